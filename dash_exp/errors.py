"""Errors a user can cause: what, got, allowed, nearest name, next step; all at once; exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing the user has to change. `where` is a config key, or `file:line`."""

    where: str
    what: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + (f"\n    {self.hint}" if self.hint else "")


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
