"""A sweep on this machine, run by its controller: this process, or a detached one,
`python -m dash_exp.sweep.local <sweep folder>`. Torch-free.

A sweep has one controller at a time, by a lock in its folder; `controller.json` names it. What is to be run
is an order, `launch.json`. Whoever comes while a controller is at work leaves an order, which is taken up
when the present one is done. A controller may be killed at any moment: its cells go on, and the next one
waits for them.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from dash_exp.errors import Fault, UserError
from dash_exp.record import manifest as manifests
from dash_exp.record.endings import is_done
from dash_exp.record.folder import read_json, write_json
from dash_exp.record.locks import HERE, Locks
from dash_exp.record.manifest import Entry, Manifest, held
from dash_exp.signals import handling
from dash_exp.sweep.actions import cluster_of
from dash_exp.sweep.pool import Relay, Say, Terms, run_pool
from dash_exp.sweep.tails import last_lines
from dash_exp.sweep.teachers import make_traces
from dash_exp.sweep.worker import Job

CONTROLLER, ORDER, LOCK, LOG = "controller.json", "launch.json", ".controller", "controller.log"
LOOK_S, START_S = 0.3, 60.0
LEFT_TO_ANOTHER = 4
"""Exit code of a detached controller that found another one at work."""


@dataclass(frozen=True, slots=True)
class Order:
    """What a controller is asked to run. `cells`: names of folders; None: all of the sweep. `taken`: by a
    controller, so that what comes later is another order."""

    n_jobs: int
    cells: tuple[str, ...] | None = None
    taken: bool = False


def launch(manifest: Manifest, n_jobs: int, cells: Sequence[str] | None, say: Say, relay: Relay) -> None:
    """Run a sweep here and now, once no other controller of it is at work. `relay.first`: the signal that
    ended it, if one did."""
    folder = manifest.folder
    order = put(folder, n_jobs, cells)
    live = n_jobs == 1 and sys.stdout.isatty()
    with handling(relay):
        turn = wait_for_turn(folder, say, relay)
        if turn is None:
            return
        try:
            if _is_taken(read_order(folder)):  # by the other one, which may have been killed
                conduct(folder, replace(order, cells=undecided(manifest, order)), say, live, relay)
            control(turn, say, live, relay)
        finally:
            turn.leave()


def detach(manifest: Manifest, n_jobs: int, cells: Sequence[str] | None, say: Say) -> None:
    """Let a process of its own run a sweep; returns once that is at work. Where one is already, it is left
    this order. Raises UserError where none can be started."""
    folder, log = manifest.folder, manifest.folder / LOG
    put(folder, n_jobs, cells)
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "dash_exp.sweep.local", str(folder.resolve())],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    deadline = time.monotonic() + START_S
    while process.poll() is None and read_json(folder / CONTROLLER).get("pid") != process.pid:
        if time.monotonic() > deadline:
            break
        time.sleep(LOOK_S / 3)
    if process.poll() == LEFT_TO_ANOTHER:
        pid = read_json(folder / CONTROLLER).get("pid")
        say(f"run by process {pid} already, which goes on with what is new")
    elif process.poll():
        said = " | ".join(last_lines(log, 3)) or f"exit code {process.poll()}"
        raise UserError(Fault(str(log), f"the sweep's controller could not be started: {said}"))
    else:
        say(f"run by process {process.pid}, {n_jobs} at once; it needs no terminal")


def put(folder: Path, n_jobs: int, cells: Sequence[str] | None) -> Order:
    """Write down what is to be run; an order that nobody has taken yet is joined to it."""
    with held(folder):
        before, chosen = read_order(folder), None if cells is None else tuple(cells)
        if before is not None and not before.taken and chosen is not None:
            chosen = None if before.cells is None else tuple(dict.fromkeys((*before.cells, *chosen)))
        order = Order(n_jobs, chosen)
        _write_order(folder, order)
    return order


def _is_taken(order: Order | None) -> bool:
    return order is None or order.taken


def read_order(folder: Path) -> Order | None:
    value = read_json(folder / ORDER)
    try:
        cells = value["cells"]
        return Order(int(value["n_jobs"]), None if cells is None else tuple(cells), bool(value["taken"]))
    except (KeyError, TypeError, ValueError):
        return None


def _write_order(folder: Path, order: Order) -> None:
    cells = None if order.cells is None else list(order.cells)
    write_json(folder / ORDER, {"n_jobs": order.n_jobs, "cells": cells, "taken": order.taken})


class Turn:
    """The place of a sweep's controller: this process's until it leaves, or ends."""

    def __init__(self, folder: Path, descriptor: int):
        self.folder, self._descriptor = folder, descriptor
        write_json(folder / CONTROLLER, {"pid": os.getpid(), "host": HERE, "started": time.time()})

    @classmethod
    def take(cls, folder: Path) -> Turn | None:
        """None while another process has it."""
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return cls(folder, descriptor)

    def leave(self) -> None:
        """Harmless when done before."""
        if self._descriptor < 0:
            return
        with suppress(OSError):
            (self.folder / CONTROLLER).unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = -1


def wait_for_turn(folder: Path, say: Say, relay: Relay) -> Turn | None:
    """Wait for another controller to end; None where a signal came meanwhile."""
    turn = Turn.take(folder)
    if turn is None:
        pid = Locks.now().holder(folder / LOCK) or read_json(folder / CONTROLLER).get("pid")
        say(f"process {pid} is running this sweep; waiting for it to end")
    while turn is None and relay.first is None:
        time.sleep(LOOK_S)
        turn = Turn.take(folder)
    return turn


def control(turn: Turn, say: Say, live: bool, relay: Relay) -> None:
    """Run orders until there is none left, then leave; or until a signal has come."""
    while relay.first is None:
        with held(turn.folder):  # nobody leaves an order between this look and the turn's end
            order = read_order(turn.folder)
            if order is None or _is_taken(order):
                turn.leave()
                return
            _write_order(turn.folder, replace(order, taken=True))
        conduct(turn.folder, order, say, live, relay)


def undecided(manifest: Manifest, order: Order) -> tuple[str, ...]:
    """Of the cells of an order those that are neither finished nor ended for good."""
    chosen = [e for e in manifest.entries if order.cells is None or e.folder in order.cells]
    states = {e.folder: read_json(manifest.cell(e) / "status.json").get("state") for e in chosen}
    return tuple(name for name, state in states.items() if state not in ("finished", "failed", "cancelled"))


def conduct(folder: Path, order: Order, say: Say, live: bool, relay: Relay) -> None:
    """One order: first the traces that cells wait for, then the cells."""
    manifest = manifests.read(folder)
    if manifest.waiting and order.cells is None:
        manifest = make_traces(manifest, say, relay, live)
    entries = [e for e in manifest.entries if order.cells is None or e.folder in order.cells]
    cluster = cluster_of(manifest.actions)
    terms = Terms(order.n_jobs, manifest.actions, cluster.retries, cluster.cells_per_gpu, live, manifest.name)
    run_pool([job_of(manifest, entry) for entry in unfinished(manifest, entries)], terms, say, relay)


def unfinished(manifest: Manifest, entries: Sequence[Entry]) -> list[Entry]:
    return [entry for entry in entries if not is_done(manifest.cell(entry))]


def job_of(manifest: Manifest, entry: Entry) -> Job:
    return Job(manifest.cell(entry), entry.needs, entry.resources.gpus)


def main(arguments: Sequence[str]) -> int:
    """The detached controller. Its exit code says whether it ran, not how the cells did."""
    folder, relay = Path(arguments[0]), Relay()

    def say(text: str) -> None:
        with suppress(OSError):
            print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} [{os.getpid()}] {text}", flush=True)

    with handling(relay):
        turn = Turn.take(folder)
        if turn is None:
            return LEFT_TO_ANOTHER
        say(f"controller of {folder}")
        try:
            control(turn, say, False, relay)
        finally:
            turn.leave()
    say("done" if relay.first is None else f"ended by {signal.Signals(relay.first).name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
