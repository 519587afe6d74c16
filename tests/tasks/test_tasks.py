"""Datasets, templates and the order of prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dash_exp.errors import UserError
from dash_exp.tasks.examples import arithmetic, read_jsonl
from dash_exp.tasks.prompts import PromptSet, batch, make_prompts, requests
from dash_exp.tasks.templates import TEMPLATES
from dash_exp.types import Prompt

FIELDS = {"id": ["id"], "problem": ["problem", "question"], "answer": ["answer"]}


def prompt_set(count: int) -> PromptSet:
    prompts = tuple(Prompt(f"p{i}", "t", "", (1,), "") for i in range(count))
    return PromptSet("t", prompts, 0, "")


def test_arithmetic_splits_are_disjoint_and_right() -> None:
    train, test = arithmetic("train"), arithmetic("test")
    assert len(train.examples) == 7600 and len(test.examples) == 500
    assert not {e.id for e in train.examples} & {e.id for e in test.examples}
    for example in test.examples:
        x, y = map(int, example.id.split("+"))
        assert int(example.answer) == x + y and 10 <= x <= 99 and 10 <= y <= 99
        assert example.problem == f"12 + 37 = 49\n58 + 24 = 82\n{x} + {y} ="
    assert train.content_hash == arithmetic("train").content_hash != test.content_hash


def test_templates_are_pinned() -> None:
    assert TEMPLATES["bare"]("1+1?") == "1+1?"
    assert TEMPLATES["problem_solution"]("1+1?") == "Problem:\n1+1?\n\nSolution:\n"


def test_every_prompt_once_an_epoch_and_batches_depend_on_the_step_alone() -> None:
    prompts = prompt_set(10)
    asked = [p.id for step in range(1, 6) for p in batch(prompts, 0, step, 4)]
    assert sorted(asked[:10]) == sorted(asked[10:]) == sorted(p.id for p in prompts.prompts)
    assert asked[:10] != asked[10:]
    assert [p.id for p in batch(prompts, 0, 3, 4)] == asked[8:12]
    assert [p.id for p in batch(prompts, 1, 3, 4)] != asked[8:12]


def test_every_sample_has_its_own_seed() -> None:
    prompts = [prompt_set(1).prompts[0]] * 3  # the same prompt three times in one batch
    asked = requests(prompts, 0, "sample", 1, 8)
    seeds = [s for r in asked for s in r.seeds]
    assert len(set(seeds)) == 24
    later = requests(prompts, 0, "sample", 2, 8)
    assert not {s for r in later for s in r.seeds} & set(seeds)


def test_fields_are_mapped_and_a_missing_id_is_the_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"question": "a", "answer": "x #### 1"}\n\n{"question": "b", "answer": 2}\n')
    found = read_jsonl(path, "mine", FIELDS, answer_after="####")
    assert [(e.id, e.problem, e.answer) for e in found.examples] == [
        ("mine-1", "a", "1"), ("mine-3", "b", "2"),
    ]  # fmt: skip


def test_every_faulty_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    rows = ['{"id": 1, "problem": "a", "answer": "1"}', "{nonsense", '["list"]', '{"problem": "b"}',
            '{"problem": "c", "answer": ["1"]}', '{"id": 1, "problem": "d", "answer": "1"}',
            '{"problem": "e", "answer": " "}']  # fmt: skip
    path.write_text("\n".join(rows))
    with pytest.raises(UserError) as caught:
        read_jsonl(path, "bad", FIELDS)
    where = [f.where for f in caught.value.faults]
    assert where == [f"{path}:2", f"{path}:3", f"{path}:4", f"{path}:5", f"{path}:7", str(path)]
    text = str(caught.value)
    assert "not JSON" in text and "lacks the field 'answer'" in text and "occurs twice" in text


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe{}"])
def test_empty_or_binary_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "f.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"f\.jsonl"):
        read_jsonl(path, "f", FIELDS)


def test_long_prompts_are_dropped_and_counted_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text("".join(json.dumps({"problem": "x" * n, "answer": "1"}) + "\n" for n in (2, 5, 9)))
    examples = read_jsonl(path, "f", FIELDS)

    def tokenize(texts: list[str]) -> list[list[int]]:
        return [[7] * len(t) for t in texts]

    made = make_prompts(examples, tokenize, template="bare", max_prompt_tokens=5, model_limit=100)
    assert [len(p.token_ids) for p in made.prompts] == [2, 5] and made.dropped == 1
    with pytest.raises(UserError, match="longer than the 4 tokens"):
        make_prompts(examples, tokenize, template="bare", max_prompt_tokens=10, model_limit=4)
    with pytest.raises(UserError, match="all 3 prompts"):
        make_prompts(examples, tokenize, template="bare", max_prompt_tokens=1, model_limit=100)


def test_real_files_load(data_folder: Path) -> None:
    expected = {"math_train": 12000, "math500_test": 500, "gsm8k_train": 7473, "gsm8k_test": 1319}
    for name, count in expected.items():
        assert len(read_jsonl(data_folder / f"{name}.jsonl", name, FIELDS).examples) == count
