"""Names, ranges and contradictions: each is refused, with the place and the reason."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dash_exp.config import checks
from dash_exp.config.checks import check, largest_deviation
from dash_exp.config.schema import FILTERS, KINDS, TEMPLATES, Config, changed, declared, plain
from dash_exp.errors import Fault
from dash_exp.learning.advantages import group_advantages
from dash_exp.learning.filters import make_filter

pytest_plugins = ["tests.config.config_fixtures"]


def test_the_base_has_no_faults(config: Config) -> None:
    assert check(config) == []


# --- names and ranges ------------------------------------------------------------------------

NAMES = {
    "algorithm.baseline": "batch_mean, best_of_others, group_mean, leave_one_out",
    "algorithm.scale": "batch_std, mean, none, std",
    "algorithm.surrogate": "clipped, clipped_sequence, clipped_weight, policy_gradient",
    "algorithm.kl": "k2, k3",
    "algorithm.aggregation": "constant, sequence_mean, token_mean",
    "sampler.name": "hf, vllm, vllm_servers",
    "sampler.dtype": "bfloat16, float16, float32",
    "filter.kl": "drop, keep",
    "filter.denominator": "all, kept",
    "learner.schedule": "constant, linear",
    "learner.precision": "bf16, bf16_mixed, fp16_mixed, fp32",
    "learner.sharding": "fsdp, none",
    "learner.device": "auto, cpu, cuda, cuda:0",
    "run.progress": "auto, none, plain",
    "dataset.kind": ", ".join(sorted(KINDS)),
    "dataset.split": "test, train",
    "dataset.template": ", ".join(sorted(TEMPLATES)),
    "dataset.verifier": "code, integer, math, math_verify, reasoning_gym",
    "dataset.extraction": "first_integer",
    "evaluation.sets.arithmetic.kind": ", ".join(sorted(KINDS)),
    "evaluation.sets.arithmetic.verifier": "code, integer, math, math_verify, reasoning_gym",
    "evaluation.template": ", ".join(sorted(TEMPLATES)),
}


def test_an_unknown_name_lists_the_allowed_ones(config: Config) -> None:
    for key, allowed in NAMES.items():
        (fault,) = check(changed(config, {key: "???-no"}))
        assert fault.what == "got '???-no'"
        assert (
            fault.hint.removesuffix(", or a function of your own, module:function") == f"allowed: {allowed}"
        )


def test_every_choice_is_checked(config: Config) -> None:
    for key, one, value in declared(config):
        if one.allowed and not one.related:
            wrong = changed(config, {key: ["no"] if isinstance(value, list) else "no"})
            assert key in [fault.where for fault in declared_faults(wrong)]


def test_a_name_almost_right(config: Config) -> None:
    config = changed(config, {"learner.precision": "bf16_mixd"})
    [fault] = check(config)
    assert fault.hint.startswith("did you mean 'bf16_mixed'?")


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:3"])
def test_devices(config: Config, device: str) -> None:
    config = changed(config, {"learner.device": device})
    assert check(config) == []


def test_numbers_outside_their_ranges(config: Config) -> None:
    """Each number of the schema, below and above its range; in mappings and lists too."""
    places = {"": config, "evaluation.sets.arithmetic.": config.evaluation.sets["arithmetic"]}
    numbers = [
        (key, d.range) for place, part in places.items() for key, d, _ in declared(part, place) if d.range
    ]
    assert len(numbers) > 70
    for key, allowed in numbers:
        wrong = [allowed.low if allowed.open_low else allowed.low - 1, math.nan, math.inf]
        if allowed.high < math.inf:
            wrong.append(allowed.high if allowed.open_high else allowed.high + 1)
        for value in wrong:
            fault = Fault(key, f"got {plain(value)}, must be {allowed}")
            assert fault in declared_faults(
                changed(config, {key: [value] if key == "evaluation.k" else value})
            )


def declared_faults(config: Config) -> list[Fault]:
    return [*checks.declared_faults(config), *checks._declared(config)]


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("seed", 10**400, "at least 0 and at most 9223372036854775807"),
        ("sampler.gpu_memory_utilization", 1.1, "more than 0 and at most 1"),
        ("learner.warmup_share", 1.0, "at least 0 and less than 1"),
        ("algorithm.clip_low", 0.0, "more than 0 and at most 1"),
        ("verifier.memory_mb", 0, "at least 512 and at most 10000000"),
        ("verifier.workers", 1_000_000, "at least 1 and at most 512"),
        ("dataset.weight", math.inf, "more than 0"),
        ("evaluation.sets.arithmetic.max_prompt_tokens", 0, "at least 1 and at most 16777216"),
    ],
)
def test_out_of_range(config: Config, key: str, value: float, allowed: str) -> None:
    assert check(changed(config, {key: value})) == [Fault(key, f"got {plain(value)}, must be {allowed}")]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("algorithm.beta", 0.0),
        ("algorithm.steps", 1),
        ("filter.threshold", 0.0),
        ("sampler.gpu_memory_utilization", 1.0),
        ("learner.beta1", 0.0),
        ("budget.seconds", None),
        ("checkpoint.every", 0),
        ("evaluation.limit", None),
        ("algorithm.group_size", 2),
    ],
)
def test_the_ends_of_a_range_that_belong_to_it(config: Config, key: str, value: Any) -> None:
    config = changed(config, {key: value})
    assert check(config) == []


def test_filter_names_are_those_that_can_be_made() -> None:
    for name in FILTERS:
        assert len(make_filter(name, 0.1).keep([[0.0, 1.0]], 0)[0]) == 2


# --- across fields ---------------------------------------------------------------------------


def test_group_of_one(config: Config) -> None:
    config = changed(config, {"algorithm.group_size": 1})
    [fault] = check(config)
    assert (fault.where, fault.what) == ("algorithm.group_size", "got 1, must be at least 2")
    assert "with a single one it is 0" in fault.hint


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("sampler.top_p", 0.95, "got 0.95, must be 1 in training"),
        ("sampler.top_p", 1.5, "got 1.5, must be 1 in training"),
        ("sampler.top_k", 50, "got 50, must be 0 (off) in training"),
        ("sampler.top_k", -1, "got -1, must be 0 (off) in training"),
    ],
)
def test_truncated_sampling_is_refused_with_the_reason(
    config: Config, key: str, value: float, what: str
) -> None:
    config = changed(config, {key: value})
    [fault] = check(config)
    assert (fault.where, fault.what) == (key, what)
    assert "renormalised over the kept tokens" in fault.hint


def test_calls_must_divide_the_batch_of_per_microbatch_arms(config: Config) -> None:
    config = changed(config, {"sampler.prompts_per_call": 3})
    assert check(config) == []  # not used by a preemptive arm
    config = changed(config, {"algorithm.schedule": "per_microbatch", "sampler.schedule": "per_microbatch"})
    [fault] = check(config)
    assert fault == Fault(
        "sampler.prompts_per_call",
        "got 3, which does not divide algorithm.prompts_per_step=16",
        "allowed: 1, 2, 4, 8, 16",
    )
    config = changed(config, {"sampler.prompts_per_call": 32})
    assert [f.where for f in check(config)] == ["sampler.prompts_per_call"]
    config = changed(config, {"sampler.prompts_per_call": 8})
    assert check(config) == []


def test_an_arm_and_a_filter_that_contradict_each_other(config: Config) -> None:
    config = changed(config, {"algorithm.name": "no_gf", "algorithm.filters": ["none"]})
    [fault] = check(config)
    assert fault.where == "filter"
    assert fault.what == ("filter=advantage contradicts algorithm=no_gf, which is defined with filter=none")


def test_an_arm_that_names_no_such_filter(config: Config) -> None:
    config = changed(config, {"algorithm.filters": ["advantage", "gradient"]})
    assert [(f.where, f.what) for f in check(config)] == [("algorithm.filters", "got 'gradient'")]


def test_an_arm_and_a_schedule_that_contradict_each_other(config: Config) -> None:
    config = changed(config, {"sampler.schedule": "per_microbatch"})
    [fault] = check(config)
    assert (fault.where, fault.what) == (
        "sampler.schedule",
        "sampler.schedule=per_microbatch contradicts algorithm=dash, which is defined with preemptive",
    )


def test_k1_is_refused_with_the_reason(config: Config) -> None:
    config = changed(config, {"algorithm.kl": "k1"})
    [fault] = check(config)
    assert (fault.where, fault.what) == ("algorithm.kl", "got 'k1', allowed: k2, k3")
    assert "expected gradient is 0" in fault.hint


def test_several_updates_need_the_clipped_ratio(config: Config) -> None:
    config = changed(config, {"algorithm.passes": 3})
    [fault] = check(config)
    assert fault.where == "algorithm.surrogate"
    assert fault.what == "got 'policy_gradient', must be 'clipped' when algorithm.passes=3"
    config = changed(config, {"algorithm.surrogate": "clipped"})
    assert check(config) == []


@pytest.mark.parametrize(
    ("values", "where", "what"),
    [
        (
            {"algorithm.baseline": "batch_mean"},
            "algorithm.scale",
            "got 'std' with algorithm.baseline=batch_mean",
        ),
        (
            {"algorithm.scale": "mean", "algorithm.overlong_share": 0.2},
            "algorithm.scale",
            "got 'mean' with algorithm.overlong_share",
        ),
        (
            {"algorithm.baseline": "best_of_others", "algorithm.pass_k": 9},
            "algorithm.pass_k",
            "got 9, must be at least 2 and at most algorithm.group_size=8",
        ),
        ({"filter.name": "top_k"}, "filter.share", "is not set, but filter=top_k keeps that share"),
        ({"filter.name": "random", "filter.threshold": 9.0}, "filter.threshold", "got 9, which drops every"),
        (
            {"algorithm.source": "solutions", "algorithm.group_size": 1, "correction.name": "token_mask"},
            "correction",
            "got 'token_mask' with algorithm.source=solutions",
        ),
    ],
)
def test_methods_that_do_not_go_together(
    config: Config, values: dict[str, Any], where: str, what: str
) -> None:
    [fault] = check(changed(config, values))
    assert fault.where == where and fault.what.startswith(what)


def test_a_group_is_sampled_together(config: Config) -> None:
    config = changed(config, {"sampler.max_sequences": 7})
    [fault] = check(config)
    assert (fault.where, fault.what) == ("sampler.max_sequences", "got 7, less than algorithm.group_size=8")


def test_largest_deviations_of_the_paper() -> None:
    # G = 4, one right of four: (1 - 1/4) / (1/2 + 1e-4) = 0.75 / 0.5001
    assert largest_deviation(4) == pytest.approx(0.75 / 0.5001)


@given(size=st.integers(2, 40))
def test_no_group_has_a_larger_deviation(size: int) -> None:
    groups = ([1.0] * right + [0.0] * (size - right) for right in range(size + 1))
    found = max(abs(a) for g in groups for a in group_advantages(g))
    assert largest_deviation(size) == pytest.approx(found, rel=1e-12)


def test_a_threshold_that_would_drop_everything(config: Config) -> None:
    config = changed(config, {"algorithm.group_size": 4})
    config = changed(config, {"filter.threshold": 1.49})
    assert check(config) == []
    config = changed(config, {"filter.threshold": 1.5})  # 0.75 / 0.5001 = 1.4997
    [fault] = check(config)
    assert fault.where == "filter.threshold"
    assert fault.what == (
        "got 1.5, which drops every completion: with group_size=4 and rewards of 0 or 1, none is "
        "more than 1.4997 standard deviations from its group's mean"
    )
    config = changed(config, {"filter.name": "zero_variance"})  # has no threshold
    assert check(config) == []


def test_several_greedy_samples_would_all_be_equal(config: Config) -> None:
    config = changed(config, {"evaluation.samples": 8})
    assert [f.where for f in check(config)] == ["evaluation.samples"]
    config = changed(config, {"evaluation.temperature": 0.6})
    assert check(config) == []


def test_greedy_decoding_draws_from_no_nucleus(config: Config) -> None:
    config = changed(config, {"evaluation.top_p": 0.95})
    [fault] = check(config)
    assert (fault.where, fault.what) == (
        "evaluation.top_p",
        "got 0.95 with evaluation.temperature=0: greedy decoding draws nothing",
    )
    config = changed(config, {"evaluation.temperature": 0.7})
    assert check(config) == []


def test_pass_at_k_is_for_positive_k_named_once(config: Config) -> None:
    config = changed(
        config, {"evaluation.k": [1, 8]}
    )  # 8 is more than the samples: a row without a value, no fault
    assert check(config) == []
    config = changed(config, {"evaluation.k": [0, 4, 4]})
    assert check(config) == [
        Fault("evaluation.k", "got 0, must be at least 1 and at most 100000"),
        Fault("evaluation.k", "names 4 more than once"),
    ]


def test_extraction_belongs_to_the_verifier(config: Config) -> None:
    config = changed(config, {"dataset.verifier": "math"})
    [fault] = check(config)
    assert fault.where == "dataset.extraction"
    assert "boxed" in fault.hint
    config = changed(config, {"dataset.extraction": "boxed"})
    assert check(config) == []


@pytest.mark.parametrize(
    ("change", "where", "what"),
    [
        ({"hidden_size": 30}, "hidden_size", "got 30, must be a multiple of 2 x heads = 4"),
        ({"kv_heads": 3}, "kv_heads", "got 3, must divide heads = 2"),
        ({"layers": 0}, "layers", "got 0, must be at least 1 and at most 65536"),
    ],
)
def test_sizes_of_a_random_model(config: Config, change: dict[str, int], where: str, what: str) -> None:
    config = changed(config, {f"model.random.{name}": size for name, size in change.items()})
    assert [(f.where, f.what) for f in check(config)] == [(f"model.random.{where}", what)]


def test_random_model_lacks_or_knows_no_size(config: Config) -> None:
    sizes = {name: size for name, size in config.model.random.items() if name != "heads"}
    config = changed(config, {"model.random": {**sizes, "head": 2}})
    assert [f.what for f in check(config)] == ["got 'head'", "lacks heads"]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("learner.ranks", 1, "no other rank shares"),
        ("learner.precision", "bf16", "rounded"),
        ("learner.lora.rank", 4, "adapters"),
        ("sampler.name", "vllm", "sampler=vllm_servers"),
        ("learner.device", "cuda:0", "learner.device=auto"),
    ],
)
def test_what_sharded_weights_do_not_go_with(config: Config, key: str, value: Any, said: str) -> None:
    config = changed(config, {"learner.sharding": "fsdp", "learner.ranks": 2})
    assert not [f for f in check(config) if f.where == "learner.sharding"]
    config = changed(config, {key: value})
    (fault,) = [f for f in check(config) if f.where == "learner.sharding"]
    assert said in str(fault)


def test_all_faults_at_once(config: Config) -> None:
    wrong = {
        "algorithm.group_size": 1,
        "sampler.top_p": 0.9,
        "learner.lr": -1.0,
        "filter.kl": "kep",
        "algorithm.kl": "k1",
        "dataset.kind": "jsnl",
        "evaluation.samples": 4,
    }
    for key, value in wrong.items():
        config = changed(config, {key: value})
    assert {fault.where for fault in check(config)} == set(wrong)
