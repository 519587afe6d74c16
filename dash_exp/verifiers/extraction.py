"""Finds the answer inside a completion: named modes, each linear in the length of the text."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Mapping
from types import MappingProxyType

MAX_CANDIDATE_CHARS = 2_000
"""A candidate is cut to this length: no true answer is near it."""

_TOKEN = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])|\\.|[{}]", re.DOTALL)
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
_BARE = re.compile(r"[^\s${}\\]{1,64}")
_ANSWER_PHRASE = re.compile(r"answer(?:\s{0,3}(?:is|are|to|:|=)){1,3}\s{0,3}:?", re.IGNORECASE)
_MATH = re.compile(r"\$\$([^$]+)\$\$|\$([^$\n]+)\$|\\\(((?:[^\\]|\\[^()])+)\\\)")
_DISPLAY = re.compile(r"\\\[((?:[^\\]|\\[^\[\]])+)\\\]")
_NUMBER = re.compile(
    r"(?:(?<![\w)\]}])[-−]\s?)?\$?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3}(?![\w.]))?"
    r"(?:\s?/\s?\d+)?(?:\s?\\?%)?"
)
_FILLER = re.compile(
    r"(?:(?:therefore|thus|simply|just|given by|equal to|exactly|about|approximately)[\s,:]+){0,3}",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n")


def last_boxed(text: str) -> str | None:
    r"""Content of the last closed `\boxed{...}` or `\fbox{...}`, or what follows a bare `\boxed`.

    One pass with a stack of open braces: a box inside a box belongs to the outer one, and a box
    that never closes is no box.
    """
    first = _BOX.search(text)
    if first is None:
        return None
    stack: list[int] = []  # start of the content for a box, -1 for any other brace
    found: tuple[int, int] | None = None
    pending = -1  # where a box's brace is expected
    for token in _TOKEN.finditer(text, first.start()):
        symbol = token.group()
        if symbol == "{":
            is_box = pending >= 0 and not text[pending : token.start()].strip()
            stack.append(token.end() if is_box else -1)
        elif symbol == "}":
            start = stack.pop() if stack else -1
            if start >= 0:
                found = (start, token.start())
        pending = token.end() if symbol in ("\\boxed", "\\fbox") else -1
        if pending >= 0:
            bare = _bare_box(text, pending)
            found = bare or found
    if found is None:
        return None
    return _unbox(text[found[0] : min(found[1], _limit(found[0]))]) or None


def _bare_box(text: str, start: int) -> tuple[int, int] | None:
    r"""Bounds of the word after `\boxed` when no brace follows (`\boxed 12`)."""
    while start < len(text) and text[start] in " \t":
        start += 1
    word = _BARE.match(text, start)
    kept = "" if word is None else word.group().rstrip(".,;:")
    return (start, start + len(kept)) if kept else None


def _limit(start: int) -> int:
    return start + MAX_CANDIDATE_CHARS


def _unbox(content: str) -> str:
    """Boxes inside a box become plain groups."""
    return _BOX.sub("", content).strip()


def last_number(text: str) -> str | None:
    """The last number in the text, such as `1,234.50`, `-3` or `3/4`, without a dollar sign."""
    last = _last(_NUMBER, text)
    return None if last is None else _tidy(last.group())


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    found = deque(pattern.finditer(text), maxlen=1)
    return found[0] if found else None


def _tidy(number: str) -> str:
    kept = number.replace("$", "").replace("−", "-").replace(" ", "").lower()
    return kept[:MAX_CANDIDATE_CHARS]


def after_hashes(text: str) -> str | None:
    """The rest of the line after the last `####`, as GSM8K writes its answers."""
    at = text.rfind("####")
    if at < 0:
        return None
    line = text[at + 4 : _limit(at)].lstrip("#").strip().split("\n", 1)[0].strip()
    return line or None


def boxed_or_last(text: str) -> str | None:
    """The last box; else the number after `####`; else what follows "the answer is"; else the
    last formula or number, whichever ends later."""
    for find in (last_boxed, after_hashes, _after_answer_phrase):
        found = find(text)
        if found:
            return found
    return _last_expression(text)


def _after_answer_phrase(text: str) -> str | None:
    last = _last(_ANSWER_PHRASE, text)
    if last is None:
        return None
    rest = text[last.end() : _limit(last.end())].strip().strip("*").strip()
    maths = _MATH.match(rest) or _DISPLAY.match(rest)
    if maths is not None:
        return _formula(maths)
    end = _SENTENCE_END.search(rest)
    sentence = (rest[: end.start()] if end else rest).strip().strip("*").strip()
    sentence = _FILLER.sub("", sentence, count=1)
    formula = _MATH.search(sentence)
    number = _NUMBER.search(sentence)
    if formula is not None:
        return _formula(formula)
    if number is not None and _is_prose(sentence):
        return _tidy(number.group())
    return sentence or None


def _is_prose(sentence: str) -> bool:
    """Whether a sentence is words around a number rather than one formula."""
    return re.search(r"[A-Za-z]{2,}\s+[A-Za-z]{2,}", sentence) is not None


def _formula(match: re.Match[str]) -> str:
    content = next(group for group in match.groups() if group is not None)
    return content.strip()[:MAX_CANDIDATE_CHARS]


def _last_expression(text: str) -> str | None:
    formulas = [found for found in (_last(_MATH, text), _last(_DISPLAY, text)) if found]
    formula = max(formulas, key=lambda found: found.end(), default=None)
    number = _last(_NUMBER, text)
    if formula is not None and (number is None or number.end() <= formula.end()):
        return _formula(formula)
    return None if number is None else _tidy(number.group())


def whole(text: str) -> str | None:
    """The text itself is the answer."""
    return text.strip()[:MAX_CANDIDATE_CHARS] or None


EXTRACTIONS: Mapping[str, Callable[[str], str | None]] = MappingProxyType(
    {
        "boxed": last_boxed,
        "boxed_or_last": boxed_or_last,
        "last_number": last_number,
        "hash": after_hashes,
        "whole": whole,
    }
)


def extract(text: str, mode: str) -> str | None:
    """The candidate answer in `text`, or None. `mode` is a key of `EXTRACTIONS`."""
    if mode not in EXTRACTIONS:
        raise ValueError(f"extraction {mode!r} is not one of {', '.join(EXTRACTIONS)}")
    return EXTRACTIONS[mode](text)
