"""Parses a normalised answer: leaves with value and unit, bracketed groups, unions of sets, relations."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import accumulate

from dash_exp.verifiers.math.normalise import NO_UNIT, Unit, closing, split_unit, trim

MAX_ITEMS = 64
_MAX_DEPTH = 12
_MAX_DIGITS = 400
_INFINITY = "\\infty"


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
_Matches = list[re.Match[str]]

_COMMA = re.compile("[,;]")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_SIGN = re.compile(r"=|<|>|\\leq(?![A-Za-z])|\\geq(?![A-Za-z])|\\ne(?![A-Za-z])")
_VARIABLE = re.compile(r"\s*[A-Za-df-hj-z](?:_\{?\w{1,4}\}?)?\s*")
_MEMBER = re.compile(r"^\s*[A-Za-z](?:_\w)?(?:\([a-z]\))?\s*\\in(?![A-Za-z])\s*")
_POINT_NAME = re.compile(r"^\(\s*[A-Za-z]\w?(?:\s*,\s*[^,()]{1,12})*\s*\)$")
_UNION = re.compile(r"\\cup(?![A-Za-z])|(?<=[)\]}])\s*[Uu]\s*(?=[(\[\\])")
_MINUS = re.compile(r"\\setminus(?![A-Za-z])")
_MATRIX = re.compile(
    r"^([^,;=<>]*?)(?:\\cdot)?\s*\\begin\{([pbB]?matrix|array)\}(?:\{[clr|]+\})?((?:(?!\\begin).)*)\\end\{\2\}$",
    re.DOTALL,
)
_BUILDER = re.compile(
    r"\s*([A-Za-z])\s*(?:\\in\s*\(-\\infty\s*,\s*\\infty\s*\)\s*)?(?::|\||\\(?:mid|vert)(?![A-Za-z]))\s*"
)
_PLUS_MINUS = re.compile(r"\\(?:pm|mp)(?![A-Za-z])")


def parse_form(text: str, join_thousands: bool = True, depth: int = 0) -> Form:
    """The form of a normalised answer. Never fails: what has no structure is a leaf.

    With `join_thousands`, `1,234` outside brackets is one number; without, it is two.
    """
    text = trim(text)
    if depth > _MAX_DEPTH:
        return parse_leaf(text)
    if join_thousands:
        text = _join_thousands(text)
    items = [part for part in split_top(text, _COMMA) if part.strip()]
    if 1 < len(items) <= MAX_ITEMS:
        return _listed(items, depth)
    if len(items) == 1:
        text = trim(items[0])
    return _single(text, depth)


def _listed(items: list[str], depth: int) -> Form:
    forms: list[Form] = []
    for item in items:
        form = parse_form(item, depth=depth + 1)
        inner = form.items if isinstance(form, Group) and not form.opening else (form,)
        forms.extend(inner)
    first = forms[0]
    if isinstance(first, SetExpr) and first.minus:
        excluded = _excluded(first, forms[1:])
        if excluded is not None:
            return SetExpr(first.parts, (*first.minus, *excluded))  # x != 2, x != 3
    if all(isinstance(f, SetExpr) or (isinstance(f, Group) and f.name) for f in forms):
        return SetExpr(tuple(forms))  # x < 2 or x > 3
    return Group("", "", tuple(forms))


def _excluded(first: SetExpr, others: list[Form]) -> list[Form] | None:
    """What the others of `x != 2, x != 3` or `x != 2, 3` exclude; None when one of them adds."""
    excluded: list[Form] = []
    for form in others:
        if isinstance(form, SetExpr) and form.minus and form.parts == first.parts:
            excluded.extend(form.minus)
        elif isinstance(form, Leaf) and not form.name:
            excluded.append(form)
        else:
            return None
    return excluded


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
    return _both_signs(text, depth) if _PLUS_MINUS.search(text) else parse_leaf(text)


def _both_signs(text: str, depth: int) -> Form:
    upper = text.replace("\\pm", "+").replace("\\mp", "-")
    lower = text.replace("\\pm", "-").replace("\\mp", "+")
    return Group("", "", tuple(parse_form(one, depth=depth + 1) for one in (upper, lower)))


def _related(text: str, depth: int) -> Form | None:
    """A named value, an interval, or a relation, when the text has a relation sign."""
    signs = [match.group() for match in _outside(_SIGN, text)]
    sides = [side.strip() for side in split_top(text, _SIGN)] if signs else []
    if not all(sides) or not signs:
        return None
    if set(signs) == {"="}:
        return _equation(sides, depth)
    if signs == ["\\ne"] and NAME.fullmatch(sides[0]):
        everything = Group("(", ")", (parse_leaf("-" + _INFINITY), parse_leaf(_INFINITY)))
        return SetExpr((everything,), (parse_form(sides[1], depth=depth + 1),))
    return _interval(sides, signs) or Relation(tuple(sides), tuple(signs))


def _equation(sides: list[str], depth: int) -> Form:
    """`x = 3`, `x = 6/2 = 3` and `6/2 = 3` are values; any other equation is a relation."""
    if NAME.fullmatch(sides[-1]) and not NAME.fullmatch(sides[0]):
        sides = sides[::-1]
    variables = all(_VARIABLE.fullmatch(side) for side in sides[:-1])
    if len(sides) > 2 and variables and not has_symbols(sides[-1]):
        value = parse_form(sides[-1], depth=depth + 1)  # `x = y = 2` is `x = 2, y = 2`
        if isinstance(value, Leaf) and len(set(sides)) == len(sides) <= MAX_ITEMS:
            return Group("", "", tuple(replace(value, name=name_of(side)) for side in sides[:-1]))
    named = bool(NAME.fullmatch(sides[0]) or _POINT_NAME.fullmatch(sides[0]))
    values = sides[1:] if named else sides
    relation = Relation(tuple(sides), ("=",) * (len(sides) - 1))
    if not named and any(has_symbols(side) for side in sides):
        return relation
    forms = [parse_form(value, depth=depth + 1) for value in values]
    if not all(isinstance(form, Leaf) for form in forms):
        return forms[0] if len(forms) == 1 else relation
    leaves = tuple(leaf for form in forms if isinstance(form, Leaf) for leaf in (*form.chain, form))
    name = name_of(sides[0]) if named else ""
    return replace(leaves[-1], name=name, chain=leaves[:-1])


def _interval(sides: list[str], signs: list[str]) -> Group | None:
    """`a < m <= b`, `m > a`: the interval that m lies in."""
    if any(sign in ("\\ne", "=") for sign in signs) or len(signs) > 2:
        return None
    down = [sign in (">", "\\geq") for sign in signs]
    if any(down) and not all(down):
        return None
    if all(down):
        sides, signs = sides[::-1], signs[::-1]
    strict = [sign in ("<", ">") for sign in signs]
    if len(signs) == 2 and (has_symbols(sides[1]) and NAME.fullmatch(sides[1])):
        low, name, high = sides
    elif len(signs) == 1 and NAME.fullmatch(sides[0]) and not has_symbols(sides[1]):
        low, name, high, strict = "-" + _INFINITY, sides[0], sides[1], [True, *strict]
    elif len(signs) == 1 and NAME.fullmatch(sides[1]) and not has_symbols(sides[0]):
        low, name, high, strict = sides[0], sides[1], _INFINITY, [*strict, True]
    else:
        return None
    brackets = "(" if strict[0] else "[", ")" if strict[1] else "]"
    return Group(*brackets, (parse_leaf(trim(low)), parse_leaf(trim(high))), name_of(name))


def _bracketed(text: str, depth: int) -> Form | None:
    matrix = _MATRIX.match(text)
    if matrix:
        return _matrix(matrix.group(1).strip(), matrix.group(3), depth)
    if text.startswith("\\{") and text.endswith("\\}") and closing(text, 1) == len(text) - 1:
        return _built_set(text[2:-2], depth) or _group("{", "}", text[2:-2], depth)
    if not text or text[0] not in "([{" or closing(text, 0) != len(text) - 1:
        return None
    inner = text[1:-1]
    if text[0] == "{" or len(split_top(inner, _COMMA)) == 1:
        # braces only group in LaTeX; brackets around one thing say nothing either
        return parse_form(inner, depth=depth + 1) if inner.strip() else None
    return _group(text[0], text[-1], inner, depth)


def _built_set(inner: str, depth: int) -> Form | None:
    """The interval or union that `{x : x > 0}` or `{x in R | x > 0}` is; None for another set."""
    built = _BUILDER.match(inner)
    if built is None:
        return None
    form = parse_form(inner[built.end() :], join_thousands=False, depth=depth + 1)
    if re.match(rf"{built.group(1)}\s*\\ne(?![A-Za-z])", inner[built.end() :]):
        return form if isinstance(form, SetExpr) else None
    parts = form.parts if isinstance(form, SetExpr) and not form.minus else (form,)
    same = all(isinstance(part, Group) and part.name == built.group(1).lower() for part in parts)
    return form if same else None


def _group(opening: str, close: str, inner: str, depth: int) -> Form:
    items = [part for part in split_top(inner, _COMMA) if part.strip()]
    forms: list[Form] = []
    for item in items[: MAX_ITEMS + 1]:
        form = parse_form(item, join_thousands=False, depth=depth + 1)
        spread = opening == "{" and isinstance(form, Group) and not form.opening
        forms.extend(form.items if spread and isinstance(form, Group) else (form,))
    if len(forms) == 2 and opening in "([":
        low, high = (isinstance(end, Leaf) and _INFINITY in end.text for end in forms)
        opening, close = "(" if low else opening, ")" if high else close  # whatever bracket was written
    return Group(opening, close, tuple(forms))


def _matrix(factor: str, body: str, depth: int) -> Group:
    """A matrix, its cells multiplied by the factor in front."""
    rows = [row for row in re.split(r"\\\\(?:\[[^\]]*\])?", body) if row.strip()]
    cells = [
        Group("(", ")", tuple(parse_form(_times(factor, cell), depth=depth + 1) for cell in row.split("&")))
        for row in rows[:MAX_ITEMS]
    ]
    return Group("matrix", "matrix", tuple(cells))


def _times(factor: str, cell: str) -> str:
    return cell if not factor else f"{factor}({cell})" if factor in "+-" else f"{factor} \\cdot ({cell})"


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


def _outside(pattern: re.Pattern[str], text: str, brackets: tuple[str, str] = ("([{", ")]}")) -> _Matches:
    matches = list(pattern.finditer(text))
    if not matches:
        return []
    opening, closing = brackets
    depths = list(accumulate((character in opening) - (character in closing) for character in text))
    return [match for match in matches if depths[match.start()] == 0]


def _join_thousands(text: str) -> str:
    for match in reversed(_outside(_THOUSANDS, text, ("([", ")]"))):
        text = text[: match.start()] + match.group().replace(",", "") + text[match.end() :]
    return text


# Leaves

NAME = re.compile(
    r"\s*(?:"
    r"[A-Za-z](?:_\{?\w{1,4}\}?)?'{0,3}(?:\([a-z]\))?|[A-Z]{2,3}|[A-Za-z]\^\{?-1\}?\([a-z]\)|[A-Z]\^\{?-1\}?"
    r"|\\(?:theta|alpha|beta|gamma|phi|lambda|omega|mu|sigma|rho)(?![A-Za-z])"
    r"|\\text\{[^{}]*\}|\\angle\s*[A-Z]{1,3}|(?:area|volume|perimeter|total|answer|sum|[A-Za-z]{4,20})"
    r")\s*"
)
"""Left sides that only name a value: `x`, `a_1`, `f(x)`, `AB`, `area`."""

_WORDS = "zero one two three four five six seven eight nine ten eleven twelve"
_TEENS = "thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_NUMBER_WORDS = {word: Fraction(value) for value, word in enumerate(f"{_WORDS} {_TEENS}".split())}
_NUMBER_WORDS |= {
    f"{tens}-{one}" if value else tens: Fraction(10 * ten + value)
    for ten, tens in enumerate(_TENS.split(), 2)
    for value, one in enumerate(_WORDS.split()[:10])
} | {"hundred": Fraction(100), "one hundred": Fraction(100), "thousand": Fraction(1000)}
_BASE_WORDS = {word: str(value) for value, word in enumerate(f"{_WORDS} {_TEENS}".split()) if 1 < value < 17}

_TIME_SUFFIX = re.compile(r"\s*\b([ap])\s?\.?\s?m\b\.?\s*$", re.IGNORECASE)
_PERCENT = re.compile(r"\s*\\?%\s*$|\s*(?:\\text\{\s*percent\s*\}|\bpercent)\s*$")
_BASE = re.compile(
    r"(?:\\text\{|\()?(-?(?:[0-9A-Z]+|\d[0-9a-z]+)(?:\.[0-9A-Z]+)?)[})]?"
    r"_\s*(?:\{?\s*(?:\\text\{)?(\d{1,2})\}?\}?)"
)
_BASE_WORD = re.compile(r"_\s*\{?\s*(?:\\text\{)?\s*(" + "|".join(_BASE_WORDS) + r")\s*\}{0,2}$")
_MODULUS = re.compile(
    r"\s*(?:\\pmod\s*\{?\s*(\w+)\s*\}?|\(?\s*(?:\\text\{\s*\(?)?(?<![A-Za-z\\])mod\s*\}?\s*\{?(\d+)\}?\s*\)?\}?)\s*$"
)
_PLAIN = re.compile(r"([-+]?)\s*(\d+(?:\.\d*)?)")
_FRAC = re.compile(r"([-+]?)\s*(\d+)?\s*\\frac\s*(?:\{\s*(-?\s*\d+)\s*\}|(\d))\s*(?:\{\s*(-?\d+)\s*\}|(\d))")
_SLASH = re.compile(r"([-+]?)\s*(?:(\d+)\s+)?(\d+)\s*/\s*(\d+)")
_REPEATING = re.compile(r"([-+]?)\s*(\d*)\.(\d*)\\overline\{(\d+)\}")
_SPACED = re.compile(r"\d{1,3}(?: \d{3})+")


def parse_leaf(text: str) -> Leaf:
    """Read one unstructured, normalised answer."""
    sides = [side for side in text.split("\\approx") if side.strip()]
    if len(sides) > 1:
        leaves = [parse_leaf(side) for side in sides[:4]]
        named = NAME.fullmatch(sides[0]) is not None
        kept = leaves[1:] if named else leaves
        kept = [kept[0], *(replace(leaf, rounded=True) for leaf in kept[1:])]
        return replace(kept[-1], chain=tuple(kept[:-1]))
    text = sides[0].strip() if sides else text.strip()
    base = _BASE.fullmatch(_BASE_WORD.sub(lambda word: "_" + _BASE_WORDS[word.group(1)], text))
    if base:
        return Leaf(base.group(1), base=int(base.group(2)))
    text, percent, unit = strip_unit(text)
    value, decimals = plain_value(text)
    return Leaf(text, value, decimals, percent, unit)


def strip_unit(text: str) -> tuple[str, bool, Unit]:
    """The text without percent sign and unit; whether there was a percent sign; the unit, known
    units in one spelling."""
    bare = re.sub(r"\\text\{([^{}]*)\}\s*$", r" \1", text)
    time = _TIME_SUFFIX.search(bare)
    if time and re.match(r"\s*\d", text):
        return _TIME_SUFFIX.sub("", bare).strip(), False, ((time.group(1).lower() + "m", 1),)
    percent = _PERCENT.search(text)
    if percent and percent.start() > 0:
        return text[: percent.start()].strip(), True, NO_UNIT
    modulus = _MODULUS.search(text)
    if modulus and modulus.start() > 0:
        return text[: modulus.start()].strip(), False, ((f"mod {modulus.group(1) or modulus.group(2)}", 1),)
    before, unit = split_unit(text)
    return before, False, unit


def plain_value(text: str) -> tuple[Fraction | None, int | None]:
    """Exact value of a plain number, fraction, mixed number or repeating decimal, and how many
    digits follow its decimal point."""
    text = text.strip()
    if len(text) > _MAX_DIGITS:
        return None, None
    while len(text) > 1 and text[0] == "{" and text[-1] == "}" and "}" not in text[:-1]:
        text = text[1:-1].strip()
    if _SPACED.fullmatch(text):
        text = text.replace(" ", "")
    plain = _PLAIN.fullmatch(text)
    if plain:
        sign, digits = plain.groups()
        value, point = Fraction(digits.rstrip(".")), digits.find(".")
        return -value if sign == "-" else value, None if point < 0 else len(digits) - point - 1
    word = _NUMBER_WORDS.get(re.sub(r"(?<=ty)\s+", "-", text.lower()))
    return (word if word is not None else _fraction(text)), None


def _fraction(text: str) -> Fraction | None:
    frac = _FRAC.fullmatch(text)
    if frac:
        sign, whole, top, top_digit, bottom, bottom_digit = frac.groups()
        return _mixed(sign, whole, top or top_digit, bottom or bottom_digit)
    slash = _SLASH.fullmatch(text)
    if slash:
        return _mixed(*slash.groups())
    repeating = _REPEATING.fullmatch(text)
    if repeating:
        sign, whole, fixed, cycle = repeating.groups()
        shift = 10 ** len(fixed)
        tail = Fraction(int(cycle), shift * (10 ** len(cycle) - 1))
        value = Fraction(int((whole or "0") + fixed), shift) + tail
        return -value if sign == "-" else value
    return None


def _mixed(sign: str, whole: str | None, top: str, bottom: str) -> Fraction | None:
    denominator = int(bottom)
    if denominator == 0:
        return None
    value = Fraction(int(whole or 0)) + Fraction(int(top.replace(" ", "")), denominator)
    return -value if sign == "-" else value
