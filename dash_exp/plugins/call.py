"""Functions of the user's own, loaded, checked and called; what they return is checked too."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, get_args

from dash_exp.errors import Fault, UserError, nearest
from dash_exp.plugins.kinds import KINDS
from dash_exp.plugins.source import Reference, find, module_file, raised, sources
from dash_exp.text import shorten
from dash_exp.types import Outcome, Score


@dataclass(frozen=True, slots=True)
class Plugin:
    """A loaded function. `accepted`: the parameters of its kind that it declares."""

    name: str
    function: Any
    accepted: frozenset[str]
    where: str

    @property
    def batch_wide(self) -> bool:
        return "batch" in self.accepted

    def __call__(self, **given: Any) -> Any:
        """Call it with what it declares. Raises UserError where it raises."""
        try:
            return self.function(**{name: given[name] for name in given if name in self.accepted})
        except MemoryError:
            raise
        except Exception as error:  # code of the user's own may raise anything
            raise self.failed(raised(error)) from error

    def failed(self, what: str) -> UserError:
        return UserError(Fault(self.where, f"{self.name} {what}"), "what was recorded is kept")

    def numbers(self, returned: Any, count: int, flags: bool = False) -> tuple[Any, ...]:
        """What it returned for one group, as `count` finite numbers or bools. Raises UserError."""
        values = returned.tolist() if hasattr(returned, "tolist") else returned
        wanted = f"{count} {'bools' if flags else 'finite numbers'}, one for each completion"
        if not isinstance(values, list | tuple) or len(values) != count:
            raise self.failed(f"returned {shorten(repr(returned))}, expected {wanted}")
        plain = [v.item() if hasattr(v, "item") else v for v in values]
        for value in plain:
            fits = isinstance(value, bool | int | float) and math.isfinite(value)
            if not fits or (flags and value not in (0, 1)):
                raise self.failed(f"returned {shorten(repr(returned))}, expected {wanted}")
        return tuple(map(bool if flags else float, plain))

    def groups(self, batch: Sequence[Sequence[float]], flags: bool = False, **more: Any) -> list[Any]:
        """What it returns for each group, called for one or for all of them, as it declares."""
        if not self.batch_wide:
            return [self.numbers(self(group=list(g), **more), len(g), flags) for g in batch]
        returned = self(batch=[list(g) for g in batch], **more)
        if not isinstance(returned, list | tuple) or len(returned) != len(batch):
            raise self.failed(f"returned {shorten(repr(returned))}, expected {len(batch)} lists")
        return [self.numbers(own, len(g), flags) for own, g in zip(returned, batch, strict=True)]


_own: set[str] = set()
"""Names in sys.modules that this module has put there."""


def load(text: str, kind: str, where: str = "") -> Plugin:
    """The function of a reference, as it is when a process first asks. `where`: the key that names it. Raises
    UserError."""
    return _load(find(text, where), kind, where or text)


@functools.cache
def _load(one: Reference, kind: str, where: str) -> Plugin:
    module = _module(one, where)
    function = getattr(module, one.function, None)
    if function is None:
        public = [name for name, value in vars(module).items() if callable(value) and name[0] != "_"]
        hint = nearest(one.function, public) if public else "it defines no function"
        raise UserError(Fault(where, f"{one.module} has no function {one.function!r}", hint))
    if not callable(function):
        raise UserError(Fault(where, f"{one.name} is {shorten(repr(function))}, not a function"))
    return Plugin(one.name, function, _accepted(one.name, function, kind, where), where)


def _module(one: Reference, where: str) -> ModuleType:
    try:
        return _import_local(one, where) if one.local else importlib.import_module(one.module)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # importing code of the user's own may raise anything
        raise UserError(Fault(where, f"{one.module} {raised(error)}, when it was imported")) from error


def _import_local(one: Reference, where: str) -> ModuleType:
    """Import from the folder, whatever modules of these names other folders have."""
    names = [re.sub(r"(/__init__)?\.py$", "", place).replace("/", ".") for place in sources(one)]
    for name in names:
        taken = name in sys.stdlib_module_names or (name in sys.modules and name not in _own)
        if taken and getattr(sys.modules.get(name), "__file__", "") != str(module_file(one.folder, name)):
            what = f"{name} is the name of another module that is in use"
            raise UserError(Fault(where, what, "rename yours"))
        sys.modules.pop(name, None)
    _own.update(names)
    importlib.invalidate_caches()
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    sys.path.insert(0, str(one.folder))
    try:
        return importlib.import_module(one.module)
    finally:
        sys.dont_write_bytecode = before
        sys.path.remove(str(one.folder))
        if str(one.folder) not in sys.path:  # last: for imports inside functions
            sys.path.append(str(one.folder))


def _accepted(name: str, function: Any, kind: str, where: str) -> frozenset[str]:
    """The parameters that it declares. Raises UserError where it cannot be called with those of its kind."""
    allowed = tuple(inspect.signature(KINDS[kind].__call__).parameters)[1:]
    try:
        declared = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        raise UserError(Fault(where, f"{name} has no signature that can be read", "wrap it")) from None
    named = [p for p in declared if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    odd = [p.name for p in named if p.name not in allowed and p.default is p.empty]
    takes = f"{name} takes ({', '.join(p.name for p in declared)}), but its kind ({kind})"
    if odd:
        hint = f"it may declare {nearest(odd[0], allowed)}"
        raise UserError(Fault(where, f"{takes} has no parameter {odd[0]!r}", hint))
    if any(p.kind == p.POSITIONAL_ONLY for p in named):
        raise UserError(Fault(where, f"{takes} is called with keywords", "leave out the / of its parameters"))
    every = any(p.kind == p.VAR_KEYWORD for p in declared)
    taken = frozenset(allowed if every else (p.name for p in named if p.name in allowed))
    if "group" in allowed and len(taken & {"group", "batch"}) != 1:
        raise UserError(Fault(where, f"{takes} takes either group or batch", "declare one of them"))
    return taken


def faults(where: str, text: str, kind: str) -> Iterator[Fault]:
    """What is wrong with a reference. Imports its module."""
    try:
        load(text, kind, where)
    except UserError as error:
        yield from error.faults


# --- rewards and rows ---


def to_score(value: Any, name: str = "it") -> Score:
    """What the reward `name` returned, as a score; see `Reward`."""
    if hasattr(value, "item") and not isinstance(value, Score):
        value = value.item()  # a number of numpy or torch
    if isinstance(value, bool):
        return Score(float(value), "correct" if value else "wrong")
    if isinstance(value, int | float) and math.isfinite(value):
        return Score(float(value), "correct" if value >= 1 else "wrong")
    known = isinstance(value, Score) and value.outcome in get_args(Outcome) and value.outcome != "shown"
    if known and (math.isfinite(value.value) or value.outcome == "verifier_error"):
        return Score(float(value.value), value.outcome, str(value.detail)[:400])
    wanted = "a bool, a finite number or a Score"
    return Score(math.nan, "verifier_error", f"{name} returned {shorten(repr(value))}, expected {wanted}")


@functools.lru_cache(maxsize=8)
def load_rows(text: str, split: str, options: str, where: str = "kind") -> tuple[str, ...]:
    """The rows of a dataset loader, each as a line of JSON; loaded once in a process. `options`: as JSON.
    Raises UserError."""
    plugin = load(text, "loader", where)
    lines = []
    try:
        for row in plugin(split=split, options=json.loads(options)):
            if not isinstance(row, Mapping):
                raise plugin.failed(f"returned a row that is {shorten(repr(row))}, expected a mapping")
            lines.append(json.dumps(dict(row), ensure_ascii=False, default=str))
    except UserError:
        raise
    except Exception as error:  # a generator raises while it is read
        raise plugin.failed(raised(error)) from error
    return tuple(lines)
