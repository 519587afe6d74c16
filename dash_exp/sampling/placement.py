"""Who works where: processors and GPUs of servers and learner on one machine. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dash_exp.errors import Fault, UserError


@dataclass(frozen=True, slots=True)
class Processors:
    """`servers`: the processors of each server. `learner`: how many threads the learner has."""

    servers: tuple[tuple[int, ...], ...]
    learner: int


def processors(available: Sequence[int], servers: int, each: int | None, overlapped: bool) -> Processors:
    """Split this machine's processors. While the learner works beside the servers (`overlapped`) half of
    them are its own; one after the other, both sides use all. `each`: of a server, if not so.

    Two programs of several threads on the same processors wait for each other at every matrix product, so
    servers are bound to the last ones, and only as many as there are.
    """
    count = len(available)
    if each is None:
        each = max(1, (count // 2 if overlapped else count) // servers)
    taken = [
        tuple(available[-1 - (n % count)] for n in range(i * each, (i + 1) * each)) for i in range(servers)
    ]
    free = count - servers * each if overlapped else count
    return Processors(tuple(tuple(sorted(set(cores))) for cores in taken), max(1, free))


def gpus(count: int, servers: int, learners: Sequence[int], colocated: bool = False) -> tuple[str, ...]:
    """The GPU of each server, by its CUDA index among `count`; `learners`: those of the learner's ranks.
    `colocated`: theirs come first and serve both, and the servers sleep while the learner works.

    Raises UserError where there are too few.
    """
    beside = [n for n in range(count) if n not in learners]
    others = [str(n) for n in ([*learners, *beside] if colocated else beside)]
    if len(others) < servers:
        hint = f"allowed: 1 to {len(others)}; or " if others else ""
        raise UserError(
            Fault(
                "sampler.servers",
                f"got {servers}, but beside the {len(learners)} of the learner there are {len(others)} "
                "GPUs here",
                f"{hint}share with sampler.colocated=true, or name servers elsewhere in cluster.server_urls",
            )
        )
    return tuple(others[:servers])
