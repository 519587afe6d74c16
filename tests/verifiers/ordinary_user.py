"""Run as a user who is not root: programs that have the kernel signal a process of that user."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict

from dash_exp.verifiers.judges import code_judge
from dash_exp.verifiers.types import CodeGold

OWNERS = (
    "fcntl.fcntl(r, fcntl.F_SETOWN, {pid})",
    "fcntl.fcntl(r, 15, struct.pack('ii', 1, {pid}))",
    "fcntl.ioctl(3, 0x8901, struct.pack('i', {pid}))",
)
ATTACK = """
import fcntl, os, struct
def f(x):
    r, w = os.pipe()
    {owner}
    fcntl.fcntl(r, 10, 9)
    fcntl.fcntl(r, fcntl.F_SETFL, fcntl.fcntl(r, fcntl.F_GETFL) | 0x2000)
    os.write(w, b'x')
    return x + 1
"""
RIGHT = "def f(x): return x + 1"
WAIT_S = 60


def main() -> None:
    try:
        verifier = code_judge(1, 10.0, 1024, sys.argv[1])  # type: ignore[arg-type]
    except RuntimeError as error:
        print(json.dumps({"skipped": str(error)}))
        return
    victim = subprocess.Popen(["sleep", "100"])
    gold = CodeGold("assert f(1) == 2", "f").to_text()
    targets = [str(victim.pid), "os.getppid()"]
    programs = [ATTACK.format(owner=owner.format(pid=pid)) for owner in OWNERS for pid in targets]
    attacks = [asdict(verifier.submit(program, gold).result(WAIT_S)) for program in programs]
    right = verifier.submit(RIGHT, gold).result(WAIT_S).outcome
    time.sleep(0.2)
    print(
        json.dumps({"user": os.getuid(), "attacks": attacks, "right": right, "victim": victim.poll()}),
        flush=True,
    )
    victim.kill()
    verifier.close()


if __name__ == "__main__":
    main()
