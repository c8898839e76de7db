"""What is in training is told from another process, and what is removed is what was meant, and of the store alone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time

import pytest

from bagssl import cli, data, locks, runs, tending
from bagssl.config import PretrainConfig
from bagssl.errors import InputError, Stopped
from bagssl.pretraining import pretrain

TINY = {"epochs": 2, "batch_size": 16, "size": 8, "width": 8, "views": 2, "projector_hidden": 16, "projector_dim": 8}
TRAIN = """
import sys
from bagssl import data, pretraining
from bagssl.config import PretrainConfig

step = pretraining.Learner.step
def halting(*words, steps=[]):
    steps.append(1)
    if len(steps) == 4:
        print("four", flush=True)
        sys.stdin.readline()
    return step(*words)
pretraining.Learner.step = halting
pretraining.pretrain(PretrainConfig(**eval(sys.argv[1])), data.subset(data.load("synthetic", "test"), 64),
                     progress=False, device="cpu", checkpoint_every=-1)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    images, root = data.subset(data.load("synthetic", "test"), 64), tmp_path_factory.mktemp("made")
    return [pretrain(PretrainConfig(**TINY, seed=seed), images, root, progress=False) for seed in (0, 1)]


@pytest.fixture
def store(made):
    """Two finished runs, the second last written forty days ago, and one that was not begun."""
    copies = [runs.Run(shutil.copytree(run.path, runs.runs_root() / run.path.name)) for run in made]
    for path in copies[1].path.rglob("*"):
        os.utime(path, (time.time() - 40 * 86_400,) * 2)
    config = PretrainConfig(**TINY, seed=2)
    return [*copies, runs.open_run(config.to_dict(), made[0].provenance["data"], config.label)]


@pytest.fixture
def training():
    """A process that trains seed 3, and stands in its fourth of eight steps."""
    with subprocess.Popen([sys.executable, "-c", TRAIN, repr({**TINY, "seed": 3})], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as process:  # fmt: skip
        assert process.stdout.readline() == "four\n"
        yield process
        process.stdin.close()
    assert process.returncode == 0


def names():
    return [run.path.name for run in runs.list_runs()]


def bytes_of(run):
    return sum(path.stat().st_size for path in run.path.rglob("*") if path.is_file())


# ---- watching


@pytest.mark.parametrize("locks", ["system", "shared"])
def test_a_training_elsewhere_is_told_by_its_last_checkpoint(locks, request, monkeypatch, capsys):
    monkeypatch.setenv("BAGSSL_LOCKS", locks)
    process = request.getfixturevalue("training")
    (run,) = runs.list_runs()
    for words in ([], [run.key]):
        assert cli.main(["runs", "watch", *words, "--once"]) == 0
        said = capsys.readouterr().out
        by = rf" by process {process.pid} on \S+" * (locks == "shared")
        assert re.fullmatch(rf"{run.path.name}: in training{by}, step 3 of 8 \(38%\), [\d,]+ crops/s, about to end, "
                            r"loss -?[\d.]+; at the last checkpoint, \d+ s ago\n", said), said  # fmt: skip
    config = {**run.config, "epochs": 2000}
    monkeypatch.setattr(runs.Run, "config", config)
    assert re.search(r"step 3 of 8,000 \(0%\), .* about \d+ ", "".join(tending.watch(run.key, once=True)))


def test_it_is_watched_until_it_ends(training, capsys):
    (run,) = runs.list_runs()
    told = tending.watch(run.key, every=0.01)
    assert "step 3 of 8" in next(told)
    training.stdin.write("\n")
    training.stdin.flush()
    assert list(told)[-1] == f"{run.path.name}: finished"
    assert list(tending.watch(once=True)) == ["no run is in training"]


def test_what_nobody_trains_is_not_said_to_be_in_training(store, capsys):
    assert cli.main(["runs", "watch", "--once"]) == 0
    assert capsys.readouterr().out == "no run is in training\n"
    assert list(tending.watch(store[2].key)) == [f"{store[2].path.name}: not in training, nothing saved"]
    with pytest.raises(Stopped):
        pretrain(PretrainConfig(**TINY, seed=4), data.subset(data.load("synthetic", "test"), 64), time_limit=0,
                 progress=False)  # fmt: skip
    (stopped,) = (run for run in runs.list_runs() if "seed4" in run.path.name)
    assert "saved at step 1; the next call goes on" in "".join(tending.watch(stopped.key))


def test_to_look_hinders_no_training(training):
    (run,) = runs.list_runs()
    assert tending.holder(run) == ""
    training.stdin.write("\n")
    training.stdin.flush()
    training.wait(60)
    assert tending.holder(run) is None
    with runs.locked(run, deadline=0):
        assert tending.holder(run) == ""


def test_without_fcntl_it_is_seen_as_well_who_holds_a_run(training, monkeypatch):
    monkeypatch.setattr(locks, "fcntl", None)
    monkeypatch.setattr(locks, "hold", lambda stream: True)
    (run,) = runs.list_runs()
    assert tending.holder(run) == ""
    training.kill()
    training.wait(60)
    training.returncode = 0  # as the fixture wants it
    assert tending.holder(run) is None


@pytest.mark.parametrize("seconds, said", [(0, "0 s"), (89, "89 s"), (91, "2 min"), (5500, "1 h 32 min"),
                                           (200_000, "2 d 8 h")])  # fmt: skip
def test_a_span_is_told_in_the_units_that_matter(seconds, said):
    assert tending.span(seconds) == said


# ---- removing


@pytest.mark.parametrize("words, gone", [
    (["{0}"], [0]), (["{0}", "{1}"], [0, 1]), (["--older-than", "30d"], [1]), (["--older-than", "6w"], []),
    (["--unfinished"], [2]), (["--unfinished", "--older-than", "1h"], []), (["{0}", "--older-than", "30d"], []),
    (["{1}", "{0}", "--older-than", "30d"], [1]), (["{0}", "--unfinished"], [])])  # fmt: skip
def test_what_all_choices_select_is_removed_and_only_when_that_is_said(store, words, gone, capsys):
    every, words = names(), [word.format(*(run.key for run in store)) for word in words]
    freed = sum(bytes_of(store[i]) for i in gone)
    for more in ([], ["--dry-run"]):
        assert cli.main(["runs", "remove", *words, *more]) == 0
        shown = capsys.readouterr().out
        assert [run.path.name in shown for run in store] == [i in gone for i in range(3)]
        assert names() == every and (f"{freed:,} bytes: nothing is removed yet" in shown) == bool(gone)
    assert cli.main(["runs", "remove", *words, "--yes"]) == 0
    assert set(every) - set(names()) == {store[i].path.name for i in gone}
    assert (f"removed {len(gone)}, {freed:,} bytes" in capsys.readouterr().out) == bool(gone)
    assert all(run.path.exists() == (run.path.name in names()) for run in store)
    for run in store[:2]:
        assert run.finished == run.path.exists()


def test_without_a_choice_or_with_a_wrong_one_nothing_is_removed(store, capsys):
    before = names()
    for words in ([], ["--yes"], ["--dry-run"], ["nothing", "--yes"], [store[0].key, "--yes", "--dry-run"],
                  [store[0].key, "nothing", "--yes"], ["--older-than", "soon", "--yes"],
                  ["--older-than", "0d", "--yes"]):  # fmt: skip
        assert cli.main(["runs", "remove", *words]) == 2, words
        assert capsys.readouterr().err.count("\n") == 1 and names() == before


@pytest.mark.parametrize("locks", ["system", "shared"])
def test_a_run_in_training_is_left(locks, monkeypatch, request, capsys):
    monkeypatch.setenv("BAGSSL_LOCKS", locks)
    request.getfixturevalue("training")
    other = request.getfixturevalue("store")[2]
    (run,) = (run for run in runs.list_runs() if "seed3" in run.path.name)
    assert cli.main(["runs", "remove", run.key, other.key, "--yes"]) == 2
    assert "held by another process" in capsys.readouterr().err and other.path.exists()
    assert cli.main(["runs", "remove", "--unfinished", "--yes"]) == 0
    assert f"{run.path.name} is held" in capsys.readouterr().err and run.path.exists() and not other.path.exists()
    if locks == "system":
        with pytest.raises(Stopped, match="still being trained"):
            tending.remove(run)
    assert runs.checkpoint(run)["step"] == 3


def test_nothing_goes_from_a_record(store, made, monkeypatch, capsys):
    record = made[0].path.parent
    monkeypatch.setenv("BAGSSL_RECORD", str(record))
    shutil.rmtree(store[0].path)
    assert cli.main(["runs", "remove", made[0].key, "--yes"]) == 2, "the record alone has it"
    store[0].path.symlink_to(made[0].path)
    assert cli.main(["runs", "remove", made[0].key, "--yes"]) == 2, "behind a link"
    assert cli.main(["runs", "remove", str(made[0].path), "--yes"]) == 2, "a folder is no name"
    store[0].path.unlink()
    (runs.runs_root().parent / "link").symlink_to(record)
    for root in (record, runs.runs_root().parent / "link"):
        monkeypatch.setenv("BAGSSL_RUNS", str(root))
        for words in ([made[0].key], ["--older-than", "1s"]):
            assert cli.main(["runs", "remove", *words, "--yes"]) == 2
            assert "record, from which nothing is removed" in capsys.readouterr().err
        with pytest.raises(InputError, match="record"):
            tending.remove(runs.Run(root / made[0].path.name))
    assert all(run.finished for run in made)


def test_a_removal_that_is_cut_short_leaves_no_finished_run(store, monkeypatch):
    monkeypatch.setattr(shutil, "rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        tending.remove(store[0])
    assert not store[0].finished and store[0].path.exists()
    monkeypatch.undo()
    assert tending.remove(store[0]) > 0 and not store[0].path.exists()
