"""The process that runs an untrusted program: it loads it, and calls what the tests ask for. It also runs the
scorers of reasoning-gym.

It was forked before the tests were read and knows neither them nor the verdict. Whatever the program does
to this process, it can only answer calls, rightly or wrongly, or not at all.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import copy
import gc
import importlib
import json
import math
import operator
import os
import random
import re
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from dash_exp.types import Score
from dash_exp.verifiers.code.confine import limit_cpu
from dash_exp.verifiers.code.program import assemble, compiled
from dash_exp.verifiers.code.values import Channel, ChannelClosedError, describe_error, encode, plain_error
from dash_exp.verifiers.types import CodeGold, GymGold, score

MODULE_NAME = "program"
"""`__name__` inside the program: what stands under `if __name__ == "__main__"` does not run."""

_MUTABLE = (list, dict, set, bytearray)

Reply = tuple[Any, ...]


class Candidate:
    """The loaded program, and those of its objects that the tests hold by number."""

    def __init__(self) -> None:
        self._objects: list[Any] = []
        self._globals: dict[str, Any] = {}

    def to_handle(self, value: Any) -> int:
        """A new number for an object that stays here."""
        self._objects.append(value)
        return len(self._objects) - 1

    def from_handle(self, handle: int | str, *described: Any) -> Any:
        """The object of a number; what the standard library has under a name; an exception of the tests."""
        if isinstance(handle, str):
            module, _, name = handle.partition(":")
            return operator.attrgetter(name)(importlib.import_module(module))
        return self._objects[handle] if handle >= 0 else plain_error(*described)

    def answer(self, request: tuple[Any, ...]) -> Reply:
        """The reply: `ok` with a value, or the exception."""
        try:
            return getattr(self, f"_do_{request[0]}")(*request[1:])  # type: ignore[no-any-return]
        except BaseException as error:  # noqa: BLE001 (the program may raise anything)
            with contextlib.suppress(BaseException):  # to free what its frames hold
                error.__traceback__ = error.__context__ = error.__cause__ = None
            return ("raised", error)

    def _do_load(self, text: str, prefix: str, entry_point: str, cpu_s: int) -> Reply:
        limit_cpu(cpu_s)
        try:
            found = json.loads(text)
            gold = CodeGold("", entry_point, prefix)
            code = compiled(found) if isinstance(found, str) else assemble(found, gold)
        except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as error:
            return ("unparsed", type(error).__name__, str(error))
        module = types.ModuleType(MODULE_NAME)
        sys.modules[MODULE_NAME] = module  # dataclasses and typing look a class's module up
        self._globals = module.__dict__
        random.seed(0)  # a fork seeds anew; the same program gets the same verdict
        exec(code, module.__dict__)  # noqa: S102 (this is what the process is for)
        return ("ok", None, None)

    def _do_score(self, answer: str, gold: str, cpu_s: int) -> Reply:
        limit_cpu(cpu_s)
        verdict = score_gym(answer, gold)
        return ("ok", (verdict.value, verdict.outcome, verdict.detail), None)

    def _do_globals(self, names: list[str]) -> Reply:
        return ("ok", {name: self._globals[name] for name in names if name in self._globals}, None)

    def _do_call(self, function: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Reply:
        mutable = [a if _can_change(a) else None for a in (*arguments, *named.values())]
        before = self._bytes(mutable)
        value = function(*arguments, **named)
        return ("ok", value, mutable if self._bytes(mutable) != before else None)

    def _do_apply(self, operation: str, operands: list[Any]) -> Reply:
        return ("ok", OPERATIONS[operation](*operands), None)

    def _bytes(self, values: list[Any]) -> bytes:
        """To see whether arguments were changed in place; a handle's own state does not count."""
        return encode(values, lambda value: 0) if any(value is not None for value in values) else b""


def _can_change(value: Any) -> bool:
    return isinstance(value, _MUTABLE) or type(value).__name__ in ("ndarray", "deque", "array")


def _comparison(compare: Callable[[Any, Any], Any]) -> Callable[[Any, Any], bool]:
    return lambda value, other: bool(compare(value, other))


_BUILT_IN = "getattr setattr delattr iter next len bool hash divmod float int complex round str repr"
_OPERATORS = """
getitem setitem delitem contains add sub mul truediv floordiv mod pow matmul lshift rshift and or xor neg pos
abs invert index
"""
_COMPARISONS = "eq lt le gt ge"
OPERATIONS: Mapping[str, Callable[..., Any]] = {
    **{name: getattr(builtins, name) for name in _BUILT_IN.split()},
    **{name: getattr(operator, f"__{name}__") for name in _OPERATORS.split()},
    **{name: _comparison(getattr(operator, name)) for name in _COMPARISONS.split()},
    **{function.__name__: function for function in (math.floor, math.ceil, copy.copy, copy.deepcopy)},
    "enter": lambda value: value.__enter__(),
    "exit": lambda value: bool(value.__exit__(None, None, None)),
    "isinstance": lambda kind, value: isinstance(value, kind),
    "issubclass": lambda kind, value: issubclass(value, kind),
}
"""What tests may do with an object that stays here."""


def serve(channel: Channel, candidate: Candidate) -> None:
    """Answer requests until the other side goes; never returns."""
    warnings.simplefilter("ignore")
    sys.argv = ["program"]
    gc.enable()
    while True:
        try:
            request = channel.receive()
        except ChannelClosedError:
            os._exit(0)
        reply = candidate.answer(request)
        try:
            channel.send(reply)
        except ChannelClosedError:
            os._exit(0)
        except BaseException as error:  # noqa: BLE001 (a value that cannot be read is the program's)
            channel.send(("raised", plain_error(*describe_error(error))))


# reasoning-gym's own scorers, some of which evaluate the answer as Python. Such a scorer gets a function that
# reads literals, or formulas without attributes, strings or unknown names, so an answer cannot look for the
# solution in the scorer's memory. Verdicts on honest answers are the library's.

EVALUATE_ANSWERS = (
    "algorithmic.string_insertion",
    "algorithmic.spiral_matrix",
    "algorithmic.number_sorting",
    "algorithmic.binary_matrix",
    "games.n_queens",
)
"""Modules of reasoning_gym 0.1.25 whose scorers call `eval` on the answer, which is a list at best."""
PARSE_ANSWERS = ("games.puzzle24", "games.countdown")
"""Modules that hold sympy's `parse_expr`, which evaluates, under this name."""

_MAX_FORMULA = 2_000
_NAME = re.compile(r"[A-Za-z_]\w*")
_ATTRIBUTE = re.compile(r"[\w)\]]\s*\.\s*[A-Za-z_]")
_FUNCTIONS = "sin cos tan cot sec csc asin acos atan sinh cosh tanh exp log ln sqrt Abs pi Rational"
_NAMES = frozenset(_FUNCTIONS.split())


def prepare_gym() -> None:
    """Import the library, and replace `eval` in those of its scorers that evaluate answers."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MPLCONFIGDIR"] = folder  # else matplotlib leaves one behind
        importlib.import_module("reasoning_gym")
    for name in EVALUATE_ANSWERS:
        module: Any = importlib.import_module(f"reasoning_gym.{name}")
        module.eval = read_literal
    sympy: Any = importlib.import_module("sympy")
    guarded = guard(sympy.parse_expr)
    sympy.parse_expr = guarded
    for name in PARSE_ANSWERS:
        module = importlib.import_module(f"reasoning_gym.{name}")
        module.parse_expr = guarded


def read_literal(text: str) -> Any:
    """What `eval` gives for a literal. Raises ValueError or SyntaxError for anything else."""
    return ast.literal_eval(text.strip())


def guard(parse: Callable[..., Any]) -> Callable[..., Any]:
    """`parse` for formulas only; ValueError for what could be a program."""

    def parse_formula(text: Any, *arguments: Any, **named: Any) -> Any:
        if not is_formula(str(text)):
            raise ValueError("not a formula")
        return parse(text, *arguments, **named)

    return parse_formula


def is_formula(text: str) -> bool:
    """Numbers, operators, one- and two-letter variables and named functions, and nothing else."""
    if len(text) > _MAX_FORMULA or not text.isascii() or _ATTRIBUTE.search(text):
        return False
    if re.search(r"[^\w\s+\-*/^().,=]|__", text):
        return False
    return all(len(name) <= 2 or name in _NAMES for name in _NAME.findall(text))


def score_gym(answer: str, gold: str) -> Score:
    """The library's score of an extracted answer; `correct` at 1."""
    try:
        known = GymGold.from_text(gold)
        scorer = importlib.import_module("reasoning_gym").get_score_answer_fn(known.task)
    except (ValueError, TypeError, KeyError) as error:
        return score("verifier_error", f"the gold is broken: {error}")
    try:
        value = float(scorer(answer, known.entry))
    except MemoryError:
        return score("crashed", "out of memory")
    except Exception as error:  # noqa: BLE001 (a scorer's fault on an odd answer scores nothing)
        return score("wrong", f"the scorer failed: {type(error).__name__}: {error}"[:300])
    if not 0.0 <= value <= 1.0:
        return score("verifier_error", f"the scorer gave {value}")
    return Score(value, "correct" if value >= 1.0 else "wrong", f"{known.task}: {value:g}")
