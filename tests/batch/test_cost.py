"""What an experiment costs: counted by its own cells, without any work, and priced by measured rates alone."""

from __future__ import annotations

import json
import signal

import pytest
import torch
from test_experiments import write_list, write_notebook

from bagssl import budget, cli, data, evaluation, pretraining
from bagssl.batch import cost, rehearsal
from bagssl.batch.notebook import run_cells
from bagssl.batch.rehearsal import Rehearsal, Work, embedded_flops, rehearse, trained_flops
from bagssl.config import PretrainConfig
from bagssl.errors import InputError, Stopped
from bagssl.paths import runs_root
from bagssl.runs import list_runs

PARAMETERS = """dataset: str = "synthetic"
epochs: float = 2.0
ks: list[int] = [0, 1, 4]
bad: bool = False
"""
TRAIN = """import torch
from bagssl import data
from bagssl.bags import embed_bags, patch_embeddings
from bagssl.errors import InputError
from bagssl.pretraining import load_encoder
from bagssl.study import comparison
if epochs > 100:
    raise InputError("epochs: too many")
train, test = (data.subset(data.load(dataset, split), count) for split, count in (("train", 70), ("test", 20)))
recipe = {"dataset": dataset, "epochs": epochs, "views": 3, "batch_size": 16, "size": 8, "encoder": "resnet10",
          "width": 8, "projector_hidden": 16, "projector_dim": 8}
trained = comparison.train_all(comparison.arms(["simclr", "byol"], [0], recipe, {}, ["patch-based"]), train)"""
MEASURE = """how = {"scale": 0.25, "features": ["h", "z"]}
measured = comparison.measure_all(trained, train, test, ks, probes=["knn"], **how)
measured = comparison.measure_all(trained, train, test, ks[:2], scale=0.25, probes=["linear"])  # the same patches
bags = embed_bags(load_encoder(trained[0]), test.pixels, [2], scale=0.5, size=None)
boxes = torch.tensor([0, 0, 9, 9]).expand(5, 20, 4)
assert patch_embeddings(load_encoder(trained[0]), test.pixels, boxes, 8).shape == (5, 20, bags[2].shape[1])
load_encoder(trained[1])(torch.rand(3, 3, 8, 8))"""
NONSENSE = "assert not bad, 'nonsense'\nwhile epochs == 3: pass"
CROPS = 2 * (70 // 16) * 16 * 3  # of a training: epochs x steps x images x views


@pytest.fixture
def notebook(tmp_path):
    path = tmp_path / "notebooks" / "small.ipynb"
    path.parent.mkdir()
    write_notebook(path, [TRAIN, MEASURE, NONSENSE], PARAMETERS)
    return path


def crops_of(noted: Rehearsal, kind: str) -> int:
    return sum(work.crops for work in noted.works.values() if work.kind == kind)


def store() -> dict:
    return {path: path.read_bytes() for path in runs_root().rglob("*") if path.is_file()}


def test_what_is_counted_is_what_a_real_run_then_does(notebook, monkeypatch):
    noted = rehearse(notebook, {})
    assert not noted.ended and not noted.models and not runs_root().exists()
    done, usual = [], budget.piece

    def piece(label, kind, units, *how, **more):
        done.append((kind[0], units))
        return usual(label, kind, units, *how, **more)

    monkeypatch.setattr(budget, "piece", piece)
    run_cells(notebook, {})
    runs = {run.path.name: run for run in list_runs()}
    trained = {work.model: work for work in noted.works.values() if work.kind == "training"}
    assert runs.keys() == trained.keys() and len(runs) == 3
    for name, run in runs.items():
        assert trained[name].crops == run.metrics["crops"] == CROPS * (run.config["training"] != "untrained")
        assert trained[name].images == run.metrics["steps"] * 16
        config = trained[name].config
        weights, _ = cost._bytes(config, pretraining.build_model(config))
        assert abs(weights / (run.path / "weights.safetensors").stat().st_size - 1) < 0.2
    embedded = sum(units for kind, units in done if kind == "embedding")
    assert crops_of(noted, "embedding") - 3 == embedded  # three were shown to the network itself
    assert embedded == 3 * 90 * 5 + 20 * 2 + 5 * 20
    probed = [kind for kind, _ in done if kind in ("knn", "linear")]
    assert len(probed) == sum(len(work.fits) for work in noted.works.values()) == 3 * (3 * 2 + 2)


def test_what_the_store_holds_costs_nothing_and_stays_as_it_is(notebook):
    run_cells(notebook, {"ks": [0, 1]})
    before = store()
    noted = rehearse(notebook, {"ks": [0, 1]})
    assert store() == before
    assert len(noted.models) == 3 and len(noted.evaluations) == 6
    assert {work.kind for work in noted.works.values()} == {"embedding"}  # what the cells themselves ask of networks
    more = rehearse(notebook, {"ks": [0, 1, 4]})
    assert store() == before
    assert len(more.models) == 3 and not crops_of(more, "training")
    assert len(more.evaluations) == 3 and crops_of(more, "embedding") > crops_of(noted, "embedding")
    other = rehearse(notebook, {"ks": [0, 1], "epochs": 1.0})  # the untrained one is the same
    assert len(other.models) == 1 and crops_of(other, "training") == CROPS  # half as long, two models


def test_of_a_training_that_was_stopped_only_the_rest_counts(notebook):
    train = data.subset(data.load("synthetic", "train"), 70)
    noted = rehearse(notebook, {})
    config = next(work.config for work in noted.works.values() if work.crops and work.config.objective == "simclr")
    with pytest.raises(Stopped):
        pretraining.pretrain(config, train, time_limit=1e-9, progress=False)
    assert crops_of(rehearse(notebook, {}), "training") == 2 * CROPS - config.crops_per_step


def test_all_is_in_its_place_afterwards(notebook):
    before = pretraining.train, pretraining._load, evaluation.embed_bags, evaluation._probe, evaluation.load_network
    rehearse(notebook, {})
    rehearse(notebook, {"bad": True})
    assert before == (pretraining.train, pretraining._load, evaluation.embed_bags, evaluation._probe,
                      evaluation.load_network)  # fmt: skip


def test_where_a_cell_cannot_go_on_the_count_ends_and_says_so(notebook):
    noted = rehearse(notebook, {"bad": True})
    assert noted.ended == "small.ipynb, cell [4]: AssertionError: nonsense" and crops_of(noted, "training") == 2 * CROPS
    found = cost.Cost([cost._row(work, cost._Rates("x", {})) for work in noted.works.values()], noted, "x")
    assert cost.table(found)[-1][6].startswith("≥")
    assert any("cell [4]" in line for line in cost.notes(found, None, None))
    with pytest.raises(InputError, match="epochs: too many"):  # what is refused before any work is no count
        rehearse(notebook, {"epochs": 101.0})


def test_arithmetic_with_nonsense_is_not_waited_for(notebook, monkeypatch):
    monkeypatch.setattr(rehearsal, "PATIENCE", 3.0)
    before = signal.getsignal(signal.SIGALRM)
    noted = rehearse(notebook, {"epochs": 3.0})
    assert noted.ended == "small.ipynb, cell [4]: Enough: nothing more was asked of a network in 3 s"
    assert crops_of(noted, "training") == 3 * CROPS
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_a_cell_that_fails_before_anything_is_counted_is_no_count_of_nothing(tmp_path):
    write_notebook(tmp_path / "fine.ipynb", ["from bagssl import data\ndata.check('synthetic')"])
    assert rehearse(tmp_path / "fine.ipynb", {}).ended == ""
    write_notebook(tmp_path / "wrong.ipynb", ["1 / 0"])
    with pytest.raises(InputError, match=r"cannot be counted: wrong.ipynb, cell \[\d\]: ZeroDivisionError"):
        rehearse(tmp_path / "wrong.ipynb", {})


@pytest.mark.parametrize("half", ["bfloat16", "float32"])
def test_of_two_processors_of_one_name_it_is_the_one_of_this_precision(half, monkeypatch):
    here = cost.runs.hardware() | {"gpu": None}
    tables = {kind: {"hardware": here, "precision": kind, "rows": {}} for kind in ("bfloat16", "float32")}
    monkeypatch.setattr(cost, "measured", lambda: tables)
    monkeypatch.setattr(cost.runs, "hardware", lambda: here)
    monkeypatch.setattr(cost, "pick_precision", lambda *_: getattr(torch, half))
    assert cost._machine(None, None)[1]["precision"] == half


@pytest.mark.parametrize("encoder, forward, both", [("resnet18", 1.11, 3.33), ("resnet34", 2.32, 6.95)])
def test_flops_are_those_of_the_literature_a_multiply_add_as_two(encoder, forward, both):
    config = PretrainConfig(encoder=encoder, width=64, size=32)
    assert embedded_flops(config) / 1e9 == pytest.approx(forward, rel=0.01)
    assert trained_flops(config) / 1e9 == pytest.approx(both, rel=0.01)
    averaged = PretrainConfig(encoder=encoder, width=64, size=32, objective="byol")
    assert trained_flops(averaged) / 1e9 == pytest.approx(both + forward, rel=0.01)  # once more through the target
    assert embedded_flops(PretrainConfig(encoder=encoder, width=64, size=16)) / 1e9 < 0.3 * forward


MACHINE = {"hardware": {"gpu": "NVIDIA X", "cores": 8, "processor": "Y"}, "precision": "bfloat16", "rows": {
    "utilisation": [
        {"measure": "training, resnet18 at 32 px: share of the bfloat16 product rate", "unit": "FLOP/s", "rate": 2e12},
        {"measure": "training, resnet18 at 64 px: share of the bfloat16 product rate", "unit": "FLOP/s", "rate": 4e12},
        {"measure": "embedding, resnet18 at 32 px: share of the bfloat16 product rate", "unit": "FLOP/s", "rate": 1e12},
    ],
    "aggregation": [
        {"measure": "60,000 images, 256 patches of each at 32 px: share of the bfloat16 rate", "unit": "FLOP/s",
         "rate": 8e12}],
    "probes": [{"measure": "kNN probe, 50,000 and 10,000 images x 512", "unit": "s", "ratio": 6.0}]}}  # fmt: skip


def work(kind: str, size: int = 32, **more) -> Work:
    return Work("m", kind, crops=100, flops=8e12, encoder="resnet18", size=size, **more)


def test_hours_are_by_the_row_of_the_bench_that_is_nearest_and_without_one_there_are_none():
    rates = cost._Rates("X", MACHINE)
    assert rates.seconds(work("training")) == (4.0, "training, resnet18 at 32 px: 2e+12 FLOP/s")
    assert rates.seconds(work("training", 64))[0] == 2.0
    far = rates.seconds(work("training", 96))
    assert far[0] == 2.0 and far[1].endswith("taken for it by FLOPs")
    assert rates.seconds(work("embedding"))[0] == 8.0
    assert rates.seconds(work("embedding", largest=10_000_000))[0] == 1.0  # a long pass is compiled
    assert rates.seconds(Work("m", "knn", fits=[(50_000, 5_000, 512)] * 2))[0] == pytest.approx(6.0)
    assert rates.seconds(Work("m", "linear", fits=[(50_000, 5_000, 512)])) == (None, "no rate measured")
    assert cost._Rates("X", {}).seconds(work("training")) == (None, "no rate measured")
    assert cost._Rates("X", {}, 50.0).seconds(work("training"))[0] == 2.0
    assert cost._Rates("X", {}, 50.0).seconds(work("embedding"))[0] is None


def test_of_a_network_far_smaller_than_those_measured_no_hours_are_foretold():
    fresh = {"measure": "training at 32 px, fresh crops for each step", "unit": "crops/s", "rate": 1e5}
    rates = cost._Rates("X", {**MACHINE, "rows": {**MACHINE["rows"], "fresh": [fresh]}})  # so 2e7 FLOP a crop
    at = 2e7 / cost.SMALLER
    assert rates.seconds(Work("m", "training", crops=10, flops=9 * at, encoder="resnet18", size=32)) == (
        None, "no rate measured of networks so small")
    assert rates.seconds(Work("m", "training", crops=10, flops=11 * at, encoder="resnet18", size=32))[0] is not None
    assert rates.seconds(Work("m", "embedding", crops=10, flops=9 * at, encoder="resnet18", size=32))[0] is not None


def test_fresh_crops_cost_by_their_pixels_and_only_in_training():
    cut = [{"measure": f"augmentation, {what} of {size} px", "unit": "crops/s", "rate": rate}
           for what, size, rate in (("patches", 16, 400.0), ("patches", 32, 50.0), ("multi-scale crops", 32, 25.0))]
    rates = cost._Rates("X", MACHINE | {"rows": MACHINE["rows"] | {"augmentation": cut}})
    seconds, source = rates.seconds(work("training"))
    assert seconds == 4.0 + 100 / 50 and source.endswith("; augmentation, patches of 32 px: 50 crops/s")
    assert rates.seconds(work("training", 64))[0] == 2.0 + 4 * 100 / 50
    multi = PretrainConfig(training="multi-scale")
    assert rates.seconds(work("training", config=multi))[0] == 4.0 + 100 / 25
    assert rates.seconds(work("embedding"))[0] == 8.0


def test_gpus_take_models_and_what_has_no_rate_is_not_in_the_sum():
    def row(model: str, seconds: float | None) -> cost.Row:
        return cost.Row(Work(model, "training", crops=1), seconds, "here" if seconds else "no rate measured")

    found = cost.Cost([row("a", 3600), row("b", 3600), row("a", 1800), row("c", 900)], Rehearsal(), "X")
    assert found.wall(1) == found.seconds == 9900 and found.wall(2) == 5400 and found.wall(8) == 5400
    assert cost.table(found, 2.0)[-1][-1] == "5.50" and cost.table(found)[-1][6] == "2.75"
    assert "8 GPUs, each with one model at a time: 1.5 hours; 8 held so long: 24.00 EUR" in cost.notes(found, 8, 2.0)
    lacking = cost.Cost([*found.rows, row("d", None)], Rehearsal(), "X")
    assert cost.table(lacking, 2.0)[-1][-1] == "≥ 5.50" and cost.table(lacking, 2.0)[-2][-1] == ""
    assert any(line.startswith("no rate measured on X") for line in cost.notes(lacking, None, None))


def test_memory_grows_with_the_crops_of_a_step_and_is_half_in_two_bytes():
    def memory(half: bool = False, **settings) -> int:
        config = PretrainConfig(size=16, **settings)
        return cost._memory(config, pretraining.build_model(config), half, 0)

    one, two, three = (memory(batch_size=each) for each in (64, 128, 192))
    assert two - one == three - two > 0 and (memory(True, batch_size=128) - (two - 2 * (two - one))) == two - one
    config = PretrainConfig(size=16, batch_size=64)
    assert cost._memory(config, pretraining.build_model(config), False, 1000) == one + 1000


def test_the_command_prints_a_table_its_sum_and_where_rates_come_from(notebook, tmp_path, monkeypatch, capsys):
    entry = {"artefact": "x", "notebook": "small.ipynb", "profiles": {"smoke": {"cost": "1 s", "parameters": {}}}}
    monkeypatch.setattr(cost, "load_experiments", lambda _: load(notebook, entry))
    folder = tmp_path / "results" / "bench"
    folder.mkdir(parents=True)
    (folder / "x.json").write_text(json.dumps(MACHINE))
    assert cli.main(["cost", "small", "--machine", "x", "--gpus", "2", "--price", "1.5"]) == 0
    shown = capsys.readouterr().out
    assert f"{CROPS:,}" in shown and "[1] NVIDIA X: training, resnet18 at 32 px: 2e+12 FLOP/s, taken for it" in shown
    assert "no rate measured" in shown and "in the store, and costs nothing: models 0" in shown and "EUR" in shown
    for words, said in ((["nothing"], "unknown experiment"), (["small", "--gpus", "0"], "above 0"),
                        (["small", "--machine", "y"], "unknown machine"), (["small", "--price", "-1"], "above 0"),
                        (["small", "--rate", "nan"], "above 0"), (["small", "--profile", "paper"], "no profile"),
                        (["small", "--set", "dataset=cifar10"], "'cifar10' is not in")):  # fmt: skip
        assert cli.main(["cost", *words]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


def load(notebook, entry):
    from bagssl.batch.experiments import load_experiments

    for name in ("good", "killed", "left", "stopped", "refused", "long"):
        write_notebook(notebook.with_name(f"{name}.ipynb"), [])
    write_list(notebook.parent, small=entry)
    return load_experiments(notebook.parent)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["patch-vs-multiscale", "fast-run", "locality", "attribution", "convergence", "tour",
                                  "aggregation-gain", "patch-scale", "many-patches"])
def test_the_notebooks_are_counted_to_their_last_cell(name):
    from bagssl.batch.experiments import load_experiments

    noted = rehearse(load_experiments()[name].notebook, {})
    assert noted.ended == "" and crops_of(noted, "training") and crops_of(noted, "embedding")
