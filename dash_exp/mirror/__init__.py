"""Records mirrored to MLflow: one idempotent sync, and a process beside each run that repeats it."""
