"""What goes on in the store, and what may go from it: for `bagssl runs watch` and `bagssl runs remove`.

A training holds its run's lock; it writes a checkpoint every minute, and nothing in between: what is told of it is how
far it was then.
"""

import contextlib
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence

from filelock import Timeout

from bagssl import details, locks, overview, records, runs
from bagssl.errors import InputError, Stopped
from bagssl.locks import lock_at, shared
from bagssl.paths import RECORDED, home, runs_root
from bagssl.runs import MARK, Run, known

RECENT = 10  # rows of the history whose median speed is told
LONG = 60.0  # seconds after which a line is said again


# ---- watching


def holder(run: Run) -> str | None:
    """Who holds a run, ` (process 4711 on node7)` or empty where that is not known; None when nobody does."""
    path = run.path / ".lock"
    with contextlib.suppress(FileNotFoundError):  # never held, or gone
        if shared(run.path) or locks.fcntl is None:  # without it one who looks holds it for that long
            lock = lock_at(path)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                return lock.holder
            lock.release()
            return None
        with open(path, "rb") as stream:  # beside others that look; who wants to hold it waits for no longer than this
            try:
                locks.fcntl.flock(stream, locks.fcntl.LOCK_SH | locks.fcntl.LOCK_NB)
            except BlockingIOError:
                return ""
    return None


def state(run: Run) -> tuple[str, float | None]:
    """Where a run is, in words, and how many seconds ago it was there; None where that does not change."""
    if run.finished:
        return "finished", None
    held = holder(run)
    about, path = known(lambda: runs.checkpoint(run), {}), run.path / "checkpoint.pt"
    age = known(lambda: max(0.0, time.time() - path.stat().st_mtime), None)
    if held is None:
        saved = f"saved at step {about['step']:,}; the next call goes on" if "step" in about else "nothing saved"
        return f"not in training, {saved}", None
    who = held.strip().strip("()")
    beginning = "in training" + f" by {who}" * bool(who)
    if age is None or "step" not in about:
        return f"{beginning}, not yet at its first checkpoint", None
    return ", ".join([beginning, *known(lambda: list(_progress(run, about, age)), [f"step {about['step']:,}"])]), age


def _progress(run: Run, about: dict, age: float) -> Iterator[str]:
    """How far it is, its speed, the time that is left, and the loss, by the checkpoint of `age` seconds ago."""
    config, step, rows = run.config, about["step"], about["history"]
    if not rows:
        yield f"step {step:,}"
        return
    steps = round((config.get("until") or config["epochs"]) * rows[-1]["step"] / rows[-1]["epoch"])
    rate = statistics.median(row["crops_per_second"] for row in rows[-RECENT:])
    left = (steps - step) * config["views"] * config["batch_size"] / rate - age
    yield f"step {step:,} of {steps:,} ({step / steps:.0%})"
    yield f"{rate:,.0f} crops/s"
    yield f"about {span(left)} left" if left >= 1 else "about to end"
    yield f"loss {rows[-1]['loss']:.4g}"


def span(seconds: float) -> str:
    """40 s, 12 min, 3 h 20 min, 2 d 4 h."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes} min"
    hours = round(minutes / 60)
    return f"{minutes // 60} h {minutes % 60} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"


def look(name: str | None = None) -> dict[str, tuple[str, float | None]]:
    """The state of a run by name, as by `overview.find`; without one of each that is in training. {}: none is."""
    if name:
        run = overview.find(name, record=False)
        return {run.path.name: state(run)}
    return {run.path.name: state(run) for run in runs.list_runs() if not run.finished and holder(run) is not None}


def watch(name: str | None = None, once: bool = False, every: float = 5.0) -> Iterator[str]:
    """A line for each run in training, or for the one that is named: once, or whenever that has changed, or is old.

    Without `once` it ends when the run that is named is no longer in training, else never. Raises InputError as
    `overview.find`.
    """
    said: dict[str, tuple[str, float]] = {}
    while True:
        found, now = look(name), time.monotonic()
        for gone in said.keys() - found.keys() - {""}:
            del said[gone]
            yield f"{gone}: {state(Run(runs_root() / gone))[0]}"
        for each, (words, age) in (found or {"": ("no run is in training", None)}).items():
            before, when = said.get(each, ("", 0.0))
            fresh = words.partition(", about ")[0] != before.partition(", about ")[0]  # the time left always differs
            if fresh or (each and now - when > LONG):
                ago = "" if age is None else f"; at the last checkpoint, {span(age)} ago"
                yield f"{each}: {words}{ago}" if each else words
                said[each] = words, now
        if found:
            said.pop("", None)
        if once or (name and not any(words.startswith("in training") for words, _ in found.values())):
            return
        time.sleep(every)


# ---- removing


def choose(names: Sequence[str], older: float | None = None, unfinished: bool = False) -> list[Run]:
    """The runs of the store that all of these select: names as of `overview.find`, `older` seconds since they were
    last written, not finished.

    Raises InputError where nothing selects, for a name as `overview.find`, and where the store is a record.
    """
    if not names and older is None and not unfinished:
        raise InputError("which runs? Give names, --older-than 30d or --unfinished")
    spare_record()
    found = {run.path: run for run in (_of_the_store(name) for name in names)} if names else {
        run.path: run for run in runs.list_runs()}  # fmt: skip
    return [run for run in found.values() if not (unfinished and run.finished)
            and (older is None or time.time() - written(run) > older)]  # fmt: skip


def _of_the_store(name: str) -> Run:
    if not overview.matching(name, record=False) and (kept := overview.matching(name)):
        raise InputError(f"{kept[0].path} is of a record, from which nothing is removed; the store has no such run")
    return overview.find(name, record=False)


def spare_record() -> None:
    """Raises InputError where $BAGSSL_RUNS names a record as the store."""
    kept = [*records.roots(), *(home() / "results" / profile / "runs" for profile in RECORDED)]
    if runs_root().resolve() in [folder.resolve() for folder in kept]:
        raise InputError(f"{runs_root()} is a record, from which nothing is removed: set BAGSSL_RUNS to the store")


def written(run: Run) -> float:
    """When a file of it was last written, in unix time; locks do not count."""
    times = [known(lambda path=path: path.stat().st_mtime, 0.0) for path in run.path.rglob("*")
             if path.is_file() and not path.relative_to(run.path).parts[0].startswith(".")]  # fmt: skip
    return max(times, default=0.0)


def remove(run: Run) -> int:
    """Remove a run from the store; its bytes. Raises Stopped, and leaves it, when another process holds it.

    Its mark goes first: what is cut short is no finished run. Raises InputError for a link, behind which may be a
    record, and where the store is one.
    """
    spare_record()
    if run.path.is_symlink():
        raise InputError(f"{run.path} is a link to another folder: remove it by hand")
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.suppress(FileNotFoundError))  # the lock's own files are gone when it is let go
        stack.enter_context(runs.locked(run, deadline=0))
        count = details.size(run)
        (run.path / MARK).unlink(missing_ok=True)
        shutil.rmtree(run.path)
        return count
    raise Stopped(f"{run.path} was removed by another process")


def candidates(chosen: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """Those that nobody holds, and those that another process does."""
    held = [run for run in chosen if holder(run) is not None]
    return [run for run in chosen if run not in held], held


def row(run: Run) -> tuple[str, ...]:
    """Name, state, how long ago it was written, and bytes of a run, as text."""
    return (run.path.name, "finished" if run.finished else "not finished",
            f"{span(max(0.0, time.time() - written(run)))} ago", f"{details.size(run):,}")  # fmt: skip


