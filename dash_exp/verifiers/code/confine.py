"""The rights that a process gives up before it runs an untrusted program. Linux only.

Landlock (without bubblewrap), resource limits, another user, no new privileges, and a filter of system calls
under which it cannot start a process, signal another one (nor have the kernel do so, as the owner of a file),
open a socket, change another process or leave its process group. Without bubblewrap the filter also refuses
to open files for writing.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import signal
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_KEEPCAPS = 1, 4, 8
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 36, 38
_CAP_DAC_READ_SEARCH = 2
_CAPABILITY_VERSION_3 = 0x20080522
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
"""System calls, of the same numbers on every kind of processor."""
_LANDLOCK_FILE_RIGHTS, _LANDLOCK_READ, _LANDLOCK_LIST = 2**13 - 1, 1 << 2, 1 << 3
"""All rights that the first version knows: to execute, write, read, list, and make or remove entries."""
_OPEN_FILES = 128
_THREADS = 64

_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one program may use. `uid`: the user it becomes, 0 for no change. `read_only`: whether
    the filter itself refuses to write. `filtered`: whether there is a filter at all. `threads`: tasks
    that its user may have. `readable`: the only paths it may read, besides its own in /proc; none: no such
    limit. `keep_reading`: the new user may read every file, as root may, because
    it could not read Python's library otherwise; it gets no other right of root."""

    memory_mb: int
    uid: int
    read_only: bool
    filtered: bool
    threads: int = _THREADS
    keep_reading: bool = False
    readable: tuple[str, ...] = ()


def filter_supported() -> bool:
    """Whether the numbers of system calls are known here: 64-bit Linux on x86."""
    return platform.system() == "Linux" and platform.machine() == "x86_64" and struct.calcsize("P") == 8


def adopt_orphans() -> None:
    """Become the parent of orphans among the descendants, so that they can be reaped."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def hide() -> None:
    """Keep other processes of this user from reading or writing this one's memory."""
    _prctl(_PR_SET_DUMPABLE, 0)


def confine(limits: Limits) -> None:
    """Apply everything, irrevocably. Raises OSError where something that was promised fails."""
    _set_limits(limits)
    if limits.readable:  # before the change of user, who may not find them all
        _read_only_below((*limits.readable, f"/proc/{os.getpid()}"))
    if limits.uid:
        _become(limits.uid, limits.keep_reading)
    os.umask(0o077)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # after the change of user, which clears it
    hide()  # the change of user undoes it
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if limits.filtered:
        _install(_own_filter(os.getpid()))


def filter_host(read_only: bool) -> None:
    """Install the part of the filter that the host can live with. Every child inherits it and adds only
    its own part in `confine`: building a filter costs a third of a fork."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _install(_common_filter(read_only))


def landlock_supported() -> bool:
    """Whether the kernel restricts which files a process may open (Linux 5.13 and later, where enabled)."""
    return bool(_LIBC.syscall(_LANDLOCK_CREATE, None, 0, 1) > 0)


def _read_only_below(paths: Sequence[str]) -> None:
    """From now on this process reads these files and folders, and what is below them; it opens, lists, makes
    and changes nothing else. Raises OSError."""
    ruleset = _called(_LANDLOCK_CREATE, struct.pack("Q", _LANDLOCK_FILE_RIGHTS), 8, 0)
    for path in paths:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        allowed = _LANDLOCK_READ | (_LANDLOCK_LIST if os.path.isdir(path) else 0)
        _called(_LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", allowed, descriptor), 0)
        os.close(descriptor)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _called(_LANDLOCK_RESTRICT, ruleset, 0)
    os.close(ruleset)


def _called(number: int, *arguments: Any) -> int:
    result = int(_LIBC.syscall(number, *arguments))
    _check(min(result, 0))
    return result


def limit_cpu(seconds: int) -> None:
    """A last resort behind the timer of the waiting process; it can only be lowered again."""
    _limit(resource.RLIMIT_CPU, seconds)


def _set_limits(limits: Limits) -> None:
    _limit(resource.RLIMIT_AS, limits.memory_mb * 2**20)
    _limit(resource.RLIMIT_NPROC, limits.threads)
    _limit(resource.RLIMIT_NOFILE, _OPEN_FILES)
    for nothing in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE, resource.RLIMIT_MSGQUEUE):
        _limit(nothing, 0)


def _limit(which: int, value: int) -> None:
    _, hard = resource.getrlimit(which)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, value))


def _become(uid: int, keep_reading: bool) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    if keep_reading:
        _prctl(_PR_SET_KEEPCAPS, 1)
    os.setresuid(uid, uid, uid)
    _set_capabilities(1 << _CAP_DAC_READ_SEARCH if keep_reading else 0)


def can_read_library(uid: int) -> bool:
    """Whether that user can read Python's own library: not so for one below root's home. Raises
    OSError where this process cannot become that user."""
    child = os.fork()
    if child == 0:
        code = 2
        try:
            _become(uid, keep_reading=False)
            code = 0 if os.access(os.__file__, os.R_OK) else 1
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, 1):
        raise PermissionError(errno.EPERM, f"cannot become user {uid}")
    return code == 0


def _set_capabilities(mask: int) -> None:
    header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
    data = struct.pack("6I", mask, mask, 0, 0, 0, 0)
    _check(_LIBC.capset(header, data))


def _prctl(option: int, value: int) -> None:
    _check(_LIBC.prctl(option, ctypes.c_ulong(value), 0, 0, 0))


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


# The filter: a program for the kernel's packet-filter machine, see seccomp(2). Numbers are x86-64's.


def _numbers(table: str) -> tuple[int, ...]:
    return tuple(int(number) for line in table.splitlines() for number in line.partition("#")[0].split())


_STARTS = (57, 58)  # fork vfork
_DENIED = _numbers("""
59 322 # execve execveat
200 129 297 424 434 438 # tkill rt_sigqueueinfo rt_tgsigqueueinfo pidfd_*
109 112 # setpgid setsid
101 310 311 312 141 142 144 203 251 256 279 314 440 448 300 301
# ptrace process_vm_* kcmp sched_* process_madvise process_mrelease fanotify_*
41 42 49 50 43 288 # socket connect bind listen accept accept4
29 64 68 240 319 447 # shmget semget msgget mq_open memfd_create memfd_secret
155 161 165 166 272 308 428 429 430 431 432 433 442 # mounts, chroot, unshare, setns
103 153 159 163 164 167 168 169 170 171 172 173 175 176 179 212 227 246 248 249 250 298 303 304 305
313 320 321 323 425 426 427 # clocks, modules, keys, kexec, bpf, perf, io_uring, ...
""")
_UNKNOWN = (435, 437, 463, 466, 467, 469)
"""clone3 openat2 setxattrat removexattrat open_tree_attr file_setattr: their flags cannot be seen, or
older calls do the same; libc falls back to those."""
_NEWEST = 469
"""Calls with a higher number were not there when this list was made: they do not exist for programs."""
_WRITES = _numbers("""
73 76 82 83 84 85 86 87 88 90 91 92 93 94 132 133 188 189 190 197 198 199 235 258 259 260 261 263
264 265 266 268 280 316 452
""")
"""Calls that change, make or lock files and folders."""
_CLONE, _CLONE_THREAD = 56, 0x10000
_KILL, _TGKILL, _PRCTL, _PRLIMIT, _OPEN, _OPENAT = 62, 234, 157, 302, 2, 257
_FCNTL, _IOCTL, _SOCKETPAIR, _SENDTO, _SENDS_MESSAGES = 72, 16, 53, 44, (46, 307)
_FCNTLS = (*range(6), 9, 11, 16, 1030, 1031, 1032, 1033, 1034)
"""Duplicates, flags, and what only asks: no owner (8, 15), signal (10), lock, lease or notice of changes."""
_IOCTLS = (0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""Questions about terminals, FIONREAD, FIONBIO, FIOCLEX and FIONCLEX: no owner (0x8901, 0x8902) either."""
_AF_UNIX, _SOCK_STREAM, _SOCKET_TYPE = 1, 1, 0xF
_WRITING_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

_ARCH_X86_64 = 0xC000003E
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _MASK, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
_ALLOW, _KILL_PROCESS, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16

_Line = tuple[int, int, int, int]


_REFUSE: _Line = (_RETURN, 0, 0, _ERRNO | errno.EPERM)
_NO_SUCH_CALL: _Line = (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)
_PASS: _Line = (_RETURN, 0, 0, _ALLOW)
_HEAD: tuple[_Line, ...] = (
    (_LOAD, 0, 0, _ARCH),
    (_EQUAL, 1, 0, _ARCH_X86_64),
    (_RETURN, 0, 0, _KILL_PROCESS),  # 32-bit calls have other numbers
    (_LOAD, 0, 0, _NUMBER),
    (_AT_LEAST, 0, 1, _NEWEST + 1),  # those of the x32 interface are among them
    _NO_SUCH_CALL,
)
"""Each line is (code, lines to skip if true, if false, value)."""


def _common_filter(read_only: bool) -> list[_Line]:
    lines = list(_HEAD)
    for number in (*_DENIED, *(_WRITES if read_only else ())):
        lines += [(_EQUAL, 0, 1, number), _REFUSE]
    for number in _UNKNOWN:
        lines += [(_EQUAL, 0, 1, number), _NO_SUCH_CALL]
    lines += _only(_PRLIMIT, 0, [(_EQUAL, 1, 0, 0), _REFUSE])  # 0: the caller itself
    lines += _only(_FCNTL, 1, _one_of(_FCNTLS))
    lines += _only(_IOCTL, 1, _one_of(_IOCTLS))
    of_type = [_argument(1), (_MASK, 0, 0, _SOCKET_TYPE), *_one_of((_SOCK_STREAM,))]
    lines += _only(_SOCKETPAIR, 0, [*_one_of((_AF_UNIX,)), *of_type])  # others reach listeners by name
    lines += _only(_SENDTO, 4, [*_one_of((0,)), (_LOAD, 0, 0, _ARGUMENTS + 8 * 4 + 4), *_one_of((0,))])
    if read_only:
        for number, argument in ((_OPEN, 1), (_OPENAT, 2)):
            lines += _only(number, argument, [(_ANY_BIT, 0, 1, _WRITING_FLAGS), _REFUSE])
    return [*lines, _PASS]


def _own_filter(pid: int) -> list[_Line]:
    """No new process, no signal to another process than `pid`, no way to outlive the host."""
    lines = list(_HEAD)
    for number in (*_STARTS, *_SENDS_MESSAGES):  # the host passes descriptors with the latter
        lines += [(_EQUAL, 0, 1, number), _REFUSE]
    lines += _only(_CLONE, 0, [(_ANY_BIT, 1, 0, _CLONE_THREAD), _REFUSE])
    for number in (_KILL, _TGKILL):
        lines += _only(number, 0, [(_EQUAL, 1, 0, pid), _REFUSE])
    lines += _only(_PRCTL, 0, [(_EQUAL, 1, 0, _PR_SET_PDEATHSIG), (_EQUAL, 0, 1, _PR_SET_DUMPABLE), _REFUSE])
    return [*lines, _PASS]


def _only(number: int, argument: int, test: list[_Line]) -> list[_Line]:
    """For this call only: load an argument's low half, run `test`, which falls through or refuses."""
    body = [_argument(argument), *test, _PASS]
    return [(_EQUAL, 0, len(body), number), *body]


def _argument(position: int) -> _Line:
    """Load an argument's low half."""
    return (_LOAD, 0, 0, _ARGUMENTS + 8 * position)


def _one_of(values: Sequence[int]) -> list[_Line]:
    """Refuse unless what is loaded is one of `values`."""
    return [*((_EQUAL, len(values) - i, 0, value) for i, value in enumerate(values)), _REFUSE]


def _install(lines: list[_Line]) -> None:
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
    header = struct.pack("HxxxxxxP", len(lines), ctypes.addressof(code))
    _check(_LIBC.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, header, 0, 0))
