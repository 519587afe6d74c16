"""How values travel between the tests and the program that is tested, two processes.

Plain data cross as themselves: None, bool, int, float, complex, str, bytes, list, tuple, dict, set,
frozenset, and the common kinds of the standard library and numpy below. Everything else stays where it
is and crosses as a handle, a number. The reading side builds only kinds it names itself, so nothing
that arrives can have an `__eq__` of its own. Subclasses arrive as what they derive from.
"""

from __future__ import annotations

import builtins
import collections
import datetime
import decimal
import fractions
import io
import pickle
import socket
import struct
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

MAX_BYTES = 2**29
"""The longest message that is read: 512 MiB."""

_NAMED_TYPES = ("bool", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "set",
                "str", "tuple")  # fmt: skip
_NUMPY_KINDS = "biufcSUmM"
_HEAD = struct.Struct("<Q")

ToHandle = Callable[[Any], int]
FromHandle = Callable[[int], Any]


class ChannelClosedError(Exception):
    """The other side has gone, or sent what is no message."""


class Channel:
    """One end of a stream socket between the two processes: a message is its length, then a pickle."""

    def __init__(self, end: socket.socket, to_handle: ToHandle, from_handle: FromHandle):
        self._end = end
        self._to_handle = to_handle
        self._from_handle = from_handle

    def send(self, message: Any) -> None:
        data = encode(message, self._to_handle)
        head = _HEAD.pack(len(data))
        try:
            self._end.sendall(head + data if len(data) < 65_536 else head)
            if len(data) >= 65_536:
                self._end.sendall(data)
        except OSError as error:
            raise ChannelClosedError("it had ended") from error

    def receive(self) -> Any:
        (size,) = _HEAD.unpack(self._read(_HEAD.size))
        if size > MAX_BYTES:
            raise ChannelClosedError(f"its value takes {size:.2e} bytes, more than {MAX_BYTES}")
        data = self._read(size)
        try:
            return decode(data, self._from_handle)
        except MemoryError:
            raise
        except Exception as error:
            raise ChannelClosedError(f"it sent no value: {type(error).__name__}") from error

    def _read(self, size: int) -> bytes:
        try:
            data = self._end.recv(size, socket.MSG_WAITALL)
            while len(data) < size:  # a signal or a large message can cut MSG_WAITALL short
                more = self._end.recv(size - len(data), socket.MSG_WAITALL)
                if not more:
                    raise ChannelClosedError("it ended")
                data += more
        except OSError as error:
            raise ChannelClosedError("it ended") from error
        return data


def encode(value: Any, to_handle: ToHandle) -> bytes:
    """Bytes of `value`. May raise what its own methods raise, and RecursionError."""
    out = io.BytesIO()
    _Writer(out, to_handle).dump(value)
    return out.getvalue()


def decode(data: bytes, from_handle: FromHandle) -> Any:
    """The value again. Raises some exception for bytes that `encode` did not make."""
    return _Reader(io.BytesIO(data), from_handle).load()


def build(*described: Any) -> Any:
    """Stands in a message for the reader's own function of this place."""
    raise TypeError("only a reader builds values")


class _Writer(pickle.Pickler):
    """Plain data are written by the C code alone; what it does not know comes by here."""

    def __init__(self, out: io.BytesIO, to_handle: ToHandle):
        super().__init__(out, protocol=5)
        self._to_handle = to_handle

    def reducer_override(self, value: Any) -> Any:
        if value is build:
            return NotImplemented
        if type(value) in _WRITERS:
            return build, (type(value).__name__, *_WRITERS[type(value)](value))
        return build, (_describe_other(value) or ("handle", self._to_handle(value)))


def _describe_other(value: Any) -> tuple[Any, ...] | None:
    numpy: Any = sys.modules.get("numpy")
    if isinstance(value, type):
        named = value.__name__ in _NAMED_TYPES and getattr(builtins, value.__name__) is value
        return ("type", value.__name__) if named else None
    if isinstance(value, types.ModuleType):
        return ("module", value.__name__)
    if numpy is not None and isinstance(value, numpy.generic) and value.dtype.kind in _NUMPY_KINDS:
        return ("scalar", value.dtype.str, value.tobytes())
    if numpy is not None and isinstance(value, numpy.ndarray):
        if value.dtype.kind in _NUMPY_KINDS:
            return ("array", value.dtype.str, value.shape, value.tobytes())
        return ("objects", value.shape, value.ravel().tolist()) if value.dtype.kind == "O" else None
    if isinstance(value, datetime.datetime | datetime.time) and value.tzinfo is None:
        moment = "datetime" if isinstance(value, datetime.datetime) else "time"
        return (moment, value.isoformat())
    for base, convert in _BASES.items():
        if isinstance(value, base):
            return ("plain", convert(value))
    return None


_BASES: Mapping[type, Callable[[Any], Any]] = {
    int: int.__int__, float: float.__float__, str: str.__str__, bytes: bytes, bytearray: bytearray,
    list: list, tuple: tuple, dict: dict, set: set, frozenset: frozenset,
}  # fmt: skip


_WRITERS: Mapping[type, Callable[[Any], tuple[Any, ...]]] = {
    complex: lambda v: (v.real, v.imag),
    decimal.Decimal: lambda v: (str(v),),
    fractions.Fraction: lambda v: (v.numerator, v.denominator),
    datetime.date: lambda v: (v.year, v.month, v.day),
    datetime.timedelta: lambda v: (v.days, v.seconds, v.microseconds),
    collections.Counter: lambda v: (dict(v),),
    collections.OrderedDict: lambda v: (list(v.items()),),
    collections.deque: lambda v: (list(v), v.maxlen),
    range: lambda v: (v.start, v.stop, v.step),
    slice: lambda v: (v.start, v.stop, v.step),
    type({}.keys()): lambda v: (list(v),),
    type({}.values()): lambda v: (list(v),),
    type({}.items()): lambda v: (list(v),),
    type(...): lambda v: (),
    type(NotImplemented): lambda v: (),
}


class _Reader(pickle.Unpickler):
    def __init__(self, source: io.BytesIO, from_handle: FromHandle):
        super().__init__(source)
        self._from_handle = from_handle

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) != (__name__, build.__name__):
            raise pickle.UnpicklingError(f"{module}.{name} is not plain data")
        return self._build

    def _build(self, kind: str, *rest: Any) -> Any:
        return self._from_handle(int(rest[0])) if kind == "handle" else _READERS[kind](*rest)


def _named_type(name: str) -> Any:
    if name not in _NAMED_TYPES:
        raise ValueError(name)
    return getattr(builtins, name)


def _module(name: str) -> Any:
    return ModuleName(str(name))


class ModuleName(str):
    """A module crosses as its name."""

    __slots__ = ()


def _dtype(text: str) -> Any:
    import numpy

    dtype = numpy.dtype(str(text))
    if dtype.kind not in _NUMPY_KINDS:
        raise ValueError(text)
    return dtype


def _array(dtype: str, shape: tuple[int, ...], data: bytes) -> Any:
    import numpy

    return numpy.frombuffer(data, dtype=_dtype(dtype)).reshape(shape).copy()


def _objects(shape: tuple[int, ...], items: list[Any]) -> Any:
    import numpy

    array = numpy.empty(len(items), dtype=object)
    for position, item in enumerate(items):
        array[position] = item
    return array.reshape(shape)


_READERS: Mapping[str, Callable[..., Any]] = {
    "complex": complex,
    "Decimal": lambda text: decimal.Decimal(str(text)),
    "Fraction": lambda n, d: fractions.Fraction(int(n), int(d)),
    "date": datetime.date,
    "datetime": lambda text: datetime.datetime.fromisoformat(text),
    "time": lambda text: datetime.time.fromisoformat(text),
    "timedelta": datetime.timedelta,
    "Counter": lambda items: collections.Counter(dict(items)),
    "OrderedDict": collections.OrderedDict,
    "deque": collections.deque,
    "range": range,
    "slice": slice,
    "dict_keys": lambda items: dict.fromkeys(items).keys(),
    "dict_values": lambda items: dict(enumerate(items)).values(),
    "dict_items": lambda items: dict(items).items(),
    "ellipsis": lambda: ...,
    "NotImplementedType": lambda: NotImplemented,
    "type": _named_type,
    "module": _module,
    "plain": lambda value: value,
    "array": _array,
    "scalar": lambda dtype, data: _array(dtype, (1,), data)[0],
    "objects": _objects,
}
