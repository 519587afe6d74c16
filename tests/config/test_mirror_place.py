"""Where the mirror lies: which address wins, which are refused, and that no secret is shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from dash_exp.config.schema import TrackingConfig
from dash_exp.config.tracking import MirrorPlace, place_of, tracking_faults
from dash_exp.text import hide_credentials

SERVER = "MLFLOW_TRACKING_URI"


def tracking(uri: str | None = None, experiment: str = "dash_exp") -> TrackingConfig:
    return TrackingConfig(mlflow=True, uri=uri, experiment=experiment)


def faults(given: TrackingConfig, variable: str | None = None, installed: bool = True) -> list[str]:
    environment = {SERVER: variable} if variable else {}
    return [str(fault) for fault in tracking_faults(given, lambda package: installed, environment)]


def test_the_setting_wins_over_the_variable_and_that_over_the_outputs(tmp_path: Path) -> None:
    variable = {SERVER: "http://host:5000"}
    assert place_of(tracking("https://mine"), tmp_path, variable).uri == "https://mine"
    assert place_of(tracking(), tmp_path, variable).uri == "http://host:5000"
    assert place_of(tracking(), tmp_path, {}).uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert place_of(tracking(), tmp_path, {}).file == tmp_path / "mlflow.db"
    assert place_of(tracking("https://mine"), tmp_path, {}).file is None


def test_a_file_is_named_absolutely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert place_of(tracking("sqlite:///a/b.db"), Path("x"), {}).uri == f"sqlite:///{tmp_path}/a/b.db"
    assert (
        place_of(tracking("sqlite:////a/b.db?timeout=3"), Path("x"), {}).uri == "sqlite:////a/b.db?timeout=3"
    )
    assert place_of(tracking("sqlite:////a/b.db?timeout=3"), Path("x"), {}).file == Path("/a/b.db")


@pytest.mark.parametrize(
    ("uri", "word"),
    [
        ("./mlruns", "file store"),
        ("file:///a/mlruns", "file store"),
        ("/a/mlflow.db", "file store"),
        ("ftp://host/x", "'ftp'"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("http://me:pw@host", "holds a user, a password"),
        ("http://pw@host", "holds a user, a password"),
        ("http://me:p/w:pw@host", "holds a user, a password"),
        ("postgresql://me:x/pw@host/db", "holds a user, a password"),
        ("postgresql://host/db?sslpassword=pw", "holds a user, a password"),
        ("https://host/x?api_key=pw&a=b", "holds a user, a password"),
    ],
)
def test_addresses_that_cannot_work_are_refused(uri: str, word: str) -> None:
    (found,) = faults(tracking(uri))
    assert word in found and found.startswith("tracking.uri:") and "pw" not in found.replace("password", "")


def test_what_is_checked_before_a_start() -> None:
    assert faults(tracking()) == [] == faults(tracking("http://host:5000"))
    assert faults(tracking(), variable="postgresql+psycopg2://me:pw@host/db") == []  # not in any record
    (found,) = faults(tracking(), variable="./mlruns")
    assert found.startswith(f"{SERVER}:")
    (found,) = faults(tracking(experiment=" "))
    assert found.startswith("tracking.experiment:")
    (found,) = faults(tracking(), installed=False)
    assert "not installed" in found
    assert faults(TrackingConfig(uri="./mlruns"), installed=False) == []
    assert len(faults(tracking("ftp://me:pw@host", ""))) == 3  # all at once


def test_secrets_are_shown_nowhere() -> None:
    uri = "postgresql+psycopg2://me:p%40ss/x@host:5432/db?sslmode=require&sslpassword=geheim"
    place = MirrorPlace(uri, "e")
    assert place.shown == "postgresql+psycopg2://***@host:5432/db?sslmode=require&sslpassword=***"
    said = place.clean(f"could not reach {uri}: password 'p@ss/x' is wrong, nor is geheim")
    assert said == f"could not reach {place.shown}: password '***' is wrong, nor is ***"
    assert "geheim" not in repr(place) and "p%40" not in repr(place)
    for plain in ("http://host:5000/a@b", "sqlite:////home/me@x/a.db", "http://a:1 x@y"):
        assert hide_credentials(plain) == plain
    assert (
        MirrorPlace("http://a:b@host", "e").mark == MirrorPlace("http://a:c@host", "e").mark
    )  # the same server
