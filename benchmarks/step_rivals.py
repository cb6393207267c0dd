"""Others' whole steps: TRL's trainer, and a careful loop of one's own."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import Any

from benchmarks.step_job import Job, model_folder, question
from benchmarks.step_reward import boxed_or_mentioned, score


def trl(job: Job, *, vllm: bool = False) -> list[dict[str, float]]:
    """TRL's GRPOTrainer as its documentation has it, the same model, sample and reward.

    With `vllm` the engine samples in the trainer's process, with the share of the device's memory
    that TRL gives it, and room for the job's completions.
    """
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from polymath_fast.precision import choose_dtype
    from polymath_fast.samples import load_tokenizer

    batch = min(16, job.generations)
    dtype, _ = choose_dtype("auto", job.device)
    folder_of_model, sampler = model_folder(job), {}
    if vllm:
        room = len(_prompt(job, load_tokenizer(folder_of_model))) + job.length
        sampler = {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": room}
    steps: list[float] = []
    generation: list[float] = []
    syncs: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            steps.append(time.perf_counter() - self.start)

    def reward(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
        return boxed_or_mentioned([turns[0]["content"] for turns in completions], answer)

    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=str(folder_of_model),
            reward_funcs=reward,
            args=GRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=job.generations // batch,
                num_generations=job.generations,
                max_completion_length=job.length,
                max_steps=job.steps,
                learning_rate=1e-6,
                temperature=1.0,
                beta=0.0,
                bf16=dtype == "bfloat16",
                use_cpu=job.device == "cpu",
                gradient_checkpointing=False,
                report_to=[],
                save_strategy="no",
                logging_steps=1,
                disable_tqdm=True,
                model_init_kwargs={"dtype": dtype},
                **sampler,
            ),
            train_dataset=Dataset.from_list(
                [
                    {
                        "prompt": [{"role": "user", "content": question(job)}],
                        "answer": job.answer,
                    }
                ]
                * 64
            ),
            callbacks=[Clock()],
        )
        trainer._generate_and_score_completions = _timed(
            trainer._generate_and_score_completions, generation
        )
        if vllm:
            engine = trainer.vllm_generation
            engine.sync_weights = _timed(engine.sync_weights, syncs)
        trainer.train()
    lengths = [
        row["completions/mean_length"]
        for row in trainer.state.log_history
        if "completions/mean_length" in row
    ]
    found = [
        {"generate": drawn, "learn": step - drawn, "step": step, "mean_length": length}
        for step, drawn, length in zip(steps, generation, lengths, strict=True)
    ]
    for row, sync in zip(found, syncs, strict=True) if vllm else ():
        row |= {"sync": sync, "generate": row["generate"] - sync, "learn": row["learn"] + sync}
    return found


def plain(job: Job) -> list[dict[str, float]]:
    """A careful loop of one's own: vLLM samples, padded batches of transformers learn."""
    import torch
    from transformers import AutoModelForCausalLM

    from polymath_fast import environment, rollout
    from polymath_fast.precision import choose_dtype, default_dtype
    from polymath_fast.rollout.types import SamplingOptions
    from polymath_fast.samples import load_tokenizer

    environment.prepare()
    folder = model_folder(job)
    tokenizer = load_tokenizer(folder)
    ids = _prompt(job, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=default_dtype("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    engine = rollout.build_engine(
        "vllm",
        model_dir=folder,
        policy=None,
        stop_token_ids=rollout.stop_token_ids(folder, tokenizer),
        max_model_len=len(ids) + job.length,
        max_num_seqs=min(256, job.generations),
        device="cpu",
        dtype=choose_dtype("auto", "cpu")[0],
    )
    found = []
    for step in range(job.steps):
        start = time.perf_counter()
        sampling = SamplingOptions(max_completion_length=job.length, temperature=1.0, seed=step)
        completions = [list(c.token_ids) for c in engine.generate(ids, job.generations, sampling)]
        drawn = time.perf_counter()
        texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
        rewards = torch.tensor([score(text, job.answer) for text in texts])
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        tokens = sum(map(len, completions))
        for first in range(0, job.generations, 16):
            some = completions[first : first + 16]
            _padded_loss(model, ids, some, advantages[first : first + 16], tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        engine.weights.push(model.named_parameters(remove_duplicate=False), step + 1)
        end = time.perf_counter()
        found.append(
            {
                "generate": drawn - start,
                "learn": end - drawn,
                "step": end - start,
                "mean_length": tokens / job.generations,
            }
        )
    engine.close()
    return found


def _prompt(job: Job, tokenizer: Any) -> list[int]:
    turns = [{"role": "user", "content": question(job)}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False).input_ids


def _padded_loss(model: Any, prompt: list[int], completions: Any, advantages: Any, tokens: int):
    """Policy-gradient loss of right-padded rows; logits of the completions only."""
    import torch

    longest = max(map(len, completions))
    ids = torch.zeros(len(completions), len(prompt) + longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, completion in enumerate(completions):
        whole = torch.tensor(prompt + completion)
        ids[row, : len(whole)], mask[row, : len(whole)] = whole, 1
    out = model(input_ids=ids, attention_mask=mask, logits_to_keep=longest + 1)
    targets = ids[:, len(prompt) :]
    logprobs = -torch.nn.functional.cross_entropy(
        out.logits[:, :-1].float().transpose(1, 2), targets, reduction="none"
    )
    return -(logprobs * advantages[:, None] * mask[:, len(prompt) :]).sum() / tokens


def _timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        seconds.append(time.perf_counter() - start)
        return result

    return call
