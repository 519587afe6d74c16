"""JSON that users write, read strictly: what the standard does not allow (NaN, a key that occurs twice) and
what no record could hold (a lone surrogate, an endless number) is a fault of its line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dash_exp.errors import Fault

DIGITS = 4300
"""Python reads and prints no longer integers."""


def parse(text: str) -> Any:
    """The value of a JSON text. Raises ValueError saying what is wrong with it."""
    try:
        value = json.loads(
            text, object_pairs_hook=_object, parse_constant=_refuse, parse_int=_integer, parse_float=_float
        )
        if "\\u" in text or not text.isascii():
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    except UnicodeEncodeError as error:
        found = ascii(error.object[error.start])
        raise ValueError(f"has half a character, the lone surrogate {found}") from error
    return value


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"has the key {twice!r} twice")
    return made


def _refuse(constant: str) -> Any:
    raise ValueError(f"holds {constant}, which is not a number")


def _integer(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError(f"holds a number of {len(text):,} digits, more than {DIGITS:,}")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"holds {text[:20]}, which is too large for a number")
    return value


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | Fault]]:
    """Each line of a file that is not blank, by its number: an object, or what is wrong with the line. A
    file that cannot be read ends with its fault."""
    number = 0
    if path.exists() and not path.is_file():  # reading a pipe or a device could wait for ever
        yield 0, Fault(str(path), "is not a file")
        return
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, _parse_line(line, f"{path}:{number}")
    except UnicodeDecodeError as error:
        what = f"is not UTF-8 text: {error.reason} at byte {error.start}"
        yield number, Fault(str(path), what, "save it as UTF-8; if it is compressed, unpack it first")
    except OSError as error:
        yield number, Fault(str(path), f"cannot be read: {error.strerror}")


def _parse_line(line: str, where: str) -> dict[str, Any] | Fault:
    try:
        row = parse(line)
    except ValueError as error:
        return Fault(where, str(error))
    return row if isinstance(row, dict) else Fault(where, f"expected an object, got {type(row).__name__}")
