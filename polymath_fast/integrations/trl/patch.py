"""`patch_trl()`: TRL's trainers score tokens with our kernels; undone by its handle."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import trl.trainer.utils as trl_utils

from polymath_fast.integrations.rebinding import Patch, check_replaceable, ours
from polymath_fast.kernels import linear_logprobs, token_logprobs

_PARAMETERS = {
    "selective_log_softmax": "logits index temperature row_mask",
    "entropy_from_logits": "logits chunk_size",
    "selective_log_softmax_and_entropy": (
        "logits index entropy_requires_grad temperature row_mask"
    ),
}
_HEAD = "_ChunkedLogProbFunction"
_HEAD_PARAMETERS = (
    "ctx hidden weight bias targets temperature chunk_size final_logit_softcapping logit_scale "
    "outputs"
)
_ONLY_TRL = ("log_sum_sq_probs", "mean_logits", "is_top1")


def patch_trl() -> Patch:
    """Put our kernels in the place of the functions that TRL's trainers score tokens with.

    The chunked LM head behind `add_fused_lm_head` (GRPO, RLOO, reference models of DPO and KTO)
    becomes `linear_logprobs`; `selective_log_softmax`, `entropy_from_logits` and
    `selective_log_softmax_and_entropy` become `token_logprobs`, with fp32 results. A call that
    those do not cover (softcapped logits, several indices a row, and the mean logits or top tokens
    that the policies of SFT, DPO and KTO ask for) stays with TRL and warns once.

    Returns:
        A handle: `handle.undo()`, or `with patch_trl(): ...`.

    Raises:
        UserError: patched already, or a TRL whose functions take other arguments.
    """
    theirs = {
        name: check_replaceable(trl_utils, name, parameters.split())
        for name, parameters in _PARAMETERS.items()
    }
    head = check_replaceable(trl_utils, _HEAD, _HEAD_PARAMETERS.split(), lambda cls: cls.forward)
    replacements = {
        "selective_log_softmax": _selective_log_softmax,
        "entropy_from_logits": _entropy_from_logits,
        "selective_log_softmax_and_entropy": _selective_log_softmax_and_entropy,
    }
    pairs = {function: ours(replacements[name](function)) for name, function in theirs.items()}
    return Patch("trl", {**pairs, head: ours(_chunked_logprob(head))})


def _selective_log_softmax(theirs: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(theirs)
    def selective_log_softmax(logits, index, temperature=1.0, row_mask=None):
        if index.shape != logits.shape[:-1]:
            _stays("selective_log_softmax with several indices a row")
            return theirs(logits, index, temperature, row_mask)
        return _rows(logits, index, temperature, row_mask)[0]

    return selective_log_softmax


def _selective_log_softmax_and_entropy(theirs: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def selective_log_softmax_and_entropy(
        logits, index, entropy_requires_grad=True, temperature=1.0, row_mask=None
    ):
        logprobs, entropy = _rows(logits, index, temperature, row_mask)
        return logprobs, entropy if entropy_requires_grad else entropy.detach()

    return selective_log_softmax_and_entropy


def _entropy_from_logits(theirs: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(theirs)
    def entropy_from_logits(logits, chunk_size=128):
        index = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
        return _rows(logits, index, 1.0, None)[1]

    return entropy_from_logits


def _rows(
    logits: torch.Tensor, index: torch.Tensor, temperature: float, row_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`logits` (..., V), `index` (...): log-probs and entropies (...), 0 where `row_mask` is 0."""
    kept = torch.ones_like(index, dtype=torch.bool) if row_mask is None else row_mask != 0
    targets = torch.where(kept, index, 0).reshape(-1)  # skipped rows may hold any index
    found = token_logprobs(logits.reshape(-1, logits.shape[-1]), targets, temperature=temperature)
    logprobs, entropy = (x.reshape(index.shape).masked_fill(~kept, 0.0) for x in found)
    return logprobs, entropy


def _chunked_logprob(theirs: type[torch.autograd.Function]) -> type:
    class ChunkedLogProb:
        """Has the `apply` of TRL's ChunkedLogProbFunction."""

        @staticmethod
        def apply(
            hidden,
            weight,
            bias,
            targets,
            temperature,
            chunk_size,
            final_logit_softcapping=None,
            logit_scale=1.0,
            outputs=("entropy", *_ONLY_TRL),
        ):
            reason = _uncovered(weight, final_logit_softcapping, logit_scale, outputs)
            if reason is not None:
                _stays(f"an LM head with {reason}")
                options = (final_logit_softcapping, logit_scale, outputs)
                return theirs.apply(
                    hidden, weight, bias, targets, temperature, chunk_size, *options
                )
            logprobs, entropy = linear_logprobs(
                hidden,
                weight.to(hidden.dtype),
                targets,
                bias=None if bias is None else bias.to(hidden.dtype),
                temperature=temperature / logit_scale,
            )
            return logprobs, entropy if "entropy" in outputs else None, None, None, None

    return ChunkedLogProb


def _uncovered(
    weight: torch.Tensor, softcap: float | None, logit_scale: float, outputs: tuple[str, ...]
) -> str | None:
    """What `linear_logprobs` lacks for a call of TRL's head; None where it lacks nothing."""
    if softcap is not None:
        return "softcapped logits"
    if logit_scale <= 0:
        return f"logits scaled by {logit_scale}"
    if hasattr(weight, "ds_id"):
        return "weights that DeepSpeed shards"
    others = [name for name in _ONLY_TRL if name in outputs]
    return " and ".join(others) or None


@functools.cache
def _stays(what: str) -> None:
    warnings.warn(f"patch_trl(): {what} is computed by TRL's own code", stacklevel=4)
