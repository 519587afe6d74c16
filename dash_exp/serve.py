"""Start one vLLM server, for runs that name it in cluster.server_urls:

    python -m dash_exp.serve [model=<option>] [sampler.max_new_tokens=...] [serve.port=8000] [key=value ...]

Give it the model, dataset, evaluation and sampler of the runs: they determine how long prompts and
completions can be. A run sends its own weights, so one server can serve one run after another.

The key that every request needs is read from the variable DASH_SERVER_KEY. Without it a key is made, in
`<run.dir>/servers/key`, readable by its owner only; servers started later use it too. The server
ends at Ctrl-C or SIGTERM. Its output goes to `<run.dir>/servers/serve-<port>.log`.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path

from dash_exp.config.checks import check, is_below, is_loopback
from dash_exp.config.compose import compose, find_faults
from dash_exp.config.environment import KEY_VARIABLE, key_faults
from dash_exp.config.overrides import own_settings, split_off
from dash_exp.config.schema import Config, changed, dataset_places
from dash_exp.errors import ExitCode, Fault, UserError, disk_errors_below, print_error, run_command
from dash_exp.sampling.fleet import leftovers
from dash_exp.sampling.fleet.member import LAUNCH, Launch, ServerProcess, ServerSettings
from dash_exp.sampling.transfer import ENGINES
from dash_exp.signals import Interrupted, Stop, handling, reduce_openmp_spinning
from dash_exp.text import format_path

USAGE = "python -m dash_exp.serve [model=<option>] [serve.port=8000] [key=value ...]"
USED = ("model", "sampler", "paths", "run", "config")
"""Where a fault of the whole config matters: nothing is asked or learned here."""
POLL_S = 0.2
LAST_PORT = 65_535


@dataclass
class ServeConfig:
    """Keys of the command line: `serve.port` and so on."""

    host: str = "127.0.0.1"
    """The address it listens at; 0.0.0.0: all of this machine's. Requests are not encrypted."""
    port: int = 8000
    """0: any that is free."""
    max_model_len: int | None = None
    """Tokens of the longest prompt with its completion; null: what the config allows."""
    transfer: str = "file"
    """How weights come: `file` (shared memory, or cluster.weights_dir), `nccl`, `ipc` (GPUs)."""
    gpu: int = 0
    """Which of the GPUs that are seen, where there are any."""
    cores: list[int] = field(default_factory=list)
    """Without a GPU: processors it keeps to; none named: any."""


@dataclass(frozen=True, slots=True)
class Command:
    """A command line that can be started."""

    config: Config
    serve: ServeConfig


def parse(arguments: Sequence[str]) -> Command:
    """Raises UserError with every fault of a command line."""
    own, rest = split_off("serve", arguments)
    serve, faults = own_settings(ServeConfig, "serve", own)
    written = {text.partition("=")[0] for text in rest}
    overrides = [*([] if "sampler" in written else ["sampler=vllm_servers"]), *rest]
    found = find_faults(overrides, checked=False)
    if found:
        raise UserError(faults + found)
    config = compose(overrides)
    config = changed(config, {"cluster.server_urls": []})  # this command starts one of them
    faults += [fault for fault in check(config) if is_below(fault.where, USED)]
    faults += setting_faults(serve, config)
    faults += key_faults(os.environ.get(KEY_VARIABLE) or "made", "serve")
    if faults:
        raise UserError(faults)
    return Command(config, serve)


def setting_faults(serve: ServeConfig, config: Config) -> list[Fault]:
    found = []
    if config.sampler.name != "vllm_servers":
        what = f"got {config.sampler.name!r}, but this command starts a server of sampler=vllm_servers"
        found.append(Fault("sampler", what, "leave it out"))
    if not 0 <= serve.port <= LAST_PORT:
        found.append(Fault("serve.port", f"got {serve.port}, must be 0 to {LAST_PORT}"))
    if serve.max_model_len is not None and serve.max_model_len < 2:
        found.append(Fault("serve.max_model_len", f"got {serve.max_model_len}, must be at least 2"))
    if serve.transfer not in ENGINES:
        found.append(Fault("serve.transfer", f"got {serve.transfer!r}", f"allowed: {', '.join(ENGINES)}"))
    allowed = os.sched_getaffinity(0)
    if absent := sorted(set(serve.cores) - allowed):
        what = f"names {absent}, which this process may not use"
        found.append(Fault("serve.cores", what, f"allowed: {sorted(allowed)}"))
    return found


def longest(config: Config) -> int:
    """Tokens of the longest prompt with its completion that runs of this config can ask for."""
    own = config.sampler.max_new_tokens
    sets = dataset_places(config).values()
    return max(one.max_prompt_tokens + (one.max_new_tokens or own) for one in sets)


def settings_of(command: Command, cache: Path) -> ServerSettings:
    """Finds the model. Raises UserError if there is none, or it is too small."""
    import torch

    from dash_exp.modeling.source import load_tokenizer, locate, position_limit
    from dash_exp.train.build_servers import server_settings

    config, serve = command.config, command.serve
    folder = locate(config.model, cache).folder
    limit = position_limit(folder)
    if (serve.max_model_len or 0) > limit:
        raise UserError(Fault("serve.max_model_len", f"got {serve.max_model_len}, the model takes {limit}"))
    length = serve.max_model_len or min(limit, longest(config))
    vocabulary = len(load_tokenizer(folder))
    plain = server_settings(config, folder, vocabulary, length, ENGINES[serve.transfer])
    count = torch.cuda.device_count()
    if count and not 0 <= serve.gpu < count:
        raise UserError(Fault("serve.gpu", f"got {serve.gpu}, but there are {count} GPUs here"))
    if not count and serve.transfer != "file":
        raise UserError(Fault("serve.transfer", f"got {serve.transfer!r}, but there is no GPU here"))
    place = {"gpu": str(serve.gpu)} if count else {"cores": tuple(serve.cores)}
    return replace(plain, **place, host=serve.host, port=serve.port)


def key_of(folder: Path) -> tuple[str, Path | None]:
    """The key, and the file that it lies in; None: the user's own key. The file is written once, atomically,
    readable by its owner only; raises UserError if others could read it."""
    if given := os.environ.get(KEY_VARIABLE, ""):
        return given, None
    path = folder / "key"
    if not path.exists():
        handle, aside = tempfile.mkstemp(prefix=".key-", dir=folder)  # of mode 600
        try:
            with os.fdopen(handle, "w") as file:
                file.write(f"{secrets.token_urlsafe(32)}\n")
            os.link(aside, path)
        except FileExistsError:
            pass  # another server was faster: its key is ours too
        finally:
            os.unlink(aside)
    if path.stat().st_mode & 0o077 or path.stat().st_uid != os.getuid():
        raise UserError(Fault(str(path), "can be read by others, so it is no secret", "remove it"))
    return path.read_text().strip(), path


def refuse_taken(host: str, port: int) -> None:
    """Refuse at once what vLLM would refuse after it has loaded the model."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            what = f"{host}:{port} cannot be listened at: {error.strerror or error}"
            raise UserError(Fault("serve.port", what, "choose another one, or 0 for any")) from error


def run(command: Command, launch: Sequence[str] = LAUNCH) -> int:
    """Serve until a signal ends it. `launch`: the program of the server. Returns an exit code."""
    reduce_openmp_spinning()
    root = Path(command.config.run.dir)
    folder = root / "servers"
    folder.mkdir(parents=True, exist_ok=True)
    leftovers.sweep()
    refuse_taken(command.serve.host, command.serve.port)
    key, file = key_of(folder)
    settings = settings_of(command, root / "cache")
    process = ServerProcess(settings, Launch(key, folder, launch), f"serve-{settings.port or os.getpid()}")
    try:
        print(f"starting, this takes a while; log  {format_path(process.log)}", flush=True)
        if answers(process):
            process.note.write()
            print("\n".join(usage_lines(command, settings, process, file)), flush=True)
            process.process.wait()
    finally:
        process.kill()
    print_error(
        f"dash_exp: the server ended with code {process.exit_code}; the end of {format_path(process.log)}:"
    )
    print_error(process.log_tail())
    return ExitCode.FAILED


def answers(process: ServerProcess) -> bool:
    """Wait until it does; False if it ends before."""
    while process.exit_code is None:
        if process.url is not None:
            try:
                with urllib.request.urlopen(f"{reachable(process.url)}/health", timeout=10) as reply:
                    if reply.status == 200:
                        return True
            except (OSError, urllib.error.URLError):
                pass
        time.sleep(POLL_S)
    return False


def reachable(url: str, name: str = "127.0.0.1") -> str:
    """A URL in which a name stands for all addresses of this machine."""
    return url.replace("//0.0.0.0:", f"//{name}:")


def usage_lines(
    command: Command, settings: ServerSettings, process: ServerProcess, file: Path | None
) -> list[str]:
    """How runs use the server."""
    url = reachable(str(process.url), socket.gethostname())
    name = command.config.model.name
    lines = [
        f"{name} at {url}  ({settings.dtype}, prompt and completion up to {settings.max_model_len} tokens)"
    ]
    if not is_loopback(url):
        lines.append("note: requests and key are not encrypted: use it in a network that you trust")
    if file is not None:
        lines += [f"key  {format_path(file)}", f"     export {KEY_VARIABLE}=$(cat {format_path(file)})"]
    return [*lines, f"use  python -m dash_exp sampler=vllm_servers 'cluster.server_urls=[{url}]'"]


def main(arguments: Sequence[str], launch: Sequence[str] = LAUNCH) -> int:
    keys = "\n".join(f"    serve.{f.name}" for f in fields(ServeConfig))
    usage = f"usage: {USAGE}\n\n{__doc__}\nIts own keys:\n{keys}"
    return run_command(partial(start, launch=launch), arguments, usage)


def start(arguments: Sequence[str], launch: Sequence[str]) -> int:
    """Parse the command line and serve until a signal ends it."""
    try:
        with handling(Stop()):
            command = parse(arguments)
            with disk_errors_below(Path(command.config.run.dir)):
                return run(command, launch)
    except (Interrupted, KeyboardInterrupt):
        print("ended", flush=True)
        return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
