"""One vLLM server as a child process: started, watched, ended. Torch-free."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from dash_exp.record.folder import read_json
from dash_exp.sampling.transfer.base import IPC
from dash_exp.signals import SCHEDULERS, sheltered

LAUNCH = (sys.executable, "-c", "from dash_exp.sampling.vllm.server import main; main()")
END_WAIT_S, TIDY_S, POLL_S = 10.0, 3.0, 0.05
LOG_TAIL_CHARS = 2000
NOT_ITS_OWN = (
    "VLLM_API_KEY",
    "DASH_SERVER_KEY",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)
"""Variables of ours that would mislead it, or that it need not know."""


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What a server is started with; the fields of the JSON line that it reads. `cores`: processors it
    keeps to (none named: any); `gpu`: the one it sees, by its index among those that we see (None: none)."""

    model: str
    vocabulary: int
    max_model_len: int
    max_sequences: int
    dtype: str
    enforce_eager: bool
    transfer: str
    kv_cache_gb: float = 1.0
    gpu_memory_utilization: float | None = None
    cores: tuple[int, ...] = ()
    gpu: str | None = None
    sleep: bool = False
    host: str = "127.0.0.1"
    port: int = 0


class ServerProcess:
    """A server in a process group of its own, deaf to a scheduler's signals. It ends with its standard
    input, so it never outlives this process, however that ends. Its key goes there too: not into arguments,
    environment or a file."""

    def __init__(
        self, settings: ServerSettings, key: str, folder: Path, name: str, command: Sequence[str] = LAUNCH
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"{name}.log"
        self._ready = folder / f".{name}.json"
        self._ready.unlink(missing_ok=True)
        self.host = settings.host
        given = {**asdict(settings), "key": key, "ready": str(self._ready.resolve())}
        with self.log.open("ab") as log, sheltered(*SCHEDULERS):
            self.process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment(settings),
                start_new_session=True,
            )
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it died at once: seen by whoever waits for it
            self.process.stdin.write(f"{json.dumps(given)}\n".encode())
            self.process.stdin.flush()

    @property
    def url(self) -> str | None:
        """Where it listens; None until its port is bound."""
        port = read_json(self._ready).get("port")
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{port}" if port else None

    @property
    def exit_code(self) -> int | None:
        return self.process.poll()

    def log_tail(self) -> str:
        """The end of what it has said."""
        try:
            return self.log.read_text(errors="replace")[-LOG_TAIL_CHARS:]
        except OSError:
            return ""

    def kill(self) -> None:
        """End it and all that it started. It is asked first, and what it leaves has a moment to tidy up:
        killed at once, vLLM leaves files in shared memory behind."""
        if self.process.stdin is not None:
            with suppress(BrokenPipeError):
                self.process.stdin.close()
        with suppress(ProcessLookupError, PermissionError):
            os.kill(self.process.pid, signal.SIGCONT)  # one that was stopped notices too
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(END_WAIT_S)
        with suppress(ProcessLookupError, PermissionError):
            deadline = time.monotonic() + TIDY_S
            while self.process.returncode is not None and time.monotonic() < deadline:
                os.killpg(self.process.pid, 0)  # raises once nobody is left
                time.sleep(POLL_S)
            os.killpg(self.process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(END_WAIT_S)
        self._ready.unlink(missing_ok=True)


def environment(settings: ServerSettings, given: Mapping[str, str] | None = None) -> dict[str, str]:
    """The server's environment: ours, with what it must know before vLLM is imported."""
    made = dict(os.environ if given is None else given)
    for name in NOT_ITS_OWN:
        made.pop(name, None)
    made |= {
        "VLLM_SERVER_DEV_MODE": "1",  # the routes that weights come by; all of them want the key
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1" if settings.transfer == IPC else "0",
        "VLLM_CPU_KVCACHE_SPACE": str(max(1, round(settings.kv_cache_gb))),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, settings.cores)) or "nobind",
        "CUDA_VISIBLE_DEVICES": visible_gpu(settings.gpu, made.get("CUDA_VISIBLE_DEVICES")),
    }
    made.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    made.setdefault("VLLM_NO_USAGE_STATS", "1")
    made.setdefault("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "60")  # seconds: longer than we keep an unused connection
    if "OMP_WAIT_POLICY" not in made:
        made.setdefault("GOMP_SPINCOUNT", "2000")
    return made


def visible_gpu(index: str | None, ours: str | None) -> str:
    """CUDA_VISIBLE_DEVICES of a server: the GPU with this index among those that `ours` names, or among all
    where it names none."""
    if index is None:
        return ""
    names = [name.strip() for name in ours.split(",")] if ours else []
    return names[int(index)] if names else index
