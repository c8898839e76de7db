"""Where `flock` holds on one host alone, or not at all, files stand for locks: nobody trains twice, nobody waits for
the dead or without a word, and who lost a lock writes nothing.

The second host is a process of this machine with another name, whose `flock` is the system's other kind of lock: the
two kinds do not know of each other, as those of two hosts do not.
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock, Timeout
from test_experiments import write_notebook
from test_paths import refuse, refusing, write_notebooks
from test_runs import HOLD, ROOT, same, train

from bagssl import locks, paths, runs, shards
from bagssl.batch import kernels, reproduce, stages
from bagssl.batch.experiments import load_experiments
from bagssl.errors import InputError, Stopped

# NFS without lockd; 9p and some FUSE; Lustre without -o flock; others again
ANSWERS = [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EIO, errno.EPERM]
BEAT, LOOK, LOOKS = 0.1, 0.05, 40
DEAD = LOOK * LOOKS  # seconds after which a heart that does not beat has stopped
QUICK = f"from bagssl import locks\nlocks.BEAT, locks.LOOK, locks.LOOKS = {BEAT}, {LOOK}, {LOOKS}\n"
SECOND = """
import fcntl, socket
fcntl.flock, socket.gethostname = fcntl.lockf, lambda: "node2"
"""
TRAIN = """
import sys
from pathlib import Path
import torch
from bagssl import data, pretraining
from bagssl.config import PretrainConfig
from bagssl.errors import Stopped

train, step = pretraining.train, pretraining.Learner.step

def told(*words, **options):
    print("trains", flush=True)
    if "wait" in sys.argv:
        sys.stdin.readline()
    train(*words, **options)

def halting(*words, steps=[]):
    steps.append(0)
    if "halt" in sys.argv and len(steps) == 5:
        sys.stdin.readline()
    return step(*words)

pretraining.train, pretraining.Learner.step = told, halting
pixels = torch.arange(16 * 3 * 8 * 8).view(16, 3, 8, 8).mul(37).byte()
images = data.Images(pixels, torch.arange(16) % 2, ("a", "b"))
config = PretrainConfig(width=8, size=8, batch_size=16, views=2, projector_hidden=16, projector_dim=8, epochs=30,
                        optimiser="sgd")
try:
    pretraining.pretrain(config, images, Path(sys.argv[1]), progress=False, device="cpu", checkpoint_every=-1)
except Stopped as stop:
    sys.exit(f"stopped: {stop}")
"""


def process(code: str, *words: object, **settings: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code, *map(str, words)], cwd=ROOT, text=True, stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **settings})  # fmt: skip


def ended(child: subprocess.Popen) -> tuple[str, str]:
    """What it says on both streams until it ends."""
    out, error = child.communicate("\n", timeout=120)
    return out, error


def once_it_says(child: subprocess.Popen, word: str, stream: str = "stdout") -> str:
    line = getattr(child, stream).readline()
    assert word in line, line + child.stderr.read() * (not line)
    return line


@pytest.fixture(params=ANSWERS, ids=[errno.errorcode[number] for number in ANSWERS])
def no_locks(request, monkeypatch):
    """A disk whose `flock` gives this answer."""
    monkeypatch.setattr(fcntl, "flock", refusing(request.param)(None))


@pytest.fixture
def shared(monkeypatch):
    """A disk that other hosts have too, for us and for the processes that we start; its hearts beat fast."""
    monkeypatch.setenv("BAGSSL_LOCKS", "shared")
    quick(monkeypatch)


def quick(monkeypatch):
    for name, value in (("BEAT", BEAT), ("LOOK", LOOK), ("LOOKS", LOOKS)):
        monkeypatch.setattr(locks, name, value)


@pytest.fixture(params=["links", "no links", "no modes"])
def disk(request, shared, monkeypatch):
    """One that has what filelock's strict lock needs, or lacks some of it."""
    monkeypatch.setattr(locks, "_claims", {})
    if request.param != "links":
        refuse(monkeypatch, errno.EPERM, *{"no links": ["link"], "no modes": ["fchmod", "chmod"]}[request.param])


# Which lock it is


MOUNTS = """22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
31 27 0:40 / /home rw - autofs systemd-1 rw
32 31 0:41 / /home/ann rw - nfs4 server:/home rw,vers=4.2
33 27 0:42 / /mnt/my\\040disk rw - lustre mgs@tcp:/scratch rw
34 27 0:43 / /over rw - xfs /dev/sdb rw
35 27 0:44 / /over rw - fuse.sshfs host: rw
"""
KINDS = {"/": "ext4", "/tmp/a": "ext4", "/home/annabel/runs": "autofs", "/home/ann": "nfs4", "/home/ann/runs": "nfs4",
         "/mnt/my disk/runs": "lustre", "/mnt/my": "ext4", "/over/x": "fuse.sshfs"}  # fmt: skip


@pytest.mark.parametrize("folder", KINDS)
def test_the_kind_of_a_disk_is_that_of_the_mount_nearest_above(folder, tmp_path, monkeypatch):
    (tmp_path / "mountinfo").write_text(MOUNTS)
    monkeypatch.setattr(locks, "_MOUNTS", tmp_path / "mountinfo")
    assert locks._kind(folder, MOUNTS) == KINDS[folder]
    assert locks.shared(Path(folder)) == (KINDS[folder] != "ext4")


def test_a_disk_of_this_hosts_own_has_the_systems_locks_and_nothing_beside_them(tmp_path, monkeypatch, capsys):
    """Negative control; a lock that another holds is no disk without locks."""
    threads = threading.active_count()
    with locks.lock_at(tmp_path / ".lock") as lock:
        assert isinstance(lock, FileLock) and lock.ours() and not locks.lock_at(tmp_path / ".lock").holder
        assert threading.active_count() == threads and [path.name for path in tmp_path.iterdir()] == [".lock"]
    with open(tmp_path / "file", "w") as one, open(tmp_path / "file") as other:
        assert locks.hold(one) is True and locks.hold(other) is False
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(locks, "_MOUNTS", tmp_path / "a system that does not say")
    assert not locks.shared(tmp_path)


def test_the_reader_may_say_which_it_is(tmp_path, monkeypatch):
    for word, kind in (("shared", locks.SharedLock), ("system", locks.SystemLock)):
        monkeypatch.setenv("BAGSSL_LOCKS", word)
        assert isinstance(locks.lock_at(tmp_path / ".lock"), kind)
    monkeypatch.setattr(fcntl, "flock", refusing(errno.ENOLCK)(None))
    assert isinstance(locks.lock_at(tmp_path / ".lock"), locks.SharedLock)  # there is no other
    monkeypatch.setenv("BAGSSL_LOCKS", "share")
    with pytest.raises(InputError, match="unknown BAGSSL_LOCKS 'share'; did you mean 'shared'"):
        train(tmp_path)


# Where the disk knows none


def test_a_run_is_trained_where_the_disk_knows_no_locks(no_locks, tmp_path, capsys):
    runs_ = [train(tmp_path), trained_again(tmp_path)]
    assert runs_[0].finished and same(runs_[0].weights(), runs_[1].weights())
    assert capsys.readouterr().err == "" and not [*tmp_path.rglob("*.claim"), *tmp_path.rglob("*.tmp")]


def trained_again(root):
    run, = runs.list_runs(root)
    (run.path / "metrics.json").unlink()
    return train(root)


def test_the_file_that_a_systems_lock_left_is_no_soft_lock(no_locks, tmp_path):
    """A folder of runs that was copied with its hidden files."""
    (tmp_path / ".lock").touch()
    with locks.lock_at(tmp_path / ".lock").acquire(timeout=1):
        pass


def test_a_stage_is_executed_where_the_disk_knows_no_locks(no_locks, tmp_path, monkeypatch, capsys):
    quick(monkeypatch)
    stage, settings = a_stage(tmp_path, monkeypatch)
    held = locks.lock_at(stage.beside("lock")).acquire()
    say = kernels.Board.say

    def released(board, text, **options):
        say(board, text, **options)
        if "waiting" in text:
            (claim,) = stage.folder.parent.rglob("held*.claim")  # released by another thread
            claim.rename(tmp_path / "claim"), (claim.with_name("intent" + claim.name.removeprefix("held"))).unlink()

    monkeypatch.setattr(kernels.Board, "say", released)
    reproduce.reproduce(["good"], **settings)
    out = capsys.readouterr().out
    assert f"another process (process {os.getpid()} on" in out and "good: done in" in out
    assert stages.state(stage) == "fresh" and not held.ours()
    held.release()


def a_stage(folder, monkeypatch):
    write_notebooks(folder / "notebooks")
    monkeypatch.setattr(kernels.Kernels, "run", executed)
    stage = stages.plan(load_experiments(folder / "notebooks")["good"], "smoke", results=folder)
    stage.folder.parent.mkdir(parents=True)
    return stage, {"notebooks": folder / "notebooks", "results": folder}


def executed(self, path, target, *_):
    write_notebook(target, ["1"])
    target.with_name("log.txt").touch()
    return {}


# Where there may be other hosts


def test_a_shared_lock_is_held_by_one_at_a_time_and_leaves_no_claim(disk, tmp_path):
    first, second = (locks.lock_at(tmp_path / ".lock") for _ in range(2))
    with first.acquire(), pytest.raises(Timeout):
        assert first.ours() and first.ours()
        second.acquire(timeout=2 * DEAD)  # as its heart beats
    assert f" (process {os.getpid()} on " in second.holder
    with second.acquire(timeout=1):
        pass
    assert {path.name for path in tmp_path.rglob("*")} <= {".lock.shared", ".lock.shared.filelock", "claims"}


def test_a_heart_that_has_stopped_frees_the_lock_and_its_holder_knows(disk, tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 1000.0)
    first, second = (locks.lock_at(tmp_path / ".lock") for _ in range(2))
    first.acquire()
    begun = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(locks.socket, "gethostname", lambda: "node2")
        second.acquire(timeout=10 * DEAD)
    with second:
        assert DEAD <= time.monotonic() - begun and not first.ours() and second.ours()
        first.release()  # which takes nothing from the second
        third = locks.lock_at(tmp_path / ".lock")
        with pytest.raises(Timeout):
            third.acquire(timeout=0)
        assert second.ours()


def test_what_stands_still_itself_breaks_no_lock(disk, tmp_path, monkeypatch):
    """A waiter that was stopped, or a server that answered nobody for an hour: few looks, however late they are."""
    monkeypatch.setattr(locks, "BEAT", 1000.0)
    holder, waiter = (locks.lock_at(tmp_path / ".lock") for _ in range(2))
    holder.acquire()
    hours = iter(range(10**6))
    monkeypatch.setattr(locks, "time", SimpleNamespace(monotonic=lambda: 3600.0 * next(hours), sleep=lambda _: None))
    for _ in range(LOOKS):
        time.sleep(0.01)  # or the disk gives two beats one time
        assert not waiter._taken() and holder.ours()  # which is a beat
    for _ in range(LOOKS):
        assert not waiter._taken()
    assert not waiter._taken() and waiter._taken()  # negative control: as many looks without a beat break it
    waiter.release()


def test_who_breaks_late_breaks_nothing_that_is_new(disk, tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 1000.0)
    monkeypatch.setattr(locks, "LOOK", 0.0)
    dead, quick, late = (locks.lock_at(tmp_path / ".lock") for _ in range(3))
    dead.acquire()
    for _ in range(LOOKS):
        assert not late._taken()  # one look more, and it would break it
    quick.acquire(timeout=60)
    for _ in range(LOOKS):
        assert not late._taken()
    assert quick.ours()
    quick.release()


@pytest.mark.parametrize("buried", [True, False])
def test_a_holder_of_this_host_that_died_is_not_waited_for(buried, tmp_path, monkeypatch):
    """With the usual patience; its files are still there."""
    monkeypatch.setenv("BAGSSL_LOCKS", "shared")
    holder = process(HOLD, tmp_path)
    once_it_says(holder, "held")
    monkeypatch.setattr(locks, "LOOK", 0.05)
    with pytest.raises(Timeout):
        locks.lock_at(tmp_path / ".lock").acquire(timeout=0.5)
    holder.kill()
    if buried:
        holder.wait()
    assert len(list(tmp_path.rglob("*.claim"))) == 2
    with runs.locked(runs.Run(tmp_path), time.monotonic() + 10):
        assert len(list(tmp_path.rglob("*.claim"))) == 2
    holder.communicate()


def test_only_what_is_certain_counts_as_the_death_of_a_neighbour():
    boot, gone, other = 7 << 64, 2**22 + 1, "node7?pidns-f0000001"
    here = SimpleNamespace(hostname="node7", start=boot + 5, pid=os.getpid())
    for hostname, start, pid, dead in [("node7", boot + 9, gone, True), ("node8", boot + 9, gone, False),
                                       (other, boot + 9, gone, False), ("node7", (8 << 64) + 9, gone, False),
                                       ("node7", None, gone, False), ("node7", 9, gone, False),
                                       ("node7", boot + 9, os.getpid(), False)]:  # fmt: skip
        assert locks._gone(SimpleNamespace(hostname=hostname, start=start, pid=pid), here) is dead


def test_a_claim_that_a_power_failure_cut_is_removed_and_other_damage_is_one_line(shared, tmp_path, monkeypatch):
    lock = locks.lock_at(tmp_path / ".lock")
    lock.acquire().release()
    (tmp_path / ".lock.shared.filelock/claims" / f"held-v1-{'0' * 32}.claim").touch()
    with lock.acquire(timeout=10 * DEAD):
        pass
    damaged = locks.SoftFileLockProtocolError(str(tmp_path / ".lock.shared"), None, "it is a directory")
    monkeypatch.setattr(locks.StrictSoftFileLock, "acquire", lambda *_, **__: (_ for _ in ()).throw(damaged))
    with pytest.raises(InputError, match=r"lock.shared is no lock that can be taken \(.* a directory.*\): remove it"):
        lock.acquire(timeout=60)


def test_a_disk_that_is_full_or_fails_is_no_loss_of_the_lock(shared, tmp_path, monkeypatch):
    with locks.lock_at(tmp_path / ".lock").acquire() as lock:
        for number in (errno.ENOSPC, errno.EIO, errno.EDQUOT):
            with monkeypatch.context() as patch:
                patch.setattr("builtins.open", refusing(number)(None))
                assert lock.ours()
        with monkeypatch.context() as patch:  # negative control: the handle of a file that the server has no more
            patch.setattr("builtins.open", refusing(errno.ESTALE)(None))
            assert not lock.ours()
    monkeypatch.setattr(locks, "_claims", {})
    refuse(monkeypatch, errno.ENOSPC, "link")
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):  # never another kind of lock than other hosts take
        locks.lock_at(tmp_path / ".lock")


# Two hosts


@pytest.mark.parametrize("kind, trainings", [("shared", 1), ("system", 2)], ids=["shared", "control"])
def test_two_hosts_train_one_run_once(kind, trainings, tmp_path):
    """Negative control: by the system's locks, which are local to their hosts, it is trained by both."""
    settings = {"BAGSSL_LOCKS": kind}
    first = process(QUICK + TRAIN, tmp_path, "wait", **settings)
    once_it_says(first, "trains")
    second = process(SECOND + QUICK + TRAIN, tmp_path, **settings)
    if kind == "shared":
        line = once_it_says(second, "is being trained by another process", "stderr")
        assert f"(process {first.pid} on {os.uname().nodename}): waiting for it" in line
        time.sleep(2 * DEAD)
        assert second.poll() is None  # it waits longer than for the dead
    else:
        once_it_says(second, "trains")
        assert not second.wait(120)
    said = [ended(child)[0] for child in (first, second)]
    assert [child.returncode for child in (first, second)] == [0, 0]
    assert 1 + (kind == "system") + "".join(said).count("trains") == trainings
    (run,) = runs.list_runs(tmp_path)
    run.check()
    assert run.finished and not list(run.path.rglob("*.claim"))


@pytest.fixture
def begun(tmp_path, shared):
    """A training of the second host, some of whose steps are saved."""
    child = process(SECOND + QUICK + TRAIN, tmp_path, "halt")
    once_it_says(child, "trains")
    until = time.monotonic() + 60
    while not list(tmp_path.glob("*/checkpoint.pt")) and time.monotonic() < until:
        time.sleep(0.01)
    yield child
    child.kill()
    child.communicate()


def test_the_lock_of_a_dead_holder_is_broken_when_its_heart_has_stopped(begun, tmp_path):
    begun.kill()
    begun.wait()
    other = process(QUICK + TRAIN, tmp_path)
    line = once_it_says(other, "is being trained by another process", "stderr")
    said = time.monotonic()
    assert f"(process {begun.pid} on node2)" in line
    once_it_says(other, "trains")
    assert time.monotonic() - said > 0.9 * DEAD
    ended(other)
    (run,) = runs.list_runs(tmp_path)
    straight = process(QUICK + TRAIN, tmp_path / "straight")
    ended(straight)
    assert run.finished and same(run.weights(), runs.list_runs(tmp_path / "straight")[0].weights())


@pytest.mark.parametrize("wary", [True, False], ids=["", "control"])
def test_a_holder_that_was_stopped_and_goes_on_writes_nothing_more(wary, tmp_path, shared):
    """Negative control: one that does not look whether the lock is still its own writes over what others have made."""
    unwary = "" if wary else "from bagssl import paths\npaths.guarded = {}\n"
    stopped = process(SECOND + QUICK + unwary + TRAIN, tmp_path, "halt")
    once_it_says(stopped, "trains")
    while not list(tmp_path.glob("*/checkpoint.pt")):
        time.sleep(0.01)
    stopped.send_signal(signal.SIGSTOP)
    other = process(QUICK + TRAIN, tmp_path)
    assert "trains" in ended(other)[0] and other.returncode == 0
    (run,) = runs.list_runs(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in run.path.glob("[!.]*.*")}
    stopped.send_signal(signal.SIGCONT)
    error = ended(stopped)[1]
    after = {path: path.stat().st_mtime_ns for path in run.path.glob("[!.]*.*")}
    assert (after == before) == wary and run.finished
    if wary:
        assert stopped.returncode == 1 and len(error.splitlines()) == 1
        assert "stopped: " in error and "was given to another process" in error


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*") if path.is_file()}


def test_a_lock_is_looked_at_before_every_file_of_a_run(shared, tmp_path):
    run = train(tmp_path)
    before = contents(run.path)
    with runs.locked(run):
        runs.save_checkpoint(run, {"step": 1})
        for claim in run.path.rglob("*.claim"):
            claim.unlink()
        for write in (lambda: runs.save_checkpoint(run, {"step": 2}), lambda: runs.finish(run, {}, [], {}, {}),
                      lambda: runs.write_json(run.path / "metrics.json", {})):  # fmt: skip
            with pytest.raises(Stopped, match="was given to another process"):
                write()
        assert runs.load_checkpoint(run, "cpu") == {"step": 1}
    runs.drop_checkpoint(run)
    assert contents(run.path) == before
    a_file(run.path)  # negative control: nobody holds it


def test_a_stage_whose_lock_was_broken_leaves_the_others_results(shared, tmp_path, monkeypatch, capsys):
    stage, settings = a_stage(tmp_path, monkeypatch)
    seen = []

    def overtaken(self, path, target, *_):
        seen.append(target.parent)
        if len(seen) == 1:
            for claim in stage.folder.parent.rglob("*.claim"):
                claim.unlink()
            monkeypatch.setattr(locks.socket, "gethostname", lambda: "node2")
            assert reproduce._run_stage(stage, False, math.inf, kernels.Kernels(), print).code == 0
            assert not target.parent.exists()
            target.parent.mkdir()  # as a figure that is still being drawn would
        return executed(self, path, target)

    monkeypatch.setattr(kernels.Kernels, "run", overtaken)
    assert reproduce.reproduce(["good"], **settings) == 3
    assert "was given to another process" in capsys.readouterr().out and stages.state(stage) == "fresh"
    assert seen[0] != seen[1] and not list(tmp_path.rglob("*partial"))


def test_two_hosts_do_not_import_one_dataset_at_once(shared, tmp_path):
    held = "with shards._alone(Path(sys.argv[1]), 'pets'):\n    print('held', flush=True)\n    sys.stdin.readline()\n"
    other = process(f"import sys\nfrom pathlib import Path\n{SECOND}{QUICK}from bagssl import shards\n{held}", tmp_path)
    once_it_says(other, "held")
    who = rf"another process is adding pets \(process {other.pid} on node2\)"
    with pytest.raises(InputError, match=f"{who}: wait for it"), shards._alone(tmp_path, "pets"):
        pass
    other.kill()
    other.communicate()
    with shards._alone(tmp_path, "pets"):  # which looks for as long as it takes
        assert tmp_path in paths.guarded
    assert not paths.guarded
    (tmp_path / "pets").mkdir()
    shards.drop("pets", tmp_path)


def a_file(folder):
    with paths.write_atomically(folder / "b.txt") as path:
        path.touch()


WRITE = """
import sys
from pathlib import Path
from bagssl.paths import write_atomically
with write_atomically(Path(sys.argv[1])) as path:
    path.write_text("whole")
    print(path, flush=True)
    sys.stdin.readline()
"""


def test_what_another_hosts_writer_has_begun_stays_for_a_day(tmp_path, monkeypatch):
    """Negative control: the same writer under this host's name, as one whose `flock` we cannot see, is swept."""
    for other in (True, False):
        named = SECOND if other else SECOND.replace(', lambda: "node2"', ", socket.gethostname")
        writer = process(named + WRITE, tmp_path / "a.txt")
        begun = Path(once_it_says(writer, ".a.txt.").strip())
        a_file(tmp_path)
        assert begun.exists() == other
        error = ended(writer)[1]
        assert (writer.returncode == 0) == other, error
    writer = process(SECOND + WRITE, tmp_path / "a.txt")
    begun = Path(once_it_says(writer, ".a.txt.").strip())
    writer.kill()
    writer.communicate()
    for age, there in ((80_000, True), (87_000, False)):
        os.utime(begun, (time.time() - age,) * 2)
        a_file(tmp_path)
        assert begun.exists() == there


def test_what_an_older_version_has_begun_is_another_hosts_where_there_are_others(tmp_path, monkeypatch):
    """Its names do not say whose they are."""
    for kind, left in (("shared", True), ("system", False)):
        monkeypatch.setenv("BAGSSL_LOCKS", kind)
        (tmp_path / ".a.txt.0123abcd.tmp").touch()
        a_file(tmp_path)
        assert (tmp_path / ".a.txt.0123abcd.tmp").exists() == left


def test_what_this_host_has_left_goes_at_once_on_any_disk(shared, tmp_path):
    writer = process(WRITE, tmp_path / "a.txt")
    begun = Path(once_it_says(writer, ".a.txt.").strip())
    a_file(tmp_path)
    assert begun.exists()
    writer.kill()
    writer.communicate()
    a_file(tmp_path)
    assert not begun.exists()


# Two nodes: name spaces in which one folder is mounted twice, by a file system that keeps `flock` to itself


class Node:
    """A node called `name` that has `disk` at `place`; all that runs there ends with the command that was started."""

    def __init__(self, name: str, disk: Path, place: Path):
        self.words = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c",
                      'hostname "$0" && bindfs -o attr_timeout=0,entry_timeout=0 "$1" "$2" && shift 2 && exec "$@"',
                      name, str(disk), str(place), sys.executable, "-c"]  # fmt: skip

    def start(self, code: str, *words: object) -> subprocess.Popen:
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        return subprocess.Popen([*self.words, code, *map(str, words)], cwd=ROOT, text=True, **streams)


FLOCK = """
import fcntl, sys
with open(sys.argv[1], "a") as stream:
    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def nodes(tmp_path):
    if not (shutil.which("unshare") and shutil.which("bindfs")):
        pytest.skip("needs unshare and bindfs")
    for name in ("disk", "place"):
        (tmp_path / name).mkdir()
    nodes = [Node(name, tmp_path / "disk", tmp_path / "place") for name in ("node1", "node2")]
    first = nodes[0].start(FLOCK, tmp_path / "place/file")
    if first.stdout.readline() != "held\n":
        pytest.skip(f"no name spaces here: {first.communicate()[1]}")
    second = nodes[1].start(FLOCK, tmp_path / "place/file")
    once_it_says(second, "held")  # negative control: the flock of one is not that of the other
    for each in (first, second):
        ended(each)
    return nodes


def test_two_nodes_with_one_disk_train_one_run_once_also_when_one_dies(nodes, tmp_path):
    """Nothing tells them that the disk is shared but its kind."""
    place, disk = tmp_path / "place", tmp_path / "disk"
    first = nodes[0].start(QUICK + TRAIN, place, "halt")
    once_it_says(first, "trains")
    while not list(disk.glob("*/checkpoint.pt")):
        time.sleep(0.01)
    second = nodes[1].start(QUICK + TRAIN, place, "wait")
    assert " on node1): waiting for it" in once_it_says(second, "is being trained by another process", "stderr")
    first.kill()  # the node, with all that it runs
    first.communicate()
    once_it_says(second, "trains")
    third = nodes[0].start(QUICK + TRAIN, place)
    assert " on node2): waiting for it" in once_it_says(third, "is being trained by another process", "stderr")
    assert [ended(each)[0] for each in (second, third)] == ["", ""]
    (run,) = runs.list_runs(disk)
    run.check()
    assert run.finished and not [*disk.rglob("*.claim"), *disk.rglob("*.safetensors.*.tmp")]
    left = list(disk.rglob(".*.tmp"))  # of the node that is dead: for a day
    assert all(re.fullmatch(r"\.\w+\.\w+\.[0-9a-f]{8}-[0-9a-f]{8}\.tmp", path.name) for path in left) and len(left) < 2


def test_a_writer_on_one_node_is_not_swept_by_another(nodes, tmp_path):
    writer = nodes[0].start(WRITE, tmp_path / "place/a.txt")
    begun = Path(once_it_says(writer, ".a.txt.").strip()).name
    other = nodes[1].start(WRITE, tmp_path / "place/a.txt")
    assert once_it_says(other, ".a.txt.").strip() != begun
    assert (tmp_path / "disk" / begun).exists()
    ended(other), ended(writer)
    assert writer.returncode == 0 and {path.name for path in (tmp_path / "disk").iterdir()} == {"a.txt", "file"}
