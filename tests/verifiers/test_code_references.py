"""Reference programs of the code datasets pass their tests; a stub that returns an object fails them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from dash_exp.verifiers.judges import PooledJudge, code_judge
from dash_exp.verifiers.types import CodeGold

FILES = ("mbppplus_train.jsonl", "mbppplus_test.jsonl", "mbpp_sanitized.jsonl", "humaneval_test.jsonl")
SAMPLE = 25
SLOW = {"mbppplus-599": 90.0, "mbppplus-255": 60.0, "mbppplus-392": 40.0}
"""Seconds that tasks with long tests are given."""

Rows = Callable[[str], list[dict[str, str]]]


@pytest.fixture(scope="module")
def verifier() -> Iterator[PooledJudge]:
    shared = code_judge(2, 20.0, 2048)
    yield shared
    shared.close()


def judge(verifier: PooledJudge, rows: list[dict[str, str]], name: str) -> None:
    header = name.startswith("humaneval")  # its solutions are bodies
    pairs = []
    for row in rows:
        prefix = row["prompt"] if header else ""
        gold = CodeGold(row["tests"], row["entry_point"], prefix, SLOW.get(row["id"])).to_text()
        stub = f"def {row['entry_point']}(*a, **k): return object()"
        pairs.append(
            (row["id"], verifier.submit(row["canonical_solution"], gold), verifier.submit(stub, gold))
        )
    failed = {i: good.result(600) for i, good, _ in pairs if good.result(600).outcome != "correct"}
    passed = {i: stub.result(600) for i, _, stub in pairs if stub.result(600).outcome != "wrong"}
    assert (failed, passed) == ({}, {})


@pytest.mark.parametrize("name", FILES)
def test_a_sample_of_reference_programs(verifier: PooledJudge, rows: Rows, name: str) -> None:
    every = [row for row in rows(name) if row["id"] not in SLOW]
    judge(verifier, every[:: max(1, len(every) // SAMPLE)][:SAMPLE], name)


@pytest.mark.long
@pytest.mark.parametrize("name", FILES)
def test_all_reference_programs(verifier: PooledJudge, rows: Rows, name: str) -> None:
    judge(verifier, rows(name), name)


BEHIND = (
    "\n\ndef other(x, y",
    '\n\ndef other(x):\n    """ It is\n',
    '\n"""\nIt\'s done.\n"""\n',
    "\n```\n",
    "\n```\n\nIt's (really simple.\n",
    "\n\nThis function works as it's (see above.\n",
    "\n\nprint({0}(input()))\nassert {0}(1, 2, 3, 4, 5, 6, 7) == 8\n",
    "\n```\nUsage:\n```python\nprint({0}(3))\n```\n",
)


@pytest.mark.parametrize("name", ["humaneval_test.jsonl", "mbpp_sanitized.jsonl"])
def test_references_followed_by_something(verifier: PooledJudge, rows: Rows, name: str) -> None:
    """Each with one of the endings, and also in a block before a block that uses it."""
    judged = {}
    for number, row in enumerate([row for row in rows(name) if row["id"] not in SLOW][:60]):
        behind, entry = BEHIND[number % len(BEHIND)], row["entry_point"]
        header = name.startswith("humaneval")
        gold = CodeGold(row["tests"], entry, row["prompt"] if header else "").to_text()
        text = row["canonical_solution"].rstrip("\n") + "\n"
        judged[row["id"], behind] = verifier.submit(text + behind.format(entry), gold)
        block = f"```python\n{row['prompt'] if header else ''}{text}```\nTry it:\n```python\n{entry}(3)\n```"
        judged[row["id"], "a block"] = verifier.submit(block, gold)
    wrong = {key: one.result(600) for key, one in judged.items() if one.result(600).outcome != "correct"}
    assert wrong == {}


def test_a_complete_function_after_its_header(verifier: PooledJudge, rows: Rows) -> None:
    """Chat models repeat the header: imports and helpers of the prompt still stand above it."""
    for row in rows("humaneval_test.jsonl")[:40]:
        start = row["prompt"].rindex(f"def {row['entry_point']}(")
        whole = f"```python\n{row['prompt'][start:]}{row['canonical_solution']}\n```"
        gold = CodeGold(row["tests"], row["entry_point"], row["prompt"]).to_text()
        assert verifier.submit(whole, gold).result(60).outcome == "correct", row["id"]
