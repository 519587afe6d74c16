"""The ledger: where the seconds of a step went. Exclusive, so phases sum to the step's wall time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

PHASES = ("sample", "verify", "logprob", "backprop", "optimizer", "sync", "evaluate", "checkpoint", "other")
Item = TypeVar("Item")


def union_s(intervals: Iterable[tuple[float, float]]) -> float:
    """Seconds covered by at least one of these (start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


class Ledger:
    """Seconds of the main process by phase. A phase entered inside another pauses the outer one; what
    lies in no phase is `other`."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._stack = ["other"]
        self._since = clock()
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._opened = self._since
        self._beside: list[tuple[float, float]] = []
        self._waited: set[str] = set()

    def beside(self, start: float, end: float, waits_in: str) -> None:
        """Another process worked from `start` to `end` (any one clock) while this process worked too, or
        waited for it in the phase `waits_in`."""
        self._beside.append((start, end))
        self._waited.add(waits_in)

    def overlap_s(self) -> float:
        """Seconds of this step in which others worked and this process did not wait for them: the union
        of their intervals, less the seconds in the phases that wait for them."""
        return max(0.0, union_s(self._beside) - sum(self._seconds[name] for name in self._waited))

    def _switch(self) -> None:
        now = self._clock()
        self._seconds[self._stack[-1]] += now - self._since
        self._since = now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        assert name in PHASES, name
        self._switch()
        self._stack.append(name)
        try:
            yield
        finally:
            self._switch()
            self._stack.pop()

    def waiting(self, name: str, items: Iterator[Item]) -> Iterator[Item]:
        """The same items; the time until each next one arrives counts for a phase."""
        while True:
            with self.phase(name):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    def so_far(self) -> tuple[float, dict[str, float]]:
        """Wall seconds and seconds by phase of this step until now."""
        self._switch()
        return self._since - self._opened, dict(self._seconds)

    def close_step(self) -> tuple[float, dict[str, float]]:
        """The same, and start the next step."""
        wall, seconds = self.so_far()
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._opened = self._since
        self._beside, self._waited = [], set()
        return wall, seconds


def training_seconds(wall: float, seconds: Mapping[str, float]) -> float:
    """Seconds of a step that count against a budget: neither evaluation nor checkpoints."""
    return wall - seconds["evaluate"] - seconds["checkpoint"]


@dataclass(slots=True)
class Budget:
    """Seconds of training time that a run may use, over all its attempts; `limit_s` None: any."""

    limit_s: float | None
    spent_s: float
    ledger: Ledger

    def over(self) -> bool:
        """Whether they are used up, the running step included."""
        if self.limit_s is None:
            return False
        return self.spent_s + training_seconds(*self.ledger.so_far()) >= self.limit_s

    def close_step(self) -> tuple[float, dict[str, float]]:
        """The step has ended: count it, and start the next. Returns what was counted."""
        wall, seconds = self.ledger.close_step()
        self.spent_s += training_seconds(wall, seconds)
        return wall, seconds
