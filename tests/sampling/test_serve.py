"""`python -m dash_exp.serve`: its command line, its key, and how it ends. Long: real vLLM servers started by
hand, trained against by their URLs, in shared memory and through a folder, and lost on the way."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from dash_exp.errors import UserError
from dash_exp.record.folder import read_json, read_rows
from dash_exp.sampling.protocol import arrived
from dash_exp.serve import key_of, longest, main, parse, reachable, refuse_taken
from tests.conftest import REPOSITORY
from tests.sampling.server_rig import FAKE
from tests.test_run import finish, start, steps_of, wait_for_steps

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


def test_all_faults_at_once() -> None:
    with pytest.raises(UserError) as raised:
        parse(
            [
                "serve.prt=1",
                "serve.port=99999",
                "serve.transfer=shm",
                "serve.cores=[4096]",
                "serve.max_model_len=1",
                "sampler=hf",
                "model=tiny",
            ]
        )
    wrong = {fault.where for fault in raised.value.faults}
    assert wrong == {
        "serve.prt",
        "serve.port",
        "serve.transfer",
        "serve.cores",
        "serve.max_model_len",
        "sampler",
    }
    assert "did you mean 'port'" in str(raised.value)


def test_how_long_it_can_be_follows_from_the_config() -> None:
    """arithmetic: 64 + 6 tokens. With GSM8K's test set: 1024 of a prompt, and 9."""
    small = ["model=tiny", "sampler.max_new_tokens=6"]
    assert longest(parse(small).config) == 70
    assert (
        longest(parse([*small, "evaluation=gsm8k", "evaluation.sets.gsm8k.max_new_tokens=9"]).config) == 1033
    )


def test_the_key_is_made_once_and_its_owners_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DASH_SERVER_KEY", raising=False)
    key, file = key_of(tmp_path)
    assert file is not None and file.stat().st_mode & 0o777 == 0o600
    assert len(key) == 43 and file.read_text() == f"{key}\n"
    assert key_of(tmp_path) == (key, file)
    assert [p.name for p in tmp_path.iterdir()] == ["key"]
    file.chmod(0o640)
    with pytest.raises(UserError, match="can be read by others"):
        key_of(tmp_path)
    monkeypatch.setenv("DASH_SERVER_KEY", "my own")
    assert key_of(tmp_path) == ("my own", None)


def test_a_port_that_is_taken_is_refused_before_a_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["model=tiny", f"serve.port={port}", f"run.dir={tmp_path}"]) == 2
    assert f"serve.port: 127.0.0.1:{port} cannot be listened at" in capsys.readouterr().err
    refuse_taken("127.0.0.1", port)
    assert reachable("http://0.0.0.0:80", "box") == "http://box:80"


class Served:
    """One server started by hand."""

    def __init__(self, root: Path, *overrides: str, launch: str = "LAUNCH"):
        code = f"import sys; from dash_exp.serve import LAUNCH, main; sys.exit(main(sys.argv[1:], {launch}))"
        environment = {k: v for k, v in os.environ.items() if k != "DASH_SERVER_KEY"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "model=tiny", f"run.dir={root}", *overrides],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        self.said: list[str] = []
        self.url = ""

    def wait(self) -> None:
        """Until it has told how to use it."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line)
            if line.startswith("use"):
                self.url = line.partition("[")[2].partition("]")[0]
                return
        raise AssertionError("".join(self.said))

    @property
    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        self.process.send_signal(number)
        rest, _ = self.process.communicate(timeout=60)
        return self.process.returncode, "".join(self.said) + rest


def asked(url: str, path: str, key: str | None = None) -> Any:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with urllib.request.urlopen(urllib.request.Request(f"{url}{path}", headers=headers), timeout=10) as reply:
        return json.load(reply)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
@pytest.mark.long
def test_it_serves_until_it_is_told_to_end(tmp_path: Path, number: int) -> None:
    """With a server that has no model: the key is in no argument, variable or log; a scheduler's signals do
    not reach the server itself."""
    one = Served(tmp_path, "serve.port=0", launch=repr(FAKE))
    one.wait()
    key = (tmp_path / "servers" / "key").read_text().strip()
    assert asked(one.url, "/dash_exp/facts", key)["max_model_len"] == 70
    with pytest.raises(urllib.error.HTTPError, match="401"):
        asked(one.url, "/dash_exp/facts", "another")
    (child,) = one.children
    for process in (child, psutil.Process(one.process.pid)):
        assert key not in " ".join([*process.cmdline(), *process.environ().values()])
    child.send_signal(signal.SIGTERM)
    child.send_signal(signal.SIGUSR2)
    time.sleep(0.2)
    assert asked(one.url, "/dash_exp/facts", key)["dtype"] == "bfloat16"
    code, said = one.end(number)
    assert (code, said.splitlines()[-1]) == (0, "ended")
    assert not child.is_running() and key not in said
    assert all(key not in log.read_text() for log in (tmp_path / "servers").glob("*.log"))


@pytest.mark.long
def test_a_server_that_ends_is_told_with_its_log(tmp_path: Path) -> None:
    broken = (sys.executable, "-c", "import sys; sys.exit('no such thing')")
    one = Served(tmp_path, "serve.port=0", launch=repr(broken))
    said, _ = one.process.communicate(timeout=60)
    assert one.process.returncode == 1
    assert "ended with code 1" in said and "no such thing" in said and "Traceback" not in said


# --- with vLLM ------------------------------------------------------------------------------------------

FP32 = ["sampler=vllm_servers", "sampler.dtype=float32", "learner.precision=fp32", "evaluation=none"]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Served]]:
    """Two servers of the tiny model, on a processor each, with one key."""
    root = tmp_path_factory.mktemp("served")
    options = ["serve.port=0", "sampler.dtype=float32", "serve.max_model_len=300"]
    made = [Served(root, *options, f"serve.cores=[{n}]") for n in sorted(os.sched_getaffinity(0))[:2]]
    for one in made:
        one.wait()
    os.environ["DASH_SERVER_KEY"] = (root / "servers" / "key").read_text().strip()
    yield made
    del os.environ["DASH_SERVER_KEY"]
    for one in made:
        with suppress(ProcessLookupError):
            one.end()


def urls(*servers: Served) -> str:
    return f"cluster.server_urls=[{','.join(one.url for one in servers)}]"


def whole(root: Path, *overrides: str) -> Path:
    """Train, and see that every step was sampled with the learner's own weights."""
    process = start(root, *FP32, *overrides)
    output = finish(process, 300)
    assert process.returncode == 0, output
    (folder,) = (root / "cells").iterdir()
    check_steps(folder)
    return folder


def check_steps(folder: Path) -> None:
    rows = steps_of(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert max(row["policy/logprob_gap"] for row in rows) < 1e-3
    assert sum(row["updates"] for row in rows) > 2  # so the weights have moved
    assert [e for e in read_rows(folder / "events.jsonl").rows if e["kind"] == "fault"] == []


@pytest.mark.long
@needs_vllm
def test_one_run_after_another_trains_with_them(two: list[Served], tmp_path: Path) -> None:
    """Through shared memory, then, other weights, through a folder, as between machines."""
    first = whole(tmp_path / "shared", urls(*two), "sampler.waves=2")
    workers = {e["worker"] for e in read_rows(first / "events.jsonl").rows if e["kind"] == "sample"}
    assert {"server-0", "server-1"} <= workers
    place = tmp_path / "seen by both"
    whole(tmp_path / "file", urls(*two), f"cluster.weights_dir={place}", "seed=7")
    assert place.is_dir() and list(place.iterdir()) == []


@pytest.mark.long
@needs_vllm
def test_servers_that_die_fail_the_run_and_the_same_command_resumes(
    two: list[Served], tmp_path: Path
) -> None:
    root = tmp_path / "lost"
    others = Served(tmp_path, "serve.port=0", "sampler.dtype=float32", "serve.max_model_len=300")
    others.wait()
    key = os.environ["DASH_SERVER_KEY"]
    os.environ["DASH_SERVER_KEY"] = (tmp_path / "servers" / "key").read_text().strip()
    try:
        options = [*FP32, "sampler.restarts=0", "checkpoint.every=1"]
        process = start(root, *options, urls(others))
        wait_for_steps(root, 2, process, 400)
        (server,) = [c for c in others.children if "vllm.server" in " ".join(c.cmdline())]
        os.killpg(server.pid, signal.SIGKILL)
        output = finish(process, 120)
        assert process.returncode == 2 and "Traceback" not in output, output
        assert f"every server is lost: server-0 at {others.url}" in output
        (folder,) = (root / "cells").iterdir()
        assert read_json(folder / "status.json")["state"] == "failed"
        said, _ = others.process.communicate(timeout=60)
        assert others.process.returncode == 1 and "ended with code -9" in said
    finally:
        os.environ["DASH_SERVER_KEY"] = key
    again = start(root, *options, urls(*two))
    output = finish(again, 300)
    assert again.returncode == 0, output
    assert "resuming after step" in output
    rows = steps_of(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert max(row["policy/logprob_gap"] for row in rows) < 1e-3


@pytest.mark.long
@needs_vllm
def test_where_nothing_learns_they_get_the_models_own_weights(two: list[Served], tmp_path: Path) -> None:
    """Whatever a training run has left in them: greedy tokens are those of the hf sampler."""
    import torch

    from dash_exp.config.compose import compose
    from dash_exp.modeling.attention import ATTENTION
    from dash_exp.modeling.source import load_model, locate
    from dash_exp.train.build_servers import make_servers
    from dash_exp.train.parts import Policy
    from tests.sampling.test_hf import ask, by_position, sampler_of
    from tests.sampling.test_vllm import GREEDY

    config = compose(["model=tiny", *FP32, urls(*two)])
    folder = locate(config.model, tmp_path).folder
    policy = Policy(folder, 99, str, 40, model=lambda: None)
    sampler = make_servers(config, policy, tmp_path)
    try:
        requests = ask([5, 11, 3, 8], repeats=1)
        theirs = by_position(arrived(sampler.stream(requests, GREEDY)))
    finally:
        sampler.close()
    model = load_model(folder, torch.float32, ATTENTION)
    ours = by_position(sampler_of(model, vocabulary=99).stream(requests, GREEDY))
    for place, group in ours.items():
        assert theirs[place].completions[0].token_ids == group.completions[0].token_ids
