"""What the cells of a race have scored so far, and which of them its next round runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dash_exp.record.folder import Row, read_final, read_json
from dash_exp.record.metrics import judged_prompts
from dash_exp.record.reading import read_config
from dash_exp.statistics.comparison import Comparison
from dash_exp.sweep.race import rounds
from dash_exp.sweep.race.grid import PER_RUN, Grid, Settings, field_of
from dash_exp.sweep.race.rounds import Standing, Values
from dash_exp.sweep.states import ACTIVE, CellState
from dash_exp.text import format_number
from dash_exp.train.budget import spent_seconds

REWARD = "reward/mean"


@dataclass(frozen=True, slots=True)
class Round:
    """What a race does next. `cells`: recipes and seeds to launch; none: it has ended, for the reason
    `state`. `until`: the step at which they pause. `lines`, `facts`: what was found so far."""

    cells: tuple[tuple[str, int], ...]
    until: int | None
    state: str
    lines: tuple[str, ...]
    facts: tuple[Row, ...]


def values_of(folder: Path, metric: str, step: int) -> Values:
    """What a cell scored at a step; empty if that was not measured. `reward`: the mean of the last quarter of
    steps, at least five; `time`: the logarithm of training seconds."""
    if metric not in PER_RUN:
        sets = list((read_config(folder).value.get("evaluation") or {}).get("sets") or ())
        if not sets:  # its config is damaged, as `status` says
            return {}
        dataset = sets[0] if metric == "accuracy" else metric
        scored, _ = judged_prompts(folder, dataset, step)
        return {row["prompt"]: row["score"] for row in scored}
    rows = [row for row in read_final(folder, "steps") if row["step"] <= step]
    if metric == "time":
        seconds = spent_seconds(rows)
        machine = read_json(folder / "provenance.json").get("hardware") or {}
        key = " ".join(str(machine.get(name)) for name in ("cpu", "threads", "gpus"))
        return {key: math.log(seconds)} if seconds > 0 else {}
    rewards = [float(row[REWARD]) for row in rows if REWARD in row]
    return {"": statistics.fmean(rewards[-max(5, len(rewards) // 4) :])} if rewards else {}


def score_of(folder: Path, metric: str, step: int) -> float:
    """One number: the mean of what a cell scored. NaN where it scored nothing."""
    values = values_of(folder, metric, step)
    return statistics.fmean(values.values()) if values else math.nan


States = Mapping[tuple[str, int], CellState]


def next_look(grid: Grid, states: States, settings: Settings, stuck: set[str]) -> Round:
    """The next round of a race until comparisons are decided."""
    raced = field_of(grid, settings.metric)
    runs: dict[str, dict[int, Values]] = {}
    for (recipe, seed), cell in states.items():
        if cell.state == "finished" and (values := values_of(cell.folder, settings.metric, cell.step)):
            runs.setdefault(recipe, {})[seed] = values
    found = rounds.standings(raced, runs)
    cells = tuple(rounds.wanted(raced, found, runs, stuck))
    lines = [line_of(one, settings.metric, stuck) for one in found]
    state = "running" if cells else "stopped" if any(one.open for one in found) else "ended"
    return Round(cells, None, state, tuple(lines), tuple(row_of(one) for one in found))


def line_of(one: Standing, metric: str, stuck: set[str]) -> str:
    """`grpo against dash: open after 3 seeds: +1.2 points [-3.0, +5.4], sequential p = 0.310`, and what is
    next."""
    text = f"{one.arm} against {one.other}: "
    if one.found is None:
        text += "open"
    else:
        verdict = verdict_of(one) if one.decided else "open" if one.open else "undecided"
        text += f"{verdict} after {one.look} seeds: {one.found.note or size_of(one.found, metric)}"
        text += "" if one.found.note else f", sequential p {p_text(one.p)}"
    if one.open:
        failed = sorted({one.arm, one.other} & stuck)
        text += f"; {' and '.join(failed)} failed" if failed else f"; next look at {one.next_look} seeds"
    return text


def verdict_of(one: Standing) -> str:
    """What a decided comparison has shown."""
    if one.margin is None or one.found is None:
        return "decided"
    return "equal within the margin" if abs(one.found.difference) <= one.margin else "not equal"


def size_of(found: Comparison, metric: str) -> str:
    """A difference with its 95 % interval, in the unit of the metric."""
    numbers = (found.difference, *found.interval())
    if metric == "time":
        size, low, high = (f"{math.exp(value):.2f}" for value in numbers)
        return f"{size} times as long [{low}, {high}]"
    if metric in PER_RUN:
        size, low, high = (f"{value:+.3f}" for value in numbers)
        return f"{size} [{low}, {high}]"
    size, low, high = (f"{100 * value:+.1f}" for value in numbers)
    return f"{size} points [{low}, {high}]"


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def row_of(one: Standing) -> Row:
    low, high = one.found.interval() if one.found else (math.nan, math.nan)
    difference = one.found.difference if one.found else math.nan
    numbers = {"difference": difference, "low": low, "high": high, "p": one.p}
    shown = {key: value if math.isfinite(value) else None for key, value in numbers.items()}
    kept = {"decided": one.decided, "margin": one.margin, "seeds": one.look, "next": one.next_look}
    return {"arm": one.arm, "other": one.other, **shown, **kept}


def next_rung(grid: Grid, states: States, settings: Settings, stuck: set[str]) -> Round:
    """The next round of a race by rungs, the last of which is the cells' end."""
    going, lines, facts = tuple(grid.overrides), list[str](), list[Row]()
    ends = [grid.steps(recipe) for recipe in going]
    rungs = [rung for rung in settings.rungs if any(end is None or rung < end for end in ends)]
    for rung in (*rungs, None):
        last = rung is None
        if settings.halve and len(going) == 1 and not last:
            continue
        behind = tuple(
            place
            for place, cell in states.items()
            if place[0] in going and place[0] not in stuck and not reached(cell, rung)
        )
        if behind:
            where = "the end" if last else f"step {rung}"
            lines.append(f"{len(going)} recipes advance to {where}")
            return Round(behind, rung, "running", tuple(lines), tuple(facts))
        scores = {recipe: _mean_score(states, recipe, settings, rung) for recipe in going}
        lower = settings.metric == "time"
        kept = rounds.better_half(going, scores, lower) if settings.halve and not last else going
        order = sorted(going, key=lambda r: (math.isnan(scores[r]), scores[r] if lower else -scores[r]))
        for recipe in order:
            out = "" if recipe in kept else ", out"
            lines.append(
                f"{'end' if last else f'rung {rung}'}: {recipe} {format_number(scores[recipe])}{out}"
            )
        shown = {r: None if math.isnan(v) else v for r, v in scores.items()}
        facts.append({"rung": rung, "scores": shown, "kept": list(kept)})
        going = kept
    planned = [(cell.step, grid.steps(place[0])) for place, cell in states.items()]
    if settings.halve and all(steps for _, steps in planned):
        share = sum(step for step, _ in planned) / sum(steps or 0 for _, steps in planned)
        lines.append(f"{share:.0%} of the steps that all cells would have taken")
    state = "stopped" if not going or stuck & set(going) else "ended"
    return Round((), None, state, tuple(lines), tuple(facts))


def reached(cell: CellState, rung: int | None) -> bool:
    """Whether a cell has passed a rung, or stands at it and does not move; None: whether it is finished."""
    if cell.state == "finished" or rung is None:
        return cell.state == "finished"
    return cell.step > rung or (cell.step == rung and cell.state not in ACTIVE)


def _mean_score(states: States, recipe: str, settings: Settings, rung: int | None) -> float:
    """Over the seeds of a recipe; NaN unless all of them have a score."""
    own = [cell for (label, _), cell in states.items() if label == recipe]
    scores = [
        score_of(cell.folder, settings.metric, cell.step if rung is None else min(rung, cell.step))
        for cell in own
        if reached(cell, rung)
    ]
    return statistics.fmean(scores) if len(scores) == len(own) else math.nan
