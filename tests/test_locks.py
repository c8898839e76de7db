"""Where a disk knows no locks, soft ones do: nobody trains twice, nobody waits for the dead or without a word."""

from __future__ import annotations

import errno
import fcntl
import subprocess
import sys

import pytest
from filelock import FileLock, SoftFileLock, Timeout
from test_experiments import write_notebook
from test_paths import write_notebooks
from test_runs import HOLD, ROOT, same, train

from bagssl import locks, runs
from bagssl.batch import kernels, reproduce, stages
from bagssl.batch.experiments import load_experiments
from bagssl.errors import Stopped

# NFS without lockd; 9p and some FUSE; Lustre without -o flock; others again
ANSWERS = [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EIO, errno.EPERM]
WITHOUT = f"""import fcntl
def flock(*_): raise OSError({errno.ENOLCK}, "No locks available")
fcntl.flock = flock
"""


@pytest.fixture(params=ANSWERS, ids=[errno.errorcode[number] for number in ANSWERS])
def no_locks(request, monkeypatch):
    """A disk whose `flock` gives this answer."""
    def flock(*_):
        raise OSError(request.param, "no locks here")

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(locks, "_told", set())


def test_a_run_is_trained_where_the_disk_knows_no_locks_and_that_is_said_once(no_locks, tmp_path, capsys):
    runs_ = [train(tmp_path), trained_again(tmp_path)]
    assert runs_[0].finished and same(runs_[0].weights(), runs_[1].weights())
    said = capsys.readouterr().err
    assert said.count("knows no locks") == 1 and str(tmp_path) in said
    assert not list(tmp_path.rglob("*.soft")) and not list(tmp_path.rglob("*.tmp"))


def trained_again(root):
    run, = runs.list_runs(root)
    (run.path / "metrics.json").unlink()
    return train(root)


def test_a_soft_lock_is_held_by_one_at_a_time(no_locks, tmp_path):
    first, second = (locks.lock_at(tmp_path / ".lock") for _ in range(2))
    with first, pytest.raises(Timeout):
        second.acquire(timeout=0.1)
    with second:
        pass
    assert not list(tmp_path.iterdir())


def test_where_the_disk_knows_locks_they_are_the_systems_and_nothing_is_said(tmp_path, capsys):
    """Negative control; a lock that another holds is no disk without locks."""
    assert isinstance(locks.lock_at(tmp_path / ".lock"), FileLock)
    assert not isinstance(locks.lock_at(tmp_path / ".lock"), SoftFileLock)
    with open(tmp_path / "file", "w") as one, open(tmp_path / "file") as other:
        assert locks.hold(one) is True and locks.hold(other) is False
    assert capsys.readouterr() == ("", "") and locks.remedy(locks.lock_at(tmp_path / ".lock")) == ""


def test_the_file_that_a_systems_lock_left_is_no_soft_lock(no_locks, tmp_path):
    """A folder of runs that was copied with its hidden files."""
    (tmp_path / ".lock").touch()
    with locks.lock_at(tmp_path / ".lock").acquire(timeout=1):
        pass


def test_a_soft_lock_is_waited_for_its_file_is_named_and_its_holders_death_frees_it(tmp_path, monkeypatch):
    holder = subprocess.Popen([sys.executable, "-c", WITHOUT + HOLD, str(tmp_path)], cwd=ROOT, text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    assert holder.stdout.readline() == "held\n"
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "none")))
    soft = tmp_path / ".lock.soft"
    with pytest.raises(Stopped, match=f"if none does, remove {soft}"), runs.locked(runs.Run(tmp_path), deadline=0):
        pass
    holder.kill()
    holder.communicate()
    assert soft.exists()  # as it is left behind
    with runs.locked(runs.Run(tmp_path)):
        assert soft.exists()
    assert not soft.exists()


def test_a_stage_is_executed_where_the_disk_knows_no_locks(no_locks, tmp_path, monkeypatch, capsys):
    write_notebooks(tmp_path / "notebooks")

    def executed(self, path, target, *_):
        write_notebook(target, ["1"])
        target.with_name("log.txt").touch()
        return {}

    monkeypatch.setattr(kernels.Kernels, "run", executed)
    settings = {"notebooks": tmp_path / "notebooks", "results": tmp_path}
    stage = stages.plan(load_experiments(tmp_path / "notebooks")["good"], "smoke", results=tmp_path)
    stage.folder.parent.mkdir(parents=True)
    held = SoftFileLock(f"{stage.beside('lock')}.soft", thread_local=False)
    held.acquire()
    say = kernels.Board.say

    def released(board, text, **options):
        say(board, text, **options)
        if "waiting" in text:
            held.release()

    monkeypatch.setattr(kernels.Board, "say", released)
    reproduce.reproduce(["good"], **settings)
    out = capsys.readouterr().out
    assert "knows no locks" in out and f"(if none does, remove {held.lock_file})" in out and "good: done in" in out
    assert stages.state(stage) == "fresh" and not list(tmp_path.rglob("*.soft"))
