"""The data of a rollout: what a sampler returns and what the learner reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from polymath_fast.rollout.tape import Recorded
    from polymath_fast.samples import Sample


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are drawn. Truncating samplers (top-p, top-k) are left out on purpose: they change
    the distribution that the importance ratio is measured against."""

    max_completion_length: int
    """tokens per completion, end-of-sequence included"""
    temperature: float = 1.0
    """0 is greedy decoding; log-probs are those of the temperature-scaled distribution"""
    stop_repetition: int = 0
    """end a completion whose last tokens are one pattern that many times in a row; 0 never does"""
    repetition_period: int = 16
    """tokens of such a pattern at most"""
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
    """"stop" (an end token was sampled), "length" (cut at max_completion_length), "repetition" (cut
    by stop_repetition) or "aborted" (not needed any more, see `Request.needed`)"""
    weight_version: int
    """number of optimizer updates the sampling weights had seen when the last token was drawn"""
    version_spans: tuple[tuple[int, int], ...] = ()
    """`spans` when there are several, else ()"""
    rank: int = 0
    """of the process that drew it, and learns from it"""
    recorded: Recorded | None = field(default=None, compare=False, repr=False)
    """where the sampler's forward pass over these tokens is kept, if it is"""

    @property
    def truncated(self) -> bool:
        """Whether it was cut: it did not end by itself."""
        return self.finish_reason != "stop"

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """(weight version, index of its first token) of each stretch that one version drew."""
        return self.version_spans or ((self.weight_version, 0),)

    @property
    def tokens_by_version(self) -> list[tuple[int, int]]:
        """(weight version, tokens that it drew) of each stretch."""
        ends = [start for _, start in self.spans[1:]] + [len(self.token_ids)]
        return [(v, end - start) for (v, start), end in zip(self.spans, ends, strict=True)]

    def extended(self, more: Completion) -> Completion:
        """This aborted completion and what was drawn after it, as one."""
        spans = self.spans
        if more.token_ids and more.weight_version != self.weight_version:
            spans = (*spans, (more.weight_version, len(self.token_ids)))
        return replace(
            more,
            token_ids=[*self.token_ids, *more.token_ids],
            sampling_logprobs=[*self.sampling_logprobs, *more.sampling_logprobs],
            weight_version=spans[-1][0],
            version_spans=spans if len(spans) > 1 else (),
            recorded=None,  # what came before was computed by another pass, or by other weights
        )


@dataclass(frozen=True, kw_only=True)
class Request:
    """Completions that are asked of an engine, all of one prompt."""

    prompt_ids: Sequence[int]
    n: int
    """how many"""
    needed: int | None = None
    """as soon as that many have finished, the others are aborted; None = all are needed"""
    begun: Sequence[Completion] = ()
    """aborted completions of this prompt, at most n, which the first of the n go on from"""


class Drawn(NamedTuple):
    """One completion of a stream of them."""

    request: int
    """index of its request"""
    index: int
    """from 0 to n - 1"""
    completion: Completion


@dataclass(kw_only=True)
class Group:
    """One prompt and the completions that are compared with each other."""

    sample: Sample
    completions: list[Completion]
    dropped: list[Completion] = field(default_factory=list)
    """completions that were asked for but are not needed: aborted, or finished too late"""
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
