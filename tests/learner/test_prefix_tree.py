"""Which rows completions share, worked out by hand, and when it pays."""

from __future__ import annotations

import random

import pytest
import torch
from tree_rows import EVERY, PROMPTS, row

from polymath_fast.errors import UserError
from polymath_fast.kernels import dispatch
from polymath_fast.kernels.cpu import tiles
from polymath_fast.kernels.prefix_attention import tiles as attention_tiles
from polymath_fast.learner import tree_rule
from polymath_fast.learner.microbatches import split_rows
from polymath_fast.learner.packing import pack, shared_token_ratio
from polymath_fast.learner.prefix_tree import Rule, common_length, plan


def test_layout_of_a_tree():
    """[7 8 9], [7 8 4 6], [7 5], [3] and [7] as inputs; each row of the model once."""
    rows = [
        row([1, 2], [7, 8, 9, 50]),
        row([1, 2], [3, 51]),
        row([1, 2], [7, 8, 4, 6, 52]),
        row([1, 2], [7, 53]),
        row([1, 2], [7, 5, 54]),
        row([1, 2], [55]),
    ]
    batch = pack(rows, tree=plan(rows, EVERY))
    #                                  prompt  3  7  5  8  4  6  9
    assert batch.input_ids.tolist() == [[1, 2, 3, 7, 5, 8, 4, 6, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 2, 3, 3, 4, 5, 4]]
    (block,) = batch.blocks
    assert block.cu_seqlens.tolist() == [0, 1, 2, 3, 4, 6, 7]
    assert block.parents == (-1, -1, 1, 1, 3, 3)
    lines = [[3, 5, 8], [2], [3, 5, 6, 7], [3], [3, 4], []]
    assert batch.hidden_rows.tolist() == [i for line in lines for i in (1, *line)]
    assert batch.targets.tolist() == [i for each in rows for i in each.token_ids]
    assert batch.rows_saved == 3 + 1 + 4 + 1 + 2 - 7
    apart = pack(rows, tree=plan(rows, EVERY), prompt_apart=True)
    assert apart.hidden_rows.tolist() == [i - 1 for i in batch.hidden_rows.tolist()]
    assert apart.blocks[0].parents == block.parents


def test_a_short_run_is_left_to_its_branches():
    """2 tokens in common by four, 3 more by two of them: with 3 as the least the five are one."""
    rows = [row([1], [1, 2, *rest, 0]) for rest in ((3, 4, 5, 6), (3, 4, 5, 7), (8, 8), (9,))]
    batch = pack(rows, tree=plan(rows, Rule(shortest=3)))
    assert batch.input_ids.tolist() == [[1, 1, 2, 3, 4, 5, 6, 7, 1, 2, 8, 8, 1, 2, 9]]
    assert batch.blocks[0].cu_seqlens.tolist() == [0, 5, 6, 7, 11, 14]
    assert batch.blocks[0].parents == (-1, 0, 0, -1, -1)
    whole = pack(rows, tree=plan(rows, Rule(shortest=2)))
    assert whole.blocks[0].cu_seqlens.tolist() == [0, 2, 5, 6, 7, 9, 10]
    assert whole.blocks[0].parents == (-1, 0, 1, 1, 0, 0)


def test_a_beginning_of_another_completion_needs_no_segment():
    rows = [row([1], [4, 5, 6, 7]), row([1], [4, 5, 9]), row([1], [4, 5, 9])]
    batch = pack(rows, tree=plan(rows, Rule(shortest=100)))
    assert batch.input_ids.tolist() == [[1, 4, 5, 6]]
    assert batch.hidden_rows.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2]
    assert batch.blocks[0].parents == ()
    # where the longer one is in another part, it has rows of its own
    alone = pack(rows[1:], tree=plan(rows, EVERY))
    assert alone.input_ids.tolist() == [[1, 4, 5]]


def test_a_run_pays_by_the_rows_below_it():
    """10 tokens in common by two: 10 rows saved, 2 x 80 rows below that see one more segment."""
    rows = [row([1], [*range(10), i, *range(100, 179), 0]) for i in (50, 51)]
    assert plan(rows, Rule(shortest=10, price=1 / 17)) is not None
    assert plan(rows, Rule(shortest=10, price=1 / 16)) is None
    assert plan(rows, Rule(shortest=11)) is None
    # 10 of 180 rows are saved
    assert plan(rows, Rule(least=10 / 181)) is not None
    assert plan(rows, Rule(least=10 / 180)) is None


def test_no_tree_without_anything_to_share():
    assert plan([row([1], [2, 3]), row([1], [4, 5]), row([2], [2, 3])], EVERY) is None
    assert plan([row([1], [2])], EVERY) is None
    assert plan([], EVERY) is None


def test_a_thousand_completions_that_leave_one_after_the_other():
    """Deeper than Python may recurse."""
    line = list(range(1500))
    rows = [row([1], [*line[:i], 2000, 0]) for i in range(1, 1500)]
    batch = pack(rows, tree=plan(rows, EVERY))
    assert len(batch.input_ids[0]) == 1 + 2 * 1499
    assert batch.hidden_rows.max() == 2 * 1499


def test_common_length():
    assert common_length((), (1,)) == 0
    assert common_length((1, 2, 3), (1, 2, 3)) == 3
    assert common_length((1, 2, 3), (1, 2, 4, 5)) == 2


def random_rows(draw):
    def tokens():
        return [draw.choice((1, 1, 1, 2)) for _ in range(draw.randrange(1, 12))]

    return [row(draw.choice(PROMPTS), tokens()) for _ in range(30)]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("rule", [EVERY, Rule(shortest=3), Rule(price=0.3)], ids=str)
def test_whatever_is_shared_each_target_reads_its_own_text(rule, seed):
    draw = random.Random(seed)
    rows = random_rows(draw)
    tree = plan(rows, rule)
    most = draw.choice((14, 25, 1000))
    parts = [part for parts in split_rows(rows, most, tree) for part in parts]
    assert sorted(index for part in parts for index in part) == list(range(30))
    for part in parts:
        chosen = [rows[index] for index in part]
        batch = pack(chosen, tree=tree)
        ids, positions = batch.input_ids[0].tolist(), batch.position_ids[0].tolist()
        for block in batch.blocks:
            assert len(block.parents) in (0, len(block.cu_seqlens) - 1)
        assert len(ids) <= most or len({each.inputs for each in chosen}) == 1
        reads = iter(batch.hidden_rows.tolist())
        for each in chosen:
            places = [next(reads) for _ in each.token_ids]
            assert [ids[i] for i in places[1:]] == list(each.inputs)
            length = len(each.prompt_ids)
            assert [positions[i] for i in places] == list(
                range(length - 1, length - 1 + len(places))
            )


def test_without_a_rule_the_saving_is_what_was_measured():
    rows = random_rows(random.Random(1))
    rows.sort(key=lambda each: each.prompt_ids)
    batch = pack(rows, tree=plan(rows, EVERY))
    inputs = sum(len(each.inputs) for each in rows)
    kept = len(batch.input_ids[0]) - sum(map(len, PROMPTS))
    assert shared_token_ratio(rows)[1] == pytest.approx(1 - kept / inputs)


CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_the_rule_follows_the_implementation(monkeypatch):
    rule = tree_rule.rule_for
    assert rule("off", CPU, torch.float32, 64) is None
    assert rule("on", CPU, torch.float16, 64) == Rule(shortest=8)
    assert rule("auto", CPU, torch.float16, 64) == Rule(8, price=1 / 16, least=1 / 64)
    monkeypatch.setattr(tiles, "available", lambda dtype: dtype != torch.float16)
    for dtype in (torch.bfloat16, torch.float32):
        assert rule("auto", CPU, dtype, 64) == Rule(1, price=1 / 256, least=1 / 64)
        assert rule("on", CPU, dtype, 64) == Rule(shortest=1)
        assert rule("auto", CPU, dtype, 40).price == 1 / 16  # no tiles of that width


@pytest.mark.parametrize(
    ("capability", "flash", "expected"),
    [
        ((9, 0), False, Rule(8, price=1 / 64, least=1 / 64)),
        ((9, 0), True, Rule(8, price=1 / 64, least=1 / 16)),
        ((7, 5), False, None),
    ],
)
def test_the_rule_on_a_gpu(monkeypatch, capability, flash, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(dispatch, "has_flash_attn", lambda: flash)
    # what is compiled for a CPU alone is not asked, nor loaded
    monkeypatch.setattr(attention_tiles, "fits", None)
    assert tree_rule.rule_for("auto", GPU, torch.bfloat16, 128) == expected
    if expected is None:
        with pytest.raises(UserError, match="--prefix-tree is on, but only the slow reference"):
            tree_rule.rule_for("on", GPU, torch.bfloat16, 128)
    if flash:
        with (
            dispatch.use("flash"),
            pytest.raises(UserError, match="--prefix-tree is on.*takes no tree.*auto works"),
        ):
            tree_rule.rule_for("on", GPU, torch.bfloat16, 128)
        with dispatch.use("flash"):
            assert tree_rule.rule_for("auto", GPU, torch.bfloat16, 128) is None
