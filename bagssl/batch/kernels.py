"""Several notebooks side by side: each in a process of its own, one line in the terminal and one Ctrl-C for all."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from bagssl.batch.stages import read_record
from bagssl.errors import shortage
from bagssl.paths import command_folder, data_root, results_root, runs_root

GRACE = 5.0  # seconds that an interrupted kernel has to write its checkpoint
KERNEL_KILLED, PROCESS_KILLED = "DeadKernelError", "DeadProcess"  # the enames of what was killed, or out of memory

# The kernel's own to set, or ours: MPLBACKEND would unplug inline plots.
_OURS = {"MPLBACKEND", "BAGSSL_OUTPUT", "BAGSSL_PRINT", "BAGSSL_DEADLINE", "BAGSSL_PROGRESS"}


def places() -> dict[str, str]:
    """The variables by which another process finds data, runs and results where this one does."""
    return {"BAGSSL_DATA": str(data_root()), "BAGSSL_RUNS": str(runs_root()), "BAGSSL_RESULTS": str(results_root()),
            "BAGSSL_FOLDER": str(command_folder())}  # fmt: skip


class Board:
    """What runs now: one line, kept up to date, in a terminal; elsewhere a plain line now and then."""

    def __init__(self, every: float = 30.0):
        self.lock, self.terminal, self.every = threading.Lock(), sys.stdout.isatty(), every
        self.now: dict[str, str] = {}
        self.said = time.monotonic()

    def say(self, text: str, *, title: str = "", error: bool = False) -> None:
        """Print a line, an error to stderr; the line of what runs now comes again below it."""
        line = " ".join(f"{title}{text}".splitlines())  # a path may hold line breaks
        with self.lock:
            print("\r\033[K" if self.terminal else "", end="", flush=True)
            print(line, file=sys.stderr if error else sys.stdout, flush=True)

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
    """The notebooks that run now, each in a process of its own, so that one Ctrl-C ends them all.

    A kernel that is killed is noticed by the process that executes the notebook (notebook.py), and that one by `run`.
    """

    def __init__(self) -> None:
        self.live: dict[subprocess.Popen, Path] = {}  # process -> the notebook it writes
        self.cells: dict[Path, str] = {}  # the notebook it writes -> cell 7/24
        self.lock = threading.Lock()
        self.stopping = False

    def run(self, notebook: Path, target: Path, parameters: Mapping, environment: Mapping[str, str]) -> dict:
        """Execute `notebook` into `target`, log.txt beside it.

        parameters: to inject. environment: variables for the kernel, beside those of this process. Returns the error
        that ended it, {ename, evalue, cell}, or {} when it ran to its end.
        """
        error, progress = target.with_name("error.json"), target.with_name("progress.txt")
        package = str(Path(__file__).resolve().parents[2])
        environment = {**{name: value for name, value in os.environ.items() if name not in _OURS},
                       "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")])),
                       "PYTHONUNBUFFERED": "1", "BAGSSL_PROGRESS": str(progress.resolve()), **places(), **environment}
        with self.lock:
            if self.stopping:
                return {"ename": "KeyboardInterrupt", "evalue": "not started"}
            process = subprocess.Popen(
                [sys.executable, "-m", "bagssl.batch.notebook", str(notebook), str(target)], env=environment,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
                errors="replace", start_new_session=True)
            self.live[process] = target
        last = ""  # of what it said: the reason, where it ended before any cell; rather what names a shortage
        try:
            with (contextlib.suppress(BrokenPipeError), process,  # which is waited for
                  open(target.with_name("log.txt"), "w", encoding="utf-8") as log):  # fmt: skip
                process.stdin.write(json.dumps(dict(parameters)) + "\n")
                process.stdin.flush()  # and left open: its end tells the process that this one is gone
                for line in process.stdout:
                    if line.strip() and (shortage("", line) or not shortage("", last)):
                        last = line.strip()
                    if re.fullmatch(r"cell \d+/\d+", line.strip()):
                        self.cells[target] = line.strip()
                    log.write(line)
                    log.flush()
        finally:
            with self.lock:
                del self.live[process]
        record = read_record(error)
        for path in (error, progress):
            path.unlink(missing_ok=True)
        if process.returncode and not record:
            end = f"it ended with {process.returncode}, {last or 'silently'}; see log.txt"
            return {"ename": PROCESS_KILLED, "evalue": end}
        return record

    def now(self) -> dict[str, str]:
        """Notebook -> its cell, and what the kernel wrote into $BAGSSL_PROGRESS."""
        lines = {}
        for target in list(self.live.values()):
            note = ""
            with contextlib.suppress(OSError):
                note = target.with_name("progress.txt").read_text(encoding="utf-8").strip()
            lines[target.stem] = f"{self.cells.get(target, 'kernel starts')}  {note}".rstrip()
        return lines

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
            with contextlib.suppress(ProcessLookupError, PermissionError, psutil.Error):
                if hasattr(os, "killpg"):
                    os.killpg(process.pid, signal.SIGKILL)  # each leads a process group of its own
                else:
                    process.kill()


@contextlib.contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Within it SIGTERM raises KeyboardInterrupt, in the main thread; in others nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
