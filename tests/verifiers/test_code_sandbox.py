"""How the host is confined: what is tried, what is said, and which users are spare."""

from __future__ import annotations

import json
import os
import platform
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from code_fixtures import skip_without

import dash_exp
from dash_exp.config.checks import check
from dash_exp.config.compose import compose
from dash_exp.config.schema import changed
from dash_exp.verifiers.code import sandbox
from dash_exp.verifiers.code.confine import filter_supported, landlock_supported
from dash_exp.verifiers.code.sandbox import Confinement, confinement, spare_uid
from dash_exp.verifiers.judges import code_judge
from dash_exp.verifiers.pool import Program, VerifierPool
from dash_exp.verifiers.types import CodeGold, VerifyTask


@pytest.fixture
def fresh_probe() -> object:
    sandbox._probe.cache_clear()
    yield
    sandbox._probe.cache_clear()


@pytest.mark.usefixtures("fresh_probe")
def test_without_bubblewrap_there_is_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    found = confinement()
    assert (found.kind, found.prefix) == ("limits", ())
    assert len([text for text in found.warnings if "not installed" in text]) == 1
    with pytest.raises(RuntimeError, match="not installed"):
        confinement("bwrap")


@pytest.mark.usefixtures("fresh_probe")
def test_a_bubblewrap_that_is_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sandbox, "_forms", lambda program: [("sh", "-c", "echo no new namespaces >&2; exit 1")]
    )
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: "/bin/sh")
    found = confinement()
    assert found.kind == "limits"
    assert "forbidden here: no new namespaces" in found.warnings[0]


def test_programs_that_can_read_the_data_are_not_rewarded(monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose(["dataset=functions", "model=tiny"])
    rows: list[tuple[str, dict[str, object], list[str]]] = [
        ("bwrap", {}, []),
        ("limits+landlock", {}, []),
        ("limits", {}, ["algorithm"]),
        ("limits", {"verifier.sandbox": "limits"}, []),
        ("limits", {"algorithm.source": "solutions", "algorithm.group_size": 1}, []),
        ("limits", {"dataset.kind": "arithmetic", "dataset.verifier": "integer"}, []),
        ("limits+landlock", {"verifier.sandbox": "bwrap"}, ["verifier.sandbox"]),
        ("bwrap", {"verifier.sandbox": "bwrap"}, []),
        ("limits", {"verifier.sandbox": "none"}, ["verifier.sandbox"]),
    ]
    for best, changes, wanted in rows:
        found: object = (("bwrap",), "") if best == "bwrap" else ((), "it is not installed")
        monkeypatch.setattr(sandbox, "_probe", lambda found=found: found)
        monkeypatch.setattr(sandbox, "landlock_supported", lambda best=best: "landlock" in best)
        assert confinement().name == best
        faults = [fault.where for fault in check(changed(config, changes))]
        assert [where for where in faults if where in ("algorithm", "verifier.sandbox")] == wanted, changes


def test_a_processor_without_a_filter_gets_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    monkeypatch.setattr(sandbox.os, "geteuid", lambda: 0)
    assert any("No filter of system calls for riscv64" in text for text in confinement("limits").warnings)
    monkeypatch.setattr(sandbox.os, "geteuid", lambda: 1000)
    with pytest.raises(RuntimeError, match="this user's own rights"):
        confinement("limits")
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    with pytest.raises(RuntimeError, match="Linux only"):
        confinement()


@pytest.mark.parametrize(
    ("uid_map", "low", "high"),
    [
        ("         0          0 4294967295\n", 1_600_000_000, 1_600_000_000 + 2**28),
        ("0 100000 65536\n", 32_768, 65_536),  # a container's users
        ("0 1000 1\n1 100000 65536\n", 32_769, 65_537),
        ("0 100000 1000\n", 500, 1_000),
        ("0 100000 1001\n", 500, 1_001),
        ("0 100000 1003\n", 501, 1_003),
    ],
)
def test_spare_users(uid_map: str, low: int, high: int) -> None:
    """Of those that can be drawn, each and the next one (the examiner's) is in the map, and no two are
    neighbours, so that no worker's program is the user of another's examiner."""
    pick = random.Random(0)
    drawn = {spare_uid(uid_map, pick) for _ in range(5_000)}
    assert low <= min(drawn)
    assert max(drawn) + 1 < high
    assert len({uid % 2 for uid in drawn}) == 1


def test_there_may_be_no_spare_user() -> None:
    assert spare_uid("1000 1000 1\n") == spare_uid("0 1000 1\n1 5000 999\n") == 0


def test_a_scratch_folder_hides_nothing_that_lies_below_it() -> None:
    """Python, or a checkout, may lie below /tmp: what is mounted there comes after the scratch folder."""
    plain = Confinement(
        "bwrap", ("bwrap", "--die-with-parent", "--ro-bind", "/tmp/x", "/tmp/x"), (), (), False
    )
    assert plain.with_scratch().prefix == (
        "bwrap",
        "--die-with-parent",
        "--tmpfs",
        "/tmp",
        "--ro-bind",
        "/tmp/x",
        "/tmp/x",
    )
    fallback = Confinement("limits", (), ("--read-only",), (), False)
    assert fallback.with_scratch() == fallback


def test_data_beside_an_environment_are_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment may be the project's own folder, or the package lie in a checkout with data."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "data.jsonl").write_text("{}")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setenv("LD_LIBRARY_PATH", ".:")
    shown = [Path(path) for path in sandbox._needed()]
    assert tmp_path / "lib" in shown
    package = Path(dash_exp.__file__).parent
    hidden = (tmp_path / "data.jsonl", package / "tasks" / "generated.py", Path.cwd() / "x")
    assert not [path for path in shown for one in hidden if one.is_relative_to(path)]


def test_an_environment_may_be_a_link(tmp_path: Path) -> None:
    """An environment that is a link to another folder, as some tools make them."""
    skip_without("bwrap")
    (tmp_path / "venv").symlink_to(sys.prefix)
    code = "from dash_exp.verifiers.code.sandbox import confinement; print(confinement('bwrap').kind)"
    done = subprocess.run(
        [tmp_path / "venv" / "bin" / "python", "-c", code],
        cwd=Path(dash_exp.__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "bwrap\n", done.stderr


def test_the_sandbox_shows_little() -> None:
    skip_without("bwrap")
    words = [*confinement("bwrap").prefix, sys.executable, "-I", "-c", "import os; print(*os.listdir('/'))"]
    seen = subprocess.run(words, env={}, capture_output=True, text=True, check=True).stdout.split()
    assert not {"home", "mnt", "srv", "var", "run", "sys", "boot", "opt"} & set(seen)


def test_a_sandbox_that_cannot_start_is_our_fault() -> None:
    broken = Confinement("bwrap", ("sh", "-c", "echo out of namespaces >&2; exit 1"), (), (), False)
    host = Program("dash_exp.verifiers.code.host", sandbox=broken)
    with VerifierPool(1, 5.0, 512, max_starts=1, program=host) as pool:
        verdict = pool.submit(VerifyTask("def f(): 0", CodeGold("f()").to_text())).result(60)
    assert verdict.outcome == "verifier_error"
    assert "out of namespaces" in verdict.detail


def test_a_confinement_that_fails_is_our_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    if not landlock_supported():
        pytest.skip("no Landlock here")
    monkeypatch.setattr(sandbox, "_needed", lambda: ["/no/such/path"])
    verifier = code_judge(1, 10.0, 512, "limits")
    verdict = verifier.submit("def f(): 0", CodeGold("f()", "f").to_text()).result(60)
    verifier.close()
    assert verdict.outcome == "verifier_error"
    assert (
        "programs cannot be confined: [Errno 2] No such file or directory: '/no/such/path'" in verdict.detail
    )


def test_no_secret_reaches_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "x")
    program = "import os\ndef f(): return sorted(os.environ)"
    verifier = code_judge(1, 10.0, 1024)
    gold = CodeGold("raise ValueError(f())", "f").to_text()
    detail = verifier.submit(program, gold).result(60).detail
    verifier.close()
    assert "PYTHONHASHSEED" in detail
    assert "A_TOKEN" not in detail
    assert "HOME" not in detail.replace("PYTHONHOME", "")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give each program a user of its own")
def test_each_program_is_a_user_of_its_own() -> None:
    for wanted in ("bwrap", "limits"):
        skip_without(wanted)
        verifier = code_judge(1, 10.0, 1024, wanted)
        gold = CodeGold("assert f()[0] != 0 and f()[1] == ''", "f").to_text()
        program = (
            "import os\ndef f():\n    status = open('/proc/self/status').read()\n"
            "    return os.getuid(), ''.join(c for c in status.split('CapEff:')[1][:18] if c in '89abcdef')"
        )
        verdict = verifier.submit(program, gold).result(60)
        verifier.close()
        assert verdict.outcome == "correct", verdict


def python_of_another_user() -> list[str]:
    """A command that runs Python with this package as a user who is not root; skips where none does."""
    setpriv = shutil.which("setpriv")
    if os.geteuid() != 0 or setpriv is None:
        pytest.skip("only root, with setpriv, can become another user")
    root = str(Path(dash_exp.__file__).resolve().parents[1])
    become = [setpriv, "--reuid=65534", "--regid=65534", "--clear-groups", "env", "-i", f"PYTHONPATH={root}"]
    check = "import sys; assert sys.version_info >= (3, 11); import dash_exp.verifiers.judges"
    for python in (sys.executable, "/usr/bin/python3"):
        words = [*become, "PATH=/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE=1", python]
        if subprocess.run([*words, "-c", check], cwd="/", capture_output=True, check=False).returncode == 0:
            return words
    pytest.skip("no Python here that another user can run this package with")


@pytest.mark.parametrize("wanted", ["limits", "bwrap"])
def test_a_program_cannot_have_the_kernel_signal_its_own_user(wanted: str) -> None:
    """Where the run is not root's, the program is the same user: only the filter keeps it from the run."""
    if not filter_supported():
        pytest.skip("not promised without a filter of system calls")
    script = Path(__file__).with_name("ordinary_user.py").read_text()
    words = [*python_of_another_user(), "-c", script, wanted]
    done = subprocess.run(words, cwd="/", capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    if "skipped" in said:
        pytest.skip(said["skipped"])
    assert said["user"] == 65534
    assert said["right"] == "correct"
    assert said["victim"] is None, "the program killed a process of its user"
    assert [v["outcome"] for v in said["attacks"]] == ["wrong"] * len(said["attacks"]), said["attacks"]
    assert all("PermissionError" in v["detail"] for v in said["attacks"]), said["attacks"]
