"""The batch: reads notebooks/experiments.yaml, executes notebooks by papermill, keeps status and provenance.

Each notebook runs in a process of its own, in the folder of the notebooks, into a hidden folder beside its
results. Only a notebook that ran to its end takes the place of the last good results. In its environment the
kernel finds BAGSSL_OUTPUT, the folder to write tables/ and figures/ into; BAGSSL_PROGRESS, a file whose text
the terminal shows; and with a time limit BAGSSL_DEADLINE, the unix time by which to raise `errors.Stopped`.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from filelock import FileLock, Timeout

from bagssl.errors import InputError, Stopped, nearest
from bagssl.paths import cores, home, results_root, write_atomically

PROFILES = ("smoke", "laptop", "paper")
GRACE = 5.0  # seconds that an interrupted kernel has to write its checkpoint
OVERTIME = 60.0  # seconds past the time limit before a notebook that takes no notice of it is interrupted
# Sources that cannot change what a notebook finds.
_BESIDE = frozenset({"bench.py", "cli.py", "experiments.py", "report.py", "report.html.j2", "notebook.html.j2"})


@dataclass(frozen=True)
class Profile:
    """How large an experiment is executed: for a laptop, for a paper."""

    cost: str  # time and hardware
    parameters: dict[str, Any]  # what differs from the notebook's defaults


@dataclass(frozen=True)
class Experiment:
    """An entry of experiments.yaml: a notebook, and its parameters in each profile."""

    name: str
    artefact: str  # the table, figure or claim of the paper
    notebook: Path
    profiles: dict[str, Profile]


@dataclass(frozen=True, eq=False)
class Stage:
    """One experiment in one profile, ready to run; `key` covers all that its results depend on."""

    experiment: Experiment
    profile: str
    parameters: dict[str, Any]
    data: dict[str, str]  # dataset -> fingerprint
    key: str
    folder: Path

    def beside(self, suffix: str) -> Path:
        return self.folder.with_name(f".{self.folder.name}.{suffix}")


@dataclass(frozen=True)
class Outcome:
    """How a stage ended. code: 0 fresh, 1 failed, 2 refused its parameters, 3 time limit, 130 interrupted."""

    code: int
    message: str


# ---- the list of experiments, and what is asked of it


def load_experiments(notebooks: Path | None = None) -> dict[str, Experiment]:
    """Read and check `notebooks`/experiments.yaml (default: notebooks/ of the checkout).

    Raises InputError, in one line, for a file that is absent, not YAML, or not of the expected shape.
    """
    folder = Path(notebooks or home() / "notebooks")
    path = folder / "experiments.yaml"
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing: run bagssl from a checkout of the project") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: not UTF-8, or a date that is none
        raise InputError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from None

    def section(value: Any, where: str, required: set[str]) -> dict:
        if not isinstance(value, dict) or set(value) != required:
            found = sorted(map(str, value)) if isinstance(value, dict) else type(value).__name__
            raise InputError(f"{path}: {where} needs exactly {', '.join(sorted(required))}; found {found}")
        return value

    if not isinstance(entries, dict) or not entries:
        raise InputError(f"{path}: expected a mapping from experiment to its entry")
    experiments = {}
    for name, entry in entries.items():
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", str(name)):
            raise InputError(f"{path}: {name!r} is no experiment name; use small letters, digits and '-'")
        section(entry, name, {"artefact", "notebook", "profiles"})
        if not isinstance(entry["profiles"], dict) or not entry["profiles"]:
            raise InputError(f"{path}: {name}: profiles must map a profile to its cost and parameters")
        if not os.path.isfile(folder / str(entry["notebook"])):  # False for whatever is no name of a file, too
            raise InputError(f"{path}: {name}: there is no notebook {entry['notebook']} in {folder}")
        profiles = {}
        for profile, value in entry["profiles"].items():
            if profile not in PROFILES:
                raise InputError(f"{path}: {name}: unknown profile {profile!r}; known: {', '.join(PROFILES)}")
            section(value, f"{name}: {profile}", {"cost", "parameters"})
            if not isinstance(value["parameters"], dict):
                raise InputError(f"{path}: {name}: {profile}: parameters must be a mapping, {{}} for none")
            profiles[profile] = Profile(str(value["cost"]), value["parameters"])
        experiments[name] = Experiment(name, str(entry["artefact"]), folder / entry["notebook"], profiles)
    return experiments


def choose(experiments: Mapping[str, Experiment], names: Sequence[str], profile: str) -> list[Experiment]:
    """The experiments asked for, once each; without names, all that have the profile."""
    if profile not in PROFILES:
        raise InputError(f"unknown profile {profile!r}; {nearest(profile, PROFILES)}")
    for name in names:
        if name not in experiments:
            raise InputError(f"unknown experiment {name!r}; {nearest(name, list(experiments))}")
        if profile not in experiments[name].profiles:
            known = ", ".join(experiments[name].profiles)
            raise InputError(f"experiment {name} has no profile {profile}; it has: {known} (--profile)")
    return [experiments[name] for name in dict.fromkeys(names or experiments)
            if profile in experiments[name].profiles]


# ---- parameters


def notebook_parameters(notebook: Path) -> dict[str, tuple[Any, str]]:
    """The `parameters` cell: name -> (default, annotation as text, or the default's type)."""
    cells = [cell for cell in _cells(notebook) if "parameters" in cell.get("metadata", {}).get("tags", [])]
    if len(cells) != 1:
        raise InputError(f"{notebook} must have one cell tagged 'parameters'; it has {len(cells)}")
    found = {}
    try:
        for node in ast.parse("".join(cells[0]["source"])).body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
                found[node.target.id] = (ast.literal_eval(node.value), ast.unparse(node.annotation))
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                value = ast.literal_eval(node.value)
                found[node.targets[0].id] = (value, _annotation_of(value))
    except (SyntaxError, ValueError) as error:
        raise InputError(f"{notebook}: the parameters cell must hold literals only ({error})") from None
    return found


def _annotation_of(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        kinds = {_annotation_of(item) for item in value}
        return f"list[{kinds.pop()}]" if len(kinds) == 1 else "list"
    return "object" if value is None else type(value).__name__


def conform(name: str, value: Any, annotation: str) -> Any:
    """`value` as the type that `annotation` names; text for no string is read as YAML, `1,4` as a list.

    An int passes for a float. Raises InputError when the value does not fit.
    """
    try:
        read = _numbers(value) if isinstance(value, dict) else value
        if isinstance(value, str) and annotation != "str":
            sequence = annotation.startswith(("list", "tuple")) and not value.lstrip().startswith("[")
            read = _numbers(yaml.safe_load(f"[{value}]" if sequence else value))
        return _fit(read, annotation)
    except (TypeError, ValueError, OverflowError, RecursionError, yaml.YAMLError):
        raise InputError(f"parameter {name} must be {annotation}, not {value!r}") from None


def _numbers(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as text: within lists and mappings, too, it is meant as a number."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)
    return value


def _fit(value: Any, kind: str) -> Any:
    """The value in the type that the text `kind` names, or TypeError."""
    inner = re.fullmatch(r"(?:list|tuple)\[([\w |]+)(?:, \.\.\.)?\]", kind)
    if inner and isinstance(value, list):
        return [_fit(item, inner[1]) for item in value]
    if "|" in kind and not inner:
        for each in kind.split("|"):
            with contextlib.suppress(TypeError):
                return _fit(value, each.strip())
        raise TypeError
    if kind == "float" and isinstance(value, (int, str)) and not isinstance(value, bool):
        value = float(value)  # a str, because YAML 1.1 reads 1e-3 as text
    wanted = _TYPES.get(kind.split("[")[0], object)
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        raise TypeError
    if isinstance(value, float) and not math.isfinite(value):
        raise TypeError
    return value


_TYPES = {"bool": bool, "int": int, "float": float, "str": str, "None": type(None), "dict": dict,
          "list": list, "tuple": list}  # fmt: skip


def resolve(experiment: Experiment, profile: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What to inject into the notebook: the profile's parameters, then the overrides, all checked."""
    known = notebook_parameters(experiment.notebook)
    given = {**experiment.profiles[profile].parameters, **overrides}
    if "output" in given:
        raise InputError("parameter output is the runner's own; set BAGSSL_RESULTS to write elsewhere")
    for name in given:
        if name not in known:
            raise InputError(f"{experiment.name} ({experiment.notebook.name}) has no parameter {name!r}; "
                             f"{nearest(str(name), [each for each in known if each != 'output'])}")
    return {name: conform(name, value, known[name][1]) for name, value in given.items()}


def check_parameters(names: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a running notebook, each in the type it is annotated with; `names` are its globals, changed in place.

    Plain papermill passes what it cannot read as text (`-p on true`), and a misspelt name like any other. Raises
    InputError, in one line, for a value that does not fit, or a name that papermill passed and that is no parameter.
    """
    known = {name: kind.__name__ if type(kind) is type else str(kind) for name, kind in names.get("__annotations__", {}).items()}
    for source in names.get("In", ()):  # the history of the kernel
        for node in ast.parse(source).body if source.lstrip().startswith("# Parameters") else ():
            for target in getattr(node, "targets", ()):
                if target.id not in known:
                    raise InputError(f"there is no parameter {target.id!r}; {nearest(target.id, list(known))}")
    found = {name: conform(name, names[name], kind) for name, kind in known.items()}
    names.update(found)
    return found


# ---- freshness


def _cells(notebook: Path) -> list[dict]:
    try:
        return json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{notebook} is not a readable notebook: {error}") from None


@functools.cache
def package_hash(folder: Path = Path(__file__).parent, beside: frozenset[str] = _BESIDE) -> str:
    """SHA-256 over the package's sources, by default but for those that decide nothing in a notebook."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*")):
        if path.suffix in {".py", ".csv", ".j2"} and path.name not in beside:
            digest.update(f"{path.name}\0{_file_hash(path)}\n".encode())
    return digest.hexdigest()


def _file_hash(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@functools.cache
def _fingerprint(dataset: str) -> str:
    from bagssl import data

    return " ".join(data.check(dataset).values())


def _ensure_data(dataset: str) -> None:
    """Raise InputError unless the dataset is there or, for those with a public source, can be fetched now."""
    from bagssl import data

    if not data.available(dataset):
        if dataset not in {"cifar10", "cifar100"}:
            data.load(dataset, "train")  # raises, and says how to add it
        print(data.get(dataset), flush=True)


def plan(experiment: Experiment, profile: str, overrides: Mapping[str, Any] | None = None, *,
         results: Path | None = None, fetch: bool = True) -> Stage:
    """Check parameters and data, and give the stage its key. fetch: get data that is missing, or raise.

    Without `fetch`, data that is absent counts as what it was when the results were made.
    """
    parameters = resolve(experiment, profile, overrides or {})
    known = notebook_parameters(experiment.notebook)
    folder = Path(results or results_root()) / profile / experiment.name
    dataset = parameters.get("dataset", known.get("dataset", (None, ""))[0])
    fingerprints: dict[str, str] = {}
    if dataset is not None:
        if fetch:
            try:
                _ensure_data(dataset)
            except InputError as error:
                raise InputError(f"{experiment.name} ({experiment.notebook.name}): {error}") from None
        try:
            fingerprints[dataset] = _fingerprint(dataset)
        except InputError:
            if fetch:
                raise
            fingerprints[dataset] = (_read(folder / "status.json").get("data") or {}).get(dataset, "")
    everything = {
        "parameters": {**{name: default for name, (default, _) in known.items()}, **parameters},
        "notebook": [[cell["cell_type"], "".join(cell["source"])] for cell in _cells(experiment.notebook)],
        "package": package_hash(),
        "data": fingerprints,
    }
    key = hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()
    return Stage(experiment, profile, parameters, fingerprints, key, folder)


def _read(path: Path) -> dict:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def _write(path: Path, content: Mapping) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _hashes(folder: Path) -> dict[str, str]:
    """Every file of a result folder -> SHA-256; not status.json, which holds them, nor pages, which follow from notebooks."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "status.json" and path.suffix != ".html")
    return {path.relative_to(folder).as_posix(): _file_hash(path) for path in files}


def state(stage: Stage) -> str:
    """fresh | stale | missing | failed (or stopped): of the results as they lie on disk."""
    status = _read(stage.folder / "status.json")
    with contextlib.suppress(OSError):
        if status.get("key") == stage.key and all(
                _file_hash(stage.folder / name) == value for name, value in status["files"].items()):
            return "fresh"
    if stage.beside("failed").exists():
        return _read(stage.beside("failed") / "status.json").get("state", "failed")
    return "stale" if status else "missing"


# ---- running


class Board:
    """What runs now: one line, kept up to date, in a terminal; elsewhere a plain line now and then."""

    def __init__(self, every: float = 30.0):
        self.lock, self.terminal, self.every = threading.Lock(), sys.stdout.isatty(), every
        self.now: dict[str, str] = {}
        self.said = time.monotonic()

    def say(self, text: str, *, error: bool = False) -> None:
        with self.lock:
            print("\r\033[K" if self.terminal else "", end="", flush=True)
            print(*text.splitlines(), file=sys.stderr if error else sys.stdout, flush=True)  # a path may hold line breaks

    def show(self, now: dict[str, str]) -> None:
        """now: experiment -> what it does."""
        line = "   ".join(f"{name} · {text}" for name, text in now.items() if text)
        with self.lock:
            if self.terminal:
                print(f"\r\033[K{line[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)
            elif line and now != self.now and time.monotonic() - self.said > self.every:
                print(line, flush=True)
                self.now, self.said = dict(now), time.monotonic()


class Kernels:
    """The notebooks that run now, each in a process of its own, so that one Ctrl-C ends them all."""

    def __init__(self) -> None:
        self.live: dict[subprocess.Popen, Path] = {}  # process -> the notebook it writes
        self.cells: dict[Path, str] = {}  # the notebook it writes -> cell 7/24
        self.lock = threading.Lock()
        self.stopping = False

    def run(self, notebook: Path, target: Path, parameters: Mapping, environment: Mapping[str, str]) -> dict:
        """Execute `notebook` into `target`, HTML and log.txt beside it; the error's {ename, evalue, cell}."""
        error, log = target.with_name("error.json"), target.with_name("log.txt")
        package = str(Path(__file__).resolve().parent.parent)
        everything = {
            **{name: value for name, value in os.environ.items() if name not in _OURS},
            "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")])),
            "PYTHONUNBUFFERED": "1",
            "BAGSSL_PROGRESS": str(target.with_name("progress.txt").resolve()),
            **environment,
        }
        with self.lock:
            if self.stopping:
                return {"ename": "KeyboardInterrupt", "evalue": "not started"}
            process = subprocess.Popen(
                [sys.executable, "-m", "bagssl.experiments", str(notebook), str(target)], env=everything,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
                errors="replace", start_new_session=True)
            self.live[process] = target
        try:
            with contextlib.suppress(BrokenPipeError), open(log, "w", encoding="utf-8") as stream:
                process.stdin.write(json.dumps(dict(parameters)) + "\n")
                process.stdin.flush()  # and left open: its end tells the process that this one is gone
                for line in process.stdout:
                    if re.fullmatch(r"cell \d+/\d+", line.strip()):
                        self.cells[target] = line.strip()
                    stream.write(line)
                    stream.flush()
            process.wait()
        finally:
            process.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            with self.lock:
                del self.live[process]
        found = _read(error)
        for path in (error, target.with_name("progress.txt")):
            path.unlink(missing_ok=True)
        if process.returncode and not found:
            return {"ename": "DeadProcess", "evalue": f"it ended with {process.returncode}; see {log.name}"}
        return found

    def now(self) -> dict[str, str]:
        """Notebook -> its cell, and what the kernel wrote into $BAGSSL_PROGRESS."""
        found = {}
        for target in list(self.live.values()):
            note = ""
            with contextlib.suppress(OSError):
                note = target.with_name("progress.txt").read_text(encoding="utf-8").strip()
            found[target.stem] = f"{self.cells.get(target, 'kernel starts')}  {note}".rstrip()
        return found

    def stop(self, grace: float = GRACE) -> None:
        """Interrupt the running cells, as JupyterLab's stop button does; kill what lives after `grace`."""
        import psutil

        with self.lock:
            workers = list(self.live)
        kernels = []
        for worker in workers:
            with contextlib.suppress(psutil.Error):
                kernels += psutil.Process(worker.pid).children()
        for kernel in kernels:
            with contextlib.suppress(psutil.Error):
                kernel.send_signal(signal.SIGINT)
        with contextlib.suppress(KeyboardInterrupt):  # a second Ctrl-C: do not wait
            until = time.monotonic() + grace
            while time.monotonic() < until and any(worker in self.live for worker in workers):
                time.sleep(0.05)
        for process in [*(kernel for kernel in kernels if kernel.is_running()),
                        *(worker for worker in workers if worker in self.live)]:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # each leads a process group of its own


# The kernel's own to set, or ours: MPLBACKEND would unplug inline plots.
_OURS = {"MPLBACKEND", "BAGSSL_OUTPUT", "BAGSSL_DEADLINE", "BAGSSL_PROGRESS"}


def _swap(partial: Path, folder: Path, old: Path) -> None:
    """Put `partial` in the place of `folder`; at no moment are both the old and the new results gone."""
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


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
    begun, made_by = time.monotonic(), _provenance(stage)
    environment = {"BAGSSL_OUTPUT": str(partial.resolve())}
    if deadline is not None:
        environment["BAGSSL_DEADLINE"] = _unix(deadline)
    target = partial / f"{name}.ipynb"
    error = kernels.run(stage.experiment.notebook.resolve(), target, stage.parameters, environment)
    seconds = time.monotonic() - begun
    if not error:
        (partial / "log.txt").unlink()
        made_by |= {"end": _iso(time.time()), "seconds": round(seconds, 1)}
        _write(partial / "provenance.json", made_by)
        _write(partial / "status.json", {"state": "done", "key": stage.key, "data": stage.data,
                                         "files": _hashes(partial)})
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
    _write(partial / "status.json", {"state": kind, "code": outcome.code, "key": stage.key, "error": error})
    shutil.rmtree(failed, ignore_errors=True)
    os.replace(partial, failed)
    return outcome


def error_line(error: Mapping[str, Any]) -> str:
    """cell 7: ValueError: the first line of its message."""
    cell = f"cell [{error['cell']}]: " if error.get("cell") else ""
    return f"{cell}{error['ename']}: {(str(error['evalue']).strip().splitlines() or [''])[0]}"


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
    with _sigterm_as_ctrl_c(), ThreadPoolExecutor(jobs) as pool:
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
        from bagssl.report import write_report

        try:
            page = write_report(results)
            _say_verdicts(page.parent, profile)
            print(f"All of it on one page: {os.path.relpath(page)}#{profile}")
        except (InputError, OSError) as error:
            print(f"bagssl: no page of all results: {error}", file=sys.stderr)
            return code or 1
    return code


def _worst(codes: Collection[int]) -> int:
    return next((code for code in (130, 1, 2, 3) if code in codes), 0)


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
            _run_cells(stage.experiment.notebook, stage.parameters)
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


def _run_cells(notebook: Path, parameters: Mapping[str, Any]) -> None:
    """The code of a notebook as one script; what would be shown is not."""
    import matplotlib.pyplot

    matplotlib.use("Agg")

    def nothing(*what: Any, **how: Any) -> None: ...

    shown = types.ModuleType("IPython.display")
    vars(shown).update(dict.fromkeys(("display", "HTML", "Image", "Markdown", "SVG"), nothing))
    names: dict[str, Any] = {"__name__": "__main__", "display": nothing}
    with mock.patch.dict(sys.modules, {"IPython.display": shown}):
        for number, cell in enumerate((cell for cell in _cells(notebook) if cell["cell_type"] == "code"), 1):
            exec(compile("".join(cell["source"]), f"{notebook.name}, cell [{number}]", "exec"), names)  # noqa: S102
            if "parameters" in cell["metadata"].get("tags", []):
                names.update(parameters)
    matplotlib.pyplot.close("all")


def _say(board: Board, title: str, text: str, *, error: bool = False) -> None:
    board.say(f"{title}: {text}", error=error)


def _say_where(folders: Sequence[Path]) -> None:
    print("\nThe executed notebooks, with their figures/ and tables/:" if folders else "", flush=True)
    for folder in folders:
        figures, tables = (len(list(folder.glob(pattern))) for pattern in ("figures/*.png", "tables/*.md"))
        print(f"  {os.path.relpath(folder / folder.name)}.ipynb: figures {figures}, tables {tables}")


def _say_verdicts(results: Path, profile: str) -> None:
    from bagssl.claims import MISSING, ledger

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


@contextlib.contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _unix(deadline: float) -> str:
    """A deadline of the monotonic clock for $BAGSSL_DEADLINE, which another process reads by the other clock."""
    return f"{time.time() + deadline - time.monotonic():.3f}"


def _iso(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _provenance(stage: Stage) -> dict[str, Any]:
    from importlib.metadata import version

    from bagssl.runs import provenance

    found, experiment = provenance(), stage.experiment
    del found["hardware"]["threads"]  # this process's: the kernel's own are in its notebook and its models' records
    return {
        "experiment": experiment.name, "profile": stage.profile, "notebook": experiment.notebook.name,
        "parameters": stage.parameters, "data": stage.data, "key": stage.key,
        "commit": found["commit"], "dirty": found["dirty"], "hardware": found["hardware"],
        "versions": {**found["versions"], "papermill": version("papermill")}, "start": _iso(time.time()),
    }  # fmt: skip


# ---- one notebook: executed here by the process that `Kernels.run` starts


def _execute(notebook: Path, target: Path, parameters: dict[str, Any]) -> dict[str, Any]:
    """Execute by papermill and write the normalised notebook and its HTML; the error, or {}."""
    import papermill
    from nbclient.exceptions import DeadKernelError

    try:
        executed = papermill.execute_notebook(
            notebook, target, parameters=parameters, cwd=notebook.parent,
            kernel_name="python3", language="python",
            progress_bar={"file": sys.stdout, "mininterval": 0, "bar_format": "cell {n_fmt}/{total_fmt}\n"},
            stdout_file=sys.stdout, stderr_file=sys.stdout)
    except papermill.PapermillExecutionError as error:
        return {"ename": error.ename, "evalue": error.evalue, "cell": error.exec_count}
    except DeadKernelError:
        return {"ename": "DeadKernelError", "evalue": "the kernel died: killed, or out of memory"}
    code = [cell for cell in executed.cells if cell.cell_type == "code" and cell.source.strip()]
    if any(cell.execution_count is None or _has_error(cell) for cell in code):  # papermill passes SystemExit
        return {"ename": "SystemExit", "evalue": "the notebook ended before its last cell"}
    normalise_notebook(target)
    from bagssl.report import notebook_page

    target.with_suffix(".html").write_text(notebook_page(target), encoding="utf-8")
    return {}


def _has_error(cell) -> bool:
    return any(output.output_type == "error" for output in cell.outputs)


def normalise_notebook(path: Path) -> None:
    """Rewrite a notebook so that two executions differ only where results do.

    Kernel python3, no versions, times or widget state in the metadata; of a cell's metadata only the tags;
    ids from the source, execution counts in order, a stream in one piece.
    """
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
                         "language_info": {"name": "python"}}
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    seen: dict[str, int] = {}
    count = 0
    for cell in notebook.cells:
        cell.metadata = {"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {}
        name = hashlib.sha256(f"{cell.cell_type}\0{cell.source}".encode()).hexdigest()[:8]
        seen[name] = seen.get(name, 0) + 1
        cell.id = name if seen[name] == 1 else f"{name}-{seen[name]}"
        if cell.cell_type != "code":
            continue
        executed = cell.execution_count is not None
        count += executed
        cell.execution_count = count if executed else None
        outputs = []
        for output in cell.outputs:
            if output.output_type == "display_data" and output.data.get("text/plain") == "":
                continue  # what a progress bar leaves
            if "execution_count" in output:
                output.execution_count = cell.execution_count
            if output.output_type == "stream" and outputs and outputs[-1].get("name") == output.name:
                outputs[-1].text += output.text
            else:
                outputs.append(output)
        cell.outputs = outputs
    with write_atomically(path) as temporary:
        nbformat.write(notebook, temporary)


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
        with tempfile.TemporaryDirectory() as temporary, _sigterm_as_ctrl_c(), ThreadPoolExecutor(1) as pool:
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


def _main() -> int:
    notebook, target = map(Path, sys.argv[1:3])
    parameters = json.loads(sys.stdin.readline())

    def leave_with_parent() -> None:
        sys.stdin.read()  # until the process that started this one is gone; the kernel then ends by itself
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
    sys.modules["rfc3987_syntax"] = None  # jsonschema's optional grammar: two seconds to load, for nothing
    error = _execute(notebook, target, parameters)
    if error:
        _write(target.with_name("error.json"), error)
    return 1 if error else 0


if __name__ == "__main__":
    sys.exit(_main())
