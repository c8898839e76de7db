"""A training watched: each row of its history goes to loggers, by the crops seen; see online.py for what is measured.

    results/runs/…-3f2a/tensorboard/    event files
    results/runs/…-3f2a/wandb/          what Weights & Biases keeps, or syncs later (WANDB_MODE=offline)

trackio keeps its own, in its folder ($TRACKIO_DIR). Nothing of this is part of the run: it has no place in the key, and
does not travel with it. A training that goes on tells its whole history again to a curve that is begun anew, so that
no point is there twice or missing; Weights & Biases, which takes no point back, is told what comes after its last.
"""

import contextlib
import importlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from bagssl.config import PretrainConfig
from bagssl.errors import InputError, check_choice, optional
from bagssl.online import Online
from bagssl.paths import LOGS
from bagssl.ranks import rank
from bagssl.runs import Run

PROJECT = "bagssl"  # of trackio, of Weights & Biases
_PLACE = ("step", "epoch", "crops")  # of a row, beside what it says
Log = Callable[[int, Mapping[str, float]], Any]  # crops seen, and what is told of them


def loggers(asked: str | Sequence[str] | None) -> list[str]:
    """The names of `log_to`, several in a row or with commas between; None: those of $BAGSSL_LOG_TO.

    Raises InputError for a name that is unknown, or whose package is absent.
    """
    words = os.environ.get("BAGSSL_LOG_TO", "") if asked is None else asked
    words = words if isinstance(words, str) else ",".join(words)
    names = list(dict.fromkeys(filter(None, (word.strip() for word in words.split(",")))))
    for name in names:
        check_choice("logger", name, ("csv", *_LOGGERS))
        if name != "csv":
            _package(name)
    return names


@contextlib.contextmanager
def watched(record: Any, log_to: Sequence[str] = (), every: int | None = None) -> Iterator[Callable[[], None]]:
    """Around a training: yields what is to be called whenever the history of its `record` has a new row.

    log_to: see `loggers`; csv is the run's own history. every: see `Online`; None measures nothing. Of several
    processes the first does it all. Nothing that it does is seen by the training, but in its seconds.
    Raises InputError for a logger that cannot be opened; one that fails later is left out, with a line.
    """
    names = [name for name in log_to if name != "csv"]
    if rank() or not names and every is None:
        yield lambda: None
        return
    online = None if every is None else Online(record, every)
    with contextlib.ExitStack() as opened:
        logs = {name: opened.enter_context(_opened(name, record.run, record.learner.config)) for name in names}

        def tell(crops: int, row: Mapping[str, float]) -> None:
            for name in list(logs):
                try:
                    logs[name](crops, {key: value for key, value in row.items() if key not in _PLACE})
                except Exception as error:  # noqa: BLE001 - whatever another's library meets is no end of a training
                    _left_out(name, error)
                    del logs[name]

        def watch() -> None:
            begun, row = time.monotonic(), record.history[-1]
            tell(row["crops"], row | (online() if online else {}))
            record.paused += time.monotonic() - begun

        told: dict[int, dict[str, float]] = {}  # before the checkpoint
        for row in (*record.history, *(online.rows if online else ())):
            told[row["crops"]] = told.get(row["crops"], {}) | row
        for crops, row in told.items():
            tell(crops, row)
        yield watch


@contextlib.contextmanager
def _opened(name: str, run: Run, config: PretrainConfig) -> Iterator[Log]:
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what a command prints is its result
            log, close = _LOGGERS[name](run, config)
    except Exception as error:  # noqa: BLE001 - of another's library
        raise InputError(f"{name} cannot be opened: {_line(error)}") from None
    try:
        yield log
    finally:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                close()
        except Exception as error:  # noqa: BLE001
            _left_out(name, error)


def _left_out(name: str, error: Exception) -> None:
    print(f"{name} is told no more: {_line(error)}", file=sys.stderr, flush=True)


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _package(name: str) -> Any:
    return optional(name, f"{name} is not installed", name)


# ---- each opened for a run: what it is told with, and what closes it


def _tensorboard(run: Run, config: PretrainConfig) -> tuple[Log, Callable[[], Any]]:
    folder = run.path / LOGS[0]
    shutil.rmtree(folder, ignore_errors=True)
    # the purge is for who looks on meanwhile
    writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(folder), purge_step=0)

    def log(crops: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, crops)
        writer.flush()

    return log, writer.close


def _trackio(run: Run, config: PretrainConfig) -> tuple[Log, Callable[[], Any]]:
    trackio = _package("trackio")
    with contextlib.suppress(ValueError):  # no project yet
        for before in trackio.Api().runs(PROJECT):
            if before.name == run.path.name:
                before.delete()
    opened = trackio.init(PROJECT, run.path.name, config=config.to_dict(), resume="allow", embed=False,
                          auto_log_gpu=False, auto_log_cpu=False)  # fmt: skip
    return lambda crops, values: opened.log(dict(values), step=crops), trackio.finish


def _wandb(run: Run, config: PretrainConfig) -> tuple[Log, Callable[[], Any]]:
    wandb, (_, folder) = _package("wandb"), LOGS
    shutil.rmtree(run.path / folder, ignore_errors=True)
    opened = wandb.init(project=PROJECT, id=run.key, name=run.path.name, dir=str(run.path), config=config.to_dict(),
                        resume="allow", settings=wandb.Settings(console="off"))  # fmt: skip

    def log(crops: int, values: Mapping[str, float]) -> None:
        if crops >= opened.step:
            opened.log(dict(values), step=crops)

    return log, opened.finish


_LOGGERS = {"tensorboard": _tensorboard, "trackio": _trackio, "wandb": _wandb}
