"""Named prompt templates: how a question is put to a model. Training and evaluation share them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jinja2

from dash_exp import plugins
from dash_exp.config.schema import CHATS
from dash_exp.errors import Fault, UserError, nearest
from dash_exp.plugins import Plugin, is_reference
from dash_exp.tasks.examples import Example
from dash_exp.text import shorten

Chat = Callable[[str | Sequence[Mapping[str, str]]], str]
"""The text of a conversation that begins with this message, or has these, and has the model answer next."""


@dataclass(frozen=True, slots=True)
class Style:
    """What a template may use beside the example: worked examples (problem, solution), and the
    tokenizer's chat form, None where it has none."""

    shots: Sequence[tuple[str, str]] = ()
    chat: Chat | None = None


def bare(example: Example, style: Style) -> str:
    """Just the question: the paper's maths prompt."""
    return example.problem


def problem_solution(example: Example, style: Style) -> str:
    """`Problem: ... Solution: ...`, the paper's form for supervised fine-tuning. A code task shows its first
    assertion, as its other prompts do: without it nothing says what the function is called."""
    shown = f"\n{example.first_test}" if example.first_test else ""
    return f"Problem:\n{example.problem}{shown}\n\nSolution:\n"


def docstring(example: Example, style: Style) -> str:
    """A docstring with the description and the first assertion: the paper's code prompt. Raises UserError
    where there is no assertion."""
    if not example.first_test:
        what = f"'docstring' shows the first assertion of a test_list; {example.id} has none"
        raise UserError(Fault("template", what, "choose bare or problem_solution"))
    return f'"""\n{example.problem.strip()}\n{example.first_test}\n"""\n'


def few_shot(example: Example, style: Style) -> str:
    """Worked examples in the form of `problem_solution`, then the question in the same form."""
    worked = (f"Problem:\n{problem}\n\nSolution:\n{solution}\n\n" for problem, solution in style.shots)
    return "".join(worked) + problem_solution(example, style)


def answer_tag(example: Example, style: Style) -> str:
    """The question, and where the answer is looked for by `extraction: answer_tag`."""
    return f"{example.problem.rstrip()}\n\nWrite the final answer as <answer>...</answer>.\n"


def chat(example: Example, style: Style) -> str:
    """The question as a user's message, in the tokenizer's chat form."""
    assert style.chat is not None
    return style.chat(example.problem)


def chat_boxed(example: Example, style: Style) -> str:
    """As `chat`, asking for the final answer in a box."""
    assert style.chat is not None
    return style.chat(f"{example.problem}\n\nThink it through, then give the final answer in \\boxed{{}}.")


RENDERERS: dict[str, Callable[[Example, Style], str]] = {
    render.__name__: render
    for render in (bare, problem_solution, docstring, few_shot, answer_tag, chat, chat_boxed)
}


def renderer(name: str, style: Style) -> Callable[[Example], str]:
    """The template as a function of the example. Raises UserError for a chat without a chat template."""
    if name in CHATS and style.chat is None:
        others = ", ".join(other for other in RENDERERS if other not in CHATS)
        what = f"{name!r} needs the tokenizer's chat template, and this one has none"
        raise UserError(Fault("template", what, f"choose another: {others}; or an instruct model"))
    if is_reference(name):
        return partial(_own, plugins.load(name, "template", "template"), style.chat)
    template = RENDERERS[name]
    return lambda example: template(example, style)


def _own(template: Plugin, chat: Chat | None, example: Example) -> str:
    """The prompt by a template of the user's own. Raises UserError where it makes none."""
    known = {"id": example.id, "problem": example.problem, "answer": example.answer}
    made = template(row={**example.fields, **known, "solution": example.solution})
    if isinstance(made, str):
        return made
    turns = list(made) if isinstance(made, list | tuple) else []
    if not turns or not all(isinstance(t, Mapping) and {"role", "content"} <= set(t) for t in turns):
        raise template.failed(f"returned {shorten(repr(made))}, expected a text or chat messages")
    if chat is None:
        raise template.failed("returned chat messages, but this tokenizer has no chat template")
    return chat(turns)


def chat_form(
    tokenizer: Any, system: str | None = None, arguments: Mapping[str, Any] | None = None
) -> Chat | None:
    """A user's message in the tokenizer's chat form, as text, after a system prompt; None where it has no
    such form. `arguments`: of its template. Raises UserError where the template takes no such prompt or
    argument."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return None
    faults = [
        Fault(f"chat_arguments.{name}", "the model's chat template reads no such name", nearest(name, known))
        for known in [sorted(set(re.findall(r"(\w+) is (?:not )?defined", str(template))))]
        for name in arguments or ()
        if not re.search(rf"\b{re.escape(name)}\b", str(template))
    ]
    if faults:
        raise UserError(faults)

    def form(message: str | Sequence[Mapping[str, str]]) -> str:
        turns = [{"role": "user", "content": message}] if isinstance(message, str) else list(message)
        if system is not None and turns[0].get("role") != "system":
            turns = [{"role": "system", "content": system}, *turns]
        try:
            text: str = tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True, **(arguments or {})
            )
        except jinja2.TemplateError as error:  # some refuse a system's turn
            raise UserError(Fault("template", f"the model's chat template says: {error}")) from error
        return text

    if system and system.strip() not in form("?"):
        hint = "leave it out, or put it into the problems (dataset.template=<module:function>)"
        raise UserError(Fault("system", "the model's chat template does not show it", hint))
    return form
