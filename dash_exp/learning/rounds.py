"""Rounds: the micro-batches that the ranks of a learner work on at the same time, one each (`Rounds`); and
learners that compute them: the protocol `RoundLearner`, and `LocalLearner` for a single process.

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
class MicroBatchResult:
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
    ) -> list[MicroBatchResult]: ...
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
        self.compute_weights = learner.weights.iter_weights

    @property
    def updates(self) -> int:
        return self.local.updates

    def reference_logprobs(self, ready: Round) -> list[Tensor | None]:
        """Log-probabilities of each micro-batch under the initial model; None without a KL term."""
        return [self.local.reference_logprobs(micro_batch) for micro_batch in ready]

    def logprobs(self, ready: Round) -> list[Tensor]:
        """Log-probabilities of each micro-batch under the current policy."""
        return [self.local.logprobs(micro_batch) for micro_batch in ready]

    def accumulate(
        self, ready: Round, references: Sequence[Tensor | None], old: Sequence[Tensor | None] | None = None
    ) -> list[MicroBatchResult]:
        """Forward and backward of each micro-batch; see `Learner.accumulate`."""
        results = []
        for micro_batch, reference, before in zip(ready, references, old or [None] * len(ready), strict=True):
            start = time.time()
            logprobs = self.local.accumulate(micro_batch, reference, before)
            results.append(MicroBatchResult(logprobs, start, time.time()))
        return results

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

    def flush(self) -> Iterator[Round]:
        """Yield the rounds of all pending micro-batches."""
        pending = [*self._pending, *self.packer.flush()]
        self._pending = []
        yield from balanced(pending, self.width, self.packer.max_tokens)


def balanced(ready: Sequence[MicroBatch], width: int, max_tokens: int) -> list[Round]:
    """The same completions in the shortest of three ways: as they are, in order; groups distributed,
    the longest first; groups cut to an equal share, then distributed (their prompts are computed again)."""
    if not ready:
        return []
    in_order = [tuple(ready[i : i + width]) for i in range(0, len(ready), width)]
    pieces = [piece for batch in ready for piece in batch.pieces]
    prompts = [len(p.source.group.prompt.token_ids) for p in pieces]
    completion_tokens = sum(p.tokens for p in pieces) - sum(prompts)
    share = max(prompts) + math.ceil(completion_tokens / (width * len(in_order)))
    smaller = [small for p in pieces for small in cut(p, min(share, max_tokens))]

    def as_round(bins: Sequence[Sequence[Piece]]) -> Round:
        return tuple(MicroBatch(tuple(content), ready[0].aggregation, ready[0].rows) for content in bins)

    by_group, by_piece = (
        [as_round(bins) for bins in balance(parts, width, max_tokens)] for parts in (pieces, smaller)
    )
    return min((in_order, by_group, by_piece), key=length)


def length(rounds: Sequence[Round]) -> int:
    """Tokens that the busiest rank of each round computes, in all."""
    return sum(max(batch.tokens for batch in ready) for ready in rounds)


def balance(pieces: Sequence[Piece], width: int, max_tokens: int) -> list[list[list[Piece]]]:
    """Rounds of up to `width` bins of pieces that fit `max_tokens`: longest first, each to the smallest bin.
    Within a bin pieces keep their order; bins of like size share a round."""
    total = sum(p.tokens for p in pieces)
    count = width * math.ceil(total / (width * max_tokens))
    while not _fits(bins := _assign(pieces, count), max_tokens):
        count += width
    by_size = sorted((content for content in bins if content), key=_tokens, reverse=True)
    return [by_size[i : i + width] for i in range(0, len(by_size), width)]


def _assign(pieces: Sequence[Piece], count: int) -> list[list[Piece]]:
    """Pieces in `count` bins, some of them perhaps empty or too full."""
    bins: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for index in sorted(range(len(pieces)), key=lambda i: -pieces[i].tokens):
        smallest = loads.index(min(loads))
        bins[smallest].append(index)
        loads[smallest] += pieces[index].tokens
    return [[pieces[i] for i in sorted(content)] for content in bins]


def _fits(bins: Sequence[Sequence[Piece]], max_tokens: int) -> bool:
    return all(len(content) <= 1 or _tokens(content) <= max_tokens for content in bins)


def _tokens(content: Sequence[Piece]) -> int:
    return sum(piece.tokens for piece in content)
