"""The one rule by which recipes are compared: intervals, p-values, equivalence, several claims or looks.

Two sources of noise are kept apart: which seeds a recipe was trained with, and which prompts it was asked.
An interval is the wider of two, one that counts both sources and one for prompts only, and p is the larger
of the two p-values, so that p < 0.05 exactly where the 95 % interval excludes the null value. Formulas,
assumptions and the coverage in simulation: docs/statistics.md (see also Colas et al. 2018, arXiv 1806.08295).

Axes: R runs (one per seed), P prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy import stats

from dash_exp.statistics.shares import Z95, wilson_interval

Array = npt.NDArray[np.float64]

MIN_SEEDS = 3
"""With fewer runs of a trained arm nothing is concluded."""
PAIRED_FROM = 5
"""From so many common seeds on, runs are paired by seed; below, too few degrees of freedom would be left."""
FEW_PROMPTS = 5
"""Where fewer prompts differ from the median, their variance is not estimated from them alone."""
LOOK_WEIGHTS: Mapping[int, float] = {3: 0.1, 5: 0.2, 8: 0.3, 12: 0.4}
"""Share of the error probability spent at each number of seeds when seeds are added in rounds."""


@dataclass(frozen=True, slots=True)
class Error:
    """A squared standard error with its degrees of freedom."""

    variance: float
    df: float

    def half_width(self, level: float) -> float:
        return float(stats.t.ppf(0.5 + level / 2, self.df) * math.sqrt(self.variance))

    def tail(self, distance: float) -> float:
        """P(T > distance / standard error); 0.5 for a distance of 0."""
        if self.variance == 0.0:
            return 0.5 if distance == 0.0 else float(distance < 0.0)
        return float(stats.t.sf(distance / math.sqrt(self.variance), self.df))


@dataclass(frozen=True, slots=True)
class Comparison:
    """Arm minus other. `errors`: by seeds and prompts, and by prompts only; empty where nothing can be
    concluded, and `note` says why. `seeds`, `prompts`: what was compared (0 prompts: numbers per run)."""

    difference: float
    errors: tuple[Error, ...] = ()
    seeds: int = 0
    prompts: int = 0
    note: str = ""

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """(nan, nan) where nothing can be concluded."""
        if not self.errors:
            return math.nan, math.nan
        half = max(error.half_width(level) for error in self.errors)
        return self.difference - half, self.difference + half

    def p_value(self, null: float = 0.0) -> float:
        """Two-sided p-value of `difference == null`; NaN where nothing can be concluded."""
        distance = abs(self.difference - null)
        return max((2.0 * error.tail(distance) for error in self.errors), default=math.nan)

    def p_equivalent(self, margin: float) -> float:
        """p-value of |difference| >= margin by two one-sided tests: below 0.05 exactly where the 90 %
        interval lies within the margin."""
        distance = margin - abs(self.difference)
        return max((error.tail(distance) for error in self.errors), default=math.nan)

    def p_within(self, margin: float) -> float:
        """p-value of whichever of |difference| < margin and its contrary the data are nearer to: of
        equivalence within the margin, or of a difference beyond it. At most one of the two can be a false
        decision."""
        if abs(self.difference) <= margin:
            return self.p_equivalent(margin)
        return self.p_value(math.copysign(margin, self.difference))

    def scaled(self, factor: float) -> Comparison:
        """The same comparison in another unit."""
        errors = tuple(replace(e, variance=e.variance * factor**2) for e in self.errors)
        return replace(self, difference=self.difference * factor, errors=errors)


def compare_scores(
    arm: Mapping[int, Array], other: Mapping[int, Array], *, trained: bool = True
) -> Comparison:
    """Mean scores of two arms on common prompts. `arm`, `other`: by seed, one score per prompt, shape [P],
    prompts in the same order. Not `trained`: the other arm is one model without training, which adds no
    noise of seeds. Raises ValueError where numbers of prompts differ or are below 2."""
    a_RP, b_RP, paired = _common(arm, other, trained)
    if len({a_RP.shape[1], b_RP.shape[1]}) > 1 or a_RP.shape[1] < 2:
        raise ValueError(f"need the same 2 or more prompts, got shapes {a_RP.shape} and {b_RP.shape}")
    d_P = a_RP.mean(axis=0) - b_RP.mean(axis=0)
    seeds = len(a_RP) if not trained else min(len(a_RP), len(b_RP))
    n_prompts = len(d_P)
    if seeds < MIN_SEEDS:
        return Comparison(float(d_P.mean()), (), seeds, n_prompts, too_few(seeds))
    unpaired = [a_RP, b_RP] if trained else [a_RP]
    tables = [a_RP - b_RP] if paired else unpaired
    both = _seeds_and_prompts(tables, float(d_P.var(ddof=1)) / n_prompts)
    return Comparison(float(d_P.mean()), (both, _prompts_only(d_P)), seeds, n_prompts)


def compare_runs(arm: Mapping[int, float], other: Mapping[int, float]) -> Comparison:
    """Numbers per run (a length, the logarithm of a time) of two arms, by seed."""
    a, b = ({seed: np.array([value]) for seed, value in runs.items()} for runs in (arm, other))
    a_R1, b_R1, paired = _common(a, b, trained=True)
    difference, seeds = float(a_R1.mean() - b_R1.mean()), min(len(a_R1), len(b_R1))
    if seeds < MIN_SEEDS:
        return Comparison(difference, (), seeds, note=too_few(seeds))
    tables = [a_R1 - b_R1] if paired else [a_R1, b_R1]
    parts = [_of_runs(table) for table in tables]
    total = sum(part.variance for part in parts)
    if total <= 1e-24 * max(1.0, difference**2):
        return Comparison(difference, (), seeds, note="runs do not vary by seed: no noise to test against")
    return Comparison(difference, (Error(total, _welch(parts, total)),), seeds)


def share_interval(scores_RP: Array, *, trained: bool = True) -> tuple[float, float]:
    """95 % interval of one arm's mean score in [0, 1], over seeds and prompts; over prompts only where there
    are fewer than MIN_SEEDS runs or the model is not `trained`. Wilson's interval with the number of
    observations that gives the rule's half width; exact binomial at 0 and 1. [nan, nan] below 2 prompts."""
    scores_P = scores_RP.mean(axis=0)
    mean, n_prompts = float(scores_P.mean()), len(scores_P)
    if n_prompts < 2:
        return math.nan, math.nan
    if mean in (0.0, 1.0):
        nearest = 1.0 - 0.025 ** (1.0 / n_prompts)
        return (0.0, nearest) if mean == 0.0 else (1.0 - nearest, 1.0)
    half = _prompts_only(scores_P).half_width(0.95)
    if trained and len(scores_RP) >= MIN_SEEDS:
        both = _seeds_and_prompts([scores_RP], float(scores_P.var(ddof=1)) / n_prompts)
        least = len(scores_RP) - 1
        half = max(half, replace(both, df=least + (both.df - least) / 2).half_width(0.95))
    n_effective = Z95**2 * mean * (1.0 - mean) / half**2
    return wilson_interval(mean * n_effective, n_effective)


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


def sequential_p(looks: Mapping[int, float]) -> float:
    """One p-value from looks at growing numbers of seeds: the smallest p / weight (a union bound over
    LOOK_WEIGHTS, so a look may be skipped). `looks`: p-value by number of seeds; numbers that are no planned
    look do not count. NaN where none does."""
    found = [
        p / LOOK_WEIGHTS[seeds] for seeds, p in looks.items() if seeds in LOOK_WEIGHTS and not math.isnan(p)
    ]
    return min(1.0, *found) if found else math.nan


def too_few(seeds: int) -> str:
    return f"{seeds} seed{'s' if seeds != 1 else ''}: no verdict (needs {MIN_SEEDS})"


def _common(arm: Mapping[int, Array], other: Mapping[int, Array], trained: bool) -> tuple[Array, Array, bool]:
    """Both arms' tables, and whether rows are pairs: then only common seeds are in them."""
    common = sorted(set(arm) & set(other))
    paired = trained and len(common) >= PAIRED_FROM
    tables = [
        np.array([runs[s] for s in (common if paired else sorted(runs))], dtype=float)
        for runs in (arm, other)
    ]
    if not all(table.size and np.isfinite(table).all() for table in tables):
        raise ValueError("both arms need runs, and finite numbers")
    return tables[0], tables[1], paired


def _of_runs(table_RP: Array) -> Error:
    """Of the mean over runs."""
    return Error(float(table_RP.mean(axis=1).var(ddof=1)) / len(table_RP), len(table_RP) - 1)


def _welch(parts: Sequence[Error], total: float) -> float:
    """Satterthwaite's degrees of freedom of a variance `total`, of which `parts` are estimated from runs."""
    return total**2 / sum(part.variance**2 / part.df for part in parts)


def _seeds_and_prompts(tables: Sequence[Array], by_prompt: float) -> Error:
    """Runs' variance plus what prompts add to it. `tables`: [R, P] each; their independent sum (or
    difference) is the effect. `by_prompt`: variance of the effect's mean from its scatter over prompts, which
    holds the residual noise of runs again, so that noise is taken out."""
    parts = [_of_runs(table) for table in tables]
    residual = sum(residual_variance(table) / len(table) for table in tables)
    variance = sum(part.variance for part in parts) + max(by_prompt - residual, 0.0)
    most = tables[0].shape[1] - 1
    if all(part.variance == 0.0 for part in parts):
        return Error(variance, most)
    least = min(part.df for part in parts)
    return Error(variance, min(max(_welch(parts, variance), least), most))


def residual_variance(table_RP: Array) -> float:
    """Mean square of what run and prompt means leave, over the number of prompts."""
    rest = (
        table_RP
        - table_RP.mean(axis=1, keepdims=True)
        - table_RP.mean(axis=0, keepdims=True)
        + table_RP.mean()
    )
    runs, prompts = table_RP.shape
    return float((rest**2).sum() / ((runs - 1) * (prompts - 1)) / prompts)


def _prompts_only(d_P: Array) -> Error:
    """Of the mean over prompts. Where hardly any prompt differs, as if one more were won and one lost."""
    n = len(d_P)
    variance = float(d_P.var(ddof=1)) / n
    if np.count_nonzero(d_P != np.median(d_P)) < FEW_PROMPTS:
        variance = (variance * n * (n - 1) + 2.0) / ((n + 1) * (n + 2))
    return Error(variance, n - 1)
