"""A record, verified from what it holds alone, without training: for `bagssl verify`.

Of an experiment every file against the hashes in its status.json, its tables against each other, the evaluations and
the executed notebook, its figures against the notebook, its models against their own hashes, and what made it; of a
profile its ledger as well, and models that no experiment names; of all results what README.md and results/README.md
cite. A hash says that a file is the one that was written; the rest, that it says what follows from the others.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bagssl import runs
from bagssl.batch import agreement
from bagssl.batch.cited import TEXTS, cite
from bagssl.batch.experiments import PROFILES
from bagssl.batch.stages import read_record
from bagssl.cards import CARD, headline
from bagssl.errors import InputError
from bagssl.paths import HALF, MARK, WEIGHTS, file_hash
from bagssl.records import FOREIGN
from bagssl.runs import Run, known
from bagssl.study import claims

STATUS, PROVENANCE, LEDGER = "status.json", "provenance.json", ("claims.csv", "claims.md")
_SEALED = ("config.json", MARK, PROVENANCE)  # of a run: each holds the SHA-256 of its own content
_OF_A_RUN = {*_SEALED, "history.csv", WEIGHTS, HALF, CARD, FOREIGN}
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass
class Verified:
    """What was found of each artefact: path -> what was compared, and what is off. In the order of the looks."""

    found: dict[Path, tuple[list[str], list[str]]] = field(default_factory=dict)

    def fine(self, path: Path, what: str) -> None:
        self.found.setdefault(path, ([], []))[0].append(what)

    def off(self, path: Path, fault: str) -> None:
        told = self.found.setdefault(path, ([], []))[1]
        told.extend([" ".join(fault.split())] * (fault not in told))

    def told(self, path: Path, what: str, fault: str | None) -> None:
        """`what` was compared, and `fault` found, or nothing."""
        if fault:
            self.off(path, fault)
        else:
            self.fine(path, what)

    @property
    def lines(self) -> list[str]:
        """One for each artefact."""
        return [f"OFF  {path}: {'; '.join(faults)}" if faults else f"ok   {path}: {', '.join(dict.fromkeys(what))}"
                for path, (what, faults) in self.found.items()]  # fmt: skip

    @property
    def faults(self) -> list[str]:
        """`path: what is off`, a line for each artefact that has a fault."""
        return [f"{path}: {'; '.join(faults)}" for path, (_, faults) in self.found.items() if faults]


def verify(folder: Path | str) -> Verified:
    """Look at an experiment's folder, a profile's, or all results. Raises InputError for a folder that is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder of results")
    found = Verified()
    if _is_experiment(folder):
        _experiment(found, folder)
        for model in _models(folder):
            _model(found, model)
    elif _experiments(folder):
        _profile(found, folder)
        _texts(found, folder.parent)
    elif profiles := [folder / name for name in PROFILES if _experiments(folder / name)]:
        for profile in profiles:
            _profile(found, profile)
        _texts(found, folder)
    else:
        raise InputError(f"{folder} holds no results: give results/, results/PROFILE or results/PROFILE/EXPERIMENT")
    return found


def _is_experiment(folder: Path) -> bool:
    return (folder / STATUS).exists() or (folder / PROVENANCE).exists() and not (folder / MARK).exists()


def _experiments(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.glob("*") if path.is_dir() and not path.name.startswith("."))
    return [path for path in found if _is_experiment(path)]


def _models(folder: Path) -> list[Path]:
    record = read_record(folder / PROVENANCE)
    return sorted(claims.models(folder, record if isinstance(record.get("runs"), list) else {}))


# ---- a profile


def _profile(found: Verified, folder: Path) -> None:
    experiments, named = _experiments(folder), set()
    for experiment in experiments:
        _experiment(found, experiment)
        named.update(_models(experiment))
    names = {model.name for model in named}
    present = set((folder / "runs").glob("*")) if (folder / "runs").is_dir() else set()
    for model in sorted(present | named):
        _model(found, model)
        if model.name not in names:
            found.off(model, "no experiment names this model")
    for path in sorted(folder.iterdir()):
        if path not in experiments and path.name not in ("runs", *LEDGER) and not path.name.startswith("."):
            found.off(path, "belongs to no experiment" if path.is_file() else f"holds no {STATUS} and {PROVENANCE}")
    _ledger(found, folder)


def _ledger(found: Verified, folder: Path) -> None:
    """The ledger as it follows today from the tables of claims."""
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, folder.name).mkdir()
        for path in folder.iterdir():
            if path.is_dir():
                Path(scratch, folder.name, path.name).symlink_to(path.resolve(), target_is_directory=True)
        try:
            claims.write_ledger(Path(scratch), folder.name)
        except (InputError, TypeError, LookupError) as error:
            found.off(folder / LEDGER[0], f"cannot be made again: {error}".replace(scratch, str(folder.parent)))
            return
        for name in LEDGER:
            ours, again = folder / name, Path(scratch, folder.name, name)
            if not ours.exists():
                found.off(ours, "missing")
                continue
            with _named(found, ours):
                lines = [path.read_text(encoding="utf-8").splitlines() for path in (ours, again)]
                found.told(ours, "verdicts follow from the tables", _otherwise(*lines))


def _otherwise(lines: list[str], again: list[str]) -> str:
    for i, (line, true) in enumerate(zip(lines, again, strict=False), 1):
        if line != true:
            start = max(0, len(os.path.commonprefix([line, true])) - 20)
            return f"line {i}: …{line[start : start + 40]}… is by the tables …{true[start : start + 40]}…"
    return "" if len(lines) == len(again) else f"{len(lines)} lines, by the tables {len(again)}"


def _texts(found: Verified, results: Path) -> None:
    """What texts cite of results, where they lie as in a checkout."""
    for name in TEXTS:
        path = results.absolute().parent / name if results.name == "results" else None
        if path is not None and path.exists():
            shown = results.parent / name
            try:
                changed = [line.removeprefix(f"{path}:") for line in cite(path)[1]]
                found.told(shown, "cites what the tables say", "; ".join(f"line {line}" for line in changed))
            except InputError as error:
                found.off(shown, "line " + str(error).removeprefix(f"{path}:"))


# ---- an experiment


def _experiment(found: Verified, folder: Path) -> None:
    _hashes(found, folder)
    _provenance(found, folder)
    measured = agreement.evaluations(_models(folder))
    for path in sorted(folder.glob("tables/*.csv")):
        with _named(found, path):
            forms = agreement.forms(path)
            for suffix in ("md", "tex", *(["csv"] * ("csv" in forms))):
                found.told(path.with_suffix(f".{suffix}"), "says what its .csv says", forms.get(suffix))
            fault = agreement.follows(agreement.read_csv(path), measured)
            if fault is not None:
                found.told(path, "follows from the evaluations", fault)
    with _named(found, folder / "tables"):
        for name, fault in agreement.recomputed(folder, measured).items():
            found.told(folder / "tables" / f"{name}.csv", "follows from the evaluations", fault)
    _notebook(found, folder, folder / f"{folder.name}.ipynb")


@contextlib.contextmanager
def _named(found: Verified, path: Path) -> Iterator[None]:
    """An artefact that cannot be read, or holds what no table does, is off; it is no bug."""
    try:
        yield
    except (InputError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        found.off(path, f"{error}" or type(error).__name__)


def _hashes(found: Verified, folder: Path) -> None:
    path, status = folder / STATUS, read_record(folder / STATUS)
    faults = [fault for fault, wrong in (
        ("missing, or no JSON", not status), ("its state is not done", status and status.get("state") != "done"),
        ("its key is not that of provenance.json", status and status.get("key") != read_record(
            folder / PROVENANCE).get("key"))) if wrong]  # fmt: skip
    found.told(path, "complete", "; ".join(faults))
    kept = status.get("files")
    kept = kept if isinstance(kept, dict) else {}
    here = {each.relative_to(folder).as_posix(): each for each in sorted(folder.rglob("*")) if each.is_file()}
    aside = {name for name, each in here.items() if name == STATUS or each.suffix == ".html"}
    for name in sorted({*kept, *here} - aside):
        if name not in here:
            found.off(folder / name, "missing")
        elif name not in kept:
            found.told(folder / name, "no hash recorded", kept and "no file of this experiment, by its status.json")
        else:
            same = file_hash(here[name]) == kept[name]
            found.told(here[name], "hash", None if same else "its SHA-256 is not the one in status.json")
    with _named(found, path):
        for model, names in (status.get("evaluations") or {}).items():
            for lost in (folder.with_name("runs") / model / "evaluations" / name for name in names):
                if not lost.exists():
                    found.off(lost, f"missing; {folder.name} was made with it")


def _provenance(found: Verified, folder: Path) -> None:
    path, record = folder / PROVENANCE, read_record(folder / PROVENANCE)
    commit, versions = record.get("commit"), record.get("versions")
    lacking = [name for name in ("notebook", "parameters", "hardware", "start", "end") if not record.get(name)
               and record.get(name) != {}]  # fmt: skip
    lacking += ["versions"] if not isinstance(versions, dict) or not versions.get("torch") else []
    faults = [fault for fault, wrong in (
        ("missing, or no JSON", not record), (f"of another experiment, {record.get('experiment')}",
                                              record and record.get("experiment") != folder.name),
        ("no commit is recorded", record and not _COMMIT.fullmatch(str(commit))),
        ("made from changed code: dirty", record.get("dirty")),
        (f"without {', '.join(lacking)}", record and lacking)) if wrong]  # fmt: skip
    found.told(path, f"commit {str(commit)[:12]}, not changed", "; ".join(faults))
    with _named(found, path):
        for name in record.get("runs") or ():
            if not (folder.with_name("runs") / name).is_dir():
                found.off(folder.with_name("runs") / name, f"missing; {folder.name} names it")


def _notebook(found: Verified, folder: Path, notebook: Path) -> None:
    if not notebook.exists():
        found.off(notebook, "missing")
        return
    with _named(found, notebook):
        tables = {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("tables/*.md"))}
        outputs, verdicts = agreement.outputs(notebook), functools.cache(lambda: _verdicts(folder))
        faults = [*agreement.shown_tables(outputs, tables), *agreement.printed_verdicts(outputs, verdicts)]
        found.told(notebook, "shows what the tables say", "; ".join(faults))
        shown = sorted(folder.glob("figures/*.png"))
        wrong = agreement.shown_figures(notebook.name, outputs, shown)
        for path in shown:
            found.told(path, "as the notebook shows it", wrong.get(path))


def _verdicts(folder: Path) -> set[str]:
    """What `claims.Ruling` prints of the tables of an experiment."""
    lines = set()
    for path in folder.glob("tables/claim_c*.csv"):
        claim, frame = path.stem.removeprefix("claim_").upper(), agreement.read_csv(path)
        lines.update(claims.Ruling(claim, claims.checked(claim, frame, str(path))).verdicts.splitlines())
    return lines


# ---- a model


def _model(found: Verified, folder: Path) -> None:
    """A run, or what was measured of an encoder that others trained, by its own hashes."""
    if not folder.is_dir():
        found.off(folder, "missing, or no folder")
        return
    if not (folder / FOREIGN).exists():
        _run(found, folder)
    else:
        _seal(found, folder / FOREIGN)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name not in _OF_A_RUN and not re.fullmatch(r"evaluations/[0-9a-f]{16}\.json", name):
            found.off(path, "no file of a run")
    count = sum(_evaluation(found, path, folder) for path in sorted(folder.glob("evaluations/*.json")))
    found.fine(folder, f"evaluations {count}")


def _seal(found: Verified, path: Path) -> None:
    content = known(lambda: json.loads(path.read_text(encoding="utf-8")), {})
    if path.exists() and "sha256" not in content and _alone(path):
        found.off(path, "has lost the SHA-256 of its content")


def _alone(path: Path) -> bool:
    """Whether no status.json has its hash: those of models that lie in an experiment's folder do, older ones too."""
    return not any((above / STATUS).exists() for above in path.parents)


def _run(found: Verified, folder: Path) -> None:
    run = Run(folder)
    for name in _SEALED:
        with _named(found, folder / name):
            runs.read_json(folder / name)
            _seal(found, folder / name)
    if "history_sha256" not in known(lambda: run.metrics, {}) and _alone(folder):
        found.off(folder / MARK, "has no hash of history.csv")
    for name, read in (("history.csv", lambda: run.history), ("config.json", lambda: _key(run)),
                       (HALF if run.halved else WEIGHTS, lambda: run.has_weights and run.weights())):
        with _named(found, folder / name):
            read()
    if (folder / HALF).exists() and not run.halved:
        found.off(folder / HALF, "beside weights as trained")
    best, card = known(lambda: headline(run), None), folder / CARD
    if best and card.exists():
        said = f"{best['accuracy']:.2f} %"
        found.told(card, "says the accuracy that was measured",
                   None if said in card.read_text(encoding="utf-8") else f"does not say {said}, what was measured")
    if known(lambda: run.provenance["dirty"], False):
        found.fine(folder, "trained from changed code")
    if folder not in found.found or not found.found[folder][1]:
        found.fine(folder, "hashes of configuration, history, metrics"
                   + (", weights as fp16" if run.halved else ", weights" if run.has_weights else ""))  # fmt: skip


def _key(run: Run) -> None:
    data = runs.read_json(run.path / "config.json").get("data")
    if runs.run_key(run.config, data) != run.key:
        raise InputError(f"{run.path / 'config.json'} is not that of this run: its key differs")
    if run.provenance.get("data") != data:
        raise InputError(f"{run.path / PROVENANCE} is of other data than config.json")


def _evaluation(found: Verified, path: Path, folder: Path) -> bool:
    """Whether an evaluation is sound: its own hash, its name from its protocol, and each number from what was right."""
    with _named(found, path):
        content = runs.read_json(path)
        _seal(found, path)
        protocol: dict[str, Any] = content["protocol"]
        key = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:16]
        if key != path.stem:
            raise InputError("its name is not that of its protocol")
        model = read_record(folder / FOREIGN).get("digest") or known(lambda: Run(folder).metrics["weights_sha256"])
        if protocol["weights"] != model:
            raise InputError("it was measured on other weights")
        for row in content["rows"]:
            agreement.test_images(row)
            if not row["low"] <= row["accuracy"] <= row["high"]:
                raise InputError(f"{row['accuracy']} is outside its interval")
        return True
    return False


