"""What the user sees: live progress on a terminal, plain lines elsewhere, and the summary."""

from __future__ import annotations

import math
import re
import shlex
import statistics
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from dash_exp.config.compose import partner_overrides
from dash_exp.config.schema import PUSH_TO
from dash_exp.record.folder import Row
from dash_exp.record.ledger import PHASES
from dash_exp.text import (
    format_accuracy,
    format_command,
    format_number,
    format_path,
    format_seconds,
    printable,
)

REWARD, LIKELIHOOD = "reward/mean", "policy/logprob_mean"
SHOWN_STEPS = 8


def columns_of(row: Row, steps: int, left_s: float) -> list[tuple[str, str]]:
    """The cells of a progress line: heading and text."""
    return [
        ("step", f"{row['step']}/{steps}"),
        *quality_columns(row),
        ("length", f"{row['length/mean_tokens']:.1f}"),
        ("tok/s", f"{row['time/tokens_per_s']:.0f}"),
        ("sample", f"{row['time/sample_s']:.2f}"),
        ("verify", f"{row['time/verify_s']:.2f}"),
        ("backp", f"{row['time/backprop_s']:.2f}"),
        ("optim", f"{row['time/optimizer_s']:.2f}"),
        ("s/step", f"{row['time/step_s']:.2f}"),
        ("left", format_seconds(left_s)),
    ]


def is_supervised(row: Row) -> bool:
    """Whether the completions of a step were given, not sampled."""
    return "completions/shown" in row


def quality_columns(row: Row) -> list[tuple[str, str]]:
    """Reward and kept share; of a supervised step the likelihood of the given completions."""
    if is_supervised(row):
        return [("log-lik.", format_number(row.get(LIKELIHOOD)))]
    return [("reward", format_number(row.get(REWARD))), ("kept", f"{row['filter/kept_share']:.2f}")]


class Display:
    """Progress of one run. `mode`: `auto` (live on a terminal, else plain), `plain` or `none`; `command`:
    starts it again."""

    def __init__(self, steps: int, mode: str, command: str | None = None, console: Console | None = None):
        self.steps, self.mode, self.command = steps, mode, command
        self.console = console or Console(highlight=False)
        self.live = mode == "auto" and self.console.is_terminal
        self._rows: deque[list[tuple[str, str]]] = deque(maxlen=SHOWN_STEPS)
        self._seconds: list[float] = []
        self._view: Live | None = None

    def note(self, text: str) -> None:
        if self.mode != "none":
            self.console.print(printable(text), markup=False, soft_wrap=True)

    def goes_on(self, place: str) -> str:
        """A sentence that names the command which continues from a place."""
        if self.command is None:
            return f"The same command continues from {place}."
        return f"This continues from {place}:\n    {self.command}"

    def step(self, row: Row) -> None:
        """Show a step's row."""
        if self.mode == "none":
            return
        self._seconds.append(float(row["time/step_s"]))
        left = statistics.median(self._seconds[-10:]) * (self.steps - int(row["step"]))
        cells = columns_of(row, self.steps, left)
        if not self.live:
            self.console.print(
                " ".join(f"{name} {text}" for name, text in cells if name not in ("verify", "optim")),
                markup=False,
                soft_wrap=True,
            )
            return
        self._rows.append(cells)
        if self._view is None:
            self._view = Live(console=self.console, refresh_per_second=4)
            self._view.start()
        self._view.update(self._picture(int(row["step"])))

    def _picture(self, step: int) -> Group:
        table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
        for name, _ in self._rows[-1]:
            table.add_column(name, justify="right", no_wrap=True)
        for cells in self._rows:
            table.add_row(*(text for _, text in cells))
        bar = Progress(TextColumn("{task.percentage:3.0f} %"), BarColumn(bar_width=None), expand=True)
        bar.add_task("steps", total=self.steps, completed=step)
        return Group(table, bar)

    def accuracy(self, row: Row) -> str:
        """One evaluation as a line."""
        return f"{row['dataset']}: accuracy {format_accuracy(row)}, n={row['n']},"

    def stop(self) -> None:
        if self._view is not None:
            self._view.stop()
            self._view = None

    def summary(self, folder: Path, steps: Sequence[Row], evals: Sequence[Row], reason: str) -> None:
        """The end of a run: what was learned, where the time went, where the record is, what next."""
        self.stop()
        if self.mode == "none":
            return
        for line in summary_lines(folder, steps, evals, reason, self.command):
            self.console.print(printable(line), markup=False, soft_wrap=True)


def summary_lines(
    folder: Path, steps: Sequence[Row], evals: Sequence[Row], reason: str, command: str | None = None
) -> list[str]:
    """The summary as text, at most 80 columns but for paths."""
    lines = ["", f"Finished after {len(steps)} steps ({reason})." if steps else "No steps."]
    if steps:
        name, key = ("log-likelihood", LIKELIHOOD) if is_supervised(steps[0]) else ("sampled reward", REWARD)
        values = [r[key] for r in steps if key in r] or [math.nan]
        first, last = values[:5], values[-5:]
        start, end = statistics.fmean(first), statistics.fmean(last)
        lines.append(
            f"  {name:<16} {start:.3f} (first {len(first)} steps) -> {end:.3f} (last {len(last)})"
            f"  {end - start:+.3f}"
        )
    lines += accuracy_lines(evals)
    if steps:
        lines += time_lines(steps)
    return [*lines, f"  record           {format_path(folder)}", *next_lines(folder, command)]


def accuracy_lines(evals: Sequence[Row]) -> list[str]:
    """Accuracy before and after, per set, with its 95 % interval over prompts."""
    lines = []
    rows = [r for r in evals if r["metric"] == "accuracy"]
    for name in dict.fromkeys(r["dataset"] for r in rows):
        mine = [r for r in rows if r["dataset"] == name]
        ends = mine[:1] if len(mine) == 1 else [mine[0], mine[-1]]
        texts = [format_accuracy(r) for r in ends]
        lines.append(f"  {name:<16} {' -> '.join(texts)}  n={mine[0]['n']}")
    return lines


def time_lines(steps: Sequence[Row]) -> list[str]:
    """Format where the seconds went, largest phase first."""
    total = sum(r["time/step_s"] for r in steps)
    shares = {p: sum(r[f"time/{p}_s"] for r in steps) / total for p in PHASES}
    largest = sorted(shares.items(), key=lambda pair: -pair[1])
    middle = statistics.median(r["time/step_s"] for r in steps)
    return [
        f"  time             {format_seconds(total)}, median {middle:.2f} s a step",
        "                   " + ", ".join(f"{name} {x:.0%}" for name, x in largest if x >= 0.005),
    ]


def next_lines(folder: Path, command: str | None) -> list[str]:
    """Where the weights are, and commands for what could be run next, which keep everything else."""
    checkpoint = sorted((folder / "checkpoints").glob("step-*"))
    weights = [f"  weights          {format_path(checkpoint[-1])}"] if checkpoint else []
    module, *given = shlex.split(command or "python -m none")[2:]
    overrides = [text for text in given if text.partition("=")[0] != PUSH_TO]  # another model is not that one
    name = re.fullmatch(r"([^-]+)-.*-s(\d+)-[0-9a-f]{8}", folder.name)
    if module != "dash_exp" or name is None:
        return weights
    seed = [text for text in overrides if text.partition("=")[0] != "seed"] + [f"seed={int(name[2]) + 1}"]
    shown = [f"  next             {format_command(module, *seed)}   # another seed"]
    if not name[1].startswith("sft"):  # else its sizes are not those of an arm that samples
        bound = ("filter", "filter.name", "sampler.schedule", "sampler.streaming")
        others = partner_overrides("dash" if name[1] == "grpo" else "grpo", overrides)
        arm = [text for text in others if text.lstrip("+").partition("=")[0] not in bound]
        shown.append(f"                   {format_command(module, *arm)}   # another arm, same prompts")
    return [*weights, *shown]
