"""Whole runs with several learning processes: the record of one, and one of them lost."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from dash_exp.record.folder import differences, read_json, read_rows
from tests.conftest import REPOSITORY
from tests.test_run import SMALL, finish, run_here, start, steps_of, wait_for_steps

TWO = ["learner.ranks=2", "learner.precision=fp32", "learner.micro_batch_tokens=70"]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The record of an undisturbed run with two ranks."""
    return run_here(tmp_path_factory.mktemp("two"), *TWO)


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The other ranks that a run has started."""
    children = psutil.Process(process.pid).children(recursive=True)
    return [c for c in children if "dash_exp.learning.distributed.launch" in c.cmdline()]


def test_two_ranks_give_the_record_of_one(two: Path, tmp_path: Path) -> None:
    """Equal samples and rewards, and gradients to rounding; both ranks have worked in every step."""
    one = run_here(tmp_path, *TWO[1:])
    assert one.name != two.name  # a cell of its own
    learned = [row for row in steps_of(one) if row["updates"]]
    assert len(learned) > 2
    for a, b in zip(steps_of(one), steps_of(two), strict=True):
        assert b.keys() - a.keys() == {"time/reduce_s"} and not a.keys() - b.keys()
        assert 0 < b["time/reduce_s"] < b["time/optimizer_s"]
        for name in (
            "reward/mean",
            "tokens/sampled",
            "tokens/backpropagated",
            "updates",
            "filter/kept_share",
        ):
            assert a[name] == b[name], name
        for name in ("optimizer/grad_norm", "policy/entropy_nats", "kl/mean", "policy/logprob_mean"):
            if name in a:
                assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-6), name
    events = [r for r in read_rows(two / "events.jsonl").rows if r["kind"] == "backprop"]
    for row in learned:
        assert {e["worker"] for e in events if e["step"] == row["step"]} == {"learner-0", "learner-1"}


SHARDED = [*TWO, "learner.sharding=fsdp"]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The record of an undisturbed run with two ranks that hold half of everything each."""
    return run_here(tmp_path_factory.mktemp("sharded"), *SHARDED)


@pytest.mark.long
def test_sharded_ranks_give_the_record_of_whole_ones(two: Path, sharded: Path) -> None:
    """The sampler has a copy of the model: equal samples say that it gets the weights."""
    assert sharded.name != two.name
    for a, b in zip(steps_of(two), steps_of(sharded), strict=True):
        assert a.keys() - b.keys() == {"time/reduce_s"} and not b.keys() - a.keys()
        for name in ("reward/mean", "tokens/sampled", "tokens/backpropagated", "updates", "tokens/computed"):
            assert a[name] == b[name], name
        for name in ("optimizer/grad_norm", "policy/entropy_nats", "kl/mean", "policy/logprob_mean"):
            if name in a:
                assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-6), name
    (one,), (other,) = ((cell / "checkpoints").iterdir() for cell in (two, sharded))
    names = {file.name for file in one.iterdir()}
    assert {file.name for file in other.iterdir()} == names
    weights, found = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert weights.keys() == found.keys()
    assert all(torch.allclose(weights[n], found[n], rtol=0, atol=1e-5) for n in weights)


@pytest.mark.long
@pytest.mark.parametrize(
    ("arm", "more"), [("ppo_mini", ["algorithm.mini_batch=16"]), ("sft_h", [])], ids=["ppo_mini", "sft_h"]
)
def test_other_arms(tmp_path: Path, arm: str, more: list[str]) -> None:
    options = [f"algorithm={arm}", *more, "learner.precision=fp32", "algorithm.steps=2", "evaluation=none"]
    if arm == "sft_h":
        options += ["dataset=arithmetic", "dataset.path=null", "algorithm.group_size=1"]
    rows = [steps_of(run_here(tmp_path / str(n), *options, f"learner.ranks={n}")) for n in (1, 2)]
    for a, b in zip(*rows, strict=True):
        assert a["updates"] == b["updates"] > 0 and a["tokens/backpropagated"] == b["tokens/backpropagated"]
        assert b["optimizer/grad_norm"] == pytest.approx(a["optimizer/grad_norm"], rel=1e-3)


def lose(root: Path, number: int, *options: str, common: Sequence[str] = TWO) -> tuple[str, Path]:
    """Send the only other rank of a run a signal in the middle of training: what is said, the cell."""
    process = start(root, *common, *options)
    wait_for_steps(root, 2, process)
    (rank,) = ranks_of(process)
    os.kill(rank.pid, number)
    output = finish(process, 60)
    assert process.returncode == 2, output
    assert "rank-1.log" in output and "Traceback" not in output
    assert not rank.is_running()
    (folder,) = (root / "cells").iterdir()
    return output, folder


@pytest.mark.long
def test_a_rank_killed_fails_the_run_and_the_same_command_resumes(two: Path, tmp_path: Path) -> None:
    output, folder = lose(tmp_path, signal.SIGKILL)
    status = read_json(folder / "status.json")
    assert status["state"] == "failed"
    assert "rank 1 was killed by SIGKILL" in output and "rank 1 was killed by SIGKILL" in status["failure"]
    again = start(tmp_path, *TWO)
    output = finish(again)
    assert again.returncode == 0, output
    assert "resuming after step" in output
    assert differences(two, folder) == []


@pytest.mark.long
def test_a_sharded_rank_killed_fails_the_run_and_the_same_command_resumes(
    sharded: Path, tmp_path: Path
) -> None:
    output, folder = lose(tmp_path, signal.SIGKILL, common=SHARDED)
    assert read_json(folder / "status.json")["state"] == "failed"
    assert "rank 1 was killed by SIGKILL" in output
    again = start(tmp_path, *SHARDED)
    output = finish(again)
    assert again.returncode == 0, output
    assert "resuming after step" in output
    assert differences(sharded, folder) == []


@pytest.mark.long
def test_a_sharded_rank_stopped_fails_the_run(tmp_path: Path) -> None:
    output, folder = lose(tmp_path, signal.SIGSTOP, "learner.timeout_s=3", common=SHARDED)
    assert read_json(folder / "status.json")["state"] == "failed"
    assert re.search(
        r"rank 1 (gave no answer to '\w+' within 3 s|did not answer during a collective)", output
    )


@pytest.mark.long
def test_a_rank_stopped_fails_the_run(tmp_path: Path) -> None:
    output, folder = lose(tmp_path, signal.SIGSTOP, "learner.timeout_s=3")
    status = read_json(folder / "status.json")
    assert status["state"] == "failed" and status["failure"] in output
    assert re.search(
        r"rank 1 (gave no answer to '\w+' within 3 s|did not answer during a collective)", output
    )


@pytest.mark.long
def test_rank_0_killed_leaves_no_process_and_resumes(two: Path, tmp_path: Path) -> None:
    process = start(tmp_path, *TWO)
    wait_for_steps(tmp_path, 3, process)
    ranks = ranks_of(process)
    process.kill()
    process.communicate()
    gone, alive = psutil.wait_procs(ranks, timeout=10)
    assert len(gone) == 1 and not alive
    again = start(tmp_path, *TWO)
    output = finish(again)
    assert again.returncode == 0, output
    (folder,) = (tmp_path / "cells").iterdir()
    assert differences(two, folder) == []


@pytest.mark.long
def test_srun_starts_them_too_and_a_rank_killed_there_is_noticed(tmp_path: Path) -> None:
    """Two tasks with the variables of a step; rank 0 learns of the other's end from its connection."""
    common = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        "SLURM_STEP_NODELIST": "n[1-2]",
        "SLURM_LOCALID": "0",
        "MASTER_ADDR": "127.0.0.1",
    }
    options = [*TWO, "algorithm.steps=400", "checkpoint.every=0"]
    tasks = [start(tmp_path, *options, SLURM_PROCID=str(rank), **common) for rank in (0, 1)]
    wait_for_steps(tmp_path, 1, tasks[0])
    tasks[1].kill()
    tasks[1].communicate()
    output = finish(tasks[0], 60)
    assert tasks[0].returncode == 2, output
    assert "rank 1 is gone" in output
    (folder,) = (tmp_path / "cells").iterdir()
    assert read_json(folder / "status.json")["state"] == "failed"


@pytest.mark.long
def test_torchrun_starts_them_too(two: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            "-m",
            "dash_exp",
            *SMALL,
            *TWO,
            f"run.dir={tmp_path}",
        ],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (tmp_path / "cells").iterdir()
    assert read_json(folder / "status.json")["attempt"] == 1
    assert not (folder / "ranks").exists()
    assert differences(two, folder) == []
