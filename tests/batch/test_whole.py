"""`reproduce --bare --whole` on boxes that are gone when their time is up: nothing is begun that cannot end."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import nbformat
import pytest
import yaml
from test_budget import Clock

from bagssl import budget, cli, evaluation, packing, pretraining, recording, runs
from bagssl.batch import reproduce
from bagssl.batch.experiments import load_experiments, order_of_worth
from bagssl.errors import InputError

PARAMETERS = "seeds: list[int] = [0]\ndataset: str = 'synthetic'\n"
WORK = """from bagssl import data
from bagssl.config import PretrainConfig
from bagssl.study import comparison, tables
train, test = (data.subset(data.load(dataset, split), 100) for split in ("train", "test"))
config = {"size": 8, "width": 8, "projector_hidden": 16, "projector_dim": 8, "batch_size": 16, "epochs": 4}
configs = [PretrainConfig(seed=seed, **config) for seed in seeds]
trained = comparison.train_all(configs, train, device="cpu", progress=False)
comparison.measure_all(trained, train, test, [0, 4], probes=["knn"], scale=0.25, progress=False)"""
MODEL, EVALUATION = 4 * 6 * 16 * 4, 2 * 100 * 5 + 2 * 100  # crops of a model; of its bags, and images of two probes


@pytest.fixture(scope="module")
def notebooks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("notebooks")
    cells = [nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(WORK)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "train.ipynb")
    profile = {"smoke": {"cost": "1 s", "parameters": {}}}
    entries = {name: {"artefact": "none", "notebook": "train.ipynb", "profiles": profile} for name in "ab"}
    worth = [{"b": {"seeds": [0]}}, {"a": {"seeds": [0, 1]}}, {"b": {"seeds": [2]}}]
    (folder / "experiments.yaml").write_text(yaml.safe_dump({**entries, "order-of-worth": {"smoke": worth}}))
    return folder


@pytest.fixture
def box(notebooks, monkeypatch, tmp_path):
    """Call it: `reproduce --whole` on a machine with nothing but the packs, that lives for some seconds, and its words.

    Work goes at 100 crops a second, by a clock of its own.
    """
    clock, count = Clock(), iter(range(100))
    for module in (budget, evaluation, pretraining, recording, reproduce):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setenv("BAGSSL_PACE", "100")
    packs = tmp_path / "packs"

    def call(capsys, seconds: float) -> tuple[int, str, float, Path]:
        store = tmp_path / f"box {next(count)}"
        monkeypatch.setenv("BAGSSL_RUNS", str(store))
        monkeypatch.setattr(budget, "_rates", {})
        evaluation._recent.clear()
        if packs.exists():
            packing.unpack([packs])
            shutil.copy(packs / reproduce.ENDED, store)
        begun = clock.now
        code = reproduce.reproduce_bare(time_limit=seconds, whole=True, notebooks=notebooks)
        took, finished = clock.now - begun, [run for run in runs.list_runs() if run.finished]
        packing.export(finished, packs, weights="fp32", new=True)
        if (store / reproduce.ENDED).exists():
            shutil.copy(store / reproduce.ENDED, packs)
        said = capsys.readouterr()
        return code, said.out + said.err, took, store

    call.packs = packs
    yield call
    evaluation._recent.clear()


def content(store: Path) -> dict[str, object]:
    """Weights, histories and accuracies of finished runs, without times."""
    found = {}
    for run in runs.list_runs(store):
        assert run.finished and not (run.path / "checkpoint.pt").exists()
        rows = [json.loads(path.read_text())["rows"] for path in sorted(run.path.glob("evaluations/*.json"))]
        found[run.key] = (run.metrics["weights_sha256"], rows)
    return found


def test_three_boxes_that_die_do_together_what_one_does(box, capsys, monkeypatch, tmp_path):
    models, evaluations = MODEL / 100, EVALUATION / 100
    code, said, took, store = box(capsys, 1000)
    assert code == 0 and "new: models 3, evaluations 3; of 3 entries 0 did not fit" in said
    assert took == pytest.approx(3 * (models + evaluations), abs=0.1)
    undisturbed = content(store)
    shutil.rmtree(box.packs)

    limit = 1.3 * (models + evaluations)  # of one model at a time
    for call in range(3):
        code, said, took, store = box(capsys, limit)
        assert took <= limit, "it overran its time"
        assert f"new: models 1, evaluations 1; of 3 entries {2 - call} did not fit" in said
        assert code == (0 if call == 2 else 3) and said.count("left: ") == 2 - call
        begun = [run for run in runs.list_runs(store) if not run.finished]
        assert not any((run.path / "checkpoint.pt").exists() for run in begun), "half a model is of no use there"
    assert [line for line in said.splitlines() if "starts" in line or "before" in line] == [
        "[1/3] b seeds=[0]: done before", "[2/3] a seeds=[0, 1]: done before", "[3/3] b seeds=[2]: starts"]

    before = sorted(box.packs.iterdir())
    code, said, took, store = box(capsys, limit)
    assert (code, took) == (0, 0) and "nothing new" in said and sorted(box.packs.iterdir()) == before
    assert said.count("done before") == 3
    assert content(store) == undisturbed


def test_of_several_models_those_that_fit_are_trained_and_the_others_named(box, capsys):
    code, said, _, store = box(capsys, 1.5 * MODEL / 100)
    finished = [run for run in runs.list_runs(store) if run.finished]
    assert code == 3 and len(finished) == 1
    assert "[2/3] a seeds=[0, 1]: left: synthetic-tcr-patch-based-seed1 takes " in said
    assert "[3/3] b seeds=[2]: left: synthetic-tcr-patch-based-seed2 takes " in said


def test_without_whole_a_model_stops_at_a_checkpoint_and_goes_on(box, notebooks, capsys, monkeypatch, tmp_path):
    """Negative control: right for a machine that stays."""
    monkeypatch.setenv("BAGSSL_RUNS", str(tmp_path / "stays"))
    assert "BAGSSL_WHOLE" not in os.environ
    with monkeypatch.context() as patch:
        patch.setattr(pretraining, "time", Clock())
        pretraining.time.monotonic = lambda: 1e9
        assert reproduce.reproduce_bare(["a"], time_limit=10, notebooks=notebooks) == 3
    (run,) = runs.list_runs(tmp_path / "stays")
    assert not run.finished and (run.path / "checkpoint.pt").exists()


def test_an_entry_whose_data_is_not_here_is_left_out_and_the_others_are_done(notebooks, tmp_path, capsys, monkeypatch):
    shutil.copytree(notebooks, tmp_path / "notebooks")
    path = tmp_path / "notebooks" / "experiments.yaml"
    entries = yaml.safe_load(path.read_text())
    entries["order-of-worth"] = {"smoke": [{"a": {"dataset": "cifar100"}}, {"a": {}}]}
    path.write_text(yaml.safe_dump(entries))
    assert reproduce.reproduce_bare(time_limit=100, whole=True, notebooks=path.parent) == 0
    said = capsys.readouterr().out
    assert "a dataset=cifar100: left out, cifar100 is not here" in said and "[1/1] a: done" in said


@pytest.mark.parametrize("worth", [["a"], [{"a": None}], [{"a": {}, "b": {}}], [3]])
def test_a_wrong_order_of_worth_is_refused_in_one_line(notebooks, tmp_path, worth):
    shutil.copytree(notebooks, tmp_path / "notebooks")
    path = tmp_path / "notebooks" / "experiments.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "order-of-worth": {"smoke": worth}}))
    with pytest.raises(InputError, match="order-of-worth: smoke: .*must be an experiment with its parameters"):
        order_of_worth("smoke", path.parent)


def test_the_order_of_worth_of_the_project_names_what_there_is():
    for profile in ("smoke", "paper"):
        for experiment, parameters in order_of_worth(profile):
            reproduce.resolve(experiment, profile, parameters)
    assert order_of_worth("smoke") and order_of_worth("paper")[0][0].name == "patch-vs-multiscale-cifar10"
    every = {name for name, each in load_experiments().items() if "paper" in each.profiles and "cifar10" in name}
    assert {experiment.name for experiment, _ in order_of_worth("paper")} >= every
    assert [(each.name, given) for each, given in order_of_worth("laptop")] == [
        (name, {}) for name, each in load_experiments().items() if "laptop" in each.profiles]  # fmt: skip


@pytest.mark.parametrize("words", [["--whole"], ["--whole", "--bare"], ["--whole", "--time-limit", "9m"]])
def test_whole_is_for_a_box_with_a_time_limit(words, capsys):
    assert cli.main(["reproduce", "tour", *words]) == 2
    assert capsys.readouterr().err == (
        "bagssl: --whole is for a box that is gone afterwards: give --bare and --time-limit with it\n")  # fmt: skip


# ---- what was trained elsewhere, in the notebook here

TABLES = WORK + """
from bagssl.study import tables
output = comparison.output_folder("tables")
measured = comparison.measure_all(trained, train, test, [0, 4], probes=["knn"], scale=0.25, progress=False)
tables.write_table(comparison.over_seeds(measured), output, "accuracy")
tables.write_table(comparison.provenance(output, trained, {}).loc[["runs"]], output, "made_with")
"""
LOOK = TABLES + "from bagssl.pretraining import load_encoder\nload_encoder(trained[0])\n"


def tables(folder: Path, cells: str, results: Path, monkeypatch) -> dict[str, bytes]:
    """The tables of a notebook, from the models in the store of `results`; InputError's words where it ends in one."""
    monkeypatch.setenv("BAGSSL_RUNS", str(results / "runs"))
    monkeypatch.setenv("BAGSSL_OUTPUT", str(results / "output"))
    cells = [nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(cells)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "tables.ipynb")
    profile = {"smoke": {"cost": "1 s", "parameters": {}}}
    entry = {"artefact": "none", "notebook": "tables.ipynb", "profiles": profile}
    (folder / "experiments.yaml").write_text(yaml.safe_dump({"tables": entry}))
    evaluation._recent.clear()
    code = reproduce.reproduce_bare(["tables"], notebooks=folder)
    return {"code": code, **{path.name: path.read_bytes() for path in (results / "output").glob("tables/*")}}


def test_tables_of_imported_runs_are_those_of_the_original_to_the_byte_with_and_without_weights(
    tmp_path, monkeypatch, capsys
):
    original = tables(tmp_path, TABLES, tmp_path / "original", monkeypatch)
    assert original["code"] == 0 and len(original) == 7
    trained = runs.list_runs(tmp_path / "original/runs")
    for weights in ("fp32", "none"):
        packs, results = tmp_path / f"packs {weights}", tmp_path / weights
        packing.export(trained, packs, weights=weights)
        packing.unpack([packs], results / "runs")
        with monkeypatch.context() as patch:
            patch.setattr(pretraining, "train", lambda *_: 1 / 0)
            patch.setattr(evaluation, "_embed", lambda *_: 1 / 0)
            assert tables(tmp_path, TABLES, results, patch) == original
    # negative controls: a store with nothing in it trains, and what needs an encoder says that there is none
    with monkeypatch.context() as patch:
        patch.setattr(pretraining, "train", lambda *_: 1 / 0)
        assert tables(tmp_path, TABLES, tmp_path / "empty", patch) == {"code": 1}
    capsys.readouterr()
    looked = tables(tmp_path, LOOK, tmp_path / "none", monkeypatch)
    assert looked == {**original, "code": 2}
    assert "has no weights: copy weights.safetensors from" in capsys.readouterr().err


def test_without_names_what_others_trained_is_left_out_where_its_file_is_not_here(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notebooks").mkdir()
    cells = [nbformat.v4.new_code_cell("encoders: list[str] = []\ndataset: str = 'synthetic'\n",
                                       metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell("1 + 1")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "notebooks" / "n.ipynb")
    words = {"ours": [], "theirs": ["theirs.pth,arch=torchvision:resnet18"]}
    entries = {name: {"artefact": "none", "notebook": "n.ipynb",
                      "profiles": {"smoke": {"cost": "1 s", "parameters": {"encoders": each}}}}
               for name, each in words.items()}  # fmt: skip
    (tmp_path / "notebooks/experiments.yaml").write_text(yaml.safe_dump(entries))
    assert reproduce.reproduce_bare([], notebooks=tmp_path / "notebooks") == 0
    said = capsys.readouterr().out
    assert f"theirs: left out, {tmp_path / 'theirs.pth'} is not here" in said and "[1/1] ours: done" in said
    with pytest.raises(InputError, match=r"theirs.pth is not there: give a file of weights"):
        reproduce.reproduce_bare(["theirs"], notebooks=tmp_path / "notebooks")
    entries["order-of-worth"] = {"smoke": [{"theirs": {}}, {"ours": {}}]}
    (tmp_path / "notebooks/experiments.yaml").write_text(yaml.safe_dump(entries))
    assert reproduce.reproduce_bare(time_limit=100, whole=True, notebooks=tmp_path / "notebooks") == 0
    said = capsys.readouterr().out
    assert f"theirs: left out, {tmp_path / 'theirs.pth'} is not here" in said and "[1/1] ours: done" in said
    (tmp_path / "theirs.pth").touch()
    assert reproduce.reproduce_bare([], notebooks=tmp_path / "notebooks") == 0
    assert "[2/2] theirs: done" in capsys.readouterr().out


def test_without_names_what_has_no_data_here_is_left_out_unless_it_was_asked_for(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BAGSSL_DATA", str(tmp_path / "data"))
    (tmp_path / "notebooks").mkdir()
    cells = [nbformat.v4.new_code_cell("dataset: str = 'synthetic'\n", metadata={"tags": ["parameters"]}),
             nbformat.v4.new_code_cell("1 + 1")]  # fmt: skip
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "notebooks" / "n.ipynb")
    entries = {name: {"artefact": "none", "notebook": "n.ipynb",
                      "profiles": {"smoke": {"cost": "1 s", "parameters": each}}}
               for name, each in {"here": {}, "elsewhere": {"dataset": "imagenette"}}.items()}  # fmt: skip
    (tmp_path / "notebooks/experiments.yaml").write_text(yaml.safe_dump(entries))
    assert reproduce.reproduce_bare([], notebooks=tmp_path / "notebooks") == 0
    said = capsys.readouterr().out
    assert "elsewhere: left out, the dataset 'imagenette' is not in" in said and "add it by bagssl data add" in said
    assert "[1/1] here: done" in said
    for names, asked in ((["elsewhere"], {}), ([], {"dataset": "imagenete"})):
        with pytest.raises(InputError, match=r"n\.ipynb\): the dataset 'imagenet+e' is not in"):
            reproduce.reproduce_bare(names, overrides=asked, notebooks=tmp_path / "notebooks")
