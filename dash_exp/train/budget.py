"""A budget taken from a partner: as much training time as another cell had (Table 5), tokens, or updates.

`budget.match` names the partner by its cell id, or by what makes it from this cell: `dash` for
`algorithm=dash`, or overrides such as `experiment=paper/math_dash_0.5b`. The latter are turned into the
id before the cell is frozen, so a cell's identity always holds its partner's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from dash_exp.config.compose import CELL_ID, MATCH, compose, partner_of, partner_overrides, without_budget
from dash_exp.config.schema import Config, changed
from dash_exp.errors import Fault, UserError
from dash_exp.record.folder import Row, read_final, read_json
from dash_exp.record.identity import make_cell
from dash_exp.record.ledger import COUNTED, SECONDS, training_seconds
from dash_exp.record.reading import read_config

COMPARED = ("cpu", "threads", "gpus")
"""Of what provenance knows of a machine; nodes of one kind differ by a little memory."""
COMPARABLE = "seconds are comparable for equal seed, model and hardware only"


class Blocked(Exception):
    """The partner is not finished yet; the message says what it is waiting for."""


@dataclass(frozen=True, slots=True)
class Partner:
    """A finished cell: its folder's name, what it used in the unit of the budget, the machines it ran on, and
    the hash of the weights it started from."""

    name: str
    spent: float
    machines: tuple[dict[str, Any], ...]
    weights: str | None


def resolve_match(config: Config, overrides: Sequence[str], cache: Path) -> tuple[Config, list[str] | None]:
    """The config with its partner's cell id in place of a description; a cell that is its own partner has no
    budget, so that one sweep can hold both. Also the overrides that make the partner, None where they are not
    known or there is none.

    Raises UserError with everything that is wrong with the partner.
    """
    match = config.budget.match
    if match is None or CELL_ID.fullmatch(match):
        return config, None
    faults, partner = partner_of(match, overrides, compose)
    if partner is None:
        raise UserError(faults)
    own = make_cell(without_budget(config), cache).id
    theirs = make_cell(partner, cache).id
    if theirs == own:
        return changed(config, {"budget.match": None}), None
    return changed(config, {"budget.match": theirs}), partner_overrides(match, overrides)


def refuse(what: str, hint: str) -> NoReturn:
    """Raise UserError about the partner."""
    raise UserError(Fault(MATCH, what, hint), "nothing was trained")


def find_partner(config: Config, pool: Path) -> Partner:
    """The finished partner of this cell among the cells of a pool.

    Raises Blocked until it is finished; UserError when it failed, or has another seed or model.
    """
    match = config.budget.match
    matches = sorted(pool.glob(f"*-{match}"))
    if not matches:
        raise Blocked(f"waits for its partner {match}, which has not been started")
    folder = matches[0]
    status = read_json(folder / "status.json")
    state = status.get("state", "pending")
    if state in ("failed", "cancelled"):
        refuse(
            f"the partner {folder.name} {state}: {status.get('failure') or 'no reason is known'}",
            "fix and run the partner, then this cell again",
        )
    if state != "finished":
        raise Blocked(f"waits for its partner {folder.name}, which is {state} (step {status.get('step', 0)})")
    frozen = read_config(folder)
    if frozen.damage:
        raise UserError([one.fault("restore the partner's record") for one in frozen.damage])
    theirs = frozen.value
    mine = {"seed": config.seed, "model": config.model.name}
    other = {"seed": theirs["seed"], "model": theirs["model"]["name"]}
    if mine != other:
        refuse(f"the partner {folder.name} has {other}, this cell {mine}", COMPARABLE)
    spent = spent_of(read_final(folder, "steps"), config.budget.unit)
    if spent == 0:
        what = f"the partner {folder.name} has {amount_of(spent, config.budget.unit)}"
        raise UserError(Fault(MATCH, what, "name one that was trained, or another budget.unit"))
    facts = read_json(folder / "provenance.json")
    attempts = facts.get("attempts", [])
    machines = tuple(a["hardware"] for a in attempts if "hardware" in a) or (facts.get("hardware", {}),)
    return Partner(folder.name, spent, machines, facts.get("model", {}).get("weights_hash"))


def check_equal(partner: Partner, here: dict[str, Any] | None, weights: str) -> None:
    """Raises UserError when the partner started from other weights, or ran on another machine than `here`
    (None: that does not matter)."""
    if partner.weights != weights:
        refuse(f"the partner {partner.name} started from other weights than this cell", COMPARABLE)
    if here is None:
        return
    different = {k: there.get(k) for there in partner.machines for k in COMPARED if there.get(k) != here[k]}
    if different:
        listed = ", ".join(f"{k} {value!r} there, {here[k]!r} here" for k, value in different.items())
        refuse(
            f"the partner {partner.name} ran on other hardware: {listed}",
            "run both on one kind of machine, or set budget.seconds instead",
        )


def spent_of(rows: Sequence[Row], unit: str) -> float:
    """What these steps used of a budget in `unit`; of a repeated step only the last."""
    return spent_seconds(rows) if unit == SECONDS else float(sum(row[COUNTED[unit]] for row in rows))


def amount_of(spent: float, unit: str) -> str:
    """A budget in words."""
    words = {SECONDS: "s of training", "tokens": "tokens sampled", "backpropagated": "tokens backpropagated"}
    return f"{spent:.1f} {words[unit]}" if unit == SECONDS else f"{spent:.0f} {words.get(unit, unit)}"


def spent_seconds(rows: Sequence[Row]) -> float:
    """Training seconds of these steps: neither evaluation nor checkpoints; of a repeated step only the
    last."""
    phases = ("evaluate", "checkpoint")
    spent = [training_seconds(r["time/step_s"], {p: r[f"time/{p}_s"] for p in phases}) for r in rows]
    return float(sum(spent))
