"""The packed layout, written out by hand."""

from __future__ import annotations

import pytest
import torch

from polymath_fast.learner.packing import TrainingRow, pack, split_rows


def row(prompt, tokens, advantage=1.0):
    return TrainingRow(
        prompt_ids=tuple(prompt),
        token_ids=tokens,
        sampling_logprobs=[-0.5] * len(tokens),
        advantage=advantage,
    )


def test_layout_of_two_prompts():
    batch = pack([row([1, 2, 3], [10, 11, 12]), row([1, 2, 3], [20]), row([7, 8], [30, 31], -2.0)])
    #                        prompt   10  11 | (20: target only) | prompt 30
    assert batch.input_ids.tolist() == [[1, 2, 3, 10, 11, 7, 8, 30]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]]
    assert batch.hidden_rows.tolist() == [2, 3, 4, 2, 6, 7]
    assert batch.targets.tolist() == [10, 11, 12, 20, 30, 31]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert batch.advantages.tolist() == [1.0, 1.0, -2.0]
    first, second = batch.blocks
    assert (first.start, first.prompt_len, first.end) == (0, 3, 5)
    assert first.cu_seqlens.tolist() == [0, 2, 2]
    assert (second.start, second.prompt_len, second.end) == (5, 2, 8)


def test_optional_logprobs_are_absent_or_packed():
    assert pack([row([1], [5, 6])]).old_logprobs is None
    filled = TrainingRow(
        prompt_ids=(1,),
        token_ids=[5, 6],
        sampling_logprobs=[-1.0, -2.0],
        advantage=0.5,
        old_logprobs=[-1.5, -2.5],
        ref_logprobs=[-3.0, -4.0],
    )
    batch = pack([filled, filled])
    torch.testing.assert_close(batch.old_logprobs, torch.tensor([-1.5, -2.5] * 2))
    torch.testing.assert_close(batch.ref_logprobs, torch.tensor([-3.0, -4.0] * 2))


@pytest.mark.parametrize(
    ("max_tokens", "expected"),
    [
        (100, [[0, 1, 2, 3]]),
        # prompt 4 + (3 - 1) + (3 - 1) = 8 rows fit, a third completion of that prompt does not
        (8, [[0, 1], [2], [3]]),
        (6, [[0], [1], [2], [3]]),
        (1, [[0], [1], [2], [3]]),  # a completion is never cut
    ],
)
def test_split_counts_a_prompt_once(max_tokens, expected):
    rows = [row([1, 2, 3, 4], [9, 9, 9])] * 3 + [row([5] * 4, [9, 9, 9])]
    assert list(split_rows(rows, max_tokens)) == expected


def test_split_of_nothing():
    assert list(split_rows([], 10)) == []
