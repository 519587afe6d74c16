"""What SLURM says of jobs: one squeue for all of them, sacct for those it has forgotten. Torch-free.

Nothing here is an error: where a command is missing, accounting is off, or nobody answers in time, less is
known, and `JobState` says so.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

TIMEOUT_S = 20.0
"""For one command; a busy controller takes seconds."""

AT_ONCE = 1000
"""Jobs named on one command line, whose length is bounded."""

JOB_ID = re.compile(r"\d+(_\d+)?")
QUEUED = (
    "PENDING",
    "CONFIGURING",
    "REQUEUED",
    "REQUEUE_HOLD",
    "REQUEUE_FED",
    "SPECIAL_EXIT",
    "RESV_DEL_HOLD",
)
RUNNING = ("RUNNING", "SUSPENDED", "SIGNALING", "STAGE_OUT", "STOPPED", "RESIZING")
ACTIVE = ("queued", "running", "completing")


@dataclass(frozen=True, slots=True)
class JobState:
    """A job as SLURM sees it. `state`: `queued`, `running`, `completing` (its processes are being ended, or
    it is about to be queued anew), `ended`, or `unknown` where nobody answered. `word`: SLURM's own
    (`TIMEOUT`), None where only its absence is known; `exit_code` as a shell has it (128 + signal)."""

    state: str
    word: str | None = None
    reason: str | None = None
    """Why it waits (`Dependency`), or what ended it (`TimeLimit`)."""
    exit_code: int | None = None
    nodes: str | None = None

    @property
    def active(self) -> bool:
        """Whether it runs or will run; False is no proof where nobody answered."""
        return self.state in ACTIVE


def jobs(ids: Iterable[str]) -> dict[str, JobState]:
    """The state of each job; ids as `12`, or `12_3` for a task of an array."""
    wanted = [one for one in dict.fromkeys(ids) if JOB_ID.fullmatch(one)]
    if not wanted:
        return {}
    listed = _squeue(wanted)
    if listed is None:
        recorded = _sacct(wanted)
        return {one: recorded.get(one, JobState("unknown")) for one in wanted}
    for one in wanted:  # tasks that were taken back before they ran are told as their array
        if one not in listed and (parent := listed.get(one.partition("_")[0])) and not parent.active:
            listed[one] = parent
    missing = [one for one in wanted if one not in listed]
    recorded = _sacct(missing) if missing else {}
    # accounting lags: what the controller has forgotten is over, whatever is recorded of it
    over = {name: state for name, state in recorded.items() if not state.active}
    return {one: listed.get(one) or over.get(one) or JobState("ended") for one in wanted}


def active(ids: Iterable[str]) -> set[str] | None:
    """Those of the jobs that run or will run; None where SLURM does not answer: then nothing is known."""
    wanted = [one for one in dict.fromkeys(ids) if JOB_ID.fullmatch(one)]
    listed = _squeue(wanted or ["1"])
    return None if listed is None else {one for one in wanted if one in listed and listed[one].active}


def cancel(ids: Sequence[str], now: bool = False) -> bool:
    """Take queued jobs back, and ask running ones to end: their cells do, after their step. `now`: have
    these killed too, after SLURM's KillWait. Whether SLURM was reached; jobs that are gone are no error.

    Which ones are queued is asked first: `scancel --state=PENDING 12_3` takes back all of array 12.
    """
    wanted = [one for one in dict.fromkeys(ids) if JOB_ID.fullmatch(one)]
    listed = _squeue(wanted or ["1"])
    if listed is None:
        return False
    queued = [one for one in wanted if one in listed and listed[one].state == "queued"]
    begun = [one for one in wanted if one in listed and listed[one].active and one not in queued]
    reached = [run(["scancel", "--quiet", *piece]) is not None for piece in _pieces(queued)]
    for piece in _pieces(begun):
        done = run(["scancel", "--quiet", *([] if now else ["--signal=TERM"]), *piece])
        reached += [done is not None] if now else []  # a signal for one that has ended fails
    return all(reached)


def _pieces(ids: Sequence[str]) -> list[Sequence[str]]:
    return [ids[i : i + AT_ONCE] for i in range(0, len(ids), AT_ONCE)]


def run(command: Sequence[str], timeout_s: float = TIMEOUT_S) -> str | None:
    """A command's standard output; None where it is missing, fails, or is not done in time."""
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
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _squeue(wanted: Sequence[str]) -> dict[str, JobState] | None:
    """Jobs that the controller remembers; None where it did not answer. It is asked for whole arrays, which
    keeps the command line short, and about job 1 too: asked for a single job, it takes an unknown one for
    an error, asked for several, it leaves that out."""
    found: dict[str, JobState] = {}
    for parents in _parents(wanted):
        text = run(
            [
                "squeue",
                "--noheader",
                "--array",
                "--all",
                "--states=all",
                f"--jobs=1,{parents}",
                "--format=%i|%T|%r|%N",
            ]
        )
        if text is None:
            return None
        found.update(_read(text, _listed))
    return found


def _listed(fields: Sequence[str]) -> JobState:
    word, reason, nodes = fields[:3]
    return JobState(_state(word), word, _given(reason), None, _given(nodes))


def _sacct(wanted: Sequence[str]) -> dict[str, JobState]:
    """Jobs that accounting knows; none where it is off."""
    found: dict[str, JobState] = {}
    for parents in _parents(wanted):
        text = run(
            [
                "sacct",
                "--noheader",
                "--parsable2",
                "--allocations",
                f"--jobs={parents}",
                "--format=JobID,State,ExitCode,NodeList",
            ]
        )
        found.update(_read(text or "", _accounted))
    return found


def _accounted(fields: Sequence[str]) -> JobState:
    word = fields[0].split(" ")[0]  # `CANCELLED by 1000`
    code, number = (int(part) if part.isdigit() else 0 for part in f"{fields[1]}:".split(":")[:2])
    return JobState(_state(word), word, None, 128 + number if number else code, _given(fields[2]))


def _read(text: str, reader: Callable[[Sequence[str]], JobState]) -> Iterator[tuple[str, JobState]]:
    """Id and state of each line; tasks that never ran share one."""
    for line in text.splitlines():
        name, *fields = line.strip().split("|")
        if len(fields) >= 3:
            for one in tasks_in(name):
                yield one, reader(fields)


def tasks_in(name: str) -> list[str]:
    """The ids that a line is about: `12_[0,3-5%2]` is 12_0, 12_3, 12_4 and 12_5."""
    ranges = re.fullmatch(r"(\d+)_\[([\d,-]+)(?:%\d+)?\]", name)
    if not ranges:
        return [name] if JOB_ID.fullmatch(name) else []
    ends = [part.split("-") for part in ranges[2].split(",")]
    return [f"{ranges[1]}_{n}" for part in ends for n in range(int(part[0]), int(part[-1]) + 1)]


def _state(word: str) -> str:
    if word in QUEUED:
        return "queued"
    if word in RUNNING:
        return "running"
    return "completing" if word == "COMPLETING" else "ended"


def _given(text: str) -> str | None:
    return None if text in ("", "None", "None assigned", "(null)") else text


def _parents(wanted: Sequence[str]) -> list[str]:
    """The ids of whole jobs and arrays, joined by commas, in pieces for one command line each."""
    return [
        ",".join(piece) for piece in _pieces(list(dict.fromkeys(one.partition("_")[0] for one in wanted)))
    ]
