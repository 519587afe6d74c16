"""How fast servers decode, fitted to batches that were really sampled. Torch-free.

A decode step with n sequences takes a + b n seconds (weights are read once, each sequence costs its share),
and prompts take c seconds a token and hold up what the server decodes. So a completion of L tokens lasts

    a L + b (the sum of n over its L decode steps) + c (tokens of prompts that came meanwhile, its own too)

Decode steps are not seen, only when completions end; how many fall between two ends follows from b / a. So
for each b / a the rest is linear in a and c, non-negative least squares over all completions, and the b / a
that explains them best is looked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dash_exp.capacity.sampling import Decode
from dash_exp.types import Group

Floats = NDArray[np.floating[Any]]
GRID = 11
"""Values of b / a that are tried before the best of them is made exact."""
EXACT = 1e-4
"""Of the share of a decode step that is due to b."""
TURNS, STILL = 4, 1e-3
"""At most so many turns of c against the time that it leaves to decode steps; until it moves by less."""
LEAST_SHARE = 1e-3
"""Of any time, that is for decode steps, whatever prompts seem to take."""
LEAST_S = 1e-6
"""Of a decode step, where everything seems to be prompts."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Of one server. `decode`: seconds of a decode step; `prefill_s`: of a prompt token."""

    decode: Decode
    prefill_s: float


@dataclass(frozen=True)
class Served:
    """Completions of one batch on one server. `times`: when their number changed; `sequences`: how many there
    were from then on; `came`: tokens of the prompts that came then. By completion: `first` and `last` of the
    times are its start and end; `tokens` its own, `prompts` those of all prompts that came meanwhile."""

    times: Floats
    sequences: NDArray[np.int64]
    came: Floats
    first: NDArray[np.int64]
    last: NDArray[np.int64]
    tokens: Floats
    prompts: Floats

    @classmethod
    def of(cls, groups: Sequence[Group]) -> Served:
        """Of groups that one server sampled, undisturbed."""
        origins = [g.origin for g in groups if g.origin is not None]
        begun = np.array([o.start for o in origins])
        start = np.repeat(begun, [len(g.completions) for g in groups])
        end = np.array([time for o in origins for time in o.ends])
        computed = np.array([len(g.prompt.token_ids) for g in groups], dtype=float)
        times = np.unique(np.concatenate([start, end]))
        first, last = np.searchsorted(times, start), np.searchsorted(times, end)
        came: Floats = np.bincount(np.searchsorted(times, begun), computed, len(times)).astype(float)
        before = np.concatenate([[0.0], np.cumsum(came)])
        return cls(
            times,
            np.cumsum(np.bincount(first, minlength=len(times)) - np.bincount(last)),
            came,
            first,
            last,
            np.array([len(c.token_ids) for g in groups for c in g.completions], dtype=float),
            before[last] - before[first],
        )

    @property
    def lasted(self) -> Floats:
        """Seconds, by completion."""
        found: Floats = self.times[self.last] - self.times[self.first]
        return found

    def rows(self, fixed: float, each: float, c: float) -> Floats:
        """What seconds and c are multiplied with, for each completion, where a decode step of n sequences
        takes seconds x (fixed + each x n), and prompts about c a token."""
        spans, sequences = np.diff(self.times), self.sequences[:-1]
        cost = np.where(sequences > 0, np.maximum(fixed + each * sequences, 1e-12), 1.0)  # 0: it was idle
        steps = np.maximum(_left(spans, c * self.came[:-1]), LEAST_SHARE * spans) / cost
        reached = np.concatenate([[0.0], np.cumsum(steps)])
        passed = np.concatenate([[0.0], np.cumsum(steps * cost)])
        whole = reached[self.last] - reached[self.first]
        mean_cost = (passed[self.last] - passed[self.first]) / whole
        return np.column_stack([self.tokens * mean_cost, self.prompts])


def _left(spans: Floats, taken: Floats) -> Floats:
    """Of spans one after the other, what is not taken: something begins with each and takes this long, first
    what did not fit into earlier ones. A queue: by the end of a span all is done that was asked for, or else
    it was at work since the start of some span before which all was done."""
    asked = np.cumsum(taken)
    ends = np.cumsum(spans)
    idle_until = np.maximum.accumulate((ends - spans) - (asked - taken))
    return spans - np.diff(np.minimum(asked, ends - idle_until), prepend=0.0)


def undisturbed(groups: Sequence[Group]) -> bool:
    """Whether it is known when every completion ended: no other server was asked for any of them."""
    return bool(groups) and all(map(_known, groups))


def _known(group: Group) -> bool:
    origin = group.origin
    return (
        origin is not None and len(origin.ends) == len(group.completions) and min(origin.ends) > origin.start
    )


def by_server(groups: Sequence[Group]) -> tuple[Served, ...]:
    """A batch, as its servers had it. Raises ValueError where it was disturbed."""
    if not undisturbed(groups):
        raise ValueError("a batch of which some ends are not known tells nothing of speed")
    of: dict[str, list[Group]] = {}
    for group in groups:
        assert group.origin is not None
        of.setdefault(group.origin.worker, []).append(group)
    return tuple(map(Served.of, of.values()))


def fit_speed(served: Sequence[Served]) -> Speed:
    """Of servers like each other."""
    from scipy.optimize import minimize_scalar, nnls  # slow to import, and most runs never come here

    lasted = np.concatenate([one.lasted for one in served])
    most = max(int(one.sequences.max()) for one in served)

    def solved(share: float) -> tuple[Floats, float]:
        """Seconds and c, and how far off they are, where `share` of a step with the most sequences is
        due to their number."""
        c = 0.0
        for _ in range(TURNS):
            rows = np.concatenate([one.rows(1 - share, share / most, c) for one in served])
            found, off = nnls(rows, lasted)
            before, c = c, float(found[1])
            if abs(c - before) <= STILL * c:
                break
        return found, float(off)

    grid = np.linspace(0.0, 1.0, GRID)
    best = int(np.argmin([solved(share)[1] for share in grid]))
    near = grid[max(best - 1, 0)], grid[min(best + 1, GRID - 1)]
    exact = minimize_scalar(
        lambda share: solved(share)[1], bounds=near, method="bounded", options={"xatol": EXACT}
    )
    share = min((float(exact.x), float(grid[best])), key=lambda s: solved(s)[1])
    seconds, c = map(float, solved(share)[0])
    a, b = max(seconds * (1 - share), LEAST_S), seconds * share / most
    return Speed(Decode(((1.0, a + b), (2.0, a + 2 * b))), c)


def prefill_rate(speed: Speed) -> float:
    """Prompt tokens per second."""
    return 1 / speed.prefill_s if speed.prefill_s > 0 else math.inf
