"""What of a sweep a SLURM cluster would refuse, or keep waiting for ever. Torch-free.

sbatch takes most of such requests and lets them wait without end, so they are compared beforehand with what
sinfo, scontrol and sacctmgr tell. What these do not know (accounting may be off) is no fault.
"""

from __future__ import annotations

import getpass
import math
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dash_exp.config.schema import ClusterConfig
from dash_exp.errors import Fault, nearest
from dash_exp.record.jobs import Resources
from dash_exp.record.manifest import Entry
from dash_exp.sweep.slurm.arrays import Demand, demand_of
from dash_exp.sweep.slurm.queue import run

COMMANDS = ("sbatch", "srun", "squeue", "scontrol")
MAX_ARRAY_SIZE = 1001
"""SLURM's own default."""
UNKNOWN_MEMORY_MB = 1
"""What a node has where SLURM was told nothing."""


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


def faults(entries: Sequence[Entry], cluster: ClusterConfig) -> list[Fault]:
    """Everything that is wrong with running these cells on the cluster that can be reached from here."""
    absent = [name for name in COMMANDS if shutil.which(name) is None]
    if absent:
        return [
            Fault(
                "cluster",
                f"{', '.join(absent)} not found on PATH",
                "start this where jobs are submitted to SLURM, or set cluster=local",
            )
        ]
    text = run(["sinfo", "--noheader", "--all", "--exact", "--format=%P|%l|%D|%c|%m|%G|%f"])
    if text is None:
        return [Fault("cluster", "SLURM does not answer", "sinfo says more; is its controller up?")]
    nodes = read_nodes(text)
    found = _partition_faults(nodes, cluster)
    chosen = chosen_nodes(nodes, cluster.partition)
    if not found:
        found += _feature_faults(chosen, cluster)
        found += _demand_faults(entries, chosen, cluster)
    return found + _account_faults(cluster) + _warning_faults(entries, cluster)


def read_nodes(text: str) -> list[Nodes]:
    """The lines of sinfo."""
    found = []
    for line in text.splitlines():
        fields = line.strip().split("|")
        if len(fields) != 7:
            continue
        name, limit, count, cpus, memory, gres, features = fields
        memory_mb = _number(memory)
        found.append(
            Nodes(
                name.rstrip("*"),
                name.endswith("*"),
                minutes_of(limit),
                _number(count),
                _number(cpus),
                math.inf if memory_mb <= UNKNOWN_MEMORY_MB else memory_mb,
                gpus_of(gres),
                frozenset(features.split(",")) - {"(null)"},
            )
        )
    return found


def _number(text: str) -> int:
    found = re.match(r"\d+", text)
    return int(found[0]) if found else 0


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


def chosen_nodes(nodes: Sequence[Nodes], partition: str | None) -> list[Nodes]:
    """Those of the partitions that jobs would go to."""
    if partition is None:
        return [one for one in nodes if one.default]
    return [one for one in nodes if one.partition in partition.split(",")]


def _partition_faults(nodes: Sequence[Nodes], cluster: ClusterConfig) -> list[Fault]:
    known = {one.partition for one in nodes}
    if cluster.partition is None:
        if any(one.default for one in nodes):
            return []
        return [
            Fault(
                "cluster.partition",
                "is not set, and this cluster has no default",
                f"allowed: {', '.join(sorted(known))}",
            )
        ]
    return [
        Fault("cluster.partition", f"got {name!r}, which this cluster does not have", nearest(name, known))
        for name in cluster.partition.split(",")
        if name not in known
    ]


def _feature_faults(nodes: Sequence[Nodes], cluster: ClusterConfig) -> list[Fault]:
    """Features that no node has; how they are combined is left to SLURM."""
    known = frozenset().union(*(one.features for one in nodes))
    words = re.split(r"[\[\]()&|,*\s]+", cluster.constraint or "")
    return [
        Fault("cluster.constraint", f"got {word!r}, which no node of the partition has", nearest(word, known))
        for word in words
        if word and not word.isdigit() and word not in known
    ]


def _demand_faults(entries: Sequence[Entry], nodes: Sequence[Nodes], cluster: ClusterConfig) -> list[Fault]:
    """Profiles that no partition of those chosen can run, each told once."""
    groups: dict[Resources, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.resources, []).append(entry)
    found = []
    for resources, group in groups.items():
        demand = demand_of(resources, cluster, len(group))
        names = dict.fromkeys(one.partition for one in nodes)
        each = [lacking(demand, name, [n for n in nodes if n.partition == name]) for name in names]
        if all(each):
            told = group[0].folder + (f" and {len(group) - 1} more" if len(group) > 1 else "")
            found += [Fault(key, f"{what} (for {told})", hint) for key, what, hint in min(each, key=len)]
    return found


def lacking(demand: Demand, name: str, nodes: Sequence[Nodes]) -> list[tuple[str, str, str]]:
    """What a partition lacks for a job: the key to change, what is wrong, and what would be right."""
    sizes = [
        ("gpus", "GPUs", demand.gpus_per_node, max(one.gpus for one in nodes)),
        ("cpus", "CPUs", demand.cpus_per_node, max(one.cpus for one in nodes)),
        ("memory_gb", "GB of memory", demand.memory_gb, max(one.memory_mb for one in nodes) / 1024),
    ]
    found = [
        (f"cluster.{key}", f"asks for {want} {word} of a node", f"partition {name} has at most {have:.4g}")
        for key, word, want, have in sizes
        if want > have
    ]
    fitting = sum(one.count for one in nodes if one.holds(demand))
    if not found and fitting < demand.nodes:
        what = f"asks for {demand.nodes} nodes of {describe(demand)} each"
        found.append(("cluster", what, f"partition {name} has {fitting} so large"))
    limit = max(one.minutes for one in nodes)
    if demand.minutes > limit:
        what = f"asks for {demand.minutes / 60:.4g} hours"
        hint = f"partition {name} allows {limit / 60:.4g}; a cell goes on in a new job where one ended"
        found.append(("cluster.hours", what, hint))
    return found


def describe(demand: Demand) -> str:
    return f"{demand.gpus_per_node} GPUs, {demand.cpus_per_node} CPUs and {demand.memory_gb} GB"


def _account_faults(cluster: ClusterConfig) -> list[Fault]:
    """Accounts and qualities of service that accounting does not know, or not for this user."""
    wanted = [("account", cluster.account), ("qos", cluster.qos)]
    found = []
    for kind, name in wanted:
        if name is None:
            continue
        known = _names(["show", kind, f"format={'Account' if kind == 'account' else 'Name'}"])
        if known and name not in known:
            what = f"got {name!r}, which this cluster does not have"
            found.append(Fault(f"cluster.{kind}", what, nearest(name, known)))
        elif known and "associations" in setting("AccountingStorageEnforce"):
            own = _names(["show", "associations", "where", f"user={getpass.getuser()}", f"format={kind}"])
            if own and name not in own:
                what = f"got {name!r}, which you may not use"
                found.append(Fault(f"cluster.{kind}", what, nearest(name, own)))
    return found


def _names(command: Sequence[str]) -> set[str]:
    """Names that accounting lists; empty where it is off."""
    text = run(["sacctmgr", "--noheader", "--parsable2", *command]) or ""
    return {name.strip() for line in text.splitlines() for name in line.split(",") if name.strip()}


def _warning_faults(entries: Iterable[Entry], cluster: ClusterConfig) -> list[Fault]:
    shortest = min((entry.resources.minutes for entry in entries), default=None)
    if shortest is None or cluster.warning_s < 60 * shortest:
        return []
    what = f"got {cluster.warning_s} s before the end of jobs of {shortest} min"
    hint = "a cell would be asked to end as soon as it starts: set it lower, or cluster.hours higher"
    return [Fault("cluster.warning_s", what, hint)]


def setting(name: str) -> str:
    """One of SLURM's settings, empty where it cannot be learnt."""
    text = run(["scontrol", "show", "config"]) or ""
    found = re.search(rf"^{name}\s*=\s*(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def largest_array() -> int:
    """Tasks that one array may have: 1 where arrays are turned off."""
    value = setting("MaxArraySize")
    return max(1, int(value)) if value.isdigit() else MAX_ARRAY_SIZE
