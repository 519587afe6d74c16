"""How long servers take to sample a batch of known lengths: a part of the capacity model (capacity/model.py),
simulated event by event. Torch-free."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

Lengths = tuple[tuple[int, ...], ...]
"""Tokens of each completion, by group."""


@dataclass(frozen=True, slots=True)
class Decode:
    """Seconds of one decode step by how many sequences are decoded together: piecewise linear.

    `points`: (sequences, seconds), in order of both. Below the first point a step takes as long as there,
    beyond the last it grows as between the last two.
    """

    points: tuple[tuple[float, float], ...]

    @classmethod
    def of_rates(cls, rates: Sequence[tuple[float, float]]) -> Decode:
        """From (sequences, tokens per second): a step of n sequences takes n / rate. More sequences never
        make a step shorter; where noise says so, the longer time counts."""
        points: list[tuple[float, float]] = []
        longest = 0.0
        for sequences, rate in sorted(rates):
            longest = max(longest, sequences / rate)
            points.append((sequences, longest))
        return cls(tuple(points))

    def seconds(self, sequences: int) -> float:
        if len(self.points) == 1 or sequences <= self.points[0][0]:
            return self.points[0][1]
        place = min(bisect_left(self.points, (sequences, 0.0)), len(self.points) - 1)
        (n0, s0), (n1, s1) = self.points[place - 1], self.points[place]
        return s0 + (s1 - s0) * (sequences - n0) / (n1 - n0)


class _Server:
    """One server: sequences at work, and how far they are. Times are absolute."""

    def __init__(self, decode: Decode) -> None:
        self.decode = decode
        self.now = 0.0
        self.busy_until = 0.0  # with prompts
        self.steps = 0.0
        self.ends: list[tuple[float, int]] = []  # decode step at which a sequence of a group ends
        self.groups: set[int] = set()
        self.most = 0

    def move(self, time: float) -> None:
        """Decode until then."""
        if self.ends:
            begin = max(self.now, self.busy_until)
            self.steps += max(0.0, time - begin) / self.decode.seconds(len(self.ends))
        self.now = time

    def take(self, group: int, lengths: Sequence[int], prefill_s: float) -> None:
        self.busy_until = max(self.busy_until, self.now) + prefill_s
        for length in lengths:
            heapq.heappush(self.ends, (self.steps + length, group))
        self.groups.add(group)
        self.most = max(self.most, len(self.ends))

    def next_end(self) -> float:
        if not self.ends:
            return math.inf
        left = max(0.0, self.ends[0][0] - self.steps)
        return max(self.now, self.busy_until) + left * self.decode.seconds(len(self.ends))

    def finish_next(self) -> int:
        end, group = heapq.heappop(self.ends)
        self.steps = max(self.steps, end)
        return group


@dataclass(frozen=True, slots=True)
class Sampled:
    """When each group of a batch was complete: (seconds, group), in that order."""

    ends: tuple[tuple[float, int], ...]
    sequences: int

    @property
    def seconds(self) -> float:
        return self.ends[-1][0]


def sample(
    lengths: Lengths,
    decode: Decode,
    prefill_s: float,
    *,
    servers: int,
    max_sequences: int,
    at_once: int | None,
) -> Sampled:
    """Continuous batching over some servers: a group goes to the one with the fewest groups, as long as it
    has room, and at most as many completions are on their way as `at_once` groups have. `prefill_s`: seconds
    of a group's prompt."""
    machines = [_Server(decode) for _ in range(servers)]
    queue, left = deque(range(len(lengths))), [len(group) for group in lengths]
    ends: list[tuple[float, int]] = []
    nexts = [math.inf] * servers

    def assign(now: float) -> None:
        while queue:
            size = len(lengths[queue[0]])
            if at_once is not None and sum(len(m.ends) for m in machines) + size > at_once * size:
                return
            room = [n for n, m in enumerate(machines) if not m.groups or len(m.ends) + size <= max_sequences]
            if not room:
                return
            chosen = min(room, key=lambda n: len(machines[n].groups))
            machines[chosen].move(now)
            group = queue.popleft()
            machines[chosen].take(group, lengths[group], prefill_s)
            nexts[chosen] = machines[chosen].next_end()

    assign(0.0)
    while (now := min(nexts)) < math.inf:
        number = nexts.index(now)
        machine = machines[number]
        machine.move(now)
        group = machine.finish_next()
        left[group] -= 1
        if left[group] == 0:
            machine.groups.discard(group)
            ends.append((now, group))
        assign(now)
        nexts[number] = machine.next_end()
    return Sampled(tuple(ends), max(m.most for m in machines))
