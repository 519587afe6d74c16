"""Sampling: one protocol, several engines. A sampler yields groups as they complete."""
