"""The paper's claims as sentences, each with what these data say: supported, contradicted or undecided."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from . import estimates as est
from . import quantities
from .figures import places_of
from .load import Records
from .paper_values import FOLDER
from .tables import MODEL_NAMES
from .variants import Variant

Verdict = Literal["supported", "contradicted", "undecided"]
MARGIN = 3.0
"""Percentage points within which two accuracies count as the same, where a claim says that they are."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A claim about one model and dataset. `effect` is in `unit`."""

    claim: str
    where: str
    verdict: Verdict
    effect: est.Estimate
    unit: str
    paper: str
    cells: tuple[str, ...]


Measure = Callable[[Records, Variant, Variant], tuple[est.Estimate, str]]


@dataclass(frozen=True, slots=True)
class Claim:
    """`text` says that `arm` differs from `other` in `measure` (of MEASURES). `sign`: +1 where the effect is
    claimed to be above no difference, -1 below, 0 within MARGIN of it."""

    text: str
    arm: str
    other: str
    measure: str
    sign: int
    paper: str


def findings(records: Records, variants: Sequence[Variant]) -> list[Finding]:
    """Every claim that these data can be asked about, in the paper's order."""
    return [found for claim in read_claims() for found in _of_claim(records, variants, claim)]


def _of_claim(records: Records, variants: Sequence[Variant], claim: Claim) -> Iterator[Finding]:
    measure, none = MEASURES[claim.measure]
    for model, data in places_of(variants):
        own = [v for v in variants if (v.model, v.data) == (model, data)]
        for one in (v for v in own if v.arm == claim.arm):
            for other in (v for v in own if v.arm == claim.other):
                effect, unit = measure(records, one, other)
                if math.isnan(effect.value) and not effect.note:
                    continue
                labels = f", {one.label} against {other.label}" if "(" in one.label + other.label else ""
                where = f"{MODEL_NAMES.get(model, model)} on {data}{labels}"
                verdict = judge(effect, claim.sign, none)
                yield Finding(claim.text, where, verdict, effect, unit, claim.paper, one.cells + other.cells)


def judge(effect: est.Estimate, sign: int, none: float = 0.0) -> Verdict:
    """From an interval to a verdict: entirely on the claimed side of `none`, on the other, or neither. An
    effect without an interval over seeds decides nothing."""
    if not effect.has_interval or effect.n_seeds < est.MIN_SEEDS:
        return "undecided"
    if sign == 0:
        if none - MARGIN <= effect.low and effect.high <= none + MARGIN:
            return "supported"
        return "contradicted" if effect.low > none + MARGIN or effect.high < none - MARGIN else "undecided"
    above, below = effect.low > none, effect.high < none
    if above or below:
        return "supported" if above == (sign > 0) else "contradicted"
    return "undecided"


def accuracy_difference(records: Records, one: Variant, other: Variant) -> tuple[est.Estimate, str]:
    """In percentage points, over the first evaluation set that both have, paired by seed and prompt."""
    for dataset in quantities.eval_sets(records, [one, other]):
        a, b = quantities.paired(
            quantities.scores(records, one, dataset), quantities.scores(records, other, dataset)
        )
        if a.size:
            return est.accuracy((a - b) * 100), f"points on {dataset}"
    return est.Estimate(math.nan, note="no evaluation of both at the same seeds"), "points"


def speed_up(records: Records, one: Variant, other: Variant) -> tuple[est.Estimate, str]:
    """How many times longer `other` trained than `one`, at the seeds that both finished."""
    seeds, pairs = _paired_cells(records, one, other)
    if not seeds:
        return est.Estimate(math.nan, note="no seed that both finished"), "x"
    machines = quantities.hardware_of(records, [c for pair in pairs for c in pair])
    if len(machines) > 1:
        return est.Estimate(math.nan, note=f"different hardware: {'; '.join(machines)}"), "x"
    times = [[quantities.training_seconds(quantities.steps_of(records, c)) for c in pair] for pair in pairs]
    return est.speed_up([b for _, b in times], [a for a, _ in times]), "x as fast"


def length_difference(records: Records, one: Variant, other: Variant) -> tuple[est.Estimate, str]:
    """Mean length in the last quarter of the steps, one minus other, paired by seed."""
    return _late_difference(records, one, other, "length/mean_tokens"), "tokens"


def instability_difference(records: Records, one: Variant, other: Variant) -> tuple[est.Estimate, str]:
    """How much more the reward curve swings about its trend, paired by seed."""
    _, pairs = _paired_cells(records, one, other)
    gaps = []
    for pair in pairs:
        a, b = (est.instability(_column(records, cell, "reward/mean")) for cell in pair)
        if math.isfinite(a) and math.isfinite(b):
            gaps.append(a - b)
    return est.over_seeds(gaps) if gaps else est.Estimate(math.nan, note="curves too short"), "reward (sd)"


def _late_difference(records: Records, one: Variant, other: Variant, metric: str) -> est.Estimate:
    _, pairs = _paired_cells(records, one, other)
    gaps = []
    for pair in pairs:
        a, b = (_column(records, cell, metric) for cell in pair)
        if len(a) and len(b):
            gaps.append(float(a[-max(1, len(a) // 4) :].mean() - b[-max(1, len(b) // 4) :].mean()))
    return est.over_seeds(gaps) if gaps else est.Estimate(math.nan, note="no seed that both finished")


def _column(records: Records, cell: str, metric: str) -> est.Array:
    steps = quantities.steps_of(records, cell)
    return steps[metric].dropna().to_numpy(float) if metric in steps else np.empty(0)


def _paired_cells(records: Records, one: Variant, other: Variant) -> tuple[list[int], list[tuple[str, str]]]:
    """Seeds that both finished, and their cells."""
    mine = dict(zip(one.seeds, one.cells, strict=True))
    theirs = dict(zip(other.seeds, other.cells, strict=True))
    done = {*quantities.finished(records, one), *quantities.finished(records, other)}
    seeds = [s for s in mine if s in theirs and mine[s] in done and theirs[s] in done]
    return seeds, [(mine[s], theirs[s]) for s in seeds]


MEASURES: dict[str, tuple[Measure, float]] = {
    "accuracy": (accuracy_difference, 0.0),
    "speed": (speed_up, 1.0),
    "instability": (instability_difference, 0.0),
    "length": (length_difference, 0.0),
}
"""What a claim can be about, and the effect that means no difference."""


def read_claims() -> list[Claim]:
    """The paper's claims, in its order."""
    with (FOLDER / "claims.csv").open(encoding="utf-8") as stream:
        return [
            Claim(row["claim"], row["arm"], row["other"], row["measure"], int(row["sign"]), row["paper"])
            for row in csv.DictReader(stream)
        ]
