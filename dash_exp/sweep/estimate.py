"""How long cells will take, from finished ones of the same profile. Torch-free."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from dash_exp.record import journal
from dash_exp.record.folder import read_json
from dash_exp.sweep.states import median_of, recent_steps

Profile = tuple[object, ...]
NAME = re.compile(r"(.+)-s-?\d+-[0-9a-f]{8}")
LOOKED_AT = 50
"""Finished cells of one arm, model and dataset that are read; the newest ones."""
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def profile(frozen: Mapping[str, Any]) -> Profile:
    """What mainly decides how long a cell takes: arm, model, data, sizes, engine, evaluation."""
    data, budget = frozen["dataset"], frozen["budget"]
    keys = {
        "algorithm": ("name", "steps", "epochs", "prompts_per_step", "group_size"),
        "model": ("name",),
        "sampler": ("name", "max_new_tokens", "streaming", "servers", "colocated"),
        "learner": ("ranks", "device", "precision", "preflight"),
        "evaluation": ("name", "before", "after", "every", "samples", "limit"),
    }
    facts = tuple(frozen[group].get(key) for group, names in keys.items() for key in names)
    return (
        *facts,
        data["name"],
        *sorted(data["mix"]),
        data["limit"],
        budget["seconds"],
        bool(budget["match"]),
    )


def hours_by_profile(root: Path, names: Iterable[str], gpus: bool) -> dict[Profile, float]:
    """Median hours of finished cells in the pool of `root`, by profile, for the profiles that cells with
    these folder names may have. `gpus`: of those that ran with GPUs, or of those without."""
    wanted = {found.group(1) for name in names if (found := NAME.fullmatch(name))}
    looked: dict[str, int] = defaultdict(int)
    hours: dict[Profile, list[float]] = defaultdict(list)
    for folder in sorted((root / "cells").glob("*"), key=_changed, reverse=True):
        found = NAME.fullmatch(folder.name)
        prefix = found.group(1) if found else ""
        if prefix not in wanted or looked[prefix] >= LOOKED_AT:
            continue
        took = _hours(folder, gpus)
        if took is not None:
            looked[prefix] += 1
            frozen = yaml.load((folder / "config.yaml").read_text(encoding="utf-8"), LOADER)
            hours[profile(frozen)].append(took)
    return {one: statistics.median(many) for one, many in hours.items()}


def _changed(folder: Path) -> float:
    try:
        return (folder / "status.json").stat().st_mtime
    except OSError:
        return 0.0


def _hours(folder: Path, gpus: bool) -> float | None:
    """What a finished cell took, on the kind of machine asked for."""
    status = read_json(folder / "status.json")
    facts = read_json(folder / "provenance.json")
    if status.get("state") != "finished" or bool(facts.get("hardware", {}).get("gpus")) != gpus:
        return None
    took = _launched_s(folder, float(status["heartbeat"]))
    attempts = facts.get("attempts", ())
    if took is None and len(attempts) == 1:
        took = float(status["heartbeat"]) - float(attempts[0]["started"])
    if took is None:  # several attempts, of which nobody knows when they ended
        step_s = median_of(recent_steps(folder), "time/step_s")
        took = None if step_s is None else step_s * int(status["step"])
    return None if took is None else took / 3600


def _launched_s(folder: Path, heartbeat: float) -> float | None:
    """Seconds between all starts and ends that a launcher noted."""
    total, since, known = 0.0, None, False
    for row in journal.read(folder):
        if row["kind"] == "start":
            since = float(row["time"])
        elif row["kind"] == "end" and since is not None:
            total, since, known = total + float(row["time"]) - since, None, True
    if since is not None:  # the launcher died before the cell
        total, known = total + max(0.0, heartbeat - since), True
    return total if known else None
