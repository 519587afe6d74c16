"""A budget taken from a partner: train as long as another cell did (Table 5). Torch-free.

`budget.match` names the partner by its cell id, or by what makes it from this cell: `dash` for
`algorithm=dash`, or overrides such as `experiment=paper/math_dash_0.5b`. The latter are turned into the
id before the cell is frozen, so a cell's identity always holds its partner's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dash_exp.cells import make_cell
from dash_exp.compose import compose
from dash_exp.config import Config
from dash_exp.errors import Fault, UserError
from dash_exp.ledger import training_seconds
from dash_exp.partners import CELL_ID, KEY, partner_of, without_budget
from dash_exp.record import Row, read_final, read_json

COMPARED = ("cpu", "threads", "gpus")
"""Of what provenance says of a machine; nodes of one kind differ by a little memory."""


class Blocked(Exception):
    """The partner is not finished yet; the message says what it is waiting for."""


@dataclass(frozen=True, slots=True)
class Partner:
    """A finished cell: its folder's name, its training time, and the machine it ran on."""

    name: str
    seconds: float
    hardware: dict[str, Any]


def resolve_match(config: Config, overrides: Sequence[str], cache: Path) -> None:
    """Replace the partner's description in `config` by its cell id; a cell that is its own partner has
    no budget, so that one sweep can hold both.

    Raises UserError with everything that is wrong with the partner.
    """
    match = config.budget.match
    if match is None or CELL_ID.fullmatch(match):
        return
    faults, partner = partner_of(match, overrides, compose)
    if partner is None:
        raise UserError(faults)
    own = make_cell(without_budget(config), cache).id
    theirs = make_cell(partner, cache).id
    config.budget.match = None if theirs == own else theirs


def find_partner(config: Config, pool: Path) -> Partner:
    """The finished partner of this cell among the cells of a pool.

    Raises Blocked until it is finished; UserError when it failed, or has another seed or model.
    """
    match = config.budget.match
    found = sorted(pool.glob(f"*-{match}"))
    if not found:
        raise Blocked(f"waits for its partner {match}, which has not been started")
    folder = found[0]
    status = read_json(folder / "status.json")
    state = status.get("state", "pending")
    if state in ("failed", "cancelled"):
        raise UserError(
            Fault(KEY, f"the partner {folder.name} {state}: {status.get('failure') or 'no reason is known'}",
                  "mend and run the partner, then this cell again"),
            "nothing was trained",
        )  # fmt: skip
    if state != "finished":
        raise Blocked(f"waits for its partner {folder.name}, which is {state} (step {status.get('step', 0)})")
    theirs = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    mine = {"seed": config.seed, "model": config.model.name}
    other = {"seed": theirs["seed"], "model": theirs["model"]["name"]}
    if mine != other:
        raise UserError(
            Fault(KEY, f"the partner {folder.name} has {other}, this cell {mine}",
                  "seconds are comparable for equal seed, model and hardware only"),
            "nothing was trained",
        )  # fmt: skip
    seconds = spent_seconds(read_final(folder, "steps"))
    return Partner(folder.name, seconds, read_json(folder / "provenance.json").get("hardware", {}))


def check_hardware(partner: Partner, here: dict[str, Any]) -> None:
    """Raises UserError when the partner ran on another machine than this one."""
    different = [key for key in COMPARED if partner.hardware.get(key) != here.get(key)]
    if different:
        told = ", ".join(f"{k} {partner.hardware.get(k)!r} there, {here.get(k)!r} here" for k in different)
        raise UserError(
            Fault(KEY, f"the partner {partner.name} ran on other hardware: {told}",
                  "run both on one kind of machine, or set budget.seconds instead"),
            "nothing was trained",
        )  # fmt: skip


def spent_seconds(rows: Sequence[Row]) -> float:
    """Training seconds of these steps: neither evaluation nor checkpoints; redone steps come once."""
    phases = ("evaluate", "checkpoint")
    spent = [training_seconds(r["time/step_s"], {p: r[f"time/{p}_s"] for p in phases}) for r in rows]
    return float(sum(spent))
