"""Found by Hydra: the launcher of `python -m dash_exp -m`."""
