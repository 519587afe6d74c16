"""How the host of programs is confined: by bubblewrap where it works, else by limits, with Landlock where the
kernel has it."""

from __future__ import annotations

import functools
import os
import platform
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import dash_exp
from dash_exp.verifiers.code.confine import landlock_supported

_PROBE_S = 20.0
_MOUNTS_BEGIN = "--die-with-parent"
_SYSTEM = ("/usr", "/lib", "/lib64", "/lib32", "/bin", "/etc/ld.so.cache", "/etc/localtime")
_OF_PREFIX = ("bin", "lib", "lib64", "pyvenv.cfg", "share/zoneinfo")
"""What Python needs of its own folder, which may be a project's, with data in it."""
_HOST_RIGHTS = ("CAP_SETUID", "CAP_SETGID", "CAP_KILL", "CAP_DAC_READ_SEARCH")
_FIRST_UID, _UIDS = 1_600_000_000, 2**28

Kind = Literal["bwrap", "limits"]


@dataclass(frozen=True, slots=True)
class Confinement:
    """`prefix` goes before the host's command, `arguments` after it; `warnings` say what is not covered.
    `hides`: whether programs can read no file but those that Python needs."""

    kind: Kind
    prefix: tuple[str, ...]
    arguments: tuple[str, ...]
    warnings: tuple[str, ...]
    may_change_user: bool
    hides: bool = True

    @property
    def name(self) -> str:
        """What a judge's version says of it."""
        return "limits+landlock" if self.kind == "limits" and self.hides else self.kind

    def with_scratch(self) -> Confinement:
        """The same with a temporary folder for the host's own imports; the filter that it installs after
        them refuses to write there. Mounted first: Python or this package may lie below /tmp."""
        arguments = tuple(dict.fromkeys((*self.arguments, "--read-only")))
        if not self.prefix:
            return replace(self, arguments=arguments)
        first = self.prefix.index(_MOUNTS_BEGIN) + 1
        prefix = (*self.prefix[:first], "--tmpfs", "/tmp", *self.prefix[first:])
        return replace(self, prefix=prefix, arguments=arguments)

    def worker_arguments(self) -> tuple[str, ...]:
        """For one worker: each gets its own user, so that limits per user are limits per program."""
        return (*self.arguments, f"--uid={spare_uid()}") if self.may_change_user else self.arguments


def confinement(wanted: Literal["auto", "bwrap", "limits"] = "auto") -> Confinement:
    """The best confinement that works on this machine. Raises RuntimeError where none protects the run's
    own processes from programs, or where `bwrap` was asked for by name and does not work."""
    if platform.system() != "Linux":
        raise RuntimeError("programs are judged on Linux only")
    prefix, reason = _probe() if wanted != "limits" else ((), "the fallback was asked for")
    root, machine = os.geteuid() == 0, platform.machine()
    warnings = () if machine == "x86_64" else (_NO_FILTER.format(machine),)
    if prefix:
        inside_root = root and "--unshare-user" not in prefix
        return Confinement("bwrap", prefix, ("--own-namespace",), warnings, inside_root)
    if wanted == "bwrap":
        raise RuntimeError(reason)
    if not root and warnings:
        lacking = "and there is no filter of system calls for this kind of processor"
        raise RuntimeError(f"programs would run with this user's own rights: {reason}, {lacking}")
    hides = landlock_supported()
    arguments = ("--read-only", *(("--readable", ":".join(_needed())) if hides else ()))
    warning = _NO_BUBBLEWRAP.format(reason, _READING[hides])
    return Confinement("limits", (), arguments, (warning, *warnings), root, hides)


_NO_BUBBLEWRAP = (
    "Programs run without bubblewrap ({}). They are limited in memory, time and processes, a filter of "
    "system calls keeps them from the network, from writing files and from other processes, and {}"
)
_READING = {
    True: "Landlock from reading files that Python does not need.",
    False: "nothing keeps them from reading every file that their user can, such as the dataset with its "
    "answers. Install bubblewrap, or run where user namespaces or Landlock are allowed.",
}
_NO_FILTER = (
    "No filter of system calls for {}: programs can start processes (killed with the "
    "verdict) and, without bubblewrap, use the network and write where everybody may."
)


@functools.cache
def _probe() -> tuple[tuple[str, ...], str]:
    """The first form of bubblewrap that runs this Python here, or why none does."""
    program = shutil.which("bwrap")
    if program is None:
        return (), "it is not installed"
    reason = "it does not run"
    for prefix in _forms(program):
        try:
            done = subprocess.run(
                [*prefix, sys.executable, "-I", "-c", "import ctypes, select, socket"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_PROBE_S,
                check=False,
                env={},
                cwd="/",
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            reason = f"it does not run: {error}"
            continue
        if done.returncode == 0:
            return prefix, ""
        reason = "it is forbidden here: " + (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    return (), reason


def _forms(program: str) -> list[tuple[str, ...]]:
    """As root first without a user namespace, so that programs can be other users than their host."""
    unshare = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    rights = ["--cap-drop", "ALL", *(word for right in _HOST_RIGHTS for word in ("--cap-add", right))]
    as_root = [program, *unshare, *rights, *_mounts()]
    as_user = [program, "--unshare-user", *unshare, "--cap-drop", "ALL", *_mounts()]
    forms = [as_root, as_user] if os.geteuid() == 0 else [as_user]
    return [tuple(form) for form in forms]


def _mounts() -> list[str]:
    """Its own read-only root: the system's libraries, Python, and this package."""
    words = [_MOUNTS_BEGIN]
    needed = _needed()
    for folder in _folders_above(needed):
        words += ["--dir", folder]  # open to every user; those that bubblewrap makes by itself are not
    for path in needed:
        words += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]
    words += ["--proc", "/proc", "--dev", "/dev", "--dir", "/tmp"]
    return [*words, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/"]


def _folders_above(paths: list[str]) -> list[str]:
    """Every folder above these paths that none of them contains, outer ones first."""
    above = {str(parent) for path in paths for parent in Path(path).parents} - {"/"}
    return sorted(f for f in above if not any(Path(f).is_relative_to(path) for path in paths))


def _needed() -> list[str]:
    package = Path(dash_exp.__file__).resolve().parent
    own = [str(package / name) for name in ("__init__.py", "text.py", "types.py", "verifiers")]
    libraries = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    linked = [p for p in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if os.path.isabs(p)]
    prefixes = [f"{prefix}/{name}" for prefix in (sys.base_prefix, sys.prefix) for name in _OF_PREFIX]
    python = [*prefixes, *libraries, *linked, *own]
    wanted = [*_SYSTEM, *(str(Path(p).resolve()) for p in python), *python]
    kept: list[str] = []
    for path in dict.fromkeys(wanted):
        if os.path.exists(path) and path != "/" and not _is_covered(path, kept):
            kept.append(path)
    return kept


def _is_covered(path: str, kept: list[str]) -> bool:
    """Whether one of these contains it: a folder above it, or a link above it whose target is there."""
    above = [known for known in kept if Path(path).is_relative_to(known)]
    if any(not os.path.islink(known) for known in above):
        return True
    return any(known != path for known in above) and _is_covered(str(Path(path).resolve()), kept)


def spare_uid(uid_map: str | None = None, pick: random.Random | None = None) -> int:
    """An unused user id whose successor (the examiner's) is unused too: one of many above all real ones, or,
    where this process may only use the ids of a container, one of the upper half of those. In steps of two,
    so that no worker's program is the user of another's examiner. 0 where there is none."""
    text = Path("/proc/self/uid_map").read_text() if uid_map is None else uid_map
    extents = [tuple(map(int, line.split())) for line in text.splitlines() if line.strip()]
    choose = pick or random.SystemRandom()
    if any(start <= _FIRST_UID and start + size >= _FIRST_UID + _UIDS for start, _, size in extents):
        return _FIRST_UID + 2 * choose.randrange(_UIDS // 2)
    start, _, size = max(extents, key=lambda extent: extent[2])
    return start + size // 2 + 2 * choose.randrange(size // 4) if size >= 1000 else 0
