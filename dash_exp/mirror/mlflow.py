"""The only module that talks to MLflow: experiments, runs, what they hold, and batches of values.

Every failure is a StoreError whose text holds no secrets. A database breaks when several processes create its
schema or an experiment at once, and some give up when many write at once: both happen under a lock beside it.
"""

from __future__ import annotations

import getpass
import json
import logging
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock

from dash_exp.config.tracking import MirrorPlace
from dash_exp.mirror.store import ENDED, Point, Run, StoreError

BATCH = {"metrics": 1000, "params": 100, "tags": 100}
"""The most entities that MLflow takes in one request."""
LOCK_S = 60.0
DIGEST = 36
"""Characters of a dataset's digest that MLflow takes."""
SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "GIT_PYTHON_REFRESH": "quiet",
}
"""Defaults for MLflow's variables: no telemetry, and a server that does not answer fails within 30 s."""


class MLflowStore:
    """An experiment on a server or in a database, created if it does not exist. Raises StoreError."""

    has_parents = True

    def __init__(self, place: MirrorPlace):
        self.place = place
        with self._call():
            self._lock = FileLock(lock_file(place), timeout=LOCK_S)
            with self._lock:  # the first client creates the schema
                self._client = _client(place.uri)
                self._experiment = self._experiment_id()

    def _experiment_id(self) -> str:
        name, file = self.place.experiment, self.place.file
        known = self._client.get_experiment_by_name(name)
        if known is None:
            artifacts = f"{file.parent / 'mlflow_artifacts' / name}" if file else None
            return str(self._client.create_experiment(name, artifact_location=artifacts))
        if known.lifecycle_stage != "active":
            raise StoreError(f"the experiment {name!r} is deleted: restore it, or set tracking.experiment=")
        return str(known.experiment_id)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One process of this machine at a time: look whether a run exists, create it if not."""
        with self._call():
            self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    def check(self) -> None:
        """Raises StoreError if the server does not answer."""
        with self._call():
            self._client.get_experiment(self._experiment)

    def find(self, tag: str, value: str) -> list[Run]:
        """The active runs with this tag, oldest first."""
        query = f"tags.`{tag}` = '{value}'"
        with self._call():
            found = self._client.search_runs([self._experiment], query, max_results=1000)
        return [_run(one) for one in sorted(found, key=lambda one: (one.info.start_time, one.info.run_id))]

    def create(self, name: str, start_ms: int, tags: Mapping[str, str]) -> Run:
        with self._call(write=True):
            tags = {"mlflow.user": getpass.getuser(), **tags}
            return _run(self._client.create_run(self._experiment, start_ms, tags, run_name=name))

    def held(self, run: Run) -> dict[tuple[int, int], set[str]]:
        """Names of the metrics that a run holds, by step and time (ms), asked of the server."""
        found: dict[tuple[int, int], set[str]] = defaultdict(set)
        with self._call():
            for name in run.metrics:
                for one in self._client.get_metric_history(run.id, name):
                    found[int(one.step), int(one.timestamp)].add(name)
        return found

    def log_points(self, run: Run, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(k, v, p.time_ms, p.step) for p in points for k, v in p.values.items()]
        self._log_batches(run, "metrics", metrics)

    def log_params(self, run: Run, params: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        self._log_batches(run, "params", [Param(name, text) for name, text in params.items()])
        run.params |= params

    def set_tags(self, run: Run, tags: Mapping[str, str], drop: Sequence[str] = ()) -> None:
        from mlflow.entities import RunTag

        changed = {name: text for name, text in tags.items() if run.tags.get(name) != text}
        self._log_batches(run, "tags", [RunTag(name, text) for name, text in changed.items()])
        run.tags |= changed
        for name in drop:
            with self._call(write=True):
                self._client.delete_tag(run.id, name)
            del run.tags[name]

    def log_inputs(self, run: Run, data: Sequence[tuple[str, str]]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = [
            DatasetInput(
                Dataset(name, digest[:DIGEST], "dash_exp", json.dumps({"prompts": digest})),
                [InputTag("mlflow.data.context", "training" if place == 0 else "eval")],
            )
            for place, (name, digest) in enumerate(data)
        ]
        with self._call(write=True):
            self._client.log_inputs(run.id, inputs)

    def log_folder(self, run: Run, folder: Path, name: str) -> None:
        """Copy a folder to the run's artefacts, as `name`."""
        with self._call(write=True):
            self._client.log_artifacts(run.id, str(folder), name)

    def _log_batches(self, run: Run, kind: str, entities: Sequence[Any]) -> None:
        for start in range(0, len(entities), BATCH[kind]):
            with self._call(write=True):
                self._client.log_batch(run.id, **{kind: entities[start : start + BATCH[kind]]})

    def set_status(self, run: Run, status: str, end_ms: int) -> None:
        """The status, and the time of the end if the run has ended."""
        if run.status == status and (status not in ENDED or run.end_ms == end_ms):
            return
        with self._call(write=True):
            if status in ENDED:
                self._client.set_terminated(run.id, status, end_ms)
                run.end_ms = end_ms
            else:
                self._client.update_run(run.id, status)
        run.status = status

    @contextmanager
    def _call(self, write: bool = False) -> Iterator[None]:
        """Raises StoreError for whatever goes wrong inside. `write`: one at a time in a database's file."""
        try:
            with self._lock if write and self.place.file else nullcontext():
                yield
        except StoreError:
            raise
        except Exception as error:  # noqa: BLE001 (MLflow's own, SQLAlchemy's, the system's, a driver's)
            text = " ".join(str(error).split())
            raise StoreError(self.place.clean(f"{type(error).__name__}: {text}")[:500]) from None


def lock_file(place: MirrorPlace) -> Path:
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
