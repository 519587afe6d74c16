"""What happens to workers when their parent ends, and what the parent never imports."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

import dash_exp

WaitGone = Callable[[list[int]], list[int]]
GENEROUS_S = 120.0
BUSY = ("sleep 600", "sleep 601")

SCRIPT = """
import sys, time
from dash_exp.verifiers.pool import Program, VerifierPool
from dash_exp.verifiers.types import VerifyTask
pool = VerifierPool(2, timeout_s=600, program=Program("odd_worker"))
pool.submit(VerifyTask("fine", "1")).result()
futures = [pool.submit(VerifyTask(text, "3")) for text in sys.argv[1:]]
while not all(future.running() for future in futures):
    time.sleep(0.01)
while len(pool.worker_pids()) < 2:
    time.sleep(0.01)
print(*pool.worker_pids(), flush=True)
{end}
"""


def run_parent(end: str, *texts: str) -> tuple[subprocess.Popen[str], list[int]]:
    """A process with a busy pool, and the process ids of its workers."""
    root = str(Path(dash_exp.__file__).resolve().parent.parent)
    path = os.pathsep.join([root, *filter(None, sys.path)])
    script = textwrap.dedent(SCRIPT).format(end=end)
    parent = subprocess.Popen(
        [sys.executable, "-c", script, *texts],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert parent.stdout is not None
    with parent.stdout as said:
        return parent, [int(pid) for pid in said.readline().split()]


@pytest.mark.skipif(sys.platform != "linux", reason="relies on Linux's parent-death signal")
@pytest.mark.parametrize("texts", [BUSY, ()], ids=["busy", "idle"])
def test_no_worker_survives_a_killed_parent(wait_gone: WaitGone, texts: tuple[str, ...]) -> None:
    parent, pids = run_parent("time.sleep(600)", *texts)
    assert len(pids) == 2
    parent.kill()
    parent.wait()
    assert wait_gone(pids) == []


@pytest.mark.parametrize("end", ["", "raise SystemExit(1)", "1 / 0"])
def test_a_parent_that_forgets_to_close_still_ends(wait_gone: WaitGone, end: str) -> None:
    parent, pids = run_parent(f"sys.stderr = None\n{end}", *BUSY)
    assert parent.wait(GENEROUS_S) == (1 if end else 0)
    assert len(pids) == 2
    assert wait_gone(pids) == []


def test_the_parent_imports_no_algebra() -> None:
    code = """
        import sys
        import dash_exp.verifiers.judges, dash_exp.verifiers.pool
        heavy = {"sympy", "math_verify", "latex2sympy2_extended", "torch", "transformers", "numpy"}
        print(sorted(heavy & set(sys.modules)))
    """
    root = str(Path(dash_exp.__file__).resolve().parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([root, *filter(None, sys.path)])},
    )
    assert done.stdout.strip() == "[]"
