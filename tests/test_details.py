"""One run shown in full, and several side by side."""

from __future__ import annotations

import csv
import shutil

import pytest

from bagssl import cli, data, details, runs
from bagssl.config import PretrainConfig
from bagssl.evaluation import evaluate
from bagssl.pretraining import pretrain

TINY = {"epochs": 2, "batch_size": 16, "size": 8, "width": 8, "views": 2, "projector_hidden": 16, "projector_dim": 8}
CHANGED = {"training": "multi-scale", "learning_rate": 0.002}


@pytest.fixture(scope="module")
def images():
    return data.subset(data.load("synthetic", "test"), 64)


@pytest.fixture(scope="module")
def made(images, tmp_path_factory):
    """Two runs, both measured by one protocol, the first by another as well; random weights, not measured."""
    root = tmp_path_factory.mktemp("made")
    configs = [PretrainConfig(**{**TINY, **more}) for more in ({}, CHANGED, {"training": "untrained"})]
    trained = [pretrain(config, images, root, progress=False) for config in configs]
    for run, ks in ((trained[0], [0, 2]), (trained[1], [0, 2]), (trained[0], [4])):
        evaluate(run, images, images, ks, probes=["knn"], scale=0.25, progress=False)
    return trained


@pytest.fixture
def store(made):
    """Copies in the store, which a test may damage."""
    return [runs.Run(shutil.copytree(run.path, runs.runs_root() / run.path.name)) for run in made]


def test_a_run_is_shown_with_what_was_set_and_what_was_measured(store, images, capsys):
    run = store[1]
    assert cli.main(["runs", "show", run.key[:6]]) == 0
    shown = capsys.readouterr().out
    first, usual = shown.split("as by default: ")
    assert first.startswith(f"{run.path.name}\nfinished: 256 crops in ")
    for name, value in {**TINY, **CHANGED}.items():
        default = PretrainConfig.__dataclass_fields__[name].default
        assert (f"  {name} " in first) == (value != default), name
        assert (f"{name}=" in usual) == (value == default), name
    rows = evaluate(run, images, images, [0, 2], probes=["knn"], scale=0.25, progress=False)
    for row in rows:
        what = f"K = {row['k']} at 0.25" if row["k"] else "centre crop"
        (line,) = (line for line in shown.splitlines() if line.startswith(f"  {what}, knn, h"))
        assert f"{row['accuracy']:.2f} ({row['low']:.2f} to {row['high']:.2f})" in line
    assert f"train {images.fingerprint[:8]}, test {images.fingerprint[:8]}" in shown  # some images
    assert details._images(data.load("synthetic", "train").fingerprint) == "all of synthetic"
    size = sum(path.stat().st_size for path in run.path.rglob("*") if path.is_file())
    for said in (f"{size:,} bytes, weights as trained", str(run.path), f'bagssl.load("{run.path.name}")',
                 f"loss {run.metrics['final']['loss']:.4g}", "64 images", "256 in 8 steps, 2 epochs"):  # fmt: skip
        assert said in shown
    assert any(block in shown for block in details.BLOCKS)


def test_whatever_state_it_is_in_a_run_is_shown(store, capsys):
    run = store[0]
    for name in ("metrics.json", "history.csv", "provenance.json", "weights.safetensors", "config.json"):
        (run.path / name).write_bytes(b"\0{")
        assert cli.main(["runs", "show", run.path.name]) == 0
        assert capsys.readouterr().out.startswith(run.path.name)
    for path, content in zip(sorted((run.path / "evaluations").iterdir()), ('{"protocol": {}, "rows": [7, {"k": "x"}]}',
                                                                            '{"protocol": 7}'), strict=True):
        path.write_text(content)
    assert details.accuracies(run) == {} and "not measured" in details.show(run)


def test_only_what_differs_is_compared_and_accuracies_by_the_same_protocol(store, images, tmp_path, capsys):
    first, second, _ = store
    file = tmp_path / "compared.csv"
    words = ["runs", "compare", first.key, second.key]
    assert cli.main([*words, "--csv", str(file)]) == 0
    shown = capsys.readouterr().out
    rows = list(csv.DictReader(file.read_text().splitlines()))
    settings = {row["name"]: (row[first.path.name], row[second.path.name]) for row in rows
                if row["section"] == "setting"}  # fmt: skip
    assert settings == {"training": ("patch-based", "multi-scale"), "learning_rate": ("0.004", "0.002")}
    accuracy = [row for row in rows if row["section"] == "accuracy"]
    both = [evaluate(run, images, images, [0, 2], probes=["knn"], scale=0.25, progress=False) for run in store[:2]]
    assert [(float(row[first.path.name]), float(row[second.path.name])) for row in accuracy] == [
        (pytest.approx(one["accuracy"], abs=1e-4), pytest.approx(other["accuracy"], abs=1e-4))
        for one, other in zip(*both, strict=True)]
    assert not any("K = 4" in row["name"] for row in rows), "it was measured on one alone"
    finals = {row["name"]: row[second.path.name] for row in rows if row["section"] == "final"}
    assert finals["loss"] == f"{second.metrics['final']['loss']:.4g}" and "crops a second" in shown
    assert f"A = {first.path.name}" in shown and f"({both[0][0]['low']:.2f} to " in shown


def test_without_an_accuracy_in_common_that_is_said(store, capsys):
    assert cli.main(["runs", "compare", store[0].key, store[2].key]) == 0
    assert "No accuracy was measured by the same protocol" in capsys.readouterr().out


@pytest.mark.parametrize("scale, other", [(0.25, 0.5), (0.25, 0.2501)])
def test_another_scale_is_another_protocol_but_for_the_centre_crop(store, images, scale, other):
    keys = []
    for run, each in zip(store[:2], (scale, other), strict=True):
        shutil.rmtree(run.path / "evaluations")
        evaluate(run, images, images, [0, 2], probes=["knn"], scale=each, progress=False)
        keys.append(set(details.accuracies(run)))
    assert [key[1] for key in keys[0] & keys[1]] == [0]


def test_a_name_that_means_none_or_several_is_one_line_with_the_candidates(store, capsys):
    several = [run.path.name for run in store]
    for words, said in ((["show", "synthetic-tcr"], several[:2]), (["show", "nothing"], several),
                        (["compare", several[0], "synthetic-"], several), (["watch", "synthetic-"], several),
                        (["compare", several[0], several[0]], ["each once"]), (["compare", several[0]], ["two runs"]),
                        (["remove", "synthetic-"], several), (["remove", ""], several),
                        (["show", several[0][:-1] + "?"], [f"did you mean '{several[0]}'"])):  # fmt: skip
        assert cli.main(["runs", *words]) == 2, words
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == 1 and all(name in err for name in said), err
    assert [run.finished for run in store] == [True] * 3


def test_a_run_of_the_record_is_shown_where_it_lies(made, monkeypatch, capsys):
    monkeypatch.setenv("BAGSSL_RECORD", str(made[0].path.parent))
    for word in (made[0].key, made[0].path.name, str(made[0].path)):
        assert cli.main(["runs", "show", word]) == 0
        assert f"{made[0].path}, of the record" in capsys.readouterr().out
    assert not runs.runs_root().exists(), "nothing was copied"


def test_a_curve_goes_from_its_highest_to_its_lowest_block():
    assert details.curve([8, 7, 6, 5, 4, 3, 2, 1]) == "█▇▆▅▄▃▂▁ 8 to 1"
    assert details.curve([1.0, float("nan"), 1.0]) == "▁▁ 1 to 1"
    assert details.curve([1.0]) == details.curve([]) == ""
    assert len(details.curve(range(1000)).split()[0]) == 48
