"""Training seconds until each claim of a study is decided: by `sweep race`, with fixed seeds, and with TRL.

    python -m benchmarks.decision [analysis/data/study] [--peer 20.1] [--json outputs/bench/decision.json]

A race looks at 3, 5, 8 and 12 seeds of both arms and stops at the first look at which the claim is decided,
raced by itself with its sequential correction; the records are asked which look that would have been. Fixed
seeds are twelve
of both arms at the mean time of those recorded. `--peer`: TRL's seconds for one update of this work, as
`benchmarks.default_cell` measures them; twelve seeds of both arms take as many of DASH's updates. Evaluation
is left out on all sides. Pairs with an arm that is not RL have no time in TRL.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from analysis import claims, quantities
from analysis.load import Records, load
from analysis.variants import Variant, variants
from benchmarks.report import print_table
from dash_exp.statistics.comparison import LOOK_WEIGHTS, sequential_p

FIXED = 12
ALPHA = 0.05
NOT_RL = ("base", "sft_h", "sft_m")
Key = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class Decision:
    """`look`: seeds of each arm at which the claim was decided, None where it is open. Seconds are of both
    arms; NaN where there is no such number."""

    claim: str
    data: str
    verdict: str
    look: int | None
    race_s: float
    fixed_s: float
    peer_s: float


def with_seeds(records: Records, count: int) -> Records:
    """The records of the first seeds only."""
    cells = records.cells[records.cells["seed"] < count]
    return replace(records, cells=cells)


def looks_of(records: Records) -> dict[int, dict[Key, claims.Finding]]:
    """What each look would have found, by claim, pair and evaluation set."""
    seeds = int(records.cells["seed"].max()) + 1
    found = {}
    for look in (k for k in LOOK_WEIGHTS if k <= seeds):
        part = with_seeds(records, look)
        findings = claims.findings(part, variants(part))
        found[look] = {(f.claim, f.where, f.pair[2] if f.pair else ""): f for f in findings}
    return found


def decided_at(looks: Mapping[int, Mapping[Key, claims.Finding]], key: Key) -> int | None:
    """The first look at which a claim, raced by itself, is decided."""
    seen: dict[int, float] = {}
    for look in sorted(looks):
        if key in looks[look]:
            seen[look] = looks[look][key].p
        if sequential_p(seen) < ALPHA:
            return look
    return None


def decisions(records: Records, peer_s: float | None, at_once: int = 1) -> list[Decision]:
    """A line for each claim, in the order of the page. `at_once`: runs that shared the machine, so that what
    they took on the wall is their sum divided by it."""
    looks, arms = looks_of(records), {v.arm: v for v in variants(records)}
    last = looks[max(looks)]
    asked = {claim.text: claim for claim in claims.read_claims()}
    updates = len(quantities.steps_of(records, arms["dash"].cells[0]))
    lines = []
    for key, finding in last.items():
        both = (asked[finding.claim].arm, asked[finding.claim].other)
        pair = [name for name in both if name in arms]
        mean = sum(sum(seconds(records, arms[name])) / len(arms[name].cells) for name in pair)
        look = decided_at(looks, key)
        race = sum(sum(seconds(records, arms[name])[:look]) for name in pair) if look else math.nan
        rl = not {*both} & {*NOT_RL}
        peer = FIXED * len(pair) * updates * peer_s if peer_s and rl else math.nan
        verdict = verdict_of(asked[finding.claim], looks[look][key]) if look else "undecided"
        ours = race / at_once, FIXED * mean / at_once
        lines.append(Decision(finding.claim, key[2], verdict, look, *ours, peer))
    return lines


def verdict_of(claim: claims.Claim, finding: claims.Finding) -> str:
    """What a decided claim came to."""
    value = finding.effect.value
    value = math.log(value) if claim.measure == "speed" else value
    holds = value * claim.sign > 0 if claim.sign else abs(value) <= claim.effect
    return "supported" if holds else "contradicted"


def seconds(records: Records, variant: Variant) -> list[float]:
    """Training seconds of each run, in the order of seeds."""
    return [quantities.training_seconds(quantities.steps_of(records, cell)) for cell in variant.cells]


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("records", type=Path, nargs="?", default=Path("analysis/data/study"))
    parser.add_argument("--peer", type=float, help="seconds of one update with TRL")
    parser.add_argument("--at-once", type=int, default=1, help="runs that shared the machine")
    parser.add_argument("--json", type=Path, help="where the numbers are written")
    args = parser.parse_args(given)
    lines = decisions(load([args.records]), args.peer, args.at_once)
    rows = []
    for one in lines:
        times = [shown(value) for value in (one.race_s, one.fixed_s, one.peer_s)]
        ratios = [ratio(value, one.race_s) for value in (one.fixed_s, one.peer_s)]
        rows.append([one.claim, one.data, one.verdict, str(one.look or "-"), *times, *ratios])
    heads = ["claim", "set", "verdict", "seeds", "race, s", f"{FIXED} seeds, s", f"TRL, {FIXED} seeds, s"]
    print_table("Training seconds until a claim is decided", [*heads, "fixed / race", "TRL / race"], rows)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps([asdict(one) for one in lines], indent=1) + "\n", encoding="utf-8")


def shown(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:,.0f}"


def ratio(one: float, other: float) -> str:
    return "-" if math.isnan(one / other) else f"{one / other:.1f}"


if __name__ == "__main__":
    main()
