"""The pool of cells on one machine, with real processes that stand in for training."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dash_exp.record import journal
from dash_exp.record.folder import Row, read_json, read_rows, write_json
from dash_exp.sweep import pool
from dash_exp.sweep.pool import Relay, Terms, run_pool
from dash_exp.sweep.worker import (
    OUTPUT,
    Gpus,
    Job,
    Lease,
    cell_actions,
    error_line,
    threads_each,
    visible_gpus,
)
from tests.conftest import REPOSITORY

RETRIES = {"node": 3, "preemption": 2, "unknown": 1, "config": 0}


class Bench:
    """Cells that follow a script, and a pool to run them."""

    def __init__(self, root: Path):
        self.root, self.logged = root, list[str]()

    def job(self, name: str, *acts: dict[str, Any], needs: tuple[str, ...] = (), gpus: int = 0) -> Job:
        """A cell with the id `name`, eight times; what each of its starts does."""
        folder = self.root / "cells" / f"cell-{name * 8}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "play.json").write_text(json.dumps(acts or ({},)))
        return Job(folder, tuple(need * 8 for need in needs), gpus)

    def run(self, *jobs: Job, relay: Relay | None = None, **terms: Any) -> dict[str, str]:
        """States by the letter of the cell."""
        states = run_pool(jobs, Terms(**{"retries": RETRIES, **terms}), self.logged.append, relay)
        return {name[-1]: state for name, state in states.items()}

    def seen(self, job: Job) -> list[Row]:
        return read_rows(job.folder / "seen.jsonl").rows


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    path = [str(Path(__file__).parent / "stand_in"), str(REPOSITORY)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(pool, "LOOK_S", 0.1)
    monkeypatch.setattr(pool, "BUSY_S", 0.2)
    return Bench(tmp_path)


def kinds(job: Job) -> list[str]:
    return [row["kind"] for row in journal.read(job.folder)]


def later(seconds: float, action: Any, *arguments: Any) -> None:
    timer = threading.Timer(seconds, action, arguments)
    timer.daemon = True
    timer.start()


def until(condition: Any, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


def test_one_after_the_other_each_with_output_and_journal(bench: Bench) -> None:
    jobs = [bench.job("a", {"say": "hello"}), bench.job("b"), bench.job("c")]
    assert bench.run(*jobs, sweep="mine") == {"a": "finished", "b": "finished", "c": "finished"}
    spans = [(row["begun"], row["ended"]) for job in jobs for row in bench.seen(job)]
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    assert (jobs[0].folder / OUTPUT).read_text() == "hello\n"
    start, end = journal.read(jobs[0].folder)
    assert (start["kind"], start["sweep"], start["job"]) == ("start", "mine", None)
    assert start["pid"] == bench.seen(jobs[0])[0]["pid"]
    assert (end["kind"], end["exit"], end["failure_class"]) == ("end", 0, None)
    assert bench.logged[0] == "cell-aaaaaaaa started"
    assert bench.logged[1].startswith("[1/3] cell-aaaaaaaa finished after step 0, ")


def test_as_many_at_once_as_there_are_slots_with_equal_parts_of_the_machine(bench: Bench) -> None:
    jobs = [bench.job(name, {"wait": 0.4}) for name in "abcd"]
    assert set(bench.run(*jobs, slots=2).values()) == {"finished"}
    spans = [row for job in jobs for row in bench.seen(job)]
    together = [sum(b["begun"] <= a["begun"] < b["ended"] for b in spans) for a in spans]
    assert max(together) == 2
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert all(row["actions"] == [f"cluster.threads={threads}"] for row in spans)


def test_a_cell_gets_only_the_keys_that_it_reads() -> None:
    actions = (
        "run.progress=none",
        "cluster.name=local",
        "cluster.retries.node=3",
        "cluster.setup=[x]",
        "cluster.threads=null",
        "cluster.server_urls=[http://x]",
        "tracking.mlflow=true",
    )
    kept = ["run.progress=none", "cluster.server_urls=[http://x]", "tracking.mlflow=true"]
    assert cell_actions(actions, None) == kept
    assert cell_actions(actions, 3) == [*kept, "cluster.threads=3"]
    assert cell_actions(["cluster.threads=5"], 3) == ["cluster.threads=5"]
    assert [threads_each(slots, cores=16) for slots in (1, 3, 16, 99)] == [16, 5, 1, 1]


def test_needs_come_first_and_blocked_cells_have_a_reason(bench: Bench) -> None:
    after = bench.job("a", needs=("b",))
    before = bench.job("b", {"wait": 0.3})
    orphan = bench.job("c", needs=("d",))
    lost = bench.job("e", needs=("f",))
    broken = bench.job("f", {"failure": "ValueError: x"})
    finished = bench.job("g")
    write_json(finished.folder / "status.json", {"state": "finished", "step": 1})
    ready = bench.job("h", needs=("g",))
    states = bench.run(after, before, orphan, lost, broken, ready, slots=2)
    assert states == {
        "a": "finished",
        "b": "finished",
        "c": "blocked",
        "e": "blocked",
        "f": "failed",
        "h": "finished",
    }
    assert bench.seen(after)[0]["begun"] >= bench.seen(before)[0]["ended"]
    assert read_json(orphan.folder / "status.json")["reason"] == "waits for dddddddd (missing)"
    assert read_json(lost.folder / "status.json")["reason"] == "waits for cell-ffffffff (failed)"
    assert not bench.seen(lost)


def test_failures_are_retried_by_the_budget_of_their_class(bench: Bench) -> None:
    once = bench.job("a", {"failure": "KeyError: 'x'"}, {})
    twice = bench.job("b", {"failure": "KeyError: 'x'", "step": 4})
    further = bench.job("c", *({"failure": "KeyError", "step": n} for n in (1, 2, 3)), {})
    wrong = bench.job("d", {"exit": 2})
    killed = bench.job("e", {"die": 9})
    assert bench.run(once, twice, further, wrong, killed, slots=2) == {
        "a": "finished",
        "b": "failed",
        "c": "finished",
        "d": "failed",
        "e": "interrupted",
    }
    starts = [kinds(job).count("start") for job in (once, twice, further, wrong, killed)]
    assert starts == [2, 2, 4, 1, 4]
    classes = [
        [r["failure_class"] for r in journal.read(job.folder) if r["kind"] == "end"]
        for job in (wrong, killed)
    ]
    assert classes == [["config"], ["node"] * 4]
    status = read_json(killed.folder / "status.json")  # which it could not write itself
    assert (status["state"], status["failure"]) == ("interrupted", "killed by SIGKILL")
    assert read_json(twice.folder / "status.json")["failure"] == "KeyError: 'x'"


def test_a_failure_is_classified_by_the_end_of_the_output(bench: Bench) -> None:
    job = bench.job("a", {"say": "torch.OutOfMemoryError: CUDA out of memory", "exit": 1})
    assert bench.run(job) == {"a": "failed"}
    assert journal.read(job.folder)[-1]["failure_class"] == "out_of_memory"
    assert read_json(job.folder / "status.json")["failure"].startswith("ended with exit code 1: torch.OutOf")


def test_a_failure_is_reported_in_a_line() -> None:
    fault = "dash_exp: 2 problems, nothing was started\n  x.jsonl:3: is broken\n    fix it\n  y: is absent"
    assert (
        error_line(fault, last=False) == "x.jsonl:3: is broken" == error_line(f"step 1\n{fault}", last=True)
    )
    trace = "Traceback (most recent call last):\n  File ...\nValueError: x\n\n"
    assert error_line(trace, last=True) == "ValueError: x"
    assert error_line("KeyError: 'x'\nand more", last=False) == "KeyError: 'x'"
    assert error_line("", last=True) == error_line("dash_exp:", last=False).removeprefix("dash_exp:") == ""


def test_a_cell_that_another_process_runs_is_waited_for(bench: Bench) -> None:
    job, other = bench.job("a", {"wait": 0.6}), bench.job("b")
    process = subprocess.Popen([sys.executable, "-m", "dash_exp.cell", str(job.folder)])
    until(lambda: read_json(job.folder / "status.json").get("state") == "running")
    assert bench.run(job, other) == {"a": "finished", "b": "finished"}
    assert process.wait() == 0
    assert len(bench.seen(job)) == 1 and kinds(job) == []
    assert f"cell-aaaaaaaa is being run by process {process.pid}; waiting for it" in bench.logged
    assert bench.seen(other)[0]["ended"] < bench.seen(job)[0]["ended"]


def test_a_cell_that_is_found_busy_is_tried_again_later(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a file system that shows no locks of other machines: only the start finds out."""
    monkeypatch.setattr(pool.Locks, "now", classmethod(lambda cls: cls({})))
    job = bench.job("a", {"wait": 0.5})
    process = subprocess.Popen([sys.executable, "-m", "dash_exp.cell", str(job.folder)])
    until(lambda: read_json(job.folder / "status.json").get("state") == "running")
    assert bench.run(job) == {"a": "finished"}
    assert process.wait() == 0 and len(bench.seen(job)) == 1
    assert {r.get("failure_class") for r in journal.read(job.folder)} == {None}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_is_forwarded_once_and_nothing_is_started_after_it(bench: Bench, number: int) -> None:
    jobs = [bench.job("a", {"wait": 20}), bench.job("b", {"wait": 20}), bench.job("c")]
    relay, before = Relay(), signal.getsignal(number)

    def interrupt() -> None:
        until(lambda: all((job.folder / "status.json").exists() for job in jobs[:2]))
        os.kill(os.getpid(), number)

    later(0, interrupt)
    assert bench.run(*jobs, slots=2, relay=relay) == {"a": "interrupted", "b": "interrupted", "c": "pending"}
    assert relay.first == number
    assert [bench.seen(job)[0]["signals"] for job in jobs[:2]] == [[number], [number]]
    assert [r["failure_class"] for r in journal.read(jobs[0].folder) if r["kind"] == "end"] == [None]
    assert signal.getsignal(number) == before
    assert bench.run(bench.job("a"), jobs[2]) == {"a": "finished", "c": "finished"}


def test_a_second_signal_is_forwarded_too(bench: Bench) -> None:
    job = bench.job("a", {"wait": 20})

    def interrupt() -> None:
        until(lambda: (job.folder / "status.json").exists())
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    later(0, interrupt)
    assert bench.run(job) == {"a": "interrupted"}
    assert bench.seen(job)[0]["signals"] == [signal.SIGINT, signal.SIGINT]


def test_cells_are_cancelled_by_a_row_in_their_journals(bench: Bench) -> None:
    running, waiting = bench.job("a", {"wait": 20}), bench.job("b")
    rest = bench.job("c", needs=("b",))
    journal.note(waiting.folder, "cancel")

    def cancel() -> None:
        until(lambda: (running.folder / "status.json").exists())
        journal.note(running.folder, "cancel")

    later(0, cancel)
    assert bench.run(running, waiting, rest) == {"a": "cancelled", "b": "cancelled", "c": "blocked"}
    assert not bench.seen(waiting)
    assert [read_json(j.folder / "status.json")["state"] for j in (running, waiting)] == ["cancelled"] * 2
    assert bench.seen(running)[0]["signals"] == [signal.SIGTERM]
    journal.note(waiting.folder, "retry")
    assert bench.run(waiting) == {"b": "finished"}


def test_a_killed_pool_leaves_its_cells_running_and_the_next_waits_for_them(bench: Bench) -> None:
    jobs = [bench.job("a", {"wait": 1}), bench.job("b", {"wait": 0.1})]
    code = (
        "from dash_exp.sweep.pool import Job, Terms, run_pool; from pathlib import Path; import sys; "
        "run_pool([Job(Path(p)) for p in sys.argv[1:]], Terms())"
    )
    first = subprocess.Popen([sys.executable, "-c", code, *(str(job.folder) for job in jobs)])
    until(lambda: (jobs[0].folder / "status.json").exists())
    first.kill()
    first.wait()
    assert bench.run(*jobs) == {"a": "finished", "b": "finished"}
    assert [len(bench.seen(job)) for job in jobs] == [1, 1]
    assert kinds(jobs[0]) == ["start"] and kinds(jobs[1]) == ["start", "end"]


def test_a_cell_that_a_killed_controller_left_running_keeps_its_slot(bench: Bench) -> None:
    jobs = [bench.job("a", {"wait": 0.6}), bench.job("b")]
    process = subprocess.Popen([sys.executable, "-m", "dash_exp.cell", str(jobs[0].folder)])
    until(lambda: read_json(jobs[0].folder / "status.json").get("state") == "running")
    journal.note(jobs[0].folder, "start", host="here", pid=process.pid, job=None, sweep="mine")
    assert bench.run(*jobs, sweep="mine") == {"a": "finished", "b": "finished"}
    assert process.wait() == 0
    assert bench.seen(jobs[1])[0]["begun"] >= bench.seen(jobs[0])[0]["ended"]


def test_a_cell_killed_before_its_clean_up_is_started_once_more(bench: Bench) -> None:
    job, done = bench.job("a"), bench.job("b")
    for one in (job, done):
        write_json(one.folder / "status.json", {"state": "finished", "step": 1})
    (job.folder / "checkpoints" / "step-000001" / "resume").mkdir(parents=True)
    late = bench.job("c", {"die_late": 9})
    assert bench.run(job, done, late) == {"a": "finished", "b": "finished", "c": "finished"}
    assert [kinds(one).count("start") for one in (job, done, late)] == [1, 0, 1]
    assert not list(job.folder.glob("checkpoints/*/resume"))
    assert [r["failure_class"] for r in journal.read(late.folder) if r["kind"] == "end"] == [None]


def test_gpus_are_leased_by_places() -> None:
    gpus = Gpus(("0", "1"), each=2)
    first, second, third = gpus.lease(1), gpus.lease(1), gpus.lease(1)
    assert [lease.gpus for lease in (first, second, third) if lease] == [("0",), ("1",), ("0",)]
    assert gpus.lease(2) is None  # both have cells on them
    fourth = gpus.lease(1)
    assert fourth == Lease(("1",), 1) and gpus.lease(1) is None
    for lease in (first, second, third, fourth):
        assert lease is not None
        gpus.release(lease)
    everything = gpus.lease(5)  # more than there are: the cell gets all, and reports the error itself
    assert everything == Lease(("0", "1"), 2) and gpus.lease(1) is None
    assert gpus.lease(0) == Lease((), 2)
    assert gpus.environment(everything) == {"CUDA_VISIBLE_DEVICES": "0,1"}
    assert Gpus(()).lease(4) == Lease((), 1) and Gpus(()).environment(Lease()) == {}


def test_which_gpus_there_are() -> None:
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "2, MIG-abc"}) == ("2", "MIG-abc")
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == () == visible_gpus({"CUDA_VISIBLE_DEVICES": "-1"})


def test_cells_at_the_same_time_see_different_gpus(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    jobs = [*(bench.job(name, {"wait": 0.4}, gpus=1) for name in "abc"), bench.job("d", gpus=2)]
    assert set(bench.run(*jobs, slots=3).values()) == {"finished"}
    rows = {job.name[-1]: bench.seen(job)[0] for job in jobs}
    assert rows["d"]["gpus"] == "4,7"
    for a, b in [("a", "b"), ("a", "c"), ("b", "c"), ("a", "d"), ("b", "d"), ("c", "d")]:
        together = rows[a]["begun"] < rows[b]["ended"] and rows[b]["begun"] < rows[a]["ended"]
        assert not (together and set(rows[a]["gpus"].split(",")) & set(rows[b]["gpus"].split(",")))
