"""The record: models that are committed are not trained again, are what was written, and can be opened by anybody."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml

import bagssl
from bagssl import cli, evaluation, pretraining, records, runs
from bagssl.batch.stages import merge_models
from bagssl.cards import CARD
from bagssl.config import PretrainConfig
from bagssl.data import load
from bagssl.errors import InputError
from bagssl.evaluation import evaluate
from bagssl.pretraining import load_encoder, load_projector, pretrain
from bagssl.runs import HALF, MARK, WEIGHTS, Run

TINY = {"width": 8, "size": 8, "batch_size": 16, "views": 2, "projector_hidden": 16, "projector_dim": 8, "epochs": 1}
PROTOCOL = {"probes": ["knn"], "scale": 0.25, "progress": False}


@pytest.fixture(scope="module")
def images():
    return load("synthetic", "train").take(torch.arange(0, 3920, 49))


def config(**settings):
    return PretrainConfig(**{**TINY, **settings})


@pytest.fixture
def record(images, tmp_path, monkeypatch):
    """A record of a trained model, with what was measured of it, and of a random one; the store is empty."""
    made, folder = tmp_path / "made", tmp_path / "results/laptop/runs"
    for training, whole in (("patch-based", True), ("multi-scale", False), ("untrained", True)):
        run = pretrain(config(training=training), images, made, progress=False)
        if training == "patch-based":
            evaluate(run, images, images, [0, 2], **PROTOCOL)
        records.keep(run.path, folder / run.path.name, whole)
    monkeypatch.setenv("BAGSSL_RECORD", str(folder))
    evaluation._recent.clear()
    return folder


def of(record, training):
    return next(run for run in runs.list_runs(record) if run.config["training"] == training)


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_the_record_holds_is_neither_trained_nor_measured_again(record, images, monkeypatch):
    before, kept = files(record), of(record, "patch-based")
    rows = evaluate(Run(record.parents[2] / "made" / kept.path.name), images, images, [0, 2], **PROTOCOL)
    for name in ("train", "build_model"):
        monkeypatch.setattr(pretraining, name, None)
    monkeypatch.setattr(evaluation, "embed_bags", None)
    run = pretrain(config(), images, progress=False)
    assert run.path.parent == runs.runs_root() and run.key == kept.key and run.metrics == kept.metrics
    assert torch.equal(load_encoder(run)(torch.ones(2, 3, 8, 8)), load_encoder(kept)(torch.ones(2, 3, 8, 8)))
    assert evaluate(run, images, images, [0, 2], **PROTOCOL) == rows
    assert files(record) == before  # read only


def test_without_a_record_or_for_other_settings_it_is_trained(record, images, monkeypatch):
    """Negative control."""
    trained = []
    monkeypatch.setattr(pretraining, "train", lambda *_, **__: trained.append(1) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pretrain(config(seed=1), images, progress=False)
    monkeypatch.setenv("BAGSSL_RECORD", "")
    with pytest.raises(ZeroDivisionError):
        pretrain(config(), images, progress=False)
    assert len(trained) == 2


def test_a_folder_that_the_caller_names_is_a_store_of_its_own(record, images, tmp_path, monkeypatch):
    """Who times a training, or makes a record anew, is given no other's."""
    monkeypatch.setattr(pretraining, "train", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pretrain(config(), images, tmp_path / "own", progress=False)


@pytest.mark.parametrize("training, name", [("patch-based", WEIGHTS), ("multi-scale", HALF)])
def test_one_changed_byte_of_committed_weights_is_refused_by_name(record, images, training, name):
    path = of(record, training).path / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(str(path))) as error:
        pretrain(config(training=training), images, progress=False)
    assert "SHA-256" in str(error.value) and "\n" not in str(error.value)
    assert not any(run.finished for run in runs.list_runs())
    assert pretrain(config(training="untrained"), images, progress=False).finished  # the others are as they were


@pytest.mark.parametrize("name", ["config.json", "history.csv", "metrics.json", "provenance.json"])
def test_a_record_that_was_changed_by_hand_is_refused(record, images, name):
    path = of(record, "patch-based").path / name
    path.write_text(path.read_text().replace("0", "1", 1))
    with pytest.raises(InputError, match=re.escape(str(path))):
        pretrain(config(), images, progress=False)


def test_a_run_under_the_name_of_another_is_refused(record, images):
    one, other = of(record, "patch-based"), of(record, "multi-scale")
    shutil.rmtree(one.path)
    shutil.copytree(other.path, one.path)
    with pytest.raises(InputError, match="it is not that of this run"):
        pretrain(config(), images, progress=False)


def test_where_weights_were_left_out_tables_still_come_and_what_needs_an_encoder_says_so(record, images):
    (of(record, "patch-based").path / WEIGHTS).unlink()
    run = pretrain(config(), images, progress=False)
    assert len(evaluate(run, images, images, [0, 2], **PROTOCOL)) == 2
    with pytest.raises(InputError, match=r"has no weights: copy weights.safetensors .* BAGSSL_RECORD"):
        evaluate(run, images, images, [0, 1], **PROTOCOL)
    with pytest.raises(InputError, match="has no weights"):
        load_encoder(run)


def test_rounded_weights_are_known_as_such(record, images):
    run = pretrain(config(training="multi-scale"), images, progress=False)
    assert run.halved and not (run.path / WEIGHTS).exists()
    exact = load_encoder(Run(record.parents[2] / "made" / run.path.name))(torch.ones(2, 3, 8, 8))
    assert torch.allclose(load_encoder(run)(torch.ones(2, 3, 8, 8)), exact, atol=1e-2)


def test_random_weights_follow_from_their_seed_and_must_be_those_of_the_record(record, images, monkeypatch):
    run = pretrain(config(training="untrained"), images, progress=False)
    assert not run.has_weights
    made = Run(record.parents[2] / "made" / run.path.name)
    for opened in (load_encoder, load_projector):
        ours, theirs = opened(run).state_dict(), opened(made).state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    build = pretraining.build_model
    monkeypatch.setattr(pretraining, "build_model", lambda config: build(PretrainConfig(**TINY, seed=1)))
    with pytest.raises(InputError, match="draws other weights from its seed"):
        load_encoder(run)


def test_a_copy_that_was_cut_short_is_begun_again(record, images, monkeypatch):
    copy = records.copy_folder

    def cut(source, target, without=()):
        copy(source, target, without)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(records, "copy_folder", cut)
        pretrain(config(), images, progress=False)
    assert not any(run.finished for run in runs.list_runs())
    monkeypatch.setattr(pretraining, "train", None)
    assert pretrain(config(), images, progress=False).finished


def test_a_model_of_the_record_is_opened_by_its_key_its_name_or_its_folder(record, images, capsys):
    kept, patches = of(record, "patch-based"), torch.rand(3, 3, 8, 8)
    expected = load_encoder(kept)(patches)
    for word in (kept.key, kept.path.name, str(kept.path)):
        shutil.rmtree(runs.runs_root(), ignore_errors=True)
        encoder = bagssl.load(word)
        assert torch.equal(encoder(patches), expected) and not encoder.training
    with pytest.raises(InputError, match="is no encoder"):
        bagssl.load("0000")
    shutil.rmtree(runs.runs_root())
    assert cli.main(["runs", "list"]) == 0
    shown = capsys.readouterr().out
    assert kept.path.name in shown and shown.count("in the record") == 3
    assert f"{evaluate(kept, images, images, [0, 2], **PROTOCOL)[-1]['accuracy']:.1f} %" in shown


def test_three_lines_of_a_card_load_the_model(record, tmp_path):
    kept = of(record, "patch-based")
    code = re.search(r"```python\n(.*?)```", (kept.path / CARD).read_text(), re.DOTALL)[1]
    script = f"import torch\npatches = torch.rand(2, 3, 8, 8)\n{code}\nprint(list(h.shape), encoder.dim)"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=dict(os.environ))
    assert done.stdout.split() == ["[2,", f"{load_encoder(kept).dim}]", str(load_encoder(kept).dim)], done.stderr


def test_a_card_says_what_the_model_is_and_the_hub_can_read_it(record, images):
    kept = of(record, "patch-based")
    text = (kept.path / CARD).read_text()
    row = max(evaluate(kept, images, images, [0, 2], **PROTOCOL), key=lambda each: each["k"])
    for said in ("synthetic, 80 training images", "2 patches of 0.25 of the image's area", "crops seen | 160 ",
                 f"{row['accuracy']:.2f} % (95 %: {row['low']:.2f} to {row['high']:.2f})", "MIT",
                 kept.metrics["weights_sha256"][:16], runs.machine(kept.provenance["hardware"])):  # fmt: skip
        assert said in text
    about = yaml.safe_load(text.split("---")[1])
    assert about["license"] == "mit" and about["model-index"][0]["results"][0]["metrics"][0]["value"] == pytest.approx(
        row["accuracy"] / 100, abs=1e-6)
    rounded = (of(record, "multi-scale").path / CARD).read_text()
    assert "not measured" in rounded and "rounded to fp16" in rounded and "rounded" not in text


def test_a_beginning_means_one_run_of_the_store_and_the_record_or_the_candidates_and_copies_nothing(record, capsys):
    kept = of(record, "patch-based")
    shutil.copytree(kept.path, runs.runs_root() / kept.path.name)
    label = os.path.commonprefix([run.path.name for run in runs.list_runs(record)])
    for words in (["evaluate", label, "--dataset", "synthetic"], ["runs", "show", label]):
        assert cli.main(words) == 2
        error = capsys.readouterr().err
        assert f"3 runs begin with '{label}'" in error and all(run.path.name in error for run in runs.list_runs(record))
    with pytest.raises(InputError, match="3 runs begin"):
        bagssl.load(label)
    assert [path.name for path in runs.runs_root().iterdir()] == [kept.path.name]
    other = of(record, "multi-scale")
    assert cli.main(["runs", "remove", other.key, "--yes"]) == 2
    assert f"{other.path} is of a record, from which nothing is removed" in capsys.readouterr().err


def test_large_weights_stay_where_they_are(record, images, tmp_path, monkeypatch):
    made = Run(record.parents[2] / "made" / of(record, "patch-based").path.name)
    monkeypatch.setattr(records, "LARGE", 2**10)
    for whole in (True, False):
        records.keep(made.path, tmp_path / str(whole), whole)
        assert not list((tmp_path / str(whole)).glob("*.safetensors")) and (tmp_path / str(whole) / MARK).exists()
        said = (tmp_path / str(whole) / CARD).read_text()
        assert "not in this record" in said and "bagssl.load" not in said


# ---- the batch adds the models of an experiment to those of its profile


def test_models_of_several_experiments_are_kept_once_and_whole(record, images, tmp_path):
    made, target = record.parents[2] / "made", tmp_path / "kept"
    name = of(record, "patch-based").path.name
    for i, whole in enumerate((False, True, False)):
        folder = tmp_path / f"experiment {i}/runs"
        records.keep(made / name, folder / name, whole)
        (folder / name / "evaluations" / f"{i}.json").write_text("{}")
        assert merge_models(folder, target) == [name]
        assert {path.name for path in target.rglob("*.safetensors")} == {WEIGHTS if i else HALF}
        assert ("rounded" in (target / name / CARD).read_text()) == (i == 0)
    assert {f"{i}.json" for i in range(3)} <= {path.name for path in (target / name / "evaluations").iterdir()}


def test_a_model_that_was_trained_anew_takes_the_place_of_the_former(record, images, tmp_path):
    made, target = record.parents[2] / "made", tmp_path / "kept"
    name = of(record, "patch-based").path.name
    records.keep(made / name, tmp_path / "first/runs" / name, True)
    merge_models(tmp_path / "first/runs", target)
    again = tmp_path / "second/runs" / name
    records.keep(made / name, again, False)
    shutil.rmtree(again / "evaluations")
    metrics = json.loads((again / MARK).read_text())
    (again / MARK).write_text(json.dumps({**metrics, "weights_sha256": "another"}))
    merge_models(tmp_path / "second/runs", target)
    assert not (target / name / "evaluations").exists() and not (target / name / WEIGHTS).exists()


def test_a_model_that_another_stage_is_about_to_write_keeps_what_is_there(record, tmp_path):
    made, target = record.parents[2] / "made", tmp_path / "kept"
    name = of(record, "patch-based").path.name
    (target / name / "evaluations").mkdir(parents=True)
    (target / name / "evaluations" / "first.json").write_text("{}")  # its mark comes last
    records.keep(made / name, tmp_path / "second/runs" / name, False)
    merge_models(tmp_path / "second/runs", target)
    assert (target / name / "evaluations" / "first.json").exists() and (target / name / MARK).exists()


def test_damage_of_a_model_that_is_asked_for_by_name_is_named(record):
    path = of(record, "patch-based").path / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(InputError, match=re.escape(str(path))):
        bagssl.load(path.parent.name)
