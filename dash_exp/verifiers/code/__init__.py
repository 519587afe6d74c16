"""Judges programs by tests, in sandboxed processes."""
