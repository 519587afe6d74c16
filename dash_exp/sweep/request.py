"""From what a user typed to a launch request: the combinations of `-m`, a sweep's file, or a sweep that was
launched before, whose cells are frozen."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dash_exp.config.compose import compose
from dash_exp.config.schema import Range
from dash_exp.config.tracking import TRACKERS
from dash_exp.errors import Fault, UserError, disk_errors_below
from dash_exp.learning.settings import rank_from_environment
from dash_exp.record.folder import read_json
from dash_exp.record.identity import read_frozen
from dash_exp.record.manifest import NAME, Manifest, Plan, PlannedCell, sweep_folder
from dash_exp.record.metrics import objective
from dash_exp.sweep.dispatch import LaunchRequest, launch
from dash_exp.sweep.local import planned_cell, read_order
from dash_exp.sweep.plan import make_plan, plan_spec
from dash_exp.sweep.resources import (
    NOT_REPEATED,
    OF_A_CELL,
    cluster_of,
    common_actions,
    part_of_machine,
    resources_of,
    settings_of,
    slug,
    split,
)
from dash_exp.sweep.spec import Combination, Spec, key_of
from dash_exp.sweep.states import frozen_values
from dash_exp.sweep.status import SPEAKING, find
from dash_exp.text import format_path, shorten

N_JOBS, WAIT = "hydra.launcher.n_jobs", "hydra.launcher.wait"
JOBS = Range(1, 1024)
SHOWN_VALUES, NAME_LENGTH = 4, 80


# python -m dash_exp -m ----------------------------------------------------------------------------


def launch_multirun(
    config: DictConfig, overrides: Sequence[Sequence[str]], first: int, n_jobs: object, wait: object
) -> tuple[int, list[float | None]]:
    """Run the combinations of `-m`; returns the exit code, and what each came to (`metrics.objective`).
    `config`: Hydra's of the sweep. `first`: the index of the first one, above 0 in later batches
    (hydra.sweeper.max_batch_size), which are sweeps of their own.

    Raises UserError with everything that is wrong with them, before anything is started.
    """
    jobs, waits = _launcher_settings(n_jobs, wait)
    searchpath = search_path(config)
    combinations = [(*searchpath, *one) for one in overrides]
    base = compose(combinations[0])
    root = Path(base.run.dir)
    name = base.run.sweep or ad_hoc_name(combinations)
    name = f"{name}-{first}" if first else name
    part = part_of_machine(base.cluster, jobs)
    with disk_errors_below(root):
        root.joinpath("cache").mkdir(parents=True, exist_ok=True)  # where hashes are kept
        plan = make_plan(name, combinations, root=root, actions=part)
    if base.run.sweep is None:
        plan = replace(plan, name=_unused_name(plan, root))
    code = launch(LaunchRequest(plan, root, base.cluster, jobs, base.run.force), wait=waits)
    asked = [_cell_of(plan, (*one, *part)) for one in combinations]
    return code, [None if cell is None else objective(cell.cell.folder(root)) for cell in asked]


def _cell_of(plan: Plan, combination: Combination) -> PlannedCell | None:
    """The cell that a combination makes: all of its overrides are among the combination's."""
    fitting = [cell for cell in plan.cells if set(cell.overrides) <= set(combination)]
    return max(fitting, key=lambda cell: len(cell.overrides), default=None)


def _launcher_settings(n_jobs: object, wait: object) -> tuple[int, bool]:
    """The launcher's own settings, checked. Raises UserError."""
    faults = []
    if not isinstance(n_jobs, int) or isinstance(n_jobs, bool) or not JOBS.holds(n_jobs):
        what = f"got {shorten(repr(n_jobs))}, must be a whole number, {JOBS}"
        faults.append(Fault(N_JOBS, what, "so many cells run at once on this machine"))
    if not isinstance(wait, bool):
        faults.append(Fault(WAIT, f"got {wait!r}, expected true or false"))
    if rank_from_environment(os.environ) is not None:
        hint = "leave them out: a sweep starts the ranks of each cell itself"
        faults.append(Fault("-m", "torchrun and srun start the ranks of one cell, not a sweep", hint))
    if faults:
        raise UserError(faults)
    assert isinstance(n_jobs, int) and isinstance(wait, bool)
    return n_jobs, wait


def search_path(config: DictConfig) -> tuple[str, ...]:
    """Folders of options besides our own (--config-dir, hydra.searchpath), as an override."""
    sources: Iterable[Any] = config.hydra.runtime.config_sources
    found = [
        f"{one.schema}://{one.path}"
        for one in sources
        if one.provider == "command-line" or one.provider.startswith("hydra.searchpath")
    ]
    quoted = ("'" + place.replace("\\", "\\\\").replace("'", "\\'") + "'" for place in found)
    return (f"hydra.searchpath=[{','.join(quoted)}]",) if found else ()


def _unused_name(plan: Plan, root: Path) -> str:
    """The name of a sweep that was given none. If the same overrides made other cells before options or data
    changed, it is another sweep, and gets another name."""
    known = read_json(sweep_folder(root, plan.name) / NAME)
    own = {cell.id for cell in plan.cells}
    if own.issuperset(row["id"] for row in known.get("cells", ())):
        return plan.name
    return f"{plan.name}-{hashlib.sha256(' '.join(sorted(own)).encode()).hexdigest()[:8]}"


def ad_hoc_name(combinations: Sequence[Sequence[str]]) -> str:
    """A name for combinations from a command line: what varies, and a hash of them that depends neither on
    their order nor on how they are launched."""
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
    return short if key in (*SPEAKING, "sampler") else f"{last}{short}"


# python -m dash_exp.sweep plan, launch, retry -----------------------------------------------------


def request_of(text: str, overrides: Sequence[str], root: Path, n_jobs: int | None) -> LaunchRequest:
    """Plan the sweep that was named. Raises UserError with everything that is wrong with it."""
    given = {key_of(one): one.partition("=")[2] for one in overrides}
    rest = [one for one in overrides if key_of(one) != N_JOBS]
    name = given.get("run.sweep")
    target = find(text, root, name)
    jobs = _n_jobs(n_jobs, given.get(N_JOBS), target.folder)
    force = given.get("run.force", "false").lower() in ("true", "yes", "on", "1")
    if target.spec is not None:
        part = _part_of_machine(target.spec, rest, jobs)
        plan = plan_spec(target.spec, root=target.root, actions=part, extra=rest, name=name)
    else:
        plan = _with_settings(target.manifest(), rest)
        plan = with_configs(plan, target.root) if force else plan
    return LaunchRequest(plan, target.root, cluster_of(plan.actions), jobs, force)


def request_again(manifest: Manifest, folders: Sequence[str], n_jobs: int | None) -> LaunchRequest:
    """Launch some cells of a launched sweep again, as they are frozen."""
    jobs = _n_jobs(n_jobs, None, manifest.folder)
    cluster = cluster_of(manifest.actions)
    return LaunchRequest(plan_of(manifest), manifest.root, cluster, jobs, cells=tuple(folders))


def _n_jobs(flag: int | None, given: str | None, folder: Path) -> int:
    """Cells at once: as asked for, else as at the last launch, else one."""
    if flag is not None or given is not None:
        text = str(flag) if flag is not None else str(given)
        if not text.isdecimal() or not JOBS.holds(int(text[:9])):
            raise UserError(Fault("-n", f"got {shorten(text)}, must be a whole number, {JOBS}"))
        return int(text)
    before = read_order(folder)
    return before.n_jobs if before else 1


def _part_of_machine(spec: Spec, overrides: Sequence[str], n_jobs: int) -> tuple[str, ...]:
    """Each cell's share of this machine. Faults of the settings are reported when cells are planned."""
    settings = (*split(spec.overrides)[1], *split(overrides)[1])
    try:
        return part_of_machine(compose(settings).cluster, n_jobs)
    except UserError:
        return ()


def _with_settings(manifest: Manifest, overrides: Sequence[str]) -> Plan:
    """A launched sweep with other settings of the launch: its cells are not composed again."""
    own, settings = split(overrides)
    if own:
        what = f"{manifest.name} was launched already, and its cells are frozen"
        hint = "only run, tracking, cluster and paths may change; name its yaml for other cells"
        raise UserError([Fault(key_of(one), what, hint) for one in own])
    plan = plan_of(manifest)
    if not any(key_of(one) not in NOT_REPEATED for one in settings):
        return plan
    kept = [text for text in manifest.actions if text not in _of_options(manifest.actions, settings)]
    asked = settings_of(compose((*kept, *settings)))
    plan = replace(plan, actions=common_actions([asked], settings_of(compose())))
    changed = {key_of(one) for one in settings}
    if any(key.partition(".")[0] == "cluster" for key in changed):
        cells = tuple(_with_resources(cell, plan, manifest.root, changed) for cell in plan.cells)
        plan = replace(plan, cells=cells)
    return plan


def _of_options(actions: Sequence[str], settings: Sequence[str]) -> Combination:
    """The actions that an option chose (`cluster=slurm`) for which the settings choose another one."""
    given = [key_of(text) for text in settings]
    names = {key_of(text): text.partition("=")[2] for text in actions}
    trackers = [name for name in TRACKERS if names.get(f"tracking.{name}") == "true"]
    before = [f"cluster={names['cluster.name']}"] if "cluster" in given and "cluster.name" in names else []
    before += [f"tracking=[{','.join(trackers)}]"] if "tracking" in given and trackers else []
    return common_actions([settings_of(compose(before))], settings_of(compose()))


def _with_resources(cell: PlannedCell, plan: Plan, root: Path, changed: Collection[str]) -> PlannedCell:
    """A frozen cell with what it asks for under the plan's actions, without its own for `changed` keys."""
    kept = tuple(text for text in cell.overrides if key_of(text) not in changed)
    own = [text for text in kept if key_of(text) in OF_A_CELL]
    config = read_frozen(cell.cell.folder(root), [*plan.actions, *own])
    return replace(cell, overrides=kept, resources=resources_of(config))


def plan_of(manifest: Manifest) -> Plan:
    """A launched sweep as a plan again. Raises UserError where a frozen config is gone."""
    hint = "launch the sweep's yaml, or the same -m, to freeze it anew"
    gone = [
        manifest.cell(e) for e in manifest.entries if not os.path.lexists(manifest.cell(e) / "config.yaml")
    ]
    if gone:
        raise UserError([Fault(format_path(folder), "has no config.yaml any more", hint) for folder in gone])
    cells = tuple(map(planned_cell, manifest.entries))
    return Plan(manifest.name, cells, manifest.waiting, 0, manifest.actions, manifest.about)


def with_configs(plan: Plan, root: Path) -> Plan:
    """A plan whose cells can be frozen again after their records have been archived."""
    cells = [replace(c, cell=replace(c.cell, frozen=frozen_values(c.cell.folder(root)))) for c in plan.cells]
    return replace(plan, cells=tuple(cells))
