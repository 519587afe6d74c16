"""Where mirrors are: from settings to a folder or an address, and the address without its secrets."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

from dash_exp.config.schema import TrackingConfig
from dash_exp.errors import Fault
from dash_exp.text import HIDDEN, SECRET_IN_URL, USER_IN_URL, hide_credentials

URI, EXPERIMENT, VARIABLE = "tracking.uri", "tracking.experiment", "MLFLOW_TRACKING_URI"
TRACKERS = {"mlflow": "MLflow", "wandb": "Weights & Biases", "tensorboard": "TensorBoard"}
"""Each is a flag in `TrackingConfig`, an option of conf/tracking/, a Python package and an extra of ours."""
DATABASE = "mlflow.db"
SERVERS = ("http", "https")
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
LONGEST_EXPERIMENT = 500


@dataclass(frozen=True, slots=True)
class MirrorPlace:
    """A tracking server, database or folder, and an experiment there. The address may hold a password: print
    `shown`, and pass messages about it through `clean`."""

    uri: str = field(repr=False)
    experiment: str
    tracker: str = "mlflow"

    @property
    def shown(self) -> str:
        return hide_credentials(self.uri)

    @property
    def file(self) -> Path | None:
        """The file of a SQLite database, else None."""
        found = re.fullmatch(r"sqlite(?:\+\w+)?:///([^?]+)(?:\?.*)?", self.uri)
        return Path(found[1]) if found else None

    @property
    def mark(self) -> str:
        """Eight hex digits that stand for this place in the name of a lock's file."""
        return hashlib.sha256(f"{self.shown}\0{self.experiment}".encode()).hexdigest()[:8]

    def clean(self, text: str) -> str:
        """A text without the address's secrets."""
        text = text.replace(self.uri, self.shown)
        for secret in sorted(secrets_of(self.uri), key=len, reverse=True):
            text = text.replace(secret, HIDDEN)
        return text


def trackers_of(tracking: TrackingConfig) -> list[str]:
    """The trackers that are switched on."""
    return [name for name in TRACKERS if getattr(tracking, name)]


def places_of(tracking: TrackingConfig, root: Path) -> list[MirrorPlace]:
    """Where each of them writes. `root`: of the outputs."""
    return [
        place_of(tracking, root)
        if name == "mlflow"
        else MirrorPlace(str(root.resolve() / name), tracking.experiment, name)
        for name in trackers_of(tracking)
    ]


def place_of(
    tracking: TrackingConfig, root: Path, environment: Mapping[str, str] = os.environ
) -> MirrorPlace:
    """`tracking.uri`, else the variable MLFLOW_TRACKING_URI, else a database below the outputs. A database's
    file is named absolutely, so that processes in other folders find it."""
    uri = tracking.uri or environment.get(VARIABLE) or f"sqlite:///{root.resolve() / DATABASE}"
    found = re.fullmatch(r"(sqlite(?:\+\w+)?:///)([^?/][^?]*)(\?.*)?", uri)
    if found:
        uri = f"{found[1]}{Path(found[2]).resolve()}{found[3] or ''}"
    return MirrorPlace(uri, tracking.experiment)


def tracking_faults(
    tracking: TrackingConfig, installed: Callable[[str], bool], environment: Mapping[str, str] = os.environ
) -> Iterator[Fault]:
    """What keeps a mirror from ever working. Does not ask whether a server answers: it may do so later."""
    for name in trackers_of(tracking):
        if not installed(name):
            what = f"tracking={name} needs the package {name}, which is not installed"
            later = "python -m dash_exp.mirror can mirror the records at any later time"
            yield Fault("tracking", what, f"pip install 'dash-exp[{name}]', or leave it out: {later}")
    if tracking.mlflow:
        yield from place_faults(tracking, environment)


def place_faults(tracking: TrackingConfig, environment: Mapping[str, str] = os.environ) -> Iterator[Fault]:
    uri, name = tracking.uri or environment.get(VARIABLE), tracking.experiment
    if uri:
        yield from _uri_faults(URI if tracking.uri else VARIABLE, uri)
    if tracking.uri and (shown := hide_credentials(tracking.uri)) != tracking.uri:
        what = f"{shown} holds a user, a password or a token, which would be written into records"
        server = "for a server MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        yield Fault(URI, what, f"set the variable {VARIABLE} instead, or {server}")
    if not name.strip() or len(name) > LONGEST_EXPERIMENT:
        yield Fault(EXPERIMENT, f"got {name[:40]!r}, must have 1 to {LONGEST_EXPERIMENT} characters")


def _uri_faults(where: str, uri: str) -> Iterator[Fault]:
    scheme, colon, rest = uri.partition("://")
    kind, shown = scheme.partition("+")[0].lower(), hide_credentials(uri)
    if not colon or kind == "file":
        hint = f"name a database (sqlite:////folder/{DATABASE}) or a server (http://host:5000)"
        yield Fault(where, f"{shown} is a folder or file: MLflow no longer supports its file store", hint)
    elif kind not in (*SERVERS, *DATABASES):
        yield Fault(where, f"{shown} begins with {scheme!r}", f"allowed: {', '.join((*SERVERS, *DATABASES))}")
    elif kind == "sqlite" and not re.match(r"/(?!:memory:)[^?]", rest):
        hint = f"write sqlite:////a/folder/{DATABASE}: three slashes, then the path"
        yield Fault(where, f"{shown} names no file, and other processes could not see it", hint)


def secrets_of(uri: str) -> set[str]:
    """Passwords, tokens and keys in an address, as written and decoded."""
    users = [m[0][:-1].partition(":") for m in USER_IN_URL.finditer(uri)]
    found = [password or (user if uri.lower().startswith(SERVERS) else "") for user, _, password in users]
    found += [m["value"] for m in SECRET_IN_URL.finditer(uri)]
    return {text for secret in found if secret for text in (secret, unquote(secret))}
