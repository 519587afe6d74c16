"""Estimates from a few seeds and some hundred prompts: pure functions over arrays.

Axes: S seeds, P prompts, K values of k. Intervals and p-values are those of `dash_exp.statistics.comparison`;
where there is too little data for an interval it is NaN, and `note` says why.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy import signal, stats

from dash_exp.statistics.comparison import MIN_SEEDS, Comparison, compare_runs, share_interval
from dash_exp.statistics.shares import pass_at_k

Array = npt.NDArray[np.float64]

MIN_PROMPTS = 20
MIN_POINTS = 8
"""A shorter curve gives no `instability`."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its 95 % interval; `low` and `high` are NaN where none can be given, and `note` says why.
    `n_seeds`, `n_prompts`: what it comes from (0 prompts: not a matter of prompts)."""

    value: float
    low: float = math.nan
    high: float = math.nan
    n_seeds: int = 0
    n_prompts: int = 0
    note: str = ""

    @property
    def has_interval(self) -> bool:
        return math.isfinite(self.low) and math.isfinite(self.high)


@dataclass(frozen=True, slots=True)
class Difference:
    """Arm minus baseline with its two-sided p-value (NaN below MIN_SEEDS seeds)."""

    estimate: Estimate
    p: float = math.nan


NOTHING = Estimate(math.nan, note="no data")


def over_seeds(values_S: Sequence[float] | Array) -> Estimate:
    """The mean over seeds with Student's t interval: with three runs a bootstrap would cover far less than
    it says. Raises ValueError for a value that is no number: the caller says what is missing."""
    values = _finite(values_S)
    if len(values) == 0:
        return NOTHING
    middle = float(values.mean())
    if len(values) < MIN_SEEDS:
        return Estimate(middle, n_seeds=len(values), note=few_seeds(len(values)))
    half = float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return Estimate(middle, middle - half, middle + half, len(values))


def share_over_seeds(values_S: Sequence[float] | Array) -> Estimate:
    """The same for shares: the interval ends at 0 and 1."""
    found = over_seeds(values_S)
    if math.isnan(found.low):
        return found
    return replace(found, low=max(0.0, found.low), high=min(1.0, found.high))


def accuracy(scores_SP: Array, *, trained: bool = True) -> Estimate:
    """Mean score over seeds and prompts with its interval. `scores_SP`: the mean verdict of each prompt in
    each run, in [0, 1]. With fewer than MIN_SEEDS runs of a `trained` model the interval is over prompts
    only, and the note says so."""
    scores = np.asarray(scores_SP, dtype=float)
    if scores.size == 0:
        return NOTHING
    n_seeds, n_prompts = scores.shape
    value = float(scores.mean())
    if n_prompts < MIN_PROMPTS:
        note = f"{n_prompts} prompts: no interval (needs {MIN_PROMPTS})"
        return Estimate(value, n_seeds=n_seeds, n_prompts=n_prompts, note=note)
    low, high = share_interval(scores, trained=trained)
    note = f"{few_seeds(n_seeds)}; over prompts only" if trained and n_seeds < MIN_SEEDS else ""
    return Estimate(value, low, high, n_seeds, n_prompts, note)


def difference(found: Comparison, factor: float = 1.0) -> Difference:
    """A comparison as it is shown, in a unit that is `factor` of its own."""
    low, high = found.interval()
    estimate = Estimate(
        found.difference * factor, low * factor, high * factor, found.seeds, found.prompts, found.note
    )
    return Difference(estimate, found.p_value())


def log_ratio(baseline: Mapping[int, float], arm: Mapping[int, float]) -> Comparison:
    """Logarithm of the baseline's time over the arm's, by seed."""
    logs = [{seed: math.log(value) for seed, value in times.items()} for times in (baseline, arm)]
    return compare_runs(*logs)


def as_ratio(found: Comparison) -> Estimate:
    """A difference of logarithms as a ratio with its interval."""
    low, high = found.interval()
    return Estimate(math.exp(found.difference), math.exp(low), math.exp(high), found.seeds, 0, found.note)


def time_to(values_T: Array, times_T: Array, target: float, window: int = 5) -> float:
    """The first time at which the mean of the last `window` values reaches the target; NaN: never. Both
    arrays in order of time."""
    if len(values_T) < window:
        return math.nan
    means = np.convolve(values_T, np.ones(window) / window, mode="valid")
    reached = np.flatnonzero(means >= target - 1e-9)  # sums of decimals are off by less
    return float(times_T[reached[0] + window - 1]) if len(reached) else math.nan


def pass_at_k_curve(correct_SP: Array, n: int, k: Sequence[int], *, trained: bool = True) -> list[Estimate]:
    """pass@k over prompts and seeds: `correct_SP` counts the correct ones of n samples. k > n: NaN, and the
    note says so. Prompts and seeds are the observations, never samples."""
    curve = []
    for size in k:
        if size > n:
            curve.append(Estimate(math.nan, note=f"k = {size} > n = {n} samples"))
            continue
        table = np.array([pass_at_k(n, c, size) for c in range(n + 1)])
        curve.append(accuracy(table[np.asarray(correct_SP, dtype=int)], trained=trained))
    return curve


def crossing(k: Sequence[int], one: Sequence[float], other: Sequence[float]) -> list[float]:
    """The values of k at which two curves meet, linear in log k between the points given."""
    gaps = np.asarray(one, dtype=float) - np.asarray(other, dtype=float)
    logs = np.log(np.asarray(k, dtype=float))
    found = []
    for i in range(len(gaps) - 1):
        if math.isfinite(gaps[i]) and math.isfinite(gaps[i + 1]) and gaps[i] * gaps[i + 1] < 0:
            share = gaps[i] / (gaps[i] - gaps[i + 1])
            found.append(float(np.exp(logs[i] + share * (logs[i + 1] - logs[i]))))
    return found


def instability(curve_T: Sequence[float] | Array) -> float:
    """How much a curve swings about its own trend: the standard deviation of what is left when a
    local quadratic over a third of the run (Savitzky and Golay 1964) is taken away, freed of what the fit
    itself swallows of white noise. NaN for a curve too short to tell."""
    curve = _finite(curve_T)
    window = max(5, len(curve) // 3 | 1)
    if len(curve) < MIN_POINTS:
        return math.nan
    rest = curve - signal.savgol_filter(curve, window, 2)
    unit = np.eye(len(curve))
    left = unit - signal.savgol_filter(unit, window, 2, axis=0)
    return float(math.sqrt((rest**2).sum() / (left**2).sum()))


def _finite(values: Sequence[float] | Array) -> Array:
    array = np.asarray(values, dtype=float)
    if not np.isfinite(array).all():
        raise ValueError(f"values must be numbers, got {array}")
    return array


def few_seeds(n: int) -> str:
    return f"{n} seed{'s' if n != 1 else ''}: no interval over seeds (needs {MIN_SEEDS})"
