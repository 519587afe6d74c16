"""What Hydra's `-m` hands over, planned and launched. Torch-free; the plugin in hydra_plugins/ calls it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dash_exp.config.compose import compose
from dash_exp.errors import Fault, UserError, disk_errors_below
from dash_exp.learning.distributed.world import placed
from dash_exp.record.folder import read_json
from dash_exp.record.jobs import Plan
from dash_exp.record.manifest import NAME, sweep_folder
from dash_exp.sweep.dispatch import LaunchRequest, launch
from dash_exp.sweep.plan import make_plan
from dash_exp.sweep.resources import part_of_machine, slug, split
from dash_exp.sweep.spec import key_of

N_JOBS, WAIT = "hydra.launcher.n_jobs", "hydra.launcher.wait"
SHOWN_VALUES, NAME_LENGTH = 4, 80
SPEAKING = ("algorithm", "model", "dataset", "experiment", "evaluation", "recipe", "sampler")
"""Keys whose options speak for themselves."""


def launch_sweep(
    config: DictConfig, overrides: Sequence[Sequence[str]], first: int, n_jobs: object, wait: object
) -> int:
    """Run the combinations of a sweep; its exit code. `config`: Hydra's of the whole sweep. `first`: the
    number of the first one, above 0 in later batches (hydra.sweeper.max_batch_size): sweeps of their own.

    Raises UserError with everything that is wrong with them, before anything is started.
    """
    jobs, waits = checked(n_jobs, wait)
    places = search_path(config)
    combinations = [(*places, *one) for one in overrides]
    base = compose(combinations[0])
    root = Path(base.run.dir)
    name = base.run.sweep or ad_hoc_name(combinations)
    name = f"{name}-{first}" if first else name
    part = part_of_machine(base.cluster, jobs)
    with disk_errors_below(root):
        root.joinpath("cache").mkdir(parents=True, exist_ok=True)  # hashes are remembered there
        plan = make_plan(name, combinations, root=root, actions=part)
    if base.run.sweep is None:
        plan = replace(plan, name=unlike_others(plan, root))
    return launch(LaunchRequest(plan, root, base.cluster, jobs, base.run.force), wait=waits)


def unlike_others(plan: Plan, root: Path) -> str:
    """The name of a sweep that has none of its own. The same words make other cells once options or data
    have changed: the sweep is another one then, and is called by its cells."""
    known = read_json(sweep_folder(root, plan.name) / NAME)
    own = {cell.id for cell in plan.cells}
    if own.issuperset(row["id"] for row in known.get("cells", ())):
        return plan.name
    return f"{plan.name}-{hashlib.sha256(' '.join(sorted(own)).encode()).hexdigest()[:8]}"


def checked(n_jobs: object, wait: object) -> tuple[int, bool]:
    """The launcher's own settings. Raises UserError."""
    faults = []
    if not isinstance(n_jobs, int) or isinstance(n_jobs, bool) or n_jobs < 1:
        faults.append(
            Fault(
                N_JOBS,
                f"got {n_jobs!r}, must be a whole number from 1 on",
                "so many cells run at once on this machine",
            )
        )
    if not isinstance(wait, bool):
        faults.append(Fault(WAIT, f"got {wait!r}, expected true or false"))
    if placed(os.environ) is not None:
        faults.append(
            Fault(
                "-m",
                "torchrun and srun start the ranks of one cell, not a sweep",
                "leave them out: a sweep starts the ranks of each cell itself",
            )
        )
    if faults:
        raise UserError(faults)
    assert isinstance(n_jobs, int) and isinstance(wait, bool)
    return n_jobs, wait


def search_path(config: DictConfig) -> tuple[str, ...]:
    """Where Hydra looks for options beyond our own folder, as an override: --config-dir and
    hydra.searchpath."""
    sources: Iterable[Any] = config.hydra.runtime.config_sources
    found = [
        f"{one.schema}://{one.path}"
        for one in sources
        if one.provider == "command-line" or one.provider.startswith("hydra.searchpath")
    ]
    quoted = ("'" + place.replace("\\", "\\\\").replace("'", "\\'") + "'" for place in found)
    return (f"hydra.searchpath=[{','.join(quoted)}]",) if found else ()


def ad_hoc_name(combinations: Sequence[Sequence[str]]) -> str:
    """A name for combinations from a command line: what varies, and a hash of them, in whatever order and
    however they are launched."""
    cells = [split(combination)[0] for combination in combinations]
    lines = sorted({" ".join(sorted(cell)) for cell in cells})
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:8]
    values: dict[str, list[str]] = {}
    for text in dict.fromkeys(text for cell in cells for text in cell):
        values.setdefault(key_of(text), []).append(text.partition("=")[2])
    varied = {key: found for key, found in values.items() if len(found) > 1} or values
    name = slug("-".join(_shown(key, found) for key, found in varied.items()) or "sweep")[:NAME_LENGTH]
    return f"{name.rstrip('-_.+')}-{digest}"


def _shown(key: str, values: Sequence[str]) -> str:
    last = key.rpartition(".")[2]
    if len(values) > SHOWN_VALUES:
        return f"{len(values)}x{last}"
    short = "+".join(value.rpartition("/")[2] for value in values)
    return short if key in SPEAKING else f"{last}{short}"
