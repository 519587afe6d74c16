"""The process inside the sandbox that judges programs, one verdict at a time, in forked processes.

Started by the pool as `python -m dash_exp.verifiers.code.host`, in a sandbox where there is one. It
imports once what programs usually import, and reads neither requests nor verdicts. The examiner, forked from
it, reads requests, runs the tests, and sends the verdict to the pool; the host only learns, over a socket
that those two hold, that there is one. A fresh candidate, forked from the host for each program, runs the
program and answers the examiner's calls, so its memory never held any tests or verdicts. Answers for
reasoning-gym's scorers, some of which evaluate them, are scored in a candidate too. The host watches the time
and kills the candidate (and an examiner that hangs).
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import gc
import json
import os
import random
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from dash_exp.text import printable
from dash_exp.types import Score
from dash_exp.verifiers.code import candidate as candidates
from dash_exp.verifiers.code.candidate import Candidate
from dash_exp.verifiers.code.confine import (
    Limits,
    adopt_orphans,
    can_read_library,
    confine,
    filter_host,
    filter_supported,
    hide,
)
from dash_exp.verifiers.code.examiner import Examiner
from dash_exp.verifiers.code.values import Channel
from dash_exp.verifiers.math.extract import GYM_EXTRACTORS
from dash_exp.verifiers.types import CodeGold, VerifyTask, score, wall_limit
from dash_exp.verifiers.worker import die_with, private_channel, send, silence

_USUAL = """
abc bisect cmath collections copy dataclasses datetime decimal enum fractions functools hashlib heapq
itertools json math operator random re statistics string sys textwrap time typing unicodedata numpy
"""
"""What programs usually import: imported once, before anything is forked."""
_USES = 200
"""Verdicts of one examiner. It can serve many: tests are the dataset's, and receive plain data."""
_EXAMINERS_MEMORY = 2
"""Times a program's: it holds a result, the expected one, and the message between."""
_EXTRA_CPU_S = 3
_CHANNEL = 64
"""The examiner's descriptor for verdicts; its smaller ones are for other things."""
_MAX_DETAIL_CHARS = 320
"""So that the line of a verdict fits what a pipe takes at once: an examiner may be killed while it writes."""
_WAITING = 0.1
"""Share of its limit of processor time below which a program, after that time, waits for something."""
_LOOK_S = 0.02
"""Seconds between two looks at the time that a verdict has taken, at least."""


@dataclass(frozen=True, slots=True)
class Options:
    """The host's command line."""

    judge: str
    limits: Limits
    timeout_s: float


@dataclass(slots=True)
class Child:
    """A forked process, and the end of a socket to it."""

    pid: int
    end: socket.socket
    uses: int = 0


def main(arguments: list[str] | None = None) -> int:
    """Serve requests until stdin ends."""
    parser = argparse.ArgumentParser(description="judge programs sent as JSON lines on stdin")
    parser.add_argument("--judge", choices=("code", "reasoning_gym"), default="code")
    parser.add_argument("--memory-mb", type=int, default=2048, help="limit of a program's address space")
    parser.add_argument("--deadline-s", type=float, default=10.0, help="limit of a verdict")
    parser.add_argument("--uid", type=int, default=0, help="user that programs become")
    parser.add_argument("--parent", type=int, default=0, help="leave when this process is gone")
    parser.add_argument("--readable", help="the only paths that can be read, separated by colons")
    parser.add_argument("--read-only", action="store_true", help="the filter refuses to write files")
    parser.add_argument("--own-namespace", action="store_true", help="all processes in sight are ours")
    options = parser.parse_args(arguments)
    channel = os.fdopen(fcntl.fcntl(private_channel(), fcntl.F_DUPFD_CLOEXEC, _CHANNEL), "wb")
    die_with(options.parent)
    adopt_orphans()
    hide()
    _warm(options.judge)
    limits = Limits(
        memory_mb=options.memory_mb,
        uid=options.uid,
        read_only=options.read_only,
        filtered=filter_supported(),
        threads=64 if options.uid or options.own_namespace else 64 + _tasks_of_user(),
        readable=tuple(options.readable.split(":")) if options.readable else (),
        keep_reading=bool(options.uid) and not can_read_library(options.uid),
    )
    errors = os.fdopen(os.dup(2), "w")
    silence()  # stdin stays, for the examiners
    if limits.filtered:
        filter_host(options.read_only)
    try:
        _try_confinement(limits)
        _serve(channel, Options(options.judge, limits, options.deadline_s))
    except Exception:  # noqa: BLE001 (written where the pool reads it; children do not have this file)
        traceback.print_exc(file=errors)
        return 1
    return 0


def _try_confinement(limits: Limits) -> None:
    """Raises OSError where a process cannot be confined, which would make every program `crashed`."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            confine(limits)
        except OSError as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    _wait(child)
    with os.fdopen(reading) as stream:
        if reason := stream.read():
            raise OSError(f"programs cannot be confined: {reason}")


def _warm(judge: str) -> None:
    for name in _USUAL.split():
        with contextlib.suppress(ImportError):
            __import__(name)
    if judge == "reasoning_gym":
        candidates.prepare_gym()
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page it looks at


def _tasks_of_user() -> int:
    """Threads of this process's user: the limit of tasks counts them all."""
    count = 0
    for status in Path("/proc").glob("[0-9]*/task"):
        with contextlib.suppress(OSError):
            if status.stat().st_uid == os.getuid():
                count += len(os.listdir(status))
    return count


def _serve(channel: IO[bytes], options: Options) -> None:
    examiner = _start_examiner(channel, options)
    candidate = _start_candidate(options)
    _introduce(candidate, examiner)
    send(channel, {"ready": True})
    while True:
        began = _line_of(examiner.end)
        if began is None:
            return
        limit = max(options.timeout_s, float(began.get("timeout_s") or 0.0))
        failure = _watch(examiner, candidate, limit)
        _kill(candidate.pid)
        examiner.uses += 1
        spent = failure is not None or examiner.uses >= _USES
        if spent:
            _kill(examiner.pid)
        if not options.limits.filtered:
            _kill_others(() if spent else (examiner.pid,))
        if spent:  # before the next request can come: one that is dying could still read it
            _wait(examiner.pid)
            examiner.end.close()
            examiner = _start_examiner(channel, options)
        instead = {"score": asdict(failure)} if failure else {}
        send(channel, {"serial": began["serial"], **instead, "retire": False})
        candidate, gone = _start_candidate(options), candidate.pid  # now: during the tests it slows them
        _introduce(candidate, examiner)
        _wait(gone)


def _watch(examiner: Child, candidate: Child, limit_s: float) -> Score | None:
    """None once the examiner has reached a verdict, else what stands in its place."""
    start, wall = time.monotonic(), wall_limit(limit_s)
    before = _cpu_seconds(examiner.pid) + _cpu_seconds(candidate.pid)
    poller = select.poll()
    poller.register(examiner.end, select.POLLIN)
    ends: list[Any] = []
    while not ends:
        passed = time.monotonic() - start
        used = _cpu_seconds(examiner.pid) + _cpu_seconds(candidate.pid) - before
        if used >= limit_s:
            return score("timeout", f"no verdict within {limit_s:g} s of processor time")
        if passed >= (limit := limit_s if used < limit_s * _WAITING else wall):
            return score("timeout", f"no verdict within {limit:g} s")
        ends = poller.poll(1000 * min(60.0, max(_LOOK_S, min(limit_s - used, limit - passed))))
    if _line_of(examiner.end) is None:
        return score("crashed", "the tests' process ended: out of memory?")
    return None


def _cpu_seconds(pid: int) -> float:
    """Processor time of all threads of a process; of one that has ended, what it used."""
    return time.clock_gettime((~pid << 3) | 2)  # see clock_getcpuclockid(3)


def _line_of(end: socket.socket) -> dict[str, Any] | None:
    """One line from an examiner; None when it has ended."""
    line = bytearray()
    while not line.endswith(b"\n"):
        piece = end.recv(1)  # the next line may be there already
        if not piece:
            return None
        line += piece
    message = json.loads(line)
    return message if isinstance(message, dict) else None


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _wait(pid: int) -> None:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)


def _kill_others(kept: tuple[int, ...]) -> None:
    """Without a filter of system calls a program can leave processes behind: orphans become children of
    this process, and are killed until there are none."""
    while others := [pid for pid in _children() if pid not in kept]:
        for pid in others:
            _kill(pid)
            _wait(pid)


def _children() -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            if int(path.read_text().rsplit(")", 1)[1].split()[1]) == os.getpid():
                found.append(int(path.parent.name))
    return found


def _start_examiner(channel: IO[bytes], options: Options) -> Child:
    return _fork((1, 2), lambda end: _examine(end, channel, options), channel.fileno())


def _start_candidate(options: Options) -> Child:
    """A process for one program, and the end of its socket, which an examiner will get."""
    return _fork((0, 1, 2), lambda end: _be_candidate(end, options.limits))


def _fork(silent: tuple[int, ...], run: Callable[[socket.socket], None], kept: int = 3) -> Child:
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        _run_child(theirs, silent, run, kept)
    theirs.close()
    return Child(pid, ours)


def _introduce(candidate: Child, examiner: Child) -> None:
    """Give the examiner its line to the next candidate."""
    socket.send_fds(examiner.end, [b"c"], [candidate.end.fileno()])
    candidate.end.close()


def _run_child(
    end: socket.socket, silent: tuple[int, ...], run: Callable[[socket.socket], None], kept: int
) -> None:
    """In a forked child: keep one socket and the file `kept`, close everything else, run, and never
    return."""
    try:
        for standard in silent:
            os.dup2(1, standard)  # the host's own goes nowhere
        os.dup2(end.fileno(), 3)
        os.closerange(4, max(4, kept))
        os.closerange(max(4, kept + 1), os.sysconf("SC_OPEN_MAX"))
        run(socket.socket(fileno=3))
    finally:
        os._exit(1)


def _be_candidate(end: socket.socket, limits: Limits) -> None:
    confine(limits)
    candidate = Candidate()
    channel = Channel(end, candidate.to_handle, candidate.from_handle, trusting=True)
    candidates.serve(channel, candidate)


# What follows runs in the examiner.


def _examine(host: socket.socket, channel: IO[bytes], options: Options) -> None:
    """Serve requests from stdin until it ends: two lines to the host for each, and the verdict to the
    pool."""
    limits = options.limits
    uid, memory_mb = limits.uid + 1 if limits.uid else 0, limits.memory_mb * _EXAMINERS_MEMORY
    confine(replace(limits, uid=uid, memory_mb=memory_mb))
    while line := sys.stdin.buffer.readline():
        request = json.loads(line)
        task = VerifyTask(**request["task"])
        serial = {"serial": request["serial"]}
        _report(host, {**serial, "timeout_s": task.timeout_s})
        limit = max(options.timeout_s, task.timeout_s or 0.0)
        try:
            verdict = _judge(task, host, int(limit) + _EXTRA_CPU_S, options)
        except BaseException as error:  # noqa: BLE001 (a fault of ours is reported, never a silent 0)
            verdict = score("verifier_error", f"{type(error).__name__}: {error}"[:300])
        verdict = replace(verdict, detail=printable(verdict.detail)[:_MAX_DETAIL_CHARS])
        send(channel, {**serial, "score": asdict(verdict)})
        _report(host, serial)


def _report(host: socket.socket, message: dict[str, Any]) -> None:
    host.sendall(json.dumps(message).encode() + b"\n")


def _judge(task: VerifyTask, host: socket.socket, cpu_s: int, options: Options) -> Score:
    _, descriptors, _, _ = socket.recv_fds(host, 1, 1)
    with socket.socket(fileno=descriptors[0]) as end:
        examiner = Examiner()
        examiner.connect(Channel(end, examiner.to_handle, examiner.from_handle))
        if options.judge == "reasoning_gym":
            found = GYM_EXTRACTORS[task.how](task.text)
            if found is None:
                return score("no_answer", f"nothing found by {task.how}")
            return examiner.score_answer(found, task.answer, cpu_s)
        try:
            gold = CodeGold.from_text(task.answer)
        except (ValueError, TypeError) as error:
            return score("verifier_error", f"the gold is broken: {error}")
        random.seed(0)
        return examiner.examine(task.text, gold, cpu_s)


if __name__ == "__main__":
    sys.exit(main())
