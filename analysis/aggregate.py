"""Arms over several models or tasks: interquartile mean and probability of improvement (Agarwal et al. 2021,
arXiv 2108.13264), with stratified bootstrap intervals over runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

from . import estimates as est
from . import quantities, style
from .figures import Picture, cells_of, places_of, trained
from .load import Records
from .table import Column, Entry, Table
from .variants import Variant

MIN_RUNS = 6
"""An interquartile mean of fewer runs leaves out nearly all of them."""
RESAMPLES = 2000
COMPARED = "is the arm compared with"

Runs = Sequence[est.Array]
"""Scores of runs, one array per task: numbers of runs may differ between tasks."""


def interquartile_mean(runs: Runs) -> est.Array:
    """The mean without the lowest and the highest quarter of the runs of all tasks (the last axis)."""
    return np.asarray(stats.trim_mean(np.concatenate(list(runs), axis=-1), 0.25, axis=-1))


def probability_of_improvement(arm: Runs, other: Runs) -> est.Array:
    """How often a run of the arm beats one of the other on the same task, mean over tasks; ties count half.
    Runs are the last axis."""
    pairs = [(a[..., :, None], b[..., None, :]) for a, b in zip(arm, other, strict=True)]
    return np.asarray(np.mean([((a > b) + 0.5 * (a == b)).mean(axis=(-2, -1)) for a, b in pairs], axis=0))


def bootstrap(statistic: Callable[..., est.Array], *arms: Runs) -> est.Estimate:
    """A statistic of one or several arms with the percentile interval of runs resampled within each task."""
    rng = np.random.Generator(np.random.Philox(key=0))
    drawn = [[rng.choice(runs, (RESAMPLES, len(runs))) for runs in arm] for arm in arms]
    low, high = np.quantile(statistic(*drawn), [0.025, 0.975])
    return est.Estimate(float(statistic(*arms)), float(low), float(high), sum(map(len, arms[0])))


def by_task(records: Records, variants: Sequence[Variant]) -> dict[str, dict[tuple[str, str], est.Array]]:
    """Accuracy in percent of each finished run, on the first evaluation set of its task: by arm's label, then
    by model and training set. Only arms that every task has, and only where there are two tasks or more."""
    places = places_of(variants)
    found: dict[str, dict[tuple[str, str], est.Array]] = {}
    for place in places:
        own = trained(variants, *place)
        for dataset in quantities.eval_sets(records, own)[:1]:
            for variant in own:
                scores = quantities.scores(records, variant, dataset)
                if scores.cells:
                    found.setdefault(variant.label, {})[place] = 100 * scores.scores_SP.mean(axis=1)
    tasks = {place for own in found.values() for place in own}
    complete = {label: own for label, own in found.items() if set(own) == tasks}
    return complete if len(tasks) > 1 and len(complete) > 1 else {}


def measured(records: Records, variants: Sequence[Variant]) -> list[tuple[str, est.Estimate, est.Estimate]]:
    """Each arm's label, interquartile mean, and probability of improvement over the first one."""
    runs = {label: list(own.values()) for label, own in by_task(records, variants).items()}
    if not runs:
        return []
    first = next(iter(runs))
    made = []
    for label, own in runs.items():
        count = sum(map(len, own))
        few = est.Estimate(
            math.nan, n_seeds=count, note=f"{count} runs: no interquartile mean (needs {MIN_RUNS})"
        )
        mean = bootstrap(interquartile_mean, own) if count >= MIN_RUNS else few
        better = est.Estimate(math.nan, n_seeds=count, note=COMPARED)
        if label != first:
            better = bootstrap(probability_of_improvement, own, runs[first])
        made.append((label, mean, better))
    return made


def table(records: Records, variants: Sequence[Variant]) -> list[Table]:
    rows = measured(records, variants)
    if not rows:
        return []
    columns = (
        Column("interquartile mean of accuracy", "%"),
        Column(f"P(better than {rows[0][0]})", "", digits=2),
    )
    return [
        Table(
            "aggregate",
            "Over all models and tasks",
            "Arms that every model and training set has; n is runs. Interquartile mean of runs, and how "
            "often a run beats one of the first arm on the same task; 95 % intervals by runs drawn within "
            "tasks. Neither decides a claim.",
            columns,
            tuple((label, (Entry(mean), Entry(better))) for label, mean, better in rows),
            (),
            cells_of(variants),
        )
    ]


def panel(records: Records, variants: Sequence[Variant]) -> list[Picture]:
    rows = measured(records, variants)
    if not rows:
        return []
    looks = {v.label: v for v in variants}
    drawn, axes = style.figure(2, height=0.7 + 0.22 * len(rows))
    labels = [label for label, _, _ in rows]
    for axis, points in zip(axes, ([r[1] for r in rows], [r[2] for r in rows]), strict=True):
        for height, (label, point) in enumerate(zip(labels, points, strict=True)):
            if math.isfinite(point.value):
                ends = [[point.value - point.low], [point.high - point.value]]
                variant = looks[label]
                axis.errorbar(
                    point.value,
                    height,
                    xerr=ends,
                    color=style.colour_of(variant),
                    marker=style.mark_of(variant),
                )
        axis.set_yticks(
            range(len(rows)), [f"{label} (n={p.n_seeds})" for label, p in zip(labels, points, strict=True)]
        )
        axis.set_ylim(len(rows) - 0.5, -0.5)
    axes[0].set_xlabel("interquartile mean of accuracy (%)")
    axes[1].set_xlabel(f"P(better than {rows[0][0]})")
    axes[1].axvline(0.5, color="0.6", linewidth=0.8)
    axes[1].set_xlim(0, 1)
    return [
        Picture(
            "aggregate",
            "Over all models and tasks",
            "Interquartile mean over runs, and probability of improvement over the first arm; 95 % intervals "
            "by runs resampled within tasks; n is runs.",
            drawn,
            cells_of(variants),
        )
    ]
