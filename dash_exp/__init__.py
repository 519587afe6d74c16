"""dash_exp: which reinforcement-learning recipe works for a small language model."""

from pathlib import Path

__version__ = "0.1.0"
PACKAGE = Path(__file__).resolve().parent
