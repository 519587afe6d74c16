"""On a CUDA GPU: the same code trains, agrees with the CPU, and resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dash_exp.record.folder import read_final
from tests.conftest import make_groups
from tests.learning.test_learner import (
    LENGTHS,
    PROMPTS,
    assert_close,
    batches_of,
    learner_gradient,
    learner_of,
    objective,
    whole_groups,
)
from tests.test_run import run_here

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")]


def test_gradient_equals_that_of_the_cpu(tiny: Any, tiny_folder: Path) -> None:
    from dash_exp.modeling.attention import ATTENTION
    from dash_exp.modeling.source import load_model

    groups = make_groups(LENGTHS, PROMPTS)
    there = load_model(tiny_folder, torch.float32, ATTENTION).to("cuda")
    expected = learner_gradient(
        learner_of(tiny, objective()), batches_of(groups, 1000, "constant"), groups, "constant"
    )
    for rows in ("group", "completion"):
        learner = learner_of(there, objective())
        actual = learner_gradient(learner, [whole_groups(groups, rows)], groups, "constant")
        assert_close({k: v.cpu() for k, v in actual.items()}, expected, 1e-3)


def test_a_run_on_the_gpu_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dash_exp.cell.__main__ import run_config
    from dash_exp.config.compose import compose
    from dash_exp.train import attempt
    from tests.test_run import SMALL

    options = [*SMALL, "learner.device=cuda", f"run.dir={tmp_path}", "learner.preflight=true"]
    real = attempt.Attempt.progress

    def stop_at_three(self: Any, row: Any) -> None:
        real(self, row)
        if row["step"] == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(attempt.Attempt, "progress", stop_at_three)
    assert run_config(compose(options)) == 130
    monkeypatch.undo()
    assert run_config(compose(options)) == 0
    (folder,) = (tmp_path / "cells").iterdir()
    rows = read_final(folder, "steps")
    assert [r["step"] for r in rows] == list(range(1, 7))
    assert all(r["memory/gpu_peak_mb"] > 0 for r in rows)


def test_fp32_sampler_and_learner_agree_on_the_gpu(tmp_path: Path) -> None:
    folder = run_here(tmp_path, "learner.device=cuda", "learner.precision=fp32", "algorithm=no_gf")
    assert all(r["policy/logprob_gap"] < 1e-3 for r in read_final(folder, "steps"))


@pytest.mark.parametrize("device", ["cuda:0", "cuda"])
def test_two_ranks_give_the_gradients_of_one(tmp_path: Path, device: str) -> None:
    """On one GPU together (gloo), or each on its own (NCCL)."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("one GPU here")
    options = ["learner.precision=fp32", "algorithm.steps=2", "evaluation=none", f"learner.device={device}"]
    one, two = (
        read_final(run_here(tmp_path / str(n), *options, f"learner.ranks={n}"), "steps") for n in (1, 2)
    )
    for a, b in zip(one, two, strict=True):
        assert a["tokens/backpropagated"] == b["tokens/backpropagated"]
        assert a.get("optimizer/grad_norm") == pytest.approx(b.get("optimizer/grad_norm"), rel=1e-3)
