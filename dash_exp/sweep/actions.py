"""The actions of a sweep, key=value, as the settings that they make. Torch-free.

A plan's actions are what its cells agree on and what the default config does not say by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import yaml

from dash_exp.config.compose import conf_dir
from dash_exp.config.schema import ClusterConfig, TrackingConfig
from dash_exp.sweep.worker import threads_each

T = TypeVar("T")


def cluster_of(actions: Sequence[str]) -> ClusterConfig:
    """Raises omegaconf errors where an action is none."""
    return _group("cluster", "local", ClusterConfig, actions)


def tracking_of(actions: Sequence[str]) -> TrackingConfig:
    return _group("tracking", "none", TrackingConfig, actions)


def _group(name: str, default: str, kind: type[T], actions: Sequence[str]) -> T:
    from omegaconf import OmegaConf

    said = yaml.safe_load((conf_dir() / name / f"{default}.yaml").read_text(encoding="utf-8"))
    given = OmegaConf.from_dotlist([text for text in actions if text.startswith(f"{name}.")])
    made = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), said, given.get(name, {})))
    assert isinstance(made, kind)
    return made


def part_of_machine(cluster: ClusterConfig, n_jobs: int) -> tuple[str, ...]:
    """The override that gives each of `n_jobs` cells its part of this machine's processors, where the user
    has set nothing; to be planned with, since the name of a machine tells it too."""
    if n_jobs <= 1 or cluster.name != "local" or cluster.threads is not None:
        return ()
    return (f"cluster.threads={threads_each(n_jobs)}",)
