"""A fresh clone makes the results of a record again without training: from its models and what was measured of them."""

from __future__ import annotations

import shutil

import nbformat
import pytest
import yaml

from bagssl import runs
from bagssl.batch import cost, reproduce, stages
from bagssl.batch.experiments import load_experiments
from bagssl.runs import HALF, WEIGHTS

PARAMETERS = "dataset: str = 'synthetic'\nopened: bool = False\n"
WORK = """import os
from bagssl import data, pretraining
from bagssl.config import PretrainConfig
from bagssl.study import comparison, tables
if not os.environ.get("MAY_TRAIN"):
    pretraining.train = None
train, test = (data.subset(data.load(dataset, split), 100) for split in ("train", "test"))
config = {"size": 8, "width": 8, "projector_hidden": 16, "projector_dim": 8, "batch_size": 16, "epochs": 1}
configs = [PretrainConfig(training=training, **config) for training in ("patch-based", "untrained")]
trained = comparison.train_all(configs, train, device="cpu", progress=False)
measured = comparison.measure_all(trained, train, test, [0, 4], probes=["knn"], scale=0.25, progress=False)
output = comparison.output_folder("small")
tables.write_table(comparison.over_seeds(measured), output, "accuracy")
if opened:
    print(pretraining.load_encoder(trained[0])(test.pixels[:2, :, :8, :8] / 255).sum())
    print(pretraining.load_encoder(trained[1])(test.pixels[:2, :, :8, :8] / 255).sum())
comparison.provenance(output, trained, {"training": train}, opened=opened)"""


@pytest.fixture
def notebooks(tmp_path):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    cells = [nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(WORK)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "small.ipynb")
    entries = {name: {"artefact": "none", "notebook": "small.ipynb", "profiles": {"laptop": {
        "cost": "1 s", "parameters": {"opened": name == "look"}}}} for name in ("table", "look")}  # fmt: skip
    (folder / "experiments.yaml").write_text(yaml.safe_dump(entries))
    return folder


def printed(notebook):
    outputs = nbformat.read(notebook, 4).cells[-1].outputs
    return [output.text for output in outputs if output.output_type == "stream"]


def test_a_record_is_made_again_from_its_models_alone(notebooks, tmp_path, monkeypatch):
    def made(where, names=("table", "look")):
        return reproduce.reproduce(names, "laptop", notebooks=notebooks, results=tmp_path / where)

    monkeypatch.setenv("MAY_TRAIN", "yes")
    assert made("first", ["table"]) == 0
    models = tmp_path / "first/laptop/runs"
    (trained,) = [run for run in runs.list_runs(models) if run.config["epochs"]]
    assert trained.halved
    assert made("first") == 0
    assert (trained.path / WEIGHTS).exists() and not (trained.path / HALF).exists()  # what a notebook opens is whole
    names = sorted(run.path.name for run in runs.list_runs(models))
    folders = [tmp_path / f"first/laptop/{name}" for name in ("table", "look")]
    for folder in folders:
        assert stages.read_record(folder / "provenance.json")["runs"] == names and not (folder / "runs").exists()
    stage = stages.plan(load_experiments(notebooks)["table"], "laptop", results=tmp_path / "first")
    assert stages.state(stage) == "fresh"

    monkeypatch.delenv("MAY_TRAIN")
    monkeypatch.setenv("BAGSSL_RUNS", str(tmp_path / "empty"))
    assert made("second") == 1  # negative control: no record, and training is refused
    shutil.rmtree(tmp_path / "empty")
    monkeypatch.setenv("BAGSSL_RECORD", str(models))
    found = cost.cost("table", "laptop", notebooks=notebooks)
    assert len(found.done.models) == 2 and not any(row.work.crops for row in found.rows)
    assert made("second") == 0
    for name in ("table", "look"):
        first, second = (tmp_path / where / "laptop" / name for where in ("first", "second"))
        assert (first / "tables/accuracy.csv").read_bytes() == (second / "tables/accuracy.csv").read_bytes()
        first, second = (printed(each / f"{name}.ipynb") for each in (first, second))
        assert first == second and bool(first) == (name == "look")

    shutil.rmtree(trained.path)  # a model that results name is gone
    assert stages.state(stage) == "stale"
