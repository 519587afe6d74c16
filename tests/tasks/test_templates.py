"""What a model is shown, pinned letter by letter."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from dash_exp.config.compose import compose
from dash_exp.config.environment import is_installed
from dash_exp.config.schema import CHATS, TEMPLATES
from dash_exp.errors import UserError
from dash_exp.modeling.source import load_tokenizer
from dash_exp.record.identity import package_path
from dash_exp.tasks.examples import Example
from dash_exp.tasks.templates import RENDERERS, Style, chat_form, renderer

SUM = Example("1", "1+1?", "2")
TASK = Example("mbpp-1", "Write a function to add.", "", first_test="assert add(1, 1) == 2")
SHOTS = Style(shots=[("2+2?", "It is 4."), ("3+3?", "It is 6.")])

GOLDEN = {
    "bare": (SUM, "1+1?"),
    "problem_solution": (SUM, "Problem:\n1+1?\n\nSolution:\n"),
    "docstring": (TASK, '"""\nWrite a function to add.\nassert add(1, 1) == 2\n"""\n'),
    "few_shot": (
        SUM,
        "Problem:\n2+2?\n\nSolution:\nIt is 4.\n\nProblem:\n3+3?\n\nSolution:\nIt is 6.\n\n"
        "Problem:\n1+1?\n\nSolution:\n",
    ),
    "answer_tag": (SUM, "1+1?\n\nWrite the final answer as <answer>...</answer>.\n"),
}
SMOLLM2_SYSTEM = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
)
SMOLLM2 = {
    "chat": f"{SMOLLM2_SYSTEM}<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n",
    "chat_boxed": (
        f"{SMOLLM2_SYSTEM}<|im_start|>user\n1+1?\n\nThink it through, then give the final answer in "
        "\\boxed{}.<|im_end|>\n<|im_start|>assistant\n"
    ),
}


@pytest.fixture(scope="module")
def smollm2() -> Any:
    """The tokenizer of the default model, from its package."""
    model = compose(["model=smollm2_135m"]).model
    assert model.package is not None and model.package_file is not None
    if not is_installed(model.package):
        pytest.skip(f"needs the package {model.package}")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(package_path(model.package), gguf_file=model.package_file)


def test_every_template_is_pinned() -> None:
    assert set(RENDERERS) == set(TEMPLATES) == set(GOLDEN) | set(SMOLLM2)
    assert set(CHATS) == set(SMOLLM2)


@pytest.mark.parametrize("name", GOLDEN)
def test_plain_templates(name: str) -> None:
    example, text = GOLDEN[name]
    assert renderer(name, SHOTS)(example) == text


@pytest.mark.parametrize("name", SMOLLM2)
def test_chats_of_the_default_model(smollm2: Any, name: str) -> None:
    text = renderer(name, Style(chat=chat_form(smollm2)))(SUM)
    assert text == SMOLLM2[name]
    ids = smollm2(text, add_special_tokens=False).input_ids
    assert ids.count(smollm2.convert_tokens_to_ids("<|im_start|>")) == 3  # markers, not their letters


def test_a_system_prompt_and_arguments_of_the_chat_template(smollm2: Any) -> None:
    """As the tokenizer's own function renders them; what its template does not know is refused."""
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    expected = smollm2.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert renderer("chat", Style(chat=chat_form(smollm2, "Be brief.")))(SUM) == expected
    thinking = copy.copy(smollm2)
    thinking.chat_template = (
        "{{ messages[-1].content }}{% if enable_thinking is defined and not enable_thinking %}<think></think>"
        "{% endif %}"
    )
    form = chat_form(thinking, arguments={"enable_thinking": False})
    assert form is not None and form("1+1?") == "1+1?<think></think>"
    with pytest.raises(UserError) as caught:
        chat_form(thinking, arguments={"enable_thinkin": False})
    assert caught.value.faults[0].where == "chat_arguments.enable_thinkin"
    assert "did you mean 'enable_thinking'?" in caught.value.faults[0].hint
    with pytest.raises(UserError, match="does not show it"):
        chat_form(thinking, "Be brief.")
    thinking.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(UserError, match="no system role"):
        chat_form(thinking, "Be brief.")


def test_a_tokenizer_without_a_chat_form(tiny_folder: Path) -> None:
    form = chat_form(load_tokenizer(tiny_folder))
    assert form is None
    with pytest.raises(UserError) as caught:
        renderer("chat_boxed", Style(chat=form))
    [fault] = caught.value.faults
    assert fault.what == "'chat_boxed' needs the tokenizer's chat template, and this one has none"
    assert "bare, problem_solution" in fault.hint


def test_a_docstring_without_an_assertion() -> None:
    with pytest.raises(UserError, match="1 has none"):
        renderer("docstring", Style())(SUM)


def test_the_stop_of_the_few_shot_option_is_one_token(smollm2: Any) -> None:
    [stop] = compose(["dataset=gsm8k_few_shot"]).dataset.stop
    assert len(smollm2(stop, add_special_tokens=False).input_ids) == 1
    _, text = GOLDEN["few_shot"]
    ids = smollm2(text, add_special_tokens=False).input_ids
    assert ids.count(smollm2(stop, add_special_tokens=False).input_ids[0]) == 3
