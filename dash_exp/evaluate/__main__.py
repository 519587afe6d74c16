"""Evaluate a checkpoint of a cell, or a base model:

    python -m dash_exp.evaluate cell=<folder> [checkpoint=<step or folder>] [key=value ...]
    python -m dash_exp.evaluate model=<option> [key=value ...]

An evaluation starts from the cell's frozen config; `evaluation=math` and keys of evaluation, sampler and
verifier override it. The cell's record is never changed: results lie in folders of their own below
`<cell>/evaluations/` or `outputs/evaluations/`, named by a hash of weights, prompts, decoding, engine and
judge, so that the same evaluation is not run twice. `run=` means the same as `cell=`.
"""

from __future__ import annotations

import hashlib
import json
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dash_exp.config.schema import changed, evaluation_places
from dash_exp.errors import ExitCode, Fault, UserError, disk_errors_below, run_command
from dash_exp.evaluate.target import USAGE, Subject, parse, subject_of
from dash_exp.evaluation.metrics import EvalSet, base_key, evaluate, shared
from dash_exp.record import provenance
from dash_exp.record.folder import CellBusy, Recorder, Row, archive, read_final, read_json, write_json
from dash_exp.record.identity import (
    freeze,
    frozen_values,
    model_hash,
    resolve_paths,
    sources_of,
    weights_hash,
)
from dash_exp.signals import Interrupted, Stop, handling, reduce_openmp_spinning
from dash_exp.text import format_accuracy, format_command, format_number, format_path, format_seconds
from dash_exp.train.display import Display

if TYPE_CHECKING:
    from dash_exp.train.inference import InferenceModel


def run(subject: Subject) -> int:
    """Evaluate, or show the recorded result. Returns an exit code."""
    reduce_openmp_spinning()
    from dash_exp.train.inference import InferenceModel, engine_width

    config = resolve_paths(subject.config)
    if config.sampler.name == "vllm" and not any("sampler.max_sequences=" in text for text in subject.given):
        config = changed(config, {"sampler.max_sequences": engine_width()})
    subject = replace(subject, config=config)
    root = Path(config.run.dir)
    cache = root / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    if config.model.path:
        _refuse_damage(Path(config.model.path))
    display = Display(0, config.run.progress)
    with InferenceModel.of(config, cache, evaluation_places(config)) as inference:
        sets = inference.prompt_builder.held_out()
        keys = {one.label: _key(inference, one, cache) for one in sets}
        digest = _digest({"keys": keys, "k": list(config.evaluation.k), "step": subject.step})
        folder = subject.place / f"{_readable(subject.name)}-{digest}"
        if config.run.force:
            archive(folder)
        freeze(frozen_values(config), folder, sources_of(config))
        with Recorder(folder) as recorder:
            if read_json(folder / "status.json").get("state") == "finished":
                display.note(f"{format_path(folder)} is known; run.force=true archives it and runs again.")
            else:
                job = Job(subject, inference, sets, keys, cache, recorder, display)
                code = job.run()
                if code != ExitCode.OK:
                    return code
        display.console.print("\n".join(table(subject, folder)), markup=False, soft_wrap=True)
    return ExitCode.OK


def _key(inference: InferenceModel, one: EvalSet, cache: Path) -> dict[str, Any]:
    from dash_exp.train.inference import engine_facts

    weights = model_hash(inference.source.folder, cache)
    return base_key(one, weights, engine_facts(inference.config), inference.config.seed)


def _refuse_damage(folder: Path) -> None:
    """A checkpoint that has changed since it was written is not evaluated."""
    from dash_exp.record.checkpoint import CHECKSUMS, damage

    if (folder / CHECKSUMS).exists() and (reason := damage(folder)):
        what = f"{format_path(folder)} is damaged: {reason}"
        raise UserError(Fault("checkpoint", what, "choose another one"))


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def _readable(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)


@dataclass(frozen=True)
class Job:
    """One evaluation, writing to its folder."""

    subject: Subject
    inference: InferenceModel
    sets: tuple[EvalSet, ...]
    keys: Mapping[str, dict[str, Any]]
    cache: Path
    recorder: Recorder
    display: Display

    def run(self) -> int:
        step = max(0, self.subject.step)
        recorder = self.recorder
        try:
            with handling(Stop()):
                recorder.status("running", step)
                self.note_provenance()
                for one in self.sets:
                    self.ask(one, step)
                recorder.status("finished", step, reason="evaluated")
        except (Interrupted, KeyboardInterrupt) as error:
            code = error.number if isinstance(error, Interrupted) else int(signal.SIGINT)
            name = signal.Signals(code).name
            recorder.status("interrupted", step, failure=name)
            self.say(f"Interrupted by {name}; the same command continues with the next set.")
            return ExitCode.SIGNALLED + code
        except Exception as error:
            recorder.status("failed", step, failure=f"{type(error).__name__}: {error}")
            recorder.log(traceback.format_exc())
            raise
        return ExitCode.OK

    def ask(self, one: EvalSet, step: int) -> None:
        """Evaluate one set. A base model's result comes from the cache that all cells share, or is put there,
        unless run.force is set."""
        if any(row["dataset"] == one.label for row in read_final(self.recorder.folder, "evals")):
            return
        asked = [(s.prompts, s.decoding) for s in self.sets]
        start = time.time()

        def compute() -> Any:
            return evaluate(one, self.inference.sampler(asked), self.subject.config.seed)

        if self.subject.step == 0 and not self.subject.config.run.force:
            place, run = self.cache / "base_results", self.recorder.folder.name
            result, known_from = shared(one, self.keys[one.label], place, compute, run)
        else:
            result, known_from = compute(), ""
        self.recorder.append("eval_samples", ({"step": step, **row} for row in result.prompts))
        self.recorder.append("evals", ({"step": step, **row} for row in result.metrics))
        source = f"known from {known_from}" if known_from else format_seconds(time.time() - start)
        accuracy = result.metrics[0]
        self.say(f"{one.label}: accuracy {format_accuracy(accuracy)}, n={accuracy['n']} ({source})")

    def say(self, text: str) -> None:
        self.recorder.log(text)
        self.display.note(text)

    def note_provenance(self) -> None:
        from dash_exp.train.inference import hardware_facts

        path, source = self.recorder.folder / "provenance.json", self.inference.source
        facts = provenance.collect(
            read_json(path),
            self.recorder.attempt,
            None,
            hardware=hardware_facts(self.subject.config),
            evaluated=dict(self.subject.facts),
            model={"origin": source.origin, "weights_hash": weights_hash(source.folder, self.cache)},
            datasets={one.label: one.prompts.content_hash for one in self.sets},
            verifiers=sorted({one.judge.version for one in self.sets}),
            keys=dict(self.keys),
        )
        write_json(path, facts)


def table(subject: Subject, folder: Path) -> list[str]:
    """Results as text of at most 80 columns but for paths. A dash: there is no such value."""
    asked = subject.config.evaluation
    how = "greedy" if asked.temperature == 0 else f"T {asked.temperature:g}, top_p {asked.top_p:g}"
    each = "one completion" if asked.samples == 1 else f"{asked.samples} completions"
    lines = ["", f"{each} a prompt, {how}", ""]
    head = f"{'set':<18} {'metric':<22} {'value':>8}   {'95 % interval':<16} {'n':>6}"
    lines += [head, "-" * len(head)]
    seen = ""
    for row in read_final(folder, "evals"):
        name, seen = ("" if row["dataset"] == seen else row["dataset"]), row["dataset"]
        ends = f"[{format_number(row['low'])}, {format_number(row['high'])}]" if "low" in row else "-"
        lines.append(f"{name[:18]:<18} {row['metric']:<22} {_value(row):>8}   {ends:<16} {row['n']:>6}")
    return [*lines, "", f"record  {format_path(folder)}"]


def _value(row: Row) -> str:
    value = row.get("value")
    return str(value) if isinstance(value, int) else format_number(value)


def main(arguments: Sequence[str]) -> int:
    usage = f"usage: {USAGE}\n\n{__doc__}"
    again = format_command("dash_exp.evaluate", *arguments)
    return run_command(start, arguments, usage, f"this continues from here:\n{again}")


def start(arguments: Sequence[str]) -> int:
    """Parse the command line and run the evaluation."""
    with handling(Stop()):
        subject = subject_of(parse(arguments))
        with disk_errors_below(Path(subject.config.run.dir)):
            try:
                return run(subject)
            except CellBusy as error:
                fault = Fault("evaluation", str(error), "wait for it, or stop it first")
                raise UserError(fault) from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
