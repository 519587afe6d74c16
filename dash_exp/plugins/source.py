"""References to functions of the user's own, `package.module:function`: where their files lie, what these
hold, and what a cell keeps of them. Nothing here imports a module of the user's own folder."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import re
import traceback
from dataclasses import dataclass
from pathlib import Path

from dash_exp.errors import Fault, UserError, nearest
from dash_exp.text import shorten

REFERENCE = re.compile(r"(?:(.*)/)?((?:[^\W\d]\w*\.)*[^\W\d]\w*):([^\W\d]\w*)")
ANY_REFERENCE = "or a function of your own, module:function"
STORED = "plugins"
"""The folder of a cell that keeps the sources of its functions."""


@dataclass(frozen=True, slots=True)
class Reference:
    """A reference taken apart. `folder`: what holds the module's top-level package; `local`: the user's own
    folder, not one of installed packages."""

    folder: Path
    module: str
    function: str
    local: bool

    @property
    def name(self) -> str:
        return f"{self.module}:{self.function}"

    def __str__(self) -> str:
        return f"{self.folder}/{self.name}" if self.local else self.name


def is_reference(value: object) -> bool:
    """Whether a value of config names a function of the user's own, well or badly."""
    return isinstance(value, str) and ":" in value


def find(text: str, where: str = "") -> Reference:
    """What a reference names. `where`: the key that names it. Imports nothing of a local module. Raises
    UserError."""
    where = where or text
    match = REFERENCE.fullmatch(re.sub(r"\.py(?=:\w+$)", "", text))
    if match is None:
        raise UserError(Fault(where, f"got {text!r}, which is not module:function", "e.g. own_reward:score"))
    folder, module, function = Path(match[1] or ".").expanduser().resolve(), match[2], match[3]
    if module_file(folder, module):
        return Reference(folder, module, function, True)
    try:
        spec = None if match[1] else importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    except Exception as error:  # a package above it is imported, which may raise anything
        raise UserError(Fault(where, f"{text}: {raised(error)}")) from error
    if spec is None or spec.origin is None:
        place = folder.joinpath(*module.split(".")[:-1])
        near = [path.stem for path in place.glob("*.py")]
        hint = nearest(module.rpartition(".")[2], near) if near else "write folder/module:function"
        what = f"{text}: no module {module!r} in {folder}{'' if match[1] else ', and none is installed'}"
        raise UserError(Fault(where, what, hint))
    above = len(module.split(".")) - (0 if spec.submodule_search_locations is not None else 1)
    return Reference(Path(spec.origin).parents[above], module, function, False)


def module_file(folder: Path, module: str) -> Path | None:
    """The file of a module below a folder."""
    place = folder.joinpath(*module.split("."))
    return next((f for f in (place.with_suffix(".py"), place / "__init__.py") if f.is_file()), None)


@functools.cache
def sources(one: Reference) -> dict[str, bytes]:
    """The files that a function consists of, by their path below its folder, as they are when a process first
    asks: its module, and what that imports from the same folder (of an installed module: from the same
    package), directly or not."""
    found: dict[str, bytes] = {}
    pending = [one.module]
    while pending:
        parts = pending.pop().split(".")
        own = parts[0] != "dash_exp" if one.local else parts[0] == one.module.split(".")[0]
        for end in range(1, len(parts) + 1) if own else ():
            name = ".".join(parts[:end])
            file = module_file(one.folder, name)
            place = str(file.relative_to(one.folder)) if file else ""
            if file and place not in found:
                found[place] = file.read_bytes()
                package = name if file.name == "__init__.py" else name.rpartition(".")[0]
                pending += _imports(found[place], package)
    return dict(sorted(found.items()))


def _imports(source: bytes, package: str) -> list[str]:
    """Full names of all that a source imports."""
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError):
        return []  # importing it says what is wrong
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    for node in (node for node in nodes if isinstance(node, ast.ImportFrom)):
        above = package.split(".")[: 1 - node.level or None] if node.level else []
        base = ".".join(filter(None, [*above, node.module]))
        names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return [name for name in names if name]


def source_hash(one: Reference) -> str:
    """The start of a SHA-256 over the files of a function."""
    digest = hashlib.sha256()
    for place, source in sources(one).items():
        digest.update(f"{place}\0".encode() + source + b"\0")
    return digest.hexdigest()[:16]


def version(one: Reference) -> str:
    """The name of a function and the hash of its source, wherever it lies."""
    return f"{one.name}@{source_hash(one)}"


def stored(one: Reference) -> tuple[str, dict[str, bytes]]:
    """The reference that stands in a frozen config, relative to the cell's folder, and the files to be
    written there. An installed module is not copied."""
    if not one.local:
        return str(one), {}
    place = f"{STORED}/{source_hash(one)[:8]}"
    return f"{place}/{one.name}", {f"{place}/{name}": source for name, source in sources(one).items()}


def raised(error: BaseException) -> str:
    """What was raised, and where in the user's own code."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = Path(__file__).parent
    own = [f for f in frames if Path(f.filename).parent != ours and "importlib" not in f.filename]
    place = f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""
    if isinstance(error, SyntaxError) and error.filename:
        place = f" ({Path(error.filename).name}:{error.lineno})"
    return f"raised {shorten(traceback.format_exception_only(error)[-1].strip())}{place}"
