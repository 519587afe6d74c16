"""The program inside a completion: golden values."""

# ruff: noqa: E501 (programs, one to a line)

from __future__ import annotations

import time
from typing import Any

import pytest

from dash_exp.verifiers.code.program import assemble, candidates, complete, defines, find_program
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
            candidates(text, GOLD)
            times.append(time.perf_counter() - start)
        return min(times)

    assert seconds(100_000) < 40 * seconds(10_000) + 0.05


@pytest.mark.parametrize("text", ["`" * 300_000, "```\n" * 30_000, "```python\n" + "f" * 10**6, " " * 10**6])
def test_extraction_takes_linear_time(text: str) -> None:
    start = time.monotonic()
    complete(find_program(text), GOLD)
    candidates(text, GOLD)
    assert time.monotonic() - start < 5


BEHIND = {
    "nothing": "",
    "a function that is cut off": "\n\ndef other(x, y",
    "a function with a docstring that is cut off": '\n\ndef other(x):\n    """ It is\n',
    "a function": "\n\ndef other(x):\n    return x\n",
    "a class that is cut off": "\n\nclass Solution:\n    def total(self, ",
    "a decorator that is cut off": "\n\n@pytest.mark.parametrize('x', [\n",
    "a docstring": '\n"""\nThis sums.\n"""\n',
    "a docstring that is cut off": "\n'''\nIt's a sum",
    "a fence": "\n```\n",
    "two fences": "\n```\n```\n",
    "a fence and prose": "\n```\n\nThis (really: it's simple sums.\n",
    "a fence of tildes": "\n~~~\nok\n",
    "prose": "\n\nThis function works as it's (see above.\n",
    "prose that is an expression": "\n\nDone\n",
    "a list": "\n\n1. First it sums\n- then `total` is returned\n",
    "prose that is indented a little": "\n This is it.\n",
    "a heading": "\n### Explanation\nIt sums.\n\n```python\ntotal(2)\n```\n",
    "an end tag": "\n</code>\n</answer>\n",
    "a use that fails": "\n\nprint(total(input()))\n",
    "a use that is kept": "\n\nresult = total(input())\nprint(result)\n",
    "a wrong assertion": "\n\nassert total([1]) == 2\n",
    "a test": "\n\nclass T(unittest.TestCase):\n    pass\n\nunittest.main()\n",
    "the usual guard": "\n\nif __name__ == '__main__':\n    total(input())\n",
    "an exit": "\n\nimport sys\nsys.exit(0)\n",
    "an error": "\n\nraise NotImplementedError\n",
    "an import that fails": "\n\nimport nothing_of_that_name\n",
    "a session": "\n\n>>> total([1])\n1\n",
    "what no text may contain": "\n# \ud800\0\nx = '\ud800",
    "an end of file": "\x1a",
    "many lines of prose": "\n" + "It's a (long story.\n" * 300,
    "a block of its use": "\n```\n\nUsage:\n```python\nprint(total(3))\n```\n",
    "a block that is cut off": "\n```python\nprint(total(3",
}
BLOCKS = {
    "a block": "```python\n{}\n```",
    "a block in prose": "Here it's:\n\n```python\n{}\n```\n\nIt sums.",
    "without a language": "```\n{}\n```\n```\ntotal(1)\n```",
    "a use behind": "```python\n{}\n```\nTry it:\n```python\nfrom a import total\nx = total(3)\n```",
    "its output behind": "```python\n{}\n```\nOutput:\n```\ntotal: 1\n```",
    "a command behind": "```python\n{}\n```\nRun:\n```bash\npython total.py\n```",
    "its name taken behind": "```python\n{}\n```\n```python\ntotal = total([3])\n```",
    "a fence on its last line": "{}```\nok",
    "a use that is cut off": "```python\n{}\n```\n```python\nprint(total(",
    "a use inside": "```python\n{}\n\nprint(total(1, 2))\n```",
    "a better version": "```python\ndef total(x):\n    return 0\n```\nBetter:\n```python\n{}\n```",
    "a version that is cut off": "```python\n{}\n```\nOr:\n```python\ndef total(xs):\n    return (1,",
    "a wrong docstring before": '```python\ndef total(x):\n    """ It is\n```\nNo:\n```python\n{}\n```',
    "no closing fence": "```python\n{}",
    "tildes": "~~~python\n{}\n~~~\nok",
    "four backticks": "````python\n{}\n````",
    "prose around, no fence": "Here it's:\n\n{}\n\nDone.",
}
FENCED_DOCSTRING = 'def total(xs):\n    """\n    ```\n    total(1)\n    ```\n```\n    """\n    return sum(xs)'
SPELLINGS = {
    "plain": "def total(xs):\n    return sum(xs)\n",
    "a fence in its docstring": FENCED_DOCSTRING,
    "a helper": "def add(a, b):\n    return a + b\n\n\ndef total(xs):\n    return add(*xs)",
    "a helper behind": "def total(xs):\n    return add(*xs)\n\n\ndef add(a, b):\n    return a + b",
    "a table behind": "def total(xs):\n    return T[0] + sum(xs)\n\n\nT = {}\nfor i in range(3):\n    T[i] = 0",
    "brackets over lines": "START = [\n0,\n]\ndef total(xs):\n    return sum(xs, *START)",
    "a text over lines": "TEXT = '''\ndef total\n'''\ndef total(xs):\n    return sum(xs)",
    "a decorator": "import functools\n@functools.cache\ndef total(xs):\n    return sum(xs)",
    "in a condition": "if True:\n    def total(xs):\n        return sum(xs)",
    "a function by name": "total = sum",
    "an alternative": "try:\n    import no_such\nexcept ImportError:\n    no_such = None\ndef total(x): return sum(x)",
    "wrapped later": "def total(xs):\n    return 0\ntotal = (lambda old: lambda xs: old(xs) + sum(xs))(total)",
}


def total_of(text: str, gold: CodeGold) -> object:
    space: dict[str, Any] = {"__name__": "program"}
    exec(assemble(candidates(text, gold), gold), space)  # noqa: S102
    return space["total"]((1, 2))


@pytest.mark.parametrize("behind", BEHIND)
def test_what_follows_does_not_change_the_program(behind: str) -> None:
    for body in (BODY, "\n" + BODY, f'    """Sum. It\'s ```x```."""\n    # sum\n\n{BODY}'):
        assert total_of(f"{body}\n{BEHIND[behind]}", GOLD) == 3
    for spelling in SPELLINGS.values():
        for gold in (GOLD, CodeGold("", "total")):
            assert total_of(f"{spelling}\n{BEHIND[behind]}", gold) == 3, (spelling, gold.prefix)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_block_that_defines_the_entry_point(block: str) -> None:
    for name, spelling in SPELLINGS.items():
        if (block, name) == ("a wrong docstring before", "a fence in its docstring"):
            continue  # nothing tells which fences are text
        for gold in (GOLD, CodeGold("", "total")):
            assert total_of(BLOCKS[block].replace("{}", spelling), gold) == 3, (spelling, gold.prefix)


@pytest.mark.parametrize(
    "before", [" Sure:\n", " Sure, it sums.\n\n", "    The sum.\n", "  # a\n\n", "\n \n"]
)
def test_what_is_indented_but_no_body(before: str) -> None:
    for spelling in SPELLINGS.values():
        assert total_of(f"{before}```python\n{spelling}\n```\nIt sums.", GOLD) == 3, spelling


def test_of_several_definitions_the_first_completes_a_header_and_the_last_is_a_program() -> None:
    other = "\n\ndef total(xs):\n    return 0\n"
    assert total_of(BODY + other, GOLD) == 3
    assert total_of(WHOLE + other, GOLD) == 0
    assert total_of(f"```python\n{WHOLE}\n```\n```python{other}```", GOLD) == 0
    assert total_of(f"```python\n{BODY}\n```", GOLD) == 3
    for gold in (GOLD, CodeGold("", "total")):
        assert total_of(" def total(xs):\n    return sum(xs)\nDone", gold) == 3


@pytest.mark.parametrize(
    "text", ["def total(xs) return 1", "    return (1", "total = ", "x = '\0'", "(" * 9000]
)
def test_what_cannot_be_read_stays_unreadable(text: str) -> None:
    with pytest.raises((SyntaxError, ValueError, MemoryError, RecursionError)):
        assemble(candidates(text, GOLD), GOLD)
