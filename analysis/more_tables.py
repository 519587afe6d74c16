"""Tables that the paper does not have: speed, cost, outcomes of completions, states of runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from . import estimates as est
from . import quantities
from .claims import TOO_FEW_EVALUATIONS, speed
from .figures import cells_of, places_of, trained
from .load import Records
from .table import Column, Entry, Table, scaled
from .tables import MODEL_NAMES
from .variants import Variant

COUNTS = {
    "tokens/sampled": "sampled",
    "tokens/forwarded": "forwarded",
    "tokens/backpropagated": "backpropagated",
    "tokens/dropped_by_filter": "dropped by filter",
}
NOT_JUDGED = "learns from given solutions, which are not judged"
NO_REWARD = "samples nothing"
NO_FILTER = "no filter, or no run with the same updates and KL without it"
TOO_SHORT = "curves too short"
WINDOW = 5
"""Steps whose mean reward has to reach a target."""
STATES = ("finished", "running", "pending", "blocked", "interrupted", "failed", "cancelled")


def more_tables(records: Records, variants: Sequence[Variant]) -> list[Table]:
    made = [state_table(records, variants)]
    for model, data in places_of(variants):
        own = [v for v in trained(variants, model, data) if quantities.finished(records, v)]
        if own:
            made += [
                speed_table(records, own, model, data),
                cost_table(records, own, model, data),
                outcome_table(records, own, model, data),
            ]
    return [table for table in made if table.columns]


def speed_table(records: Records, own: Sequence[Variant], model: str, data: str) -> Table:
    """How much faster than GRPO (else than the first arm) each trained, what it sampled a second, what the
    filter saved, when it reached the reward that every run of the baseline reached, and how stable it was."""
    base = next((v for v in own if v.arm == "grpo"), own[0])
    unfiltered = next((v for v in own if v.arm == "no_gf"), None)
    target = reached_by_all(records, base)
    reached = math.isfinite(target)
    columns = (
        Column(f"speed-up over {base.label}", "x", digits=2),
        Column("of sampling", "x", digits=2),
        Column("of gradients", "x", digits=2),
        Column("throughput", "sampled tokens / s", digits=0),
        Column("filter saves, predicted", "%", better=0),
        Column("measured", "%", better=0),
        Column("updates made", "", better=0, digits=0),
        Column(f"seconds to reward {target:.2f}" if reached else "seconds to a reward", "s", better=-1),
        Column("swing of accuracy", "points (sd)", better=-1, digits=2),
    )
    unreached = f"not every run reached {target:.2f}" if reached else TOO_SHORT
    rows = []
    for variant in own:
        cells = quantities.finished(records, variant)
        why = unreached if sampled(records, cells) else NO_REWARD
        entries = (
            *(_speed_up(records, variant, base, part) for part in ("", "sampling", "gradient")),
            _over(cells, lambda c: throughput(records, c), NO_REWARD),
            *_filter_saving(records, variant, unfiltered),
            est.over_seeds([_total(records, c, "updates") for c in cells]),
            _over(cells, lambda c: seconds_to(records, c, target), why),
            _over(
                cells,
                lambda c: 100 * est.instability(quantities.policy_curve(records, c)),
                TOO_FEW_EVALUATIONS,
            ),
        )
        rows.append((variant.label, tuple(Entry(entry) for entry in entries)))
    return Table(
        f"speed-{model}-{data}",
        f"Speed and stability, {MODEL_NAMES.get(model, model)} on {data}",
        "Speed-up: ratio of training times as configured (geometric mean), and of their parts. The filter is "
        "predicted to save the share of tokens it drops times the share of gradients in the time without it. "
        "Swing: standard deviation of accuracy on a fixed set about its local trend. 95 % intervals over "
        "seeds; n is seeds.",
        columns,
        tuple(rows),
        (),
        cells_of(own),
    )


def _speed_up(records: Records, variant: Variant, base: Variant, part: str) -> est.Estimate:
    if variant is base:
        return est.Estimate(1.0, n_seeds=len(quantities.finished(records, base)))
    found = speed(records, variant, base, part)
    return est.as_ratio(found[0].comparison) if found else est.Estimate(math.nan, note=NO_REWARD)


def throughput(records: Records, cell: str) -> float:
    """Sampled tokens per second of training; NaN where none is sampled."""
    tokens = _total(records, cell, "tokens/sampled")
    return tokens / quantities.training_seconds(quantities.steps_of(records, cell)) if tokens else math.nan


def _same_work(records: Records, one: Variant, other: Variant) -> bool:
    """Whether two arms make as many updates, with the same KL term."""
    facts = []
    for variant in (one, other):
        cells = quantities.finished(records, variant)
        beta = records.cells.loc[cells[0]].get("config.algorithm.beta")
        facts.append((beta, {_total(records, c, "updates") for c in cells}))
    return facts[0] == facts[1]


def _filter_saving(
    records: Records, variant: Variant, unfiltered: Variant | None
) -> tuple[est.Estimate, est.Estimate]:
    """Percent of training time that the filter saves: as predicted from what it drops, and as measured."""
    nothing = est.Estimate(math.nan, note=NO_FILTER)
    cells = quantities.finished(records, variant)
    dropped = [_total(records, c, "tokens/dropped_by_filter") for c in cells]
    if unfiltered is None or not any(dropped) or not _same_work(records, variant, unfiltered):
        return nothing, nothing
    whole, gradient = (quantities.time_of(records, unfiltered, part).value for part in ("", "gradient"))
    shares = [
        d / (d + _total(records, c, "tokens/backpropagated")) for c, d in zip(cells, dropped, strict=True)
    ]
    found = speed(records, variant, unfiltered)
    ratio = est.as_ratio(found[0].comparison) if found else est.NOTHING
    saved = est.Estimate(
        100 * (1 - 1 / ratio.value), 100 * (1 - 1 / ratio.low), 100 * (1 - 1 / ratio.high), ratio.n_seeds
    )
    return est.over_seeds([100 * share * gradient / whole for share in shares]), replace(
        saved, note=ratio.note
    )


def curve_of(records: Records, cell: str) -> est.Array:
    steps = quantities.steps_of(records, cell)
    return steps["reward/mean"].dropna().to_numpy(float) if "reward/mean" in steps else np.empty(0)


def sampled(records: Records, cells: Sequence[str]) -> bool:
    """Whether these runs have rewards: supervised ones sample nothing."""
    return any(len(curve_of(records, cell)) for cell in cells)


def reached_by_all(records: Records, variant: Variant) -> float:
    """The highest mean reward of five steps in a row that every finished run of a variant reached, rounded
    down to two digits; NaN: there is none."""
    curves = [curve_of(records, c) for c in quantities.finished(records, variant)]
    if not curves or min(map(len, curves)) < WINDOW:
        return math.nan
    best: float = min(np.convolve(c, np.ones(WINDOW) / WINDOW, mode="valid").max() for c in curves)
    return math.floor(best * 100 + 1e-9) / 100


def seconds_to(records: Records, cell: str, target: float) -> float:
    """Training seconds until the mean reward of five steps was at least the target; NaN: never."""
    steps = quantities.steps_of(records, cell)
    if "reward/mean" not in steps:
        return math.nan
    valid = steps["reward/mean"].notna().to_numpy()  # time passes in a step whose reward is no number, too
    times = quantities.seconds(records, cell).to_numpy(float)[valid]
    return est.time_to(curve_of(records, cell), times, target, WINDOW)


def _over(cells: Sequence[str], number: Callable[[str], float], why: str) -> est.Estimate:
    """A number of each run over seeds; NA where a run has none: the mean of the others would flatter."""
    values = [number(cell) for cell in cells]
    if not values or not np.isfinite(values).all():
        return est.Estimate(math.nan, n_seeds=len(values), note=why)
    return est.over_seeds(values)


def cost_table(records: Records, own: Sequence[Variant], model: str, data: str) -> Table:
    """Machine hours (all of a run: evaluation and checkpoints too) and thousands of tokens, per run."""
    columns = [Column("machine time", "device h", better=-1, digits=3)]
    columns += [Column(f"tokens {words}", "thousands", better=0, digits=1) for words in COUNTS.values()]
    rows = []
    for variant in own:
        cells = quantities.finished(records, variant)
        entries = [Entry(device_hours(records, variant))]
        for metric in COUNTS:
            totals = [_total(records, cell, metric) for cell in cells]
            entries.append(Entry(scaled(est.over_seeds(totals), 1e-3)))
        rows.append((variant.label, tuple(entries)))
    return Table(
        f"cost-{model}-{data}",
        f"Cost of a run, {MODEL_NAMES.get(model, model)} on {data}",
        "Mean over finished runs with a 95 % interval (Student's t); n is seeds. A device is a GPU, or "
        "without one a machine's processor.",
        tuple(columns),
        tuple(rows),
        (),
        cells_of(own),
    )


def device_hours(records: Records, variant: Variant) -> est.Estimate:
    """Hours times devices of a run; none where the hardware of runs differs."""
    cells = quantities.finished(records, variant)
    if len(machines := quantities.hardware_of(records, cells)) > 1:
        return est.Estimate(math.nan, n_seeds=len(cells), note=f"different hardware: {'; '.join(machines)}")
    spent = [float(quantities.steps_of(records, c)["time/step_s"].sum()) / 3600 for c in cells]
    return est.over_seeds(
        [s * _devices(str(records.cells.loc[c, "hardware"])) for s, c in zip(spent, cells, strict=True)]
    )


def _devices(hardware: str) -> int:
    """GPUs of a machine as `load` describes it; 1 where it has none."""
    count = hardware.rpartition(", ")[2].partition(" x ")
    return int(count[0]) if count[1] and count[0].isdigit() else 1


def _total(records: Records, cell: str, metric: str) -> float:
    steps = quantities.steps_of(records, cell)
    return float(np.nansum(steps[metric])) if metric in steps else 0.0


def outcome_table(records: Records, own: Sequence[Variant], model: str, data: str) -> Table:
    """Shares of verdicts while training, over all sampled completions."""
    kinds = [c for c in records.steps if c.startswith("outcome/")]
    rows_of = {v.label: records.steps[records.steps["cell"].isin(v.cells)] for v in own}
    present = [k for k in kinds if any(k in r and np.nansum(r[k]) > 0 for r in rows_of.values())]
    columns = tuple(Column(k.removeprefix("outcome/"), "%", better=0) for k in present)
    rows = []
    for variant in own:
        shares = [_shares(records, cell, kinds, present) for cell in quantities.finished(records, variant)]
        table = pd.DataFrame([s for s in shares if s is not None])
        entries = tuple(
            Entry(scaled(est.share_over_seeds(table[k]), 100))
            if len(table)
            else Entry(est.Estimate(math.nan, note=NOT_JUDGED))
            for k in present
        )
        rows.append((variant.label, entries))
    return Table(
        f"outcomes-{model}-{data}",
        f"Verdicts on samples, {MODEL_NAMES.get(model, model)} on {data}",
        "Share of verdicts over all completions of training; mean over runs, 95 % interval (Student's t).",
        columns,
        tuple(rows),
        (),
        cells_of(own),
    )


def _shares(
    records: Records, cell: str, kinds: Sequence[str], present: Sequence[str]
) -> dict[str, float] | None:
    totals = {k: _total(records, cell, k) for k in kinds}
    judged = sum(totals.values())
    return {k: totals[k] / judged for k in present} if judged else None


def state_table(records: Records, variants: Sequence[Variant]) -> Table:
    """How many runs of each recipe are in which state."""
    present = [s for s in STATES if (records.cells["state"] == s).any()]
    rows = []
    for variant in variants:
        states = records.cells.loc[list(variant.cells), "state"]
        counts = tuple(Entry(est.Estimate(float((states == s).sum()), n_seeds=len(states))) for s in present)
        rows.append(
            (f"{variant.label}, {MODEL_NAMES.get(variant.model, variant.model)}, {variant.data}", counts)
        )
    return Table(
        "state",
        "State of the runs",
        "Number of runs; n is how many there are of the recipe.",
        tuple(Column(s, "", better=0, digits=0) for s in present),
        tuple(rows),
        (),
        cells_of(variants),
    )
