"""The cell's folder: everything a run leaves behind, written and read here.

    config.yaml      the frozen config             steps.jsonl    one row per step: metrics and ledger
    status.json      state, step, heartbeat        samples.jsonl  one row per completion
    provenance.json  code, packages, hardware      evals.jsonl    one row per metric and evaluation
    log.txt          messages of the run           events.jsonl   who did what when; faults
    eval_samples.jsonl one row per evaluated prompt
    checkpoints/     see record/checkpoint.py

Files only grow. Every row carries `attempt`; where a resumed run wrote a step again, readers take the
rows of the last attempt. A line torn by a crash is left in place and counted.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from dash_exp.errors import UserError
from dash_exp.record.locks import take_lock
from dash_exp.record.reading import REPAIR, SHOWN, STATES, Damage, Read, read_config, read_record, unusable
from dash_exp.record.reading import Row as Row
from dash_exp.record.reading import read_rows as read_rows

IGNORED_IN_COMPARISON = ("time/", "memory/", "attempt", "host", "tokens_per_s")
STREAMS = ("steps", "samples", "evals", "eval_samples", "events")


class CellBusy(RuntimeError):
    """Another process is running this cell."""


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace a JSON file so that a reader sees the old or the new one, never a part."""
    replace_text(path, json.dumps(value, indent=1, allow_nan=False, default=str) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Replace a file at once, and only after its text is on the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def append_line(path: Path, line: str) -> None:
    """Append a line in one write, so that other processes may append to the file too; a line that a crash
    tore stays apart."""
    start = "\n" if ends_torn(path) else ""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, f"{start}{line}\n".encode(errors="backslashreplace"))
    finally:
        os.close(descriptor)


def read_json(path: Path) -> Row:
    """What can be used of a JSON file of a record; {} where there is none."""
    return read_record(path).value


def last_attempts(rows: Iterable[Row]) -> list[Row]:
    """Of every step (and dataset, in evaluations) the rows of the last attempt that wrote it; in order
    of steps."""
    kept: dict[tuple[int, str], list[Row]] = {}
    newest: dict[tuple[int, str], int] = {}
    for row in rows:
        key, attempt = (row["step"], str(row.get("dataset", ""))), row["attempt"]
        if attempt > newest.get(key, -1):
            newest[key], kept[key] = attempt, []
        if attempt == newest[key]:
            kept[key].append(row)
    order = sorted(kept, key=lambda key: key[0])
    return [row for key in order for row in kept[key]]


def read_final(folder: Path, name: str) -> list[Row]:
    """The rows of a cell's `<name>.jsonl` that count: of the last attempts, and not beyond the step at
    which a finished cell ended."""
    status = read_json(folder / "status.json")
    end = status.get("step", math.inf) if status.get("state") == "finished" else math.inf
    return [r for r in last_attempts(read_rows(folder / f"{name}.jsonl").rows) if r["step"] <= end]


def finite(row: Mapping[str, Any]) -> Row:
    """Leave out values that are absent (None) or not a number: never written as 0."""
    return {
        k: v for k, v in row.items() if v is not None and not (isinstance(v, float) and not math.isfinite(v))
    }


def lock(folder: Path) -> int:
    """Take a cell's lock and return its descriptor; closing it, or dying, releases it.

    Raises CellBusy if another process holds it, or has moved the folder away meanwhile.
    """
    path = folder / ".lock"
    with suppress(BlockingIOError):
        descriptor = take_lock(path)
        with suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        os.close(descriptor)
    raise CellBusy(f"{folder} is being run by another process")


class Recorder:
    """The one writer of a cell's folder. Use as a context manager: it holds the folder's lock."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.attempt = 1
        self.facts: Row = {"host": platform.node(), "pid": os.getpid()}
        """Part of every status."""
        self._streams: dict[str, TextIO] = {}
        self._lock = -1

    def __enter__(self) -> Recorder:
        names = (*(f"{name}.jsonl" for name in STREAMS), "launch.jsonl", ".lock", "log.txt")
        _refuse([one for name in names if (one := unusable(self.folder / name))])
        self._lock = lock(self.folder)
        try:
            self._take_over()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def _take_over(self) -> None:
        """Count this attempt from what the record shows. Raises UserError where config, status or provenance
        are damaged; damaged rows are left out, and named in the log."""
        status, facts = (read_record(self.folder / name) for name in ("status.json", "provenance.json"))
        frozen = read_config(self.folder) if os.path.lexists(self.folder / "config.yaml") else Read({})
        _refuse([*frozen.damage, *status.damage, *facts.damage])
        streams = [read_rows(self.folder / f"{name}.jsonl") for name in ("steps", "evals")]
        known = [*facts.value.get("attempts", ()), *(row for one in streams for row in one.rows)]
        self.attempt = max([status.value.get("attempt", 0), *(row["attempt"] for row in known)]) + 1
        for damage in (one for stream in streams for one in stream.damage[:SHOWN]):
            self.log(f"{damage}: it is left out")

    def __exit__(self, *exception: object) -> None:
        for stream in self._streams.values():
            with suppress(OSError):  # a full disk has been reported by the write that met it
                stream.close()
        self._streams.clear()
        os.close(self._lock)

    def append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows to `<name>.jsonl`, each as one complete line, and flush them."""
        text = "".join(
            json.dumps(finite({"attempt": self.attempt, **row}), ensure_ascii=False) + "\n" for row in rows
        )
        stream = self._stream(f"{name}.jsonl")
        stream.write(text)
        stream.flush()

    def event(self, kind: str, start: float, end: float, **more: Any) -> None:
        """An interval of work, in seconds since the epoch; `kind`: sample, verify, backprop, ..."""
        self.append("events", [{"kind": kind, "start": round(start, 6), "end": round(end, 6), **more}])

    def log(self, text: str) -> None:
        stream = self._stream("log.txt")
        stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} [{self.attempt}] {text}\n")
        stream.flush()

    def status(self, state: str, step: int, **more: Any) -> None:
        """Replace status.json; `heartbeat` is the time now."""
        assert state in STATES, state
        failure = more.pop("failure", None)
        now = {"state": state, "attempt": self.attempt, "step": step, "heartbeat": time.time()}
        write_json(self.folder / "status.json", {**now, "failure": failure, **self.facts, **more})

    def _stream(self, name: str) -> TextIO:
        if name not in self._streams:
            path = self.folder / name
            torn = ends_torn(path)
            self._streams[name] = path.open("a", encoding="utf-8", errors="backslashreplace")
            if torn:
                self._streams[name].write("\n")
                if name != "log.txt":
                    self.log(f"{name}: the last line was torn by a crash; it is left out")
        return self._streams[name]


def _refuse(damage: Sequence[Damage]) -> None:
    if damage:
        raise UserError([one.fault(REPAIR) for one in damage], "nothing was started, the record is unchanged")


def ends_torn(path: Path) -> bool:
    """Whether a file's last line has no end."""
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as stream:
        stream.seek(-1, os.SEEK_END)
        return stream.read(1) != b"\n"


@contextmanager
def timed_event(recorder: Recorder, kind: str, **more: Any) -> Iterator[None]:
    start = time.time()
    yield
    recorder.event(kind, start, time.time(), **more)


def differences(first: Path, second: Path, limit: int = 20) -> list[str]:
    """How two records differ, ignoring seconds, memory, attempts and hosts; empty when equal."""
    found: list[str] = []
    for name in ("steps", "samples", "evals", "eval_samples"):
        a, b = read_final(first, name), read_final(second, name)
        if len(a) != len(b):
            found.append(f"{name}: {len(a)} rows against {len(b)}")
        for number, (x, y) in enumerate(zip(a, b, strict=False)):
            found += [
                f"{name}[{number}] {key}: {x.get(key)!r} against {y.get(key)!r}"
                for key in sorted({*x, *y})
                if not key.startswith(IGNORED_IN_COMPARISON) and x.get(key) != y.get(key)
            ]
            if len(found) >= limit:
                return found[:limit]
    return found


def archive(folder: Path) -> None:
    """Move a record aside; nothing recorded is ever deleted. Raises CellBusy while it is being run."""
    if not folder.exists():
        return
    held = lock(folder)
    try:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        target = folder.parent.parent / "archive" / f"{folder.name}-{stamp}-{os.getpid()}"
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(target)
    finally:
        os.close(held)
