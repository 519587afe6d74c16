"""Programs that try to get a reward without the answer, or to do harm; for tests only.

Each is judged by `assert f(1) == 2` and `assert f(41) == 42`. Where an attack would win something (a
secret, a file, another process), the program answers rightly only after winning, so a score says that
the attack worked. `@CANARY@` stands for a folder of the test's, `@PARENT@` for its process id.
"""

# ruff: noqa: E501 (sources of programs, one to a line)

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Literal

TESTS = "assert f(1) == 2\nassert f(41) == 42\n"
RIGHT = "def f(x):\n    return x + 1\n"


Needs = Literal["", "filter", "user", "hides", "bwrap"]


@dataclass(frozen=True, slots=True)
class Hostile:
    """`needs`: what has to be there for it to fail: `bwrap`, `hides` (Landlock; bubblewrap will do), `filter` (of
    system calls), `user` (a user of its own, which root can give; bubblewrap will do), or nothing."""

    source: str
    outcomes: tuple[str, ...] = ("wrong", "crashed")
    needs: Needs = ""


ANY = ("wrong", "crashed", "timeout", "unparsed")


def wins(attack: str, *outcomes: str, needs: Needs = "") -> Hostile:
    """Right answers once `attack` has come through without an exception."""
    return Hostile(textwrap.dedent(attack).strip() + "\n" + RIGHT, outcomes or ("wrong", "crashed"), needs)


def inside(body: str, *outcomes: str, needs: Needs = "") -> Hostile:
    """The attack when the tests call the function."""
    text = "import os, sys\ndef f(x):\n" + textwrap.indent(textwrap.dedent(body).strip(), "    ") + "\n"
    return Hostile(text, outcomes or ("wrong", "crashed"), needs)


def plain(text: str, *outcomes: str, needs: Needs = "") -> Hostile:
    return Hostile(textwrap.dedent(text), outcomes or ("wrong", "crashed"), needs)


ENDINGS = {
    "infinite loop": plain("while True: pass", "timeout"),
    "infinite loop in a call": inside("while True: pass", "timeout"),
    "sleep": plain("import time\ntime.sleep(1000)", "timeout"),
    "SystemExit": plain("raise SystemExit"),
    "sys.exit(0)": inside("sys.exit(0)"),
    "os._exit(0) while loading": plain("import os\nos._exit(0)", "crashed"),
    "os._exit(0) in a call": inside("os._exit(0)", "crashed"),
    "KeyboardInterrupt": inside("raise KeyboardInterrupt"),
    "GeneratorExit": inside("raise GeneratorExit"),
    "StopIteration": inside("raise StopIteration"),
    "AssertionError swallowed": inside("raise AssertionError"),
    "abort": inside("os.abort()", "crashed"),
    "segfault": plain("import ctypes\nctypes.string_at(0)", "crashed"),
    "faulthandler": plain("import faulthandler\nfaulthandler._sigsegv()", "crashed"),
    "signal to itself": inside("os.kill(os.getpid(), 9)", "crashed"),
    "stdin": wins("while not input(): pass"),
    "exec of true": wins("import os\nos.execv('/bin/true', ['true'])", needs="filter"),
    "no function": plain("x = 1", "wrong"),
    "nothing but a comment": plain("# f", "wrong"),
}

SPENDERS = {
    "fork bomb": plain("import os\nwhile True: os.fork()", "wrong", "timeout", "crashed"),
    "forks": wins("import os\nif os.fork() == 0:\n    import time; time.sleep(1000)", needs="filter"),
    "forks that are caught": plain(
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", "timeout", "crashed"
    ),
    "memory bomb": plain("x = bytearray(2**40)", "crashed"),
    "slow memory bomb": plain("x = []\nwhile True: x.append(bytearray(2**24))", "crashed"),
    "memory bomb in a call": inside("return [0] * 10**11", "crashed"),
    "threads": plain(
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,)).start()",
        "wrong",
        "crashed",
        "timeout",
    ),
    "thread that never ends": plain(
        "import threading\nthreading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start()"
    ),
    "recursion": inside("return f(x)", "wrong"),
    "recursion without limit": inside(
        "sys.setrecursionlimit(10**9)\nreturn f(x)", "crashed", "wrong", "timeout"
    ),
    "recursion in C": inside(
        "sys.setrecursionlimit(10**9)\ny = []\nfor _ in range(10**6): y = [y]\nreturn repr(y)", *ANY
    ),
    "regular expression": inside("import re\nre.match('(a+)+$', 'a' * 64 + 'b')", "timeout"),
    "power": inside("return 9 ** 9 ** 9", "timeout", "crashed"),
    "power at compile time": plain("x = 9 ** 9 ** 9", "timeout", "crashed"),
    "giant output": plain("while True: print('x' * 10**6)", "timeout"),
    "giant result": inside("return 'x' * 10**9", "crashed"),
    "endless iterator": inside("return iter(int, 1)", "wrong"),
    "open files": plain("import os\nfor _ in range(10**5): os.dup(1)", "wrong"),
    "pipes": plain("import os\nwhile True: os.pipe()", "wrong"),
    "shared memory": plain("import os\nwhile True: os.memfd_create('x')", "wrong"),
    "deep data": inside("y = []\nfor _ in range(10**5): y = [y]\nreturn y", "wrong", "crashed"),
    "signals ignored": plain(
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except Exception: pass\nwhile True: pass",
        "timeout",
    ),
    "catches everything": plain(
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass", "timeout"
    ),
    "alarm that raises": plain(
        "import signal\ndef g(*a): raise SystemExit(0)\nsignal.signal(14, g)\nsignal.setitimer(0, .05)\n"
        "while True: pass",
        "wrong",
    ),
    "destructor": plain("class A:\n    def __del__(self):\n        while True: pass\nA()", "timeout"),
    "at exit": plain("import atexit\natexit.register(lambda: print('ok'))\nraise SystemExit(0)", "wrong"),
}

ESCAPES = {
    "kill all": wins("import os\nos.kill(-1, 9)", needs="filter"),
    "kill the parent": wins("import os\nos.kill(os.getppid(), 9)", needs="filter"),
    "kill the test": wins("import os\nos.kill(@PARENT@, 0)", needs="filter"),
    "kill the group": wins("import os\nos.killpg(1, 9)", needs="filter"),
    "signals by the owner of a pipe": wins(
        "import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, os.getppid())", needs="filter"
    ),
    "signals by the owner, to itself": wins(
        "import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, os.getpid())", needs="filter"
    ),
    "signals by the owner, extended": wins(
        "import fcntl, os, struct\nr, w = os.pipe()\nfcntl.fcntl(r, 15, struct.pack('ii', 1, os.getppid()))",
        needs="filter",
    ),
    "another signal by the owner": wins("import fcntl, os\nfcntl.fcntl(os.pipe()[0], 10, 9)", needs="filter"),
    "signals by the owner of a socket": wins(
        "import fcntl, os, struct\nfcntl.ioctl(3, 0x8901, struct.pack('i', os.getppid()))", needs="filter"
    ),
    "signals by the group of a socket": wins(
        "import fcntl, os, struct\nfcntl.ioctl(3, 0x8902, struct.pack('i', os.getppid()))", needs="filter"
    ),
    "high halves of arguments": wins(
        "import ctypes, os\nr, w = os.pipe()\n"
        "assert ctypes.CDLL(None).syscall(72, r, ctypes.c_long(2**32 + 8), ctypes.c_long(os.getppid())) == 0",
        needs="filter",
    ),
    "a lease": wins("import fcntl, os\nfcntl.fcntl(os.open(os.__file__, 0), 1024, 0)", needs="filter"),
    "notice of changes": wins("import fcntl, os\nfcntl.fcntl(os.open('/usr', 0), 1026, 1)", needs="filter"),
    "a lock": wins("import fcntl, os\nfcntl.lockf(os.open(os.__file__, 0), fcntl.LOCK_SH)", needs="filter"),
    "calls newer than the filter": inside(
        """
        import ctypes
        call = ctypes.CDLL(None, use_errno=True).syscall
        for number in (463, 466, 467, 469, 470, 500, 1000, 0x40000000, 0x7fffffff):
            if call(number, 0, 0, 0, 0, 0, 0) != -1 or ctypes.get_errno() != 38:
                return x + 1
        return 0
        """,
        needs="filter",
    ),
    "setsid": wins("import os\nos.setsid()", needs="filter"),
    "daemon": wins(
        """
        import os, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(1000)
            os._exit(0)
        """,
        needs="filter",
    ),
    "subprocess": wins("import subprocess\nsubprocess.Popen(['sleep', '1000'])", needs="filter"),
    "os.system": inside("return x + 1 if os.system('true') == 0 else 0", needs="filter"),
    "multiprocessing": wins(
        "import multiprocessing as m\np = m.get_context('fork').Process(target=print)\np.start()",
        needs="filter",
    ),
    "ptrace": wins(
        "import ctypes, os\nassert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0", needs="filter"
    ),
    "memory of the parent": wins("import os\nopen(f'/proc/{os.getppid()}/mem', 'rb').read(1)"),
    "descriptors of the parent": wins("import os\nos.readlink(f'/proc/{os.getppid()}/fd/0')"),
    "environment of the parent": wins("import os\nassert open(f'/proc/{os.getppid()}/environ').read()"),
    "environment of the test": wins(
        "assert 'DASH_SECRET' in open('/proc/@PARENT@/environ').read()", needs="user"
    ),
    "secret in the environment": wins("import os\nos.environ['DASH_SECRET']"),
    "looks into others": wins(
        "import ctypes\nassert ctypes.CDLL(None).prctl(4, 1, 0, 0, 0) == 0", needs="filter"
    ),
    "outlives the host": wins(
        "import ctypes\nassert ctypes.CDLL(None).prctl(1, 0, 0, 0, 0) == 0", needs="filter"
    ),
    "becomes root": wins("import os\nos.setuid(0)\nos.kill(@PARENT@, 0)"),
    "more memory": wins("import resource as r\nr.setrlimit(r.RLIMIT_AS, (-1, -1))"),
    "limits of others": wins(
        "import os, resource as r\nr.prlimit(os.getppid(), r.RLIMIT_CPU, (1, 1))", needs="filter"
    ),
    "nice": wins("import os\nos.nice(-20)\nassert os.nice(0) == -20"),
    "scheduler of others": wins("import os\nos.sched_setaffinity(os.getppid(), {0})", needs="filter"),
    "new namespaces": wins(
        "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0", needs="filter"
    ),
    "mount": wins("import ctypes\nassert ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, 0) == 0"),
    "chroot": wins("import os\nos.chroot('/tmp')"),
    "32-bit calls": plain(
        "import ctypes, mmap\nm = mmap.mmap(-1, 4096, prot=7)\n"
        "m.write(b'\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3')\n"  # mov eax, 20; int 0x80; ret
        "ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))()\n" + RIGHT,
        "crashed",
        needs="filter",
    ),
    "network": wins("import socket\nsocket.create_connection(('127.0.0.1', 22), 1)", needs="filter"),
    "a server": wins("import socket\nsocket.socket().bind(('127.0.0.1', 0))", needs="filter"),
    "a socket by name": wins("import socket\nsocket.socket(socket.AF_UNIX).bind('\\0dash')", needs="filter"),
    "a letter to a listener": wins(
        "import socket\na, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)", needs="filter"
    ),
    "a letter without waiting": wins(
        "import socket as s\na, b = s.socketpair(s.AF_UNIX, s.SOCK_DGRAM | s.SOCK_CLOEXEC | s.SOCK_NONBLOCK)",
        needs="filter",
    ),
    "a packet to a listener": wins(
        "import socket\na, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)", needs="filter"
    ),
    "a message with an address": inside(
        """
        import socket
        a, b = socket.socketpair()
        for send in (lambda: a.sendto(b'x', '/tmp/no'), lambda: a.sendmsg([b'x'], [], 0, '/tmp/no')):
            try: send()
            except PermissionError: continue
            except OSError: pass
            return x + 1
        a.send(b'x')
        return 0 if b.recv(1) == b'x' else x + 1
        """,
        needs="filter",
    ),
    "names of hosts": wins("import socket\nsocket.getaddrinfo('example.org', 80)", needs="filter"),
}

FILES = {
    "write outside": wins("open('@CANARY@/new', 'w').write('x')", needs="filter"),
    "append": wins("open('@CANARY@/canary', 'a').write('x')", needs="filter"),
    "delete": wins("import os\nos.remove('@CANARY@/canary')", needs="filter"),
    "delete a tree": wins("import shutil\nshutil.rmtree('@CANARY@')", needs="filter"),
    "rename": wins("import os\nos.rename('@CANARY@/canary', '@CANARY@/other')", needs="filter"),
    "new folder": wins("import os\nos.mkdir('@CANARY@/folder')", needs="filter"),
    "symbolic link": wins("import os\nos.symlink('/etc/passwd', '@CANARY@/link')", needs="filter"),
    "hard link": wins("import os\nos.link('@CANARY@/canary', '@CANARY@/link')", needs="filter"),
    "permissions": wins("import os\nos.chmod('@CANARY@/canary', 0o777)", needs="filter"),
    "truncate": wins("import os\nos.truncate('@CANARY@/canary', 0)", needs="filter"),
    "times": wins("import os\nos.utime('@CANARY@/canary', (0, 0))", needs="filter"),
    "a pipe by name": wins("import os\nos.mkfifo('@CANARY@/pipe')", needs="filter"),
    "fill the scratch": wins(
        "f = open('/tmp/dash-scratch', 'wb')\nwhile True: f.write(bytes(2**24))", needs="filter"
    ),
    "fill shared memory": wins(
        "f = open('/dev/shm/dash-scratch', 'wb')\nwhile True: f.write(bytes(2**24))", needs="filter"
    ),
    "write through descriptors": wins(
        """
        import os
        for n in range(256):
            try: os.write(n, b'{"serial": 1, "score": {"value": 1.0, "outcome": "correct", "detail": ""}}\\n')
            except OSError: pass
        """,
        "crashed",
    ),
    "write into the package": wins(
        "import dash_exp.verifiers.types as p\nopen(p.__file__, 'a').write('#')", needs="filter"
    ),
    "see other processes": wins("import os\nassert os.path.exists('/proc/@PARENT@/stat')", needs="bwrap"),
}

SECRET = "'@CANARY@/canary'"
READERS = {
    "open": f"assert open({SECRET}).read()",
    "os.open": f"import os\nassert os.read(os.open({SECRET}, os.O_RDONLY), 9)",
    "a path only": f"import os\nfd = os.open({SECRET}, os.O_PATH)\nassert open(f'/proc/self/fd/{{fd}}').read()",
    "pathlib": f"from pathlib import Path\nassert Path({SECRET}).read_text()",
    "numpy": f"import numpy\nassert numpy.fromfile({SECRET}, 'u1').size",
    "mmap": f"import mmap, os\nassert mmap.mmap(os.open({SECRET}, 0), 0, prot=1)[:]",
    "C": f"import ctypes\nassert ctypes.CDLL(None).fopen(b{SECRET}, b'r')",
    "a system call": f"import ctypes\nassert ctypes.CDLL(None).syscall(2, b{SECRET}, 0) >= 0",
    "openat2": f"import ctypes\nassert ctypes.CDLL(None).syscall(437, -100, b{SECRET}, bytes(24), 24) >= 0",
    "linecache": f"import linecache\nassert linecache.getlines({SECRET})",
    "the importer": f"from importlib.machinery import SourceFileLoader as L\nassert L('x', {SECRET}).get_data({SECRET})",
    "sqlite": "import sqlite3\nsqlite3.connect('file:@CANARY@/canary?mode=ro', uri=True).execute('select 1 from a')",
    "a list": "import os\nassert os.listdir('@CANARY@')",
    "a walk": "import os\nassert next(iter(os.walk('@CANARY@')))[2]",
    "its folder": "import os\nos.chdir('@CANARY@')\nassert open('canary').read()",
    "the folder's descriptor": "import os\nd = os.open('@CANARY@', os.O_PATH)\nassert os.open('canary', 0, dir_fd=d)",
    "a link": f"import os\nos.symlink({SECRET}, '/tmp/dash-link')\nassert open('/tmp/dash-link').read()",
    "its own root": "assert open('/proc/self/root@CANARY@/canary').read()",
    "its thread's root": "assert open('/proc/thread-self/root@CANARY@/canary').read()",
    "the host's root": "import os\nassert open(f'/proc/{os.getppid()}/root@CANARY@/canary').read()",
    "the first process's root": "assert open('/proc/1/root@CANARY@/canary').read()",
    "the folder of the test": "import os\nassert os.listdir('/proc/@PARENT@/cwd')",
    "a file of the test's process": "import os\nassert os.listdir('/proc/@PARENT@/fd')",
    "arguments of the test's process": "assert open('/proc/@PARENT@/cmdline').read()",
    "the users": "assert open('/etc/passwd').read()",
    "a home": "import os\nassert os.listdir(os.path.expanduser('~root'))",
    "a generator of datasets": "import dash_exp.tasks.generated",
    "the configs": "import dash_exp.config.schema",
    "mounts": "import ctypes\nassert ctypes.CDLL(None).mount(b'@CANARY@', b'/usr', b'', 4096, 0) == 0",
}

PEEPERS = {
    "memory of others": """
        import os
        for pid in filter(str.isdigit, os.listdir('/proc')) if os.access('/proc', os.R_OK) else range(1, 2**15):
            if int(pid) != os.getpid():
                try: found = open(f'/proc/{pid}/mem', 'rb')
                except OSError: continue
                return x + 1
        """,
    "maps of the host": "return x + 1 if open(f'/proc/{os.getppid()}/maps').read() else 0",
    "the host's open files": "return x + 1 if os.listdir(f'/proc/{os.getppid()}/fd') else 0",
    "process_vm_readv": """
        import ctypes
        libc, data = ctypes.CDLL(None), ctypes.create_string_buffer(8)
        vector = (ctypes.c_size_t * 2)(ctypes.addressof(data), 8)
        return x + 1 if libc.process_vm_readv(os.getppid(), vector, 1, vector, 1, 0) > 0 else 0
        """,
    "any descriptor": """
        for n in (*range(3), *range(4, 4096)):
            try: data = os.read(n, 1)
            except OSError: continue
            if data: return x + 1
        return 0
        """,
    "a verdict through any descriptor": """
        import json
        for n in range(4, 4096):
            for serial in range(1, 3):
                row = {'serial': serial, 'score': {'value': 1.0, 'outcome': 'correct', 'detail': ''}, 'retire': False}
                try: os.write(n, json.dumps(row).encode() + b'\\n')
                except OSError: break
        return 0
        """,
    "the next request": """
        import socket, threading
        end = socket.socket(fileno=os.dup(3))
        end.setblocking(False)
        try: data = end.recv(2**16, socket.MSG_PEEK)
        except BlockingIOError: return 0
        return x + 1 if data else 0
        """,
    "a verdict in a frame": """
        for frame in sys._current_frames().values():
            while frame:
                if any(type(v).__name__ == 'Score' for v in [*frame.f_locals.values(), *frame.f_globals.values()]):
                    return x + 1
                frame = frame.f_back
        return 0
        """,
    "a verdict among objects": """
        import gc
        return x + 1 if any(type(o).__name__ in ('Score', 'VerifyTask', 'Examiner') for o in gc.get_objects()) else 0
        """,
    "the host's module": """
        import __main__ as m
        found = [v for v in vars(m).values() if type(v).__name__ in ('Score', 'Examiner', 'Child')]
        return x + 1 if found else 0
        """,
    "a verdict that is collected": """
        import gc
        gc.unfreeze()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        return x + 1 if any('outcome' in o for o in gc.garbage if isinstance(o, dict)) else 0
        """,
    "what the test expects, by an operator": """
        class A(int):
            def __eq__(s, o): s.seen = o; return True
            __ne__ = __lt__ = __gt__ = __rsub__ = __sub__ = lambda s, o: False
            __hash__ = int.__hash__
        return A(0)
        """,
    "what the test expects, by a trace": """
        sys.settrace(lambda *a: None)
        class A:
            def __getattribute__(s, name): return lambda *a: True
            __eq__ = __ne__ = __lt__ = lambda *a: True
            __hash__ = None
        return A()
        """,
    "a generator": "yield x + 1",
    "a coroutine": "async def g(): return x + 1\nreturn g()",
    "a future": "from concurrent.futures import Future\na = Future()\na.set_result(x + 1)\nreturn a",
    "a weak proxy": "import weakref\nclass A: __eq__ = lambda *a: True\na = f.a = A()\nreturn weakref.proxy(a)",
    "a named tuple of lies": "import collections\nclass A(collections.namedtuple('A', 'a')): __eq__ = lambda *a: True\nreturn A(1)",
    "a decimal of lies": "import decimal\nclass A(decimal.Decimal):\n    __eq__ = lambda *a: True\n    __hash__ = None\nreturn A(0)",
    "a float that is no number": "return float('nan')",
    "an enum of lies": "import enum\nclass A(enum.IntEnum):\n    B = 1\n    __eq__ = lambda *a: True\n    __hash__ = None\nreturn A.B",
    "an exception as a result": "return AssertionError()",
    "an exit at exit": "import atexit\natexit.register(os._exit, 0)\nraise SystemExit(0)",
    "a fault handler": "import faulthandler\nfaulthandler.dump_traceback_later(0.01, exit=True)\nwhile True: pass",
}

LOOKING = {
    **{f"read: {name}": wins(text, needs="hides") for name, text in READERS.items()},
    **{f"peep: {name}": inside(text, *ANY) for name, text in PEEPERS.items()},
}
"""Programs that start and change nothing: they can be judged side by side."""

_ALWAYS = "class A{base}:\n    def __eq__(s, o): return True\n    def __ne__(s, o): return False\n    __hash__ = {h}\n"

FORGERIES = {
    "print a pass": plain("print('PASSED', 'correct', 1.0)\nraise SystemExit(0)", "wrong"),
    "equal to everything": plain(_ALWAYS.format(base="", h="None") + "def f(x): return A()", "wrong"),
    "an int equal to everything": plain(
        _ALWAYS.format(base="(int)", h="int.__hash__") + "def f(x): return A(7)"
    ),
    "a str equal to everything": plain(
        _ALWAYS.format(base="(str)", h="str.__hash__") + "def f(x): return A()"
    ),
    "a list equal to everything": plain(_ALWAYS.format(base="(list)", h="None") + "def f(x): return A()"),
    "a class equal to everything": plain(
        _ALWAYS.format(base="(type)", h="type.__hash__") + "class B(metaclass=A): pass\ndef f(x): return B"
    ),
    "unittest.mock.ANY": plain("from unittest import mock\ndef f(x): return mock.ANY", "wrong"),
    "a class that lies": plain(
        _ALWAYS.format(base="", h="None")
        + "    __class__ = int\n    def __int__(s): return 2\ndef f(x): return A()"
    ),
    "reversed operand": plain(
        "class A(int):\n    def __eq__(s, o): return s is not o\ndef f(x): return A(0)"
    ),
    "an array of equal things": plain(
        "import numpy as np\n"
        + _ALWAYS.format(base="", h="None")
        + "def f(x): return np.array([A()], dtype=object)"
    ),
    "pickle that runs code": plain(
        "class A:\n    def __reduce__(s): return eval, ('2',)\ndef f(x): return A()", "wrong"
    ),
    "bytes of its own": plain(
        """
        import pickle, os, sys
        class B:
            def __reduce__(s): return os._exit, (0,)
        data = pickle.dumps(('ok', B(), None))
        def f(x):
            os.write(3, len(data).to_bytes(8, 'little') + data)
        """
    ),
    "a reply of its own": plain(
        "import os, pickle\nd = pickle.dumps(('done', 'correct'))\n"
        "def f(x): os.write(3, len(d).to_bytes(8, 'little') + d)"
    ),
    "a type that builds classes": plain(
        """
        import os, pickle
        from dash_exp.verifiers import values
        class T:
            def __reduce__(s): return values.build, ('type', 'type')
        d = pickle.dumps(('ok', T(), None))
        def f(x): os.write(3, len(d).to_bytes(8, 'little') + d)
        """
    ),
    "a comparison for a class of the reader's": plain(
        """
        import os, pickle, sys
        from dash_exp.verifiers.code.values import build
        class Handle:
            def __reduce__(s): return build, ('handle', Handle.number)
        class Kind:
            def __reduce__(s): return build, ('type', 'Fraction'), (None, {'__eq__': Handle()})
        class Value:
            def __reduce__(s): return build, ('Fraction', 1, 2)
        def f(x):
            frame = sys._getframe()
            while 'candidate' not in frame.f_locals: frame = frame.f_back
            Handle.number = frame.f_locals['candidate'].to_handle(lambda *a: True)
            channel = frame.f_locals['channel']
            d = pickle.dumps(('ok', Value(), [Kind()]))
            while True:
                os.write(3, len(d).to_bytes(8, 'little') + d)
                while channel.receive()[1] is not f: channel.send(('ok', True, None))
        """
    ),
    "half a message": plain(
        "import os, time\ndef f(x):\n    os.write(3, b'abc')\n    os._exit(0)", "crashed"
    ),
    "a message without end": plain(
        "import os, time\ndef f(x):\n    os.write(3, (2**60).to_bytes(8, 'little'))\n    time.sleep(99)",
        "crashed",
    ),
    "patched assert": plain(
        "import builtins\nbuiltins.AssertionError = type('E', (Exception,), {})\n"
        "builtins.__debug__ = False\ndef f(x): return 0",
        "wrong",
        "unparsed",
    ),
    "__debug__": plain("__debug__ = False\ndef f(x): return 0", "unparsed"),
    "patched builtins": plain(
        "import builtins\nfor n in ('compile', 'exec', 'isinstance', 'len', 'all', 'abs'):\n"
        "    setattr(builtins, n, lambda *a, **k: True)\ndef f(x): return 0"
    ),
    "patched sys": plain(
        "import sys\nsys.exit = sys.excepthook = sys.unraisablehook = lambda *a: None\ndef f(x): return 0",
        "wrong",
    ),
    "empty sys.modules": plain("import sys\nsys.modules.clear()\ndef f(x): return 0"),
    "patched judge": plain(
        """
        import dash_exp.verifiers.code.examiner as e, dash_exp.verifiers.types as p, dash_exp.verifiers.code.values as v
        from dash_exp.types import Score
        e.score = p.score = lambda *a: Score(1.0, 'correct')
        e.Examiner.examine = lambda *a: Score(1.0, 'correct')
        v.Channel.send = lambda *a: None
        def f(x): return 0
        """,
        "wrong",
        "crashed",
        "timeout",
    ),
    "patched host": plain(
        "import __main__ as m\nm._watch = m._tell = m._send = lambda *a: None\ndef f(x): return 0", "wrong"
    ),
    "patched numpy": plain(
        "import numpy\nnumpy.allclose = numpy.array_equal = lambda *a, **k: True\ndef f(x): return 0", "wrong"
    ),
    "a module for the function": plain("import types\nf = types.ModuleType('math.nope')", "wrong"),
    "a module that does things": plain("import types\nf = types.ModuleType('antigravity')", "wrong"),
    "a module that is there": plain("import math as f", "wrong"),
    "an error of imports": inside("raise ImportError('no module')", "wrong"),
    "an error of imports as a result": plain("f = ImportError", "wrong"),
    "an error of imports while loading": plain("raise ModuleNotFoundError('x', name='numpy')", "wrong"),
    "own test helpers": plain("def check(*a): pass\ndef assertion(*a): pass\ndef f(x): return 0", "wrong"),
    "trace": plain(
        "import sys\nsys.settrace(lambda *a: None)\nsys.setprofile(print)\ndef f(x): return 0", "wrong"
    ),
    "tests in a frame": inside(
        """
        frame = sys._getframe()
        while frame:
            if any('assert f' in str(v) for v in (*frame.f_locals.values(), *frame.f_globals.values())):
                return x + 1
            frame = frame.f_back
        """,
        "wrong",
        "timeout",
    ),
    "tests among objects": inside(
        """
        import gc
        for o in gc.get_objects():
            if isinstance(o, dict) and any(type(v) is str and 'assert f(41)' in v for v in list(o.values())):
                return x + 1
        """
    ),
    "tests in memory": inside(
        """
        import ctypes
        half = b'assert f'  # the whole of what is looked for never lies in this program's own memory
        for line in open('/proc/self/maps'):
            if 'rw' in line.split()[1] and ('heap' in line or len(line.split()) == 5):
                low, high = (int(n, 16) for n in line.split()[0].split('-'))
                data = ctypes.string_at(low, high - low)
                at = data.find(half)
                while at >= 0:
                    if data[at + 8 : at + 10] == b'(4' and data[at + 10 : at + 12] == b'1)':
                        return x + 1
                    at = data.find(half, at + 1)
        """,
        "wrong",
        "crashed",
        "timeout",
    ),
    "tests in the arguments": inside(
        "return x + 1 if 'assert f' in ' '.join(sys.argv) + open('/proc/self/cmdline').read() else 0"
    ),
    "tests from stdin": inside("return x + 1 if os.read(0, 10**6) else 0"),
    "name of the module": wins("assert __name__ == '__main__'", "wrong"),
}

SPELLINGS = {
    "parentheses": plain("x = " + "(" * 100_000 + ")" * 100_000, "unparsed"),
    "lists": plain("x = " + "[" * 50_000 + "]" * 50_000, "unparsed"),
    "minus": plain("x = " + "-" * 500_000 + "1", "unparsed", "crashed", "timeout"),
    "attributes": plain("x = a" + ".b" * 100_000, "unparsed", "crashed", "wrong", "timeout"),
    "indents": plain("".join(" " * i + "if 1:\n" for i in range(150)), "unparsed"),
    "NUL": plain("x = 1\0\n", "unparsed"),
    "no Python": plain("Certainly! Here is the function:", "unparsed"),
    "surrogates": plain("x = '\ud800'\n", "unparsed", "wrong"),
    "direction marks": plain("def \u202ef(x): return 2\n", "unparsed"),
    "another f": plain("def \u0192(x): return x + 1\n", "wrong"),
    "two megabytes": plain("x = 1\n" * 350_000, "wrong", "timeout", "crashed"),
    "one long line": plain("x = '" + "a" * 3_000_000 + "'\n", "wrong"),
    "bad encoding": plain("# coding: nonsense\ndef f(x): return 0\n", "unparsed", "wrong"),
    "long number": plain("x = " + "9" * 100_000, "unparsed"),
}

HOSTILE = {
    f"{kind}: {name}": hostile
    for kind, table in {
        "end": ENDINGS,
        "spend": SPENDERS,
        "escape": ESCAPES,
        "file": FILES,
        "forge": FORGERIES,
        "spell": SPELLINGS,
    }.items()
    for name, hostile in table.items()
}
