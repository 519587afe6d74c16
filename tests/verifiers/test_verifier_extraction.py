"""Finding the answer in a completion, and staying linear on hostile text."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dash_exp.config.schema import MATH_EXTRACTIONS
from dash_exp.verifiers.math.extract import EXTRACTORS, MAX_CANDIDATE_CHARS, extract


@pytest.mark.parametrize(
    ("text", "candidate"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"first \boxed{1}, then \boxed{2}", "2"),
        (r"\fbox{7}", "7"),
        (r"\boxed 5", "5"),
        (r"$\boxed 12$.", "12"),
        (r"\boxed {5}", "5"),
        (r"\boxed{1}, no: \boxed 2", "2"),
        (r"\boxed 1, no: \boxed{2}", "2"),
        (r"\boxed{ \{1, 2\} }", r"\{1, 2\}"),
        (r"\boxed{x = \boxed{3}}", "x = {3}"),
        (r"\boxed{\boxed{1}, \boxed{2}}", "{1}, {2}"),
        (r"\boxed{5} and then cut off \boxed{\frac{1", "5"),
        (r"{ an open brace, then \boxed{5}", "5"),
        (r"} a stray brace, then \boxed{5}", "5"),
        ("\\boxed{5}\n1\n2\n3\n4\n5\n6", "5"),
        ("\\boxed{a\nb}", "a\nb"),
        (r"The roots are $\boxed{3}$, $\boxed{5}$ and $\boxed{7}$.", "3, 5, 7"),
        (r"\boxed{3}, \boxed{5} \text{ and } \boxed{7}", "3, 5, 7"),
        (r"$x=\boxed{3}$ or $x=\boxed{-2}$", r"3 \text{ or } -2"),
        (r"\boxed{3}, \boxed{5}. No: \boxed{7}", "7"),
        (r"\boxed{3} is wrong, and so \boxed{7}", "7"),
        (r"\boxed{3}, so $\boxed{ }$", "3"),
        (r"\boxed{3} and \boxed{}", "3"),
        (r"\boxed{}", None),
        (r"\boxed{5", None),
        (r"\boxedfoo{5}", None),
        ("the answer is 5", None),
        ("", None),
    ],
)
def test_boxed(text: str, candidate: str | None) -> None:
    assert extract(text, "boxed") == candidate


@pytest.mark.parametrize(
    ("text", "candidate"),
    [
        (r"The answer is 3. Or \boxed{4}.", "4"),
        ("a = 3\n#### 1,234", "1,234"),
        ("The answer is 3/4.", "3/4"),
        ("The answer is $\\frac{3}{4}$.", r"\frac{3}{4}"),
        ("Therefore, the final answer is: $x = 5$. I hope it is correct.", "x = 5"),
        ("**Answer:** 18", "18"),
        ("The answer is therefore 18.", "18"),
        ("The answer is $1,234.50.", "$1,234.50"),
        ("She earns $1,234.50", "1,234.50"),
        ("The answer is \\(\\sqrt{2}\\).", r"\sqrt{2}"),
        ("The answer is 18 dollars for the whole week.", "18"),
        ("answer: east", "east"),
        ("we get $x = 3$.", "x = 3"),
        ("we get\n\\[x = 3\\]", "x = 3"),
        ("we get $x = 3$ apples in 2 days", "2"),
        ("first 5, then 7", "7"),
        ("it falls to -3", "-3"),
        ("it falls to −3", "-3"),
        ("which is 20%", "20%"),
        ("So $x = 3$ or $x = -2$.", "x = 3, x = -2"),
        ("The solutions are $x=3$ and $x=-2$.", "x=3, x=-2"),
        ("so x = 3 or x = -2", "3, -2"),
        ("Either 5 or 6", "5, 6"),
        ("So $x = 3$ and $y = 4$.", "y = 4"),
        ("The answer is $3$ or $-2$.", "3, -2"),
        ("The answer is either $5$ or $3$.", "5, 3"),
        ("The answers are $5$, $6$ and $7$.", "5, 6, 7"),
        ("The answers are 3 and -2.", "3 and -2"),
        ("The answer is $3$, and $3$ is prime.", "3"),
        ("The answer is 3, because 2+1=3.", "3"),
        ("The answer is $5 or $6.", "$5 or $6"),
        ("The correct option is B.", "B"),
        ("**Answer**: 42 apples in 3 bags", "42"),
        ("#### Step 3: Conclusion\nThe total is 42.", "42"),
        ("#### 42\n\nThis took 3 steps.", "42"),
        ("答案：42。", "42"),
        ("The answer is 14, not 15.", "14"),
        ("It is 14, not 15", "14"),
        ("So $x = 14$, not $x = 15$.", "x = 14"),
        ("The answer is 3 1/2 cups of sugar.", "3 1/2"),
        ("no idea", None),
        ("", None),
    ],
)
def test_boxed_or_last(text: str, candidate: str | None) -> None:
    assert extract(text, "boxed_or_last") == candidate


@pytest.mark.parametrize(
    ("text", "candidate"),
    [
        ("3 cats and 1,234.50 dogs", "1,234.50"),
        ("10-3", "3"),
        ("x = -3", "-3"),
        ("1, 2, 3", "3"),
        ("about .5", ".5"),
        ("3/4", "3/4"),
        ("it costs $5.", "5"),
        ("5e1", "5e1"),
        ("about 6.02E-23", "6.02e-23"),
        ("5ex", "5"),
        ("2 eggs", "2"),
        ("He walked 2 1/2 miles.", "2 1/2"),
        ("He walked 2 and 1/2 miles.", "2 1/2"),
        ("about 3 and a half cups", "3 and a half"),
        ("2.5 million people", "2.5 million"),
        ("it was 5 degrees below zero", "5 degrees below zero"),
        ("14, not 15", "14"),
        ("14 rather than 15", "14"),
        ("not 15", "15"),
        ("negative 5", "-5"),
        ("10 - 3", "3"),
        ("it costs $5k", "5e3"),
        ("none", None),
    ],
)
def test_last_number(text: str, candidate: str | None) -> None:
    assert extract(text, "last_number") == candidate


@pytest.mark.parametrize(
    ("text", "candidate"),
    [("#### 18", "18"), ("#### 1\n#### 2\nrest", "2"), ("####18", "18"), ("18", None), ("####", None)],
)
def test_hash(text: str, candidate: str | None) -> None:
    assert extract(text, "hash") == candidate


def test_whole_text() -> None:
    assert extract("  3 + 4 ", "whole") == "3 + 4"
    assert extract(" \n", "whole") is None


def test_unknown_mode_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="boxed_or_last"):
        extract("5", "boxd")


CONTENT = st.recursive(
    st.text("ab1+ ", max_size=5),
    lambda inner: st.lists(inner, max_size=3).map(lambda parts: "{" + "".join(parts) + "}"),
    max_leaves=8,
)


@given(st.text("ab {}$\n.", max_size=30), CONTENT, st.text("ab $\n.", max_size=30))
def test_balanced_content_is_extracted(before: str, content: str, after: str) -> None:
    text = f"{before}\\boxed{{{content}}}{after}"
    assert extract(text, "boxed") == (content.strip() or None)


@given(st.text())
def test_any_text_gives_a_bounded_candidate(text: str) -> None:
    for mode in EXTRACTORS:
        candidate = extract(text, mode)
        assert candidate is None or 0 < len(candidate) <= MAX_CANDIDATE_CHARS


LONG = 200_000
HOSTILE = {
    "boxes that never close": r"\boxed{",
    "open braces": "{",
    "braces after a box": r"\boxed{}{",
    "bare boxes": r"\boxed ",
    "closed boxes": r"\boxed{1}",
    "backslashes": "\\",
    "opening parentheses": r"\(",
    "opening brackets": r"\[",
    "dollars": "$$ ",
    "single dollars": "$a\n",
    "digits": "1",
    "grouped digits": "123,",
    "points": "1.",
    "signs": "-",
    "slashes": "1/",
    "spaces": " ",
    "answers": "answer is ",
    "hashes": "#",
    "stars": "**",
}


@pytest.mark.parametrize("piece", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("head", ["", "\\boxed{"], ids=["", "in a box"])
def test_time_is_linear_in_hostile_text(piece: str, head: str) -> None:
    """Quadratic work on 200 kB would take many minutes."""
    text = head + piece * (LONG // len(piece))
    start = time.perf_counter()
    for mode in EXTRACTORS:
        candidate = extract(text, mode)
        assert candidate is None or len(candidate) <= MAX_CANDIDATE_CHARS
    assert time.perf_counter() - start < 30


def test_the_schema_allows_just_the_extractions_there_are() -> None:
    assert set(MATH_EXTRACTIONS) == set(EXTRACTORS)
