"""Run folders to tidy tables. Every cell is read from its own records; nothing is averaged here.

Unfinished cells, records of older versions, torn lines, unequal seeds and steps are all allowed: what is
missing or odd is listed in `problems`, which every later stage shows.
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.json

from dash_exp.errors import Fault, UserError
from dash_exp.record.folder import read_json, write_json
from dash_exp.record.identity import model_name
from dash_exp.record.reading import (
    NAME,
    TEXT,
    WAITING,
    Row,
    Schema,
    Unreadable,
    list_of,
    parse_rows,
    read_bytes,
    read_config,
    read_record,
    record_of,
    summary,
    unusable,
)
from dash_exp.text import format_seconds

TABLES = ("steps", "evals")
VERSION = 1
"""Of what a cache holds."""

REWARD, SUSPENDED = "reward/mean", "time/suspended_s"
CELLS_OF = Schema(
    {"cells": list_of(record_of({"folder": NAME}))}, {"name": TEXT, "waiting": list_of(WAITING)}
)
"""What is read of a sweep's manifest."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What was left out, or taken with a doubt: where, and what."""

    where: str
    what: str


@dataclass(frozen=True, slots=True)
class Records:
    """All that was read. `cells`: a row per cell, indexed by its folder's name, as `cell_facts` makes it.
    `steps`, `evals`: a row per step, and per metric of an evaluation, with the cell's name in `cell`; of each
    step the last attempt only."""

    cells: pd.DataFrame
    steps: pd.DataFrame
    evals: pd.DataFrame
    problems: tuple[Problem, ...]


def find_cells(places: Sequence[Path]) -> tuple[list[Path], dict[str, list[str]], list[Problem]]:
    """Cell folders below these places (a cell, a sweep's folder, or a root of outputs), the sweeps that name
    each, and what was named but is not there. Raises UserError for a place that holds no cell at all."""
    folders: dict[str, Path] = {}
    sweeps: dict[str, list[str]] = {}
    problems: list[Problem] = []
    faults: list[Fault] = []
    for place in places:
        before = len(problems)
        found = list(_cells_of(place, sweeps, problems))
        if not found and len(problems) == before:
            what = "holds no cells" if place.is_dir() else "is not a folder"
            faults.append(
                Fault(str(place), what, "name a sweep's folder (outputs/sweeps/<name>), a cell, or outputs")
            )
        for folder in found:
            known = folders.setdefault(folder.name, folder)
            if known.resolve() != folder.resolve() and not _same_config(known, folder):
                faults.append(
                    Fault(
                        folder.name,
                        f"is two different cells: {known} and {folder}",
                        "equal ids with different content cannot be told apart",
                    )
                )
    if faults or not folders:
        raise UserError([*faults, *(Fault(one.where, one.what) for one in problems)], "nothing was made")
    return [folders[name] for name in sorted(folders)], sweeps, problems


def _cells_of(place: Path, sweeps: dict[str, list[str]], problems: list[Problem]) -> Iterator[Path]:
    if os.path.lexists(place / "config.yaml"):
        yield place
    elif os.path.lexists(place / "manifest.json"):
        read = read_record(place / "manifest.json", CELLS_OF)
        manifest = read.value
        if read.damage:
            problems.append(Problem(str(place), f"is damaged: {summary(read.damage)}"))
        for row in manifest.get("cells", ()):
            folder = place.parent.parent / "cells" / row["folder"]
            if not os.path.lexists(folder / "config.yaml"):
                problems.append(Problem(row["folder"], f"named by the sweep {place.name}, but not there"))
                continue
            sweeps.setdefault(folder.name, []).append(str(manifest.get("name", place.name)))
            yield folder
        problems += [
            Problem(" ".join(row["overrides"]), f"waits for {row['traces']}")
            for row in manifest.get("waiting", ())
        ]
    elif place.is_dir():
        pool = place / "cells" if (place / "cells").is_dir() else place
        yield from (path for path in sorted(pool.glob("*")) if os.path.lexists(path / "config.yaml"))


def _same_config(one: Path, other: Path) -> bool:
    damaged = any(unusable(folder / "config.yaml") for folder in (one, other))
    return not damaged and (one / "config.yaml").read_bytes() == (other / "config.yaml").read_bytes()


def load(places: Sequence[Path], cache: Path | None = None) -> Records:
    """Read everything below these places. `cache`: a folder that keeps the tables of cells whose files
    have not changed since (by size and time of change)."""
    folders, sweeps, problems = find_cells(places)
    facts = []
    known = Cache.read(cache)
    parts: dict[str, list[pd.DataFrame]] = {"steps": [], "evals": []}
    wanted: list[tuple[Path, str, float]] = []
    for folder in folders:
        row, found = cell_facts(folder, sweeps.get(folder.name, []))
        problems += found
        if row is None:
            continue
        facts.append(row)
        end = row["step"] if row["state"] == "finished" else np.inf
        wanted += [(folder, name, end) for name in known.stale(folder, signature(folder))]
    if not facts:
        raise UserError([Fault(one.where, one.what) for one in problems], "nothing was made")
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # parsing lets other threads run
        tables = pool.map(lambda job: read_table(job[0] / f"{job[1]}.jsonl"), wanted)
        for (folder, name, end), (table, found) in zip(wanted, tables, strict=True):
            problems += found
            if found:
                known.fresh.pop(str(folder), None)  # read again next time, so that it is reported again
            if len(table):
                parts[name].append(final_rows(table, end).assign(cell=folder.name, folder=str(folder)))
    together = {name: _concatenated(known.kept(name, folders) + parts[name]) for name in parts}
    if cache is not None:
        known.write(cache, together)
    cells = pd.DataFrame(facts).set_index("cell")
    problems += [*_no_numbers(together["steps"]), *_suspensions(together["steps"])]
    steps, evals = (together[name].drop(columns="folder", errors="ignore") for name in ("steps", "evals"))
    return Records(cells, steps, evals, tuple(problems))


def _no_numbers(steps: pd.DataFrame) -> list[Problem]:
    """Runs whose reward is no number at some steps, though it is one at others: gaps."""
    if REWARD not in steps:
        return []
    gaps = steps[REWARD].isna().groupby(steps["cell"], observed=True)
    found = gaps.agg(["sum", "size"])
    broken = found[(found["sum"] > 0) & (found["sum"] < found["size"])]
    first = steps.loc[steps[REWARD].isna()].groupby("cell", observed=True)["step"].min()
    return [
        Problem(
            str(cell),
            f"{REWARD} is no number at {row['sum']} of {row['size']} steps, first at step "
            f"{first[cell]}; left out of curves",
        )
        for cell, row in broken.iterrows()
    ]


def _suspensions(steps: pd.DataFrame) -> list[Problem]:
    """Runs that were suspended for a while, which their times leave out."""
    if SUSPENDED not in steps:
        return []
    spent = steps.groupby("cell", observed=True)[SUSPENDED].sum()
    return [
        Problem(str(cell), f"was suspended for {format_seconds(value)}, which its times leave out")
        for cell, value in spent[spent > 0].items()
    ]


def _concatenated(tables: Iterable[pd.DataFrame]) -> pd.DataFrame:
    made = list(tables)
    if not made:
        return pd.DataFrame({"cell": [], "step": []})
    table = pd.concat(made, ignore_index=True, copy=False)
    for name in ("cell", "folder"):
        table[name] = table[name].astype("category")
    return table


def cell_facts(folder: Path, sweeps: Sequence[str]) -> tuple[dict[str, Any] | None, list[Problem]]:
    """One row of `Records.cells`; every setting is a column `config.<key>`. None: its config is damaged."""
    frozen = read_config(folder)
    records = [read_record(folder / name) for name in ("status.json", "provenance.json")]
    status, provenance = (one.value for one in records)
    damage = [*frozen.damage, *records[0].damage, *records[1].damage]
    problems = [Problem(folder.name, f"is damaged: {summary(damage)}")] if damage else []
    if frozen.damage:
        return None, [replace(one, what=f"{one.what}; left out") for one in problems]
    config = frozen.value
    algorithm = config["algorithm"]
    state = "damaged" if records[0].damage else str(status.get("state", "pending"))
    if state not in ("finished", "damaged"):
        problems.append(Problem(folder.name, f"is {state} (step {status.get('step', 0)})"))
    machines = {_machine(a.get("hardware") or {}) for a in provenance.get("attempts", [])}
    if len(machines) > 1:
        problems.append(Problem(folder.name, f"ran on different hardware: {'; '.join(sorted(machines))}"))
    judges = [str(version) for version in provenance.get("verifiers") or ()]
    if open_to_reading := [v for v in judges if "limits" in v.split("+") and "landlock" not in v.split("+")]:
        what = f"its programs could read the dataset's file: judged by {', '.join(open_to_reading)}"
        problems.append(Problem(folder.name, what))
    row = {
        "cell": folder.name,
        "id": folder.name.rpartition("-")[2],
        "folder": str(folder),
        "sweeps": tuple(sweeps),
        "arm": "base" if algorithm.get("steps") == 0 else algorithm["name"],
        "model": model_name(config["model"]),
        "data": config["dataset"]["name"],
        "seed": config["seed"],
        "state": state,
        "failure": status.get("failure"),
        "step": int(status.get("step", 0)),
        "steps": algorithm.get("steps"),
        "hardware": " / ".join(sorted(machines)) or None,
        "judges": ", ".join(judges),
        "commit": provenance.get("commit"),
        "code_hash": provenance.get("code_hash"),
        "requeues": provenance.get("requeues", 0),
        "started": max((a.get("started", 0.0) for a in provenance.get("attempts", [])), default=0.0),
        **{f"config.{key}": value for key, value in flattened(config)},
        **contents(provenance),
    }
    return row, problems


def contents(provenance: Row) -> dict[str, str]:
    """Hashes of what a cell was made from: `content.model`, and a column for the training data and for each
    evaluation set."""
    found = {f"content.{label}": digest for label, digest in (provenance.get("datasets") or {}).items()}
    weights = (provenance.get("model") or {}).get("weights_hash")
    return found | ({"content.model": weights} if weights else {})


def _machine(hardware: Row) -> str:
    """Hardware in words, as far as a time depends on it."""
    gpus = hardware.get("gpus") or []
    named = f"{len(gpus)} x {gpus[0]}" if gpus else f"{hardware.get('threads')} threads"
    return f"{hardware.get('cpu')}, {named}"


def flattened(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values, so that they can be compared and grouped by: lists as JSON, null as a
    word, which differs from a key that an older record does not have."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from flattened(value, f"{prefix}{key}.")
        else:
            plain = json.dumps(value) if isinstance(value, list) or value is None else value
            yield f"{prefix}{key}", plain


def read_table(path: Path) -> tuple[pd.DataFrame, list[Problem]]:
    """A JSON-lines file as a table, and which of its lines were left out."""
    try:
        data = read_bytes(path)
    except Unreadable as error:
        return pd.DataFrame(), [Problem(f"{path.parent.name}/{path.name}", f"is damaged: it {error}")]
    if not data:
        return pd.DataFrame(), []
    try:
        if not _is_flat(data):
            raise ValueError("a null for a row, or deep nesting, would crash the parser")
        options = pa.json.ReadOptions(use_threads=False, block_size=max(1 << 20, len(data)))
        table = pa.json.read_json(io.BytesIO(data), read_options=options).to_pandas()
        if _fits(table):
            return table, []
    except (pa.ArrowException, ValueError):  # a torn line, or rows that differ in type
        pass
    read = parse_rows(path, data, 1)
    text = f"{read.torn} damaged {'line' if read.torn == 1 else 'lines'} left out: {summary(read.damage)}"
    return pd.DataFrame(read.rows), [Problem(f"{path.parent.name}/{path.name}", text)] if read.torn else []


def _is_flat(data: bytes) -> bool:
    """Whether every line looks like a complete object of plain values, as all lines do that a run wrote."""
    lines = {data.count(part) for part in (b"\n", b"{", b"}\n")}
    return b"[" not in data and lines == {1 + data.count(b"\n{")} and data.startswith(b"{")


def _fits(table: pd.DataFrame) -> bool:
    """Whether every value has the type that its key has in a record, so that no line has to be left out."""
    for name in ("step", "attempt"):
        if name not in table or table[name].dtype != "int64" or not table[name].between(0, 2**53).all():
            return False
    for name in table.columns:
        column = table[name]
        if name in ("dataset", "metric"):
            if not column.map(type).eq(str).all():
                return False
        elif "/" in name or name in ("value", "low", "high", "n"):
            is_number = column.dtype in ("int64", "float64") and not (column.abs() > 1e300).any()
            if not is_number and not column.isna().all():
                return False
    return True


def final_rows(table: pd.DataFrame, end: float) -> pd.DataFrame:
    """The rows that count (as `dash_exp.record.folder.read_final`): of each step's and dataset's last
    attempt, and not beyond the step at which a finished cell ended; in order of steps."""
    attempts, steps = table["attempt"].to_numpy(), table["step"].to_numpy()
    if attempts.min() == attempts.max() and steps.max() <= end and (np.diff(steps) >= 0).all():
        return table  # as nearly all are
    keys = ["step", "dataset"] if "dataset" in table else ["step"]
    newest = table.groupby(keys, sort=False)["attempt"].transform("max")
    kept = table[(table["attempt"] == newest) & (table["step"] <= end)]
    return kept.sort_values("step", kind="stable")


def signature(folder: Path) -> str:
    """Changes whenever a file that is read changes."""
    parts = []
    for name in ("steps.jsonl", "evals.jsonl", "status.json"):
        try:
            found = (folder / name).stat()
            parts.append(f"{found.st_size}.{found.st_mtime_ns}.{found.st_ino}")
        except OSError:
            parts.append("-")
    return " ".join(parts)


@dataclass(frozen=True, slots=True)
class Cache:
    """Tables of earlier loads, by the folder they came from. Anything odd about the files that hold them
    means that nothing is known."""

    signatures: dict[str, str]
    tables: dict[str, pd.DataFrame]
    fresh: dict[str, str] = field(default_factory=dict)
    """Signatures of what is being read anew."""

    @staticmethod
    def read(cache: Path | None) -> Cache:
        nothing = Cache({}, {})
        if cache is None:
            return nothing
        known = read_json(cache / "signatures.json")
        if known.get("version") != VERSION:
            return nothing
        try:
            tables = {name: pd.read_feather(cache / f"{name}-{known['stamp']}.feather") for name in TABLES}
        except (OSError, pa.ArrowInvalid, KeyError):
            return nothing
        return Cache(dict(known["cells"]), tables)

    def stale(self, folder: Path, now: str) -> tuple[str, ...]:
        """The names of the tables that have to be read anew."""
        if self.signatures.get(str(folder)) == now:
            return ()
        self.signatures.pop(str(folder), None)
        self.fresh[str(folder)] = now
        return TABLES

    def kept(self, name: str, folders: Sequence[Path]) -> list[pd.DataFrame]:
        table = self.tables.get(name)
        if table is None or "folder" not in table:
            return []
        wanted = {str(f) for f in folders} & set(self.signatures)
        rows = table[table["folder"].isin(wanted)]
        return [rows] if len(rows) else []

    def write(self, cache: Path, tables: Mapping[str, pd.DataFrame]) -> None:
        """The files first, then the list that names them: a reader sees the old or the new."""
        if not self.fresh:
            return
        cache.mkdir(parents=True, exist_ok=True)
        stamp = f"{time.time_ns():x}"
        for name in TABLES:
            tables[name].reset_index(drop=True).to_feather(cache / f"{name}-{stamp}.feather")
        before = read_json(cache / "signatures.json").get("stamp")
        cells = {**self.signatures, **self.fresh}
        write_json(cache / "signatures.json", {"version": VERSION, "stamp": stamp, "cells": cells})
        for name in TABLES:
            (cache / f"{name}-{before}.feather").unlink(missing_ok=True)
