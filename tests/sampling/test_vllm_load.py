"""Weights loaded in place leave vLLM's model, to the bit, as its own reload does: fused matrices, biases, an
output matrix that is the embedding's or one of its own. (In the tiny model, quickly: test_vllm.py.) So do
vLLM's own transfers between GPUs with our checks, but for the way tensors arrive."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 128,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("kind", "tied", "dtype"), [("Llama", False, "float32"), ("Qwen2", True, "bfloat16")]
)
def test_both_ways_leave_the_same(tmp_path: Path, kind: str, tied: bool, dtype: str) -> None:
    import transformers

    config = getattr(transformers, f"{kind}Config")(**SIZES, tie_word_embeddings=tied)
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "tests.sampling.load_probe", str(tmp_path), dtype],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["different"] == []
    assert found["between_gpus"] == []
    # 4 linear layers and 2 norms in each of 2 layers, a last norm, embedding and output
    assert found["compared"] >= 2 * 4 + 2 * 4 + 1 + 2
    assert found["changed"] == found["compared"] - 2 * 4  # the packed matrices are empty as parameters
