"""On the path of a Python that is started, this takes the place of a cell's process: what it is to do stands
in the cell's folder (tests/sweep/stand_in/play.py)."""

import sys

if sys.orig_argv[1:3] == ["-m", "dash_exp.cell"]:
    from tests.sweep.stand_in.play import play

    play(sys.orig_argv[3:])
