"""The paper's tables from records, and the tables that a reader wants beside them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from . import estimates as est
from . import paper_values, quantities
from .load import Records
from .table import Column, Entry, Table, scaled
from .variants import ARMS, Variant

MATH, CODE = "math", "code"
PAPER_DATA = {"math": MATH, "mbppplus": CODE}
"""The paper's own training sets: only beside these are its values comparable."""
SET_NAMES = {
    "math500": "MATH-500",
    "gsm8k": "GSM8K",
    "mbppplus": "MBPP+",
    "arithmetic": "arithmetic",
    "functions": "functions",
    "aime24": "AIME 2024",
}
MODEL_NAMES = {
    "qwen0.5b": "Qwen2.5-0.5B",
    "qwen1.5b": "Qwen2.5-1.5B",
    "qwen3b": "Qwen2.5-3B",
    "smollm2_135m": "SmolLM2-135M",
}
NOT_TRAINED = "not trained"
UNITS = (("h", 3600.0), ("min", 60.0), ("s", 1.0))


@dataclass(frozen=True, slots=True)
class Wanted:
    """A table: its rows, whether training time is a column, and the row that others are compared with."""

    name: str
    title: str
    task: str
    arms: tuple[str, ...]
    timed: bool
    baseline: str


ABLATION = ("base", "grpo", "no_gf", "dash")
SAVED = "What preemptive sampling and the filter save"
AGAINST_SFT = "RL against supervised fine-tuning"
REUSE = "Reusing samples, at equal training time"
PAPER_TABLES = (
    Wanted(
        "table1", f"Table 1. {AGAINST_SFT}, math", MATH, ("base", "sft_h", "sft_m", "dash"), False, "base"
    ),
    Wanted("table2", f"Table 2. {AGAINST_SFT}, code", CODE, ("base", "sft_h", "dash"), False, "base"),
    Wanted("table3", f"Table 3. {SAVED}, math", MATH, ABLATION, True, "grpo"),
    Wanted("table4", f"Table 4. {SAVED}, code", CODE, ABLATION, True, "grpo"),
    Wanted("table5", f"Table 5. {REUSE}", MATH, ("dash", "ppo_multi", "ppo_mini"), False, "dash"),
    Wanted("table6", "Table 6. Without KL regularisation", MATH, ("dash", "no_kl"), True, "dash"),
)


def task_of(records: Records, variant: Variant) -> str:
    """`math` or `code`, by what judges the training set."""
    verifier = records.cells.loc[variant.cells[0]].get("config.dataset.verifier")
    return CODE if verifier == "code" else MATH


def paper_tables(records: Records, variants: Sequence[Variant]) -> list[Table]:
    """Tables 1 to 6, each once per training set that has at least two of its rows."""
    made = []
    for wanted in PAPER_TABLES:
        mine = [v for v in variants if v.arm in wanted.arms and task_of(records, v) == wanted.task]
        for data in dict.fromkeys(v.data for v in mine):
            rows = [v for v in mine if v.data == data]
            if len({v.arm for v in rows} - {"base"}) >= min(2, len(wanted.arms) - 1):
                made.append(paper_table(records, wanted, data, rows))
    return made


def recipe_tables(records: Records, variants: Sequence[Variant]) -> list[Table]:
    """Accuracy and training time of everything there is, once per training set: arms of no table of the
    paper, and variants of its arms, are compared with DASH here (else with the first that was trained)."""
    made = []
    for data in dict.fromkeys(v.data for v in variants):
        rows = [v for v in variants if v.data == data]
        arms = tuple(dict.fromkeys(v.arm for v in rows if v.arm != "base"))
        if len([v for v in rows if v.arm != "base"]) >= 2:
            baseline = "dash" if "dash" in arms else arms[0]
            task = task_of(records, rows[0])
            wanted = Wanted("recipes", "All recipes", task, ("base", *arms), True, baseline)
            made.append(paper_table(records, wanted, data, rows))
    return made


def paper_table(records: Records, wanted: Wanted, data: str, rows: Sequence[Variant]) -> Table:
    """One table: methods down, models and metrics across."""
    models = list(dict.fromkeys(v.model for v in rows))
    columns: list[Column] = []
    cells: dict[str, list[Entry]] = {}
    notes: list[str] = []
    labels = _labels(wanted, rows)
    for model in models:
        own = {label: next((v for v in found if v.model == model), None) for label, found in labels.items()}
        for column, entries in _columns(records, wanted, data, model, own, notes):
            columns.append(column)
            for label, entry in entries.items():
                cells.setdefault(label, []).append(entry)
    shown = [(label, tuple(cells[label])) for label in labels]
    twin = "" if data in PAPER_DATA else f" (twin on {data})"
    names = [c for v in rows for c in v.cells]
    return Table(
        f"{wanted.name}-{data}",
        f"{wanted.title}{twin}",
        _caption(wanted, data),
        tuple(columns),
        tuple(shown),
        tuple(dict.fromkeys([*notes, *_paper_note(wanted, data, labels)])),
        tuple(names),
    )


def _labels(wanted: Wanted, rows: Sequence[Variant]) -> dict[str, list[Variant]]:
    """Row labels in the paper's order, and the variants of each (one per model)."""
    found: dict[str, list[Variant]] = {"Base": []} if "base" in wanted.arms else {}
    for arm in wanted.arms:
        for variant in (v for v in rows if v.arm == arm):
            found.setdefault(variant.label, []).append(variant)
    return found


def _caption(wanted: Wanted, data: str) -> str:
    baseline = ARMS.get(wanted.baseline, wanted.baseline)
    text = (
        "Accuracy in percent with a 95 % interval over prompts and, from three runs on, seeds; n is seeds x "
        f"prompts. Differences are to {baseline}, on the same prompts, with 95 % interval and p-value; a "
        "star marks those that a decided claim is about."
    )
    if wanted.timed:
        text += (
            " Training time is without evaluation and checkpoints; 95 % interval over seeds (Student's t)."
        )
    return text


def _paper_note(wanted: Wanted, data: str, labels: dict[str, list[Variant]]) -> list[str]:
    """For a twin, in one sentence: what the paper used and found. Its values stand beside ours only where
    model, data and metric are the paper's."""
    if data in PAPER_DATA:
        return []
    metric, name = ("math500", "MATH-500") if wanted.task == MATH else ("pass@1", "MBPP+ pass@1")
    arms = {label: found[0].arm if found else "base" for label, found in labels.items()}
    values = {
        label: paper_values.percent(wanted.task, "qwen0.5b", arm, metric) for label, arm in arms.items()
    }
    known = ", ".join(f"{label} {value:g}" for label, value in values.items() if value is not None)
    trained = "MATH" if wanted.task == MATH else "MBPP+"
    return (
        [f"the paper trained Qwen2.5-0.5B on {trained} and reports {name} in percent: {known}"]
        if known
        else []
    )


def _columns(
    records: Records, wanted: Wanted, data: str, model: str, own: dict[str, Variant | None], notes: list[str]
) -> list[tuple[Column, dict[str, Entry]]]:
    found: list[tuple[Column, dict[str, Entry]]] = []
    present = [v for v in own.values() if v is not None]
    group = MODEL_NAMES.get(model, model)
    source = model if data in PAPER_DATA else ""
    if wanted.timed:
        found.append(_time_column(records, wanted, source, group, own))
        found += [_part_column(records, part, group, own) for part in ("sampling", "gradient")]
    for dataset in quantities.eval_sets(records, present):
        for metric in ("pass@1", "pass@8") if wanted.task == CODE else ("accuracy",):
            entries, more = _metric(records, wanted, source, dataset, metric, own)
            name = SET_NAMES.get(dataset, dataset)
            heading = f"{name} {metric}" if wanted.task == CODE else name
            found.append((Column(heading, "%", group), entries))
            notes += more
    return found


def _time_column(
    records: Records, wanted: Wanted, source: str, group: str, own: dict[str, Variant | None]
) -> tuple[Column, dict[str, Entry]]:
    """Training time, and the paper's."""
    times, unit, size = _times(records, own)
    entries = {}
    for label, variant in own.items():
        paper = paper_values.seconds(wanted.task, source, variant.arm) if variant else None
        entries[label] = Entry(scaled(times[label], 1 / size), None if paper is None else paper / size)
    return Column("training time", unit, group, better=-1), entries


def _part_column(
    records: Records, part: str, group: str, own: dict[str, Variant | None]
) -> tuple[Column, dict[str, Entry]]:
    """What of it was spent on sampling, or on gradients: what preemptive sampling saves, and what larger
    gradient batches save."""
    _, unit, size = _times(records, own)
    times, _, _ = _times(records, own, part)
    entries = {label: Entry(scaled(time, 1 / size)) for label, time in times.items()}
    return Column(f"of it {part}", unit, group, better=-1), entries


def _times(
    records: Records, own: dict[str, Variant | None], part: str = ""
) -> tuple[dict[str, est.Estimate], str, float]:
    """Seconds by row, of all rows on one kind of hardware or of none; a unit for them and its seconds."""
    trained = {label: v for label, v in own.items() if v and v.arm != "base"}
    finished = [c for v in trained.values() for c in quantities.finished(records, v)]
    times = {label: replace(est.NOTHING, note=NOT_TRAINED) for label in own}
    times |= {label: quantities.time_of(records, v, part) for label, v in trained.items()}
    if len(machines := quantities.hardware_of(records, finished)) > 1:
        reason = f"rows ran on different hardware: {'; '.join(machines)}"
        times |= {label: est.Estimate(math.nan, note=reason) for label in trained}
    largest = max((t.value for t in times.values() if math.isfinite(t.value)), default=0.0)
    unit, size = next(((u, s) for u, s in UNITS if largest >= 2 * s), UNITS[-1])
    return times, unit, size


def _metric(
    records: Records, wanted: Wanted, source: str, dataset: str, metric: str, own: dict[str, Variant | None]
) -> tuple[dict[str, Entry], list[str]]:
    """An accuracy or pass@k column, with differences to the baseline row."""
    found: dict[str, quantities.Scores] = {}
    notes: list[str] = []
    for label, variant in own.items():
        if variant is not None:
            found[label] = quantities.scores(records, variant, dataset, after=variant.arm != "base")
            notes += found[label].notes
    trained = [v for v in own.values() if v is not None and v.arm != "base"]
    if "Base" in own and own["Base"] is None and trained:
        found["Base"] = before_training(records, trained, dataset)
    value = value_of(metric)
    several = [n for n, v in own.items() if (v.arm if v else "base") == wanted.baseline]
    base_label = several[0] if several else None
    if len(several) > 1:
        notes.append(f"of {len(several)} rows that differences could be to, they are to {base_label}")
    entries = {}
    for label, variant in own.items():
        scores = found.get(label)
        arm = variant.arm if variant else "base"
        paper = paper_values.percent(wanted.task, source, arm, _paper_metric(dataset, metric))
        delta = None
        if label != base_label:
            untrained = "row" if arm == "base" else "baseline" if wanted.baseline == "base" else ""
            delta = _delta(scores, found.get(base_label or ""), value, untrained)
        baseline = own.get(base_label or "")
        keys = [v.key if v and v.arm != "base" else "" for v in (variant, baseline)]
        pair = (keys[0], keys[1], dataset) if metric == "accuracy" else None
        entries[label] = Entry(_percent(scores, value, trained=arm != "base"), paper, delta, pair)
    return entries, notes


def before_training(records: Records, variants: Sequence[Variant], dataset: str) -> quantities.Scores:
    """The base model's verdicts: the evaluation before training, of one run (all runs share it)."""
    for variant in variants:
        found = quantities.scores(records, variant, dataset, after=False)
        if found.cells:
            return replace(
                found,
                cells=found.cells[:1],
                seeds=found.seeds[:1],
                scores_SP=found.scores_SP[:1],
                correct_SP=found.correct_SP[:1],
            )
    return quantities.Scores((), (), (), np.empty((0, 0)), np.empty((0, 0)), 0, ())


Value = Callable[[quantities.Scores], est.Array]


def value_of(metric: str) -> Value:
    """From verdicts to a value per seed and prompt: the mean verdict, or pass@k of all samples."""
    if metric == "accuracy":
        return lambda scores: scores.scores_SP
    k = int(metric.partition("@")[2])

    def of_k(scores: quantities.Scores) -> est.Array:
        if scores.n < k or (scores.correct_SP < 0).any():
            return np.empty((0, 0))
        return quantities.at_k(scores, k).scores_SP

    return of_k


def _percent(scores: quantities.Scores | None, value: Value, *, trained: bool) -> est.Estimate:
    if scores is None or not scores.cells:
        return est.NOTHING
    values = value(scores)
    if values.size == 0:
        return est.Estimate(math.nan, note=f"k is more than the {scores.n} samples there are")
    return scaled(est.accuracy(values, trained=trained), 100)


def _delta(
    scores: quantities.Scores | None, base: quantities.Scores | None, value: Value, untrained: str
) -> est.Difference | None:
    """In percentage points. `untrained`: which of both is the model before training, `row`, `baseline` or
    neither."""
    if scores is None or base is None or not scores.cells or not base.cells:
        return None
    one, other = value(scores), value(base)
    if one.size == 0 or other.size == 0:
        return None
    a, b = replace(scores, scores_SP=one), replace(base, scores_SP=other)
    if untrained == "row":
        found = quantities.compare(b, a, trained=False)
        found = found and found.scaled(-1)
    else:
        found = quantities.compare(a, b, trained=untrained != "baseline")
    return None if found is None else est.difference(found, 100)


def _paper_metric(dataset: str, metric: str) -> str:
    """The paper's name of a metric on this evaluation set; "" where it has none."""
    if metric == "accuracy":
        return paper_values.SETS.get(dataset, "")
    return metric if dataset == "mbppplus" else ""
