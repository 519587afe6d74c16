"""One attempt at a cell: build, resume, evaluate before, train, evaluate after, finish."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dash_exp.config.schema import Config
from dash_exp.evaluation.metrics import EvalResult, EvalSet, base_key, evaluate, shared
from dash_exp.learning.packing import largest_micro_batch
from dash_exp.record import checkpoint, provenance
from dash_exp.record.folder import Recorder, Row, read_final, read_json, read_rows, write_json
from dash_exp.record.identity import model_hash, weights_hash
from dash_exp.signals import Interrupted, Stop, keep_freed_memory
from dash_exp.text import format_path, format_seconds
from dash_exp.train.budget import Partner, check_equal, spent_seconds
from dash_exp.train.build import build, engine_facts, thread_count
from dash_exp.train.display import Display
from dash_exp.train.loop import evaluation_due, train
from dash_exp.train.parts import Ending, Hooks

if TYPE_CHECKING:
    from dash_exp.learning.distributed.communicator import Coordinator

TRUNCATION_WARNING, CONSTANT_WARNING = 0.5, 0.9


@dataclass
class Attempt:
    """An attempt and what it works with; `machine` exists once everything is built."""

    folder: Path
    config: Config
    recorder: Recorder
    display: Display
    stop: Stop
    partner: Partner | None = None
    coordinator: Coordinator | None = None
    """Of the learner's ranks, where they were started together with this process."""
    evaluated: set[tuple[int, str]] = field(default_factory=set)
    """Steps and sets that have results of the current weights; a resumed run repeats later ones."""

    def run(self) -> None:
        """Everything. Raises Interrupted after a signal, UserError for what the user can fix."""
        keep_freed_memory()
        self.cache = self.folder.parent.parent / "cache"
        self.log(f"cell {format_path(self.folder)}")
        event, logs = self.recorder.event, self.folder / "servers"
        self.machine = build(self.config, self.cache, self.log, logs, event, self.coordinator)
        try:
            self.train()
        finally:
            self.machine.close()

    def log(self, text: str) -> None:
        self.recorder.log(text)
        self.display.note(text)

    def train(self) -> None:
        self.display.steps = self.recorder.facts["steps"] = self.machine.plan.steps
        done = self.resume()
        rows = read_final(self.folder, "evals")
        self.evaluated |= {(r["step"], r["dataset"]) for r in rows if r["step"] in (0, done)}
        self.note_provenance(done)
        self.preflight()
        if done and self.machine.parts.demonstrations is None:  # else before its first evaluation
            self.machine.parts.sampler.load_weights(done)  # wakes colocated servers, so only after preflight
        if self.config.evaluation.before:
            self.evaluate(0)
        if evaluation_due(self.machine.plan, done):  # a signal may have prevented its evaluation
            self.evaluate(done)
        ending = self.loop(done)
        if ending.signal is not None:
            raise Interrupted(ending.signal)
        if self.config.evaluation.after:
            self.evaluate(ending.step)
        self.finish(ending)

    def loop(self, done: int) -> Ending:
        """The training loop, in which a first signal waits for the end of a step."""
        hooks = Hooks(self.evaluate, self.save, self.progress, lambda: self.stop.asked)
        plan, parts = self.machine.plan, self.machine.parts
        spent = self.spent_seconds(done)
        self.stop.patient = True
        try:
            return train(plan, parts, hooks, self.recorder, done=done, spent_s=spent)
        finally:
            self.stop.patient = False

    def resume(self) -> int:
        """Continue from the newest intact checkpoint. Returns its step, 0 without one."""
        snapshot, damaged = checkpoint.latest(self.folder)
        for one in damaged:
            self.log(f"checkpoint {one.folder.name} is damaged ({one.reason}); using the one before")
            now = time.time()
            self.recorder.event("fault", now, now, what="damaged checkpoint", where=one.folder.name)
            one.folder.rename(one.folder.with_name(f"damaged-{one.folder.name}-{time.time_ns()}"))
        if snapshot is None:
            return 0
        self.machine.parts.learner.restore(snapshot)
        step = int(snapshot.state["step"])
        rows = read_rows(self.folder / "steps.jsonl").rows
        if all(row["step"] != step for row in rows):  # killed between the checkpoint and its row
            self.recorder.append("steps", [snapshot.state["row"]])
        self.log(f"resuming after step {step}")
        return step

    def spent_seconds(self, done: int) -> float:
        """Training seconds of the steps that count, over all attempts."""
        return spent_seconds([r for r in read_final(self.folder, "steps") if r["step"] <= done])

    def note_provenance(self, done: int) -> None:
        path = self.folder / "provenance.json"
        known, machine = read_json(path), self.machine
        data = {"training": machine.parts.prompts, **{s.label: s.prompts for s in machine.sets}}
        judges = {
            *(j.version for j in machine.parts.judges.values()),
            *(s.judge.version for s in machine.sets),
        }
        weights = weights_hash(machine.source.folder, self.cache)
        budget = known.get("budget")  # as read at the first start
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        hardware = provenance.hardware(thread_count(self.config.cluster.threads), gpus)
        if self.partner is not None and budget is None:
            check_equal(self.partner, hardware, weights)
            budget = {"match": self.partner.name, "seconds": self.partner.seconds}
        if budget is not None:
            plan = replace(machine.plan, budget_s=float(budget["seconds"]))
            self.machine = replace(machine, plan=plan)
            self.log(f"budget: {budget['seconds']:.1f} s of training, as {budget['match']} had")
        facts = provenance.collect(
            known,
            self.recorder.attempt,
            done or None,
            hardware=hardware,
            budget=budget,
            model={
                "origin": machine.source.origin,
                "weights_hash": weights,
            },
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
        parts, plan = self.machine.parts, self.machine.plan
        longest = max(len(p.token_ids) for p in parts.prompts.prompts)
        new = parts.decoding.max_new_tokens
        parts.learner.preflight(largest_micro_batch(longest, new, plan.group_size, parts.packer))
        self.log("preflight: a micro-batch of the longest samples fits")

    def evaluate(self, step: int) -> None:
        """Evaluate every set now; the base model's result is shared through the cache."""
        for one in self.machine.sets:
            if (step, one.label) in self.evaluated:
                continue
            self.evaluated.add((step, one.label))
            start = time.time()
            result, hit = self.evaluate_one(one, step)
            end = time.time()
            self.recorder.event("evaluate", start, end, step=step, worker="main", cached=hit)
            self.recorder.append("eval_samples", ({"step": step, **r} for r in result.prompts))
            self.recorder.append("evals", ({"step": step, **r} for r in result.metrics))
            source = "known already" if hit else format_seconds(end - start)
            self.log(f"{self.display.accuracy(result.metrics[0])} at step {step} ({source})")

    def evaluate_one(self, one: EvalSet, step: int) -> tuple[EvalResult, bool]:
        """The result of one set, and whether it is a cache hit (the base model's)."""
        sampler, seed = self.machine.parts.sampler, self.config.seed
        if sampler.policy_version != step:  # a supervised arm syncs its weights only here
            sampler.load_weights(step)
        if step > 0:
            return evaluate(one, sampler, seed), False
        model = model_hash(self.machine.source.folder, self.cache)
        key = base_key(one, model, engine_facts(self.config), seed)
        return shared(one, key, self.cache / "base_results", lambda: evaluate(one, sampler, seed))

    def save(self, step: int, last: bool, row: Row) -> None:
        """Write a checkpoint, then delete the oldest. After the last step moments, more than half of the
        bytes, are left out: no update follows."""
        start = time.time()
        snapshot = self.machine.parts.learner.snapshot(step, moments=not last, row=row)
        checkpoint.save(self.folder, step, snapshot, self.machine.source.folder)
        checkpoint.prune(self.folder, self.config.checkpoint.keep)
        self.recorder.event("checkpoint", start, time.time(), step=step, worker="main")

    def progress(self, row: Row) -> None:
        self.display.step(row)
        for text in warnings_of(row):
            self.recorder.log(text)
            if int(row["step"]) <= 3:
                self.display.note(text)

    def finish(self, ending: Ending) -> None:
        """The status first, then the tidying: after a kill in between the next launch tidies up."""
        self.recorder.status("finished", ending.step, reason=ending.reason)
        checkpoint.finalise(self.folder)
        self.recorder.log(f"finished after step {ending.step} ({ending.reason})")
        steps, evals = read_final(self.folder, "steps"), read_final(self.folder, "evals")
        self.display.summary(self.folder, steps, evals, ending.reason)


def warnings_of(row: Row) -> list[str]:
    """What usually indicates a wrong setting rather than a hard task."""
    found = []
    if row.get("length/truncated_share", 0.0) > TRUNCATION_WARNING:
        found.append(
            f"warning: {row['length/truncated_share']:.0%} of completions were cut at "
            "sampler.max_new_tokens; their answers may never have been reached"
        )
    if row.get("filter/zero_variance_share", 0.0) > CONSTANT_WARNING:
        found.append(
            f"warning: in {row['filter/zero_variance_share']:.0%} of groups all rewards are equal: "
            "nothing to learn from; is the task too hard, too easy, or judged wrongly?"
        )
    if row["updates/nonfinite"]:
        found.append("warning: a gradient was infinite or not a number; that update was skipped")
    return found
