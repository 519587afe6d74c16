"""A worker that cannot start: for tests of the pool only."""

raise ImportError("no algebra today")
