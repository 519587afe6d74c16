"""A rank of the learner, started by rank 0 as `python -m dash_exp.learning.distributed`.

Reads one line of JSON (rank, size, port, timeout_s) and serves rank 0. Ends with its standard input.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback

from dash_exp.signals import keep_freed_memory


def main() -> int:
    given = json.loads(sys.stdin.readline())
    threading.Thread(target=end_with_parent, daemon=True).start()
    keep_freed_memory()
    from dash_exp.learning.distributed.ranks import serve_child

    try:
        return serve_child(**given)
    except Exception:  # noqa: BLE001  told here, in the log; rank 0 has the gist of it
        traceback.print_exc()
        return 1


def end_with_parent() -> None:
    """Whoever started this holds the other end of standard input: when it is gone, so is this process."""
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # not by way of destructors that wait for other ranks
