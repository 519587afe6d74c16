"""Settings that a command has beside those of the config, as `serve.port=8000`. Torch-free."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dash_exp.config.overrides import describe
from dash_exp.errors import Fault, nearest

Settings = TypeVar("Settings")


def split_off(prefix: str, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments that begin with `prefix.`, without it, and the others."""
    own = [text.removeprefix(f"{prefix}.") for text in arguments if text.startswith(f"{prefix}.")]
    return own, [text for text in arguments if not text.startswith(f"{prefix}.")]


def own_settings(schema: type[Settings], prefix: str, texts: Sequence[str]) -> tuple[Settings, list[Fault]]:
    """A dataclass filled from these `name=value`, and what is wrong with them."""
    settings = OmegaConf.structured(schema)
    types = typing.get_type_hints(schema)
    faults = []
    for text in texts:
        name, equals, value = text.partition("=")
        where = f"{prefix}.{name}"
        if not equals:
            faults.append(Fault(where, "is not key=value"))
        elif name not in types:
            faults.append(Fault(where, "unknown key", nearest(name, types)))
        else:
            try:
                settings = OmegaConf.merge(settings, OmegaConf.from_dotlist([text]))
            except OmegaConfBaseException:
                faults.append(Fault(where, f"got {value!r}, expected {describe(types[name])}"))
    made: Any = OmegaConf.to_object(settings)
    assert isinstance(made, schema)
    return made, faults
