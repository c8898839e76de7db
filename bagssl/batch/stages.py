"""What is fresh: an experiment in a profile, with a key over all that its results depend on."""

import contextlib
import functools
import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bagssl import catalogue, words
from bagssl.batch.experiments import Experiment
from bagssl.errors import InputError, nearest
from bagssl.parameters import conform, notebook_cells, notebook_parameters
from bagssl.paths import HALF, MARK, WEIGHTS, copy_folder, file_hash, results_root, write_text

_PACKAGE = Path(__file__).resolve().parents[1]
# modules that decide nothing in a notebook
_DECIDE_NOTHING = frozenset({"bench", "cli.py", "commands.py", "details.py", "hub.py", "tending.py", "batch"})


@dataclass(frozen=True, eq=False)
class Stage:
    """One experiment in one profile, ready to run; `key` covers all that its results depend on."""

    experiment: Experiment
    profile: str
    parameters: dict[str, Any]
    data: dict[str, str]  # dataset -> fingerprint
    key: str
    folder: Path

    @property
    def models(self) -> Path:
        """The folder of the models of all experiments of its profile, see records.py."""
        return self.folder.with_name("runs")

    def beside(self, suffix: str) -> Path:
        """The hidden path beside its results: `partial`, `failed`, `old`, `lock`."""
        return self.folder.with_name(f".{self.folder.name}.{suffix}")


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


def settings(experiment: Experiment, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """All parameters of its notebook: the defaults, but for those that are injected."""
    return {name: default for name, (default, _) in notebook_parameters(experiment.notebook).items()} | parameters


def lacks(parameters: Mapping[str, Any], asked: str | None = None) -> str:
    """What of others an experiment needs that is not here and cannot be fetched; "" for nothing, or for the dataset
    `asked` for: that is not passed over."""
    if file := words.absent(parameters.get("encoders") or []):
        return f"{file} is not here"
    dataset = parameters.get("dataset")
    if dataset in (None, *catalogue.CIFAR, asked) or catalogue.available(dataset):
        return ""
    return str(catalogue.absent(dataset, None))


def plan(experiment: Experiment, profile: str, overrides: Mapping[str, Any] | None = None, *,
         results: Path | None = None, fetch: bool = True) -> Stage:
    """Check parameters and data, and give the stage its key. fetch: get data that is missing, or raise.

    Without `fetch`, data that is absent counts as what it was when the results were made.
    """
    parameters = resolve(experiment, profile, overrides or {})
    every = settings(experiment, parameters)
    folder = Path(results or results_root()) / profile / experiment.name
    fingerprints: dict[str, str] = {}
    looks = dict.fromkeys(words.join(every.get("encoders") or []), words.fingerprint)  # others' files
    if (dataset := every.get("dataset")) is not None:
        looks = {dataset: _fetched if fetch else _recorded, **looks}
    for name, look in looks.items():
        try:
            fingerprints[name] = look(name)
        except InputError as error:
            if fetch:
                raise InputError(f"{experiment.name} ({experiment.notebook.name}): {error}") from None
            fingerprints[name] = (read_record(folder / "status.json").get("data") or {}).get(name, "")
    cells = [[cell["cell_type"], "".join(cell["source"])] for cell in notebook_cells(experiment.notebook)]
    everything = {"parameters": every, "notebook": cells, "package": package_hash(), "data": fingerprints}
    key = hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()
    return Stage(experiment, profile, parameters, fingerprints, key, folder)


def _ensure_data(dataset: str) -> None:
    """Raise InputError unless the dataset is there or, for those with a public source, can be fetched now."""
    if not catalogue.available(dataset):
        if dataset not in catalogue.CIFAR:
            raise catalogue.absent(dataset, None)
        from bagssl import trees

        print(trees.get(dataset), flush=True)


def _fetched(dataset: str) -> str:
    _ensure_data(dataset)
    return _checked(dataset)


@functools.cache
def _checked(dataset: str) -> str:
    found = catalogue.recorded(dataset)
    if not found or catalogue.DECODED not in found.values():  # else there is nothing to compare with
        from bagssl import data

        found = data.check(dataset)
    return " ".join(found.values())


@functools.cache
def _recorded(dataset: str) -> str:
    found = catalogue.recorded(dataset)
    return " ".join(found.values()) if found else _checked(dataset)


@functools.cache
def package_hash(folder: Path = _PACKAGE, without: frozenset[str] = _DECIDE_NOTHING) -> str:
    """SHA-256 over the package's sources, by default but for those that decide nothing in a notebook."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.suffix in {".py", ".csv", ".j2"} and name.parts[0] not in without:
            digest.update(f"{name.as_posix()}\0{file_hash(path)}\n".encode())
    return digest.hexdigest()


def state(stage: Stage) -> str:
    """fresh | stale | missing | failed (or stopped): of the results as they lie on disk."""
    status = read_record(stage.folder / "status.json")
    with contextlib.suppress(OSError, KeyError):
        if status.get("key") == stage.key and all((stage.models / name).is_dir() for name in status["runs"]) and all(
                file_hash(stage.folder / name) == value for name, value in status["files"].items()):
            return "fresh"
    if stage.beside("failed").exists():
        return read_record(stage.beside("failed") / "status.json").get("state", "failed")
    return "stale" if status else "missing"


def hashes(folder: Path) -> dict[str, str]:
    """Every file of a result folder -> SHA-256; but status.json, which holds them, and pages, made from notebooks."""
    return {path.relative_to(folder).as_posix(): file_hash(path) for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != "status.json" and path.suffix != ".html"}


def read_record(path: Path) -> dict:
    """The mapping in a JSON file; {} for a file that is absent or damaged."""
    with contextlib.suppress(OSError, ValueError):
        record = json.loads(path.read_text(encoding="utf-8"))
        return record if isinstance(record, dict) else {}
    return {}


def write_record(path: Path, content: Mapping) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def stage_provenance(stage: Stage) -> dict[str, Any]:
    """What a stage is about to be made from, by, and on, for provenance.json."""
    from bagssl.runs import provenance

    record, experiment = provenance(), stage.experiment
    del record["hardware"]["threads"]  # this process's: the kernel's own are in its notebook and its models' records
    return {"experiment": experiment.name, "profile": stage.profile, "notebook": experiment.notebook.name,
            "parameters": stage.parameters, "data": stage.data, "key": stage.key,
            "commit": record["commit"], "dirty": record["dirty"], "hardware": record["hardware"],
            "versions": {**record["versions"], "papermill": version("papermill")}, "start": iso_time(time.time())}


def merge_models(source: Path, target: Path) -> list[str]:
    """Add the models of an experiment to those of its profile; their names.

    Weights in fp32 are not replaced by rounded ones, nor is what was measured lost; a run that was trained anew takes
    the place of the former.
    """
    from bagssl.cards import CARD, card  # slow to import
    from bagssl.runs import Run

    names = sorted(path.name for path in source.glob("*"))
    for name in names:
        new, old = source / name, target / name
        if _weights(old) not in (None, _weights(new)):  # None: another stage is about to write it
            shutil.rmtree(old, ignore_errors=True)
        copy_folder(new, old, [HALF] * (old / WEIGHTS).exists())
        if (old / WEIGHTS).exists():
            (old / HALF).unlink(missing_ok=True)
        if (old / CARD).exists():
            with contextlib.suppress(InputError):  # of what is damaged the card stays
                write_text(old / CARD, card(Run(old)))  # of what both have left there
    return names


def _weights(run: Path) -> str | None:
    return read_record(run / MARK).get("weights_sha256")


def iso_time(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
