"""What only POSIX has is asked for in no module that trains, measures or shows: tried where it is taken away."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bagssl import devices
from bagssl.errors import InputError

ROOT = Path(__file__).resolve().parents[1]

# Windows has none of these; its msvcrt locks bytes, here by the locks that this system has.
BARE = """
import fcntl, os, signal, sys, types
lockf, held = fcntl.lockf, fcntl.LOCK_EX | fcntl.LOCK_NB

def locking(handle, mode, count):
    assert mode == 2 and os.lseek(handle, 0, os.SEEK_CUR) > 2**30
    lockf(handle, held, count, 0, os.SEEK_CUR)

import bagssl.errors, torch, torch.distributed, lightly.models.modules.heads, filelock, tqdm  # their own business

TAKEN = (os, ["getuid", "geteuid", "getgid", "killpg", "setsid", "fork", "O_CLOEXEC", "sched_getaffinity", "uname"]), (
    signal, ["SIGALRM", "SIGKILL", "SIGUSR1", "SIGUSR2", "SIGSTOP", "SIGCONT", "setitimer", "pthread_sigmask"])
for module, names in TAKEN:
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
for name in ("fcntl", "pwd", "grp", "resource", "termios"):
    sys.modules[name] = None
sys.modules["msvcrt"] = types.SimpleNamespace(locking=locking, LK_NBLCK=2)
"""
TRAIN = """
import tempfile
from bagssl import bags, data, locks, overview, paths, runs, user
from bagssl.config import PretrainConfig
from bagssl.pretraining import load_encoder, pretrain
paths._WINDOWS = True
assert locks.fcntl is None
train = data.subset(data.load("synthetic", "train"), 40)
config = PretrainConfig(objective="simclr", width=8, size=8, batch_size=8, views=2, epochs=1)
run = pretrain(config, train, progress=False)
assert run.finished and pretrain(config, train, progress=False).path == run.path
bag = bags.embed_bags(load_encoder(run), train.pixels, [0, 2], scale=0.3, size=8)
assert bag[2].shape == (40, 64)
runs.list_runs()
print("trained")
"""

def said(script: str, folder: Path) -> str:
    environment = {**os.environ, "BAGSSL_RUNS": str(folder), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


@pytest.mark.skipif(sys.platform == "win32", reason="takes away what POSIX has")
def test_without_what_only_posix_has_one_trains_embeds_and_finds_runs(tmp_path):
    assert said(BARE + TRAIN, tmp_path) == "trained"
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.skipif(sys.platform == "win32", reason="takes away what POSIX has")
def test_what_is_taken_away_is_missed(tmp_path):
    with pytest.raises(AssertionError, match="fcntl"):
        said(BARE + "import fcntl", tmp_path)
    with pytest.raises(AssertionError, match="SIGALRM"):
        said(BARE + "signal.SIGALRM", tmp_path)


def test_the_reader_may_name_the_device_and_one_that_is_not_here_is_one_line(monkeypatch):
    monkeypatch.delenv("BAGSSL_DEVICE", raising=False)
    here = "cuda" if torch.cuda.is_available() else "cpu"
    assert (devices.pick_device("auto"), devices.pick_device("cuda:1")) == (here, "cuda:1")
    monkeypatch.setenv("BAGSSL_DEVICE", "cpu")
    assert devices.pick_device("auto") == "cpu"
    monkeypatch.setenv("BAGSSL_DEVICE", "mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"^BAGSSL_DEVICE = mps: torch [\w.+]+ finds no such device here$"):
        devices.pick_device("auto")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert devices.pick_device("auto") == "mps"
    assert devices.pick_precision("auto", torch.device("mps")) == torch.float32
    monkeypatch.setenv("BAGSSL_DEVICE", "tpu")
    with pytest.raises(InputError, match="tpu"):
        devices.pick_device("auto")
