"""dash_exp: which reinforcement-learning recipe works for a small language model."""

__version__ = "0.1.0"
