"""Every wrong override is found, with the place and what was meant, all of them at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from dash_exp.config.compose import CachingComposer, compose, conf_dir, find_faults, opened
from dash_exp.config.schema import FILTERS
from dash_exp.errors import Fault, UserError

pytest_plugins = ["tests.config.config_fixtures"]
pytestmark = pytest.mark.usefixtures("no_data_folder")

ALL_ARMS = ", ".join(sorted(path.stem for path in (conf_dir() / "algorithm").iterdir()))
ALL_FILTERS = ", ".join(sorted(FILTERS))


def where(faults: list[Fault]) -> list[str]:
    return [fault.where for fault in faults]


def add_arm(outside: Path, text: str) -> list[str]:
    """Overrides that choose an outside arm with this file."""
    (outside / "algorithm" / "mine.yaml").write_text(text)
    return [f"hydra.searchpath=[file://{outside}]", "algorithm=mine", "model=tiny"]


def test_compose_raises_every_fault() -> None:
    with pytest.raises(UserError) as raised:
        compose(["algorithm.stepz=3", "learner.lr=fast"])
    assert where(raised.value.faults) == ["algorithm.stepz", "learner.lr"]


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("seed=abc", Fault("seed", "got 'abc' (text), expected a whole number")),
        ("seed=2.5", Fault("seed", "got 2.5 (number), expected a whole number")),
        ("algorithm.group_size=null", Fault("algorithm.group_size", "got null, expected a whole number")),
        ("learner.lr=fast", Fault("learner.lr", "got 'fast' (text), expected a number")),
        ("run.force=maybe", Fault("run.force", "got 'maybe' (text), expected true or false")),
        ("dataset.stop=x", Fault("dataset.stop", "got 'x' (text), expected a list like [a,b]")),
        ("dataset.limit=x", Fault("dataset.limit", "got 'x' (text), expected a whole number or null")),
        ("learner={lr: x}", Fault("learner.lr", "got 'x' (text), expected a number")),
        ("model.random.heads=x", Fault("model.random.heads", "got 'x' (text), expected a whole number")),
        (
            "evaluation.sets.arithmetic.limit=x",
            Fault("evaluation.sets.arithmetic.limit", "got 'x' (text), expected a whole number or null"),
        ),
        ("filter=of", Fault("filter", "unknown option 'of'", f"allowed: {ALL_FILTERS}")),
        (
            "algorithm=grppo",
            Fault("algorithm", "unknown option 'grppo'", f"did you mean 'grpo'? (allowed: {ALL_ARMS})"),
        ),
        (
            "+experiment=demo/minute",
            Fault("experiment", "already has an option", "write experiment=demo/minute, without +"),
        ),
        (
            "experiment/demo=minute",
            Fault("experiment/demo", "is a folder of options", "write experiment=demo/minute"),
        ),
        (
            "~filter",
            Fault(
                "filter", "a config group cannot be removed", f"did you mean 'none'? (allowed: {ALL_FILTERS})"
            ),
        ),
        ("~seed", Fault("seed", "a setting cannot be removed", "give it another value")),
        (
            "checkpoint.evry=3",
            Fault(
                "checkpoint.evry",
                "unknown key",
                "did you mean 'checkpoint.every'? (in checkpoint: every, keep, minutes, push_to)",
            ),
        ),
        (
            "+checkpoint.often=3",
            Fault("checkpoint.often", "unknown key", "in checkpoint: every, keep, minutes, push_to"),
        ),
        ("dash", Fault("dash", "is not key=value", "see python -m dash_exp --help")),
        ("hydra.searchpath=[/nope]", None),
        ("hydra.foo=3", Fault("hydra.foo", "unknown key")),
        ("evaluation.sets.other.limit=3", None),
    ],
)
def test_one_wrong_override(override: str, fault: Fault | None) -> None:
    found = find_faults(["model=tiny", override])
    if fault is None:  # only the place is ours to say
        assert where(found) == [override.split("=")[0]]
    else:
        assert found == [fault]


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("algorithm.stepz=3", "'algorithm.steps'"),
        ("stepz=3", "'algorithm.steps'"),
        ("lr=1e-3", "'learner.lr'"),
        ("algorithm.lr=1e-3", "'learner.lr'"),
        ("learner.scale=std", "'algorithm.scale'"),  # though learner.schedule looks like it
        ("algoritm=dash", "'algorithm'"),
        ("temperature=1", "'sampler.temperature' or 'evaluation.temperature'"),
        ("evaluation.sets.arithmetic.limti=3", "'evaluation.sets.arithmetic.limit'"),
        ("learner={lrr: 3}", "'learner.lr'"),
    ],
)
def test_an_unknown_key_names_the_one_meant(override: str, meant: str) -> None:
    [fault] = find_faults(["model=tiny", override])
    assert fault.what == "unknown key"
    assert fault.hint.startswith(f"did you mean {meant}? (")


def test_all_faults_are_found_at_once() -> None:
    overrides = [
        "model=tiny",
        "algorithm.stepz=3",
        "sampler=hff",
        "learner.lr=x",
        "oops",
        "a=[",
        "algorithm.group_size=1",
        "sampler.top_p=0.9",
    ]
    faults = find_faults(overrides)
    assert sorted(where(faults)) == sorted(
        ["oops", "a", "algorithm.stepz", "sampler", "learner.lr", "algorithm.group_size", "sampler.top_p"]
    )


def test_faults_that_hydra_finds_are_told_one_by_one() -> None:
    wrong = ["hydra.foo=3", "hydra/launcher=absent", "evaluation.sets.other.limit=3"]
    faults = find_faults(["model=tiny", *wrong])
    assert where(faults) == ["hydra.foo", "hydra/launcher", "evaluation.sets.other.limit"]
    assert faults[1].what.startswith("unknown option 'absent'")


def test_a_wrong_option_does_not_cause_faults_elsewhere() -> None:
    # the default arm, chosen in place of the unknown one, would contradict filter=none
    assert where(find_faults(["model=tiny", "algorithm=no_gff", "filter=none"])) == ["algorithm"]


def test_several_values_need_a_sweep() -> None:
    [fault] = find_faults(["model=tiny", "seed=0,1"])
    assert (fault.where, fault.what) == ("seed", "got several values: seed=0,1")
    assert "-m" in fault.hint
    assert find_faults(["model=tiny", "seed=0,1"], sweep=True) == []


def test_a_sweep_is_checked_in_every_value() -> None:
    overrides = ["model=tiny", "seed=0,x,2", "algorithm.group_size=8,1", "recipe=small,smal"]
    faults = find_faults(overrides, sweep=True)
    assert sorted(where(faults)) == ["algorithm.group_size", "recipe", "seed"]


def test_a_sweep_names_the_cells_that_contradict_themselves() -> None:
    overrides = ["model=tiny", "algorithm=dash,no_gf", "filter=advantage,none", "seed=range(0,3)"]
    faults = find_faults(overrides, sweep=True)
    assert [fault.what for fault in faults] == [
        "filter=none contradicts algorithm=dash, which is defined with filter=advantage, zero_variance, "
        "random, positive, top_k, max_variance, variance_top_p, dynamic (in algorithm=dash filter=none)",
        "filter=advantage contradicts algorithm=no_gf, which is defined with filter=none "
        "(in algorithm=no_gf filter=advantage)",
    ]


def test_sweeps_over_all_options_and_over_intervals() -> None:
    assert find_faults(["algorithm=glob(d*)", "debug=fast"], sweep=True) == []
    [fault] = find_faults(["model=tiny", "learner.lr=interval(0,1)"], sweep=True)
    assert fault == Fault("learner.lr", "an interval has no list of values", "write learner.lr=a,b,c")


@pytest.mark.parametrize(
    ("line", "where_and_what"),
    [
        ("betta: 1", ("algorithm.betta", "unknown key (in algorithm/mine.yaml)")),
        ("beta: x", ("algorithm.beta", "got 'x' (text), expected a number (in algorithm/mine.yaml)")),
        ("beta: ${nope}", ("algorithm.beta", "Interpolation key 'nope' not found")),
    ],
)
def test_a_wrong_line_in_a_file_of_ones_own(
    outside: Path, line: str, where_and_what: tuple[str, str]
) -> None:
    [fault] = find_faults(add_arm(outside, f"defaults: [dash, _self_]\n{line}\n"))
    assert (fault.where, fault.what) == where_and_what


def test_a_wrong_default_in_a_file_of_ones_own(outside: Path) -> None:
    [fault] = find_faults(add_arm(outside, "defaults: [dahs, _self_]\n"))
    assert (fault.where, fault.what) == ("algorithm", "unknown option 'dahs' (in algorithm/mine.yaml)")
    assert fault.hint.startswith("did you mean 'dash'?")


def test_broken_yaml_is_named_with_its_line(outside: Path) -> None:
    [fault] = find_faults(add_arm(outside, "name: mine\n  beta: [\n"))
    assert fault.where == f"{outside}/algorithm/mine.yaml:2"
    assert fault.what == "not valid yaml: mapping values are not allowed here"


def test_an_incomplete_arm_lists_all_it_lacks(outside: Path) -> None:
    text = (conf_dir() / "algorithm" / "dash.yaml").read_text()
    short = "\n".join(s for s in text.splitlines() if not s.startswith(("beta:", "passes")))
    assert find_faults(add_arm(outside, short)) == [
        Fault("algorithm.beta", "has no value", "set algorithm.beta="),
        Fault("algorithm.passes", "has no value", "set algorithm.passes="),
    ]


def test_showing_a_config_asks_for_no_files() -> None:
    missing = ["model=tiny", "dataset=gsm8k", "dataset.path=/nowhere/x.jsonl"]
    assert where(find_faults(missing)) == ["dataset.path"]
    assert find_faults(missing, checked=False) == []


NINES = "9" * 5000  # more digits than Python reads
NONSENSE = (
    *(f"{key}={NINES}" for key in ("seed", "learner.lr", "algorithm.steps", "cluster.retries.node")),
    *("", "=", "==", "=3", "a", "+", "~", "++", "~~seed", "seed", "seed=", "seed= ", "seed =3", '"seed"=3'),
    *(f"seed={text}" for text in ("[", "]", "{", "{}", "(", "'", '"', "a b", "1e400", "nan", "true", "0x10")),
    *(f"seed={text}" for text in ("range(0,9)", "range(1)", "choice()", "int(x)", "sort(1,a)", "glob(*)")),
    *("seed=" + "[" * 3000, "seed=" + "[" * 3000 + "]" * 3000, "dataset.stop=" + "[" * 500 + "]" * 500),
    *("seed=" + ",".join(map(str, range(6000))), "a" * 100_000 + "=3", "seed=" + "x" * 100_000),
    *("a." * 2000 + "b=3", "seed=3\n4", "seed=\x1b[31m3", "\x1b[31m=3", "run.dir=a\udcffb", "\udcff=3"),
    *("seed.x=3", "seed.0=3", "seed[0]=3", ".seed=3", "seed.=3", "seed..x=3", "..=3", "_target_=x"),
    *("dataset.__class__=3", "dataset.shots=[3]", "dataset.timeouts={a:b}", "dataset.mix={a:3}"),
    *("run.dir=", "model.path=", "dataset.path=''", "paths.data=", "hardware=", "tracking.experiment="),
    *("algorithm=", "algorithm=null", "algorithm=..", "algorithm=../../etc/passwd", "algorithm=3"),
    *(
        f"hydra.searchpath={entry}"
        for entry in ("[/no]", "[pkg://no.such]", "[foo://x]", "[1]", "['']", "/no")
    ),
    "hydra.sweeper.max_batch_size=0",
    "cluster.server_urls=[http://u:secretpw@h:8000]",
    "cluster.server_urls=[http://secretpw@h:8000]",
    'cluster.server_urls=["http://h:8000/?key=secretpw"]',
    'cluster={server_urls: ["http://secretpw@h:1"]}',
    'cluster.setup=["export http_proxy=http://u:secretpw@h"]',
    "tracking.uri=http://u:secretpw@h:5000",
    "tracking.uri=http://secretpw@h:5000",
    "tracking.uri=postgresql://u:1/secretpw@h/db",
    'tracking.uri="https://h/?access_token=secretpw"',
    "tracking.uri=[http://u:secretpw@h",
    "tracking.uri=http://u:secretpw@h,http://x",
    "tracking.url=http://u:secretpw@h",
)


def test_nonsense_is_a_fault_of_one_short_line_without_secrets() -> None:
    with opened():
        composer = CachingComposer()
        found = {text: composer.faults_of(text) for text in NONSENSE}
    assert [text[:80] for text, faults in found.items() if not faults] == []
    for text, faults in found.items():
        shown = "\n".join(map(str, faults))
        assert len(shown) < 1000 and "secretpw" not in shown and "\x1b" not in shown, text[:80]
        shown.encode()


@pytest.mark.parametrize(
    ("override", "where", "what"),
    [
        ("seed=range(0,1000000000)", "seed", "has 1000000000 values"),
        ("seed=range(0,1e18)", "seed", "has 1000000000000000000 values"),
        ("seed=shuffle(range(0,1e9))", "seed", "has 1000000000 values"),
        ("learner.lr=range(0,1,1e-9)", "learner.lr", "has 1000000000 values"),
        ("seed=range(0,1,0)", "seed", "finite ends and a step other than 0"),
        ("seed=range(0,inf)", "seed", "finite ends and a step other than 0"),
        ("seed=range(0,100) algorithm.steps=range(1,101)", "-m", "makes 10000 cells"),
    ],
)
def test_a_sweep_is_counted_before_it_is_expanded(override: str, where: str, what: str) -> None:
    [fault] = find_faults(override.split(), sweep=True)
    assert fault.where == where and what in fault.what
