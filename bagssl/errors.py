"""What can go wrong, in three words; the command line turns each into an exit code, a notebook into one line."""

import difflib
from collections.abc import Sequence


class _OneLine(Exception):
    def _render_traceback_(self) -> list[str]:
        """What IPython shows in the place of a traceback: the message says all that the reader needs."""
        return [f"{type(self).__name__}: {self}"]


class InputError(_OneLine, ValueError):
    """Wrong input: the message is one line that says what is wrong and what to do (exit code 2)."""


class Stopped(_OneLine):
    """Work stopped at a checkpoint and resumes at the next call (exit code 3; 130 after Ctrl-C)."""

    def __init__(self, message: str, *, interrupted: bool = False):
        super().__init__(message)
        self.interrupted = interrupted


class Diverged(_OneLine, RuntimeError):
    """Training gave NaN or collapsed; the message names the term (exit code 1)."""


def nearest(word: str, known: Sequence[str]) -> str:
    """Known names, the one that was probably meant first in line: the second half of an error message."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def check_choice(name: str, value: object, known: Sequence[str]) -> None:
    """Raises InputError, with the nearest known word, when `value` is none of `known`; `name`: what it is."""
    if value not in known:
        raise InputError(f"unknown {name} {value!r}; {nearest(str(value), list(known))}")
