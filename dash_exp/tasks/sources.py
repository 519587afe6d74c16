"""Reading examples from a JSON-lines file or the hub. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dash_exp.errors import Fault, UserError
from dash_exp.tasks.examples import Example, ExampleSet, Layout, to_example

MAX_FAULTS = 20


def read_jsonl(path: Path, name: str, layout: Layout) -> ExampleSet:
    """Read a JSON-lines file; an absent id becomes `<name>-<line>`.

    Raises UserError naming file and line of every faulty line (the first 20).
    """
    faults: list[Fault] = []
    rows: list[Example] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for where, number, line in _numbered(lines, path):
                found = _parse_line(line, where)
                if not isinstance(found, Fault):
                    made = to_example(found, where, f"{name}-{number}", layout)
                    rows += [made] if isinstance(made, Example) else []
                    faults += [made] if isinstance(made, Fault) else []
                else:
                    faults.append(found)
    except UnicodeDecodeError as error:
        faults.append(Fault(str(path), f"is not UTF-8 text: {error.reason} at byte {error.start}"))
    except OSError as error:
        faults.append(Fault(str(path), f"cannot be read: {error.strerror}"))
    return _example_set(name, rows, str(path), faults, layout)


def _numbered(lines: Iterable[str], path: Path) -> Iterator[tuple[str, int, str]]:
    return ((f"{path}:{n}", n, line) for n, line in enumerate(lines, 1) if line.strip())


def _parse_line(line: str, where: str) -> dict[str, Any] | Fault:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return Fault(where, f"is not JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        return Fault(where, "is nested too deeply")
    if not isinstance(row, dict):
        return Fault(where, f"expected an object, got {type(row).__name__}")
    return row


def read_hub(name: str, repository: str, config: str | None, split: str, layout: Layout) -> ExampleSet:
    """Read a dataset of the hub by name. Raises UserError when it cannot be had."""
    import datasets

    try:
        loaded = datasets.load_dataset(repository, config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            Fault(
                "hub",
                f"{repository!r} could not be loaded: {reason}",
                "offline? name a file with dataset.path=<file>.jsonl, or a folder with DASH_DATA",
            )
        ) from error
    return from_rows(name, loaded, f"hub:{repository}/{config or 'default'}/{split}", layout)


def from_rows(name: str, rows: Iterable[Mapping[str, Any]], origin: str, layout: Layout) -> ExampleSet:
    """Rows of the hub's schema as examples. Raises UserError with the faulty ones (the first 20)."""
    made = [to_example(row, f"{origin}:{n}", f"{name}-{n}", layout) for n, row in enumerate(rows)]
    faults = [one for one in made if isinstance(one, Fault)]
    return _example_set(name, [one for one in made if isinstance(one, Example)], origin, faults, layout)


def _example_set(
    name: str, rows: list[Example], origin: str, faults: list[Fault], layout: Layout
) -> ExampleSet:
    faults = faults + _repeated_ids(rows, origin)
    if not rows and not faults:
        hint = "one JSON object per line is expected"
        if layout.id_range:
            hint = f"dataset.id_range={list(layout.id_range)} may leave all of them out"
        faults.append(Fault(origin, "has no rows", hint))
    if faults:
        more = len(faults) - MAX_FAULTS
        extra = [Fault(origin, f"and {more} more faulty lines")] if more > 0 else []
        raise UserError(faults[:MAX_FAULTS] + extra)
    return ExampleSet(name, tuple(rows), origin)


def _repeated_ids(rows: Iterable[Example], origin: str) -> list[Fault]:
    seen: set[str] = set()
    faults = []
    for row in rows:
        if row.id in seen:
            faults.append(Fault(origin, f"the id {row.id!r} occurs twice"))
        seen.add(row.id)
    return faults
