"""One server of a fleet: its process, its start, its health, its end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import aiohttp

from dash_exp.config.environment import KEY_VARIABLE
from dash_exp.errors import Fault, UserError
from dash_exp.record.folder import read_json
from dash_exp.sampling.fleet import leftovers
from dash_exp.sampling.fleet.client import CALL_ERRORS, RefusedError, Sampled, ServerClient, describe
from dash_exp.sampling.protocol import EngineSettings
from dash_exp.sampling.transfer import ENGINES, IPC
from dash_exp.signals import SCHEDULERS, block_signals
from dash_exp.types import Request

LAUNCH = (sys.executable, "-c", "from dash_exp.sampling.vllm.server import main; main()")
WHERE = "cluster.server_urls"
START_HINT = "start it with python -m dash_exp.serve, and wait until it says how to use it (docs/engine.md)"
END_WAIT_S, TIDY_S, POLL_S = 10.0, 3.0, 0.05
HEALTH_CHECKS = 3
"""So many failed in a row mean that the server is lost."""
LOG_TAIL_CHARS = 2000
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
REMOVED_VARIABLES = ("VLLM_API_KEY", KEY_VARIABLE, *RANK_VARIABLES)
"""Variables of this process that would mislead a server, or that it need not know."""
State = Literal["starting", "serving", "lost", "gone"]
"""A lost server may be started again; one that is gone is not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings(EngineSettings):
    """What a server is started with; the fields of the JSON line that it reads. `cores`: processors that it
    is bound to (none: any); `gpu`: the one it sees, by its index among those that this process sees."""

    transfer: str
    cores: tuple[int, ...] = ()
    gpu: str | None = None
    sleep: bool = False
    host: str = "127.0.0.1"
    port: int = 0


@dataclass(frozen=True, slots=True)
class Launch:
    """How servers are started and reached. `key`: required by every route; `folder`: for logs."""

    key: str
    folder: Path
    command: Sequence[str] = LAUNCH


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """When a server counts as lost, and how often servers are started again, in all. In seconds: `start_s`
    until a started server answers, `connect_s` until one that was started by hand does, `stall_s` without a
    token while requests are pending, `health_s` between health checks, `answer_s` until one is answered."""

    restarts: int
    start_s: float = 600.0
    connect_s: float = 120.0
    stall_s: float = 300.0
    health_s: float = 2.0
    answer_s: float = 10.0


class ServerProcess:
    """A server in a process group of its own, in which a scheduler's signals are blocked. It ends with its
    standard input, so it never outlives this process, however that ends. Its key is passed there too: not in
    arguments, the environment or a file."""

    def __init__(self, settings: ServerSettings, launch: Launch, name: str):
        launch.folder.mkdir(parents=True, exist_ok=True)
        self.log = launch.folder / f"{name}.log"
        self._ready = launch.folder / f".{name}.json"
        self._ready.unlink(missing_ok=True)
        self.host = settings.host
        sockets = leftovers.socket_folder()
        given = {**asdict(settings), "key": launch.key, "ready": str(self._ready.resolve())}
        with self.log.open("ab") as log, block_signals(*SCHEDULERS):
            self.process = subprocess.Popen(
                list(launch.command),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment(settings, sockets=sockets),
                start_new_session=True,
            )
        self.note = leftovers.Note(self.process.pid, sockets)
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended already, which `start` reports
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
        try:
            return self.log.read_text(errors="replace")[-LOG_TAIL_CHARS:]
        except OSError:
            return ""

    def kill(self) -> None:
        """End it and all its children. Its standard input is closed first and its children get a moment to
        clean up: killed at once, vLLM leaves files in shared memory."""
        self.note.write()
        if self.process.stdin is not None:
            with suppress(BrokenPipeError):
                self.process.stdin.close()
        with suppress(ProcessLookupError, PermissionError):
            os.kill(self.process.pid, signal.SIGCONT)  # a stopped process must notice too
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(END_WAIT_S)
        with suppress(ProcessLookupError, PermissionError):
            deadline = time.monotonic() + TIDY_S
            while self.process.returncode is not None and time.monotonic() < deadline:
                os.killpg(self.process.pid, 0)  # raises once the group is empty
                time.sleep(POLL_S)
            os.killpg(self.process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(END_WAIT_S)
        self._ready.unlink(missing_ok=True)
        self.note.clear()


def environment(
    settings: ServerSettings, given: Mapping[str, str] | None = None, sockets: Path | None = None
) -> dict[str, str]:
    """The server's environment: ours, with what must be set before vLLM is imported. `sockets`: where vLLM
    makes its own."""
    ours = os.environ if given is None else given
    made = {name: value for name, value in ours.items() if name not in REMOVED_VARIABLES}
    made |= {
        "VLLM_SERVER_DEV_MODE": "1",  # the routes that load weights; all of them require the key
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1" if settings.transfer == IPC else "0",
        "VLLM_CPU_KVCACHE_SPACE": str(max(1, round(settings.kv_cache_gb))),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, settings.cores)) or "nobind",
        "CUDA_VISIBLE_DEVICES": visible_gpu(settings.gpu, made.get("CUDA_VISIBLE_DEVICES")),
    }
    defaults = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
    defaults["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"] = "60"  # seconds: longer than we keep an unused connection
    if sockets is not None:
        made["VLLM_RPC_BASE_PATH"] = str(sockets)
    if "OMP_WAIT_POLICY" not in made:
        defaults["GOMP_SPINCOUNT"] = "2000"
    return defaults | made


def visible_gpu(index: str | None, ours: str | None) -> str:
    """CUDA_VISIBLE_DEVICES of a server: the GPU with this index among those that `ours` names, or among all
    where it names none."""
    if index is None:
        return ""
    names = [name.strip() for name in ours.split(",")] if ours else []
    return names[int(index)] if names else index


class ServerKilledError(RuntimeError):
    """A signal ended a server while it was starting."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What a server that was started by hand must have been started with. `config`: the hash of its model's
    config.json."""

    config: str
    vocabulary: int
    longest: int
    dtype: str
    transfer: str

    def unmet(self, url: str, facts: Mapping[str, Any]) -> list[Fault]:
        """`facts`: what it says of itself."""
        found: list[tuple[str, str]] = []
        if facts.get("config") != self.config:
            found.append(("serves another model: its config.json differs", "start it with the run's model"))
        for name, wanted in (("dtype", self.dtype), ("vocabulary", self.vocabulary)):
            if facts.get(name) != wanted:
                what = f"has {name} {facts.get(name)}, this run {wanted}"
                found.append((what, "start it with the model and sampler of the run"))
        if (length := int(facts.get("max_model_len", 0))) < self.longest:
            what = f"takes {length} tokens, this run needs {self.longest}"
            found.append((what, f"start it with serve.max_model_len={self.longest}"))
        if (transfer := facts.get("transfer")) != self.transfer:
            own = next(name for name, engine in ENGINES.items() if engine == self.transfer)
            what = f"takes weights by {transfer}, not {self.transfer}"
            found.append((what, f"start it with serve.transfer={own}, or set cluster.transfer"))
        return [Fault(WHERE, f"{url} {what}", hint) for what, hint in found]


@dataclass(eq=False, slots=True)
class Pending:
    """One group in flight: the request, its completions so far, and when it was last sent to a server
    (`start`). `cost`: tokens it is expected to take."""

    request: Request
    sampled: list[Sampled | None]
    cost: float
    start: float = 0.0

    @property
    def missing(self) -> list[int]:
        return [i for i, one in enumerate(self.sampled) if one is None]


@dataclass(eq=False)
class Member:
    """A server and its pending groups. `settings` None: it was started by hand and cannot be started from
    here; it has a URL, and must meet `needs`."""

    name: str
    settings: ServerSettings | None
    url: str | None = None
    needs: Needs | None = None
    state: State = "starting"
    reason: str = ""
    process: ServerProcess | None = None
    client: ServerClient | None = None
    pending: dict[int, Pending] = field(default_factory=dict)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    watch: asyncio.Task[None] | None = None
    last_token: float = 0.0

    @property
    def cost(self) -> float:
        return sum(one.cost for one in self.pending.values())

    @property
    def completions(self) -> int:
        return sum(len(one.missing) for one in self.pending.values())

    async def start(self, launch: Launch, policy: RestartPolicy, first: bool = False) -> None:
        """Start it, if it is ours, and wait until it answers. Raises RuntimeError where its process ends or
        does not answer, UserError where one that was started by hand does not, or does not fit. `first`: one
        that was started by hand is not waited for where nothing listens at its address."""
        self.state = "starting"
        if self.settings is not None:
            self.process = ServerProcess(self.settings, launch, self.name)
        wait_s = policy.connect_s if self.settings is None else policy.start_s
        try:
            async with asyncio.timeout(wait_s):
                await self._connect(launch.key, policy.answer_s, first)
        except TimeoutError as error:
            if self.settings is not None:
                raise RuntimeError(f"{self.name} did not start within {wait_s:g} s") from error
            what = f"{self.url} did not answer within {wait_s:g} s ({self.reason or 'it is slow'})"
            raise UserError(Fault(WHERE, what, START_HINT)) from error
        if self.needs is not None:
            await self._check(self.needs)
        if self.process is not None:
            self.process.note.write()

    async def _connect(self, key: str, answer_s: float, first: bool) -> None:
        self.reason = ""
        while True:
            if self.process is not None:
                if (code := self.process.exit_code) is not None:
                    kind = ServerKilledError if code < 0 else RuntimeError
                    raise kind(f"{self.name} ended with code {code} while starting: {self.log_tail()}")
                self.url = self.process.url
            if self.url is not None and self.client is None:
                self.client = ServerClient(self.url, key, answer_s)
            try:
                if self.client is not None and await self.client.healthy():
                    return
            except CALL_ERRORS as error:
                self.reason = describe(error)
                if first and self.process is None and isinstance(error, aiohttp.ClientConnectorError):
                    number = error.os_error.errno or 0
                    why = os.strerror(number) if number > 0 else error.os_error.strerror
                    what = f"{self.url} cannot be reached: {why or error}"
                    raise UserError(Fault(WHERE, what, START_HINT)) from error
            await asyncio.sleep(POLL_S)

    async def _check(self, needs: Needs) -> None:
        assert self.client is not None
        try:
            facts = await self.client.facts()
        except (RefusedError, *CALL_ERRORS) as error:
            if "401" in str(error):
                raise UserError(Fault(KEY_VARIABLE, f"is not the key of {self.url}")) from error
            what = f"{self.url} was not started with python -m dash_exp.serve: {error}"
            raise UserError(Fault(WHERE, what)) from error
        if faults := needs.unmet(str(self.url), facts):
            raise UserError(faults)

    async def wait_for_failure(self, policy: RestartPolicy) -> str:
        """Check its health while it serves. Returns when it has failed, and why; empty if it is no longer
        serving for another reason."""
        failed, sampled = 0, -1.0
        while True:
            await asyncio.sleep(policy.health_s)
            if self.state != "serving" or self.client is None:
                return ""
            if self.process is not None and self.process.exit_code is not None:
                return f"ended with code {self.process.exit_code}"
            try:
                well, reason = await self.client.healthy(), "/health reports an error"
                now = await self.client.tokens() if self.pending else sampled
            except CALL_ERRORS as error:
                well, now, reason = False, sampled, describe(error)
            failed = 0 if well else failed + 1
            if failed >= HEALTH_CHECKS:
                return f"{failed} health checks failed: {reason}"
            if now != sampled or not self.pending:
                sampled, self.last_token = now, time.monotonic()
            elif time.monotonic() - self.last_token > policy.stall_s:
                return f"no token for {policy.stall_s:g} s with requests pending"

    def log_tail(self) -> str:
        return self.process.log_tail()[-500:] if self.process is not None else ""

    async def stop(self) -> None:
        """End its process and close all connections."""
        if self.watch is not None and self.watch is not asyncio.current_task():
            self.watch.cancel()
        self.watch = None
        if self.client is not None:
            await self.client.close()
            self.client = None
        if self.process is not None:
            await asyncio.to_thread(self.process.kill)
            self.process = None
