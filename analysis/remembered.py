"""Tables of run folders that have not changed since they were last read."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import pyarrow as pa

from dash_exp.record.folder import read_json, write_json

TABLES = ("steps", "evals")
VERSION = 1
"""Of what a cache holds."""


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
class Remembered:
    """Tables of earlier loads, by the folder they came from. Anything odd about the files that hold them
    means that nothing is remembered."""

    signatures: dict[str, str]
    tables: dict[str, pd.DataFrame]
    fresh: dict[str, str] = field(default_factory=dict)
    """Signatures of what is being read anew."""

    @staticmethod
    def read(cache: Path | None) -> Remembered:
        nothing = Remembered({}, {})
        if cache is None:
            return nothing
        known = read_json(cache / "signatures.json")
        if known.get("version") != VERSION:
            return nothing
        try:
            tables = {name: pd.read_feather(cache / f"{name}-{known['stamp']}.feather") for name in TABLES}
        except (OSError, pa.ArrowInvalid, KeyError):
            return nothing
        return Remembered(dict(known["cells"]), tables)

    def forget_unless(self, folder: Path, now: str) -> tuple[str, ...]:
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

    def write(self, cache: Path, whole: Mapping[str, pd.DataFrame]) -> None:
        """The files first, then the list that names them: a reader sees the old or the new."""
        if not self.fresh:
            return
        cache.mkdir(parents=True, exist_ok=True)
        stamp = f"{time.time_ns():x}"
        for name in TABLES:
            whole[name].reset_index(drop=True).to_feather(cache / f"{name}-{stamp}.feather")
        before = read_json(cache / "signatures.json").get("stamp")
        cells = {**self.signatures, **self.fresh}
        write_json(cache / "signatures.json", {"version": VERSION, "stamp": stamp, "cells": cells})
        for name in TABLES:
            (cache / f"{name}-{before}.feather").unlink(missing_ok=True)
