"""`python -m analysis live <folder>`: states and reward curves of a running sweep, in a terminal."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dash_exp.text import format_seconds, printable

from . import COMMAND, quantities
from .load import Records, load
from .variants import Variant, variants

BLOCKS = "▁▂▃▄▅▆▇█"
CURVE = "reward/mean"
UNFINISHED = ("pending", "blocked", "running", "interrupted")
FOLD = 30
"""Characters of a recipe's name in a line; a longer one takes several lines."""


def watch(arguments: Sequence[str]) -> int:
    """Exit code 0; Ctrl-C ends it. `--once` prints one picture."""
    parser = argparse.ArgumentParser(prog=f"{COMMAND} live")
    parser.add_argument("places", nargs="+", type=Path, metavar="folder")
    parser.add_argument("--every", type=float, default=5.0, metavar="S", help="seconds between two looks (5)")
    parser.add_argument("--once", action="store_true", help="print one picture and end")
    options = parser.parse_args(arguments)
    console = Console(highlight=False)
    if options.once or not console.is_terminal:
        console.print(picture(load(options.places), console.width))
        return 0
    with Live(console=console, auto_refresh=False) as view:
        try:
            while True:
                records = load(options.places)
                view.update(picture(records, console.width), refresh=True)
                if not records.cells["state"].isin(UNFINISHED).any():
                    return 0
                time.sleep(options.every)
        except KeyboardInterrupt:
            return 0


def picture(records: Records, width: int) -> RenderableType:
    """A line per run: state, steps, reward and its curve, scaled alike for all runs."""
    found = variants(records)
    head = Text(_headline(records, found), style="bold")
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("recipe", max_width=FOLD, overflow="fold")
    for name in ("seed", "state", "step", "s/step", "reward", ""):
        table.add_column(name, justify="left" if name in ("state", "") else "right", no_wrap=True)
    curves = {c: _curve(records, c) for v in found for c in v.cells}
    values = np.concatenate([c.to_numpy(float) for c in curves.values()]) if curves else np.empty(0)
    low, high = (float(np.nanmin(values)), float(np.nanmax(values))) if len(values) else (0.0, 1.0)
    named = min(FOLD, max((len(_name(v)) for v in found), default=0))
    room = max(8, width - 38 - named)
    for variant in found:
        for seed, cell in zip(variant.seeds, variant.cells, strict=True):
            texts = _row(records, variant, seed, cell)
            table.add_row(*(Text(printable(text)) for text in texts), spark(curves[cell], room, low, high))
    scale = Text(f"{CURVE}, from {low:.2f} to {high:.2f}", style="dim")
    return Group(head, table, scale)


def _name(variant: Variant) -> str:
    return f"{variant.label} {variant.model}"


def _headline(records: Records, found: Sequence[Variant]) -> str:
    """The sweeps' names, how many cells are in each state, and about how long the rest will take."""
    cells = records.cells
    names = sorted({name for own in cells["sweeps"] for name in own})
    states = ", ".join(f"{count} {state}" for state, count in cells["state"].value_counts().items())
    seconds = time_left(records, found)
    left = f", about {format_seconds(seconds)} left" if seconds else ""
    return f"{', '.join(names)}: {states}{left}" if names else f"{states}{left}"


def time_left(records: Records, found: Sequence[Variant]) -> float | None:
    """Seconds until all planned steps are done, at the pace of each recipe so far and with as many cells side
    by side as run now. None: nothing is unfinished, or a recipe has no step yet."""
    seconds, running = 0.0, 0
    for variant in found:
        facts = records.cells.loc[list(variant.cells)]
        open_cells = facts[facts["state"].isin(UNFINISHED)]
        steps = records.steps[records.steps["cell"].isin(variant.cells)]
        if open_cells.empty:
            continue
        if steps.empty or open_cells["steps"].isna().any():
            return None
        done = steps.groupby("cell", observed=True)["step"].max().reindex(open_cells.index).fillna(0)
        seconds += float((open_cells["steps"] - done).sum()) * _pace(steps)
        running += int((open_cells["state"] == "running").sum())
    return seconds / max(1, running) or None


def _pace(steps: pd.DataFrame) -> float:
    """Seconds of a late step."""
    return float(steps.groupby("cell", observed=True)["time/step_s"].tail(10).median())


def _row(records: Records, variant: Variant, seed: int, cell: str) -> list[str]:
    facts, steps = records.cells.loc[cell], quantities.steps_of(records, cell)
    pace = f"{_pace(steps):.1f}" if len(steps) else "-"
    curve = _curve(records, cell)
    reward = f"{curve.tail(5).mean():.2f}" if len(curve) else "-"
    done = len(steps) and int(steps["step"].max())
    planned = facts["steps"] if pd.notna(facts["steps"]) else "?"
    return [_name(variant), str(seed), str(facts["state"]), f"{done}/{planned}", pace, reward]


def _curve(records: Records, cell: str) -> pd.Series:
    steps = quantities.steps_of(records, cell)
    return steps[CURVE].dropna() if CURVE in steps else pd.Series(dtype=float)


def spark(values: pd.Series, room: int, low: float, high: float) -> str:
    """A curve in `room` characters: means of equal parts, from `low` to `high`."""
    if values.empty:
        return ""
    parts = np.array_split(values.to_numpy(float), min(room, len(values)))
    span = high - low or 1.0
    return "".join(BLOCKS[min(7, int((p.mean() - low) / span * 8))] for p in parts)
