"""The ideas of a step, each with a switch that turns it off: what it is worth is measured so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

from torch import nn


class _Alone(tuple):
    """The tokens of a prompt that is the same as no other one."""

    __eq__, __hash__ = object.__eq__, object.__hash__


def _prompt_repeated(stack: ExitStack) -> None:
    """Every completion brings its own copy of the prompt, and so shares nothing in the learner."""
    from polymath_fast.learner import rows

    training_rows = rows.training_rows

    def apart(*args, **kwargs):
        found = training_rows(*args, **kwargs)
        return [replace(row, prompt_ids=_Alone(row.prompt_ids)) for row in found]

    stack.enter_context(mock.patch.object(rows, "training_rows", apart))


def _own_forward_pass(stack: ExitStack) -> None:
    """The learner computes again what the sampler has computed."""
    from polymath_fast.rollout.tape import Tape

    stack.enter_context(mock.patch.object(Tape, "start_step", Tape.end_step))


def _own_logits(stack: ExitStack) -> None:
    """The learner computes the logits again from which the sampler drew."""
    from polymath_fast.learner.taped import TapedPass

    stack.enter_context(mock.patch.object(TapedPass, "_predicts", lambda *_: False))


def _torch_attention(stack: ExitStack) -> None:
    """torch's flash-attention pieces instead of compiled tiles, which a tape needs."""
    from polymath_fast.kernels.prefix_attention import tiles

    _own_forward_pass(stack)
    stack.enter_context(mock.patch.object(tiles, "fits", lambda *_: False))


def _modules(stack: ExitStack) -> None:
    """transformers' own decoder layers instead of fused ones, in the learner and the sampler, which
    then fills no tape."""
    _module_decoding(stack)
    original = nn.Module.__call__

    def call(module: nn.Module, *args, **kwargs):
        module.__dict__.pop("forward", None)
        return original(module, *args, **kwargs)

    stack.enter_context(mock.patch.object(nn.Module, "__call__", call))


def _module_decoding(stack: ExitStack) -> None:
    """The sampler decodes through transformers' modules, which fill no tape."""
    from polymath_fast.rollout import tile_weights

    stack.enter_context(mock.patch.object(tile_weights, "fits", lambda *_: False))


def _whole_logits(stack: ExitStack) -> None:
    """The LM head as its reference has it: all logits, in float32."""
    from polymath_fast.learner import loss as losses

    _own_logits(stack)
    loss = losses.linear_grpo_loss

    def plain(*args, **kwargs):
        return loss(*args, impl="reference", **kwargs)

    stack.enter_context(mock.patch.object(losses, "linear_grpo_loss", plain))


def _old_logprobs(stack: ExitStack) -> None:
    """A pass for the log-probs before the update, as every trainer with ratios takes it."""
    from polymath_fast.learner.passes import Passes

    learn = Passes.learn

    def twice(passes, rows, *args):
        return learn(passes, passes.with_logprobs(rows, "old_logprobs"), *args)

    stack.enter_context(mock.patch.object(Passes, "learn", twice))


def _many_passes(stack: ExitStack) -> None:
    """AdamW as torch's operations have it, each of which reads and writes the whole state."""
    from polymath_fast.learner import optimizer

    plain = partial(optimizer.flat_adamw, impl="reference")
    stack.enter_context(mock.patch.object(optimizer, "flat_adamw", plain))


def _duplicates(stack: ExitStack) -> None:
    """Identical completions are computed as often as they were drawn."""
    from polymath_fast.learner import passes

    stack.enter_context(mock.patch.object(passes, "merge_duplicates", list))


def _every_row(stack: ExitStack) -> None:
    """Completions that the loss has no coefficient for go through the model like any other.

    They are those of groups whose rewards agree, and with --mask-truncated-completions those that
    were cut off; the LM head leaves them out all the same. One group with a graded reward has none
    of them, so the standard step would show nothing. Of pairs with a reward of 0 or 1 at least half
    agree, whatever the policy, as larger groups do where it fails or succeeds nearly always.
    """
    from polymath_fast.learner import step

    def everything(rows, _):
        return [row if row.trained else replace(row, trained=True, advantage=0.0) for row in rows]

    stack.enter_context(mock.patch.object(step, "with_influence", everything))


def _no_tree(stack: ExitStack) -> None:
    """Completions that begin alike compute their beginnings each for itself."""
    from polymath_fast.learner import passes

    stack.enter_context(mock.patch.object(passes, "plan", lambda *_: None))


def _rows_apart(stack: ExitStack) -> None:
    """The sampler computes every completion in a row of its own from its first token on."""
    from polymath_fast.rollout import transformers_engine

    branches = transformers_engine.Branches

    def apart(prefixes, **_):
        return branches(prefixes, apart=True)

    stack.enter_context(mock.patch.object(transformers_engine, "Branches", apart))


ABLATIONS: dict[str, Callable[[ExitStack], None]] = {
    "prompt once": _prompt_repeated,
    "the sampler's forward pass": _own_forward_pass,
    "the sampler's softmax": _own_logits,
    "attention in tiles": _torch_attention,
    "fused layers": _modules,
    "decoding in tiles": _module_decoding,
    "logits never stored": _whole_logits,
    "no old-log-prob pass": _old_logprobs,
    "AdamW in one pass": _many_passes,
    "duplicates once": _duplicates,
    "no row without influence": _every_row,
    "common beginnings learned once": _no_tree,
    "common beginnings sampled once": _rows_apart,
}

SETTINGS: dict[str, dict[str, Any]] = {
    "no row without influence": {"groups": 32, "generations": 2, "reward": "mentioned"},
}
"""of jobs where an idea has something to do; the others have the standard one"""


@contextmanager
def switched_off(name: str | None) -> Iterator[None]:
    """Run the block without the idea called `name` (None: with all of them)."""
    with ExitStack() as stack:
        if name is not None:
            ABLATIONS[name](stack)
        yield
