"""The shape of an answer: leaves, bracketed groups, unions of sets, relations; and its parser."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from dash_exp.verifiers.math.leaves import NAME, Leaf, parse_leaf
from dash_exp.verifiers.math.normalise import closing, trim

MAX_ITEMS = 64
_MAX_DEPTH = 12
_INFINITY = "\\infty"


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
    items = [part for part in split_top(text, ",;") if part.strip()]
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
        parts = _split_on(text, pattern)
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
    forms = (parse_form(upper, depth=depth + 1), parse_form(lower, depth=depth + 1))
    return Group("", "", forms)


def _related(text: str, depth: int) -> Form | None:
    """A named value, an interval, or a relation, when the text has a relation sign."""
    sides, signs = _split_relation(text)
    if not signs or not all(side.strip() for side in sides):
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
    if (
        len(sides) > 2
        and all(_VARIABLE.fullmatch(side) for side in sides[:-1])
        and not has_symbols(sides[-1])
    ):
        value = parse_form(sides[-1], depth=depth + 1)  # `x = y = 2` is `x = 2, y = 2`
        if isinstance(value, Leaf) and len({side.strip() for side in sides}) == len(sides) <= MAX_ITEMS:
            return Group("", "", tuple(replace(value, name=name_of(side)) for side in sides[:-1]))
    named = bool(NAME.fullmatch(sides[0]) or _POINT_NAME.fullmatch(sides[0]))
    values = sides[1:] if named else sides
    if not named and any(has_symbols(side) for side in sides):
        return Relation(tuple(sides), ("=",) * (len(sides) - 1))
    forms = [parse_form(value, depth=depth + 1) for value in values]
    last = forms[-1]
    if not all(isinstance(form, Leaf) for form in forms):
        return last if len(forms) == 1 else Relation(tuple(sides), ("=",) * (len(sides) - 1))
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
    if text[0] == "{" or not _has_comma(inner):
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
    items = [part for part in split_top(inner, ",;") if part.strip()]
    forms: list[Form] = []
    for item in items[: MAX_ITEMS + 1]:
        form = parse_form(item, join_thousands=False, depth=depth + 1)
        spread = opening == "{" and isinstance(form, Group) and not form.opening
        forms.extend(form.items if spread and isinstance(form, Group) else (form,))
    if len(forms) == 2 and opening in "([":
        opening, close = _at_infinity(opening, close, forms)
    return Group(opening, close, tuple(forms))


def _at_infinity(opening: str, close: str, ends: list[Form]) -> tuple[str, str]:
    """An infinite end of an interval is open, whatever bracket was written."""
    low, high = (isinstance(end, Leaf) and _INFINITY in end.text for end in ends)
    return "(" if low else opening, ")" if high else close


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


def split_top(text: str, separators: str) -> list[str]:
    """Parts of the text between separators that lie outside all brackets."""
    parts, depth, start = [], 0, 0
    for index, character in enumerate(text):
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif depth == 0 and character in separators:
            parts.append(text[start:index])
            start = index + 1
    return [*parts, text[start:]]


def _depths(text: str) -> list[int]:
    depths, depth = [], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        depths.append(depth)
    return depths


def _split_on(text: str, pattern: re.Pattern[str]) -> list[str]:
    matches = list(pattern.finditer(text))
    depths = _depths(text) if matches else []
    parts, start = [], 0
    for match in matches:
        if depths[match.start()] == 0:
            parts.append(text[start : match.start()])
            start = match.end()
    return [*parts, text[start:]]


def _split_relation(text: str) -> tuple[list[str], list[str]]:
    matches = list(_SIGN.finditer(text))
    depths = _depths(text) if matches else []
    kept = [match for match in matches if depths[match.start()] == 0]
    bounds = [0, *(match.end() for match in kept)]
    ends = [*(match.start() for match in kept), len(text)]
    sides = [text[start:end].strip() for start, end in zip(bounds, ends, strict=True)]
    return sides, [match.group() for match in kept]


def _join_thousands(text: str) -> str:
    matches = list(_THOUSANDS.finditer(text))
    if not matches:
        return text
    round_depth, depth = [], 0
    for character in text:
        depth += (character in "([") - (character in ")]")
        round_depth.append(depth)
    for match in reversed(matches):
        if round_depth[match.start()] == 0:
            joined = match.group().replace(",", "")
            text = text[: match.start()] + joined + text[match.end() :]
    return text


def _has_comma(inner: str) -> bool:
    return len(split_top(inner, ",;")) > 1
