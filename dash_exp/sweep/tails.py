"""The ends of files, read without the rest. Torch-free."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from dash_exp.record.folder import Row

STEP_BYTES = 24_000
"""More than ten rows of steps.jsonl."""
TEXT_BYTES = 16_000
CONTROL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f]")
"""Colours, and what else a terminal would obey rather than show."""


def end_of(path: Path, size: int) -> bytes:
    """The last `size` bytes of a file, from the beginning of a line on; nothing where there is no file."""
    try:
        with path.open("rb") as stream:
            length = stream.seek(0, os.SEEK_END)
            start = max(0, length - size)
            stream.seek(start)
            data = stream.read()
    except OSError:
        return b""
    if start == 0:
        return data
    return data.partition(b"\n")[2] or data


def last_rows(path: Path, count: int, size: int = STEP_BYTES) -> list[Row]:
    """The last whole rows of a JSON-lines file, oldest first; broken lines are left out."""
    rows: list[Row] = []
    for line in reversed(end_of(path, size).splitlines()):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
        if len(rows) == count:
            break
    return rows[::-1]


def last_lines(path: Path, count: int, size: int = TEXT_BYTES) -> list[str]:
    """The last lines of a text that say something, as a terminal would have left them."""
    return shown_lines(end_of(path, size))[-count:] if count > 0 else []


def shown_lines(data: bytes) -> list[str]:
    """Lines without what a progress bar overwrote, without colours, and without empty ones."""
    text = data.decode("utf-8", errors="replace")
    lines = [CONTROL.sub("", line.rstrip().rpartition("\r")[2]) for line in text.split("\n")]
    return [line for line in lines if line.strip()]


class Follower:
    """What is added to a text after its first `start` bytes, in whole lines."""

    def __init__(self, path: Path, start: int = 0):
        self.path = path
        self._place = start

    def more(self) -> list[str]:
        try:
            with self.path.open("rb") as stream:
                self._place = min(self._place, stream.seek(0, os.SEEK_END))
                stream.seek(self._place)
                whole, newline, _ = stream.read().rpartition(b"\n")
        except OSError:
            return []
        self._place += len(whole) + len(newline)
        return shown_lines(whole)
