"""A run that learns nothing: it writes a record and is followed, as a process of its own.

    python -m tests.mirror_writer <outputs> <cell's name> <steps> <seconds a step> <metrics a step>

It prints `ready` before its first step. With 0 steps it waits to be killed.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from dash_exp.config.schema import Config, TrackingConfig, changed
from dash_exp.mirror.follow import Follower
from dash_exp.record.folder import Recorder
from tests.mirror_fixtures import attempt, begin, step


def config_of(root: Path, uri: str | None = None) -> Config:
    config = Config()
    tracking = TrackingConfig(mlflow=True, every_s=0.3, uri=uri)
    config = changed(config, {"run.dir": str(root), "tracking": tracking})
    return config


def main(root: Path, name: str, steps: int, pause_s: float, metrics: int) -> None:
    folder = begin(root, name)
    with Follower(folder, config_of(root), print) as follower, Recorder(folder) as recorder:
        follower.start(recorder.attempt)
        attempt(recorder)
        step(recorder, 1, 0.5)
        print("ready", flush=True)
        for number in range(2, steps + 1):
            more = {f"more/{place}": number + place / 7 for place in range(metrics)}
            step(recorder, number, 1 / number, **more)
            time.sleep(pause_s)
        if steps == 0:
            time.sleep(600)
        recorder.status("finished", max(1, steps), reason="planned")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5]))
