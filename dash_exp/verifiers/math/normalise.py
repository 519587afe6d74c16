"""Brings an answer string to one LaTeX spelling, without changing what it says."""

from __future__ import annotations

import re

_UNICODE = str.maketrans(
    {
        "−": "-",
        "–": "-",
        "—": "-",
        "×": "\\times ",
        "·": "\\cdot ",
        "÷": "/",
        "∞": "\\infty ",
        "π": "\\pi ",
        "θ": "\\theta ",
        "≤": "\\leq ",
        "≥": "\\geq ",
        "≠": "\\ne ",
        "∪": "\\cup ",
        "∈": "\\in ",
        "±": "\\pm ",
        "°": "^\\circ ",
        "√": "\\sqrt ",
        "′": "'",
        "\u00a0": " ",
        "²": "^2",
        "³": "^3",
        "½": "\\frac{1}{2}",
        "¼": "\\frac{1}{4}",
        "¾": "\\frac{3}{4}",
        "ℝ": "\\mathbb{R}",
        "∅": "\\emptyset ",
        "“": '"',
        "”": '"',
        "’": "'",
        "∖": "\\setminus ",
        "⟨": "\\langle ",
        "⟩": "\\rangle ",
        "\n": " ",
        "\t": " ",
        "、": ",",
        "。": ".",
        "\u3000": " ",
        "µ": "\\mu ",
        "μ": "\\mu ",
        **{chr(full): chr(full - 0xFEE0) for full in range(0xFF01, 0xFF5E)},  # `，` is `,`, `５` is `5`
    }
)

_CURRENCIES = {"€": "euros", "£": "pounds", "¥": "yuan", "₹": "rupees"}
_ORDINAL = r"(?:\\text\{\s*(?:st|nd|rd|th)\s*\}|\{\s*(?:st|nd|rd|th)\s*\})"
_LEAD = (
    r"(?i)^\\text\{(?![^{}]*\b(?:no|not|wrong|incorrect)\b)\s*(?:the\s+)?(?:[a-z]+\s+){1,4}?"
    r"(?:is|are|equals)\s*:?\s*\}\s*(?=\S)"
)
"""`\\text{The answer is }` in front."""

_SIMPLE: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # thousands separators that cannot be anything else: {,} and ,\! and \, before 3 digits
        (r"(?<=\d)\s*(?:\{,\}|,\s*\\!|\\,)\s*(?=\d{3}(?!\d))", ""),
        (r"\\(?:text)?color\s*\{[^{}]*\}|\\underline(?![A-Za-z])|\s*\\checkmark\s*$", ""),
        (r"\\!|\\displaystyle|\\textstyle|\\limits(?![A-Za-z])|\\null(?![A-Za-z])", ""),
        (r"\\(?:left|right)\s*\.", ""),
        (r"\\(?:left|right|[bB]ig{1,2}[lrm]?)(?![A-Za-z])\s*", ""),
        (r"\\(?:lbrace)(?![A-Za-z])", r"\{"),
        (r"\\(?:rbrace)(?![A-Za-z])", r"\}"),
        (r"\\(?:langle|lparen)(?![A-Za-z])", "("),
        (r"\\(?:rangle|rparen)(?![A-Za-z])", ")"),
        (r"\\lbrack(?![A-Za-z])", "["),
        (r"\\rbrack(?![A-Za-z])", "]"),
        (r"(?<!\\)\\[,;: ]|\\q?quad(?![A-Za-z])|~|\\thinspace(?![A-Za-z])", " "),
        (r"\\phantom\s*(?:\{[^{}]*\}|.)", ""),
        (r"\\(?:[dtcs]|nice)frac(?![A-Za-z])", r"\\frac"),
        (r"\\frac\s*(\\pi|[A-Za-z0-9])\s*(\\pi|[A-Za-z0-9])(?![A-Za-z])", r"\\frac{\1}{\2}"),
        (r"\\frac\s*(\\pi|[A-Za-z0-9])\s*(?=\{)", r"\\frac{\1}"),
        (r"\\frac\s*(\{[^{}]*\})\s*(\\pi|[A-Za-z0-9])(?![A-Za-z])", r"\\frac\1{\2}"),
        (r"\\(?:text(?:normal|bf|it|rm|sf|tt)|mbox|hbox|mathrm|operatorname)\s*\{", r"\\text{"),
        (r"\\text\s+\{", r"\\text{"),
        (r"(?<![\w.^/}])(\d+)/(\d+)\s+(?=\\?[A-Za-z])", r"\\frac{\1}{\2} "),  # not `1/(2 x)`
        (r"\\(?:wide)?hat\s*\{\s*\\?([ijk])(?:math)?\s*\}", r" \1 "),
        (r"(?<=\^)\s*\{\s*(-?\d)\s*\}(?=(?!\d)[^{}]*\})", r"\1"),  # `\text{m s^{-1}}`
        (r"\\mu\s*\\text\{\s*", r"\\text{ micro"),
        (r"(\\text\{[^{}]*?)\\mu\s*", r"\1micro"),
        *((rf"\s*{sign}(?!\s*\d)", rf"\\text{{ {name}}}") for sign, name in _CURRENCIES.items()),
        (rf"[{''.join(_CURRENCIES)}]", ""),
        (rf"(?<=\d)\s*(?:\^\s*\{{\s*{_ORDINAL}\s*\}}|\^?\s*{_ORDINAL})|(?<=\d)(?:st|nd|rd|th)$", ""),
        (r"^([-\d.,/]+)\s+\(([A-Za-z]{2,}(?:\s[A-Za-z]+)*)\)$", r"\1\\text{ \2}"),  # `9 (apples)`
        (r"(?<=[\d})])\s*([\u4e00-\u9fff]+)$", r"\\text{ \1}"),  # a unit in Chinese
        (_LEAD, ""),
        (r"^(\d+)\s*(?:\\text\{\s*to\s*\}|\bto\b)\s*(\d+)$", r"\1:\2"),  # `3 to 4`
        (r"\\(?:mathbf|boldsymbol|mathit|bm|mathsf|emph|bf|rm)(?![A-Za-z])\s*", ""),
        (r"\\(?:le|leqslant|leqq)(?![A-Za-z])", r"\\leq"),
        (r"\\(?:ge|geqslant|geqq)(?![A-Za-z])", r"\\geq"),
        (r"\\neq(?![A-Za-z])", r"\\ne"),
        (r"\\lt(?![A-Za-z])", "<"),
        (r"\\gt(?![A-Za-z])", ">"),
        (r"<=", r"\\leq "),
        (r">=", r"\\geq "),
        (r"\\(?:thickapprox|approxeq|doteq|simeq)(?![A-Za-z])", r"\\approx"),
        (r"\\varnothing|\\\{\s*\\\}", r"\\emptyset"),
        (r"\\backslash(?![A-Za-z])", r"\\setminus"),
        (r"\\(?:mathbb|Bbb)\s*(?:\{R\}|R)\s*(?:\^|_)\s*\{?\s*(?:\+|>\s*0)\s*\}?", r"(0,\\infty)"),
        (r"\\(?:mathbb|Bbb)\s*(?:\{R\}|R(?![A-Za-z]))", r"(-\\infty,\\infty)"),
        (r"\^\s*\{?\s*(?:\\circ|\\degree)\s*\}?|\\degree(?![A-Za-z])", r"\\text{ degrees}"),
        (r"(\\text\{[^{}]*)\\text\{([^{}]*)\}", r"\1\2"),  # `\text{ °C}`
        (r"\+\s*\\infty", r"\\infty"),
        (r"(?<![A-Za-z\\])(?:infinity|infty|inf)(?![A-Za-z])", r"\\infty"),
        (r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi"),
        (r"(?<![A-Za-z\\])(theta|alpha|beta)(?![A-Za-z])", r"\\\1"),
        (r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", r"\\cdot "),
        (r"\*\*", "^"),
        (r"\*", r"\\cdot "),
        # `1.4e3`; an E without a point could be a digit of base 16
        (r"(?<![\w.\\])(\d+(?:\.\d+)?)e([-+]?)\+?(\d{1,3})(?![\w.])", r"\1\\cdot 10^{\2\3}"),
        (r"(?<![\w.\\])(\d+\.\d+)E([-+]?)\+?(\d{1,3})(?![\w.])", r"\1\\cdot 10^{\2\3}"),
        # `2i` would be read as a product with a symbol named i, `2 i` as a complex number
        (r"(?<=\d)i(?![A-Za-z])", " i"),
        (r"(?<=[\s,;(\[])\.(?=\d)|^\.(?=\d)|(?<=[-+$])\.(?=\d)", "0."),
        (r"\s+", " "),
    )
)
_TRIG = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
_TRIG_DEGREES = re.compile(r"(?<![\d.])(\d+(?:\.\d+)?)\s*\\text\{ degrees\}")
_PRICE = re.compile(rf"(-?)\s*(?:\\?\$|([{''.join(_CURRENCIES)}]))\s*(\d(?:[\d,.{{}}\s]|\\[!,])*)")
_DOUBLED = re.compile(r"\\\\(?=[A-Za-z]{2})")
_CURRENCY = re.compile(r"\\?\$")
_AND = (
    r"(?:,\s*)?\\text\s*\{[\s,]*(?:and|or)[\s,]*\}|(?<![A-Za-z\\{])(?:,\s*)?(?:and|or)(?![A-Za-z}])"
    r"|(?<=[\d)}\]])\s*[或和]"
)
_CONNECTOR = re.compile(_AND)
_FOR_ALL = re.compile(
    r"(?<=\S)\s*,?\s*(?:(?:\\text\{\s*)?for (?:all|any|every|each)(?:\s+real)?\s*\}?|\\forall)\s*[a-z]"
    r"(?:\s*\\in\s*\(-\\infty,\\infty\))?\s*\}?$"
)
_PHRASES = {
    phrase: meaning
    for meaning, phrases in (
        (
            "\\emptyset",
            "no solution|no solutions|there is no solution|there are no solutions|has no solution"
            "|has no solutions|empty set|null set",
        ),
        (
            "(-\\infty,\\infty)",
            "all real numbers|all reals|all real values|any real number|every real number"
            "|set of all real numbers|set of real numbers|real numbers|all real x|x is any real number"
            "|all real values of x",
        ),
        ("does not exist", "dne|does not exist|doesn t exist|limit does not exist|no limit exists"),
    )
    for phrase in phrases.split("|")
}
_WHOLE_TEXT = re.compile(r"\\text\{([^{}]*)\}")


def normalise(answer: str) -> str:
    """One spelling for brackets, fractions, spaces, signs, relations, text and degrees.

    A price alone becomes a number of dollars; other dollar signs go (they mark currency or maths
    mode), `and` and `or` become commas, a degree sign becomes the unit `degrees` or, inside a
    trigonometric expression, a factor of pi/180. Phrases such as `no solution` become symbols.
    """
    text = answer.strip().strip("*").strip()
    if "\\begin" not in text:
        text = _DOUBLED.sub(r"\\", text)
    price = _PRICE.fullmatch(text.removeprefix("$").removesuffix("$") if text.startswith("$\\$") else text)
    if price:
        sign, currency, amount = price.groups()
        text = rf"{sign}{amount.rstrip('., ')}\text{{ {_CURRENCIES.get(currency, 'dollars')}}}"
    text = _CURRENCY.sub("", text.translate(_UNICODE))
    for pattern, replacement in _SIMPLE:
        text = pattern.sub(replacement, text)
    if _TRIG.search(text):
        text = _TRIG_DEGREES.sub(r"(\\frac{\1 \\pi}{180})", text)
    whole = _WHOLE_TEXT.fullmatch(text.strip(" .,"))
    if whole:
        text = whole.group(1)
    text = _FOR_ALL.sub("", _CONNECTOR.sub(",", text))
    text = square_roots(trim(text))
    return _PHRASES.get(plain_words(text), text)


def trim(text: str) -> str:
    """Without surrounding space, quotes and closing punctuation."""
    text = text.strip().strip('"`')
    if len(text) > 1 and text[0] == text[-1] == "'":  # a single one is a prime: `f'`
        text = text.strip("'")
    return text.rstrip(" .,;:?").lstrip(" =:,;")


def square_roots(text: str) -> str:
    r"""`sqrt(...)` typed as on a keyboard becomes `\sqrt{...}`."""
    parts: list[str] = []
    at = 0
    for match in re.finditer(r"(?<![A-Za-z\\])sqrt\s*\(", text):
        end = closing(text, match.end() - 1)
        if match.start() < at or end is None:
            continue
        parts += [text[at : match.start()], "\\sqrt{", text[match.end() : end], "}"]
        at = end + 1
    return "".join(parts) + text[at:]


def closing(text: str, opening: int) -> int | None:
    """Index of the bracket that closes the one at `opening`; `(` and `[` close each other."""
    depth = 0
    for index in range(opening, len(text)):
        if text[index] in "([{":
            depth += 1
        elif text[index] in ")]}":
            depth -= 1
            if depth == 0:
                return index
    return None


def squash(text: str) -> str:
    """Without spaces that separate nothing."""
    return re.sub(r"(?<![A-Za-z0-9])\s+|\s+(?![A-Za-z0-9])", "", text.strip())


def plain_words(text: str) -> str:
    """An answer in words, as lower-case words; empty when it is a formula. `(B)` becomes `b`."""
    bare = re.sub(r"\\(?:text|overline)\s*\{([^{}]*)\}", r" \1 ", text)
    bare = re.sub(r"(?<=[A-Za-z]{2})-(?=[A-Za-z]{2})", " ", bare)
    bare = re.sub(r"(?:(?<=[A-Za-z]{3})|(?<=\b[Nn]o))!", "", bare)  # `n!` is a factorial
    if not re.fullmatch(r"[\sA-Za-z0-9().,:'\"?]+", bare):
        return ""
    words = re.findall(r"[a-z0-9]+", bare.lower())
    if not any(re.fullmatch(r"[a-z]{2,}", word) for word in words):
        return words[0] if len(words) == 1 and words[0].isalpha() and "'" not in bare else ""
    return " ".join(words[1:] if len(words) > 1 and words[0] in ("the", "a", "an", "on") else words)
