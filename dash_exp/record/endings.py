"""What launchers write about a cell that its own process did not, or could not, write. Torch-free."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from dash_exp.record import journal
from dash_exp.record.folder import CellBusy, Row, lock, read_json, write_json


def say_state(folder: Path, state: str, **more: object) -> bool:
    """Record a state: `failed` for a process that died without a word, `blocked`, or `cancelled`. Returns
    whether it was written: not while somebody runs the cell, who then says it better, and never over
    `finished`."""
    try:
        held = lock(folder)
    except (CellBusy, OSError):
        return False
    try:
        known = read_json(folder / "status.json")
        if known.get("state") == "finished":
            return False
        kept = {k: v for k, v in known.items() if k != "reason"}
        write_json(
            folder / "status.json",
            {
                "attempt": 0,
                "step": 0,
                **kept,
                "failure": None,
                **more,
                "state": state,
                "heartbeat": time.time(),
            },
        )
    except OSError:
        return False
    finally:
        os.close(held)
    return True


def note_end(folder: Path, exit_code: int, failure_class: str | None) -> None:
    """The `end` row, with the step that was reached: budgets of retries count anew when it grows."""
    step = int(read_json(folder / "status.json").get("step", 0))
    journal.note(folder, "end", exit=exit_code, failure_class=failure_class, step=step)


def is_done(folder: Path) -> bool:
    """Whether there is nothing left to do for a cell. One that was killed between its end and its tidying
    says `finished`, but still has what only a resumed run needs: another start removes it."""
    finished = read_json(folder / "status.json").get("state") == "finished"
    return finished and not any(folder.glob("checkpoints/*/resume"))


def is_cancelled(rows: Sequence[Row]) -> bool:
    """Whether a person asked for the cell's end, and nobody has asked for another start since."""
    last = next((r["kind"] for r in reversed(rows) if r["kind"] in ("queued", "retry", "cancel")), None)
    return last == "cancel"
