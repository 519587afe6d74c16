"""Thousands of configs from a few compositions. Torch-free.

Hydra needs a tenth of a second for a config, whatever differs. So it composes once per choice of options,
and of values that take part in composing: those that something interpolates, and those of models, datasets,
evaluations and paths, which decide about files. All other values are put into a copy that shares the rest.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dash_exp.config.compose import (
    COMPOSITION_ERRORS,
    absent_keys,
    composed_config,
    find_faults,
    opened,
    options_in,
    parse,
    raw,
    search_dirs,
)
from dash_exp.config.overrides import override_faults, type_of
from dash_exp.config.schema import ACTIONS, Config, to_config
from dash_exp.errors import Fault, UserError
from dash_exp.record.identity import Cell, cell_of, described, resolve_paths

T = TypeVar("T")
COMPOSED = ("model", "dataset", "evaluation", "paths")
"""Groups all of whose values Hydra composes."""
FEW = 100
"""Cells of a sweep so small that comparing two of them is enough."""
NAME = re.compile(r"\.*[A-Za-z_][\w-]*(?:\.[\w-]+)*")


@dataclass(frozen=True, slots=True)
class Piece:
    """An override that was read. `chooses`: it is an option of a group. `plain`: its value can be put into
    a composed config; it is `value`, in the type of the schema."""

    text: str
    key: str
    chooses: bool
    plain: bool = False
    value: Any = None


class Base:
    """What Hydra made of some overrides; shared by many cells, so nobody changes it. `config` is None where
    it could not be made (yet): a value is absent, or wrong."""

    def __init__(self, composed: DictConfig):
        self.absent = frozenset(absent_keys(composed))
        self.names = frozenset(interpolated(OmegaConf.to_container(composed, resolve=False)))
        self.config: Config | None = None
        self._described: tuple[dict[str, Any], dict[str, Any]] | None = None
        if not self.absent:
            try:
                self.config = to_config(composed)
            except COMPOSITION_ERRORS as error:
                self.absent = frozenset({getattr(error, "full_key", None) or "config"})

    def needs(self, key: str) -> bool:
        """Whether a value of this key takes part in composing."""
        return key in self.absent or any(refers(name, key) for name in self.names)

    def described(self, cache: Path | None) -> tuple[dict[str, Any], dict[str, Any]]:
        """What is frozen and what is hashed of it. Raises OSError where a file cannot be read."""
        if self._described is None:
            resolved = copy.deepcopy(self.config)
            assert resolved is not None
            resolve_paths(resolved)
            self._described = described(resolved, cache)
        return self._described


@dataclass(frozen=True, slots=True)
class Composition:
    """A config, as a base and the values put into it."""

    base: Base
    values: tuple[tuple[str, Any], ...]

    @property
    def config(self) -> Config:
        """Shares parts with other cells' configs: to be read only."""
        assert self.base.config is not None
        return patched(self.base.config, self.values, getattr, setattr)

    def changed(self, new: Mapping[str, Any]) -> Composition:
        """With other values, by dotted key."""
        return Composition(self.base, (*((k, v) for k, v in self.values if k not in new), *new.items()))

    def cell(self, cache: Path | None) -> Cell:
        """Its cell, with the id that `cells.make_cell` gives its config."""
        values = [(k, v) for k, v in self.values if k.partition(".")[0] not in ACTIONS]
        frozen, identity = self.base.described(cache)
        return cell_of(
            patched(frozen, values, dict.__getitem__, dict.__setitem__),
            patched(identity, values, dict.__getitem__, dict.__setitem__),
        )


def patched(
    tree: T,
    values: Sequence[tuple[str, Any]],
    get: Callable[[Any, str], Any],
    put: Callable[[Any, str, Any], None],
) -> T:
    """A copy of a tree with other leaves, by dotted key; branches without one are shared."""
    top = copy.copy(tree)
    copies: dict[str, Any] = {}
    for key, value in values:
        *branches, leaf = key.split(".")
        node: Any = top
        path = ""
        for name in branches:
            path += f"{name}."
            if path not in copies:
                copies[path] = copy.copy(get(node, name))
                put(node, name, copies[path])
            node = copies[path]
        put(node, leaf, value)
    return top


class Composer:
    """Composes many cells. A context, within which Hydra is open on our folder.

    `places`: overrides of hydra.searchpath that any cell has, for the names of options.
    """

    def __init__(self, places: Sequence[str] = ()):
        self._places = list(places)
        self._faults: dict[str, list[Fault]] = {}
        self._pieces: dict[str, Piece] = {}
        self._bases: dict[tuple[str, ...], Base | list[Fault]] = {}
        self._schema = OmegaConf.structured(Config)
        self._stack = ExitStack()
        self.options: Mapping[str, Sequence[str]] = {}

    def __enter__(self) -> Composer:
        self._stack.enter_context(opened())
        self.options = options_in(search_dirs(parse(self._places)[0]))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def faults_of(self, text: str) -> list[Fault]:
        """What is wrong with an override taken alone."""
        if text not in self._faults:
            parsed, self._faults[text] = parse([text])
            for override in parsed:
                self._faults[text] = self._alone(override, text)
        return self._faults[text]

    def _alone(self, override: Override, text: str) -> list[Fault]:
        if override.is_sweep_override():
            what = f"got several values: {text}"
            return [Fault(override.get_key_element(), what, "a cell has one; quote a value that has commas")]
        return [] if self._kept(override, text).plain else override_faults(override, self.options)

    def compose(self, overrides: Sequence[str]) -> Composition:
        """Raises UserError with what is wrong with these overrides together."""
        pieces = [self._piece(text) for text in overrides]
        fixed = {piece.text for piece in pieces if not piece.plain}
        while True:
            chosen = tuple(piece.text for piece in pieces if piece.text in fixed)
            base = self._base(chosen)
            keys = [piece.key for piece in pieces if piece.text in fixed and not piece.chooses]
            free = [piece for piece in pieces if piece.text not in fixed]
            more = {p.text for p in free if base.needs(p.key) or any(overlap(p.key, k) for k in keys)}
            if not more:
                break
            fixed |= more
        if base.config is None:  # and no value that is still to come would help
            self._bases[chosen] = _faults_together(chosen)
            base = self._base(chosen)
        return Composition(base, tuple((piece.key, piece.value) for piece in free))

    def check_sample(self, cells: Sequence[Sequence[str]]) -> None:
        """Compare some cells, from the first to the last, with what Hydra alone makes of them.

        Raises RuntimeError where they differ: nothing that was planned can be trusted then.
        """
        size = 2 if len(cells) < FEW else 4
        for number in sorted({n * (len(cells) - 1) // (size - 1) for n in range(size)} if cells else ()):
            ours, theirs = asdict(self.compose(cells[number]).config), asdict(composed_config(cells[number]))
            if ours != theirs:
                keys = sorted(differing(ours, theirs))
                raise RuntimeError(f"{' '.join(cells[number])}: Hydra's composition differs in {keys}")

    def _piece(self, text: str) -> Piece:
        if text not in self._pieces:
            parsed, faults = parse([text])
            if faults:
                raise UserError(faults)
            return self._kept(parsed[0], text)
        return self._pieces[text]

    def _kept(self, override: Override, text: str) -> Piece:
        if text not in self._pieces:
            self._pieces[text] = self._read(override, text)
        return self._pieces[text]

    def _read(self, override: Override, text: str) -> Piece:
        key, value = override.key_or_group, override.value()
        composed = Piece(text, key, key in self.options and not isinstance(value, dict))
        changes = override.is_delete() or override.is_add() or override.is_force_add() or override.package
        if (
            override.is_sweep_override()
            or changes
            or isinstance(value, dict)
            or "${" in text
            or not is_leaf(key)
        ):
            return composed
        if composed.chooses or key.partition(".")[0] in COMPOSED:
            return composed
        try:
            OmegaConf.update(self._schema, key, value, merge=True)
            node = OmegaConf.select(self._schema, key)
        except OmegaConfBaseException:
            return composed  # Hydra says what is wrong with it
        plain = OmegaConf.to_object(node) if OmegaConf.is_config(node) else node
        return Piece(text, key, chooses=False, plain=True, value=plain)

    def _base(self, overrides: tuple[str, ...]) -> Base:
        """Raises UserError, every time, where Hydra could not compose these."""
        if overrides not in self._bases:
            try:
                self._bases[overrides] = Base(raw(overrides))
            except COMPOSITION_ERRORS:
                self._bases[overrides] = _faults_together(overrides)
        base = self._bases[overrides]
        if isinstance(base, Base):
            return base
        raise UserError(base)


def _faults_together(overrides: Sequence[str]) -> list[Fault]:
    told = " ".join(overrides) or "the defaults"
    return find_faults(overrides, checked=False) or [Fault("config", f"{told}: cannot be composed")]


@functools.cache
def is_leaf(key: str) -> bool:
    """Whether a dotted key leads through dataclasses to a value, or a list."""
    above = key.rpartition(".")[0]
    kind, holder = type_of(key), type_of(above) if above else Config
    return kind is not None and dataclasses.is_dataclass(holder) and not dataclasses.is_dataclass(kind)


def overlap(one: str, other: str) -> bool:
    """Whether two dotted keys are the same, or one holds the other."""
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")


def refers(name: str, key: str) -> bool:
    """Whether a name in an interpolation may mean a key, or what holds it, or a part of it."""
    if name.startswith("."):  # relative to a place that is not known here
        return name.lstrip(".").partition(".")[0] in key.split(".")
    return overlap(name, key)


def interpolated(node: object) -> Iterator[str]:
    """Every name that stands in an interpolation anywhere below, as it stands there. Other words beside
    it come along, which costs a composition at most."""
    if isinstance(node, str) and "${" in node:
        yield from NAME.findall(node)
    elif isinstance(node, dict):
        for one in node.values():
            yield from interpolated(one)
    elif isinstance(node, list):
        for one in node:
            yield from interpolated(one)


def differing(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted keys whose values differ."""
    for name in {*one, *other}:
        left, right = one.get(name), other.get(name)
        if isinstance(left, dict) and isinstance(right, dict):
            yield from differing(left, right, f"{prefix}{name}.")
        elif left != right:
            yield f"{prefix}{name}"
