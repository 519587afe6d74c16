"""A sweep on this machine, run by its controller: this process, or a detached one, `python -m
dash_exp.sweep.local <sweep folder>`.

A sweep has one controller at a time, by a lock in its folder; `controller.json` names it. What to run is an
order, `launch.json`. A launch while a controller is at work replaces the order, and that controller runs it
next. A controller may be killed at any moment: its cells go on running, and the next controller waits for
them. It first makes the traces that cells learn from and plans these cells, as a SLURM job does too.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dash_exp.errors import Fault, UserError
from dash_exp.record import manifest as manifests
from dash_exp.record.folder import read_json, write_json
from dash_exp.record.identity import Cell
from dash_exp.record.journal import is_done
from dash_exp.record.locks import HERE, Locks, take_lock
from dash_exp.record.manifest import Entry, Manifest, PlannedCell, Traces, held
from dash_exp.record.reading import read_config
from dash_exp.signals import handling, run_forwarding
from dash_exp.sweep.pool import Log, Relay, Terms, print_log, run_pool
from dash_exp.sweep.resources import cluster_of
from dash_exp.sweep.states import recorded_state
from dash_exp.sweep.status import CONTROLLER
from dash_exp.sweep.worker import Job
from dash_exp.text import format_path, last_lines

ORDER, LOCK, LOG = "launch.json", ".controller", "controller.log"
POLL_S, START_S = 0.3, 60.0
OTHER_CONTROLLER = 4
"""Exit code of a detached controller that found another one at work."""


@dataclass(frozen=True, slots=True)
class Order:
    """What a controller is to run. `cells`: names of folders; None: all of the sweep. `taken`: whether a
    controller has begun to run it."""

    n_jobs: int
    cells: tuple[str, ...] | None = None
    taken: bool = False

    def entries(self, manifest: Manifest) -> list[Entry]:
        return [entry for entry in manifest.entries if self.cells is None or entry.folder in self.cells]


def launch(manifest: Manifest, n_jobs: int, cells: Sequence[str] | None, log: Log, relay: Relay) -> None:
    """Run a sweep in this process, once no other controller of it is at work. `relay.first`: the signal that
    ended it, if one did."""
    folder = manifest.folder
    order = place_order(folder, n_jobs, cells)
    live = n_jobs == 1 and sys.stdout.isatty()
    with handling(relay):
        lock = wait_for_lock(folder, log, relay)
        if lock is None:
            return
        try:
            placed = read_order(folder)
            if placed is None or placed.taken:  # by the other controller, which may have been killed
                run_order(folder, replace(order, cells=unsettled(manifest, order)), log, live, relay)
            run_orders(lock, log, live, relay)
        finally:
            lock.release()


def detach(manifest: Manifest, n_jobs: int, cells: Sequence[str] | None, log: Log) -> None:
    """Run a sweep in a process of its own; returns once that is at work, or once a controller that is at work
    already has the order. Raises UserError if no controller can be started."""
    folder, log_file = manifest.folder, manifest.folder / LOG
    place_order(folder, n_jobs, cells)
    with log_file.open("ab") as output:
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
        time.sleep(POLL_S / 3)
    if process.poll() == OTHER_CONTROLLER:
        pid = read_json(folder / CONTROLLER).get("pid")
        log(f"run by process {pid} already, which runs what is new next")
    elif process.poll():
        reason = " | ".join(last_lines(log_file, 3)) or f"exit code {process.poll()}"
        raise UserError(Fault(str(log_file), f"the sweep's controller could not be started: {reason}"))
    else:
        log(f"run by process {process.pid}, {n_jobs} at once; it needs no terminal")


def place_order(folder: Path, n_jobs: int, cells: Sequence[str] | None) -> Order:
    """Write down what to run, joined with an order that no controller has taken yet."""
    with held(folder):
        before, chosen = read_order(folder), None if cells is None else tuple(cells)
        if before is not None and not before.taken and chosen is not None:
            chosen = None if before.cells is None else tuple(dict.fromkeys((*before.cells, *chosen)))
        order = Order(n_jobs, chosen)
        write_json(folder / ORDER, asdict(order))
    return order


def read_order(folder: Path) -> Order | None:
    value = read_json(folder / ORDER)
    try:
        cells = value["cells"]
        return Order(int(value["n_jobs"]), None if cells is None else tuple(cells), bool(value["taken"]))
    except (KeyError, TypeError, ValueError):
        return None


def run_orders(lock: ControllerLock, log: Log, live: bool, relay: Relay) -> None:
    """Run orders until none is left, then release the lock; or until a signal came."""
    while relay.first is None:
        with held(lock.folder):  # no order is placed between this check and the release
            order = read_order(lock.folder)
            if order is None or order.taken:
                lock.release()
                return
            write_json(lock.folder / ORDER, asdict(replace(order, taken=True)))
        run_order(lock.folder, order, log, live, relay)


def run_order(folder: Path, order: Order, log: Log, live: bool, relay: Relay) -> None:
    """First the traces that cells wait for, then the cells."""
    manifest = manifests.read(folder)
    if manifest.waiting and order.cells is None:
        manifest = make_traces(manifest, log, relay, live)
    cluster = cluster_of(manifest.actions)
    terms = Terms(order.n_jobs, manifest.actions, cluster.retries, cluster.cells_per_gpu, live, manifest.name)
    todo = unfinished(manifest, order.entries(manifest))
    run_pool([Job(manifest.cell(e), e.needs, e.resources.gpus) for e in todo], terms, log, relay)


def unfinished(manifest: Manifest, entries: Sequence[Entry]) -> list[Entry]:
    return [entry for entry in entries if not is_done(manifest.cell(entry))]


def unsettled(manifest: Manifest, order: Order) -> tuple[str, ...]:
    """The cells of an order that are neither finished, failed nor cancelled."""
    folders = [manifest.cell(entry) for entry in order.entries(manifest)]
    settled = ("finished", "failed", "cancelled")
    return tuple(folder.name for folder in folders if recorded_state(folder) not in settled)


class ControllerLock:
    """Makes this process the controller of a sweep, until it is released or the process ends. Raises
    BlockingIOError if another process holds it."""

    def __init__(self, folder: Path):
        self.folder, self._lock = folder, take_lock(folder / LOCK)
        write_json(folder / CONTROLLER, {"pid": os.getpid(), "host": HERE, "started": time.time()})

    def release(self) -> None:
        """May be called twice."""
        if self._lock >= 0:
            with suppress(OSError):
                (self.folder / CONTROLLER).unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = -1


def wait_for_lock(folder: Path, log: Log, relay: Relay) -> ControllerLock | None:
    """Wait until no other controller is at work; None if a signal came meanwhile."""
    logged = False
    while relay.first is None:
        try:
            return ControllerLock(folder)
        except BlockingIOError:
            if not logged:
                pid = Locks.now().holder(folder / LOCK) or read_json(folder / CONTROLLER).get("pid")
                log(f"process {pid} is running this sweep; waiting for it to end")
                logged = True
            time.sleep(POLL_S)
    return None


# Traces that cells learn from, made before these cells have an id ---------------------------------


def make_traces(manifest: Manifest, log: Log, relay: Relay, live: bool) -> Manifest:
    """Sample each teacher that cells wait for, in a process of its own, then plan these cells. Failures are
    logged, and their cells go on waiting. Returns the manifest as it is then."""
    for traces in dict.fromkeys(one.traces for one in manifest.waiting):
        if not traces.path.exists() and relay.first is None:
            _sample(manifest, traces, log, relay, live)
    try:
        return plan_waiting(manifest)
    except UserError as error:
        log(str(error))
        return manifest


def _sample(manifest: Manifest, traces: Traces, log: Log, relay: Relay, live: bool) -> None:
    output = None if live else manifest.folder / f"{traces.path.stem}.txt"
    log(f"making the traces {format_path(traces.path)}" + (f" (see {format_path(output)})" if output else ""))
    progress = [text for text in manifest.actions if text.startswith("run.progress=")]
    command = [sys.executable, "-m", "dash_exp.traces", *traces.arguments, *progress]
    code, signal_number = run_forwarding(command, output)
    if signal_number is not None:
        relay(signal_number, None)
    elif code != 0:
        log(f"the traces {format_path(traces.path)} failed with exit code {code}; their cells go on waiting")


def plan_waiting(manifest: Manifest) -> Manifest:
    """Plan and freeze the cells whose traces exist by now. Raises UserError with all their faults."""
    ready = [one for one in manifest.waiting if one.traces.path.exists()]
    if not ready:
        return manifest
    from dash_exp.sweep.plan import SweepOptions, make_plan  # not needed by a controller without traces

    fresh = make_plan(
        manifest.name,
        [one.overrides for one in ready],
        root=manifest.root,
        actions=manifest.actions,
        options=SweepOptions(times=_are_times(manifest), about=manifest.about),
    )
    known = {entry.id for entry in manifest.entries}
    cells = [*map(planned_cell, manifest.entries), *(cell for cell in fresh.cells if cell.id not in known)]
    still = [one for one in manifest.waiting if one not in ready]
    grown = replace(fresh, cells=tuple(cells), waiting=(*still, *fresh.waiting))
    return manifests.write(grown, manifest.root)


def planned_cell(entry: Entry) -> PlannedCell:
    """A cell of a manifest as one of a plan again; its frozen config is in its folder only."""
    cell = Cell(entry.id, entry.folder.removesuffix(f"-{entry.id}"), {}, "")
    return PlannedCell(cell, entry.overrides, entry.resources, entry.needs)


def _are_times(manifest: Manifest) -> bool:
    """Whether the results of this sweep are times, so that its cells are labelled with a kind of machine."""
    if "times" in manifest.about:
        return bool(manifest.about["times"])
    return any(read_config(manifest.cell(entry)).value.get("hardware") for entry in manifest.entries[:1])


# The detached controller --------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    """The detached controller. Its exit code is about itself, not about the cells."""
    folder, relay = Path(arguments[0]), Relay()
    with handling(relay):
        try:
            lock = ControllerLock(folder)
        except BlockingIOError:
            return OTHER_CONTROLLER
        print_log(f"controller of {folder}")
        try:
            run_orders(lock, print_log, False, relay)
        finally:
            lock.release()
    print_log("done" if relay.first is None else f"ended by {signal.Signals(relay.first).name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
