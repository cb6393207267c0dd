"""Completions of one prompt that begin alike share the rows of their beginning.

Inputs of completions form a radix tree. A run of tokens that several have in common becomes a
segment of its own, which the others continue; attention lets each row see the segments above its
own, so that nothing changes but the number of rows. What branches is cut only where it pays, see
`Rule`: a run that does not is left to each of its branches. Inputs that are a beginning of other
ones need no rows and no segment: their targets read the rows of the longer ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from polymath_fast.learner.packing import TrainingRow

Tokens = tuple[int, ...]
"""inputs of a completion: its tokens without the last one"""
Cuts = tuple[int, ...]
"""where a path through the tree changes segments: lengths, ascending, that of the inputs last"""


@dataclass(frozen=True)
class Rule:
    """Which common runs become segments, and from which saving on a tree is used at all."""

    shortest: int = 1
    """tokens of a segment that others continue"""
    price: float = 0.0
    """what it costs a row, in rows of the model, to see one more segment"""
    least: float = 0.0
    """share of the rows that must be saved"""

    def pays(self, run: int, branches: int, below: int) -> bool:
        """Whether sharing `run` tokens between `branches`, which have `below` rows, saves more
        rows than it costs."""
        return run >= self.shortest and run * (branches - 1) > self.price * below


@dataclass(frozen=True)
class Segments:
    """Rows behind one prompt, in preorder."""

    tokens: list[int]
    depths: list[int]
    """for each row the tokens of the completion before it"""
    offsets: list[int]
    """where segments begin, and the end"""
    parents: Cuts
    """the segment that each continues, -1 for the prompt; empty when all continue the prompt"""
    rows: dict[Tokens, list[int]]
    """inputs -> the row of each token"""


class PrefixTree:
    """The tree of every prompt of a batch; made by `plan`, restricted by whoever packs a part."""

    def __init__(self, cuts: Mapping[tuple[int, ...], Mapping[Tokens, Cuts]]):
        self._cuts = cuts

    def new_rows(self, prompt: tuple[int, ...], previous: Tokens | None, inputs: Tokens) -> int:
        """Rows that `inputs` add to a part whose last ones, in ascending order, are `previous`."""
        if previous is None:
            return len(inputs)
        if inputs[: len(previous)] == previous:
            return len(inputs) - len(previous)
        return len(inputs) - self._shared(prompt, previous, inputs)

    def segments(self, prompt: tuple[int, ...], members: Iterable[Tokens]) -> Segments:
        """The part of the tree that `members` need; runs without a branch left are joined."""
        ordered = sorted(set(members))
        ends = _ends(ordered)
        common = [self._shared(prompt, *pair) for pair in pairwise(ends)]
        cuts = _cut([len(end) for end in ends], common, lambda *_: True)
        made = Segments([], [], [0], (), {})
        parents: list[int] = []
        path: list[int] = []
        rows: list[int] = []
        for end, own, shared in zip(ends, cuts, [0, *common], strict=False):
            known = sum(cut <= shared for cut in own[:-1])
            path, begin = path[:known], own[known - 1] if known else 0
            rows = rows[:begin]
            for cut in own[known:]:
                parents.append(path[-1] if path else -1)
                path.append(len(parents) - 1)
                rows = rows + list(range(len(made.tokens), len(made.tokens) + cut - begin))
                made.tokens.extend(end[begin:cut])
                made.depths.extend(range(begin, cut))
                made.offsets.append(len(made.tokens))
                begin = cut
            made.rows[end] = rows
        for inputs, longer in reversed(list(pairwise(ordered))):
            if inputs not in made.rows:
                made.rows[inputs] = made.rows[longer][: len(inputs)]
        flat = all(parent < 0 for parent in parents)
        return Segments(
            made.tokens, made.depths, made.offsets, () if flat else tuple(parents), made.rows
        )

    def _shared(self, prompt: tuple[int, ...], one: Tokens, other: Tokens) -> int:
        """Tokens of the segments that both have in common."""
        cuts = self._cuts[prompt]
        most, shared = common_length(one, other), 0
        for mine, theirs in zip(cuts[one], cuts[other], strict=False):
            if mine != theirs or mine > most:
                break
            shared = mine
        return shared


def flat_segments(members: Iterable[Tokens]) -> Segments:
    """Distinct inputs in the order of `members`, each a segment that continues the prompt."""
    made = Segments([], [], [0], (), {})
    for inputs in members:
        if inputs in made.rows:
            continue
        made.rows[inputs] = list(range(len(made.tokens), len(made.tokens) + len(inputs)))
        made.tokens.extend(inputs)
        made.depths.extend(range(len(inputs)))
        made.offsets.append(len(made.tokens))
    return made


def plan(rows: Sequence[TrainingRow], rule: Rule) -> PrefixTree | None:
    """The tree of `rows` by `rule`; None when it would not save enough."""
    members: dict[tuple[int, ...], set[Tokens]] = {}
    for row in rows:
        members.setdefault(row.prompt_ids, set()).add(row.inputs)
    cuts: dict[tuple[int, ...], dict[Tokens, Cuts]] = {}
    tree, total, needed = PrefixTree(cuts), 0, 0
    for prompt, distinct in members.items():
        ordered = sorted(distinct)
        cuts[prompt] = _planned(ordered, rule)
        total += sum(map(len, ordered))
        needed += sum(tree.new_rows(prompt, *pair) for pair in pairwise([None, *ordered]))
    return tree if total - needed > rule.least * total else None


def _planned(ordered: list[Tokens], rule: Rule) -> dict[Tokens, Cuts]:
    """Cuts of distinct inputs in ascending order."""
    ends = _ends(ordered)
    common = [common_length(*pair) for pair in pairwise(ends)]
    cuts = dict(zip(ends, _cut([len(end) for end in ends], common, rule.pays), strict=True))
    for inputs, longer in reversed(list(pairwise(ordered))):
        if inputs not in cuts:
            cuts[inputs] = (*(c for c in cuts[longer] if c < len(inputs)), len(inputs))
    return cuts


def _ends(ordered: Sequence[Tokens]) -> list[Tokens]:
    """Those that are no beginning of another one."""
    return [
        one
        for i, one in enumerate(ordered)
        if i + 1 == len(ordered) or ordered[i + 1][: len(one)] != one
    ]


def _cut(
    lengths: Sequence[int], common: Sequence[int], pays: Callable[[int, int, int], bool]
) -> list[Cuts]:
    """Cuts of inputs in ascending order, whose neighbours have `common` tokens in common."""
    cuts: list[Cuts] = [()] * len(lengths)
    todo: list[tuple[int, int, int, Cuts]] = [(0, len(lengths), 0, ())] if lengths else []
    while todo:
        low, high, begin, above = todo.pop()
        if high - low == 1:
            cuts[low] = (*above, lengths[low])
            continue
        branch = min(common[low : high - 1])
        edges = [low, *(i + 1 for i in range(low, high - 1) if common[i] == branch), high]
        below = sum(lengths[low:high]) - sum(common[low : high - 1]) - branch
        if branch > begin and pays(branch - begin, len(edges) - 1, below):
            begin, above = branch, (*above, branch)
        todo += [(*edge, begin, above) for edge in pairwise(edges)]
    return cuts


def common_length(one: Tokens, other: Tokens) -> int:
    """Tokens that both begin with; by halves, so that most are compared in one go."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
