"""The tolerant reader of records: a typed value, and what is damaged.

A value whose type a reader relies on has it, or is absent: what is damaged is left out and named by file and
line, so that no command fails because of one file. Keys that are not listed here are passed on unchanged.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dash_exp.errors import Fault

Row = dict[str, Any]
STATES = ("pending", "blocked", "running", "interrupted", "failed", "cancelled", "finished")
REPAIR = (
    "restore it; without its status.json or provenance.json a cell continues from its last checkpoint; "
    "run.force=true archives the record and starts again"
)
SHOWN = 3
"""Damages of a file that a person is shown; the others are counted."""
LARGEST = 2**53
SURROGATE = re.compile(r"[\ud800-\udfff]")
ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, slots=True)
class Damage:
    """What is damaged in a record. `line`: from 1, where it is known."""

    path: Path
    what: str
    line: int | None = None

    def __str__(self) -> str:
        place = f"{self.path.name} line {self.line}" if self.line else self.path.name
        return f"{place} {self.what}"

    def fault(self, hint: str = "") -> Fault:
        place = f"{self.path}:{self.line}" if self.line else str(self.path)
        return Fault(place, f"is damaged: {self.what}", hint)


@dataclass(frozen=True, slots=True)
class Read:
    """A record of one value; {} where there is none."""

    value: Row
    damage: tuple[Damage, ...] = ()


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a file, and what was left out."""

    rows: list[Row] = field(default_factory=list)
    damage: tuple[Damage, ...] = ()

    @property
    def torn(self) -> int:
        """How many lines could not be read."""
        return len(self.damage)


def summary(damage: Iterable[Damage]) -> str:
    """Damages in one line."""
    texts = [str(one) for one in damage]
    more = [f"and {len(texts) - SHOWN} more"] if len(texts) > SHOWN else []
    return "; ".join([*texts[:SHOWN], *more])


# What the keys of each file hold ------------------------------------------------------------------


class Kind(NamedTuple):
    words: str
    fits: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -1e300 < value < 1e300


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value not in ("", ".", "..") and not re.search(r"[/\x00]", value)


def list_of(kind: Kind) -> Kind:
    return Kind(f"a list, each {kind.words}", lambda v: isinstance(v, list) and all(map(kind.fits, v)))


def record_of(required: Mapping[str, Kind], optional: Mapping[str, Kind] | None = None) -> Kind:
    """An object with these keys; null stands for an absent optional one."""
    rest = optional or {}

    def fits(value: Any) -> bool:
        return (
            isinstance(value, dict)
            and all(key in value and kind.fits(value[key]) for key, kind in required.items())
            and all(value.get(key) is None or kind.fits(value[key]) for key, kind in rest.items())
        )

    return Kind(f"an object with {', '.join(required)}" if required else "an object", fits)


COUNT = Kind("an integer from 0", lambda v: type(v) is int and 0 <= v < LARGEST)
PID = Kind("a process id", lambda v: type(v) is int and 0 < v < 2**31)
INTEGER = Kind("an integer", lambda v: type(v) is int and abs(v) < LARGEST)
NUMBER = Kind("a finite number", _is_number)
TIME = Kind("a time in seconds", lambda v: _is_number(v) and 0 <= v < 1e11)
TEXT = Kind("a text", lambda v: isinstance(v, str))
NAME = Kind("the name of a folder", _is_name)
STATE = Kind(f"one of {', '.join(STATES)}", lambda v: v in STATES)
HARDWARE = record_of({}, {"cpu": TEXT, "threads": COUNT, "gpus": list_of(TEXT)})
RESOURCES = record_of(
    dict.fromkeys(("gpus", "cpus", "memory_gb", "minutes"), COUNT), {"nodes": COUNT, "tasks": COUNT}
)
ATTEMPT = record_of({"attempt": COUNT, "started": TIME}, {"host": TEXT, "hardware": HARDWARE})
ENTRY = record_of(
    {"id": NAME, "folder": NAME, "overrides": list_of(TEXT), "resources": RESOURCES, "needs": list_of(NAME)}
)
WAITING = record_of({"overrides": list_of(TEXT), "traces": TEXT, "arguments": list_of(TEXT)})


class Schema(NamedTuple):
    """Keys that a reader relies on. An object without a required one is left out; an optional one of another
    type, or a number that is null, counts as absent. `named`: what every key with a slash holds."""

    required: Mapping[str, Kind]
    optional: Mapping[str, Kind]
    named: Kind | None = None


BUDGETS = ("seconds", "tokens", "backpropagated", "updates")
OF_STEP = {"step": COUNT, "attempt": COUNT}
SCHEMAS = {
    "status.json": Schema(
        {"state": STATE},
        {"attempt": COUNT, "step": COUNT, "heartbeat": TIME, "steps": COUNT, "pid": PID}
        | dict.fromkeys(("failure", "reason", "host"), TEXT),
    ),
    "provenance.json": Schema(
        {},
        {"attempts": list_of(ATTEMPT), "hardware": HARDWARE, "requeues": COUNT, "packages": record_of({})}
        | {"model": record_of({}, {"origin": TEXT, "weights_hash": TEXT}), "commit": TEXT, "code_hash": TEXT}
        | {"budget": record_of({}, dict.fromkeys(BUDGETS, NUMBER)), "diff_hash": TEXT},
    ),
    "launch.jsonl": Schema(
        {"kind": TEXT, "time": TIME},
        {"exit": INTEGER, "step": COUNT, "pid": PID}
        | dict.fromkeys(("job", "sweep", "host", "failure_class", "reason"), TEXT),
    ),
    "steps.jsonl": Schema(OF_STEP, {}, NUMBER),
    "evals.jsonl": Schema(
        {**OF_STEP, "dataset": TEXT, "metric": TEXT}, dict.fromkeys(("value", "low", "high", "n"), NUMBER)
    ),
    "samples.jsonl": Schema(OF_STEP, {"prompt": TEXT, "tokens": COUNT, "text": TEXT}),
    "eval_samples.jsonl": Schema(
        {**OF_STEP, "dataset": TEXT, "prompt": TEXT, "outcomes": list_of(TEXT)}
        | {"scores": list_of(Kind("a number or null", lambda v: v is None or NUMBER.fits(v)))},
        {},
    ),
    "events.jsonl": Schema(
        {"kind": TEXT, "start": TIME, "end": TIME}, {"attempt": COUNT, "step": COUNT, "worker": TEXT}
    ),
    "manifest.json": Schema(
        {"format": COUNT, "name": NAME, "created": TIME, "actions": list_of(TEXT)}
        | {"about": record_of({}, {"claim": TEXT, "feeds": list_of(TEXT), "source": TEXT})}
        | {"cells": list_of(ENTRY), "waiting": list_of(WAITING)},
        {},
    ),
    "race.json": Schema(
        {"started": TIME, "metric": TEXT, "rungs": list_of(COUNT), "state": TEXT, "lines": list_of(TEXT)}
        | {"spent_hours": NUMBER},
        {"budget_hours": NUMBER, "pid": PID},
    ),
    "controller.json": Schema({}, {"pid": PID, "host": TEXT, "started": TIME}),
}
CONFIG = {
    "seed": INTEGER,
    "algorithm": record_of({"name": TEXT}, {"steps": COUNT}),
    "model": record_of({"name": TEXT}),
    "dataset": record_of({"name": TEXT}),
}
"""What readers rely on in every frozen config."""


def checked(value: Any, schema: Schema | None) -> tuple[Row | None, list[str]]:
    """A parsed value as far as it fits its schema, and what is wrong with it; None: it cannot be used."""
    if not isinstance(value, dict):
        return None, [f"holds {_shown(value)}, not an object"]
    if schema is None:
        return value, []
    wrong = [
        f"has no {key}" if key not in value else f"has {key}={_shown(value[key])}, not {kind.words}"
        for key, kind in schema.required.items()
        if key not in value or not kind.fits(value[key])
    ]
    if wrong:
        return None, wrong
    kinds: dict[str, Kind] = dict(schema.optional)
    if schema.named is not None:
        kinds |= {key: schema.named for key in value if "/" in key}
    bad = [key for key, kind in kinds.items() if value.get(key) is not None and not kind.fits(value[key])]
    wrong = [f"has {key}={_shown(value[key])}, not {kinds[key].words}" for key in bad]
    absent = {key for key, kind in kinds.items() if value.get(key) is None and kind is not TEXT}
    return {key: one for key, one in value.items() if key not in bad and key not in absent}, wrong


def _shown(value: Any) -> str:
    if isinstance(value, int) and abs(value) >= LARGEST:
        return "an integer out of range"
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else f"{text[:37]}..."


# From bytes to values -----------------------------------------------------------------------------


class Unreadable(ValueError):
    """Why a file cannot be read as what it should be, and at which of its lines."""

    def __init__(self, what: str, line: int | None = None):
        super().__init__(what)
        self.line = line


def read_bytes(path: Path, limit: int = -1) -> bytes | None:
    """What a regular file holds; None: there is none. Raises Unreadable."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would block
    except FileNotFoundError:
        if path.is_symlink():
            raise Unreadable("is a link to nothing") from None
        return None
    except OSError as error:
        raise Unreadable(f"cannot be read: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") if _is_regular(descriptor) else _not_a_file(descriptor) as stream:
        try:
            return bytes(stream.read(limit))
        except OSError as error:
            raise Unreadable(f"cannot be read: {error.strerror}") from error


def _is_regular(descriptor: int) -> bool:
    return stat.S_ISREG(os.fstat(descriptor).st_mode)


def _not_a_file(descriptor: int) -> Any:
    is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
    os.close(descriptor)
    raise Unreadable("is a folder, not a file" if is_folder else "is not a regular file")


def unusable(path: Path) -> Damage | None:
    """Why a file of a record cannot be opened for appending; None if it can, or is not there."""
    try:
        read_bytes(path, limit=0)
    except Unreadable as error:
        return Damage(path, str(error))
    return None


def parse(data: bytes) -> Any:
    """A JSON value, its keys unique, its texts free of lone surrogates. Raises Unreadable."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except Unreadable:
        raise
    except UnicodeDecodeError as error:
        raise Unreadable(f"is not UTF-8 (byte {error.start + 1})") from None
    except json.JSONDecodeError as error:
        raise Unreadable(f"is not JSON ({error.msg}, column {error.colno})", error.lineno) from None
    except RecursionError:
        raise Unreadable("is nested too deeply") from None
    except ValueError:
        raise Unreadable("holds an integer of too many digits") from None
    return _without_surrogates(value) if ESCAPED_SURROGATE.search(data) else value


def _unique(pairs: list[tuple[str, Any]]) -> Row:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise Unreadable(f"has the key {_shown(twice)} twice")
    return found


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return SURROGATE.sub("\ufffd", value)
    if isinstance(value, list):
        return [_without_surrogates(one) for one in value]
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(one) for key, one in value.items()}
    return value


def read_record(path: Path, schema: Schema | None = None) -> Read:
    """A JSON file of a record, checked by this schema, else by the one of its name."""
    try:
        data = read_bytes(path)
        if data is None:
            return Read({})
        if not data.strip():
            raise Unreadable("is empty")
        value, wrong = checked(parse(data), schema or SCHEMAS.get(path.name))
    except Unreadable as error:
        return Read({}, (Damage(path, str(error), error.line),))
    return Read(value or {}, tuple(Damage(path, one) for one in wrong))


def read_rows(path: Path) -> Rows:
    """Every row of a JSON-lines file that can be used, in order. A missing file has none."""
    try:
        data = read_bytes(path)
    except Unreadable as error:
        return Rows([], (Damage(path, str(error)),))
    return parse_rows(path, data or b"", 1)


def parse_rows(path: Path, data: bytes, first: int | None) -> Rows:
    """The rows of these lines of a file. `first`: the number of the first line, if it is known."""
    rows: list[Row] = []
    damage: list[Damage] = []
    schema = SCHEMAS.get(path.name)
    for number, line in enumerate(data.split(b"\n"), first or 0):
        if not line.strip():
            continue
        try:
            row, wrong = checked(parse(line), schema)
        except Unreadable as error:
            row, wrong = None, [str(error)]
        rows += [] if row is None else [row]
        if wrong:
            damage.append(Damage(path, ", ".join(wrong), None if first is None else number))
    return Rows(rows, tuple(damage))


# The frozen config --------------------------------------------------------------------------------


DEEPEST = 200
NESTED = re.compile(rb"(?:[-?]\s+){50}")
"""Lists in lists, or keys in keys, in YAML's block style."""


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Refuses a key that is there twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        made: dict[Any, Any] = super().construct_mapping(node, deep)
        if len(made) < len(node.value):
            raise yaml.YAMLError("a key is there twice")
        return made


def _parse_yaml(data: bytes) -> Any:
    """Raises Unreadable where nesting is deep: libyaml would crash."""
    depth = deepest = 0
    for bracket in re.findall(rb"[][{}]", data):
        depth += 1 if bracket in b"[{" else -1
        deepest = max(deepest, depth)
    if deepest > DEEPEST or NESTED.search(data):
        raise Unreadable("is nested too deeply")
    return yaml.load(data.decode("utf-8"), Loader=_Loader)


def read_config(folder: Path) -> Read:
    """A cell's frozen config as plain values; {} where it is damaged."""
    path = folder / "config.yaml"
    try:
        data = read_bytes(path)
        if data is None:
            raise Unreadable("is missing")
        value = _parse_yaml(data)
        if not data.endswith(b"\n"):
            raise Unreadable("is cut off in its last line", data.count(b"\n") + 1)
    except Unreadable as error:
        return Read({}, (Damage(path, str(error), error.line),))
    except RecursionError:
        return Read({}, (Damage(path, "is nested too deeply"),))
    except (ValueError, TypeError, yaml.YAMLError) as error:  # TypeError: a list as a key
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error)
        return Read({}, (Damage(path, f"is not YAML ({_shown(problem)})", mark and mark.line + 1),))
    found, wrong = checked(value, Schema(CONFIG, {}))
    if found is not None and (odd := next(_odd(found), None)):
        wrong = [f"has {odd}, which no config holds"]
    return Read({}, tuple(Damage(path, one) for one in wrong)) if wrong else Read(found or {})


def _odd(value: Row, prefix: str = "") -> Iterator[str]:
    """Keys and values that no writer of ours makes: dates, bytes, NaN, integers out of range."""
    for key, one in value.items():
        if not isinstance(key, str):
            yield f"the key {_shown(key)}"
        elif isinstance(one, dict):
            yield from _odd(one, f"{prefix}{key}.")
        elif not _is_plain(one):
            yield f"{prefix}{key}={_shown(one)}"


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return next(iter(_odd(value)), None) is None
    return value is None or isinstance(value, str | bool) or _is_number(value)
