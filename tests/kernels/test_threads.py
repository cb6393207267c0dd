"""Compiled kernels on torch's own threads, or on a pool where these cannot be reached."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from polymath_fast.kernels.cpu import openmp
from polymath_fast.kernels.cpu.team import barrier, together
from polymath_fast.kernels.cpu.threads import on_threads, parallel, split


@pytest.fixture(params=["torch's threads", "a pool"], autouse=True)
def threads(request, monkeypatch):
    if request.param == "a pool":
        monkeypatch.setattr(openmp, "available", lambda: False)
    elif not openmp.available():
        pytest.skip("torch has no GNU OpenMP here")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_every_range_is_worked_on_once():
    seen = np.zeros(1000, np.int64)

    def kernel(start, stop, seen):
        seen[start:stop] += 1

    parallel(kernel, split(1000), seen)
    assert (seen == 1).all()


def test_several_threads_work_at_the_same_time():
    meeting = threading.Barrier(3, timeout=60)
    names = set()

    def work(present):
        assert present == 3
        names.add(threading.get_ident())
        meeting.wait()

    on_threads(work, 3)
    assert len(names) == 3


@pytest.mark.parametrize("error", [ValueError, IndexError, KeyboardInterrupt])
def test_what_a_kernel_raises_comes_out_once_all_are_done(error):
    done = []

    def kernel(start, stop):
        if start == 3:
            raise error("here")
        done.append(start)

    with pytest.raises(error, match="here"):
        parallel(kernel, [(i, i + 1) for i in range(9)])
    parallel(kernel, [(20, 21), (21, 22), (22, 23)])
    assert {20, 21, 22} <= set(done)


def test_a_team_that_waits_for_one_another_is_complete():
    def kernel(present, counters, places):
        barrier(present, counters, 0)
        places.append(present)
        barrier(present, counters, 1)

    places = []
    together(kernel, 2, places)
    assert places == [3, 3, 3]


def test_threads_of_the_caller_s_own_may_all_call():
    totals = [np.zeros(64) for _ in range(4)]

    def kernel(start, stop, total):
        total[start:stop] += 1

    def call(total):
        torch.set_num_threads(3)
        for _ in range(50):
            parallel(kernel, split(64), total)

    with ThreadPoolExecutor(4) as callers:
        list(callers.map(call, totals))
    assert all((total == 50).all() for total in totals)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_does_not_wait_for_its_parent_s_threads():
    seen = np.zeros(8)
    parallel(_mark, split(8), seen)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            found = np.zeros(8)
            parallel(_mark, split(8), found)
            code = int(not (found == 1).all())
        finally:  # an error must not go on as a second pytest
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (seen == 1).all()


def _mark(start, stop, seen):
    seen[start:stop] += 1
