"""Axes become combinations: products, zips, exclusions, additions; values survive Hydra's grammar."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from dash_exp.config.compose import opened, parse
from dash_exp.config.overrides import quoted
from dash_exp.errors import UserError
from dash_exp.sweep.spec import Block, Spec, combinations, key_of, products, text_of


def spec(
    *blocks: Block, overrides: tuple[str, ...] = (), seeds: tuple[int, ...] = (0,), times: bool = False
) -> Spec:
    return Spec("s", "c", "q", ("table_1",), overrides, seeds, blocks, times, (), Path("s.yaml"))


def axis(key: str, *values: str) -> tuple[tuple[str, ...], ...]:
    return tuple((f"{key}={value}",) for value in values)


def test_axes_are_multiplied_zips_run_together_and_the_first_seed_comes_first() -> None:
    together = (("g=4", "p=64"), ("g=8", "p=32"))
    block = Block(
        (axis("algorithm", "dash", "grpo"), together),
        exclude=(frozenset({"algorithm=grpo", "g=8"}),),
        include=(("algorithm=pg",),),
    )
    assert combinations(spec(block, seeds=(0, 7))) == [
        ("algorithm=dash", "g=4", "p=64", "seed=0"),
        ("algorithm=dash", "g=8", "p=32", "seed=0"),
        ("algorithm=grpo", "g=4", "p=64", "seed=0"),
        ("algorithm=pg", "seed=0"),
        ("algorithm=dash", "g=4", "p=64", "seed=7"),
        ("algorithm=dash", "g=8", "p=32", "seed=7"),
        ("algorithm=grpo", "g=4", "p=64", "seed=7"),
        ("algorithm=pg", "seed=7"),
    ]


def test_one_seed_of_a_combination_can_be_left_out() -> None:
    block = Block((axis("a", "1", "2"),), exclude=(frozenset({"a=2", "seed=1"}),))
    assert combinations(spec(block, seeds=(0, 1))) == [
        ("a=1", "seed=0"),
        ("a=2", "seed=0"),
        ("a=1", "seed=1"),
    ]


def test_blocks_are_united_and_choices_win_over_what_is_common() -> None:
    one, two = Block((axis("a", "1", "2"),)), Block((axis("a", "2"), axis("b", "x", "y")))
    assert combinations(spec(one, two, overrides=("b=y", "c=0"))) == [
        ("b=y", "c=0", "a=1", "seed=0"),
        ("b=y", "c=0", "a=2", "seed=0"),
        ("c=0", "a=2", "b=x", "seed=0"),
        ("c=0", "a=2", "b=y", "seed=0"),
    ]


def test_where_times_count_nothing_streams_unless_it_is_said() -> None:
    plain, said = Block((axis("a", "1"),)), Block((axis("sampler.streaming", "true"),))
    assert combinations(spec(plain, said, times=True)) == [
        ("a=1", "seed=0", "sampler.streaming=false"),
        ("sampler.streaming=true", "seed=0"),
    ]


def test_a_command_lines_overrides_take_the_place_of_the_sweeps_own() -> None:
    block = Block((axis("algorithm", "dash", "grpo"),))
    assert combinations(spec(block, overrides=("x=1",), seeds=(0, 1)), ["seed=5,6", "x=2"]) == [
        ("algorithm=dash", "seed=5", "x=2"),
        ("algorithm=dash", "seed=6", "x=2"),
        ("algorithm=grpo", "seed=5", "x=2"),
        ("algorithm=grpo", "seed=6", "x=2"),
    ]
    assert combinations(spec(block), ["algorithm=pg"]) == [("seed=0", "algorithm=pg")]
    with pytest.raises(UserError, match="cannot read"):
        combinations(spec(block), ["seed=[1"])


def test_multirun_overrides_expand_in_the_order_of_hydras_own_sweeper() -> None:
    overrides = ["algorithm=dash,grpo", "model=tiny", "seed=range(0,3)", "learner.lr=choice(1e-4,3e-4)"]
    with opened():
        parsed, _ = parse(overrides)
    theirs = [tuple(job) for batch in BasicSweeper.split_arguments(parsed, None) for job in batch]
    assert products(overrides) == theirs
    assert len(theirs) == 2 * 3 * 2
    assert products([]) == [()]
    for text, why in (("seed=interval(0,1)", "an interval has no list"), ("algorithm=glob(zz*)", "no value")):
        with pytest.raises(UserError, match=why):
            products([text, "seed=1"])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (3, "3"),
        (1e-6, "1e-06"),
        (0.5, "0.5"),
        (float("inf"), "inf"),
        ("1e-4", "0.0001"),
        ("dash", "dash"),
        ("paper/math_dash_0.5b", "paper/math_dash_0.5b"),
        ("", "''"),
        ("null", "'null'"),
        ("1_0", "'1_0'"),
        ("a b", "'a b'"),
        ([1, "x y"], "[1,'x y']"),
        ([], "[]"),
        ({"a": 1, "b": None}, "{a:1,b:null}"),
        ("experiment=demo/x", "'experiment=demo/x'"),
    ],
)
def test_values_of_yaml_in_hydras_grammar(value: object, text: str) -> None:
    assert text_of(value) == text


@settings(max_examples=60, deadline=None)
@given(
    st.one_of(
        st.text(alphabet="ab1.e-+_/\\'\"=,:[]{}() $", max_size=8),
        st.sampled_from(["\\", "'\\'", "${a}", "x=y,z", "1_0", ".5", "nan", "0x1"]),
    )
)
def test_text_survives_the_grammar(text: str) -> None:
    value = OverridesParser.create().parse_override(f"hardware={quoted(text)}").value()
    assert value == text or float(text) == value  # 1e-4 is the one text that is meant as a number


def test_the_key_of_an_override() -> None:
    assert [key_of(t) for t in ("a.b=1", "+a.b=x=y", "++a=1", "~a", "g@p.q=x")] == [
        "a.b",
        "a.b",
        "a",
        "a",
        "g@p.q",
    ]
