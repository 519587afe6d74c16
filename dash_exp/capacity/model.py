"""How long a step takes, from measured curves: pure functions, torch-free. Assumptions: docs/capacity.md.

A server decodes all of its sequences together, one token each per decode step; `Decode` says how long such a
step takes with n sequences. Groups are handed out as `sampling/fleet/fleet.py` does, wait as
`learning/packing.py` packs them, and learners take micro-batches as they fill (`learning/rounds.py`).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from dash_exp.capacity.sampling import Decode, Lengths, Sampled, sample
from dash_exp.sampling.protocol import groups_at_once

DRAWS = 8
"""Batches of lengths that a prediction is the mean of."""


@dataclass(frozen=True, slots=True)
class Curves:
    """What was measured. `prefill_tokens_per_s`: of prompts, on one server. `learner_tokens_per_s`: input
    tokens of micro-batches that one learner forwards and backpropagates. `lengths`: of sampled groups, none
    longer than `cap`. `reduce_s`: summing gradients over two learners. Seconds of the others: once a step."""

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
    """What is to be predicted. `tokens`: the longest completion. `call`: prompts sampled and learned at a
    time (None: the whole batch). `kept`: share of the groups that the filter keeps. `equal`: every
    completion has `tokens` tokens. `streaming`: the learner works on devices of its own while groups are
    still sampled, asked for in `waves` parts; else one side works after the other."""

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
    """Seconds of a step. `sampling_s` and `backprop_s`: each side alone; `hidden_s`: how much of them
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
    """When everything is backpropagated. `arrivals`: (seconds, tokens of each piece) by group, in order.
    A micro-batch is full when the next piece would not fit into it. A round of one for each learner
    starts when all are full, and lasts as long as its largest; what is left at the end, or when the learners
    would have nothing to do until the next group comes, is dealt out."""
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
    """What a reduction over this many learners would take over two: in a ring each sends 2 (n - 1) / n of the
    gradients. 0 where there is nobody else."""
    return seconds * learners / (2 * (learners - 1)) if learners > 1 else 0.0


def _part(curves: Curves, setting: Setting, lengths: Lengths) -> tuple[float, Sampled, float]:
    """Of prompts that are sampled together: when all is done, when each was sampled, and seconds of
    backpropagation alone."""
    at_once = groups_at_once(len(lengths), setting.waves, setting.servers) if setting.streaming else None
    done = sample(
        lengths,
        curves.decode,
        curves.prompt_tokens / curves.prefill_tokens_per_s,
        servers=setting.servers,
        max_sequences=setting.max_sequences,
        at_once=at_once,
    )
    most, rate = setting.micro_batch_tokens, curves.learner_tokens_per_s
    cut = [[setting.kept * p for p in pieces(curves.prompt_tokens, group, most)] for group in lengths]
    alone = learn([(0.0, cut[g]) for _, g in done.ends], rate, learners=setting.learners, most=most)
    if not setting.streaming:
        return done.seconds + alone, done, alone
    end = learn([(t, cut[g]) for t, g in done.ends], rate, learners=setting.learners, most=most)
    return max(end, done.seconds), done, alone


def predict_batch(curves: Curves, setting: Setting, lengths: Lengths) -> Prediction:
    """A step on completions of these lengths."""
    size = setting.call or len(lengths)
    parts = [_part(curves, setting, lengths[i : i + size]) for i in range(0, len(lengths), size)]
    both = sum(end for end, _, _ in parts)
    sampling, backprop = sum(d.seconds for _, d, _ in parts), sum(alone for _, _, alone in parts)
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
        sequences=max(d.sequences for _, d, _ in parts),
    )


def predict(curves: Curves, setting: Setting, draws: int = DRAWS) -> Prediction:
    """The mean over some batches like the measured ones; the same batches whatever the setting."""
    each = [predict_batch(curves, setting, draw_lengths(curves, setting, seed)) for seed in range(draws)]
    n = len(each)
    return Prediction(
        step_s=sum(p.step_s for p in each) / n,
        sampling_s=sum(p.sampling_s for p in each) / n,
        backprop_s=sum(p.backprop_s for p in each) / n,
        hidden_s=sum(p.hidden_s for p in each) / n,
        reduce_s=each[0].reduce_s,
        optimizer_s=curves.optimizer_s,
        sync_s=curves.sync_s,
        other_s=curves.other_s,
        tokens=sum(p.tokens for p in each) / n,
        sequences=max(p.sequences for p in each),
    )


def wave_choices(prompts: int) -> list[int]:
    """1, 2, 4, ... and every prompt for itself."""
    return sorted({*(2**k for k in range(prompts.bit_length()) if 2**k < prompts), prompts})


def best_waves(curves: Curves, setting: Setting) -> tuple[int, Prediction]:
    """The number of waves with the shortest step (the smallest of equals). Few waves fill the servers
    better, many let the learner begin sooner; one side after the other wants a single one."""
    if not setting.streaming:
        return 1, predict(curves, replace(setting, waves=1))
    found = [(w, predict(curves, replace(setting, waves=w))) for w in wave_choices(setting.prompts)]
    return min(found, key=lambda pair: (pair[1].step_s, pair[0]))


def splits(curves: Curves, setting: Setting, gpus: int) -> list[tuple[Setting, Prediction]]:
    """Every way to give `gpus` devices to servers and learners, each with its best number of waves, the
    shortest step first. A single device is shared, one side after the other."""
    if gpus == 1:
        alone = replace(setting, servers=1, learners=1, streaming=False, waves=1)
        return [(alone, predict(curves, alone))]
    found = []
    for servers in range(1, gpus):
        apart = replace(setting, servers=servers, learners=gpus - servers, streaming=True)
        waves, prediction = best_waves(curves, apart)
        found.append((replace(apart, waves=waves), prediction))
    return sorted(found, key=lambda pair: (pair[1].step_s, pair[0].servers))
