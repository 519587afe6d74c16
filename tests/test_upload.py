"""Uploading to the hub: what its model card says, and the upload itself, to a server that speaks the hub's
protocol on this machine."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import validate_repo_id

from dash_exp.cell.__main__ import main, run_config
from dash_exp.cell.upload import repository_of
from dash_exp.config.checks import check
from dash_exp.config.compose import compose
from dash_exp.config.schema import changed
from dash_exp.errors import UserError
from dash_exp.record.card import model_card
from dash_exp.record.folder import read_json
from dash_exp.sweep.plan import make_plan
from tests.test_run import SMALL

TOKEN = "hf_of_a_test"
EVALS = [
    {"step": 0, "dataset": "sums|far", "metric": "accuracy", "value": 0.25, "low": 0.1, "high": 0.5, "n": 8},
    {"step": 3, "dataset": "sums|far", "metric": "accuracy", "value": 0.4, "low": 0.3, "high": 0.6, "n": 8},
    {"step": 6, "dataset": "sums|far", "metric": "accuracy", "value": 0.5, "low": 0.2, "high": 0.8, "n": 8},
    {"step": 6, "dataset": "sums|far", "metric": "pass@4", "n": 0},
    {"step": 6, "dataset": "sums|far", "metric": "length/mean_tokens", "value": 3.5, "n": 8},
]


def test_a_model_card_states_recipe_data_and_results() -> None:
    config = compose(["model=qwen0.5b", "sampler=hf", "algorithm=grpo", "dataset=own", "evaluation=gsm8k"])
    config = changed(
        config,
        {
            "dataset.path": "/home/someone/sums.jsonl",
            "dataset.verifier": "/home/someone/own_reward.py:score",
            "dataset.rewards": ["/home/someone/own_reward.py:brief"],
            "dataset.task_options": {"options": ["/home/someone/more"]},
            "algorithm.baseline": "/home/someone/own_advantage.py:middle",
        },
    )
    facts = {
        "datasets": {"training": "a" * 64, "gsm8k": "b" * 64},
        "model": {"weights_hash": "c" * 64},
        "code_hash": "d" * 64,
        "packages": {"torch": "2.9", "hydra-core": "1.3"},
    }
    text = model_card("grpo-x", config, facts, EVALS, {"step": 6, "reason": "all steps done"})
    known = ModelCard(text).data.to_dict()
    assert known["base_model"] == "Qwen/Qwen2.5-0.5B" and "datasets" not in known
    assert known["tags"] == ["dash_exp", "reinforcement-learning", "grpo"]
    assert r"| sums\|far | accuracy | 0.250 [0.100, 0.500] | 0.500 [0.200, 0.800] | 8 |" in text
    assert r"| sums\|far | pass@4 | - | - | 0 |" in text and "length/" not in text
    judged = "math (boxed_or_last)"
    own = "own_reward.py:score (boxed_or_last) + own_reward.py:brief"
    assert f"| training | file `sums.jsonl` | all | bare | {own} | {'a' * 16} |" in text
    assert f"| evaluation (gsm8k) | `openai/gsm8k`, split test | all | bare | {judged} | {'b' * 16} |" in text
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert recipe["algorithm"]["baseline"] == "own_advantage.py:middle"
    assert recipe["dataset"]["task_options"] == {"options": ["more"]} and "entropy" not in recipe["algorithm"]
    assert recipe["learner"]["lr"] == config.learner.lr and recipe["seed"] == 0
    assert "/home" not in text and "for 6 steps of" in text and "all steps done" in text


@pytest.mark.parametrize(
    ("target", "cell", "expected"),
    [
        ("me/mine", "dash-tiny-own-s0-12345678", "me/mine"),
        ("me", "dash-tiny-own-s0-12345678", "me/dash-tiny-own-s0-12345678"),
        ("me", "dash-tiny-a+b..ü--c-s0-12345678", "me/dash-tiny-a-b-c-s0-12345678"),
        ("me", f"dash-{'x' * 200}-s0-12345678", f"me/dash-{'x' * 82}-12345678"),
    ],
)
def test_the_name_of_a_repository(target: str, cell: str, expected: str) -> None:
    assert repository_of(target, cell) == expected
    validate_repo_id(expected)


class Hub(ThreadingHTTPServer):
    """What `create_repo` and `create_commit` ask of the hub. `commits`: the files of each, by repository."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.made: list[dict[str, Any]] = []
        self.tokens: set[str | None] = set()
        self.commits: list[tuple[str, dict[str, bytes]]] = []


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.tokens.add(self.headers["Authorization"])
        repository = "/".join(self.path.split("/")[3:5])
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            self.server.made.append(asked)
            answer: Any = {"url": f"{self.server.url}/{asked['organization']}/{asked['name']}"}
        elif self.path == "/api/validate-yaml":
            answer = {"errors": [], "warnings": []}
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            answer = {
                "files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            }
        else:
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            self.server.commits.append(
                (repository, {f["path"]: base64.b64decode(f["content"]) for f in files})
            )
            answer = {"commitUrl": f"{self.server.url}/{repository}/commit/abc", "commitOid": "abc"}
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *ignored: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


def test_a_finished_run_is_uploaded_once_also_later(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    short = [*SMALL, f"run.dir={tmp_path}", "algorithm.steps=1"]
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        UserError, match=r"me/mine could not be uploaded: .*\n +again: .* checkpoint.push_to=me/mine"
    ):
        run_config(compose([*short, "checkpoint.push_to=me/mine"]))
    (folder,) = (tmp_path / "cells").iterdir()
    assert read_json(folder / "status.json")["state"] == "finished"
    assert "push_to" not in (folder / "config.yaml").read_text()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    assert main([str(folder), "checkpoint.push_to=me/mine"]) == 0
    assert run_config(compose([*short, "checkpoint.push_to=me/mine", "run.progress=plain"])) == 0
    assert f"uploaded before: {hub.url}/me/mine" in capfd.readouterr().out
    assert list((tmp_path / "cells").iterdir()) == [folder], "the same cell, wherever it goes"
    assert hub.made == [{"name": "mine", "organization": "me", "visibility": "private"}]
    assert hub.tokens == {f"Bearer {TOKEN}"}
    ((repository, files),) = hub.commits
    (weights,) = (folder / "checkpoints").iterdir()
    here = {f.name: f.read_bytes() for f in weights.iterdir() if f.name != "checksums.json"}
    card = files.pop("README.md").decode()
    assert repository == "me/mine" and files == here and {"model.safetensors", "config.json"} <= set(files)
    assert "| arithmetic | accuracy | " in card and str(tmp_path) not in card
    (weights / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json has changed since it was written"):
        run_config(compose([*short, "checkpoint.push_to=me"]))


def test_what_cannot_be_uploaded_is_known_when_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    faults = check(compose(["model=tiny", "checkpoint.push_to=a/b/c"]))
    assert [f.where for f in faults] == ["checkpoint.push_to"] * 2
    assert "cannot name a repository" in faults[0].what and "HF_TOKEN" in faults[1].hint
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert check(compose(["model=tiny", "checkpoint.push_to=me"])) == []
    cells = [["model=tiny", f"seed={n}", "checkpoint.push_to=me/mine"] for n in (0, 1)]
    with pytest.raises(UserError, match=r"one repository for 2 cells[^\n]*\n[^\n]*checkpoint.push_to=me$"):
        make_plan("two", cells, root=tmp_path)
    plan = make_plan("two", [[*c[:2], "checkpoint.push_to=me"] for c in cells], root=tmp_path)
    assert "checkpoint.push_to=me" in plan.actions and len(plan.cells) == 2
