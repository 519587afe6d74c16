"""Verifiers: what a completion's reward is, decided by pure judges, run in killable processes."""

VERIFIER_VERSION = "3"
"""Raised whenever a judge could answer differently for the same text and gold answer."""

CODE_VERSION = "3"
"""The same for judges of programs and of reasoning-gym's answers."""
