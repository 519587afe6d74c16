"""How the cells of a sweep become SLURM's job arrays. Pure, torch-free.

One array per resource profile (and per set of jobs it waits for), cut where SLURM's largest index asks for
it. A task of an array runs one cell, or several small ones that share a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dash_exp.config.schema import ClusterConfig
from dash_exp.record.jobs import Resources
from dash_exp.record.manifest import Entry

NAME_LENGTH = 60
SHOWN = 3
"""Arms or models named in a job's name; more are counted."""


@dataclass(frozen=True, slots=True, order=True)
class Demand:
    """What one job asks SLURM for. `memory_gb`: of each node; `slots`: cells that it runs at once."""

    nodes: int
    tasks_per_node: int
    cpus_per_task: int
    gpus_per_node: int
    memory_gb: int
    minutes: int
    slots: int

    @property
    def cpus_per_node(self) -> int:
        return self.cpus_per_task * self.tasks_per_node


@dataclass(frozen=True, slots=True)
class Array:
    """One submission: `tasks` (each a list of cells), and what it waits for: the cells that it needs, and
    other arrays by their place in the list, where few jobs may run at a time. `parallel`: its tasks that
    may run at once."""

    name: str
    demand: Demand
    tasks: tuple[tuple[Entry, ...], ...]
    needs: tuple[str, ...] = ()
    behind: tuple[int, ...] = ()
    parallel: int = 1


def demand_of(resources: Resources, cluster: ClusterConfig, cells: int) -> Demand:
    """What a job asks for that runs up to `cells` cells of this profile, as many at once as may share a
    GPU. They share its processors too where those were counted by GPU."""
    small = resources.gpus <= 1 and resources.tasks == resources.nodes == 1
    slots = min(max(cluster.cells_per_gpu, 1), cells) if small else 1
    shared = resources.gpus > 0 and cluster.cpus is None
    cpus = resources.cpus if shared else resources.cpus * slots
    per_node = math.ceil(resources.tasks / resources.nodes)
    return Demand(
        nodes=resources.nodes,
        tasks_per_node=per_node,
        cpus_per_task=max(1, math.ceil(cpus / (resources.nodes * per_node))),
        gpus_per_node=math.ceil(resources.gpus / resources.nodes),
        memory_gb=resources.memory_gb * slots,
        minutes=resources.minutes,
        slots=slots,
    )


def plan_arrays(
    sweep: str, entries: Sequence[Entry], cluster: ClusterConfig, largest: int, unfinished: Sequence[str] = ()
) -> list[Array]:
    """The arrays of these cells, in an order in which each comes after those it waits for. `largest`: tasks
    that one array may have; `unfinished`: ids of cells, of this list or not, that can be waited for."""
    waited = {entry.id: tuple(n for n in entry.needs if n in set(unfinished)) for entry in entries}
    found: list[tuple[int, Array]] = []
    for depth, same in enumerate(_levels(entries, waited)):
        groups: dict[tuple[Resources, tuple[str, ...]], list[Entry]] = {}
        for entry in same:
            groups.setdefault((entry.resources, waited[entry.id]), []).append(entry)
        for (resources, needs), group in groups.items():
            demand = demand_of(resources, cluster, len(group))
            tasks = [tuple(group[i : i + demand.slots]) for i in range(0, len(group), demand.slots)]
            for start in range(0, len(tasks), largest):
                piece = tuple(tasks[start : start + largest])
                array = Array(job_name(sweep, piece), demand, piece, needs, parallel=len(piece))
                found.append((depth, array))
    return _limited(found, cluster.max_parallel)


def _levels(entries: Sequence[Entry], waited: Mapping[str, tuple[str, ...]]) -> Iterator[list[Entry]]:
    """First the cells that wait for none of the others, then those that wait for these only, ..."""
    left = {entry.id: entry for entry in entries}
    while left:
        free = [e for e in left.values() if not any(need in left for need in waited[e.id])]
        if not free:
            raise ValueError(f"cells wait for each other: {', '.join(sorted(left))}")
        yield free
        for entry in free:
            del left[entry.id]


def _limited(found: Sequence[tuple[int, Array]], limit: int | None) -> list[Array]:
    """Let no more than `limit` tasks of all arrays run at once: the arrays of one depth share it, those of
    the next depth wait for all of them, and where there are more arrays than that, for one another."""
    arrays = [array for _, array in found]
    if limit is None:
        return arrays
    limited: list[Array] = []
    before: tuple[int, ...] = ()
    for depth in sorted({depth for depth, _ in found}):
        places = [place for place, (own, _) in enumerate(found) if own == depth]
        shares = share_out(limit, [len(arrays[place].tasks) for place in places])
        for turn, place in enumerate(places):
            behind = (places[turn - limit],) if turn >= limit else before
            limited.append(replace(arrays[place], parallel=shares[turn], behind=behind))
        before = tuple(places[-limit:])
    return limited


def share_out(limit: int, sizes: Sequence[int]) -> list[int]:
    """Shares of `limit`, at least 1 each and at most an array's size, larger ones for larger arrays."""
    shares = [1] * len(sizes)
    for _ in range(limit - len(sizes)):
        place = max(range(len(sizes)), key=lambda i: sizes[i] / shares[i])
        if shares[place] >= sizes[place]:
            break
        shares[place] += 1
    return shares


def job_name(sweep: str, tasks: Sequence[Sequence[Entry]]) -> str:
    """`<sweep>-<arms>-<models>`, of what a cell's folder is called: `table_1-dash+grpo-qwen3b`."""
    parts = [entry.folder.split("-") for task in tasks for entry in task]
    arms, models = ([part[place] for part in parts if len(part) > place] for place in (0, 1))
    rest = f"-{_told(arms, 'arms')}-{_told(models, 'models')}"
    return f"{sweep[: max(8, NAME_LENGTH - len(rest))]}{rest}"[:NAME_LENGTH]


def _told(names: Sequence[str], kind: str) -> str:
    distinct = list(dict.fromkeys(names))
    return "+".join(distinct) if len(distinct) <= SHOWN else f"{len(distinct)}_{kind}"


def parameters(array: Array, cluster: ClusterConfig, after: Sequence[str]) -> dict[str, Any]:
    """An array as submitit's SlurmExecutor wants it. `after`: ids of jobs that must have ended first."""
    demand = array.demand
    return {
        "job_name": array.name,
        "time": demand.minutes,
        "nodes": demand.nodes,
        "ntasks_per_node": demand.tasks_per_node,
        "cpus_per_task": demand.cpus_per_task,
        "gpus_per_node": demand.gpus_per_node or None,
        "mem": f"{demand.memory_gb}GB",
        "account": cluster.account,
        "partition": cluster.partition,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "setup": list(cluster.setup) or None,
        "signal_delay_s": cluster.warning_s,
        "dependency": f"afterany:{':'.join(after)}" if after else None,
        "array_parallelism": array.parallel,
        "wckey": None,  # submitit's own is refused where such keys are checked
        "stderr_to_stdout": True,
        "additional_parameters": {"requeue": True},  # a site's default may be not to
        # srun does not take this from the job; one failed rank leaves it to rank 0 to tell what happened
        "srun_args": [f"--cpus-per-task={demand.cpus_per_task}", "--kill-on-bad-exit=0"],
    }
