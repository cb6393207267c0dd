"""Scratch memory that lies in somebody else's: where it lies, what is refused, what is left."""

from __future__ import annotations

import threading

import pytest
import torch

from polymath_fast.kernels import linear_grpo_loss
from polymath_fast.kernels.cpu import workspace
from polymath_fast.kernels.scratch import ALIGNED, Arena, Scratch, lend, lent

CPU = torch.device("cpu")


def memory(*sizes):
    """Tensors of bytes that are all 0xFF: NaN, read as any float."""
    return [torch.full((size,), 255, dtype=torch.uint8) for size in sizes]


def arena_of(*tensors):
    return Arena(tensor.untyped_storage() for tensor in tensors)


def inside(part, whole):
    start, base = part.data_ptr(), whole.data_ptr()
    return base <= start and start + part.nbytes <= base + whole.nbytes


def test_parts_are_aligned_disjoint_and_taken_from_any_storage_with_room():
    first, second = memory(4096, 16384)
    arena = arena_of(first, second)
    parts = [arena.take(300, torch.float32), arena.take(700, torch.bfloat16)]
    parts.append(arena.take(2000, torch.int32))
    assert inside(parts[0], first) and inside(parts[1], first) and inside(parts[2], second)
    assert all(part.data_ptr() % ALIGNED == 0 for part in parts)
    for number, part in enumerate(parts):
        part.fill_(number + 1)
    assert [int(part.sum()) for part in parts] == [300, 1400, 6000]
    assert (arena.in_use, arena.most, arena.refused) == (10600, 10600, 0)


def test_what_fits_nowhere_is_refused_and_counted():
    arena = arena_of(*memory(4096, 4096))
    assert arena.take(5000, torch.uint8) is None
    assert arena.take(1500, torch.float32) is None
    assert arena.take(0, torch.float32) is None
    assert (arena.refused, arena.most, arena.capacity) == (6000, 0, 8192)


def test_what_was_given_back_is_handed_out_again():
    arena = arena_of(*memory(8192))
    parts = [arena.take(512, torch.float32) for _ in range(2)]
    assert arena.take(2048, torch.float32) is None
    address = parts[0].data_ptr()
    arena.give_back(parts[0].view(2, 256))
    assert arena.in_use == 2048
    assert arena.take(1024, torch.float16).data_ptr() == address
    arena.give_back(torch.empty(3))  # from elsewhere
    assert arena.in_use == 4096


def test_a_storage_that_tensors_share_counts_once():
    (bytes_,) = memory(8192)
    layers = [bytes_[:4096].view(torch.bfloat16), bytes_[4096:].view(2, 2048).t()]
    arena = arena_of(*layers, bytes_)
    assert arena.capacity == 8192
    parts = [arena.take(1024, torch.uint8) for _ in range(4)]
    assert len({part.data_ptr() for part in parts}) == 4


def test_the_owner_finds_zeros_where_anything_was_handed_out_and_its_own_bytes_behind():
    first, second = memory(8192, 8192)
    with lend(arena_of(first, second)) as arena:
        part = arena.take(100, torch.float32).fill_(float("nan"))
        arena.give_back(part)
    reach = part.data_ptr() - first.data_ptr() + part.nbytes
    assert not first[:reach].any() and (first[reach:] == 255).all()
    assert (second == 255).all()
    assert arena.most == 400 and arena.in_use == 0 and arena.take(1, torch.uint8) is None


def test_an_engine_that_allocated_in_inference_mode_lends_ordinary_tensors():
    with torch.inference_mode():
        (bytes_,) = memory(8192)
    arena = arena_of(bytes_)
    first, second = arena.take(16, torch.float32), arena.take(16, torch.float32)
    assert not first.is_inference()
    weight = torch.ones(16, requires_grad=True)
    saved = weight * first.fill_(2.0)
    second.fill_(3.0)  # autograd must not take this for a change of `first`
    saved.sum().backward()
    assert weight.grad.tolist() == [2.0] * 16


def test_a_loan_is_of_one_thread_one_device_and_one_arena():
    with lend(arena_of(*memory(4096))) as arena:
        seen = []
        other = threading.Thread(target=lambda: seen.append(lent(CPU)))
        other.start()
        other.join()
        assert seen == [None] and lent(CPU) is arena and lent(torch.device("meta")) is None
        with pytest.raises(ValueError, match="lent an arena already"), lend(arena_of()):
            pass
        assert lent(CPU) is arena
    assert lent(CPU) is None


def test_a_loan_that_fails_ends_all_the_same():
    (bytes_,) = memory(4096)
    with pytest.raises(MemoryError), lend(arena_of(bytes_)) as arena:
        arena.take(4, torch.float32)
        raise MemoryError
    assert lent(CPU) is None and not bytes_[:16].any()


def test_a_call_takes_what_is_lent_and_allocates_what_does_not_fit():
    (bytes_,) = memory(4096)
    with lend(arena_of(bytes_)) as arena:
        scratch = Scratch(CPU)
        small, large = (scratch.buffer(n, n, torch.float32) for n in (100, 5000))
        assert inside(small, bytes_) and not inside(large, bytes_)
        assert scratch.buffer(100, 50, torch.float32).data_ptr() == small.data_ptr()
        assert scratch.buffer(100, 200, torch.float32).shape == (200,)
        assert (arena.in_use, arena.refused) == (800, 20000)
        scratch.release()
        assert arena.in_use == 0
        scratch.buffer(100, 100, torch.float32)
    scratch.release()  # after the loan: nothing to give back to
    assert not inside(Scratch(CPU).buffer("x", 8, torch.float32), bytes_)


def test_named_buffers_of_a_cpu_are_lent_and_forgotten_with_the_loan():
    (bytes_,) = memory(4096)
    workspace.clear()
    own = workspace.buffer("x", (10, 10), torch.float32)
    with lend(arena_of(bytes_)) as arena:
        there = workspace.buffer("x", (10, 10), torch.float32)
        assert inside(there, bytes_) and there.shape == (10, 10)
        assert workspace.buffer("x", (5,), torch.float32).data_ptr() == there.data_ptr()
        assert workspace.buffer("x", (5,), torch.int32).dtype == torch.int32
        grown = workspace.buffer("x", (200,), torch.float32)
        assert inside(grown, bytes_) and arena.in_use == 800
        assert not inside(workspace.buffer("x", (2000,), torch.float32), bytes_)
        assert (arena.in_use, arena.refused) == (0, 8000)
    after = workspace.buffer("x", (10, 10), torch.float32)
    assert not inside(after, bytes_) and own.shape == after.shape
    workspace.clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1 << 16, 1 << 24])
def test_the_fused_head_computes_the_same_bits_in_lent_memory(size, dtype):
    """`size`: too little for the larger buffers, and enough for all."""
    draw = torch.Generator().manual_seed(3)
    given = [(torch.randn(n, 64, generator=draw) / 4).to(dtype) for n in (40, 1000)]
    targets = torch.randint(1000, (40,), generator=draw)
    ends, advantages = torch.tensor([0, 11, 40]), torch.tensor([1.0, -0.7])
    (bytes_,) = memory(size)

    def results():
        hidden, weight = (x.clone().requires_grad_() for x in given)
        out = linear_grpo_loss(hidden, weight, targets, advantages, ends, impl="cpu")
        out.loss.backward()
        return out.loss.detach(), out.logprobs, hidden.grad, weight.grad

    workspace.clear()
    plain = results()
    with lend(arena_of(bytes_)) as arena:
        lent_ = results()
        assert arena.most > 0 and (arena.refused > 0) == (size == 1 << 16)
    assert not bytes_[: arena.most].any()  # zeros since: what is returned must lie elsewhere
    for left, right in zip(plain, lent_, strict=True):
        assert torch.equal(left, right)
    workspace.clear()
