"""What can go wrong, in a few words; the command line turns each into an exit code, a notebook into one line."""

import difflib
import importlib
import re
from collections.abc import Sequence
from typing import Any


class OneLine(Exception):
    """What is said in one line, in the place of a traceback."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in the place of a traceback: the message says all that the reader needs."""
        return [f"{type(self).__name__}: {self}"]


class InputError(OneLine, ValueError):
    """Wrong input: the message is one line that says what is wrong and what to do (exit code 2)."""


class Stopped(OneLine):
    """Work stopped at a checkpoint and resumes at the next call (exit code 3; 130 after Ctrl-C)."""

    def __init__(self, message: str, *, interrupted: bool = False):
        super().__init__(message)
        self.interrupted = interrupted


class DoesNotFit(Stopped):
    """Work that could not end in the time that is left, and so was not done (exit code 3)."""


class Diverged(OneLine, RuntimeError):
    """Training gave NaN or collapsed; the message names the term (exit code 1)."""


class Lost(OneLine, RuntimeError):
    """Another process of a training or evaluation is gone or hangs; the message says what comes next (exit code 1)."""


def nearest(word: str, known: Sequence[str]) -> str:
    """Known names, the one that was probably meant first in line: the second half of an error message."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def optional(package: str, needs: str, extra: str) -> Any:
    """The module of a package that only an extra asks for. Raises InputError, `needs` and what to install, without."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise InputError(f"{needs}: pip install 'bagssl[{extra}]', or pip install {package}") from None


def check_choice(name: str, value: object, known: Sequence[str]) -> None:
    """Raises InputError, with the nearest known word, when `value` is none of `known`; `name`: what it is."""
    if value not in known:
        raise InputError(f"unknown {name} {value!r}; {nearest(str(value), list(known))}")


# What a box has too little of, by what Python, torch, CUDA and the system say of it (the last: `OSError` in text).
_SHORTAGES = [
    (r"CUDA out of memory|CUDA error: out of memory|CU\w+_STATUS_ALLOC_FAILED|\bOutOfMemoryError\b",
     "the memory of the GPU does not suffice", "a smaller batch_size, fewer --jobs, or nothing else on this GPU"),
    (r"</torch_|out of shared memory|shared memory object", "the shared memory does not suffice",
     "more of it (/dev/shm; in a container by --shm-size), or fewer workers"),
    (r"can't start new thread|[Tt]hread creation failed|pthread_create|BlockingIOError: .*unavailable",
     "no more threads or processes may run",
     "fewer --jobs, OMP_NUM_THREADS=1, or a higher limit (ulimit -u)"),
    (r"Too many open files", "no more files may be open", "fewer --jobs, or a higher limit (ulimit -n)"),
    (r"No usable temporary directory", "there is no folder for temporary files",
     "TMPDIR set to one that may be written"),
    (r"\b\w*MemoryError\b|[Nn]ot enough memory|Cannot allocate memory|bad_alloc|failed to map segment|static TLS block",
     "the memory does not suffice", "a smaller batch_size, fewer --jobs, or more memory (ulimit -v; the job's limit)"),
]  # fmt: skip


def shortage(name: str, message: str) -> str | None:
    """For an error, by its class's name and its message: one line that says what this box lacks and what would help;
    None for any other.
    """
    if name in ("InputError", "Stopped", "DoesNotFit", "Diverged", "Lost"):  # which say themselves what to do
        return None
    for part in message.strip().splitlines() or [""]:
        line = f"{name}: {part.strip()}".removesuffix(": ")
        for said, lacking, helps in _SHORTAGES:
            if re.search(said, line):
                return f"{lacking} ({line}); what helps: {helps}"
    return None
