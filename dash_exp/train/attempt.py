"""One attempt at a cell: build, resume, evaluate before, train, evaluate after, finish."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dash_exp.config.schema import Config
from dash_exp.evaluation.metrics import EvalResult, EvalSet, base_key, evaluate, shared
from dash_exp.learning.packing import largest_micro_batch
from dash_exp.modeling.source import computing_type
from dash_exp.record import checkpoint, provenance
from dash_exp.record.folder import Recorder, Row, read_final, read_json, read_rows, write_json
from dash_exp.record.identity import model_hash, weights_hash
from dash_exp.record.ledger import SECONDS
from dash_exp.signals import Interrupted, Stop, tune_malloc
from dash_exp.text import format_path, format_seconds
from dash_exp.train.budget import Partner, amount_of, check_equal, spent_of
from dash_exp.train.build import BuiltRun, build, engine_facts, thread_count
from dash_exp.train.display import Display
from dash_exp.train.loop import evaluation_due, train
from dash_exp.train.parts import Ending, Hooks

if TYPE_CHECKING:
    from dash_exp.learning.distributed.communicator import Coordinator

TRUNCATION_WARNING, CONSTANT_WARNING = 0.5, 0.9


@dataclass
class Attempt:
    """An attempt and what it works with. `run` sets `built`, all parts of the run."""

    folder: Path
    config: Config
    recorder: Recorder
    display: Display
    stop: Stop
    partner: Partner | None = None
    coordinator: Coordinator | None = None
    """The coordinator of the learner's ranks, where they were started together with this process."""
    evaluated: set[tuple[int, str]] = field(default_factory=set)
    """Steps and sets that have results of the current weights; a resumed run repeats later ones."""
    built: BuiltRun = field(init=False)
    cache: Path = field(init=False)
    saver: checkpoint.Saver = field(init=False)

    def run(self) -> None:
        """Run the attempt from build to finish. Raises Interrupted after a signal, UserError for what the
        user can fix."""
        tune_malloc()
        self.cache = self.folder.parent.parent / "cache"
        self.log(f"cell {format_path(self.folder)}")
        event, logs = self.recorder.event, self.folder / "servers"
        self.built = build(self.config, self.cache, self.log, logs, event, self.coordinator)
        keep = self.config.checkpoint.keep
        self.saver = checkpoint.Saver(self.folder, self.built.source.folder, keep, self.note_saved)
        try:
            self.train()
        finally:
            self.built.close()

    def log(self, text: str) -> None:
        self.recorder.log(text)
        self.display.note(text)

    def train(self) -> None:
        self.display.steps = self.recorder.facts["steps"] = self.built.plan.steps
        done = self.resume()
        rows = read_final(self.folder, "evals")
        self.evaluated |= {(r["step"], r["dataset"]) for r in rows if r["step"] in (0, done)}
        self.note_provenance(done)
        self.preflight()
        if done and self.built.parts.demonstrations is None:  # else before its first evaluation
            self.built.parts.sampler.load_weights(done)  # wakes colocated servers, so only after preflight
        if self.config.evaluation.before:
            self.evaluate(0)
        if evaluation_due(self.built.plan, done):  # a signal may have prevented its evaluation
            self.evaluate(done)
        try:
            ending = self.loop(done)
        finally:
            self.saver.wait()
        if ending.signal is not None:
            raise Interrupted(ending.signal)
        if ending.reason == "paused":
            return self.pause(ending.step)
        if self.config.evaluation.after:
            self.evaluate(ending.step)
        self.finish(ending)

    def loop(self, done: int) -> Ending:
        """The training loop, in which a first signal waits for the end of a step."""
        first, last = done + 2, done + 1 + self.config.run.profile
        hooks = Hooks(
            self.evaluate,
            self.save,
            self.progress,
            lambda: self.stop.received,
            lambda step: self.profiled(step) if first <= step <= last else nullcontext(),
        )
        plan, parts = self.built.plan, self.built.parts
        rows = [row for row in read_final(self.folder, "steps") if row["step"] <= done]
        spent = spent_of(rows, plan.budget_unit)
        self.stop.deferred = True
        try:
            with hooks.clock.beating():
                return train(plan, parts, hooks, self.recorder, done=done, spent=spent)
        finally:
            self.stop.deferred = False

    @contextmanager
    def profiled(self, step: int) -> Iterator[None]:
        """Trace a step by torch's profiler into the cell's folder, for chrome://tracing or Perfetto."""
        target = self.folder / "profile" / f"step-{step:06d}.json.gz"
        target.parent.mkdir(exist_ok=True)
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it prints when it starts and stops
        with torch.profiler.profile() as trace:
            yield
        trace.export_chrome_trace(str(target))
        self.log(f"profile of step {step}: {format_path(target)}")

    def resume(self) -> int:
        """Continue from the newest intact checkpoint. Returns its step, 0 without one."""
        snapshot, damaged = checkpoint.latest(self.folder)
        for bad in damaged:
            self.log(f"checkpoint {bad.folder.name} is damaged ({bad.reason}); using the one before")
            now = time.time()
            self.recorder.event("fault", now, now, what="damaged checkpoint", where=bad.folder.name)
            bad.folder.rename(bad.folder.with_name(f"damaged-{bad.folder.name}-{time.time_ns()}"))
        if snapshot is None:
            return 0
        self.built.parts.learner.restore(snapshot)
        step = int(snapshot.state["step"])
        first = {"place": step * self.built.plan.prompts_per_step, "explore": {}, "streaks": {}}
        self.built.parts.chooser.restore(snapshot.state.get("selection", first))  # older ones have none
        rows = read_rows(self.folder / "steps.jsonl").rows
        if all(row["step"] != step for row in rows):  # killed between the checkpoint and its row
            self.recorder.append("steps", [snapshot.state["row"]])
        self.log(f"resuming after step {step}")
        return step

    def note_provenance(self, done: int) -> None:
        path = self.folder / "provenance.json"
        known, built = read_json(path), self.built
        data = {"training": built.parts.chooser.prompts, **{s.label: s.prompts for s in built.sets}}
        judges = {*(j.version for j in built.parts.judges.values()), *(s.judge.version for s in built.sets)}
        weights = weights_hash(built.source.folder, self.cache)
        budget = known.get("budget")  # as read at the first start
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        hardware = provenance.hardware(thread_count(self.config.cluster.threads), gpus)
        if self.partner is not None and budget is None:
            check_equal(self.partner, hardware if built.plan.budget_unit == SECONDS else None, weights)
            budget = {"match": self.partner.name, built.plan.budget_unit: self.partner.spent}
        if budget is not None:
            unit = built.plan.budget_unit
            self.built = replace(built, plan=replace(built.plan, budget=float(budget[unit])))
            self.log(f"budget: {amount_of(budget[unit], unit)}, as {budget['match']} had")
        facts = provenance.collect(
            known,
            self.recorder.attempt,
            done or None,
            hardware=hardware,
            budget=budget,
            model={"origin": built.source.origin, "weights_hash": weights},
            datasets={label: p.content_hash for label, p in data.items()},
            verifiers=sorted(judges),
        )
        if known and known.get("code_hash") != facts["code_hash"]:
            self.log("note: this cell was started by other code; provenance.json lists both")
        write_json(path, facts)

    def preflight(self) -> None:
        """Check that the longest samples fit. Raises UserError now rather than in an hour."""
        if not self.config.learner.preflight:
            return
        parts, plan = self.built.parts, self.built.plan
        longest = max(len(p.token_ids) for p in parts.chooser.prompts.prompts)
        new = parts.decoding.max_new_tokens
        parts.learner.preflight(largest_micro_batch(longest, new, plan.group_size, parts.packer))
        self.log("preflight: a micro-batch of the longest samples fits")

    def evaluate(self, step: int) -> None:
        """Evaluate every set now; the base model's result is shared through the cache."""
        for eval_set in self.built.sets:
            if (step, eval_set.label) in self.evaluated:
                continue
            self.evaluated.add((step, eval_set.label))
            start = time.time()
            result, known_from = self.evaluate_set(eval_set, step)
            end = time.time()
            self.recorder.event("evaluate", start, end, step=step, worker="main", cached=bool(known_from))
            self.recorder.append("eval_samples", ({"step": step, **r} for r in result.prompts))
            self.recorder.append("evals", ({"step": step, **r} for r in result.metrics))
            source = f"known from {known_from}" if known_from else format_seconds(end - start)
            self.log(f"{self.display.accuracy(result.metrics[0])} at step {step} ({source})")

    def evaluate_set(self, eval_set: EvalSet, step: int) -> tuple[EvalResult, str]:
        """The result of one set, and the run it is known from (a base model's), "" if none."""
        sampler, seed = self.built.parts.sampler, self.config.seed
        if sampler.policy_version != step:  # a supervised arm syncs its weights only here
            sampler.load_weights(step)
        if step > 0:
            return evaluate(eval_set, sampler, seed), ""
        model = model_hash(self.built.source.folder, self.cache)
        key = base_key(eval_set, model, engine_facts(self.config), seed)
        place, run = self.cache / "base_results", self.folder.name
        return shared(eval_set, key, place, lambda: evaluate(eval_set, sampler, seed), run)

    def save(self, step: int, last: bool, row: Row) -> None:
        """Begin to write a checkpoint beside training. After the last step moments, more than half of the
        bytes, are left out: no update follows."""
        snapshot = self.built.parts.learner.snapshot(step, moments=not last, row=row)
        state = {**snapshot.state, "selection": self.built.parts.chooser.state()}
        self.saver.save(step, replace(snapshot, state=state))

    def note_saved(self, step: int, start: float, end: float) -> None:
        self.recorder.event("checkpoint", start, end, step=step, worker="checkpoint")

    def progress(self, row: Row) -> None:
        self.display.step(row)
        warnings = warnings_of(row)
        if gap := gap_warning(row, self.config):
            warnings.append(gap)
            now, step = time.time(), int(row["step"])
            self.recorder.event("fault", now, now, what="log-prob gap", step=step, reason=gap)
        for text in warnings:
            self.recorder.log(text)
            if int(row["step"]) <= 3:
                self.display.note(text)

    def pause(self, step: int) -> None:
        """Record that the run stopped where `run.until_step` asked it to; its checkpoint is written."""
        reason = f"paused at step {step} (run.until_step)"
        self.recorder.status("interrupted", step, reason=reason)
        self.log(f"{reason}. {self.display.goes_on('there')}")

    def finish(self, ending: Ending) -> None:
        """Record the end, then delete what only a resumption needs. A run killed in between is cleaned up by
        the next launch."""
        self.recorder.status("finished", ending.step, reason=ending.reason)
        checkpoint.finalise(self.folder)
        self.recorder.log(f"finished after step {ending.step} ({ending.reason})")
        steps, evals = read_final(self.folder, "steps"), read_final(self.folder, "evals")
        self.display.summary(self.folder, steps, evals, ending.reason)


LOGPROB_GAP = {"float32": 0.003, "float16": 0.01, "bfloat16": 0.03}
"""More than rounding explains, as a mean over tokens, by the less precise type of sampler and learner."""


def gap_warning(row: Row, config: Config) -> str | None:
    """What is wrong where sampler and learner compute different probabilities with the same weights."""
    s, precision = config.sampler, config.learner.precision
    kinds = {s.dtype} if s.name.startswith("vllm") else set[str]()
    kinds.add(str(computing_type(precision)).removeprefix("torch."))
    allowed, gap = max(LOGPROB_GAP.get(kind, 0.03) for kind in kinds), row.get("policy/logprob_gap") or 0.0
    if gap <= allowed or config.algorithm.source != "sampler":
        return None
    return (
        f"warning: log-probabilities of sampler and learner differ by {gap:.3g} a token, more than the "
        f"{allowed:g} that rounding explains: the batch is off-policy; does the sampler hold this model?"
    )


def warnings_of(row: Row) -> list[str]:
    """What usually indicates a wrong setting rather than a hard task."""
    warnings = []
    if row.get("length/truncated_share", 0.0) > TRUNCATION_WARNING:
        warnings.append(
            f"warning: {row['length/truncated_share']:.0%} of completions were cut at "
            "sampler.max_new_tokens; their answers may never have been reached"
        )
    if row.get("filter/zero_variance_share", 0.0) > CONSTANT_WARNING:
        warnings.append(
            f"warning: in {row['filter/zero_variance_share']:.0%} of groups all rewards are equal: "
            "nothing to learn from; is the task too hard, too easy, or judged wrongly?"
        )
    if failed := row.get("outcome/verifier_error"):
        warnings.append(f"warning: {failed} verdicts failed; samples.jsonl has each reason as its detail")
    if row["updates/nonfinite"]:
        warnings.append("warning: a gradient was infinite or not a number; that update was skipped")
    return warnings
