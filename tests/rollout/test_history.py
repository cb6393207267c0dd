"""Tables of n-grams against counts by hand, and the bounds of what is remembered."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from polymath_fast.rollout.history import History, NGramTable, context_of, draft
from polymath_fast.rollout.speculation import Speculation, surest
from polymath_fast.rollout.tail import Tail
from polymath_fast.rollout.types import Request, SamplingOptions
from polymath_fast.rollout.wave import Wave, slots_of

PROMPT = [1, 2, 3]


def drafted(table, tokens, most=6):
    """Tokens of one draft after `tokens`, and the chances of its beginnings."""
    found, chances = draft([table], np.array([context_of(tokens)]), most)
    length = int((chances[0] > 0).sum())
    assert (chances[0, length:] == 0).all()
    return found[0, :length].tolist(), chances[0, :length].tolist()


def test_the_most_frequent_continuation_follows():
    """After 2 3 came 4 three times and 9 once: 3 of 4, counted as 3 of 5. After 3 4 only 5 (3 of
    4), after 4 5 only 6, after 5 6 twice 7 and once 8 (2 of 4). 0.6 * 0.75 * 0.75 * 0.5 < 0.2."""
    table = NGramTable(PROMPT, [[4, 5, 6, 7], [4, 5, 6, 8], [4, 5, 6, 7], [9]])
    tokens, chances = drafted(table, PROMPT)
    assert tokens == [4, 5, 6]
    assert chances == pytest.approx([0.6, 0.45, 0.3375])
    assert drafted(table, [*PROMPT, 4, 5, 6]) == ([7], pytest.approx([0.5]))


def test_of_equally_frequent_tokens_the_smallest_follows():
    table = NGramTable(PROMPT, [[8, 5], [5, 8], [9, 1], [5, 8], [8, 5]])
    assert drafted(table, PROMPT, 1) == ([5], pytest.approx([2 / 6]))


def test_the_longest_known_context_decides():
    """7 follows 5 6 once, after 1 2 3 4; 8 follows it twice, after other tokens."""
    lists = [[11, 12, 13, 14, 5, 6, 7], [20, 5, 6, 8], [30, 5, 6, 8]]
    table = NGramTable(PROMPT, lists)
    assert drafted(table, [13, 14, 5, 6], 1) == ([7], pytest.approx([0.5]))  # four tokens known
    assert drafted(table, [99, 14, 5, 6], 1) == ([8], pytest.approx([0.5]))  # two: 2 of 3, + 1
    assert drafted(table, [99, 6], 1) == ([], [])


def test_contexts_reach_into_the_prompt_but_not_into_other_completions():
    table = NGramTable(PROMPT, [[4, 5], [6, 7]])
    assert drafted(table, [5, 6], 1) == ([], [])
    assert drafted(table, [3, 4], 1) == ([5], pytest.approx([0.5]))
    short = NGramTable([], [[4, 5, 6]])
    assert drafted(short, []) == ([4, 5], pytest.approx([0.5, 0.25]))
    assert drafted(short, [0]) == ([], [])  # a token 0 is something, unlike none


def test_of_two_tables_the_surer_is_believed():
    old, new = NGramTable(PROMPT, [[4, 5]] * 2), NGramTable(PROMPT, [[6, 5]] * 3)
    contexts = np.array([context_of(PROMPT)])
    for tables in ([old, new], [new, old]):
        tokens, chances = draft(tables, contexts, 1)
        assert tokens.tolist() == [[6]]
        assert chances == pytest.approx(np.array([[0.75]]))


@pytest.mark.parametrize("completions", [[], [[]], [[], []]])
def test_nothing_is_drafted_from_nothing(completions):
    assert drafted(NGramTable(PROMPT, completions), PROMPT) == ([], [])
    assert draft([], np.array([context_of(PROMPT)]), 3)[1].sum() == 0


def test_history_keeps_the_last_steps_of_each_prompt():
    history = History(steps=2)
    for token in (4, 5, 6):
        history.add(PROMPT, [[token]] * (10 - token))
    assert history.num_tokens == 5 + 4
    assert drafted(history.table(PROMPT), PROMPT, 1)[0] == [5]  # 4 is forgotten
    assert history.table([7]) is None


def test_history_forgets_the_prompt_asked_longest_ago_beyond_its_bound():
    history = History(max_tokens=10)
    history.add([1], [[5, 5, 5, 5]])
    history.add([2], [[6, 6, 6, 6]])
    history.add([1], [[7, 7]])
    assert history.num_tokens == 10
    history.add([3], [[8], [9]])
    assert history.table([2]) is None and history.num_tokens == 8
    history.add([4], [[1] * 6, [2] * 4, [3]])  # more than fit: the first ones
    assert history.num_tokens == 10 and history.table([1]) is None


def test_history_comes_back_from_a_checkpoint():
    history = History(steps=2)
    history.add(PROMPT, [[4, 5], [6]])
    history.add([9, 8], [[], [7, 7, 7]])
    history.add(PROMPT, [[4], [4, 2]])
    tensors = {name: tensor.clone() for name, tensor in history.tensors().items()}
    back = History(steps=2)
    back.load(tensors)
    for name, tensor in back.tensors().items():
        assert torch.equal(tensor, tensors[name]) and tensor.dtype == torch.int32
    assert drafted(back.table(PROMPT), PROMPT) == drafted(history.table(PROMPT), PROMPT)
    for each in (history, back):  # both forget the same next
        each.add(PROMPT, [[1]])
    assert back.num_tokens == history.num_tokens == 3 + 3 + 1
    back.load({"master": torch.zeros(3)})
    assert back.num_tokens == 0
    empty = History()
    empty.load(History().tensors())
    assert empty.num_tokens == 0


@pytest.mark.parametrize(
    ("drawn", "draft_tokens", "stands"),
    [
        ([5], [], (1, 0)),
        ([5, 6, 7], [5, 6], (3, 2)),
        ([5, 9, 7], [5, 6], (2, 1)),
        ([8, 6, 7], [5, 6], (1, 0)),
        ([2, 6, 7], [5, 6], (1, 0)),
        ([5, 2, 7], [5, 2], (2, 2)),  # the drafted stop token was right: nothing follows it
        ([5, 2, 7], [5, 6], (2, 1)),
        ([5, 6, 2], [5, 6], (3, 2)),
    ],
)
def test_what_stands_of_a_block(drawn, draft_tokens, stands):
    speculation, ended = Speculation(4), {}
    sampling = SamplingOptions(max_completion_length=8)
    slots = slots_of([Request(prompt_ids=[1], n=1)])
    wave = Wave(slots, sampling, frozenset({2}), 16, torch.Generator())
    tail = Tail(speculation, None, wave, torch.tensor([0]))
    kept = tail._take(tail.rows, torch.tensor(drawn), torch.zeros(3), draft_tokens, ended)
    assert (kept, speculation._counts["accepted"]) == stands
    assert wave.so_far(0) == drawn[:kept]
    assert ended == ({0: "stop"} if 2 in drawn[:kept] else {})


def test_the_budget_goes_to_the_surest():
    chances = np.array([[0.9, 0.5, 0.4], [0.6, 0.5, 0.0], [0.0, 0.0, 0.0]])
    assert surest(chances, 0).tolist() == [0, 0, 0]
    assert surest(chances, 2).tolist() == [1, 1, 0]
    assert surest(chances, 3).tolist() == [2, 1, 0]  # of equals the upper row
    assert surest(chances, 99).tolist() == [3, 2, 0]
