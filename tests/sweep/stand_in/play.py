"""A cell's process without its training: the real lock, record and signals, and what a test asks for.

`play.json` in the folder, or the variable PLAY_<seed>, lists what each start does, the last one again and
again: `step` (reached), `wait` (seconds; a stopping signal ends it as it ends a step), `say` (printed),
`failure` (recorded, and the exit code is 1), `die` (a signal it sends itself; `die_late`: once it is
finished), `exit` (a code, with nothing recorded).
`seen.jsonl` records what it was given.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from dash_exp.record.folder import CellBusy, Recorder, read_json
from dash_exp.signals import STOPPING


def play(arguments: list[str]) -> NoReturn:
    folder = Path(arguments[0])
    try:
        with Recorder(folder) as recorder:
            finished = read_json(folder / "status.json").get("state") == "finished"  # as a real cell looks
            code = tidy(folder) if finished else perform(folder, recorder, arguments[1:])
    except CellBusy:
        code = 4
    sys.stdout.flush()
    os._exit(code)


def tidy(folder: Path) -> int:
    """Clean up after a finished cell."""
    for left in folder.glob("checkpoints/*/resume"):
        shutil.rmtree(left)
    return 0


def acts_of(folder: Path) -> str:
    if (folder / "play.json").exists():
        return (folder / "play.json").read_text()
    seed = re.search(r"^seed: (\d+)$", (folder / "config.yaml").read_text(), re.MULTILINE)
    return os.environ.get(f"PLAY_{seed[1] if seed else ''}", "[{}]")


def perform(folder: Path, recorder: Recorder, actions: list[str]) -> int:
    came: list[int] = []
    for number in STOPPING:
        signal.signal(number, lambda number, frame: came.append(number))
    acts = json.loads(acts_of(folder))
    act: dict[str, Any] = acts[min(recorder.attempt, len(acts)) - 1]
    step = act.get("step", 0)
    recorder.status("running", step)
    begun = time.time()
    if "say" in act:
        print(act["say"], flush=True)
    while time.time() < begun + act.get("wait", 0) and not came:
        time.sleep(0.01)
    time.sleep(0.15 if came else 0)  # for a second one
    seen = {
        "pid": os.getpid(),
        "begun": begun,
        "ended": time.time(),
        "actions": actions,
        "signals": came,
        "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }
    with (folder / "seen.jsonl").open("a") as stream:
        stream.write(json.dumps(seen) + "\n")
    if came:
        recorder.status("interrupted", step, failure=signal.Signals(came[0]).name)
        return 128 + came[0]
    if "die" in act:
        signal.signal(act["die"], signal.SIG_DFL) if act["die"] != signal.SIGKILL else None
        os.kill(os.getpid(), act["die"])
        time.sleep(10)
    if "failure" in act:
        recorder.status("failed", step, failure=act["failure"])
        return 1
    if "exit" in act:
        return int(act["exit"])
    recorder.status("finished", step, reason="planned")
    if "die_late" in act:
        os.kill(os.getpid(), act["die_late"])
    return 0
