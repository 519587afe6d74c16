"""Examples: a question and its gold answer, from a file, the hub, or generated. Torch-free."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dash_exp.errors import Fault, UserError
from dash_exp.seeding import permutation

REQUIRED = ("problem", "answer")
MAX_FAULTS = 20


@dataclass(frozen=True, slots=True)
class Example:
    """A question with its gold answer (see `Prompt.answer`). `solution` is a worked one, if there is
    any: what SFT-H learns and the verifier is tried on. `first_test` is a code task's first assertion,
    which its prompt may show."""

    id: str
    problem: str
    answer: str
    solution: str = ""
    first_test: str = ""


@dataclass(frozen=True, slots=True)
class ExampleSet:
    """Examples in the order of their source, and a hash of all of them."""

    name: str
    examples: tuple[Example, ...]
    origin: str

    @property
    def content_hash(self) -> str:
        digest = hashlib.sha256()
        for e in self.examples:
            digest.update(json.dumps([e.id, e.problem, e.answer], ensure_ascii=False).encode())
        return digest.hexdigest()


def read_jsonl(
    path: Path, name: str, fields: Mapping[str, Sequence[str]], answer_after: str | None = None
) -> ExampleSet:
    """Read a JSON-lines file. `fields` maps `problem`, `answer` and `id` to the names accepted, the
    first present winning; an absent id becomes `<name>-<line>`.

    Raises UserError naming file and line of every faulty line (the first 20).
    """
    faults: list[Fault] = []
    rows: list[Example] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                found = _parse_line(line, f"{path}:{number}")
                if isinstance(found, Fault):
                    faults.append(found)
                    continue
                made = to_example(found, f"{path}:{number}", f"{name}-{number}", fields, answer_after)
                if isinstance(made, Fault):
                    faults.append(made)
                else:
                    rows.append(made)
    except UnicodeDecodeError as error:
        faults.append(Fault(str(path), f"is not UTF-8 text: {error.reason} at byte {error.start}"))
    except OSError as error:
        faults.append(Fault(str(path), f"cannot be read: {error.strerror}"))
    faults += _repeated_ids(rows, path)
    if not rows and not faults:
        faults.append(Fault(str(path), "has no rows", "one JSON object per line is expected"))
    if faults:
        more = len(faults) - MAX_FAULTS
        extra = [Fault(str(path), f"and {more} more faulty lines")] if more > 0 else []
        raise UserError(faults[:MAX_FAULTS] + extra)
    return ExampleSet(name, tuple(rows), str(path))


def _parse_line(line: str, where: str) -> dict[str, Any] | Fault:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return Fault(where, f"is not JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        return Fault(where, "is nested too deeply")
    if not isinstance(row, dict):
        return Fault(where, f"expected an object, got {type(row).__name__}")
    return row


def to_example(
    row: Mapping[str, Any], where: str, fallback_id: str,
    fields: Mapping[str, Sequence[str]], answer_after: str | None,
) -> Example | Fault:  # fmt: skip
    """One row of a source as an example, or the fault that prevents it."""
    values: dict[str, str] = {}
    for ours in (*REQUIRED, "id"):
        names = fields.get(ours, [ours])
        name = next((n for n in names if n in row), None)
        if name is None:
            if ours == "id":
                continue
            return Fault(
                where,
                f"lacks the field {' or '.join(map(repr, names))}",
                f"it has {', '.join(map(repr, row))}; map it with dataset.fields.{ours}=[<name>]",
            )
        value = row[name]
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            return Fault(where, f"field {name!r}: expected text, got {type(value).__name__}")
        values[ours] = str(value)
    if answer_after and answer_after in values["answer"]:
        values["answer"] = values["answer"].rpartition(answer_after)[2].strip()
    for ours in REQUIRED:
        if not values[ours].strip():
            return Fault(where, f"the {ours} is empty")
    return Example(values.get("id", fallback_id), values["problem"], values["answer"])


def _repeated_ids(rows: Iterable[Example], path: Path) -> list[Fault]:
    seen: set[str] = set()
    faults = []
    for row in rows:
        if row.id in seen:
            faults.append(Fault(str(path), f"the id {row.id!r} occurs twice"))
        seen.add(row.id)
    return faults


def read_hub(
    name: str, repository: str, config: str | None, split: str,
    fields: Mapping[str, Sequence[str]], answer_after: str | None,
) -> ExampleSet:  # fmt: skip
    """Read a dataset of the hub by name. Raises UserError when it cannot be had."""
    import datasets

    try:
        loaded = datasets.load_dataset(repository, config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            Fault(
                "dataset.hub",
                f"{repository!r} could not be loaded: {reason}",
                "offline? name a file with dataset.path=<file>.jsonl, or a folder with DASH_DATA",
            )
        ) from error
    rows = []
    for number, row in enumerate(loaded):
        made = to_example(row, f"{repository}[{split}]:{number}", f"{name}-{number}", fields, answer_after)
        if isinstance(made, Fault):
            raise UserError(made)
        rows.append(made)
    return ExampleSet(name, tuple(rows), f"hub:{repository}/{config or 'default'}/{split}")


HELD_OUT_SUMS = 500
SPLIT_SEED = 20250518  # fixed for good: the split must be the same in every run


def arithmetic(split: str) -> ExampleSet:
    """Two-digit additions x + y, x and y in 10..99, after two worked examples.

    All 8,100 pairs in one fixed random order: the first 500 are `test`, the rest `train`.
    """
    order = permutation(SPLIT_SEED, 90 * 90)
    chosen = order[:HELD_OUT_SUMS] if split == "test" else order[HELD_OUT_SUMS:]
    rows = []
    for code in chosen.tolist():
        x, y = 10 + code // 90, 10 + code % 90
        problem = f"12 + 37 = 49\n58 + 24 = 82\n{x} + {y} ="
        rows.append(Example(f"{x}+{y}", problem, str(x + y)))
    return ExampleSet("arithmetic", tuple(rows), f"generated:arithmetic/{split}")
