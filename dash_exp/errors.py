"""Errors that the user can fix (what, got, allowed, nearest name, next step), and how a command ends."""

from __future__ import annotations

import difflib
import errno
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from dash_exp import _exit_quietly
from dash_exp.signals import Interrupted
from dash_exp.text import hide_credentials, printable


class ExitCode(IntEnum):
    """Exit codes of every command."""

    OK = 0
    FAILED = 1
    USER_ERROR = 2
    BLOCKED = 3
    """The cell waits for its partner."""
    BUSY = 4
    """Another process is running the cell; nothing was done."""
    SIGNALLED = 128
    """128 + n: ended by signal n."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing the user has to change. `where` is a config key, or `file:line`."""

    where: str
    what: str
    hint: str = ""

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" + (f"\n    {self.hint}" if self.hint else "")
        return printable(hide_credentials(text))


class UserError(Exception):
    """Raised with every fault found, never with the first only. Commands print it and exit 2."""

    def __init__(self, faults: Sequence[Fault] | Fault, consequence: str = "nothing was started"):
        self.faults = [faults] if isinstance(faults, Fault) else list(faults)
        self.consequence = consequence
        super().__init__(str(self))

    def __str__(self) -> str:
        count = len(self.faults)
        head = "1 problem" if count == 1 else f"{count} problems"
        return "\n".join([f"dash_exp: {head}, {self.consequence}", *(f"  {f}" for f in self.faults)])


def nearest(name: str, allowed: Iterable[str]) -> str:
    """A hint naming the closest allowed name, or all of them when none is close."""
    options = sorted(allowed)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.55)
    if close:
        return f"did you mean {close[0]!r}? (allowed: {', '.join(options)})"
    return f"allowed: {', '.join(options)}"


def print_error(text: str) -> None:
    """Print an error for the user, on stderr."""
    print(printable(text), file=sys.stderr, flush=True)


def run_command(
    command: Callable[[Sequence[str]], int], arguments: Sequence[str], usage: str = "", interrupted: str = ""
) -> int:
    """Run a command with these arguments and return its exit code, whichever way it ends.

    `usage` is printed for -h and --help; `interrupted` says what happens next after a signal.
    """
    if usage and any(text in ("-h", "--help") for text in arguments):
        print(usage)
        return ExitCode.OK
    try:
        if signal.getsignal(signal.SIGINT) is _exit_quietly:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return command(arguments)
    except UserError as error:
        print_error(str(error))
        return ExitCode.USER_ERROR
    except BrokenPipeError:  # the reader (head, say) has closed the pipe
        sys.stderr.close()
        return ExitCode.OK
    except (Interrupted, KeyboardInterrupt) as error:
        number = error.number if isinstance(error, Interrupted) else int(signal.SIGINT)
        if interrupted:
            print_error(f"Interrupted by {signal.Signals(number).name}; {interrupted}")
        return ExitCode.SIGNALLED + number


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


def disk_fault(error: OSError, root: Path) -> Fault:
    """What the user can do about an error of the disk below the outputs, or of another file."""
    place = Path(error.filename or root)
    hint = "set run.dir=<folder>"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Fault("run.dir", f"no space left on the disk of {place}", f"free some, or {hint}")
    if not place.absolute().is_relative_to(root.absolute()):
        return Fault(str(place), f"cannot be used: {error.strerror or error}")
    return Fault("run.dir", f"cannot write {place}: {error.strerror or error}", hint)


@contextmanager
def disk_errors_below(root: Path, consequence: str = "nothing was started") -> Iterator[None]:
    """Raise UserError for an OSError that occurs inside; `root` is the folder of the outputs."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(disk_fault(error, root), consequence) from error


@contextmanager
def as_disk_errors(path: Path) -> Iterator[None]:
    """Raise OSError for errors of the disk that a library reports as another one: safetensors and tokenizers
    have types of their own, with the system's number in their text."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # tokenizers raises a plain Exception
        number = re.search(r"os error (\d+)|\(os (\d+)\)|code: (\d+)", str(error))
        if number is None:
            raise
        code = int(number[number.lastindex or 1])
        raise OSError(code, os.strerror(code), str(path)) from error
