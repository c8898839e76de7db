"""Experiments on a cluster by submitit: each model a job of its own, then each notebook one, on one shared store.

Which models there are, and what they take, the notebooks say themselves (cost.py, rehearsal.py); one that several
experiments share is one job, so no job waits for the lock of another's model. A notebook's job begins when those of its
models have ended well: on Slurm by a dependency, so that nobody need stay logged in; on this machine (`local`) the call
stays, shows what runs, and gives each job a GPU of its own where there are any. A job stops itself, with a checkpoint,
before its time limit, and asks submitit to put it back into the queue; one that is preempted goes on from the last
minute's.
"""

import contextlib
import functools
import math
import os
import signal
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from bagssl import catalogue, data, pretraining
from bagssl.batch import cost
from bagssl.batch.experiments import choose, load_experiments
from bagssl.batch.kernels import Board, places
from bagssl.batch.rehearsal import PUBLISHED
from bagssl.batch.reproduce import spare_records
from bagssl.batch.stages import lacks, resolve, settings, state
from bagssl.batch.stages import plan as plan_stage
from bagssl.config import PretrainConfig
from bagssl.data import Images
from bagssl.errors import InputError, Stopped, check_choice, optional
from bagssl.paths import cores, results_root

KINDS = ("slurm", "local")
PARTS = ("models", "experiments")  # of a file of options: what holds for one kind of jobs alone
USUAL = {"timeout_min": 240, "nodes": 1, "tasks_per_node": 1, "stderr_to_stdout": True}
STOPPED = 3  # the exit code
WARNED = {"slurm": 90, "local": 30}  # seconds before its limit at which submitit warns a job, which then ends
MARGIN = 60.0  # seconds before that at which a job stops itself
REQUEUED = 100  # times that a job may reach its limit


@dataclass(frozen=True)
class Training:
    """The call of a job that trains one model, on `count` images of its dataset; by several tasks on a GPU each, as
    torchrun's processes would.
    """

    config: dict[str, Any]
    count: int
    fingerprint: str
    places: dict[str, str]
    limit: float = math.inf  # seconds

    def __call__(self) -> str:
        submitit = _submitit()
        os.environ.update(self.places | _own_progress())
        if submitit.JobEnvironment().num_tasks > 1:
            submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        config = PretrainConfig.from_dict(self.config)
        try:
            images = _images(config.dataset, self.count, self.fingerprint)
            return str(pretraining.pretrain(config, images, time_limit=self.limit).path)
        except Stopped as stop:
            if stop.interrupted:
                raise
            return _later(str(stop))

    def checkpoint(self) -> Any:
        """What submitit asks for at the time limit: the same call once more."""
        return _again(self)


def _images(dataset: str, count: int, fingerprint: str) -> Images | None:
    """The images that a model is trained on, if they are the training split or what `data.subset` takes of it."""
    images = data.load(dataset, "train")
    if len(images) != count:
        images = data.subset(images, count)
    return images if images.fingerprint == fingerprint else None


@dataclass(frozen=True)
class Execution:
    """The call of a job that executes the notebook of one experiment, whose models are there."""

    name: str
    profile: str
    overrides: dict[str, Any]
    places: dict[str, str]
    options: dict[str, Any] = field(default_factory=dict)  # more of `reproduce`
    limit: float = math.inf  # seconds

    def __call__(self) -> str:
        from bagssl.batch.reproduce import reproduce

        os.environ.update(self.places)
        code = reproduce([self.name], self.profile, self.overrides, time_limit=self.limit, **self.options)
        if code == STOPPED:
            return _later(f"{self.name} stopped")
        if code:
            raise RuntimeError(f"{self.name} ended with code {code}")
        return self.name

    def checkpoint(self) -> Any:
        """As of `Training`."""
        return _again(self)


def _later(said: str) -> str:
    """Leave this job as at its limit, so that submitit puts it back into the queue."""
    print(said, flush=True)
    again = signal.getsignal(signal.SIGUSR2)  # submitit's, of a limit that is near
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])  # that of the limit itself would kill what is leaving
    again(signal.SIGUSR2, None)  # leaves, in the first task
    signal.pause()  # the others are ended with that one
    return said


def _again(call: Training | Execution) -> Any:
    return _submitit().helpers.DelayedSubmission(call)


def _own_progress() -> dict[str, str]:
    """Where this job tells how far it is: beside its log."""
    return {"BAGSSL_PROGRESS": str(_submitit().JobEnvironment().paths.stdout.with_suffix(".progress"))}


@dataclass
class Job:
    """A job before it is submitted. needs: jobs that must have ended well; rows: what it does, with prices."""

    name: str
    call: Training | Execution
    needs: tuple[str, ...] = ()
    rows: list[cost.Row] = field(default_factory=list)

    @property
    def part(self) -> str:
        return PARTS[isinstance(self.call, Execution)]


@dataclass
class Plan:
    """What would be submitted: jobs, models first; parameters of submitit for each part of them; notes to print."""

    kind: str
    jobs: list[Job]
    parameters: dict[str, dict[str, Any]]
    gpus: int  # of this machine, for `local`
    notes: list[str]

    @property
    def lacks(self) -> bool:
        """Whether an experiment cannot be submitted, as its data is not here."""
        return any(note.startswith("missing: ") for note in self.notes)


def prepare(names: Sequence[str], profile: str, overrides: Mapping[str, Any], kind: str, options: Path | None = None, *,
            dry_run: bool = False, notebooks: Path | None = None, **execution: bool) -> Plan:
    """What experiments need, as jobs.

    names, profile, overrides as of `reproduce`, and execution are options of it. kind: of `KINDS`. options: a YAML file
    of submitit's parameters, for all jobs or under `models:` and `experiments:`. Raises InputError for what is wrong,
    and for data that is not here; with dry_run a note says that.
    """
    check_choice("cluster", kind, KINDS)
    _submitit()
    given, gpus = _options(options), _gpus() if kind == "local" else 0
    usual = USUAL | ({"gpus_per_node": 1} if kind == "slurm" or gpus else {})
    parameters = {part: usual | given[part] for part in PARTS}
    jobs, notes = _planned(names, profile, dict(overrides), kind == "slurm" or bool(gpus), execution, notebooks,
                           dry_run)  # fmt: skip
    return Plan(kind, jobs, parameters, gpus, notes)


def submit(plan: Plan, side_by_side: int = 1) -> int:
    """Submit the jobs of a plan; on `local` run them, without GPUs so many side by side. The exit code."""
    if not plan.jobs:
        print("nothing to submit: all models and results are there")
        return 0
    folder = results_root() / "cluster"
    folder.mkdir(parents=True, exist_ok=True)
    executors = {part: _executor(plan.kind, folder, plan.parameters[part]) for part in PARTS}
    for job in plan.jobs:
        job.call = replace(job.call, limit=_limit(plan.kind, plan.parameters[job.part]))
    print(*plan.notes, f"logs: {os.path.relpath(folder)}", sep="\n", flush=True)
    if plan.kind == "slurm":
        return _to_slurm(plan.jobs, executors)
    each = max(1, plan.parameters["models"].get("gpus_per_node", 1))
    return _here(plan.jobs, executors, max(1, plan.gpus // each) if plan.gpus else side_by_side, plan.gpus)


# ---- what is to be done


def _planned(names: Sequence[str], profile: str, overrides: dict[str, Any], gpus: bool, execution: dict[str, bool],
             notebooks: Path | None, dry_run: bool) -> tuple[list[Job], list[str]]:
    """The jobs, models first; and lines on what is missing, and where hours come from."""
    images = functools.lru_cache(1)(_images)  # the models of an experiment share them: read and hashed once
    models: dict[str, Job] = {}
    last: list[Job] = []
    notes: dict[str, None] = {}  # in their order, each once
    for experiment in choose(load_experiments(notebooks), names, profile):
        every = settings(experiment, resolve(experiment, profile, overrides))
        dataset = every.get("dataset")
        if not names and (lack := lacks(every, dataset if dry_run else overrides.get("dataset"))):
            notes[f"{experiment.name}: left out, {lack}"] = None
            continue
        try:
            there = dataset is None or catalogue.available(dataset)
            stage = plan_stage(experiment, profile, overrides, fetch=there or not dry_run)
            if overrides and not execution.get("replace"):
                spare_records([stage])
            if state(stage) == "fresh" and not execution.get("fresh"):
                notes[f"{experiment.name}: fresh"] = None
                continue
            found = cost.cost(experiment.name, profile, overrides, gpus=1 if gpus else None, notebooks=notebooks)
        except InputError as error:
            if not dry_run:
                raise
            notes[f"missing: {experiment.name}: {error}"] = None
            continue
        needs = []
        for row in found.rows:
            config, work = row.work.config, row.work
            if config is not None and work.crops and (
                    found.absent or images(config.dataset, work.count, work.fingerprint) is not None):  # fmt: skip
                call = Training(config.to_dict(), work.count, work.fingerprint, places())
                models[work.model] = Job(work.model, call, rows=[row])
                needs.append(work.model)
        rest = [row for row in found.rows if row.work.model not in needs or row.work.kind != "training"]
        call = Execution(experiment.name, profile, overrides, places(), {**execution, "notebooks": notebooks})
        last.append(Job(experiment.name, call, tuple(needs), rest))
        notes |= dict.fromkeys([*_fewer(dataset),
                                *(f"hours: {found.machine}, {each}" for each in cost.sources(found))])  # fmt: skip
    return [*models.values(), *last], list(notes)


def _fewer(name: str | None) -> Iterator[str]:
    """A line where a dataset here is none, or a part, of the published one."""
    if name not in PUBLISHED:
        return
    if not catalogue.available(name):
        yield f"missing: {catalogue.absent(name, None)}; hours are for what is published"
        return
    about, (_, classes, counts) = next(row for row in catalogue.status() if row["name"] == name), PUBLISHED[name]
    have = ((about["classes"], classes, "classes"), *((about[split], counts[split], f"{split} images")
                                                      for split in counts))  # fmt: skip
    if parts := [f"{here:,} of {all_:,} {what}" for here, all_, what in have if here != all_]:
        yield f"missing of {name}: here are {', '.join(parts)}; hours are for these"


def table(plan: Plan) -> list[tuple[str, ...]]:
    """The jobs as text under a header: what each waits for, GPUs, hours on them, its limit, disk; and their sum."""
    numbers = {job.name: str(i) for i, job in enumerate(plan.jobs, 1)}
    rows, total, disk = [("JOB", "WHAT", "AFTER", "GPUS", "HOURS", "LIMIT", "DISK")], 0.0, 0
    for job in plan.jobs:
        asked = plan.parameters[job.part]
        gpus = asked.get("gpus_per_node", 0) * asked["nodes"]
        size = sum(row.disk + row.checkpoint for row in job.rows)
        hours = sum(row.seconds or 0.0 for row in job.rows) / 3600 / (max(1, gpus) if job.part == "models" else 1)
        total, disk = total + hours * max(1, gpus), disk + size
        rows.append((numbers[job.name], job.name, " ".join(numbers[each] for each in job.needs), str(gpus),
                     f"{_least(job)}{hours:.3g}", f"{asked['timeout_min'] / 60:.3g} h", cost.size_text(size)))
    unit, least = "GPU hours" if plan.kind == "slurm" else "hours", max(map(_least, plan.jobs), default="")
    return [*rows, ("sum", f"{len(plan.jobs)} jobs", "", "", f"{least}{total:.3g}", unit, cost.size_text(disk))]


def _least(job: Job) -> str:
    """Before hours that are of a part of the work alone, as for the rest no rate was measured."""
    return "≥ " * any(row.seconds is None for row in job.rows)


# ---- submitit


def _submitit() -> Any:
    return optional("submitit", "--cluster needs submitit", "cluster")


def _options(path: Path | None) -> dict[str, dict[str, Any]]:
    """The parameters of each part of jobs in a file of options; submitit has looked at their names and types."""
    if path is None:
        return {part: {} for part in PARTS}
    try:
        given = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"--cluster-options {path}: {' '.join(str(error).split())}") from None
    parts = {part: given.pop(part, None) or {} for part in PARTS} if isinstance(given, dict) else {"": None}
    tables = [given, *parts.values()]
    if not all(isinstance(each, dict) and all(isinstance(name, str) for name in each) for each in tables):
        raise InputError(f"--cluster-options {path} must be lines of `name: value`, submitit's parameters; those of "
                         f"one kind of jobs under {' or '.join(PARTS)}")  # fmt: skip
    found = {part: given | parts[part] for part in PARTS}
    with tempfile.TemporaryDirectory() as folder:
        for parameters in found.values():
            _executor("local", Path(folder), USUAL | parameters, str(path))
    return found


def _executor(kind: str, folder: Path, parameters: Mapping[str, Any], named: str = "") -> Any:
    submitit = _submitit()
    try:
        executor = submitit.AutoExecutor(folder, cluster=kind, slurm_max_num_timeout=REQUEUED,
                                         local_max_num_timeout=REQUEUED)  # fmt: skip
        with warnings.catch_warnings(action="error"):  # of names that were once submitit's
            executor.update_parameters(**parameters)
    except RuntimeError as error:  # no srun
        raise InputError(f"--cluster {kind}: {error}") from None
    except (NameError, AssertionError, TypeError, ValueError, UserWarning) as error:
        where = f"--cluster-options {named}" if named else f"--cluster {kind}"
        raise InputError(f"{where}: {str(error).strip().splitlines()[0]}") from None
    return executor


def _limit(kind: str, parameters: Mapping[str, Any]) -> float:
    """Seconds after which a job stops itself: before it is warned, with time to write a checkpoint."""
    minutes = parameters.get("slurm_time") or parameters.get(f"{kind}_timeout_min") or parameters["timeout_min"]
    warned = 60 * minutes - parameters.get("slurm_signal_delay_s", WARNED["slurm"]) if kind == "slurm" else (
        60 * minutes - WARNED["local"])  # fmt: skip
    return warned - min(MARGIN, 0.4 * warned)


def _to_slurm(planned: Sequence[Job], executors: Mapping[str, Any]) -> int:
    """Submit all, each after those that it needs."""
    ids: dict[str, str] = {}
    for job in planned:
        executor = executors[job.part]
        needed = ":".join(ids[name] for name in job.needs)
        after = {"dependency": f"afterok:{needed}", "kill-on-invalid-dep": "yes"} if needed else {}
        executor.update_parameters(name=job.name[:60], slurm_additional_parameters=after)
        submitted = executor.submit(job.call)
        ids[job.name] = submitted.job_id
        print(f"{submitted.job_id}  {job.name}: {os.path.relpath(submitted.paths.stdout)}", flush=True)
    print("`squeue --me` shows what runs, `bagssl list` what is done; submitted again, what is there is left out")
    return 0


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _here(planned: Sequence[Job], executors: Mapping[str, Any], side_by_side: int, gpus: int) -> int:
    """Run all on this machine, so many at a time, each on GPUs of its own; 0, or 1 if one failed."""
    board, waiting, running = Board(), list(planned), {}
    ended: dict[str, bool] = {}  # job -> well
    free, number = list(range(side_by_side)), {job.name: i for i, job in enumerate(planned, 1)}
    if side_by_side > 1 and not gpus:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // side_by_side)))

    def say(job: Job, text: str, error: bool = False) -> None:
        board.say(text, title=f"[{number[job.name]}/{len(planned)}] {job.name}: ", error=error)

    try:
        while waiting or running:
            for job in [job for job in waiting if any(ended.get(name) is False for name in job.needs)]:
                waiting.remove(job)
                ended[job.name] = False
                lost = next(name for name in job.needs if not ended.get(name, True))
                say(job, f"left out, {lost} failed", error=True)
            for job in [job for job in waiting if all(name in ended for name in job.needs)][: len(free)]:
                waiting.remove(job)
                running[job.name] = job, _start(job, executors[job.part], slot := free.pop(0), gpus), slot, time.time()
                say(job, "starts")
            for name, (job, submitted, slot, begun) in list(running.items()):
                if submitted.done():
                    del running[name]
                    free.append(slot)
                    ended[name] = _say_end(job, submitted, time.time() - begun, say)
            board.show({name: _progress(submitted) for name, (_, submitted, *_) in running.items()})
            time.sleep(0.2)
    except KeyboardInterrupt:
        for _, submitted, *_ in running.values():
            submitted.cancel()
        for _, submitted, *_ in running.values():
            with contextlib.suppress(Exception):
                submitted.wait()
        raise Stopped("interrupted; the next call goes on from there", interrupted=True) from None
    return int(not all(ended.values()))


def _start(job: Job, executor: Any, slot: int, gpus: int) -> Any:
    if gpus:
        each = executor._executor.parameters.get("gpus_per_node", 1)
        executor.update_parameters(local_visible_gpus=tuple(range(slot * each, (slot + 1) * each)))
    return executor.submit(job.call)


def _say_end(job: Job, submitted: Any, seconds: float, say: Any) -> bool:
    submitit = _submitit()
    log = os.path.relpath(submitted.paths.stdout)
    try:
        error = submitted.exception()
    except submitit.core.utils.UncompletedJobError:  # killed, or submitit has no patience left
        error = "it left no result: killed, or at its time limit too often; the next call goes on from there"
    if error is None:
        say(job, f"done in {seconds:.0f} s")
        return True
    say(job, f"failed: {_reason(error)} (see {log})", error=True)
    return False


def _reason(error: BaseException | str) -> str:
    """The last line of the trace that submitit hands on, which is the error itself."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    bars = [i for i, line in enumerate(lines) if set(line.strip()) == {"-"}]
    return lines[bars[-1] - 1] if len(bars) > 1 else (lines or [type(error).__name__])[0]


def _progress(submitted: Any) -> str:
    with contextlib.suppress(OSError):
        return submitted.paths.stdout.with_suffix(".progress").read_text(encoding="utf-8").strip()
    return "runs"
