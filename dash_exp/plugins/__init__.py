"""Functions of your own: the kinds that config takes (kinds), how references to them are found and hashed
(source), and how they are called (call).

A reference is `package.module:function`. The module is looked for in the current folder, then among installed
packages; `folder/module:function` names one in another folder. A function is called with keywords and
declares only those parameters of its kind that it needs. docs/plugins.md shows one of each kind."""

from dash_exp.plugins.call import Plugin, faults, load, load_rows, to_score
from dash_exp.plugins.kinds import Advantage, DatasetLoader, Filter, Reward, Row, Surrogate, Template
from dash_exp.plugins.source import (
    ANY_REFERENCE,
    STORED,
    Reference,
    find,
    is_reference,
    module_file,
    source_hash,
    sources,
    stored,
    version,
)
from dash_exp.types import Score

__all__ = [
    "ANY_REFERENCE",
    "STORED",
    "Advantage",
    "DatasetLoader",
    "Filter",
    "Plugin",
    "Reference",
    "Reward",
    "Row",
    "Score",
    "Surrogate",
    "Template",
    "faults",
    "find",
    "is_reference",
    "load",
    "load_rows",
    "module_file",
    "source_hash",
    "sources",
    "stored",
    "to_score",
    "version",
]
