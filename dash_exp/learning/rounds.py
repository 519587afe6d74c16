"""Rounds: the micro-batches that the ranks of a learner work on at the same time, one each; and what the
training loop calls of a learner, `RoundLearner`.

A round lasts as long as its largest micro-batch, so work is balanced by tokens. Full micro-batches are nearly
equal; what is left at a flush, and a mini-batch that is known completely, is distributed anew where that is
shorter. A single process has rounds of one micro-batch, in order.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dash_exp.learning.learner import Learner
from dash_exp.learning.packing import MicroBatch, Packer, Piece, cut
from dash_exp.learning.settings import UpdateStats
from dash_exp.record.checkpoint import Snapshot
from dash_exp.types import AdvantagedGroup

Round = tuple[MicroBatch, ...]
"""At most as many micro-batches as there are ranks; the first is for rank 0. A rank without one is idle."""


@dataclass(frozen=True, slots=True)
class Backpropagated:
    """A micro-batch's log-probabilities, and when it was computed (seconds since the epoch)."""

    logprobs: Tensor
    start: float
    end: float


class RoundLearner(Protocol):
    """A learner as the training loop uses it: `LocalLearner` in this process, `DistributedLearner` over
    several.

    `width`: micro-batches in a full round; `workers`: who computes them, as events name them. `local`: the
    learner in this process; `sharded`: it holds only a part of each tensor.
    """

    width: int
    workers: tuple[str, ...]
    local: Learner
    sharded: bool

    @property
    def updates(self) -> int: ...
    def reference_logprobs(self, ready: Round) -> list[Tensor | None]: ...
    def logprobs(self, ready: Round) -> list[Tensor]: ...
    def accumulate(
        self, ready: Round, references: Sequence[Tensor | None], old: Sequence[Tensor | None] | None = None
    ) -> list[Backpropagated]: ...
    def update(self, denominator: float) -> UpdateStats: ...
    def take_sums(self) -> dict[str, float]: ...
    def compute_weights(self) -> Iterator[tuple[str, Tensor]]: ...
    def preflight(self, micro_batch: MicroBatch) -> None: ...
    def snapshot(
        self, step: int, *, moments: bool = True, row: Mapping[str, Any] | None = None
    ) -> Snapshot: ...
    def restore(self, snapshot: Snapshot) -> None: ...
    def release(self) -> None: ...


class LocalLearner:
    """A learner in this process."""

    def __init__(self, learner: Learner):
        self.local = learner
        self.width, self.sharded = 1, False
        self.workers: tuple[str, ...] = ("learner",)
        self.update, self.take_sums = learner.update, learner.take_sums
        self.preflight, self.snapshot, self.restore = learner.preflight, learner.snapshot, learner.restore
        self.compute_weights = learner.weights.computed

    @property
    def updates(self) -> int:
        return self.local.updates

    def reference_logprobs(self, ready: Round) -> list[Tensor | None]:
        """Of each micro-batch under the initial model; None where the objective has no KL term."""
        return [self.local.reference_logprobs(micro_batch) for micro_batch in ready]

    def logprobs(self, ready: Round) -> list[Tensor]:
        """Of each micro-batch under the current policy."""
        return [self.local.logprobs(micro_batch) for micro_batch in ready]

    def accumulate(
        self, ready: Round, references: Sequence[Tensor | None], old: Sequence[Tensor | None] | None = None
    ) -> list[Backpropagated]:
        """Forward and backward of each micro-batch; see `Learner.accumulate`."""
        done = []
        for micro_batch, reference, before in zip(ready, references, old or [None] * len(ready), strict=True):
            start = time.time()
            logprobs = self.local.accumulate(micro_batch, reference, before)
            done.append(Backpropagated(logprobs, start, time.time()))
        return done

    def release(self) -> None:
        """Free GPU memory that is cached but unused, for other processes."""
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


class Rounds:
    """Turns groups, as they arrive, into rounds of `width` micro-batches."""

    def __init__(self, packer: Packer, width: int):
        self.packer, self.width = packer, width
        self._pending: list[MicroBatch] = []

    def add(self, group: AdvantagedGroup) -> Iterator[Round]:
        """Take a group; yield every round that this completes."""
        for ready in self.packer.add(group):
            self._pending.append(ready)
            if len(self._pending) == self.width:
                yield tuple(self._pending)
                self._pending = []

    def take(self, group: AdvantagedGroup | None) -> Iterator[Round]:
        """Add a group; None where none has finished: then the pending micro-batches are a round, so that
        ranks do not wait. How a batch is cut depends on time then, its gradient does not."""
        yield from self.flush() if group is None else self.add(group)

    def flush(self) -> Iterator[Round]:
        """Yield the rounds of all pending micro-batches."""
        rest = [*self._pending, *self.packer.flush()]
        self._pending = []
        yield from balanced(rest, self.width, self.packer.max_tokens)


def balanced(ready: Sequence[MicroBatch], width: int, max_tokens: int) -> list[Round]:
    """The same completions in the shortest of three ways: as they are, in order; groups distributed,
    the longest first; groups cut to an equal share, then distributed (their prompts are computed again)."""
    if not ready:
        return []
    in_order = [tuple(ready[i : i + width]) for i in range(0, len(ready), width)]
    pieces = [piece for batch in ready for piece in batch.pieces]
    prompts = [len(p.source.group.prompt.token_ids) for p in pieces]
    own = sum(p.tokens for p in pieces) - sum(prompts)
    share = max(prompts) + math.ceil(own / (width * len(in_order)))
    smaller = [small for p in pieces for small in cut(p, min(share, max_tokens))]
    dealt = (deal(some, width, max_tokens) for some in (pieces, smaller))
    rounds = [
        [tuple(MicroBatch(tuple(own), ready[0].aggregation, ready[0].rows) for own in one) for one in way]
        for way in dealt
    ]
    return min((in_order, *rounds), key=length)


def length(rounds: Sequence[Round]) -> int:
    """Tokens that the busiest rank of each round computes, in all."""
    return sum(max(batch.tokens for batch in one) for one in rounds)


def deal(pieces: Sequence[Piece], width: int, max_tokens: int) -> list[list[list[Piece]]]:
    """Rounds of up to `width` hands of pieces that fit `max_tokens`: longest first, each to the smallest
    hand. Within a hand pieces keep their order; hands of like size share a round."""
    total = sum(p.tokens for p in pieces)
    hands = width * math.ceil(total / (width * max_tokens))
    while not _fits(made := _dealt(pieces, hands), max_tokens):
        hands += width
    sized = sorted((hand for hand in made if hand), key=_tokens, reverse=True)
    return [sized[i : i + width] for i in range(0, len(sized), width)]


def _dealt(pieces: Sequence[Piece], hands: int) -> list[list[Piece]]:
    taken: list[list[int]] = [[] for _ in range(hands)]
    loads = [0] * hands
    for index in sorted(range(len(pieces)), key=lambda i: -pieces[i].tokens):
        least = loads.index(min(loads))
        taken[least].append(index)
        loads[least] += pieces[index].tokens
    return [[pieces[i] for i in sorted(hand)] for hand in taken]


def _fits(hands: Sequence[Sequence[Piece]], max_tokens: int) -> bool:
    return all(len(hand) <= 1 or _tokens(hand) <= max_tokens for hand in hands)


def _tokens(hand: Sequence[Piece]) -> int:
    return sum(piece.tokens for piece in hand)
