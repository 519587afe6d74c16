"""dash_exp: which reinforcement-learning recipe works for a small language model."""

from pathlib import Path

__version__ = "0.2.0"
PACKAGE = Path(__file__).resolve().parent
