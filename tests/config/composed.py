"""Configs that several tests read, composed once."""

from __future__ import annotations

from functools import cache

from dash_exp.config.compose import compose
from dash_exp.config.schema import Config


@cache
def composed(*overrides: str) -> Config:
    """The config of these overrides without a data folder, composed once for all tests."""
    return compose([*overrides, "paths.data=null"])
