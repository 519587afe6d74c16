"""Every arm and every preset on the tiny model: updates, record, resume; and that `debug=fast` learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dash_exp.cell.__main__ import run_config
from dash_exp.config.compose import compose, conf_dir
from dash_exp.config.schema import changed
from dash_exp.errors import UserError
from dash_exp.record.folder import Row, differences, read_final, read_json
from dash_exp.sampling.hf import HFSampler
from dash_exp.tasks.generated import digits
from dash_exp.train.budget import resolve_match
from tests.test_run import SMALL, finish, run_here, start, steps_of, wait_for_steps

HERE = Path(__file__).parent
TINY = ["cluster.threads=1", "run.progress=none", "evaluation.limit=4"]


def arm(root: Path, *overrides: str) -> Path:
    """Two steps of an arm as `debug=fast` runs it, without evaluation; its folder."""
    fixed = ("debug=fast", "run.progress=none", "cluster.threads=1", "evaluation=none")
    assert run_config(compose([*fixed, f"run.dir={root}", *overrides])) == 0
    (folder,) = (root / "cells").iterdir()
    return folder


AXES = [
    (["filter=zero_variance", "learner.precision=fp32"], 1, True),
    (["filter.kl=keep", "algorithm.kl=k2"], 1, True),
    (["filter.denominator=kept", "learner.precision=bf16"], 1, True),
    (["sampler.streaming=false", "algorithm.aggregation=token_mean"], 1, True),
    (["algorithm.aggregation=sequence_mean", "algorithm.scale=none"], 1, True),
    (["learner.lora.rank=2", "algorithm=ppo_multi"], 3, True),
    (["algorithm=maxrl"], 1, False),
    (["algorithm=gpg"], 1, False),
    (["algorithm=pass_at_k", "filter=random", "filter.share=0.5"], 1, False),
    (["algorithm=cispo", "algorithm.mini_batch=32", "filter=advantage"], 2, False),
    (["algorithm=dapo", "algorithm.mini_batch=32", "correction=sequence_truncate"], 2, False),
    (["correction=token_mask", "filter.kl=keep", "algorithm.mask_truncated=true"], 1, True),
    (["correction=sequence_mask", "algorithm.entropy=0.01"], 1, True),
    (["filter=positive", "algorithm=no_kl", "algorithm.entropy=0.01"], 1, False),
    (["filter=max_variance", "algorithm=rloo"], 1, False),
    (["filter=variance_top_p", "algorithm=ppo_mini", "algorithm.mini_batch=32"], 2, True),
    (["filter=top_k", "algorithm.baseline=group_mean", "algorithm.scale=batch_std"], 1, True),
]
"""Pairs of independent settings."""


@pytest.mark.parametrize(
    ("overrides", "updates", "kl"),
    [
        (["algorithm=dash"], 1, True),
        (["algorithm=no_gf"], 1, True),
        (["algorithm=no_kl"], 1, False),
        (["algorithm=pg"], 1, False),
        (["algorithm=grpo", "sampler.prompts_per_call=2"], 1, True),
        (["algorithm=rloo"], 1, False),
        (["algorithm=dr_grpo"], 1, False),
        (["algorithm=reinforce_pp", "filter=top_k"], 1, False),
        (["filter=random", "correction=token_truncate"], 1, True),
        (["algorithm=gspo", "algorithm.mini_batch=32"], 2, False),
        (["algorithm=ppo_multi"], 3, True),
        (["algorithm=ppo_mini", "algorithm.mini_batch=32"], 2, True),
        (["algorithm=ppo_mini", "algorithm.mini_batch=32", "algorithm.passes=2"], 4, True),
        (["algorithm=sft_h"], 1, False),
        (["algorithm=sft_m"], 1, False),
        *(pytest.param(*row, marks=pytest.mark.long) for row in AXES),
    ],
)
def test_every_arm_and_axis_learns_in_both_steps_of_a_fast_run(
    tmp_path: Path, overrides: list[str], updates: int, kl: bool
) -> None:
    """The random model gets some sums below ten right, so that samples are kept and backpropagated."""
    if "algorithm=sft_m" in overrides:
        rows = [{"id": one.id, "solution": one.solution} for one in digits("train").examples]
        (tmp_path / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        overrides = [*overrides, f"dataset.traces={tmp_path / 'traces.jsonl'}"]
    rows = steps_of(arm(tmp_path, *overrides))
    assert [r["updates"] + r["updates/skipped"] for r in rows] == [updates] * 2
    assert rows[-1]["updates/total"] == 2 * updates
    for row in rows:
        assert row["tokens/backpropagated"] > 0 and row["optimizer/grad_norm"] > 0
        if updates > 1 and row["updates"] > 1:  # later updates are off-policy
            assert abs(row["policy/ratio_mean"] - 1) > 1e-6
        assert ("kl/mean" in row) == ("kl/beta" in row) == kl
        assert "policy/clip_share" in row
        assert ("correction/weight_mean" in row) == any("correction=" in text for text in overrides)
        if updates == 1:  # arms with one update never forward twice
            assert row["tokens/forwarded"] == row["tokens/backpropagated"]


def test_digits_has_disjoint_splits_with_one_digit_answers() -> None:
    train, test = digits("train").examples, digits("test").examples
    assert (len(train), len(test)) == (45, 10)
    assert not {one.id for one in train} & {one.id for one in test}
    assert all(len(one.answer) == 1 for one in (*train, *test))


def test_beta_falls_over_the_planned_updates(tmp_path: Path) -> None:
    folder = run_here(
        tmp_path, "algorithm.beta_schedule=linear", "algorithm=no_gf", "evaluation=none", "algorithm.steps=4"
    )
    betas = [r["kl/beta"] for r in steps_of(folder)]
    assert betas == pytest.approx([0.04, 0.03, 0.02, 0.01])


SUMS = ["dataset=arithmetic", "dataset.path=null", "dataset.verifier=integer", "sampler.max_new_tokens=8"]


def test_sft_learns_what_it_is_shown(tmp_path: Path) -> None:
    """The base model and the trained one are evaluated with the template of training; nothing is
    sampled, judged or filtered in a step."""
    folder = run_here(
        tmp_path,
        *SUMS,
        "algorithm=sft_h",
        "algorithm.group_size=1",
        "algorithm.steps=20",
        "learner.lr=1e-2",
        "learner.freeze_embeddings=false",
    )
    rows = steps_of(folder)
    assert rows[-1]["policy/logprob_mean"] > rows[0]["policy/logprob_mean"] + 1.0
    for row in rows:
        assert row["completions/sampled"] == row["tokens/sampled"] == 0 and row["completions/shown"] == 4
        assert not {"reward/mean", "filter/kept_share", "policy/logprob_gap"} & row.keys()
    samples = read_final(folder, "samples")
    assert {r["outcome"] for r in samples} == {"shown"} and len(samples) == 80
    assert len({r["prompt"] for r in samples}) == 80  # an epoch without repetition
    evals = [r for r in read_final(folder, "evals") if r["metric"] == "accuracy"]
    assert [r["step"] for r in evals] == [0, 20]
    other = run_here(tmp_path, *SUMS, "algorithm.steps=1")  # the bare template: another base result
    cached = [json.loads(line).get("cached") for line in (other / "events.jsonl").read_text().splitlines()]
    assert True not in cached


def test_sft_raises_the_likelihood_at_temperature_one(tmp_path: Path) -> None:
    """Whatever the sampler's temperature is for evaluation, a demonstration was not drawn with it."""
    likelihoods = [
        steps_of(
            arm(tmp_path / t, *SUMS, "algorithm=sft_h", "algorithm.group_size=1", f"sampler.temperature={t}")
        )[0]["policy/logprob_mean"]
        for t in ("1.0", "0.5")
    ]
    assert likelihoods[0] == likelihoods[1]


def test_sft_hands_its_weights_on_before_an_evaluation_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions: list[int] = []
    plain = HFSampler.load_weights

    def noted(self: HFSampler, version: int) -> None:
        versions.append(version)
        plain(self, version)

    monkeypatch.setattr(HFSampler, "load_weights", noted)
    run_here(tmp_path, *SUMS, "algorithm=sft_h", "algorithm.group_size=1", "evaluation.every=2")
    assert versions == [2, 4, 6]


@pytest.mark.long
@pytest.mark.parametrize(
    "overrides",
    [
        ["algorithm=ppo_mini", "algorithm.mini_batch=16"],
        ["learner.lora.rank=2"],
        [*SUMS, "algorithm=sft_h", "algorithm.group_size=1"],
    ],
)
def test_killed_and_resumed_equals_undisturbed(tmp_path: Path, overrides: list[str]) -> None:
    whole = run_here(tmp_path / "whole", *overrides)
    process = start(tmp_path / "cut", *overrides)
    wait_for_steps(tmp_path / "cut", 3, process)
    process.kill()
    process.communicate()
    again = start(tmp_path / "cut", *overrides)
    output = finish(again)
    assert again.returncode == 0, output
    (folder,) = (tmp_path / "cut" / "cells").iterdir()
    assert differences(whole, folder) == []


@pytest.mark.long
def test_lora_killed_before_its_last_evaluation_evaluates_what_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last checkpoint is merged and has no moments, but still the adapters."""
    from dash_exp.train import attempt

    options = [
        *SUMS,
        "algorithm=sft_h",
        "algorithm.group_size=1",
        "learner.lora.rank=4",
        "learner.lr=5e-2",
        "algorithm.steps=40",
        "evaluation.temperature=1",
        "evaluation.limit=64",
    ]
    whole = run_here(tmp_path / "whole", *options)
    plain = attempt.evaluate
    monkeypatch.setattr(attempt, "evaluate", lambda *a: (_ for _ in ()).throw(MemoryError("gone")))
    with pytest.raises(MemoryError):
        run_here(tmp_path / "cut", *options, "evaluation.before=false")
    monkeypatch.setattr(attempt, "evaluate", plain)
    folder = run_here(tmp_path / "cut", *options, "evaluation.before=false")
    assert read_json(folder / "status.json")["attempt"] == 2
    last = [[r for r in read_final(f, "eval_samples") if r["step"] == 40] for f in (whole, folder)]
    assert [r["tokens"] for r in last[0]] == [r["tokens"] for r in last[1]]
    base = [r["tokens"] for r in read_final(whole, "eval_samples") if r["step"] == 0]
    assert base != [r["tokens"] for r in last[1]]


def test_a_step_is_evaluated_once_although_the_budget_ends_there(tmp_path: Path) -> None:
    folder = run_here(tmp_path, "evaluation.every=1", "budget.seconds=1e-6")
    steps = [r["step"] for r in read_final(folder, "evals") if r["metric"] == "accuracy"]
    assert steps == [0, 1]


def test_supervised_arms_count_epochs_of_what_they_are_shown(tmp_path: Path) -> None:
    folder = run_here(
        tmp_path,
        *SUMS,
        "algorithm=sft_h",
        "algorithm.group_size=1",
        "dataset.limit=10",
        "algorithm.steps=null",
        "algorithm.epochs=2.5",
        "evaluation=none",
    )
    rows = steps_of(folder)
    assert len(rows) == 7  # 25 demonstrations in batches of 4
    assert rows[-1]["optimizer/lr"] == pytest.approx(1e-3 * 1 / 5)  # 2 of 7 warm up


def test_a_base_model_is_evaluated_and_not_trained(tmp_path: Path) -> None:
    folder = run_here(tmp_path, "algorithm.steps=0")
    assert read_json(folder / "status.json")["state"] == "finished"
    assert steps_of(folder) == [] and {r["step"] for r in read_final(folder, "evals")} == {0}
    assert not list((folder / "checkpoints").glob("*"))


def test_a_lora_checkpoint_is_a_plain_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = arm(tmp_path, "learner.lora.rank=2", "algorithm=no_gf")
    (checkpoint,) = (folder / "checkpoints").iterdir()
    _, facts = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not facts["missing_keys"] and not facts["unexpected_keys"]


def test_sft_m_reads_traces_and_its_identity_is_their_content(tmp_path: Path) -> None:
    traces = tmp_path / "traces.jsonl"
    rows = [
        {"id": "12+34", "solution": " 46"},
        {"id": "12+34", "solution": " 46 it is"},
        {"id": "55+5", "solution": "no such prompt"},
        {"id": "55+15", "solution": " 70"},
    ]
    traces.write_text("".join(json.dumps(r) + "\n" for r in rows))
    options = [
        *SUMS,
        "algorithm=sft_m",
        "algorithm.group_size=1",
        f"dataset.traces={traces}",
        "sampler.max_new_tokens=12",
        "algorithm.prompts_per_step=3",
        "algorithm.steps=2",
    ]
    folder = run_here(tmp_path, *options)
    shown = {r["prompt"]: r["text"] for r in read_final(folder, "samples")}
    assert shown == {
        "arithmetic/12+34#0": " 46",
        "arithmetic/12+34#1": " 46 it is",
        "arithmetic/55+15#0": " 70",
    }
    moved = tmp_path / "elsewhere.jsonl"
    traces.rename(moved)
    same = run_here(tmp_path, *[o.replace(str(traces), str(moved)) for o in options])
    assert same == folder


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["algorithm=sft_m"], "sample them first: python -m dash_exp.traces"),
        (["algorithm=sft_h", "algorithm.group_size=4"], "must be 1 with algorithm.source=solutions"),
        (["algorithm=ppo_mini", "algorithm.mini_batch=24"], "allowed: 16, 32, 64"),
        (
            ["algorithm=ppo_mini", "algorithm.mini_batch=16", "algorithm.surrogate=policy_gradient"],
            "must be 'clipped' when algorithm.mini_batch=16",
        ),
        (["algorithm.kl=k1"], "k2's is what k1 gives as a penalty on the reward"),
    ],
)
def test_contradictions_are_told(overrides: list[str], told: str) -> None:
    from dash_exp.config.compose import find_faults

    assert told in "\n".join(map(str, find_faults([*SMALL, *overrides])))


def test_a_dataset_without_solutions_is_refused_by_sft(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no worked solutions"):
        run_here(tmp_path, "algorithm=sft_h", "algorithm.group_size=1", "dataset.fields.solution=[none]")


PRESETS = sorted(
    p.relative_to(conf_dir() / "experiment").with_suffix("").as_posix()
    for folder in ("paper", "demo")
    for p in (conf_dir() / "experiment" / folder).glob("*.yaml")
)
QUICK = ("demo/math_sft_m", "demo/code_sft_h")


def presets() -> list[Any]:
    """Each preset; most of them among the longer tests."""
    return [p if p in QUICK else pytest.param(p, marks=pytest.mark.long) for p in PRESETS]


@pytest.mark.parametrize("name", presets())
def test_every_preset_runs_two_updates(
    name: str, tmp_path: Path, data_folder: Path, tiny_folder: Path
) -> None:
    """With the tiny model's weights, the sampler of this process and short completions; the rest as it
    is. A base model is evaluated and not trained."""
    overrides = [
        f"experiment={name}",
        f"model.path={tiny_folder}",
        "sampler=hf",
        f"run.dir={tmp_path}",
        *TINY,
        f"paths.data={data_folder}",
        "verifier.workers=1",
        "evaluation.samples=1",
        "evaluation.temperature=0",
        "evaluation.k=[]",
        "learner.preflight=false",
    ]
    supervised, steps = "sft" in name, 0 if "base" in name else 2
    overrides.append(f"algorithm.steps={steps}")
    if "confounded" not in name:
        overrides.append("algorithm.prompts_per_step=4")
    overrides.append(f"sampler.max_new_tokens={400 if supervised else 12}")
    if supervised:
        overrides.append("evaluation=none")
    if "sft_m" in name:
        overrides.append(f"dataset.traces={write_traces(tmp_path, name)}")
    config = compose(overrides)
    if config.budget.match:
        config, _ = resolve_match(config, overrides, tmp_path / "cache")
        assert config.budget.match is not None and len(config.budget.match) == 8
        config = changed(config, {"budget.match": None})  # its partner is another preset
    assert run_config(config) == 0
    (folder,) = (tmp_path / "cells").iterdir()
    assert read_json(folder / "status.json")["state"] == "finished"
    rows: list[Row] = steps_of(folder)
    assert [r["step"] for r in rows] == [1, 2][:steps]
    assert all(r["updates/total"] >= r["step"] for r in rows)
    data = {row["dataset"] for row in read_final(folder, "evals")}
    expected = {
        "paper/math": "math500",
        "demo/math": "arithmetic",
        "paper/code": "mbppplus",
        "demo/minute": "arithmetic",
    }
    assert supervised or expected.get(name.partition("_")[0], "functions") in data


def write_traces(folder: Path, name: str) -> Path:
    rows = {"demo/math_sft_m": ("12+34", " 46")}.get(name, ("math-train-00003", "The answer is 2."))
    path = folder / "traces.jsonl"
    path.write_text(json.dumps({"id": rows[0], "solution": rows[1]}) + "\n")
    return path


@pytest.mark.long
def test_vllm_samples_from_merged_adapters(tmp_path: Path) -> None:
    """The engine holds weights of its own, without adapters: after each sync its log-probabilities are
    the learner's."""
    rows = steps_of(
        arm(
            tmp_path,
            "sampler=vllm",
            "sampler.dtype=float32",
            "learner.precision=fp32",
            "algorithm=no_gf",
            "learner.lora.rank=4",
            "learner.lr=3e-2",
            "learner.schedule=constant",
            "learner.warmup_share=0",
            "algorithm.beta=10",
            "algorithm.steps=3",
        )
    )
    assert rows[-1]["kl/mean"] > 1e-3  # it has moved
    assert all(r["policy/logprob_gap"] < 1e-5 for r in rows)
