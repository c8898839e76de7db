"""The batch: executes the notebooks of notebooks/experiments.yaml, and keeps their results fresh.

Each notebook runs in a process of its own, in the folder of the notebooks, into a hidden folder beside its
results. Only a notebook that ran to its end takes the place of the last good results. In its environment the
kernel finds BAGSSL_OUTPUT, the folder to write tables/ and figures/ into; BAGSSL_PROGRESS, a file whose text
the terminal shows; and with a time limit BAGSSL_DEADLINE, the unix time by which to raise `errors.Stopped`.
"""

from __future__ import annotations

import functools
import math
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from bagssl.batch.experiments import choose, load_experiments
from bagssl.batch.kernels import Board, Kernels, sigterm_as_ctrl_c
from bagssl.batch.notebook import error_line, run_cells
from bagssl.batch.stages import Stage, hashes, iso_time, plan, resolve, stage_provenance, state, write_record
from bagssl.errors import InputError, Stopped, nearest
from bagssl.paths import cores, home, write_atomically

OVERTIME = 60.0  # seconds past the time limit before a notebook that takes no notice of it is interrupted


@dataclass(frozen=True)
class Outcome:
    """How a stage ended. code: 0 fresh, 1 failed, 2 refused its parameters, 3 time limit, 130 interrupted."""

    code: int
    message: str


def reproduce(
    names: Sequence[str] = (), profile: str = "smoke", overrides: Mapping[str, Any] | None = None, *,
    jobs: int = 1, fresh: bool = False, time_limit: float | None = None,
    notebooks: Path | None = None, results: Path | None = None,
) -> int:  # fmt: skip
    """Bring the results of experiments up to date; the exit code.

    names: experiments, none for all that have the profile. overrides: parameter -> value, or its text. jobs:
    notebooks side by side. fresh: run even what is fresh. time_limit: seconds.
    0 all fresh, 1 one failed, 2 one refused its parameters, 3 stopped by the time limit, 130 by Ctrl-C.
    Raises InputError, before anything runs, for what is unknown, of the wrong type, or has no data.
    """
    deadline = None if time_limit is None else time.monotonic() + time_limit  # the other clock may be set meanwhile
    chosen = choose(load_experiments(notebooks), names, profile)
    for experiment in chosen:
        resolve(experiment, profile, overrides or {})  # all of them, before any data is fetched
    stages = [plan(experiment, profile, overrides, results=results) for experiment in chosen]
    if jobs > 1:  # share the cores out; torch would otherwise use all of them in every kernel
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // jobs)))

    board, kernels, ended = Board(), Kernels(), {}
    with sigterm_as_ctrl_c(), ThreadPoolExecutor(jobs) as pool:
        waiting = {}
        for i, stage in enumerate(stages, 1):
            say = functools.partial(_say, board, f"[{i}/{len(stages)}] {stage.experiment.name}")
            waiting[pool.submit(_run_stage, stage, fresh, deadline, kernels, say)] = stage, say
        while waiting:
            try:
                for future in wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED).done:
                    stage, say = waiting.pop(future)
                    outcome = future.result()
                    ended[stage] = outcome.code
                    say(outcome.message, error=outcome.code in (1, 2))
                board.show(kernels.now())
                if deadline is not None and time.monotonic() > deadline + OVERTIME and kernels.live:
                    kernels.stop()
            except KeyboardInterrupt:
                board.say("stopping; what has ended stays")
                kernels.stopping = True
                kernels.stop()
            except BaseException:
                kernels.stopping = True
                kernels.stop(0)
                raise
    _say_where(sorted(stage.folder for stage, code in ended.items() if code == 0))
    _say_failures([stage for stage in stages if ended.get(stage) in (1, 2)], len(stages))
    code = _worst(ended.values())
    if 0 in ended.values():
        from bagssl.batch.report import write_report

        try:
            page = write_report(results)
            _say_verdicts(page.parent, profile)
            print(f"All of it on one page: {os.path.relpath(page)}#{profile}")
        except (InputError, OSError) as error:
            print(f"bagssl: no page of all results: {error}", file=sys.stderr)
            return code or 1
    return code


def reproduce_bare(names: Sequence[str], profile: str = "smoke", overrides: Mapping[str, Any] | None = None, *,
                   time_limit: float | None = None, notebooks: Path | None = None) -> int:  # fmt: skip
    """Execute the cells of experiments in this process, where there is no Jupyter: a box that only trains; the exit code.

    What is kept are the models and their evaluations, in the store: with its folders, `reproduce` is quick elsewhere.
    Tables and figures go to results/by-hand/. Exit codes and errors as of `reproduce`, but that Ctrl-C raises; what was
    trained before is not trained again.
    """
    deadline = None if time_limit is None else time.monotonic() + time_limit
    chosen = choose(load_experiments(notebooks), names, profile)
    stages = [plan(experiment, profile, overrides) for experiment in chosen]
    codes = []
    for i, stage in enumerate(stages, 1):
        title, begun = f"[{i}/{len(stages)}] {stage.experiment.name}", time.monotonic()
        if deadline is not None:
            if begun >= deadline:
                print(f"{title}: not started, the time is up; run again to go on", file=sys.stderr)
                codes.append(3)
                continue
            os.environ["BAGSSL_DEADLINE"] = _unix(deadline)
        print(f"{title}: starts", flush=True)
        try:
            run_cells(stage.experiment.notebook, stage.parameters)
        except Stopped as stop:
            if stop.interrupted:
                raise
            print(f"{title}: stopped at the time limit: {stop}", file=sys.stderr)
            codes.append(3)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the notebook's own; the other experiments may do better
            at = next((f"{frame.filename}: " for frame in reversed(traceback.extract_tb(error.__traceback__))
                       if frame.filename.startswith(stage.experiment.notebook.name)), "")
            print(f"{title}: failed: {at}{error_line({'ename': type(error).__name__, 'evalue': error})}", file=sys.stderr)
            codes.append(2 if isinstance(error, InputError) else 1)
        else:
            print(f"{title}: done in {time.monotonic() - begun:.0f} s", flush=True)
    return _worst(codes)


def refresh_notebooks(names: Sequence[str] = (), *, notebooks: Path | None = None) -> int:
    """Execute notebooks with their own defaults and rewrite them in place, normalised; the exit code.

    names: file names, none for all. A notebook that fails stays as it was.
    """
    folder = Path(notebooks or home() / "notebooks")
    known = sorted(path.name for path in folder.glob("*.ipynb"))
    for name in names:
        if name not in known:
            stems = [each.removesuffix(".ipynb") for each in known]
            raise InputError(f"no notebook {name!r} in {folder}; {nearest(name.removesuffix('.ipynb'), stems)}")
    board, kernels, worst = Board(), Kernels(), 0
    for name in names or known:
        with tempfile.TemporaryDirectory() as temporary, sigterm_as_ctrl_c(), ThreadPoolExecutor(1) as pool:
            begun, target = time.monotonic(), Path(temporary) / name
            future = pool.submit(kernels.run, (folder / name).resolve(), target, {}, {"BAGSSL_COMMITTED": "1"})
            try:
                while not wait([future], timeout=0.2).done:
                    board.show(kernels.now())
            except KeyboardInterrupt:
                kernels.stopping = True
                kernels.stop()
                board.say(f"{name}: interrupted, left as it was")
                return 130
            if error := future.result():
                board.say(f"{name}: failed, left as it was: {error_line(error)}", error=True)
                worst = 1
            else:
                with write_atomically(folder / name) as fresh:
                    shutil.copyfile(target, fresh)
                board.say(f"{name}: done in {time.monotonic() - begun:.0f} s")
    return worst


def _run_stage(stage: Stage, fresh: bool, deadline: float | None, kernels: Kernels, say) -> Outcome:
    """Run one stage into its partial folder, and swap that in if all went well."""
    stage.folder.parent.mkdir(parents=True, exist_ok=True)
    lock, waiting = FileLock(stage.beside("lock")), False
    while not kernels.stopping:
        try:
            lock.acquire(timeout=0.2)
            break
        except Timeout:  # another bagssl runs it: wait, then take its results as fresh
            if not waiting:
                say("another process executes it: waiting for that")
            waiting = True
    try:
        if kernels.stopping:
            return Outcome(130, "not started")
        return _run_locked(stage, fresh, deadline, kernels, say)
    finally:
        lock.release()


def _run_locked(stage: Stage, fresh: bool, deadline: float | None, kernels: Kernels, say) -> Outcome:
    name, (partial, failed, old) = stage.experiment.name, map(stage.beside, ("partial", "failed", "old"))
    if old.exists() and not stage.folder.exists():
        os.replace(old, stage.folder)  # a swap was cut short
    if not fresh and state(stage) == "fresh":
        return Outcome(0, "fresh")
    if deadline is not None and time.monotonic() >= deadline:
        return Outcome(3, "not started, the time is up; run again to go on")
    for path in (partial, old):
        shutil.rmtree(path, ignore_errors=True)
    partial.mkdir()
    say("starts")
    begun, made_by = time.monotonic(), stage_provenance(stage)
    environment = {"BAGSSL_OUTPUT": str(partial.resolve())}
    if deadline is not None:
        environment["BAGSSL_DEADLINE"] = _unix(deadline)
    target = partial / f"{name}.ipynb"
    error = kernels.run(stage.experiment.notebook.resolve(), target, stage.parameters, environment)
    seconds = time.monotonic() - begun
    if not error:
        (partial / "log.txt").unlink()
        made_by |= {"end": iso_time(time.time()), "seconds": round(seconds, 1)}
        write_record(partial / "provenance.json", made_by)
        write_record(partial / "status.json", {"state": "done", "key": stage.key, "data": stage.data,
                                         "files": hashes(partial)})
        _swap(partial, stage.folder, old)
        shutil.rmtree(failed, ignore_errors=True)
        return Outcome(0, f"done in {seconds:.0f} s")

    overtime = -math.inf if deadline is None else time.monotonic() - deadline
    # interrupted at the limit, or killed when it took no notice of that
    out_of_time = error["ename"] == "KeyboardInterrupt" and overtime >= 0 or (
        error["ename"] == "DeadProcess" and overtime >= OVERTIME)
    if kernels.stopping:
        outcome = Outcome(130, "interrupted; run again to go on")
    elif error["ename"] == "Stopped" or out_of_time:
        outcome = Outcome(3, f"stopped at the time limit, {error_line(error)}; run again to go on")
    else:
        outcome = Outcome(2 if error["ename"] == "InputError" else 1,
                          f"failed after {seconds:.0f} s: {error_line(error)} (see {failed / target.name})")
    kind = "failed" if outcome.code in (1, 2) else "stopped"
    write_record(partial / "status.json", {"state": kind, "code": outcome.code, "key": stage.key, "error": error})
    shutil.rmtree(failed, ignore_errors=True)
    os.replace(partial, failed)
    return outcome


def _swap(partial: Path, folder: Path, old: Path) -> None:
    """Put `partial` in the place of `folder`; at no moment are both the old and the new results gone."""
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


def _worst(codes: Collection[int]) -> int:
    return next((code for code in (130, 1, 2, 3) if code in codes), 0)


def _unix(deadline: float) -> str:
    """A deadline of the monotonic clock for $BAGSSL_DEADLINE, which another process reads by the other clock."""
    return f"{time.time() + deadline - time.monotonic():.3f}"


def _say(board: Board, title: str, text: str, *, error: bool = False) -> None:
    board.say(f"{title}: {text}", error=error)


def _say_where(folders: Sequence[Path]) -> None:
    print("\nThe executed notebooks, with their figures/ and tables/:" if folders else "", flush=True)
    for folder in folders:
        figures, tables = (len(list(folder.glob(pattern))) for pattern in ("figures/*.png", "tables/*.md"))
        print(f"  {os.path.relpath(folder / folder.name)}.ipynb: figures {figures}, tables {tables}")


def _say_verdicts(results: Path, profile: str) -> None:
    from bagssl.study.claims import MISSING, ledger

    print("The claims, on what was measured:")
    for row in ledger(results, profile).itertuples():
        if row.verdict != MISSING:
            print(f"  {row.claim} {row.verdict} on {row.dataset}: {row.measure} {row.value}")


def _say_failures(stages: Sequence[Stage], count: int) -> None:
    """At the end again, where it is seen: what failed, and where its log is."""
    if not stages or count == 1:  # one failure has just been said
        return
    print(f"{len(stages)} of {count} failed:", file=sys.stderr)
    for stage in stages:
        print(f"  {stage.experiment.name}: {os.path.relpath(stage.beside('failed') / 'log.txt')}", file=sys.stderr)
