"""The program inside a completion: golden values."""

from __future__ import annotations

import time

import pytest

from dash_exp.verifiers.code.program import complete, defines, find_program
from dash_exp.verifiers.types import CodeGold

HEADER = (
    "from typing import List\n\n\ndef helper(x):\n    return x\n\n\n"
    'def total(xs: List[int]) -> int:\n    """Sum."""\n'
)
BODY = "    return sum(xs)"
WHOLE = "def total(xs: List[int]) -> int:\n    return sum(xs)"
GOLD = CodeGold("check(total)", "total", HEADER)


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("def f():\n    pass", "def f():\n    pass"),
        ("    return 1\n", "    return 1\n"),
        ("Sure:\n```python\nx = 1\n```\nDone.", "x = 1"),
        ("```py\nx = 1\n```", "x = 1"),
        ("```Python\nx = 1\n```", "x = 1"),
        ("```python3\nx = 1\n```", "x = 1"),
        ("``` python\nx = 1\n```", "x = 1"),
        ("```{.python}\nx = 1\n```", "x = 1"),
        ("```python title=a.py\nx = 1\n```", "x = 1"),
        ("```python\nx = 1\n```\n```python\nx = 2\n```", "x = 2"),
        ("```python\nx = 1\n```\n```text\n2\n```\n```\n3\n```", "x = 1"),
        ("```\nx = 1\n```\nor\n```\nx = 2\n```", "x = 2"),
        ("```\nx = 1\n```\nor\n```bash\nls\n```", "ls"),
        ("```python\n    return 1\n```", "    return 1"),
        ("1. So:\n   ```python\n   def f():\n       pass\n   ```", "def f():\n    pass"),
        ("````python\nx = '''\n```\n'''\n````", "x = '''\n```\n'''"),
        ("```python\r\nx = 1\r\ny = 2\r\n```", "x = 1\ny = 2"),
        ("```python\nx = 1", "x = 1"),
        ("```python\nx = 1\n```\nAgain:\n```python\nx = ", "x = 1"),
        ("```python\nx = 1\n```\nOutput:\n```\n1", "x = 1"),
        ("```python\nx = 1\n```\n```python\n```", "x = 1"),
        ("```python\n```", ""),
        ("```", ""),
        ("", ""),
        ("Use `x = 1` here", "Use `x = 1` here"),
        ("x = '```' + '```'", "x = '```' + '```'"),
        ("\ufeffx = 1", "x = 1"),
        ("\ufeff```python\nx = 1\n```", "x = 1"),
        ("```python\n\ufeffx = 1\n```", "x = 1"),
        ("```python\n\u00a0x = 1\n```", "\u00a0x = 1"),
        ("   ```\x0bpython\nx = 1\n  ```  ", "x = 1"),
        ("```a`b\nx = 1\n```", "```a`b\nx = 1\n```"),
    ],
)
def test_the_program_of_a_completion(text: str, program: str) -> None:
    assert find_program(text) == program


@pytest.mark.parametrize(
    ("text", "program"),
    [
        (BODY, HEADER + BODY),
        ("\n" + BODY, HEADER + "\n" + BODY),
        (f"{BODY}\n\ndef other():\n    pass", f"{HEADER}{BODY}\n\ndef other():\n    pass"),
        (WHOLE, HEADER[: HEADER.index("def total")] + WHOLE),
        (f"from __future__ import annotations\n{WHOLE}", f"from __future__ import annotations\n{WHOLE}"),
        ("    def total(): pass\n    return 1", HEADER + "    def total(): pass\n    return 1"),
    ],
)
def test_the_prompt_begins_a_program_that_does_not_define_its_function(text: str, program: str) -> None:
    assert complete(text, GOLD) == program


def test_without_a_prefix_the_program_is_what_was_written() -> None:
    assert complete(BODY, CodeGold("", "total")) == BODY


@pytest.mark.parametrize(
    ("program", "found"),
    [
        ("def f(x): pass", True),
        ("async  def f(): pass", True),
        ("class f: pass", True),
        ("f = lambda x: x", True),
        ("f: object = max", True),
        ("import a\ndef f(x):\n  pass", True),
        ("  def f(x): pass", False),
        ("def ff(x): pass", False),
        ("f == 1", False),
        ("f(1)", False),
        ("define f", False),
    ],
)
def test_what_counts_as_a_definition(program: str, found: bool) -> None:
    assert defines(program, "f") is found


@pytest.mark.parametrize(
    "line", ["```{}`", "```{} `", "``` {}`", "```\n{}`", "{}`", "``{}", "```a {}`", "```python\n{}```"]
)
@pytest.mark.parametrize("filling", ["a", " ", "`", "\t", "a `"])
def test_a_long_line_takes_linear_time(line: str, filling: str) -> None:
    """Ten times the length took a hundred times as long where a pattern tried every way to divide it."""

    def seconds(length: int) -> float:
        text = line.format(filling * (length // len(filling)))
        times = []
        for _ in range(3):
            start = time.perf_counter()
            find_program(text)
            times.append(time.perf_counter() - start)
        return min(times)

    assert seconds(100_000) < 40 * seconds(10_000) + 0.05


@pytest.mark.parametrize("text", ["`" * 300_000, "```\n" * 100_000, "```python\n" + "f" * 10**6, " " * 10**6])
def test_extraction_takes_linear_time(text: str) -> None:
    start = time.monotonic()
    complete(find_program(text), GOLD)
    assert time.monotonic() - start < 5
