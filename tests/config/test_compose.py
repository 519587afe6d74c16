"""Every option composes; explicit choices win; every wrong override is found, all at once."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra

from dash_exp.config.checks import check
from dash_exp.config.compose import compose, conf_dir, find_faults
from dash_exp.config.overrides import type_of
from dash_exp.config.schema import changed
from dash_exp.config.tracking import TRACKERS
from dash_exp.errors import UserError
from tests.config.composed import composed

OPTIONS = sorted(
    file.relative_to(conf_dir()).with_suffix("").as_posix()
    for file in conf_dir().glob("*/**/*.yaml")
    if "hydra" not in file.parts[-3:]
)
pytest_plugins = ["tests.config.config_fixtures"]
pytestmark = pytest.mark.usefixtures("no_data_folder")
PAPER_MODELS = ("qwen0.5b", "qwen1.5b", "qwen3b")
NEEDS = {
    "filter": ["algorithm=ppo_multi"],
    "evaluation/reasoning_gym": ["dataset=reasoning_gym"],
    "dataset/own": [f"dataset.path={Path(__file__).parents[1] / 'digits.jsonl'}"],
}
"""Options, or groups of them, that fit only beside another one."""


def chosen_together() -> list[tuple[str, ...]]:
    """Every option at least once: what an arm or experiment says by itself, the other groups side by side."""
    names = {
        group: [o for o in OPTIONS if o.startswith(f"{group}/")]
        for group in sorted({o.split("/")[0] for o in OPTIONS})
    }
    by_itself = [(o,) for group in ("algorithm", "experiment") for o in names.pop(group)]
    names["evaluation"].remove("evaluation/reasoning_gym")  # fits beside its own dataset only
    by_itself.append(("evaluation/reasoning_gym",))
    return by_itself + list(itertools.zip_longest(*names.values()))


@pytest.mark.parametrize("options", chosen_together(), ids=lambda options: "+".join(filter(None, options)))
def test_every_option_composes_to_a_config_without_faults(options: tuple[str | None, ...]) -> None:
    chosen = [o.replace("/", "=", 1) for o in options if o]
    needs = [one for o in options if o for one in NEEDS.get(o, NEEDS.get(o.split("/")[0], []))]
    config = composed(*dict.fromkeys([*needs, *chosen]))
    if config.algorithm.source == "traces":
        config = changed(config, {"dataset.traces": __file__})  # sampled before, by another command
    assert check(config, installed=lambda package: True) == []


def test_every_option_says_what_it_is() -> None:
    for option in OPTIONS:
        lines = (conf_dir() / f"{option}.yaml").read_text().splitlines()
        documented = lines[1] if lines[0] == "# @package _global_" else lines[0]
        assert documented.startswith("# ") and len(documented) > 12, option


def test_options_are_named_after_their_files() -> None:
    for option in OPTIONS:
        group, _, name = option.partition("/")
        named = yaml.safe_load((conf_dir() / f"{option}.yaml").read_text()) or {}
        if group == "tracking":
            assert [tracker for tracker in TRACKERS if named.get(tracker)] == [name] * (name != "none")
        elif group not in ("dataset", "debug", "experiment", "recipe"):
            assert named.get(group, named)["name"] == name


def test_the_default_cell() -> None:
    config = compose()
    names = (
        config.model.name,
        config.algorithm.name,
        config.recipe.name,
        config.sampler.name,
        config.filter.name,
        config.dataset.name,
        config.evaluation.name,
    )
    assert names == ("smollm2_135m", "dash", "small", "hf", "advantage", "arithmetic", "arithmetic")
    assert (config.algorithm.steps, config.algorithm.beta) == (30, 0.04)
    assert (config.algorithm.prompts_per_step, config.algorithm.group_size) == (16, 8)
    assert (config.learner.lr, config.learner.precision) == (3e-5, "bf16_mixed")
    assert config.evaluation.sets["arithmetic"].split == "test"
    assert config.dataset.split == "train"
    assert config.dataset.stop == ["\n"]


@pytest.mark.parametrize("model", PAPER_MODELS)
@pytest.mark.parametrize("algorithm", ["dash", "grpo", "ppo_multi"])
def test_the_papers_experiment_composes_to_its_recipe(model: str, algorithm: str) -> None:
    config = compose([f"algorithm={algorithm}", f"model={model}"])
    assert config.model.name == model
    assert config.algorithm.name == algorithm
    assert config.dataset.name == "math"
    assert config.dataset.file == "math_train.jsonl"
    assert (config.sampler.name, config.recipe.name) == ("vllm", "paper")
    assert config.evaluation.name == "math"
    assert list(config.evaluation.sets) == ["math500", "gsm8k"]
    assert (config.algorithm.prompts_per_step, config.algorithm.group_size) == (64, 4)
    assert (config.sampler.max_new_tokens, config.sampler.temperature) == (2048, 0.9)
    assert config.learner.lr == 3e-6
    assert config.algorithm.beta == 0.04


@pytest.mark.parametrize(
    ("arm", "expected"),
    {
        "dash": ("policy_gradient", 0.04, 1, "preemptive", "advantage"),
        "no_gf": ("policy_gradient", 0.04, 1, "preemptive", "none"),
        "no_kl": ("policy_gradient", 0.0, 1, "preemptive", "advantage"),
        "pg": ("policy_gradient", 0.0, 1, "preemptive", "none"),
        "grpo": ("clipped", 0.04, 1, "per_microbatch", "none"),
        "ppo_multi": ("clipped", 0.04, 3, "preemptive", "advantage"),
    }.items(),
)
def test_arms_are_what_the_design_says(arm: str, expected: tuple[object, ...]) -> None:
    config = compose([f"algorithm={arm}"])
    a = config.algorithm
    assert (a.surrogate, a.beta, a.passes, config.sampler.schedule, config.filter.name) == expected


def test_explicit_choices_win_over_what_a_model_names() -> None:
    config = compose(["model=qwen0.5b", "sampler=hf", "dataset=gsm8k"])
    assert (config.sampler.name, config.dataset.name) == ("hf", "gsm8k")
    assert config.evaluation.name == "gsm8k"
    assert list(config.evaluation.sets) == ["gsm8k"]
    assert config.recipe.name == "paper"  # not named, so still the model's


def test_explicit_evaluation_wins_over_the_datasets() -> None:
    config = compose(["dataset=gsm8k", "evaluation=none"])
    assert (config.evaluation.name, config.evaluation.sets) == ("none", {})


def test_explicit_filter_wins_over_the_arms_where_it_fits() -> None:
    assert compose(["algorithm=dash", "filter=zero_variance"]).filter.name == "zero_variance"


def test_a_key_wins_over_recipe_experiment_and_debug() -> None:
    chosen = ["experiment=demo/minute", "debug=fast", "algorithm.steps=7", "recipe=paper"]
    assert compose(chosen).algorithm.steps == 7


def test_experiment_and_debug_presets() -> None:
    assert compose(["experiment=demo/minute"]).algorithm.steps == 10
    fast = compose(["debug=fast", "algorithm=grpo"])
    assert (fast.model.name, fast.algorithm.name, fast.algorithm.steps) == ("tiny", "grpo", 2)
    assert compose(["debug=fast", "model=qwen0.5b"]).model.name == "qwen0.5b"


def test_data_folder_comes_from_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DASH_DATA", "/data/of/mine")
    assert compose().paths.data == "/data/of/mine"
    assert compose(["paths.data=/other"]).paths.data == "/other"
    monkeypatch.delenv("DASH_DATA")
    assert compose().paths.data is None


def test_an_outside_arm_may_build_on_one_of_ours(outside: Path) -> None:
    text = "defaults: [grpo, _self_]\nname: mine\nbeta: 0.1\n"
    (outside / "algorithm" / "mine.yaml").write_text(text)
    overrides = [f"hydra.searchpath=[file://{outside}]", "algorithm=mine", "model=tiny"]
    config = compose(overrides)
    assert (config.algorithm.name, config.algorithm.beta) == ("mine", 0.1)
    assert (config.filter.name, config.sampler.schedule) == ("none", "per_microbatch")
    assert find_faults(overrides) == []


def test_composing_leaves_hydra_as_it_was() -> None:
    GlobalHydra.instance().clear()
    compose()
    assert not GlobalHydra.instance().is_initialized()
    with pytest.raises(UserError):
        compose(["algorithm=nothing_like_it"])
    assert not GlobalHydra.instance().is_initialized()


def test_composing_inside_hydra_leaves_it_as_it_was() -> None:
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        before = GlobalHydra.instance().hydra
        assert before is not None
        compose()
        assert GlobalHydra.instance().hydra is before


def test_the_schema_knows_every_kind_of_key() -> None:
    assert type_of("algorithm.prompts_per_step") is int
    assert type_of("evaluation.sets.any_label.limit") == int | None
    assert type_of("model.random.heads") is int
    for absent in ("algorithm.stepz", "algorithm.steps.more", "nothing", "evaluation.sets.a.b"):
        assert type_of(absent) is None


def test_nothing_here_imports_torch() -> None:
    code = (
        "import sys, dash_exp.config.compose, dash_exp.config.checks, dash_exp.__main__\n"
        "dash_exp.config.compose.find_faults(['model=tiny'])\n"
        "print([m for m in ('torch', 'vllm', 'transformers') if m in sys.modules])"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_own_data_are_evaluated_on_their_own_held_out_set_or_on_nothing() -> None:
    """Each row: overrides beside dataset=gsm8k, and where the evaluation sets are read from."""
    mine = "dataset.path=my.jsonl"
    rows: list[tuple[tuple[str, ...], list[tuple[str | None, str | None]]]] = [
        ((), [(None, "test")]),
        (("dataset.path=null",), [(None, "test")]),
        ((mine,), []),
        (("dataset.hub=me/sums",), []),
        ((mine, "dataset.test_path=t.jsonl", "dataset.limit=9"), [("t.jsonl", "train")]),
        (("dataset.hub=me/sums", "dataset.test_split=held"), [(None, "held")]),
        ((mine, "evaluation=gsm8k"), [(None, "test")]),
        ((mine, "+dataset@evaluation.sets.more=math500"), [(None, "test"), (None, "test")]),
    ]
    for overrides, expected in rows:
        config = compose(["dataset=gsm8k", *overrides])
        sets = config.evaluation.sets.values()
        assert [(one.path, one.hub_split) for one in sets] == expected, overrides
        assert config.evaluation.before is bool(expected)
        assert all(one.limit is None and one.split == "test" for one in sets)
    streamed = ["dataset.hub=me/sums", "dataset.test_split=held", "dataset.streaming=true", "dataset.limit=9"]
    config = compose(["dataset=own", "model=tiny", *streamed])
    assert check(config) == [] and [one.limit for one in config.evaluation.sets.values()] == [9]
