"""Who the partner of `budget.match` is, as a config of its own. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from copy import deepcopy

from dash_exp.config.checks import check
from dash_exp.config.schema import Config
from dash_exp.errors import Fault, UserError

CELL_ID = re.compile(r"[0-9a-f]{8}")
KEY = "budget.match"
ARM_ONLY = ("name", "source", "surrogate", "clip_low", "clip_high", "passes", "mini_batch", "filters")
"""What makes an arm with several updates what it is; sizes, beta and the rest hold for its partner too."""
HINT = "name a cell id, an arm (dash), or overrides (experiment=...)"


def partner_overrides(match: str, overrides: Sequence[str]) -> list[str]:
    """The overrides of the partner: this cell's, without its budget, without what `match` sets anew, and,
    where that is another arm (by itself or by an experiment), without what only this arm means."""
    wanted = match.split() if "=" in match else [f"algorithm={match}"]
    replaced = {text.partition("=")[0] for text in wanted}
    if replaced & {"algorithm", "experiment"}:
        replaced |= {"algorithm", *(f"algorithm.{name}" for name in ARM_ONLY)}
    kept = [
        text
        for text in overrides
        if (key := text.lstrip("+~").partition("=")[0]) not in replaced and not key.startswith("budget")
    ]
    return [*kept, *wanted]


def partner_of(
    match: str, overrides: Sequence[str], compose: Callable[[Sequence[str]], Config]
) -> tuple[list[Fault], Config | None]:
    """The partner's config without a budget, or everything that is wrong with it."""
    try:
        partner = without_budget(compose(partner_overrides(match, overrides)))
        faults = check(partner)
    except UserError as error:
        faults = error.faults
    return (told(match, faults), None) if faults else ([], partner)


def told(match: str, faults: Sequence[Fault]) -> list[Fault]:
    """Faults of a partner, as faults of the cell that names it."""
    return [Fault(KEY, f"its partner {match!r}: {f.where}: {f.what}", f.hint or HINT) for f in faults]


def without_budget(config: Config) -> Config:
    """The same config with nothing to end it early."""
    copied = deepcopy(config)
    copied.budget.seconds = copied.budget.match = None
    return copied
