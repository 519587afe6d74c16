"""The verifier of programs: outcomes, what tests may do, limits of time, memory of verdicts."""

# ruff: noqa: E501 (sources of programs, one to a line)

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import pytest
from code_fixtures import CONFINEMENTS, descendants, verifier_in

from dash_exp.types import Score
from dash_exp.verifiers.frontends import PooledCodeVerifier, Wanted
from dash_exp.verifiers.gold import CodeGold
from dash_exp.verifiers.protocol import Verifier

GENEROUS_S = 60.0
HEADER = 'def helper(x):\n    return x * 2\n\n\ndef f(x):\n    """Twice helper."""\n'


@pytest.fixture(scope="module", params=CONFINEMENTS)
def verifier(request: pytest.FixtureRequest) -> Iterator[PooledCodeVerifier]:
    with verifier_in(request.param, 10.0) as shared:
        yield shared


def verdict(verifier: Verifier, program: str, tests: str, **more: object) -> Score:
    gold = CodeGold(tests, **({"entry_point": "f"} | more))  # type: ignore[arg-type]
    return verifier.submit(program, gold.to_text()).result(GENEROUS_S)


@pytest.mark.parametrize(
    ("program", "outcome", "detail"),
    [
        ("def f(x): return x + 1", "correct", ""),
        ("Sure!\n```python\ndef f(x): return x + 1\n```", "correct", ""),
        ("def f(x): return x", "wrong", "AssertionError:  (line 1 of the tests)"),
        ("def g(x): return x", "wrong", "NameError: name 'f' is not defined"),
        ("def f(x): return 1 / 0", "wrong", "ZeroDivisionError: division by zero (line 1 of the tests)"),
        ("import nothing_of_that_name", "wrong", "ModuleNotFoundError: No module named"),
        ("class E(ValueError): pass\ndef f(x): raise E('no')", "wrong", "ValueError: no"),
        ("def f(x) return x", "unparsed", "SyntaxError: expected ':'"),
        ("def f(x):\nreturn x", "unparsed", "IndentationError"),
        ("```python\n```", "no_answer", "no program"),
        ("", "no_answer", "no program"),
        ("import os\nos._exit(3)", "crashed", "the program's process failed"),
        ("x = bytearray(2**40)", "crashed", "out of memory"),
    ],
)
def test_outcomes(verifier: PooledCodeVerifier, program: str, outcome: str, detail: str) -> None:
    got = verdict(verifier, program, "assert f(1) == 2")
    assert (got.outcome, got.value) == (outcome, 1.0 if outcome == "correct" else 0.0)
    assert detail in got.detail


@pytest.mark.parametrize(
    ("gold", "detail"),
    [
        ("no JSON", "the gold is broken"),
        ("[1]", "the gold is broken"),
        ('{"tests": "", "unknown": 1}', "the gold is broken"),
        (CodeGold("assert f(1) ==", "f").to_text(), "the tests do not compile: SyntaxError"),
        (CodeGold("import nothing_at_all\nassert f(1)", "f").to_text(), "need what is not installed"),
    ],
)
def test_a_broken_gold_is_our_fault(verifier: PooledCodeVerifier, gold: str, detail: str) -> None:
    got = verifier.submit("def f(x): return x", gold).result(GENEROUS_S)
    assert got.outcome == "verifier_error"
    assert math.isnan(got.value)
    assert detail in got.detail


@pytest.mark.parametrize(
    ("program", "tests"),
    [
        ("def f(x): x.append(3)", "y = [1]\nf(y)\nassert y == [1, 3]"),
        ("def f(x): x['b'] = 2", "y = {'a': 1}\nf(y)\nassert y == {'a': 1, 'b': 2}"),
        ("def f(x): x[0][0] = 5", "y = [[1]]\nf(y)\nassert y == [[5]]"),
        ("def f(x): x *= 2", "import numpy as np\ny = np.ones(2)\nf(y)\nassert (y == 2).all()"),
        (
            "def f(n):\n    for i in range(n): yield i",
            "assert list(f(3)) == [0, 1, 2]\nassert next(f(1)) == 0",
        ),
        (
            "def f(x): return map(str, x)",
            "assert list(f([1])) == ['1']\nassert sum(1 for _ in f([1, 2])) == 2",
        ),
        ("def f(x): return lambda y: x + y", "assert f(1)(2) == 3"),
        ("def f(x): return (i for i in x)", "assert set(f([1, 1])) == {1}"),
        ("def f(x): raise KeyError('no')", "try:\n    f(1)\n    assert False\nexcept LookupError: pass"),
        ("def f(x): raise StopIteration", "try:\n    f(1)\n    assert 0\nexcept StopIteration: pass"),
        (
            "class f:\n    def __init__(s, x): s.x = x\n    def get(s): return s.x",
            "assert f(3).get() == f(3).x == 3",
        ),
        (
            "class P:\n    def __init__(s, a): s.a = a\n    def __eq__(s, o): return s.a == o.a\n"
            "def f(ps): return P(max(p.a for p in ps))",
            "assert f([P(1), P(4)]) == P(4)\nassert f([P(1)]) != P(2)",
        ),
        ("class P:\n    def __len__(s): return 3\ndef f(x): return P()", "assert len(f(1)) == 3"),
        (
            "class P:\n    def __str__(s): return 'me'\ndef f(x): return P()",
            "assert str(f(1)) == f'{f(1)}' == 'me'",
        ),
        ("import math\ndef f(x): return math.sqrt(x)", "assert math.isclose(f(4), 2)"),
        ("import numpy as np\ndef f(x): return np.array(x)", "assert f([1, 2]).tolist() == [1, 2]"),
        ("import numpy as np\ndef f(x): return np.mean(x)", "assert abs(f([1, 2]) - 1.5) < 1e-9"),
        ("def f(*a, k=1, **b): return len(a) + k + len(b)", "assert f(1, 2, k=3, z=4) == 6"),
        (
            "from dataclasses import dataclass\n@dataclass\nclass P:\n    a: 'int'\ndef f(x): return P(x).a",
            "assert f(1) == 1",
        ),
        ("import functools\n@functools.lru_cache\ndef f(x): return x", "assert f(2) == 2"),
        ("f = lambda x: x", "assert f(None) is None and f(True) is True"),
        ("def f(x): return float('nan')", "assert f(1) != f(1)"),
        ("print('hello')\ndef f(x):\n    print(x)\n    return x", "assert f(1) == 1"),
        ("def f(x): return x\nif __name__ == '__main__':\n    print(f(input()))", "assert f(1) == 1"),
        ("import asyncio\nasync def g(x): return x\ndef f(x): return asyncio.run(g(x))", "assert f(1) == 1"),
        (
            "from threading import Thread\ndef f(x):\n    y = []\n    t = Thread(target=y.append, args=(x,))\n"
            "    t.start()\n    t.join()\n    return y",
            "assert f(1) == [1]",
        ),
    ],
)
def test_what_tests_may_do(verifier: PooledCodeVerifier, program: str, tests: str) -> None:
    assert verdict(verifier, program, tests) == Score(1.0, "correct")


@pytest.mark.parametrize(
    ("program", "tests", "outcome"),
    [
        ("helper = lambda x: 0\ndef f(x): return 0", "assert f(3) == helper(3)", "wrong"),
        ("def f(x): return helper(x)", "assert f(3) == 6", "correct"),
        ("    return helper(x)", "assert f(3) == helper(3)", "correct"),
        (
            "def f(x): return 0\ndef len(x): return 0\ndef all(x): return True",
            "assert len([1]) == f(1)",
            "wrong",
        ),
        ("import os\ndef f(x): os._exit(0)", "try: f(1)\nexcept: pass", "crashed"),
        ("def f(x): raise SystemExit(0)", "f(1)", "wrong"),
    ],
)
def test_what_a_program_cannot_change(
    verifier: PooledCodeVerifier, program: str, tests: str, outcome: str
) -> None:
    assert verdict(verifier, program, tests, prefix=HEADER).outcome == outcome


def test_a_request_of_many_kilobytes(verifier: PooledCodeVerifier) -> None:
    table = {i: str(i) * 20 for i in range(20_000)}
    program = f"TABLE = {table!r}\ndef f(x): return TABLE"
    assert verdict(verifier, program, f"assert f(1) == {table!r}").outcome == "correct"


@pytest.mark.parametrize("kind", CONFINEMENTS)
def test_a_task_may_have_more_time_than_the_verifier(kind: Wanted) -> None:
    program = "import time\ndef f(x):\n    time.sleep(1.5)\n    return x"
    with verifier_in(kind, 0.5) as short:
        assert verdict(short, program, "assert f(1) == 1").outcome == "timeout"
        assert verdict(short, program, "assert f(1) == 1", timeout_s=0.1).outcome == "timeout"
        slow = verdict(short, program, "assert f(1) == 1", timeout_s=20.0)
        assert slow.outcome == "correct"
        late = verdict(short, "while True: pass", "f(1)", timeout_s=0.7)
        assert "no verdict within 0.7 s" in late.detail


def test_the_timer_starts_with_the_work() -> None:
    """Twelve programs of 0.5 s wait for two workers with a limit of 1.5 s."""
    with verifier_in("limits", 1.5) as shared:
        gold = CodeGold("assert f(1) == 1", "f").to_text()
        program = "import time\ntime.sleep(.5)\ndef f(x): return x  # {}"
        futures = [shared.submit(program.format(i), gold) for i in range(12)]
        assert {future.result(GENEROUS_S).outcome for future in futures} == {"correct"}


def test_equal_programs_are_judged_once(verifier: PooledCodeVerifier) -> None:
    program = "import time\ntime.sleep(.3)\ndef f(x): return x"
    gold = CodeGold("assert f(1) == 1", "f").to_text()
    start = time.monotonic()
    futures = [verifier.submit(f"Try {i}:\n```python\n{program}\n```", gold) for i in range(40)]
    assert {future.result(GENEROUS_S).outcome for future in futures} == {"correct"}
    assert time.monotonic() - start < 5  # forty times 0.3 s on two workers would be 6 s
    assert verifier.submit(program, gold).done()
    other = CodeGold("assert f(1) == 2", "f").to_text()
    assert verifier.submit(program, other).result(GENEROUS_S).outcome == "wrong"


def test_good_programs_beside_hanging_ones() -> None:
    with verifier_in("limits", 1.0) as shared:
        start = time.monotonic()
        bad = [shared.submit(f"while True: pass  # {i}", CodeGold("f(1)", "f").to_text()) for i in range(4)]
        gold = CodeGold("assert f(1) == 2", "f").to_text()
        good = [shared.submit(f"def f(x): return {i} + x", gold) for i in range(-49, 51)]
        assert [g.result(GENEROUS_S).outcome for g in good].count("correct") == 1
        assert {b.result(GENEROUS_S).outcome for b in bad} == {"timeout"}
        assert time.monotonic() - start < 30


@pytest.mark.parametrize("kind", CONFINEMENTS)
def test_closing_leaves_no_process(kind: Wanted) -> None:
    before = descendants()
    with verifier_in(kind, 60.0) as shared:
        gold = CodeGold("assert f(1) == 1", "f").to_text()
        assert shared.submit("def f(x): return x", gold).result(GENEROUS_S).value == 1.0
        futures = [shared.submit(f"while True: pass  # {i}", gold) for i in range(5)]
        time.sleep(0.2)
    assert all(future.done() for future in futures)
    deadline = time.monotonic() + 10
    while descendants() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert descendants() - before == set()


@pytest.mark.parametrize("kind", CONFINEMENTS)
def test_what_can_change_a_verdict_is_in_the_version(kind: Wanted) -> None:
    with verifier_in(kind, 1.0) as shared:
        assert shared.version.startswith("code-")
        assert kind in shared.version
        assert any("without bubblewrap" in text for text in shared.warnings) == (kind == "limits")
