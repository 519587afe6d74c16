"""What a table or figure was made from, written beside it, and the check that it still follows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .load import Records

READ = ("config.yaml", "status.json", "steps.jsonl", "evals.jsonl", "eval_samples.jsonl")
"""What of a cell decides what is made from it (and events.jsonl, for Figure 2)."""
LIBRARIES = ("numpy", "scipy", "pandas", "matplotlib")
HERE = Path(__file__).parent


@cache
def content_of(folder: str) -> str:
    """One hash over what a cell's folder holds."""
    digest = hashlib.sha256()
    for name in (*READ, "events.jsonl"):
        path = Path(folder, name)
        if path.is_file():
            with path.open("rb") as stream:
                digest.update(f"{name}:{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


@cache
def code_hash() -> str:
    """SHA-256 over the analysis code and its data files."""
    digest = hashlib.sha256()
    for path in sorted(p for p in HERE.rglob("*") if p.suffix in (".py", ".csv", ".mplstyle")):
        digest.update(f"{path.relative_to(HERE)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def sidecar(records: Records, title: str, cells: Sequence[str], files: Mapping[str, bytes]) -> str:
    """The JSON beside a table or figure: its cells with code and content, and what it is made with."""
    value: dict[str, Any] = {
        "title": title,
        "n_cells": len(set(cells)),
        "cells": [_cell(records, name) for name in sorted(set(cells))],
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())},
        "analysis_code": code_hash(),
        "libraries": {name: version(name) for name in LIBRARIES},
    }
    return json.dumps(value, indent=1, sort_keys=True) + "\n"


def _cell(records: Records, name: str) -> dict[str, Any]:
    row = records.cells.loc[name]
    return {
        "cell": name,
        "seed": int(row["seed"]),
        "state": row["state"],
        "step": int(row["step"]),
        "commit": row["commit"],
        "code_hash": row["code_hash"],
        "hardware": row["hardware"],
        "content": content_of(str(row["folder"])),
    }
