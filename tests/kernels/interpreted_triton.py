"""The Triton implementations in Triton's interpreter; `test_triton_interpreter.py` runs this file.

Small tiles, so that awkward shapes have whole tiles, tails and more than one of each.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from closeness import relative_error
from interpreter import hurry
from no_sync import NoSync, outside
from triton_checks import (
    ROUNDING,
    compare,
    logprobs_result,
    loss_result,
    make_batch,
    make_head,
    make_logits,
)
from weight_sync_cases import PAIRS, check, layouts

from polymath_fast.kernels import scratch
from polymath_fast.kernels.faults import verify_targets
from polymath_fast.kernels.group_advantages import _triton as triton_advantages
from polymath_fast.kernels.group_advantages import reference as advantages
from polymath_fast.kernels.grpo_loss._triton import grpo_loss
from polymath_fast.kernels.linear_grpo_loss._triton import linear_grpo_loss
from polymath_fast.kernels.linear_logprobs._triton import gradients as head_gradients
from polymath_fast.kernels.linear_logprobs._triton import linear_logprobs
from polymath_fast.kernels.policy_loss import PolicyLossSpec, input_checks, prepare
from polymath_fast.kernels.token_logprobs._triton import gradient as token_gradient
from polymath_fast.kernels.token_logprobs._triton import token_logprobs
from polymath_fast.kernels.triton import budget, head, head_gradient, offsets, vocabulary
from polymath_fast.kernels.triton.coefficients import known_beforehand
from polymath_fast.kernels.weight_sync import _triton as triton_sync

hurry()

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

LOGITS = [
    pytest.param(1, 1000, BF16, id="one-row"),
    pytest.param(63, 1000, FP32, id="tail-only"),
    pytest.param(507, 1000, FP16, id="many-rows"),
    pytest.param(5, 49152, BF16, id="whole-tiles"),
    pytest.param(2, 151936, BF16, id="tiles-and-tail"),
]
HEADS = [
    pytest.param(1, 1000, 48, BF16, False, id="one-row"),
    pytest.param(63, 1000, 47, BF16, True, id="odd-depth"),
    pytest.param(130, 1000, 64, BF16, False, id="many-rows"),
    pytest.param(21, 1000, 48, FP16, True, id="half"),
    pytest.param(21, 1000, 48, FP32, False, id="single"),
    pytest.param(20, 49152, 32, BF16, False, id="many-tiles"),
    pytest.param(1, 151936, 16, BF16, False, id="large-vocabulary"),
]
SPECS = [
    pytest.param(PolicyLossSpec(), (), id="on-policy"),
    pytest.param(PolicyLossSpec(entropy_coef=0.1, temperature=0.7), (), id="entropy-bonus"),
    pytest.param(
        PolicyLossSpec(loss_type="grpo", beta=0.1), ("old_logprobs", "ref_logprobs"), id="kl"
    ),
    pytest.param(PolicyLossSpec(loss_type="gspo"), ("old_logprobs",), id="sequence-ratio"),
    pytest.param(PolicyLossSpec(loss_type="gspo"), (), id="sequence-ratio-on-policy"),
    pytest.param(PolicyLossSpec(top_entropy_quantile=0.5), ("old_logprobs",), id="whole-batch"),
    pytest.param(PolicyLossSpec(loss_type="sapo"), ("old_logprobs",), id="sapo"),
]


def upstream(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, count, generator=torch.Generator().manual_seed(1)).unbind()


@pytest.mark.parametrize(("count", "vocab", "dtype"), LOGITS)
def test_rows_logprobs(count, vocab, dtype) -> None:
    g, g_entropy = upstream(count)
    compare(
        lambda name, tensors: logprobs_result("token_logprobs", name, tensors, g, g_entropy),
        make_logits(count, vocab, dtype, "cpu"),
        dtype,
    )


def test_rows_gradient_of_the_logprobs_alone() -> None:
    g, _ = upstream(20)
    compare(
        lambda name, tensors: logprobs_result("token_logprobs", name, tensors, g, None),
        make_logits(20, 5000, BF16, "cpu"),
        BF16,
    )


@pytest.mark.parametrize(("spec", "names"), SPECS)
def test_rows_loss(spec, names) -> None:
    batch = make_batch(21, "cpu", *names)
    compare(
        lambda name, tensors: loss_result("grpo_loss", name, tensors, batch, spec),
        make_logits(21, 1000, BF16, "cpu"),
        BF16,
    )


@pytest.mark.parametrize(("count", "vocab", "depth", "dtype", "bias"), HEADS)
def test_head_logprobs(count, vocab, depth, dtype, bias) -> None:
    g, g_entropy = upstream(count)
    compare(
        lambda name, tensors: logprobs_result("linear_logprobs", name, tensors, g, g_entropy),
        make_head(count, vocab, depth, dtype, "cpu", bias),
        dtype,
    )


def test_head_logprobs_without_gradient() -> None:
    tensors = make_head(507, 1000, 64, BF16, "cpu")
    given = (tensors["hidden"], tensors["weight"], tensors["targets"])
    logprobs, entropy = linear_logprobs(*given, None, 1.0)
    exact = (given[0].double() @ given[1].double().T).log_softmax(-1)
    chosen = exact.gather(-1, given[2][:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), chosen, rtol=1e-6, atol=1e-5)
    truth = -(exact.exp() * exact).sum(-1)
    torch.testing.assert_close(entropy.double(), truth, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(("spec", "names"), SPECS)
def test_head_loss(spec, names, monkeypatch) -> None:
    monkeypatch.setattr(head.Head, "_rows_that_fit", lambda self: 16)
    batch = make_batch(37, "cpu", *names)
    compare(
        lambda name, tensors: loss_result("linear_grpo_loss", name, tensors, batch, spec),
        make_head(37, 1000, 48, BF16, "cpu", bias=True),
        BF16,
    )


def test_head_loss_with_multiplicity() -> None:
    times = {"multiplicity": torch.tensor([2.0, 1.0, 3.0, 1.0])}
    compare(
        lambda name, tensors: loss_result(
            "linear_grpo_loss", name, tensors, make_batch(21, "cpu") | times, PolicyLossSpec()
        ),
        make_head(21, 1000, 48, BF16, "cpu"),
        BF16,
    )


def test_head_loss_of_one_chunk() -> None:
    batch = make_batch(63, "cpu", "old_logprobs")
    spec = PolicyLossSpec(loss_type="cispo", epsilon_high=5.0)
    compare(
        lambda name, tensors: loss_result("linear_grpo_loss", name, tensors, batch, spec),
        make_head(63, 1000, 48, BF16, "cpu"),
        BF16,
    )


LENT = [
    pytest.param(BF16, PolicyLossSpec(), 0.0, 1 << 22, id="all-of-it"),
    pytest.param(BF16, PolicyLossSpec(loss_type="gspo"), 0.0, 1 << 16, id="too-little"),
    pytest.param(FP16, PolicyLossSpec(entropy_coef=0.01), 1e-3, 1 << 22, id="chosen-columns"),
    pytest.param(FP32, PolicyLossSpec(), 0.0, 1 << 22, id="single"),
]


@pytest.mark.parametrize(("dtype", "spec", "tol", "size"), LENT)
def test_head_loss_has_the_same_bits_in_lent_memory(dtype, spec, tol, size, monkeypatch) -> None:
    """Of a KV cache full of NaN; only results outlive the loan, which leaves zeros."""
    monkeypatch.setattr(head.Head, "_rows_that_fit", lambda self: 16)
    tensors, batch = make_head(37, 1000, 48, dtype, "cpu", bias=True), make_batch(37, "cpu")
    given = ("linear_grpo_loss", "_triton", tensors, batch, spec, tol)
    plain = loss_result(*given)
    owner = torch.full((size,), 255, dtype=torch.uint8)
    asked, take = [], scratch.Arena.take

    def note(arena, count, dtype):
        asked.append(take(arena, count, dtype))
        return asked[-1]

    monkeypatch.setattr(scratch.Arena, "take", note)
    with scratch.lend(scratch.Arena([owner.untyped_storage()])) as arena:
        lent = loss_result(*given)
        with torch.no_grad():
            loss_result_without_gradient(tensors, batch, spec)
        assert arena.in_use == 0  # every call has given back what it took
    chunk = 16 * 1000 * dtype.itemsize
    assert arena.most >= chunk if size > 1 << 16 else arena.refused >= 4 * 1000 * 48
    addresses = [part.data_ptr() - owner.data_ptr() for part in asked if part is not None]
    assert addresses and all(0 <= address < size for address in addresses)
    for name, value in plain.gradients.items():
        assert torch.equal(lent.gradients[name], value)
    assert torch.equal(lent.logprobs, plain.logprobs)
    assert torch.equal(lent.entropy, plain.entropy)
    assert lent.output.loss == plain.output.loss


def loss_result_without_gradient(tensors, given, spec) -> None:
    """Both operators that read the head under no_grad, as for old log-probs."""
    hidden, weight, targets, bias = (tensors[n] for n in ("hidden", "weight", "targets", "bias"))
    linear_logprobs(hidden, weight, targets, bias, 1.0)
    prepared = prepare(
        spec, 37, torch.float32, hidden.device, given["advantages"], given["cu_seqlens"]
    )
    linear_grpo_loss(hidden, weight, targets, bias, prepared, spec, 0.0)


def test_head_logprobs_recomputed_in_chunks(monkeypatch) -> None:
    monkeypatch.setattr(head.Head, "_rows_that_fit", lambda self: 16)
    g, g_entropy = upstream(37)
    g[5:30] = 0
    compare(
        lambda name, tensors: logprobs_result("linear_logprobs", name, tensors, g, g_entropy * g),
        make_head(37, 1000, 48, BF16, "cpu"),
        BF16,
    )


@pytest.mark.parametrize(("tol", "peaked"), [(1e-3, True), ("auto", True), ("auto", False)])
def test_vocabulary_columns_left_out(tol, peaked, monkeypatch) -> None:
    monkeypatch.setattr(head.Head, "_rows_that_fit", lambda self: 32)
    tensors = make_head(48, 900, 32, FP16, "cpu", bias=True)
    targets = tensors["targets"] = tensors["targets"] % 40
    tensors["bias"][40:] -= 14.0 if peaked else -2.0
    tensors["hidden"] *= 0.5
    batch = make_batch(48, "cpu")
    batch["advantages"][3] = 0.4
    spec = PolicyLossSpec(entropy_coef=0.01)
    exact, some = (
        loss_result("linear_grpo_loss", "_triton", tensors, batch, spec, t) for t in (0.0, tol)
    )
    metrics = some.output.metrics
    share, bound = metrics["vocab/live_share"], metrics["vocab/error_bound"]
    if peaked:
        assert share < 0.5 and 0 < metrics["vocab/dropped_mass"] < 0.01
        zero = (some.gradients["weight"] == 0).all(1).float().mean().item()
        assert zero == pytest.approx(1 - share.item(), abs=0.15)
    elif tol == "auto":
        assert share == 1 and bound == 0
    errors = [
        relative_error(some.gradients[name], exact.gradients[name]) for name in ("hidden", "weight")
    ]
    assert max(errors) <= bound + 2 * ROUNDING[FP16]
    assert tol != "auto" or bound <= 2.6e-3
    torch.testing.assert_close(some.gradients["bias"], exact.gradients["bias"])
    assert torch.equal(some.logprobs, exact.logprobs)
    assert (some.gradients["weight"][targets.unique()] != 0).any()


@pytest.mark.parametrize("train", [(True, False), (False, True)], ids=["hidden", "weight"])
def test_head_gradient_of_one_input_only(train) -> None:
    tensors = make_head(20, 300, 32, BF16, "cpu")
    hidden, weight, targets = tensors["hidden"], tensors["weight"], tensors["targets"]
    both = [t.clone().requires_grad_() for t in (hidden, weight)]
    some = [t.clone().requires_grad_(r) for t, r in zip((hidden, weight), train, strict=True)]
    for leaves in (both, some):
        _head_loss(*leaves, targets).loss.backward()
    for wanted, ours, truth in zip(train, some, both, strict=True):
        assert torch.equal(ours.grad, truth.grad) if wanted else ours.grad is None


def test_nothing_at_all() -> None:
    logits = torch.randn(0, 1000, dtype=BF16, requires_grad=True)
    hidden = torch.randn(0, 32, dtype=BF16, requires_grad=True)
    weight = torch.randn(1000, 32, dtype=BF16, requires_grad=True)
    targets = torch.zeros(0, dtype=torch.long)
    for out in (_rows_loss(logits, targets), _head_loss(hidden, weight, targets)):
        assert out.loss == 0 and out.logprobs.shape == out.entropy.shape == (0,)
        out.loss.backward()
    (token_logprobs(logits, targets, 1.0)[0].sum()).backward()
    (linear_logprobs(hidden, weight, targets, None, 1.0)[0].sum()).backward()
    assert logits.grad.shape == (0, 1000) and hidden.grad.shape == (0, 32)
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_rows_hostile_values_stay_in_their_rows() -> None:
    tensors = make_logits(12, 700, FP32, "cpu")
    clean, targets = tensors["logits"], tensors["targets"]
    logits = clean.clone()
    logits[1, 5] = torch.nan
    logits[2, 6] = torch.inf
    logits[3] = -torch.inf
    logits[4, targets[4]] = -torch.inf
    logits[5, :600] = -torch.inf
    targets[5] = 650
    logits[6] = 1e4 * logits[6].sign()
    logits[7] = 3.0
    targets[8], targets[9], targets[10] = -1, 700, -100
    logits.requires_grad_()
    logprobs, entropy = token_logprobs(logits, targets, 1.0)
    (logprobs[:8].nan_to_num(0, 0, 0) + entropy[:8].nan_to_num()).sum().backward()
    bad = torch.tensor([1, 2, 3, 8, 9, 10])
    logprobs, entropy = logprobs.detach(), entropy.detach()
    assert logprobs[bad].isnan().all() and entropy[bad].isnan().all()
    assert logprobs[4] == -torch.inf and entropy[4].isfinite()
    good = torch.tensor([0, 5, 6, 7, 11])
    exact = logits.detach().double().log_softmax(-1)
    torch.testing.assert_close(
        logprobs[good].double(), exact[good, targets[good]], rtol=1e-6, atol=1e-5
    )
    assert entropy[7] == pytest.approx(torch.log(torch.tensor(700.0)).item(), abs=1e-5)
    assert logits.grad[[0, 5, 6, 7]].isfinite().all()
    assert (logits.grad[[1, 2, 3]] == 0).all()
    with pytest.raises(ValueError, match="outside"):
        verify_targets("cpu")


def test_head_hostile_values_stay_in_their_rows() -> None:
    tensors = make_head(12, 300, 32, BF16, "cpu")
    hidden, weight, targets = tensors["hidden"], tensors["weight"], tensors["targets"]
    kept = torch.tensor([0, 4, 5, 6, 7, 8, 11])
    alone = [hidden[kept].requires_grad_(), weight.clone().requires_grad_()]
    truth = _head_loss(*alone, targets[kept], normalizer=12.0)
    truth.loss.backward()
    hidden[1, 3], hidden[2, 0], hidden[3] = torch.nan, torch.inf, -torch.inf
    targets[9], targets[10] = -1, 300
    leaves = [hidden.requires_grad_(), weight.clone().requires_grad_()]
    out = _head_loss(*leaves, targets, normalizer=12.0)
    out.loss.backward()
    assert out.logprobs[[1, 2, 3, 9, 10]].isnan().all()
    assert out.metrics["nonfinite_rows"] == 5
    torch.testing.assert_close(out.logprobs[kept], truth.logprobs)
    torch.testing.assert_close(leaves[0].grad[kept], alone[0].grad)
    torch.testing.assert_close(leaves[1].grad, alone[1].grad)
    assert (leaves[0].grad[[1, 2, 3, 9, 10]] == 0).all()
    with pytest.raises(ValueError, match="outside"):
        verify_targets("cpu")


def test_head_rows_whose_target_is_all_but_impossible() -> None:
    tensors = make_head(20, 300, 32, BF16, "cpu")
    tensors["hidden"][::3] *= 40
    g, g_entropy = upstream(20)
    ours = logprobs_result("linear_logprobs", "_triton", tensors, g, g_entropy)
    exact = {n: None if t is None else t.double() for n, t in tensors.items()}
    exact["targets"] = tensors["targets"]
    truth = logprobs_result("linear_logprobs", "reference", exact, g, g_entropy)
    assert truth.logprobs.min() < -200
    torch.testing.assert_close(ours.logprobs.double(), truth.logprobs, rtol=1e-5, atol=1e-4)
    for name in ("hidden", "weight"):
        assert relative_error(ours.gradients[name], truth.gradients[name]) < 1e-2


@pytest.mark.parametrize("label", [-100, 300, 2**40])
@pytest.mark.parametrize("op", ["token_logprobs", "grpo_loss", "linear_grpo_loss", "of-fp32"])
def test_targets_outside_are_told_to_the_host(op, label, monkeypatch) -> None:
    """Under the row's own number, also where rows were put in another order; once."""
    monkeypatch.setattr(head.Head, "_rows_that_fit", lambda self: 8)
    tensors = make_head(20, 300, 32, FP32 if op == "of-fp32" else BF16, "cpu")
    logits = make_logits(20, 300, BF16, "cpu")["logits"].requires_grad_()
    hidden, weight = (tensors[name].requires_grad_() for name in ("hidden", "weight"))
    targets = tensors["targets"]
    targets[13] = label
    if op == "token_logprobs":
        token_logprobs(logits, targets, 1.0)
    elif op == "grpo_loss":
        _rows_loss(logits, targets)
    else:
        _head_loss(hidden, weight, targets, mask=torch.arange(20) % 3 != 0)
    shown = max(min(label, 2**31 - 1), -(2**31))
    with pytest.raises(ValueError, match=rf"targets\[13\] was {shown} .*outside \[0, 300\)"):
        verify_targets("cpu")
    verify_targets("cpu")


@pytest.mark.parametrize("op", ["token_logprobs", "linear_logprobs", "grpo_loss", "linear"])
def test_second_derivatives_are_refused(op) -> None:
    tensors = make_head(8, 300, 32, BF16, "cpu")
    logits = make_logits(8, 300, BF16, "cpu")["logits"].requires_grad_()
    hidden, weight = (tensors[name].requires_grad_() for name in ("hidden", "weight"))
    targets = tensors["targets"]
    scalar = {
        "token_logprobs": lambda: token_logprobs(logits, targets, 1.0)[0].sum(),
        "linear_logprobs": lambda: linear_logprobs(hidden, weight, targets, None, 1.0)[0].sum(),
        "grpo_loss": lambda: _rows_loss(logits, targets).loss,
        "linear": lambda: _head_loss(hidden, weight, targets).loss,
    }[op]()
    leaf = logits if op in ("token_logprobs", "grpo_loss") else hidden
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(scalar, leaf, create_graph=True)


@pytest.mark.parametrize("far", [-200.0, torch.nan])
def test_masked_tokens_enter_no_product(far) -> None:
    tensors = make_head(30, 300, 32, BF16, "cpu")
    mask = torch.arange(30) % 3 != 0
    spec, results = PolicyLossSpec(), []
    for value in (-2.0, far):
        old = torch.where(mask, -2.0, value)
        given = _prepared(30, spec, mask, old_logprobs=old)
        leaves = [tensors[n].detach().requires_grad_() for n in ("hidden", "weight")]
        linear_grpo_loss(*leaves, tensors["targets"], None, given, spec, 0.0).loss.backward()
        results.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("tol", [0.0, 0.3], ids=["all-columns", "some-columns"])
def test_scratch_is_what_the_budget_says(dtype, tol, monkeypatch) -> None:
    """Of several chunks; `memory.estimate` counts by the same functions."""
    monkeypatch.setattr(budget, "SMALLEST_BUDGET", 130 * budget.CELLS[dtype] * 1024)
    count, vocab, depth, held = 130, 1000, 16, []

    def noting(owner: type) -> None:
        release = owner.release

        def note(self) -> None:
            held.append(sum(buffer.nbytes for buffer in self._scratch._buffers.values()))
            release(self)

        monkeypatch.setattr(owner, "release", note)

    noting(head.Head)
    noting(vocabulary.Vocabulary)
    tensors = make_head(count, vocab, depth, dtype, "cpu")
    leaves = [tensors[n].detach().requires_grad_() for n in ("hidden", "weight")]
    spec = PolicyLossSpec()
    linear_grpo_loss(*leaves, tensors["targets"], None, _prepared(count, spec), spec, tol)
    gpu = budget.gpu_of(torch.device("cpu"))
    assert budget.chunk_rows(count, vocab, depth, dtype, gpu) == 128
    counted = budget.head_bytes(count, vocab, depth, dtype, gpu, some_columns=tol > 0)
    counted -= (dtype.itemsize * count + 4 * vocab) * depth  # both gradients
    counted -= 128 * 2 * dtype.itemsize * depth  # rows of hidden states, gathered and scaled
    assert 0.95 * counted < sum(held) <= counted


@pytest.mark.parametrize("layout", ["transposed", "expanded", "gaps", "odd-address"])
def test_rows_strides(layout) -> None:
    tensors = make_logits(6, 1000, BF16, "cpu")
    logits, targets = tensors["logits"], tensors["targets"]
    views = {
        "transposed": logits.T.contiguous().T,
        "expanded": logits[:1].expand(6, 1000),
        "gaps": torch.cat([logits, logits], 1)[:, :1000],
        "odd-address": torch.cat([logits.new_zeros(1), logits.flatten()])[1:].view(6, 1000),
    }
    view = views[layout].detach().requires_grad_()
    plain = view.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    for leaf in (view, plain):
        logprobs, entropy = token_logprobs(leaf, targets, 1.0)
        (logprobs + entropy).sum().backward()
    assert torch.equal(view.grad, plain.grad)


@pytest.mark.parametrize("layout", ["expanded", "gaps"])
def test_targets_strides(layout) -> None:
    tensors = make_logits(64, 300, BF16, "cpu")
    one = tensors["targets"][:1]
    views = {
        "expanded": one.expand(64),  # the kernel would read past a single number
        "gaps": torch.stack([tensors["targets"], torch.zeros(64, dtype=torch.int64)], 1)[:, 0],
    }
    found = []
    for targets in (views[layout], views[layout].contiguous()):
        for inplace in (False, True):  # with the loss's coefficients known beforehand
            leaf = tensors["logits"].detach().clone().requires_grad_()
            logprobs, _ = token_logprobs(leaf, targets, 1.0)
            logprobs.sum().backward()
            found.append([logprobs.detach(), leaf.grad])
            leaf.grad = None
            out = _rows_loss(leaf * 1, targets, inplace=inplace)
            out.loss.backward()
            found[-1] += [out.logprobs.detach(), leaf.grad]
    for kept in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(kept, found[0], strict=True))


def test_inplace_overwrites_and_says_so() -> None:
    tensors = make_logits(6, 1000, FP32, "cpu")
    truth = tensors["logits"].clone().requires_grad_()
    _rows_loss(truth, tensors["targets"]).loss.backward()
    leaf = tensors["logits"].clone().requires_grad_()
    logits = leaf * 1
    squares = logits.square()
    out = _rows_loss(logits, tensors["targets"], inplace=True)
    out.loss.backward(retain_graph=True)
    assert torch.equal(leaf.grad, truth.grad) and torch.equal(logits, truth.grad)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.sum().backward()
    with pytest.raises(RuntimeError, match="used up"):
        out.loss.backward()


def test_inplace_never_writes_over_a_leaf() -> None:
    tensors = make_logits(6, 1000, FP32, "cpu")
    leaf = tensors["logits"].clone().requires_grad_()
    _rows_loss(leaf, tensors["targets"], inplace=True).loss.backward()
    assert torch.equal(leaf.detach(), tensors["logits"])


def test_two_runs_are_bit_equal() -> None:
    runs = []
    for _ in range(2):
        tensors = make_head(63, 1000, 48, BF16, "cpu")
        leaves = [tensors[name].requires_grad_() for name in ("hidden", "weight")]
        out = _head_loss(*leaves, tensors["targets"])
        out.loss.backward()
        runs.append([out.loss.detach(), out.logprobs, *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_rows_without_gradient_are_left_out_of_the_products(monkeypatch) -> None:
    tensors = make_head(60, 300, 32, BF16, "cpu")
    mask = torch.zeros(60, dtype=torch.bool)
    mask[::4] = True
    seen = []
    monkeypatch.setattr(head.Head, "_rows_that_fit", lambda self: 32)
    add = head_gradient.HeadGradient.add
    monkeypatch.setattr(
        head_gradient.HeadGradient,
        "add",
        lambda self, chunk, *rest: (seen.append(int(chunk.live)), add(self, chunk, *rest)),
    )
    leaves = [tensors[name].requires_grad_() for name in ("hidden", "weight")]
    out = _head_loss(*leaves, tensors["targets"], mask=mask)
    out.loss.backward()
    assert seen == [15, 0]
    assert out.logprobs.isfinite().all()
    assert (leaves[0].grad[~mask] == 0).all() and (leaves[0].grad[mask] != 0).any(1).all()


NOTHING_WAITS = [
    pytest.param(PolicyLossSpec(), 0.0, BF16, id="on-policy"),
    pytest.param(PolicyLossSpec(loss_type="gspo", entropy_coef=0.1), 0.0, BF16, id="two-passes"),
    pytest.param(PolicyLossSpec(top_entropy_quantile=0.5), 0.0, FP16, id="quantile"),
    pytest.param(PolicyLossSpec(), "auto", BF16, id="auto"),
    pytest.param(PolicyLossSpec(loss_type="sapo"), 1e-3, BF16, id="number"),
    pytest.param(PolicyLossSpec(loss_type="sapo"), "auto", FP32, id="single"),
]


@pytest.fixture
def poisoned():
    """Memory that nobody wrote holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def launches_unseen(monkeypatch):
    """The interpreter copies what it is given."""
    kernels = type(head_gradient.scaled_rows_kernel)
    launcher = kernels.__getitem__
    monkeypatch.setattr(kernels, "__getitem__", lambda self, grid: outside(launcher(self, grid)))


@pytest.mark.parametrize(("spec", "tol", "dtype"), NOTHING_WAITS)
def test_the_host_waits_for_nothing(
    spec, tol, dtype, monkeypatch, poisoned, launches_unseen
) -> None:
    """Neither forward nor backward fetches a number, with rows and columns left out on the way."""
    monkeypatch.setattr(head.Head, "_rows_that_fit", lambda self: 32)
    tensors = make_head(45, 600, 32, dtype, "cpu", bias=True)
    tensors["bias"][30:] -= 12.0
    tensors["targets"] %= 30
    names = ("old_logprobs",) if spec.loss_type == "gspo" else ()
    given = make_batch(45, "cpu", *names)
    batch = prepare(spec, 45, FP32, torch.device("cpu"), **given)
    known_beforehand(batch, spec)  # looks at a new spec once, on the CPU
    inputs = [tensors[n].requires_grad_() for n in ("hidden", "weight", "bias")]
    with NoSync():
        arguments = (inputs[0], inputs[1], tensors["targets"], inputs[2], batch, spec, tol)
        out = linear_grpo_loss(*arguments)
        out.loss.backward()
        logprobs, entropy = linear_logprobs(*arguments[:4], 1.0)
        (logprobs + entropy).sum().backward()
    assert all(t.grad.isfinite().all() and t.grad.any() for t in inputs)


@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
def test_rows_wait_for_nothing(loss_type, launches_unseen) -> None:
    spec = PolicyLossSpec(loss_type=loss_type)
    tensors = make_logits(12, 700, BF16, "cpu")
    logits = tensors["logits"].requires_grad_()
    batch = _prepared(12, spec)
    known_beforehand(batch, spec)
    with NoSync():
        grpo_loss(logits, tensors["targets"], batch, spec, False).loss.backward()
        logprobs, entropy = token_logprobs(logits, tensors["targets"], 1.0)
        (logprobs + entropy).sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("count", [0, 1, 77])
def test_group_advantages(scale, baseline, count) -> None:
    generator = torch.Generator().manual_seed(count)
    rewards = torch.randint(0, 3, (count,), generator=generator).float() / 3
    groups = torch.randint(0, 9, (count,), generator=generator)
    rewards[groups == 4] = 0.1
    rewards[::13] = torch.nan
    for eps in (0.0, 1e-4):
        ours = triton_advantages.group_advantages(rewards, groups, scale, eps, baseline)
        truth = advantages.group_advantages(rewards, groups, scale, eps, baseline)
        torch.testing.assert_close(ours, truth)
        assert (ours[(groups == 4) | rewards.isnan()] == 0).all()


def _prepared(count: int, spec: PolicyLossSpec, mask: torch.Tensor | None = None, **given):
    ends = torch.tensor([0, count // 2, count], dtype=torch.int32)
    advantages = torch.tensor([1.0, -0.7])
    return prepare(spec, count, FP32, torch.device("cpu"), advantages, ends, mask=mask, **given)


def _rows_loss(logits, targets, inplace=False):
    spec = PolicyLossSpec()
    return grpo_loss(logits, targets, _prepared(len(targets), spec), spec, inplace)


def _head_loss(hidden, weight, targets, mask=None, **options):
    spec = PolicyLossSpec(**options)
    batch = _prepared(len(targets), spec, mask)
    return linear_grpo_loss(hidden, weight, targets, None, batch, spec, 0.0)


@pytest.mark.parametrize(("src", "dst"), PAIRS, ids=str)
def test_weight_sync(src, dst, monkeypatch) -> None:
    """Chunks and blocks so small that a segment has several of them."""
    monkeypatch.setattr(triton_sync, "CHUNK", 4096)
    monkeypatch.setattr(triton_sync, "BLOCK", 512)
    check(triton_sync.weight_sync, layouts(src, dst))


@pytest.mark.parametrize("keep", [True, False], ids=["stored", "sums-alone"])
def test_a_persistent_product_has_the_same_bits(keep) -> None:
    """Its programs take several tiles each, more than four in all here, and the last ones fewer."""
    tensors = make_head(130, 3000, 47, BF16, "cpu", bias=True)
    given = [tensors[name] for name in ("hidden", "weight", "bias", "targets")]
    index = torch.arange(130)
    live = torch.tensor([130], dtype=torch.int32) if keep else None
    found = []
    for persistent in (False, True):
        one = head.Head(*given, 0.7)
        one.tiles = replace(one.tiles, persistent=persistent)
        chunk = one.chunk(index, slice(0, 130), live)
        found.append((chunk.found, chunk.exps if keep else chunk.found))
    assert found[0][0].isfinite().all()
    for plain, ours in zip(*found, strict=True):
        assert torch.equal(plain, ours)


BAD_OFFSETS = [
    pytest.param([2, 9, 20], r"cu_seqlens\[0\] was 2 ", id="start"),
    pytest.param([0, 9, 7, 20], r"cu_seqlens\[2\] was 7 ", id="fall"),
    pytest.param([0, 9, 19], r"cu_seqlens\[2\] was 19 ", id="short"),
    pytest.param([0, 30, 20], r"cu_seqlens\[2\] was 20 ", id="beyond"),
    pytest.param([0, -5, 20], r"cu_seqlens\[1\] was -5 ", id="negative"),
    pytest.param([0, 2**40], r"cu_seqlens\[1\] was 2147483647 ", id="huge"),
    pytest.param([0, *range(1500), 1400, 20], r"cu_seqlens\[1501\] was 1400 ", id="second-block"),
]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("cuts", [[0, 20], [0, 0, 7, 7, 20], [*[0] * 2000, 20]], ids=len)
def test_offsets_that_fit_come_through(dtype, cuts) -> None:
    given = torch.tensor(cuts, dtype=dtype)
    # a slice is contiguous and not aligned; every other one is neither
    spread = given.repeat_interleave(2)
    for view in (given, torch.cat([given[:1], given])[1:], spread[::2]):
        safe, sound = offsets.checked_offsets(view, 20)
        assert safe.dtype == torch.int64 and safe.tolist() == cuts and sound == 1
    verify_targets("cpu")


@pytest.mark.parametrize(("cuts", "message"), BAD_OFFSETS)
def test_offsets_that_do_not_fit_are_told_to_the_host(cuts, message) -> None:
    given = torch.tensor(cuts, dtype=torch.int64)
    safe, sound = offsets.checked_offsets(given, 20)
    assert safe.tolist() == [0] + [20] * (len(cuts) - 1) and sound.isnan()
    with pytest.raises(ValueError, match=message + ".*from 0 to the 20 tokens"):
        verify_targets("cpu")
    verify_targets("cpu")


def test_offsets_of_no_tokens() -> None:
    for cuts in ([0], [0, 0, 0]):
        safe, sound = offsets.checked_offsets(torch.tensor(cuts, dtype=torch.int32), 0)
        assert safe.tolist() == cuts and sound == 1
    safe, sound = offsets.checked_offsets(torch.tensor([3]), 0)
    assert safe.tolist() == [0] and sound.isnan()
    with pytest.raises(ValueError, match="was 3"):
        verify_targets("cpu")


@pytest.mark.parametrize(("spec", "names"), SPECS[:4])
@pytest.mark.parametrize("op", ["grpo_loss", "linear_grpo_loss"])
def test_bad_offsets_have_no_gradient(op, spec, names, monkeypatch) -> None:
    """The loss is NaN, all gradients are 0, nothing reads outside its memory."""
    shape = (21, 100) if op == "grpo_loss" else (21, 100, 32)
    tensors = (make_logits if op == "grpo_loss" else make_head)(*shape, BF16, "cpu")
    given = make_batch(21, "cpu", *names)
    # what is asked of the table of losses once, with offsets of its own on the CPU, is then known
    loss_result(op, "_triton", tensors, given, spec)
    monkeypatch.setattr(input_checks, "_looked_at_later", lambda device: True)
    bad = given | {"cu_seqlens": torch.tensor([0, 7, 7, 50, 40], dtype=torch.int32)}
    result = loss_result(op, "_triton", tensors, bad, spec)
    assert result.output.loss.isnan() and result.logprobs.isfinite().all()
    assert result.output.metrics["nonfinite_rows"] == given["mask"].sum()
    for gradient in result.gradients.values():
        assert gradient is None or (gradient == 0).all()
    with pytest.raises(ValueError, match=r"cu_seqlens\[4\] was 40 "):
        loss_result(op, "_triton", tensors, given, spec)
    assert loss_result(op, "_triton", tensors, given, spec).output.loss.isfinite()


def test_rows_gradient_starts_from_the_logits_again() -> None:
    """As graphs of torch.compile need it: the bits of a plain call's backward pass."""
    tensors = make_logits(21, 1000, BF16, "cpu")
    leaf, (g, g_entropy) = tensors["logits"].requires_grad_(), upstream(21)
    for by_entropy in (None, g_entropy):
        logprobs, entropy = token_logprobs(leaf, tensors["targets"], 0.7)
        outputs = ((logprobs, entropy), (g, by_entropy))
        if by_entropy is None:
            outputs = (logprobs, g)
        (expected,) = torch.autograd.grad(outputs[0], leaf, outputs[1])
        again = token_gradient(leaf.detach(), tensors["targets"], 0.7, g, by_entropy)
        assert torch.equal(again, expected)


@pytest.mark.parametrize("chunk", [16, 64], ids=["chunks", "one-chunk"])
def test_head_gradients_start_from_the_inputs_again(chunk, monkeypatch) -> None:
    monkeypatch.setattr(head.Head, "_rows_that_fit", lambda self: chunk)
    tensors = make_head(37, 1000, 48, BF16, "cpu", bias=True)
    g, g_entropy = upstream(37)
    g[::3] = g_entropy[::3] = 0
    leaves = [tensors[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    hidden, weight, bias = leaves
    outputs = linear_logprobs(hidden, weight, tensors["targets"], bias, 0.7)
    expected = torch.autograd.grad(outputs, leaves, (g, g_entropy))
    hidden, weight, bias = (leaf.detach() for leaf in leaves)
    given = (hidden, weight, tensors["targets"], bias, 0.7, g, g_entropy)
    everything = head_gradients(*given, (True, True, True))
    for again, exact in zip(everything, expected, strict=True):
        assert torch.equal(again, exact)
    only = head_gradients(*given, (False, True, False))
    assert only[0] is only[2] is None and torch.equal(only[1], expected[1])
