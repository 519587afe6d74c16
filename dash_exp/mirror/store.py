"""What a mirror needs of a tracker, whichever it is, and which module talks to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from dash_exp.config.tracking import MirrorPlace

ENDED = ("FINISHED", "FAILED", "KILLED")
"""States of a run that has ended, in MLflow's words."""
CELL = "dash_exp.cell"
"""The tag by which the run of a cell is found again."""


class StoreError(Exception):
    """What a tracker could not do, and why, without secrets."""


@dataclass(frozen=True, slots=True)
class Point:
    """The values of a step, or of one set's evaluation. `time_ms`: since the epoch."""

    step: int
    time_ms: int
    values: dict[str, float]


@dataclass(slots=True)
class Run:
    """A run as the tracker has it. `metrics`: names of its values, where the tracker is asked for them."""

    id: str
    status: str
    end_ms: int | None
    params: dict[str, str]
    tags: dict[str, str]
    metrics: tuple[str, ...] = ()


class Store(Protocol):
    """A place for runs. Every method raises StoreError. `has_parents`: a sweep is a run of its own."""

    place: MirrorPlace
    has_parents: bool

    def locked(self) -> AbstractContextManager[None]:
        """One process of this machine at a time: look whether a run exists, create it if not."""
        ...

    def check(self) -> None:
        """Raises StoreError if nothing can be sent."""
        ...

    def find(self, tag: str, value: str) -> list[Run]:
        """The runs with this tag, oldest first."""
        ...

    def create(self, name: str, start_ms: int, tags: Mapping[str, str]) -> Run: ...

    def held(self, run: Run) -> dict[tuple[int, int], set[str]]:
        """Names of the values that a run holds, by step and time (ms)."""
        ...

    def log_points(self, run: Run, points: Sequence[Point]) -> None: ...

    def log_params(self, run: Run, params: Mapping[str, str]) -> None: ...

    def set_tags(self, run: Run, tags: Mapping[str, str], drop: Sequence[str] = ()) -> None: ...

    def log_inputs(self, run: Run, data: Sequence[tuple[str, str]]) -> None:
        """The names of datasets with hashes of their prompts; the first of them is trained on."""
        ...

    def set_status(self, run: Run, status: str, end_ms: int) -> None:
        """The status, and the time of the end if the run has ended."""
        ...


def open_store(place: MirrorPlace) -> Store:
    """The tracker of a place. Raises StoreError if it cannot be used."""
    if place.tracker == "mlflow":
        from dash_exp.mirror.mlflow import MLflowStore

        return MLflowStore(place)
    from dash_exp.mirror.local import TensorBoardStore, WandbStore

    return WandbStore(place) if place.tracker == "wandb" else TensorBoardStore(place)
