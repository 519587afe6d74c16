"""The program inside a completion. Pure functions, linear in the length of the text."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dash_exp.verifiers.types import CodeGold

_BYTE_ORDER_MARK = "\ufeff"
_PYTHON = ("python", "py", "python3")
_FUTURE = re.compile(r"^from[ \t]+__future__[ \t]+import\b", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class _Block:
    language: str
    lines: tuple[str, ...]
    closed: bool

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


def find_program(text: str) -> str:
    """The last Python block of a completion; else its last block; else all of it.

    Closed blocks are preferred to one that the end of the text cuts off, which cannot run. Leading white
    space is kept: a function's body needs it.
    """
    text = text.removeprefix(_BYTE_ORDER_MARK)
    return _find(text).removeprefix(_BYTE_ORDER_MARK)


def _find(text: str) -> str:
    blocks = [block for block in _blocks(text) if block.text.strip()]
    python = [block for block in blocks if block.language in _PYTHON]
    for candidates in (python, blocks):
        closed = [block for block in candidates if block.closed]
        if candidates:
            return (closed or candidates)[-1].text
    return "" if blocks or _only_fences(text) else text


def _blocks(text: str) -> list[_Block]:
    found: list[_Block] = []
    lines: list[str] = []
    fence, language, indent = "", "", ""
    for line in text.replace("\r\n", "\n").split("\n"):
        match = _fence(line)
        if fence and match and len(match[0]) >= len(fence) and line.strip() == match[0]:
            found.append(_Block(language, tuple(lines), True))
            fence = ""
        elif fence:
            lines.append(line.removeprefix(indent))  # a block inside a list item is indented
        elif match:
            fence, language = match[0], match[1].lower().strip("{}.:")
            indent = line[: len(line) - len(line.lstrip())]
            lines = []
    if fence:
        found.append(_Block(language, tuple(lines), False))
    return found


def _fence(line: str) -> tuple[str, str] | None:
    """The backticks that open or close a block, and the word after them. A regular expression would try
    every way to divide a line."""
    begins = line.lstrip(" \t")
    rest = begins.lstrip("`")
    ticks = len(begins) - len(rest)
    if ticks < 3 or "`" in rest:
        return None
    rest = rest.lstrip(" \t")
    return "`" * ticks, rest.split(maxsplit=1)[0] if rest and not rest[0].isspace() else ""


def _only_fences(text: str) -> bool:
    return all(_fence(line) or not line.strip() for line in text.splitlines())


def defines(program: str, name: str) -> bool:
    """Whether the program defines or assigns `name` at top level. It is not parsed, which might crash the
    caller's process."""
    name = re.escape(name)
    pattern = rf"^(?:(?:(?:async[ \t]+)?def|class)[ \t]+{name}\b|{name}[ \t]*(?::[^=\n]*)?=(?!=))"
    return re.search(pattern, program, re.MULTILINE) is not None


def complete(program: str, gold: CodeGold) -> str:
    """The program with what the prompt had begun.

    A program that does not define the entry point is the function's body and gets the entire prefix.
    One that does gets only what stands above the entry point in the prefix (imports and helpers).
    """
    if not gold.prefix:
        return program
    if not gold.entry_point or not defines(program, gold.entry_point):
        return gold.prefix + program
    if _FUTURE.search(program):  # has to stay first
        return program
    start = re.search(
        rf"^(?:async[ \t]+)?def[ \t]+{re.escape(gold.entry_point)}\b", gold.prefix, re.MULTILINE
    )
    return program if start is None else gold.prefix[: start.start()] + program
