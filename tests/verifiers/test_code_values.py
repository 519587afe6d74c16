"""What crosses between the tests and the program, and what cannot."""

from __future__ import annotations

import collections
import datetime
import decimal
import enum
import fractions
import os
import pickle
import socket
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dash_exp.verifiers import values
from dash_exp.verifiers.values import Channel, ChannelClosedError, decode, encode

Point = collections.namedtuple("Point", "x y")
Colour = enum.IntEnum("Colour", "RED BLUE")


class Text(str):
    __slots__ = ()

    def __str__(self) -> str:
        return "another"


def handle(value: Any) -> int:
    return 7


def back(number: int) -> Any:
    return ("handle", number)


def crossed(value: Any) -> Any:
    return decode(encode(value, handle), back)


@pytest.mark.parametrize(
    ("value", "arrives"),
    [
        (Point(1, [2]), (1, [2])),
        (Colour.BLUE, 2),
        (Text("a"), "a"),
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
    ids=repr,
)
def test_values_that_cross(value: Any, arrives: Any) -> None:
    got = crossed(value)
    assert got == arrives
    if type(value).__module__ in ("builtins", "decimal", "fractions", "datetime") and got != ("handle", 7):
        assert type(got) is type(value) or isinstance(value, type(os))


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(PLAIN)
def test_plain_data_cross_as_themselves(value: Any) -> None:
    assert crossed(value) == value


@pytest.mark.parametrize(
    "array", [np.arange(6).reshape(2, 3), np.array([]), np.array(["a", "bc"]), np.eye(2) > 0]
)
def test_arrays_cross(array: Any) -> None:
    got = crossed(array)
    assert got.dtype == array.dtype
    assert np.array_equal(got, array)


def test_shared_and_cyclic_lists_stay_so() -> None:
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
        Evil(values.build, ("array", "O", (1,), b"12345678")),
        Evil(values.build, ("nonsense",)),
        Evil(Channel, ()),
        Evil(values._named_type, ("int",)),
    ],
    ids=lambda evil: str(evil.reduced),
)
def test_nothing_else_is_built(message: Evil) -> None:
    with pytest.raises(Exception):  # noqa: B017, PT011 (any will do: the reader takes it for no message)
        decode(pickle.dumps(message), back)


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
def test_what_is_no_message(data: bytes) -> None:
    left, right = socket.socketpair()
    left.sendall(data)
    left.close()
    with right, pytest.raises(ChannelClosedError):
        Channel(right, handle, back).receive()
