"""The verifier of programs: outcomes, what tests may do, limits of time, memory of verdicts."""

# ruff: noqa: E501 (sources of programs, one to a line)

from __future__ import annotations

import math
import socket
import time
from collections.abc import Iterator

import pytest
from code_fixtures import BEST_AND_LIMITS, CONFINEMENTS, descendants, verifier_in

from dash_exp.text import printable
from dash_exp.types import Score
from dash_exp.verifiers.code import host
from dash_exp.verifiers.judges import PooledJudge, Wanted, code_judge
from dash_exp.verifiers.types import CodeGold, Judge

GENEROUS_S = 60.0
UNITTEST = (
    "import io, unittest\nclass T(unittest.TestCase):\n    def test(self): f()\n"
    "r = unittest.TextTestRunner(io.StringIO()).run(unittest.defaultTestLoader.loadTestsFromTestCase(T))\n"
    "assert r.wasSuccessful()"
)
HEADER = 'def helper(x):\n    return x * 2\n\n\ndef f(x):\n    """Twice helper."""\n'


@pytest.fixture(scope="module", params=BEST_AND_LIMITS)
def verifier(request: pytest.FixtureRequest) -> Iterator[PooledJudge]:
    with verifier_in(request.param, 10.0) as shared:
        yield shared


def verdict(verifier: Judge, program: str, tests: str, **more: object) -> Score:
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
        ("class E(ValueError): pass\ndef f(x): raise E('no')", "wrong", "E: no"),
        ("def f(x) return x", "unparsed", "SyntaxError: expected ':'"),
        ("def f(x):\nreturn x", "unparsed", "IndentationError"),
        ("```python\n```", "no_answer", "no program"),
        ("", "no_answer", "no program"),
        ("import os\nos._exit(3)", "crashed", "the program's process failed"),
        ("x = bytearray(2**40)", "crashed", "out of memory"),
    ],
)
def test_outcomes(verifier: PooledJudge, program: str, outcome: str, detail: str) -> None:
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
def test_a_broken_gold_is_our_fault(verifier: PooledJudge, gold: str, detail: str) -> None:
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
def test_what_tests_may_do(verifier: PooledJudge, program: str, tests: str) -> None:
    assert verdict(verifier, program, tests) == Score(1.0, "correct")


S = "class S:\n    def __init__(s, v): s.v = v\n"
"""The beginning of a class of programs, for the methods that follow."""
EQUAL = "    def __eq__(s, o): return s.v == o.v\n    def __hash__(s): return hash(s.v)\n"
OWN_ERRORS = (
    "class E(ValueError):\n    LIMIT = 3\n    def __init__(s, c=7):\n        s.c = c\n"
    "        super().__init__(f'code {c}')\n    @classmethod\n    def of(k, c): return k(c)\nclass F(E): pass\n"
)
ZONE = "datetime.timezone(datetime.timedelta(hours=2), 'X')"


@pytest.mark.parametrize(
    ("program", "tests"),
    [
        (S + EQUAL + "    def __add__(s, o): return S(s.v + o.v)\n", "assert S(1) + S(2) == S(3)"),
        (S + EQUAL + "    def __neg__(s): return S(-s.v)\n", "assert -S(1) == S(-1)"),
        (S + "    def __le__(s, o): return s.v <= o.v\n", "assert S(1) <= S(1) and not S(2) <= S(1)"),
        (S + "    def __gt__(s, o): return s.v > o.v\n", "assert S(2) > S(1)"),
        (
            S + "    def __lt__(s, o): return s.v < o.v\n",
            "assert [s.v for s in sorted([S(2), S(1)])] == [1, 2]",
        ),
        (S + "    def __float__(s): return s.v\n", "assert float(S(1.5)) == 1.5"),
        (S + "    def __index__(s): return s.v\n", "assert [4, 5][S(1)] == 5"),
        (S + "    def __round__(s, n=0): return round(s.v, n)\n", "assert round(S(1.25), 1) == 1.2"),
        (S + EQUAL, "assert len({S(1), S(1), S(2)}) == 2 and {S(1): 2}[S(1)] == 2"),
        (S, "s = S(1)\ns.v = 4\nassert s.v == 4\ndel s.v\nassert not hasattr(s, 'v')"),
        (
            S + "    def __setitem__(s, k, x): s.v[k] = x\n    def __getitem__(s, k): return s.v[k]\n",
            "s = S({})\ns['a'] = 1\nassert s['a'] == 1",
        ),
        (
            "import contextlib\n@contextlib.contextmanager\ndef f():\n    yield 3",
            "with f() as x:\n    assert x == 3",
        ),
        (
            S + "class T(S): pass",
            "assert isinstance(T(1), S) and not isinstance(S(1), T) and issubclass(T, S)",
        ),
        (S, "import copy\ns = S([1])\nt = copy.deepcopy(s)\nt.v.append(2)\nassert s.v == [1]"),
        ("def f():\n    'doc'", "assert f.__name__ == 'f' and f.__doc__ == 'doc'"),
        (
            "def f(): return {}['k']",
            "try: f()\nexcept KeyError as e: assert e.args == ('k',) and str(e) == \"'k'\"",
        ),
        (
            "def f(): open('/no')",
            "try: f()\nexcept FileNotFoundError as e: assert e.errno == 2 and '/no' in str(e)",
        ),
        (
            "class E(Exception):\n    def __init__(s, c):\n        super().__init__('no')\n        s.c = c\n"
            "class F(E): pass\ndef f(): raise F(5)",
            "try:\n    f()\n    assert False\nexcept E as e: assert e.c == 5 and str(e) == 'no' and isinstance(e, F)",
        ),
        ("class E(Exception): pass\ndef f(x): raise x", "try: f(E)\nexcept E: pass"),
        (
            OWN_ERRORS + "def f(e): return e.c",
            "e = E(5)\nassert e.c == f(e) == 5 and str(e) == 'code 5'\nassert E.LIMIT == 3 and E.of(4).c == 4\n"
            "assert isinstance(F(1), E) and type(F(1)) is F and issubclass(F, ValueError)",
        ),
        (
            OWN_ERRORS + "def f(): raise F",
            "try: raise E\nexcept ValueError as e: assert e.c == 7\ntry: f()\nexcept E as e: assert e.c == 7",
        ),
        (
            "class E(ValueError): pass\ndef f(): return E()",
            "kind = type(f())\nassert isinstance(kind(2), ValueError) and not hasattr(kind, 'LIMIT')",
        ),
        (
            "def f(m, y): y.append(2)",
            "import numpy as np\ny = [1]\nf(np.matrix([[1]]), y)\nassert y == [1, 2]",
        ),
        ("def f(*a, **k): k['y'].append(2)", "y = [1]\nf(0, {}, x=[], y=y)\nassert y == [1, 2]"),
        ("import json\ndef f(): json.loads('{')", "import json\ntry: f()\nexcept json.JSONDecodeError: pass"),
        ("def f(): return ValueError('x')", "assert isinstance(f(), ValueError) and str(f()) == 'x'"),
        ("def f(): return ValueError", "assert f() is ValueError"),
        ("def f(e): return str(e)", "assert f(ValueError('x')) == 'x'"),
        ("def f(k, x): return sorted(x, key=k)", "assert f(len, ['bb', 'a']) == ['a', 'bb']"),
        ("def f(k): return k('A'), k('b')", "assert f(str.lower) == ('a', 'b')"),
        (
            "def f(g, x): return g(x)",
            "import math, numpy as np\nassert f(math.sqrt, 4) == 2 == f(np.max, [1, 2])",
        ),
        ("def f(k): return k('aab')['a']", "from collections import Counter\nassert f(Counter) == 2"),
        ("def f(p, s): return bool(p.match(s))", "import re\nassert f(re.compile('A', re.I), 'ab')"),
        (
            "def f(p): return p / 'b', p.name",
            "from pathlib import Path\nassert f(Path('/a')) == (Path('/a/b'), 'a')",
        ),
        ("def f(d): return d['x']", "from collections import defaultdict\nassert f(defaultdict(int)) == 0"),
        (
            "from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(p): return P(p.x, 2)",
            "from collections import namedtuple\nQ = namedtuple('Q', 'x')\nassert f(Q(3)) == (3, 2) and f(Q(3)).y == 2",
        ),
        ("import uuid\ndef f(): return uuid.UUID(int=1)", "import uuid\nassert f() == uuid.UUID(int=1)"),
        (
            "import array\ndef f(a): return a * 2",
            "import array\nassert f(array.array('i', [1])) == array.array('i', [1, 1])",
        ),
        (
            "import datetime\ndef f(t): return t.replace(year=2021)",
            f"import datetime\nt = datetime.datetime(2020, 1, 1, tzinfo={ZONE})\nassert f(t) == t.replace(year=2021) and f(t).tzname() == 'X'",
        ),
        (
            "def f(n):\n    r = []\n    for i in range(n): r = [r]\n    return r",
            "r, d = f(600), 0\nwhile r: r, d = r[0], d + 1\nassert d == 600",
        ),
        (
            "def f(a): a.append(2)",
            "import array\na = array.array('i', [1])\nf(a)\nassert a.tolist() == [1, 2]",
        ),
        ("\ufeffdef f(): return 1", "assert f() == 1"),
    ],
)
def test_what_tests_may_do_with_objects(verifier: PooledJudge, program: str, tests: str) -> None:
    assert verdict(verifier, program, tests) == Score(1.0, "correct")


AGREES = (
    "class A:\n    def __init__(s, *a): pass\n    def __exit__(s, *a): return True\n"
    + "".join(
        f"    __{name}__ = lambda s, *o: s\n"
        for name in (
            "enter",
            "add",
            "radd",
            "sub",
            "rsub",
            "mul",
            "rmul",
            "truediv",
            "rtruediv",
            "abs",
            "neg",
        )
    )
    + "".join(
        f"    __{name}__ = lambda s, *o: True\n" for name in ("eq", "ne", "lt", "le", "gt", "ge", "bool")
    )
    + "    __float__ = lambda s: 0.0\n    __hash__ = lambda s: hash(3)\ndef f(x): return A()\n"
)


@pytest.mark.parametrize(
    "tests",
    [
        "assert f(1) == 3",
        "assert abs(f(1) - 3) < 1e-9",
        "assert abs(3 - f(1)) < 1e-9",
        "assert f(1) < 3",
        "assert f(1) >= 3",
        "assert 3 >= f(1)",
        "assert not f(1) < 3",
        "assert f(1) + 1 == 4",
        "assert f(1) in [3]",
        "assert f(1) in {3}",
        "assert {3: 1}[f(1)]",
        "with f(1) as x:\n    assert x == 3",
        "with f(1):\n    raise ValueError",
        "import math\nassert math.isclose(f(1), 3)",
        "import numpy as np\nassert np.allclose(f(1), 3)",
        "import numpy as np\nassert np.isclose(np.array(f(1)) - 3, 0).all()",
        "import numpy as np\nassert (np.array([3]) == f(1)).all()",
        "assert isinstance(f(1), int)",
        "from fractions import Fraction\nassert Fraction(3) == f(1)",
        "from decimal import Decimal\nassert Decimal(3) <= f(1)",
        "assert round(f(1)) == 3",
    ],
)
def test_an_object_that_equals_everything(verifier: PooledJudge, tests: str) -> None:
    assert verdict(verifier, AGREES, tests).outcome == "wrong"


ANYTHING = "def f(*a): return a[0](2) if callable(a[0]) else 3"


@pytest.mark.parametrize(
    ("tests", "kind"),
    [
        ("assert f(lambda a: a + 1, 2) == 3", "function"),
        ("assert f(3) == 3\nassert f(lambda a: a + 1, 2) == 3", "function"),
        ("try: f(lambda a: a + 1)\nexcept Exception: pass", "function"),
        ("def g(a): return a\nf([1, (2, g)])", "function"),
        ("class Node: pass\nf(3)\nf(Node())", "Node"),
        ("class Node(dict): pass\nf(3)\nf(Node())", "Node"),
        ("class Node: pass\nf(Node)", "type"),
        ("class E(ValueError): pass\nf(E())", "E"),
        ("f(3)\nf(i for i in range(3))", "generator"),
        ("f(3)\nf(map(int, ['1']))", "map"),
        ("f(3)\nf(zip([1], [2]))", "zip"),
        ("f(iter([1, 2]))", "list_iterator"),
        ("import io\nf(3)\nf(io.StringIO('q'))", "StringIO"),
        ("import types\nf(3)\nf(types.SimpleNamespace(a=1))", "SimpleNamespace"),
        ("import itertools\nf(3)\nf(itertools.count())", "count"),
        ("f(3)\ntry: f(object())\nexcept TypeError: pass", "object"),
        ("import functools\nf(3)\nf(functools.partial(max, 1))", "partial"),
    ],
)
def test_what_tests_cannot_pass_is_their_fault(verifier: PooledJudge, tests: str, kind: str) -> None:
    got = verdict(verifier, ANYTHING, tests)
    assert (got.outcome, math.isnan(got.value)) == ("verifier_error", True), got
    assert f"the tests pass a {kind}, which cannot cross to the program" in got.detail


CLASSES = (
    "import abc, enum\nfrom collections import namedtuple\nfrom typing import Generic, TypeVar\nclass P: pass\n"
    "class A(abc.ABC): pass\nclass E(enum.Enum): B = 1\nN = namedtuple('N', 'a')\nT = TypeVar('T')\n"
    "class G(Generic[T]): pass\nclass X(ValueError): pass\ndef f(x): return x"
)


@pytest.mark.parametrize(
    ("tests", "outcome"),
    [
        ("class Q(P): pass\nQ()", "verifier_error"),
        ("class Q(A):\n    def g(s): return 1\nassert Q().g() == 1", "verifier_error"),
        ("class Q(N): pass", "verifier_error"),
        ("class Q(G[int]): pass", "verifier_error"),
        ("class Q(int, E): pass", "verifier_error"),
        ("import unittest\nclass Q(P, unittest.TestCase): pass", "verifier_error"),
        ("try:\n    class Q(P): pass\nexcept TypeError: pass", "verifier_error"),
        ("type('Q', (P,), {})", "verifier_error"),
        ("import types\ntypes.new_class('Q', (P,))", "verifier_error"),
        ("class Q(X): pass\ntry: raise Q('a')\nexcept X as e: assert str(e) == 'a'", "correct"),
        ("class Q(f(1)): pass", "wrong"),
        ("class Q(Absent): pass", "wrong"),
    ],
)
def test_tests_that_derive_a_class(verifier: PooledJudge, tests: str, outcome: str) -> None:
    got = verdict(verifier, CLASSES, tests)
    assert got.outcome == outcome, got
    assert ("derive a class from one of the program" in got.detail) == (outcome == "verifier_error")


SAYS_NOTHING = (
    "import os\nclass A:\n    __hash__ = lambda s: 2\n    def __repr__(s): 1 / 0\ndef f(x): return A()"
)


@pytest.mark.parametrize(
    ("program", "tests"),
    [
        ("def f(*a): return [1]", "f(iter(f(1)))"),
        ("def f(*a): return [1]", "f(f(1).append)"),
        ("import collections as c\ndef f(*a): return c.namedtuple('P', 'x')(1)", "f(type(f(1)))"),
        ("def f(*a): return object()", "f(type(f(1)))"),
        ("class E(Exception): pass\ndef f(*a): raise E", "try: f(1)\nexcept Exception as e: f(e.__str__)"),
        ("import numpy\ndef f(*a): return numpy.ones(2)", "f(f(1).flat)"),
        ("import collections\ndef f(*a): return collections.deque()", "f(iter(f(1)))"),
        ("def f(y): y[0] = ''", "y = [0]\nf(y)\nf(y[0].upper)"),
        (SAYS_NOTHING, "assert f(1) == 2, f(1)"),
        (SAYS_NOTHING, "{2: 1}[f(1)]"),
        (SAYS_NOTHING.replace("1 / 0", "os._exit(0)"), "assert f(1) == 2, f(1)"),
        (
            "import dash_exp.verifiers.code.candidate as c\nclass G:\n    def get(s, *a): return 1\n"
            "c.Candidate._do_globals = lambda *a: ('ok', G(), None)",
            "f(1)",
        ),
        ("def f(*a): return ImportError('x')", "raise f(1)"),
        ("def f(*a): return 'no_such_module'", "__import__(f(1))"),
        ("f = ImportError", "raise f(1)"),
        ("class E(ImportError): pass\ndef f(x): raise E('x', name='numpy')", "import numpy\nf(1)"),
        ("import types\nf = types.ModuleType('math.nope')", "f(1)"),
        ("import types\nf = types.ModuleType('antigravity')", "f.webbrowser"),
        ("import types\ng = types.ModuleType('antigravity')\ndef f(): pass", "g.webbrowser"),
        ("import math as f", "assert f.sqrt(4) == 2"),
        ("import unittest\ndef f(): raise unittest.SkipTest", UNITTEST),
    ],
)
def test_a_program_cannot_blame_its_failure_on_the_tests(
    verifier: PooledJudge, program: str, tests: str
) -> None:
    assert verdict(verifier, program, tests).outcome == "wrong"


@pytest.mark.parametrize(
    ("program", "tests", "outcome"),
    [
        (
            "class sys: getsizeof = lambda x: 0\ndef f(x): return 0",
            "assert f(1) == sys.getsizeof(1)",
            "wrong",
        ),
        ("def f(x): return __import__('sys').getsizeof(x)", "assert f(1) == sys.getsizeof(1)", "correct"),
        ("class np: allclose = lambda *a: True\ndef f(x): return 0", "assert np.allclose(f(1), 1)", "wrong"),
        (
            "math = lambda: 0\nmath.isclose = lambda *a: True\ndef f(x): return 0",
            "assert math.isclose(f(1), 1)",
            "wrong",
        ),
        (
            "from datetime import datetime\ndef f(x): return x",
            "assert f(datetime(2020, 1, 1)).year == 2020",
            "correct",
        ),
        (
            "import datetime\ndef f(x): return x",
            "assert f(datetime.datetime(2020, 1, 1)).year == 2020",
            "correct",
        ),
        (
            "class queue:\n    def __init__(s): s.n = 1\ndef f(): return 1",
            "q = queue()\nassert q.n == f()",
            "correct",
        ),
        (
            "def f(x): return x",
            "def g(sys): return sys.a\nclass math: a = 1\nassert g(math) == f(1)",
            "correct",
        ),
        ("import math as m\ndef f(x): return x", "assert m.sqrt(4) == f(2)", "correct"),
    ],
)
def test_modules_that_tests_use_without_import(
    verifier: PooledJudge, program: str, tests: str, outcome: str
) -> None:
    assert verdict(verifier, program, tests).outcome == outcome


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
def test_what_a_program_cannot_change(verifier: PooledJudge, program: str, tests: str, outcome: str) -> None:
    assert verdict(verifier, program, tests, prefix=HEADER).outcome == outcome


@pytest.mark.parametrize("text", ["\x1b[31mred\u202e", "\x1b]0;title\x07", "a\x00\x9b2Jb", "\ud800"])
def test_a_detail_can_be_shown(verifier: PooledJudge, text: str) -> None:
    for program in (f"def f(x): return {text!r}", f"def f(x): raise ValueError({text!r})"):
        detail = verdict(verifier, program, "assert f(1) == 2, f(1)").detail
        assert detail == printable(detail) and detail.endswith("(line 1 of the tests)")


def test_the_papers_rule_takes_the_last_block_as_it_is() -> None:
    used = "```python\ndef f(x): return x\n```\n```python\nprint(f(3))\n```"
    for extraction, outcome in (("program", "correct"), ("last_block", "wrong")):
        shared = code_judge(1, 10.0, 1024, "auto", extraction)
        assert verdict(shared, used, "assert f(1) == 1").outcome == outcome
        assert verdict(shared, "def f(x): return x", "assert f(1) == 1").outcome == "correct"
        assert verdict(shared, "    return x", "assert f(1) == 1", prefix=HEADER).outcome == "correct"
        assert extraction in shared.version
        shared.close()


def test_a_request_of_many_kilobytes(verifier: PooledJudge) -> None:
    table = {i: str(i) * 20 for i in range(20_000)}
    program = f"TABLE = {table!r}\ndef f(x): return TABLE"
    assert verdict(verifier, program, f"assert f(1) == {table!r}").outcome == "correct"


@pytest.mark.parametrize("kind", [CONFINEMENTS[0], pytest.param(CONFINEMENTS[1], marks=pytest.mark.long)])
def test_a_task_may_have_more_time_than_the_verifier(kind: Wanted) -> None:
    program = "import time\ndef f(x):\n    time.sleep(0.8)\n    return x"
    with verifier_in(kind, 0.5) as short:
        assert verdict(short, program, "assert f(1) == 1").outcome == "timeout"
        assert verdict(short, program, "assert f(1) == 1", timeout_s=0.1).outcome == "timeout"
        slow = verdict(short, program, "assert f(1) == 1", timeout_s=20.0)
        assert slow.outcome == "correct"
        late = verdict(short, "while True: pass", "f(1)", timeout_s=0.7)
        assert "no verdict within 0.7 s" in late.detail


@pytest.mark.parametrize(
    ("share", "says", "least_s"),
    [
        (0.0, "no verdict within 0.1 s", 0.1),  # it waits
        (0.5, "no verdict within 0.1 s of processor time", 0.2),  # the machine is busy
        (0.15, "no verdict within 0.1 s of processor time", 0.6),
        (2.0, "no verdict within 0.1 s of processor time", 0.05),
    ],
)
def test_the_limit_is_processor_time(
    monkeypatch: pytest.MonkeyPatch, share: float, says: str, least_s: float
) -> None:
    """Of a verdict that never comes, whose processes get this share of a processor."""
    start = time.monotonic()
    monkeypatch.setattr(host, "_cpu_seconds", lambda pid: share / 2 * (time.monotonic() - start))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        found = host._watch(host.Child(1, ours), host.Child(2, theirs), 0.1)
    assert found == Score(0.0, "timeout", says)
    assert time.monotonic() - start >= least_s


def test_the_timer_starts_with_the_work() -> None:
    """Eight programs of 0.3 s wait for two workers with a limit of 1 s."""
    with verifier_in("limits", 1.0) as shared:
        gold = CodeGold("assert f(1) == 1", "f").to_text()
        program = "import time\ntime.sleep(.3)\ndef f(x): return x  # {}"
        futures = [shared.submit(program.format(i), gold) for i in range(8)]
        assert {future.result(GENEROUS_S).outcome for future in futures} == {"correct"}


def test_equal_programs_are_judged_once(verifier: PooledJudge) -> None:
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
