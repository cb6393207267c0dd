"""The data of a rollout: what a sampler returns and what the learner reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from polymath_fast.samples import Sample


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are drawn. Truncating samplers (top-p, top-k) are left out on purpose: they change
    the distribution that the importance ratio is measured against."""

    max_completion_length: int
    """tokens per completion, end-of-sequence included"""
    temperature: float = 1.0
    """0 is greedy decoding; log-probs are those of the temperature-scaled distribution"""
    seed: int = 0
    """the same seed, weights and engine on the same machine draw the same tokens"""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One sampled answer. Token ids are the truth; text is derived from them, never the reverse."""

    token_ids: Sequence[int]
    """(length,) ids, the end-of-sequence token included when it was sampled"""
    sampling_logprobs: Sequence[float]
    """(length,) log-probs of those ids under the sampler, temperature applied"""
    finish_reason: str
    """"stop" (an end token was sampled) or "length" (cut at max_completion_length)"""
    weight_version: int
    """number of optimizer updates the sampling weights had seen"""


@dataclass(kw_only=True)
class Group:
    """One prompt and the completions that are compared with each other."""

    sample: Sample
    completions: list[Completion]
    texts: list[str] = field(default_factory=list)
    rewards: list[float | None] = field(default_factory=list)
    """total reward per completion; None = excluded from the update"""


@dataclass(kw_only=True)
class RolloutBatch:
    """All groups of one step."""

    groups: list[Group]

    @property
    def completions(self) -> list[Completion]:
        """Completions of all groups, in group order."""
        return [completion for group in self.groups for completion in group.completions]

    @property
    def num_tokens(self) -> int:
        """Completion tokens in the batch."""
        return sum(len(completion.token_ids) for completion in self.completions)
