"""What an evaluation is about: a command line made into a config and a folder of weights.

A cell's frozen config becomes an option of Hydra's, so overrides and group choices on top of it mean what
they mean everywhere, and the same code finds every fault.
"""

from __future__ import annotations

import difflib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from dash_exp.config.checks import check, is_below
from dash_exp.config.compose import compose, find_faults
from dash_exp.config.schema import Config, changed, without_actions
from dash_exp.errors import Fault, UserError
from dash_exp.record.identity import model_name, read_frozen
from dash_exp.text import format_path

USAGE = (
    "python -m dash_exp.evaluate cell=<folder> [checkpoint=<step or folder>] [key=value ...]\n"
    "       python -m dash_exp.evaluate model=<option> [key=value ...]"
)
UNKNOWN_STEP = -1
"""For a checkpoint whose folder's name has no step; its rows have step 0, its provenance names it."""
CELL_KEYS = (
    "evaluation",
    "sampler",
    "verifier",
    "cluster",
    "paths",
    "run",
    "seed",
    "learner.device",
    "learner.precision",
)
"""What can be set for a cell's checkpoint; the rest of its config is how it was trained."""
USED = (*CELL_KEYS, "model", "config")
"""Where a fault of the whole config matters: no training takes place."""
FROM_RECIPE = ("max_new_tokens", "temperature", "max_sequences")
"""Keys of the sampler that no sampler option sets: with another one the cell's stay."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A command line taken apart. `cell`: a folder, or None for a base model; `faults`: what does not go
    together."""

    cell: Path | None
    checkpoint: str | None
    overrides: tuple[str, ...]
    faults: tuple[Fault, ...]


@dataclass(frozen=True, slots=True)
class Subject:
    """What is evaluated. `step`: after which training step, 0 for a base model, or UNKNOWN_STEP; `place`:
    the folder that gets a folder of results, `name` the first part of its name."""

    config: Config
    place: Path
    name: str
    step: int
    facts: Mapping[str, Any]
    given: tuple[str, ...] = ()
    """The command line's settings."""


def parse(arguments: Sequence[str]) -> Wanted:
    own: dict[str, str] = {}
    overrides, faults = [], []
    for text in arguments:
        key, equals, value = text.partition("=")
        if text.startswith("-"):
            faults.append(Fault(text, "unknown flag", "settings are written key=value, without dashes"))
        elif key in ("cell", "run", "checkpoint") and equals:
            name = "cell" if key == "run" else key
            if name in own:
                faults.append(Fault(key, f"{name} is given twice", "run= means the same as cell="))
            own[name] = value
        else:
            overrides.append(text)
    model = any(text.startswith(("model=", "model.path=")) for text in overrides)
    if "cell" not in own and not model:
        faults.append(Fault("usage", USAGE, "name a cell or a model"))
    if "cell" in own and any(text.startswith(("model=", "model.")) for text in overrides):
        faults.append(Fault("model", "a cell brings its model along", "leave out either"))
    if "checkpoint" in own and "cell" not in own:
        faults.append(Fault("checkpoint", "belongs to a cell", "name it with cell=<folder>"))
    cell = Path(own["cell"]).expanduser().resolve() if "cell" in own else None
    return Wanted(cell, own.get("checkpoint"), tuple(overrides), tuple(faults))


def subject_of(wanted: Wanted) -> Subject:
    """What is evaluated, found without loading a model. Raises UserError with all faults."""
    faults = list(wanted.faults)
    if wanted.cell is None:
        config, more = composed(wanted.overrides)
        if faults + more or config is None:
            raise UserError(faults + more)
        model = model_name(asdict(config.model))
        name = f"{model}-{config.evaluation.name}"
        place = Path(config.run.dir) / "evaluations"
        return Subject(config, place, name, 0, {"model": model}, wanted.overrides)
    folder = wanted.cell
    frozen = _frozen(folder, faults)
    checkpoint, more = find_checkpoint(folder, wanted.checkpoint)
    faults += more
    faults += [fault for text in wanted.overrides for fault in _of_training(text)]
    if frozen is None or checkpoint is None:
        unchosen = find_faults(wanted.overrides, checked=False)
        raise UserError(faults + [f for f in unchosen if not f.where.startswith("evaluation.sets")])
    with as_option(frozen, checkpoint, wanted.overrides) as chosen:
        config, more = composed([*chosen, *wanted.overrides])
    if faults + more or config is None:
        raise UserError(faults + more)
    config = changed(config, {"run.dir": str(folder.parent.parent), "model.path": str(checkpoint)})
    known = re.fullmatch(r"step-(\d+)", checkpoint.name)
    step = int(known[1]) if known else UNKNOWN_STEP
    name = f"{config.evaluation.name}-{checkpoint.name}"
    facts = {"cell": folder.name, "checkpoint": str(checkpoint)}
    return Subject(config, folder / "evaluations", name, step, facts, wanted.overrides)


def composed(overrides: Sequence[str]) -> tuple[Config | None, list[Fault]]:
    """The config of these overrides, with every fault that matters to an evaluation."""
    faults = find_faults(overrides, checked=False)
    if faults:
        return None, faults
    config = compose(overrides)
    if not config.evaluation.sets:
        hint = "choose one, e.g. evaluation=math"
        return config, [Fault("evaluation", "names no set to evaluate on", hint)]
    generated: dict[str, Any] = {"dataset.kind": "arithmetic", "dataset.path": None, "dataset.mix": {}}
    asked = changed(config, {"evaluation.before": True, **generated})  # its sets, and no training data
    return config, [f for f in check(asked) if is_below(f.where, USED)]


def _of_training(override: str) -> list[Fault]:
    """A fault for a setting that exists, but not for the evaluation of a cell."""
    key = override.partition("=")[0].lstrip("+~")
    group, _, place = key.partition("@")
    root = (place or group).partition("/")[0]
    if root == "model":  # parse has said so
        return []
    known = {f.name for f in fields(Config)} | {"experiment", "debug"}
    if root.partition(".")[0] not in known or is_below(root, CELL_KEYS):
        return []
    return [Fault(key, "is fixed: the cell is trained already", f"allowed: {', '.join(CELL_KEYS)}")]


def _frozen(folder: Path, faults: list[Fault]) -> Config | None:
    """The cell's config, or None after adding what is wrong with it."""
    if not folder.is_dir():
        faults.append(Fault("cell", f"{format_path(folder)} is not a folder", _near(folder)))
        return None
    if not os.path.lexists(folder / "config.yaml"):
        faults.append(Fault("cell", f"{format_path(folder)} holds no config.yaml, so it is not a cell"))
        return None
    try:
        return read_frozen(folder)
    except UserError as error:
        faults += error.faults
    return None


def _near(path: Path) -> str:
    names = os.listdir(path.parent) if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f"did you mean {format_path(path.parent / close[0])}?" if close else "cells lie in outputs/cells/"


def find_checkpoint(folder: Path, named: str | None) -> tuple[Path | None, list[Fault]]:
    """The folder of a checkpoint: `named` by its step or as a folder, else the newest."""
    known = sorted((folder / "checkpoints").glob("step-*"))
    steps = ", ".join(str(int(p.name.rpartition("-")[2])) for p in known)
    if named is not None and not named.isdecimal():
        path = Path(named).expanduser().resolve()
        if (path / "config.json").is_file():
            return path, []
        hint = f"steps with a checkpoint: {steps}" if steps else ""
        return None, [Fault("checkpoint", f"{named} is neither a step nor a model's folder", hint)]
    if not folder.is_dir():
        return None, []
    if not known:
        hint = "it has one after its first checkpoint.every steps; model=<option> evaluates a base model"
        return None, [Fault("cell", f"{format_path(folder)} has no checkpoints", hint)]
    if named is None:
        return known[-1], []
    found = [p for p in known if int(p.name.rpartition("-")[2]) == int(named)]
    hint = f"there are: {steps} (checkpoint.keep says how many stay)"
    return (found[0], []) if found else (None, [Fault("checkpoint", f"no checkpoint of step {named}", hint)])


@contextmanager
def as_option(frozen: Config, checkpoint: Path, overrides: Sequence[str]) -> Iterator[list[str]]:
    """A frozen config as an option of Hydra's, in a temporary folder. Yields the overrides that choose it."""
    plain = without_actions(frozen)
    plain["model"]["path"] = str(checkpoint)
    chosen = {text.partition("=")[0] for text in overrides}
    if "evaluation" in chosen:
        plain.pop("evaluation")
    if "sampler" in chosen:
        plain["sampler"] = {key: plain["sampler"][key] for key in FROM_RECIPE}
    defaults = {"defaults": [{"override /evaluation": "none"}, "_self_"]}
    with tempfile.TemporaryDirectory() as place:
        option = Path(place, "experiment", "frozen.yaml")
        option.parent.mkdir()
        text = yaml.safe_dump({**defaults, **plain}, sort_keys=False, allow_unicode=True)
        option.write_text(f"# @package _global_\n{text}", encoding="utf-8")
        yield [f"hydra.searchpath=[file://{place}]", "experiment=frozen"]
