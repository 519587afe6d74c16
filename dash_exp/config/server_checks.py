"""What is wrong with a config's servers and the way weights get to them. Torch-free."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from urllib.parse import urlsplit

from dash_exp.config.limits import unknown
from dash_exp.config.schema import Config
from dash_exp.errors import Fault

TRANSFERS = ("auto", "shared", "file", "nccl", "ipc")
URLS, TRANSFER = "cluster.server_urls", "cluster.transfer"


def server_faults(config: Config) -> Iterator[Fault]:
    c = config.cluster
    if c.transfer not in TRANSFERS:
        yield unknown(TRANSFER, c.transfer, TRANSFERS)
    if config.sampler.name != "vllm_servers":
        return
    for url in c.server_urls:
        if not _is_address(url):
            yield Fault(URLS, f"{url!r} is not the address of a server", "write http://host:port")
    repeated = sorted({url for url in c.server_urls if c.server_urls.count(url) > 1})
    if repeated:
        yield Fault(URLS, f"names {', '.join(repeated)} more than once")
    far = [url for url in c.server_urls if _is_address(url) and not is_loopback(url)]
    if far and not c.weights_dir and c.transfer in ("auto", "shared"):
        yield Fault(
            "cluster.weights_dir",
            f"is not set, but {far[0]} does not share this machine's memory",
            "name a folder that both see; between GPUs also cluster.transfer=nccl",
        )
    elif c.transfer == "file" and not c.weights_dir:
        yield Fault("cluster.weights_dir", "is not set, but cluster.transfer=file writes weights there")
    yield from _gpu_faults(config)


def _gpu_faults(config: Config) -> Iterator[Fault]:
    wanted, colocated = config.cluster.transfer, config.sampler.colocated
    if wanted in ("nccl", "ipc") and config.learner.device == "cpu":
        yield Fault(TRANSFER, f"{wanted} is between GPUs, but learner.device=cpu", "set it to auto")
    if wanted == "ipc" and not colocated:
        yield Fault(
            TRANSFER,
            "ipc is within the GPU that learner and server share",
            "set sampler.colocated=true, or cluster.transfer=nccl",
        )
    servers = len(config.cluster.server_urls) or config.sampler.servers
    if wanted == "ipc" and colocated and servers != 1:
        yield Fault(
            TRANSFER, f"ipc reaches one GPU, but there are {servers} servers", "set cluster.transfer=auto"
        )
    if wanted == "nccl" and colocated:
        yield Fault(
            TRANSFER,
            "nccl wants a GPU for each side, but sampler.colocated=true",
            "set cluster.transfer=auto",
        )


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname and parts.port)
    except ValueError:  # a port that is none
        return False


def is_loopback(url: str) -> bool:
    """Whether an address can be reached from this machine only."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def transfer_of(config: Config, gpus: int, learner_on_gpu: bool) -> str:
    """The way that `cluster.transfer=auto` takes. `gpus`: of this machine."""
    c, s = config.cluster, config.sampler
    if c.transfer != "auto":
        return c.transfer
    if c.weights_dir or any(not is_loopback(url) for url in c.server_urls):
        return "file"
    if c.server_urls or not gpus or not learner_on_gpu:
        return "shared"
    if s.colocated:
        return "ipc" if s.servers == 1 else "shared"  # the others are on other ranks' GPUs
    return "nccl"
