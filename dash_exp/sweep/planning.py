"""From what a person typed to a plan that can be launched: a sweep's file planned anew, or one that was
launched before, whose cells are frozen. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from dash_exp.config.compose import compose
from dash_exp.errors import Fault, UserError
from dash_exp.record.identity import read_frozen
from dash_exp.record.jobs import Plan, PlannedCell
from dash_exp.record.manifest import Manifest
from dash_exp.sweep.dispatch import LaunchRequest, launch, refusals
from dash_exp.sweep.estimate import LOADER
from dash_exp.sweep.local import read_order
from dash_exp.sweep.lookup import find
from dash_exp.sweep.plan import plan_spec
from dash_exp.sweep.resources import (
    NOT_REPEATED,
    OF_A_CELL,
    cluster_of,
    common_actions,
    part_of_machine,
    resources_of,
    settings_of,
    split,
)
from dash_exp.sweep.spec import Spec, key_of
from dash_exp.sweep.teachers import planned
from dash_exp.text import format_path

NAME, FORCE, N_JOBS = "run.sweep", "run.force", "hydra.launcher.n_jobs"


def order_of(text: str, overrides: Sequence[str], root: Path, n_jobs: int | None) -> LaunchRequest:
    """Plan the sweep that a person named. Raises UserError with everything that is wrong with it."""
    given = {key_of(one): one.partition("=")[2] for one in overrides}
    rest = [one for one in overrides if key_of(one) != N_JOBS]
    name = given.get(NAME)
    target = find(text, root, name)
    jobs = jobs_of(n_jobs, given.get(N_JOBS), target.folder)
    force = given.get(FORCE, "false").lower() in ("true", "yes", "on", "1")
    if target.spec is not None:
        part = _part(target.spec, rest, jobs)
        plan = plan_spec(target.spec, root=target.root, actions=part, extra=rest, name=name)
    else:
        plan = frozen_plan(target.manifest(), rest)
        plan = with_configs(plan, target.root) if force else plan
    return LaunchRequest(plan, target.root, cluster_of(plan.actions), jobs, force)


def jobs_of(flag: int | None, given: str | None, folder: Path) -> int:
    """Cells at once: as asked for, else as at the last launch, else one."""
    if flag is not None or given is not None:
        said = str(flag) if flag is not None else str(given)
        if not said.isdecimal() or int(said) < 1:
            raise UserError(Fault("-n", f"got {said}, must be a whole number from 1 on"))
        return int(said)
    before = read_order(folder)
    return before.n_jobs if before else 1


def _part(spec: Spec, overrides: Sequence[str], n_jobs: int) -> tuple[str, ...]:
    """Each cell's part of this machine, by the settings of the launch; what is wrong with these is told
    together with all else."""
    settings = (*split(spec.overrides)[1], *split(overrides)[1])
    try:
        return part_of_machine(compose(settings).cluster, n_jobs)
    except UserError:
        return ()


def frozen_plan(manifest: Manifest, overrides: Sequence[str]) -> Plan:
    """A launched sweep, to be gone on with: nothing is composed but settings of the launch."""
    own, settings = split(overrides)
    if own:
        raise UserError(
            [
                Fault(
                    key_of(one),
                    f"{manifest.name} was launched already, and its cells are frozen",
                    "only run, tracking, cluster and paths may change; name its yaml for other cells",
                )
                for one in own
            ]
        )
    plan = plan_of(manifest)
    if not any(key_of(one) not in NOT_REPEATED for one in settings):
        return plan
    asked = settings_of(compose((*manifest.actions, *settings)))
    plan = replace(plan, actions=common_actions([asked], settings_of(compose(()))))
    if any(key_of(one).partition(".")[0] == "cluster" for one in settings):
        plan = replace(plan, cells=tuple(_asking(cell, plan, manifest.root) for cell in plan.cells))
    return plan


def plan_of(manifest: Manifest) -> Plan:
    """A launched sweep as a plan again. Raises UserError where what its cells are frozen to is gone."""
    hint = "launch the sweep's yaml, or the same -m, to freeze it anew"
    gone = [manifest.cell(e) for e in manifest.entries if not (manifest.cell(e) / "config.yaml").is_file()]
    if gone:
        raise UserError([Fault(format_path(folder), "has no config.yaml any more", hint) for folder in gone])
    cells = tuple(map(planned, manifest.entries))
    return Plan(manifest.name, cells, manifest.waiting, 0, manifest.actions, manifest.about)


def with_configs(plan: Plan, root: Path) -> Plan:
    """A plan whose cells can be frozen anew once their records are archived."""

    def read(cell: PlannedCell) -> PlannedCell:
        text = (cell.cell.folder(root) / "config.yaml").read_text(encoding="utf-8")
        return replace(cell, cell=replace(cell.cell, frozen=yaml.load(text, LOADER)))

    return replace(plan, cells=tuple(map(read, plan.cells)))


def _asking(cell: PlannedCell, plan: Plan, root: Path) -> PlannedCell:
    """A frozen cell with what it asks for on another cluster."""
    own = [text for text in cell.overrides if key_of(text) in OF_A_CELL]
    config = read_frozen(cell.cell.folder(root), [*plan.actions, *own])
    return replace(cell, resources=resources_of(config))


def again(manifest: Manifest, folders: Sequence[str], n_jobs: int | None) -> LaunchRequest:
    """Some cells of a launched sweep, as they are frozen."""
    jobs = jobs_of(n_jobs, None, manifest.folder)
    return LaunchRequest(
        plan_of(manifest), manifest.root, cluster_of(manifest.actions), jobs, cells=tuple(folders)
    )


def scripts(order: LaunchRequest) -> tuple[list[str], list[Fault]]:
    """What SLURM would be given, and what it would not take; nothing where cells run on this machine."""
    if order.cluster.name != "slurm":
        return [], []
    from dash_exp.sweep.slurm import submit as slurm

    faults = refusals(order)
    return slurm.sbatch_text(order.plan, order.root, order.cluster), faults


def start(order: LaunchRequest, wait: bool) -> int:
    """Launch it: by a controller of its own on this machine, or on SLURM."""
    return launch(order, wait=wait, detached=True)
