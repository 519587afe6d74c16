"""A sampler over servers that have no model (fake_server.py), and what can be done to them."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dash_exp.sampling.fleet.fleet import FleetSettings
from dash_exp.sampling.fleet.member import Launch, Member, RestartPolicy, ServerSettings
from dash_exp.sampling.fleet.sampler import ServerSampler
from dash_exp.sampling.transfer import PATH, Transfer
from dash_exp.sampling.transfer.path import PathTransfer, SharedWeights
from dash_exp.types import Decoding, Group, Prompt, Request
from tests.sampling.fake_server import tokens_of

FAKE = (sys.executable, str(Path(__file__).with_name("fake_server.py")))
DECODING = Decoding(max_new_tokens=6, temperature=1.0, stop_ids=(1,))
POLICY = RestartPolicy(0, start_s=30, connect_s=1.0, stall_s=60, health_s=0.1, answer_s=0.5)
NAMED = [("weight", torch.arange(8.0)), ("bias", torch.ones(2, 3))]


def shared() -> Transfer:
    return PathTransfer(SharedWeights(torch.float32))


def server_settings(delay: float = 0.0, transfer: str = PATH, port: int = 0) -> ServerSettings:
    return ServerSettings(
        model=f"fake delay={delay}",
        vocabulary=100,
        max_model_len=64,
        max_sequences=16,
        dtype="float32",
        transfer=transfer,
        port=port,
    )


def fleet_settings(launch: Launch, policy: RestartPolicy = POLICY, **more: Any) -> FleetSettings:
    return FleetSettings(
        vocabulary=100, max_sequences=16, decode=lambda ids: str(ids), launch=launch, policy=policy, **more
    )


class Rig:
    """A sampler over fake servers, and what can be done to them."""

    def __init__(
        self, folder: Path, servers: int, delay: float, restarts: int, transfer: Transfer | None, **more: Any
    ):
        self.events: list[dict[str, Any]] = []
        transfer = transfer or shared()
        settings = server_settings(delay, transfer.engine)
        self.members = [Member(f"server-{n}", settings) for n in range(servers)]
        release = more.pop("release", lambda: None)
        policy = replace(more.pop("policy", POLICY), restarts=restarts)
        fleet = fleet_settings(Launch("secret", folder, FAKE), policy=policy, **more)
        self.sampler = ServerSampler(
            self.members, lambda: NAMED, transfer, fleet, event=self.event, release=release
        )

    def event(self, kind: str, start: float, end: float, **more: Any) -> None:
        self.events.append({"kind": kind, **more})

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [e for e in self.events if e["kind"] == kind]

    def pid(self, number: int) -> int:
        process = self.members[number].process
        assert process is not None
        return process.process.pid

    def kill(self, number: int, how: int = signal.SIGKILL) -> None:
        os.killpg(self.pid(number), how)

    def post(self, number: int, mode: str) -> Any:
        body = json.dumps({"mode": mode}).encode()
        headers = {"Authorization": "Bearer secret", "Content-Type": "application/json"}
        url = f"{self.members[number].url}/fake"
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=5) as reply:
            return json.load(reply)


def until(holds: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert holds()


def ask(count: int, repeats: int = 4, first: int = 0) -> list[Request]:
    return [
        Request(n, Prompt(f"p{n}", "t", "", (3, 4, 5), ""), tuple(range(start, start + repeats)))
        for n, start in enumerate(range(first, first + 100 * count, 100))
    ]


def check(groups: list[Group], asked: list[Request], version: str) -> None:
    """Every group once, with the tokens of its seeds at these weights."""
    assert sorted(g.position for g in groups) == [r.position for r in asked]
    for group in groups:
        seeds = asked[group.position].seeds
        assert [list(c.token_ids) for c in group.completions] == [tokens_of(s, version) for s in seeds]
        known = 0 if version == "default" else int(version.partition("-")[0])
        assert all(c.policy_version == known for c in group.completions)
        assert all(len(c.logprobs) == len(c.token_ids) for c in group.completions)
