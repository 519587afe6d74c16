"""How long a step takes, from measured curves: pure functions. Assumptions: docs/capacity.md.

A server decodes all of its sequences together, one token each per decode step; `Decode` says how long a step
takes with n sequences. Groups are assigned as sampling/fleet/fleet.py does, cut as learning/packing.py does,
and learners take micro-batches as they fill (learning/rounds.py).
"""

from __future__ import annotations

import heapq
import math
import random
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

from dash_exp.sampling.protocol import groups_at_once

DRAWS = 8
"""Batches of lengths that a prediction is the mean of."""
Lengths = tuple[tuple[int, ...], ...]
"""Tokens of each completion, by group."""


@dataclass(frozen=True, slots=True)
class Decode:
    """Seconds of one decode step by the number of sequences, piecewise linear: constant below the first
    point, and beyond the last as between the last two. `points`: (sequences, seconds), in order of both."""

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


@dataclass(frozen=True, slots=True)
class Curves:
    """What was measured. `prefill_tokens_per_s`: of prompts, on one server. `learner_tokens_per_s`: input
    tokens of micro-batches that one learner forwards and backpropagates. `lengths`: of sampled groups, none
    longer than `cap`. `reduce_s`: summing gradients over two learners. The other seconds: once a step."""

    decode: Decode
    prefill_tokens_per_s: float
    learner_tokens_per_s: float
    lengths: Lengths
    cap: int
    prompt_tokens: int
    optimizer_s: float = 0.0
    sync_s: float = 0.0
    reduce_s: float = 0.0
    other_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Setting:
    """What is to be predicted. `tokens`: the longest completion. `call`: prompts sampled and learned from at
    a time (None: the batch). `kept`: share of the groups that the filter keeps. `equal`: every completion has
    `tokens` tokens. `streaming`: the learner works on devices of its own while groups are still being
    sampled, requested in `waves` parts; else both sides take turns."""

    servers: int = 1
    learners: int = 1
    prompts: int = 16
    group: int = 8
    waves: int = 1
    tokens: int = 128
    kept: float = 1.0
    streaming: bool = False
    equal: bool = False
    call: int | None = None
    max_sequences: int = 256
    micro_batch_tokens: int = 1024


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds of a step. `sampling_s` and `backprop_s`: each side by itself; `hidden_s`: how much of them
    overlapped. `tokens`: sampled. `sequences`: the most that one server decoded at once."""

    step_s: float
    sampling_s: float
    backprop_s: float
    hidden_s: float
    reduce_s: float
    optimizer_s: float
    sync_s: float
    other_s: float
    tokens: float
    sequences: int

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.step_s


# --- sampling: servers with continuous batching, simulated event by event ---


class _Server:
    """One server: its running sequences, and how far they are. Times are absolute."""

    def __init__(self, decode: Decode) -> None:
        self.decode = decode
        self.now = 0.0
        self.busy_until = 0.0  # with prompts
        self.steps = 0.0
        self.ends: list[tuple[float, int]] = []  # decode step at which a sequence of a group ends
        self.groups: set[int] = set()
        self.most = 0

    def advance(self, time: float) -> None:
        if self.ends:
            begin = max(self.now, self.busy_until)
            self.steps += max(0.0, time - begin) / self.decode.seconds(len(self.ends))
        self.now = time

    def add(self, group: int, lengths: Sequence[int], prefill_s: float) -> None:
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


def sample(lengths: Lengths, decode: Decode, prefill_s: float, setting: Setting) -> Sampled:
    """Sample a batch of these lengths. A group goes to the server with the fewest groups that has room, and
    at most the completions of one wave are in flight. `prefill_s`: seconds of a group's prompt."""
    at_once = groups_at_once(len(lengths), setting.waves, setting.servers) if setting.streaming else None
    machines = [_Server(decode) for _ in range(setting.servers)]
    queue, left = deque(range(len(lengths))), [len(group) for group in lengths]
    ends: list[tuple[float, int]] = []
    nexts = [math.inf] * setting.servers

    def assign(now: float) -> None:
        while queue:
            size = len(lengths[queue[0]])
            if at_once is not None and sum(len(m.ends) for m in machines) + size > at_once * size:
                return
            most = setting.max_sequences - size
            free = [n for n, m in enumerate(machines) if not m.groups or len(m.ends) <= most]
            if not free:
                return
            chosen = min(free, key=lambda n: len(machines[n].groups))
            machines[chosen].advance(now)
            group = queue.popleft()
            machines[chosen].add(group, lengths[group], prefill_s)
            nexts[chosen] = machines[chosen].next_end()

    assign(0.0)
    while (now := min(nexts)) < math.inf:
        number = nexts.index(now)
        machine = machines[number]
        machine.advance(now)
        group = machine.finish_next()
        left[group] -= 1
        if left[group] == 0:
            machine.groups.discard(group)
            ends.append((now, group))
        assign(now)
        nexts[number] = machine.next_end()
    return Sampled(tuple(ends), max(m.most for m in machines))


def draw_lengths(curves: Curves, setting: Setting, seed: int) -> Lengths:
    """Lengths of one batch: groups like the measured ones, scaled so that `cap` becomes `tokens`."""
    if setting.equal:
        return ((setting.tokens,) * setting.group,) * setting.prompts
    random_ = random.Random(seed)
    scale = setting.tokens / curves.cap

    def scaled(length: int) -> int:
        return min(setting.tokens, max(1, round(length * scale)))

    groups = []
    for _ in range(setting.prompts):
        like = random_.choice(curves.lengths)
        groups.append(tuple(scaled(random_.choice(like)) for _ in range(setting.group)))
    return tuple(groups)


# --- learning ---


def pieces(prompt: int, lengths: Sequence[int], most: int) -> Iterator[int]:
    """Input tokens of the pieces that a group is cut into, as `learning.packing.pieces_of` cuts it: the
    prompt comes once in each, and nothing is predicted from a completion's last token."""
    tokens, some = prompt, False
    for length in lengths:
        if some and tokens + length - 1 > most:
            yield tokens
            tokens = prompt
        tokens, some = tokens + length - 1, True
    yield tokens


def learn(
    arrivals: Sequence[tuple[float, Sequence[float]]], rate: float, *, learners: int, most: int
) -> float:
    """When everything is backpropagated. `arrivals`: (seconds, tokens of each piece) by group, in order. A
    micro-batch is full when the next piece would not fit into it. A round of one for each learner starts when
    all are full, and lasts as long as its largest; what is left at the end, or when the learners would be
    idle until the next group comes, is split evenly."""
    free, waiting, full, before = 0.0, 0.0, list[float](), 0.0
    for time, sizes in arrivals:
        if (held := sum(full) + waiting) and max(free, before) < time:
            free, waiting, full = max(free, before) + held / learners / rate, 0.0, []
        before = time
        for tokens in sizes:
            if waiting and waiting + tokens > most:
                full.append(waiting)
                waiting = 0.0
                if len(full) == learners:
                    free = max(time, free) + max(full) / rate
                    full = []
            waiting += tokens
    rest = sum(full) + waiting
    return max(arrivals[-1][0], free) + rest / learners / rate if rest else free


def of_two(seconds: float, learners: int) -> float:
    """The time over two learners of a reduction that takes `seconds` over this many: in a ring each sends
    2 (n - 1) / n of the gradients. 0 for a single learner."""
    return seconds * learners / (2 * (learners - 1)) if learners > 1 else 0.0


# --- predictions ---


def _predict_call(curves: Curves, setting: Setting, lengths: Lengths) -> tuple[float, Sampled, float]:
    """Of prompts that are sampled together: when all is done, when each was sampled, and the seconds of
    backpropagation by itself."""
    done = sample(lengths, curves.decode, curves.prompt_tokens / curves.prefill_tokens_per_s, setting)
    most, rate = setting.micro_batch_tokens, curves.learner_tokens_per_s
    cut = [[setting.kept * p for p in pieces(curves.prompt_tokens, group, most)] for group in lengths]
    arrivals = [(time, cut[group]) for time, group in done.ends]
    alone = learn([(0.0, sizes) for _, sizes in arrivals], rate, learners=setting.learners, most=most)
    if not setting.streaming:
        return done.seconds + alone, done, alone
    return max(learn(arrivals, rate, learners=setting.learners, most=most), done.seconds), done, alone


def predict_batch(curves: Curves, setting: Setting, lengths: Lengths) -> Prediction:
    """A step on completions of these lengths."""
    size = setting.call or len(lengths)
    calls = [_predict_call(curves, setting, lengths[i : i + size]) for i in range(0, len(lengths), size)]
    both = sum(end for end, _, _ in calls)
    sampling, backprop = sum(d.seconds for _, d, _ in calls), sum(alone for _, _, alone in calls)
    reduce = curves.reduce_s / of_two(1.0, setting.learners) if setting.learners > 1 else 0.0
    return Prediction(
        step_s=both + reduce + curves.optimizer_s + curves.sync_s + curves.other_s,
        sampling_s=sampling,
        backprop_s=backprop,
        hidden_s=max(0.0, sampling + backprop - both),
        reduce_s=reduce,
        optimizer_s=curves.optimizer_s,
        sync_s=curves.sync_s,
        other_s=curves.other_s,
        tokens=sum(map(sum, lengths)),
        sequences=max(d.sequences for _, d, _ in calls),
    )


def predict(curves: Curves, setting: Setting, draws: int = DRAWS) -> Prediction:
    """The mean over some batches like the measured ones; the same batches for every setting."""
    each = [predict_batch(curves, setting, draw_lengths(curves, setting, seed)) for seed in range(draws)]
    means = {f.name: sum(getattr(p, f.name) for p in each) / len(each) for f in fields(Prediction)}
    return Prediction(**{**means, "sequences": max(p.sequences for p in each)})  # type: ignore[arg-type]


def wave_choices(prompts: int) -> list[int]:
    """1, 2, 4, ... and each prompt in a wave of its own."""
    return sorted({*(2**k for k in range(prompts.bit_length()) if 2**k < prompts), prompts})


def best_waves(curves: Curves, setting: Setting) -> tuple[int, Prediction]:
    """The number of waves with the shortest step (the smallest of equals). Few waves fill the servers better,
    many let the learner start sooner; without streaming one is best."""
    choices = wave_choices(setting.prompts) if setting.streaming else [1]
    found = [(w, predict(curves, replace(setting, waves=w))) for w in choices]
    return min(found, key=lambda pair: (pair[1].step_s, pair[0]))


def splits(curves: Curves, setting: Setting, gpus: int) -> list[tuple[Setting, Prediction]]:
    """Every split of `gpus` devices into servers and learners, each with its best number of waves, the
    shortest step first. A single device is shared: both sides take turns."""
    if gpus == 1:
        alone = replace(setting, servers=1, learners=1, streaming=False, waves=1)
        return [(alone, predict(curves, alone))]
    found = []
    for servers in range(1, gpus):
        apart = replace(setting, servers=servers, learners=gpus - servers, streaming=True)
        waves, prediction = best_waves(curves, apart)
        found.append((replace(apart, waves=waves), prediction))
    return sorted(found, key=lambda pair: (pair[1].step_s, pair[0].servers))
