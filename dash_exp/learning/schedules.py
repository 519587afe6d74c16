"""How the learning rate and the KL coefficient change over the planned updates. Pure functions.

A schedule depends on the plan alone: a skipped update counts, and a budget that ends a run early
changes no value before its end.
"""

from __future__ import annotations

import math


def learning_rate(update: int, *, lr: float, schedule: str, warmup_share: float, total: int) -> float:
    """The rate of update number `update` (from 0): linear warm-up over a share of the planned updates
    (rounded up), then constant or linear to 0 over the rest."""
    warmup = math.ceil(warmup_share * total)
    if update < warmup:
        return lr * (update + 1) / warmup
    if schedule == "constant":
        return lr
    return lr * max(0, total - update) / max(1, total - warmup)


def kl_coefficient(update: int, *, beta: float, schedule: str, total: int) -> float:
    """beta of update number `update` (from 0): constant, or linear to 0 over the planned updates."""
    return beta if schedule == "constant" else beta * max(0, total - update) / total
