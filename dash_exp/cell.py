"""Run one frozen cell: `python -m dash_exp.cell <folder>`, or from a composed config.

Takes the folder's lock, resumes from the newest whole checkpoint, trains, evaluates, and leaves a
status that tells the truth however it ends.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from dash_exp import checkpoint, provenance
from dash_exp.cells import freeze, make_cell, read_frozen
from dash_exp.config import Config
from dash_exp.errors import Fault, UserError
from dash_exp.hashing import weights_hash
from dash_exp.record import CellBusy, Recorder, Row, last_attempts, read_json, read_rows
from dash_exp.terminal import Display, complain, seconds_text, show

OK, FAILED, USER_ERROR = 0, 1, 2


class Interrupted(Exception):
    """A signal asked this process to stop."""

    def __init__(self, number: int):
        self.number = number
        super().__init__(signal.Signals(number).name)


class Stop:
    """SIGINT, SIGTERM and USR2 (a scheduler's warning): the first lets the step end and a checkpoint be
    written; a second, or one outside training, stops at once."""

    def __init__(self) -> None:
        self.asked: int | None = None
        self.patient = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None or not self.patient:
            raise Interrupted(number)
        self.asked = number
        complain("\nstopping after this step; again to stop at once")

    @contextmanager
    def installed(self) -> Iterator[Stop]:
        numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2]
        before = {n: signal.signal(n, self) for n in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def run_config(config: Config) -> int:
    """Freeze the cell of this config and run it. Returns an exit code; UserError is the caller's."""
    root = Path(config.run.dir)
    try:
        cache = root / "cache"
        cache.mkdir(parents=True, exist_ok=True)
        cell = make_cell(config, cache)
        folder = cell.folder(root)
        if config.run.force:
            archive(folder)
        freeze(cell, folder)
    except OSError as error:
        raise UserError(disk_fault(error, root)) from error
    return run(folder, config)


def archive(folder: Path) -> None:
    """Move a record aside; nothing recorded is ever deleted."""
    if folder.exists():
        stamp = time.strftime("%Y%m%d-%H%M%S")
        target = folder.parent.parent / "archive" / f"{folder.name}-{stamp}-{os.getpid()}"
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(target)


def disk_fault(error: OSError, root: Path) -> Fault:
    place = error.filename or root
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Fault("run.dir", f"no space left on the disk of {place}", "free some, or set run.dir=<folder>")
    return Fault("run.dir", f"cannot write {place}: {error.strerror or error}", "set run.dir=<folder>")


def run(folder: Path, config: Config) -> int:
    """Run the cell in `folder` (frozen already). `config` supplies the actions (run, cluster, ...)."""
    display = Display(config.algorithm.steps, config.run.progress)
    status = read_json(folder / "status.json")
    if status.get("state") == "finished":
        return tell_finished(folder, display)
    stop = Stop()
    try:
        with Recorder(folder) as recorder, stop.installed():
            return attempt(folder, config, recorder, display, stop)
    except CellBusy as error:
        complain(f"dash_exp: {error}")
        return FAILED
    finally:
        display.stop()


def tell_finished(folder: Path, display: Display) -> int:
    provenance_then = read_json(folder / "provenance.json")
    display.note(f"{show(folder)} is finished; run.force=true archives it and starts anew.")
    if provenance_then.get("code_hash") != provenance.code_hash():
        display.note("It is stale: it was recorded by other code than this.")
    steps = last_attempts(read_rows(folder / "steps.jsonl").rows)
    evals = last_attempts(read_rows(folder / "evals.jsonl").rows)
    display.summary(folder, steps, evals, str(read_json(folder / "status.json").get("reason")))
    return OK


def attempt(folder: Path, config: Config, recorder: Recorder, display: Display, stop: Stop) -> int:
    """One attempt at a cell, with every way it can end turned into a status and an exit code."""
    step = int(read_json(folder / "status.json").get("step", 0))
    recorder.status("running", step)
    try:
        return Run(folder, config, recorder, display, stop).whole()
    except (Interrupted, KeyboardInterrupt) as error:
        number = error.number if isinstance(error, Interrupted) else int(signal.SIGINT)
        name = signal.Signals(number).name
        say_last(recorder, "interrupted", name)
        display.stop()
        display.note(f"Interrupted by {name}; the same command goes on from the last checkpoint.")
        return 128 + number
    except UserError as error:
        say_last(recorder, "failed", str(error))
        raise
    except OSError as error:
        say_last(recorder, "failed", f"{type(error).__name__}: {error}")
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise UserError(disk_fault(error, folder), "what was recorded is kept") from error
        raise
    except Exception as error:
        recorder.log(traceback.format_exc())
        say_last(recorder, "failed", f"{type(error).__name__}: {error}")
        raise


def say_last(recorder: Recorder, state: str, failure: str) -> None:
    """Record how it ended, if the disk lets us."""
    step = int(read_json(recorder.folder / "status.json").get("step", 0))
    try:
        recorder.log(f"{state}: {failure}")
        recorder.status(state, step, failure=failure)
    except OSError as error:
        complain(f"dash_exp: the status could not be written: {error}")


@dataclass
class Run:
    """One attempt: build, resume, evaluate before, train, evaluate after, finish."""

    folder: Path
    config: Config
    recorder: Recorder
    display: Display
    stop: Stop

    def whole(self) -> int:
        from dash_exp.build import build  # heavy imports only once there is something to run

        keep_freed_memory()
        self.cache = Path(self.config.run.dir) / "cache"
        self.say(f"cell {show(self.folder)}")
        machine = build(self.config, self.cache, self.say)
        try:
            return self.train(machine)
        finally:
            machine.close()

    def say(self, text: str) -> None:
        self.recorder.log(text)
        self.display.note(text)

    def train(self, machine: Any) -> int:
        from dash_exp.loop import Hooks, train

        self.machine = machine
        done = self.resume(machine)
        self.note_provenance(machine, done)
        self.preflight(machine)
        if self.config.evaluation.before:
            self.evaluate(0)
        self.stop.patient = True
        hooks = Hooks(self.evaluate, self.save, self.progress, lambda: self.stop.asked)
        spent = self.spent_seconds(done)
        ending = train(machine.plan, machine.parts, hooks, self.recorder, done=done, spent_s=spent)
        self.stop.patient = False
        if ending.signal is not None:
            raise Interrupted(ending.signal)
        if self.config.evaluation.after:
            self.evaluate(ending.step)
        return self.finish(ending.step, ending.reason)

    def preflight(self, machine: Any) -> None:
        """Fail now rather than in an hour, if the longest samples do not fit."""
        from dash_exp.learning.preflight import largest_micro_batch, preflight

        if not self.config.learner.preflight:
            return
        parts, longest = machine.parts, max(len(p.token_ids) for p in machine.parts.prompts.prompts)
        preflight(parts.learner, largest_micro_batch(
            longest, parts.decoding.max_new_tokens, machine.plan.group_size, parts.packer
        ))  # fmt: skip
        self.say("preflight: a micro-batch of the longest samples fits")

    def resume(self, machine: Any) -> int:
        """Go back to the newest whole checkpoint. Returns its step, 0 without one."""
        snapshot, damaged = checkpoint.latest(self.folder)
        for one in damaged:
            self.say(f"checkpoint {one.folder.name} is damaged ({one.reason}); using the one before")
            now = time.time()
            self.recorder.event("fault", now, now, what="damaged checkpoint", where=one.folder.name)
            one.folder.rename(one.folder.with_name(f"damaged-{one.folder.name}-{int(now)}"))
        if snapshot is None:
            return 0
        machine.parts.learner.restore(snapshot)
        step = int(snapshot.state["step"])
        machine.parts.sampler.load_weights(step)
        self.say(f"resuming after step {step}")
        return step

    def spent_seconds(self, done: int) -> float:
        """Training seconds of the steps that count, over all attempts."""
        rows = last_attempts(read_rows(self.folder / "steps.jsonl").rows)
        out = ("time/evaluate_s", "time/checkpoint_s")
        spent = [r["time/step_s"] - sum(r[k] for k in out) for r in rows if r["step"] <= done]
        return float(sum(spent))

    def note_provenance(self, machine: Any, done: int) -> None:
        from dash_exp.build import thread_count
        from dash_exp.record import write_json

        path = self.folder / "provenance.json"
        known = read_json(path)
        facts = provenance.collect(
            known, self.recorder.attempt, done or None,
            hardware=provenance.hardware(thread_count(self.config.cluster.threads), gpu_names()),
            model={"origin": machine.source.origin,
                   "weights_hash": weights_hash(machine.source.folder, self.cache)},
            datasets={p.name: p.content_hash for p in
                      [machine.parts.prompts, *(s.prompts for s in machine.sets)]},
            verifiers=sorted({machine.parts.judge.version, *(s.judge.version for s in machine.sets)}),
        )  # fmt: skip
        if known and known.get("code_hash") != facts["code_hash"]:
            self.say("note: this cell was begun by other code; provenance.json lists both")
        write_json(path, facts)

    def evaluate(self, step: int) -> None:
        """Evaluate every set now; the base model's result is shared through the cache."""
        known = last_attempts(read_rows(self.folder / "evals.jsonl").rows)
        for one in self.machine.sets:
            if step == 0 and any(r["step"] == 0 and r["dataset"] == one.label for r in known):
                continue
            start = time.time()
            result, hit = self.evaluate_one(one, step)
            took = time.time() - start
            self.recorder.event("evaluate", start, time.time(), step=step, worker="main", cached=hit)
            self.recorder.append("eval_samples", ({"step": step, **r} for r in result.prompts))
            self.recorder.append("evals", ({"step": step, **r} for r in result.metrics))
            first = result.metrics[0]
            source = "cached" if hit else seconds_text(took)
            self.say(
                f"{one.label}: accuracy {first['value']:.3f} [{first['low']:.3f}, {first['high']:.3f}] "
                f"at step {step}, n={first['n']} ({source})"
            )

    def evaluate_one(self, one: Any, step: int) -> tuple[Any, bool]:
        """The result of one set, and whether it was known already (the base model's, from the cache)."""
        from dash_exp.build import engine_facts
        from dash_exp.evaluation import base_key, cached, evaluate

        def compute() -> Any:
            return evaluate(one, self.machine.parts.sampler, self.config.seed)

        if step > 0:
            return compute(), False
        weights = weights_hash(self.machine.source.folder, self.cache)
        key = base_key(one, weights, engine_facts(self.config), self.config.seed)
        return cached(key, self.cache / "base_results", compute)

    def save(self, step: int, last: bool) -> None:
        """Write a checkpoint, then drop the oldest. After the last step no optimizer goes on, so its
        moments, more than half of the bytes, are left out."""
        start = time.time()
        snapshot = self.machine.parts.learner.snapshot(step, moments=not last)
        checkpoint.save(self.folder, step, snapshot, self.machine.source.folder)
        checkpoint.prune(self.folder, self.config.checkpoint.keep)
        self.recorder.event("checkpoint", start, time.time(), step=step, worker="main")

    def progress(self, row: Row) -> None:
        self.display.step(row)
        for text in warnings_of(row):
            self.recorder.log(text)
            if int(row["step"]) <= 3:
                self.display.note(text)

    def finish(self, step: int, reason: str) -> int:
        """Keep the last weights only, say so in the status, and sum up."""
        checkpoint.finalise(self.folder)
        self.recorder.status("finished", step, reason=reason)
        self.recorder.log(f"finished after step {step} ({reason})")
        steps = last_attempts(read_rows(self.folder / "steps.jsonl").rows)
        evals = last_attempts(read_rows(self.folder / "evals.jsonl").rows)
        self.display.summary(self.folder, steps, evals, reason)
        return OK


TRUNCATION_WARNING, CONSTANT_WARNING = 0.5, 0.9


def warnings_of(row: Row) -> list[str]:
    """What usually means a wrong setting rather than a hard task."""
    found = []
    if row["length/truncated_share"] > TRUNCATION_WARNING:
        found.append(
            f"warning: {row['length/truncated_share']:.0%} of completions were cut at "
            "sampler.max_new_tokens; their answers may never have been reached"
        )
    if row["filter/zero_variance_share"] > CONSTANT_WARNING:
        found.append(
            f"warning: in {row['filter/zero_variance_share']:.0%} of groups all rewards are equal: "
            "nothing to learn from; is the task too hard, too easy, or judged wrongly?"
        )
    return found


def keep_freed_memory() -> None:
    """Let glibc reuse freed memory instead of returning it: on CPU, fresh pages for every large
    temporary cost about a tenth of a step. Elsewhere nothing happens."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            for option, value in ((-3, 32 << 20), (-1, 1 << 30), (-2, 256 << 20)):
                libc.mallopt(option, value)  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD


def gpu_names() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        complain("usage: python -m dash_exp.cell <folder of a frozen cell>")
        return USER_ERROR
    folder = Path(arguments[0]).resolve()
    try:
        if not (folder / "config.yaml").exists():
            raise UserError(Fault(str(folder), "holds no config.yaml, so it is not a cell"))
        return run(folder, read_frozen(folder))
    except UserError as error:
        complain(str(error))
        return USER_ERROR


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
