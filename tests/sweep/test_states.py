"""The state of a cell: from evidence, real processes with real locks, and the ends of files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dash_exp.record import journal
from dash_exp.record.folder import Recorder, Row, lock
from dash_exp.record.locks import HERE, Locks, ask_to_end, is_alive, runs
from dash_exp.record.state import Evidence, derive_state, last_rows, recent_steps
from dash_exp.sweep.slurm.queue import JobState
from dash_exp.sweep.states import CellState, state_of, states_of, steps_of
from dash_exp.sweep.watch import Follower
from dash_exp.text import last_lines
from tests.conftest import REPOSITORY
from tests.sweep.sweep_fixtures import cell_of, held_by_a_process, ran, rewrite, steps_rows, sweep_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    manifest = sweep_of(tmp_path, [cell_of("dash", 0, 1)])
    return manifest.cell(manifest.entries[0])


def row(kind: str, at: float, **facts: Any) -> dict[str, Any]:
    return {"kind": kind, "time": at, **facts}


def record(state: str, heartbeat: float, **facts: Any) -> dict[str, Any]:
    return {"state": state, "attempt": 1, "step": 3, "heartbeat": heartbeat, "failure": None, **facts}


QUEUED, RUNS, ENDED = row("queued", 10, job="7"), JobState("running", "RUNNING"), JobState("ended")
START = row("start", 20, host="node7", pid=5, job="7")
LOCAL = row("start", 20, host=HERE, pid=5, job=None)


def end(code: int, kind: str | None, at: float = 40) -> dict[str, Any]:
    return row("end", at, exit=code, failure_class=kind)


CASES = {
    "nothing was started": (record("pending", 5), [], {}, "pending"),
    "finished stays so while its process tidies up": (
        record("finished", 30),
        [LOCAL],
        {"pid": 5},
        "finished",
    ),
    "a process holds it, whatever was recorded": (record("interrupted", 15), [LOCAL], {"pid": 5}, "running"),
    "it recorded running and nobody holds it": (record("running", 30), [LOCAL], {}, "interrupted"),
    "killed, and the launcher saw a lost machine": (
        record("running", 30),
        [LOCAL, end(-9, "node")],
        {},
        "interrupted",
    ),
    "killed for its memory": (record("running", 30), [LOCAL, end(-9, "out_of_memory")], {}, "failed"),
    "refused before it had its lock": (record("pending", 5), [LOCAL, end(2, "config")], {}, "failed"),
    "asked to end before it had its lock": (
        record("pending", 5),
        [LOCAL, end(143, "preemption")],
        {},
        "interrupted",
    ),
    "its partner is not ready: exit code 3": (record("blocked", 5), [LOCAL, end(3, None)], {}, "blocked"),
    "failed": (record("failed", 30, failure="boom"), [LOCAL, end(1, "unknown")], {}, "failed"),
    "failed, then a person asked again": (
        record("failed", 30),
        [LOCAL, end(1, "nan"), row("retry", 50)],
        {},
        "pending",
    ),
    "waits in the queue": (record("pending", 5), [QUEUED], {"job": JobState("queued", "PENDING")}, "queued"),
    "queued anew after a lost node": (
        record("running", 30),
        [QUEUED, START],
        {"job": JobState("queued", "PENDING")},
        "queued",
    ),
    "its job has begun, itself not yet": (record("pending", 5), [QUEUED], {"job": RUNS}, "running"),
    "runs in a job elsewhere": (record("running", 30), [QUEUED, START], {"job": RUNS}, "running"),
    "its process ended in a job that goes on": (
        record("running", 30),
        [QUEUED, START, end(-9, "node")],
        {"job": RUNS},
        "interrupted",
    ),
    "its job was queued anew and runs again": (
        record("interrupted", 30),
        [QUEUED, START, end(140, "timeout"), row("requeue", 50, job="7")],
        {"job": RUNS},
        "running",
    ),
    "its job was killed, queued anew, and has just begun again": (
        record("interrupted", 30),
        [QUEUED, START],
        {"job": RUNS},
        "running",
    ),
    "its job is over": (record("running", 30), [QUEUED, START], {"job": ENDED}, "interrupted"),
    "its job ran out of memory": (
        record("running", 30),
        [QUEUED, START],
        {"job": JobState("ended", "OUT_OF_MEMORY")},
        "failed",
    ),
    "scancel, while it waited": (
        record("pending", 5),
        [QUEUED],
        {"job": JobState("ended", "CANCELLED")},
        "cancelled",
    ),
    "scancel, then a retry": (
        record("interrupted", 30),
        [QUEUED, START, row("retry", 60)],
        {"job": JobState("ended", "CANCELLED")},
        "interrupted",
    ),
    "cancelled while it ran": (
        record("interrupted", 31),
        [LOCAL, row("cancel", 30), end(143, "preemption")],
        {},
        "cancelled",
    ),
    "cancelled, not ended yet": (record("running", 30), [LOCAL, row("cancel", 31)], {"pid": 5}, "running"),
    "cancelled before it began": (record("pending", 5), [row("cancel", 30)], {}, "cancelled"),
    "cancelled, then a retry": (record("cancelled", 30), [row("retry", 50)], {}, "pending"),
    "elsewhere, heard a minute ago": (
        record("running", 30, host="node7"),
        [],
        {"now": 90.0, "step_s": 2.0},
        "running",
    ),
    "elsewhere, silent for twenty minutes at 2 s a step": (
        record("running", 30, host="node7"),
        [],
        {"now": 1230.0, "step_s": 2.0},
        "interrupted",
    ),
    "elsewhere, silent for twenty minutes at 5 minutes a step": (
        record("running", 30, host="node7"),
        [],
        {"now": 1230.0, "step_s": 300.0},
        "running",
    ),
    "elsewhere, evaluating before its first step": (
        record("running", 30, host="node7"),
        [],
        {"now": 1230.0, "step_s": None},
        "running",
    ),
    "queued, and squeue does not answer": (record("pending", 5), [QUEUED], {}, "queued"),
}


@pytest.mark.parametrize("name", CASES)
def test_states(name: str) -> None:
    status, rows, more, expected = CASES[name]
    assert derive_state(Evidence(Path(), status, rows, **more)).state == expected


def test_a_state_has_a_note() -> None:
    def derived(status: Row, rows: list[Row], **more: Any) -> CellState:
        return derive_state(Evidence(Path(), status, rows, **more))

    assert derived(record("running", 30), [LOCAL, row("cancel", 31)], pid=5).note == "asked to end"
    waits = JobState("queued", "PENDING", reason="Priority")
    assert derived(record("pending", 5), [QUEUED], job=waits).note == "Priority"
    dead = derived(record("running", 30), [LOCAL], now=120.0)
    assert dead.note == "exited without recording a status, last seen 1m30s ago"
    lost = derived(record("running", 30), [QUEUED, START], job=JobState("ended", "NODE_FAIL"))
    assert (lost.note, lost.failure_class) == ("job 7: NODE_FAIL", "node")
    refused = derived(record("pending", 5), [LOCAL, end(2, "config")])
    assert (refused.failure, refused.failure_class) == ("ended with exit code 2", "config")


def test_a_cell_runs_while_a_live_process_holds_its_lock(folder: Path) -> None:
    with held_by_a_process(folder) as process:
        state = state_of(folder, time.time())
        assert (state.state, state.pid, state.host) == ("running", process.pid, HERE)
        process.kill()
        process.wait()
        dead = state_of(folder, time.time() + 30)
    assert (dead.state, dead.pid) == ("interrupted", None)
    assert dead.note.startswith("exited without recording a status, last seen 3")


def test_a_process_that_starts_is_seen_before_it_has_its_lock(folder: Path) -> None:
    code = "import time; time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, "-m", "dash_exp.cell", str(folder)])
    try:
        journal.note(folder, "start", host=HERE, pid=process.pid, job=None, sweep="demo")
        assert state_of(folder, time.time()).state == "running"
        assert not runs(process.pid, "another-folder")  # its number may be another's by now
        assert not ask_to_end(process.pid, "another-folder") and process.poll() is None
        assert ask_to_end(process.pid, folder.name)
        assert process.wait(timeout=20) == -15
        assert not is_alive(process.pid) and not ask_to_end(process.pid, folder.name)
    finally:
        process.kill()
        process.wait()
    assert state_of(folder, time.time()).state == "interrupted"


def test_without_a_table_of_locks_the_recorded_process_counts(folder: Path) -> None:
    unknown = Locks({}, known=False)
    with held_by_a_process(folder) as process:
        seen = Evidence.read(folder)
        assert seen.process(unknown) == process.pid
        assert seen.process(Locks({})) is None  # by the table, nobody holds it
    assert seen.process(unknown) is None


def test_looking_never_takes_the_lock(folder: Path) -> None:
    """A cell that starts while somebody looks is not found busy."""
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            state_of(folder, time.time())

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        for _ in range(50):
            descriptor = lock(folder)
            assert Locks.now().holder(folder / ".lock") == os.getpid()
            os.close(descriptor)
    finally:
        done.set()
        watcher.join()


def test_a_cell_that_ends_while_it_is_looked_at_never_seems_dead(folder: Path) -> None:
    """Between reading "running" and asking for the lock the run may have ended properly."""
    code = (
        "import sys; from pathlib import Path; from dash_exp.record.folder import Recorder\n"
        "print('go', flush=True)\n"
        "for step in range(40):\n"
        "    with Recorder(Path(sys.argv[1])) as recorder:\n"
        "        recorder.status('running', step); recorder.status('interrupted', step, failure='SIGTERM')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], cwd=REPOSITORY, stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == b"go\n"
    looks, dead = 0, []
    while process.poll() is None:
        looks += 1
        dead += [s for s in states_of([folder], time.time()) if "exited" in s.note]
    process.stdout.close()
    assert looks > 5 and dead == []


def test_progress_is_that_of_the_last_steps(folder: Path) -> None:
    with Recorder(folder) as recorder:
        # The first 20 are slow; of the last ten, nine take 2 s and one 100 s: the median is 2.
        recorder.append("steps", steps_rows(20, seconds=50.0, reward=0.0))
        recorder.append("steps", steps_rows(9, seconds=2.0, reward=0.25, first=21))
        recorder.append("steps", [{"step": 30, "time/step_s": 100.0, "reward/mean": 0.75}])
        recorder.facts["steps"] = 50
        recorder.status("running", 30)
        state = state_of(folder, time.time())
    assert (state.state, state.step, state.steps) == ("running", 30, 50)
    assert state.step_s == 2.0
    assert state.reward == pytest.approx((4 * 0.25 + 0.75) / 5)
    assert state.eta_s == pytest.approx(20 * 2.0)
    assert state_of(folder, time.time()).eta_s is None  # nobody runs it any more


def test_steps_that_a_resumed_run_makes_anew_count_once(folder: Path) -> None:
    with Recorder(folder) as recorder:
        recorder.append("steps", steps_rows(6, reward=0.1))
        recorder.status("interrupted", 6)
    with Recorder(folder) as recorder:  # from the checkpoint at step 4
        recorder.append("steps", steps_rows(1, reward=0.9, first=5))
        rows, damage = recent_steps(folder)
        assert not damage
    assert [(r["step"], r["reward/mean"]) for r in rows] == [(1, 0.1), (2, 0.1), (3, 0.1), (4, 0.1), (5, 0.9)]


def test_planned_steps_come_from_the_run_else_from_the_config(tmp_path: Path) -> None:
    cells = [cell_of("dash", 0, 1, steps=37), cell_of("sft_h", 0, 2, steps=None, epochs=2.0)]
    manifest = sweep_of(tmp_path, cells)
    known, unknown = (manifest.cell(entry) for entry in manifest.entries)
    assert steps_of({}, known) == 37
    assert steps_of({"steps": 12}, known) == 12
    assert steps_of({}, unknown) is None
    ran(unknown, "running", 2)
    assert state_of(unknown, time.time()).eta_s is None


def test_a_budget_ends_a_run_before_its_steps_do(tmp_path: Path) -> None:
    cell = cell_of("dash", 0, 1, steps=1000)
    cell.cell.frozen["budget"] = {"seconds": 30.0, "match": None}
    manifest = sweep_of(tmp_path, [cell])
    folder = manifest.cell(manifest.entries[0])
    with Recorder(folder) as recorder:
        recorder.append("steps", steps_rows(10))
        recorder.status("running", 10)
        assert state_of(folder, time.time()).eta_s == pytest.approx(30 - 10 * 2.0)


def test_stale_marks_what_other_code_finished(folder: Path) -> None:
    ran(folder, "finished", 20, code="then")
    assert states_of([folder], time.time(), code="now")[0].stale
    assert not states_of([folder], time.time(), code="then")[0].stale
    rewrite(folder, state="failed")
    assert not states_of([folder], time.time(), code="now")[0].stale


def test_where_it_ran_is_what_was_said_last(folder: Path) -> None:
    ran(folder, "running", 3)
    rewrite(folder, host="node7", heartbeat=time.time() - 60)
    state = state_of(folder, time.time())
    assert (state.state, state.host) == ("running", "node7") and state.note == "on node7, last seen 1m00s ago"
    journal.note(folder, "start", host=HERE, pid=2**22 + 1, job=None, sweep="demo")
    state = state_of(folder, time.time())
    assert (state.state, state.host) == ("interrupted", HERE)


def test_only_the_ends_of_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    one, two = ({"step": step, "attempt": 1} for step in (1, 2))
    path.write_text(f"{json.dumps(one)}\n" * 5000 + json.dumps(two) + '\n{"step": 3, "tor')
    rows, damage = last_rows(path, 2, size=90)
    assert rows == [one, two] and "not JSON" in damage[0].what
    assert last_rows(tmp_path / "absent", 2) == ([], ())
    text = tmp_path / "output.txt"
    text.write_bytes(b"first\n\n 10 %\r 20 %\r100 %\n\x1b[31mred\x1b[0m\r\nlast \xff\n")
    assert last_lines(text, 3) == ["100 %", "red", "last \N{REPLACEMENT CHARACTER}"]
    assert last_lines(text, 0) == []


def test_a_follower_returns_complete_new_lines(tmp_path: Path) -> None:
    path = tmp_path / "output.txt"
    follower = Follower(path)
    assert follower.more() == []
    path.write_text("one\ntwo\nthr")
    assert follower.more() == ["one", "two"]
    with path.open("a") as stream:
        stream.write("ee\n")
    assert follower.more() == ["three"]
    assert follower.more() == []
