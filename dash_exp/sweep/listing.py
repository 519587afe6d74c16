"""All sweeps there are: files of sweeps/, and what was launched here, from a file or by -m. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from dash_exp.errors import Fault, UserError
from dash_exp.sweep import spec as specs
from dash_exp.sweep.lookup import launched
from dash_exp.sweep.report import counts_text
from dash_exp.sweep.spec import combinations
from dash_exp.sweep.status import SweepState, read_sweeps


@dataclass(frozen=True, slots=True)
class Listed:
    """A sweep. `combinations`: of its file, before duplicates are dropped; `counts`: of its cells by state,
    None where it was not launched here."""

    name: str
    claim: str
    feeds: tuple[str, ...]
    combinations: int | None
    counts: dict[str, int] | None
    source: str | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def view(self) -> list[RenderableType]:
        head = Text(self.name, style="bold")
        facts = [f"feeds {', '.join(self.feeds)}"] if self.feeds else []
        if self.combinations is not None:
            facts.append("1 cell" if self.combinations == 1 else f"{self.combinations} cells")
        here = "not launched here" if self.counts is None else f"here {counts_text(self.counts)}"
        body = Text("\n".join([*([self.claim] if self.claim else []), "; ".join([*facts, here])]))
        return [head, Padding(body, (0, 0, 0, 2))]


def listing(root: Path) -> tuple[list[Listed], list[Fault]]:
    """Every sweep, those of sweeps/ first, and what is wrong with their files."""
    there, faults = launched(root)
    states = {state.manifest.name: state for state in read_sweeps(there)}
    rows = []
    for name in specs.names():
        try:
            spec = specs.load(name)
            count = len(combinations(spec))
        except UserError as error:
            faults += error.faults
            continue
        counts = states.pop(name).counts if name in states else None
        rows.append(Listed(name, spec.claim, spec.feeds, count, counts, str(spec.source)))
    return rows + [_launched_only(state) for state in states.values()], faults


def _launched_only(state: SweepState) -> Listed:
    about = state.manifest.about
    feeds = about.get("feeds")
    named = tuple(map(str, feeds)) if isinstance(feeds, list) else ()
    source = about.get("source")
    claim = str(about.get("claim") or "by -m")
    return Listed(state.manifest.name, claim, named, None, state.counts, str(source) if source else None)


def views(rows: Sequence[Listed]) -> list[RenderableType]:
    return [part for row in rows for part in row.view()] or [Text("no sweeps")]
