"""Functions of the user's own: found, hashed, checked and called; what they return wrongly is named."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dash_exp import plugins
from dash_exp.config.checks import check
from dash_exp.config.schema import Config, changed
from dash_exp.errors import UserError
from dash_exp.learning.advantages import batch_advantages, compares_batch, group_advantages
from dash_exp.learning.filters import make_filter
from dash_exp.learning.losses import surrogate
from dash_exp.learning.packing import Packed
from dash_exp.plugins import to_score
from dash_exp.record.identity import as_stored, freeze, make_cell, read_frozen, resolve_paths
from dash_exp.record.metrics import BatchFacts, batch_values, is_constant, sample_rows
from dash_exp.tasks.sources import load_examples
from dash_exp.tasks.templates import Style, renderer
from dash_exp.train.loop import compute_advantages
from dash_exp.types import Completion, Group, Prompt, Score, ScoredGroup
from dash_exp.verifiers.judges import Judges
from dash_exp.verifiers.types import Facts

pytest_plugins = ["tests.config.config_fixtures"]

REWARD = """
import helper
def score(text, answer, fields, finish_reason, tokens):
    if text in ("raise", "exit", "hang", "crash"):
        return helper.misbehave(text)
    facts = fields.get("level"), finish_reason, tokens
    return helper.BONUS if facts == (3, "length", 7) else text == answer
def size(tokens): return -float(tokens)
def odd(completion, gold): return 1
def no_number(text): return "good"
VALUE = 3
"""
HELPER = """
BONUS = 2
def misbehave(how):
    import ctypes, sys
    if how == "raise": raise KeyError("no such thing")
    if how == "exit": sys.exit(3)
    if how == "crash": ctypes.string_at(0)
    while True: pass
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current folder with modules of the user's own."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, text in {"own": REWARD, "helper": HELPER, "broken": "1 / 0", "unread": "def f(:"}.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.chdir(folder)
    path = list(sys.path)
    yield folder
    sys.path[:] = path


def forget() -> None:
    """As a new process, which sees files that were edited."""
    for known in (plugins.sources, plugins.call._load, plugins.load_rows):
        known.cache_clear()


def module(folder: Path, **functions: str) -> str:
    """A module of functions given by parameters and returned expression; its name."""
    forget()
    lines = [f"def {name}{text}" for name, text in functions.items()]
    (folder / "made.py").write_text("import torch\n" + "\n".join(lines))
    return "made"


def test_every_fault_of_a_reference_is_named(here: Path, config: Config) -> None:
    """All keys at once; nothing is started."""
    rows = {
        "dataset.verifier": ("own:scor", "own has no function 'scor'"),
        "dataset.template": ("owm:score", f"owm:score: no module 'owm' in {here}"),
        "filter.name": ("own:VALUE", "own:VALUE is 3, not a function"),
        "algorithm.baseline": ("own:odd", "own:odd takes (completion, gold), but its kind (advantage)"),
        "algorithm.surrogate": (
            "broken:f",
            "broken raised ZeroDivisionError: division by zero (broken.py:1)",
        ),
        "dataset.kind": ("unread:f", "unread raised SyntaxError"),
        "evaluation.template": ("own:", "got 'own:', which is not module:function"),
    }
    found = {f.where: f for f in check(changed(config, {key: text for key, (text, _) in rows.items()}))}
    for key, (_, what) in rows.items():
        assert found[key].what.startswith(what), found[key]
    assert "did you mean 'score'?" in found["dataset.verifier"].hint
    assert "did you mean 'own'?" in found["dataset.template"].hint
    for text, what in {
        "json:dumps": "json:dumps takes (obj",
        "nowhere/own:score": f"nowhere/own:score: no module 'own' in {here}/nowhere",
        "not_there.at.all:f": "not_there.at.all:f: no module",
        "own:odd": "own:odd takes (completion, gold), but its kind (reward)",
    }.items():
        (fault,) = check(changed(config, {"dataset.rewards": [text]}))
        assert (fault.where, fault.what[: len(what)]) == ("dataset.rewards", what)
    (here / "random.py").write_text("def f(text): return 1")
    (fault,) = check(changed(config, {"dataset.verifier": "random:f"}))
    assert fault.what == "random is the name of another module that is in use"
    text = module(here, both="(group, batch): return group", none="(threshold): return []")
    for name in ("both", "none"):
        (fault,) = check(changed(config, {"filter.name": f"{text}:{name}"}))
        assert fault.what.endswith("but its kind (filter) takes either group or batch")
    weights = changed(config, {"dataset.rewards": ["own:size"], "dataset.reward_weights": [1.0, 2.0]})
    assert [f.what for f in check(weights)] == ["got 2 for the 1 of dataset.rewards"]
    twice = changed(config, {"dataset.rewards": ["own:size", f"{here}/own:size"]})
    assert [f.where for f in check(twice)] == ["dataset.rewards"]


def test_the_id_follows_the_source_and_the_cell_keeps_it(here: Path, config: Config, tmp_path: Path) -> None:
    config = changed(config, {"dataset.verifier": "own:score", "dataset.rewards": ["own:size"]})
    cell = make_cell(config, None)
    assert cell.frozen["dataset"]["verifier"].startswith("plugins/")
    folder = cell.folder(tmp_path)
    freeze(cell.frozen, folder, cell.sources)
    (here / "unrelated.py").write_text("")
    assert make_cell(config, None).id == cell.id
    (here / "helper.py").write_text(HELPER.replace("BONUS = 2", "BONUS = 5"))  # imported by it
    assert make_cell(config, None).id == cell.id  # of this process
    forget()
    edited = make_cell(config, None)
    assert edited.id != cell.id and edited.frozen["dataset"] != cell.frozen["dataset"]
    os.chdir(tmp_path)  # where SLURM starts it, say
    frozen = read_frozen(folder)
    assert make_cell(frozen, None).id == cell.id
    loaded = plugins.load(frozen.dataset.verifier, "reward")
    given = {"text": "", "answer": "", "fields": {"level": 3}, "finish_reason": "length", "tokens": 7}
    assert loaded(**given) == 2  # the old source
    assert plugins.load("mine/own:score", "reward")(**given) == 5  # of the same name, in another folder
    assert loaded(**given) == 2
    resolved = resolve_paths(changed(config, {"dataset.verifier": "mine/own:score", "dataset.rewards": []}))
    assert make_cell(resolved, None).id == make_cell(resolve_paths(resolved), None).id
    freeze(edited.frozen, edited.folder(tmp_path), edited.sources)
    os.chdir(here)
    stored = as_stored(config, edited.folder(tmp_path)).dataset.verifier
    assert Path(stored.partition(":")[0]).with_suffix(".py").is_file()
    next(folder.glob("plugins/*/helper.py")).write_text("BONUS = 9")
    forget()
    assert make_cell(read_frozen(folder), None).id != cell.id  # so it is refused


SCORES: dict[Any, tuple[float, str]] = {
    True: (1.0, "correct"),
    0.5: (0.5, "wrong"),
    -3: (-3.0, "wrong"),
    np.float32(2): (2.0, "correct"),
    np.bool_(False): (0.0, "wrong"),
    math.inf: (math.nan, "verifier_error"),
    None: (math.nan, "verifier_error"),
    "1": (math.nan, "verifier_error"),
}


def test_what_a_reward_returns_becomes_a_score() -> None:
    for value, (number, outcome) in SCORES.items():
        made = to_score(value, "own:score")
        assert made.outcome == outcome and made.value == pytest.approx(number, nan_ok=True)
    assert to_score(torch.tensor(0.25)).value == 0.25
    assert to_score(Score(0.5, "correct", "half")) == Score(0.5, "correct", "half")
    for wrong in (Score(0.5, "right"), Score(math.nan, "correct")):  # type: ignore[arg-type]
        assert to_score(wrong).outcome == "verifier_error"
    assert to_score(None, "own:score").detail.startswith("own:score returned None, expected a bool")


def test_rewards_run_in_the_pool_and_add_up(here: Path, config: Config) -> None:
    """A reward that raises, exits, crashes or hangs costs one verdict."""
    judges = Judges(2, 0.5, 4096)
    facts = Facts('{"level": 3}', "length", 7)
    try:
        own = judges.get(str(plugins.find("own:score")), "")
        texts = {"4": "correct", "5": "wrong", "raise": "verifier_error", "exit": "crashed"}
        texts |= {"crash": "crashed", "hang": "timeout"}
        verdicts = {text: own.submit(text, "4") for text in texts}
        assert {text: one.result().outcome for text, one in verdicts.items()} == texts
        detail = verdicts["raise"].result().detail
        assert detail == "own:score raised KeyError: 'no such thing' (helper.py:5)"
        assert own.submit("5", "4", facts).result() == Score(2.0, "correct")
        assert own.version == plugins.version(plugins.find("own:score"))
        base = judges.get("integer", "first_integer")
        verdict = judges.adding(base, ["own:size"], [0.5]).submit("4", "4", facts).result()
        assert verdict == Score(1.0, "correct", added=-3.5, parts={"own.size": -7.0})
        verdict = judges.adding(base, ["own:size", "own:no_number"], []).submit("4", "4", facts).result()
        assert verdict.outcome == "verifier_error" and "own:no_number returned 'good'" in verdict.detail
    finally:
        judges.close()


def test_own_advantages_and_filters(here: Path) -> None:
    name = module(
        here,
        mean="(group): return [r - sum(group) / len(group) for r in group]",
        rank="(batch): return [[r + len(batch) for r in g] for g in batch]",
        keep="(group, threshold): return [r > threshold for r in group]",
        draw="(batch, seed): return [[i == seed for i in range(len(g))] for g in batch]",
    )
    groups = [[1.0, 0.0, math.nan, 0.0], [1.0, 1.0, 1.0, 1.0]]
    for scale in ("std", "none", "mean"):
        own = batch_advantages(groups, baseline=f"{name}:mean", scale=scale)
        assert own[0] == pytest.approx(group_advantages(groups[0], scale=scale))
        assert own[1] == (0.0,) * 4
    assert compares_batch(f"{name}:rank", "none") and not compares_batch(f"{name}:mean", "none")
    assert batch_advantages(groups, baseline=f"{name}:rank", scale="none")[0] == (3.0, 2.0, 0.0, 2.0)
    keep, draw = (make_filter(f"{name}:{one}", threshold=0.5) for one in ("keep", "draw"))
    assert (keep.batch_wide, draw.batch_wide) == (False, True)
    assert keep.keep(groups, 1)[0] == (True, False, False, False)
    assert draw.keep(groups, 1) == [(False, True, False, False)] * 2


def packed() -> Packed:
    return Packed(*[torch.zeros(3)] * len(Packed.__dataclass_fields__))


WRONG: list[tuple[str, str, str]] = [
    ("filter", "(group): return [True]", "returned [True], expected 2 bools"),
    ("filter", "(group): return [0.5, 1.0]", "returned [0.5, 1.0], expected 2 bools"),
    ("filter", "(group): return None", "returned None, expected 2 bools"),
    ("filter", "(batch): return [[True, True]] * 3", "expected 1 lists"),
    ("filter", "(group): raise OSError('full')", "raised OSError: full (made.py:2)"),
    ("advantage", "(group): return [1.0, float('nan')]", "returned [1.0, nan], expected 2 finite numbers"),
    ("advantage", "(group): return group[0]", "returned 1.0, expected 2 finite numbers"),
    (
        "surrogate",
        "(logprobs): return logprobs.sum()",
        "returned a tensor [], expected the loss of each token: [3]",
    ),
    ("surrogate", "(logprobs): return logprobs / 0", "returned a loss that is infinite or not a number"),
    ("surrogate", "(logprobs): return logprobs.detach()", "returned a loss that does not depend on logprobs"),
    ("surrogate", "(logprobs): return 1", "returned 1, expected the loss of each token"),
    ("template", "(row): return {}", "returned {}, expected a text or chat messages"),
    ("template", "(row): return [{'role': 'user', 'content': ''}]", "this tokenizer has no chat template"),
    ("loader", "(split): return [1]", "returned a row that is 1, expected a mapping"),
    ("loader", "(split): yield 1 / 0", "raised ZeroDivisionError: division by zero (made.py:2)"),
]


def test_what_a_function_does_wrong_stops_the_run(here: Path, config: Config) -> None:
    def loss(name: str) -> object:
        batch = replace(packed(), advantages=torch.ones(3))
        return surrogate(name, torch.ones(3, requires_grad=True), torch.ones(3), batch, (0.2, 0.2))

    def examples(name: str) -> object:
        return load_examples(replace(config.dataset, kind=name))

    example = load_examples(config.dataset).examples[0]
    uses: dict[str, tuple[str, Callable[[str], object]]] = {
        "filter": ("filter.name", lambda name: make_filter(name).keep([[1.0, 0.0]], 0)),
        "advantage": (
            "algorithm.baseline",
            lambda name: batch_advantages([[1.0, 0.0]], baseline=name, scale="none"),
        ),
        "surrogate": ("algorithm.surrogate", loss),
        "template": ("template", lambda name: renderer(name, Style())(example)),
        "loader": ("kind", examples),
    }
    for kind, text, what in WRONG:
        name = module(here, f=text)
        where, use = uses[kind]
        with pytest.raises(UserError) as error:
            use(f"{name}:f")
        (fault,) = error.value.faults
        assert fault.where == where and fault.what.startswith("made:f ") and what in fault.what
        assert error.value.consequence == "what was recorded is kept"


def test_rows_and_prompts_of_the_user(here: Path, config: Config) -> None:
    name = module(
        here,
        rows="(split, options): yield {'problem': split, 'answer': 1, 'level': options['level']}",
        ask='(row): return f\'{row["problem"]} at {row["level"]}\'',
        talk="(row): return [{'role': 'system', 'content': 'Be brief.'}]",
    )
    values = {"kind": f"{name}:rows", "template": f"{name}:ask", "task_options": {"level": 3}}
    data = replace(config.dataset, **values)  # type: ignore[arg-type]
    (example,) = load_examples(data).examples
    assert (example.answer, dict(example.fields)) == ("1", {"level": 3})
    assert renderer(f"{name}:ask", Style())(example) == "train at 3"
    assert renderer(f"{name}:talk", Style(chat=lambda turns: json.dumps(turns)))(example).startswith("[{")
    whole = changed(config, {f"dataset.{key}": value for key, value in values.items()})
    before = make_cell(whole, None).id
    assert make_cell(changed(whole, {"dataset.task_options": {"level": 4}}), None).id != before
    module(
        here,
        rows="(split, options): yield {'problem': split, 'answer': 2, 'level': 3}",
        ask="(row): return ''",
    )
    assert make_cell(whole, None).id != before


def test_the_filter_looks_at_the_verdict_unless_told_otherwise() -> None:
    """Advantages and `reward/shaped_mean` are of the sum; all else in the record is the verifier's."""
    scores = tuple(Score(1.0, "correct", added=-n / 4, parts={"own.size": -float(n)}) for n in range(2))
    completions = tuple(Completion((1,) * (n + 1), (0.0,) * (n + 1), "", "stop", 0) for n in range(2))
    group = ScoredGroup(Group(0, Prompt("p", "t", "", (1,), ""), completions), scores)
    parts = SimpleNamespace(
        filter=make_filter("zero_variance"),
        advantages=lambda rewards: batch_advantages(rewards, baseline="group_mean", scale="none"),
    )
    for on_reward in (False, True):
        plan = SimpleNamespace(seed=0, overlong_share=0.0, mask_truncated=False, filter_on_reward=on_reward)
        ctx: Any = SimpleNamespace(plan=plan, parts=parts, step=1)
        (made,) = compute_advantages(ctx, [group])
        assert made.advantages == (0.125, -0.125)
        assert made.kept == (on_reward, on_reward)
        row = batch_values(BatchFacts((made,), (), {}, 0))
        assert row["filter/zero_variance_share"] == (0.0 if on_reward else 1.0)
        assert (row["reward/mean"], row["reward/shaped_mean"], row["reward/own.size"]) == (1.0, 0.875, -0.5)
        samples = sample_rows(1, [made])
        assert [(r["reward"], r["shaped"]) for r in samples] == [(1.0, 1.0), (1.0, 0.75)]


def test_a_group_is_constant_by_its_finite_scores() -> None:
    assert is_constant([1.0, math.nan, 1.0]) and is_constant([math.nan]) and not is_constant([0.0, 1.0])
