"""Numbers of single cells and variants, from rows to estimates. Each says what it could not tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from dash_exp.record.metrics import judged_prompts
from dash_exp.statistics.comparison import Comparison, compare_scores
from dash_exp.statistics.shares import pass_at_k

from . import estimates as est
from .load import Records
from .variants import Variant

PHASES = ("sample", "verify", "logprob", "backprop", "optimizer", "sync", "other")
"""Of training time; evaluation and checkpoints are told apart (dash_exp/record/ledger.py)."""

PARTS = {
    "sampling": ("sample",),
    "gradient": ("logprob", "backprop", "optimizer"),
    "verdicts": ("verify",),
    "sync": ("sync",),
    "other": ("other",),
}
"""What training time is spent on, by phases of the ledger."""
MIN_EVALUATIONS = 8
"""A run that was evaluated less often has no curve to judge its stability by."""

NONE_FINISHED = "no finished cell"


@dataclass(frozen=True, slots=True)
class Scores:
    """`scores_SP`: mean verdicts; `correct_SP`: how many of n samples were correct, -1 where n differs."""

    cells: tuple[str, ...]
    seeds: tuple[int, ...]
    prompts: tuple[str, ...]
    scores_SP: est.Array
    correct_SP: est.Array
    n: int
    notes: tuple[str, ...]


def training_seconds(steps: pd.DataFrame, part: str = "") -> float:
    """Seconds spent training, neither evaluation nor checkpoints; or on one of PARTS. NaN if no step says."""
    if part:
        return float(steps.reindex(columns=[f"time/{phase}_s" for phase in PARTS[part]]).sum().sum())
    return float(_spent(steps).sum(min_count=1))


def _spent(steps: pd.DataFrame) -> pd.Series:
    """Training seconds of each step."""
    apart = steps.reindex(columns=["time/evaluate_s", "time/checkpoint_s"], fill_value=0.0).fillna(0.0)
    return steps.get("time/step_s", pd.Series(np.nan, index=steps.index)) - apart.sum(axis=1)


def steps_of(records: Records, cell: str) -> pd.DataFrame:
    return records.steps[records.steps["cell"] == cell]


def finished(records: Records, variant: Variant) -> tuple[str, ...]:
    return tuple(c for c in variant.cells if records.cells.loc[c, "state"] == "finished")


def hardware_of(records: Records, cells: Sequence[str]) -> tuple[str, ...]:
    return tuple(sorted({str(records.cells.loc[c, "hardware"]) for c in cells}))


def time_of(records: Records, variant: Variant, part: str = "") -> est.Estimate:
    """Training seconds, or those of one of PARTS, over the finished cells of a variant; no value where their
    hardware differs."""
    cells = finished(records, variant)
    if not cells:
        return est.Estimate(np.nan, note=NONE_FINISHED)
    if len(machines := hardware_of(records, cells)) > 1:
        return est.Estimate(np.nan, n_seeds=len(cells), note=f"different hardware: {'; '.join(machines)}")
    found = est.over_seeds([training_seconds(steps_of(records, c), part) for c in cells])
    partner = str(records.cells.loc[cells[0]].get("config.budget.match", "null"))
    unit = str(records.cells.loc[cells[0]].get("config.budget.unit", "seconds"))
    as_long = "as long as its partner" if unit in ("seconds", "nan") else f"as many {unit} as its partner"
    matched = "" if partner in ("null", "nan") else f"{as_long} (budget.match)"
    return replace(found, note="; ".join(filter(None, (found.note, matched))))


def policy_curve(records: Records, cell: str) -> est.Array:
    """Accuracy on the first evaluation set at every evaluation, which is of the policy: the prompts are the
    same each time. Empty where there are fewer than MIN_EVALUATIONS."""
    evals = records.evals
    if "dataset" not in evals:
        return np.empty(0)
    rows = evals[(evals["cell"] == cell) & (evals["metric"] == "accuracy")]
    rows = rows[rows["dataset"] == rows["dataset"].iloc[0]] if len(rows) else rows
    values = rows.sort_values("step")["value"].to_numpy(float)
    return values if len(values) >= MIN_EVALUATIONS else np.empty(0)


@cache
def scores_of(folder: Path, dataset: str, step: int, stamp: int) -> pd.DataFrame:
    """The mean verdict on each prompt of an evaluation: columns prompt, score, correct, n. `stamp`: when the
    file last changed. `attrs["torn"]`: lines of the file that could not be read."""
    rows, torn = judged_prompts(folder, dataset, step)
    table = pd.DataFrame(rows, columns=["prompt", "score", "correct", "n"])
    table.attrs["torn"] = torn
    return table


def scores(records: Records, variant: Variant, dataset: str, *, after: bool = True) -> Scores:
    """Verdicts of the last evaluation (or of the one before training) of each finished cell, for the prompts
    that all of them could judge."""
    tables, cells, notes = [], [], []
    for cell in finished(records, variant):
        folder = Path(str(records.cells.loc[cell, "folder"]))
        step = int(records.cells.loc[cell, "step"]) if after else 0
        verdicts = folder / "eval_samples.jsonl"
        stamp = verdicts.stat().st_mtime_ns if verdicts.is_file() else 0
        table = scores_of(folder, dataset, step, stamp)
        if torn := table.attrs["torn"]:
            notes.append(f"{cell}/eval_samples.jsonl: {torn} damaged lines left out")
        if table.empty:
            notes.append(f"{cell} has no evaluation on {dataset} at step {step}")
            continue
        tables.append(table.set_index("prompt"))
        cells.append(cell)
    if not tables:
        return Scores((), (), (), np.empty((0, 0)), np.empty((0, 0)), 0, tuple(notes))
    common = sorted(set.intersection(*(set(t.index) for t in tables)))
    asked = max(len(t) for t in tables)
    if len(common) < asked:
        notes.append(f"{asked - len(common)} of {asked} prompts of {dataset} were not judged in every run")
    rows = [t.loc[common] for t in tables]
    n = int(rows[0]["n"].min()) if common else 0
    same = all((r["n"] == n).all() for r in rows)
    correct = np.array([r["correct"].to_numpy(float) if same else np.full(len(common), -1.0) for r in rows])
    seeds = tuple(int(records.cells.loc[c, "seed"]) for c in cells)
    return Scores(
        tuple(cells),
        seeds,
        tuple(common),
        np.array([r["score"].to_numpy(float) for r in rows]),
        correct,
        n,
        tuple(notes),
    )


def at_k(found: Scores, k: int) -> Scores:
    """The same with pass@k, k <= n, in place of mean verdicts."""
    table = np.array([pass_at_k(found.n, c, k) for c in range(found.n + 1)])
    return replace(found, scores_SP=table[found.correct_SP.astype(int)])


def by_seed(one: Scores, other: Scores) -> tuple[dict[int, est.Array], dict[int, est.Array]]:
    """The scores of both by seed, at the prompts that both have, in the same order."""
    prompts = [p for p in one.prompts if p in set(other.prompts)]

    def cut(found: Scores) -> dict[int, est.Array]:
        places = {p: i for i, p in enumerate(found.prompts)}
        columns = [places[p] for p in prompts]
        return {seed: found.scores_SP[i][columns] for i, seed in enumerate(found.seeds)}

    return cut(one), cut(other)


def compare(one: Scores, other: Scores, *, trained: bool = True) -> Comparison | None:
    """`one` minus `other`; None where they have no run, or fewer than two prompts in common. `trained`:
    whether the other is."""
    a, b = by_seed(one, other)
    if not a or not b or len(next(iter(a.values()))) < 2:
        return None
    return compare_scores(a, b, trained=trained)


def curve(records: Records, cells: Sequence[str], metric: str) -> pd.DataFrame:
    """A metric by step: one column per cell, one row per step, NaN where a cell has none."""
    rows = records.steps[records.steps["cell"].isin(list(cells))]
    if metric not in rows:
        return pd.DataFrame()
    return rows.pivot_table(index="step", columns="cell", values=metric, observed=True)


def seconds(records: Records, cell: str) -> pd.Series:
    """Training seconds that had passed at the end of each step, by step."""
    rows = steps_of(records, cell).set_index("step")
    return _spent(rows).cumsum()


def eval_sets(records: Records, variants: Sequence[Variant]) -> list[str]:
    """The labels of evaluation sets that these variants have results for, in the order they were asked."""
    cells = [c for v in variants for c in v.cells]
    if "dataset" not in records.evals:
        return []
    return list(dict.fromkeys(records.evals.loc[records.evals["cell"].isin(cells), "dataset"]))
