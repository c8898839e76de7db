"""Runs that travel: whole or not at all, with all that was measured on them, and marked when they were rounded."""

import gzip
import hashlib
import io
import json
import os
import random
import shutil
import tarfile

import pytest
import torch
from test_pretraining import TINY

from bagssl import cli, overview, packing, runs
from bagssl.config import PretrainConfig
from bagssl.data import load
from bagssl.errors import InputError
from bagssl.evaluation import evaluate
from bagssl.pretraining import load_encoder, pretrain
from bagssl.runs import HALF, WEIGHTS, Run

IMAGES = load("synthetic", "train").take(torch.arange(0, 4000, 49)[:80])


def trained(root, **settings) -> Run:
    return pretrain(PretrainConfig(**{**TINY, "epochs": 1, **settings}), IMAGES, root, progress=False)


def measured(run, ks=(0, 2)):
    return evaluate(run, IMAGES, IMAGES, ks, probes=["knn"], scale=0.5, progress=False)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Two runs, measured."""
    root = tmp_path_factory.mktemp("packed") / "runs"
    for seed in (0, 1):
        measured(trained(root, seed=seed))
    return root


def files(root) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*"))
            if path.is_file() and path.name != ".lock"}  # fmt: skip


def refused(do, *words: str) -> None:
    with pytest.raises(InputError) as error:
        do()
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def packed(store, folder, **how) -> list:
    return packing.export(runs.list_runs(store), folder, **{"part": 2**16, "weights": "fp32", **how})


def test_runs_arrive_as_they_were_to_the_byte_and_nothing_is_measured_again(store, tmp_path, monkeypatch):
    parts = packed(store, tmp_path / "parts")
    assert len(parts) > 2 and all(path.stat().st_size <= 2**16 for path in parts)
    assert parts == packed(store, tmp_path / "again") or [path.read_bytes() for path in parts] == [
        path.read_bytes() for path in sorted((tmp_path / "again").iterdir())]
    random.Random(0).shuffle(parts)
    assert [line.split(": ")[1] for line in packing.unpack(parts, tmp_path / "there")] == [
        "new, 1 evaluation, weights"] * 2
    assert files(tmp_path / "there") == files(store) and set(files(tmp_path / "parts")) == {p.name for p in parts}
    monkeypatch.setattr("bagssl.evaluation._embed", None)
    monkeypatch.setattr("bagssl.pretraining.train", None)
    for seed in (0, 1):
        assert measured(trained(tmp_path / "there", seed=seed))
    assert all("here already" in line for line in packing.unpack([tmp_path / "parts"], tmp_path / "there"))


@pytest.mark.parametrize("weights, file", [("fp16", HALF), ("none", None)])
def test_rounded_weights_are_marked_and_without_any_what_was_measured_stands(store, tmp_path, weights, file):
    packing.unpack(packed(store, tmp_path / "parts", weights=weights), tmp_path / "there")
    there, whole = runs.list_runs(tmp_path / "there"), runs.list_runs(store)
    for run, before in zip(there, whole, strict=True):
        assert {WEIGHTS, HALF} & set(os.listdir(run.path)) == {file} - {None} and run.halved == (file == HALF)
        assert measured(run) == measured(before) and run.provenance == before.provenance
        if file is None:
            refused(lambda run=run: load_encoder(run), "has no weights")
        else:
            assert load_encoder(run) and overview.row(run)[5] == "fp16" and overview.row(before)[5] == "fp32"
    # what was rounded goes on as it is, and gives way to what was trained
    again = packing.export(there, tmp_path / "again", weights="fp32")
    assert len(packing.unpack(again, tmp_path / "further")) == 2
    assert files(tmp_path / "further") == files(tmp_path / "there")
    lines = packing.unpack(packed(store, tmp_path / "parts32"), tmp_path / "there")
    assert all(line.endswith("0 evaluations, weights") for line in lines) and files(tmp_path / "there") == files(store)


def test_evaluations_are_added_to_a_run_that_is_here(store, tmp_path):
    shutil.copytree(store, tmp_path / "further")
    for run in runs.list_runs(tmp_path / "further"):
        measured(run, (4,))
    parts = packing.export(runs.list_runs(tmp_path / "further"), tmp_path / "parts", weights="none")
    shutil.copytree(store, tmp_path / "there")
    assert all(line.endswith(": 1 evaluation") for line in packing.unpack(parts, tmp_path / "there"))
    assert files(tmp_path / "there") == files(tmp_path / "further")


def test_a_missing_or_damaged_part_is_named_and_nothing_comes_in(store, tmp_path):
    parts, there = packed(store, tmp_path / "parts"), tmp_path / "there"
    trained(there, seed=2)
    before = files(there)
    for part in parts:
        content = part.read_bytes()
        part.unlink()
        refused(lambda: packing.unpack([tmp_path / "parts"], there), part.name, "is missing")
        for at in (0, len(content) // 2, len(content) - 1):
            part.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            refused(lambda: packing.unpack([tmp_path / "parts"], there), "damaged", part.name)
        part.write_bytes(content[:-1])
        refused(lambda: packing.unpack([tmp_path / "parts"], there), "damaged", part.name)
        part.write_bytes(content)
    assert files(there) == before and not list(there.glob(".import*"))
    for nothing in ([], [tmp_path / "empty"]):
        (tmp_path / "empty").mkdir(exist_ok=True)
        refused(lambda nothing=nothing: packing.unpack(nothing, there), "no file to import")
    refused(lambda: packing.unpack([tmp_path / "absent"], there), "cannot read", "absent")


def test_a_run_of_the_same_key_with_other_weights_is_refused_and_so_is_one_in_training(store, tmp_path):
    parts, there = packed(store, tmp_path / "parts"), tmp_path / "there"
    shutil.copytree(store, there)
    last = runs.list_runs(there)[-1]
    tensors = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in last.weights().items()}
    runs.finish(last, tensors, last.history, last.metrics, last.provenance)
    (runs.list_runs(there)[0].path / WEIGHTS).unlink()
    before = files(there)
    refused(lambda: packing.unpack(parts, there), last.path.name, "other weights")
    assert files(there) == before
    shutil.rmtree(last.path)
    with runs.locked(runs.open_run(last_config(store), IMAGES.fingerprint, "tiny", there)):
        pass
    assert packing.unpack(parts, there)


def last_config(store) -> dict:
    return runs.list_runs(store)[-1].config


def part_of(content: dict[str, bytes], path, kind=tarfile.REGTYPE) -> list:
    """A pack with sound hashes that holds what nobody exported."""
    stream = io.BytesIO()
    with gzip.GzipFile("", "wb", 6, stream) as zipped, tarfile.open(fileobj=zipped, mode="w") as tar:
        for name, data in content.items():
            member = tarfile.TarInfo(name)
            member.size, member.type, member.linkname = len(data), kind, "/etc/passwd"
            tar.addfile(member, io.BytesIO(data))
    return written(stream.getvalue(), path)


def written(data: bytes, path, **head) -> list:
    digest = hashlib.sha256(data).hexdigest()
    head = {"format": packing.FORMAT, "pack": digest, "part": 1, "of": 1, "sha256": digest, **head}
    path.write_bytes(json.dumps(head).encode() + b"\n" + data)
    return [path]


@pytest.mark.parametrize("name", ["../config.json", "/tmp/config.json", "..", "a/../../config.json", "a/b/config.json",
                                  "config.json", "run/weights.pkl", "run/evaluations/../x.json", "run/.lock"])
def test_nothing_but_the_files_of_runs_is_unpacked(name, tmp_path):
    path = part_of({name: b"{}"}, tmp_path / "p.bagssl")
    refused(lambda: packing.unpack(path, tmp_path / "there"), "no file of a run")
    assert not files(tmp_path / "there") and set(os.listdir(tmp_path)) == {"p.bagssl", "there"}


def test_links_foreign_files_and_other_names_are_one_line(store, tmp_path):
    there, path = tmp_path / "there", tmp_path / "p.bagssl"
    refused(lambda: packing.unpack(part_of({"run/config.json": b""}, path, tarfile.SYMTYPE), there), "no file of a run")
    refused(lambda: packing.unpack(written(b"no archive", path), there), "was not written by")
    refused(lambda: packing.unpack(written(b"", path, format="bagssl-runs-99"), there), "bagssl-runs-99")
    for content in (b"", b"\x80" * 3000, b"[]\n", b"{}\n", b'{"format": "bagssl-runs-1", "part": "x"}\n'):
        path.write_bytes(content)
        refused(lambda: packing.unpack([path], there), "no part of exported runs")
    run = runs.list_runs(store)[0]
    named = {name.replace(run.key, "0" * 16): data for name, data in files(store).items() if run.key in name}
    refused(lambda: packing.unpack(part_of(named, path), there), "not what its name says")
    assert not files(there)


def test_what_cannot_be_exported_is_one_line(store, tmp_path):
    refused(lambda: packing.export([], tmp_path), "no finished run")
    refused(lambda: packed(store, tmp_path, part=10), "16KiB or more")
    refused(lambda: packed(store, tmp_path, weights="fp8"), "fp8")
    shutil.copytree(store, tmp_path / "runs")
    run = runs.list_runs(tmp_path / "runs")[0]
    content = bytearray((run.path / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (run.path / WEIGHTS).write_bytes(content)
    refused(lambda: packed(tmp_path / "runs", tmp_path / "parts"), "damaged")
    (run.path / "metrics.json").unlink()
    refused(lambda: packed(tmp_path / "runs", tmp_path / "parts"), "is not finished")
    assert not (tmp_path / "parts").exists() or not os.listdir(tmp_path / "parts")


def test_by_the_command_line(store, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BAGSSL_RUNS", str(store))
    key = runs.list_runs(store)[0].key
    assert cli.main(["runs", "list"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 3 and "finished" in shown[1] and "knn, h, K = 2" in shown[1] and "fp32" in shown[1]
    assert cli.main(["runs", "export", str(tmp_path / "parts"), key, "--part", "1MiB"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(os.listdir(tmp_path / "parts")) == 1
    monkeypatch.setenv("BAGSSL_RUNS", str(tmp_path / "there"))
    assert cli.main(["runs", "import", str(tmp_path / "parts")]) == 0
    assert capsys.readouterr().out.startswith(runs.list_runs(store)[0].path.name + ": new")
    for words in (["export", str(tmp_path / "x"), "ffff"], ["import", str(tmp_path / "x")],
                  ["export", str(tmp_path / "x"), "--part", "many"]):
        assert cli.main(["runs", *words]) == 2
        out, err = capsys.readouterr()
        assert not out and len(err.splitlines()) == 1


def test_a_list_shows_runs_that_are_begun_or_damaged_too(store, tmp_path):
    shutil.copytree(store, tmp_path / "runs")
    whole, other = runs.list_runs(tmp_path / "runs")
    (other.path / "history.csv").unlink()
    (whole.path / "metrics.json").write_text("damaged")
    assert [overview.row(run)[1] for run in (whole, other)] == ["finished", "has lost history.csv"]
    assert overview.row(whole)[2] == ""


def test_new_packs_what_no_pack_in_the_folder_holds_and_all_packs_together_are_the_store(store, tmp_path):
    root, folder = tmp_path / "store", tmp_path / "packs"
    shutil.copytree(store, root)
    first, second = runs.list_runs(root)
    assert packing.export([first], folder, weights="fp32", new=True)
    assert packing.export([first], folder, weights="fp32", new=True) == []
    measured(first, (0, 3))
    (lighter,) = packing.export([first], folder, weights="fp32", new=True)
    assert packing.export([first, second], folder, part=2**16, weights="fp32", new=True)
    assert packing.export([first, second], folder, weights="fp32", new=True) == []
    assert len(lighter.read_bytes()) < (root / first.path.name / WEIGHTS).stat().st_size, "its weights travelled before"
    packing.unpack([folder], tmp_path / "there")
    assert files(tmp_path / "there") == files(root)
    assert packing.export([], folder, new=True) == []
    part = next(folder.iterdir())
    part.write_bytes(part.read_bytes()[:-1])
    refused(lambda: packing.export([first], folder, new=True), part.name, "damaged")
