"""The job arrays that a sweep's cells become, and what of them a cluster would refuse.

Cells become one array per resource profile and set of needed jobs, cut at SLURM's largest array size; a task
runs one cell, or several small ones that share a GPU. sbatch accepts most requests that can never run and
lets them wait, so they are compared with what sinfo, scontrol and sacctmgr report. What these do not know
(accounting may be off) is no fault.
"""

from __future__ import annotations

import getpass
import math
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from graphlib import TopologicalSorter
from typing import Any

from dash_exp.config.schema import ClusterConfig
from dash_exp.errors import Fault, nearest
from dash_exp.record.manifest import Entry, Resources
from dash_exp.sweep.slurm.queue import chunks, run, setting

COMMANDS = ("sbatch", "srun", "squeue", "scontrol")
NAME_LENGTH, SHOWN_NAMES = 60, 3
"""Characters of a job's name; arms or models named in it, more are counted."""
EARLY_S = 60
"""SLURM may send the warning so much too early."""
UNKNOWN_MEMORY_MB = 1
"""The memory of a node that SLURM does not know."""


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
    """One submission. `tasks`: the cells of each task; `needs`: ids of cells that must end first; `behind`:
    positions of arrays that must end first, if few jobs may run at a time; `parallel`: tasks that may run at
    once."""

    name: str
    demand: Demand
    tasks: tuple[tuple[Entry, ...], ...]
    needs: tuple[str, ...] = ()
    behind: tuple[int, ...] = ()
    parallel: int = 1


def demand_of(resources: Resources, cluster: ClusterConfig, cells: int) -> Demand:
    """What a job asks for that runs up to `cells` cells with these resources, as many at once as may share a
    GPU. They share CPUs too if those were counted by GPU."""
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
    """The arrays of these cells, each after those it waits for. `largest`: tasks that one array may have;
    `unfinished`: ids of cells, of this list or not, that can be waited for."""
    waited = {entry.id: tuple(n for n in entry.needs if n in set(unfinished)) for entry in entries}
    found: list[tuple[int, Array]] = []
    for depth, same in enumerate(_levels(entries, waited)):
        groups: dict[tuple[Resources, tuple[str, ...]], list[Entry]] = {}
        for entry in same:
            groups.setdefault((entry.resources, waited[entry.id]), []).append(entry)
        for (resources, needs), group in groups.items():
            demand = demand_of(resources, cluster, len(group))
            for tasks in chunks([tuple(cells) for cells in chunks(group, demand.slots)], largest):
                array = Array(job_name(sweep, tasks), demand, tuple(tasks), needs, parallel=len(tasks))
                found.append((depth, array))
    return _limited(found, cluster.max_parallel)


def _levels(entries: Sequence[Entry], waited: Mapping[str, tuple[str, ...]]) -> Iterator[list[Entry]]:
    """The cells that wait for none of the others, then those that wait only for these, and so on. Raises
    CycleError if cells wait for each other."""
    known = {entry.id for entry in entries}
    order = TopologicalSorter({one: known.intersection(needs) for one, needs in waited.items()})
    order.prepare()
    while order.is_active():
        ready = order.get_ready()
        yield [entry for entry in entries if entry.id in ready]
        order.done(*ready)


def _limited(found: Sequence[tuple[int, Array]], limit: int | None) -> list[Array]:
    """Let at most `limit` tasks run at once: the arrays of one depth share the limit, those of the next depth
    wait for all of them, and if there are more arrays than `limit`, they wait for one another."""
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
    """`<sweep>-<arms>-<models>`, from the names of the cells' folders: `table_1-dash+grpo-qwen3b`."""
    parts = [entry.folder.split("-") for task in tasks for entry in task]
    rest = ""
    for place, kind in enumerate(("arms", "models")):
        names = list(dict.fromkeys(part[place] for part in parts if len(part) > place))
        rest += "-" + ("+".join(names) if len(names) <= SHOWN_NAMES else f"{len(names)}_{kind}")
    return f"{sweep[: max(8, NAME_LENGTH - len(rest))]}{rest}"[:NAME_LENGTH]


def parameters(array: Array, cluster: ClusterConfig, after: Sequence[str]) -> dict[str, Any]:
    """An array as submitit's SlurmExecutor takes it. `after`: ids of jobs that must end first."""
    demand, more = array.demand, cluster.sbatch
    own_gpus = bool({"gres", "gpus", "gpus-per-node", "gpus-per-task"} & set(more))
    return {
        "job_name": array.name,
        "time": demand.minutes,
        "nodes": demand.nodes,
        "ntasks_per_node": demand.tasks_per_node,
        "cpus_per_task": demand.cpus_per_task,
        "gpus_per_node": None if own_gpus else demand.gpus_per_node or None,
        "mem": f"{demand.memory_gb}GB",
        "account": cluster.account,
        "partition": cluster.partition,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "setup": list(cluster.setup) or None,
        "signal_delay_s": cluster.warning_s,
        "dependency": f"afterany:{':'.join(after)}" if after else None,
        "array_parallelism": array.parallel,
        "wckey": None,  # clusters that check such keys refuse submitit's own
        "stderr_to_stdout": True,
        "additional_parameters": {"requeue": True, **more},  # a cluster's default may be not to requeue
        # srun does not take this from the job; after a failed rank, rank 0 still records what happened
        "srun_args": [f"--cpus-per-task={demand.cpus_per_task}", "--kill-on-bad-exit=0"],
    }


# What a cluster would refuse ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Nodes:
    """`count` equal nodes of a partition. `minutes`: the partition's time limit."""

    partition: str
    default: bool
    minutes: float
    count: int
    cpus: int
    memory_mb: float
    gpus: int
    features: frozenset[str]

    def holds(self, demand: Demand) -> bool:
        return (
            demand.gpus_per_node <= self.gpus
            and demand.cpus_per_node <= self.cpus
            and demand.memory_gb * 1024 <= self.memory_mb
        )


def find_faults(entries: Sequence[Entry], cluster: ClusterConfig) -> list[Fault]:
    """Everything that is wrong with running these cells on the cluster that can be reached from here."""
    absent = [name for name in COMMANDS if shutil.which(name) is None]
    if absent:
        hint = "start this where jobs are submitted to SLURM, or set cluster=local"
        return [Fault("cluster", f"{', '.join(absent)} not found on PATH", hint)]
    text = run(["sinfo", "--noheader", "--all", "--exact", "--format=%P|%l|%D|%c|%m|%G|%f"])
    if text is None:
        return [Fault("cluster", "SLURM does not answer", "sinfo says more; is its controller up?")]
    nodes = read_nodes(text)
    found = _partition_faults(nodes, cluster)
    if not found:
        names = None if cluster.partition is None else cluster.partition.split(",")
        chosen = [one for one in nodes if (one.default if names is None else one.partition in names)]
        found += _feature_faults(chosen, cluster)
        found += _demand_faults(entries, chosen, cluster)
    return found + _account_faults(cluster) + _warning_faults(entries, cluster)


def read_nodes(text: str) -> list[Nodes]:
    """The lines of sinfo."""
    found = []
    for line in text.splitlines():
        if line.count("|") != 6:
            continue
        name, limit, *numbers, gres, features = line.strip().split("|")
        count, cpus, memory = (int((re.match(r"\d+", one) or ["0"])[0]) for one in numbers)
        memory_mb = math.inf if memory <= UNKNOWN_MEMORY_MB else memory
        known, gpus = frozenset(features.split(",")) - {"(null)"}, gpus_of(gres)
        default, minutes = name.endswith("*"), minutes_of(limit)
        found.append(Nodes(name.rstrip("*"), default, minutes, count, cpus, memory_mb, gpus, known))
    return found


def minutes_of(limit: str) -> float:
    """A time limit as SLURM writes it, `[days-]hours:minutes:seconds`, in minutes."""
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", limit):
        return math.inf
    days, _, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    hours, minutes, seconds = [0] * (3 - len(parts)) + parts
    return int(days or 0) * 1440 + hours * 60 + minutes + seconds / 60


def gpus_of(gres: str) -> int:
    """GPUs of a node: `gpu:a100:4(S:0-1),gpu:2` are 6."""
    named = re.sub(r"\([^)]*\)", "", gres).split(",")
    last = [one.split(":")[-1] for one in named if one.split(":")[0] == "gpu"]
    return sum(int(count) if count.isdigit() else 1 for count in last)


def _partition_faults(nodes: Sequence[Nodes], cluster: ClusterConfig) -> list[Fault]:
    where, known = "cluster.partition", {one.partition for one in nodes}
    if cluster.partition is not None:
        unknown = [name for name in cluster.partition.split(",") if name not in known]
        return [_unknown(where, name, "which this cluster does not have", known) for name in unknown]
    if any(one.default for one in nodes):
        return []
    allowed = f"allowed: {', '.join(sorted(known))}"
    return [Fault(where, "is not set, and this cluster has no default", allowed)]


def _unknown(where: str, name: str, why: str, known: Collection[str]) -> Fault:
    return Fault(where, f"got {name!r}, {why}", nearest(name, known))


def _feature_faults(nodes: Sequence[Nodes], cluster: ClusterConfig) -> list[Fault]:
    """Features that no node has; SLURM itself checks how they are combined."""
    known = frozenset().union(*(one.features for one in nodes))
    words = [word for word in re.split(r"[\[\]()&|,*\s]+", cluster.constraint or "") if word]
    why = "which no node of the partition has"
    unknown = [word for word in words if not word.isdigit() and word not in known]
    return [_unknown("cluster.constraint", word, why, known) for word in unknown]


def _demand_faults(entries: Sequence[Entry], nodes: Sequence[Nodes], cluster: ClusterConfig) -> list[Fault]:
    """Profiles that none of the partitions can run, each reported once."""
    groups: dict[Resources, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.resources, []).append(entry)
    found = []
    for resources, group in groups.items():
        demand = demand_of(resources, cluster, len(group))
        names = dict.fromkeys(one.partition for one in nodes)
        each = [_lacking(demand, name, [n for n in nodes if n.partition == name]) for name in names]
        if all(each):
            cells = group[0].folder + (f" and {len(group) - 1} more" if len(group) > 1 else "")
            found += [replace(fault, what=f"{fault.what} (for {cells})") for fault in min(each, key=len)]
    return found


def _lacking(demand: Demand, name: str, nodes: Sequence[Nodes]) -> list[Fault]:
    """What a partition lacks for a job."""
    sizes = [
        ("gpus", "GPUs", demand.gpus_per_node, max(one.gpus for one in nodes)),
        ("cpus", "CPUs", demand.cpus_per_node, max(one.cpus for one in nodes)),
        ("memory_gb", "GB of memory", demand.memory_gb, max(one.memory_mb for one in nodes) / 1024),
    ]
    at_most = f"partition {name} has at most"
    found = [
        Fault(f"cluster.{key}", f"asks for {want} {unit} of a node", f"{at_most} {have:.4g}")
        for key, unit, want, have in sizes
        if want > have
    ]
    fitting = sum(one.count for one in nodes if one.holds(demand))
    if not found and fitting < demand.nodes:
        size = f"{demand.gpus_per_node} GPUs, {demand.cpus_per_node} CPUs and {demand.memory_gb} GB"
        what = f"asks for {demand.nodes} nodes of {size} each"
        found.append(Fault("cluster", what, f"partition {name} has {fitting} so large"))
    limit = max(one.minutes for one in nodes)
    if demand.minutes > limit:
        hint = f"partition {name} allows {limit / 60:.4g}; a cell goes on in a new job where one ended"
        found.append(Fault("cluster.hours", f"asks for {demand.minutes / 60:.4g} hours", hint))
    return found


def _account_faults(cluster: ClusterConfig) -> list[Fault]:
    """Accounts and qualities of service that accounting does not know, or not for this user."""
    found = []
    for kind, name, column in (("account", cluster.account, "Account"), ("qos", cluster.qos, "Name")):
        known = _names(["show", kind, f"format={column}"]) if name is not None else set()
        if name is None or not known:
            continue
        if name not in known:
            found.append(_unknown(f"cluster.{kind}", name, "which this cluster does not have", known))
        elif "associations" in setting("AccountingStorageEnforce"):
            own = _names(["show", "associations", "where", f"user={getpass.getuser()}", f"format={kind}"])
            if own and name not in own:
                found.append(_unknown(f"cluster.{kind}", name, "which you may not use", own))
    return found


def _names(command: Sequence[str]) -> set[str]:
    """Names that accounting lists; empty if it is off."""
    text = run(["sacctmgr", "--noheader", "--parsable2", *command]) or ""
    return {name.strip() for line in text.splitlines() for name in line.split(",") if name.strip()}


def _warning_faults(entries: Sequence[Entry], cluster: ClusterConfig) -> list[Fault]:
    shortest = min((entry.resources.minutes for entry in entries), default=None)
    if shortest is None or cluster.warning_s + EARLY_S < 60 * shortest:
        return []
    what = f"got {cluster.warning_s} s before the end of jobs of {shortest} min"
    early = f"SLURM may warn {EARLY_S} s earlier, so a cell could be asked to end as soon as it starts"
    hint = f"{early}: set it lower, or cluster.hours higher"
    return [Fault("cluster.warning_s", what, hint)]
