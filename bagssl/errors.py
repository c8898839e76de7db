"""What can go wrong, in three words; the command line turns each into an exit code, a notebook into one line."""

import difflib
from collections.abc import Sequence


def _one_line(error: Exception) -> list[str]:
    """What IPython shows in the place of a traceback: the message says all that the reader needs."""
    return [f"{type(error).__name__}: {error}"]


class InputError(ValueError):
    """Wrong input: the message is one line that says what is wrong and what to do (exit code 2)."""

    _render_traceback_ = _one_line


class Stopped(Exception):
    """Work stopped at a checkpoint and resumes at the next call (exit code 3; 130 after Ctrl-C)."""

    def __init__(self, message: str, *, interrupted: bool = False):
        super().__init__(message)
        self.interrupted = interrupted

    _render_traceback_ = _one_line


class Diverged(RuntimeError):
    """Training gave NaN or collapsed; the message names the term (exit code 1)."""

    _render_traceback_ = _one_line


def nearest(word: str, known: Sequence[str]) -> str:
    """Known names, the one that was probably meant first in line: the second half of an error message."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def check_choice(name: str, value: object, known: Sequence[str]) -> None:
    """Raises InputError, with the nearest known word, when `value` is none of `known`; `name`: what it is."""
    if value not in known:
        raise InputError(f"unknown {name} {value!r}; {nearest(str(value), list(known))}")
