"""A job for each model, then one for each notebook: planned, submitted, side by side, failing, out of time, refused."""

from __future__ import annotations

import json
import math
import os
import stat
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from test_experiments import NOTEBOOKS, write_list, write_notebook

from bagssl import cli, data, trees
from bagssl.batch import cluster
from bagssl.config import PretrainConfig
from bagssl.errors import InputError, Stopped
from bagssl.pretraining import pretrain
from bagssl.runs import list_runs

PARAMETERS = """dataset: str = "synthetic"
objectives: list[str] = ["simclr", "barlow"]
overrides: dict = {}
epochs: float = 2.0
"""
TRAIN = """import os
from pathlib import Path
from bagssl import data
from bagssl.study import comparison
train = data.subset(data.load(dataset, "train"), 70)
recipe = {"dataset": dataset, "epochs": epochs, "views": 3, "batch_size": 16, "size": 8, "encoder": "resnet10",
          "width": 8, "projector_hidden": 16, "projector_dim": 8}
trained = comparison.train_all(comparison.arms(objectives, [0], recipe, overrides, ["patch-based"]), train)
Path(os.environ["BAGSSL_OUTPUT"], "tables").mkdir(parents=True)
Path(os.environ["BAGSSL_OUTPUT"], "tables", "models.md").write_text(" ".join(run.key for run in trained))"""
SHORT = "models: {local_timeout_min: 0.75}\n"  # warned after 15 s: it stops itself after 9


@pytest.fixture
def notebooks(tmp_path):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    write_notebook(folder / "small.ipynb", [TRAIN], PARAMETERS)
    write_list(folder, small={"artefact": "x", "notebook": "small.ipynb",
                              "profiles": {"smoke": {"cost": "1 s", "parameters": {}}}})  # fmt: skip
    for name in NOTEBOOKS:
        write_notebook(folder / f"{name}.ipynb", [])
    return folder


@pytest.fixture
def alone(monkeypatch):
    """A job's threads decide its rounding."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def submit(notebooks, kind="local", overrides=None, options=None, jobs=1):
    path = None
    if options is not None:
        path = notebooks / "options.yaml"
        path.write_text(options)
    return cluster.submit(cluster.prepare(["small"], "smoke", overrides or {}, kind, path, notebooks=notebooks), jobs)


def results() -> Path:
    return Path(os.environ["BAGSSL_RESULTS"])


def finished() -> dict[str, str]:
    """Objective -> key, of the trained models."""
    return {run.config["objective"]: run.key for run in list_runs() if run.finished and run.config["epochs"]}


# ---- on this machine


def test_two_models_side_by_side_then_the_notebook_and_then_nothing_is_left(notebooks, alone, capsys):
    assert submit(notebooks, jobs=2) == 0
    said = capsys.readouterr().out
    starts = [said.index(f"[{i}/3]") for i in (1, 2)]
    assert max(starts) < said.index("done in") < said.index("[3/3] small: starts")
    assert sorted(finished()) == ["barlow", "simclr"]
    keys = (results() / "smoke" / "small" / "tables" / "models.md").read_text().split()
    assert set(keys) == {run.key for run in list_runs()}
    # a job's model is that of the notebook, to the bit
    (simclr,) = [run for run in list_runs() if run.config["objective"] == "simclr"]
    images = data.subset(data.load("synthetic", "train"), 70)
    config = PretrainConfig.from_dict(simclr.config)
    assert pretrain(config, images, results() / "again", progress=False).key == simclr.key
    assert submit(notebooks) == 0 and "nothing to submit" in capsys.readouterr().out


def test_a_model_that_fails_is_named_with_its_log_and_its_notebook_is_left_out(notebooks, alone, capsys):
    wild = {"vicreg": {"learning_rate": 1000.0, "optimiser": "sgd"}}
    assert submit(notebooks, overrides={"objectives": ["simclr", "vicreg"], "overrides": wild}, jobs=2) == 1
    said = capsys.readouterr()
    (line,) = [line for line in said.err.splitlines() if "failed:" in line]
    assert "vicreg-patch-based" in line and "Diverged" in line and "lower learning_rate" in line
    log = Path(line.split("(see ")[1].rstrip(")"))
    assert "Diverged" in log.read_text() and "small: left out" in said.err
    assert list(finished()) == ["simclr"] and not (results() / "smoke" / "small").exists()


def lasting(notebooks, seconds: float) -> int:
    """Epochs of simclr's model that take about so long on this machine, however fast it is."""
    overrides, taken = {"objectives": ["simclr"], "epochs": 10}, []
    config = cluster.prepare(["small"], "smoke", overrides, "local", notebooks=notebooks).jobs[0].call.config
    images = data.subset(data.load("synthetic", "train"), 70)
    for seed in range(3):  # the first also starts up
        begun = time.monotonic()
        pretrain(PretrainConfig.from_dict({**config, "seed": seed}), images, results() / "timed", progress=False)
        taken.append(time.monotonic() - begun)
    return max(150, math.ceil(10 * seconds / min(taken)))


def test_a_job_at_its_limit_is_put_back_and_ends_with_the_same_weights(notebooks, alone, capsys):
    epochs = lasting(notebooks, 20)
    overrides = {"objectives": ["simclr"], "epochs": epochs}
    assert submit(notebooks, overrides=overrides, options=SHORT) == 0, capsys.readouterr()
    run = next(run for run in list_runs() if run.config["epochs"])
    assert run.finished and run.metrics["steps"] == 4 * epochs
    (log,) = [log for log in (results() / "cluster").glob("*.out") if "Requeued" in log.read_text()]
    assert "stopped at step" in log.read_text()
    straight = pretrain(PretrainConfig.from_dict(run.config), data.subset(data.load("synthetic", "train"), 70),
                     results() / "straight", progress=False, device="cpu")  # fmt: skip
    assert run.metrics["weights_sha256"] == straight.metrics["weights_sha256"] and run.path != straight.path


# ---- on Slurm, as it is asked


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Stand-ins of Slurm's commands: what is submitted is numbered, and kept."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    count = folder / "count"
    count.write_text("0")
    commands = {"srun": "", "sbatch": f"""n=$(( $(cat {count}) + 1 )); echo $n > {count}; cp "$1" {folder}/$n.sh
echo Submitted batch job $n"""}
    for name, does in commands.items():
        (folder / name).write_text(f"#!/bin/sh\n{does}\n")
        (folder / name).chmod((folder / name).stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


NODE = """slurm_partition: gpu
models: {gpus_per_node: 8, tasks_per_node: 8, timeout_min: 90}
experiments: {slurm_account: us}
"""


def asked(file: Path) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in file.read_text().splitlines() if line.startswith("#SBATCH --")]
    return dict(line.split("=", 1) for line in lines if "=" in line)


def test_slurm_gets_a_file_for_each_job_and_notebooks_wait_for_their_models(notebooks, slurm, capsys):
    assert submit(notebooks, "slurm", options=NODE) == 0
    first, second, last = (asked(slurm / f"{n}.sh") for n in (1, 2, 3))
    for model in (first, second):
        assert (model["gpus-per-node"], model["ntasks-per-node"], model["time"]) == ("8", "8", "90")
        assert model["partition"] == "gpu" and "account" not in model and "dependency" not in model
        assert model["signal"] == "USR2@90" and model["open-mode"] == "append"
    assert last["dependency"] == "afterok:1:2" and last["kill-on-invalid-dep"] == "yes"
    assert (last["gpus-per-node"], last["time"], last["account"]) == ("1", "240", "us")
    said = capsys.readouterr().out
    assert "1  synthetic-simclr-patch-based-seed0" in said and "3  small: " in said
    call = sorted((results() / "cluster").glob("*_submitted.pkl"))
    assert len(call) == 3 and not finished()


def test_a_job_stops_itself_before_it_is_warned():
    assert cluster._limit("slurm", {"timeout_min": 240}) == 240 * 60 - 90 - 60
    assert cluster._limit("slurm", {"timeout_min": 240, "slurm_time": 60, "slurm_signal_delay_s": 300}) == 3240
    assert cluster._limit("local", {"timeout_min": 10}) == 600 - 30 - 60
    assert 0 < cluster._limit("local", {"timeout_min": 1}) < 30


# ---- before anything is submitted


@pytest.fixture
def as_imagenet(tmp_path):
    """A thousand pictures in ImageNet's layout, imported as a user would."""
    for split, count in (("train", 90), ("val", 10)):
        for label in range(10):
            (tmp_path / "ILSVRC" / split / f"n{label:08d}").mkdir(parents=True)
            for i in range(count):
                picture = Image.new("RGB", (100 + i, 120), (25 * label, 2 * i, 60))
                picture.save(tmp_path / "ILSVRC" / split / f"n{label:08d}" / f"{split}_{i}.JPEG")
    trees.add("imagenet", tmp_path / "ILSVRC", size=96)


def test_a_dry_run_of_the_paper_profile_says_jobs_hours_disk_and_what_is_missing(as_imagenet, tmp_path, capsys):
    (tmp_path / "node.yaml").write_text(NODE)
    words = ["reproduce", "imagenet", "--profile", "paper", "--cluster", "slurm", "--set", "batch_size=32", "--set",
             "train_images=64", "--dry-run", "--cluster-options", str(tmp_path / "node.yaml")]  # fmt: skip
    assert cli.main(words) == 0, capsys.readouterr()
    said = capsys.readouterr().out
    rows = [line.split() for line in said.splitlines() if "imagenet-tcr" in line]
    assert len(rows) == 4 and all(row[2] == "8" and float(row[3]) > 0 for row in rows)
    (last,) = [line.split() for line in said.splitlines() if line.startswith("5  ")]
    assert last[1:6] == ["imagenet", "1", "2", "3", "4"] and "5 jobs" in said and "GPU hours" in said
    assert "here are 10 of 1,000 classes, 900 of 1,281,167 train images, 100 of 50,000 test images" in said
    assert not results().exists() or not list(results().rglob("*.pkl"))


def test_a_dry_run_without_data_names_what_is_missing(capsys):
    assert cli.main(["reproduce", "imagenet", "patch-vs-multiscale-cifar10", "--profile", "paper", "--cluster", "slurm",
                     "--dry-run"]) == 2  # fmt: skip
    said = capsys.readouterr().out
    assert said.count("imagenet-tcr-") == 4 and "cifar10-" not in said
    assert "missing: the dataset 'imagenet' is not in" in said and "missing: patch-vs-multiscale-cifar10: " in said


def test_without_names_what_has_no_data_here_is_left_out_but_of_a_dry_run(notebooks, slurm, capsys):
    experiment = {"artefact": "x", "notebook": "small.ipynb"}
    write_list(notebooks, small=experiment | {"profiles": {"smoke": {"cost": "1 s", "parameters": {}}}},
               large=experiment | {"profiles": {"smoke": {"cost": "1 s", "parameters": {"dataset": "imagenet"}}}})
    def prepared(names, **options):
        return cluster.prepare(names, "smoke", {}, "slurm", notebooks=notebooks, **options)

    plan = prepared([])
    assert {"small"} == {"small", "large"} & {job.name for job in plan.jobs} and not plan.lacks
    assert any(note.startswith("large: left out, the dataset 'imagenet' is not in") for note in plan.notes)
    with pytest.raises(InputError, match="the dataset 'imagenet' is not in"):
        prepared(["large"])
    assert prepared([], dry_run=True).lacks and "large: left out" not in str(prepared([], dry_run=True).notes)


@pytest.mark.parametrize(("text", "answer"), [
    ("a: [1", "parsing"), ("- a", "lines of"), ("", "lines of"), ("1: 2", "lines of"), ("models: 3", "lines of"),
    ("partition: gpu", "partition"), ("timeout_min: long", "timeout_min"), ("slurm_colour: red", "colour"),
    ("experiments: {gpus: 1}", "gpus"), (None, "No such file")])  # fmt: skip
def test_wrong_options_are_one_line_and_nothing_is_submitted(text, answer, notebooks, tmp_path):
    path = tmp_path / "options.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=answer) as caught:
        cluster.prepare(["small"], "smoke", {}, "local", path, notebooks=notebooks)
    assert len(str(caught.value).splitlines()) == 1 and not results().exists()


@pytest.mark.parametrize(("words", "answer"), [
    (["--cluster", "cloud"], "slurm, local"), (["--dry-run"], "go with --cluster"),
    (["--cluster-options", "x.yaml"], "go with --cluster"), (["--cluster", "local", "--bare"], "limits of their own"),
    (["--cluster", "local", "--time-limit", "9m"], "timeout_min"), (["--cluster", "slurm"], "srun")])  # fmt: skip
def test_words_that_do_not_go_together_are_refused(words, answer, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert cli.main(["reproduce", "tour", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert answer in line


def test_without_submitit_it_says_what_to_install(notebooks, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(InputError, match=r"bagssl\[cluster\]"):
        submit(notebooks)


def test_images_that_no_job_could_find_are_trained_on_by_the_notebook(notebooks):
    text = json.loads((notebooks / "small.ipynb").read_text())
    for cell in text["cells"]:
        cell["source"] = "".join(cell["source"]).replace("70)", "70, seed=3)")
    (notebooks / "small.ipynb").write_text(json.dumps(text))
    (job,) = cluster.prepare(["small"], "smoke", {}, "local", notebooks=notebooks).jobs
    assert job.name == "small" and not job.needs


def test_ctrl_c_ends_the_jobs(notebooks, monkeypatch, alone):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cluster, "_progress", interrupted)
    with pytest.raises(Stopped) as caught:
        submit(notebooks, overrides={"epochs": 5000})
    assert caught.value.interrupted and not finished()
