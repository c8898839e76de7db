"""The store of trained models: a configuration and the data's fingerprint give one key and one folder.

    results/runs/cifar10-tcr-patch-based-seed0-3f2a...
        config.json          the configuration, the recipe version and the data's fingerprint: what the key is made of
        checkpoint.pt        while training: everything needed to go on, to the bit
        history.csv          one row per log interval: step, crops, learning rate, throughput, named loss terms
        weights.safetensors  encoder, projector, predictor if any; or weights-fp16.safetensors, rounded to travel
        metrics.json         crops seen, last loss terms, hashes: written last, so it marks the end
        provenance.json      commit, versions, hardware, precision, wall time
        evaluations/         accuracies measured on the run, one file per protocol
        online.csv, tensorboard/, wandb/    for those who watch it train (watching.py); they stay where they are

Every JSON file holds the SHA-256 of its own content, metrics.json those of the weights and the history as well: what
was damaged is not believed. A finished folder can be copied to another machine and used there.
"""

import contextlib
import csv
import hashlib
import io
import json
import math
import os
import platform
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from filelock import Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save

from bagssl import curves
from bagssl.errors import InputError, Stopped, shortage
from bagssl.locks import guarding, lock_at
from bagssl.paths import HALF, MARK, WEIGHTS, cores, home, runs_root, write_atomically, write_text
from bagssl.progress import notice

# Raised when the meaning of training changes, so that old runs are not taken for new ones.
RECIPE = 1
RECORD = ("history.csv", "provenance.json")  # what `finish` writes after the weights and before the mark
_AGAIN = "delete the folder to train the run again"


def run_key(config: dict[str, Any], fingerprint: str) -> str:
    """The key of a run: SHA-256 over recipe version, configuration and data, shortened to 16 hexadecimal digits."""
    return _digest(json.dumps({"recipe": RECIPE, "config": config, "data": fingerprint}, sort_keys=True).encode())[:16]


@dataclass(frozen=True, repr=False)
class Run:
    """One folder of the store. It shows itself as a line of text and in a notebook, whatever state its folder is in."""

    path: Path

    @property
    def key(self) -> str:
        """What `run_key` made of its configuration and data."""
        return self.path.name.rsplit("-", 1)[-1]

    @property
    def config(self) -> dict[str, Any]:
        """Raises InputError when it is damaged, or was written by a newer bagssl."""
        path = self.path / "config.json"
        content = read_json(path)
        recipe, config = content.get("recipe"), content.get("config")
        if not isinstance(recipe, int) or not isinstance(config, dict):
            raise InputError(f"{path} is damaged: it has no recipe and config; {_AGAIN}")
        if recipe > RECIPE:
            raise InputError(f"{path} is of recipe {recipe}, this bagssl knows {RECIPE}: use the newer one for it")
        return config

    @property
    def metrics(self) -> dict[str, Any]:
        """steps, epochs, crops, images, seconds, the last terms as `final`, hashes. Raises InputError when damaged."""
        return read_json(self.path / MARK)

    @property
    def provenance(self) -> dict[str, Any]:
        """What made it: see `provenance`; seed, data, device, precision. Raises InputError when damaged."""
        return read_json(self.path / "provenance.json")

    @property
    def history(self) -> list[dict[str, float]]:
        """One row per log interval, numbers as floats. Raises InputError when rows or ends of rows are missing."""
        path, metrics = self.path / "history.csv", self.metrics
        try:
            content = path.read_bytes()
            text = content.decode()
            rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(io.StringIO(text))]
            last = rows[-1]["step"] if rows else 0
        except OSError as error:
            if shortage(type(error).__name__, str(error)):
                raise
            raise InputError(f"cannot read {path}: {error.strerror}; {_AGAIN}") from error
        except (TypeError, ValueError, KeyError) as error:
            raise InputError(f"{path} is damaged ({error}); {_AGAIN}") from error
        if not text.endswith("\n") or last != metrics.get("steps"):
            raise InputError(f"{path} is damaged: it ends before the last step; {_AGAIN}")
        if metrics.get("history_sha256") not in (None, _digest(content)):  # None: written before there was one
            raise InputError(f"{path} is damaged (its SHA-256 differs); {_AGAIN}")
        return rows

    @property
    def finished(self) -> bool:
        """Whether its whole record is there. The weights may have been left elsewhere: what was measured holds."""
        return (self.path / MARK).exists() and not self.lost

    @property
    def lost(self) -> list[str]:
        """The files that a finished run no longer has in its record; one that is not finished has lost none."""
        return [name for name in RECORD if (self.path / MARK).exists() and not (self.path / name).exists()]

    @property
    def halved(self) -> bool:
        """Whether its weights are there as fp16 alone: what is measured with them may differ in the last digits."""
        return (self.path / HALF).exists() and not (self.path / WEIGHTS).exists()

    @property
    def has_weights(self) -> bool:
        """Whether its weights are there, as trained or as fp16."""
        return (self.path / WEIGHTS).exists() or self.halved

    def check(self) -> None:
        """Raises InputError when what it holds is not what was written; that it holds no weights is no damage."""
        _ = self.history, self.provenance, self.has_weights and self.weights()

    def __repr__(self) -> str:
        return f"<Run {self.path.name}: {'; '.join(lines(self)[1:])}>"

    def _repr_html_(self) -> str:
        title, *more = map(escape, [*lines(self), self.path.name])
        losses = known(lambda: curves.points(known_history(self), "step", "loss"), [])
        return (f'<div style="display: flex; gap: 1.5em; align-items: center">{curves.curve(losses, "loss")}'
                f"<div><b>{title}</b><br>{'<br>'.join(more)}</div></div>")  # fmt: skip

    def weights(self) -> dict[str, torch.Tensor]:
        """The tensors of encoder and projector in fp32, by name. Raises InputError when a file is not the one written.
        """
        path = self.path / (HALF if self.halved else WEIGHTS)
        try:
            return _from_half(path, self.metrics) if self.halved else load(self._sound_weights())
        except SafetensorError as error:
            if shortage("", str(error)):  # no fault of the file's
                raise
            raise InputError(f"{path} is no safetensors file ({error}); {_AGAIN}") from error
        except OSError as error:
            if shortage(type(error).__name__, str(error)):
                raise
            raise InputError(f"cannot read {path}: {error.strerror}; {_AGAIN}") from error

    def _sound_weights(self) -> bytes:
        path = self.path / WEIGHTS
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            remedy = (f"copy {path.name} from where it was trained; or, to train it again, delete the folder and set "
                      "BAGSSL_RECORD to nothing")  # fmt: skip
            raise InputError(f"{self.path} has no weights: {remedy}") from None
        if _digest(content) != self.metrics.get("weights_sha256"):
            raise InputError(f"{path} is damaged (its SHA-256 differs); {_AGAIN}")
        return content


# ---- how a run shows itself: a folder may be half-written, damaged or gone, so whatever cannot be read is left out


def known(read: Callable[[], Any], otherwise: Any = "") -> Any:
    """What `read` gives, or `otherwise` where a record is absent or damaged: for those who only show it."""
    try:
        return read()
    except Exception:  # noqa: BLE001 - a damaged record may hold anything
        return otherwise


def lines(run: Run) -> list[str]:
    """What was trained; how far, for how long and on what; the last terms of the loss."""
    config, metrics = known(lambda: run.config), known(lambda: run.metrics)
    names = ["dataset", "objective", "training"]
    if known(lambda: config["training"]) == "untrained":
        names.remove("objective")
    words = [*(known(lambda name=name: str(config[name])) for name in names), known(lambda: f"seed {config['seed']}")]
    state = known(lambda: _state(run, config, metrics), "its folder cannot be read")
    last = known(lambda: metrics["final"]) or known(lambda: {"loss": known_history(run)[-1]["loss"]})
    terms = known(lambda: [f"{name} {last[name]:.4g}" for name in sorted(sorted(last), key="loss".__ne__)], [])
    said = [", ".join(filter(None, words)) or "a run whose configuration cannot be read", state, ", ".join(terms)]
    return [" ".join(line.split()) for line in said if line]


def _state(run: Run, config: Any, metrics: Any) -> str:
    """`finished: 64,000 crops in 256 s, AMD EPYC, 2 cores` or `stopped or in training, saved at step 120 of 500`."""
    crops = known(lambda: f": {metrics['crops']:,} crops")
    if run.finished:
        took = "" if committed() else known(lambda: f" in {metrics['seconds']:,.0f} s")
        made = f"finished{crops}{took}{known(lambda: ', ' + machine(run.provenance['hardware']))}"
        return made + ", weights as fp16" * run.halved
    if not run.path.exists():
        return "its folder is gone"
    if run.lost:
        return f"has lost {' and '.join(run.lost)}{crops}"
    if not (run.path / "checkpoint.pt").exists():
        return "not started, or not yet at its first checkpoint"
    step = known(lambda: int(checkpoint(run)["step"]), None)
    if step is None:
        return "its checkpoint cannot be read"
    row = known(lambda: known_history(run)[-1])
    steps = known(lambda: f" of {round(config['epochs'] * row['step'] / row['epoch'])}")
    return f"stopped or in training, saved at step {step}{steps}"


def checkpoint(run: Run) -> dict[str, Any]:
    """What a training has left on its way; raises whatever torch does where there is none that can be read."""
    return torch.load(run.path / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=True)  # reads no tensor


def known_history(run: Run) -> list[dict[str, float]]:
    """Of a finished run, or of one at its checkpoint; empty where it cannot be read."""
    return known(lambda: run.history if run.finished else checkpoint(run)["history"], [])


# ---- finding, writing and reading runs


def open_run(config: dict[str, Any], fingerprint: str, label: str, root: Path | None = None) -> Run:
    """The run of `config` on the data with `fingerprint`; its folder is made, `label` leads its name."""
    run = Run((root or runs_root()) / f"{label}-{run_key(config, fingerprint)}")
    path, content = run.path / "config.json", {"recipe": RECIPE, "config": config, "data": fingerprint}
    with contextlib.suppress(InputError):
        if read_json(path) == content:
            return run
    write_json(path, content)  # absent or damaged: the folder's key says that nothing else can have stood there
    return run


def reopen(run: Run) -> None:
    """Take the mark from a finished run that has lost a file, so that it is trained again, and say so."""
    if run.lost:
        print(f"{run.path} has lost {' and '.join(run.lost)}: it is trained again", file=sys.stderr, flush=True)
        (run.path / MARK).unlink()


def list_runs(root: Path | None = None) -> list[Run]:
    """Every run of the store, by name."""
    return [Run(path.parent) for path in sorted((root or runs_root()).glob("*/config.json"))]


@contextlib.contextmanager
def locked(run: Run, deadline: float = math.inf) -> Iterator[None]:
    """Hold the run: whoever else wants it waits, on other hosts too. Its holder's death frees it (see locks.py).

    Raises Stopped when the wait reaches `deadline` (of the monotonic clock, in seconds, or as many as it takes to see
    whether the holder lives) or is interrupted by Ctrl-C; so does a write to its folder when the lock was lost.
    """
    lock, name = lock_at(run.path / ".lock"), run.path.name
    try:
        lock.acquire(timeout=0)
    except Timeout:
        try:
            with notice(f"{name} is being trained by another process{lock.holder}: waiting for it"):
                lock.acquire(timeout=-1 if deadline == math.inf else max(lock.doubt, deadline - time.monotonic()))
        except (KeyboardInterrupt, Timeout) as stop:
            message = f"{name} is still being trained by another process{lock.holder}; the next call waits again"
            raise Stopped(message, interrupted=isinstance(stop, KeyboardInterrupt)) from None
    with guarding(run.path, lock):
        yield


def save_checkpoint(run: Run, state: dict[str, Any]) -> None:
    """Write what `load_checkpoint` reads: tensors, numbers, and lists and mappings of them."""
    content = io.BytesIO()  # torch itself meets a full disk with an error that does not say so
    torch.save(state, content)
    with write_atomically(run.path / "checkpoint.pt") as path:
        path.write_bytes(content.getbuffer())


def load_checkpoint(run: Run, device: torch.device, names: Collection[str] = ()) -> dict[str, Any] | None:
    """The state to go on from, or None: one that is damaged or lacks one of `names` counts as none, with a line."""
    path = run.path / "checkpoint.pt"
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as archive:  # torch itself does not look at the checksums
            if (damaged := archive.testzip()) is not None:
                raise zipfile.BadZipFile(damaged)
        state = torch.load(path, map_location=device, weights_only=True)
        if not isinstance(state, dict) or not state.keys() >= set(names):
            raise KeyError(f"it needs {', '.join(names)}")
        return state
    except Exception as error:  # torch raises many kinds for a damaged file
        if shortage(type(error).__name__, str(error)):  # no fault of the file's
            raise
        print(f"{path} cannot be read ({type(error).__name__}): training starts again", file=sys.stderr)
        return None


def finish(run: Run, tensors: dict[str, torch.Tensor], history: list[dict], metrics: dict, record: dict) -> None:
    """Write what a finished run holds, `record` as its provenance; the mark goes last."""
    weights = _saved(tensors)
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, fieldnames=list(history[0]) if history else ["step"])
    writer.writeheader()
    writer.writerows(history)
    rows = table.getvalue().encode()
    for name, content in (("weights.safetensors", weights), ("history.csv", rows)):
        with write_atomically(run.path / name) as path:
            path.write_bytes(content)
    write_json(run.path / "provenance.json", record)
    write_json(run.path / MARK, {**metrics, "weights_sha256": _digest(weights), "history_sha256": _digest(rows)})
    drop_checkpoint(run)


def _saved(tensors: Mapping[str, torch.Tensor]) -> bytes:
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def weights_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of the file that `finish` writes of such weights."""
    return _digest(_saved(tensors))


def write_half(run: Run, path: Path) -> None:
    """The weights of a finished run rounded to fp16, a file of half the size, which says whose they are."""
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in run.weights().items()}
    about = {"of": run.metrics["weights_sha256"], "sha256": _digest(save(half))}
    with write_atomically(path) as temporary:
        temporary.write_bytes(save(half, about))


def _from_half(path: Path, metrics: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a file by `write_half` as fp32. Raises InputError when it is damaged, or of another run."""
    with safe_open(path, "pt") as stream:
        about, half = stream.metadata() or {}, {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    if about.get("sha256") != _digest(save(half)):
        raise InputError(f"{path} is damaged (its SHA-256 differs); delete it, or copy it again")
    if about.get("of") != metrics.get("weights_sha256"):
        raise InputError(f"{path} is of another run: copy the one that belongs to {path.parent.name}")
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in half.items()}


def drop_checkpoint(run: Run) -> None:
    """Remove the checkpoint of a finished run, if there is one and it can be: it does no harm."""
    with contextlib.suppress(OSError):
        (run.path / "checkpoint.pt").unlink()


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote. Raises InputError, in one line, when the file is missing, no JSON, or was damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is damaged: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is damaged: it holds no names and values")
    if content.pop("sha256", None) not in (None, _digest_of(content)):  # None: not written by `write_json`
        raise InputError(f"{path} is damaged: its SHA-256 differs; delete it to have it made again")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write names and values with the SHA-256 of them all, by which `read_json` knows damage."""
    whole = {**content, "sha256": _digest_of(content)}
    write_text(path, json.dumps(whole, indent=2, sort_keys=True) + "\n")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _digest_of(content: dict[str, Any]) -> str:
    return _digest(json.dumps(json.loads(json.dumps(content)), sort_keys=True).encode())  # as it will be read


def committed() -> bool:
    """Whether what is shown stands in a notebook that will be committed: $BAGSSL_COMMITTED, by `bagssl notebooks`.

    Two executions of it differ only where results do, so it shows no commit, no hour and no seconds.
    """
    return bool(os.environ.get("BAGSSL_COMMITTED"))


def provenance() -> dict[str, Any]:
    """What made a result: commit and whether the checkout was changed, versions, hardware, time (UTC)."""
    commit, dirty = _commit()
    versions = {name: _version(name) for name in ("bagssl", "torch", "torchvision", "lightly", "numpy")}
    return {"commit": commit, "dirty": dirty, "versions": {"python": platform.python_version(), **versions},
            "hardware": hardware(), "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}  # fmt: skip


def hardware() -> dict[str, Any]:
    """Processor, the cores of the machine, the threads of this process, and the GPU's name if there is one."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"processor": _processor(), "cores": cores(), "threads": torch.get_num_threads(), "gpu": gpu}


def machine(record: Mapping[str, Any]) -> str:
    """A name for what `hardware` recorded: the GPU, or `AMD EPYC, 2 cores`."""
    count = record.get("cores", "?")
    return record.get("gpu") or f"{record.get('processor') or 'not recorded'}, {count} core{'s' * (count != 1)}"


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> tuple[str | None, bool | None]:
    def git(*words: str) -> str:
        # without a lock on the index, which a full disk would leave behind in the reader's checkout
        command = ["git", "--no-optional-locks", "-C", str(home()), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    with contextlib.suppress(OSError, subprocess.SubprocessError):
        # a checkout of its own: neither installed, nor unpacked inside another repository
        if Path(git("rev-parse", "--show-toplevel")).samefile(home()) and (home() / "bagssl/runs.py").exists():
            # results are what is being made: they do not count as a change of the code
            return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--", ".", ":!results"))
    return None, None
