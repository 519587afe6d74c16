"""Run one cell, whatever its end: `python -m dash_exp.cell <folder> [run.progress=... cluster.threads=...]`.

Freezes a composed config, takes the folder's lock, makes an attempt (train/attempt.py), and leaves a status
that tells the truth however it ends. Imports no torch until there is something to run.

Exit codes: 0 finished, 1 failed, 2 the user can mend it, 3 blocked by its partner, 4 another process is
running it (nothing was done), 128 + n ended by signal n.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from omegaconf.errors import OmegaConfBaseException

from dash_exp.config.checks import check
from dash_exp.config.schema import Config
from dash_exp.errors import (
    DISK_ERRORS,
    ExitCode,
    Fault,
    UserError,
    disk_errors_below,
    disk_fault,
    print_error,
    run_command,
)
from dash_exp.learning.settings import launched_place
from dash_exp.mirror.follow import Follower
from dash_exp.record import provenance
from dash_exp.record.folder import (
    CellBusy,
    Recorder,
    archive,
    read_final,
    read_json,
)
from dash_exp.record.identity import freeze, make_cell, read_frozen, resolve_paths
from dash_exp.signals import Interrupted, Stop, handling, run_forwarding, share_cores
from dash_exp.text import format_path
from dash_exp.train.budget import Blocked, find_partner
from dash_exp.train.display import Display

if TYPE_CHECKING:
    from dash_exp.learning.distributed.communicator import Coordinator


def run_config(config: Config, apart: bool = False) -> int:
    """Freeze the cell of this config and run it, here or, `apart`, in a fresh process (so that the
    cells of a sweep share nothing). Returns an exit code; UserError is the caller's."""
    if apart and launched_place(os.environ) is not None:
        raise UserError(
            Fault(
                "-m",
                "torchrun and srun start the ranks of one cell, not a sweep",
                "leave them out: a sweep starts the ranks of each cell itself",
            )
        )
    return together(config, lambda links: freeze_and_run(config, apart, links))


def freeze_and_run(config: Config, apart: bool, links: Coordinator | None) -> int:
    root = Path(config.run.dir)
    cache = root / "cache"
    with disk_errors_below(root):
        cache.mkdir(parents=True, exist_ok=True)
        config = resolve_paths(config)
        cell = make_cell(config, cache)
        folder = cell.folder(root)
        try:
            if config.run.force:
                archive(folder)
        except CellBusy as error:
            raise UserError(Fault("run.force", str(error), "wait for it, or stop it first")) from error
        freeze(cell.frozen, folder)
    if not apart:
        return run(folder, config, links)
    actions = [f"run.progress={config.run.progress}", f"cluster.threads={config.cluster.threads or 'null'}"]
    actions += [f"run.partner={config.run.partner}"] if config.run.partner else []
    command = [sys.executable, "-m", "dash_exp.cell", str(folder.resolve()), *actions]
    code, handed = run_forwarding(command)
    return ExitCode.SIGNALLED + (handed or -code) if handed or code < 0 else code


def together(config: Config, cell: Callable[[Coordinator | None], int]) -> int:
    """Run a cell, on rank 0 only where torchrun or srun started the ranks of its learner: the others do
    what rank 0 says. They touch neither the cell's lock nor its record."""
    place = launched_place(os.environ)
    if place is None:
        return cell(None)
    if place.size != config.learner.ranks:
        raise UserError(
            Fault(
                "learner.ranks",
                f"got {config.learner.ranks}, but {place.size} processes were started together",
                f"set learner.ranks={place.size}, or start {config.learner.ranks}",
            )
        )
    share_cores()
    from dash_exp.learning.distributed.launch import connect_rank_0, run_worker

    if place.rank > 0:
        return run_worker(place, config.learner.timeout_s)
    links = connect_rank_0(place, config.learner.timeout_s)
    try:
        return cell(links)
    finally:
        links.close()


def run(folder: Path, config: Config, links: Coordinator | None = None) -> int:
    """Run the cell in `folder` (frozen already). `config` supplies the actions (run, cluster, ...)."""
    display = Display(config.algorithm.steps or 0, config.run.progress)
    stop = Stop()
    try:
        mirror = Follower(folder, config, display.note)  # ends last, when the cell's lock is free again
        with handling(stop), mirror, Recorder(folder) as recorder:
            if read_json(folder / "status.json").get("state") == "finished":
                return tell_finished(folder, display)
            mirror.start(recorder.attempt)
            return run_locked(folder, config, recorder, display, stop, links)
    except CellBusy as error:
        raise UserError(
            Fault(format_path(folder), "is being run by another process", "see its log.txt")
        ) from error
    except Interrupted as error:  # before or after the record could say so
        return ExitCode.SIGNALLED + error.number
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise UserError(disk_fault(error, folder), "what was recorded is kept") from error
    finally:
        display.stop()


def tell_finished(folder: Path, display: Display) -> int:
    if any(folder.glob("checkpoints/*/resume")):  # a kill came between the end and the tidying
        from dash_exp.record.checkpoint import finalise

        finalise(folder)
    display.note(f"{format_path(folder)} is finished; run.force=true archives it and starts anew.")
    if read_json(folder / "provenance.json").get("code_hash") != provenance.code_hash():
        display.note("It is stale: it was recorded by other code than this.")
    reason = str(read_json(folder / "status.json").get("reason"))
    display.summary(folder, read_final(folder, "steps"), read_final(folder, "evals"), reason)
    return ExitCode.OK


def run_locked(
    folder: Path, config: Config, recorder: Recorder, display: Display, stop: Stop, links: Coordinator | None
) -> int:
    """One attempt at a cell, with every way it can end turned into a status and an exit code."""
    step = int(read_json(folder / "status.json").get("step", 0))
    recorder.status("running", step)
    share_cores()
    try:
        known = "budget" in read_json(folder / "provenance.json")  # read by an earlier attempt
        partner = find_partner(config, folder.parent) if config.budget.match and not known else None
        from dash_exp.train.attempt import Attempt  # heavy imports only once there is something to run

        Attempt(folder, config, recorder, display, stop, partner, links).run()
    except Blocked as reason:
        recorder.status("blocked", step, reason=str(reason))
        recorder.log(f"blocked: {reason}")
        display.note(f"Blocked: {format_path(folder)} {reason}. Run the partner, then this command again:")
        display.note(f"    {config.run.partner or f'the cell with the id {config.budget.match}'}")
        return ExitCode.BLOCKED
    except (Interrupted, KeyboardInterrupt) as error:
        number = error.number if isinstance(error, Interrupted) else int(signal.SIGINT)
        return tell_interrupted(recorder, display, number)
    except Exception as error:
        failure, trace = str(error), ""
        if not isinstance(error, UserError):
            failure, trace = f"{type(error).__name__}: {error}", traceback.format_exc()
        if stop.asked is not None:  # the same signal has ended a helper that the step still needed
            return tell_interrupted(recorder, display, stop.asked, f"{failure}\n{trace}")
        say_last(recorder, "failed", failure, trace)
        raise
    return ExitCode.OK


def tell_interrupted(recorder: Recorder, display: Display, number: int, trace: str = "") -> int:
    name = signal.Signals(number).name
    say_last(recorder, "interrupted", name, trace)
    display.stop()
    display.note(f"Interrupted by {name}; the same command goes on from the last checkpoint.")
    return ExitCode.SIGNALLED + number


def say_last(recorder: Recorder, state: str, failure: str, trace: str = "") -> None:
    """Record how it ended, if the disk lets us."""
    step = int(read_json(recorder.folder / "status.json").get("step", 0))
    try:
        recorder.status(state, step, failure=failure)
        recorder.log(f"{state}: {failure}\n{trace}".rstrip())
    except OSError as error:
        print_error(f"dash_exp: the status could not be written: {error}")


def main(arguments: Sequence[str]) -> int:
    return run_command(run_unless_busy, arguments, usage=str(__doc__))


def run_unless_busy(arguments: Sequence[str]) -> int:
    try:
        return run_folder(arguments)
    except UserError as error:
        if not isinstance(error.__cause__, CellBusy):
            raise
        print_error(str(error))
        return ExitCode.BUSY


def run_folder(arguments: Sequence[str]) -> int:
    """Run a frozen cell: a folder, then actions as key=value."""
    if not arguments or any("=" not in text for text in arguments[1:]):
        raise UserError(Fault("usage", "python -m dash_exp.cell <folder of a frozen cell> [key=value ...]"))
    folder = Path(arguments[0]).resolve()
    path = folder / "config.yaml"
    try:
        config = read_frozen(folder, list(arguments[1:]))
    except FileNotFoundError as error:
        raise UserError(Fault(str(folder), "holds no config.yaml, so it is not a cell")) from error
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(Fault(str(path), f"is damaged: {reason}")) from error
    if faults := check(config):
        raise UserError(faults)
    cell = make_cell(config, folder.parent.parent / "cache")
    if cell.id != folder.name.rpartition("-")[2]:
        raise UserError(
            Fault(
                str(folder),
                "was frozen with other data, model or settings than are there now",
                "run the experiment again: it becomes a cell of its own",
            )
        )
    return together(config, lambda links: run(folder, config, links))
