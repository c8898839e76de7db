"""No size that the data decides is refused after the work: the notebooks' first cells look at every one of them."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bagssl import data, evaluation, probes
from bagssl.batch.notebook import run_cells
from bagssl.config import PretrainConfig
from bagssl.data import Images
from bagssl.errors import InputError
from bagssl.pretraining import pretrain
from bagssl.study import comparison, locality, sizes

pytestmark = pytest.mark.usefixtures("one_thread")

NOTEBOOKS = {path.name[:2]: path for path in (Path(__file__).parents[2] / "notebooks").glob("*.ipynb")}
HOSTILE = ("$1_$5", "$5_$9", "**a** | b", "x" * 200)  # names of classes
RECIPE = {"size": 8, "width": 8, "epochs": 1.0, "views": 2, "batch_size": 4,
          "recipe": {"projector_hidden": 16, "projector_dim": 8}}  # fmt: skip
ASKED = {  # the least that each notebook does on the dataset "few"
    "00": {"dataset": "synthetic"}, "01": {"starts": [0], "objectives": ["spectral"]},
    "02": {"seeds": [0], "ks": [0, 1, 4], "probe_images": 0},
    "03": {"ks": [1, 4], "patch_scales": [0.2, 0.6], "probe_images": 0},
    "04": {"images": 20, "ks": [1, 2, 4, 8]},
    "05": {"images": 12, "count": 2, "shifts": [1], "k": 2, "queries": [0, 3]},
    "06": {"objectives": ["simclr"], "bag": 2, "probe_images": 0},
    "07": {"seeds": [0], "k": 3, "images": 8, "probe_images": 0},
    "08": {"view_counts": [2, 4], "crops": [64], "crops_per_step": 8, "bag": 2, "probe_images": 0},
    "09": {"lengths": [1.0], "changes_length": 1.0, "crops_per_step": 8, "bag": 2, "probe_images": 0},
    "10": {"patch_sizes": [8, 12], "patch_size": 8, "baseline_size": 12, "ks": [1, 4]},
    "11": {"ends": [1.0, 2.0], "images": 12, "count": 2, "shift": 1, "k": 4, "probe_images": 0, "train_images": 0},
    "12": {"bag": 2, "probe_images": 0, "train_images": 0, "changes": {"3 views": {"views": 3}}},
}  # fmt: skip
OWN = {"00": {"epochs", "views", "batch_size"}, "01": {"epochs", "views", "batch_size"},
       "08": {"epochs", "views", "batch_size"}, "09": {"epochs", "batch_size"}}  # fmt: skip


def images(train: int, test: int, side: tuple[int, int] = (16, 16), classes: tuple[str, ...] = HOSTILE):
    """A dataset as `data.EMBEDDED` has them: noise, the classes in turn."""
    def split(name: str):
        count, generator = {"train": train, "test": test}[name], torch.Generator().manual_seed(len(name))
        pixels = torch.randint(0, 256, (count, 3, *side), generator=generator).byte()
        return pixels, torch.arange(count) % len(classes), classes

    return split


WORLDS = {"few": images(40, 30), "each": images(4, 3), "one": images(30, 10, classes=("a",)),
          "specks": images(40, 30, (3, 3)), "oblong": images(40, 30, (13, 19)), "hundred": images(120, 30)}  # fmt: skip


class Began(Exception):
    """The first training would begin."""


@pytest.fixture
def run(monkeypatch):
    """Execute the cells of a notebook, up to the first training if `until` is its exception."""
    for name, split in WORLDS.items():
        monkeypatch.setitem(data.EMBEDDED, name, split)

    def execute(notebook: str, changes: dict, train=None):
        def begins(*_, **__):
            raise Began

        monkeypatch.setattr(comparison, "pretrain", train or begins)
        recipe = {name: value for name, value in RECIPE.items() if name not in OWN.get(notebook, ())}
        dataset = {} if notebook == "01" else {"dataset": "few"}
        with plt.rc_context():
            run_cells(NOTEBOOKS[notebook], {**recipe, **dataset, **ASKED[notebook], **changes})

    return execute


REFUSED = [  # notebook, what is asked, and what the refusal names
    ("00", {"ks": [1, 4]}, "ks"), ("00", {"batch_size": 10**5}, "batch_size"), ("00", {"epochs": 1e-4}, "epochs"),
    ("01", {"patch_scale": 0.25, "views": 16, "recipe": {"grid": 8}}, "views"),
    ("02", {"train_images": 41}, "train_images"), ("02", {"train_images": -1}, "train_images"),
    ("02", {"overrides": {"simclr": {"batch_size": 50}}}, "batch_size"), ("02", {"features": ["z"]}, "features"),
    ("02", {"dataset": "one"}, "dataset"), ("02", {"dataset": "each"}, "train_images"),
    ("02", {"objectives": ["simclr", "tcr"], "overrides": {"tcr": {"batch_size": 50}}}, "tcr.*batch_size"),
    ("03", {"probe_images": 41}, "probe_images"), ("03", {"patch_scales": [0.2, 0.2, 0.6]}, "patch_scales"),
    ("03", {"dataset": "specks", "patch_scale": 0.01, "patch_scales": [0.01, 0.6]}, "patch_scales"),
    ("03", {"dataset": "specks", "overrides": {"simclr": {"patch_scale": 0.01}}}, "patch_scale"),
    ("04", {"images": 31}, "images = 31 of 30"), ("04", {"images": 1}, "images"), ("04", {"ks": [1, 2]}, "ks"),
    ("04", {"ks": [4, 2, 1]}, "ks"), ("04", {"ks": [0, 1, 2, 4]}, "ks"),
    ("04", {"recipe": {"grid": 16}}, "grid"),
    ("04", {"scales": [0.2, 1.5]}, "scales"), ("04", {"scales": [0]}, "scales"),
    ("05", {"images": 41}, "images"), ("05", {"images": 7}, "images"), ("05", {"queries": [3, 12]}, "queries"),
    ("05", {"queries": []}, "queries"), ("05", {"queries": [-1]}, "queries"), ("05", {"k": 23}, "k = 23"),
    ("05", {"count": 1}, "count"), ("05", {"shifts": [9]}, "shifts"), ("05", {"shifts": []}, "shifts"),
    ("05", {"shifts": [1, 1]}, "shifts"), ("05", {"pictured": "both"}, "pictured"),
    ("06", {"dataset": "hundred", "probe_images": 2000}, "probe_images = 2000 of 120"),
    ("06", {"held_out": 0.99}, "held_out"), ("06", {"scales": [0.1, 1.5]}, "scales"), ("06", {"scales": []}, "scales"),
    ("06", {"bag": 0}, "bag"), ("06", {"probe_images": 2}, "probe_images"), ("06", {"held_out": 0.97}, "held_out"),
    ("07", {"images": 31}, "images"), ("07", {"images": -3}, "images"), ("07", {"stride": 0}, "stride"),
    ("07", {"stride": 10}, "stride"), ("07", {"k": 0}, "k = 0"), ("07", {"patch_scale": 1.0}, "stride"),
    ("07", {"dataset": "synthetic", "images": 3}, "images = 3"),
    ("08", {"dataset": "hundred", "probe_images": 2000}, "probe_images = 2000 of 120"),
    ("08", {"crops_per_step": 100}, "crops_per_step"), ("08", {"crops": [64, 1]}, "crops"),
    ("08", {"view_counts": []}, "view_counts"), ("08", {"bag": -1}, "bag"),
    ("09", {"dataset": "hundred", "probe_images": 2000}, "probe_images = 2000 of 120"),
    ("10", {"patch_sizes": [8, 1000]}, "patch_sizes"), ("10", {"patch_size": 12}, "not the largest"),
    ("10", {"patch_sizes": [8, 8, 12]}, "patch_sizes"), ("10", {"probe_images": 41}, "probe_images"),
    ("09", {"crops_per_step": 10**4}, "crops_per_step"), ("09", {"lengths": [1.0, 0.001]}, "lengths"),
    ("09", {"changes": {"a": {"patch_scale": 0.01}}, "dataset": "specks"}, "changes.*patch_scale"),
    ("09", {"changes": {"a": 3}}, "changes"),
    ("11", {"ends": []}, "ends"), ("11", {"ends": [0.0, 1.0]}, "ends"), ("11", {"ends": [0.01, 2.0]}, "ends.*until"),
    ("11", {"k": 1}, "k = 1"), ("11", {"bag": 0}, "bag = 0"), ("11", {"images": 31}, "images"),
    ("12", {"changes": {"a": {}}}, "changes: a"), ("12", {"changes": {"a": 3}}, "changes: a"),
    ("12", {"changes": {"a": {"flip": 0.5}}}, "a differs in nothing"),
    ("12", {"asked": {"b": {"k": 2}}}, "b differs in nothing"),
    ("12", {"asked": {"b": {"ks": 4}}}, "ks"), ("12", {"changes": {"a": {"vieuws": 4}}}, "vieuws"),
    ("12", {"asked": {"b": {"scale": 2.0}}}, "scale in asked"), ("12", {"probe_images": 41}, "probe_images"),
    ("12", {"changes": {"a": {"patch_scale": 0.01}}, "dataset": "specks"}, "changes.*patch_scale"),
    ("11", {"probe_images": 41}, "probe_images"), ("11", {"shift": 9}, "shift"), ("11", {"count": 1}, "count"),
    ("09", {"changes": {"a": {"epochs": 3}}}, "changes"), ("09", {"dataset": "one"}, "dataset"),
]  # fmt: skip


@pytest.mark.parametrize(("notebook", "changes", "named"), REFUSED, ids=str)
def test_what_does_not_fit_the_data_is_refused_before_anything_is_trained(notebook, changes, named, run):
    with pytest.raises(InputError, match=named) as refused:
        run(notebook, changes)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("notebook", sorted(NOTEBOOKS))
def test_with_enough_images_the_first_cells_pass_to_the_training(notebook, run):
    """The negative control of the above: what is asked at the least, and on images that are not square."""
    for dataset in ("few", "oblong") if notebook not in ("00", "01") else ("synthetic",):
        with pytest.raises(Began):
            run(notebook, {} if notebook == "01" else {"dataset": dataset})


def quietly(config, images, **options):
    return pretrain(config, images, progress=False, **options)


NAMING = ["05", "07", "09"]  # they show names in figures
OTHERS = [pytest.param(number, marks=pytest.mark.nightly) for number in ("02", "03", "04", "06", "08", "10")]


@pytest.mark.parametrize("notebook", NAMING + OTHERS)
def test_what_passes_is_trained_measured_and_drawn_to_the_last_cell(notebook, run, tmp_path, monkeypatch, capsys):
    """With names of classes, and of a choice, that would be markup: every figure is drawn with them."""
    monkeypatch.setenv("BAGSSL_OUTPUT", str(tmp_path / "shown"))
    changes = {"changes": {"[a](b) $x_$ " + "y" * 200: {"views": 4}}} if notebook == "09" else {}
    run(notebook, {"dataset": "oblong", **changes}, quietly)
    assert list((tmp_path / "shown" / "figures").glob("*.pdf"))
    assert "no font" not in capsys.readouterr().err


# ---- what the checks say, beside what the work says

few = settings(max_examples=30, deadline=None, derandomize=True, database=None)


def refusal(call, *arguments, **options) -> str:
    try:
        call(*arguments, **options)
    except InputError as error:
        return str(error)
    return ""


@few
@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.sampled_from([None, 0.2, 0.5, 0.9]))
def test_a_probe_is_refused_exactly_where_it_would_be_refused_later(labels, share):
    split = Images(torch.zeros(len(labels), 3, 4, 4, dtype=torch.uint8), torch.tensor(labels), tuple("abcd"))
    features = torch.randn(len(labels), 3, generator=torch.Generator().manual_seed(0))
    later = [(features, split.labels)]
    refused = refusal(sizes.check_probes, split, share=share)
    if share is not None:
        if early := refusal(evaluation.held_out_places, len(labels), share, 0):
            return None if refused == early else pytest.fail(refused)
        rest = evaluation.held_out_places(len(labels), share, 0)[1]
        later.append((features[rest], split.labels[rest]))
    assert bool(refused) == any(refusal(probes.fit_linear, *each) for each in later)
    assert bool(refusal(sizes.check_probes, split, ["knn"])) == (len(set(labels)) < 2)


@few
@given(st.integers(1, 9), st.integers(0, 4), st.integers(0, 9), st.lists(st.integers(0, 4), max_size=2),
       st.sampled_from([0.02, 0.1, 0.3, 0.9]), st.tuples(st.integers(4, 14), st.integers(4, 14)))  # fmt: skip
def test_what_the_check_of_locality_lets_pass_is_measured(n, count, k, shifts, scale, side):
    generator = torch.Generator().manual_seed(0)
    pixels, labels = torch.randint(0, 256, (n, 3, *side), generator=generator).byte(), torch.arange(n) % 2
    asked = {"scale": scale, "count": count, "shifts": shifts, "k": k}
    if not refusal(locality.check_measures, pixels, **asked):
        table = locality.measures(nn.Flatten(), nn.Identity(), pixels, labels, size=4, progress=False, **asked)
        assert {level for _, level, _ in table} == {"patch", "bag"}


@pytest.mark.parametrize("asked", [{"n": 2}, {"k": 15}, {"shifts": []}, {"shifts": [6]}])
def test_what_it_refuses_cannot_be_measured(asked):
    n = asked.pop("n", 8)
    pixels, labels = torch.randint(0, 256, (n, 3, 12, 12)).byte(), torch.arange(n) % 2
    asked = {"scale": 0.2, "count": 2, "shifts": [1], "k": 2, **asked}
    assert refusal(locality.check_measures, pixels, **asked)
    with pytest.raises((InputError, ValueError, RuntimeError, IndexError)):
        locality.measures(nn.Flatten(), nn.Identity(), pixels, labels, size=4, progress=False, **asked)


@few
@given(st.lists(st.integers(0, 9), max_size=5))
def test_the_ks_that_pass_are_those_in_which_an_error_can_be_seen_to_fall(ks):
    embedded = {k: torch.randn(4, 3, generator=torch.Generator().manual_seed(k)) for k in [0, *ks]}
    later = refusal(locality.sampling_error, embedded)
    assert bool(refusal(locality.check_ks, ks)) == (bool(later) or ks != sorted(set(ks) - {0}))


@few
@given(st.integers(1, 9), st.integers(2, 9), st.sampled_from([0.001, 0.02, 0.3, 1.0]), st.integers(0, 9),
       st.tuples(st.integers(1, 12), st.integers(1, 12)), st.sampled_from([0.1, 1.0]))  # fmt: skip
def test_a_recipe_that_passes_is_trained(count, batch, scale, grid, side, epochs):
    config = PretrainConfig(width=8, size=4, batch_size=batch, views=2, projector_hidden=8, projector_dim=8,
                            patch_scale=scale, grid=grid, epochs=epochs)  # fmt: skip
    split = Images(*images(count, 1, side)("train"))
    if refused := refusal(sizes.check_training, [config], split):
        assert any(word in refused for word in ("batch_size", "epochs", "less than a pixel", "cells"))
        return
    config.steps(count)
    from bagssl.patches import augment

    assert augment(split.pixels[:batch], 2, config.augmentation(), torch.Generator()).isfinite().all()
