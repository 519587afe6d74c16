"""Runs of the tiny model with real vLLM and two learning processes: killed in the middle, resumed, and every
token sampled with the weights that both ranks hold."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from dash_exp.record.folder import read_json, read_rows
from tests.conftest import REPOSITORY
from tests.test_run import SMALL, finish, steps_of, wait_for_steps

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
EXACT = [*SMALL, "learner.precision=fp32", "sampler.dtype=float32", "learner.micro_batch_tokens=70"]


def start(root: Path, options: list[str]) -> subprocess.Popen[str]:
    more = ["learner.ranks=2", "evaluation=none", "checkpoint.every=2", "run.progress=plain"]
    return subprocess.Popen(
        [sys.executable, "-m", "dash_exp", *options, *more, f"run.dir={root}"],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("sampler", ["vllm", "vllm_servers"])
def test_two_ranks_with_vllm_killed_and_resumed(tmp_path: Path, sampler: str) -> None:
    options = [*EXACT, f"sampler={sampler}", *(["sampler.servers=2"] if sampler == "vllm_servers" else [])]
    first = start(tmp_path, options)
    wait_for_steps(tmp_path, 3, first, 400)  # vLLM starts slowly on a busy machine
    others = psutil.Process(first.pid).children(recursive=True)
    assert any("dash_exp.learning.distributed.launch" in c.cmdline() for c in others)
    first.kill()
    first.communicate()
    _, alive = psutil.wait_procs(others, timeout=30)
    assert alive == []
    (folder,) = (tmp_path / "cells").iterdir()
    killed_after = len(read_rows(folder / "steps.jsonl").rows)

    again = start(tmp_path, options)
    output = finish(again, 500)
    assert again.returncode == 0, output
    assert f"resuming after step {killed_after // 2 * 2}" in output
    assert read_json(folder / "status.json")["state"] == "finished"
    rows = steps_of(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert {row["attempt"] for row in rows} == {1, 2}
    assert max(row["policy/logprob_gap"] for row in rows) < 1e-3
    assert sum(row["updates"] for row in rows) > 2
    events = read_rows(folder / "events.jsonl").rows
    learned = {e["worker"] for e in events if e["kind"] == "backprop"}
    assert learned == {"learner-0", "learner-1"}
    assert [e for e in events if e["kind"] == "fault"] == []
    if sampler == "vllm_servers":
        assert {e["worker"] for e in events if e["kind"] == "sample"} >= {"server-0", "server-1"}
        assert {row["sampler/waves"] for row in rows} == {2}
