"""Shared fixtures: the tiny random model, and where real data lie."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

from dash_exp.types import AdvantagedGroup, Completion, Group, Prompt, Score, ScoredGroup

os.environ.setdefault("OMP_NUM_THREADS", "1")
"""Tiny tensors gain nothing from threads, and tests run side by side. Read by torch when it is imported."""

REPOSITORY = Path(__file__).parents[1]
TINY = {"hidden_size": 64, "intermediate_size": 96, "layers": 2, "heads": 2, "kv_heads": 1, "seed": 3}


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of datasets that the variable DASH_DATA names; tests that need it are skipped without it."""
    folder = os.environ.get("DASH_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("no datasets: set DASH_DATA to a folder with math500_test.jsonl and the others")
    return Path(folder)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a Hugging Face folder."""
    from dash_exp.modeling.source import make_random

    folder = tmp_path_factory.mktemp("tiny")
    make_random(TINY, folder)
    return folder


@pytest.fixture
def tiny(tiny_folder: Path) -> Any:
    """The tiny model in fp32, with our attention; fresh for each test."""
    import torch

    from dash_exp.modeling.attention import ATTENTION
    from dash_exp.modeling.source import load_model

    return load_model(tiny_folder, torch.float32, ATTENTION)


@pytest.fixture
def plain(tiny_folder: Path) -> Any:
    """The same model as transformers itself runs it: the independent reference."""
    import torch

    from dash_exp.modeling.source import load_model

    return load_model(tiny_folder, torch.float32, "eager")


def make_groups(
    lengths: list[list[int]], prompts: list[int], seed: int = 0, kept: float = 1.0
) -> list[AdvantagedGroup]:
    """Groups of random tokens: `lengths[p]` are the completion lengths of prompt p."""
    rng = random.Random(seed)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, 100) for _ in range(n))

    groups = []
    for p, own in enumerate(lengths):
        prompt = Prompt(f"p{p}", "test", "", tokens(prompts[p]), "")
        completions = tuple(
            Completion(tokens(n), tuple(-rng.random() * 5 for _ in range(n)), "", "stop", 0) for n in own
        )
        scores = tuple(Score(float(rng.random() < 0.5), "correct") for _ in own)
        advantages = tuple(rng.uniform(-2, 2) for _ in own)
        keep = tuple(rng.random() < kept for _ in own)
        scored = ScoredGroup(Group(p, prompt, completions), scores)
        groups.append(AdvantagedGroup(scored, advantages, keep))
    return groups
