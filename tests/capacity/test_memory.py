"""What a cell needs of a GPU's memory, against what its real code allocates on the meta device."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_static
from dash_exp.capacity.memory import (
    GIB,
    RESERVED,
    card_bytes,
    demand,
    described,
    engine_share,
    memory_faults,
    shape_of,
    ways_to_fit,
)
from dash_exp.config.schema import changed
from dash_exp.errors import UserError
from dash_exp.learning import learner
from dash_exp.record.journal import BY_TEXT
from dash_exp.sweep.resources import card_of
from tests.config.composed import composed
from tests.test_gpu_static import PEAKS_GIB

PRESETS = {"0.5b": "qwen0.5b", "1.5b": "qwen1.5b", "3b": "qwen3b", "8b": "llama8b"}
CARD = card_bytes(80)


def values(*overrides: str) -> dict[str, Any]:
    return asdict(composed(*overrides))


@pytest.mark.parametrize("name", PRESETS)
def test_the_planned_peak_is_what_the_learner_allocates(name: str) -> None:
    """With the paper's micro-batch of 16k tokens; `gpu_static` counts the same for the stated shape."""
    needed = demand(values(f"model={PRESETS[name]}"))
    assert needed is not None
    assert needed.learner / GIB == pytest.approx(PEAKS_GIB[name], rel=0.1)
    shape, stated = shape_of(values(f"model={PRESETS[name]}")["model"]), gpu_static.SHAPES[name]
    assert shape is not None and shape.hidden == stated["hidden"] and shape.layers == stated["layers"]
    with torch.device("meta"):
        counted = sum(p.numel() for p in gpu_static.model_of(name).parameters())
    assert shape.parameters == pytest.approx(counted, rel=0.001)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("qwen3_0.6b", 596.0),
        ("qwen3_1.7b", 1720.6),
        ("qwen3_4b", 4022.5),
        ("smollm2_360m", 361.8),
        ("smollm2_1.7b", 1711.4),
        ("llama3.2_1b", 1235.8),
    ],
)
def test_the_stated_shape_has_the_parameters_that_its_authors_count(name: str, millions: float) -> None:
    """Of the published weights, tied embeddings once; instruct models are as large as their base."""
    for option in (name, f"{name}_instruct"):
        shape = shape_of(values(f"model={option}")["model"])
        assert shape is not None and shape.parameters / 1e6 == pytest.approx(millions, rel=0.002)


def test_without_checkpointing_every_layer_keeps_its_activations() -> None:
    """22.3 GiB counted by gpu_static for 14,840 tokens at 0.5B."""
    needed = demand(
        values("model=qwen0.5b", "learner.micro_batch_tokens=14840", "learner.gradient_checkpointing=false")
    )
    assert needed is not None and needed.activations / GIB == pytest.approx(22.31, rel=0.05)


def test_the_cache_of_a_token() -> None:
    """Qwen2.5-0.5B: keys and values of 24 layers, 2 heads of 64, two bytes each."""
    shape = shape_of(values("model=qwen0.5b")["model"])
    assert shape is not None and shape.kv_bytes == 2 * 24 * 2 * 64 * 2


def test_a_folder_says_its_own_sizes(tmp_path: Path) -> None:
    plain = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "vocab_size": 151936}
    heads = {"num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps({**plain, **heads}))
    assert shape_of({"path": str(tmp_path)}) == shape_of(values("model=qwen0.5b")["model"])
    assert shape_of({"path": str(tmp_path / "absent")}) is None and shape_of({"path": None}) is None


@pytest.mark.parametrize(
    ("overrides", "card", "fits"),
    [
        *(
            (("model=" + m, "algorithm=" + a), CARD, True)
            for m in ("qwen0.5b", "qwen1.5b")
            for a in ("dash", "grpo")
        ),
        (("model=qwen3b",), CARD, True),
        (("model=qwen3b",), card_bytes(80, 2), False),
        (("model=qwen1.5b",), card_bytes(40), False),
        (("model=qwen1.5b", "sampler=vllm_servers"), card_bytes(40), True),
        (("model=llama8b",), CARD, False),
        (("model=llama8b", "learner.lora.rank=16"), CARD, True),
    ],
)
def test_what_fits_on_which_card(overrides: tuple[str, ...], card: int, fits: bool) -> None:
    config = values(*overrides)
    faults = memory_faults(config, card)
    assert (faults == []) is fits
    for way in ways_to_fit(config, card)[:1] if faults else ():
        assert way.replace("(", "").split()[0].partition("=")[0] in faults[0].hint


def test_what_is_offered_fits() -> None:
    ways = ways_to_fit(values("model=llama8b"), CARD)
    assert ways[0] == "sampler=vllm_servers learner.ranks=4 learner.sharding=fsdp"
    changes = {"learner.ranks": 4, "learner.sharding": "fsdp", "sampler.name": "vllm_servers"}
    assert memory_faults(asdict(changed(composed("model=llama8b"), changes)), CARD) == []


def test_vllm_gets_what_the_learner_leaves() -> None:
    """Moments are half of the state of a bf16_mixed learner that has 16 of 18 bytes beside its weights."""
    needed = demand(values("model=qwen3b"))
    assert needed is not None
    free = CARD - needed.state - needed.reference + needed.state // 2  # before the first update
    cache, share = engine_share(needed, free, CARD)
    assert cache == pytest.approx(needed.cache(CARD), abs=RESERVED)
    assert 0 < share * CARD <= CARD - needed.learner
    assert engine_share(needed, 0, CARD)[0] == 0
    assert f"cache for {needed.cache(CARD) // needed.sequence} of 256" in described(needed, CARD)


def test_a_cell_without_gpus_is_not_planned_and_a_cluster_says_what_its_gpus_have() -> None:
    assert card_of(composed("model=qwen3b")) is None
    assert card_of(composed("model=qwen3b", "cluster=slurm")) == CARD
    assert card_of(composed("model=qwen3b", "cluster=slurm", "cluster.gpu_gb=40")) == card_bytes(40)
    assert card_of(composed("model=qwen3b", "cluster=slurm", "cluster.cells_per_gpu=2")) == CARD // 2


def test_a_gpu_that_torch_cannot_use_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("torch uses the GPU here")
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(learner, "DEVICES_FOLDER", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(UserError, match="cannot use the GPU"):
        learner.device_of("auto")
    assert learner.device_of("cpu").type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert learner.device_of("auto").type == "cpu"


def test_vllms_words_for_too_little_memory_are_out_of_memory() -> None:
    import re

    text = "Free memory on device (3.1/79.3 GiB) on startup is less than desired GPU memory utilization (0.9)"
    assert next(name for name, pattern in BY_TEXT if re.search(pattern, text)) == "out_of_memory"
