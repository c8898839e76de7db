"""The batch: executes the notebooks of notebooks/experiments.yaml, and keeps their results fresh.

An experiment in a profile is a stage, with a key over all that its results depend on (stages.py). A notebook whose
results are not fresh runs in a process of its own (kernels.py, notebook.py), in the folder of the notebooks, into a
hidden folder beside its results. Only one that ran to its end takes the place of the last good results; from all of
them follows the page (report.py). In its environment the kernel finds BAGSSL_OUTPUT, the folder to write tables/ and
figures/ into; BAGSSL_PROGRESS, a file whose text the terminal shows; and with a time limit BAGSSL_DEADLINE, the unix
time by which to raise `errors.Stopped`.
"""

import contextlib
import functools
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from filelock import Timeout

from bagssl import catalogue
from bagssl.batch.experiments import choose, load_experiments, order_of_worth
from bagssl.batch.kernels import PROCESS_KILLED, Board, Kernels, sigterm_as_ctrl_c
from bagssl.batch.notebook import error_line, failing_cell, run_cells
from bagssl.batch.stages import (
    Stage,
    hashes,
    iso_time,
    lacks,
    merge_models,
    plan,
    read_record,
    resolve,
    stage_provenance,
    state,
    write_record,
)
from bagssl.errors import DoesNotFit, InputError, Stopped, nearest
from bagssl.locks import SharedLock, SystemLock, lock_at
from bagssl.paths import RECORDED, cores, home, move_folder, runs_root, write_atomically

ENDED = "whole.json"  # in the store: which entries of the order of worth are done
OVERTIME = 60.0  # seconds past the time limit before a notebook that takes no notice of it is interrupted


@dataclass(frozen=True)
class Outcome:
    """How a stage ended. code: 0 fresh, 1 failed, 2 refused its parameters, 3 time limit, 130 interrupted."""

    code: int
    message: str


NOT_STARTED = Outcome(3, "not started, the time is up; run again to go on")


def reproduce(names: Sequence[str] = (), profile: str = "smoke", overrides: Mapping[str, Any] | None = None, *,
              jobs: int = 1, fresh: bool = False, time_limit: float | None = None, replace: bool = False,
              notebooks: Path | None = None, results: Path | None = None) -> int:  # fmt: skip
    """Bring the results of experiments up to date, and the page of all results with them.

    names: experiments, none for all that have the profile and whose data is here, or can be fetched. overrides:
    parameter -> value, or its text. jobs: notebooks side by side. fresh: run even what is fresh. time_limit: seconds.
    replace: overrides may take the place of a record with other parameters. notebooks, results: folders.
    Returns the exit code: 0 all fresh, 1 one failed, 2 one refused its parameters, 3 stopped by the time limit,
    130 by Ctrl-C. Raises InputError, before anything runs, for what is unknown, of the wrong type, or has no data.
    """
    deadline = time.monotonic() + (math.inf if time_limit is None else time_limit)  # the other clock may be set
    stages = _stages(names, profile, overrides, notebooks, results)
    if overrides and not replace and profile in RECORDED:
        spare_records(stages)
    if jobs > 1:  # share the cores out; torch would otherwise use all of them in every kernel
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // jobs)))
    works = {stage.experiment.name: functools.partial(_run_stage, stage, fresh, deadline) for stage in stages}
    codes = _run_all(works, jobs, deadline)
    _say_ends(stages, codes)
    page_written = 0 not in codes.values() or _write_page(results, profile)
    return _worst(codes.values()) or int(not page_written)


def _stages(names: Sequence[str], profile: str, overrides: Mapping[str, Any] | None, notebooks: Path | None,
            results: Path | None = None) -> list[Stage]:  # fmt: skip
    chosen = choose(load_experiments(notebooks), names, profile)
    given = {each.name: resolve(each, profile, overrides or {}) for each in chosen}  # all, before any data is fetched
    asked = (overrides or {}).get("dataset")
    lacking = {name: lack for name, each in given.items() if not names and (lack := lacks(each, asked))}
    for name, lack in lacking.items():
        print(f"{name}: left out, {lack}", flush=True)
    return [plan(each, profile, overrides, results=results) for each in chosen if each.name not in lacking]


def spare_records(stages: Sequence[Stage]) -> None:
    """Raises InputError where results are kept that other parameters gave: they may have taken days."""
    for stage in stages:
        kept = read_record(stage.folder / "provenance.json").get("parameters")
        asked = json.loads(json.dumps(stage.parameters))
        if kept is not None and kept != asked:
            differ = sorted(name for name in {*kept, *asked} if kept.get(name) != asked.get(name))
            raise InputError(f"{stage.folder} holds the record of other parameters ({', '.join(differ)}): give "
                             "--results FOLDER for yours, or --replace")  # fmt: skip


def _run_all(works: Mapping[str, Callable[..., Outcome]], jobs: int, deadline: float = math.inf) -> dict[str, int]:
    """Do works, `jobs` of them side by side, until all have ended or been stopped; the exit code of each.

    A work is called with the kernels to run its notebook in, and with what says a line under its name.
    """
    board, kernels, codes = Board(), Kernels(), {}
    with sigterm_as_ctrl_c(), ThreadPoolExecutor(jobs) as pool:
        running = {}
        for i, (name, work) in enumerate(works.items(), 1):
            say = functools.partial(board.say, title=f"[{i}/{len(works)}] {name}: ")
            running[pool.submit(work, kernels, say)] = name, say
        while running:
            try:
                for future in wait(running, timeout=0.2, return_when=FIRST_COMPLETED).done:
                    name, say = running.pop(future)
                    outcome = future.result()
                    codes[name] = outcome.code
                    say(outcome.message, error=outcome.code in (1, 2))
                board.show(kernels.now())
                if time.monotonic() > deadline + OVERTIME and kernels.live:
                    kernels.stop()
            except KeyboardInterrupt:
                board.say("stopping; what has ended stays")
                kernels.stopping = True
                kernels.stop()
            except BaseException:
                kernels.stopping = True
                kernels.stop(0)
                raise
    return codes


# ---- one stage


def _run_stage(stage: Stage, fresh: bool, deadline: float, kernels: Kernels, say: Callable) -> Outcome:
    """Run one stage, alone: what another bagssl runs, perhaps on another host, is waited for."""
    stage.folder.parent.mkdir(parents=True, exist_ok=True)
    lock, waiting = lock_at(stage.beside("lock")), False
    while not kernels.stopping:
        with contextlib.suppress(Timeout), lock.acquire(timeout=0.2):
            return _run_locked(stage, fresh, deadline, kernels, say, lock)
        if not waiting:
            say(f"another process{lock.holder} executes it: waiting for that")  # its results will then be fresh
        waiting = True
    return Outcome(130, "not started")


def _run_locked(stage: Stage, fresh: bool, deadline: float, kernels: Kernels, say: Callable,
                lock: SystemLock | SharedLock) -> Outcome:  # fmt: skip
    """Run one stage into a partial folder, and swap that in if all went well; keep it as failed if not."""
    partial, failed, old = map(stage.beside, (f"{lock.name}partial", "failed", "old"))
    if old.exists() and not stage.folder.exists():
        move_folder(old, stage.folder)  # a swap was cut short
    if not fresh and state(stage) == "fresh":
        return Outcome(0, "fresh")
    if time.monotonic() >= deadline:
        return NOT_STARTED
    for path in (*partial.parent.glob(f".{stage.folder.name}.*partial"), old):
        shutil.rmtree(path, ignore_errors=True)
    partial.mkdir()
    say("starts")
    begun, provenance, target = time.monotonic(), stage_provenance(stage), partial / f"{stage.experiment.name}.ipynb"
    environment = {"BAGSSL_OUTPUT": str(partial.resolve()), **_unix_deadline(deadline),
                   "BAGSSL_PRINT": "1" if stage.folder.parent.name in RECORDED else ""}  # fmt: skip
    error = kernels.run(stage.experiment.notebook.resolve(), target, stage.parameters, environment)
    seconds = time.monotonic() - begun
    if not lock.ours():
        shutil.rmtree(partial, ignore_errors=True)
        return Outcome(3, "was given to another process, as this one or its disk stood still; run again to see the end")
    if error:
        outcome = _outcome(error, seconds, time.monotonic() - deadline, kernels.stopping, failed / target.name)
        record = {"state": "failed" if outcome.code in (1, 2) else "stopped", "code": outcome.code,
                  "key": stage.key, "error": error}
        write_record(partial / "status.json", record)
        shutil.rmtree(failed, ignore_errors=True)
        move_folder(partial, failed)
        return outcome
    (partial / "log.txt").unlink()
    evaluations = {path.name: sorted(each.name for each in path.glob("evaluations/*.json"))
                   for path in sorted((partial / "runs").glob("*"))}  # fmt: skip
    models = merge_models(partial / "runs", stage.models)  # before the results that name them
    shutil.rmtree(partial / "runs", ignore_errors=True)
    ended = {"end": iso_time(time.time()), "seconds": round(seconds, 1)}
    write_record(partial / "provenance.json", {**provenance, **ended, "runs": models})
    record = {"state": "done", "key": stage.key, "data": stage.data, "runs": models, "evaluations": evaluations,
              "files": hashes(partial)}  # fmt: skip
    write_record(partial / "status.json", record)
    if stage.folder.exists():  # at no moment are both the old and the new results gone
        move_folder(stage.folder, old)
    move_folder(partial, stage.folder)
    for path in (old, failed):
        shutil.rmtree(path, ignore_errors=True)
    return Outcome(0, f"done in {seconds:.0f} s")


def _outcome(error: Mapping[str, Any], seconds: float, overtime: float, stopping: bool, kept: Path) -> Outcome:
    """Of a notebook that ended by `error`, `overtime` seconds past its deadline; `kept` is what there is of it."""
    # interrupted at the limit, or killed when it took no notice of that
    out_of_time = (error["ename"] == "KeyboardInterrupt" and overtime >= 0
                   or error["ename"] == PROCESS_KILLED and overtime >= OVERTIME)
    if stopping:
        return Outcome(130, "interrupted; run again to go on")
    if error["ename"] == "Stopped" or out_of_time:
        return Outcome(3, f"stopped at the time limit, {error_line(error)}; run again to go on")
    code = 2 if error["ename"] == "InputError" else 1
    return Outcome(code, f"failed after {seconds:.0f} s: {error_line(error)} (see {kept})")


def _unix_deadline(deadline: float) -> dict[str, str]:
    """$BAGSSL_DEADLINE, if there is one, by the clock that other processes share."""
    return {} if deadline == math.inf else {"BAGSSL_DEADLINE": f"{time.time() + deadline - time.monotonic():.3f}"}


# ---- the end of the batch


def _worst(codes: Collection[int]) -> int:
    return next((code for code in (130, 1, 2, 3) if code in codes), 0)


def _say_ends(stages: Sequence[Stage], codes: Mapping[str, int]) -> None:
    """Where the results are; and again, where it is seen, what failed, and where its log is."""
    done, failed = ([stage for stage in stages if codes.get(stage.experiment.name) in ends] for ends in ((0,), (1, 2)))
    print("\nThe executed notebooks, with their figures/ and tables/:" if done else "", flush=True)
    for folder in sorted(stage.folder for stage in done):
        figures, tables = (len(list(folder.glob(pattern))) for pattern in ("figures/*.png", "tables/*.md"))
        print(f"  {os.path.relpath(folder / folder.name)}.ipynb: figures {figures}, tables {tables}")
    if failed and len(stages) > 1:  # one failure has just been said
        print(f"{len(failed)} of {len(stages)} failed:", file=sys.stderr)
        for stage in failed:
            log = os.path.relpath(stage.beside("failed") / "log.txt")
            print(f"  {stage.experiment.name}: {log}", file=sys.stderr)


def _write_page(results: Path | None, profile: str) -> bool:
    """Write the page of all results and say what it decides; False, with a line, when it cannot be made."""
    from bagssl.batch.report import write_report
    from bagssl.study.claims import MISSING, ledger, subject

    try:
        page = write_report(results)
        print("The claims, on what was measured:")
        for row in ledger(page.parent, profile).itertuples():
            if row.verdict != MISSING:
                print(f"  {row.claim} {row.verdict} on {subject(row._asdict())}: {row.measure} {row.value}")
        print(f"All of it on one page: {os.path.relpath(page)}#{profile}")
    except (InputError, OSError) as error:
        print(f"bagssl: no page of all results: {error}", file=sys.stderr)
        return False
    return True


# ---- without Jupyter, and in place


def reproduce_bare(names: Sequence[str] = (), profile: str = "smoke", overrides: Mapping[str, Any] | None = None, *,
                   time_limit: float | None = None, whole: bool = False,
                   notebooks: Path | None = None) -> int:  # fmt: skip
    """Execute the cells of experiments in this process, where there is no Jupyter: a box that only trains.

    What is kept are the models and their evaluations, in the store: with its folders, `reproduce` is quick elsewhere;
    what was trained before is not trained again. Tables and figures go to results/by-hand/. whole: on a box that is
    gone at the time limit, begin nothing that cannot end in it (budget.py); without names go by the order of worth.
    What it takes is as in `reproduce`; it returns and raises the same, but that Ctrl-C raises. No page is written.
    """
    deadline = time.monotonic() + (math.inf if time_limit is None else time_limit)
    board, codes, done, before = Board(), [], {}, ()
    if whole:  # which entries ended well, by their keys: the next box need not measure again what no run keeps
        runs_root().mkdir(parents=True, exist_ok=True)
        done, before = read_record(runs_root() / ENDED), _stored()
    stages = _by_worth(profile, overrides, notebooks, board) if whole and not names else [
        (stage.experiment.name, stage) for stage in _stages(names, profile, overrides, notebooks)]
    with mock.patch.dict(os.environ, {**_unix_deadline(deadline), **({"BAGSSL_WHOLE": "1"} if whole else {})}):
        for i, (title, stage) in enumerate(stages, 1):
            say = functools.partial(board.say, title=f"[{i}/{len(stages)}] {title}: ")
            outcome = Outcome(0, "done before") if stage.key in done else _run_bare(stage, deadline, say)
            codes.append(outcome.code)
            say(outcome.message, error=outcome.code != 0)
            if whole and outcome.code == 0 and stage.key not in done:
                done[stage.key] = title
                write_record(runs_root() / ENDED, done)
    if whole:
        models, measured = (now - then for now, then in zip(_stored(), before, strict=True))
        did = f"new: models {models}, evaluations {measured}" if models or measured else "nothing new"
        board.say(f"{did}; of {len(stages)} entries {codes.count(3)} did not fit")
    return _worst(codes)


def _by_worth(profile: str, overrides: Mapping[str, Any] | None, notebooks: Path | None,
              board: Board) -> list[tuple[str, Stage]]:  # fmt: skip
    """What is to be done, the most wanted first, by titles; what has no data here is left out, and said."""
    found = []
    for experiment, part in order_of_worth(profile, notebooks):
        given = {**part, **(overrides or {})}
        title = " ".join([experiment.name, *(f"{name}={value}" for name, value in part.items())])
        parameters = resolve(experiment, profile, given)
        dataset = parameters.get("dataset")
        there = dataset is None or catalogue.available(dataset)  # a box that does part of a batch may have no network
        if lack := lacks(parameters) if there else f"{dataset} is not here":
            board.say(f"{title}: left out, {lack}")
        else:
            found.append((title, plan(experiment, profile, given)))
    return found


def _stored() -> tuple[int, int]:
    """How many finished models and evaluations are in the store."""
    from bagssl.runs import list_runs

    finished = [run for run in list_runs() if run.finished]
    return len(finished), sum(len(list(run.path.glob("evaluations/*.json"))) for run in finished)


def _run_bare(stage: Stage, deadline: float, say: Callable) -> Outcome:
    begun, notebook = time.monotonic(), stage.experiment.notebook
    if begun >= deadline:
        return NOT_STARTED
    say("starts")
    try:
        run_cells(notebook, stage.parameters)
    except DoesNotFit as stop:
        return Outcome(3, f"left: {stop}")
    except Stopped as stop:
        if stop.interrupted:
            raise
        return Outcome(3, f"stopped at the time limit: {stop}")
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the notebook's own; the other experiments may do better
        cell, line = failing_cell(error, notebook), error_line({"ename": type(error).__name__, "evalue": error})
        said = ": ".join(filter(None, ["failed", cell, line]))
        return Outcome(2 if isinstance(error, InputError) else 1, said)
    return Outcome(0, f"done in {time.monotonic() - begun:.0f} s")


def refresh_notebooks(names: Sequence[str] = (), *, notebooks: Path | None = None) -> int:
    """Execute notebooks with their own defaults and rewrite them in place, normalised.

    names: file names, none for all of the folder `notebooks`. A notebook that fails stays as it was. Returns the exit
    code: 0, 1 when one failed, 130 by Ctrl-C. Raises InputError for a name that is unknown.
    """
    folder = Path(notebooks or home() / "notebooks")
    known = sorted(path.name for path in folder.glob("*.ipynb"))
    for name in names:
        if name not in known:
            stems = [each.removesuffix(".ipynb") for each in known]
            raise InputError(f"no notebook {name!r} in {folder}; {nearest(name.removesuffix('.ipynb'), stems)}")
    works = {name: functools.partial(_refresh, folder / name) for name in names or known}
    return _worst(_run_all(works, jobs=1).values())


def _refresh(notebook: Path, kernels: Kernels, say: Callable) -> Outcome:
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / notebook.name
        error = kernels.run(notebook.resolve(), target, {}, {"BAGSSL_COMMITTED": "1"})
        if kernels.stopping:
            return Outcome(130, "interrupted, left as it was")
        if error:
            return Outcome(1, f"failed, left as it was: {error_line(error)}")
        with write_atomically(notebook) as fresh:
            shutil.copyfile(target, fresh)
    return Outcome(0, f"done in {time.monotonic() - begun:.0f} s")
