"""Finds the answer inside a completion: named modes, each linear in the length of the text."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Mapping

MAX_CANDIDATE_CHARS = 2_000
"""A candidate is cut to this length: no true answer is near it."""

_MAX_JOINED = 16
_MAX_GAP = 40
"""Characters between two members of a list of formulas."""

_TOKEN = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])|\\.|[{}]", re.DOTALL)
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
_BARE = re.compile(r"[^\s${}\\]{1,64}")
_ANSWER_PHRASE = re.compile(
    r"(?:answers?|(?:correct|right)\s(?:option|choice))\*{0,2}(?:\s{0,3}(?:is|are|to|:|=|：)){1,3}\s{0,3}:?",
    re.IGNORECASE,
)
_MATH = re.compile(r"\$\$([^$]+)\$\$|\$([^$\n]+)\$(?!\d)|\\\(((?:[^\\]|\\[^()])+)\\\)")
_DISPLAY = re.compile(r"\\\[((?:[^\\]|\\[^\[\]])+)\\\]")
_NUMBER = re.compile(
    r"(?:(?<![\w)\]}])[-−]\s?)?\$?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3}(?![\w.]))?"
    r"(?:\s?/\s?\d+)?(?:\s?\\?%)?"
)
_FILLER = re.compile(
    r"(?:(?:therefore|thus|simply|just|given by|equal to|exactly|about|approximately)[\s,:]+){0,3}",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n|。|,?\s+(?:because|since)\b|,\s+(?:as|which|where|so)\b")
_JOINT = re.compile(r"\s*(?:[,;，、]\s*)?(?:(?:and|or|和|或)\b)?\s*")
_JOINT_NUMBERS = re.compile(r"\s*,?\s*\bor\s+(?:[A-Za-z]{1,12}\s+)?(?:[A-Za-z]\s?=\s?)?")
_SAME_NAME = re.compile(r"\s*,?\s*(?:\band\s+)?([A-Za-z])\s?=\s?")
_NAMED = re.compile(r"\s*([A-Za-z])(?:_\S{1,4})?\s*=")
_JOINT_WORD = re.compile(r"\s*(?:and|or|和|或)\b")
_PUNCTUATION = re.compile(r"\s*(?:[.,;:!?。，]|$|\n)")
_PROSE = re.compile(r"[A-Za-z]{2,}\s+[A-Za-z]{2,}")
"""Words around a number rather than one formula."""
_HASHED_NUMBER = re.compile(rf"(?:{_NUMBER.pattern})(?:\s[A-Za-z]{{1,20}})?\.?")


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
            found = _bare_box(text, pending) or found
    if found is None:
        return None
    content = text[found[0] : min(found[1], _limit(found[0]))]
    return _BOX.sub("", content).strip() or None  # boxes inside a box become plain groups


def _bare_box(text: str, start: int) -> tuple[int, int] | None:
    r"""Bounds of the word after `\boxed` when no brace follows (`\boxed 12`)."""
    while start < len(text) and text[start] in " \t":
        start += 1
    word = _BARE.match(text, start)
    kept = "" if word is None else word.group().rstrip(".,;:")
    return (start, start + len(kept)) if kept else None


def _limit(start: int) -> int:
    return start + MAX_CANDIDATE_CHARS


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
    last formula or number, whichever ends later. Alternatives (`$x = 3$ or $x = -2$`) are one list."""
    for find in (last_boxed, _hashed, _after_answer_phrase):
        found = find(text)
        if found:
            return found
    return _last_expression(text)


def _hashed(text: str) -> str | None:
    """What follows the last `####`, unless it is a heading."""
    line = after_hashes(text)
    if line is None or _HASHED_NUMBER.fullmatch(line):
        return line
    below = text[text.rfind("####") + 4 :].lstrip("#").strip()
    return None if "\n" in below else line


def _after_answer_phrase(text: str) -> str | None:
    last = _last(_ANSWER_PHRASE, text)
    if last is None:
        return None
    rest = text[last.end() : _limit(last.end())].strip().strip("*").strip()
    maths = _MATH.match(rest) or _DISPLAY.match(rest)
    if maths is not None:
        return _with_joined(maths, rest)
    end = _SENTENCE_END.search(rest)
    sentence = (rest[: end.start()] if end else rest).strip().strip("*").strip()
    sentence = _FILLER.sub("", sentence, count=1)
    if (formula := _MATH.search(sentence)) is not None:
        return _with_joined(formula, sentence)
    if (number := _NUMBER.search(sentence)) is not None and _PROSE.search(sentence):
        return _with_alternatives(number, sentence)
    return sentence or None


def _formula(match: re.Match[str]) -> str:
    content = next(group for group in match.groups() if group is not None)
    return content.strip()[:MAX_CANDIDATE_CHARS]


def _with_joined(first: re.Match[str], text: str) -> str:
    """A formula and those that a comma, `and` or `or` joins to it. One after which the sentence goes
    on begins another clause, unless it is an alternative."""
    found, end = [_formula(first)], first.end()
    while len(found) < _MAX_JOINED:
        joint = _JOINT.match(text, end)
        following = _MATH.match(text, joint.end()) if joint and joint.group().strip() else None
        if joint is None or following is None:
            break
        goes_on = not (_PUNCTUATION.match(text, following.end()) or _JOINT_WORD.match(text, following.end()))
        if goes_on and not _is_or(joint.group()):
            break
        found.append(_formula(following))
        end = following.end()
    return ", ".join(found)[:MAX_CANDIDATE_CHARS]


def _with_alternatives(number: re.Match[str], text: str) -> str:
    found, end = [_tidy(number.group())], number.end()
    while len(found) < _MAX_JOINED:
        joint = _JOINT_NUMBERS.match(text, end)
        following = _NUMBER.match(text, joint.end()) if joint else None
        if following is None:
            break
        found.append(_tidy(following.group()))
        end = following.end()
    return ", ".join(found)


def _is_or(joint: str) -> bool:
    return re.search(r"or|或", joint) is not None


def _last_expression(text: str) -> str | None:
    formulas = _last_run(_MATH, text, _one_list)
    display = _last(_DISPLAY, text)
    if display and not (formulas and formulas[-1].end() >= display.end()):
        formulas = [display]
    numbers = _last_run(_NUMBER, text, _alternatives)
    if formulas and not (numbers and numbers[-1].end() > formulas[-1].end()):
        return ", ".join(map(_formula, formulas))[:MAX_CANDIDATE_CHARS]
    return ", ".join(_tidy(number.group()) for number in numbers)[:MAX_CANDIDATE_CHARS] or None


def _last_run(
    pattern: re.Pattern[str], text: str, joined: Callable[[re.Match[str], re.Match[str], str], bool]
) -> list[re.Match[str]]:
    """The last match, with those before it that belong to it."""
    run: deque[re.Match[str]] = deque(maxlen=_MAX_JOINED)
    for match in pattern.finditer(text):
        gap = match.start() - run[-1].end() if run else _MAX_GAP
        if gap >= _MAX_GAP or not joined(run[-1], match, text):
            run.clear()
        run.append(match)
    return list(run)


def _one_list(first: re.Match[str], second: re.Match[str], text: str) -> bool:
    """Whether two formulas are alternatives: joined by `or`, or values of one name."""
    gap = text[first.end() : second.start()]
    if not gap.strip() or not _JOINT.fullmatch(gap):
        return False
    names = [_NAMED.match(_formula(formula)) for formula in (first, second)]
    same = names[0] and names[1] and names[0].group(1) == names[1].group(1)
    return bool(same) or _is_or(gap)


def _alternatives(first: re.Match[str], second: re.Match[str], text: str) -> bool:
    """Whether two numbers are: `3 or 4`, `x = 3, x = 4`."""
    gap = text[first.end() : second.start()]
    named = _SAME_NAME.fullmatch(gap)
    before = text[max(0, first.start() - 4) : first.start()]
    same = named and re.search(rf"(?<![A-Za-z]){named.group(1)}\s?=\s?$", before)
    return bool(same) or _JOINT_NUMBERS.fullmatch(gap) is not None


def whole(text: str) -> str | None:
    """The text itself is the answer."""
    return text.strip()[:MAX_CANDIDATE_CHARS] or None


EXTRACTORS: Mapping[str, Callable[[str], str | None]] = {
    "boxed": last_boxed,
    "boxed_or_last": boxed_or_last,
    "last_number": last_number,
    "hash": after_hashes,
    "whole": whole,
}


def extract(text: str, mode: str) -> str | None:
    """The candidate answer in `text`, or None. `mode` is a key of `EXTRACTORS`."""
    if mode not in EXTRACTORS:
        raise ValueError(f"extraction {mode!r} is not one of {', '.join(EXTRACTORS)}")
    return EXTRACTORS[mode](text)
