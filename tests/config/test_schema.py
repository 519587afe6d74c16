"""Every key is declared once, with a meaning and bounds; checks, help and docs follow the schema."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dash_exp.config.compose import conf_dir
from dash_exp.config.overrides import common_keys, leaf_keys, page, type_of
from dash_exp.config.schema import Config, changed

pytest_plugins = ["tests.config.config_fixtures"]
KEYS = dict(leaf_keys())
ROOT = Path(__file__).parents[2]


def numbers_in(hint: Any) -> set[Any]:
    """The numeric types that take part in a type."""
    inner = typing.get_args(hint)
    return {hint} & {int, float} if not inner else set().union(*map(numbers_in, inner))


def test_every_key_has_a_meaning_and_every_number_a_range_or_a_relation() -> None:
    for key, one in KEYS.items():
        assert len(one.meaning) > 4, key
        assert "\n" not in one.meaning
        if numbers_in(type_of(key)):
            assert one.range is not None or one.related, key


def yaml_keys(node: Any, prefix: str) -> Iterator[str]:
    for name, value in node.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and type_of(key) is not dict and value:
            yield from yaml_keys(value, f"{key}.")
        else:
            yield key


def test_every_key_of_the_yaml_files_is_in_the_schema() -> None:
    files = [f for f in conf_dir().rglob("*.yaml") if "hydra" not in f.relative_to(conf_dir()).parts]
    for file in files:
        group = file.relative_to(conf_dir()).parts[0]
        text = file.read_text()
        top = "# @package _global_" in text or group == "config.yaml"
        node = {k: v for k, v in (yaml.safe_load(text) or {}).items() if k not in ("defaults", "hydra")}
        for key in yaml_keys(node, "" if top else f"{group}."):
            assert type_of(key) is not None or ".task_options" in key, (file, key)


def test_the_page_of_the_docs_is_what_the_schema_makes() -> None:
    assert (ROOT / "docs" / "config.md").read_text() == page(), (
        "python -m dash_exp.config.overrides > docs/config.md"
    )


def test_common_keys_fit_a_narrow_terminal() -> None:
    lines = common_keys().splitlines()
    assert max(map(len, lines)) < 80
    for line in lines:
        assert type_of(line.split("=")[0]) is not None


def test_a_changed_config_is_a_copy(config: Config) -> None:
    other = changed(config, {"seed": 5, "learner.lora.rank": 2, "evaluation.sets.arithmetic.limit": 3})
    assert (other.seed, other.learner.lora.rank, other.evaluation.sets["arithmetic"].limit) == (5, 2, 3)
    assert (config.seed, config.learner.lora.rank, config.evaluation.sets["arithmetic"].limit) == (0, 0, None)


def test_a_config_is_never_assigned_to(config: Config) -> None:
    held_out = config.evaluation.sets["arithmetic"]
    for part, name in ((config, "seed"), (config.learner, "lr"), (held_out, "path")):
        with pytest.raises(AttributeError, match="changed"):
            setattr(part, name, None)
