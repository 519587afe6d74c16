"""One training run: its parts built from a config, and the loop that steps, evaluates and saves."""
