"""Run one cell: `python -m dash_exp.cell <folder> [run.progress=... cluster.threads=...]`.

Freezes a composed config, takes the folder's lock, makes an attempt (train/attempt.py), and records the state
in which the attempt ended. Torch is imported only if there is something to run.

Exit codes: 0 finished, 1 failed, 2 the user can fix it, 3 blocked by its partner, 4 another process is
running it (nothing was done), 128 + n ended by signal n.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from dash_exp.config.checks import check
from dash_exp.config.schema import Config, changed, dataset_places
from dash_exp.config.tracking import trackers_of
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
from dash_exp.learning.settings import rank_from_environment
from dash_exp.modeling.hub import refuse_unreachable
from dash_exp.record.folder import CellBusy, Recorder, archive, read_final, read_json
from dash_exp.record.identity import as_stored, freeze, make_cell, read_frozen, resolve_paths
from dash_exp.signals import Interrupted, Stop, handling, reduce_openmp_spinning, run_forwarding
from dash_exp.tasks.sources import data_faults
from dash_exp.text import format_command, format_path
from dash_exp.train.budget import Blocked, find_partner
from dash_exp.train.display import Display

if TYPE_CHECKING:
    from dash_exp.learning.distributed.communicator import Coordinator
    from dash_exp.mirror.follow import Follower


def run_config(config: Config, apart: bool = False) -> int:
    """Freeze the cell of this config and run it, in this process or, `apart`, in a new one (so that the
    cells of a sweep share nothing). Returns an exit code. Raises UserError."""
    if apart and rank_from_environment(os.environ) is not None:
        what = "torchrun and srun start the ranks of one cell, not a sweep"
        raise UserError(Fault("-m", what, "leave them out: a sweep starts the ranks of each cell itself"))
    return run_on_ranks(config, lambda links: freeze_and_run(config, apart, links))


def freeze_and_run(config: Config, apart: bool, links: Coordinator | None) -> int:
    root = Path(config.run.dir)
    cache = root / "cache"
    with disk_errors_below(root):
        cache.mkdir(parents=True, exist_ok=True)
        config = resolve_paths(config)
        if faults := data_faults(config):
            raise UserError(faults)
        cell = make_cell(config, cache)
        folder = cell.folder(root)
        try:
            if config.run.force:
                archive(folder)
        except CellBusy as error:
            raise UserError(Fault("run.force", str(error), "wait for it, or stop it first")) from error
        freeze(cell.frozen, folder, cell.sources)
    if not apart:
        return run(folder, as_stored(config, folder), links)
    actions = [f"run.progress={config.run.progress}", f"cluster.threads={config.cluster.threads or 'null'}"]
    actions += [f"run.partner={config.run.partner}"] if config.run.partner else []
    command = [sys.executable, "-m", "dash_exp.cell", str(folder.resolve()), *actions]
    code, forwarded = run_forwarding(command)
    return ExitCode.SIGNALLED + (forwarded or -code) if forwarded or code < 0 else code


def run_on_ranks(config: Config, cell: Callable[[Coordinator | None], int]) -> int:
    """Run a cell. If torchrun or srun started the ranks of its learner, rank 0 runs it and the others serve
    rank 0; they touch neither the cell's lock nor its record."""
    place = rank_from_environment(os.environ)
    if place is None:
        return cell(None)
    if place.size != config.learner.ranks:
        what = f"got {config.learner.ranks}, but {place.size} processes were started together"
        hint = f"set learner.ranks={place.size}, or start {config.learner.ranks}"
        raise UserError(Fault("learner.ranks", what, hint))
    reduce_openmp_spinning()
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
    display = Display(config.algorithm.steps or 0, config.run.progress, config.run.command)
    stop = Stop()
    try:
        with handling(stop), ExitStack() as stack:
            mirror = stack.enter_context(tracked(folder, config, display))
            recorder = stack.enter_context(Recorder(folder))  # released before the mirror's last sync
            if read_json(folder / "status.json").get("state") == "finished":
                code: int = show_finished(folder, display)
            else:
                refuse_unreachable(config.model, dataset_places(config))
                if mirror is not None:
                    mirror.start(recorder.attempt)
                code = run_locked(folder, config, recorder, display, stop, links)
            if config.checkpoint.push_to and read_json(folder / "status.json").get("state") == "finished":
                publish(folder, config, recorder, display)
            return code
    except CellBusy as error:
        fault = Fault(format_path(folder), "is being run by another process", "see its log.txt")
        raise UserError(fault) from error
    except Interrupted as error:  # before the attempt began, or after it had ended
        return ExitCode.SIGNALLED + error.number
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise UserError(disk_fault(error, folder), "what was recorded is kept") from error
    finally:
        display.stop()


def tracked(folder: Path, config: Config, display: Display) -> AbstractContextManager[Follower | None]:
    """The process that mirrors the record beside the run, if `tracking` asks for one."""
    if not trackers_of(config.tracking):
        return nullcontext()
    from dash_exp.mirror.follow import Follower

    return Follower(folder, config, display.note)


def show_finished(folder: Path, display: Display) -> int:
    from dash_exp.record import provenance

    if any(folder.glob("checkpoints/*/resume")):  # killed between its last status and its clean-up
        from dash_exp.record.checkpoint import finalise

        finalise(folder)
    display.note(f"{format_path(folder)} is finished; run.force=true archives it and starts again.")
    if read_json(folder / "provenance.json").get("code_hash") != provenance.code_hash():
        display.note("It is stale: it was recorded by other code than this.")
    reason = str(read_json(folder / "status.json").get("reason"))
    display.summary(folder, read_final(folder, "steps"), read_final(folder, "evals"), reason)
    return ExitCode.OK


def run_locked(
    folder: Path, config: Config, recorder: Recorder, display: Display, stop: Stop, links: Coordinator | None
) -> int:
    """One attempt at a cell; however it ends, the end becomes a status and an exit code."""
    step = int(read_json(folder / "status.json").get("step", 0))
    recorder.status("running", step)
    reduce_openmp_spinning()
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
        return record_interrupted(recorder, display, number)
    except Exception as error:
        failure, trace = str(error), ""
        if not isinstance(error, UserError):
            failure, trace = f"{type(error).__name__}: {error}", traceback.format_exc()
        if stop.received is not None:  # the signal ended a helper process that the step still needed
            return record_interrupted(recorder, display, stop.received, f"{failure}\n{trace}")
        record_end(recorder, "failed", failure, trace)
        raise
    return ExitCode.OK


def publish(folder: Path, config: Config, recorder: Recorder, display: Display) -> None:
    """Upload a finished cell. Raises UserError where that fails."""
    from dash_exp.cell.upload import upload

    try:
        done = upload(folder, config)
    except UserError as error:
        recorder.log(str(error))
        raise
    recorder.log(done)
    display.note(done)


def record_interrupted(recorder: Recorder, display: Display, number: int, trace: str = "") -> int:
    name = signal.Signals(number).name
    record_end(recorder, "interrupted", name, trace)
    display.stop()
    display.note(f"Interrupted by {name}. {display.goes_on('the last checkpoint')}")
    return ExitCode.SIGNALLED + number


def record_end(recorder: Recorder, state: str, failure: str, trace: str = "") -> None:
    """Record how the attempt ended, if the disk can be written."""
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
    if not os.path.lexists(folder / "config.yaml"):
        raise UserError(Fault(str(folder), "holds no config.yaml, so it is not a cell"))
    config = read_frozen(folder, list(arguments[1:]))
    if faults := check(config):
        raise UserError(faults)
    cell = make_cell(config, folder.parent.parent / "cache")
    if cell.id != folder.name.rpartition("-")[2]:
        what = "was frozen with other data, model, functions or settings than are there now"
        raise UserError(Fault(str(folder), what, "run the experiment again: it becomes a cell of its own"))
    command = format_command("dash_exp.cell", *arguments)
    config = changed(config, {"run.command": command})
    return run_on_ranks(config, lambda links: run(folder, config, links))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
