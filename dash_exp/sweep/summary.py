"""What a person sees of a sweep that has ended: a table of its cells in 80 columns. Torch-free."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from dash_exp.record import journal
from dash_exp.record.folder import Row, read_final
from dash_exp.record.manifest import Entry, Manifest
from dash_exp.sweep.lookup import default_root, labels
from dash_exp.sweep.slurm.queue import jobs
from dash_exp.sweep.states import CellState, states_of
from dash_exp.sweep.worker import gist
from dash_exp.text import format_path, format_seconds
from dash_exp.train.display import REWARD

SHOWN_CELLS, SHOWN_FAILURES = 100, 5
ENDS = 5
"""Steps whose mean is the first, and the last, reward."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The cells of a sweep, and how they stand."""

    manifest: Manifest
    entries: tuple[Entry, ...]
    states: tuple[CellState, ...]

    @property
    def counts(self) -> Counter[str]:
        found = Counter(state.state for state in self.states)
        found["blocked"] += len(self.manifest.waiting)
        return found


def ended(manifest: Manifest, cells: Sequence[str] | None, now: float) -> Ended:
    """How the chosen cells (None: all) of a sweep stand."""
    entries = tuple(e for e in manifest.entries if cells is None or e.folder in cells)
    folders = [manifest.cell(entry) for entry in entries]
    ids = [str(row["job"]) for folder in folders for row in journal.read(folder) if row.get("job")]
    return Ended(manifest, entries, tuple(states_of(folders, jobs(ids) if ids else {}, now)))


def table_of(seen: Ended) -> Table:
    """Cell, state, steps, reward, accuracy, training time."""
    rows = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    rows.add_column("cell", overflow="fold")
    for name in ("state", "steps", "reward", "accuracy", "time"):
        rows.add_column(name, justify="left" if name == "state" else "right", no_wrap=True)
    names = labels([e.overrides for e in seen.entries], [e.folder for e in seen.entries])
    for name, entry, state in list(zip(names, seen.entries, seen.states, strict=True))[:SHOWN_CELLS]:
        rows.add_row(*map(Text, (name, state.state, *measured(seen.manifest.cell(entry), state))))
    return rows


def measured(folder: Path, state: CellState) -> tuple[str, str, str, str]:
    """Steps, sampled reward first -> last, accuracy before -> after (of the first set), training time."""
    steps = read_final(folder, "steps") if state.step else []
    planned = "?" if state.steps is None else state.steps
    rewards = [float(row[REWARD]) for row in steps if REWARD in row]
    first_last = [statistics.fmean(rewards[:ENDS]), statistics.fmean(rewards[-ENDS:])] if rewards else []
    seconds = sum(float(row["time/step_s"]) for row in steps)
    accuracy = _accuracy(read_final(folder, "evals"))
    time_text = format_seconds(seconds) if steps else "-"
    return f"{state.step}/{planned}", _change(first_last), _change(accuracy), time_text


def _accuracy(evals: Sequence[Row]) -> list[float]:
    rows = [row for row in evals if row["metric"] == "accuracy"]
    mine = [float(row["value"]) for row in rows if row["dataset"] == rows[0]["dataset"] and "value" in row]
    return mine if len(mine) < 2 else [mine[0], mine[-1]]


def _change(values: Sequence[float]) -> str:
    return " -> ".join(f"{value:.3f}" for value in values) or "-"


def closing_lines(seen: Ended) -> list[str]:
    """Counts, why those failed that did, and where to look."""
    counts = ", ".join(f"{n} {state}" for state, n in sorted(seen.counts.items()) if n)
    lines = [f"{counted(len(seen.entries) + len(seen.manifest.waiting), 'cell')}: {counts}"]
    if len(seen.entries) > SHOWN_CELLS:
        lines.insert(0, f"... and {len(seen.entries) - SHOWN_CELLS} more")
    broken = [one for one in seen.states if one.state in ("failed", "blocked", "interrupted")]
    for one in broken[:SHOWN_FAILURES]:
        kind = f" ({one.failure_class})" if one.failure_class else ""
        why = gist(one.failure or one.note, last=False) or "no reason is known"
        lines += [f"  {one.state}{kind}: {why}", f"    {format_path(one.folder)}"]
    if len(broken) > SHOWN_FAILURES:
        lines.append(f"  ... and {len(broken) - SHOWN_FAILURES} more")
    place = format_path(seen.manifest.folder)
    return [*lines, f"sweep   {place}", f"status  {status_command(seen.manifest)}"]


def counted(number: int, thing: str) -> str:
    return f"{number} {thing}" + ("" if number == 1 else "s")


def status_command(manifest: Manifest) -> str:
    """What shows a sweep at any later time: by its name where that is enough."""
    usual = manifest.root.resolve() == default_root().resolve()
    return f"python -m dash_exp.sweep status {manifest.name if usual else format_path(manifest.folder)}"
