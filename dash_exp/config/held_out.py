"""What a run on the user's own data is evaluated on: the held-out set that they name, or nothing; never the
test split of the option that their data replaced."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from dash_exp.config.schema import Config, DatasetConfig, changed
from dash_exp.errors import Fault
from dash_exp.plugins import is_reference

OWN = ("path", "file", "hub", "hub_config")
"""Keys of a dataset that put other data in the place of its option's."""


def held_out(data: DatasetConfig) -> DatasetConfig | None:
    """The held-out set of a training dataset, judged as that is; None where it names none."""
    places = {"path": data.test_path} if data.test_path else {"hub_split": data.test_split}
    if not any(places.values()):
        return None
    rest: dict[str, Any] = {
        "test_path": None,
        "test_split": None,
        "split": "test",
        "mix": {},
        "limit": data.limit if data.streaming else None,
        "traces": None,
    }
    kept: DatasetConfig = changed(data, {"path": None, **places, **rest})
    return kept


def with_own_evaluation(config: Config, overrides: Iterable[str]) -> Config:
    """A copy that is evaluated on its dataset's held-out set, where the overrides give it other data, and do
    not choose its evaluation."""
    keys = {text.lstrip("+~").partition("=")[0] for text in overrides}
    data = config.dataset
    own = any(f"dataset.{name}" in keys and getattr(data, name) for name in OWN) or is_reference(data.kind)
    if any(key.split("@")[0] == "evaluation" or "evaluation.sets" in key for key in keys):
        return config
    found = held_out(data)
    if found is not None:
        made = changed(config, {"evaluation.sets": {data.name: found}})
    elif own:
        none = {"name": "none", "sets": {}, "before": False, "after": False, "every": 0}
        made = changed(config, {f"evaluation.{name}": value for name, value in none.items()})
    else:
        made = config
    assert isinstance(made, Config)
    return made


def as_typed(config: Config, faults: Iterable[Fault]) -> list[Fault]:
    """Faults of an evaluation set that was derived from the dataset under the keys that the user sets, each
    once."""
    data = config.dataset
    if held_out(data) is None or config.evaluation.sets.get(data.name) != held_out(data):
        return list(faults)
    prefix = f"evaluation.sets.{data.name}."
    renamed = {"path": "test_path", "hub_split": "test_split"}
    found = []
    for fault in faults:
        if fault.where.startswith(prefix):
            key = fault.where.removeprefix(prefix)
            fault = replace(fault, where=f"dataset.{renamed.get(key, key)}")
        if fault not in found:
            found.append(fault)
    return found
