"""Demonstrations: tokens behind prompts, ends, lengths, and faulty traces."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from dash_exp.errors import UserError
from dash_exp.tasks.demonstrations import demonstrate
from dash_exp.tasks.prompts import PromptSet
from dash_exp.tasks.sources import read_traces
from dash_exp.types import Prompt

END, STOP = 1, 10
PROMPTS = PromptSet(
    "sums", tuple(Prompt(f"p{n}", "sums", "", (5, 6), "") for n in range(3)), dropped=0, content_hash="h"
)


def characters(texts: list[str]) -> list[list[int]]:
    return [[STOP if c == "\n" else ord(c) for c in text] for text in texts]


def shown(texts: dict[str, list[str]], most: int = 5) -> dict[str, tuple[int, ...]]:
    keyed = {("sums", name): found for name, found in texts.items()}
    made = demonstrate(PROMPTS, keyed, characters, stop_ids=(END, STOP), max_tokens=most)
    assert [p.id for p in made.prompts.prompts] == list(made.completions)
    return {name: c.token_ids for name, c in made.completions.items()}


def test_a_demonstration_ends_as_a_sampled_completion_does() -> None:
    made = shown({"p0": ["ab"], "p1": ["ab\n"]})
    assert made == {"sums/p0#0": (97, 98, END), "sums/p1#0": (97, 98, STOP)}


def test_each_demonstration_is_a_prompt_and_long_ones_are_counted() -> None:
    keyed = {("sums", "p2"): ["a", "bbbbb", "c"], ("other", "p0"): ["a"]}
    made = demonstrate(PROMPTS, keyed, characters, stop_ids=(END,), max_tokens=5)
    assert list(made.completions) == ["sums/p2#0", "sums/p2#2"] and made.too_long == 1
    assert made.summary() == "2 for sums, 1 too long and dropped, 1 without a prompt"
    assert made.prompts.prompts[1].token_ids == (5, 6)
    completion = made.completions["sums/p2#0"]
    assert all(map(math.isnan, completion.logprobs)) and completion.finish_reason == "stop"


def test_nothing_left_is_an_error() -> None:
    with pytest.raises(UserError, match="1 are longer; raise"):
        shown({"p0": ["too long for that"]})
    with pytest.raises(UserError, match="no worked solutions"):
        shown({})
    with pytest.raises(UserError, match="none of the 2 demonstrations belongs to a prompt"):
        shown({"x": ["a"], "y": ["b"]})


def test_traces_are_read_by_id(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    texts = ["one\u2028line", " two"]  # a line separator inside a text does not end its row
    path.write_text(
        "".join(json.dumps({"id": "a", "solution": t, "tokens": 3}, ensure_ascii=False) + "\n" for t in texts)
        + "\n"
    )
    assert read_traces(path) == {"a": texts}


def test_every_faulty_line_of_traces_is_named(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    path.write_text('{"id": "a"}\nnot json\n{"id": 3, "solution": "x"}\n{"id": "b", "solution": " "}\n[]\n')
    with pytest.raises(UserError) as error:
        read_traces(path)
    assert [f.where for f in error.value.faults] == [f"{path}:{n}" for n in (1, 2, 3, 4, 5)]
    path.write_text("\n")
    with pytest.raises(UserError, match="holds no traces"):
        read_traces(path)
