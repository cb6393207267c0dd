"""The packed layout, written out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from polymath_fast.learner.microbatches import split_rows
from polymath_fast.learner.packing import (
    TrainingRow,
    merge_duplicates,
    pack,
    shared_token_ratio,
)


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
    assert (first.prompt_len, first.cu_seqlens.tolist()) == (3, [0, 2, 2])
    assert (second.prompt_len, second.cu_seqlens.tolist()) == (2, [0, 1])


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
        (100, [[[0, 1, 2, 3]]]),
        # prompt 4 + (3 - 1) + (3 - 1) = 8 rows fit, a third completion of that prompt does not
        (8, [[[0, 1], [2]], [[3]]]),
        (10, [[[0, 1, 2]], [[3]]]),
        (6, [[[0], [1], [2]], [[3]]]),
        (1, [[[0], [1], [2]], [[3]]]),  # a completion is never cut
    ],
)
def test_split_counts_a_prompt_once(max_tokens, expected):
    rows = [row([1, 2, 3, 4], [i, 9, 9]) for i in range(3)] + [row([5] * 4, [9, 9, 9])]
    assert list(split_rows(rows, max_tokens)) == expected


def test_split_brings_prompts_and_equal_inputs_together():
    one, two = [1, 2], [3]
    rows = [
        row(one, [7, 8]),
        row(two, [7, 8]),
        row(one, [5, 5, 5]),
        row(one, [7, 9]),
        row(two, [4]),
    ]
    assert list(split_rows(rows, 100)) == [[[0, 3, 2, 1, 4]]]
    # [1, 2 | 7] serves rows 0 and 3; [1, 2 | 5 5]; [3 | 7] serves 1, and 4 needs no row of its own
    assert list(split_rows(rows, 4)) == [[[0, 3], [2]], [[1, 4]]]


def test_a_long_prompt_leaves_half_of_a_micro_batch_to_its_completions():
    rows = [row([1] * 9, [i, 2, 3]) for i in range(7)]  # two rows of the model each
    assert list(split_rows(rows, 10)) == [[[0, 1], [2, 3], [4, 5], [6]]]
    assert list(split_rows(rows, 13)) == [[[0, 1, 2], [3, 4, 5], [6]]]
    assert list(split_rows(rows, 23)) == [[[0, 1, 2, 3, 4, 5, 6]]]


def test_split_bounds_targets_that_share_rows():
    rows = [row([1], [2] * 10)] * 9
    assert list(split_rows(rows, 10)) == [[[0, 1, 2, 3], [4, 5, 6, 7], [8]]]


def test_equal_inputs_share_the_rows_of_the_model():
    rows = [
        row([1, 2], [7, 8, 3]),
        row([1, 2], [7, 8, 4]),
        row([1, 2], [7]),
        row([1, 2], [7, 8, 3]),
    ]
    batch = pack(rows)
    assert batch.input_ids.tolist() == [[1, 2, 7, 8]]
    assert batch.hidden_rows.tolist() == [1, 2, 3, 1, 2, 3, 1, 1, 2, 3]
    assert batch.targets.tolist() == [7, 8, 3, 7, 8, 4, 7, 7, 8, 3]
    assert batch.blocks[0].cu_seqlens.tolist() == [0, 2, 2]
    assert batch.multiplicity is None


def test_a_prompt_that_is_computed_elsewhere():
    rows = [row([1, 2], [7, 8, 3]), row([1, 2], [6]), row([1, 2], [7, 8, 4])]
    batch = pack(rows, prompt_apart=True)
    assert batch.input_ids.tolist() == [[7, 8]]
    assert batch.position_ids.tolist() == [[2, 3]]
    assert batch.hidden_rows.tolist() == [0, 1, 2, 0, 0, 1, 2]  # 0 is the prompt's last state
    assert (batch.blocks[0].prompt_len, batch.blocks[0].cu_seqlens.tolist()) == (2, [0, 2, 2])


def test_only_what_the_loss_cannot_tell_apart_is_merged():
    same = row([1], [5, 6])
    others = [
        replace(same, advantage=2.0),
        replace(same, sampling_logprobs=[-0.5, -0.4]),
        replace(same, old_logprobs=[-1.0, -1.0]),
        replace(same, trained=False),
        replace(same, prompt_ids=(2,)),
        row([1], [5, 7]),
    ]
    merged = merge_duplicates([same, others[0], same, *others[1:], same])
    assert merged == [replace(same, multiplicity=3), *others]
    assert pack(merged[:2]).multiplicity.tolist() == [3.0, 1.0]


def test_sharing_is_measured_over_the_inputs_of_one_prompt():
    rows = [row([1], [5, 6, 7, 0]), row([1], [5, 6, 8, 0]), row([1], [9, 0]), row([1], [9, 0])]
    rows.append(row([2], [5, 6, 7, 0]))
    # 3 + 3 + 1 + 1 + 3 inputs; one is a duplicate, two more begin like another of their prompt
    assert shared_token_ratio(rows) == pytest.approx((1 / 11, 3 / 11))
    assert shared_token_ratio(merge_duplicates(rows)) == pytest.approx((1 / 11, 3 / 11))
    assert shared_token_ratio([row([1], [5])]) == (0.0, 0.0)


def test_split_of_nothing():
    assert list(split_rows([], 10)) == []
