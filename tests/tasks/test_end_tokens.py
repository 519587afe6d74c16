"""Every end token that a model's folder names ends a completion."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dash_exp.errors import UserError
from dash_exp.modeling.source import text_model

ABSENT = object()


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [
        ([1, 7], 1, (1, 7)),
        ([7, 1, 7], 1, (1, 7)),
        (7, 1, (1, 7)),
        (None, 9, (1, 9)),
        (ABSENT, [9, 4], (1, 9, 4)),
        (7, 9, (1, 7)),
        (ABSENT, None, (1,)),
        ([], ABSENT, (1,)),
    ],
)
def test_the_tokenizers_end_token_and_those_of_the_configs(
    tiny_folder: Path, tmp_path: Path, generation: Any, config: Any, ends: tuple[int, ...]
) -> None:
    assert text_model(_folder(tiny_folder, tmp_path, generation, config)).end_ids == ends


@pytest.mark.parametrize("given", [100_000, [1, 120], -1, "</s>", [True], [1.0], {"a": 1}, [[1]]])
def test_an_end_token_that_is_none(tiny_folder: Path, tmp_path: Path, given: Any) -> None:
    with pytest.raises(UserError, match="eos_token_id"):
        text_model(_folder(tiny_folder, tmp_path, given, 1))


def test_a_tokenizer_of_another_model_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    folder = _folder(tiny_folder, tmp_path, 1, 1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 64}))
    with pytest.raises(UserError, match=r"has \d+ tokens, but the model only 64"):
        text_model(folder)


def _folder(tiny_folder: Path, tmp_path: Path, generation: Any, config: Any) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    for name, value in (("generation_config.json", generation), ("config.json", config)):
        kept = json.loads((folder / name).read_text())
        kept.pop("eos_token_id")
        (folder / name).write_text(json.dumps(kept if value is ABSENT else {**kept, "eos_token_id": value}))
    return folder
