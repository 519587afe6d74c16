"""The process that judges maths answers: JSON requests on stdin, JSON verdicts on a private descriptor.

Started by the pool as `python -m dash_exp.verifiers.worker`. One request per line; the first line
sent back says `ready`, every further line is one verdict. It may be killed at any moment.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import faulthandler
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import IO, Any

from dash_exp.types import Score
from dash_exp.verifiers.types import VerifyTask, score

_PR_SET_PDEATHSIG = 1
_MAX_DETAIL_CHARS = 400

TaskJudge = Callable[[VerifyTask], Score]


def main(arguments: list[str] | None = None) -> int:
    """Serve requests until stdin ends."""
    parser = argparse.ArgumentParser(description="judge answers sent as JSON lines on stdin")
    parser.add_argument("--memory-mb", type=int, default=2048, help="limit of address space")
    parser.add_argument("--deadline-s", type=float, default=60.0, help="leave after so long a task")
    parser.add_argument("--parent", type=int, default=0, help="leave when this process is gone")
    parser.add_argument("--verifier", default="", help="a function of the user's own that judges")
    parser.add_argument("--reward", action="append", default=[], help="one whose value is added")
    options = parser.parse_args(arguments)
    channel = private_channel()
    die_with(options.parent)
    _limit_memory(options.memory_mb)
    own = (options.verifier, options.reward)
    judge = load_own(*own) if any(own) else load_judge()
    send(channel, {"ready": True})
    silence()
    for line in sys.stdin.buffer:
        # a C-level hang holds the interpreter lock: this watchdog does not need it
        faulthandler.dump_traceback_later(options.deadline_s, exit=True, file=2)
        request = json.loads(line)
        verdict, retire = _verdict(judge, VerifyTask(**request["task"]))
        faulthandler.cancel_dump_traceback_later()
        send(channel, {"serial": request["serial"], "score": asdict(verdict), "retire": retire})
    return 0


def private_channel() -> IO[bytes]:
    """Verdicts get a copy of stdout's descriptor; whatever prints to stdout goes to stderr."""
    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return channel


def silence() -> None:
    """From now on stdout and stderr go nowhere."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.close(nowhere)


def die_with(parent: int) -> None:
    """Have Linux kill this process when the pool's thread that started it ends."""
    if sys.platform != "linux" or not parent:
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)  # it was gone before the request


def _limit_memory(megabytes: int) -> None:
    limit = megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def load_judge() -> TaskJudge:
    """The judge of maths answers, warmed up: the first verdict should not pay for imports."""
    from dash_exp.verifiers.math.compare import judge_candidate, judge_math

    judge_candidate("x + \\frac{1}{2}", "\\frac{1 + 2x}{2}")
    return lambda task: judge_math(task.text, task.answer, task.how)


def load_own(verifier: str, rewards: Sequence[str]) -> TaskJudge:
    """Judges by a function of the user's own; without one the verdict has the values of rewards as parts."""
    from dash_exp import plugins  # late: not among the files that the sandbox of programs shows
    from dash_exp.errors import UserError

    asked = [plugins.load(text, "reward") for text in ([verifier] if verifier else rewards)]

    def run(task: VerifyTask) -> Score:
        given = json.loads(task.answer)
        given |= {"text": task.text, "fields": json.loads(given["fields"])}
        try:
            scores = [plugins.to_score(one(**given), one.name) for one in asked]
        except UserError as error:
            return score("verifier_error", error.faults[0].what)
        failed = [one for one in scores if one.outcome == "verifier_error"]
        if failed or verifier:
            return [*failed, *scores][0]
        parts = {one.name.replace(":", "."): made.value for one, made in zip(asked, scores, strict=True)}
        return Score(0.0, "shown", parts=parts)

    return run


def _verdict(judge: TaskJudge, task: VerifyTask) -> tuple[Score, bool]:
    """The verdict, and whether this process should not be used again."""
    try:
        return judge(task), False
    except RecursionError:
        return score("unparsed", "nested too deeply"), False
    except MemoryError:
        return score("crashed", "out of memory"), True
    except Exception as error:  # noqa: BLE001 (has to survive any fault of ours)
        return score("verifier_error", _last_line(error)), False


def _last_line(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{os.path.basename(frame.filename)}:{frame.lineno} in {frame.name}"
    message = traceback.format_exception_only(error)[-1].strip()
    return f"{message} ({place})"[:_MAX_DETAIL_CHARS]


def send(channel: IO[bytes], message: Mapping[str, Any]) -> None:
    """Write a message as one line of JSON."""
    channel.write(json.dumps(message).encode() + b"\n")
    channel.flush()


if __name__ == "__main__":
    sys.exit(main())
