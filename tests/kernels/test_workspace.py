"""Scratch memory is shared by the sampler, under inference mode, and the learner."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from polymath_fast.kernels.cpu.workspace import buffer, claim, clear, give_back, passing


def test_a_buffer_first_used_by_the_sampler_may_be_written_by_the_learner():
    clear()
    with torch.inference_mode():
        first = buffer("x", (2, 3), torch.float32)
        first.fill_(1.0)
    second = buffer("x", (3, 2), torch.float32)
    second[0] = torch.ones(2, requires_grad=True).detach()
    assert second.data_ptr() == first.data_ptr() and not second.is_inference()
    clear()


def test_a_larger_or_other_request_replaces_the_memory():
    clear()
    small = buffer("x", (4,), torch.float32)
    assert buffer("x", (2, 8), torch.float32).shape == (2, 8)
    assert buffer("x", (4,), torch.bfloat16).dtype == torch.bfloat16
    assert buffer("y", (4,), torch.float32).data_ptr() != small.data_ptr()
    clear()


def test_a_claim_is_handed_out_again_only_when_nobody_holds_it():
    clear()
    held = claim("x", (4,), torch.float32)
    place = held.data_ptr()
    other = claim("x", (4,), torch.float32)
    assert other.data_ptr() != place
    del held
    assert claim("x", (4,), torch.float32).data_ptr() == place
    clear()


def test_what_comes_into_being_for_a_while_goes_again():
    clear()
    kept = buffer("x", (4,), torch.float32)
    with passing():
        assert buffer("x", (4,), torch.float32).data_ptr() == kept.data_ptr()
        lent = buffer("y", (4,), torch.float32)
        lent.fill_(1.0)
    assert buffer("x", (4,), torch.float32).data_ptr() == kept.data_ptr()
    assert buffer("y", (4,), torch.float32).data_ptr() != lent.data_ptr()
    assert torch.equal(lent, torch.ones(4))  # whoever holds it may go on
    clear()


def test_pages_that_are_given_back_are_the_systems_and_their_neighbours_are_not():
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        pytest.skip("resident memory is read from /proc")

    def resident() -> int:
        return int(statm.read_text().split()[1]) * resource.getpagesize()

    whole = torch.ones(16 * 2**20)  # 64 MiB
    inner = whole[100_001:-100_001]
    before = resident()
    give_back(inner)
    assert before - resident() > 0.9 * inner.nbytes
    assert (whole[:100_001] == 1).all() and (whole[-100_001:] == 1).all()
    inner.fill_(2.0)
    assert (inner == 2).all() and (whole[:100_001] == 1).all() and (whole[-100_001:] == 1).all()
    give_back(whole[5:9])  # less than a page
    assert (whole[5:9] == 1).all()
