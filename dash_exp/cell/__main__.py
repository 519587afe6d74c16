"""`python -m dash_exp.cell <folder> [run.progress=... cluster.threads=...]`: run one frozen cell."""

import sys

from dash_exp.cell.run import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
