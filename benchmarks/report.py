"""What every benchmark says besides its numbers: the machine, in general terms, and where it wrote."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dash_exp.provenance import hardware

PACKAGES = ("torch", "transformers", "trl", "accelerate")


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
        table.add_column(name, justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console()
    Console(width=None if console.is_terminal else 160).print(table)


def write(path: Path | None, result: Mapping[str, Any]) -> None:
    """The whole result as JSON, where one was asked for."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"written to {path}")
