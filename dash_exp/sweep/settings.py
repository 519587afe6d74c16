"""Settings of a launch, which are no part of a cell: `run`, `tracking`, `cluster`, `paths`. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from dash_exp.config.schema import ACTIONS, Config
from dash_exp.errors import Fault
from dash_exp.sweep.expand import Combination, key_of, quoted

OF_A_CELL = frozenset(
    f"cluster.{name}" for name in ("gpus", "cpus", "gpus_per_node", "cpus_per_gpu", "memory_gb", "hours")
)
"""What cells of one sweep may ask for differently."""
NOT_REPEATED = frozenset({"run.dir", "run.force", "run.sweep", "run.partner"})
"""Of a single launch, never of every start."""

Settings = Mapping[str, str]
"""Value by dotted key, as text that both Hydra and OmegaConf's dotlists read."""


def is_setting(text: str) -> bool:
    """Whether an override sets something of a launch, not of a cell."""
    return key_of(text).partition(".")[0] in ACTIONS


def split(overrides: Iterable[str]) -> tuple[Combination, Combination]:
    """A command line's overrides: those of cells, then those of the launch. Hydra's own are left out, but
    for where options are looked for."""
    kept = [
        text
        for text in overrides
        if not key_of(text).startswith(("hydra.", "hydra/")) or key_of(text) == "hydra.searchpath"
    ]
    return tuple(t for t in kept if not is_setting(t)), tuple(t for t in kept if is_setting(t))


def settings_of(config: Config) -> Settings:
    """Everything a config sets of a launch, but what is never repeated."""
    found = {
        key: text
        for group in ACTIONS
        for key, text in _leaves(asdict(getattr(config, group)), f"{group}.")
        if key not in NOT_REPEATED
    }
    return found


def _leaves(node: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for name, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        elif isinstance(value, str) and quoted(value) == value:
            yield f"{prefix}{name}", value
        else:
            yield f"{prefix}{name}", json.dumps(value)


def differing_faults(found: Sequence[Settings]) -> Iterator[Fault]:
    """A sweep has one value for what is no part of its cells, but for what they ask a cluster for."""
    for key in found[0] if found else ():
        values = sorted({one[key] for one in found if key in one})
        if len(values) > 1 and key not in OF_A_CELL:
            hint = "it is no part of a cell, so the cells would be the same: give it one value"
            yield Fault(key, f"has several values: {', '.join(values[:4])}", hint)


def common_actions(found: Sequence[Settings], defaults: Settings) -> Combination:
    """What all cells are started with: where they agree, and differ from what is set without a word."""
    return tuple(
        f"{key}={value}"
        for key, value in (found[0].items() if found else ())
        if value != defaults.get(key) and all(one.get(key) == value for one in found)
    )
