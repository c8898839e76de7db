"""One live line for long work: tqdm's bar in a terminal, one self-replacing line in a notebook (also by papermill)."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from bagssl.ranks import rank


@contextmanager
def progress_bar(total: int, done: int, label: str, enabled: bool = True,
                 unit: str = "crops") -> Iterator[Callable[[int, str], None]]:
    """Yield `update(done, note)`. Without a terminal or a notebook (a log file) nothing is printed; of several
    processes of a training the first shows it."""
    if not enabled or total <= 0 or rank():
        yield lambda done, note="": None
    elif in_notebook():
        yield from _in_notebook(total, done, label)
    else:
        bar = tqdm(total=total, initial=done, desc=label, unit=f" {unit}", unit_scale=True, dynamic_ncols=True,
                   leave=False, mininterval=0.5, disable=None)  # fmt: skip

        def update(done: int, note: str = "") -> None:
            bar.set_postfix_str(note, refresh=False)
            bar.update(done - bar.n)
            _show_in_terminal(f"{done / total:4.0%}  {note}")

        with bar:
            yield update


@contextmanager
def notice(text: str) -> Iterator[None]:
    """Say what is waited for: a line on stderr, or one in the notebook that goes when the wait is over."""
    if not in_notebook():
        if not rank():
            print(text, file=sys.stderr, flush=True)
        yield
        return
    with _displayed({"text/plain": text, "text/html": f"<code>{text}</code>"}):
        _show_in_terminal(text)
        yield


def in_notebook() -> bool:
    """Whether this process is a Jupyter kernel."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and hasattr(shell, "kernel")


def _in_notebook(total: int, already: int, label: str) -> Iterator[Callable[[int, str], None]]:
    def line(done: int, note: str) -> dict[str, str]:
        share = done / total
        text = f"{label}  {share:4.0%}  {note}"
        bar = f'<progress value="{share:.3f}" max="1"></progress>'
        return {"text/plain": text, "text/html": f"{bar} <code>{text}</code>"}

    shown = started = time.monotonic()

    def update(done: int, note: str = "") -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown > 0.5:
            shown = now
            left = (now - started) * (total - done) / max(done - already, 1)
            content = line(done, f"{note}  about {left / 60:.0f} min left" if left > 60 else note)
            handle.update(content, raw=True)
            _show_in_terminal(content["text/plain"])

    with _displayed(line(already, "")) as handle:
        yield update


@contextmanager
def _displayed(content: dict[str, str]) -> Iterator:
    """Show content that goes at the end; a handle to change it. By the kernel's IPython, never imported for this."""
    handle = sys.modules["IPython.display"].display(content, raw=True, display_id=True)
    try:
        yield handle
    finally:
        handle.update({"text/plain": "", "text/html": ""}, raw=True)


def _show_in_terminal(text: str) -> None:
    if file := os.environ.get("BAGSSL_PROGRESS"):  # of the batch, which shows its text
        Path(file).write_text(text)
