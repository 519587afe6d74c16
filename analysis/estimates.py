"""Statistics for a few seeds and some hundred prompts: pure functions over arrays.

Axes: S seeds, P prompts, K values of k, R resamples. Two sources of noise are kept apart: which seeds a
recipe was run with, and which prompts it was asked. Where there is too little of one of them, the interval
is NaN and `note` says why.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import signal, stats

from dash_exp.statistics import pass_at_k

Array = npt.NDArray[np.float64]

MIN_SEEDS = 3
"""Fewer runs give no interval over seeds."""
MIN_PROMPTS = 20
MIN_STEPS = 12
"""A shorter curve gives no `instability`."""
RESAMPLES = 4000


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
    """Arm minus baseline, paired; `p` of a two-sided paired t-test over seeds (NaN below MIN_SEEDS)."""

    estimate: Estimate
    p: float = math.nan


NOTHING = Estimate(math.nan, note="no data")


def generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed))


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


def accuracy(scores_SP: Array, seed: int = 0) -> Estimate:
    """Mean score over seeds and prompts, both resampled (the pigeonhole bootstrap, Owen 2007): seeds and
    prompts are crossed, every run is asked the same prompts. `scores_SP`: the mean verdict of each prompt in
    each run, in [0, 1]. With fewer than MIN_SEEDS runs only prompts are resampled, and the note says so."""
    scores = np.asarray(scores_SP, dtype=float)
    if scores.size == 0:
        return NOTHING
    n_seeds, n_prompts = scores.shape
    if n_prompts < MIN_PROMPTS:
        return Estimate(
            float(scores.mean()),
            n_seeds=n_seeds,
            n_prompts=n_prompts,
            note=f"{n_prompts} prompts: no interval (needs {MIN_PROMPTS})",
        )
    values_R = resampled_means(scores, seed)
    low, high = np.quantile(values_R, [0.025, 0.975])
    note = "" if n_seeds >= MIN_SEEDS else f"{few_seeds(n_seeds)}; over prompts only"
    return Estimate(float(scores.mean()), float(low), float(high), n_seeds, n_prompts, note)


def resampled_means(scores_SP: Array, seed: int = 0, resamples: int = RESAMPLES) -> Array:
    """Means of resampled prompts and, from MIN_SEEDS runs on, of resampled seeds: shape [R]."""
    n_seeds, n_prompts = scores_SP.shape
    rng = generator(seed)
    weights_RP = rng.multinomial(n_prompts, np.full(n_prompts, 1 / n_prompts), resamples) / n_prompts
    if n_seeds < MIN_SEEDS:
        return np.asarray(weights_RP @ scores_SP.mean(axis=0))
    weights_RS = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), resamples) / n_seeds
    return np.asarray(((weights_RS @ scores_SP) * weights_RP).sum(axis=1))


@dataclass(frozen=True, slots=True)
class Noise:
    """Standard errors of a mean accuracy: from which seeds were run, from which prompts were asked."""

    seeds: float
    prompts: float


def noise(scores_SP: Array) -> Noise:
    """The two sources apart; NaN where there is one run, or one prompt."""
    n_seeds, n_prompts = scores_SP.shape
    of_seeds, of_prompts = scores_SP.mean(axis=1), scores_SP.mean(axis=0)
    by_seed = float(of_seeds.std(ddof=1) / math.sqrt(n_seeds)) if n_seeds > 1 else math.nan
    by_prompt = float(of_prompts.std(ddof=1) / math.sqrt(n_prompts)) if n_prompts > 1 else math.nan
    return Noise(by_seed, by_prompt)


def difference(arm_SP: Array, baseline_SP: Array, seed: int = 0) -> Difference:
    """Arm minus baseline in accuracy: same seeds in the same order, same prompts, so pairs are resampled."""
    if arm_SP.shape != baseline_SP.shape:
        raise ValueError(f"pairs need equal shapes, got {arm_SP.shape} and {baseline_SP.shape}")
    return Difference(
        accuracy(arm_SP - baseline_SP, seed), paired_p(arm_SP.mean(axis=1), baseline_SP.mean(axis=1))
    )


def paired_p(arm_S: Array, baseline_S: Array) -> float:
    """Two-sided paired t-test over seeds; NaN below MIN_SEEDS, 1 where all pairs are equal."""
    gaps = np.asarray(arm_S, dtype=float) - np.asarray(baseline_S, dtype=float)
    if len(gaps) < MIN_SEEDS:
        return math.nan
    if np.ptp(gaps) <= 1e-12:  # all alike: no noise to test against
        return 1.0 if abs(gaps[0]) <= 1e-12 else 0.0
    return float(stats.ttest_1samp(gaps, 0).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (Holm 1979): the i-th smallest of m (from 0) times m - i, made monotone
    and at most 1. NaN stays NaN and does not count as a test."""
    adjusted = [math.nan] * len(p_values)
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def speed_up(baseline_S: Sequence[float] | Array, arm_S: Sequence[float] | Array) -> Estimate:
    """Baseline's time over the arm's, runs paired by seed: the geometric mean of their ratios, with Student's
    t interval of its logarithm."""
    ratios = np.log(_finite(baseline_S) / _finite(arm_S))
    of_log = over_seeds(ratios)
    return Estimate(
        math.exp(of_log.value), math.exp(of_log.low), math.exp(of_log.high), of_log.n_seeds, 0, of_log.note
    )


def time_to(values_T: Array, times_T: Array, target: float, window: int = 5) -> float:
    """The first time at which the mean of the last `window` values reaches the target; NaN: never. Both
    arrays in order of time."""
    if len(values_T) < window:
        return math.nan
    means = np.convolve(values_T, np.ones(window) / window, mode="valid")
    reached = np.flatnonzero(means >= target - 1e-9)  # sums of decimals are off by less
    return float(times_T[reached[0] + window - 1]) if len(reached) else math.nan


def pass_at_k_curve(correct_SP: Array, n: int, k: Sequence[int], seed: int = 0) -> list[Estimate]:
    """pass@k over prompts and seeds: `correct_SP` counts the correct ones of n samples. k > n: NaN, and the
    note says so. Resampling is of prompts and seeds, never of samples."""
    curve = []
    for size in k:
        if size > n:
            curve.append(Estimate(math.nan, note=f"k = {size} > n = {n} samples"))
            continue
        table = np.array([pass_at_k(n, c, size) for c in range(n + 1)])
        curve.append(accuracy(table[np.asarray(correct_SP, dtype=int)], seed))
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
    """How much a reward curve swings about its own trend: the standard deviation of what is left when a
    local quadratic over a third of the run (Savitzky and Golay 1964) is taken away, freed of what the fit
    itself swallows of white noise. NaN for a curve too short to tell."""
    curve = _finite(curve_T)
    window = max(5, len(curve) // 3 | 1)
    if len(curve) < MIN_STEPS:
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
