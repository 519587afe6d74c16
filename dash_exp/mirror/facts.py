"""What is told of a cell besides its metrics: parameters, tags, state, times. Torch-free, no MLflow."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dash_exp.errors import Fault, UserError
from dash_exp.mirror.points import Point, milliseconds, named, starts
from dash_exp.record.folder import Row, read_json
from dash_exp.record.locks import HERE, Locks

FORMAT = 1
"""Raised when the meaning of what is sent changes, so that mirrors are brought up to date."""
LONGEST_PARAMETER, LONGEST_TAG = 6000, 1000
PREFIX = "dash_exp"
CELL, RECORD, STATE, SWEEPS = (f"{PREFIX}.{name}" for name in ("cell", "record", "state", "sweeps"))
STATUS = {
    "finished": "FINISHED",
    "failed": "FAILED",
    "interrupted": "KILLED",
    "cancelled": "KILLED",
    "running": "RUNNING",
    "pending": "SCHEDULED",
    "blocked": "SCHEDULED",
}
ENDED = ("FINISHED", "FAILED", "KILLED")
QUIET_ELSEWHERE_S = 3600.0
"""A run on another machine is taken for dead after so long without a word."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What is told of a cell besides its points. `record`: tells one record of a cell from another that
    was begun anew by force; empty until a run got as far as that."""

    name: str
    record: str
    state: str
    start_ms: int
    end_ms: int
    params: dict[str, str]
    tags: dict[str, str]

    @property
    def status(self) -> str:
        return STATUS[self.state]

    @property
    def begun(self) -> bool:
        """Whether there is anything to mirror."""
        return bool(self.record) or self.status in ENDED or self.state == "running"


def parameters(config: Mapping[str, Any]) -> dict[str, str]:
    """A frozen config as `group.key` and text; what is too long for MLflow is shortened visibly."""
    return {
        name: shortened(_text(value), LONGEST_PARAMETER)
        for name, value in named(dict(_dotted(config))).items()
    }


def _dotted(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from _dotted(value, f"{name}.")
        else:
            yield name, value


def _text(value: object) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False, default=str)


def shortened(text: str, limit: int) -> str:
    """A text of at most `limit` characters; one that was cut says so, and which text it was."""
    if len(text) <= limit:
        return text
    mark = f" ... [cut: {len(text)} characters, sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}]"
    return text[: limit - len(mark)] + mark


def read_facts(folder: Path, sweeps: Sequence[str] = (), gone: int | None = None) -> Facts:
    """What a cell's folder says now. `sweeps`: those it belongs to; `gone`: an attempt known to have ended.

    Raises UserError where it is no cell, or config.yaml cannot be read.
    """
    path = folder / "config.yaml"
    try:
        config = yaml.load(path.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except FileNotFoundError as error:
        raise UserError(Fault(str(folder), "holds no config.yaml, so it is not a cell")) from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(Fault(str(path), f"is damaged: {' '.join(str(error).split())}")) from error
    if not isinstance(config, dict):
        raise UserError(Fault(str(path), "is damaged: it holds no settings"))
    status, provenance = read_json(folder / "status.json"), read_json(folder / "provenance.json")
    state, began = state_of(folder, status, provenance, gone), starts(folder)
    heartbeat = milliseconds(float(status.get("heartbeat", 0.0)))
    first = min(began.values(), default=None)
    record = "" if first is None else str(milliseconds(first))
    return Facts(
        folder.name,
        record,
        state,
        heartbeat if first is None else milliseconds(first),
        heartbeat,
        parameters(config),
        tags_of(folder.name, record, state, status, provenance, sweeps),
    )


def state_of(folder: Path, status: Row, provenance: Row, gone: int | None = None) -> str:
    """The state a status tells, and `interrupted` where it says running and nobody runs it: here by its lock,
    elsewhere by how long it has said nothing."""
    said = str(status.get("state", "pending"))
    if said not in STATUS:
        return "pending"
    if said != "running":
        return said
    if gone is not None and status.get("attempt") == gone:
        return "interrupted"
    known = next((one.get("host") for one in reversed(provenance.get("attempts", []))), HERE)
    host = status.get("host", known)
    if host != HERE:
        silent = time.time() - float(status.get("heartbeat", 0.0))
        return "interrupted" if silent > QUIET_ELSEWHERE_S else "running"
    table = Locks.now()
    return "running" if not table.known or table.holder(folder / ".lock") else "interrupted"


def tags_of(
    name: str, record: str, state: str, status: Row, provenance: Row, sweeps: Sequence[str]
) -> dict[str, str]:
    """Who and what, as text; what is not known is left out."""
    hardware, model = provenance.get("hardware", {}), provenance.get("model", {})
    hosts = dict.fromkeys(one.get("host") for one in provenance.get("attempts", []))
    found = {
        CELL: name,
        RECORD: record,
        STATE: state,
        SWEEPS: ", ".join(sweeps),
        "id": name.rpartition("-")[2],
        "attempts": status.get("attempt"),
        "reason": status.get("reason"),
        "failure": status.get("failure"),
        "requeues": provenance.get("requeues"),
        "code_hash": provenance.get("code_hash"),
        "diff_hash": provenance.get("diff_hash"),
        "mlflow.source.git.commit": provenance.get("commit"),
        "mlflow.source.name": PREFIX,
        "model": model.get("origin"),
        "weights_hash": model.get("weights_hash"),
        "cpu": hardware.get("cpu"),
        "gpus": ", ".join(hardware.get("gpus", [])),
        "hosts": ", ".join(map(str, hosts)),
        "packages": provenance.get("packages"),
    }
    return {
        key if "." in key else f"{PREFIX}.{key}": shortened(_text(value), LONGEST_TAG)
        for key, value in found.items()
        if value not in (None, "", {}, [])
    }


def digest_of(facts: Facts, points: Iterable[Point]) -> str:
    """Of everything a mirror is told of a cell: equal ones need nothing sent."""
    told = [
        FORMAT,
        facts.status,
        facts.start_ms,
        facts.end_ms,
        facts.params,
        facts.tags,
        *([p.step, p.time_ms, p.values] for p in points),
    ]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
