"""Functions of your own: the kinds that config takes, and how they are found, checked, hashed and called.

A reference is `package.module:function`. The module is looked for in the current folder, then among installed
packages; `folder/module:function` names one in another folder. A function is called with keywords and
declares only those parameters of its kind that it needs. docs/plugins.md shows one of each kind."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import importlib.util
import inspect
import json
import math
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, get_args

from dash_exp.errors import Fault, UserError, nearest
from dash_exp.text import shorten
from dash_exp.types import FinishReason, Outcome, Score

if TYPE_CHECKING:
    from torch import Tensor

Row = Mapping[str, Any]


class Reward(Protocol):
    """Scores a completion: `dataset.verifier`, whose score decides the outcome, and each of
    `dataset.rewards`, whose value is added to it. `fields`: all further fields of the data row. `tokens`: of
    the completion, its end token included. Runs in a worker process, within `verifier.timeout_s`.

    A bool is `correct` (1) or `wrong` (0). A number is the value itself, `correct` from 1 on, else `wrong`. A
    `Score` names both. An exception, NaN and anything else is `verifier_error`, from which nothing is
    learned."""

    def __call__(
        self, *, text: str, answer: str, fields: Row, finish_reason: FinishReason, tokens: int
    ) -> Score | float | bool: ...


class Filter(Protocol):
    """Which completions are learned from (`filter.name`): one bool for each. It declares either `group`, the
    scores of one prompt's completions, or `batch`, those of every prompt of the step; of a batch it returns a
    list for each group. `threshold`, `share`: of config. `seed`: for draws. A score that could not be reached
    is NaN."""

    def __call__(
        self,
        *,
        group: Sequence[float],
        batch: Sequence[Sequence[float]],
        threshold: float,
        share: float | None,
        seed: int,
    ) -> Sequence[bool] | Sequence[Sequence[bool]]: ...


class Advantage(Protocol):
    """How much better each completion is than its baseline (`algorithm.baseline`), before `algorithm.scale`
    divides it (`none` leaves it as it is). It declares either `group` or `batch`, as a filter does, and gets
    finite rewards only: a completion without a reward has advantage 0."""

    def __call__(
        self, *, group: Sequence[float], batch: Sequence[Sequence[float]]
    ) -> Sequence[float] | Sequence[Sequence[float]]: ...


class Surrogate(Protocol):
    """The loss of each token [T] (`algorithm.surrogate`), to be differentiated with respect to `logprobs`
    [T]. `old_logprobs` [T]: at the sampling weights. `lengths` [N]: tokens of each completion, which follow
    each other in T. Nothing is divided here: `algorithm.aggregation` does that."""

    def __call__(
        self,
        *,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        lengths: Tensor,
        clip_low: float,
        clip_high: float,
    ) -> Tensor: ...


class Template(Protocol):
    """The prompt of a row (`dataset.template`): a text, or chat messages (`role`, `content`) for the model's
    chat template. `row`: `id`, `problem`, `answer`, `solution` and all further fields of the data row."""

    def __call__(self, *, row: Row) -> str | Sequence[Mapping[str, str]]: ...


class DatasetLoader(Protocol):
    """The rows of a dataset (`dataset.kind`), each with a problem, an answer and any further fields that JSON
    can hold. `split`: `train`, or `dataset.test_split`; `options`: `dataset.task_options`. The rows are
    part of the cell's id."""

    def __call__(self, *, split: str, options: Row) -> Iterable[Row]: ...


KINDS: dict[str, type] = {
    "reward": Reward,
    "filter": Filter,
    "advantage": Advantage,
    "surrogate": Surrogate,
    "template": Template,
    "loader": DatasetLoader,
}
REFERENCE = re.compile(r"(?:(.*)/)?((?:[^\W\d]\w*\.)*[^\W\d]\w*):([^\W\d]\w*)")
ANY_REFERENCE = "or a function of your own, module:function"
STORED = "plugins"
"""The folder of a cell that keeps the sources of its functions."""


@dataclass(frozen=True, slots=True)
class Reference:
    """A reference taken apart. `folder`: what holds the module's top-level package; `local`: the user's own
    folder, not one of installed packages."""

    folder: Path
    module: str
    function: str
    local: bool

    @property
    def name(self) -> str:
        return f"{self.module}:{self.function}"

    def __str__(self) -> str:
        return f"{self.folder}/{self.name}" if self.local else self.name


def is_reference(value: object) -> bool:
    """Whether a value of config names a function of the user's own, well or badly."""
    return isinstance(value, str) and ":" in value


def find(text: str, where: str = "") -> Reference:
    """What a reference names. `where`: the key that names it. Imports nothing of a local module. Raises
    UserError."""
    where = where or text
    match = REFERENCE.fullmatch(re.sub(r"\.py(?=:\w+$)", "", text))
    if match is None:
        raise UserError(Fault(where, f"got {text!r}, which is not module:function", "e.g. own_reward:score"))
    folder, module, function = Path(match[1] or ".").expanduser().resolve(), match[2], match[3]
    if module_file(folder, module):
        return Reference(folder, module, function, True)
    try:
        spec = None if match[1] else importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    except Exception as error:  # a package above it is imported, which may raise anything
        raise UserError(Fault(where, f"{text}: {_raised(error)}")) from error
    if spec is None or spec.origin is None:
        place = folder.joinpath(*module.split(".")[:-1])
        near = [path.stem for path in place.glob("*.py")]
        hint = nearest(module.rpartition(".")[2], near) if near else "write folder/module:function"
        what = f"{text}: no module {module!r} in {folder}{'' if match[1] else ', and none is installed'}"
        raise UserError(Fault(where, what, hint))
    above = len(module.split(".")) - (0 if spec.submodule_search_locations is not None else 1)
    return Reference(Path(spec.origin).parents[above], module, function, False)


def module_file(folder: Path, module: str) -> Path | None:
    """The file of a module below a folder."""
    place = folder.joinpath(*module.split("."))
    return next((f for f in (place.with_suffix(".py"), place / "__init__.py") if f.is_file()), None)


@functools.cache
def sources(one: Reference) -> dict[str, bytes]:
    """The files that a function consists of, by their path below its folder, as they are when a process first
    asks: its module, and what that imports from the same folder (of an installed module: from the same
    package), directly or not."""
    found: dict[str, bytes] = {}
    pending = [one.module]
    while pending:
        parts = pending.pop().split(".")
        own = parts[0] != "dash_exp" if one.local else parts[0] == one.module.split(".")[0]
        for end in range(1, len(parts) + 1) if own else ():
            name = ".".join(parts[:end])
            file = module_file(one.folder, name)
            place = str(file.relative_to(one.folder)) if file else ""
            if file and place not in found:
                found[place] = file.read_bytes()
                package = name if file.name == "__init__.py" else name.rpartition(".")[0]
                pending += _imports(found[place], package)
    return dict(sorted(found.items()))


def _imports(source: bytes, package: str) -> list[str]:
    """Full names of all that a source imports."""
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError):
        return []  # importing it says what is wrong
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    for node in (node for node in nodes if isinstance(node, ast.ImportFrom)):
        above = package.split(".")[: 1 - node.level or None] if node.level else []
        base = ".".join(filter(None, [*above, node.module]))
        names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return [name for name in names if name]


def source_hash(one: Reference) -> str:
    """The start of a SHA-256 over the files of a function."""
    digest = hashlib.sha256()
    for place, source in sources(one).items():
        digest.update(f"{place}\0".encode() + source + b"\0")
    return digest.hexdigest()[:16]


def version(one: Reference) -> str:
    """The name of a function and the hash of its source, wherever it lies."""
    return f"{one.name}@{source_hash(one)}"


def stored(one: Reference) -> tuple[str, dict[str, bytes]]:
    """The reference that stands in a frozen config, relative to the cell's folder, and the files to be
    written there. An installed module is not copied."""
    if not one.local:
        return str(one), {}
    place = f"{STORED}/{source_hash(one)[:8]}"
    return f"{place}/{one.name}", {f"{place}/{name}": source for name, source in sources(one).items()}


# --- load and call ---


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
            raise self.failed(_raised(error)) from error

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
        raise UserError(Fault(where, f"{one.module} {_raised(error)}, when it was imported")) from error


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


def _raised(error: BaseException) -> str:
    """What was raised, and where in the user's own code."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f.filename != __file__ and "importlib" not in f.filename]
    place = f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""
    if isinstance(error, SyntaxError) and error.filename:
        place = f" ({Path(error.filename).name}:{error.lineno})"
    return f"raised {shorten(traceback.format_exception_only(error)[-1].strip())}{place}"


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
        raise plugin.failed(_raised(error)) from error
    return tuple(lines)
