"""What SLURM reports about jobs and its own settings: squeue first, sacct for jobs that squeue has forgotten.

Nothing here is an error: if a command is missing, accounting is off, or nobody answers in time, less is
known, and `JobState` shows it.
"""

from __future__ import annotations

import math
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

TIMEOUT_S, AGAIN_S, SILENT_S = 8.0, 1.0, 60.0
"""For one command: a busy controller takes seconds. After a command without an answer, the next ones wait for
`AGAIN_S` only, for `SILENT_S`."""
AT_ONCE = 1000
"""Jobs named on one command line, whose length is bounded."""
DEFAULT_ARRAY_SIZE = 1001

JOB_ID = re.compile(r"\d+(_\d+)?")
QUEUED = re.compile("PENDING|CONFIGURING|REQUEUED|REQUEUE_HOLD|REQUEUE_FED|SPECIAL_EXIT|RESV_DEL_HOLD")
RUNNING = re.compile("RUNNING|SUSPENDED|SIGNALING|STAGE_OUT|STOPPED|RESIZING")
SQUEUE = ["squeue", "--noheader", "--array", "--all", "--states=all", "--format=%i|%T|%r|%N"]
SACCT = ["sacct", "--noheader", "--parsable2", "--allocations"]


@dataclass(frozen=True, slots=True)
class JobState:
    """A job as SLURM sees it. `state`: `queued`, `running`, `completing` (its processes are being ended, or
    it is about to be queued again), `ended`, or `unknown` if nobody answered. `word`: SLURM's own
    (`TIMEOUT`), None if the job is only known to be absent. `reason`: why it waits (`Dependency`), or what
    ended it (`TimeLimit`). `exit_code`: 128 + signal, as in a shell."""

    state: str
    word: str | None = None
    reason: str | None = None
    exit_code: int | None = None
    nodes: str | None = None

    @property
    def active(self) -> bool:
        """Whether it runs or will run; False proves nothing if nobody answered."""
        return self.state in ("queued", "running", "completing")


def jobs(ids: Iterable[str]) -> dict[str, JobState]:
    """The state of each job; ids as `12`, or `12_3` for a task of an array."""
    wanted = _valid(ids)
    if not wanted:
        return {}
    listed = _squeue(wanted)
    if listed is None:
        recorded = _sacct(wanted)
        return {one: recorded.get(one, JobState("unknown")) for one in wanted}
    for one in wanted:  # tasks that were cancelled before they ran are listed as their array
        if one not in listed and (parent := listed.get(_parent(one))) and not parent.active:
            listed[one] = parent
    missing = [one for one in wanted if one not in listed]
    recorded = _sacct(missing) if missing else {}
    # accounting lags: a job that the controller has forgotten is over, whatever is recorded
    over = {name: state for name, state in recorded.items() if not state.active}
    return {one: listed.get(one) or over.get(one) or JobState("ended") for one in wanted}


def active(ids: Iterable[str]) -> set[str] | None:
    """Those of the jobs that run or will run; None if SLURM does not answer."""
    wanted = _valid(ids)
    listed = _squeue(wanted or ["1"])
    return None if listed is None else {one for one in wanted if one in listed and listed[one].active}


def cancel(ids: Sequence[str], now: bool = False) -> bool:
    """Take queued jobs back, and send SIGTERM to running ones: their cells end after their step. `now`: let
    SLURM end running jobs, by SIGKILL after its KillWait. Returns whether SLURM answered; jobs that are gone
    are no error.

    Queued jobs are selected here, since `scancel --state=PENDING 12_3` takes back all of array 12.
    """
    wanted = _valid(ids)
    listed = _squeue(wanted or ["1"])
    if listed is None:
        return False
    open_ones = [one for one in wanted if one in listed and listed[one].active]
    queued = [one for one in open_ones if listed[one].state == "queued"]
    answered = [run(["scancel", "--quiet", *piece]) is not None for piece in chunks(queued, AT_ONCE)]
    for piece in chunks([one for one in open_ones if one not in queued], AT_ONCE):
        text = run(["scancel", "--quiet", *([] if now else ["--signal=TERM"]), *piece])
        answered += [text is not None] if now else []  # signalling a job that has ended fails
    return all(answered)


def setting(name: str) -> str:
    """One of SLURM's settings; empty if unknown."""
    text = run(["scontrol", "show", "config"]) or ""
    found = re.search(rf"^{name}\s*=\s*(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def largest_array() -> int:
    """How many tasks one array may have; 1 if arrays are turned off."""
    value = setting("MaxArraySize")
    return max(1, int(value)) if value.isdigit() else DEFAULT_ARRAY_SIZE


def run(command: Sequence[str], timeout_s: float | None = None) -> str | None:
    """A command's standard output; None if it is missing, fails, or takes too long."""
    succeeded, text = call(command, timeout_s)
    return text if succeeded else None


@dataclass(slots=True)
class Silence:
    """When SLURM last did not answer this process."""

    since: float = -math.inf

    def timeout_s(self) -> float:
        return AGAIN_S if time.monotonic() - self.since < SILENT_S else TIMEOUT_S


SILENCE = Silence()


def call(command: Sequence[str], timeout_s: float | None = None) -> tuple[bool, str]:
    """Run a command. Returns whether it succeeded, and its output, else its error in one line."""
    timeout_s = timeout_s or SILENCE.timeout_s()
    try:
        done = subprocess.run(
            list(command),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except subprocess.TimeoutExpired:
        SILENCE.since = time.monotonic()
        return False, f"{command[0]} has not answered within {timeout_s:g} s"
    except OSError as error:
        return False, str(error)
    return (True, done.stdout) if done.returncode == 0 else (False, " ".join(done.stderr.split()))


def _squeue(wanted: Sequence[str]) -> dict[str, JobState] | None:
    """Jobs that the controller remembers; None if it did not answer. Whole arrays are asked for, to keep the
    command line short, and always job 1 too: asked for a single job, squeue fails if it does not know it."""
    found: dict[str, JobState] = {}
    for parents in _parents(wanted):
        text = run([*SQUEUE, f"--jobs=1,{parents}"])
        if text is None:
            return None
        found.update(_read(text, _listed))
    return found


def _listed(fields: Sequence[str]) -> JobState:
    word, reason, nodes = fields[:3]
    return JobState(_state(word), word, _given(reason), None, _given(nodes))


def _sacct(wanted: Sequence[str]) -> dict[str, JobState]:
    """Jobs that accounting knows; none if it is off."""
    found: dict[str, JobState] = {}
    for parents in _parents(wanted):
        text = run([*SACCT, f"--jobs={parents}", "--format=JobID,State,ExitCode,NodeList"])
        found.update(_read(text or "", _accounted))
    return found


def _accounted(fields: Sequence[str]) -> JobState:
    word = fields[0].split(" ")[0]  # `CANCELLED by 1000`
    code, number = (int(part) if part.isdigit() else 0 for part in f"{fields[1]}:".split(":")[:2])
    return JobState(_state(word), word, None, 128 + number if number else code, _given(fields[2]))


def last_run(job: str) -> str | None:
    """The word for how the run of a job before its current one ended, by accounting."""
    text = run([*SACCT, "--duplicates", f"--jobs={job}", "--format=State"]) or ""
    runs = text.split("\n")[:-1]
    return runs[-2].split(" ")[0] if len(runs) > 1 else None


def _read(text: str, reader: Callable[[Sequence[str]], JobState]) -> Iterator[tuple[str, JobState]]:
    """Id and state of each line; tasks that never ran share one."""
    for line in text.splitlines():
        name, *fields = line.strip().split("|")
        if len(fields) >= 3:
            for one in tasks_in(name):
                yield one, reader(fields)


def tasks_in(name: str) -> list[str]:
    """The ids in one line of output: `12_[0,3-5%2]` is 12_0, 12_3, 12_4 and 12_5."""
    ranges = re.fullmatch(r"(\d+)_\[([\d,-]+)(?:%\d+)?\]", name)
    if not ranges:
        return _valid([name])
    ends = [part.split("-") for part in ranges[2].split(",")]
    return [f"{ranges[1]}_{n}" for part in ends for n in range(int(part[0]), int(part[-1]) + 1)]


def _state(word: str) -> str:
    if QUEUED.fullmatch(word):
        return "queued"
    return "running" if RUNNING.fullmatch(word) else "completing" if word == "COMPLETING" else "ended"


def _given(text: str) -> str | None:
    return None if text in ("", "None", "None assigned", "(null)") else text


def _valid(ids: Iterable[str]) -> list[str]:
    return [one for one in dict.fromkeys(ids) if JOB_ID.fullmatch(one)]


def _parent(job: str) -> str:
    return job.partition("_")[0]


def _parents(wanted: Sequence[str]) -> list[str]:
    """The ids of jobs and entire arrays, joined by commas, in pieces for one command line each."""
    return [",".join(piece) for piece in chunks(list(dict.fromkeys(map(_parent, wanted))), AT_ONCE)]


def chunks(items: Sequence[T], size: int) -> list[Sequence[T]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
