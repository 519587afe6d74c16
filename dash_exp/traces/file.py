"""The file of traces, while it grows and when it is complete.

<out>.jsonl             one row per trace, in the dataset's order; there once everything is sampled
<out>.provenance.json   how it was made: settings, counts, teacher, data, code
<out>.partial.jsonl     until then: the settings, then one line per prompt, as they are done
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dash_exp.errors import Fault, UserError
from dash_exp.evaluation.metrics import UNRELIABLE
from dash_exp.record.folder import Row, read_json, read_rows, replace_text, write_json
from dash_exp.text import format_path
from dash_exp.types import Completion, Score

COUNTED = ("sampled", "correct", "duplicates", "truncated", "failed", "kept", "tokens")
OTHER_FILE = "choose another file with traces.out=, or move this one away"


@dataclass(frozen=True, slots=True)
class TraceFile:
    """Where traces go, and the settings they are made with: a file never mixes two settings."""

    out: Path
    settings: Mapping[str, Any]

    @property
    def partial(self) -> Path:
        return self.out.with_suffix(".partial.jsonl")

    @property
    def provenance(self) -> Path:
        return self.out.with_suffix(".provenance.json")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Lock the file. Raises UserError if another process samples into it."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.out.with_suffix(".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            what, hint = "another process is sampling into it", "wait for it, or choose traces.out="
            raise UserError(Fault(format_path(self.out), what, hint)) from error
        try:
            yield
        finally:
            lock.release()

    def finished(self) -> Row | None:
        """The provenance of the complete file, or None if there is none. Raises UserError for a file made
        with other settings."""
        if not self.out.exists():
            return None
        facts = read_json(self.provenance)
        if not facts:
            what = f"is there, but not its {self.provenance.name}: nobody knows how it was made"
            raise UserError(Fault(format_path(self.out), what, OTHER_FILE))
        self._refuse_others(self.out, facts.get("settings", {}))
        return facts

    def begin(self) -> dict[str, Row]:
        """The lines of prompts that are done, by prompt. A torn last line is dropped; settings come first.
        Raises UserError for a partial file made with other settings."""
        _drop_torn_line(self.partial)
        rows = read_rows(self.partial).rows
        if not rows:
            self.append({"settings": dict(self.settings)})
            return {}
        self._refuse_others(self.partial, rows[0].get("settings", {}))
        return {row["id"]: row for row in rows[1:]}

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one line to the partial file."""
        with self.partial.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")

    def finish(self, done: Mapping[str, Row], order: Sequence[str], facts: Mapping[str, Any]) -> None:
        """Write the complete file, in the order of these prompts, and drop the partial one. May be stopped
        anywhere and repeated: the file appears last, and at once."""
        write_json(self.provenance, {**facts, "settings": dict(self.settings)})
        traces = (trace for name in order for trace in done[name]["traces"])
        replace_text(self.out, "".join(json.dumps(trace, ensure_ascii=False) + "\n" for trace in traces))
        self.partial.unlink(missing_ok=True)

    def _refuse_others(self, path: Path, found: Mapping[str, Any]) -> None:
        now = json.loads(json.dumps(dict(self.settings)))
        if now == found:
            return
        differing = [key for key in {**found, **now} if found.get(key) != now.get(key)]
        faults = []
        for key in differing:
            what = f"was made with {key} {_brief(found.get(key))}, not {_brief(now.get(key))}"
            faults.append(Fault(format_path(path), what, OTHER_FILE if key == differing[-1] else ""))
        raise UserError(faults)


def _brief(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 160 else f"{text[:160]}..."


def _drop_torn_line(path: Path) -> None:
    """Cut a file after its last complete line."""
    if not path.exists():
        return
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        os.truncate(path, end)


def prompt_line(
    name: str,
    problem: str,
    solutions: Sequence[str],
    completions: Sequence[Completion],
    scores: Sequence[Score],
) -> Row:
    """What is kept of a prompt's completions: each correct solution once, the first time it was sampled;
    and how many there were of each kind."""
    traces: dict[str, Row] = {}
    correct = 0
    for index, (text, completion, score) in enumerate(zip(solutions, completions, scores, strict=True)):
        if score.outcome != "correct" or not text.strip():
            continue
        correct += 1
        traces.setdefault(
            text,
            {
                "id": name,
                "problem": problem,
                "solution": text,
                "tokens": len(completion.token_ids),
                "index": index,
                "finish": completion.finish_reason,
            },
        )
    return {
        "id": name,
        "sampled": len(completions),
        "correct": correct,
        "duplicates": correct - len(traces),
        "truncated": sum(c.finish_reason == "length" for c in completions),
        "failed": sum(s.outcome in UNRELIABLE for s in scores),
        "kept": len(traces),
        "tokens": sum(len(c.token_ids) for c in completions),
        "traces": list(traces.values()),
    }


def totals(lines: Iterable[Row]) -> dict[str, int]:
    """The counts of prompts' lines, summed; `solved`: prompts with a trace."""
    counts: Counter[str] = Counter(dict.fromkeys(("prompts", "solved", *COUNTED), 0))
    for line in lines:
        counts.update({name: line[name] for name in COUNTED})
        counts.update(prompts=1, solved=int(line["kept"] > 0))
    return dict(counts)
