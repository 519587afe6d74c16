"""Sampler and learner that compute different probabilities with the same weights are reported."""

from __future__ import annotations

from typing import Any

import pytest

from dash_exp.config.compose import compose
from dash_exp.config.schema import Config, changed
from dash_exp.train.attempt import gap_warning


@pytest.fixture(scope="module")
def config() -> Config:
    return compose(["model=tiny", "sampler=vllm_servers"])


@pytest.mark.parametrize(
    ("precision", "dtype", "gap", "warned"),
    [
        ("fp32", "float32", 0.0005, False),
        ("fp32", "float32", 0.02, True),
        ("fp32", "bfloat16", 0.02, False),
        ("bf16_mixed", "float32", 0.02, False),
        ("bf16_mixed", "bfloat16", 0.09, True),
        ("fp32", "float32", None, False),
    ],
)
def test_a_gap_beyond_what_the_types_explain(
    config: Config, precision: str, dtype: str, gap: Any, warned: bool
) -> None:
    made = changed(config, {"learner.precision": precision, "sampler.dtype": dtype})
    text = gap_warning({} if gap is None else {"policy/logprob_gap": gap}, made)
    assert (text is not None) == warned and (not text or f"{gap:.3g}" in text)
