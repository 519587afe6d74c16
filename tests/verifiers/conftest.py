"""Where the reference data lie, and how to tell that a process is gone."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

# the judge tables, and the odd workers that the pool is made to run, lie beside this file
sys.path.insert(0, str(Path(__file__).resolve().parent))

Row = dict[str, str]

settings.register_profile("verifiers", database=None, deadline=None, derandomize=True, max_examples=50)
settings.load_profile("verifiers")


@pytest.fixture(scope="session")
def rows() -> Callable[[str], list[Row]]:
    """Reads one data file by name; skips the test, naming the file, where there is none."""
    folder = Path(os.environ.get("DASH_DATA") or "no folder")

    def read(name: str) -> list[Row]:
        path = folder / name
        if not path.is_file():
            pytest.skip(f"{name} is not in {folder}: set DASH_DATA to the data folder")
        with path.open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]

    return read


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended but is not yet reaped does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rsplit(")", 1)[1].split()[0] not in ("Z", "X")


@pytest.fixture
def wait_gone() -> Callable[[list[int]], list[int]]:
    """Waits for processes to end; returns those still alive after a generous time."""

    def wait(pids: list[int]) -> list[int]:
        deadline = time.monotonic() + 30
        while any(map(is_alive, pids)) and time.monotonic() < deadline:
            time.sleep(0.05)
        return [pid for pid in pids if is_alive(pid)]

    return wait
