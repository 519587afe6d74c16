"""Trackers that cannot be asked what they hold: Weights & Biases and TensorBoard. Each run is a folder, and
beside what the tracker writes there lies what was sent, so that a second sync sends nothing twice."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock

from dash_exp.config.tracking import MirrorPlace
from dash_exp.mirror.store import CELL, ENDED, Point, Run, StoreError
from dash_exp.record.folder import append_line, read_json, read_rows, write_json

LOCK_S = 60.0
KNOWN, SENT = "run.json", "sent.jsonl"


class FolderStore:
    """Runs as folders below a place: `run.json` has their facts, `sent.jsonl` a line for each point, written
    after the point. One whose line a crash prevented is sent again, with the same step and time, and to W&B
    under the same number."""

    has_parents = False

    def __init__(self, place: MirrorPlace):
        self.place, self.root = place, Path(place.uri)
        with self._call():
            self.root.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        with self._call(), FileLock(self.root / ".lock", timeout=LOCK_S):
            yield

    def check(self) -> None:
        """A folder that could be made can be written."""

    def find(self, tag: str, value: str) -> list[Run]:
        with self._call():
            known = [Run(**read_json(path)) for path in sorted(self.root.glob(f"*/{KNOWN}"))]
        return [run for run in known if run.tags.get(tag) == value]

    def create(self, name: str, start_ms: int, tags: Mapping[str, str]) -> Run:
        """Two records of one cell (`run.force=true`) are two runs."""
        folder = f"{name}-{start_ms}" if (self.root / name).exists() else name
        run = Run(folder, "RUNNING", None, {}, {CELL: name, **tags})
        with self._call():
            (self.root / folder).mkdir()
            self._save(run)
        return run

    def held(self, run: Run) -> dict[tuple[int, int], set[str]]:
        found: dict[tuple[int, int], set[str]] = defaultdict(set)
        for row in read_rows(self.root / run.id / SENT).rows:
            found[int(row["step"]), int(row["time_ms"])].update(row["names"])
        return found

    def log_points(self, run: Run, points: Sequence[Point]) -> None:
        if not points:
            return
        sent = self.root / run.id / SENT
        with self._call():
            self.write_points(run, points, len(read_rows(sent).rows))
            rows = [{"step": p.step, "time_ms": p.time_ms, "names": sorted(p.values)} for p in points]
            append_line(sent, "\n".join(map(json.dumps, rows)))

    def log_params(self, run: Run, params: Mapping[str, str]) -> None:
        if not params:
            return
        run.params |= params
        with self._call():
            self.write_params(run)
            self._save(run)

    def set_tags(self, run: Run, tags: Mapping[str, str], drop: Sequence[str] = ()) -> None:
        run.tags = {key: text for key, text in (run.tags | dict(tags)).items() if key not in drop}
        with self._call():
            self._save(run)

    def log_inputs(self, run: Run, data: Sequence[tuple[str, str]]) -> None:
        """Neither tracker has a place for them: the tags hold the record's own hashes."""

    def set_status(self, run: Run, status: str, end_ms: int) -> None:
        if run.status == status and (status not in ENDED or run.end_ms == end_ms):
            return
        run.status, run.end_ms = status, end_ms if status in ENDED else None
        with self._call():
            if status in ENDED:
                self.end(run)
            self._save(run)

    def _save(self, run: Run) -> None:
        write_json(self.root / run.id / KNOWN, asdict(run))

    @contextmanager
    def _call(self) -> Iterator[None]:
        """Raises StoreError for whatever goes wrong inside."""
        try:
            yield
        except StoreError:
            raise
        except Exception as error:  # noqa: BLE001 (the tracker's own, the system's)
            text = " ".join(str(error).split())
            raise StoreError(f"{type(error).__name__}: {text}"[:500]) from None

    # --- what each tracker does ---

    def write_points(self, run: Run, points: Sequence[Point], first: int) -> None:
        """The first of them is the run's point number `first`."""
        raise NotImplementedError

    def write_params(self, run: Run) -> None:
        raise NotImplementedError

    def end(self, run: Run) -> None:
        raise NotImplementedError


class TensorBoardStore(FolderStore):
    """Event files: scalars with the times of the record, the config as a table."""

    def __init__(self, place: MirrorPlace):
        super().__init__(place)
        self._writers: dict[str, Any] = {}

    def _writer(self, run: Run) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        if run.id not in self._writers:
            self._writers[run.id] = SummaryWriter(str(self.root / run.id))
        return self._writers[run.id]

    def write_points(self, run: Run, points: Sequence[Point], first: int) -> None:
        writer = self._writer(run)
        for point in points:
            for name, value in point.values.items():
                writer.add_scalar(name, value, point.step, point.time_ms / 1000)
        writer.flush()

    def write_params(self, run: Run) -> None:
        rows = "\n".join(f"| {key} | {text} |" for key, text in sorted(run.params.items()))
        self._writer(run).add_text("config", f"| key | value |\n|---|---|\n{rows}")
        self._writer(run).flush()

    def end(self, run: Run) -> None:
        if writer := self._writers.pop(run.id, None):
            writer.close()


class WandbStore(FolderStore):
    """Runs of a W&B project, grouped by sweep. Offline unless WANDB_API_KEY or WANDB_MODE says otherwise:
    `wandb sync <folder>/*/wandb/offline-run-*` sends them later."""

    def __init__(self, place: MirrorPlace):
        super().__init__(place)
        self._runs: dict[str, Any] = {}

    def _run(self, run: Run) -> Any:
        import wandb

        if run.id not in self._runs:
            mode = os.environ.get("WANDB_MODE") or (
                "online" if os.environ.get("WANDB_API_KEY") else "offline"
            )
            self._runs[run.id] = opened = wandb.init(
                project=self.place.experiment,
                id=run.id,
                name=run.id,
                group=run.tags.get("dash_exp.sweeps", "").partition(",")[0] or None,
                dir=self.root / run.id,
                mode=mode,  # type: ignore[arg-type]
                resume="allow" if mode == "online" else None,
                reinit="create_new",
                settings=wandb.Settings(silent=True, console="off", disable_git=True, x_disable_stats=True),
            )
            opened.define_metric("*", step_metric="step")
        return self._runs[run.id]

    def write_points(self, run: Run, points: Sequence[Point], first: int) -> None:
        """`step` is the record's. W&B's own only counts: it cannot go back, as a resumed run does."""
        opened = self._run(run)
        for number, point in enumerate(points, first):
            row = {**point.values, "step": point.step, "_timestamp": point.time_ms / 1000}
            opened.log(row, step=number)

    def write_params(self, run: Run) -> None:
        given = {name: typed(text) for name, text in run.params.items()}
        self._run(run).config.update(given, allow_val_change=True)

    def end(self, run: Run) -> None:
        opened = self._run(run)
        opened.summary.update({key: text for key, text in run.tags.items() if key.startswith("dash_exp.")})
        opened.finish(exit_code=0 if run.status == "FINISHED" else 1)
        del self._runs[run.id]


def typed(text: str) -> Any:
    """A parameter's text as the number or flag that it stands for, else itself."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, bool | int | float) else text
