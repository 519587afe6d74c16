"""Sample a teacher over a dataset and keep what is correct: the data of SFT-M.

    python -m dash_exp.traces [dataset=<option>] [model=<option>] [traces.samples=10] [key=value ...]

Every prompt is answered `traces.samples` times; correct and different completions are kept, one JSON
object per line, in the dataset's order: id, problem, solution (the completion without its stop token),
tokens (as sampled, stop token included), index (which of the samples), finish (`length`: it was cut).

Work is kept prompt by prompt in `<out>.partial.jsonl`, so a killed run continues where it was. Seeds are
functions of (seed, prompt, index) and prompts are asked in fixed chunks, of which a broken one is asked
again: with the `hf` sampler on CPU a resumed file equals that of an undisturbed run.
"""

from __future__ import annotations

import hashlib
import sys
import time
import typing
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from dash_exp.config.schema import parts_of
from dash_exp.errors import ExitCode, disk_errors_below, run_command
from dash_exp.record import provenance
from dash_exp.record.folder import Row
from dash_exp.record.identity import model_hash, resolve_paths, weights_hash
from dash_exp.sampling.protocol import arrived
from dash_exp.seeding import seed_for
from dash_exp.signals import Stop, handling, reduce_openmp_spinning
from dash_exp.tasks.prompts import PromptSet
from dash_exp.tasks.sources import load_examples
from dash_exp.text import format_command, format_path, format_seconds
from dash_exp.traces.file import TraceFile, prompt_line, totals
from dash_exp.traces.settings import Command, TracesConfig, parse
from dash_exp.types import Decoding, Group, Prompt, Request, Score
from dash_exp.verifiers.types import Facts, Judge

if TYPE_CHECKING:
    from dash_exp.train.inference import InferenceModel

USAGE = "python -m dash_exp.traces [dataset=<option>] [model=<option>] [traces.samples=10] [key=value ...]"
EVERY_S = 10.0
"""Seconds between two lines of progress where there is no terminal."""


def run(command: Command) -> int:
    """Sample, unless it is done already. Returns an exit code."""
    reduce_openmp_spinning()
    from dash_exp.train.inference import InferenceModel

    config = resolve_paths(command.config)
    command = replace(command, config=config)
    cache = Path(config.run.dir) / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    progress = Progress(config.run.progress)
    with InferenceModel.of(config, cache, parts_of(config.dataset)) as inference:
        work = Work.of(command, inference, cache)
        file = TraceFile(command.out, work.settings)
        with file.held(), progress:
            facts = file.finished()
            if facts is not None:
                file.partial.unlink(missing_ok=True)
                progress.say(f"{format_path(file.out)} is there, made with these settings.")
                progress.say(counts_text(facts["counts"]))
                return ExitCode.OK
            done = work.sample(file, progress)
            counts = {**totals(done.values()), "dropped_prompts": work.prompts.dropped}
            file.finish(done, [p.id for p in work.prompts.prompts], {**work.facts(cache), "counts": counts})
    progress.say(counts_text(counts))
    progress.say(f"traces  {format_path(file.out)}")
    return ExitCode.OK


def counts_text(counts: Mapping[str, int]) -> str:
    """Counts as two short lines."""
    c = counts
    return (
        f"{c['prompts']} prompts, {c['sampled']} sampled ({c['truncated']} cut), {c['correct']} correct\n"
        f"{c['kept']} kept of {c['solved']} prompts; {c['duplicates']} duplicates left out, "
        f"{c['failed']} verdicts failed"
    )


@dataclass(frozen=True)
class Work:
    """Prompts, the teacher and the judge."""

    command: Command
    inference: InferenceModel
    prompts: PromptSet
    problems: Mapping[str, str]
    decoding: Decoding
    judge: Judge
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, command: Command, inference: InferenceModel, cache: Path) -> Work:
        from dash_exp.train.inference import engine_facts

        config, traces = command.config, command.traces
        data, builder = config.dataset, inference.prompt_builder
        prompts = builder.prompts(data, traces.limit if traces.limit is not None else data.limit)
        decoding = builder.decoding(data, traces.temperature, traces.top_p)
        judge = inference.judges.get(data.verifier, data.extraction)
        tokens = repr([(p.id, p.token_ids) for p in prompts.prompts]).encode()
        settings = {
            "teacher": model_hash(inference.source.folder, cache),
            "dataset": prompts.content_hash,
            "template": data.template,
            "prompts": hashlib.sha256(tokens).hexdigest(),
            "decoding": {**asdict(decoding), "stop_ids": list(decoding.stop_ids)},
            "samples": traces.samples,
            "seed": config.seed,
            "verifier": f"{data.verifier}/{data.extraction}/{judge.version}",
            "engine": {k: v for k, v in engine_facts(config).items() if k != "packages"},
            "chunk": traces.chunk,
        }
        problems = {e.id: e.problem for e in load_examples(data).examples}
        return cls(command, inference, prompts, problems, decoding, judge, settings)

    def sample(self, file: TraceFile, progress: Progress) -> dict[str, Row]:
        """The lines of all prompts: those that are there, and the others as they are sampled."""
        done = file.begin()
        everything, size = self.prompts.prompts, self.command.traces.chunk
        progress.start(len(everything), done.values())
        for start in range(0, len(everything), size):
            chunk = everything[start : start + size]
            if all(prompt.id in done for prompt in chunk):
                continue
            sampler = self.inference.sampler([(self.prompts, self.decoding)])
            groups = arrived(sampler.stream(self.requests(chunk), self.decoding))
            for group, scores in judged(groups, self.judge):
                if group.prompt.id in done:  # its chunk is sampled again
                    continue
                line = self.line(group, scores)
                file.append(line)
                done[group.prompt.id] = line
                progress.add(line)
        return done

    def requests(self, chunk: Sequence[Prompt]) -> list[Request]:
        seed, count = self.command.config.seed, self.command.traces.samples
        return [
            Request(n, p, tuple(seed_for(seed, "traces", p.id, index) for index in range(count)))
            for n, p in enumerate(chunk)
        ]

    def line(self, group: Group, scores: Sequence[Score]) -> Row:
        decode, name = self.inference.text.tokenizer.decode, group.prompt.id
        solutions = [
            decode(c.token_ids[:-1] if c.finish_reason == "stop" else c.token_ids, skip_special_tokens=True)
            for c in group.completions
        ]
        return prompt_line(name, self.problems[name], solutions, group.completions, scores)

    def facts(self, cache: Path) -> dict[str, Any]:
        from dash_exp.train.inference import hardware_facts

        source, config = self.inference.source, self.command.config
        return provenance.collect(
            {},
            1,
            None,
            hardware=hardware_facts(config),
            model={"origin": source.origin, "weights_hash": weights_hash(source.folder, cache)},
            datasets={self.prompts.name: self.prompts.content_hash},
            verifiers=[self.judge.version],
        )


def judged(groups: Iterator[Group], judge: Judge) -> Iterator[tuple[Group, list[Score]]]:
    """Groups with their verdicts, in the order in which they were sampled; sampling never waits."""
    waiting: deque[tuple[Group, list[Future[Score]]]] = deque()
    for group in groups:
        futures = [
            judge.submit(c.text, group.prompt.answer, Facts.of(group.prompt, c)) for c in group.completions
        ]
        waiting.append((group, futures))
        while waiting and all(future.done() for future in waiting[0][1]):
            first, verdicts = waiting.popleft()
            yield first, [future.result() for future in verdicts]
    for group, futures in waiting:
        yield group, [future.result() for future in futures]


class Progress:
    """Counts and tokens per second: one line that changes on a terminal, a line now and then elsewhere."""

    def __init__(self, mode: str, console: Console | None = None):
        self.console = console or Console(highlight=False)
        self.quiet = mode == "none"
        live = mode == "auto" and self.console.is_terminal
        self._live = Live(console=self.console, refresh_per_second=4, transient=True) if live else None
        self._prompts, self._fresh, self._tokens = 0, 0, 0
        self._counts = totals([])
        self._begun = self._said = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        if not self.quiet:
            self.console.print(text, markup=False, soft_wrap=True)

    def start(self, prompts: int, done: typing.Iterable[Row]) -> None:
        self._prompts = prompts
        self._counts = totals(done)
        if self._counts["prompts"]:
            self.say(f"{self._counts['prompts']} of {prompts} prompts are done already")
        self._begun = self._said = time.monotonic()
        if self._live is not None:
            self._live.start()

    def add(self, line: Row) -> None:
        """One more prompt is done."""
        self._counts = {n: v + totals([line])[n] for n, v in self._counts.items()}
        self._fresh += 1
        self._tokens += line["tokens"]
        now = time.monotonic()
        if self._live is not None:
            self._live.update(Text(self.text(now)))
        elif now - self._said >= EVERY_S:
            self._said = now
            self.say(self.text(now))

    def text(self, now: float) -> str:
        seconds, c = max(now - self._begun, 1e-9), self._counts
        left = seconds / self._fresh * (self._prompts - c["prompts"])
        return (
            f"prompt {c['prompts']}/{self._prompts} sampled {c['sampled']} correct {c['correct']} "
            f"kept {c['kept']} tok/s {self._tokens / seconds:.0f} left {format_seconds(left)}"
        )


def main(arguments: Sequence[str]) -> int:
    keys = "\n".join(f"    traces.{f.name}={f.default}" for f in fields(TracesConfig))
    usage = f"usage: {USAGE}\n\n{__doc__}\nIts own keys, with their defaults:\n{keys}"
    again = format_command("dash_exp.traces", *arguments)
    return run_command(start, arguments, usage, f"this continues from here:\n{again}")


def start(arguments: Sequence[str]) -> int:
    """Parse the command line and sample the teacher."""
    command = parse(arguments)
    with disk_errors_below(Path(command.config.run.dir), "what was sampled is kept"), handling(Stop()):
        return run(command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
