"""How values travel between two processes: the tests, and the program that is tested.

Plain data are sent by value: None, numbers, text, bytes, the built-in collections, and the common kinds of
the standard library and numpy below. Any other object stays where it is and is sent as a handle, a number.
The reader builds only kinds that it names itself, so nothing it receives has an `__eq__` of its own.
Subclasses arrive as what they derive from; exceptions and their classes as names, arguments and a handle.
"""

from __future__ import annotations

import array
import builtins
import collections
import contextlib
import datetime
import decimal
import fractions
import functools
import io
import pathlib
import pickle
import pickletools
import re
import socket
import struct
import sys
import types
import uuid
from collections.abc import Callable, Mapping
from typing import Any

MAX_BYTES = 2**29
"""The longest message that is read: 512 MiB."""

TESTS = "<tests>"
"""`__name__` of the tests: what they define is not sent as the kind it derives from."""

_BUILT_IN = (bool, bytes, complex, dict, float, frozenset, int, list, set, str, tuple)
_COLLECTIONS = (collections.Counter, collections.OrderedDict, collections.defaultdict, collections.deque)
_DATES = (datetime.date, datetime.datetime, datetime.time, datetime.timedelta)
_PLAIN_TYPES: Mapping[str, type] = {
    kind.__name__: kind for kind in (*_BUILT_IN, *_COLLECTIONS, decimal.Decimal, fractions.Fraction, *_DATES)
}
_NAMED_TYPES: Mapping[str, type] = {
    **_PLAIN_TYPES,
    **{n: k for n, k in vars(builtins).items() if isinstance(k, type) and issubclass(k, BaseException)},
}
_PATHS = {
    kind.__name__: kind for kind in (pathlib.PurePosixPath, pathlib.PureWindowsPath, type(pathlib.Path()))
}
_MAX_ERROR_CHARS = 2_000
_MAX_KINDS = 50
_DEPTH = 4_000
"""Of nested lists and the like; each takes a frame of C."""
_NUMPY_KINDS = "biufcSUmM"
_OPCODE_NAMES = """
PROTO FRAME STOP MARK POP POP_MARK MEMOIZE BINGET LONG_BINGET STACK_GLOBAL REDUCE NONE NEWTRUE NEWFALSE
BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT SHORT_BINUNICODE BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES
BINBYTES8 BYTEARRAY8 EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT SETITEM
SETITEMS EMPTY_SET ADDITEMS FROZENSET
"""
_OPCODES = frozenset(_OPCODE_NAMES.split())
"""What `encode` writes. Not BUILD, say: it could give a class that was read an `__eq__` of the program's."""
_HEAD = struct.Struct("<Q")

ToHandle = Callable[[Any], int | str]
FromHandle = Callable[..., Any]
"""Of a handle, and of what describes an exception or a class of exceptions."""


class ChannelClosedError(Exception):
    """The other side has gone, or sent something that is no message."""


class Channel:
    """One end of a stream socket between the two processes: a message is its length, then a pickle.
    `trusting`: the other side runs no untrusted program, so its messages are not checked."""

    def __init__(
        self, end: socket.socket, to_handle: ToHandle, from_handle: FromHandle, trusting: bool = False
    ):
        self._end = end
        self._to_handle = to_handle
        self._from_handle = from_handle
        self._trusting = trusting

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
            return decode(data, self._from_handle, self._trusting)
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
    limit = sys.getrecursionlimit()
    if limit < _DEPTH:
        sys.setrecursionlimit(_DEPTH)
    try:
        _Writer(out, to_handle).dump(value)
    finally:
        if limit < _DEPTH:
            sys.setrecursionlimit(limit)
    return out.getvalue()


def decode(data: bytes, from_handle: FromHandle, trusting: bool = False) -> Any:
    """The value again. Unless `trusting`, raises some exception for bytes that `encode` cannot have made."""
    return _Reader(data, from_handle, trusting).load()


def build(*described: Any) -> Any:
    """In a message: the reader's own function that makes a value."""
    raise TypeError("only a reader builds values")


class _Writer(pickle.Pickler):
    """The C code writes plain data by itself; only what it does not know comes here."""

    def __init__(self, out: io.BytesIO, to_handle: ToHandle):
        super().__init__(out, protocol=5)
        self._to_handle = to_handle

    def reducer_override(self, value: Any) -> Any:
        if value is build:
            return NotImplemented
        if type(value) in _WRITERS:
            return build, (type(value).__name__, *_WRITERS[type(value)](value))
        return build, (self._describe_own(value) or ("handle", self._to_handle(value)))

    def _describe_own(self, value: Any) -> tuple[Any, ...] | None:
        if isinstance(value, BaseException):
            known = type(value).__module__ == "builtins"  # no handle, which would keep its frames alive
            return ("error", -1 if known else self._to_handle(value), *describe_error(value))
        if isinstance(value, type) and issubclass(value, BaseException) and not _is_named(value):
            return ("error", self._to_handle(value), error_names(value))
        fields = getattr(type(value), "_fields", None)
        if isinstance(value, tuple) and type(fields) is tuple and type(value).__base__ is tuple:
            return ("namedtuple", type(value).__name__, fields, tuple(value))
        if type(value).__module__ == TESTS and not isinstance(value, int):
            return None
        return _describe_other(value)


def _describe_other(value: Any) -> tuple[Any, ...] | None:
    numpy: Any = sys.modules.get("numpy")
    if isinstance(value, type):
        return ("type", value.__name__) if _is_named(value) else None
    if isinstance(value, types.ModuleType):
        return ("module", value.__name__)
    if numpy is not None and isinstance(value, numpy.generic) and value.dtype.kind in _NUMPY_KINDS:
        return ("scalar", value.dtype.str, value.tobytes())
    if numpy is not None and isinstance(value, numpy.ndarray):
        if value.dtype.kind in _NUMPY_KINDS:
            return ("ndarray", value.dtype.str, value.shape, value.tobytes())
        return ("objects", value.shape, value.ravel().tolist()) if value.dtype.kind == "O" else None
    if isinstance(value, datetime.datetime | datetime.time):
        moment = "datetime" if isinstance(value, datetime.datetime) else "time"
        zone = _describe_zone(value.tzinfo)
        return zone and (moment, value.replace(tzinfo=None).isoformat(), zone, value.fold)
    if type(value) in _PATHS.values():
        return ("path", type(value).__name__, str(value))
    for base, convert in _BASES.items():
        if isinstance(value, base):
            return ("plain", convert(value))
    return None


def _is_named(kind: type) -> bool:
    return _NAMED_TYPES.get(kind.__name__) is kind


def _describe_zone(zone: datetime.tzinfo | None) -> tuple[Any, ...] | None:
    """None for zones that no other process could know."""
    if zone is None:
        return ("none",)
    if type(zone) is datetime.timezone:
        return ("offset", zone.utcoffset(None), zone.tzname(None))
    key = getattr(zone, "key", None)
    return ("key", key) if type(zone).__module__ == "zoneinfo" and type(key) is str else None


def error_names(kind: type) -> tuple[str, ...]:
    """The class and those it derives from, each after its module; built-in ones are `builtins.X`."""
    return tuple(f"{k.__module__}.{k.__qualname__}" for k in kind.__mro__ if issubclass(k, BaseException))


def describe_error(error: BaseException) -> tuple[tuple[str, ...], tuple[Any, ...], str]:
    """Names of its classes, its arguments where they are short and plain, and its message."""
    try:
        message = str(error)[:_MAX_ERROR_CHARS]
    except BaseException:  # noqa: BLE001 (its __str__ may be the program's)
        message = ""
    arguments = vars(BaseException)["args"].__get__(error)  # `args` itself may be the program's
    if isinstance(error, OSError):
        arguments = vars(OSError)["__reduce__"](error)[1]  # with the file's name
    return error_names(type(error)), arguments if _is_short(arguments) else (message,), message


def _is_short(values: tuple[Any, ...], depth: int = 2) -> bool:
    return len(values) <= 10 and all(
        (type(v) in (str, bytes) and len(v) <= _MAX_ERROR_CHARS)
        or (type(v) is int and v.bit_length() <= _MAX_ERROR_CHARS)
        or type(v) in (float, bool, type(None))
        or (type(v) is tuple and depth > 0 and _is_short(v, depth - 1))
        for v in values
    )


def plain_error(names: tuple[str, ...], arguments: tuple[Any, ...], message: str) -> Exception:
    """The first built-in exception among the names, that can be made of these arguments."""
    for name in names[:_MAX_KINDS]:
        module, _, short = str(name).rpartition(".")
        kind = _NAMED_TYPES.get(short)
        if module != "builtins" or kind is None or not issubclass(kind, Exception):
            continue
        with contextlib.suppress(Exception):  # some need other arguments
            return kind(*arguments)
        with contextlib.suppress(Exception):
            return kind(message)
    name = str(names[0]).rpartition(".")[2] if names else "exception"
    return RuntimeError(f"{name}: {message}")


_BASES: Mapping[type, Callable[[Any], Any]] = {
    int: int.__int__,
    float: float.__float__,
    str: str.__str__,
    **{kind: kind for kind in (bytes, bytearray, list, tuple, dict, set, frozenset)},
}
"""How a subclass becomes what it derives from."""

_WRITERS: Mapping[type, Callable[[Any], tuple[Any, ...]]] = {
    complex: lambda v: (v.real, v.imag),
    decimal.Decimal: lambda v: (str(v),),
    fractions.Fraction: lambda v: (v.numerator, v.denominator),
    datetime.date: lambda v: (v.year, v.month, v.day),
    datetime.timedelta: lambda v: (v.days, v.seconds, v.microseconds),
    collections.OrderedDict: lambda v: (list(v.items()),),
    collections.deque: lambda v: (list(v), v.maxlen),
    collections.defaultdict: lambda v: (dict(v), _factory_name(v)),
    collections.ChainMap: lambda v: (v.maps,),
    memoryview: lambda v: (v.tobytes(),),
    array.array: lambda v: (v.typecode, v.tolist()),
    uuid.UUID: lambda v: (v.int,),
    re.Pattern: lambda v: (v.pattern, v.flags),
    **dict.fromkeys((range, slice), lambda v: (v.start, v.stop, v.step)),
    **dict.fromkeys((collections.Counter, types.MappingProxyType), lambda v: (dict(v),)),
    **dict.fromkeys(map(type, ({}.keys(), {}.values(), {}.items())), lambda v: (list(v),)),
    **dict.fromkeys(map(type, (..., NotImplemented)), lambda v: ()),
}


def _factory_name(value: Any) -> str:
    factory = value.default_factory
    return factory.__name__ if isinstance(factory, type) and _is_named(factory) else ""


class _Reader(pickle.Unpickler):
    def __init__(self, data: bytes, from_handle: FromHandle, trusting: bool):
        super().__init__(io.BytesIO(data))
        self._unchecked = None if trusting else data
        self._from_handle = from_handle

    def find_class(self, module: str, name: str) -> Any:
        """Until the first call the message holds only plain data, with which no opcode can do harm."""
        if (module, name) != (__name__, build.__name__):
            raise pickle.UnpicklingError(f"{module}.{name} is not plain data")
        if self._unchecked is not None:
            strange = {code.name for code, _, _ in pickletools.genops(self._unchecked)}.difference(_OPCODES)
            if strange:
                raise pickle.UnpicklingError(f"{min(strange)} is in no message")
            self._unchecked = None
        return self._build

    def _build(self, kind: str, *rest: Any) -> Any:
        return self._from_handle(*rest) if kind in ("handle", "error") else _READERS[kind](*rest)


def _moment(kind: Any, text: str, zone: tuple[Any, ...], fold: int) -> Any:
    return kind.fromisoformat(text).replace(tzinfo=_zone(*zone), fold=fold)


def _zone(kind: str, *rest: Any) -> datetime.tzinfo | None:
    if kind == "offset":
        offset, name = rest
        plain = datetime.timezone(offset)
        return plain if plain.tzname(None) == name else datetime.timezone(offset, name)
    if kind == "key":
        import zoneinfo

        return zoneinfo.ZoneInfo(*rest)
    return None


@functools.lru_cache(maxsize=64)
def _tuple_of(name: str, fields: tuple[str, ...]) -> Any:
    if type(name) is not str or not all(type(field) is str for field in fields):
        raise ValueError(name)
    return collections.namedtuple(name, fields, module="program")  # type: ignore[misc]


def _namedtuple(name: str, fields: tuple[str, ...], items: tuple[Any, ...]) -> Any:
    try:
        return _tuple_of(name, fields)(*items)
    except (ValueError, TypeError):  # names such as `_1`
        return tuple(items)


def _defaultdict(items: dict[Any, Any], factory: str) -> Any:
    return collections.defaultdict(_PLAIN_TYPES[factory], items) if factory in _PLAIN_TYPES else items


class ModuleName(str):
    """A module is sent as its name."""

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
    "datetime": lambda *parts: _moment(datetime.datetime, *parts),
    "time": lambda *parts: _moment(datetime.time, *parts),
    "timedelta": datetime.timedelta,
    "Counter": lambda items: collections.Counter(dict(items)),
    "OrderedDict": collections.OrderedDict,
    "deque": collections.deque,
    "range": range,
    "slice": slice,
    "dict_keys": lambda items: dict.fromkeys(items).keys(),
    "dict_values": lambda items: dict(enumerate(items)).values(),
    "dict_items": lambda items: dict(items).items(),
    "defaultdict": _defaultdict,
    "ChainMap": lambda maps: collections.ChainMap(*map(dict, maps)),
    "mappingproxy": lambda items: types.MappingProxyType(dict(items)),
    "memoryview": lambda data: memoryview(bytes(data)),
    "array": lambda typecode, items: array.array(typecode, items),
    "UUID": lambda number: uuid.UUID(int=number),
    "Pattern": lambda pattern, flags: re.compile(pattern, int(flags) & ~re.DEBUG),
    "path": lambda name, text: _PATHS[name](str(text)),
    "namedtuple": _namedtuple,
    "ellipsis": lambda: ...,
    "NotImplementedType": lambda: NotImplemented,
    "type": lambda name: _NAMED_TYPES[str(name)],
    "module": lambda name: ModuleName(str(name)),
    "plain": lambda value: value,
    "ndarray": _array,
    "scalar": lambda dtype, data: _array(dtype, (1,), data)[0],
    "objects": _objects,
}
