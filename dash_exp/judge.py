"""Judge completions with a dataset's own verifier: a check of data and verifier before hours are spent.

    python -m dash_exp.judge dataset=<option> [dataset.path=<file>] [completions=<jsonl>] [key=value ...]

Without `completions` the dataset's reference solutions are judged: each should be correct. A file of
completions has one JSON object per line, with `id`, `task_id` or `prompt` (an example's id, ours or its
source's) and `completion`, `text` or `solution`, so a cell's samples.jsonl, a file of traces and HumanEval's
samples work as they are. No model is loaded, no torch. Exit code 0 whatever the verdicts; the last line is
one JSON object: dataset, n, outcomes.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dash_exp.config.checks import check, is_below
from dash_exp.config.compose import compose, find_faults
from dash_exp.config.schema import Config, DatasetConfig, parts_of
from dash_exp.errors import ExitCode, Fault, UserError, run_command
from dash_exp.jsonl import read_lines
from dash_exp.plugins import is_reference
from dash_exp.record.folder import Row, last_attempts
from dash_exp.record.identity import resolve_paths
from dash_exp.tasks.examples import Example, row_id
from dash_exp.tasks.sources import first_faults, load_examples
from dash_exp.text import format_seconds, printable
from dash_exp.types import FinishReason, Score
from dash_exp.verifiers.judges import Judges
from dash_exp.verifiers.math.extract import extract
from dash_exp.verifiers.types import Facts, Judge

USAGE = "python -m dash_exp.judge dataset=<option> [completions=<jsonl>] [key=value ...]"
ID_FIELDS = ("id", "prompt")
TEXT_FIELDS = ("completion", "text", "solution")
USED = ("dataset", "verifier", "paths", "config", "hydra")
"""Where a fault of the whole config matters here."""
SHOWN = 20
"""Verdicts other than `correct` that are listed."""


@dataclass(frozen=True, slots=True)
class Gold:
    """An example of a dataset, with its judge."""

    example: Example
    data: DatasetConfig
    judge: Judge


@dataclass(frozen=True, slots=True)
class Answer:
    """A text to be judged as the answer to one example. `finish_reason`, `tokens`: where the file has
    them."""

    gold: Gold
    text: str
    finish_reason: FinishReason = "stop"
    tokens: int = 0

    def facts(self) -> Facts:
        return Facts(json.dumps(dict(self.gold.example.fields), default=str), self.finish_reason, self.tokens)


def reference(example: Example, data: DatasetConfig) -> str:
    """The dataset's own solution; where it has none, or one in which the answer is not marked as the
    extraction wants it, only the gold answer: an integer as it is, anything else in a box."""
    if example.solution and not unmarked(example, data):
        return example.solution
    plain = data.verifier == "integer" or is_reference(data.verifier)
    return example.answer if plain else f"\\boxed{{{example.answer}}}"


def references(golds: Sequence[Gold]) -> list[Answer]:
    """The answer each example should get. Raises UserError if only the task's own checks know it."""
    blind = [g for g in golds if g.data.verifier in ("code", "reasoning_gym") and not g.example.solution]
    if blind:
        what = f"{len(blind)} examples have no reference solution, e.g. {blind[0].example.id}"
        raise UserError(Fault("dataset", what, "judge completions instead: completions=<jsonl>"))
    return [Answer(gold, reference(gold.example, gold.data)) for gold in golds]


def unmarked(example: Example, data: DatasetConfig) -> bool:
    """Whether a worked solution marks no answer that the extraction finds, or several of which the gold
    answer is only the last: `$\\boxed{1}$ and $\\boxed{9}$`."""
    if not example.solution or data.verifier != "math":
        return False
    found, gold = extract(example.solution, data.extraction), example.answer
    last = (
        bool(found) and str(found).endswith((f", {gold}", f" {gold}")) and f"{{{gold}}}" in example.solution
    )
    return not found or last


def config_of(overrides: Sequence[str]) -> Config:
    """The config, of which the dataset and the verifier are used. Raises UserError with their faults."""
    stand_ins = ["evaluation=none", "model=tiny"]  # nothing of theirs is needed
    written = {text.partition("=")[0] for text in overrides}
    if written & {"dataset.path", "dataset.kind"}:
        stand_ins.append("dataset=own")  # unless another is written
    overrides = [*(s for s in stand_ins if s.partition("=")[0] not in written), *overrides]
    faults = find_faults(overrides, checked=False)
    if not faults:
        config = compose(overrides)
        faults = [f for f in check(config) if is_below(f.where, USED)]
    if faults:
        raise UserError(faults)
    return resolve_paths(config)


def load_golds(config: Config, judges: Judges) -> list[Gold]:
    """Every example of the dataset, and of what is mixed into it."""
    faults: list[Fault] = []
    golds: list[Gold] = []
    for data in parts_of(config.dataset).values():
        try:
            examples = load_examples(data).examples[: data.limit]
        except UserError as error:
            faults.extend(error.faults)
            continue
        judge = judges.get(data.verifier, data.extraction)
        golds += [Gold(example, data, judge) for example in examples]
    if faults:
        raise UserError(faults)
    return golds


def read_answers(path: Path, golds: Sequence[Gold]) -> list[Answer]:
    """The completions of a file, each beside its example. Of a cell's samples the rows of the last attempt
    count, and lines torn by a crash are left out. Raises UserError with every faulty line (the first 20).
    """
    read = [(f"{path}:{number}", row) for number, row in read_lines(path)]
    rows = [(where, row) for where, row in read if not isinstance(row, Fault)]
    faults = [row for _, row in read if isinstance(row, Fault)]
    if rows and all("attempt" in row for _, row in rows):  # a record: its torn lines are known to it
        faults = []
        if all("step" in row for _, row in rows):
            kept = {id(row) for row in last_attempts(row for _, row in rows)}
            rows = [(where, row) for where, row in rows if id(row) in kept]
    by_id: dict[str, list[Gold]] = {}
    for gold in golds:
        by_id.setdefault(gold.example.id, []).append(gold)
    prefixes = dict.fromkeys(gold.data.id_prefix for gold in golds)
    answers = []
    for where, row in rows:
        made = _answer(where, row, by_id, prefixes)
        if isinstance(made, Fault):
            faults.append(made)
        else:
            answers.append(made)
    if not rows and not faults:
        faults.append(Fault(str(path), "has no rows", "one JSON object per line is expected"))
    if faults:
        raise UserError(first_faults(faults, str(path)))
    return answers


def _answer(
    where: str, row: Row, by_id: Mapping[str, Sequence[Gold]], prefixes: Iterable[str]
) -> Answer | Fault:
    name, text = _first(row, ID_FIELDS) or _task_id(row), _first(row, TEXT_FIELDS)
    lacking = [
        " or ".join(map(repr, fields))
        for fields, value in ((ID_FIELDS, name), (TEXT_FIELDS, text))
        if value is None
    ]
    if lacking:
        return Fault(where, f"lacks {' and '.join(lacking)} as text", f"it has {', '.join(map(repr, row))}")
    found = next((by_id[known] for known in names_of(str(name), prefixes) if known in by_id), ())
    if not found:
        return Fault(where, f"the dataset has no example {name!r}", "is it another dataset, or split?")
    if len(found) > 1:
        return Fault(where, f"{name!r} is in several parts of the mixture", "judge one dataset at a time")
    tokens = row.get("tokens")
    finish: FinishReason = "length" if row.get("finish") == "length" else "stop"
    return Answer(found[0], str(text), finish, tokens if isinstance(tokens, int) else 0)


def names_of(given: str, prefixes: Iterable[str]) -> Iterator[str]:
    """An id as it is, then as datasets of these prefixes name it: `HumanEval/7` and `humanevalplus-7` are
    `humaneval-7`. A name of another dataset is not changed."""
    yield given
    stem = _letters(given.rstrip("0123456789"))
    for prefix in prefixes:
        ours = _letters(prefix)
        if ours and (stem.startswith(ours) or ours.startswith(stem)):
            yield row_id(given, prefix)


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))


def _first(row: Row, names: Sequence[str]) -> str | None:
    return next((row[name] for name in names if isinstance(row.get(name), str)), None)


def _task_id(row: Row) -> str | None:
    """What HumanEval's and MBPP's samples name a task by, where they do."""
    return str(row["task_id"]) if type(row.get("task_id")) in (str, int) else None


def judge_all(answers: Sequence[Answer]) -> Iterator[tuple[Answer, Score]]:
    """Each answer with its verdict, in their order."""
    waiting = [(a, a.gold.judge.submit(a.text, a.gold.example.answer, a.facts())) for a in answers]
    for answer, future in waiting:
        yield answer, future.result()


def report(name: str, verdicts: Sequence[tuple[Answer, Score]]) -> list[str]:
    """The exceptions, a table of outcomes, and the JSON line."""
    counts = Counter(score.outcome for _, score in verdicts)
    odd = [(a.gold.example.id, s) for a, s in verdicts if s.outcome != "correct"]
    lines = [f"  {where}: {s.outcome}, {' '.join(s.detail.split())}".rstrip(", ") for where, s in odd[:SHOWN]]
    if len(odd) > SHOWN:
        lines.append(f"  and {len(odd) - SHOWN} more")
    n = len(verdicts)
    lines += ["", f"  {'outcome':<16} {'n':>8} {'share':>8}"]
    lines += [f"  {outcome:<16} {count:>8} {count / n:>8.3f}" for outcome, count in counts.most_common()]
    partial = [s.value for _, s in verdicts if 0 < s.value < 1]
    if partial:
        lines.append(f"  {len(partial)} of them earn a fraction of the reward")
    summary = {"dataset": name, "n": n, "outcomes": dict(sorted(counts.items()))}
    return [*lines, "", json.dumps(summary)]


def run(arguments: Sequence[str]) -> int:
    own = [text.partition("=")[2] for text in arguments if text.startswith("completions=")]
    completions = own[-1] if own else None
    config = config_of([text for text in arguments if not text.startswith("completions=")])
    judges = Judges(**vars(config.verifier))
    start = time.monotonic()
    try:
        golds = load_golds(config, judges)
        answers = (
            references(golds) if completions is None else read_answers(Path(completions).expanduser(), golds)
        )
        what = "reference solutions" if completions is None else "completions"
        odd = [g.example.id for g in golds if completions is None and unmarked(g.example, g.data)]
        versions = ", ".join(dict.fromkeys(gold.judge.version for gold in golds))
        print(f"{config.dataset.name}: {len(answers)} {what}, judged by {versions}", flush=True)
        if odd:
            shown = ", ".join(odd[:SHOWN]) + (", ..." if len(odd) > SHOWN else "")
            print(f"note: the gold answer stands for {len(odd)} of them, which mark none or several: {shown}")
        verdicts = list(judge_all(answers))
        for warning in judges.warnings:
            print(f"note: {warning}")
    finally:
        judges.close()
    lines = report(config.dataset.name, verdicts)
    lines[-1:] = [f"  in {format_seconds(time.monotonic() - start)}", "", lines[-1]]
    print(printable("\n".join(lines)), flush=True)
    return ExitCode.OK


def main(arguments: Sequence[str]) -> int:
    return run_command(run, arguments, f"usage: {USAGE}\n\n{__doc__}", "nothing was kept.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
