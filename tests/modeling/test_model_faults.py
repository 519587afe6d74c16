"""Model folders that no run can use, as tables: what their small files show is found before anything is
loaded, the rest when the weights are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from dash_exp.config.model_files import INDEX, SINGLE, model_faults
from dash_exp.errors import UserError
from dash_exp.modeling.attention import ATTENTION
from dash_exp.modeling.source import load_model

CONFIGS: list[tuple[Any, str]] = [
    ([], "config.json: expected an object, got list"),
    ("{", "is not JSON"),
    ('{"hidden_size": 64, "hidden_size": 64}', "has the key 'hidden_size' twice"),
    ({"model_type": None}, "model_type"),
    ({"hidden_size": -64}, "hidden_size: got -64"),
    ({"hidden_size": 0}, "hidden_size: got 0"),
    ({"hidden_size": True}, "hidden_size: got True"),
    ({"hidden_size": "64"}, "hidden_size: got '64'"),
    ({"hidden_size": 64.5}, "hidden_size: got 64.5"),
    ({"hidden_size": [64]}, "hidden_size: got [64]"),
    ({"hidden_size": 65, "head_dim": None}, "must be a multiple of num_attention_heads=2"),
    ({"num_key_value_heads": 3}, "num_key_value_heads: got 3, must divide"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers: got 1000000000"),
    ({"vocab_size": 10**12}, "vocab_size: got"),
    ({"max_position_embeddings": 0}, "max_position_embeddings: got 0"),
    ({"rms_norm_eps": -1e-6}, "rms_norm_eps: got -1e-06"),
    ({"rope_parameters": {"rope_theta": 0, "rope_type": "default"}}, "rope_theta: got 0"),
    ({"layer_types": ["conv", "full_attention"]}, "layers of 'conv'"),
    ({"layer_types": ["sliding_attention"] * 2}, "layers of 'sliding_attention'"),
    ({"sliding_window": 64}, "sliding_window: got 64"),
    ({"conv_L_cache": 3}, "layers without attention"),
    ({"quantization_config": {"bits": 4}}, "the weights are quantised"),
    ({"text_config": {"hidden_size": 0}}, "hidden_size: got 0"),
    ({"eos_token_id": -1}, None),  # that of generation_config.json counts
]


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def test_a_config_that_no_model_can_have(folder: Path) -> None:
    assert model_faults(folder) == []
    path = folder / "config.json"
    good = json.loads(path.read_text())
    for harm, what in CONFIGS:
        text = harm if isinstance(harm, str) else json.dumps({**good, **harm} if harm else harm)
        path.write_text(text)
        found = [fault.what for fault in model_faults(folder)]
        assert [what in one for one in found] == [True] if what else found == [], (harm, found)


def _pickled(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")


def _indexed(name: object) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        (folder / SINGLE).rename(folder.parent / "outside.safetensors")
        (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))

    return harm


def _changed(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        tensors = load_file(folder / SINGLE)
        change(tensors)
        save_file(tensors, folder / SINGLE, metadata={"format": "pt"})

    return harm


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("harm", "what"),
    [
        (_pickled, "neither model.safetensors nor"),
        (_indexed("../outside.safetensors"), "names '../outside.safetensors'"),
        (_indexed("absent.safetensors"), "names 'absent.safetensors'"),
        (_indexed("config.json"), "names 'config.json'"),
        (_indexed(7), "expected the file of each tensor"),
        (lambda f: (f / SINGLE).write_bytes((f / SINGLE).read_bytes()[:-8]), "is damaged"),
        (_changed(lambda t: t.update({NORM: t[NORM].to(torch.int8)})), "1 integer weights, e.g. model.norm"),
        (_changed(lambda t: t.update({NORM: t[NORM] / 0 * 0})), "NaN or infinity in 1 tensors"),
        (_changed(lambda t: t[NORM][3:4].fill_(float("-inf"))), "NaN or infinity in 1 tensors"),
        (_changed(lambda t: t.update({"more.weight": torch.ones(3)})), "does not use, e.g. more.weight"),
        (_changed(lambda t: t.pop(NORM)), "lacks 1 tensors, e.g. model.norm"),
        (_changed(lambda t: t.update({NORM: torch.ones(65)})), "does not load"),
    ],
)
def test_weights_that_no_run_can_use(folder: Path, harm: Callable[[Path], Any], what: str) -> None:
    harm(folder)
    faults = model_faults(folder)
    if not faults:
        with pytest.raises(UserError) as caught:
            load_model(folder, torch.float32, ATTENTION)
        faults = caught.value.faults
    assert [what in fault.what for fault in faults] == [True], faults


SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
RECURRENT = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "linear_num_value_heads": 4}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROPE = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0, "low_freq_factor": 1.0}
LLAMA_3 = {
    "rope_parameters": {**ROPE, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    "tie_word_embeddings": True,
}
LEAKS, SCALES, REFUSES = "change each other", "logits are not", "does not load"


@pytest.mark.parametrize(
    ("family", "more", "refused"),
    [
        ("llama", {}, None),
        ("llama", LLAMA_3, None),
        ("qwen2", {}, None),
        ("qwen3", {}, None),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, LEAKS),
        ("granite", {"logits_scaling": 8.0}, SCALES),
        ("mistral", {"sliding_window": 4}, REFUSES),
        *(
            pytest.param(*row, marks=pytest.mark.long)
            for row in (
                ("smollm3", {}, None),
                ("qwen3_moe", EXPERTS, None),
                ("mixtral", EXPERTS, None),
                ("mistral", {"sliding_window": None}, None),
                ("mamba", {}, LEAKS),
                ("granitemoehybrid", {**RECURRENT, **EXPERTS, "layer_types": ["mamba", "attention"]}, LEAKS),
                ("qwen3_5_text", {"layer_types": ["linear_attention", "full_attention"]}, LEAKS),
                ("gemma3_text", {}, REFUSES),
                ("cohere", {}, SCALES),
            )
        ),
    ],
)
def test_packed_samples_of_a_family_are_computed_apart_or_the_model_is_refused(
    tmp_path: Path, family: str, more: dict[str, Any], refused: str | None
) -> None:
    """Whatever its config says: the weights are tried."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SIZES, **more})).save_pretrained(
            tmp_path
        )
    if refused is None:
        assert model_faults(tmp_path) == []
        load_model(tmp_path, torch.float32, ATTENTION)
    else:
        with pytest.raises(UserError, match=refused):
            load_model(tmp_path, torch.float32, ATTENTION)
