"""Where things lie, how many cores there are, and how a file is written so that a reader never sees half of it."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bagssl.errors import InputError

_CHECKOUT = Path(__file__).resolve().parent.parent
_STALE = 86_400.0  # seconds: nobody downloads for a day, and few clocks are wrong by one
_BEGUN = 2.0  # seconds after which whoever writes a file holds its lock


def home() -> Path:
    """The checkout that this package lies in, or the working folder when it is installed elsewhere."""
    return _CHECKOUT if (_CHECKOUT / "pyproject.toml").exists() else Path.cwd()


def data_root() -> Path:
    """The folder of dataset caches: $BAGSSL_DATA, else data/."""
    return _folder("BAGSSL_DATA") or home() / "data"


def results_root() -> Path:
    """The folder of tables, figures and executed notebooks: $BAGSSL_RESULTS, else results/."""
    return _folder("BAGSSL_RESULTS") or home() / "results"


def runs_root() -> Path:
    """The store of trained models: $BAGSSL_RUNS, else runs/ among the results."""
    return _folder("BAGSSL_RUNS") or results_root() / "runs"


def _folder(variable: str) -> Path | None:
    """The folder that the environment names, from the working folder on: the notebooks are executed in another one."""
    named = os.environ.get(variable)
    return Path(os.path.expanduser(named)).absolute() if named else None


def cores() -> int:
    """Cores that this process may use: on a cluster's node those of its job, not all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def sweep(path: Path) -> None:
    """Remove what killed writers left in the folder of `path`: files that nobody holds, folders after a day."""
    for left in path.parent.glob(".*.tmp"):
        with contextlib.suppress(OSError):  # held, or on a disk that knows no locks
            age = time.time() - left.stat().st_mtime
            if left.is_dir() and age > _STALE:
                shutil.rmtree(left)
            elif not left.is_dir() and age > _BEGUN:
                with open(left, "r+b") as stream:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    left.unlink()


@contextlib.contextmanager
def write_atomically(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed to disk and takes the place of `path`.

    Raises InputError when `path` is a folder, OSError, with the file's name, for whatever the disk refuses.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder, and a file belongs there: remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    with contextlib.suppress(OSError):  # a disk that knows no locks
        fcntl.flock(handle, fcntl.LOCK_EX)  # until we end, however that is: `sweep` leaves it alone
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files that only their owner may read
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not name the file
        raise
    finally:
        temporary.unlink(missing_ok=True)
        os.close(handle)
