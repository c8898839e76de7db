"""Locks that hold on any disk: the system's where the disk knows them, else a file that says who holds it.

The system frees its locks when their holder dies. Some network, cluster and FUSE disks have none (`flock` answers
ENOLCK, ENOSYS or EOPNOTSUPP); there a soft lock does: a file that is there while it is held. That of a process of this
machine which is gone is not heeded; one that was left by another machine must be removed by hand.
"""

import errno
import fcntl
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from filelock import BaseFileLock, FileLock, SoftFileLock

from bagssl.progress import in_notebook

_HELD = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES}  # by another; whatever else `flock` answers: no locks here
_told: set[int] = set()  # of which disks it has been said


def hold(stream: IO | int) -> bool | None:
    """Try to hold an open file until it is closed or we die: whether we do; None where the disk knows no locks."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in _HELD else None
    return True


def lock_at(path: Path, say: Callable[[str], object] | None = None) -> BaseFileLock:
    """A lock of all processes that ask for the same path, in a folder that is there; the caller acquires it.

    say: what tells, once for a disk, that it knows no locks; None: a line on stderr, and nothing in a notebook. Raises
    OSError when nothing can be written there.
    """
    with tempfile.TemporaryFile(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent) as probe:
        if hold(probe):  # asked here: versions of filelock differ in what they make of a disk's answers
            return FileLock(path)
        disk = os.fstat(probe.fileno()).st_dev
    soft = SoftFileLock(path.with_name(f"{path.name}.soft"))  # not `path`: the system's lock leaves its file there
    if disk not in _told:
        _told.add(disk)
        (say or _say)(f"the disk of {path.parent} knows no locks: files *{path.name}.soft stand for them")
    return soft


def remedy(lock: BaseFileLock) -> str:
    """What the reader can do who waits for a soft lock in vain, in brackets; nothing for a lock of the system's."""
    return f" (if none does, remove {lock.lock_file})" if isinstance(lock, SoftFileLock) else ""


def _say(line: str) -> None:
    if not in_notebook():
        print(line, file=sys.stderr, flush=True)
