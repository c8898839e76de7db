"""Locks that hold on any disk, and that no dead process keeps.

On a disk of this host's own they are the system's, free as soon as their holder dies. On one that other hosts may have
as well (NFS, Lustre, FUSE, …) `flock` may hold on one host alone, and some disks know none. There files stand for a
lock, filelock's strict soft one, and its holder writes its own again every BEAT seconds. Whoever waits looks at them
every LOOK seconds; after LOOKS looks in a row that saw no change the holder counts as dead, and its files are removed.
Only looks are counted: no clock of another host is asked, and a disk or a waiter that stood still breaks no lock. One
who held it and only slept finds its files gone (`ours`) and stops before it writes, so at worst work is done twice.
"""

import contextlib
import errno
import hashlib
import math
import os
import re
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Self

from filelock import FileLock, SoftFileLock, SoftFileLockProtocolError, StrictSoftFileLock, Timeout
from filelock import StrictSoftFileClaim as Claim

from bagssl.errors import InputError, check_choice

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None

BEAT, LOOK, LOOKS = 15.0, 2.0, 60  # seconds, seconds, times: a dead holder is waited for for two minutes
_HELD = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES}  # by another; whatever else `flock` answers: no locks here
_SHORT = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE}  # no answer to what it knows
_BEYOND = 2**31 - 2
_MOUNTS = Path("/proc/self/mountinfo")
_claims: dict[int, Claim | None] = {}  # by disk: see `_own_claim`
# file systems of one host; whatever is none of these may have others
_LOCAL = {"apfs", "bcachefs", "btrfs", "devtmpfs", "erofs", "exfat", "ext2", "ext3", "ext4", "f2fs", "fuseblk", "hfs",
          "hfsplus", "jfs", "msdos", "nilfs2", "ntfs", "ntfs3", "overlay", "ramfs", "reiserfs", "rootfs", "squashfs",
          "tmpfs", "vfat", "xfs", "zfs"}  # fmt: skip

guarded: dict[Path, "SystemLock | SharedLock"] = {}  # folders, and the lock that must be ours to write there


def hold(stream: IO | int) -> bool | None:
    """Try to hold an open file until it is closed or we die: whether we do, as far as this host goes; None where the
    disk knows no locks.
    """
    try:
        if fcntl is None:  # one byte where no file has any: what is locked there nobody else can read
            handle = stream if isinstance(stream, int) else stream.fileno()
            at = os.lseek(handle, 0, os.SEEK_CUR)
            os.lseek(handle, _BEYOND, os.SEEK_SET)
            try:
                msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            finally:
                os.lseek(handle, at, os.SEEK_SET)
        else:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in _HELD else None
    return True


def host() -> str:
    """Eight hexadecimal digits for this host, from its last start on: what `hold` tells goes no further."""
    boot = b""
    with contextlib.suppress(OSError):  # Linux alone says
        boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    return hashlib.sha256(socket.gethostname().encode("utf-8", "surrogateescape") + boot).hexdigest()[:8]


def shared(folder: Path) -> bool:
    """Whether other hosts may have the disk of a folder too: by its kind, or $BAGSSL_LOCKS, `shared` or `system`."""
    if asked := os.environ.get("BAGSSL_LOCKS"):
        check_choice("BAGSSL_LOCKS", asked, ("shared", "system"))
        return asked == "shared"
    with contextlib.suppress(OSError):  # Linux alone says; elsewhere disks count as their host's own
        return _kind(os.path.realpath(folder), _MOUNTS.read_text(errors="surrogateescape")) not in _LOCAL
    return False


def _kind(folder: str, mounts: str) -> str:
    """The file system that a folder lies on: that of the longest mount point above it, the last of equals."""
    best, kind = -1, ""
    for line in mounts.splitlines():
        mount, _, source = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), mount.split()[4])
        if len(point) >= best and (folder + "/").startswith(point.rstrip("/") + "/"):
            best, kind = len(point), source.split()[0]
    return kind


def lock_at(path: Path) -> "SystemLock | SharedLock":
    """A lock of all processes that ask for the same path, in a folder that is there; the caller acquires it.

    Raises OSError when nothing can be written there, InputError for another $BAGSSL_LOCKS than there is.
    """
    if not shared(path.parent):
        with tempfile.TemporaryFile(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent) as probe:
            if hold(probe):  # asked here: versions of filelock differ in what they make of a disk's answers
                return SystemLock(path)
    return SharedLock(path.with_name(f"{path.name}.shared"))  # not `path`: the system's lock leaves its file there


@contextlib.contextmanager
def guarding(folder: Path, lock: "SystemLock | SharedLock") -> Iterator[None]:
    """Until the end, when a lock that we hold is let go, nothing is written into a folder unless it is still ours."""
    guarded[folder] = lock
    try:
        yield
    finally:
        del guarded[folder]
        lock.release()


class SystemLock(FileLock):
    """The system's lock, with the attributes of a SharedLock; it does not tell whose it is, and cannot be lost."""

    holder, name, doubt = "", "", 0.0

    def ours(self) -> bool:
        """Whether we still hold it."""
        return True


class SharedLock:
    """A lock among hosts, in files that are named after `path`; to be used as filelock's.

    holder: of one that could not be acquired, who has it: ` (process 4711 on node7)`, or nothing. name: of ours, for
    what only we may write to, as we would go on to, stopped and waked, when we have lost the lock: `3f2a…-4711.`.
    """

    def __init__(self, path: Path):
        claim = _own_claim(path.parent)
        self._lock = (SoftFileLock if claim is None else StrictSoftFileLock)(path)
        self._claim, self._tried, self._failed = claim, -math.inf, 0
        self._seen: dict[Path, tuple[object, int]] = {}  # of the files of others: what they were, in how many looks
        self.holder, self.name = "", f"{host()}-{os.getpid()}."

    @property
    def doubt(self) -> float:
        """Seconds after which it is known whether a holder lives."""
        return 1.1 * (LOOKS + 2) * LOOK

    def acquire(self, timeout: float = -1) -> Self:
        """Hold it, at once or when it has become free. Raises Timeout after so many seconds, if they are not negative;
        InputError when its files are damaged.
        """
        end = math.inf if timeout < 0 else time.monotonic() + timeout
        while not self._taken():
            left = end - time.monotonic()
            if left <= 0:
                raise Timeout(self._lock.lock_file)
            time.sleep(min(LOOK, left))
        return self

    def _taken(self) -> bool:
        """One try, and if it is in vain one look at the holder's files; no more often than every LOOK seconds."""
        if time.monotonic() - self._tried < LOOK:
            return False
        try:
            self._lock.acquire(timeout=0)
        except (Timeout, FileNotFoundError):  # or we stood still in the middle of it, and count as dead
            self._failed = 0
        except SoftFileLockProtocolError as error:
            self._failed += 1
            if self._failed > LOOKS + 1:  # what could be removed has been
                raise InputError(f"{self._lock.lock_file} is no lock that can be taken ({error}): remove it") from error
        else:
            if self._begin():
                return True
            self._lock.release()
        self._look()
        self._tried = time.monotonic()
        return False

    def _begin(self) -> bool:
        """Find the file that stands for us, and keep it young; False when that is not clear."""
        self._file = Path(self._lock.lock_file)
        if self._claim:
            mine = [claim.name for claim in self._claims() if claim.state == "held" and claim.pid == os.getpid()]
            if len(mine) != 1:
                return False
            self._file = self._folder / mine[0]
        self._record, self._over, self._seen, self.holder = self._file.read_bytes(), threading.Event(), {}, ""
        threading.Thread(target=self._beat, args=[self._over], daemon=True, name="bagssl-lock").start()
        return True

    def _beat(self, over: threading.Event) -> None:
        while not over.wait(BEAT) and self.ours():
            pass

    def ours(self) -> bool:
        """Whether we still hold it: if so, our file is written again, as it was, which others see by its time."""
        try:
            with open(self._file, "r+b") as stream:  # it is never made anew
                if stream.read() != self._record:
                    return False
                stream.seek(0)
                stream.write(self._record)
        except OSError as error:  # of others, a full disk's perhaps, nothing follows
            return error.errno not in (errno.ENOENT, errno.ESTALE)
        return True

    def release(self) -> None:
        """Let others have it; also when they have taken it."""
        self._over.set()
        self._lock.release()

    def __enter__(self) -> Self:
        return self if self._lock.is_locked else self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    # ---- others' files

    @property
    def _folder(self) -> Path:
        return Path(f"{self._lock.lock_file}.filelock", "claims")

    def _claims(self) -> tuple[Claim, ...]:
        with contextlib.suppress(OSError):  # damaged, or gone meanwhile
            return self._lock.claims
        return ()

    def _look(self) -> None:
        """See who holds it, and remove the files of holders that are dead."""
        claims, seen = {claim.name: claim for claim in self._claims()} if self._claim else {}, {}
        for path in self._files():
            claim, now, (before, looks) = claims.get(path.name), _state(path), self._seen.get(path, (None, 0))
            looks = looks + 1 if now == before and now else 0
            seen[path] = now, looks
            if not claim or claim.state == "held":  # not one who is about to
                self.holder = _named(claim, now) or self.holder
            if (looks >= LOOKS or (claim and _gone(claim, self._claim))) and now == _state(path):
                path.unlink(missing_ok=True)
        self._seen = seen

    def _files(self) -> list[Path]:
        """What stands for holders. A strict lock's files have names that never come again; a soft one's can be removed
        just when another has taken its place, which that one notices as it would any loss.
        """
        if not self._claim:
            return [Path(self._lock.lock_file)]
        with contextlib.suppress(FileNotFoundError):
            return [path for path in self._folder.iterdir() if not path.name.startswith(".")]
        return []


def _state(path: Path) -> tuple[bytes, int, int] | None:
    """What a file holds, if that may be read, and since when; None when it is gone."""
    with contextlib.suppress(FileNotFoundError):
        try:
            with open(path, "rb") as stream:  # asks a network's server anew
                content, about = stream.read(1024), os.fstat(stream.fileno())
        except PermissionError:
            content, about = b"", path.lstat()
        return content, about.st_mtime_ns, about.st_ino
    return None


def _named(claim: Claim | None, state: tuple[bytes, int, int] | None) -> str:
    """` (process 4711 on node7)`: by a strict lock's claim, or what a soft one's file says."""
    if claim:
        words = [str(claim.pid), claim.hostname]
    else:
        words = state[0].decode("ascii", "replace").split()[:2] if state else []
    return f" (process {words[0]} on {words[1].partition('?')[0]})" if len(words) == 2 and words[0].isdigit() else ""


def _gone(claim: Claim, own: Claim) -> bool:
    """Whether a claim is that of a process of this host which has ended. Only what is certain counts."""
    boots = {(each.start or 0) >> 64 for each in (claim, own)}  # see filelock's `process_start_token`
    if claim.hostname != own.hostname or len(boots) > 1 or 0 in boots:
        return False
    try:
        os.kill(claim.pid, 0)
        with open(f"/proc/{claim.pid}/stat", "rb") as stream:  # a container may have nobody who buries its dead
            return stream.read().rpartition(b")")[2].split()[:1] == [b"Z"]
    except OSError as error:
        return error.errno == errno.ESRCH


def _own_claim(folder: Path) -> Claim | None:
    """How a strict lock names this process and its host; None where the disk lacks the links or modes that it needs."""
    disk = os.stat(folder).st_dev
    if disk not in _claims:
        with tempfile.TemporaryDirectory(prefix=f".{os.getpid()}.", suffix=".tmp", dir=folder) as scratch:
            lock = StrictSoftFileLock(Path(scratch, "lock"))
            try:
                with lock.acquire(timeout=0):
                    _claims[disk] = lock.claims[0]
            except OSError as error:
                if {getattr(each, "errno", None) for each in (error, error.__cause__)} & _SHORT:
                    raise
                _claims[disk] = None
    return _claims[disk]
