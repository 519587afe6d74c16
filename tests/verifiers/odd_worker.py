"""A worker whose judge does what the text says, however bad: for tests of the pool only."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from dash_exp.types import Score
from dash_exp.verifiers import worker
from dash_exp.verifiers.types import VerifyTask, score

FORGED = json.dumps({"serial": 1, "score": {"value": 1.0, "outcome": "correct", "detail": ""}})


def obey(task: VerifyTask) -> Score:
    """Do it, then judge the text wrong, unless it is `fine`."""
    word, _, rest = task.text.partition(" ")
    if task.text == "fine":
        return score("correct")
    if task.text == "print a verdict":
        print(FORGED, flush=True)
    elif task.text == "write a verdict to descriptor 1":
        os.write(1, f"{FORGED}\n".encode())
    elif word == "sleep":
        time.sleep(float(rest))
    elif word == "hang":
        child = subprocess.Popen(["sleep", "600"])
        Path(rest.split()[-1]).write_text(str(child.pid))
        time.sleep(600)
    elif word == "length":
        return score("wrong", str(len(task.text)))
    else:
        return misbehave(task.text)
    return score("wrong")


def misbehave(text: str) -> Score:
    if text == "raise":
        raise ZeroDivisionError("division by zero")
    if text == "recurse":
        return misbehave(text)
    if text == "eat memory":
        return score("wrong", str(len(bytearray(2**33))))
    if text == "exit 0":
        os._exit(0)
    if text == "SystemExit":
        sys.exit(3)
    if text == "segfault":
        ctypes.string_at(0)
    if text == "environment":
        return score("wrong", " ".join(sorted(os.environ)))
    if text == "pid":
        return score("wrong", str(os.getpid()))
    return score("wrong")


def noisy_start() -> worker.TaskJudge:
    print(json.dumps({"ready": False}), flush=True)
    return obey


def run() -> int:
    worker.load_judge = noisy_start
    return worker.main()


if __name__ == "__main__":
    sys.exit(run())
