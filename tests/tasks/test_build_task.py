"""From config to prompts and judges: mixtures, templates with their own tokens, verifiers on demand."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dash_exp.config.compose import compose
from dash_exp.config.environment import GYM_PACKAGE, is_installed
from dash_exp.config.schema import Config, changed
from dash_exp.errors import UserError
from dash_exp.modeling.source import TextModel, text_model
from dash_exp.tasks.generated import HEADER, functions, gym_examples
from dash_exp.tasks.prompts import prompts_at
from dash_exp.train.build_tasks import build_task, log_prompts
from dash_exp.verifiers.judges import Judges, PooledJudge


@pytest.fixture
def model(tiny_folder: Path) -> TextModel:
    return text_model(tiny_folder)


@pytest.fixture
def judges() -> Iterator[Judges]:
    made = Judges(workers=1, timeout_s=20, memory_mb=2048)
    yield made
    made.close()


@pytest.fixture
def mixed(tmp_path: Path) -> Config:
    """Two datasets of single letters, three to one, each with a template and a verifier of its own."""
    files = {letter: tmp_path / f"{letter}.jsonl" for letter in "mg"}
    for letter, file in files.items():
        rows = [{"id": f"{n}", "problem": f"{letter}{n}", "answer": n} for n in range(20)]
        file.write_text("\n".join(map(json.dumps, rows)))
    part = {"template": "problem_solution", "verifier": "integer", "extraction": "first_integer"}
    values = {f"dataset.mix.gsm8k.{key}": value for key, value in {**part, "path": str(files["g"])}.items()}
    config = compose(["dataset=math_gsm8k", "model=tiny", "evaluation=arithmetic"])
    mixed: Config = changed(config, {"dataset.path": str(files["m"]), **values})
    return mixed


def test_a_mixture_has_the_parts_templates_and_judges(
    mixed: Config, model: TextModel, judges: Judges
) -> None:
    task = build_task(mixed, model, judges)
    texts = {p.text for p in task.prompts.prompts}
    assert "m3" in texts and "Problem:\ng3\n\nSolution:\n" in texts
    asked = prompts_at(task.prompts, 0, 0, 64)
    assert Counter(p.task for p in asked)["math"] in range(46, 51)  # 48 of 64
    assert set(task.judges) == {"math", "gsm8k"}
    assert isinstance(task.judges["math"], PooledJudge)
    assert task.judges["gsm8k"].submit("It is 7.", "7").result().outcome == "correct"
    notes: list[str] = []
    log_prompts(task, notes.append)
    assert notes[0] == "training: 40 prompts of math+gsm8k"


def test_every_fault_of_the_data_at_once_with_its_place(
    mixed: Config, model: TextModel, judges: Judges
) -> None:
    values = {"dataset.max_prompt_tokens": 1, "dataset.mix.gsm8k.template": "chat"}
    mixed = changed(mixed, {**values, "evaluation.sets.arithmetic.stop": ["two"]})
    with pytest.raises(UserError) as caught:
        build_task(mixed, model, judges)
    assert [f.where for f in caught.value.faults] == [
        "dataset.max_prompt_tokens",
        "dataset.mix.gsm8k.template",
        "evaluation.sets.arithmetic.stop",
    ]


def test_one_template_for_all_evaluation_sets(mixed: Config, model: TextModel, judges: Judges) -> None:
    mixed = changed(mixed, {"evaluation.template": "problem_solution"})
    [held_out] = build_task(mixed, model, judges).sets
    assert held_out.prompts.prompts[0].text.startswith("Problem:\n12 + 37")


class Marking:
    """A tokenizer with a chat form, that puts a begin token before a text when asked to."""

    chat_template = "present"
    eos_token_id = 1

    def __call__(self, texts: list[str] | str, add_special_tokens: bool) -> Any:
        begin = [0] if add_special_tokens else []
        ids = [[*begin, *map(ord, text)] for text in ([texts] if isinstance(texts, str) else texts)]

        class Encoded:
            input_ids = ids[0] if isinstance(texts, str) else ids

        return Encoded()

    def apply_chat_template(self, turns: Any, tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize and add_generation_prompt
        return f"\0<{turns[0]['role']}>{turns[0]['content']}<assistant>"


def test_a_chat_gets_no_second_begin_token(mixed: Config, judges: Judges) -> None:
    mixed = changed(mixed, {"model.add_bos": True, "dataset.template": "chat"})
    task = build_task(mixed, TextModel(Marking(), 2048, (1,)), judges)
    first = {p.task: p for p in task.prompts.prompts if p.id == "3"}
    assert first["math"].text == "\0<user>m3<assistant>"
    assert first["math"].token_ids == tuple(map(ord, first["math"].text))  # one begin token: its own
    assert first["gsm8k"].token_ids[:2] == (0, ord("P"))


# --- judges ----------------------------------------------------------------------------------------


def test_judges_are_made_once(judges: Judges) -> None:
    assert judges.warnings == ()
    assert judges.get("math", "boxed") is judges.get("math", "boxed")
    assert judges.get("math", "boxed") is not judges.get("math", "last_number")
    assert judges.get("integer", "first_integer").submit("4", "4").result().value == 1


def test_functions_are_judged_by_running_them(judges: Judges) -> None:
    judge = judges.get("code", "program")
    examples = functions("test").examples[:6]
    right = [judge.submit(e.solution, e.answer) for e in examples]
    stripped = [judge.submit(e.solution.strip(), e.answer) for e in examples]
    whole = [judge.submit(f"{HEADER}{e.solution}", e.answer) for e in examples]
    wrong = [judge.submit(" x - 1000\n", e.answer) for e in examples]
    assert {f.result().outcome for f in (*right, *stripped, *whole)} == {"correct"}
    assert {f.result().outcome for f in wrong} == {"wrong"}
    assert isinstance(judges.warnings, tuple)


@pytest.mark.skipif(not is_installed(GYM_PACKAGE), reason="pip install 'dash-exp[gym]'")
def test_gym_solutions_score_full(judges: Judges) -> None:
    judge = judges.get("reasoning_gym", "answer_tag")
    made = gym_examples("g", "chain_sum", {}, split="test", size=3, extraction="answer_tag")
    assert [judge.submit(e.solution, e.answer).result().value for e in made.examples] == [1.0] * 3
