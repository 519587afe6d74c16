"""The process that runs the tests: the program's functions are remote, its values plain data.

The program runs in another process (`candidate.py`) that cannot reach the tests and the verdict here. An
exception of the program is raised here as the built-in one it derives from, or as a class made here that
derives from that one. No module that the program names is imported here.
"""

from __future__ import annotations

import ast
import builtins
import dis
import importlib
import operator
import re
import sys
import traceback
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from dash_exp.types import Score
from dash_exp.verifiers.code.values import TESTS, Channel, ChannelClosedError, ModuleName, plain_error
from dash_exp.verifiers.types import CodeGold, score

_MAX_DETAIL_CHARS = 300
_PROMPT = "<prompt>"
_FORWARDED = ("__name__", "__qualname__", "__annotations__", "__dict__")
_USUAL_NAMES = {"np": "numpy"}
_ERROR_MODULES = """
json.decoder decimal statistics struct re queue _queue binascii dataclasses calendar csv _csv ipaddress
numpy.linalg
"""
"""Modules whose exceptions the program may raise here. Not unittest's: one of those skips a test."""
_RESULTS = """
builtins collections _collections numpy decimal fractions datetime zoneinfo array uuid pathlib re program
dash_exp
"""
"""Modules of the kinds of a program's results, and of what a test gets from those."""


def _remote(operation: str, convert: Callable[[Any], Any] = lambda value: value) -> Callable[..., Any]:
    return lambda self, *operands: convert(self._remote_apply(operation, *operands))


def _between(operation: str) -> Callable[[Remote, object], Any]:
    """Only with another object of the program: otherwise the program would see what the tests expect, and
    could decide `abs(f(x) - 3) < 1` itself."""
    return lambda self, other: (
        self._remote_apply(operation, other) if isinstance(other, Remote) else NotImplemented
    )


class Remote:
    # An object of the program, seen from the tests. Operations on it (those in `_SPECIAL` too) run in the
    # candidate; `==` with anything but another such object is False, whatever its class says.

    __slots__ = ("_remote_examiner", "_remote_number")
    __doc__ = property(lambda self: self._remote_apply("getattr", "__doc__"))  # type: ignore[assignment]

    def __init__(self, examiner: Examiner, number: int):
        object.__setattr__(self, "_remote_examiner", examiner)
        object.__setattr__(self, "_remote_number", number)

    def _remote_apply(self, operation: str, *operands: Any) -> Any:
        return self._remote_examiner.ask("apply", operation, [self, *operands])

    @property
    def __mro_entries__(self) -> Any:
        """Read where a class statement, or a call of `type`, names this as a base."""
        raise self._remote_examiner.refuse("the tests derive a class from one of the program")

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._remote_examiner.call(self, arguments, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_remote_") or (name.startswith("__") and name not in _FORWARDED):
            raise AttributeError(name)  # protocols of numpy and others are not the program's to answer
        return self._remote_apply("getattr", name)

    def __iter__(self) -> Iterator[Any]:
        iterator = self._remote_apply("iter")
        return iterator if isinstance(iterator, Remote) else iter(iterator)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and bool(self._remote_apply("eq", other))

    def __deepcopy__(self, memo: object) -> Any:
        return self._remote_apply("deepcopy")

    def __exit__(self, *error: object) -> None:
        """Never suppresses an exception, which may be an assertion's, and does not pass it on."""
        self._remote_apply("exit")

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance, Remote) and bool(self._remote_apply("isinstance", instance))

    def __subclasscheck__(self, kind: object) -> bool:
        return isinstance(kind, Remote) and bool(self._remote_apply("issubclass", kind))

    __next__ = _remote("next")


_BETWEEN = "lt le gt ge add sub mul truediv floordiv mod divmod pow matmul lshift rshift and or xor"
_ALONE = "setattr delattr getitem setitem delitem neg pos abs invert round floor ceil copy enter"
_CONVERTED: Mapping[str, Callable[[Any], Any]] = {
    **{kind.__name__: kind for kind in (bool, float, int, complex, str)},
    **dict.fromkeys(("len", "index", "hash"), int),
    "contains": bool,
    "repr": str,
}
_SPECIAL = {
    **{name: _between(name) for name in _BETWEEN.split()},
    **{name: _remote(name) for name in _ALONE.split()},
    **{name: _remote(name, convert) for name, convert in _CONVERTED.items()},
}
for _name, _method in _SPECIAL.items():
    setattr(Remote, f"__{_name}__", _method)


class UnparsedError(Exception):
    """The program does not compile."""


class Examiner:
    """Runs tests in this process against a program in the candidate."""

    def __init__(self) -> None:
        self._channel: Channel | None = None
        self._lost: ChannelClosedError | None = None
        self._fault = ""
        self._answered = False
        self._kinds: dict[tuple[str, type], type] = {}
        self._kind_numbers: dict[type, int] = {}

    def connect(self, channel: Channel) -> None:
        self._channel = channel

    def to_handle(self, value: Any) -> int | str:
        """An object of the program is sent by its number, a function or class of Python by its name. Anything
        else is a fault of the tests, unless the program could have made them pass it."""
        if isinstance(value, Remote):
            return int(value._remote_number)
        if isinstance(value, BaseException) and isinstance(vars(value).get("_remote"), Remote):
            return vars(value)["_remote"]._remote_number  # type: ignore[no-any-return]
        if isinstance(value, type) and value in self._kind_numbers:
            return self._kind_numbers[value]
        name = _public_name(value)
        if name:
            return name
        fault = f"the tests pass a {type(value).__name__}, which cannot cross to the program"
        of_remote = value is Remote or isinstance(getattr(value, "__self__", None), Remote)
        if _is_of_tests(value) or not (self._answered or of_remote):
            raise self.refuse(fault)
        raise TypeError(fault)

    def refuse(self, fault: str) -> TypeError:
        """The error of tests that ask for what cannot be had. The verdict is that, even if they catch it."""
        self._fault = self._fault or fault
        return TypeError(fault)

    def from_handle(self, number: int, *described: Any) -> Any:
        if type(number) is not int:
            raise ValueError("no handle")
        if not described:
            return Remote(self, number)
        names, *rest = described
        base, own = _known_error(names)
        for name in reversed(own):
            key = name, base
            base = self._kinds[key] = self._kinds.get(key) or _Kind.named(*key)
        if rest:
            return self._error(base if own or base.__module__ != "builtins" else None, number, names, *rest)
        self._kind_numbers[base] = number
        if isinstance(base, _Kind):
            base._remote = Remote(self, number)
        return base

    def _error(
        self, kind: type | None, number: int, names: tuple[str, ...], arguments: tuple[Any, ...], message: str
    ) -> BaseException:
        if kind is None:
            return plain_error(names, arguments, str(message))
        try:
            error = kind.__new__(kind, *arguments)
        except Exception:  # noqa: BLE001 (UnicodeDecodeError and its like want more)
            return plain_error(names, arguments, str(message))
        vars(error).update(_remote=Remote(self, number), _message=str(message))
        return error  # type: ignore[no-any-return]

    def ask(self, *request: Any) -> Any:
        """The value of a request. Raises the program's exception as a built-in one."""
        return self._ask(*request)[0]

    def call(self, function: Remote, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Call in the candidate; arguments that it changed in place are changed here too."""
        value, changed = self._ask("call", function, arguments, named)
        if changed is not None:
            self._answered = True
            for old, new in zip((*arguments, *named.values()), changed, strict=False):
                replace = _replacer(old)
                if replace is not None and new is not None:
                    replace(new)
        return value

    def _ask(self, *request: Any) -> tuple[Any, Any]:
        assert self._channel is not None
        try:
            self._channel.send(request)
            reply = self._channel.receive()
        except ChannelClosedError as error:
            self._lost = error  # remembered, since the tests may swallow the exception
            raise
        match reply:
            case ("ok", value, changed):
                values = value.values() if isinstance(value, dict) else (value,)
                self._answered = self._answered or not all(isinstance(v, Remote | None) for v in values)
                return value, changed
            case ("unparsed", str(kind), str(message)):
                raise UnparsedError(f"{kind}: {message}")
            case ("raised", Exception() as raised):
                self._answered = True
                raise raised
        self._lost = ChannelClosedError("it sent no reply")
        raise self._lost

    def examine(self, program: str, gold: CodeGold, cpu_s: int) -> Score:
        """The verdict on `program`, as `assemble` takes it. Hangs as long as the program does."""
        warnings.simplefilter("ignore")
        try:
            tests = compile(gold.tests, TESTS, "exec", dont_inherit=True)
        except (SyntaxError, ValueError) as error:
            return score("verifier_error", f"the tests do not compile: {_line(error)}")
        try:
            self.ask("load", program, gold.prefix, gold.entry_point, cpu_s)
            space = self._space(tests, gold)
            exec(tests, space)  # noqa: S102 (the dataset's tests, in the sandbox)
        except UnparsedError as error:
            return score("unparsed", str(error)[:_MAX_DETAIL_CHARS])
        except BaseException as error:  # noqa: BLE001 (tests fail by raising anything)
            if self._lost is None and not self._fault:
                return _failure(error)
        if self._lost is not None:
            return score("crashed", f"the program's process failed: {self._lost}")
        if self._fault:  # the tests may have swallowed it
            return score("verifier_error", self._fault)
        return score("correct")

    def score_answer(self, answer: str, gold: str, cpu_s: int) -> Score:
        """reasoning-gym's score, computed in the candidate: its scorers may evaluate the answer."""
        try:
            value, outcome, detail = self.ask("score", answer, gold, cpu_s)
        except ChannelClosedError as error:
            return score("crashed", f"the scorer's process failed: {error}")
        except Exception as error:  # noqa: BLE001 (whatever the scorer's process raised)
            return score("crashed", _line(error))
        return Score(float(value), outcome, str(detail)[:_MAX_DETAIL_CHARS])

    def _space(self, tests: types.CodeType, gold: CodeGold) -> dict[str, Any]:
        """The tests' globals: the prompt's helpers, then what the tests name and the program has.

        A program's own `len`, or its own version of a helper that the prompt gave, is not used.
        """
        empty: dict[str, Any] = {"__name__": TESTS, "__builtins__": builtins}
        space = dict(empty)
        try:
            exec(compile(gold.prefix, _PROMPT, "exec", dont_inherit=True), space)  # noqa: S102
        except Exception:  # noqa: BLE001 (half a program: it has no helpers then)
            space = empty
        space.pop(gold.entry_point, None)
        wanted = _names(tests) - {*space, *dir(builtins), gold.entry_point}
        space.update(_own_modules(gold.tests, wanted))
        wanted -= space.keys()
        theirs = self.ask("globals", [*wanted, gold.entry_point])
        if type(theirs) is not dict:
            raise TypeError("the program's globals are no dict")
        for name in (*wanted, gold.entry_point):
            value = theirs.get(name, _NOTHING)
            if isinstance(value, ModuleName):  # a module that tests may use is imported here already
                top = value.partition(".")[0]
                shared = top in sys.stdlib_module_names or top == "numpy"
                value = sys.modules.get(value, _NOTHING) if shared and name in wanted else _NOTHING
            if value is not _NOTHING:
                space[name] = value
        return space


_NOTHING = object()


def _failure(error: BaseException) -> Score:
    detail = _line(error)
    if isinstance(error, MemoryError):
        return score("crashed", f"out of memory: {detail}")
    if isinstance(error, ImportError) and _is_importing(error):
        return score("verifier_error", f"the tests need what is not installed: {detail}")
    return score("wrong", detail)


def _is_importing(error: BaseException) -> bool:
    """Whether an `import` statement of the tests raised it: no program can raise it there."""
    places = [(f.f_code, at) for f, at in _walk(error.__traceback__) if f.f_code.co_filename == TESTS]
    return bool(places) and dis.opname[places[-1][0].co_code[places[-1][1]]].startswith("IMPORT_")


def _walk(trace: types.TracebackType | None) -> Iterator[tuple[types.FrameType, int]]:
    while trace is not None:
        yield trace.tb_frame, trace.tb_lasti
        trace = trace.tb_next


def _own_modules(tests: str, names: Iterable[str]) -> dict[str, types.ModuleType]:
    """Python's modules that the tests use without an import, as if the program had imported them: its own
    `sys` could agree with everything. A name that is used for anything but the module's attributes
    (`datetime(2020, 1, 1)`) is left to the program."""
    asked = {n: _USUAL_NAMES.get(n, n) for n in names}
    found = {n: m for n, m in asked.items() if m in sys.stdlib_module_names or n in _USUAL_NAMES}
    imports = set(re.findall(r"\w+", " ".join(_IMPORTS.findall(tests)))) if found else set()
    found = {n: m for n, m in found.items() if n not in imports}
    used = _attributes_of(tests, found) if found else {}
    modules = {}
    for name, attributes in used.items():
        try:
            module = importlib.import_module(found[name])  # a name that the tests chose
        except ImportError:
            continue
        if all(hasattr(module, attribute) for attribute in attributes):
            modules[name] = module
    return modules


_IMPORTS = re.compile(r"^[ \t]*(?:import|from)[ \t].*$", re.MULTILINE)


def _attributes_of(tests: str, names: Iterable[str]) -> dict[str, set[str]]:
    """The attributes that are read of these names, for names that are used in no other way."""
    used: dict[str, set[str]] = {name: set() for name in names}
    plain: dict[str, int] = dict.fromkeys(used, 0)
    bound: set[str] = set()
    for node in ast.walk(ast.parse(tests)):
        match node:
            case ast.Attribute(value=ast.Name(id=name)) if name in used:
                used[name].add(node.attr)
                plain[name] -= 1
            case ast.Name(id=name) if name in used:
                plain[name] += 1
                bound |= set() if isinstance(node.ctx, ast.Load) else {name}
            case ast.arg(arg=name) | ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                bound.add(name)
    return {name: found for name, found in used.items() if found and not plain[name] and name not in bound}


def _names(code: types.CodeType) -> set[str]:
    """Names that the code and the functions in it may look up, attributes included."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names(constant)
    return names


def _replacer(value: Any) -> Callable[[Any], None] | None:
    """How to give a mutable argument the content it has in the candidate."""
    if isinstance(value, list | bytearray) or type(value).__name__ in ("ndarray", "array"):
        return lambda new: value.__setitem__(slice(None), new)
    if isinstance(value, dict | set) or type(value).__name__ == "deque":
        return lambda new: _refill(value, new)
    return None


def _refill(value: Any, new: Iterable[Any]) -> None:
    value.clear()
    (value.extend if hasattr(value, "extend") else value.update)(new)


def _known_error(names: Any) -> tuple[type, list[str]]:
    """The first class of these that is known here, and the names before it. Raises ValueError."""
    if type(names) is not tuple or not 0 < len(names) < 50 or not all(type(n) is str for n in names):
        raise ValueError("no names of classes")
    for position, name in enumerate(names):
        module, _, short = name.rpartition(".")
        if module == "builtins" or module in _ERROR_MODULES.split():
            kind = getattr(sys.modules.get(module), short, None)
            if isinstance(kind, type) and issubclass(kind, Exception):
                return kind, list(names[:position])
    return RuntimeError, [name for name in names if not name.startswith("builtins.")]


class _Kind(type):
    """The type of the program's exception classes. Instances are made, and other attributes looked up, in
    the candidate."""

    _remote: Remote

    @staticmethod
    def named(name: str, base: type) -> _Kind:
        space = {"__module__": "program", "__str__": _message_of, "__getattr__": _attribute_of}
        return _Kind(name.rpartition(".")[2], (base,), space)

    def __call__(cls, *arguments: Any, **named: Any) -> Any:
        own = "_remote" in vars(cls)  # else it was only seen as the class of an instance
        return cls._remote(*arguments, **named) if own else super().__call__(*arguments, **named)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_") or "_remote" not in vars(cls):
            raise AttributeError(name)
        return getattr(cls._remote, name)


def _message_of(error: Any) -> str:
    return str(vars(error)["_message"] if "_message" in vars(error) else Exception.__str__(error))


def _attribute_of(error: Any, name: str) -> Any:
    if name.startswith("_") or "_remote" not in vars(error):
        raise AttributeError(name)
    return getattr(vars(error)["_remote"], name)


def _public_name(value: Any) -> str:
    """Where Python or numpy has this function or class; empty where neither has it."""
    if not callable(value):
        return ""
    owner = getattr(value, "__objclass__", None)
    module = getattr(value, "__module__", None) or getattr(owner, "__module__", None)
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
    if not isinstance(module, str) or not isinstance(name, str):
        return ""
    if module.partition(".")[0] not in (*sys.stdlib_module_names, "numpy"):
        return ""
    try:
        found = operator.attrgetter(name)(sys.modules[module])
    except (KeyError, AttributeError):
        return ""
    return f"{module}:{name}" if found is value else ""


def _is_of_tests(value: Any) -> bool:
    """Whether the tests made this themselves. What they derive from the program's results (an iterator over
    one, a method of one) is the program's choice."""
    if type(value) is object or isinstance(value, map | filter | zip | enumerate | reversed):
        return True
    if isinstance(value, types.GeneratorType):
        return value.gi_code.co_filename in (TESTS, _PROMPT)
    kind = value if isinstance(value, type | types.FunctionType) else type(value)
    return str(kind.__module__).partition(".")[0] not in _RESULTS.split()


def _line(error: BaseException) -> str:
    """The exception in one line, with the line of the tests it came through."""
    try:
        message = str(error).strip().replace("\n", " ")
    except BaseException:  # noqa: BLE001 (of an assertion's message that is an object of the program)
        message = ""
    places = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == TESTS]
    place = f" (line {places[-1]} of the tests)" if places else ""
    return f"{type(error).__name__}: {message}"[:_MAX_DETAIL_CHARS] + place
