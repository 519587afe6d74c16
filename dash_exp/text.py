"""How numbers, durations and paths are written for a person, and the ends of printed texts."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TEXT_BYTES = 16_000
"""Read from the end of a text."""
CONTROL = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # colours, the cursor, the screen
    r"|(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x9c\n]*(?:\x07|\x1b\\|\x9c)?"  # a title, a link
    r"|\x1b[ -/]*[0-~]?"
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]"
)
"""What changes a terminal instead of being shown: control sequences and characters, and marks that reverse
the direction of a text."""
SURROGATE = re.compile(r"[\ud800-\udfff]")


def printable(text: str) -> str:
    """A text from a record as a terminal may show it: without control characters, and fit to be encoded."""
    return SURROGATE.sub("\ufffd", CONTROL.sub("", text))


USER_IN_URL = re.compile(
    r"(?<=://)[^/?#\s]*@"  # user, password or token
    r"|(?<=://)[^/?#\s:@]*:(?!\d+(?:[/?#\s]|$))\S*@"  # a password with a slash that is not encoded
    r"|(?<!http://)(?<!https://)(?<=://)[^/?#\s:@]*:\S*@"
)
"""What stands before the @ in a URL."""
SECRET_IN_URL = re.compile(
    r"(?P<name>[?&;#][^=&;\s'\"]*(?:pass|pwd|secret|token|key|auth|sig|credential)[^=&;\s'\"]*=)"
    r"(?P<value>[^&;#\s'\"]+)",
    re.I,
)
HIDDEN = "***"
LONG = 100


def hide_credentials(text: str) -> str:
    """A text with URLs whose user, password and secret parameters are left out."""
    return SECRET_IN_URL.sub(rf"\g<name>{HIDDEN}", USER_IN_URL.sub(f"{HIDDEN}@", text))


def shorten(text: str) -> str:
    """The start of a text that is too long for a message."""
    return text if len(text) <= LONG else f"{text[:LONG]}... ({len(text)} characters)"


def format_seconds(seconds: float) -> str:
    """Seconds as 8s, 3m05s or 2h07m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def format_number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def format_accuracy(row: Mapping[str, Any]) -> str:
    """A share with its interval, or a dash for what could not be measured."""
    value, low, high = (format_number(row.get(key)) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def format_command(module: str, *arguments: str) -> str:
    """`python -m <module> <arguments>`, quoted so that it can be pasted into a shell."""
    return shlex.join(["python", "-m", module, *arguments])


def format_path(path: Path) -> str:
    """A path relative to where the user stands, if it lies below."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def end_of(path: Path, size: int) -> bytes:
    """The last `size` bytes of a file, from the start of a line on; nothing if there is no file."""
    try:
        with path.open("rb") as stream:
            start = max(0, stream.seek(0, os.SEEK_END) - size)
            stream.seek(start)
            data = stream.read()
    except OSError:
        return b""
    return data if start == 0 else data.partition(b"\n")[2] or data


def last_lines(path: Path, count: int) -> list[str]:
    """The last non-empty lines of a text, as a terminal would show them."""
    return shown_lines(end_of(path, TEXT_BYTES))[-count:] if count > 0 else []


def shown_lines(data: bytes) -> list[str]:
    """Lines without what a progress bar overwrote, without colours, and without empty ones."""
    text = data.decode("utf-8", errors="replace")
    lines = [printable(line.rstrip().rpartition("\r")[2]) for line in text.split("\n")]
    return [line for line in lines if line.strip()]
