"""Speed of the verifiers: maths verdicts per second and core, and what pool and sandbox add to them.

    python -m benchmarks.verifiers [--data FOLDER] [--answers 400] [--repeats 3] [--json FILE]

Maths: MATH-500's reference solutions, and the same with their answer changed. Code: HumanEval's reference
solutions with their tests, once in this process, already warm, and through `code_judge` with one
worker, at once after another verdict and after a pause; the difference is what a verdict costs beyond the
program's own run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import describe, machine, print_table, write
from dash_exp.types import Score
from dash_exp.verifiers.judges import code_judge
from dash_exp.verifiers.math.extract import extract
from dash_exp.verifiers.pool import VerifierPool
from dash_exp.verifiers.types import CodeGold, VerifyTask

GENEROUS_S = 120.0
PAUSE_S = 0.02
"""Before a verdict of an idle worker: by then the process for the next program is ready."""
Pair = tuple[str, str]


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    with (folder / name).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def maths_pairs(folder: Path, count: int) -> list[Pair]:
    """Half as they are, half with a changed answer, all of them judged, none equal as text."""
    pairs = []
    for number, row in enumerate(read(folder, "math500_test.jsonl")[: count // 2]):
        found = extract(row["solution"], "boxed") or ""
        pairs += [(f"{found}\\,", row["answer"]), (f"{found}+{number + 1}", row["answer"])]
    return pairs


def measure_maths(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Seconds a verdict: in this process, and through a pool of one worker, one after the other."""
    from dash_exp.verifiers.math.compare import judge_candidate

    for text, gold in pairs[:20]:
        judge_candidate(text, gold)
    here = [seconds(lambda: [judge_candidate(*pair) for pair in pairs]) / len(pairs)]  # once: sympy remembers
    tasks = [VerifyTask(text, gold) for text, gold in pairs]
    with VerifierPool(1, 30.0, 4096) as pool:
        pool.submit(tasks[0]).result(GENEROUS_S)
        one_by_one = [seconds(lambda: [pool.submit(task).result(GENEROUS_S) for task in tasks]) / len(tasks)]
        trivial = VerifyTask("5", "5")
        crossing = [seconds(lambda: pool.submit(trivial).result(GENEROUS_S)) for _ in range(500)]
    return {
        "verdicts_per_s": 1 / statistics.median(here),
        "pool_verdicts_per_s": 1 / statistics.median(one_by_one),
        "pool_overhead_ms": statistics.median(crossing) * 1e3,
    }


def run_here(program: str, tests: str) -> None:
    """The program and its tests as one script, in this process: no protection at all."""
    space: dict[str, Any] = {"__name__": "program"}
    exec(compile(program, "<program>", "exec"), space)  # noqa: S102 (reference solutions)
    exec(compile(tests, "<tests>", "exec"), space)  # noqa: S102


def measure_code(folder: Path, repeats: int, wanted: Any) -> dict[str, Any]:
    rows = read(folder, "humaneval_test.jsonl")
    golds = [CodeGold(r["tests"], r["entry_point"], r["prompt"]).to_text() for r in rows]
    here: dict[str, list[float]] = {r["id"]: [] for r in rows}
    there: dict[str, list[float]] = {r["id"]: [] for r in rows}
    idle: dict[str, list[float]] = {r["id"]: [] for r in rows}
    verifier = code_judge(1, 30.0, 2048, wanted)
    verifier.submit("def f(): 0", CodeGold("f()", "f").to_text()).result(GENEROUS_S)
    for turn in range(repeats + 1):  # the first is not counted: imports
        for row, gold in zip(rows, golds, strict=True):
            body = f"{row['canonical_solution']}\n# {turn}"  # another program: verdicts are remembered
            direct = seconds(lambda: run_here(row["prompt"] + body, row["tests"]))  # noqa: B023
            found: list[Score] = []
            judged = seconds(lambda: found.append(verifier.submit(body, gold).result(GENEROUS_S)))  # noqa: B023
            other = f"{body} after a pause"
            time.sleep(PAUSE_S)
            rested = seconds(lambda: found.append(verifier.submit(other, gold).result(GENEROUS_S)))  # noqa: B023
            assert [score.value for score in found] == [1.0, 1.0], (row["id"], found)
            if turn:
                here[row["id"]].append(direct)
                there[row["id"]].append(judged)
                idle[row["id"]].append(rested)
    verifier.close()
    return {
        "own_ms": median_of(here),
        "verdict_ms": median_of(there),
        "overhead_ms": extra_of(there, here),
        "overhead_idle_ms": extra_of(idle, here),
        "verdicts_per_s_2_workers": throughput(rows, golds, wanted),
    }


def extra_of(times: dict[str, list[float]], own: dict[str, list[float]]) -> float:
    """Median over the programs of what a verdict takes more than the program's own run."""
    return statistics.median(statistics.median(times[i]) - statistics.median(own[i]) for i in own) * 1e3


def median_of(times: dict[str, list[float]]) -> float:
    return statistics.median(statistics.median(values) for values in times.values()) * 1e3


def throughput(rows: Sequence[dict[str, Any]], golds: Sequence[str], wanted: Any) -> float:
    """Verdicts a second with two workers and everything submitted at once."""
    verifier = code_judge(2, 30.0, 2048, wanted)
    for _ in range(2):
        verifier.submit("def f(): 0", CodeGold("f()", "f").to_text()).result(GENEROUS_S)

    def everything() -> None:
        futures = [verifier.submit(r["canonical_solution"], g) for r, g in zip(rows, golds, strict=True)]
        for future in futures:
            future.result(GENEROUS_S)

    elapsed = seconds(everything)
    verifier.close()
    return len(rows) / elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("DASH_DATA", "data")))
    parser.add_argument("--answers", type=int, default=400, help="maths answers")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to write everything")
    args = parser.parse_args()
    if not (args.data / "math500_test.jsonl").is_file():
        raise SystemExit(f"no math500_test.jsonl in {args.data}: set DASH_DATA, or give --data")
    facts = machine(1)
    print(describe(facts))
    maths = measure_maths(maths_pairs(args.data, args.answers))
    code = {}
    for wanted in ("bwrap", "limits"):
        try:
            code[wanted] = measure_code(args.data, args.repeats, wanted)
        except RuntimeError as error:
            print(f"{wanted}: {error}")
    print_table("Maths", list(maths), [[f"{value:.3g}" for value in maths.values()]])
    columns = ["confinement", *next(iter(code.values()))]
    print_table("Code", columns, [[k, *(f"{v:.3g}" for v in row.values())] for k, row in code.items()])
    write(args.json, {"machine": facts, "maths": maths, "code": code})
    print(json.dumps({"maths": maths, "code": code}))


if __name__ == "__main__":
    main()
