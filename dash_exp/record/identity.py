"""A cell: one resolved config, its identity, and its frozen file. Torch-free.

The identity is a hash of everything that can change the result: the config without actions, with
paths replaced by what they hold. Equal experiments therefore share a folder, wherever the data lie.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from dash_exp.config.schema import ACTIONS, Config, DatasetConfig, ModelConfig, dataset_places, to_config
from dash_exp.record.hashing import file_hash, model_hash, package_path, package_version

FORMAT = 1
"""Raised when the meaning of a config changes, so that old records are not taken for new ones."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A frozen cell: its id (8 hex digits of `digest`), its readable name, and what is written to
    config.yaml."""

    id: str
    name: str
    frozen: dict[str, Any]
    digest: str

    def folder(self, root: Path) -> Path:
        return root / "cells" / f"{self.name}-{self.id}"


def make_cell(config: Config, cache: Path | None) -> Cell:
    """Resolve paths, hash what they hold, and name the cell. `cache`: where hashes are remembered."""
    resolve_paths(config)
    return cell_of(*described(config, cache))


def described(config: Config, cache: Path | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is frozen of a config with resolved paths, and what its identity is made of."""
    frozen = {k: v for k, v in asdict(config).items() if k not in ACTIONS}
    identity = {**frozen, "format": FORMAT}
    identity["model"] = _model_identity(config.model, frozen["model"], cache)
    identity["dataset"] = _dataset_identity(config.dataset, cache)
    identity["evaluation"] = {
        **frozen["evaluation"],
        "sets": {label: _dataset_identity(one, cache) for label, one in config.evaluation.sets.items()},
    }
    return frozen, identity


def cell_of(frozen: dict[str, Any], identity: Mapping[str, Any]) -> Cell:
    """The cell of what `described` said."""
    hashed = {k: v for k, v in identity.items() if k != "hardware" or v is not None}
    # a key that came later changes no id where it stands for what was done before it
    hashed["learner"] = {k: v for k, v in hashed["learner"].items() if (k, v) != ("sharding", "none")}
    if hashed["algorithm"]["source"] != "traces":  # who reads none is the same cell before they are made
        hashed["dataset"] = {**hashed["dataset"], "traces": None}
    digest = hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()
    mixed = frozen["dataset"]["mix"]
    data = "+".join([frozen["dataset"]["name"], *(mixed[label]["name"] for label in sorted(mixed))])
    name = f"{frozen['algorithm']['name']}-{frozen['model']['name']}-{data}-s{frozen['seed']}"
    readable = "".join(c if c.isalnum() or c in "-_.+" else "_" for c in name)
    return Cell(cell_id(digest), readable, frozen, digest)


def cell_id(digest: str) -> str:
    """The first 8 digits in a row of a hash that nobody takes for a number, as 12345678 or 1234e567."""
    windows = (digest[i : i + 8] for i in range(len(digest) - 7))
    return next(window for window in windows if set(window) & set("abcdf"))


def resolve_paths(config: Config) -> None:
    """Put the file each dataset is read from into its `path`, absolute, and drop the other names."""
    for one in dataset_places(config).values():
        found = dataset_file(one, config.paths.data)
        one.path = str(found) if found else None
        if one.traces:
            one.traces = str(Path(one.traces).expanduser().resolve())
    if config.model.path:
        config.model.path = str(Path(config.model.path).expanduser().resolve())


def dataset_file(one: DatasetConfig, data_folder: str | None) -> Path | None:
    """The file a dataset is read from: `path`, else `file` below the data folder, else None (hub)."""
    if one.path:
        return Path(one.path).expanduser().resolve()
    if one.file and data_folder:
        candidate = Path(data_folder).expanduser().resolve() / one.file
        return candidate if candidate.exists() else None
    return None


def _dataset_identity(one: DatasetConfig, cache: Path | None) -> dict[str, Any]:
    """A dataset's settings with its files, and those of what is mixed in, replaced by what they hold."""
    kept = asdict(one)
    kept["mix"] = {label: _dataset_identity(part, cache) for label, part in one.mix.items()}
    if one.kind == "reasoning_gym":
        kept["generator"] = package_version("reasoning-gym")
    if one.traces and Path(one.traces).is_file():
        kept["traces"] = file_hash(Path(one.traces), cache)
    if one.path:
        for key in ("file", "hub", "hub_config", "hub_split"):
            kept.pop(key)
        kept["path"] = file_hash(Path(one.path), cache)
    return kept


def _model_identity(one: ModelConfig, plain: dict[str, Any], cache: Path | None) -> dict[str, Any]:
    kept = {"name": one.name, "add_bos": one.add_bos}
    if one.path:
        return {**kept, "folder": model_hash(Path(one.path), cache)}
    if one.package and one.package_file:
        return {**kept, "weights": file_hash(package_path(one.package) / one.package_file, cache)}
    return {**kept, **{k: plain[k] for k in ("hub", "revision", "random")}}


def freeze(frozen: Mapping[str, Any], folder: Path) -> None:
    """Write config.yaml once; what is frozen is never written again."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    if not path.exists():
        temporary = folder / f".config.yaml.{os.getpid()}"
        dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # libyaml's is several times faster
        temporary.write_text(yaml.dump(dict(frozen), Dumper=dumper, sort_keys=False, allow_unicode=True))
        temporary.replace(path)


def read_frozen(folder: Path, actions: Sequence[str] = ()) -> Config:
    """The config of a cell's folder, with `run.dir` set to its root, and actions as `key=value`."""
    from omegaconf import OmegaConf

    loaded = OmegaConf.load(folder / "config.yaml")
    defaults = {
        "run": {"dir": str(folder.parent.parent), "force": False, "progress": "auto"},
        "tracking": {"name": "none"},
        "cluster": {
            "name": "local",
            "gpus_per_node": 1,
            "cpus_per_gpu": 1,
            "cells_per_gpu": 1,
            "warning_s": 1,
            "requeues": 0,
        },  # who started this has seen to these
    }
    given = OmegaConf.from_dotlist([a for a in actions if a.partition(".")[0] in ACTIONS])
    return to_config(OmegaConf.merge(OmegaConf.create(defaults), loaded, given))
