"""Rounds: the micro-batches that the ranks of a learner work on at the same time, one each.

A round lasts as long as its largest micro-batch, so work is balanced by tokens. Full micro-batches are nearly
equal as they come; what is left at a flush, or a mini-batch known whole, is dealt anew where that is
shorter. With one rank a round is one micro-batch, in order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from dash_exp.learning.packing import MicroBatch, Packer, Piece, cut
from dash_exp.types import AdvantagedGroup

Round = tuple[MicroBatch, ...]
"""At most as many micro-batches as there are ranks; the first is for rank 0. A rank without one is idle."""


class Rounds:
    """Turns groups, as they arrive, into rounds of `width` micro-batches."""

    def __init__(self, packer: Packer, width: int):
        self.packer, self.width = packer, width
        self._waiting: list[MicroBatch] = []

    def add(self, group: AdvantagedGroup) -> Iterator[Round]:
        """Take a group; yield every round that this completes."""
        for ready in self.packer.add(group):
            self._waiting.append(ready)
            if len(self._waiting) == self.width:
                yield tuple(self._waiting)
                self._waiting = []

    def take(self, group: AdvantagedGroup | None) -> Iterator[Round]:
        """A group, or None where none has come yet: rather than let ranks wait, what is held is handed on.
        How a batch is cut depends on time then, its gradient does not."""
        yield from self.flush() if group is None else self.add(group)

    def flush(self) -> Iterator[Round]:
        """Yield what is waiting, if anything is."""
        rest = [*self._waiting, *self.packer.flush()]
        self._waiting = []
        yield from balanced(rest, self.width, self.packer.max_tokens)


def balanced(ready: Sequence[MicroBatch], width: int, max_tokens: int) -> list[Round]:
    """The same completions in the shortest of three ways: as they are, in order; groups dealt out, the
    longest first; groups cut to an equal share, then dealt out (their prompts are computed again)."""
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
