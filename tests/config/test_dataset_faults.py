"""Datasets whose settings do not fit together are refused, with the place and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dash_exp.config.checks import check
from dash_exp.config.compose import compose, find_faults
from dash_exp.config.dataset_checks import EXTRACTIONS_OF, VERIFIERS_OF
from dash_exp.config.schema import KINDS, VERIFIERS, Config, DatasetConfig, changed, parts_of
from dash_exp.record import identity
from dash_exp.record.identity import make_cell, resolve_paths

pytest_plugins = ["tests.config.config_fixtures"]
pytestmark = pytest.mark.usefixtures("no_data_folder")


def faults(config: Config) -> list[tuple[str, str]]:
    return [(f.where, f.what) for f in check(config, installed=lambda package: True)]


@pytest.fixture
def mixed() -> Config:
    return compose(["dataset=math_gsm8k", "model=tiny"])


@pytest.fixture
def code() -> Config:
    return compose(["dataset=mbppplus", "model=tiny"])


def test_the_tables_name_the_same_kinds_and_verifiers() -> None:
    assert set(VERIFIERS_OF) == set(KINDS)
    assert set(EXTRACTIONS_OF) == set(VERIFIERS)
    assert {v for fitting in VERIFIERS_OF.values() for v in fitting} == set(VERIFIERS)


# --- one dataset -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "verifier", "extraction"),
    [
        ("arithmetic", "code", "program"),
        ("functions", "math", "boxed"),
        ("gsm8k", "reasoning_gym", "answer_tag"),
        ("reasoning_gym", "integer", "first_integer"),
    ],
)
def test_a_verifier_that_does_not_understand_the_answers(option: str, verifier: str, extraction: str) -> None:
    config = compose([f"dataset={option}", "evaluation=none", "model=tiny"])
    config = changed(config, {"dataset.verifier": verifier, "dataset.extraction": extraction})
    kind = config.dataset.kind
    assert faults(config) == [
        (
            "dataset.verifier",
            f"got {verifier!r}, which does not understand the answers of dataset.kind={kind}",
        )
    ]


def test_a_docstring_needs_programs(config: Config) -> None:
    config = changed(config, {"evaluation.sets.arithmetic.template": "docstring"})
    what = "'docstring' shows a program's first assertion, but {}.verifier=integer"
    [fault] = check(config)
    assert fault.where == "evaluation.sets.arithmetic.template"
    assert fault.what == what.format("evaluation.sets.arithmetic")
    config = changed(config, {"evaluation.sets.arithmetic.template": "bare"})
    config = changed(config, {"evaluation.template": "docstring"})
    [fault] = check(config)
    assert fault.where == "evaluation.template"


def test_few_shot_needs_examples(config: Config) -> None:
    config = changed(config, {"dataset.template": "few_shot"})
    assert [w for w, _ in faults(config)] == ["dataset.shots"]
    shots = [
        {"problem": "p", "solution": "s"},
        {"problem": "p", "answer": "s"},
        {"problem": "p", "solution": " "},
    ]
    config = changed(config, {"dataset.shots": shots})
    assert [w for w, _ in faults(config)] == ["dataset.shots[1]", "dataset.shots[2]"]
    config = changed(config, {"dataset.shots": config.dataset.shots[:1]})
    assert faults(config) == []
    config = changed(config, {"evaluation.template": "few_shot"})
    assert [w for w, _ in faults(config)] == ["evaluation.sets.arithmetic.shots"]


@pytest.mark.parametrize("bounds", [[5], [5, 2], [-1, 3], [1, 2, 3]])
def test_a_range_of_ids_is_two_numbers(code: Config, bounds: list[int]) -> None:
    code = changed(code, {"dataset.id_range": bounds})
    assert [w for w, _ in faults(code)] == ["dataset.id_range"]


def test_seconds_of_single_tasks(code: Config, config: Config) -> None:
    code = changed(code, {"dataset.timeouts": {"mbppplus-2": 0.0}})
    assert faults(code) == [
        ("dataset.timeouts.mbppplus-2", "got 0, must be more than 0 and at most 10000000")
    ]
    config = changed(config, {"dataset.timeouts": {"1": 2.0}, "dataset.tests_call": "f()"})
    assert [w for w, _ in faults(config)] == ["dataset.timeouts", "dataset.tests_call"]


def test_code_needs_names_for_its_tests(code: Config) -> None:
    code = changed(code, {"dataset.fields": {"problem": ["prompt"]}})
    assert faults(code) == [("dataset.fields", "no source is named for tests or test_list")]
    code = changed(code, {"dataset.fields.test_list": ["test_list"]})
    assert faults(code) == []


def test_what_is_dropped_is_a_regular_expression(code: Config) -> None:
    code = changed(code, {"dataset.solution_drop": "<<(>>"})
    [(where, what)] = faults(code)
    assert where == "dataset.solution_drop" and "'<<(>>' is no regular expression" in what


def test_generated_datasets_read_no_file_and_have_their_own_size(config: Config) -> None:
    config = changed(config, {"dataset.path": __file__, "dataset.size": 10})
    assert [w for w, _ in faults(config)] == ["dataset.path", "dataset.size"]


# --- reasoning-gym -----------------------------------------------------------------------------


def test_a_gym_dataset_without_task_or_size() -> None:
    found = find_faults(["dataset=reasoning_gym", "dataset.task=null", "dataset.size=null"])
    assert [f.where for f in found[:2]] == ["dataset.task", "dataset.size"]


def test_an_unknown_task_names_the_nearest_and_is_said_once() -> None:
    [fault] = find_faults(["dataset=reasoning_gym", "dataset.task=chain_sun"])
    assert (fault.where, fault.what) == ("dataset.task", "got 'chain_sun'")
    assert "did you mean 'chain_sum'" in fault.hint


def test_task_settings_are_written_without_a_plus() -> None:
    chosen = ["dataset=reasoning_gym", "dataset.task_options={max_terms:3}"]
    config = compose(chosen)
    assert find_faults(chosen) == []
    held_out = config.evaluation.sets["reasoning_gym"]
    assert held_out.task_options == config.dataset.task_options == {"max_terms": 3}
    assert (held_out.task, held_out.split, config.dataset.split) == ("chain_sum", "test", "train")
    [fault] = find_faults(["dataset=reasoning_gym", "dataset.task_options.max_term=3"])
    assert fault.hint.startswith("did you mean 'max_terms'?")


def test_the_package_of_gym_tasks_is_missing() -> None:
    config = compose(["dataset=reasoning_gym", "model=tiny"])
    [fault] = check(config, installed=lambda package: False)
    assert fault.what == "gym_chain_sum needs the package reasoning_gym, which is not installed"
    assert fault.hint == "pip install 'dash-exp[gym]'"


def test_other_datasets_do_not_need_it(config: Config) -> None:
    assert check(config, installed=lambda package: package != "reasoning_gym") == []


def test_evaluating_a_gym_task_without_training_on_one() -> None:
    where = [f.where for f in find_faults(["evaluation=reasoning_gym"])]
    assert "evaluation.sets.reasoning_gym.task" in where


# --- mixtures --------------------------------------------------------------------------------------


def test_a_mixture_of_the_options(mixed: Config) -> None:
    assert faults(mixed) == []
    assert [mixed.dataset.name, *mixed.dataset.mix] == ["math", "gsm8k"]
    assert (mixed.dataset.weight, mixed.dataset.mix["gsm8k"].weight) == (3.0, 1.0)
    assert mixed.evaluation.name == "math"
    supervised = compose(["dataset=math_gsm8k", "dataset.template=problem_solution"])
    assert supervised.dataset.mix["gsm8k"].template == "problem_solution"


def test_any_option_can_be_mixed_in_on_the_command_line() -> None:
    chosen = [
        "dataset=math",
        "+dataset@dataset.mix.more=gsm8k",
        "dataset.mix.more.weight=0.5",
        "evaluation=math",
    ]
    assert find_faults(chosen) == []
    config = compose(chosen)
    assert config.dataset.mix["more"].file == "gsm8k_train.jsonl"
    assert (config.dataset.mix["more"].weight, config.evaluation.name) == (0.5, "math")


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("stop", ["\n"], "got ['\\n'], but dataset.stop=[]"),
        ("max_new_tokens", 5, "got 5, but dataset.max_new_tokens=None"),
        ("name", "math", "'math' is the name of dataset too"),
        ("mix", {"x": DatasetConfig()}, "a dataset that is mixed in cannot be a mixture itself"),
        ("weight", 0.0, "got 0, must be more than 0"),
        ("template", "bear", "got 'bear'"),
    ],
)
def test_parts_that_do_not_fit(mixed: Config, key: str, value: Any, what: str) -> None:
    mixed = changed(mixed, {f"dataset.mix.gsm8k.{key}": value})
    assert faults(mixed) == [(f"dataset.mix.gsm8k.{key}", what)]


def test_a_part_is_looked_for_like_any_dataset(mixed: Config, tmp_path: Path) -> None:
    mixed = changed(mixed, {"dataset.mix.gsm8k.path": str(tmp_path / "absent.jsonl")})
    assert [w for w, _ in faults(mixed)] == ["dataset.mix.gsm8k.path"]


def test_only_training_is_mixed(mixed: Config) -> None:
    mixed = changed(mixed, {"evaluation.sets.math500.mix": {"x": DatasetConfig()}})
    assert faults(mixed) == [("evaluation.sets.math500.mix", "only what is trained on can be a mixture")]


def test_all_faults_of_all_datasets_at_once(mixed: Config) -> None:
    mixed = changed(mixed, {"dataset.template": "bear", "dataset.mix.gsm8k.split": "tarin"})
    mixed = changed(mixed, {"evaluation.sets.math500.verifier": "maths"})
    assert [w for w, _ in faults(mixed)] == [
        "dataset.template",
        "dataset.mix.gsm8k.split",
        "evaluation.sets.math500.verifier",
    ]


# --- identity --------------------------------------------------------------------------------------


def test_a_cell_is_what_its_parts_hold_wherever_they_lie(mixed: Config, tmp_path: Path) -> None:
    def cell(place: str, content: str, weight: float = 1.0) -> str:
        (tmp_path / place).mkdir(exist_ok=True)
        files = {"dataset": ("math", "main"), "dataset.mix.gsm8k": ("gsm8k", content)}
        config = changed(mixed, {"dataset.mix.gsm8k.weight": weight})
        for key, (name, text) in files.items():
            file = tmp_path / place / f"{name}.jsonl"
            file.write_text(text)
            config = changed(config, {f"{key}.path": str(file)})
        made = make_cell(config, tmp_path / "cache")
        assert made.name == "dash-tiny-math+gsm8k-s0"
        assert made.frozen["dataset"]["mix"]["gsm8k"]["path"] == str(tmp_path / place / "gsm8k.jsonl")
        return made.id

    assert cell("here", "rows") == cell("there", "rows")
    assert cell("here", "rows") != cell("here", "other rows")
    assert cell("here", "rows") != cell("here", "rows", weight=2.0)


def test_parts_are_found_in_the_data_folder(mixed: Config, tmp_path: Path) -> None:
    for name in ("math_train.jsonl", "gsm8k_train.jsonl"):
        (tmp_path / name).write_text("rows")
    mixed = changed(mixed, {"paths.data": str(tmp_path)})
    found = [one.path for one in parts_of(resolve_paths(mixed).dataset).values()]
    assert found == [str(tmp_path / "math_train.jsonl"), str(tmp_path / "gsm8k_train.jsonl")]


def test_traces_are_known_by_what_they_hold(config: Config, tmp_path: Path) -> None:
    ids = set()
    for name, content in (("a", "x"), ("b", "x"), ("c", "y")):
        (tmp_path / name).write_text(content)
        one = changed(config, {"algorithm.source": "traces", "dataset.traces": str(tmp_path / name)})
        ids.add(make_cell(one, tmp_path / "cache").id)
    assert len(ids) == 2


@pytest.mark.parametrize(("dataset", "changes"), [("functions", True), ("arithmetic", False)])
def test_a_new_version_of_a_verifier_makes_another_cell(
    monkeypatch: pytest.MonkeyPatch, dataset: str, changes: bool
) -> None:
    config = compose([f"dataset={dataset}", "model=tiny", "evaluation=none"])
    before = make_cell(config, None).id
    monkeypatch.setitem(identity.JUDGED_BY, "code", {"judge": "another"})
    assert (make_cell(config, None).id != before) == changes
    limited = changed(config, {"verifier.sandbox": "limits"})
    assert make_cell(changed(limited, {"verifier.sandbox": "auto"}), None).id == make_cell(config, None).id
    assert make_cell(limited, None).id != make_cell(config, None).id


def test_faults_of_the_own_held_out_set_are_named_as_the_user_set_it(tmp_path: Path) -> None:
    """It is derived from the dataset: a shared fault is told once, that of its file by its own key."""
    mine, held = tmp_path / "mine.jsonl", tmp_path / "held.jsonl"
    given = [f"dataset.path={mine}", f"dataset.test_path={held}", "dataset.extraction=boxed"]
    found = faults(compose(["dataset=own", "model=tiny", *given]))
    places = [where for where, _ in found]
    assert {"dataset.path", "dataset.test_path"} <= set(places)
    assert len(places) == len(set(places))
    assert not [where for where in places if where.startswith("evaluation.sets")]
