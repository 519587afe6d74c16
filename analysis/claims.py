"""The paper's claims as sentences, each with what these data say: supported, contradicted or undecided.

All findings of a page are one family: a claim is decided where its p-value, after Holm's correction over the
page, is below 0.05. An undecided one says about how many seeds would decide it.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from dash_exp.statistics import power
from dash_exp.statistics.comparison import MIN_SEEDS, Comparison, compare_runs, holm
from dash_exp.statistics.power import Noise

from . import estimates as est
from . import quantities
from .figures import places_of
from .load import Records
from .paper_values import FOLDER
from .tables import MODEL_NAMES, before_training
from .variants import Variant

Verdict = Literal["supported", "contradicted", "undecided"]
TOO_FEW_EVALUATIONS = (
    f"evaluated fewer than {quantities.MIN_EVALUATIONS} times in training (set evaluation.every)"
)


@dataclass(frozen=True, slots=True)
class Claim:
    """`text` says that `arm` differs from `other` in `measure`, of ON_SETS or OF_RUNS. `sign`: +1 where the
    difference is claimed to be above 0, -1 below, 0 within `effect` of it. `effect`: the size that the paper
    reports, or the margin; in points or as a factor, NaN where it gives none."""

    text: str
    arm: str
    other: str
    measure: str
    sign: int
    effect: float
    paper: str


@dataclass(frozen=True, slots=True)
class Measured:
    """A comparison of two recipes. `noise`: of the data, in the comparison's unit, None where it cannot be
    estimated. `dataset`: the evaluation set, of an accuracy."""

    comparison: Comparison
    unit: str
    noise: Noise | None = None
    dataset: str = ""


@dataclass(frozen=True, slots=True)
class Finding:
    """A claim about one model and dataset. `effect` is in `unit`. `p`: of the claim, before and after Holm's
    correction. `advice`: what would decide an undecided claim. `pair`: of an accuracy, the keys of both
    recipes ("" for the model before training) and the evaluation set; `of_equality`: the claim is that they
    do not differ."""

    claim: str
    where: str
    verdict: Verdict
    effect: est.Estimate
    unit: str
    p: float
    p_adjusted: float
    advice: str
    paper: str
    cells: tuple[str, ...]
    pair: tuple[str, str, str] | None = None
    of_equality: bool = False


MANY_SAMPLES = 16
"""Completions of a prompt that pass@k is compared with."""


def findings(records: Records, variants: Sequence[Variant]) -> list[Finding]:
    """Every claim that these data can be asked about, in the paper's order."""
    asked = [found for claim in read_claims() for found in _asked(records, variants, claim)]
    p_values = [p_value(measured.comparison, claim) for claim, _, _, measured in asked]
    adjusted = holm(p_values)
    return [
        _finding(*one, p, p_adjusted) for one, p, p_adjusted in zip(asked, p_values, adjusted, strict=True)
    ]


Asked = tuple[Claim, Variant, Variant | None, Measured]


def _asked(records: Records, variants: Sequence[Variant], claim: Claim) -> Iterator[Asked]:
    """The claim for each pair of recipes of one model and training set, and each evaluation set."""
    for model, data in places_of(variants):
        own = [v for v in variants if (v.model, v.data) == (model, data)]
        others: list[Variant | None] = [v for v in own if v.arm == claim.other]
        if claim.other == "base" and not others:
            others = [None]  # the evaluation before training
        for arm in (v for v in own if v.arm == claim.arm):
            for other in others:
                found = _measure(records, claim.measure, arm, other)
                yield from ((claim, arm, other, measured) for measured in found)


def p_value(found: Comparison, claim: Claim) -> float:
    """Of the claim or of its contrary, whichever the data are nearer to."""
    return found.p_value() if claim.sign else found.p_within(claim.effect)


def judge(found: Comparison, claim: Claim, p_adjusted: float) -> Verdict:
    if not p_adjusted < 0.05:
        return "undecided"
    if claim.sign:
        return "supported" if found.difference * claim.sign > 0 else "contradicted"
    return "supported" if abs(found.difference) <= claim.effect else "contradicted"


def _finding(
    claim: Claim, arm: Variant, other: Variant | None, measured: Measured, p: float, p_adjusted: float
) -> Finding:
    found, ratio = measured.comparison, claim.measure == "speed"
    verdict = judge(found, claim, p_adjusted)
    effect = est.as_ratio(found) if ratio else est.difference(found).estimate
    other_label = other.label if other else "Base"
    labels = f", {arm.label} against {other_label}" if "(" in arm.label + other_label else ""
    where = f"{MODEL_NAMES.get(arm.model, arm.model)} on {arm.data}{labels}"
    advice = advise(claim, measured) if verdict == "undecided" else ""
    cells = arm.cells + (other.cells if other else ())
    return Finding(
        claim.text,
        where,
        verdict,
        effect,
        measured.unit,
        p,
        p_adjusted,
        advice,
        claim.paper,
        cells,
        (arm.key, other.key if other and other.arm != "base" else "", measured.dataset)
        if measured.dataset
        else None,
        claim.sign == 0,
    )


def advise(claim: Claim, measured: Measured) -> str:
    """How many seeds each arm needs to find the claimed effect (never the observed one)."""
    noise, prompts = measured.noise, measured.comparison.prompts
    if noise is None:
        return f"run at least {MIN_SEEDS} seeds of both" if measured.comparison.seeds < MIN_SEEDS else ""
    if math.isnan(claim.effect):
        return ""
    size = math.log(claim.effect) if claim.measure == "speed" else claim.effect
    needed = power.seeds_needed(noise, size, prompts, equivalence=claim.sign == 0)
    shown = f"a factor of {claim.effect:g}" if claim.measure == "speed" else f"{claim.effect:g} points"
    goal = f"equality within {shown}" if claim.sign == 0 else f"an effect of {shown}"
    if needed is None:
        return f"{goal} cannot be shown with {prompts} prompts: evaluate on more"
    have = measured.comparison.seeds
    return f"about {needed} seeds would show {goal}" if needed > have else f"{have} seeds suffice for {goal}"


def accuracy(records: Records, arm: Variant, other: Variant | None) -> list[Measured]:
    """In percentage points, on each evaluation set of both. `other` None: the model before training."""
    return _on_each_set(records, arm, other, lambda scores: (scores, ""))


def pass_at_most(records: Records, arm: Variant, other: Variant | None) -> list[Measured]:
    """pass@k in percentage points at the largest power of two that the samples of both allow, on each
    evaluation set with at least MANY_SAMPLES completions per prompt."""

    def largest(scores: quantities.Scores) -> tuple[quantities.Scores | None, str]:
        if scores.n < MANY_SAMPLES or (scores.correct_SP < 0).any():
            return None, ""
        k = 2 ** int(math.log2(scores.n))
        return quantities.at_k(scores, k), f", pass@{k}"

    return _on_each_set(records, arm, other, largest)


Reading = Callable[[quantities.Scores], tuple[quantities.Scores | None, str]]
"""From the verdicts on a set to what is compared and its name; None where they do not allow it."""


def _on_each_set(records: Records, arm: Variant, other: Variant | None, read: Reading) -> list[Measured]:
    made = []
    for dataset in quantities.eval_sets(records, [arm, other] if other else [arm]):
        one = quantities.scores(records, arm, dataset)
        trained = other is not None and other.arm != "base"
        two = (
            quantities.scores(records, other, dataset, after=trained)
            if other is not None
            else before_training(records, [arm], dataset)
        )
        (one_read, name), (two_read, other_name) = read(one), read(two)
        if one_read is None or two_read is None or name != other_name:
            continue
        one, two = one_read, two_read
        found = quantities.compare(one, two, trained=trained)
        if found is None:
            continue
        tables = [np.array(list(t.values())) for t in quantities.by_seed(one, two)]
        noise = power.estimate_noise(tables if trained else tables[:1])
        points = (
            None if noise is None else replace(noise, seeds=100 * noise.seeds, prompts=100 * noise.prompts)
        )
        made.append(
            Measured(found.scaled(100), f"points on {dataset}{name}", points, dataset if not name else "")
        )
    return made


def speed(records: Records, arm: Variant, other: Variant, part: str = "") -> list[Measured]:
    """Logarithm of how many times longer `other` trained than `arm` (or spent on one of PARTS), over finished
    runs on one kind of hardware."""
    unit = "times as fast"
    cells = [_finished(records, v) for v in (arm, other)]
    if not all(cells):
        return []
    machines = quantities.hardware_of(records, [c for own in cells for c in own.values()])
    if len(machines) > 1:
        return [Measured(Comparison(math.nan, note=f"different hardware: {'; '.join(machines)}"), unit)]
    times = [
        {s: quantities.training_seconds(quantities.steps_of(records, c), part) for s, c in own.items()}
        for own in cells
    ]
    if min(t for own in times for t in own.values()) <= 0:  # a supervised arm samples nothing
        return []
    logs = [{s: math.log(t) for s, t in own.items()} for own in times]
    return [Measured(est.log_ratio(times[1], times[0]), unit, _noise_of_runs(logs))]


def length(records: Records, arm: Variant, other: Variant) -> list[Measured]:
    """Mean length of completions in the last quarter of the steps."""

    def late(cell: str) -> float:
        column = _column(records, cell, "length/mean_tokens")
        return float(column[-max(1, len(column) // 4) :].mean()) if len(column) else math.nan

    return _per_run(records, arm, other, late, "tokens")


def instability(records: Records, arm: Variant, other: Variant) -> list[Measured]:
    """How much accuracy on a fixed set swings about its trend, in percentage points: of the policy, whatever
    prompts it was trained on."""

    def swing(cell: str) -> float:
        curve = quantities.policy_curve(records, cell)
        return 100 * est.instability(curve) if len(curve) else math.nan

    found = _per_run(records, arm, other, swing, "points (sd)")
    return found or [Measured(Comparison(math.nan, note=TOO_FEW_EVALUATIONS), "points (sd)")]


ON_SETS: dict[str, Callable[[Records, Variant, Variant | None], list[Measured]]] = {
    "accuracy": accuracy,
    "pass@k": pass_at_most,
}
OF_RUNS: dict[str, Callable[[Records, Variant, Variant], list[Measured]]] = {
    "speed": speed,
    "instability": instability,
    "length": length,
}
"""What a claim can be about: each common evaluation set, or training itself."""


def _measure(records: Records, measure: str, arm: Variant, other: Variant | None) -> list[Measured]:
    if measure in ON_SETS:
        return ON_SETS[measure](records, arm, other)
    return OF_RUNS[measure](records, arm, other) if other is not None else []


def _per_run(
    records: Records, arm: Variant, other: Variant, number: Callable[[str], float], unit: str
) -> list[Measured]:
    """A number of each finished run that has it."""
    columns = []
    for variant in (arm, other):
        values = {s: number(c) for s, c in _finished(records, variant).items()}
        columns.append({s: v for s, v in values.items() if math.isfinite(v)})
    if not all(columns):
        return []
    return [Measured(compare_runs(*columns), unit, _noise_of_runs(columns))]


def _noise_of_runs(columns: Sequence[dict[int, float]]) -> Noise | None:
    return power.estimate_noise([np.array(list(own.values()))[:, None] for own in columns])


def _finished(records: Records, variant: Variant) -> dict[int, str]:
    """Finished cells by seed."""
    done = set(quantities.finished(records, variant))
    return {s: c for s, c in zip(variant.seeds, variant.cells, strict=True) if c in done}


def _column(records: Records, cell: str, metric: str) -> est.Array:
    steps = quantities.steps_of(records, cell)
    return steps[metric].dropna().to_numpy(float) if metric in steps else np.empty(0)


def read_claims() -> list[Claim]:
    """The paper's claims, in its order."""
    with (FOLDER / "claims.csv").open(encoding="utf-8") as stream:
        return [
            Claim(
                row["claim"],
                row["arm"],
                row["other"],
                row["measure"],
                int(row["sign"]),
                float(row["effect"] or "nan"),
                row["paper"],
            )
            for row in csv.DictReader(stream)
        ]
