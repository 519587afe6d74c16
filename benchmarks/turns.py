"""Who is timed when: sides take turns in one process, so that both meet the same machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

Result = TypeVar("Result")
WARM_UP = 1


def alternate(
    sides: Mapping[str, Callable[[int], Result]], rounds: int, warm_up: int = WARM_UP
) -> dict[str, list[Result]]:
    """What each side gave, by its name: in every round each is called once, with the number of the
    round (from 1), in the opposite order every other time. The first `warm_up` rounds are not kept."""
    kept: dict[str, list[Result]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(1, warm_up + rounds + 1):
        for name in names if number % 2 else reversed(names):
            result = sides[name](number)
            if number > warm_up:
                kept[name].append(result)
    return kept


def seconds(work: Callable[[], object]) -> float:
    """How long it takes, an accelerator's part included."""
    settle()
    start = time.perf_counter()
    work()
    settle()
    return time.perf_counter() - start


def settle() -> None:
    """Wait until an accelerator has done what it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median(rows: Sequence[Mapping[str, Any]], *names: str) -> float:
    """Of the sum of these values of a row."""
    return statistics.median(sum(float(row[name]) for name in names) for row in rows)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, smallest and largest of what was measured, and all of it."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "all": list(values)}
