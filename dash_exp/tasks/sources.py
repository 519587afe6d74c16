"""Reads what a run learns from: examples of a JSON-lines file or the hub, and files of traces."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from dash_exp import plugins
from dash_exp.config.schema import Config, DatasetConfig, evaluation_places, own_rows, parts_of
from dash_exp.errors import Fault, UserError
from dash_exp.jsonl import read_lines
from dash_exp.plugins import is_reference
from dash_exp.tasks.examples import Example, ExampleSet, Layout, to_example

MAX_FAULTS = 20


def data_faults(config: Config) -> list[Fault]:
    """What is wrong with the rows of every file that a run of this config reads; its paths are resolved."""
    places, evaluation = parts_of(config.dataset), config.evaluation
    if evaluation.before or evaluation.after or evaluation.every:
        places = {**places, **evaluation_places(config)}
    found: dict[Fault, None] = {}
    for place, data in places.items():
        try:
            with placed(place):
                if is_reference(data.kind) or (data.path and Path(data.path).is_file()):
                    load_examples(data)
                if config.algorithm.source == "traces" and data.traces and Path(data.traces).is_file():
                    read_traces(Path(data.traces))
        except UserError as error:
            found.update(dict.fromkeys(error.faults))
    return list(found)


@contextmanager
def placed(place: str) -> Iterator[None]:
    """Faults raised inside name a key of a dataset; outside it is the key of the config."""
    known = {key.name for key in fields(DatasetConfig)}
    try:
        yield
    except UserError as error:
        named = [replace(f, where=f"{place}.{f.where}") if f.where in known else f for f in error.faults]
        raise UserError(named, error.consequence) from error


def load_examples(dataset: DatasetConfig) -> ExampleSet:
    """The examples of a dataset whose path has been resolved."""
    if is_reference(dataset.kind):
        name = plugins.find(dataset.kind).name
        return from_rows(dataset.name, map(json.loads, own_rows(dataset)), name, layout(dataset))
    if dataset.kind != "jsonl":
        from dash_exp.tasks.generated import GENERATED, gym_examples

        if dataset.kind in GENERATED:
            return replace(GENERATED[dataset.kind](dataset.split), name=dataset.name)
        assert dataset.task is not None and dataset.size is not None
        return gym_examples(
            dataset.name,
            dataset.task,
            dataset.task_options,
            split=dataset.split,
            size=dataset.size,
            extraction=dataset.extraction,
        )
    if dataset.path:
        return read_jsonl(Path(dataset.path), dataset.name, layout(dataset))
    if dataset.hub:
        return read_hub(dataset, dataset.hub)
    raise UserError(Fault("path", f"{dataset.name!r} names no file and no hub dataset", "set it to a file"))


def layout(dataset: DatasetConfig) -> Layout:
    """How the rows of a dataset are read."""
    return Layout(
        fields=dataset.fields,
        code=dataset.verifier == "code",
        own=any(map(is_reference, (dataset.verifier, dataset.template, *dataset.rewards))),
        free=is_reference(dataset.verifier),
        answer_after=dataset.answer_after,
        solution_drop=dataset.solution_drop,
        id_prefix=dataset.id_prefix,
        id_range=(dataset.id_range[0], dataset.id_range[1]) if dataset.id_range else None,
        tests_call=dataset.tests_call,
        timeouts=dataset.timeouts,
    )


def read_jsonl(path: Path, name: str, layout: Layout) -> ExampleSet:
    """Read a JSON-lines file; an absent id becomes `<name>-<line>`. A file that has not changed is read once.

    Raises UserError naming file and line of every faulty line (the first 20).
    """
    stat = path.stat() if path.is_file() else None
    read = _read(path, stat and (stat.st_mtime_ns, stat.st_size, stat.st_ino), name, layout)
    if isinstance(read, UserError):
        raise UserError(read.faults)
    return read


@lru_cache(maxsize=32)
def _read(path: Path, stamp: object, name: str, layout: Layout) -> ExampleSet | UserError:
    made: list[Example | Fault | None] = []
    for number, row in read_lines(path):
        where, name_of_row = f"{path}:{number}", f"{name}-{number}"
        made.append(row if isinstance(row, Fault) else to_example(row, where, name_of_row, layout))
    try:
        return _example_set(name, made, str(path), layout)
    except UserError as error:
        return error


def read_traces(path: Path) -> dict[str, list[str]]:
    """The texts of a traces file by the id of their example: JSON lines with `id` and `solution`.

    Raises UserError naming file and line of every faulty line (the first 20).
    """
    texts: dict[str, list[str]] = {}
    faults: list[Fault] = []
    for number, row in read_lines(path):
        if isinstance(row, Fault):
            faults.append(row)
            continue
        name, text, where = row.get("id"), row.get("solution"), f"{path}:{number}"
        if "id" not in row or "solution" not in row:
            faults.append(Fault(where, "is no trace", 'expected {"id": ..., "solution": ...}'))
        elif not isinstance(name, str) or not isinstance(text, str) or not text.strip():
            faults.append(Fault(where, "id and solution must be text, and not empty"))
        else:
            texts.setdefault(name, []).append(text)
    if not faults and not texts:
        faults.append(Fault(str(path), "holds no traces", "the teacher solved nothing?"))
    if faults:
        raise UserError(first_faults(faults, str(path)))
    return texts


def first_faults(faults: Sequence[Fault], origin: str) -> list[Fault]:
    """The first faulty lines, and how many more there are."""
    more = len(faults) - MAX_FAULTS
    return [*faults[:MAX_FAULTS], *([Fault(origin, f"and {more} more faulty lines")] if more > 0 else [])]


def read_hub(dataset: DatasetConfig, repository: str) -> ExampleSet:
    """Read a dataset of the hub, or of a folder in its layout. Raises UserError when it cannot be had."""
    import datasets

    split, which = dataset.hub_split or dataset.split, dataset.hub_config or "default"
    given = {"split": split, "revision": dataset.revision, "streaming": dataset.streaming}
    try:
        loaded = datasets.load_dataset(repository, dataset.hub_config, **given)
        rows = list(islice(loaded, dataset.limit)) if dataset.streaming else loaded
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = "offline? name a file with dataset.path=<file>.jsonl, or a folder with DASH_DATA"
        raise UserError(Fault("hub", f"{repository!r} could not be loaded: {reason}", hint)) from error
    at = f"@{dataset.revision}" if dataset.revision else ""
    return from_rows(dataset.name, rows, f"hub:{repository}{at}/{which}/{split}", layout(dataset))


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
        raise UserError(first_faults(faults, origin))
    return ExampleSet(name, tuple(rows), origin)


def _repeated_ids(rows: Iterable[Example], origin: str) -> list[Fault]:
    counts = Counter(row.id for row in rows)
    return [Fault(origin, f"the id {i!r} occurs twice") for i, n in counts.items() for _ in range(n - 1)]
