"""A server's end of weight transfers: it waits for what has not arrived, and refuses what was not sent. With
a model: test_vllm_servers.py; between GPUs: not run yet."""

from __future__ import annotations

import asyncio
import importlib.util
import threading
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dash_exp.record.checkpoint import checksum, fingerprints
from dash_exp.sampling.fleet.member import ServerSettings
from dash_exp.sampling.transfer import PATH

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.filterwarnings("ignore"),  # vLLM's own imports warn
]
SENT = {"a": torch.arange(4.0), "b": torch.ones(2, 3)}
SUMS = fingerprints(SENT)


class Model:
    """Accepts any tensors, as vLLM's models do."""

    def __init__(self) -> None:
        self.held: dict[str, torch.Tensor] = {}

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        fresh = dict(weights)
        self.held |= fresh
        return set(fresh)


def received(*parts: dict[str, torch.Tensor]) -> Model:
    """A model after these parts have come, one after the other."""
    from dash_exp.sampling.vllm.weights import checking

    model = Model()
    engine = SimpleNamespace(model=model)
    try:
        with checking(engine, SUMS, SENT, {"b": tuple(SENT["b"].shape)}):
            for part in parts:
                engine.model.load_weights(part.items())
    finally:
        assert engine.model is model
    return model


def test_parts_are_checked_as_they_come() -> None:
    assert received({"a": SENT["a"]}, {"b": SENT["b"]}).held.keys() == SENT.keys()


@pytest.mark.parametrize(
    ("parts", "what"),
    [
        ([{"a": SENT["a"] + 1, "b": SENT["b"]}], "a is not what the learner sent"),
        ([SENT | {"c": SENT["a"]}], "c is not what the learner sent"),
        ([SENT, {"a": SENT["a"]}], "a is not what the learner sent"),
        ([{"a": SENT["a"]}], r"\['b'\] did not arrive"),
        ([], r"\['a', 'b'\] did not arrive"),
    ],
)
def test_what_was_not_sent_is_refused(parts: list[dict[str, torch.Tensor]], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        received(*parts)


def test_a_tensor_of_another_shape_is_refused_before_it_is_loaded() -> None:
    from dash_exp.sampling.vllm.weights import check

    tensor = torch.ones(4, 2)
    check("a", tensor, checksum(tensor), {"a": checksum(tensor)}, {"a": (4, 2)})
    with pytest.raises(ValueError, match=r"a has shape \(4, 2\), but \(8, 2\) in the model of this server"):
        check("a", tensor, checksum(tensor), {"a": checksum(tensor)}, {"a": (8, 2)})


def test_what_the_model_holds_is_what_was_sent() -> None:
    from dash_exp.sampling.vllm.weights import check_loaded

    model = torch.nn.Module()
    model.joined, model.lm_head = torch.nn.Linear(2, 4, bias=False), torch.nn.Linear(2, 3, bias=False)
    sent = {"q": torch.randn(2, 2), "k": torch.randn(2, 2), "lm_head.weight": model.lm_head.weight.detach()}
    model.joined.weight.data = torch.cat([sent["q"], sent["k"]])
    check_loaded(sent, model, ["joined.weight", "lm_head.weight"])
    model.joined.weight.data[3] = 0
    with pytest.raises(ValueError, match="the model holds numbers of size"):
        check_loaded(sent, model, ["joined.weight", "lm_head.weight"])


def test_the_transfers_between_gpus_take_checksums() -> None:
    """The fields of vLLM's own, and ours; more cannot be tried without a GPU."""
    from dash_exp.sampling.vllm.weights import IPCReceiver, IPCUpdate, NCCLReceiver, NCCLUpdate

    fields = {"names": ["a"], "dtype_names": ["float32"], "shapes": [[4]], "checksums": SUMS}
    assert NCCLUpdate(**fields).checksums == SUMS
    assert IPCUpdate(**fields, ipc_handles=[{"gpu": (1,)}]).checksums == SUMS
    assert NCCLReceiver.update_info_cls is NCCLUpdate and IPCReceiver.update_info_cls is IPCUpdate


def test_the_mask_fits_both_model_runners() -> None:
    """The second one is that of GPUs; its way of loading such classes runs anywhere."""
    from vllm.v1.sample.logits_processor import LogitsProcessor
    from vllm.v1.worker.gpu.sample.logits_processor.loader import _load_v2_logitsprocs

    from dash_exp.sampling.vllm.engine import MaskPadding

    (found,) = _load_v2_logitsprocs(["dash_exp.sampling.vllm.engine:MaskPadding"])
    assert found is MaskPadding and issubclass(found, LogitsProcessor)
    config = SimpleNamespace(additional_config={"dash_vocabulary": 3})
    first, second = found(config, torch.device("cpu"), False), found(config, SimpleNamespace())
    expected = torch.tensor([[1.0, 2.0, 3.0, -torch.inf, -torch.inf]])
    for made, context in ((first, ()), (second, (SimpleNamespace(),))):
        logits = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
        assert torch.equal(made.apply(logits, *context), expected)
    assert second.add_request(0, SimpleNamespace()) and not first.is_argmax_invariant()
    first.update_state(None)
    second.apply_staged_writes()


def test_a_file_of_another_machine_is_waited_for(tmp_path: Path) -> None:
    from dash_exp.sampling.vllm.weights import wait_for_file

    path = tmp_path / "folder" / "weights-1.safetensors"

    def write() -> None:
        time.sleep(0.3)
        path.parent.mkdir()
        path.touch()

    thread = threading.Thread(target=write)
    thread.start()
    assert wait_for_file(path, 10) == path
    thread.join()
    with pytest.raises(FileNotFoundError, match=r"weights-2\.safetensors is not visible to this server"):
        wait_for_file(path.with_name("weights-2.safetensors"), 0)


def test_vllm_accepts_the_command_line_of_a_server() -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from dash_exp.sampling.vllm.server import command_line

    settings = ServerSettings(
        model="m", vocabulary=90, max_model_len=64, max_sequences=8, dtype="float32", transfer=PATH, port=81
    )
    for made in (settings, replace(settings, enforce_eager=True, sleep=True)):
        args = make_arg_parser(FlexibleArgumentParser()).parse_args(command_line(made))
        validate_parsed_serve_args(args)
        assert (args.model, args.max_num_seqs, args.max_model_len, args.port) == ("m", 8, 64, 81)
        eager = made.enforce_eager or not torch.cuda.is_available()
        assert (args.enforce_eager, args.enable_sleep_mode) == (eager, made.sleep)
        assert args.logits_processors == ["dash_exp.sampling.vllm.engine:MaskPadding"]
        assert args.additional_config == {"dash_vocabulary": 90}
        assert args.weight_transfer_config.backend == PATH


def test_every_route_but_health_requires_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    from dash_exp.sampling.vllm import server

    monkeypatch.setattr(server, "_key", "secret")
    monkeypatch.setattr(server, "_facts", {"dtype": "float32"})
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        sent.append({"status": 200, "body": b"app"})

    def answer(path: str, key: str = "", kind: str = "http") -> tuple[int, bytes] | None:
        sent.clear()
        headers = [(b"authorization", f"Bearer {key}".encode())] if key else []
        scope = {"type": kind, "path": path, "headers": headers}
        asyncio.run(server.RequireKey(app)(scope, None, send))
        return (sent[0]["status"], sent[-1]["body"]) if sent else None

    assert answer("/health") == answer("/metrics", "secret") == (200, b"app")
    assert answer("/dash_exp/facts", "secret") == (200, b'{"dtype": "float32"}')
    for path in ("/metrics", "/update_weights", "/dash_exp/facts"):
        assert answer(path) == answer(path, "wrong") == (401, b"the key is missing or wrong")
    assert answer("/", "secret", "websocket") is None
