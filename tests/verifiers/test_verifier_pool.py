"""The pool: hangs, crashes and forgeries cost one task; nothing outlives it."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, wait
from pathlib import Path

import pytest

from dash_exp.verifiers.pool import Program, VerifierPool
from dash_exp.verifiers.types import VerifyTask

WaitGone = Callable[[list[int]], list[int]]
GENEROUS_S = 120.0

HOSTILE = (
    "9^{9^{9^9}}",
    "100000000!",
    "2^{1000000000000}",
    r"\sum_{n=1}^{10^{100}} \frac{\sin n}{n^{7.3}}",
    r"\int_0^1 \frac{\sin(\tan(x^{x^x}))}{x^5+e^x} dx",
    r"\prod_{k=1}^{10^9} k",
    r"\binom{10^{12}}{5\cdot 10^{11}}",
    "(x+y+z+w)^{500}",
    "(" * 10_000 + "1" + ")" * 10_000,
    r"\sqrt{" * 150 + "2" + "}" * 150,
    r"\frac{1}{" * 300 + "2" + "}" * 300,
    "7^{7^{7^{7^7}}}",
    "2^{2^{2^{2^{2^{2}}}}}",
    "(10^9)!",
    "((10^4)!)!",
    r"\binom{10^9}{10^8}",
    r"\sqrt[10^9]{2^{10^9}}",
    r"\log_{2}(3^{10^{10}})",
    r"\sum_{k=1}^{10^8} k^{10^3}",
    r"\sum_{n=1}^{\infty} \frac{1}{n^{\sqrt{n}}}",
    r"\int_{-\infty}^{\infty} e^{-x^4 + \sin x} dx",
    r"\int \sqrt{\tan(x)^{\sin x}} dx",
    r"\lim_{x \to 0} \frac{\sin(\tan x) - \tan(\sin x)}{x^{700}}",
    r"(x+1)^{10^6}",
    r"(a+b+c+d+e)^{200}",
    r"\prod_{i=1}^{10^7} (x+i)",
    "1" * 50_000,
    "9" * 1_999 + "!",
    "0." + "3" * 30_000,
    "1+" * 5_000 + "1",
    "-" * 5_000 + "1",
    "x^" * 500 + "2",
    "{" * 5_000,
    "}" * 5_000,
    r"\left(" * 2_000,
    r"\frac" * 2_000,
    r"\begin{pmatrix}" * 500,
    r"\begin{pmatrix}" + "1 & " * 900 + r"1 \end{pmatrix}",
    r"\{" + ",".join(map(str, range(400))) + r"\}",
    "[" * 3_000 + "]" * 3_000,
    r"\text{" * 1_000,
    "=".join("x" * 900),
    r"\cos(" * 200 + "1" + ")" * 200,
    "\0" * 100,
    "\ud7ff\u202e" * 200,
    "__import__('os')._exit(0)",
    r"\input{/etc/passwd}",
    "10^{-10^{10^{10}}}",
    r"\overline{9}" * 500,
)
HANGS = ("9^{9^{9^9}}", "7^{7^{7^{7^7}}}", r"\log_{2}(3^{10^{10}})")
ODD = Program("odd_worker")
"""A light worker without sympy, which does what the text says."""


def slow_unless_quick(text: str) -> object:
    """Most of them cost a timeout and a new worker: every eighth text is enough for `make test`."""
    return pytest.param(text, id=text[:20], marks=() if HOSTILE.index(text) % 8 == 0 else pytest.mark.long)


def task(text: str, answer: str = r"\sqrt{3}") -> VerifyTask:
    return VerifyTask(text, answer)


@pytest.fixture(scope="module")
def pool() -> Iterator[VerifierPool]:
    with VerifierPool(2, timeout_s=1.0, memory_mb=1024) as shared:
        yield shared


@pytest.mark.parametrize("text", map(slow_unless_quick, HOSTILE))
def test_hostile_answers_never_score(pool: VerifierPool, text: str) -> None:
    verdict = pool.submit(task(text)).result(GENEROUS_S)
    named = ("timeout",) if text in HANGS else ("timeout", "crashed", "unparsed", "wrong")
    assert verdict.value == 0.0
    assert verdict.outcome in named
    assert verdict.detail


def test_good_answers_among_hanging_ones(wait_gone: WaitGone) -> None:
    workers, timeout_s = 2, 1.0
    with VerifierPool(workers, timeout_s=timeout_s, memory_mb=1024) as pool:
        pool.submit(task("1", "1")).result(GENEROUS_S)
        start = time.monotonic()
        bad = [pool.submit(task((HANGS * 2)[i])) for i in range(2 * workers)]
        good = [pool.submit(task(rf"\frac{{{2 * i}}}{{4}}", f"{i}/2")) for i in range(20)]
        off = [pool.submit(task(rf"\sqrt{{{i}}}", rf"\sqrt{{{i + 1}}}")) for i in range(20)]
        assert [f.result(GENEROUS_S).outcome for f in good] == ["correct"] * 20
        assert [f.result(GENEROUS_S).outcome for f in off] == ["wrong"] * 20
        assert [f.result(GENEROUS_S).outcome for f in bad] == ["timeout"] * (2 * workers)
        assert time.monotonic() - start < 60
        pids = pool.worker_pids()
    assert wait_gone(pids) == []


def test_the_timer_starts_with_the_work_not_in_the_queue() -> None:
    """Five tasks of 0.3 s wait for one worker with a limit of 1 s: none runs out of time."""
    with VerifierPool(1, timeout_s=1.0, program=ODD) as pool:
        futures = [pool.submit(task("sleep 0.3")) for _ in range(5)]
        assert {f.result(GENEROUS_S).outcome for f in futures} == {"wrong"}


def test_a_worker_killed_from_outside(wait_gone: WaitGone) -> None:
    with VerifierPool(1, timeout_s=GENEROUS_S, program=ODD) as pool:
        assert pool.submit(task("fine")).result(GENEROUS_S).outcome == "correct"
        (victim,) = pool.worker_pids()
        stuck = pool.submit(task("sleep 600"))
        after = pool.submit(task("fine"))
        while not stuck.running():
            time.sleep(0.01)
        os.kill(victim, signal.SIGKILL)
        verdict = stuck.result(GENEROUS_S)
        assert verdict.outcome == "crashed"
        assert "signal 9" in verdict.detail
        assert after.result(GENEROUS_S).outcome == "correct"
        assert pool.worker_pids() != [victim]
    assert wait_gone([victim]) == []


def test_close_ends_running_and_waiting_work(wait_gone: WaitGone) -> None:
    pool = VerifierPool(1, timeout_s=GENEROUS_S, program=ODD)
    stuck = pool.submit(task("sleep 600"))
    waiting = pool.submit(task("fine"))
    while not stuck.running():
        time.sleep(0.01)
    pids = pool.worker_pids()
    pool.close()
    assert stuck.result(GENEROUS_S).outcome == "crashed"
    assert wait([waiting], GENEROUS_S).done == {waiting}
    with pytest.raises(CancelledError):
        waiting.result()
    assert wait_gone(pids) == []
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(task("1"))


def test_close_before_any_worker_is_ready() -> None:
    pool = VerifierPool(2, program=ODD)
    future = pool.submit(task("fine"))
    pool.close()
    assert future.cancelled() or future.done()
    assert pool.worker_pids() == []


@pytest.mark.parametrize("value", [{"workers": 0}, {"timeout_s": 0}, {"memory_mb": 0}])
def test_limits_have_to_be_positive(value: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="positive"):
        VerifierPool(**({"workers": 1} | value))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("module", "reason"),
    [("no_such_module_anywhere", "No module named"), ("broken_worker", "no algebra today")],
)
def test_workers_that_cannot_start(module: str, reason: str) -> None:
    with VerifierPool(2, program=Program(module), max_starts=2) as pool:
        futures = [pool.submit(task("1", "1")) for _ in range(5)]
        for future in futures:
            verdict = future.result(GENEROUS_S)
            assert (math.isnan(verdict.value), verdict.outcome) == (True, "verifier_error")
            assert reason in verdict.detail


FLAKY = """
import os, sys
try:
    os.close(os.open({marker!r}, os.O_CREAT | os.O_EXCL))
except FileExistsError:
    import odd_worker
    sys.exit(odd_worker.run())
raise ImportError("the first one fails")
"""


def test_a_slot_without_worker_leaves_tasks_to_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = str(tmp_path / "marker")
    (tmp_path / "flaky_worker.py").write_text(FLAKY.format(marker=marker))
    monkeypatch.syspath_prepend(tmp_path)
    with VerifierPool(2, program=Program("flaky_worker"), max_starts=1) as pool:
        futures = [pool.submit(task("sleep 0.01")) for _ in range(20)]
        assert [f.result(GENEROUS_S).outcome for f in futures] == ["wrong"] * 20
        assert len(pool.worker_pids()) == 1


def test_a_worker_that_never_gets_ready() -> None:
    with VerifierPool(1, program=Program("slow_worker"), start_timeout_s=0.5, max_starts=1) as pool:
        verdict = pool.submit(task("1", "1")).result(GENEROUS_S)
    assert verdict.outcome == "verifier_error"
    assert "not ready" in verdict.detail


def test_too_little_memory_to_start_is_reported() -> None:
    with VerifierPool(1, memory_mb=40, max_starts=1, start_timeout_s=20) as pool:
        assert pool.submit(task("1", "1")).result(GENEROUS_S).outcome == "verifier_error"


# Judges that misbehave: `odd_worker` (beside this file) does what the text says.


@pytest.fixture(scope="module")
def odd() -> Iterator[VerifierPool]:
    with VerifierPool(1, timeout_s=5.0, memory_mb=512, program=ODD) as shared:
        yield shared


@pytest.mark.parametrize(
    ("text", "outcome", "detail"),
    [
        ("print a verdict", "wrong", ""),
        ("write a verdict to descriptor 1", "wrong", ""),
        ("raise", "verifier_error", "ZeroDivisionError: division by zero (odd_worker.py:"),
        ("recurse", "unparsed", "too deeply"),
        ("eat memory", "crashed", "out of memory"),
        ("exit 0", "crashed", "exit status 0"),
        ("SystemExit", "crashed", "exit status 3"),
        ("segfault", "crashed", "signal 11"),
        ("no such judge", "wrong", ""),
    ],
)
def test_misbehaving_judges(odd: VerifierPool, text: str, outcome: str, detail: str) -> None:
    verdict = odd.submit(task(text)).result(GENEROUS_S)
    assert verdict.outcome == outcome
    assert verdict.value == 0.0 or (outcome == "verifier_error" and math.isnan(verdict.value))
    assert detail in verdict.detail
    assert odd.submit(task("fine")).result(GENEROUS_S).outcome == "correct"


def test_children_of_a_hanging_judge_are_killed(wait_gone: WaitGone, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    with VerifierPool(1, timeout_s=2.0, program=ODD) as pool:
        verdict = pool.submit(task(f"hang with a child {note}")).result(GENEROUS_S)
        assert verdict.outcome == "timeout"
        assert wait_gone([int(note.read_text())]) == []


def test_no_secret_reaches_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    with VerifierPool(1, program=ODD) as pool:
        seen = pool.submit(task("environment")).result(GENEROUS_S).detail
    assert "HF_TOKEN" not in seen
    assert "PYTHONHASHSEED" in seen


def test_spent_workers_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dash_exp.verifiers.pool._TASKS_PER_WORKER", 2)
    with VerifierPool(1, program=ODD) as pool:
        pids = [pool.submit(task("pid")).result(GENEROUS_S).detail for _ in range(5)]
    assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [2, 2, 1]


def test_a_long_task_arrives_complete(odd: VerifierPool) -> None:
    verdict = odd.submit(task("length " + "x" * 3_000_000)).result(GENEROUS_S)
    assert verdict.detail == "3000007"
