"""Where things lie, how many cores there are, and how a file is written so that a reader never sees half of it.

Of a disk no more is asked than that files can be made, written and renamed: locks, modes, times and `fsync` are used
where it has them.
"""

import contextlib
import errno
import hashlib
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

from bagssl.errors import InputError, Stopped
from bagssl.locks import guarded, hold, host, shared

RECORDED = ("laptop", "paper")  # profiles whose results are kept; those of smoke are made again when they are wanted
# Of a run, named here for those that need no torch: the mark of a finished one; its weights as trained, and rounded.
MARK, WEIGHTS, HALF = "metrics.json", "weights.safetensors", "weights-fp16.safetensors"
# What stands in a run's folder for those who watch it train, and stays there: loggers' folders, what was measured.
LOGS, ONLINE = ("tensorboard", "wandb"), "online.csv"
_CHECKOUT = Path(__file__).resolve().parent.parent
_STALE = 86_400.0  # seconds: nobody downloads for a day, and few clocks are wrong by one
_WRITER = re.compile(r"\.([0-9a-f]{8})-[0-9a-f]{8}\.tmp$")  # its host, at the end of a temporary file's name
_WINDOWS = os.name == "nt"
_NOT_INHERITED = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOINHERIT", 0) | getattr(os, "O_BINARY", 0)
_NO_FSYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


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


def command_folder() -> Path:
    """Where the command was given: in a notebook that the batch executes $BAGSSL_FOLDER, else the working folder."""
    return _folder("BAGSSL_FOLDER") or Path.cwd()


def _folder(variable: str) -> Path | None:
    """The folder that the environment names, from the working folder on: the notebooks are executed in another one."""
    named = os.environ.get(variable)
    if not named:
        return None
    if named.startswith("~") and os.path.expanduser(named) == named:
        raise InputError(f"{variable}={named} begins with a home folder, and there is none: write it from / on")
    return Path(os.path.expanduser(named)).absolute()


def cores() -> int:
    """Cores that this process may use: on a cluster's node those of its job, in a container those of its quota."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return math.ceil(min(bound, quota()))


def quota(proc: Path = Path("/proc/self/cgroup"), mounts: Path = Path("/sys/fs/cgroup")) -> float:
    """Cores' worth of time that the container or its job may use, above 0: of its control group and all around it.

    Infinity where there is no quota, or none that can be read: as on systems without control groups.
    """
    shares = [math.inf]
    with contextlib.suppress(OSError, ValueError):
        for line in proc.read_text().splitlines():
            number, controllers, group = line.split(":", 2)
            roots = [mounts, mounts / "unified"] if number == "0" else []  # version 2
            if "cpu" in controllers.split(","):  # version 1
                roots = [mounts / "cpu", mounts / controllers]
            # the root as well: a container's own group is mounted there, by whatever path it is known outside
            shares += [_share(root / above.lstrip("/")) for root in roots
                       for above in (group, *map(str, Path(group).parents))]  # fmt: skip
    return min(shares)


def _share(group: Path) -> float:
    """The quota of one control group in cores: cpu.max of version 2, two files of version 1; infinity for none."""
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        if (group / "cpu.max").exists():
            used, period = (group / "cpu.max").read_text().split()
        else:
            used, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        share = int(used) / int(period)  # "max" and -1: none
        return share if share > 0 else math.inf
    return math.inf


def sweep(path: Path) -> None:
    """Remove what killed writers left in the folder of `path`: files of this host that nobody holds; after a day also
    folders, and files of which no lock tells whether they are held: where the disk has none, or another host wrote.
    """
    for left in path.parent.glob(".*.tmp"):
        with contextlib.suppress(OSError):  # another's, or gone
            stale = time.time() - left.stat().st_mtime > _STALE
            if left.is_dir() and stale:
                shutil.rmtree(left)
            elif not left.is_dir() and (stale or _ours(left)):
                with open(left, "r+b") as stream:
                    if (free := hold(stream)) or (free is None and stale):
                        left.unlink()


def _ours(temporary: Path) -> bool:
    """Whether a writer of this host made it, so that it holds it if it lives; its name says so, or used not to."""
    writer = _WRITER.search(temporary.name)
    return writer[1] == host() if writer else not shared(temporary.parent)


def file_hash(path: Path) -> str:
    """SHA-256, in hex, of what a file holds."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def write_atomically(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed to disk and takes the place of `path`.

    Raises InputError when `path` is a folder, Stopped when its folder is guarded by a lock that we have lost, OSError,
    with the file's name, for whatever the disk refuses.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder, and a file belongs there: remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path)
    temporary, handle = _new_file(path)
    try:
        yield temporary
        _flush(temporary)
        if (lock := guarded.get(path.parent)) and not lock.ours():
            raise Stopped(f"{path.parent} was given to another process, as this one or its disk stood still: the next "
                          "call waits for that one, or goes on where it was")  # fmt: skip
        if _WINDOWS:  # what is open cannot be renamed there
            os.close(handle)
            handle = None
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not name the file
        raise
    finally:
        if handle is not None:
            os.close(handle)
        temporary.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    """Write a file as UTF-8, its ends of lines as they are, by `write_atomically`, whose errors it raises."""
    with write_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def _new_file(path: Path) -> tuple[Path, int]:
    """A hidden file beside `path` and its handle; held until we end, however that is: `sweep` leaves it alone."""
    while True:
        temporary = path.with_name(f".{path.name}.{host()}-{secrets.token_hex(4)}.tmp")
        # its mode is what the reader's umask makes of it, from the beginning: some disks refuse to change one
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | _NOT_INHERITED, 0o666)
        if hold(handle) is not False and temporary.exists():
            return temporary, handle
        os.close(handle)  # before we held it, a sweep took it for one that a dead writer had left


def _flush(path: Path) -> None:
    """To the disk; one that does not know how has written it already, or never says."""
    with open(path, "rb") as stream:
        try:
            os.fsync(stream.fileno())
        except OSError as error:
            if error.errno not in _NO_FSYNC:
                raise


def copy_folder(source: Path, target: Path, without: Sequence[str] = ()) -> None:
    """Copy what the files of a folder say, not their modes and times, which some disks refuse; over what is there.

    without: patterns of names to leave out. Raises OSError for what cannot be read or written.
    """
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if any(fnmatch(path.name, pattern) for pattern in without):
            continue
        if path.is_dir():
            copy_folder(path, target / path.name, without)
        else:
            shutil.copyfile(path, target / path.name)


def move_folder(source: Path, target: Path) -> None:
    """Rename a folder to a name that is free; one that came with a container's image can only be copied and removed.

    Killed in between it leaves the source, or all of the target, whole.
    """
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        copy_folder(source, target)
        shutil.rmtree(source)
