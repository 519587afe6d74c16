"""Run folders made by the real recorder, with numbers that a test knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dash_exp.record.folder import Recorder, write_json

CPU = {"cpu": "Test CPU", "cores": 2, "threads": 2, "memory_gb": 8.0, "gpus": []}
PHASES = ("sample", "verify", "logprob", "backprop", "optimizer", "sync", "evaluate", "checkpoint", "other")


def config(arm: str = "dash", seed: int = 0, **changed: Any) -> dict[str, Any]:
    """A frozen config as far as the analysis reads it; `changed`: dotted keys, with __ for the dot."""
    plain: dict[str, Any] = {
        "seed": seed,
        "model": {"name": "smollm2_135m", "path": None},
        "algorithm": {"name": arm, "steps": 4, "prompts_per_step": 16, "group_size": 8, "beta": 0.04},
        "sampler": {"name": "hf", "streaming": True},
        "filter": {"name": "advantage", "threshold": 0.1},
        "dataset": {"name": "arithmetic", "verifier": "integer", "path": None},
        "learner": {"lr": 3e-5},
        "budget": {"seconds": None, "match": None},
    }
    for key, value in changed.items():
        group, _, name = key.partition("__")
        plain[group][name] = value
    return plain


def make_cell(
    root: Path,
    name: str,
    plain: Mapping[str, Any],
    *,
    rewards: Sequence[float] = (0.2, 0.4, 0.6, 0.8),
    step_s: float = 10.0,
    before: Sequence[float] | Sequence[Sequence[float]] = (),
    after: Sequence[float] | Sequence[Sequence[float]] = (),
    state: str = "finished",
    hardware: Mapping[str, Any] = CPU,
    code: str = "c0de",
) -> Path:
    """A cell in the pool. `before`, `after`: the verdict of the prompts p0, p1, ... on `arithmetic`, or
    those of several samples of each."""
    folder = root / "cells" / name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(plain)))
    with Recorder(folder) as recorder:
        for step, reward in enumerate(rewards, start=1):
            recorder.append("steps", [step_row(step, reward, step_s)])
        for step, verdicts in ((0, before), (len(rewards), after)):
            scores = [[v] if isinstance(v, float) else list(v) for v in verdicts]
            rows = [
                {
                    "step": step,
                    "dataset": "arithmetic",
                    "prompt": f"p{i}",
                    "scores": s,
                    "outcomes": ["correct" if one else "wrong" for one in s],
                    "tokens": [5] * len(s),
                    "truncated": [False] * len(s),
                }
                for i, s in enumerate(scores)
            ]
            recorder.append("eval_samples", rows)
            if scores:
                value = sum(map(sum, scores)) / sum(map(len, scores))
                recorder.append(
                    "evals",
                    [
                        {
                            "step": step,
                            "dataset": "arithmetic",
                            "metric": "accuracy",
                            "value": value,
                            "n": len(scores),
                        }
                    ],
                )
        recorder.status(state, len(rewards))
        write_json(
            folder / "provenance.json",
            {
                "code_hash": code,
                "commit": "a" * 40,
                "requeues": 0,
                "attempts": [{"attempt": 1, "started": 1.0, "hardware": dict(hardware)}],
            },
        )
    return folder


def step_row(step: int, reward: float, step_s: float) -> dict[str, Any]:
    """A step of `step_s` seconds of training: half sampling, half backpropagation."""
    seconds = dict.fromkeys(PHASES, 0.0) | {"sample": step_s / 2, "backprop": step_s / 2, "checkpoint": 1.0}
    return {
        "step": step,
        "reward/mean": reward,
        "updates": 1,
        "length/mean_tokens": 5.0,
        "advantage/mean_abs": 0.4,
        "advantage/kept_mean_abs": 0.7,
        "filter/kept_share": 0.5,
        "completions/sampled": 128,
        "tokens/sampled": 600,
        "tokens/forwarded": 300,
        "tokens/backpropagated": 300,
        "tokens/dropped_by_filter": 300,
        "outcome/correct": 30,
        "outcome/wrong": 98,
        "time/step_s": step_s + 1.0,
        **{f"time/{p}_s": s for p, s in seconds.items()},
    }
