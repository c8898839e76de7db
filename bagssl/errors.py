"""What can go wrong, in three words; the command line turns each into an exit code."""


class InputError(ValueError):
    """Wrong input: the message is one line that says what is wrong and what to do (exit code 2)."""


class Stopped(Exception):
    """Work stopped at a checkpoint and resumes at the next call (exit code 3; 130 after Ctrl-C)."""

    def __init__(self, message: str, *, interrupted: bool = False):
        super().__init__(message)
        self.interrupted = interrupted


class Diverged(RuntimeError):
    """Training gave NaN or collapsed; the message names the term (exit code 1)."""
