"""The one door to MLflow: its experiment, its runs, what they hold, and batches. MLflow is imported when a
door is opened, never before.

Nothing here knows a cell. Whatever goes wrong is a StoreError, in words without secrets. Several processes
that create the schema or the experiment of a database at once break it, and several that write at once wait
for each other until some give up: so both happen under a lock, in a file beside it.
"""

from __future__ import annotations

import getpass
import logging
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from filelock import FileLock

from dash_exp.config.tracking import Place
from dash_exp.mirror.facts import ENDED
from dash_exp.mirror.points import Point

METRICS_AT_ONCE, OTHERS_AT_ONCE = 1000, 100
"""MLflow's limits of a batch."""
LOCK_S = 60.0
SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "GIT_PYTHON_REFRESH": "quiet",
}
"""Of MLflow, unless the user has set them: nothing is told to others, and a server that does not answer is
given up within half a minute, to be asked again later."""

Held = dict[tuple[int, int], frozenset[str]]
"""Step and time (ms) to the names of the metrics that a run holds there."""


class StoreError(Exception):
    """What MLflow could not do, and why, without secrets."""


@dataclass(slots=True)
class Run:
    """A run as the server has it."""

    id: str
    status: str
    end_ms: int | None
    params: dict[str, str]
    tags: dict[str, str]
    metrics: tuple[str, ...]


class Store:
    """An experiment at a place, created where it is not there yet. Raises StoreError."""

    def __init__(self, place: Place):
        self.place = place
        with self._told():
            self._lock = FileLock(lock_file(place), timeout=LOCK_S)
            with self._lock:  # the schema is created by whoever asks first
                self._client = _client(place.uri)
                self._experiment = self._experiment_id()

    def _experiment_id(self) -> str:
        name = self.place.experiment
        known = self._client.get_experiment_by_name(name)
        if known is None:
            file = self.place.file
            files = f"{file.parent / 'mlflow_artifacts' / name}" if file else None
            return str(self._client.create_experiment(name, artifact_location=files))
        if known.lifecycle_stage != "active":
            raise StoreError(f"the experiment {name!r} is deleted: restore it, or set tracking.experiment=")
        return str(known.experiment_id)

    @contextmanager
    def creating(self) -> Iterator[None]:
        """One process of this machine at a time: look whether a run is there, create it if not."""
        with self._told():
            self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    def check(self) -> None:
        """Raises StoreError where nobody answers."""
        with self._told():
            self._client.get_experiment(self._experiment)

    def find(self, tag: str, value: str) -> list[Run]:
        """The active runs with this tag, oldest first."""
        with self._told():
            found = self._client.search_runs(
                [self._experiment], f"tags.`{tag}` = '{value}'", max_results=1000
            )
        return [_run(one) for one in sorted(found, key=lambda one: (one.info.start_time, one.info.run_id))]

    def create(self, name: str, start_ms: int, tags: Mapping[str, str]) -> Run:
        with self._told(), self._writing():
            told = {"mlflow.user": getpass.getuser(), **tags}
            return _run(self._client.create_run(self._experiment, start_ms, told, run_name=name))

    def held(self, run: Run) -> Held:
        """Which values a run holds, asked of the server."""
        found: dict[tuple[int, int], set[str]] = defaultdict(set)
        with self._told():
            for name in run.metrics:
                for one in self._client.get_metric_history(run.id, name):
                    found[int(one.step), int(one.timestamp)].add(name)
        shared: dict[frozenset[str], frozenset[str]] = {}  # most steps have the same names
        frozen = {key: frozenset(names) for key, names in found.items()}
        return {key: shared.setdefault(names, names) for key, names in frozen.items()}

    def log_points(self, run: Run, points: Sequence[Point]) -> None:
        """Every value of these points, in as few batches as MLflow allows."""
        from mlflow.entities import Metric

        metrics = (Metric(k, v, p.time_ms, p.step) for p in points for k, v in p.values.items())
        while some := list(islice(metrics, METRICS_AT_ONCE)):
            with self._told(), self._writing():
                self._client.log_batch(run.id, metrics=some)

    def log_words(self, run: Run, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        for first in range(0, len(params), OTHERS_AT_ONCE):
            some = [Param(k, v) for k, v in list(params.items())[first : first + OTHERS_AT_ONCE]]
            with self._told(), self._writing():
                self._client.log_batch(run.id, params=some)
        run.params |= params
        if tags:
            with self._told(), self._writing():
                self._client.log_batch(run.id, tags=[RunTag(k, v) for k, v in tags.items()])
        run.tags |= tags

    def drop_tags(self, run: Run, names: Sequence[str]) -> None:
        for name in names:
            with self._told(), self._writing():
                self._client.delete_tag(run.id, name)
            del run.tags[name]

    def set_status(self, run: Run, status: str, end_ms: int) -> None:
        """The status, with the time of the end if it is one."""
        if run.status == status and (status not in ENDED or run.end_ms == end_ms):
            return
        with self._told(), self._writing():
            if status in ENDED:
                self._client.set_terminated(run.id, status, end_ms)
                run.end_ms = end_ms
            else:
                self._client.update_run(run.id, status)
        run.status = status

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except StoreError:
            raise
        except Exception as error:  # noqa: BLE001 (MLflow's own, SQLAlchemy's, the system's, a driver's)
            text = " ".join(str(error).split())
            raise StoreError(self.place.clean(f"{type(error).__name__}: {text}")[:500]) from None

    def _writing(self) -> FileLock | nullcontext[None]:
        return self._lock if self.place.file else nullcontext()


def lock_file(place: Place) -> Path:
    """Beside a database's file; for servers, of this machine and user."""
    if place.file:
        place.file.parent.mkdir(parents=True, exist_ok=True)
        return place.file.with_name(f"{place.file.name}.lock")
    return Path(tempfile.gettempdir(), f"dash_exp-mirror-{os.getuid()}-{place.mark}.lock")


def _client(uri: str) -> Any:
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _run(one: Any) -> Run:
    info, data = one.info, one.data
    return Run(
        info.run_id, info.status, info.end_time, dict(data.params), dict(data.tags), tuple(data.metrics)
    )
