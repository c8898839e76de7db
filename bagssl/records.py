"""The record: finished runs that are committed with the results, a second place of the store.

    results/laptop/runs/cifar10-tcr-patch-based-seed0-3f2a.../    what a run holds, see runs.py; README.md is its card

Nothing is written there but by the batch: what is asked for and not in the store is copied into the store, and used
from there. `$BAGSSL_RECORD` names other folders, or, empty, none. Weights travel whole where a notebook opens the
model, else rounded to fp16; those of random networks follow from their seed, and large ones stay where they are.
"""

import contextlib
import os
import shutil
from pathlib import Path

from bagssl import runs
from bagssl.cards import CARD, card
from bagssl.errors import InputError
from bagssl.paths import LOGS, ONLINE, RECORDED, copy_folder, home, runs_root, write_atomically, write_text
from bagssl.runs import HALF, MARK, WEIGHTS, Run

LARGE = 4 * 2**20  # bytes of weights that a checkout need not carry
FOREIGN = "encoder.json"  # marks what was measured of an encoder that others trained
STAYS = (*LOGS, ONLINE, CARD, "checkpoint.pt", ".*")  # in a run's folder, wherever the run goes


def roots() -> list[Path]:
    """The folders of the record that are there: those that $BAGSSL_RECORD names, else of the results kept here."""
    named = os.environ.get("BAGSSL_RECORD")
    folders = [home() / "results" / profile / "runs" for profile in RECORDED] if named is None else (
        [Path(each).expanduser().absolute() for each in named.split(os.pathsep) if each])  # fmt: skip
    return [folder for folder in folders if folder.is_dir()]


def recorded(name: str) -> Path | None:
    """The folder of that name in the record, if it holds a finished run, or what was measured of another's encoder."""
    marked = (root / name for root in roots() if any((root / name / mark).exists() for mark in (MARK, FOREIGN)))
    return next(marked, None)


def adopt(path: Path) -> bool:
    """Copy into the store what the record has for the folder `path` there; whether it has it. Hold the run meanwhile.

    Raises InputError where the record is damaged, by the file's name: nothing is copied then.
    """
    source = recorded(path.name)
    if source is None or source.parent == path.parent:
        return False
    mark = MARK if (source / MARK).exists() else FOREIGN
    if mark == MARK:
        found = Run(source)
        if not found.finished:
            return False
        check(found)
    take(source, path, mark)
    return True


def check(run: Run) -> None:
    """Raises InputError, by the file's name, where a finished run is damaged, or bears the name of another."""
    run.check()
    if runs.run_key(run.config, runs.read_json(run.path / "config.json").get("data")) != run.key:
        raise InputError(f"{run.path / 'config.json'} is damaged: it is not that of this run")


def take(source: Path, path: Path, mark: str = MARK) -> None:
    """Copy a sound folder into the store, its mark last, so that a copy that was cut short is none."""
    copy_folder(source, path, (mark, *STAYS))
    with write_atomically(path / mark) as temporary:
        temporary.write_bytes((source / mark).read_bytes())


def only_there(root: Path | None = None) -> list[Run]:
    """The runs of the record that the store does not have."""
    have = {run.path.name for run in runs.list_runs(root)}
    found = {run.path.name: run for folder in roots() for run in runs.list_runs(folder)}
    return [run for name, run in sorted(found.items()) if name not in have]


def stored(run: Run) -> Run:
    """A run of the record in the store, where it can be measured; any other as it is."""
    if run.path.parent not in roots():
        return run
    ours = Run(runs_root() / run.path.name)
    ours.path.mkdir(parents=True, exist_ok=True)
    with runs.locked(ours):
        if not ours.finished:
            adopt(ours.path)
    return ours


def keep(path: Path, folder: Path, whole: bool) -> None:
    """Copy what a run or another's encoder at `path` has to its place in a record; `whole`: with weights in fp32."""
    copy_folder(path, folder, (WEIGHTS, HALF, *STAYS))
    if not (path / MARK).exists():
        return
    run = Run(path)
    if run.config["training"] != "untrained":
        with contextlib.suppress(FileNotFoundError):  # its weights may be elsewhere
            _keep_weights(run, folder, whole)
    write_text(folder / CARD, card(Run(folder)))  # of what is there


def _keep_weights(run: Run, folder: Path, whole: bool) -> None:
    kept = HALF if run.halved else WEIGHTS
    if (run.path / kept).stat().st_size > (LARGE // 2 if run.halved else LARGE):
        return
    if run.halved or whole:
        shutil.copyfile(run.path / kept, folder / kept)
    else:
        runs.write_half(run, folder / HALF)
