"""The ledger: where the seconds of a step went. Exclusive, so phases sum to the step's wall time."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

BEAT_S, SUSPENDED_S = 0.25, 2.0
"""Seconds between two beats of the clock; a longer pause without work is a suspension."""
BUSY_SHARE = 0.05
"""Share of a pause in which a process that was not suspended uses a processor: something else kept the clock
from beating."""
CORES = min(8, os.cpu_count() or 1)
PHASES = ("sample", "verify", "logprob", "backprop", "optimizer", "sync", "evaluate", "checkpoint", "other")
Item = TypeVar("Item")


def union_s(intervals: Iterable[tuple[float, float]]) -> float:
    """Seconds covered by at least one of these (start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


@dataclass(frozen=True, slots=True)
class Times:
    """Now, by the clocks of the system: `running` goes on while the process is stopped but not while the
    machine sleeps, `booted` goes on then too; `worked`: seconds of processor time of this process."""

    running: float
    booted: float
    worked: float

    @classmethod
    def now(cls) -> Times:
        booted = time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
        return cls(time.perf_counter(), booted, time.process_time())


class RunningClock:
    """Seconds in which this process was not suspended: neither stopped (SIGSTOP, Ctrl-Z, a frozen container)
    nor asleep with the machine. A thread calls it often, so that a pause between two calls is seen."""

    def __init__(self, times: Callable[[], Times] = Times.now):
        self._times, self._lock = times, threading.Lock()
        self._last = times()
        self._stopped_s = 0.0
        self._gaps: list[tuple[float, float]] = []
        self._ended = threading.Event()

    def __call__(self) -> float:
        with self._lock:
            before, now = self._last, self._times()
            self._last = now
            pause, slept = now.running - before.running, now.booted - before.booted
            work = BUSY_SHARE * slept + BEAT_S * CORES  # the second part: since the last beat
            if slept > SUSPENDED_S and now.worked - before.worked < work:
                self._gaps.append((time.time() - slept, time.time()))
                self._stopped_s += pause
            return now.running - self._stopped_s

    def take_gaps(self) -> list[tuple[float, float]]:
        """Start and end, in seconds since the epoch, of each suspension since the last call."""
        self()
        with self._lock:
            taken, self._gaps = self._gaps, []
        return taken

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Notice every suspension inside the block."""

        def beat() -> None:
            while not self._ended.wait(BEAT_S):
                self()

        thread = threading.Thread(target=beat, name="clock", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()


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
        self._gaps: list[tuple[float, float]] = []

    def suspended(self, gaps: Iterable[tuple[float, float]]) -> None:
        """This process was suspended in these intervals of this step: nothing worked beside it then."""
        self._gaps += gaps

    def beside(self, start: float, end: float, waits_in: str) -> None:
        """Another process worked from `start` to `end` (any one clock) while this process worked too, or
        waited for it in the phase `waits_in`."""
        self._beside.append((start, end))
        self._waited.add(waits_in)

    def suspended_s(self) -> float:
        """Seconds of this step in which this process was suspended."""
        return union_s(self._gaps)

    def overlap_s(self) -> float:
        """Seconds of this step in which others worked and this process did not wait for them: the union
        of their intervals, less the seconds in the phases that wait for them."""
        worked = union_s([*self._beside, *self._gaps]) - union_s(self._gaps)
        return max(0.0, worked - sum(self._seconds[name] for name in self._waited))

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
        self._beside, self._waited, self._gaps = [], set(), []
        return wall, seconds


def training_seconds(wall: float, seconds: Mapping[str, float]) -> float:
    """Seconds of a step that count against a budget: neither evaluation nor checkpoints."""
    return wall - seconds["evaluate"] - seconds["checkpoint"]


SECONDS = "seconds"
COUNTED = {"tokens": "tokens/sampled", "backpropagated": "tokens/backpropagated", "updates": "updates"}
"""The other units of a budget, and the keys of a step's row that count them."""


@dataclass(slots=True)
class Budget:
    """What a run may use over all its attempts: seconds of training, or what its steps count (`unit`, see
    COUNTED). `limit` None: any."""

    limit: float | None
    spent: float
    ledger: Ledger
    unit: str = SECONDS

    def over(self) -> bool:
        """Whether it is used up; of seconds those of the running step count."""
        if self.limit is None:
            return False
        running = training_seconds(*self.ledger.so_far()) if self.unit == SECONDS else 0.0
        return self.spent + running >= self.limit

    def count(self, row: Mapping[str, float]) -> None:
        """Add what a step has used of a unit other than seconds, by its row."""
        self.spent += row[COUNTED[self.unit]]

    def close_step(self) -> tuple[float, dict[str, float]]:
        """The step has ended: add its seconds if they are counted, and start the next. Returns wall seconds
        and seconds by phase."""
        wall, seconds = self.ledger.close_step()
        if self.unit == SECONDS:
            self.spent += training_seconds(wall, seconds)
        return wall, seconds
