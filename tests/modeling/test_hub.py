"""What is not here and cannot be fetched is named at once, before anything waits for a connection."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
from huggingface_hub import constants

from dash_exp.config.compose import compose
from dash_exp.config.schema import dataset_places
from dash_exp.errors import UserError
from dash_exp.modeling.hub import refuse_unreachable

pytest_plugins = ["tests.config.config_fixtures"]
pytestmark = pytest.mark.usefixtures("no_data_folder")


class Refusing(http.server.BaseHTTPRequestHandler):
    """A hub that is there, and lets nobody in."""

    def do_HEAD(self) -> None:
        self.send_error(401)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    server = http.server.HTTPServer(("127.0.0.1", 0), Refusing)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_model_and_data_are_named_together_where_the_hub_is_out_of_reach(
    hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose(["model=qwen0.5b"])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(UserError) as caught:
        refuse_unreachable(config.model, dataset_places(config))
    places = [fault.where for fault in caught.value.faults]
    assert places == ["model.hub", "dataset.hub", "evaluation.sets.math500.hub", "evaluation.sets.gsm8k.hub"]
    assert "refused" in str(caught.value)
    (tmp_path / "openai___gsm8k").mkdir()  # prepared once
    with pytest.raises(UserError) as caught:
        refuse_unreachable(config.model, dataset_places(config))
    assert [fault.where for fault in caught.value.faults] == places[:3]
    generated = compose(["model=tiny", "dataset=digits"])
    refuse_unreachable(generated.model, dataset_places(generated))  # asks nobody
    with pytest.raises(UserError) as caught:  # only what will be read counts
        refuse_unreachable(generated.model, {"dataset": config.dataset})
    assert [fault.where for fault in caught.value.faults] == ["dataset.hub"]
    monkeypatch.setattr(constants, "ENDPOINT", hub)
    refuse_unreachable(config.model, dataset_places(config))  # it answers; what it says comes later
