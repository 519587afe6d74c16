"""What a person reads of sweeps, in 80 columns. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dash_exp.sweep.preview import Line, Preview
from dash_exp.sweep.status import SweepState, Watched, end_of_output, has_controller, is_moving
from dash_exp.text import format_number, format_path, format_seconds

STYLES = {
    "running": "bold green",
    "finished": "green",
    "failed": "bold red",
    "interrupted": "yellow",
    "queued": "cyan",
    "stale": "yellow",
}
SHOWN_CELLS = 100
"""Cells that a table lists; more are counted, and `--json` has them all."""
SHOWN_FAILURES, SHORT_END, LONG_END = 3, 5, 20


def table(*columns: tuple[str, bool]) -> Table:
    """An empty table: headings, and whether a column holds numbers. The first and the last may wrap."""
    made = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", pad_edge=False)
    for place, (name, is_number) in enumerate(columns):
        wraps = place in (0, len(columns) - 1)
        made.add_column(name, justify="right" if is_number else "left", no_wrap=not wraps, overflow="fold")
    return made


def add(to: Table, *texts: str, style: str = "") -> None:
    """A row of plain texts: brackets in them are no markup."""
    to.add_row(*(Text(text) for text in texts), style=style)


def counts_text(counts: Mapping[str, int]) -> str:
    """`6 cells: 2 finished, 1 running, ...`, best news last."""
    total = sum(counts.values())
    many = "1 cell" if total == 1 else f"{total} cells"
    return f"{many}: " + ", ".join(f"{n} {state}" for state, n in counts.items()) if total else "no cells"


def left_text(seconds: float | None) -> str:
    return "" if seconds is None else f"{format_seconds(seconds)} left"


def sweep_lines(states: Sequence[SweepState]) -> RenderableType:
    """All sweeps, a line each."""
    rows = table(
        ("sweep", False),
        ("cells", True),
        ("finished", True),
        ("running", True),
        ("failed", True),
        ("left", True),
        ("other", False),
    )
    for one in states:
        counts = one.counts
        other = [f"{n} {s}" for s, n in counts.items() if s not in ("finished", "running", "failed")]
        add(
            rows,
            one.manifest.name,
            str(sum(counts.values())),
            *(str(counts.get(s, 0)) for s in ("finished", "running", "failed")),
            "-" if one.eta_s is None else format_seconds(one.eta_s),
            ", ".join(other),
        )
    return rows


def status_view(state: SweepState, chosen: Sequence[Watched], long: bool) -> RenderableType:
    """A sweep: what there is of it, its cells in a table, and why those failed that did. `long`: of all
    chosen cells the end of their output."""
    parts: list[RenderableType] = [head(state), Text("")]
    parts += [cell_table(chosen[:SHOWN_CELLS])] if chosen else []
    parts += _more(len(chosen), "name a pattern, or --json for all of them")
    if state.waiting and len(chosen) == len(state.cells):
        parts += waiting_lines(str(w.traces.path) for w in state.waiting)
    parts += endings(state.manifest.name, chosen, long)
    parts += advice(state)
    return Group(*parts)


def head(state: SweepState) -> RenderableType:
    left = f", about {left_text(state.eta_s)}" if state.eta_s is not None else ""
    lines = [state.manifest.name, counts_text(state.counts) + left]
    facts = state.controller
    if facts and has_controller(state):
        place = f"process {facts['pid']}" + (f" on {facts['host']}" if facts.get("host") else "")
        lines.append(f"{format_path(state.manifest.folder)}, run by {place}")
    else:
        lines.append(format_path(state.manifest.folder))
    return Text("\n".join(lines))


def cell_table(chosen: Sequence[Watched]) -> Table:
    rows = table(
        ("cell", False),
        ("id", False),
        ("state", False),
        ("step", True),
        ("reward", True),
        ("s/step", True),
        ("", False),
    )
    for one in chosen:
        cell = one.cell
        steps = f"{cell.step}/{cell.steps if cell.steps is not None else '?'}"
        shown = cell.state
        pace = "-" if cell.step_s is None else f"{cell.step_s:.2f}"
        style = STYLES.get(shown, "")
        add(
            rows,
            one.label,
            one.entry.id,
            shown,
            steps,
            format_number(cell.reward),
            pace,
            remark(one),
            style=style,
        )
    return rows


def remark(one: Watched) -> str:
    """What there is to say of a cell beside its numbers."""
    cell = one.cell
    said = [left_text(cell.eta_s) if cell.state == "running" else "", cell.failure_class or "", cell.note]
    if cell.stale:
        said.append("stale")
    if cell.state == "finished" and cell.note == "planned":
        said.remove("planned")
    if cell.job and cell.state in ("queued", "running"):
        said.append(f"job {cell.job}")
    return ", ".join(text for text in said if text)


def _more(count: int, hint: str) -> list[RenderableType]:
    return [Text(f"... and {count - SHOWN_CELLS} more: {hint}")] if count > SHOWN_CELLS else []


def waiting_lines(traces: Iterable[str]) -> list[RenderableType]:
    many = list(traces)
    lines = [
        f"{many.count(path)} more wait for the traces {format_path(Path(path))}"
        for path in dict.fromkeys(many)
    ]
    return [Text(line) for line in lines]


def endings(name: str, chosen: Sequence[Watched], long: bool) -> list[RenderableType]:
    """Why cells of a sweep failed, and the end of what they said; of the first few only, unless asked for
    `long`."""
    ended = [one for one in chosen if one.cell.state == "failed" or (long and one.cell.attempt)]
    shown = ended if long else ended[:SHOWN_FAILURES]
    parts = [part for one in shown for part in ending(one, LONG_END if long else SHORT_END)]
    if len(ended) > len(shown):
        more = len(ended) - len(shown)
        parts.append(Text(f"\n{more} more failed: python -m dash_exp.sweep status {name} --failed"))
    return parts


def ending(one: Watched, count: int) -> list[RenderableType]:
    cell = one.cell
    why = ": ".join(text for text in (cell.failure_class, cell.failure) if text) or cell.note
    quoted = Table.grid(padding=(0, 1, 0, 0))
    for line in end_of_output(cell.folder, count):
        quoted.add_row("  |", Text(line, overflow="fold"), style="dim")
    head_line = f"\n{one.label} ({one.entry.id}), {cell.state}" + (f": {why}" if why else "")
    return [Text(head_line), quoted]


def advice(state: SweepState) -> list[RenderableType]:
    """The next command, where nothing would happen without one."""
    counts, name = state.counts, state.manifest.name
    said = []
    if counts.get("failed"):
        said.append(f"python -m dash_exp.sweep retry {name} --failed   starts what failed once more")
    left = [kind for kind in ("pending", "interrupted", "cancelled") if counts.get(kind)]
    left += ["blocked"] if counts.get("blocked") and not is_moving(state) else []
    if left and not has_controller(state):
        said.append(f"python -m dash_exp.sweep launch {name}   goes on with what is {' or '.join(left)}")
    return [Text(""), *(Text(line) for line in said)] if said else []


def plan_view(made: Preview) -> RenderableType:
    """A dry run: the sweep, its cells, what they ask for, what is known of their cost, the scripts."""
    plan = made.plan
    parts: list[RenderableType] = [*about_lines(plan.about or {}, plan.name), *_plan_counts(made), Text("")]
    rows = table(
        ("cell", False), ("id", False), ("state", False), ("hours", True), ("GPU-h", True), ("", False)
    )
    for line in made.lines[:SHOWN_CELLS]:
        add(
            rows,
            line.label,
            line.planned.id,
            line.state,
            hours_text(line.hours_left),
            hours_text(line.gpu_hours),
            _line_remark(line),
            style=STYLES.get(line.state, ""),
        )
    parts += [rows] if made.lines else []
    parts += _more(len(made.lines), "--json has them all")
    for waiting in {w.traces.path: w.traces for w in plan.waiting}.values():
        many = sum(w.traces.path == waiting.path for w in plan.waiting)
        command = f"python -m dash_exp.traces {' '.join(waiting.arguments)}"
        parts.append(Text(f"{many} more once there are traces; made first, by\n  {command}"))
    parts += [Text(""), resource_table(made), *_hours_note(made)]
    return Group(*parts)


def about_lines(about: Mapping[str, object], name: str) -> list[RenderableType]:
    feeds = about.get("feeds")
    lines = [f"{name}: {about['claim']}" if about.get("claim") else name]
    if isinstance(feeds, list | tuple) and feeds:
        lines.append(f"feeds {', '.join(map(str, feeds))}")
    if about.get("source"):
        lines.append(f"from {format_path(Path(str(about['source'])))}")
    return [Text(line) for line in lines]


def _plan_counts(made: Preview) -> list[RenderableType]:
    plan = made.plan
    said = [counts_text(made.counts())]
    if plan.duplicates:
        said.append(f"{plan.duplicates} duplicates left out")
    shared = sum(bool(line.shared) for line in made.lines)
    if shared:
        said.append(f"{shared} shared with other sweeps")
    return [Text("; ".join(said))]


def _line_remark(line: Line) -> str:
    said = [line.note if line.note != "planned" else "", "stale" if line.stale else ""]
    said += [f"also in {', '.join(line.shared)}"] if line.shared else []
    return ", ".join(text for text in said if text)


def resource_table(made: Preview) -> Table:
    """What cells ask for, and how many hours are left, by profile."""
    rows = table(
        ("each cell asks for", False), ("cells", True), ("to run", True), ("hours", True), ("GPU-hours", True)
    )
    for resources, lines in made.profiles().items():
        open_ones = [line for line in lines if line.rest > 0]
        add(
            rows,
            str(resources),
            str(len(lines)),
            str(len(open_ones)),
            sum_text([line.hours_left for line in open_ones]),
            sum_text([line.gpu_hours for line in open_ones]),
        )
    return rows


def sum_text(values: Sequence[float | None]) -> str:
    """A sum of hours; with a + where parts are not known, a dash where none is."""
    known = [value for value in values if value is not None]
    if len(known) == len(values):
        return hours_text(sum(known))
    return f"{hours_text(sum(known))}+" if known else "-"


def hours_text(hours: float | None) -> str:
    return "-" if hours is None else f"{hours:.2f}" if hours < 10 else f"{hours:.0f}"


def _hours_note(made: Preview) -> list[RenderableType]:
    unknown = sum(line.hours_left is None for line in made.lines)
    if not unknown:
        return []
    many = "any of them" if unknown == len(made.lines) else f"{unknown} of them"
    return [Text(f"no cell with the arm, model, data and sizes of {many} has finished here")]
