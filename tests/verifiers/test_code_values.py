"""What crosses between the tests and the program, and what cannot."""

from __future__ import annotations

import array
import collections
import datetime
import decimal
import enum
import fractions
import os
import pathlib
import pickle
import re
import socket
import sys
import threading
import types
import uuid
import zoneinfo
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dash_exp.verifiers.code import values
from dash_exp.verifiers.code.values import Channel, ChannelClosedError, decode, encode

EAST = datetime.timezone(datetime.timedelta(hours=5, minutes=30), "east")
ROME = zoneinfo.ZoneInfo("Europe/Rome")
Point = collections.namedtuple("Point", "x y")
Colour = enum.IntEnum("Colour", "RED BLUE")


class Text(str):
    __slots__ = ()

    def __str__(self) -> str:
        return "another"


class Trouble(ValueError):
    def __str__(self) -> str:
        return "trouble"


def handle(value: Any) -> int:
    return 7


def back(number: int, *described: Any) -> Any:
    return (number, *described) if described else ("handle", number)


def named(value: Any) -> str:
    """The same in every process: addresses differ, and workers of pytest-xdist compare names."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def crossed(value: Any) -> Any:
    return decode(encode(value, handle), back)


@pytest.mark.parametrize(
    ("value", "arrives"),
    [
        (Point(1, [2]), (1, [2])),
        (Colour.BLUE, 2),
        (Text("a"), "a"),
        (
            datetime.datetime(2020, 1, 2, tzinfo=datetime.UTC),
            datetime.datetime(2020, 1, 2, tzinfo=datetime.UTC),
        ),
        (datetime.time(3, tzinfo=EAST), datetime.time(3, tzinfo=EAST)),
        (
            datetime.datetime(2020, 7, 2, tzinfo=ROME, fold=1),
            datetime.datetime(2020, 7, 2, tzinfo=ROME, fold=1),
        ),
        (pathlib.Path("a/b"), pathlib.Path("a/b")),
        (pathlib.PureWindowsPath("a/b"), pathlib.PureWindowsPath("a/b")),
        (uuid.UUID(int=5), uuid.UUID(int=5)),
        (array.array("d", [1.5]), array.array("d", [1.5])),
        (re.compile("a+", re.I), re.compile("a+", re.I)),
        (memoryview(b"ab"), b"ab"),
        (types.MappingProxyType({1: 2}), {1: 2}),
        (collections.ChainMap({1: 2}), {1: 2}),
        (collections.Counter, collections.Counter),
        (KeyError, KeyError),
        (1 + 2j, 1 + 2j),
        (collections.defaultdict(list, {1: [2]}), {1: [2]}),
        (bytearray(b"x"), bytearray(b"x")),
        (decimal.Decimal("1.50"), decimal.Decimal("1.50")),
        (fractions.Fraction(1, 3), fractions.Fraction(1, 3)),
        (datetime.datetime(2020, 1, 2, 3), datetime.datetime(2020, 1, 2, 3)),
        (datetime.time(3), datetime.time(3)),
        (datetime.date(2020, 1, 2), datetime.date(2020, 1, 2)),
        (datetime.timedelta(1, 2), datetime.timedelta(1, 2)),
        (collections.Counter("aab"), collections.Counter("aab")),
        (collections.deque([1], 3), collections.deque([1])),
        (range(1, 9, 2), range(1, 9, 2)),
        (slice(1, 2), slice(1, 2)),
        ({1: 2}.keys(), {1}),
        (..., ...),
        (NotImplemented, NotImplemented),
        (int, int),
        (np.float64(2.5), 2.5),
        (np.int8(-3), -3),
        (10**400, 10**400),
        (type, ("handle", 7)),
        (object(), ("handle", 7)),
        (len, ("handle", 7)),
        (os, "os"),
        ("\ud800", "\ud800"),
        (iter([1]), ("handle", 7)),
        ([(print, 1)], [(("handle", 7), 1)]),
    ],
    ids=named,
)
def test_values_that_can_be_sent(value: Any, arrives: Any) -> None:
    got = crossed(value)
    assert got == arrives
    if type(value).__module__ in ("builtins", "decimal", "fractions", "datetime") and got != ("handle", 7):
        assert type(got) is type(value) or isinstance(value, type(os))


@pytest.mark.parametrize(
    ("error", "described"),
    [
        (KeyError("a", (1, None)), (-1, ("builtins.KeyError",), ("a", (1, None)), "('a', (1, None))")),
        (ValueError(["x"]), (-1, ("builtins.ValueError",), ("['x']",), "['x']")),
        (ValueError("x" * 10_000), (-1, ("builtins.ValueError",), ("x" * 2_000,), "x" * 2_000)),
        (Trouble(), (7, (f"{__name__}.Trouble", "builtins.ValueError"), (), "trouble")),
    ],
    ids=["key", "list", "long", "own"],
)
def test_exceptions_are_sent_as_descriptions(error: Exception, described: tuple[Any, ...]) -> None:
    handle, names, arguments, message = crossed(error)
    wanted = described[1]
    assert (handle, names[: len(wanted)], arguments, message) == described
    assert names[-1] == "builtins.BaseException"


def test_named_tuples_keep_their_names() -> None:
    got = crossed(Point(1, [2]))
    assert (got.x, got.y, got) == (1, [2], (1, [2]))
    hidden = collections.namedtuple("hidden", "a _b", rename=True)
    assert crossed(hidden(1, 2)) == (1, 2)


def test_nested_lists_and_the_limit_of_recursion() -> None:
    limit = sys.getrecursionlimit()
    value: list[Any] = []
    for _ in range(900):
        value = [value]
    got, depth = crossed(value), 0
    while got:
        got, depth = got[0], depth + 1
    assert (depth, sys.getrecursionlimit()) == (900, limit)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(PLAIN)
def test_plain_data_are_sent_by_value(value: Any) -> None:
    assert crossed(value) == value


@pytest.mark.parametrize(
    "array", [np.arange(6).reshape(2, 3), np.array([]), np.array(["a", "bc"]), np.eye(2) > 0]
)
def test_arrays_are_sent_by_value(array: Any) -> None:
    got = crossed(array)
    assert got.dtype == array.dtype
    assert np.array_equal(got, array)


def test_shared_and_cyclic_lists_keep_their_shape() -> None:
    value: list[Any] = [1]
    value.append(value)
    got = crossed(value)
    assert got[1] is got


class Evil:
    def __init__(self, *reduced: Any):
        self.reduced = reduced

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.mark.parametrize(
    "message",
    [
        Evil(eval, ("1 + 1",)),
        Evil(os.system, ("true",)),
        Evil(type, ("A", (), {})),
        Evil(values.build, ("type", "type")),
        Evil(values.build, ("type", "object")),
        Evil(values.build, ("ndarray", "O", (1,), b"12345678")),
        Evil(values.build, ("nonsense",)),
        Evil(Channel, ()),
        Evil(values._dtype, ("int",)),
        Evil(values.build, ("type", "Fraction"), (None, {"of_a_program": 1})),
        Evil(values.build, ("type", "Counter"), (None, {"of_a_program": 1})),
    ],
    ids=lambda evil: named(evil.reduced),
)
def test_nothing_else_is_built(message: Evil) -> None:
    with pytest.raises(Exception):  # noqa: B017, PT011 (any will do: the reader takes it for no message)
        decode(pickle.dumps(message), back)
    assert not any(hasattr(kind, "of_a_program") for kind in (fractions.Fraction, collections.Counter))


def test_every_opcode_of_a_message_is_known_to_the_reader() -> None:
    """Of the shapes that a pickler has opcodes for, beside something that makes the reader look."""
    itself: tuple[Any, ...] = ([],)
    itself[0].append(itself)
    value = [
        None,
        True,
        False,
        1,
        300,
        -1,
        2**31,
        2**3000,
        1.5,
        "a",
        "a" * 300,
        b"a",
        b"a" * 300,
        bytearray(b"a"),
        [],
        [1],
        [1, 2],
        (),
        (1,),
        (1, 2),
        (1, 2, 3),
        (1, 2, 3, 4),
        {},
        {1: 2},
        {1: 2, 3: 4},
        set(),
        {1, 2},
        frozenset({1}),
        *([i] for i in range(300)),
        Point(1, 2),
        fractions.Fraction(1, 3),
    ]
    value.append(value[-3])
    assert crossed(value) == value
    again = crossed([itself, range(3)])[0]
    assert again[0][0] is again


def test_messages_longer_than_the_buffers_of_a_socket() -> None:
    left, right = socket.socketpair()
    ends = [Channel(end, handle, back) for end in (left, right)]
    message = ["x" * 3_000_000, list(range(100_000))]
    sender = threading.Thread(target=ends[0].send, args=(message,))
    sender.start()
    assert ends[1].receive() == message
    sender.join()
    left.close()
    with pytest.raises(ChannelClosedError):
        ends[1].receive()
    right.close()


@pytest.mark.parametrize("data", [b"", b"abc", b"\x05" + bytes(7) + b"abcde", b"\xff" * 8, bytes(8)])
def test_bytes_that_are_no_message(data: bytes) -> None:
    left, right = socket.socketpair()
    left.sendall(data)
    left.close()
    with right, pytest.raises(ChannelClosedError):
        Channel(right, handle, back).receive()
