"""Others' learners on the rows that `gpu_learner` gives ours: transformers, padded, and TRL.

Forward and backward passes of micro-batches, whose gradients add up; neither makes an update.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks import gpu_sizes
from benchmarks.rivals import chosen_logprobs
from polymath_fast.learner.packing import TrainingRow
from polymath_fast.models import random_models

if TYPE_CHECKING:
    from trl import GRPOTrainer


def padded_logprobs(model: PreTrainedModel, rows: Sequence[TrainingRow]) -> Tensor:
    """(N,) log-probs of the completions' tokens by transformers' own forward pass."""
    texts = [torch.tensor([*row.prompt_ids, *row.token_ids], device=model.device) for row in rows]
    attend = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    ids = pad_sequence(texts, batch_first=True)
    logits = model(ids, attention_mask=attend, use_cache=False).logits
    start = len(rows[0].prompt_ids)
    parts = [row[start - 1 : len(t) - 1] for row, t in zip(logits, texts, strict=True)]
    targets = [text[start:] for text in texts]
    return chosen_logprobs(torch.cat(parts), torch.cat(targets))


def padded(rows: Sequence[TrainingRow]) -> Callable[[], object]:
    """Forward and backward passes as a plain loop has them, warmed up."""
    sizes = gpu_sizes.SIZES
    model = random_models.in_memory(sizes.learner_model, "bfloat16", "cuda").eval()
    at_once = sizes.rival_completions_at_once

    def run(rows: Sequence[TrainingRow]) -> None:
        for start in range(0, len(rows), at_once):
            part = rows[start : start + at_once]
            # the gradient of the loss, on policy, is that of these products
            advantages = torch.tensor([row.advantage for row in part], device="cuda")
            logprobs = padded_logprobs(model, part).view(len(part), -1)
            (logprobs * advantages[:, None]).sum().neg().backward()

    run(rows[:at_once])
    return lambda: run(rows)


def trl(rows: Sequence[TrainingRow], *, liger: bool = False) -> Callable[[], object]:
    """TRL's training steps up to its optimizer's, warmed up; with `liger` by Liger's layers."""
    sizes = gpu_sizes.SIZES
    model = random_models.in_memory(sizes.learner_model, "bfloat16", "cuda")
    steps = trl_steps(model, rows, sizes.rival_completions_at_once, liger=liger)
    steps()
    return steps


def trl_steps(
    model: PreTrainedModel, rows: Sequence[TrainingRow], at_once: int, *, liger: bool = False
) -> Callable[[], None]:
    """A call takes all rows through `GRPOTrainer.training_step`, `at_once` at a time.

    What it would have sampled is given. As fast as its documentation knows to make it where memory
    lasts: bf16 weights if the model's are, no reference model, no checkpointing of activations.
    """
    trainer = _trainer(model, rows, at_once, liger)
    exchanged = _exchanged_by_liger(trainer) if liger else {}
    prepared = trainer.accelerator.prepare(model)
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    batch = _batch(rows, model.device)
    trainer._generate_and_score_completions = lambda inputs: batch

    def run() -> None:
        with mock.patch.dict(vars(sys.modules[type(model).__module__]), exchanged):
            for _ in range(trainer.args.gradient_accumulation_steps):
                trainer.training_step(prepared, None, None)

    return run


def _exchanged_by_liger(trainer: GRPOTrainer) -> dict[str, Any]:
    """Liger's layers in its model, as `train` has them before the first step.

    Returns:
        What else Liger exchanged, in transformers' module of the architecture, where it would be
        there for all models of this process: it is put back.
    """
    from transformers.integrations.liger import apply_liger_kernel

    module = sys.modules[type(trainer.model).__module__]
    before = dict(vars(module))
    apply_liger_kernel(trainer.model, trainer.args.liger_kernel_config)
    exchanged = {name: x for name, x in vars(module).items() if x is not before[name]}
    vars(module).update(before)
    return exchanged


def _trainer(
    model: PreTrainedModel, rows: Sequence[TrainingRow], at_once: int, liger: bool
) -> GRPOTrainer:
    with _absent("vllm"):
        from trl import GRPOConfig, GRPOTrainer
    from datasets import Dataset

    with tempfile.TemporaryDirectory() as folder:
        return GRPOTrainer(
            model=model,
            reward_funcs=lambda **_: None,
            args=GRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=at_once,
                gradient_accumulation_steps=len(rows) // at_once,
                num_generations=len(rows),
                max_completion_length=max(len(row.token_ids) for row in rows),
                beta=0.0,
                bf16=model.dtype == torch.bfloat16,
                use_cpu=model.device.type == "cpu",
                gradient_checkpointing=False,
                use_liger_kernel=liger,
                report_to=[],
            ),
            train_dataset=Dataset.from_list([{"prompt": ""}]),
            processing_class=_tokenizer(),
        )


def _batch(rows: Sequence[TrainingRow], device: torch.device) -> dict[str, Any]:
    """What TRL's trainer learns from: prompts are padded on the left, completions on the right."""
    ids = partial(torch.tensor, device=device)
    completions = [ids(row.token_ids) for row in rows]
    prompts = ids([row.prompt_ids for row in rows])
    mask = pad_sequence([torch.ones_like(each) for each in completions], batch_first=True)
    return {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": pad_sequence(completions, batch_first=True),
        "completion_mask": mask,
        "advantages": ids([row.advantage for row in rows]),
        "num_items_in_batch": mask.sum(),
    }


def _tokenizer() -> PreTrainedTokenizerFast:
    """TRL's trainer wants one; no text is ever made."""
    from tokenizers import Tokenizer, models

    end = "<|endoftext|>"
    words = Tokenizer(models.WordLevel({end: 0}, unk_token=end))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=end, pad_token=end)


@contextmanager
def _absent(package: str) -> Iterator[None]:
    """Looks as if it were not installed: TRL imports vLLM, which takes longer than what is timed
    and sets torch's compiler as it likes it."""
    hidden = package not in sys.modules
    if hidden:
        sys.modules[package] = None
    try:
        yield
    finally:
        if hidden:
            del sys.modules[package]
