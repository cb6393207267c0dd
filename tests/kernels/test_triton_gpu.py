"""The Triton implementations on a GPU: real tiles, and what an interpreter cannot show."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from triton_checks import compare, logprobs_result, loss_result, make_batch, make_head, make_logits

from polymath_fast.kernels import (
    PolicyLossSpec,
    grpo_loss,
    linear_grpo_loss,
    token_logprobs,
    verify_targets,
)
from polymath_fast.kernels.triton import head

pytestmark = pytest.mark.gpu
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)


def upstream(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(1)
    return torch.randn(2, count, device="cuda", generator=generator).unbind()


@DTYPES
@pytest.mark.parametrize(("count", "vocab"), [(1, 1000), (63, 49152), (507, 1000), (129, 151936)])
def test_logprobs_of_logits(count: int, vocab: int, dtype: torch.dtype) -> None:
    g, g_entropy = upstream(count)
    compare(
        lambda name, tensors: logprobs_result("token_logprobs", name, tensors, g, g_entropy),
        make_logits(count, vocab, dtype, "cuda"),
        dtype,
    )


@DTYPES
@pytest.mark.parametrize(
    ("count", "vocab", "depth", "bias"),
    [
        (1, 1000, 64, False),
        (507, 1000, 96, True),
        (130, 50257, 127, False),
        (300, 49152, 576, True),
    ],
)
def test_logprobs_of_a_head(
    count: int, vocab: int, depth: int, bias: bool, dtype: torch.dtype
) -> None:
    g, g_entropy = upstream(count)
    compare(
        lambda name, tensors: logprobs_result("linear_logprobs", name, tensors, g, g_entropy),
        make_head(count, vocab, depth, dtype, "cuda", bias),
        dtype,
    )


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        (PolicyLossSpec(), ()),
        (PolicyLossSpec(entropy_coef=0.1, temperature=0.7), ()),
        (PolicyLossSpec(loss_type="grpo", beta=0.1), ("old_logprobs", "ref_logprobs")),
        (PolicyLossSpec(loss_type="gspo"), ("old_logprobs",)),
        (PolicyLossSpec(top_entropy_quantile=0.5), ("old_logprobs",)),
    ],
    ids=["on-policy", "entropy-bonus", "kl", "sequence-ratio", "whole-batch"],
)
@pytest.mark.parametrize("op", ["grpo_loss", "linear_grpo_loss"])
def test_losses(op: str, spec: PolicyLossSpec, names: tuple[str, ...]) -> None:
    batch = make_batch(300, "cuda", *names)
    if op == "grpo_loss":
        tensors = make_logits(300, 20000, BF16, "cuda")
    else:
        tensors = make_head(300, 20000, 128, BF16, "cuda")
    compare(lambda name, given: loss_result(op, name, given, batch, spec), tensors, BF16)


def test_nan_survives_every_clamp() -> None:
    """The interpreter's maximum always keeps NaN, a GPU's only when it is told to."""
    logits = make_logits(8, 5000, FP32, "cuda")["logits"]
    targets = torch.zeros(8, dtype=torch.long, device="cuda")
    logits[1, 4999], logits[2, 3] = torch.nan, torch.inf
    logprobs, entropy = token_logprobs(logits, targets, impl="triton")
    assert logprobs[1:3].isnan().all() and entropy[1:3].isnan().all()
    assert logprobs[[0, 3, 4, 5, 6, 7]].isfinite().all()


@pytest.mark.parametrize("op", ["token_logprobs", "linear_grpo_loss"])
def test_a_target_outside_is_raised_by_the_next_call(op: str) -> None:
    tensors = make_head(40, 3000, 64, BF16, "cuda")
    hidden, weight, targets = (tensors[name] for name in ("hidden", "weight", "targets"))

    def run(targets: torch.Tensor) -> None:
        if op == "token_logprobs":
            token_logprobs(hidden @ weight.T, targets, impl="triton")
        else:
            linear_grpo_loss(hidden, weight, targets, *_batch(40), impl="triton")

    wrong = targets.clone()
    wrong[17] = -100
    run(wrong)
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match=r"targets\[17\] was -100 .*outside \[0, 3000\)"):
        run(targets)
    run(wrong)
    with pytest.raises(ValueError, match="outside"):
        verify_targets("cuda")
    run(targets)
    verify_targets("cuda")


@pytest.mark.parametrize("keep", [True, False], ids=["stored", "sums-alone"])
def test_a_persistent_product_has_the_same_bits(keep: bool) -> None:
    tensors = make_head(1500, 50_000, 192, BF16, "cuda", bias=True)
    given = [tensors[name] for name in ("hidden", "weight", "bias", "targets")]
    index = torch.arange(1500, device="cuda")
    live = torch.full((1,), 1500, dtype=torch.int32, device="cuda") if keep else None
    found = []
    for persistent in (False, True):
        one = head.Head(*given, 0.7)
        one.tiles = replace(one.tiles, persistent=persistent)
        chunk = one.chunk(index, slice(0, 1500), live)
        found.append([chunk.found, chunk.exps if keep else chunk.found])
    for plain, ours in zip(*found, strict=True):
        assert torch.equal(plain, ours)


@pytest.mark.parametrize("cuts", [[1, 20, 40], [0, 30, 20], [0, 20, 10**6], [0, 20, 39]], ids=str)
def test_offsets_that_do_not_fit_are_told_to_the_host(cuts: list[int]) -> None:
    """Without an access outside of memory; calls after it work."""
    tensors = make_head(40, 3000, 64, BF16, "cuda")
    leaves = [tensors[name].requires_grad_() for name in ("hidden", "weight")]
    advantages = torch.tensor([1.0, -1.0], device="cuda")
    for spec in (PolicyLossSpec(), PolicyLossSpec(loss_type="gspo")):
        given = (*leaves, tensors["targets"], advantages)
        offsets = torch.tensor(cuts, dtype=torch.int32, device="cuda")
        out = linear_grpo_loss(*given, offsets, spec=spec, impl="triton")
        gradients = torch.autograd.grad(out.loss, leaves)
        assert out.loss.isnan() and out.logprobs.isfinite().all()
        assert all((gradient == 0).all() for gradient in gradients)
        with pytest.raises(ValueError, match="from 0 to the 40 tokens"):
            verify_targets("cuda")
        good = torch.tensor([0, 20, 40], dtype=torch.int32, device="cuda")
        assert linear_grpo_loss(*given, good, spec=spec, impl="triton").loss.isfinite()


@pytest.mark.parametrize("vocab_tol", [0.0, "auto"])
def test_nothing_waits_for_the_device(vocab_tol: float | str) -> None:
    spec = PolicyLossSpec(loss_type="gspo", entropy_coef=0.01, top_entropy_quantile=0.5)
    tensors = make_head(300, 20000, 128, BF16, "cuda")
    leaves = [tensors[name].requires_grad_() for name in ("hidden", "weight")]
    inputs = (*leaves, tensors["targets"], *_batch(300))
    mask = torch.arange(300, device="cuda") % 3 != 0
    for mode in ("default", "error"):  # the first round compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            out = linear_grpo_loss(
                *inputs, mask=mask, spec=spec, vocab_tol=vocab_tol, impl="triton"
            )
            out.loss.backward()
            token_logprobs(leaves[0].detach() @ leaves[1].detach().T, inputs[2], impl="triton")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


def test_a_step_in_a_cuda_graph() -> None:
    tensors = make_head(300, 3000, 128, BF16, "cuda")
    leaves = [tensors[name].requires_grad_() for name in ("hidden", "weight")]
    mask = torch.arange(300, device="cuda") % 3 != 0

    def step() -> list[torch.Tensor]:
        out = linear_grpo_loss(*leaves, tensors["targets"], *_batch_held, mask=mask, impl="triton")
        return [out.loss.detach(), *torch.autograd.grad(out.loss, leaves)]

    _batch_held = _batch(300)
    expected = step()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_two_runs_are_bit_equal() -> None:
    tensors = make_head(700, 30000, 256, BF16, "cuda")
    runs = []
    for _ in range(2):
        leaves = [tensors[name].clone().requires_grad_() for name in ("hidden", "weight")]
        out = linear_grpo_loss(*leaves, tensors["targets"], *_batch(700), impl="triton")
        out.loss.backward()
        runs.append([out.loss.detach(), out.logprobs, *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_new_lengths_do_not_compile() -> None:
    from polymath_fast.kernels.triton import head_kernels, row_kernels

    kernels = [
        row_kernels.fused_kernel,
        row_kernels.statistics_kernel,
        head_kernels.exp_gemm_kernel,
        head_kernels.finish_kernel,
    ]
    compiled = []
    for count in (33, 64, 257, 1):
        tensors = make_head(count, 3000, 64, BF16, "cuda")
        leaves = [tensors[name].requires_grad_() for name in ("hidden", "weight")]
        linear_grpo_loss(*leaves, tensors["targets"], *_batch(count), impl="triton").loss.backward()
        logits = make_logits(count, 3000, BF16, "cuda")["logits"].requires_grad_()
        grpo_loss(logits, tensors["targets"], *_batch(count), impl="triton").loss.backward()
        token_logprobs(logits.detach(), tensors["targets"], impl="triton")
        caches = [cache[0] for kernel in kernels for cache in kernel.device_caches.values()]
        compiled.append(sum(len(cache) for cache in caches))
    assert len(set(compiled)) == 1


@pytest.mark.slow
def test_more_than_two_to_the_31_logits() -> None:
    count, vocab = 17_000, 151_936
    logits = torch.empty(count, vocab, dtype=BF16, device="cuda").normal_()
    targets = torch.randint(vocab, (count,), device="cuda")
    logprobs, _ = token_logprobs(logits, targets, impl="triton")
    exact = logits[-3:].double().log_softmax(-1).gather(1, targets[-3:, None])[:, 0]
    torch.testing.assert_close(logprobs[-3:].double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("op", ["token_logprobs", "linear_grpo_loss"])
def test_under_torch_compile(op: str) -> None:
    tensors = make_head(60, 3000, 64, BF16, "cuda")
    hidden, weight, targets = (tensors[name] for name in ("hidden", "weight", "targets"))

    def run(states: torch.Tensor) -> torch.Tensor:
        if op == "token_logprobs":
            return token_logprobs(states @ weight.T, targets, impl="triton")[0].sum()
        return linear_grpo_loss(states, weight, targets, *_batch(60), impl="triton").loss

    gradients = []
    for function in (run, torch.compile(run)):
        leaf = hidden.detach().clone().requires_grad_()
        function(leaf).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def _batch(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    ends = torch.tensor([0, count // 2, count], dtype=torch.int32, device="cuda")
    return torch.tensor([1.0, -0.7], device="cuda"), ends
