"""Parses a normalised answer: leaves with value and unit, bracketed groups, unions of sets, relations."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import accumulate

from dash_exp.verifiers.math.normalise import closing, trim
from dash_exp.verifiers.math.quantities import BASES, NO_UNIT, Unit, plain_value, split_quantity

MAX_ITEMS = 64
_MAX_DEPTH = 12
INFINITY = "\\infty"


@dataclass(frozen=True, slots=True)
class Leaf:
    """`text` is what is left of the answer without its unit. `value` is set for plain numbers;
    `decimals` counts digits after the point, None when there is none. `chain` holds earlier
    members of `x = 6/2 = 3` or of `2/3 \\approx 0.67`, whose last is `rounded`."""

    text: str
    value: Fraction | None = None
    decimals: int | None = None
    percent: bool = False
    unit: Unit = NO_UNIT
    base: int | None = None
    name: str = ""
    chain: tuple[Leaf, ...] = ()
    rounded: bool = False


@dataclass(frozen=True, slots=True)
class Group:
    """Items between brackets. `opening` is `(`, `[`, `{` (a set), `` (a bare list) or `matrix`
    (its items are rows). `name` is what the group was said to be: `x` in `x > 3`."""

    opening: str
    closing: str
    items: tuple[Form, ...]
    name: str = ""

    @property
    def unordered(self) -> bool:
        return self.opening in ("", "{")


@dataclass(frozen=True, slots=True)
class SetExpr:
    """A union of sets, without those in `minus`."""

    parts: tuple[Form, ...]
    minus: tuple[Form, ...] = ()


@dataclass(frozen=True, slots=True)
class Relation:
    """An equation or inequality that does not simply name a value: `2x + y = 3`, `a < b < c`."""

    sides: tuple[str, ...]
    signs: tuple[str, ...]


Form = Leaf | Group | SetExpr | Relation
_REALS = Group("(", ")", (Leaf("-" + INFINITY), Leaf(INFINITY)))

_COMMA = re.compile("[,;]")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_SIGN = re.compile(r"=|<|>|\\leq(?![A-Za-z])|\\geq(?![A-Za-z])|\\ne(?![A-Za-z])")
_MEMBER = re.compile(r"^\s*[A-Za-z](?:_\w)?(?:\([a-z]\))?\s*\\in(?![A-Za-z])\s*")
_POINT_NAME = re.compile(r"^\(\s*[A-Za-z]\w?(?:\s*,\s*[^,()]{1,12})*\s*\)$")
_UNION = re.compile(r"\\cup(?![A-Za-z])|(?<=[)\]}])\s*[Uu]\s*(?=[(\[\\])")
_MINUS = re.compile(r"\\setminus(?![A-Za-z])")
_MATRIX = re.compile(
    r"^([^,;=<>]*?)(?:\\cdot)?\s*\\begin\{(pmatrix|array)\}(?:\{[clr|]+\})?((?:(?!\\begin).)*)\\end\{\2\}$",
    re.DOTALL,
)
_BUILDER = re.compile(
    r"\s*([A-Za-z])\s*(?:\\in\s*\(-\\infty\s*,\s*\\infty\s*\)\s*)?(?::|\||\\(?:mid|vert)(?![A-Za-z]))\s*"
)
_PLUS_MINUS = re.compile(r"\\(?:pm|mp)(?![A-Za-z])")
_DISTANCE = re.compile(r"\|\s*([A-Za-z])(?:\s*([-+])\s*([\d./]+))?\s*\|")
NAME = re.compile(
    r"\s*(?:"
    r"[A-Za-z](?:_\{?\w{1,4}\}?)?'{0,3}(?:\([a-z]\))?|[A-Z]{2,3}|[A-Za-z]\^\{?-1\}?\([a-z]\)|[A-Z]\^\{?-1\}?"
    r"|\\(?:theta|alpha|beta|gamma|phi|lambda|omega|mu|sigma|rho)(?![A-Za-z])"
    r"|\\text\{[^{}]*\}|\\angle\s*[A-Z]{1,3}|[A-Za-z]{4,20}"
    r")\s*"
)
"""Left sides that only name a value: `x`, `a_1`, `f(x)`, `AB`, `area`."""


def parse_form(text: str, join_thousands: bool = True, depth: int = 0) -> Form:
    """The form of a normalised answer. Never fails: what has no structure is a leaf.

    With `join_thousands`, `1,234` outside brackets is one number; without, it is two.
    """
    text = trim(text)
    if depth > _MAX_DEPTH:
        return parse_leaf(text)
    if join_thousands:
        for match in reversed(_outside(_THOUSANDS, text, ("([", ")]"))):
            text = text[: match.start()] + match.group().replace(",", "") + text[match.end() :]
    items = [part for part in split_top(text, _COMMA) if part.strip()]
    if 1 < len(items) <= MAX_ITEMS:
        return _listed([parse_form(item, depth=depth + 1) for item in items])
    return _single(trim(items[0]) if len(items) == 1 else text, depth)


def _items(form: Form) -> tuple[Form, ...]:
    """Those of a bare list, else the form itself."""
    return form.items if isinstance(form, Group) and not form.opening else (form,)


def _listed(found: list[Form]) -> Form:
    forms = tuple(item for form in found for item in _items(form))
    sets = [form for form in forms if isinstance(form, SetExpr)]
    if len(sets) == len(forms) and all(form.parts == (_REALS,) and form.minus for form in sets):
        return SetExpr((_REALS,), tuple(point for form in sets for point in form.minus))  # x != 2, x != 3
    if all(isinstance(form, SetExpr) or (isinstance(form, Group) and form.name) for form in forms):
        return SetExpr(forms)  # x < 2 or x > 3
    return Group("", "", forms)


def _single(text: str, depth: int) -> Form:
    text = _MEMBER.sub("", text, count=1)
    if "mod" in text:
        text = text.replace("\\equiv", "=")
    related = _related(text, depth)
    if related is not None:
        return related
    for pattern in (_MINUS, _UNION):
        parts = split_top(text, pattern)
        if len(parts) > 1:
            forms = tuple(parse_form(part, depth=depth + 1) for part in parts[:MAX_ITEMS])
            return SetExpr(forms[:1], forms[1:]) if pattern is _MINUS else SetExpr(forms)
    bracketed = _bracketed(text, depth)
    if bracketed is not None:
        return bracketed
    if _PLUS_MINUS.search(text):
        upper = text.replace("\\pm", "+").replace("\\mp", "-")
        lower = text.replace("\\pm", "-").replace("\\mp", "+")
        return Group("", "", tuple(parse_form(one, depth=depth + 1) for one in (upper, lower)))
    return parse_leaf(text)


def _related(text: str, depth: int) -> Form | None:
    """A named value, an interval, or a relation, when the text has a relation sign."""
    signs = [match.group() for match in _outside(_SIGN, text)]
    sides = [side.strip() for side in split_top(text, _SIGN)] if signs else []
    if not all(sides) or not signs:
        return None
    if set(signs) == {"="}:
        return _equation(sides, depth)
    if signs == ["\\ne"] and NAME.fullmatch(sides[0]):
        return SetExpr((_REALS,), _items(parse_form(sides[1], depth=depth + 1)))
    return _interval(sides, signs) or Relation(tuple(sides), tuple(signs))


def _equation(sides: list[str], depth: int) -> Form:
    """`x = 3`, `x = 6/2 = 3` and `6/2 = 3` are values; any other equation is a relation."""
    if NAME.fullmatch(sides[-1]) and not NAME.fullmatch(sides[0]):
        sides = sides[::-1]
    named = bool(NAME.fullmatch(sides[0]) or _POINT_NAME.fullmatch(sides[0]))
    relation = Relation(tuple(sides), ("=",) * (len(sides) - 1))
    if not named and any(has_symbols(side) for side in sides):
        return relation
    forms = [parse_form(value, depth=depth + 1) for value in sides[named:]]
    leaves = tuple(leaf for form in forms if isinstance(form, Leaf) for leaf in (*form.chain, form))
    if not all(isinstance(form, Leaf) for form in forms):
        return forms[0] if len(forms) == 1 else relation
    return replace(leaves[-1], name=name_of(sides[0]) if named else "", chain=leaves[:-1])


def _interval(sides: list[str], signs: list[str]) -> Form | None:
    """`a < m <= b`, `m > a`, `|m| < a`: the interval that m lies in, or the union."""
    if any(sign in ("\\ne", "=") for sign in signs) or len(signs) > 2:
        return None
    down = [sign in (">", "\\geq") for sign in signs]
    if any(down) and not all(down):
        return None
    if all(down):
        sides, signs = sides[::-1], signs[::-1]
    strict = [sign in ("<", ">") for sign in signs]
    if len(signs) == 1:
        distances = [_DISTANCE.fullmatch(side) for side in sides]
        if distances[0] and not has_symbols(sides[1]):
            return _within(distances[0], f"-({sides[1]})", sides[1], strict * 2)
        if distances[1] and not has_symbols(sides[0]):
            low = _within(distances[1], "-" + INFINITY, f"-({sides[0]})", [True, *strict])
            return SetExpr((low, _within(distances[1], sides[0], INFINITY, [*strict, True])))
        sides = [*sides, INFINITY] if NAME.fullmatch(sides[1]) else ["-" + INFINITY, *sides]
        strict = [*strict, True] if sides[-1] == INFINITY else [True, *strict]
    name = NAME.fullmatch(sides[1])
    if (
        not name
        or not has_symbols(sides[1])
        or (len(signs) == 1 and (has_symbols(sides[0]) or has_symbols(sides[2])))
    ):
        return None
    brackets = "(" if strict[0] else "[", ")" if strict[1] else "]"
    return Group(*brackets, (parse_leaf(trim(sides[0])), parse_leaf(trim(sides[2]))), name_of(sides[1]))


def _within(distance: re.Match[str], low: str, high: str, strict: list[bool]) -> Group:
    name, sign, centre = distance.groups()
    shift = f" {'-' if sign == '+' else '+'} {centre}" if centre else ""
    ends = tuple(parse_leaf(end if INFINITY in end else end + shift) for end in (low, high))
    return Group("(" if strict[0] else "[", ")" if strict[1] else "]", ends, name.lower())


def _bracketed(text: str, depth: int) -> Form | None:
    if matrix := _MATRIX.match(text):
        return _matrix(matrix.group(1).strip(), matrix.group(3), depth)
    if text.startswith("\\{") and text.endswith("\\}") and closing(text, 1) == len(text) - 1:
        inner = text[2:-2]
        built = _BUILDER.match(inner)
        form = parse_form(inner[built.end() :], False, depth + 1) if built else None
        parts = form.parts if isinstance(form, SetExpr) else (form,)
        known = all(isinstance(part, Group) and part.name in ("", inner.strip()[0].lower()) for part in parts)
        return form if known else _group("{", "}", inner, depth)
    if not text or text[0] not in "([{" or closing(text, 0) != len(text) - 1:
        return None
    inner = text[1:-1]
    if text[0] == "{" or len(split_top(inner, _COMMA)) == 1:
        # braces only group in LaTeX; brackets around one thing say nothing either
        return parse_form(inner, depth=depth + 1) if inner.strip() else None
    return _group(text[0], text[-1], inner, depth)


def _group(opening: str, close: str, inner: str, depth: int) -> Group:
    parts = [part for part in split_top(inner, _COMMA) if part.strip()][: MAX_ITEMS + 1]
    found = [parse_form(part, join_thousands=False, depth=depth + 1) for part in parts]
    forms = tuple(item for form in found for item in (_items(form) if opening == "{" else (form,)))
    if len(forms) == 2 and opening in "([":
        low, high = (isinstance(end, Leaf) and INFINITY in end.text for end in forms)
        opening, close = "(" if low else opening, ")" if high else close  # whatever bracket was written
    return Group(opening, close, forms)


def _matrix(factor: str, body: str, depth: int) -> Group:
    """A matrix, its cells multiplied by the factor in front."""
    rows = [row.split("&") for row in re.split(r"\\\\(?:\[[^\]]*\])?", body) if row.strip()][:MAX_ITEMS]
    before = factor if factor in ("", "+", "-") else f"{factor} \\cdot "
    cells = [
        [parse_form(f"{before}({cell})" if factor else cell, depth=depth + 1) for cell in row] for row in rows
    ]
    return Group("matrix", "matrix", tuple(Group("(", ")", tuple(row)) for row in cells))


def has_symbols(text: str) -> bool:
    """Whether a variable occurs in the text (pi, e, i and commands are none)."""
    bare = re.sub(r"\\text\s*\{[^{}]*\}|\\(?!theta|alpha|beta|phi|omega|lambda)[A-Za-z]+", "", text)
    return re.search(r"[A-Za-df-hj-z]", bare) is not None


def name_of(side: str) -> str:
    """A name for comparison: no spaces, commands or braces, lower case."""
    return re.sub(r"\\text|[\s{}\\]", "", side).lower()


def split_top(text: str, pattern: re.Pattern[str]) -> list[str]:
    """Parts of the text between the matches that lie outside all brackets."""
    matches = _outside(pattern, text)
    starts = [0, *(match.end() for match in matches)]
    ends = [*(match.start() for match in matches), len(text)]
    return [text[start:end] for start, end in zip(starts, ends, strict=True)]


def _outside(
    pattern: re.Pattern[str], text: str, brackets: tuple[str, str] = ("([{", ")]}")
) -> list[re.Match[str]]:
    matches = list(pattern.finditer(text))
    if not matches:
        return []
    opening, closing = brackets
    depths = list(accumulate((character in opening) - (character in closing) for character in text))
    return [match for match in matches if depths[match.start()] == 0]


# Leaves

_TIME_SUFFIX = re.compile(r"\s*\b([ap])\s?\.?\s?m\b\.?\s*$", re.IGNORECASE)
_PERCENT = re.compile(r"\s*\\?%\s*$")
_BASE = re.compile(
    r"(?:\\text\{|\()?(-?(?:[0-9A-Z]+|\d[0-9a-z]+)(?:\.[0-9A-Z]+)?)[})]?"
    r"_\s*(?:\{?\s*(?:\\text\{)?(\d{1,2})\}?\}?)"
)
_BASE_WORD = re.compile(r"_\s*\{?\s*(?:\\text\{)?\s*(" + "|".join(BASES) + r")\s*\}{0,2}$")
_MODULUS = re.compile(
    r"^(.*?\S)\s*(?:\\pmod\s*\{?\s*(\d+)\s*\}?"
    r"|\(?\s*(?:\\text\{\s*\(?)?\\?(?<![A-Za-z])b?mod(?:ulo)?\s*\}?\s*\{?(\d+)\}?\s*\)?\}?)\s*$"
)


def parse_leaf(text: str) -> Leaf:
    """Read one unstructured, normalised answer."""
    sides = [side for side in text.split("\\approx") if side.strip()]
    if len(sides) > 1:
        leaves = [parse_leaf(side) for side in sides[:4]]
        kept = leaves[1:] if NAME.fullmatch(sides[0]) else leaves
        kept = [kept[0], *(replace(leaf, rounded=True) for leaf in kept[1:])]
        return replace(kept[-1], chain=tuple(kept[:-1]))
    text = sides[0].strip() if sides else text.strip()
    base = _BASE.fullmatch(_BASE_WORD.sub(lambda word: "_" + BASES[word.group(1)], text))
    if base:
        return Leaf(base.group(1), base=int(base.group(2)))
    text, percent, unit = _strip_unit(text)
    value, decimals = plain_value(text)
    return Leaf(text, value, decimals, percent, unit)


def _strip_unit(text: str) -> tuple[str, bool, Unit]:
    """The text without percent sign and unit; whether there was a percent sign; the unit."""
    time = _TIME_SUFFIX.search(re.sub(r"\\text\{([^{}]*)\}\s*$", r" \1", text))
    if time and re.match(r"\s*\d", text):
        return time.string[: time.start()].strip(), False, ((time.group(1).lower() + "m", 1),)
    percent = _PERCENT.search(text)
    if percent and percent.start() > 0:
        return text[: percent.start()].strip(), True, NO_UNIT
    if modulus := _MODULUS.match(text):
        number, divisor = modulus.group(1), int(modulus.group(2) or modulus.group(3))
        value, _ = plain_value(number)
        rest = str(value % divisor) if value is not None and divisor else number
        return rest, False, ((f"mod {divisor}", 1),)
    return (split := split_quantity(text))[0], False, split[1]
