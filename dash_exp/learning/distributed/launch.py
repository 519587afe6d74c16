"""The processes of a learner's ranks: started here, or all together by torchrun or srun; and how rank 0
watches them. `python -m dash_exp.learning.distributed.launch` is a rank that `start_workers` starts: it reads
one line of JSON (rank, size, port, timeout_s), runs the commands of rank 0, and ends with its standard input.
Torch is imported late, so that this holds from the start.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dash_exp.errors import Fault, UserError
from dash_exp.learning.settings import START_S, RankInfo
from dash_exp.signals import SCHEDULERS, block_signals, handling, tune_malloc

if TYPE_CHECKING:
    from dash_exp.learning.distributed.communicator import Coordinator, WorkerCommunicator

LOOPBACK = "127.0.0.1"
PORT_KEY = "dash/door"
"""Where the store says at which port rank 0 accepts connections."""
COMMAND = (sys.executable, "-m", "dash_exp.learning.distributed.launch")
LOG_TAIL_LINES = 20


# --- ranks started here ---


def start_workers(ranks: int, timeout_s: float, folder: Path) -> Coordinator:
    """Start ranks 1 to `ranks` - 1 on this machine; `folder`: for their logs. They and this process are
    reached over the loopback interface only."""
    import torch.distributed as dist

    from dash_exp.learning.distributed.communicator import Coordinator

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
    workers = {rank: WorkerProcess({"rank": rank, **common}, folder) for rank in range(1, ranks)}
    return Coordinator(store, ranks, timeout_s, workers)


class WorkerProcess:
    """A rank as a child process in a process group of its own. It ends with its standard input, so it never
    outlives this process, however that ends."""

    def __init__(self, settings: dict[str, Any], folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"rank-{settings['rank']}.log"
        with self.log.open("ab") as log, block_signals(*SCHEDULERS):
            self.process = subprocess.Popen(
                COMMAND, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
            )
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it ended at once: `exit_reason` says so
            self.process.stdin.write(f"{json.dumps(settings)}\n".encode())
            self.process.stdin.flush()

    def exit_reason(self) -> str | None:
        """Return how it ended; None while it runs."""
        code = self.process.poll()
        if code is None:
            return None
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def log_tail(self) -> str:
        """Return the end of its log, for an error message."""
        try:
            lines = self.log.read_text(errors="replace").strip().splitlines()
        except OSError as error:
            lines = [f"({error})"]
        return "\n".join([f"\nthe end of {self.log.name}:", *(lines[-LOG_TAIL_LINES:] or ["(nothing)"])])

    def stop(self, wait_s: float) -> None:
        """Let it end; kill it where it does not."""
        if self.process.stdin is not None:
            with suppress(BrokenPipeError):
                self.process.stdin.close()
        try:
            self.process.wait(wait_s)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def main() -> int:
    """Run a rank that `start_workers` started."""
    args = json.loads(sys.stdin.readline())
    threading.Thread(target=end_with_parent, daemon=True).start()
    tune_malloc()
    import torch.distributed as dist

    from dash_exp.learning.distributed.communicator import WorkerCommunicator

    rank, size, timeout_s = args["rank"], args["size"], args["timeout_s"]
    try:
        store = dist.TCPStore(
            LOOPBACK,
            args["port"],
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
        )
        return serve(WorkerCommunicator(store, rank, size, timeout_s), rank)
    except Exception:  # noqa: BLE001  printed here, in the log; rank 0 already received the error message
        traceback.print_exc()
        return 1


def end_with_parent() -> None:
    """End this process when its parent is gone, which holds the other end of standard input."""
    sys.stdin.buffer.read()
    os._exit(1)


# --- ranks started by torchrun or srun ---


def connect_rank_0(info: RankInfo, timeout_s: float) -> Coordinator:
    """Connect rank 0 to the other ranks."""
    from dash_exp.learning.distributed.communicator import Coordinator

    store, listener = _rendezvous(info, timeout_s), Listener()
    store.set(PORT_KEY, str(listener.port))
    workers = listener.accept_workers(info.size, max(START_S, timeout_s))
    return Coordinator(store, info.size, timeout_s, workers)


def run_worker(info: RankInfo, timeout_s: float) -> int:
    """Run any other rank. Signals that ask to stop are for rank 0, which ends its step first. Returns
    an exit code."""
    from dash_exp.learning.distributed.communicator import WorkerCommunicator

    store = _rendezvous(info, timeout_s)
    communicator = WorkerCommunicator(store, info.rank, info.size, timeout_s)
    tune_malloc()
    with (
        handling(lambda number, frame: None),
        connect_to_rank_0(info.address, int(store.get(PORT_KEY)), info.rank, max(START_S, timeout_s)),
    ):
        return serve(communicator, info.local_rank)


def _rendezvous(info: RankInfo, timeout_s: float) -> Any:
    import torch.distributed as dist

    try:
        socket.getaddrinfo(info.address, info.port)
    except OSError as error:
        what = f"{info.address!r}, where rank 0 should be, has no address here: {error}"
        hint = "set it to the name or address of rank 0's machine"
        raise UserError(Fault("MASTER_ADDR", what, hint)) from error
    wait_s = max(START_S, timeout_s)
    url = f"tcp://{info.address}:{info.port}?rank={info.rank}&world_size={info.size}"
    try:
        store, _, _ = next(dist.rendezvous(url, timeout=timedelta(seconds=wait_s)))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        where = f"{info.address}:{info.port}"
        what = f"rank {info.rank} could not meet the others at {where} within {wait_s:g} s: {reason}"
        raise UserError(Fault("learner.ranks", what)) from error
    return store


class WorkerConnection:
    """Rank 0's end of a connection that a rank holds open while it lives: the system closes it when the
    process ends, however it ends."""

    def __init__(self, connection: socket.socket):
        self._connection = connection

    def exit_reason(self) -> str | None:
        """Return how it ended; None while it runs."""
        try:
            alive = self._connection.recv(1, socket.MSG_DONTWAIT)
        except BlockingIOError:  # nothing to read: a rank never sends anything
            return None
        except OSError as error:
            return f"is gone ({error.strerror})"
        return None if alive else "is gone: it has closed its connection"

    def log_tail(self) -> str:
        """Return nothing: the log is where torchrun or srun put it."""
        return ""

    def stop(self, wait_s: float) -> None:
        """Wait for its side to close."""
        with suppress(OSError), self._connection:
            self._connection.settimeout(wait_s)
            self._connection.recv(1)


class Listener:
    """A port of this machine, to which the other ranks connect."""

    def __init__(self) -> None:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self._server = socket.create_server(("", 0), family=family, backlog=1024, dualstack_ipv6=dual)
        self.port = int(self._server.getsockname()[1])

    def accept_workers(self, ranks: int, wait_s: float) -> dict[int, WorkerConnection]:
        """Wait for ranks 1 to `ranks` - 1. Raises UserError where some do not connect."""
        workers: dict[int, WorkerConnection] = {}
        deadline = time.monotonic() + wait_s
        with self._server:
            while len(workers) < ranks - 1:
                self._server.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    connection, _ = self._server.accept()
                    connection.settimeout(10)
                    (rank,) = struct.unpack("!I", connection.recv(4, socket.MSG_WAITALL))
                except (TimeoutError, struct.error):
                    if time.monotonic() < deadline:
                        continue  # not a rank, but a port scanner, say
                    missing = ", ".join(str(r) for r in range(1, ranks) if r not in workers)
                    what = f"rank {missing} did not connect within {wait_s:g} s"
                    raise UserError(Fault("learner.ranks", what)) from None
                connection.settimeout(None)
                workers[rank] = WorkerConnection(connection)
        return dict(sorted(workers.items()))


def connect_to_rank_0(address: str, port: int, rank: int, wait_s: float) -> socket.socket:
    """Open another rank's end of the connection, which it keeps open for as long as it lives."""
    connection = socket.create_connection((address, port), timeout=wait_s)
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.sendall(struct.pack("!I", rank))
    return connection


def serve(communicator: WorkerCommunicator, local_rank: int) -> int:
    """Run the commands of rank 0. Returns 0 after its stop, 1 where it is gone, 2 where a command failed in a
    way that rank 0 reports."""
    import torch.distributed as dist

    from dash_exp.learning.distributed.learner import Worker

    try:
        communicator.serve(Worker(communicator, local_rank).run)
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        return 2
    except dist.DistNetworkError:
        print("rank 0 is gone", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # without destructors that wait for other ranks
