"""The part of run folders that a report is made from, small enough to publish beside a paper."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from dash_exp.errors import Fault, UserError
from dash_exp.record.reading import read_rows

from .load import Records
from .timeline import step_events

WHOLE = ("config.yaml", "status.json", "provenance.json", "steps.jsonl", "evals.jsonl")


def keep(records: Records, target: Path) -> int:
    """Copy what the analysis reads of each cell to `target/cells`: no weights, samples or logs, verdicts of
    the first and the last evaluation, events of one step. Returns the bytes written. Raises UserError if
    `target` holds files."""
    if target.exists() and any(target.iterdir()):
        raise UserError(Fault(str(target), "holds files already", "name a new folder"), "nothing was written")
    for name, cell in records.cells.iterrows():
        source, place = Path(str(cell["folder"])), target / "cells" / str(name)
        place.mkdir(parents=True)
        for file in WHOLE:
            if (source / file).is_file():
                shutil.copyfile(source / file, place / file)
        ends = {0, int(cell["step"])}
        verdicts = [r for r in read_rows(source / "eval_samples.jsonl").rows if r["step"] in ends]
        for file, rows in (("eval_samples.jsonl", verdicts), ("events.jsonl", step_events(source))):
            if rows:
                lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                (place / file).write_text("".join(lines), encoding="utf-8")
    return sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
