"""What watches a training changes nothing of it, tells all of it, and says in one line what it lacks."""

import csv
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from test_pretraining import TINY, same_weights, train

from bagssl import cli, hub, online, packing, paths, pretraining, probes, records, watching
from bagssl.data import load
from bagssl.errors import InputError, Stopped
from bagssl.pretraining import load_encoder
from bagssl.runs import Run

CURVES = ("learning_rate", "crops_per_second", "loss", "similarity", "coding_rate", "spread")
MEASURES = ("knn", "effective_rank")


@pytest.fixture(scope="module")
def images():
    return load("synthetic", "train").take(torch.arange(0, 3920, 49))  # 80 images: 5 steps an epoch


def interrupted(images, root, **how):
    """The run, ended after the fifth row, when the fourth was the last with a checkpoint; again ten later; then whole.
    """
    for rows, every in ((4, 0), (9, 1e9)):
        left = iter([None] * rows)

        def agreed(reason, left=left):
            if next(left, True):
                raise Stopped("killed, and no checkpoint written")
            return reason

        with pytest.raises(Stopped), pytest.MonkeyPatch.context() as patch:
            patch.setattr(pretraining.distributed, "agreed", agreed)
            train(images, root, checkpoint_every=every, **how)
    return train(images, root, **how)


def told(run):
    """By curve, its points (crops, value): the history, and what was measured."""
    found = {name: [(row["crops"], row[name]) for row in run.history] for name in CURVES}
    return found | {name: [(row["crops"], row[name]) for row in online.read(run)] for name in MEASURES}


def of_tensorboard(run):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(run.path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def of_trackio(run):
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    (found,) = (each for each in pytest.importorskip("trackio").Api().runs("bagssl") if each.name == run.path.name)
    rows, curves = storage.get_logs("bagssl", found.name, run_id=found.id), {}
    for row in rows:
        for name in row.keys() & {*CURVES, *MEASURES}:
            curves.setdefault(name, []).append((row["step"], row[name]))
    return curves


def of_wandb(run):
    record, curves = pytest.importorskip("wandb.proto.wandb_internal_pb2").Record, {}
    (path,) = run.path.glob("wandb/offline-run-*/*.wandb")
    for content in journal(path.read_bytes()):
        items = {item.key or item.nested_key[0]: item.value_json for item in record.FromString(content).history.item}
        for name in items.keys() & {*CURVES, *MEASURES}:
            curves.setdefault(name, []).append((int(items["_step"]), float(items[name])))
    return curves


def journal(content, begin=7, block=2**15):
    """The records of a LevelDB log, which wandb writes after a header of its own, and no longer reads in Python."""
    at, whole = begin, b""
    while at < len(content):
        if block - at % block < 7:
            at += block - at % block
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # all of it, or its last part
            yield whole
            whole = b""


LOGGERS = {"tensorboard": of_tensorboard, "trackio": of_trackio, "wandb": of_wandb}


@pytest.fixture
def stay_here(monkeypatch, tmp_path):
    """No logger asks a network, or writes to the reader's home."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    if "trackio" in sys.modules:  # which reads it once
        for module in [each for name, each in sys.modules.items() if name.startswith("trackio")]:
            if hasattr(module, "TRACKIO_DIR"):
                monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")


@pytest.mark.parametrize("name", LOGGERS)
@pytest.mark.parametrize("way", [train, interrupted], ids=["straight", "gone on with"])
def test_what_a_logger_was_told_is_the_history_point_by_point(name, way, images, tmp_path, stay_here, capsys):
    pytest.importorskip(name)
    run = way(images, tmp_path / "runs", log_to=f"csv,{name}", online="knn:100")
    found, wanted = LOGGERS[name](run), told(run)
    assert found.keys() == wanted.keys() and len(wanted["loss"]) == 15 and len(wanted["knn"]) == 5
    for curve, points in wanted.items():
        assert [crops for crops, _ in found[curve]] == [crops for crops, _ in points], curve
        kind = np.float32 if name == "tensorboard" else np.float64
        assert [kind(value) for _, value in found[curve]] == [kind(value) for _, value in points], curve
    assert capsys.readouterr().out == ""  # where the command prints the run's folder


@pytest.mark.parametrize("objective", ["tcr", "byol"])
def test_weights_with_and_without_are_the_same_to_the_bit(images, tmp_path, objective):
    plain = train(images, tmp_path / "plain", objective=objective)
    state = torch.get_rng_state()
    watched = train(images, tmp_path / "watched", objective=objective, log_to="tensorboard", online="knn:1")
    assert torch.equal(torch.get_rng_state(), state)
    assert watched.key == plain.key and same_weights(plain, watched) and len(online.read(watched)) == 15
    assert watched.metrics["weights_sha256"] == plain.metrics["weights_sha256"]
    assert not (plain.path / "online.csv").exists() and not (plain.path / "tensorboard").exists()


def test_of_two_processes_one_looks_on_and_weights_stay(tmp_path, monkeypatch):
    words = [f"--set={name}={value}" for name, value in TINY.items() if name != "epochs"]
    command = [sys.executable, "-m", "bagssl.cli", "pretrain", "--processes=2", *words, "--set=epochs=0.1"]
    found = []
    for name, more in (("plain", []), ("watched", ["--log-to=tensorboard", "--online=knn:64"])):
        monkeypatch.setenv("BAGSSL_RUNS", str(tmp_path / name))
        done = subprocess.run([*command, *more], capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0 and len(done.stdout.splitlines()) == 1, done.stderr
        found.append(Run(tmp_path / name / os.path.basename(done.stdout.strip())))
    plain, watched = found
    assert same_weights(plain, watched)
    assert len(list((watched.path / "tensorboard").iterdir())) == 1
    assert [row["crops"] for row in online.read(watched)] == [64 * i for i in range(1, 13)] + [800]


def test_a_measure_that_touches_the_network_would_be_seen(images, tmp_path, monkeypatch):
    def touching(self):
        self.learner.model.encoder(self.crops.float() / 255)  # in training mode: batch-norm counts it
        return torch.eye(len(self.crops))

    plain = train(images, tmp_path / "plain")
    monkeypatch.setattr(online.Online, "_embed", touching)
    assert not same_weights(plain, train(images, tmp_path / "watched", online="knn:1"))


def test_seconds_count_the_measures_and_crops_per_second_do_not(images, tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("bagssl.watching.time.monotonic", lambda: clock[0])
    step, measure = pretraining.Learner.step, online.Online._embed

    def slow(function, seconds):
        def call(*how):
            clock[0] += seconds
            return function(*how)
        return call

    monkeypatch.setattr(pretraining.Learner, "step", slow(step, 1.0))
    monkeypatch.setattr(online.Online, "_embed", slow(measure, 100.0))
    run = train(images, tmp_path, online="knn:64")
    assert {row["crops_per_second"] for row in run.history} == {32.0}
    assert run.metrics["seconds"] == 15 * 1 + 7 * 100  # the last measure comes after the last row


def test_what_is_measured_is_what_the_finished_encoder_gives(images, tmp_path):
    run = train(images, tmp_path, online="knn", epochs=12, size=32)  # at their own size: nothing is rounded
    rows = online.read(run)
    assert [name for name in csv.DictReader((run.path / "online.csv").open()).fieldnames] == [
        "step", "epoch", "crops", *MEASURES]
    assert [row["crops"] for row in rows] == [1920]  # 24 for each of 80 images
    places = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        h = load_encoder(run)(images.pixels[places].float() / 255)
    asked, bank, labels = h[:20], h[20:], images.labels[places]
    assert rows[-1]["knn"] == pytest.approx(probes.knn(bank, labels[20:], asked, labels[:20]).value)
    values = torch.linalg.svdvals(h.double())
    shares = values / values.sum()
    assert rows[-1]["effective_rank"] == pytest.approx(torch.exp(-(shares * shares.log()).sum()).item(), rel=1e-3)


def test_the_effective_rank_is_that_of_known_matrices():
    assert online.effective_rank(torch.eye(8)) == pytest.approx(8, rel=1e-4)
    assert online.effective_rank(torch.ones(100, 8)) == pytest.approx(1, rel=1e-4)
    assert online.effective_rank(torch.eye(8) * torch.tensor([1.0] * 4 + [0.0] * 4)) == pytest.approx(4, rel=1e-4)


@pytest.mark.parametrize("crops", [0, 30, 500, 30_000, 98_304, 100_000, 1_000_000, 10_000_000])
@pytest.mark.parametrize("count", [2, 80, 4000, 50_000, 1_281_167])
def test_by_default_measures_take_a_seventieth_of_the_training(crops, count):
    images, every = online.plan(crops, count)
    measures = sum(1 for _ in range(every, crops + 1, every)) + bool(crops % every)
    assert 2 <= images <= min(count, online.IMAGES) and measures <= online.TIMES
    if crops >= 2 * online.COST:  # forward, against forward and back
        assert measures * images <= 3 * crops / 72 * 1.0001
    assert online.plan(crops, count, 7) == (min(count, online.IMAGES), 7)


def test_nothing_of_it_travels(images, tmp_path):
    run = train(images, tmp_path / "runs", log_to="tensorboard", online="knn")
    (run.path / "wandb").mkdir()
    (run.path / "wandb/debug.log").write_text("")
    there = {"tensorboard", "wandb", "online.csv"}
    assert there <= set(os.listdir(run.path)) and there == {*paths.LOGS, paths.ONLINE}
    records.keep(run.path, tmp_path / "record" / run.path.name, True)
    hub._write(run, "me/run", tmp_path / "hub")
    (tmp_path / "copy").mkdir()
    records.take(run.path, tmp_path / "copy")
    packing.unpack(packing.export([run], tmp_path / "packs"), tmp_path / "other")
    for folder in (tmp_path / "record" / run.path.name, tmp_path / "hub", tmp_path / "copy",
                   tmp_path / "other" / run.path.name):
        assert "history.csv" in os.listdir(folder) and not there & set(os.listdir(folder)), folder


def test_a_logger_that_fails_is_left_out_with_a_line(images, tmp_path, monkeypatch, capsys):
    rows, closed = [], []

    def log(crops, values):
        rows.append(crops)
        if crops > 64:
            raise ConnectionError("the network\nis gone")

    monkeypatch.setitem(watching._LOGGERS, "tensorboard", lambda run, config: (log, lambda: closed.append(run)))
    run = train(images, tmp_path, log_to=["tensorboard"])
    assert run.finished and rows == [32, 64, 96] and closed == [run]
    assert capsys.readouterr().err == "tensorboard is told no more: ConnectionError: the network is gone\n"


def test_one_that_cannot_be_opened_is_one_line_before_anything_is_trained(images, tmp_path, monkeypatch):
    def refuse(run, config):
        raise RuntimeError("no account")

    monkeypatch.setitem(watching._LOGGERS, "tensorboard", refuse)
    with pytest.raises(InputError, match="^tensorboard cannot be opened: RuntimeError: no account$"):
        train(images, tmp_path, log_to="tensorboard")
    assert not list(tmp_path.glob("*/checkpoint.pt"))


def test_a_damaged_file_of_measures_is_begun_anew(images, tmp_path):
    run = train(images, tmp_path, online="knn:100")
    (run.path / "online.csv").write_bytes(b"step,epoch\n\xff")
    assert online.read(run) == []
    (run.path / "online.csv").write_text("step,crops\n1,2\n")
    assert online.read(run) == []


def test_batch_and_notebooks_say_it_by_the_environment(images, tmp_path, monkeypatch):
    monkeypatch.setenv("BAGSSL_LOG_TO", "csv, tensorboard")
    assert watching.loggers(None) == ["csv", "tensorboard"] and watching.loggers(["csv", "csv"]) == ["csv"]
    assert "tensorboard" in os.listdir(train(images, tmp_path / "a").path)
    assert "tensorboard" not in os.listdir(train(images, tmp_path / "b", log_to="csv").path)


@pytest.mark.parametrize("name", watching._LOGGERS)
def test_without_the_package_one_line_says_what_to_install(name, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(["pretrain", "--log-to", "csv", "--log-to", f"csv,{name}"]) == 2
    out, err = capsys.readouterr()
    assert err == f"bagssl: {name} is not installed: pip install 'bagssl[{name}]', or pip install {name}\n"
    assert out == "" and not (tmp_path / "results").exists()


def test_the_command_takes_both_and_prints_the_folder_alone(tmp_path, capsys):
    words = "--set epochs=0.1 --set batch_size=64 --set width=8 --set size=8 --set views=2 --set projector_dim=8"
    assert cli.main(["pretrain", *words.split(), "--log-to", "tensorboard,csv", "--online", "knn"]) == 0
    (folder,) = capsys.readouterr().out.splitlines()
    assert {"tensorboard", "online.csv", "history.csv"} <= set(os.listdir(folder))
    assert cli.main(["pretrain", *words.split(), "--log-to", "tensorboard"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{folder}\n" and "was trained before: nothing is left to log" in err
