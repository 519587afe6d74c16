"""Brings an answer to one LaTeX spelling without changing its meaning."""

from __future__ import annotations

import re
from collections.abc import Callable

_SIGNS = r"""
− - – - — - × \times · \cdot ÷ / ∞ \infty π \pi θ \theta ≤ \leq ≥ \geq ≠ \ne ∪ \cup ∈ \in ± \pm ° ^\circ
√ \sqrt ′ ' ² ^2 ³ ^3 ½ \frac{1}{2} ¼ \frac{1}{4} ¾ \frac{3}{4} ℝ \mathbb{R} ∅ \emptyset “ " ” " ’ '
∖ \setminus ⟨ \langle ⟩ \rangle 、 , 。 . µ \mu μ \mu ≈ \approx
"""
"""Characters, each with its LaTeX."""
_UNICODE = str.maketrans(
    {sign: latex + " " * latex[-1].isalpha() for sign, latex in re.findall(r"(\S+) (\S+)", _SIGNS)}
    | {chr(full): chr(full - 0xFEE0) for full in range(0xFF01, 0xFF5E)}  # `，` is `,`, `５` is `5`
    | dict.fromkeys("\u00a0\n\t\u3000", " ")
    | dict.fromkeys("€£¥₹", "")
)
FUNCTIONS = r"(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|log|ln|exp"
_ORDINAL = r"(?:\\text\{\s*(?:st|nd|rd|th)\s*\}|\{\s*(?:st|nd|rd|th)\s*\})"
_LEAD = (
    r"(?i)^\\text\{(?![^{}]*\b(?:no|not|wrong|incorrect)\b)\s*(?:the\s+)?(?:[a-z]+\s+){1,4}?"
    r"(?:is|are|equals)\s*:?\s*\}\s*(?=\S)"
)
"""`\\text{The answer is }` in front."""
_DENIAL = (
    r"(?<=[\d)}\]])\s*(?:,\s*(?:\\text\{\s*)?|\\text\{\s*[,(]?\s*|\(|\s)(?:(?:and|but)\s+)?"
    r"(?:not|rather than|instead of)\s+(?:\}\s*)?(?=[-\d\\(]).{1,80}$"
)
"""What the answer is not: `14, not 15`."""
_ROWS = (
    r"(?:\\?\{\s*)?\\begin\{(cases|array|aligned|gathered)\}(?:\{[clr|]+\})?"
    r"([^;<>]{1,300}?)\\end\{\1\}(?:\s*\\\})?"
)


def _commands(table: str) -> list[tuple[str, str]]:
    """Patterns of commands; `table` has each replacement before the commands that it stands for."""
    rows = [row.split() for row in table.split(", ")]
    return [(rf"\\(?:{'|'.join(commands)})(?![A-Za-z])", meaning) for meaning, *commands in rows]


def _equations(match: re.Match[str]) -> str:
    r"""`x=1 \\ y=2` inside an environment as `x=1, y=2`; other rows stay as they are."""
    rows = [row.replace("&", "").strip(" ,") for row in match.group(2).split("\\\\") if row.strip()]
    return ", ".join(rows) if rows and all("=" in row for row in rows) else match.group()


_Meaning = str | Callable[[re.Match[str]], str]
_TABLE: list[tuple[str, _Meaning]] = [
    # thousands separators that cannot be anything else: {,} and ,\! and \, before 3 digits
    (r"(?<=\d)\s*(?:\{,\}|,\s*\\!|\\,)\s*(?=\d{3}(?!\d))", ""),
    (r"\\(?:text)?color\s*\{[^{}]*\}|\\underline(?![A-Za-z])|\s*\\checkmark\s*$", ""),
    (r"\\!|\\displaystyle|\\textstyle|\\limits(?![A-Za-z])|\\null(?![A-Za-z])", ""),
    (r"\\(?:left|right)\s*\.", ""),
    (r"\\(?:left|right|[bB]ig{1,2}[lrm]?)(?![A-Za-z])\s*", ""),
    *_commands(
        r"\{ lbrace, \} rbrace, ( langle lparen, ) rangle rparen, [ lbrack, ] rbrack, | lvert rvert vert"
    ),
    (r"(?<!\\)\\[,;: ]|\\q?quad(?![A-Za-z])|~|\\thinspace(?![A-Za-z])", " "),
    (r"\\phantom\s*(?:\{[^{}]*\}|.)", ""),
    (r"\{(?:[pb]?small|[pb])?matrix\*?\}", "{pmatrix}"),
    (_ROWS, _equations),
    (r"\\(?:[dtcs]|nice)frac(?![A-Za-z])", r"\\frac"),
    (r"\\frac\s*(\\pi|[A-Za-z0-9])\s*(\\pi|[A-Za-z0-9])(?![A-Za-z])", r"\\frac{\1}{\2}"),
    (r"\\[dt]binom(?![A-Za-z])", r"\\binom"),
    (r"\{([^{}]{1,80})\\choose(?![A-Za-z])([^{}]{1,80})\}", r"\\binom{\1}{\2}"),
    (r"\\(?:text(?:normal|bf|it|rm|sf|tt)|mbox|hbox|mathrm|operatorname\*?)\s*\{|\\text\s+\{", r"\\text{"),
    (rf"\\text\{{\s*({FUNCTIONS}|[ei]|sqrt)\s*\}}", r" \1 "),
    (rf"\\text\{{\s*((?:{FUNCTIONS}|sqrt)\s*\(?\s*-?[\w.]+\s*\)?)\s*\}}", r" \1 "),
    (r"(?<![\w.^/}])(\d+)/(\d+)\s+(?=\\?[A-Za-z])", r"\\frac{\1}{\2} "),  # not `1/(2 x)`
    (r"(\\text\{[^{}]*\^)\s*\{\s*(-?\d)\s*\}", r"\1\2"),  # `\text{m s^{-1}}`
    (rf"(?<=\d)\s*(?:\^\s*\{{\s*{_ORDINAL}\s*\}}|\^?\s*{_ORDINAL})|(?<=\d)(?:st|nd|rd|th)$", ""),
    (r"^([-\d.,/]+)\s+\(([A-Za-z]{2,}(?:\s[A-Za-z]+)*)\)$", r"\1\\text{ \2}"),  # `9 (apples)`
    (r"\\text\{\s*per\s?cent\s*\}|(?<![A-Za-z\\])per\s?cent(?![A-Za-z])", r"\\%"),
    (_LEAD, ""),
    (_DENIAL, ""),
    (r"^(?:\\text\{\s*)?(?:minus|negative)\s*\}?\s*(?=[\d\\])", "-"),
    (r"^(\d+)\s*(?:\\text\{\s*to\s*\}|\bto\b)\s*(\d+)$", r"\1:\2"),  # `3 to 4`
    (r"\\(?:mathbf|boldsymbol|mathit|bm|mathsf|emph|bf|rm)(?![A-Za-z])\s*", ""),
    *_commands(r"\\leq le leqslant leqq, \\geq ge geqslant geqq, \\ne neq, < lt, > gt"),
    (r"<=", r"\\leq "),
    (r">=", r"\\geq "),
    *_commands(
        r"\\approx thickapprox approxeq doteq simeq, \\setminus backslash, \\emptyset varnothing, \\log lg"
    ),
    (r"\\\{\s*\\\}", r"\\emptyset"),
    (r"\\(?:mathbb|Bbb)\s*(?:\{R\}|R)\s*(?:\^|_)\s*\{?\s*(?:\+|>\s*0)\s*\}?", r"(0,\\infty)"),
    (r"\\(?:mathbb|Bbb)\s*(?:\{R\}|R(?![A-Za-z]))", r"(-\\infty,\\infty)"),
    (r"\^\s*\{?\s*(?:\\circ|\\degree)\s*\}?|\\degree(?![A-Za-z])", r"\\text{ degrees}"),
    (r"(\\text\{[^{}]*)\\text\{([^{}]*)\}", r"\1\2"),  # `\text{ °C}`
    (r"\+\s*\\infty", r"\\infty"),
    (r"(?<![A-Za-z\\])(?:infinity|infty|inf|oo)(?![A-Za-z])", r"\\infty"),
    (r"(?<![A-Za-z\\])(pi|theta|alpha|beta)(?![A-Za-z])", r"\\\1"),
    # `sin(x)`, `ln 2`, `cos2x`; but `5 sec` is a time, and words in a text stay
    (
        rf"\\text\{{[^{{}}]*\}}|(?<![A-Za-z\\])({FUNCTIONS})(?=\s*(?:[\d(\\{{^_]|[A-Za-z](?![A-Za-z])))",
        lambda found: rf"\{found.group(1)} " if found.group(1) else found.group(),
    ),
    (r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", r"\\cdot "),
    (r"\*\*", "^"),
    (r"\*", r"\\cdot "),
    # `1.4e3`; an E without a point could be a digit of base 16
    (r"(?<![\w.\\])(\d+(?:\.\d+)?)e([-+]?)\+?(\d{1,3})(?![\w.])", r"\1\\cdot 10^{\2\3}"),
    (r"(?<![\w.\\])(\d+\.\d+)E([-+]?)\+?(\d{1,3})(?![\w.])", r"\1\\cdot 10^{\2\3}"),
    (r"(?<=[\s,;(\[])\.(?=\d)|^\.(?=\d)|(?<=[-+$])\.(?=\d)", "0."),
    (r"\s+", " "),
]
SPELLINGS = tuple((re.compile(pattern), meaning) for pattern, meaning in _TABLE)
"""What other people write, each with our spelling; applied in this order."""

_TRIG = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
_TRIG_DEGREES = re.compile(r"(?<![\d.])(\d+(?:\.\d+)?)\s*\\text\{ degrees\}")
_PRICE = re.compile(r"(-?)\s*\\?\$\s*(\d(?:[\d,.{}\s]|\\[!,])*)")
_ROOT = re.compile(r"√\s*(\d+(?:\.\d+)?)")
_DOUBLED = re.compile(r"\\\\(?=[A-Za-z]{2})")
_CURRENCY = re.compile(r"\\?\$")
_CONNECTOR = re.compile(
    r"(?:,\s*)?\\text\s*\{[\s,]*(?:and|or)[\s,]*\}|(?<![A-Za-z\\{])(?:,\s*)?(?:and|or)(?![A-Za-z}])"
    r"|(?<=[\d)}\]])\s*[或和]"
)
_MIXED = re.compile(r"(?<=\d)\s*(?:\\text\{\s*and\s*\}|and)\s*(?=\d+\s*/\s*\d|\\frac\s*\{?\d)")
_PLUS = re.compile(
    r"(?<=hundred )and\b|(?<=thousand )and\b|(?<=million )and\b"
    r"|\band\b(?=\s+(?:an?\s|one[\s-]|two[\s-]|three[\s-])?(?:hal|third|quarter|fourth|fifth|eighth|tenth))"
)
_FOR_ALL = re.compile(
    r"(?<=\S)\s*,?\s*(?:(?:\\text\{\s*)?for (?:all|any|every|each)(?:\s+real)?\s*\}?|\\forall)\s*[a-z]"
    r"(?:\s*\\in\s*\(-\\infty,\\infty\))?\s*\}?$"
)
_SYNONYMS = r"""
\emptyset = no solution | no solutions | there is no solution | there are no solutions | has no solution
\emptyset = has no solutions | empty set | null set
(-\infty,\infty) = all real numbers | all reals | all real values | any real number | every real number
(-\infty,\infty) = set of all real numbers | set of real numbers | real numbers | all real x
(-\infty,\infty) = x is any real number | all real values of x
does not exist = dne | does not exist | doesn t exist | limit does not exist | no limit exists
"""
_PHRASES = {
    phrase: meaning
    for meaning, phrases in (line.split(" = ") for line in _SYNONYMS.strip().split("\n"))
    for phrase in phrases.split(" | ")
}
_WHOLE_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_CALL = re.compile(r"(?<![A-Za-z])(\\?sqrt\s*(?:\[[^\[\]]{1,20}\])?|\\?exp|\\?cbrt|[Aa]bs|\^)\s*\(")
_CALLS = {"exp": ("e^{", "}"), "cbrt": ("\\sqrt[3]{", "}"), "abs": ("|", "|"), "^": ("^{", "}")}


def normalise(answer: str) -> str:
    """One spelling for brackets, fractions, spaces, signs, relations, functions, text and degrees.

    An answer that is a price becomes a number of dollars; other dollar signs go (they mark currency or maths
    mode), `and` and `or` become commas, a degree sign becomes the unit `degrees` or, inside a
    trigonometric expression, a factor of pi/180. Phrases such as `no solution` become symbols.
    """
    text = answer.strip().strip("*").strip()
    if "\\begin" not in text:
        text = _DOUBLED.sub(r"\\", text)
    price = _PRICE.fullmatch(text.removeprefix("$").removesuffix("$") if text.startswith("$\\$") else text)
    if price:
        text = price[1] + price[2].removesuffix("\\,").rstrip("., ") + "\\text{ dollars}"
    text = _CURRENCY.sub("", text)
    text = _ROOT.sub(r"\\sqrt{\1}", text).translate(_UNICODE)
    for pattern, meaning in SPELLINGS:
        text = pattern.sub(meaning, text)
    if _TRIG.search(text):
        text = _TRIG_DEGREES.sub(r"(\\frac{\1 \\pi}{180})", text)
    complete = _WHOLE_TEXT.fullmatch(text.strip(" .,"))
    if complete:
        text = complete.group(1)
    text = _FOR_ALL.sub("", _CONNECTOR.sub(",", _PLUS.sub("plus", _MIXED.sub(" ", text))))
    text = _calls(trim(text))
    return _PHRASES.get(plain_words(text), text)


def trim(text: str) -> str:
    """Without surrounding space, quotes and closing punctuation."""
    text = text.strip().strip('"`')
    if len(text) > 1 and text[0] == text[-1] == "'":  # a single one is a prime: `f'`
        text = text.strip("'")
    return text.rstrip(" .,;:?").lstrip(" =:,;")


def _calls(text: str) -> str:
    r"""`sqrt(...)`, `\sqrt(...)`, `exp(...)`, `abs(...)` and `^(...)` with braces or strokes."""
    at = 0
    while found := _CALL.search(text, at):
        end, name = closing(text, found.end() - 1), found.group(1).replace("\\", "").lower()
        at = found.end()
        if end is not None:
            before, after = _CALLS.get(name, (f"\\{name.replace(' ', '')}{{", "}"))
            text = text[: found.start()] + before + text[at:end] + after + text[end + 1 :]
            at = found.start() + len(before)
    return text


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
