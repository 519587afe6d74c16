"""The process that runs an untrusted program: it loads it, and calls what the tests ask for.

It was forked before the tests were read and knows neither them nor the verdict. Whatever the program does
to this process, it can only answer calls, rightly or wrongly, or not at all.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib
import math
import operator
import os
import random
import sys
import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from dash_exp.verifiers.code.confine import limit_cpu
from dash_exp.verifiers.code.values import Channel, ChannelClosedError, describe_error, encode, plain_error

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

    def _do_load(self, source: str, cpu_s: int) -> Reply:
        limit_cpu(cpu_s)
        try:
            code = compile(source, "<program>", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as error:
            return ("unparsed", type(error).__name__, str(error))
        module = types.ModuleType(MODULE_NAME)
        sys.modules[MODULE_NAME] = module  # dataclasses and typing look a class's module up
        self._globals = module.__dict__
        random.seed(0)  # a fork seeds anew; the same program gets the same verdict
        exec(code, module.__dict__)  # noqa: S102 (this is what the process is for)
        return ("ok", None, None)

    def _do_score(self, answer: str, gold: str, cpu_s: int) -> Reply:
        from dash_exp.verifiers import gym

        limit_cpu(cpu_s)
        verdict = gym.judge(answer, gold)
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


_OPERATORS = "add sub mul truediv floordiv mod pow matmul lshift rshift and_ or_ xor neg pos abs invert index"
OPERATIONS: Mapping[str, Callable[..., Any]] = {
    "attribute": getattr,
    "assign": setattr,
    "forget": delattr,
    "iterate": iter,
    "next": next,
    "length": len,
    "item": operator.getitem,
    "set_item": operator.setitem,
    "delete_item": operator.delitem,
    "contains": operator.contains,
    "true": bool,
    "hash": hash,
    "equal": lambda value, other: bool(value == other),
    "less": lambda value, other: bool(value < other),
    "at_most": lambda value, other: bool(value <= other),
    "greater": lambda value, other: bool(value > other),
    "at_least": lambda value, other: bool(value >= other),
    **{name: getattr(operator, name) for name in _OPERATORS.split()},
    "divmod": divmod,
    "float": float,
    "int": int,
    "complex": complex,
    "round": round,
    "floor": math.floor,
    "ceil": math.ceil,
    "enter": lambda value: value.__enter__(),
    "leave": lambda value: bool(value.__exit__(None, None, None)),
    "copy": copy.copy,
    "deep_copy": copy.deepcopy,
    "is_instance": lambda kind, value: isinstance(value, kind),
    "is_subclass": lambda kind, value: issubclass(value, kind),
    "text": str,
    "representation": repr,
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
