"""Finds the answer inside a completion: named modes, each linear in the length of the text."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Mapping

MAX_CANDIDATE_CHARS = 2_000
"""A candidate is cut to this length: no true answer is near it."""

_MAX_READ = 200_000
"""Only so many characters at the end are read, which takes about a second at worst."""
_MAX_JOINED = 16
_MAX_GAP = 40
"""Characters between two members of a list."""

_TOKEN = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])|\\.|[{}]", re.DOTALL)
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
_BARE = re.compile(r"[^\s${}\\]{1,64}")
_BOX_JOINT = re.compile(
    r"[\s$]*(?:(?:[,;，、&]|\\q?quad|\\text\s?\{[\s,]*(?:and|or)\s*\}|\band\b|\bor\b|和|或)[\s$,]*){1,3}"
    r"(?:[A-Za-z](?:_\w)?\s?=\s?)?"
)
_ANSWER_PHRASE = re.compile(
    r"(?:answers?|(?:correct|right)\s(?:option|choice))\*{0,2}(?:\s{0,3}(?:is|are|to|:|=|：)){1,3}\s{0,3}:?",
    re.IGNORECASE,
)
_MATH = re.compile(r"\$\$([^$]+)\$\$|\$([^$\n]+)\$(?!\d)|\\\(((?:[^\\]|\\[^()])+)\\\)")
_DISPLAY = re.compile(r"\\\[((?:[^\\]|\\[^\[\]])+)\\\]")
_SCALED = (
    r"(?:\s(?:and\s(?:a\s|one[\s-])?(?:half|quarter|third)|and\sthree[\s-]quarters|hundred|thousand|million|billion"
    r"|trillion|dozen|halves|thirds|quarters|fourths|fifths|tenths|percent|per\scent|squared|cubed"
    r"|(?:degrees\s)?below\szero)\b){0,2}"
)
"""Words that belong to the number in front of them."""
_SIGNED = r"(?:(?<![\w)\]}])(?<![\d)]\s)(?:[-−]\s?|(?:minus|negative)\s))?"
_PLAIN = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3}(?![\w.])|[kK]\b)?"
_NUMBER = re.compile(
    rf"{_SIGNED}\$?{_PLAIN}(?:(?:(?:\s|-|\s?and\s)\d+)?\s?/\s?\d+)?(?:\s?\\?%)?{_SCALED}", re.IGNORECASE
)
_DENIED = re.compile(
    r"\b(?:not|instead of|rather than)\s(?:equal to\s|a\s)?[$\\(]{0,2}(?:[A-Za-z]\s?=\s?)?$", re.IGNORECASE
)
_FILLER = re.compile(
    r"(?:(?:therefore|thus|simply|just|given by|equal to|exactly|about|approximately)[\s,:]+){0,3}",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(
    r"[.!?](?=\s|$)|\n|。|,?\s(?:because|since|rather than|instead of)\b"
    r"|,\s(?:as|which|where|so|(?:and\s|but\s)?not)\b"
)
_JOINT = re.compile(r"\s*(?:[,;，、]\s*)?(?:(?:and|or|和|或)\b)?\s*")
_JOINT_NUMBERS = re.compile(r"\s?,?\s?\bor\s(?:[A-Za-z]{1,12}\s)?(?:[A-Za-z]\s?=\s?)?")
_NAMED = re.compile(r"\s*([A-Za-z])(?:_\S{1,4})?\s*=")
_ENDS = re.compile(r"\s*(?:[.,;:!?。，]|$|\n|(?:and|or|和|或)\b)")
_PROSE = re.compile(r"[A-Za-z]{2,}\s+[A-Za-z]{2,}")
"""Words around a number rather than one formula."""
_HASHED_NUMBER = re.compile(rf"(?:{_NUMBER.pattern})(?:\s[A-Za-z]{{1,20}})?\.?", re.IGNORECASE)


def last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}` or `\fbox{...}` that is not empty, or what follows a bare
    `\boxed`. Boxes joined by commas, `and` or `or` are one list.

    One pass with a stack of open braces: a box inside a box belongs to the outer one, and a box
    that never closes is no box.
    """
    stack: list[tuple[int, int]] = []  # for a box where it and its content start, else -1
    boxes: deque[tuple[int, int, int, int]] = deque(maxlen=_MAX_JOINED)  # box and content: start, end
    box = pending = -1  # the last box, and where its brace is expected
    for token in _TOKEN.finditer(text):
        symbol, at = token.group(), token.start()
        if symbol == "{":
            stack.append((box, token.end()) if pending >= 0 and _blank(text, pending, at) else (-1, -1))
        elif symbol == "}" and stack:
            start, content = stack.pop()
            if start >= 0 and not _blank(text, content, at):
                while boxes and boxes[-1][0] > start:
                    boxes.pop()
                boxes.append((start, content, at, token.end()))
        pending = -1
        if symbol in ("\\boxed", "\\fbox"):
            box, pending = at, token.end()
            bare = _bare_box(text, pending)
            if bare:
                boxes.append((at, *bare, bare[1]))
    return _list_of_boxes(text, list(boxes))[:MAX_CANDIDATE_CHARS] or None


def _list_of_boxes(text: str, boxes: list[tuple[int, int, int, int]]) -> str:
    """Contents of the last box and of those that are joined to it."""
    found, following = "", -1
    for start, content, end, after in reversed(boxes):
        gap = text[after:following] if following - after < _MAX_GAP else "."
        if found and not _BOX_JOINT.fullmatch(gap):
            break
        joint = r" \text{ or } " if _is_or(gap) else ", "
        member = _BOX.sub("", text[content : min(end, content + MAX_CANDIDATE_CHARS)]).strip()
        found, following = f"{member}{joint}{found}" if found else member, start
    return found


def _blank(text: str, start: int, end: int) -> bool:
    return end - start < 1_000 and not text[start:end].strip(" \t\n~$.")


def _bare_box(text: str, start: int) -> tuple[int, int] | None:
    r"""Bounds of the word after `\boxed` when no brace follows (`\boxed 12`)."""
    while start < len(text) and text[start] in " \t":
        start += 1
    word = _BARE.match(text, start)
    kept = "" if word is None else word.group().rstrip(".,;:")
    return (start, start + len(kept)) if kept else None


def last_number(text: str) -> str | None:
    """The last number in the text, such as `1,234.50`, `-3`, `3/4`, `2 1/2` or `2 million`, without a
    dollar sign. One that is denied (`14, not 15`) counts only where there is no other."""
    last = _last(_NUMBER, text, _affirmed) or _last(_NUMBER, text)
    return None if last is None else _tidy(last)


def _affirmed(match: re.Match[str]) -> bool:
    return not _DENIED.search(match.string[max(0, match.start() - 25) : match.start()])


def _last(
    pattern: re.Pattern[str], text: str, wanted: Callable[[re.Match[str]], bool] = bool
) -> re.Match[str] | None:
    found = deque((match for match in pattern.finditer(text) if wanted(match)), maxlen=1)
    return found[0] if found else None


def _tidy(match: re.Match[str]) -> str:
    kept = match.group().replace("$", "").replace("−", "-").lower()
    kept = re.sub(r"^(?:minus|negative|-)\s", "-", kept)
    kept = re.sub(r"\s?/\s?", "/", re.sub(r"(?<=\d)(?:\s?and\s|-)(?=\d)", " ", kept))
    return re.sub(r"(?<=\d)k$", "e3", kept)[:MAX_CANDIDATE_CHARS]


def after_hashes(text: str) -> str | None:
    """The rest of the line after the last `####`, as GSM8K writes its answers."""
    at = text.rfind("####")
    if at < 0:
        return None
    line = text[at + 4 : at + MAX_CANDIDATE_CHARS].lstrip("#").strip().split("\n", 1)[0].strip()
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
    rest = text[last.end() : last.end() + MAX_CANDIDATE_CHARS].strip().strip("*").strip()
    maths = _MATH.match(rest) or _DISPLAY.match(rest)
    if maths is not None:
        return _with_joined(maths, rest)
    end = _SENTENCE_END.search(rest)
    sentence = (rest[: end.start()] if end else rest).strip().strip("*").strip()
    sentence = _FILLER.sub("", sentence, count=1)
    if (formula := _MATH.search(sentence)) is not None:
        return _with_joined(formula, sentence)
    if (number := _NUMBER.search(sentence)) is not None and _PROSE.search(sentence):
        return ", ".join(map(_tidy, _last_run(_NUMBER, sentence, _alternatives, first=number)))
    return sentence or None


def _formula(match: re.Match[str]) -> str:
    content = next(group for group in match.groups() if group is not None)
    return content.strip()[:MAX_CANDIDATE_CHARS]


def _with_joined(first: re.Match[str], text: str) -> str:
    return ", ".join(map(_formula, _last_run(_MATH, text, _continued, first=first)))[:MAX_CANDIDATE_CHARS]


def _continued(_: re.Match[str], second: re.Match[str], gap: str) -> bool:
    """Whether a comma, `and` or `or` joins a formula to the one before. One after which the sentence goes
    on begins another clause, unless it is an alternative."""
    joint = gap.strip() and _JOINT.fullmatch(gap)
    return bool(joint and (_is_or(gap) or _ENDS.match(second.string, second.end())))


def _is_or(joint: str) -> bool:
    return re.search(r"or|或", joint) is not None


def _last_expression(text: str) -> str | None:
    formulas = _last_run(_MATH, text, _one_list)
    display = _last(_DISPLAY, text, _affirmed)
    if display and not (formulas and formulas[-1].end() >= display.end()):
        formulas = [display]
    numbers = _last_run(_NUMBER, text, _alternatives)
    if formulas and not (numbers and numbers[-1].end() > formulas[-1].end()):
        return ", ".join(map(_formula, formulas))[:MAX_CANDIDATE_CHARS]
    return ", ".join(map(_tidy, numbers))[:MAX_CANDIDATE_CHARS] or last_number(text)


def _last_run(
    pattern: re.Pattern[str],
    text: str,
    joined: Callable[[re.Match[str], re.Match[str], str], bool],
    first: re.Match[str] | None = None,
) -> list[re.Match[str]]:
    """The last match that is not denied, with those before it that belong to it; with `first`, that
    match and those after it that do."""
    run: deque[re.Match[str]] = deque([first] if first else [], maxlen=_MAX_JOINED)
    for match in pattern.finditer(text, first.end() if first else 0):
        if not _affirmed(match):
            continue
        gap = match.start() - run[-1].end() if run else _MAX_GAP
        if gap >= _MAX_GAP or not joined(run[-1], match, text[run[-1].end() : match.start()]):
            if first:
                break
            run.clear()
        run.append(match)
    return list(run)


def _one_list(first: re.Match[str], second: re.Match[str], gap: str) -> bool:
    """Whether two formulas are alternatives: joined by `or`, or values of one name."""
    if not gap.strip() or not _JOINT.fullmatch(gap):
        return False
    names = [_NAMED.match(_formula(formula)) for formula in (first, second)]
    same = names[0] and names[1] and names[0].group(1) == names[1].group(1)
    return bool(same) or _is_or(gap)


def _alternatives(_: re.Match[str], __: re.Match[str], gap: str) -> bool:
    """Whether `or` joins two numbers."""
    return _JOINT_NUMBERS.fullmatch(gap) is not None


def whole(text: str) -> str | None:
    """The text itself is the answer."""
    return text.strip()[:MAX_CANDIDATE_CHARS] or None


def answer_tag(text: str) -> str | None:
    """What stands in the last `<answer>...</answer>`, stripped."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return text[start + len("<answer>") : end].strip() if start >= 0 else None


MATH_VERIFY = "math_verify"
"""In place of an extraction: the library finds the answer itself."""
EXTRACTORS: Mapping[str, Callable[[str], str | None]] = {
    "boxed": last_boxed,
    "boxed_or_last": boxed_or_last,
    "last_number": last_number,
    "hash": after_hashes,
    "whole": whole,
}
GYM_EXTRACTORS: Mapping[str, Callable[[str], str | None]] = {
    "answer_tag": lambda text: answer_tag(text) or None,
    "boxed_or_last": boxed_or_last,
    "whole": lambda text: text.strip() or None,
}
"""For reasoning-gym, whose answers have any length."""


def extract(text: str, mode: str) -> str | None:
    """The candidate answer in `text`, or None. `mode` is a key of `EXTRACTORS`."""
    if mode not in EXTRACTORS:
        raise ValueError(f"extraction {mode!r} is not one of {', '.join(EXTRACTORS)}")
    return EXTRACTORS[mode](text[-_MAX_READ:])
