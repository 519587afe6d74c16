"""Servers and transfers of a config that cannot work, and which transfer fits."""

from __future__ import annotations

from typing import Any

import pytest

from dash_exp.config import schema
from dash_exp.config.checks import is_loopback, server_faults
from dash_exp.config.compose import compose
from dash_exp.config.environment import KEY_VARIABLE, key_faults
from dash_exp.config.schema import Config
from dash_exp.train.build_servers import transfer_of

HERE, THERE = "http://127.0.0.1:8000", "http://10.0.0.7:8000"


@pytest.fixture(scope="module")
def base() -> Config:
    return compose(["model=tiny", "sampler=vllm_servers"])


def changed(base: Config, **values: Any) -> Config:
    groups = {"colocated": "sampler", "servers": "sampler", "device": "learner"}
    return schema.changed(base, {f"{groups.get(k, 'cluster')}.{k}": v for k, v in values.items()})


@pytest.mark.parametrize(
    ("values", "where", "what"),
    [
        ({"server_urls": ["10.0.0.7:8000"]}, "cluster.server_urls", "not the address of a server"),
        ({"server_urls": ["http://10.0.0.7"]}, "cluster.server_urls", "not the address of a server"),
        ({"server_urls": ["http://10.0.0.7:x"]}, "cluster.server_urls", "not the address of a server"),
        ({"server_urls": [HERE, HERE]}, "cluster.server_urls", "more than once"),
        ({"server_urls": [HERE, THERE]}, "cluster.weights_dir", "10.0.0.7:8000 does not share"),
        ({"server_urls": [THERE], "transfer": "shared"}, "cluster.weights_dir", "does not share"),
        ({"transfer": "file"}, "cluster.weights_dir", "cluster.transfer=file writes"),
        ({"transfer": "nccl", "device": "cpu"}, "cluster.transfer", "learner.device=cpu"),
        ({"transfer": "ipc"}, "cluster.transfer", "within the GPU that"),
        ({"transfer": "nccl", "colocated": True}, "cluster.transfer", "a GPU for each side"),
        ({"transfer": "ipc", "colocated": True, "servers": 2}, "cluster.transfer", "reaches one GPU"),
    ],
)
def test_faults(base: Config, values: dict[str, Any], where: str, what: str) -> None:
    (fault,) = server_faults(changed(base, **values))
    assert fault.where == where and what in fault.what


@pytest.mark.parametrize(
    "values",
    [
        {"server_urls": [HERE, "http://localhost:8001"]},
        {"server_urls": [THERE], "weights_dir": "/net"},
        {"server_urls": [THERE], "transfer": "nccl"},
        {"transfer": "ipc", "colocated": True},
    ],
)
def test_no_faults(base: Config, values: dict[str, Any]) -> None:
    assert list(server_faults(changed(base, **values))) == []


def test_other_samplers_have_no_servers() -> None:
    assert list(server_faults(compose(["model=tiny", "cluster.server_urls=[nonsense]"]))) == []


@pytest.mark.parametrize(
    ("values", "gpus", "learner_on_gpu", "fits"),
    [
        ({}, 0, False, "shared"),
        ({}, 4, True, "nccl"),
        ({}, 4, False, "shared"),
        ({"colocated": True}, 1, True, "ipc"),
        ({"colocated": True, "servers": 2}, 2, True, "shared"),
        ({"server_urls": [HERE]}, 4, True, "shared"),
        ({"server_urls": [HERE, THERE]}, 4, True, "file"),
        ({"weights_dir": "/net"}, 0, False, "file"),
        ({"transfer": "shared", "weights_dir": "/net"}, 4, True, "shared"),
    ],
)
def test_the_transfer_that_fits(
    base: Config, values: dict[str, Any], gpus: int, learner_on_gpu: bool, fits: str
) -> None:
    assert transfer_of(changed(base, **values), gpus, learner_on_gpu) == fits


def test_loopback() -> None:
    assert [is_loopback(f"http://{host}:1") for host in ("127.0.0.1", "localhost", "[::1]", "127.1.2.3")] == [
        True
    ] * 4
    assert not is_loopback("http://node7:1") and not is_loopback("http://0.0.0.0:1")


def test_a_key_that_no_request_can_carry_is_refused_and_never_shown() -> None:
    assert list(key_faults("secret-1_A", "here")) == []
    for key in ("", "secret\n", "sec ret", "secret\r\nX: 1", "sécret", "secret\x00", "\tsecret"):
        (fault,) = key_faults(key, "here")
        assert KEY_VARIABLE in fault.what and "cret" not in str(fault)
