"""The capacity model: predicts the time of a step on more devices or other settings from measured curves."""
