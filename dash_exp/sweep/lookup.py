"""Which sweep, and which of its cells, a name or a pattern on the command line means."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from dash_exp.config.compose import conf_dir
from dash_exp.errors import Fault, UserError, nearest
from dash_exp.record import manifest as manifests
from dash_exp.record.manifest import Entry, Manifest
from dash_exp.sweep import spec as specs
from dash_exp.sweep.spec import Spec

LIST_HINT = "python -m dash_exp.sweep list names them"
UNCHANGED = "nothing was changed"
WILD = set("*?[")


@dataclass(frozen=True, slots=True)
class Target:
    """A sweep that was named: its file, where there is one, and its folder, whether launched or not."""

    name: str
    folder: Path
    root: Path
    spec: Spec | None

    @property
    def launched(self) -> bool:
        return (self.folder / manifests.NAME).is_file()

    def manifest(self) -> Manifest:
        """What was launched. Raises UserError where nothing was."""
        if not self.launched:
            what = f"has not been launched: there is no {self.folder / manifests.NAME}"
            hint = f"python -m dash_exp.sweep launch {self.name}; run.dir=<folder> looks elsewhere"
            raise UserError(Fault(self.name, what, hint), UNCHANGED)
        return manifests.read(self.folder)


def default_root() -> Path:
    """Where outputs lie when `run.dir` is not given, as conf/config.yaml says."""
    config = yaml.safe_load((conf_dir() / "config.yaml").read_text(encoding="utf-8"))
    return Path(config["run"]["dir"])


def launched_folders(root: Path) -> list[Path]:
    """Folders of all sweeps launched below this root, by name."""
    return sorted(path.parent for path in (root / "sweeps").glob(f"*/{manifests.NAME}"))


def launched(root: Path) -> tuple[list[Manifest], list[Fault]]:
    """All sweeps launched below this root, and what is wrong with those that cannot be read."""
    found, faults = [], []
    for folder in launched_folders(root):
        try:
            found.append(manifests.read(folder))
        except UserError as error:
            faults += error.faults
    return found, faults


def find(text: str, root: Path, name: str | None = None) -> Target:
    """The sweep meant by a yaml, a name or a folder. `name`: another name to run it under (`run.sweep`)."""
    folder = Path(text)
    if (folder / manifests.NAME).is_file():
        folder = folder.resolve()
        return Target(folder.name, folder, folder.parent.parent, None)
    known = specs.names()
    if text in known or text.endswith((".yaml", ".yml")):
        spec = specs.load(text)
        chosen = name or spec.name
        return Target(chosen, manifests.sweep_folder(root, chosen), root, spec)
    folder = manifests.sweep_folder(root, text)
    if (folder / manifests.NAME).is_file():
        return Target(text, folder, root, None)
    there = [path.name for path in launched_folders(root)]
    what = f"is no sweep: neither a file in sweeps/, nor one launched in {root}, nor a folder"
    hint = nearest(text, {*known, *there}) if known or there else LIST_HINT
    raise UserError(Fault(text, what, hint), UNCHANGED)


def matches(entry: Entry, pattern: str) -> bool:
    """Whether a pattern selects a cell: with wildcards over the folder's name or one override, without
    as an override, or as a part of the folder's name."""
    if WILD & set(pattern):
        return any(fnmatch.fnmatchcase(text, pattern) for text in (entry.folder, *entry.overrides))
    return pattern in entry.overrides or pattern in entry.folder


def select(entries: Sequence[Entry], patterns: Sequence[str]) -> list[Entry]:
    """The cells that every one of these patterns selects; all without a pattern.

    Raises UserError where a pattern, or all of them together, select nothing.
    """
    faults = [
        Fault(pattern, f"selects none of the {len(entries)} cells", _nearest_pattern(pattern, entries))
        for pattern in patterns
        if not any(matches(entry, pattern) for entry in entries)
    ]
    if faults:
        raise UserError(faults, UNCHANGED)
    chosen = [entry for entry in entries if all(matches(entry, pattern) for pattern in patterns)]
    if patterns and not chosen:
        hint = "each pattern narrows the choice"
        raise UserError(Fault(" ".join(patterns), "no cell is selected by all of these", hint), UNCHANGED)
    return chosen


def _nearest_pattern(pattern: str, entries: Sequence[Entry]) -> str:
    known = sorted({text for entry in entries for text in entry.overrides})
    if 0 < len(known) <= 40:
        return nearest(pattern, known)
    return (
        "a part of the name of a cell's folder, one of its overrides (algorithm=dash), or wildcards (*-s0-*)"
    )


def labels(entries: Sequence[tuple[str, ...]], folders: Sequence[str]) -> list[str]:
    """Short names of a sweep's cells, from their overrides. Overrides that all cells have are left out, and
    so are well-known keys, unless two cells would get the same name."""
    common = set(entries[0]).intersection(*entries[1:]) if len(entries) > 1 else set()
    own = [[text for text in overrides if text not in common] for overrides in entries]
    for shorten in (_short, _plain):
        texts = [" ".join(map(shorten, parts)) for parts in own]
        if len(set(texts)) == len(texts) and all(texts):
            return texts
    return [folder.rpartition("-")[0] for folder in folders]


SPEAKING = ("algorithm", "model", "dataset", "experiment", "evaluation", "recipe")
"""Keys whose options need no key beside them."""


def _short(override: str) -> str:
    key, _, value = override.lstrip("+~").partition("=")
    return value.rpartition("/")[2] if key in SPEAKING else f"{key.rpartition('.')[2]}={value}"


def _plain(override: str) -> str:
    return override.lstrip("+~")
