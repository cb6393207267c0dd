"""One contender of the whole-step benchmark in a process of its own: prints one line of JSON.

python -m benchmarks.step_workers NAME JSON_OF_THE_JOB; `end_to_end` and `vllm_step` run this.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks.step_job import Job, question
from benchmarks.step_rivals import plain, trl

SMALL = {"offload_optimizer": True, "tape_gib": 0, "tokens_per_microbatch": 1024}
"""settings that take little memory, short of gradient checkpointing"""


def ours(job: Job, engine: str, **settings: Any) -> list[dict[str, float]]:
    """polymath_fast's own training step with everything around it."""
    from benchmarks.ablations import switched_off
    from polymath_fast import train
    from polymath_fast.config import Config
    from polymath_fast.run import assembly

    with tempfile.TemporaryDirectory() as folder:
        config = Config(
            model=job.model,
            device=job.device,
            question=question(job),
            answer=job.answer,
            instruction="",
            engine=engine,
            num_generations=job.generations,
            groups_per_step=job.groups,
            max_completion_length=job.length,
            temperature=1.0,
            reward=(f"{Path(__file__).with_name('step_reward.py')}:{job.reward}",),
            learning_rate=1e-6,
            eval_dataset=(),
            max_steps=job.steps,
            output_dir=folder,
            **settings,
        )
        found = []
        with assembly.build(config) as parts, switched_off(job.without):
            if job.full_length:
                parts.engine.stop_token_ids = frozenset()
            for step in range(1, job.steps + 1):
                metrics = train.train_step(config, parts, step)
                found.append(
                    {
                        "generate": metrics["time/generate"],
                        "learn": metrics["time/learn"] + metrics["time/sync"],
                        "sync": metrics["time/sync"],
                        "step": metrics["time/step"],
                        "mean_length": metrics["completion/mean_length"],
                        "prompt": len(parts.inputs.samples[0].prompt_ids),
                        "reward": metrics["reward/mean"],
                        "skipped": metrics["update/skipped"],
                    }
                )
    return found


CONTENDERS: dict[str, Callable[[Job], list[dict[str, float]]]] = {
    "ours": lambda job: ours(job, "transformers"),
    "ours, vLLM": lambda job: ours(job, "vllm"),
    "ours, small": lambda job: ours(job, "transformers", **SMALL),
    "TRL": trl,
    "plain loop": plain,
}
ON_A_GPU: dict[str, Callable[[Job], list[dict[str, float]]]] = {
    "ours, vLLM": CONTENDERS["ours, vLLM"],
    "TRL, vLLM": partial(trl, vllm=True),
}
"""likewise, for `vllm_step`"""


def main() -> int:
    """Run the contender and print what it measured."""
    from polymath_fast import environment

    environment.prepare()  # before torch: it sets how threads wait
    import torch

    contenders = CONTENDERS | ON_A_GPU
    if len(sys.argv) != 3 or sys.argv[1] not in contenders:
        print(f"{__doc__}\nNAME is one of: {', '.join(contenders)}")
        return 2
    name, text = sys.argv[1:]
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    job = Job(**json.loads(text))
    result = {"job": asdict(job), "steps": contenders[name](job)}
    if job.device == "cuda":  # an engine in this process takes its memory from torch, too
        result["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    print("RESULT " + json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
