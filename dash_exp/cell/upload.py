"""Uploads the last checkpoint of a finished cell to the hub, with a model card, in one commit."""

from __future__ import annotations

import re
from pathlib import Path

from dash_exp.config.schema import PUSH_TO, Config
from dash_exp.errors import Fault, UserError
from dash_exp.record.card import model_card
from dash_exp.record.folder import read_final, read_json, write_json
from dash_exp.text import format_command, format_path

UPLOADED = "upload.json"
"""In a cell's folder: where it was uploaded to."""
LONGEST_NAME = 96
"""Characters of a repository's name, without its owner."""


def repository_of(target: str, cell: str) -> str:
    """The repository that `checkpoint.push_to` names: `owner/name`, or for an owner alone the cell's name as
    the hub allows it, with its id."""
    if "/" in target:
        return target
    name, _, number = cell.rpartition("-")
    allowed = re.sub(r"(?:[^A-Za-z0-9._]|\.\.+)+", "-", name)
    return f"{target}/{allowed[: LONGEST_NAME - len(number) - 1].strip('-.')}-{number}"


def upload(folder: Path, config: Config) -> str:
    """Upload the weights, once for each repository, which is made private where it is new. Returns what to
    tell the user. Raises UserError where it fails; the record stays complete."""
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HTTPError  # of whichever HTTP client the installed version uses
    from huggingface_hub.utils import disable_progress_bars

    assert config.checkpoint.push_to is not None
    repository = repository_of(config.checkpoint.push_to, folder.name)
    known = read_json(folder / UPLOADED)
    if known.get("repository") == repository:
        return f"It was uploaded before: {known['url']}"
    weights = _checkpoint(folder)
    facts, status = read_json(folder / "provenance.json"), read_json(folder / "status.json")
    card = model_card(folder.name, config, facts, read_final(folder, "evals"), status)
    files = [file for file in sorted(weights.iterdir()) if file.is_file() and file.name != "checksums.json"]
    added = [CommitOperationAdd(file.name, file) for file in files]
    added.append(CommitOperationAdd("README.md", card.encode()))
    disable_progress_bars()
    try:
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        commit = api.create_commit(repository, added, commit_message=f"{folder.name}, {weights.name}")
    except (HTTPError, OSError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        again = format_command("dash_exp.cell", format_path(folder), f"{PUSH_TO}={config.checkpoint.push_to}")
        fault = Fault(PUSH_TO, f"{repository} could not be uploaded: {reason}", f"again: {again}")
        raise UserError(fault, "the run is finished, and its weights are kept") from error
    write_json(
        folder / UPLOADED, {"repository": repository, "url": commit.repo_url.url, "commit": commit.oid}
    )
    return f"Uploaded {weights.name} and its model card: {commit.repo_url.url}"


def _checkpoint(folder: Path) -> Path:
    """The newest checkpoint. Raises UserError where there is none, or it is damaged."""
    from dash_exp.record.checkpoint import damage, existing

    found = existing(folder)[:1]
    reason = damage(found[0]) if found else "it has no checkpoint"
    if reason:
        what = f"{format_path(folder)} cannot be uploaded: {reason}"
        raise UserError(Fault(PUSH_TO, what, "run it again with run.force=true"), "the record is unchanged")
    return found[0]
