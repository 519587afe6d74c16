"""Reads examples from a JSON-lines file or the hub."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dash_exp.errors import Fault, UserError
from dash_exp.tasks.examples import Example, ExampleSet, Layout, to_example

MAX_FAULTS = 20


def read_jsonl(path: Path, name: str, layout: Layout) -> ExampleSet:
    """Read a JSON-lines file; an absent id becomes `<name>-<line>`.

    Raises UserError naming file and line of every faulty line (the first 20).
    """
    made: list[Example | Fault | None] = []
    for number, row in json_lines(path):
        where, name_of_row = f"{path}:{number}", f"{name}-{number}"
        made.append(row if isinstance(row, Fault) else to_example(row, where, name_of_row, layout))
    return _example_set(name, made, str(path), layout)


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | Fault]]:
    """Each line of a file that is not blank, by its number: an object, or what is wrong with the line. A
    file that cannot be read ends with its fault."""
    number = 0
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, _parse_line(line, f"{path}:{number}")
    except UnicodeDecodeError as error:
        yield number, Fault(str(path), f"is not UTF-8 text: {error.reason} at byte {error.start}")
    except OSError as error:
        yield number, Fault(str(path), f"cannot be read: {error.strerror}")


def _parse_line(line: str, where: str) -> dict[str, Any] | Fault:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return Fault(where, f"is not JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        return Fault(where, "is nested too deeply")
    return row if isinstance(row, dict) else Fault(where, f"expected an object, got {type(row).__name__}")


def read_hub(name: str, repository: str, config: str | None, split: str, layout: Layout) -> ExampleSet:
    """Read a dataset of the hub by name. Raises UserError when it cannot be had."""
    import datasets

    try:
        loaded = datasets.load_dataset(repository, config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = "offline? name a file with dataset.path=<file>.jsonl, or a folder with DASH_DATA"
        raise UserError(Fault("hub", f"{repository!r} could not be loaded: {reason}", hint)) from error
    return from_rows(name, loaded, f"hub:{repository}/{config or 'default'}/{split}", layout)


def from_rows(name: str, rows: Iterable[Mapping[str, Any]], origin: str, layout: Layout) -> ExampleSet:
    """Rows of the hub's schema as examples. Raises UserError with the faulty ones (the first 20)."""
    made = [to_example(row, f"{origin}:{n}", f"{name}-{n}", layout) for n, row in enumerate(rows)]
    return _example_set(name, made, origin, layout)


def _example_set(
    name: str, made: Sequence[Example | Fault | None], origin: str, layout: Layout
) -> ExampleSet:
    rows = [one for one in made if isinstance(one, Example)]
    faults = [*(one for one in made if isinstance(one, Fault)), *_repeated_ids(rows, origin)]
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
    counts = Counter(row.id for row in rows)
    return [Fault(origin, f"the id {i!r} occurs twice") for i, n in counts.items() for _ in range(n - 1)]
