"""Configs from a few compositions equal Hydra's own, whatever is chosen and set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dash_exp.config.compose import compose, conf_dir
from dash_exp.config.schema import Config
from dash_exp.errors import UserError
from dash_exp.record.identity import cell_of, make_cell
from dash_exp.sweep.composer import Base, Composer, interpolated, is_leaf, overlap, refers

pytest_plugins = ["tests.config.config_fixtures"]
pytestmark = pytest.mark.usefixtures("no_data_folder")


@pytest.fixture(scope="module")
def composer() -> Iterator[Composer]:
    with Composer() as opened:
        yield opened


CHOICES = {
    "algorithm": ["dash", "grpo", "ppo_mini", "sft_h"],
    "recipe": ["small", "paper_code"],
    "model": ["tiny", "qwen0.5b"],
    "experiment": ["demo/minute", "demo/math_ppo_multi"],
}
NUMBERS = ["0", "1", "3", "1e-5", "0.5", "-2", "inf"]
VALUES = {
    "seed": ["0", "7"],
    "learner.lr": NUMBERS,
    "algorithm.beta": NUMBERS,
    "filter.threshold": NUMBERS,
    "algorithm.steps": ["3", "null", "${seed}"],
    "algorithm.filters": ["[none]", "[advantage,none]", "[]"],
    "algorithm.schedule": ["preemptive", "per_microbatch"],
    "sampler.schedule": ["per_microbatch"],
    "sampler.max_new_tokens": ["5", "${dataset.completion_tokens}"],
    "dataset.completion_tokens": ["9"],
    "dataset.template": ["bare", "problem_solution"],
    "recipe.sft_lr": ["1e-3"],
    "recipe.sft_batch": ["2"],
    "evaluation.k": ["[1,2]"],
    "evaluation.limit": ["4", "null"],
    "hardware": ["80", "'a b'", "null"],
    "budget.seconds": ["3", "null"],
    "budget.match": ["dash", "'x=1 y=2'"],
    "run.dir": ["/tmp/elsewhere"],
    "cluster.threads": ["1"],
    "cluster.setup": ["['module load x']"],
    "cluster.retries.nan": ["3"],
    "learner.lora.targets": ["[q_proj]"],
    "learner": ["{lr: 0.25}"],
    "model.add_bos": ["true"],
    "checkpoint.keep": ["1"],
    "algorithm.mini_batch": ["16", "null"],
    "tracking.every_s": ["5"],
}


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    chosen = draw(st.lists(st.sampled_from(sorted(CHOICES)), unique=True, max_size=2))
    named = draw(st.lists(st.sampled_from(sorted(VALUES)), unique=True, max_size=6))
    pairs = [(key, draw(st.sampled_from(CHOICES.get(key) or VALUES[key]))) for key in [*chosen, *named]]
    return [f"{key}={value}" for key, value in draw(st.permutations(pairs))]


@settings(max_examples=10, deadline=None)
@example(["learner.lr=2", "learner={lr: 0.25}"])  # what comes later wins
@example(["learner={lr: 0.25}", "learner.lr=2", "seed=1"])
@given(command_lines())
@pytest.mark.long
def test_every_config_equals_hydras_own(composer: Composer, overrides: list[str]) -> None:
    try:
        expected = compose(overrides)
    except UserError:
        with pytest.raises(UserError):
            composer.compose(overrides)
        return
    assert asdict(composer.compose(overrides).config) == asdict(expected)


@pytest.mark.long
@settings(max_examples=300, deadline=None)
@given(command_lines())
def test_every_config_equals_hydras_own_at_length(composer: Composer, overrides: list[str]) -> None:
    test_every_config_equals_hydras_own.hypothesis.inner_test(composer, overrides)  # type: ignore[attr-defined]


def test_cells_have_the_ids_of_single_runs(composer: Composer, tmp_path: Path) -> None:
    for overrides in (
        ["model=tiny", "seed=3", "learner.lr=1e-3", "hardware=mine"],
        ["algorithm=sft_h", "algorithm.steps=2", "recipe.sft_batch=4", "budget.seconds=9"],
        ["dataset=math_gsm8k", "model=tiny", "cluster.threads=1", "tracking=mlflow"],
    ):
        expected = make_cell(compose(overrides), tmp_path)
        assert composer.compose(overrides).cell(tmp_path) == expected


def test_no_machine_is_as_if_there_were_no_such_key(composer: Composer) -> None:
    """Records from before `hardware` existed keep their ids."""
    frozen, identity = composer.compose(["model=tiny"]).base.described(None)
    before = {key: value for key, value in identity.items() if key != "hardware"}
    assert cell_of(frozen, before).id == cell_of(frozen, identity).id
    assert cell_of(frozen, {**identity, "hardware": "mine"}).id != cell_of(frozen, identity).id


def bases(composer: Composer, *overrides: str) -> set[int]:
    """The compositions behind these overrides with each of the values 1, 2 and 3 for the last key."""
    return {id(composer.compose([*overrides[:-1], f"{overrides[-1]}={n}"]).base) for n in (1, 2, 3)}


def test_hydra_composes_once_for_values_that_nothing_depends_on(composer: Composer) -> None:
    assert len(bases(composer, "model=tiny", "seed")) == 1
    assert len(bases(composer, "model=tiny", "algorithm.steps")) == 1
    assert len(bases(composer, "model=tiny", "dataset.limit")) == 3
    assert len(bases(composer, "model=tiny", "recipe.sft_batch")) == 1
    assert len(bases(composer, "model=tiny", "algorithm=sft_h", "recipe.sft_batch")) == 3
    assert len(bases(composer, "model=tiny", "'algorithm.steps=${seed}'".strip("'"), "seed")) == 3


def test_a_copy_shares_what_does_not_differ(composer: Composer) -> None:
    plain, other = composer.compose(["model=tiny"]), composer.compose(["model=tiny", "learner.lr=1"])
    one, two = plain.config, other.config
    assert (one.learner.lr, two.learner.lr) == (3e-5, 1.0)
    assert one.dataset is two.dataset and one.algorithm is two.algorithm
    assert one.learner is not two.learner and one.learner.lora is two.learner.lora
    assert plain.cell(None).frozen["dataset"] is other.cell(None).frozen["dataset"]
    assert plain.cell(None).frozen["learner"]["lr"] == 3e-5


def test_what_cannot_be_composed_is_told_and_remembered(composer: Composer) -> None:
    for overrides, why in (
        (["algorithm=das"], "did you mean 'dash'"),
        (["algorithm.steps=${nowhere}"], "'nowhere' not found"),
        (["algorithm.beta=x"], "expected a number"),
        (["seed=[1"], "cannot read"),
    ):
        for _ in range(2):
            with pytest.raises(UserError, match=why):
                composer.compose(overrides)
    assert composer.faults_of("seed=1,2")[0].what == "got several values: seed=1,2"
    assert "did you mean 'filter.threshold'" in composer.faults_of("filter.treshold=1")[0].hint
    assert composer.faults_of("filter.threshold=1") == []


@pytest.mark.long
def test_an_outside_arm_whose_values_are_still_to_come(outside: Path) -> None:
    """It says nothing of `kl`, and its `passes` are null until `mini_batch` is not."""
    ours = (conf_dir() / "algorithm" / "dash.yaml").read_text().splitlines()
    lines = [line for line in ours if not line.startswith(("kl:", "passes:"))]
    text = "\n".join([*lines, "passes: ${algorithm.mini_batch}"])
    (outside / "algorithm" / "mine.yaml").write_text(text.replace("name: dash", "name: mine"))
    place = f"hydra.searchpath=[file://{outside}]"
    with Composer([place]) as composer:
        for more in ("algorithm.mini_batch=8", "algorithm.passes=2"):
            whole = [place, "seed=2", more, "algorithm=mine", "algorithm.kl=k3"]
            assert asdict(composer.compose(whole).config) == asdict(compose(whole))
        for lacking in (["algorithm.kl=k3"], []):
            overrides = [place, "algorithm=mine", "seed=2", *lacking]
            with pytest.raises(UserError) as theirs:
                compose(overrides)
            with pytest.raises(UserError, match=r"algorithm\.kl: has no value") as ours_told:
                composer.compose(overrides)
            assert str(ours_told.value) == str(theirs.value)


def test_a_sample_is_compared_with_hydra(composer: Composer) -> None:
    cells = [["model=tiny", f"seed={n}", f"learner.lr={n + 1}e-4"] for n in range(5)]
    with Composer() as broken:
        broken.check_sample(cells)
        base = broken.compose(cells[0]).base
        assert base.config is not None
        base.config.checkpoint.every += 1
        with pytest.raises(RuntimeError, match=r"checkpoint\.every"):
            broken.check_sample(cells)
        broken.check_sample([])


def test_what_an_interpolation_refers_to() -> None:
    names = set(interpolated({"a": "${x.y}/t/${oc.env:HOME,null}", "b": ["${..z}"], "c": 1, "d": "plain"}))
    assert {"x.y", "..z", "oc.env", "HOME"} <= names and "plain" not in names
    assert refers("x.y", "x.y") and refers("x", "x.y") and refers("x.y.z", "x.y")
    assert not refers("x.y", "x.yy") and not refers("y", "x.y")
    assert refers("..z", "a.z") and not refers("..z", "a.zz")
    assert overlap("a.b", "a") and not overlap("a.b", "a.bc")


def test_which_keys_hold_plain_values() -> None:
    assert all(map(is_leaf, ("seed", "learner.lr", "learner.lora.rank", "algorithm.filters")))
    assert not any(
        map(is_leaf, ("learner", "learner.lora", "cluster.retries.nan", "nothing", "a.b", "model.x"))
    )


def test_a_base_knows_what_it_lacks(composer: Composer) -> None:
    base = composer.compose(["model=tiny"]).base
    assert isinstance(base, Base) and isinstance(base.config, Config)
    assert base.absent == frozenset() and base.needs("run.dir") is False
    assert base.needs("dataset.completion_tokens") and base.needs("algorithm.schedule")
