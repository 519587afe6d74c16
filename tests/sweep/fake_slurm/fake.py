"""A pretended SLURM: its commands keep their jobs in the folder $FAKE_SLURM and never start any.

settings.json   what the cluster is like, and which commands give no answer
jobs.json       id -> state, reason, nodes, script, exit code, restarts, accounted
calls.txt       every command line
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import sys
from pathlib import Path

HOME = Path(os.environ["FAKE_SLURM"])
Jobs = dict[str, dict[str, object]]


def option(arguments: list[str], name: str) -> str:
    return next((a.partition("=")[2] for a in arguments if a.startswith(f"--{name}=")), "")


def of_these(jobs: Jobs, ids: str) -> Jobs:
    wanted = set(ids.split(","))
    return {k: job for k, job in jobs.items() if k in wanted or k.partition("_")[0] in wanted}


def sbatch(jobs: Jobs, settings: dict[str, object], arguments: list[str]) -> str:
    text = Path(arguments[0]).read_text(encoding="utf-8")
    if len(of_parents(jobs)) >= int(str(settings.get("most_submissions", 10**6))):
        sys.exit("sbatch: error: QOSMaxSubmitJobPerUserLimit")
    parent = str(1 + max([100, *(int(k.partition("_")[0]) for k in jobs)]))
    array = re.search(r"^#SBATCH --array=0-(\d+)", text, re.MULTILINE)
    ids = [f"{parent}_{i}" for i in range(int(array[1]) + 1)] if array else [parent]
    for one in ids:
        jobs[one] = {"state": "PENDING", "reason": "Priority", "nodes": "", "script": text, "restarts": 0}
    return f"Submitted batch job {parent}"


def of_parents(jobs: Jobs) -> set[str]:
    return {k.partition("_")[0] for k in jobs}


def squeue(jobs: Jobs, settings: dict[str, object], arguments: list[str]) -> str:
    shown = {k: j for k, j in of_these(jobs, option(arguments, "jobs")).items() if not j.get("forgotten")}
    return "\n".join(f"{k}|{j['state']}|{j['reason']}|{j['nodes']}" for k, j in shown.items())


def sacct(jobs: Jobs, settings: dict[str, object], arguments: list[str]) -> str:
    shown = of_these(jobs, option(arguments, "jobs"))
    return "\n".join(
        f"{k}|{j.get('accounted', j['state'])}|{j.get('exit', '0:0')}|{j['nodes']}" for k, j in shown.items()
    )


def scancel(jobs: Jobs, settings: dict[str, object], arguments: list[str]) -> str:
    signal = option(arguments, "signal")
    for job in of_these(jobs, ",".join(a for a in arguments if not a.startswith("-"))).values():
        job.update({"signal": signal} if signal else {"state": "CANCELLED"})
    return ""


def scontrol(jobs: Jobs, settings: dict[str, object], arguments: list[str]) -> str:
    if arguments[:2] == ["show", "config"]:
        config = dict(settings.get("config", {}))  # type: ignore[call-overload]
        return "\n".join(f"{name:<24}= {value}" for name, value in config.items())
    assert arguments[0] == "requeue", arguments
    job = jobs[arguments[1]]
    job["state"], job["restarts"] = "PENDING", int(str(job["restarts"])) + 1
    return ""


def sinfo(jobs: Jobs, settings: dict[str, object], arguments: list[str]) -> str:
    return "\n".join(settings["sinfo"])  # type: ignore[arg-type]


def sacctmgr(jobs: Jobs, settings: dict[str, object], arguments: list[str]) -> str:
    kind = next(a for a in arguments if a in ("account", "qos", "associations"))
    if kind == "associations":
        kind = option([f"--{a}" for a in arguments], "format") + " of mine"
    return "\n".join(settings.get(kind, []))  # type: ignore[arg-type]


def main(command: str, arguments: list[str]) -> None:
    with (HOME / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with (HOME / "calls.txt").open("a") as calls:
            calls.write(f"{command} {' '.join(arguments)}\n")
        settings = json.loads((HOME / "settings.json").read_text())
        if command in settings.get("silent", ()):
            sys.exit(f"{command}: error: Unable to contact slurm controller (connect failure)")
        path = HOME / "jobs.json"
        jobs = json.loads(path.read_text()) if path.exists() else {}
        text = globals()[command](jobs, settings, arguments)
        path.write_text(json.dumps(jobs))
    if text:
        print(text)


if __name__ == "__main__":
    main(Path(sys.argv[0]).name if len(sys.argv) < 2 else sys.argv[1], sys.argv[2:])
