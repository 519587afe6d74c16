"""What the paper printed (arXiv 2505.17218), read from the data files beside this module. Facts only; values
of Figure 5 are read off the plot."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent / "paper"
MODELS = {"qwen0.5b": "qwen2.5-0.5b", "qwen1.5b": "qwen2.5-1.5b", "qwen3b": "qwen2.5-3b"}
"""Our model options by the paper's names."""
SETS = {"math500": "math500", "gsm8k": "gsm8k"}
HOURS = {"hours": 1.0, "minutes": 1 / 60}


@cache
def _results() -> dict[tuple[str, str, str, str], tuple[float, str]]:
    with (FOLDER / "results.csv").open(encoding="utf-8") as stream:
        return {
            (row["task"], row["model"], row["method"], row["metric"]): (float(row["value"]), row["unit"])
            for row in csv.DictReader(stream)
        }


def percent(task: str, model: str, arm: str, metric: str) -> float | None:
    """An accuracy or pass@k in percent; None where the paper has none. `model`: our option's name."""
    found = _results().get((task, MODELS.get(model, ""), arm, metric))
    return found[0] if found else None


def seconds(task: str, model: str, arm: str) -> float | None:
    """A training time."""
    found = _results().get((task, MODELS.get(model, ""), arm, "train_time"))
    return found[0] * HOURS[found[1]] * 3600 if found else None


@cache
def pass_curve(model: str, arm: str) -> tuple[tuple[int, float], ...]:
    """Figure 5: (k, pass@k in [0, 1]); empty where the paper has none."""
    name = MODELS.get(model, model)
    with (FOLDER / "passk.csv").open(encoding="utf-8") as stream:
        rows = [r for r in csv.DictReader(stream) if r["model"] == name and r["method"] == arm]
    return tuple((int(r["k"]), float(r["pass_at_k"])) for r in rows)
