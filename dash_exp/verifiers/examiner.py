"""The process that runs the tests: the program's functions are remote, its values plain data.

The tests and the verdict live here; the program lives in another process (`candidate.py`) that cannot
reach this one. An exception of the program is raised here as the built-in exception it derives from.
"""

from __future__ import annotations

import builtins
import importlib
import sys
import traceback
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from dash_exp.types import Score
from dash_exp.verifiers.gold import CodeGold
from dash_exp.verifiers.protocol import score
from dash_exp.verifiers.values import Channel, ChannelClosedError, ModuleName

_MAX_DETAIL_CHARS = 300
_TESTS = "<tests>"


class Remote:
    """An object of the program, seen from the tests. What the tests may do with it is done over there;
    `==` with anything but another such object is False, whatever its class says."""

    __slots__ = ("_examiner", "_number")

    def __init__(self, examiner: Examiner, number: int):
        self._examiner = examiner
        self._number = number

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._examiner.call(self, arguments, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # protocols of numpy and others are not the program's to answer
            raise AttributeError(name)
        return self._apply("attribute", name)

    def __iter__(self) -> Iterator[Any]:
        iterator = self._apply("iterate")
        return iterator if isinstance(iterator, Remote) else iter(iterator)

    def __next__(self) -> Any:
        return self._apply("next")

    def __len__(self) -> int:
        return int(self._apply("length"))

    def __getitem__(self, key: Any) -> Any:
        return self._apply("item", key)

    def __contains__(self, item: Any) -> bool:
        return bool(self._apply("contains", item))

    def __bool__(self) -> bool:
        return bool(self._apply("true"))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and bool(self._apply("equal", other))

    def __lt__(self, other: object) -> bool:
        return isinstance(other, Remote) and bool(self._apply("less", other))

    def __hash__(self) -> int:
        return self._number

    def __str__(self) -> str:
        return str(self._apply("text"))

    def __repr__(self) -> str:
        return str(self._apply("representation"))

    def _apply(self, operation: str, *operands: Any) -> Any:
        return self._examiner.ask("apply", operation, [self, *operands])


class UnparsedError(Exception):
    """The program does not compile."""


class Examiner:
    """Runs tests here against a program there."""

    def __init__(self) -> None:
        self._channel: Channel | None = None
        self._raised: BaseException | None = None
        self._lost: ChannelClosedError | None = None

    def connect(self, channel: Channel) -> None:
        self._channel = channel

    def to_handle(self, value: Any) -> int:
        """Only what came from the program can go back as a handle."""
        if isinstance(value, Remote):
            return value._number
        raise TypeError(f"the tests pass a {type(value).__name__}, which cannot cross to the program")

    def from_handle(self, number: int) -> Remote:
        return Remote(self, number)

    def ask(self, *request: Any) -> Any:
        """The value of a request. Raises the program's exception as a built-in one."""
        return self._ask(*request)[0]

    def call(self, function: Remote, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Call over there; arguments that it changed in place are changed here too."""
        value, changed = self._ask("call", function, arguments, named)
        if changed is not None:
            mine = [a for a in (*arguments, *named.values()) if _replacer(a) is not None]
            for old, new in zip(mine, changed, strict=False):
                replace = _replacer(old)
                if replace is not None:
                    replace(new)
        return value

    def _ask(self, *request: Any) -> tuple[Any, Any]:
        assert self._channel is not None
        try:
            self._channel.send(request)
            reply = self._channel.receive()
        except ChannelClosedError as error:
            self._lost = error  # the tests may swallow exceptions; this they cannot
            raise
        match reply:
            case ("ok", value, changed):
                return value, changed
            case ("unparsed", [str(kind), *_], str(message)):
                raise UnparsedError(f"{kind}: {message}")
            case ("raised", [str(kind), *bases], str(message)):
                self._raised = _exception(kind, bases, message)
                raise self._raised
        self._lost = ChannelClosedError("it sent no reply")
        raise self._lost

    def examine(self, program: str, gold: CodeGold, cpu_s: int) -> Score:
        """The verdict on `program`. Does not return while the program does not."""
        warnings.simplefilter("ignore")
        try:
            tests = compile(gold.tests, _TESTS, "exec", dont_inherit=True)
        except (SyntaxError, ValueError) as error:
            return score("verifier_error", f"the tests do not compile: {_line(error)}")
        try:
            self.ask("load", program, cpu_s)
            space = self._space(tests, gold)
            exec(tests, space)  # noqa: S102 (the dataset's tests, in the sandbox)
        except UnparsedError as error:
            return score("unparsed", str(error)[:_MAX_DETAIL_CHARS])
        except BaseException as error:  # noqa: BLE001 (tests fail by raising anything)
            if self._lost is None:
                return self._failure(error)
        if self._lost is not None:
            return score("crashed", f"the program's process failed: {self._lost}")
        return score("correct")

    def score_answer(self, answer: str, gold: str, cpu_s: int) -> Score:
        """reasoning-gym's score, reached over there: its scorers may evaluate the answer."""
        try:
            value, outcome, detail = self.ask("score", answer, gold, cpu_s)
        except ChannelClosedError as error:
            return score("crashed", f"the scorer's process failed: {error}")
        except Exception as error:  # noqa: BLE001 (whatever the scorer's process raised)
            return score("crashed", _line(error))
        return Score(float(value), outcome, str(detail)[:_MAX_DETAIL_CHARS])

    def _failure(self, error: BaseException) -> Score:
        detail = _line(error)
        if isinstance(error, MemoryError):
            return score("crashed", f"out of memory: {detail}")
        if error is not self._raised and isinstance(error, ImportError):
            return score("verifier_error", f"the tests need what is not installed: {detail}")
        return score("wrong", detail)

    def _space(self, tests: types.CodeType, gold: CodeGold) -> dict[str, Any]:
        """The tests' globals: the prompt's helpers, then what the tests name and the program has.

        A program's own `len`, or its own version of a helper that the prompt gave, is not used.
        """
        space: dict[str, Any] = {"__name__": _TESTS, "__builtins__": builtins}
        if gold.prefix:
            try:
                exec(compile(gold.prefix, "<prompt>", "exec", dont_inherit=True), space)  # noqa: S102
            except Exception:  # noqa: BLE001 (half a program: it has no helpers then)
                space = {"__name__": _TESTS, "__builtins__": builtins}
        space.pop(gold.entry_point, None)
        wanted = [n for n in _names(tests) if n not in space and not hasattr(builtins, n)]
        theirs = self.ask("globals", [*wanted, gold.entry_point])
        for name in dict.fromkeys((*wanted, gold.entry_point)):
            if name in theirs:
                space[name] = _local(theirs[name])
        return space


def _local(value: Any) -> Any:
    """A module that the program imported is imported here, where it is ours."""
    if not isinstance(value, ModuleName):
        return value
    top = value.partition(".")[0]
    if top not in sys.stdlib_module_names and top != "numpy":
        raise NameError(f"the tests name its module {value}")
    return importlib.import_module(value)


def _names(code: types.CodeType) -> set[str]:
    """Names that the code and the functions in it may look up; attributes are among them."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names(constant)
    return names


def _replacer(value: Any) -> Callable[[Any], None] | None:
    """How to give a mutable argument the content it got over there."""
    if isinstance(value, list | bytearray) or type(value).__name__ == "ndarray":
        return lambda new: value.__setitem__(slice(None), new)
    if isinstance(value, dict | set):
        return lambda new: _refill(value, new)
    if type(value).__name__ == "deque":
        return lambda new: _refill(value, new)
    return None


def _refill(value: Any, new: Iterable[Any]) -> None:
    value.clear()
    (value.extend if hasattr(value, "extend") else value.update)(new)


def _exception(kind: str, bases: list[str], message: str) -> BaseException:
    for name in (kind, *bases):
        known = getattr(builtins, str(name), None)
        if isinstance(known, type) and issubclass(known, Exception):
            try:
                return known(message if known is not StopIteration else None)
            except TypeError:  # UnicodeDecodeError and its like want more
                continue
    return RuntimeError(f"{kind}: {message}")


def _line(error: BaseException) -> str:
    """The exception in one line, with the line of the tests it came through."""
    message = str(error).strip().replace("\n", " ")
    places = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == _TESTS]
    place = f" (line {places[-1]} of the tests)" if places else ""
    return f"{type(error).__name__}: {message}"[:_MAX_DETAIL_CHARS] + place
