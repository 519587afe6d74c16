"""The arms and the paper's settings, number by number, as docs/arms.md and the paper have them."""

from __future__ import annotations

from typing import Any

import pytest

from dash_exp.config.schema import Config
from tests.config.composed import composed

pytest_plugins = ["tests.config.config_fixtures"]
pytestmark = pytest.mark.usefixtures("no_data_folder")

AXES = (
    "source",
    "baseline",
    "scale",
    "surrogate",
    "beta",
    "beta_schedule",
    "kl",
    "aggregation",
    "passes",
    "mini_batch",
    "schedule",
)
COMMON = (
    "sampler",
    "group_mean",
    "std",
    "policy_gradient",
    0.04,
    "constant",
    "k3",
    "constant",
    1,
    None,
    "preemptive",
)
ARMS: dict[str, dict[str, Any]] = {
    "dash": {},
    "no_gf": {"filter": "none"},
    "no_kl": {"beta": 0.0},
    "pg": {"filter": "none", "beta": 0.0},
    "grpo": {"filter": "none", "surrogate": "clipped", "schedule": "per_microbatch"},
    "ppo_multi": {"surrogate": "clipped", "passes": 3},
    "ppo_mini": {"surrogate": "clipped", "mini_batch": 8},
    "rloo": {"filter": "none", "baseline": "leave_one_out", "scale": "none", "beta": 0.0},
    "dr_grpo": {"filter": "none", "scale": "none", "surrogate": "clipped", "beta": 0.0},
    "reinforce_pp": {
        "filter": "none",
        "baseline": "batch_mean",
        "scale": "batch_std",
        "surrogate": "clipped",
        "beta": 0.0,
    },
    "maxrl": {"filter": "none", "scale": "mean", "beta": 0.0},
    "pass_at_k": {"filter": "none", "baseline": "best_of_others", "scale": "none", "beta": 0.0},
    "gpg": {"filter": "zero_variance", "scale": "none", "beta": 0.0, "aggregation": "token_mean"},
    "gspo": {
        "filter": "none",
        "surrogate": "clipped_sequence",
        "clip": (3e-4, 4e-4),
        "beta": 0.0,
        "aggregation": "sequence_mean",
        "mini_batch": 64,
    },
    "cispo": {
        "filter": "none",
        "surrogate": "clipped_weight",
        "clip": (1.0, 4.0),
        "beta": 0.0,
        "aggregation": "token_mean",
        "mini_batch": 64,
    },
    "dapo": {
        "filter": "zero_variance",
        "surrogate": "clipped",
        "clip": (0.2, 0.28),
        "beta": 0.0,
        "aggregation": "token_mean",
        "mini_batch": 64,
    },
    "sft_h": {"filter": "none", "source": "solutions", "beta": 0.0, "aggregation": "token_mean"},
    "sft_m": {"filter": "none", "source": "traces", "beta": 0.0, "aggregation": "token_mean"},
}


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_differs_from_dash_in_what_defines_it_only(arm: str) -> None:
    config = composed(f"algorithm={arm}")
    differs = dict(ARMS[arm])
    assert config.filter.name == differs.pop("filter", "advantage")
    clip = differs.pop("clip", (0.2, 0.2))
    assert (config.algorithm.clip_low, config.algorithm.clip_high) == clip
    found = {axis: getattr(config.algorithm, axis) for axis in AXES}
    assert found == {**dict(zip(AXES, COMMON, strict=True)), **differs}
    assert config.sampler.schedule == config.algorithm.schedule


def paper(name: str) -> Config:
    return composed(f"experiment=paper/{name}")


SIZES = {"math": ("0.5b", "1.5b", "3b"), "code": ("0.5b", "1.5b")}
RL = {
    "math": [
        *(f"dash_{s}" for s in SIZES["math"]),
        *(f"no_kl_{s}" for s in SIZES["math"]),
        "grpo_0.5b",
        "no_gf_0.5b",
        *(f"{a}_{s}" for a in ("ppo_multi", "ppo_mini") for s in SIZES["math"][:2]),
    ],
    "code": ["dash_0.5b", "dash_1.5b", "no_gf_0.5b", "grpo_0.5b"],
}


@pytest.mark.parametrize(("task", "name"), [(t, n) for t, names in RL.items() for n in names])
def test_a_row_of_reinforcement_learning(task: str, name: str) -> None:
    """64 x 4 completions and 562 updates on math, 32 x 4 and 24 on code; lr 3e-6, linear, no warm-up."""
    config = paper(f"{task}_{name}")
    arm, _, size = name.rpartition("_")
    a, opt, s = config.algorithm, config.learner, config.sampler
    assert (a.name, config.model.name) == (arm, f"qwen{size}")
    assert (a.steps, a.prompts_per_step, a.group_size) == {"math": (562, 64, 4), "code": (24, 32, 4)}[task]
    assert (opt.lr, opt.schedule, opt.warmup_share, opt.weight_decay, opt.max_grad_norm) == (
        3e-6,
        "linear",
        0.0,
        0.0,
        1.0,
    )
    assert (opt.beta1, opt.beta2, opt.eps, opt.freeze_embeddings) == (0.9, 0.999, 1e-8, False)
    assert (s.name, s.max_new_tokens, s.temperature, s.top_p, s.top_k) == ("vllm", 2048, 0.9, 1.0, 0)
    assert config.filter.threshold == (0.1 if task == "math" else 0.01) or config.filter.name == "none"
    data = {"math": ("math", 256, "bare"), "code": ("mbppplus", 1900, "docstring")}[task]
    assert (config.dataset.name, config.dataset.max_prompt_tokens, config.dataset.template) == data
    matched = f"experiment=paper/math_dash_{size}" if arm.startswith("ppo") else None
    assert config.budget.match == matched and config.budget.seconds is None


@pytest.mark.parametrize("task", SIZES)
def test_a_row_of_supervised_learning(task: str) -> None:
    """Three epochs in batches of 8, lr 2e-5, `Problem: ... Solution: ...` in training and evaluation."""
    for size in SIZES[task]:
        for arm in ("sft_h", "sft_m") if task == "math" else ("sft_h",):
            config = paper(f"{task}_{arm}_{size}")
            a = config.algorithm
            assert (a.name, a.steps, a.epochs, a.prompts_per_step, a.group_size) == (arm, None, 3, 8, 1)
            assert (config.learner.lr, config.model.name) == (2e-5, f"qwen{size}")
            assert config.dataset.template == config.evaluation.template == "problem_solution"
            assert config.dataset.name == {"math": "math", "code": "mbppplus"}[task]


def test_a_base_model_is_not_trained() -> None:
    for task, sizes in SIZES.items():
        for size in sizes:
            config = paper(f"{task}_base_{size}")
            assert (config.algorithm.steps, config.model.name) == (0, f"qwen{size}")


def test_grpo_on_code_as_published() -> None:
    config = paper("code_grpo_confounded_0.5b")
    a = config.algorithm
    assert (a.name, a.steps, a.prompts_per_step, a.group_size) == ("grpo", 792, 1, 4)
    assert config.learner.lr == 1e-6


def test_how_the_rows_are_evaluated() -> None:
    math, code = paper("math_dash_0.5b").evaluation, paper("code_dash_0.5b").evaluation
    assert set(math.sets) == {"math500", "gsm8k"} and (math.samples, math.temperature) == (1, 0.0)
    assert set(code.sets) == {"mbppplus"}
    assert (code.samples, code.temperature, code.top_p, code.k) == (8, 0.9, 1.0, [1, 8])
