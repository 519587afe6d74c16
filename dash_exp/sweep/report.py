"""What a person reads about sweeps, in 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from dash_exp.record.folder import Row, read_final, read_json
from dash_exp.record.locks import HERE, runs
from dash_exp.record.manifest import Manifest
from dash_exp.record.reading import read_record, summary
from dash_exp.sweep.states import CellState
from dash_exp.sweep.status import CONTROLLER, RACE, SweepCell, SweepState, default_root, end_of_output
from dash_exp.sweep.worker import error_line
from dash_exp.text import format_command, format_number, format_path, format_seconds, printable
from dash_exp.train.display import REWARD

STYLES = {
    "running": "bold green",
    "finished": "green",
    "failed": "bold red",
    "interrupted": "yellow",
    "queued": "cyan",
    "stale": "yellow",
}
OF_TEXT = ("sweep", "cell", "id", "state", "other", "each cell asks for", "")
"""Headings of columns that are aligned to the left; the others hold numbers."""
SHOWN_CELLS = 100
"""Cells that a table lists; more are counted, and `--json` has them all."""
SHOWN_FAILURES, SHOWN_REASONS = 3, 5
SHORT_OUTPUT, LONG_OUTPUT = 5, 20
"""Lines quoted from the output of a failed cell."""
END_STEPS = 5
"""Steps whose mean reward is shown as the first, and as the last."""


def print_parts(*parts: RenderableType) -> None:
    """Print. If the output is not a terminal, lines have no trailing blanks."""
    console = Console(highlight=False)
    if console.is_terminal:
        console.print(*parts, sep="\n", crop=False)
        return
    with console.capture() as caught:
        console.print(*parts, sep="\n", crop=False)
    print("\n".join(line.rstrip() for line in caught.get().splitlines()), flush=True)


def table(*headings: str) -> Table:
    """An empty table. Its first and last column may wrap."""
    made = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", pad_edge=False)
    for place, name in enumerate(headings):
        wraps = place in (0, len(headings) - 1)
        justify: Literal["left", "right"] = "left" if name in OF_TEXT else "right"
        made.add_column(name, justify=justify, no_wrap=not wraps, overflow="fold")
    return made


def plain(text: str, **style: Any) -> Text:
    """A text from a record: brackets in it are not markup, and it does not control the terminal."""
    return Text(printable(text), **style)


def add(to: Table, *texts: str, style: str = "") -> None:
    to.add_row(*(plain(text) for text in texts), style=style)


def count_of(number: int, thing: str) -> str:
    return f"{number} {thing}" + ("" if number == 1 else "s")


def by_state(counts: Mapping[str, int]) -> str:
    """`1 running, 5 finished`."""
    return ", ".join(f"{number} {state}" for state, number in counts.items())


def counts_text(counts: Mapping[str, int]) -> str:
    """`6 cells: 1 running, 5 finished`."""
    total = sum(counts.values())
    return f"{count_of(total, 'cell')}: {by_state(counts)}" if total else "no cells"


def eta_text(seconds: float | None) -> str:
    return "" if seconds is None else f"{format_seconds(seconds)} left"


def sweep_lines(states: Sequence[SweepState]) -> RenderableType:
    """All sweeps, a line each."""
    columns = ("finished", "running", "failed")
    rows = table("sweep", "cells", *columns, "left", "other")
    for one in states:
        counts = one.counts
        add(
            rows,
            one.manifest.name,
            str(sum(counts.values())),
            *(str(counts.get(name, 0)) for name in columns),
            "-" if one.eta_s is None else format_seconds(one.eta_s),
            by_state({state: number for state, number in counts.items() if state not in columns}),
        )
    return rows


def status_view(state: SweepState, chosen: Sequence[SweepCell], long: bool) -> RenderableType:
    """A sweep: its counts, its cells in a table, and why cells failed. `long`: the end of the output of all
    chosen cells."""
    race = race_lines(read_json(state.manifest.folder / RACE))
    own = [read_record(state.manifest.folder / name).damage for name in (RACE, CONTROLLER)]
    race += [f"damaged: {summary(damage)}" for damage in own if damage]
    parts: list[RenderableType] = [_head(state), *map(plain, race), plain("")]
    parts += [_cell_table(chosen[:SHOWN_CELLS])] if chosen else []
    parts += more_cells(len(chosen), "name a pattern, or --json for all of them")
    if len(chosen) == len(state.cells):
        paths = [str(one.traces.path) for one in state.waiting]
        for path in dict.fromkeys(paths):
            parts.append(plain(f"{paths.count(path)} more wait for the traces {format_path(Path(path))}"))
    return Group(*parts, *_outputs(state.manifest, chosen, long), *_advice(state))


def _head(state: SweepState) -> RenderableType:
    eta = f", about {eta_text(state.eta_s)}" if state.eta_s is not None else ""
    place = format_path(state.manifest.folder)
    if state.controller and state.has_controller:
        host = state.controller.get("host")
        place += f", run by process {state.controller['pid']}" + (f" on {host}" if host else "")
    return plain(f"{state.manifest.name}\n{counts_text(state.counts)}{eta}\n{place}")


def race_lines(found: Row) -> list[str]:
    """A race as `status` shows it; nothing where there was none."""
    if not found:
        return []
    spent, budget = format_seconds(3600 * found["spent_hours"]), found.get("budget_hours")
    spent += " spent" if budget is None else f" of {format_seconds(3600 * budget)} spent"
    how = f"by rungs {', '.join(map(str, found['rungs']))}" if found["rungs"] else "until decided"
    state = found["state"]
    if state == "running" and found["host"] == HERE and not runs(found["pid"], "race"):
        state = "not running; the same command continues it"
    return [f"race {how}, {found['metric']}: {state}, {spent}", *(f"  {t}" for t in found["lines"])]


def _cell_table(chosen: Sequence[SweepCell]) -> Table:
    rows = table("cell", "id", "state", "step", "reward", "s/step", "")
    for one in chosen:
        cell = one.cell
        add(
            rows,
            one.label,
            one.entry.id,
            cell.state,
            _steps(cell),
            format_number(cell.reward),
            "-" if cell.step_s is None else f"{cell.step_s:.2f}",
            _remark(cell),
            style=STYLES.get(cell.state, ""),
        )
    return rows


def _steps(cell: CellState) -> str:
    return f"{cell.step}/{'?' if cell.steps is None else cell.steps}"


def _remark(cell: CellState) -> str:
    """What the numbers of a cell do not show."""
    texts = [
        eta_text(cell.eta_s) if cell.state == "running" else "",
        cell.failure_class or "",
        f"damaged: {cell.damage}" if cell.damage else "",
        "" if cell.state == "finished" and cell.note == "planned" else cell.note,
        "stale" if cell.stale else "",
        f"job {cell.job}" if cell.job and cell.state in ("queued", "running") else "",
    ]
    return ", ".join(text for text in texts if text)


def more_cells(count: int, hint: str) -> list[RenderableType]:
    return [plain(f"... and {count - SHOWN_CELLS} more: {hint}")] if count > SHOWN_CELLS else []


def _outputs(manifest: Manifest, chosen: Sequence[SweepCell], long: bool) -> list[RenderableType]:
    """Why cells failed, and the end of their output: of the first few, or of all chosen cells that ran."""
    wanted = [one for one in chosen if one.cell.state == "failed" or (long and one.cell.attempt)]
    shown = wanted if long else wanted[:SHOWN_FAILURES]
    parts: list[RenderableType] = []
    for one in shown:
        cell = one.cell
        why = ": ".join(text for text in (cell.failure_class, cell.failure) if text) or cell.note
        quoted = Table.grid(padding=(0, 1, 0, 0))
        for line in end_of_output(cell.folder, LONG_OUTPUT if long else SHORT_OUTPUT):
            quoted.add_row("  |", plain(line, overflow="fold"), style="dim")
        parts += [
            plain(f"\n{one.label} ({one.entry.id}), {cell.state}" + (f": {why}" if why else "")),
            quoted,
        ]
    if len(wanted) > len(shown):
        more = len(wanted) - len(shown)
        parts.append(plain(f"\n{more} more failed: {sweep_command('status', manifest, '--failed')}"))
    return parts


def _advice(state: SweepState) -> list[RenderableType]:
    """The next command, if nothing happens without one."""
    counts, manifest = state.counts, state.manifest
    lines = []
    if counts.get("failed"):
        lines.append(f"{sweep_command('retry', manifest, '--failed')}   # what failed, once more")
    left = [kind for kind in ("pending", "interrupted", "cancelled") if counts.get(kind)]
    left += ["blocked"] if counts.get("blocked") and not state.is_moving else []
    if left and not state.has_controller:
        lines.append(f"{sweep_command('launch', manifest)}   # what is {' or '.join(left)}")
    return [plain(""), *(plain(line, no_wrap=True, overflow="ignore") for line in lines)] if lines else []


# The end of a launch ------------------------------------------------------------------------------


def closing_table(cells: Sequence[SweepCell]) -> Table:
    """Cell, state, steps, sampled reward (first -> last), accuracy (before -> after) and training time."""
    rows = table("cell", "state", "steps", "reward", "accuracy", "time")
    for one in cells[:SHOWN_CELLS]:
        cell = one.cell
        steps = read_final(cell.folder, "steps") if cell.step else []
        rewards = [float(row[REWARD]) for row in steps if REWARD in row]
        ends = [fmean(part) for part in (rewards[:END_STEPS], rewards[-END_STEPS:]) if part]
        time_text = format_seconds(sum(float(row["time/step_s"]) for row in steps)) if steps else "-"
        accuracy = _accuracy(read_final(cell.folder, "evals"))
        add(rows, one.label, cell.state, _steps(cell), _change(ends), _change(accuracy), time_text)
    return rows


def _accuracy(evals: Sequence[Row]) -> list[float]:
    """The first and the last accuracy on the first dataset that was evaluated."""
    rows = [row for row in evals if row["metric"] == "accuracy"]
    found = [float(row["value"]) for row in rows if row["dataset"] == rows[0]["dataset"] and "value" in row]
    return found if len(found) < 2 else [found[0], found[-1]]


def _change(values: Sequence[float]) -> str:
    return " -> ".join(f"{value:.3f}" for value in values) or "-"


def closing_lines(manifest: Manifest, cells: Sequence[SweepCell], counts: Mapping[str, int]) -> list[str]:
    """Counts, reasons of failures, and where to look."""
    lines = [f"... and {len(cells) - SHOWN_CELLS} more"] if len(cells) > SHOWN_CELLS else []
    lines.append(counts_text(counts))
    broken = [one.cell for one in cells if one.cell.state in ("failed", "blocked", "interrupted")]
    for cell in broken[:SHOWN_REASONS]:
        kind = f" ({cell.failure_class})" if cell.failure_class else ""
        why = error_line(cell.failure or cell.note, last=False) or "no reason is known"
        lines += [f"  {cell.state}{kind}: {why}", f"    {format_path(cell.folder)}"]
    if len(broken) > SHOWN_REASONS:
        lines.append(f"  ... and {len(broken) - SHOWN_REASONS} more")
    lines = [printable(line) for line in lines]
    return [*lines, f"sweep   {format_path(manifest.folder)}", f"status  {sweep_command('status', manifest)}"]


def sweep_command(verb: str, manifest: Manifest, *more: str) -> str:
    """A command about a launched sweep. It names the folder where a name is not enough: other outputs, or a
    launch, which would read the sweep's file again, without what was given on the command line then."""
    is_default = verb != "launch" and manifest.root.resolve() == default_root().resolve()
    which = manifest.name if is_default else format_path(manifest.folder)
    return format_command("dash_exp.sweep", verb, which, *more)
