"""Real vLLM servers on the tiny model in fp32, on this machine's processors: the same distribution as the
learner's, after new weights too, and nothing lost when one is killed."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import save_file

from dash_exp.record.checkpoint import checksum
from dash_exp.sampling.fleet.fleet import FleetSettings
from dash_exp.sampling.fleet.member import Launch, Member, RestartPolicy, ServerSettings
from dash_exp.sampling.fleet.sampler import ServerSampler
from dash_exp.sampling.protocol import arrived
from dash_exp.sampling.transfer import PATH
from dash_exp.sampling.transfer.path import PathTransfer, SharedWeights
from tests.sampling.test_hf import ask, by_position, sampler_of
from tests.sampling.test_vllm import FREE, GREEDY, SEEN, learner_gap

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


@dataclasses.dataclass
class Rig:
    sampler: ServerSampler
    members: list[Member]
    model: Any
    events: list[dict[str, Any]]


@pytest.fixture(scope="module")
def rig(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """Two servers for all tests, and the model whose weights they follow."""
    from dash_exp.modeling.attention import ATTENTION
    from dash_exp.modeling.source import load_model

    model = load_model(tiny_folder, torch.float32, ATTENTION)
    settings = ServerSettings(
        model=str(tiny_folder),
        vocabulary=SEEN,
        max_model_len=64,
        max_sequences=64,
        dtype="float32",
        enforce_eager=True,
        transfer=PATH,
    )
    events: list[dict[str, Any]] = []
    members = [Member(f"server-{n}", dataclasses.replace(settings, cores=(n,))) for n in range(2)]
    fleet = FleetSettings(
        vocabulary=SEEN,
        max_sequences=64,
        decode=str,
        launch=Launch("secret", tmp_path_factory.mktemp("logs")),
        policy=RestartPolicy(2),
    )
    sampler = ServerSampler(
        members,
        model.named_parameters,
        PathTransfer(SharedWeights(torch.float32)),
        fleet,
        lambda kind, start, end, **more: events.append({"kind": kind, **more}),
    )
    yield Rig(sampler, members, model, events)
    sampler.close()


def sampled(rig: Rig, prompts: list[int], repeats: int, decoding: Any = FREE) -> list[Any]:
    return list(arrived(rig.sampler.stream(ask(prompts, repeats), decoding)))


def test_the_distribution_is_the_learners(rig: Rig) -> None:
    groups = sampled(rig, [5, 11, 3, 8, 9, 6, 4, 12], 4)
    assert sorted(g.position for g in groups) == list(range(8))
    assert {g.origin.worker for g in groups} == {"server-0", "server-1"}
    assert learner_gap(rig.model, groups, 1.0).abs().mean() < 1e-3


def test_greedy_equals_the_hf_sampler(rig: Rig) -> None:
    requests = ask([5, 11, 3], repeats=1)
    ours = by_position(arrived(rig.sampler.stream(requests, GREEDY)))
    theirs = by_position(sampler_of(rig.model, vocabulary=SEEN).stream(requests, GREEDY))
    assert [ours[n].completions[0].token_ids for n in range(3)] == [
        theirs[n].completions[0].token_ids for n in range(3)
    ]


@pytest.mark.parametrize("path", ["/metrics", "/weight_info", "/v1/models", "/openapi.json"])
def test_no_route_answers_without_the_key(rig: Rig, path: str) -> None:
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{rig.members[0].url}{path}", timeout=10)


def test_new_weights_reach_both_and_old_prefixes_are_forgotten(rig: Rig) -> None:
    before = by_position(sampled(rig, [17, 20], 2))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in rig.model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    rig.sampler.load_weights(3)
    after = sampled(rig, [17, 20, 17, 20], 2)
    assert {c.policy_version for g in after for c in g.completions} == {3}
    assert {g.origin.worker for g in after} == {"server-0", "server-1"}
    assert learner_gap(rig.model, after, 1.0).abs().max() < 2e-3
    changed = by_position(after)[0].completions[0].logprobs[0]
    assert abs(changed - before[0].completions[0].logprobs[0]) > 1e-3


def test_what_is_not_what_the_learner_sent_is_not_loaded(rig: Rig, tmp_path: Path) -> None:
    named = {name: p.detach().clone() for name, p in rig.model.named_parameters()}
    sums = {name: checksum(tensor) for name, tensor in named.items()}
    first = next(iter(named))
    named[first].view(-1)[0] += 1
    path = tmp_path / "wrong.safetensors"
    save_file(named, path)
    client = rig.members[0].client
    assert client is not None
    loading = client.load({"path": str(path), "checksums": sums}, "9")
    with pytest.raises(Exception, match=r"500|not what the learner sent"):
        rig.sampler._run(loading)


def test_a_schedulers_signals_reach_no_process_of_a_server(rig: Rig) -> None:
    """The run ends its step when it is warned, and needs them for it."""
    faults = len([e for e in rig.events if e["kind"] == "fault"])
    for member in rig.members:
        assert member.process is not None
        leader = psutil.Process(member.process.process.pid)
        family = [leader, *leader.children(recursive=True)]
        assert len(family) >= 3
        for number in (signal.SIGUSR2, signal.SIGTERM):
            for process in family:
                if "resource_tracker" not in " ".join(process.cmdline()):
                    process.send_signal(number)
    time.sleep(3)
    assert {g.origin.worker for g in sampled(rig, [6] * 8, 2)} == {"server-0", "server-1"}
    assert len([e for e in rig.events if e["kind"] == "fault"]) == faults


def test_a_killed_server_loses_nothing_and_comes_back_with_the_weights(rig: Rig) -> None:
    """Killed while it samples: noticed, replaced, brought up to date."""
    long = dataclasses.replace(FREE, max_new_tokens=40, stop_ids=())
    rig.sampler.load_weights(4)  # also lets the one that refused weights come back
    wait(lambda: all(m.state == "serving" for m in rig.members))
    process = rig.members[1].process
    assert process is not None
    stream = rig.sampler.stream(ask([6] * 40, 4), long)
    got = [next(stream)]
    os.killpg(process.process.pid, signal.SIGKILL)
    got += list(stream)
    groups = [g for g in got if g is not None]
    assert sorted(g.position for g in groups) == list(range(40))
    assert learner_gap(rig.model, groups, 1.0).abs().mean() < 1e-3
    wait(lambda: all(m.state == "serving" for m in rig.members))
    again = sampled(rig, [17] * 8, 2)
    assert {g.origin.worker for g in again} == {"server-0", "server-1"}
    assert learner_gap(rig.model, again, 1.0).abs().mean() < 1e-3
    assert [e["version"] for e in rig.events if e["kind"] == "restart"][-1] == 4


def wait(holds: Any, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert holds()
