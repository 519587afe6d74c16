"""Before any timing: do both sides ask the same, and judge the same completions alike?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.ours import Ours
from benchmarks.peer import Rewards, Seen, integer_rewards
from dash_exp.sampling.protocol import arrived
from dash_exp.tasks.prompts import prompts_at, requests
from dash_exp.types import Prompt
from dash_exp.verifiers.judges import judge_integer
from dash_exp.verifiers.types import Judge

TEXTS = (
    " 85",
    "85",
    "85\n",
    " 085",
    "0085 ",
    " +85",
    " -85",
    "- 85",
    " 85.0",
    "85 or 58",
    "58 or 85",
    "8 5",
    "",
    " ",
    "\n",
    "eighty-five",
    " = 85",
    "185",
    "850",
    "85" * 400,
    "-0",
    "0",
    "٨٥",
    "8٥",
    "１",
)
ANSWERS = ("85", "-85", "0", "185")


def require(pairs: Sequence[tuple[object, object]], what: str) -> int:
    """How many pairs were compared. Ends the program at the first unequal one."""
    for ours, theirs in pairs:
        if ours != theirs:
            raise SystemExit(
                f"the sides do not do the same work, so times would mean nothing; {what}: "
                f"{ours!r} here, {theirs!r} there"
            )
    return len(pairs)


def judged_alike(texts: Sequence[tuple[str, str]]) -> int:
    """Texts with their gold answers, under both judges of integers."""
    theirs = integer_rewards([t for t, _ in texts], [a for _, a in texts])
    pairs = [
        ((text, gold, judge_integer(text, gold).value), (text, gold, reward))
        for (text, gold), reward in zip(texts, theirs, strict=True)
    ]
    return require(pairs, "reward of a text")


def listed_texts() -> dict[str, int]:
    """A fixed list of odd texts."""
    return {"listed texts judged alike": judged_alike([(t, a) for t in TEXTS for a in ANSWERS])}


def before(ours: Ours, prompts: Sequence[Prompt], tokenizer: Any, rewards: Rewards) -> dict[str, int]:
    """What is compared before timing, each with the number of comparisons. `tokenizer`, `rewards`: the
    peer's.

    Nothing of ours moves: the sampler is asked once, and no step is taken.
    """
    asked = tokenizer(text=[p.text for p in prompts])["input_ids"]
    tokens = [(tuple(p.token_ids), tuple(ids)) for p, ids in zip(prompts, asked, strict=True)]
    parts, plan = ours.built.parts, ours.built.plan
    chosen = prompts_at(parts.chooser.prompts, plan.seed, 0, plan.prompts_per_step)
    calls = requests(chosen, plan.seed, "sample", 1, plan.group_size)
    groups = list(arrived(parts.sampler.stream(calls, parts.decoding)))
    sampled = [(c, g.prompt.answer) for g in groups for c in g.completions]
    (judge,) = parts.judges.values()
    decoded = tokenizer.batch_decode([c.token_ids for c, _ in sampled], skip_special_tokens=True)
    verdicts = [judge.submit(c.text, gold).result().value for c, gold in sampled]
    theirs = rewards(decoded, [gold for _, gold in sampled])
    return {
        "prompts tokenized alike": require(tokens, "tokens of a prompt"),
        "our samples decoded alike": require(
            [(c.text, text) for (c, _), text in zip(sampled, decoded, strict=True)], "a sample's text"
        ),
        "our samples judged alike": require(list(zip(verdicts, theirs, strict=True)), "reward of a sample"),
    }


def after(seen: Seen, judge: Judge) -> dict[str, int]:
    """The peer's own samples, once there are some, under a judge of ours."""
    pairs = [
        ((text, gold, judge.submit(text, gold).result().value), (text, gold, reward))
        for rows in seen.batches
        for text, gold, reward, _ in rows
    ]
    return {"the peer's samples judged alike": require(pairs, "reward of the peer's sample")}
