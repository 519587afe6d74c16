"""dash_exp: which reinforcement-learning recipe works for a small language model."""

import os
import signal
import sys
from pathlib import Path

__version__ = "0.2.0"
PACKAGE = Path(__file__).resolve().parent


def _exit_quietly(number: int, frame: object) -> None:
    os._exit(128 + number)


IS_COMMAND = Path(sys.argv[0] if sys.argv else "").name in ("-m", "dash-exp")
if IS_COMMAND and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _exit_quietly)  # while it is imported; then `errors.run_command` takes over
