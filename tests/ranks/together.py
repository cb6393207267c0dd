"""Several processes of a run, played by threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from polymath_fast.ranks import Ranks


def at_once(ranks: list[Ranks], work: Callable[[Ranks], Any]) -> list[Any]:
    """What `work` returns for each of them, all at work at the same time."""
    found: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda each=each: found.update({each.rank: work(each)}))
        for each in ranks
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return [found[each.rank] for each in ranks]
