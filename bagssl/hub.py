"""Runs on the Hugging Face hub: a repository for each, in the hub's own file names.

    model.safetensors (or model.fp16.safetensors)   encoder and projector
    README.md                                       its card, see cards.py
    config.json, history.csv, metrics.json, provenance.json, evaluations/*.json       as in the store, see runs.py

What was pulled is checked as any run is, and believed by its own hashes alone.
"""

import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bagssl import records, runs
from bagssl.cards import CARD, card
from bagssl.config import PretrainConfig
from bagssl.errors import InputError, optional
from bagssl.overview import the_one
from bagssl.paths import copy_folder, runs_root
from bagssl.runs import HALF, WEIGHTS, Run

FILES = {WEIGHTS: "model.safetensors", HALF: "model.fp16.safetensors"}  # here -> there
_CLIENTS = "huggingface_hub", "httpx", "httpcore", "requests"  # whose errors are refusals; httpx2 as well
_TAKEN = ["config.json", *runs.RECORD, runs.MARK, *FILES.values(), "evaluations/*.json"]


def push(name: str, repo: str, *, private: bool = False, folder: Path | str | None = None) -> str:
    """Publish the finished run of that name or key; its address. folder: write there what would be published, instead.

    Raises InputError for a name that no one run has, a run without weights, a folder that is not empty, or what the
    hub refuses.
    """
    _check_name(repo)
    run = the_one(name)
    records.check(run)
    if not run.has_weights:
        raise InputError(f"{run.path} has no weights to publish")
    if folder is not None:
        if (target := Path(folder)).exists() and any(target.iterdir()):
            raise InputError(f"{target} is not empty: name another folder")
        _write(run, repo, target)
        return str(target)
    hub = _hub()
    with tempfile.TemporaryDirectory() as scratch:
        _write(run, repo, Path(scratch))
        with _refusals(repo):
            api = hub.HfApi()
            api.create_repo(repo, private=private or None, exist_ok=True)
            api.upload_folder(repo_id=repo, folder_path=scratch, commit_message=f"{run.path.name}, by bagssl")
            return f"{api.endpoint}/{repo}"


def pull(repo: str, revision: str | None = None) -> Run:
    """The run of a repository, in the store. Raises InputError for one that is not there, holds none, or is damaged."""
    _check_name(repo)
    hub = _hub()
    with _refusals(repo):
        there = Path(hub.snapshot_download(repo, revision=revision, allow_patterns=_TAKEN))
    if not (there / runs.MARK).exists():
        raise InputError(f"hub:{repo} holds no run of bagssl: it has no {runs.MARK}")
    content = runs.read_json(there / "config.json")
    label = PretrainConfig.from_dict(Run(there).config).label
    path = runs_root() / f"{label}-{runs.run_key(content['config'], content.get('data'))}"
    with tempfile.TemporaryDirectory() as scratch:
        found = Run(Path(scratch, path.name))
        copy_folder(there, found.path)
        for ours, theirs in FILES.items():
            if (found.path / theirs).exists():
                (found.path / theirs).rename(found.path / ours)
        if found.lost or not found.has_weights:
            raise InputError(f"hub:{repo} lacks {', '.join(found.lost) or FILES[WEIGHTS]}: push the run again")
        records.check(found)
        path.mkdir(parents=True, exist_ok=True)
        with runs.locked(Run(path)):
            if not Run(path).finished:
                records.take(found.path, path)
    return Run(path)


def _write(run: Run, repo: str, folder: Path) -> None:
    """What is published of a run."""
    copy_folder(run.path, folder, ("weights*.safetensors", *records.STAYS))
    ours = HALF if run.halved else WEIGHTS
    shutil.copyfile(run.path / ours, folder / FILES[ours])
    (folder / CARD).write_text(card(run, f"hub:{repo}"), encoding="utf-8")


def _hub() -> Any:
    return optional("huggingface_hub", "the hub needs huggingface_hub", "hub")


def _check_name(repo: str) -> None:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise InputError(f"hub:{repo} is no repository: write OWNER/NAME")


@contextlib.contextmanager
def _refusals(repo: str) -> Iterator[None]:
    """Within it what the hub refuses, or the way there, is an InputError in one line."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith(_CLIENTS):
            raise
        said = " ".join(str(error).split())[:300]
        denied = any(code in said for code in ("401", "403", "oken"))
        raise InputError(f"hub:{repo}: {said}{'; log in by `hf auth login`, or set HF_TOKEN' * denied}") from None
