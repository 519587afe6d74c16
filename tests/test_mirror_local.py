"""Records mirrored to TensorBoard's event files and to Weights & Biases offline, read back from there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dash_exp.config.environment import is_installed
from dash_exp.config.schema import TrackingConfig
from dash_exp.config.tracking import MirrorPlace, places_of
from dash_exp.errors import UserError
from dash_exp.mirror import __main__ as mirror
from dash_exp.mirror.store import CELL, Store, open_store
from dash_exp.mirror.sync import CellSync, record_points
from dash_exp.record.folder import Recorder
from tests.mirror_fixtures import NAME, attempt, begin, finished, step

pytestmark = pytest.mark.filterwarnings("ignore")
Values = dict[tuple[str, int], tuple[float, float]]


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not is_installed(package), reason=f"{package} is not installed")


def wanted(folder: Path) -> Values:
    """Each value by its name and step, with its time in seconds."""
    points = record_points(folder)
    return {(name, p.step): (v, p.time_ms / 1000) for p in points for name, v in p.values.items()}


def in_event_files(folder: Path) -> list[tuple[str, int, float, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return [
        (name, one.step, one.value, one.wall_time)
        for name in events.Tags()["scalars"]
        for one in events.Scalars(name)
    ]


def store_in(root: Path, tracker: str) -> Store:
    return open_store(MirrorPlace(str(root / tracker), "dash_exp", tracker))


@needs("tensorboard")
def test_event_files_hold_every_value_once_with_its_time(tmp_path: Path) -> None:
    """While the run goes on, by another process later, and again when there is nothing new."""
    folder = begin(tmp_path)
    with Recorder(folder) as recorder:
        attempt(recorder)
        step(recorder, 1, 0.25)
        first = CellSync(folder, store_in(tmp_path, "tensorboard"))
        first.sync()
        step(recorder, 2, 0.5)
        first.sync()
        step(recorder, 3, 0.75)
        recorder.status("finished", 3, reason="planned")
    for sent in (True, False):
        assert (CellSync(folder, store_in(tmp_path, "tensorboard")).sync() is not None) is sent
    found = in_event_files(tmp_path / "tensorboard" / NAME)
    expected = wanted(folder)
    assert len(found) == len(expected) >= 6
    for name, at, value, time in found:
        assert (value, time) == pytest.approx(expected[name, at], rel=1e-6)
    known = json.loads((tmp_path / "tensorboard" / NAME / "run.json").read_text())
    assert (known["status"], known["tags"][CELL]) == ("FINISHED", NAME)
    assert known["params"]["seed"] == "0"


@needs("wandb")
def test_weights_and_biases_offline_holds_every_value_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    folder = finished(tmp_path)
    assert mirror.run([str(folder), "tracking=wandb"]) == 0
    assert mirror.run([str(folder), "tracking=wandb"]) == 0
    [written] = (tmp_path / "wandb" / NAME / "wandb").glob("offline-run-*/run-*.wandb")
    rows: list[dict[str, Any]] = []
    for record in wandb_records(written):
        if record.HasField("history"):
            items = record.history.item
            rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
    found = {(k, int(r["step"])): v for r in rows for k, v in r.items() if not k.startswith("_")}
    found = {key: value for key, value in found.items() if key[0] != "step"}
    assert found == pytest.approx({key: value for key, (value, _) in wanted(folder).items()})


def wandb_records(path: Path) -> Any:
    """The records of W&B's file: blocks of 32 KiB with checksummed parts, as LevelDB's log has them."""
    from wandb.proto import wandb_internal_pb2

    data, place, parts = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def test_trackers_are_named_together(tmp_path: Path) -> None:
    tracking = TrackingConfig(mlflow=True, tensorboard=True)
    assert [(p.tracker, Path(p.uri).name) for p in places_of(tracking, tmp_path)] == [
        ("mlflow", "mlflow.db"),
        ("tensorboard", "tensorboard"),
    ]
    _, parsed = mirror.parse([str(tmp_path), "tracking=[wandb,mlflow]"])
    assert (parsed.mlflow, parsed.wandb, parsed.tensorboard) == (True, True, False)
    with pytest.raises(UserError, match="did you mean 'wandb'"):
        mirror.parse([str(tmp_path), "tracking=wandbb"])
