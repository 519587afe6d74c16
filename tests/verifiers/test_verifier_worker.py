"""The worker program by itself: what it writes where, and when it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import dash_exp


def run_worker(module: str, requests: list[dict[str, object]]) -> subprocess.CompletedProcess[str]:
    root = str(Path(dash_exp.__file__).resolve().parent.parent)
    return subprocess.run(
        [sys.executable, "-m", module],
        input="".join(json.dumps(request) + "\n" for request in requests),
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([root, *filter(None, sys.path)])},
    )


def request(serial: int, text: str, answer: str = "1") -> dict[str, object]:
    return {"serial": serial, "task": {"text": text, "answer": answer}}


def test_one_verdict_for_each_request_until_the_input_ends() -> None:
    done = run_worker(
        "dash_exp.verifiers.worker", [request(1, r"\frac{2}{4}", "0.5"), request(2, ""), request(3, "7", "7")]
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines[0] == {"ready": True}
    found = [(line["serial"], line["score"]["outcome"], line["retire"]) for line in lines[1:]]
    assert found == [(1, "correct", False), (2, "no_answer", False), (3, "correct", False)]
    assert done.returncode == 0


def test_prints_never_reach_the_channel() -> None:
    """Before it is ready they are kept as errors, to say why a start failed; later they go."""
    done = run_worker(
        "odd_worker", [request(1, "print a verdict"), request(2, "write a verdict to descriptor 1")]
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines[0] == {"ready": True}
    assert [line["score"]["outcome"] for line in lines[1:]] == ["wrong", "wrong"]
    assert done.stderr.splitlines() == [json.dumps({"ready": False})]


def test_the_worker_exits_when_its_parent_has_gone() -> None:
    root = str(Path(dash_exp.__file__).resolve().parent.parent)
    done = subprocess.run(
        [sys.executable, "-m", "dash_exp.verifiers.worker", "--parent=1"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([root, *filter(None, sys.path)])},
    )
    assert done.stdout == b""
    assert done.returncode == (1 if sys.platform == "linux" else 0)
