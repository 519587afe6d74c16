"""The card of a model says what it was made from, how, and what came of it; all of it from the record."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from dash_exp.config.checks import check
from dash_exp.config.compose import compose
from dash_exp.config.schema import changed
from dash_exp.record.card import card

EVALS = [
    {"step": 0, "dataset": "gsm8k", "metric": "accuracy", "value": 0.25, "low": 0.2, "high": 0.31, "n": 200},
    {"step": 0, "dataset": "gsm8k", "metric": "length/mean_tokens", "value": 90.0, "n": 200},
    {"step": 30, "dataset": "gsm8k", "metric": "accuracy", "value": 0.5, "low": 0.43, "high": 0.57, "n": 200},
]


def test_a_card_has_recipe_data_and_results_with_intervals() -> None:
    config = asdict(compose(["model=qwen0.5b", "dataset=gsm8k", "sampler=hf", "recipe=small"]))
    provenance = {
        "commit": "abc123",
        "model": {"origin": "hub:Qwen/Qwen2.5-0.5B@main"},
        "datasets": {"training": "5" * 64},
    }
    text = card(config, provenance, EVALS, "dash-qwen0.5b-gsm8k-s0-0a1b2c3d")
    _, header, body = text.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": "transformers",
        "tags": ["dash_exp", "dash"],
        "base_model": "Qwen/Qwen2.5-0.5B",
    }
    assert "| gsm8k | 200 | 0.250 [0.200, 0.310] | 0.500 [0.430, 0.570] |" in body
    assert "`hub:Qwen/Qwen2.5-0.5B@main` after reinforcement learning on `gsm8k`" in body
    assert f"| `learner.lr` | {config['learner']['lr']} |" in body
    assert "commit `abc123`" in body and "5" * 64 in body
    assert "It was not evaluated." in card(config, provenance, [], "x")


def test_where_a_model_goes_is_checked_before_it_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    config = changed(compose(["model=tiny", "debug=fast"]), {"run.push_to": "mine"})
    found = [(fault.where, fault.what) for fault in check(config)]
    assert ("run.push_to", "got 'mine', must be <owner>/<name>") in found
    assert ("run.push_to", "needs a token of the hub") in found
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    assert check(changed(config, {"run.push_to": "me/mine"})) == []
