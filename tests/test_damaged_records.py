"""One damaged record is that cell's problem: every command names it and goes on with the others. Each kind of
damage is a row of DAMAGES, each command a row of COMMANDS."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from analysis.__main__ import main as report
from dash_exp.errors import UserError
from dash_exp.record import journal
from dash_exp.record import manifest as manifests
from dash_exp.record.folder import Recorder
from dash_exp.record.locks import HERE
from dash_exp.record.reading import read_record, read_rows, summary
from dash_exp.sweep import local
from dash_exp.sweep.__main__ import main as sweep
from dash_exp.text import printable
from tests.sweep.sweep_fixtures import cell_of, ran, sweep_of, write_yaml

OF_CELL = ("config.yaml", "status.json", "provenance.json", "steps.jsonl", "evals.jsonl", "launch.jsonl")
CERTAIN = ("empty", "cut in a line", "not JSON", "a list", "binary", "a folder", "a link to nothing")
"""Kinds of damage that leave nothing to go on with."""
SEEN_BY_STATUS = ("config.yaml", "status.json", "steps.jsonl", "launch.jsonl")
QUIET = ("eval_samples.jsonl", "events.jsonl", "log.txt", "output.txt")
"""Files whose damage only some commands can see."""


def text(path: Path, value: str | bytes) -> None:
    path.write_bytes(value if isinstance(value, bytes) else value.encode())


def folder_in_its_place(path: Path) -> None:
    path.unlink()
    path.mkdir()


def link_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("nothing"))


def link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def value_of_every_key(made: object) -> Callable[[Path], None]:
    """Every key has this value, nested ones too."""

    def changed(value: object) -> object:
        if isinstance(value, dict):
            return {key: changed(one) if isinstance(one, dict) else made for key, one in value.items()}
        return made

    def damage(path: Path) -> None:
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        rows = [json.dumps(changed(json.loads(line))) for line in lines]
        text(path, "\n".join(rows) + "\n")

    return damage


def first_key(name: str) -> Callable[[Path], None]:
    """Change the first quoted key of the last line that has one."""

    def damage(path: Path) -> None:
        head, quote, rest = path.read_text().rpartition('"attempt":')
        text(path, f'{head}"{name}":{rest}' if quote else f'{{"{name}": 1}}\n')

    return damage


def nan(path: Path) -> None:
    text(
        path, path.read_text().replace('"step": 3', '"step": NaN').replace('"attempt": 1', '"attempt": 1e400')
    )


DAMAGES: dict[str, Callable[[Path], None]] = {
    "empty": lambda p: text(p, ""),
    "cut in a line": lambda p: text(p, p.read_bytes()[: len(p.read_bytes()) * 5 // 8]),
    "not JSON": lambda p: text(p, "not json\n"),
    "a list": lambda p: text(p, "[1, 2]\n"),
    "a number": lambda p: text(p, "7\n"),
    "null": lambda p: text(p, "null\n"),
    "a text": lambda p: text(p, '"text"\n'),
    "an empty object": lambda p: text(p, "{}\n"),
    "a missing key": first_key("other"),
    "NaN and infinity": nan,
    "every value a text": value_of_every_key("\x1b[31mred"),
    "every value a list": value_of_every_key([1]),
    "every value null": value_of_every_key(None),
    "every value negative": value_of_every_key(-1),
    "every value huge": value_of_every_key(10**400),
    "an integer of 5,000 digits": lambda p: text(p, '{"step": ' + "9" * 5000 + "}\n"),
    "a key twice": lambda p: text(p, '{"state": "failed", "state": "finished", "step": 1, "step": 2}\n'),
    "binary": lambda p: text(p, bytes(range(256)) * 3),
    "NUL bytes": lambda p: text(p, b"\0" * len(p.read_bytes())),
    "not UTF-8": lambda p: text(p, p.read_bytes().replace(b'"', b'"\xff', 3)),
    "a lone surrogate": lambda p: text(p, p.read_text().replace(': "', ': "\\ud800', 2)),
    "nested too deeply": lambda p: text(p, "[" * 5_000),
    "a folder": folder_in_its_place,
    "a link to nothing": link_to_nothing,
    "a link to itself": link_to_itself,
}
YAML = {
    "not YAML": "seed: [",
    "aliases that multiply": "a: &a [1]\nb: &b [*a, *a]\nseed: *b\n",
    "a Python object": "seed: !!python/object/apply:os.system [true]\n",
    "a date": "seed: 2001-99-99\n",
    "a key twice": "seed: 0\nseed: 1\n",
    "an integer of 5,000 digits": f"seed: {'9' * 5000}\n",
}


NO_DAMAGE = {("steps.jsonl", "empty"), ("launch.jsonl", "empty"), ("status.json", "a missing key")}
"""What looks like a run that has not begun. Lone surrogates are replaced."""
FILES = (*OF_CELL, *QUIET)


def finished_cell(folder: Path) -> None:
    journal.note(folder, "start", host=HERE, pid=1, job=None, sweep="demo")
    ran(folder, "finished", 3)
    with Recorder(folder) as recorder:
        recorder.append("evals", [{"step": 3, "dataset": "d", "metric": "accuracy", "value": 0.5, "n": 2}])
        row = {"step": 3, "dataset": "d", "prompt": "p", "scores": [1.0], "outcomes": ["correct"]}
        recorder.append("eval_samples", [row])
        recorder.event("sample", 1.0, 2.0, step=3, worker="w", group=0)
    (folder / "output.txt").write_text("printed\n")
    journal.note_end(folder, 0, None)


@dataclass(frozen=True)
class Damaged:
    """Outputs whose cells have each one damage: of one file, in one way. The last cell is intact."""

    root: Path
    what: dict[str, tuple[str, str]]

    @staticmethod
    def make(root: Path, wanted: Sequence[tuple[str, str]]) -> Damaged:
        cells = [cell_of("dash", seed, seed) for seed in range(len(wanted) + 1)]
        manifest = sweep_of(root, cells[:1])
        template = manifest.cell(manifest.entries[0])
        finished_cell(template)
        for cell in cells[1:]:
            folder = cell.cell.folder(root)
            shutil.copytree(template, folder)
            text(folder / "config.yaml", yaml.safe_dump(cell.cell.frozen, sort_keys=False))
        value = json.loads((manifest.folder / "manifest.json").read_text())
        rows = [manifests.cell_row(cell) for cell in cells]
        text(manifest.folder / "manifest.json", json.dumps({**value, "cells": rows}))
        manifest = manifests.read(manifest.folder)
        what = {}
        for (name, kind), entry in zip(wanted, manifest.entries, strict=False):
            made = {**DAMAGES, **YAML}[kind]
            path = manifest.cell(entry) / name
            before = path.read_bytes()
            with suppress(ValueError):  # a kind of damage for JSON only
                made(path) if callable(made) else text(path, made)
            if not path.is_file() or path.read_bytes() != before:
                what[entry.folder] = (name, kind)
        return Damaged(root, what)


ALL = [(name, kind) for name in FILES for kind in DAMAGES] + [("config.yaml", kind) for kind in YAML]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Damaged:
    """Damages of the files that decide what a command does."""
    names = (*SEEN_BY_STATUS, "provenance.json")
    wanted = [(name, kind) for name, kind in ALL if name in names]
    made = Damaged.make(tmp_path_factory.mktemp("damaged") / "outputs", wanted)
    write_yaml(made.root, algorithm=["dash"])
    return made


@pytest.fixture(scope="module")
def damaged_in_every_way(tmp_path_factory: pytest.TempPathFactory) -> Damaged:
    return Damaged.make(tmp_path_factory.mktemp("damaged") / "outputs", ALL)


def ran_command(arguments: Sequence[str]) -> tuple[int, str]:
    command = report if arguments[0] in ("report", "live") else sweep
    words = arguments[1:] if arguments[0] == "report" else arguments
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = command(words)
    return code, out.getvalue() + err.getvalue()


COMMANDS = {
    "status": "status demo run.dir={}",
    "status --json": "status demo run.dir={} --json",
    "list": "list run.dir={}",
    "logs": "logs demo run.dir={}",
    "plan": "plan {}/tried.yaml run.dir={}",
    "plan of what was launched": "plan {}/sweeps/demo",
    "live": "live {} --once",
    "report": "report {} --check --out {}/none",
    "cancel": "cancel demo run.dir={}",
}
SLOW = ("live", "report")


@pytest.mark.parametrize("label", [one for one in COMMANDS if one not in SLOW])
def test_damaged_cells_take_no_command_down(damaged: Damaged, label: str) -> None:
    code, printed = ran_command(COMMANDS[label].replace("{}", str(damaged.root)).split())
    assert code in (0, 1) and "\x1b" not in printed, printed
    if label == "status --json":
        cells = {Path(one["folder"]).name: one for one in json.loads(printed)["cells"]}
        unseen = {what for name, what in damaged.what.items() if what[0] not in cells[name]["damage"]}
        assert {
            what for what in unseen if what[0] in SEEN_BY_STATUS and "surrogate" not in what[1]
        } == NO_DAMAGE
        assert list(cells.values())[-1]["damage"] == ""


@pytest.mark.long
@pytest.mark.parametrize("label", [one for one in COMMANDS if one not in ("plan", "cancel")])
def test_no_damage_takes_a_command_down(damaged_in_every_way: Damaged, label: str) -> None:
    code, printed = ran_command(COMMANDS[label].replace("{}", str(damaged_in_every_way.root)).split())
    assert code in (0, 1) and "\x1b" not in printed, printed


OF_SWEEP = {
    "manifest.json": None,
    "controller.json": {"pid": 1, "host": HERE, "started": 1.0},
    "race.json": {
        "started": 1.0,
        "pid": 1,
        "metric": "accuracy",
        "rungs": [],
        "halve": False,
        "budget_hours": None,
        "spent_hours": 1.0,
        "state": "ended",
        "lines": ["dash against grpo: open"],
        "found": [],
    },
}


def test_damaged_files_of_a_sweep_hide_no_other_sweep(tmp_path: Path) -> None:
    """Each sweep has one damage. A damaged manifest is named, and only its own `status` exits with 2."""
    root = tmp_path / "outputs"
    intact = sweep_of(root, [cell_of("dash", 0, 1)], name="intact")
    damaged = {}
    for name, facts in OF_SWEEP.items():
        for number, (kind, damage) in enumerate(DAMAGES.items()):
            folder = root / "sweeps" / f"{Path(name).stem}-{number}"
            shutil.copytree(intact.folder, folder)
            path = folder / name
            if facts is not None:
                text(path, json.dumps(facts))
            before = path.read_bytes()
            damage(path)
            if not path.is_file() or path.read_bytes() != before:
                damaged[folder] = (name, kind)
    for command in ("status", "list"):
        code, printed = ran_command([command, f"run.dir={root}"])
        assert code == (2 if command == "list" else 0) and "intact" in printed and "\x1b" not in printed
    for folder, (name, kind) in damaged.items():
        code, printed = ran_command(["status", str(folder)])
        refused = name == "manifest.json" and "is damaged" in printed and name in printed
        assert code == 0 or (code == 2 and refused), (name, kind, printed)
    assert ran_command(["cancel", "intact", f"run.dir={root}"])[0] == 0


def test_cells_beside_damaged_ones_start_again(damaged: Damaged, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    monkeypatch.setattr(local, "detach", lambda manifest, n_jobs, cells, log: started.extend(cells))
    code, printed = ran_command(["retry", "demo", f"run.dir={damaged.root}"])
    assert code == 0 and len(started) > 10, printed
    assert {damaged.what[name][0] for name in started} >= {"status.json"}


def test_a_rerun_repairs_a_damaged_cell_or_names_what_to_do(damaged: Damaged) -> None:
    """A damaged config, status or provenance is refused and stays as it is; rows are left out and named."""
    wrong = []
    for folder_name, (name, kind) in damaged.what.items():
        folder = damaged.root / "cells" / folder_name
        before = (folder / name).read_bytes() if (folder / name).is_file() else None
        try:
            with Recorder(folder) as recorder:
                recorder.event("sample", 1.0, 2.0)
                recorder.append("steps", [{"step": 4}])
                journal.note(folder, "start", host=HERE, pid=1)
                if recorder.attempt < 1:
                    wrong.append(f"{name}, {kind}: attempt {recorder.attempt}")
            if name in ("config.yaml", "status.json", "provenance.json") and kind in CERTAIN:
                wrong.append(f"{name}, {kind}: not refused")
            if before and not (folder / name).read_bytes().startswith(before):
                wrong.append(f"{name}, {kind}: what was there is gone")
        except UserError as error:
            after = (folder / name).read_bytes() if (folder / name).is_file() else None
            if after != before or name not in str(error) or "run.force=true" not in str(error):
                wrong.append(f"{name}, {kind}: {error}")
        if name == "status.json" and kind in CERTAIN and journal.set_state(folder, "cancelled"):
            wrong.append(f"{name}, {kind}: a damaged status was replaced")
    assert wrong == []


def test_the_next_attempt_is_counted_from_what_is_left(damaged: Damaged) -> None:
    folder = damaged.root / "cells" / [*damaged.what][-1]
    folder = next(p for p in sorted(folder.parent.iterdir()) if p.name not in damaged.what)
    with Recorder(folder) as recorder:
        recorder.append("steps", [{"step": 4}])
        attempt = recorder.attempt
    (folder / "status.json").unlink()
    (folder / "provenance.json").unlink()
    with Recorder(folder) as recorder:
        assert recorder.attempt == attempt + 1


@pytest.mark.parametrize(
    ("name", "line", "what"),
    [
        ("steps.jsonl", '{"step": -1, "attempt": 1}', "line 1 has step=-1, not an integer from 0"),
        ("steps.jsonl", '{"step": 1, "attempt": 1, "reward/mean": "high"}', "not a finite number"),
        ("steps.jsonl", '{"step": 1, "attempt": 1, "reward/mean": NaN}', "has reward/mean=NaN"),
        ("steps.jsonl", '{"attempt": 1, "attempt": 2}', 'line 1 has the key "attempt" twice'),
        ("launch.jsonl", '{"kind": "end"}', "launch.jsonl line 1 has no time"),
        ("status.json", '{"state": "done"}', 'has state="done", not one of pending'),
        ("status.json", '{\n"state": "running",\n', "status.json line 3 is not JSON"),
        ("manifest.json", '{"name": "../x"}', 'has name="../x", not the name of a folder'),
        ("provenance.json", "", "provenance.json is empty"),
    ],
)
def test_what_is_damaged_is_named(tmp_path: Path, name: str, line: str, what: str) -> None:
    path = tmp_path / name
    path.write_text(line)
    read = read_rows(path) if path.suffix == ".jsonl" else read_record(path)
    assert what in summary(read.damage)


def test_printable_text_has_no_control_characters() -> None:
    hostile = "a\x1b[2Jb\x1b]0;title\x07c\x9b31md\x1b]8;;http://x\x1b\\\\e\x00f\u202eg\u2066h\x1b(0i\ud800"
    assert printable(hostile.replace("\\\\", "\\")) == "abcdefghi\ufffd"
    assert printable("tab\tand\nnewline, Ünïcödé 模型") == "tab\tand\nnewline, Ünïcödé 模型"
