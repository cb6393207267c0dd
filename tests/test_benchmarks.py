"""The benchmarks' own code, as far as it runs without a GPU: names, order, checks that can fail."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import (
    ablations,
    gpu_learner,
    gpu_operators,
    gpu_sections,
    gpu_sizes,
    gpu_suite,
    run,
    weight_copies,
)
from polymath_fast import memory
from polymath_fast.kernels.prefix_attention import tiles
from polymath_fast.kernels.triton.budget import Gpu
from polymath_fast.learner import loss as losses
from polymath_fast.learner import optimizer, passes, rows
from polymath_fast.learner import step as steps
from polymath_fast.learner.taped import TapedPass
from polymath_fast.models.random_models import FAMILIES
from polymath_fast.rollout import tile_weights, transformers_engine
from polymath_fast.rollout.tape import Tape

FLAGS = {
    "fpu sse2 avx avx2": "AVX2",
    "avx2 avx512f avx512bw": "AVX512",
    "avx2 avx512f avx512_bf16": "AVX512-BF16",
    "avx2 avx512f avx512_bf16 amx_bf16 amx_tile": "AMX",
    "fpu sse2": "",
}


@pytest.mark.parametrize(("flags", "name"), FLAGS.items())
def test_processors_of_one_name_are_told_apart(
    flags: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "cpuinfo"
    # the second core must not count
    info.write_text(
        f"processor\t: 0\ncpu family\t: 25\nmodel name\t: AMD EPYC\nflags\t\t: {flags}\n\n"
        "processor\t: 1\ncpu family\t: 26\nmodel name\t: another\nflags\t\t: amx_bf16\n"
    )
    monkeypatch.setattr(run, "CPUINFO", info)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    middle = f"-{name.lower()}" if name else ""
    assert run.machine_name("cpu") == f"amd-epyc-family-25{middle}-2-threads"


def test_a_processor_that_linux_does_not_describe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "CPUINFO", Path("/nowhere"))
    assert run.machine_name("cpu").endswith("-threads")


def test_results_lie_in_the_folder_of_their_machine() -> None:
    files = sorted(run.RESULTS.glob("*/*.json"))
    assert files
    for path in files:
        found = json.loads(path.read_text())["machine"]
        name = found.get("name") or found["gpu"].removeprefix("NVIDIA ")
        assert re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") == path.parent.name


def test_what_a_section_needs_comes_before_it() -> None:
    order = list(gpu_suite.SECTIONS)
    for section, needed in gpu_suite.NEEDS.items():
        assert order.index(needed) < order.index(section)


def test_the_checks_hold_on_a_cpu() -> None:
    sizes = {"rows": 60, "head": (32, 500)}
    for found in (
        gpu_operators.correct_optimizer("cpu"),
        gpu_operators.correct_advantages("cpu"),
        gpu_operators.correct_head_logprobs("cpu", **sizes),
        gpu_learner.correct_learner("cpu"),
    ):
        assert found["values"] and "error" not in found


def test_the_checks_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    norm, advantages = gpu_operators.grad_norm, gpu_operators.group_advantages
    head = gpu_operators.linear_logprobs
    monkeypatch.setattr(gpu_operators, "grad_norm", lambda grad: 1.001 * norm(grad))
    monkeypatch.setattr(
        gpu_operators, "group_advantages", lambda *given, **how: advantages(*given, **how) + 1e-9
    )
    monkeypatch.setattr(
        gpu_operators,
        "linear_logprobs",
        lambda x, w, t, impl: head(x if impl == "reference" else x * 1.02, w, t, impl=impl),
    )
    assert "norm" in gpu_operators.correct_optimizer("cpu")["error"]
    assert "equal rewards" in gpu_operators.correct_advantages("cpu")["error"]
    found = gpu_operators.correct_head_logprobs("cpu", rows=60, head=(32, 500))
    assert "hidden gradient" in found["error"]


@pytest.mark.parametrize("wrong", ["multiplicity", "sampling_logprobs"])
def test_the_check_of_the_learner_notices(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = losses.linear_grpo_loss

    def wrong_loss(*given: object, **how: object) -> object:
        value = how["sampling_logprobs"] - 0.01 if wrong == "sampling_logprobs" else None
        return loss(*given, **(how | {wrong: value}))

    monkeypatch.setattr(losses, "linear_grpo_loss", wrong_loss)
    error = gpu_learner.correct_learner("cpu")["error"]
    assert "whole, gradient error" in error and "in parts, loss error" in error


def test_the_learner_is_timed_where_it_fits() -> None:
    """78 GiB with a tenth to spare, counted from the shapes; there is no sampler."""
    sizes = gpu_sizes.Sizes()
    config = gpu_learner.settings(sizes.completions_at_once, sizes.update)
    parts = memory.estimate(
        FAMILIES[sizes.learner_model],
        config,
        engine="transformers",
        prompt_tokens=sizes.update[0],
        device="cuda",
        gpu=Gpu(85_017_493_504, 132, "hopper"),
    )
    assert "KV cache" not in parts  # of a sampler, which needs less
    assert 40 < sum(parts.values()) < 0.9 * 78


@pytest.mark.parametrize("idea", ablations.ABLATIONS)
def test_an_idea_is_off_inside_and_on_again_behind(idea: str) -> None:
    def everything() -> dict[str, object]:
        owners = (
            rows,
            losses,
            optimizer,
            passes,
            passes.Passes,
            steps,
            tiles,
            tile_weights,
            Tape,
            TapedPass,
            transformers_engine,
            torch.nn.Module,
        )
        return {f"{o.__name__}.{name}": value for o in owners for name, value in vars(o).items()}

    before = everything()
    with ablations.switched_off(idea):
        inside = everything()
    changed = {name for name in before if inside[name] is not before[name]}
    assert changed and everything() == before


def test_a_run_on_a_gpu_needs_no_compiler_for_cpus() -> None:
    """numba is particular about numpy's version; the suite shall not be lost to that."""
    code = "import sys; sys.modules['numba'] = None; import benchmarks.gpu_suite"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 0, found.stderr


def test_a_head_may_be_off_by_what_products_of_torch_are() -> None:
    name = "64 head logprob error"
    assert "error" not in gpu_sections.gate({f"torch {name}": 1e-6, name: 1.9e-5})
    assert "error" in gpu_sections.gate({f"torch {name}": 1e-6, name: 2.1e-5})
    assert "error" not in gpu_sections.gate({f"torch {name}": 2e-5, name: 3.9e-5})
    assert "error" in gpu_sections.gate({f"torch {name}": 2e-5, name: 4.1e-5})
    assert "error" in gpu_sections.gate({"64 head logprob error": float("nan")})


def test_the_readme_says_what_was_measured() -> None:
    root = Path(__file__).parents[1]
    results = root / "benchmarks/results/amd-epyc-family-25-avx512-bf16-2-threads/end_to_end.md"
    said = " ".join((root / "README.md").read_text().split())
    for contender in ("TRL", "plain loop"):
        measured = re.search(
            rf"\* {contender} takes ([\d.]+) times as long a token", results.read_text()
        )
        assert re.search(rf"{contender}(?: takes)? {re.escape(measured[1])} times", said), contender


def test_what_travels_in_buckets_arrives() -> None:
    """A tensor that is larger than a bucket, too."""
    sources, pairs = weight_copies.tensors("tiny", torch.float32, "cpu")
    for most in (1, 5000, weight_copies.BUCKET):
        for _, target in pairs:
            target.zero_()
        weight_copies.buckets(pairs, most)()
        assert weight_copies.wrong_tensors(pairs) == 0 < len(sources)
