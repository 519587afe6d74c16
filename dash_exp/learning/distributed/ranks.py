"""How the ranks of a learner find each other: started here, or all together by torchrun or srun."""

from __future__ import annotations

import os
import socket
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dash_exp.errors import Fault, UserError
from dash_exp.learning.distributed.links import START_S, Follower, Leader
from dash_exp.learning.distributed.member import Member
from dash_exp.learning.distributed.rank_process import RankProcess
from dash_exp.learning.distributed.watch import Door, knock
from dash_exp.learning.distributed.world import Place
from dash_exp.signals import handling, keep_freed_memory

LOOPBACK = "127.0.0.1"
DOOR = "dash/door"


def start(ranks: int, timeout_s: float, folder: Path) -> Leader:
    """Start ranks 1 to `ranks` - 1 on this machine; `folder`: for their logs. They and this process are
    reached over the loopback interface only."""
    names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if names:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", names[0])
    listener = socket.create_server((LOOPBACK, 0))
    port = listener.getsockname()[1]
    store = dist.TCPStore(
        LOOPBACK,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=listener.detach(),
    )
    common = {"size": ranks, "port": port, "timeout_s": timeout_s}
    members = {rank: RankProcess(rank, {"rank": rank, **common}, folder) for rank in range(1, ranks)}
    return Leader(store, ranks, timeout_s, members)


def serve_child(rank: int, size: int, port: int, timeout_s: float) -> int:
    """What a rank that was started by `start` does. Returns its exit code."""
    wait = timedelta(seconds=timeout_s)
    store = dist.TCPStore(LOOPBACK, port, is_master=False, wait_for_workers=False, timeout=wait)
    return _serve(Member(links := Follower(store, rank, size, timeout_s), rank), links)


def lead(place: Place, timeout_s: float) -> Leader:
    """Rank 0's end, where torchrun or srun started all of them."""
    store, door = _meet(place, timeout_s), Door()
    store.set(DOOR, str(door.port))
    members = door.receive(place.size, max(START_S, timeout_s))
    return Leader(store, place.size, timeout_s, members)


def follow(place: Place, timeout_s: float) -> int:
    """What every other rank does then. Signals that ask to stop are for rank 0, which ends its step first.
    Returns an exit code."""
    store = _meet(place, timeout_s)
    links = Follower(store, place.rank, place.size, timeout_s)
    keep_freed_memory()
    with (
        handling(lambda number, frame: None),
        knock(place.address, int(store.get(DOOR)), place.rank, max(START_S, timeout_s)),
    ):
        return _serve(Member(links, place.local_rank), links)


def _meet(place: Place, timeout_s: float) -> Any:
    try:
        socket.getaddrinfo(place.address, place.port)
    except OSError as error:
        raise UserError(
            Fault(
                "MASTER_ADDR",
                f"{place.address!r}, where rank 0 should be, has no address here: {error}",
                "set it to the name or address of rank 0's machine",
            )
        ) from error
    wait_s = max(START_S, timeout_s)
    url = f"tcp://{place.address}:{place.port}?rank={place.rank}&world_size={place.size}"
    try:
        store, _, _ = next(dist.rendezvous(url, timeout=timedelta(seconds=wait_s)))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        where = f"{place.address}:{place.port}"
        what = f"rank {place.rank} could not meet the others at {where} within {wait_s:g} s: {reason}"
        raise UserError(Fault("learner.ranks", what)) from error
    return store


def _serve(member: Member, links: Follower) -> int:
    """Follow rank 0 until it says stop (0), or is gone (1). What fails here is rank 0's to tell (2)."""
    try:
        links.serve(member.perform)
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        return 2
    except dist.DistNetworkError:
        print("rank 0 is gone", file=sys.stderr, flush=True)
        return 1
    return 0
