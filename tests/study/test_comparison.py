"""The comparison of claim C2: arms that differ in their crops alone, a tidy table, differences with verdicts."""

import re

import numpy as np
import pandas as pd
import pytest
import torch

from bagssl import catalogue, data, evaluation, objectives
from bagssl.bags import embed_bags
from bagssl.data import load
from bagssl.errors import InputError
from bagssl.evaluation import evaluate, unpack_correct
from bagssl.pretraining import load_encoder, pretrain
from bagssl.probes import knn
from bagssl.runs import HALF, WEIGHTS
from bagssl.study import comparison, tables

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = {"width": 8, "size": 8, "batch_size": 16, "views": 2, "projector_hidden": 16, "projector_dim": 8, "epochs": 1}


@pytest.fixture(scope="module")
def images():
    return [load("synthetic", split).take(torch.arange(100)) for split in ("train", "test")]


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    arms = comparison.arms(["tcr", "simclr"], [0, 1], RECIPE, {"simclr": {"options": {"temperature": 0.2}}})
    root = tmp_path_factory.mktemp("runs")
    return [pretrain(arm, images[0], root, progress=False) for arm in arms]


def test_arms_of_an_objective_differ_in_their_crops_and_seed_alone():
    recipe = {**RECIPE, "patch_scale": 0.25, "min_scale": 0.2}
    arms = comparison.arms(["tcr", "simclr"], [0, 1], recipe, {"simclr": {"options": {"temperature": 0.2}}})
    assert len(arms) == 2 * 2 * 2 + 2
    for objective in ("tcr", "simclr"):
        own = [arm.to_dict() for arm in arms if arm.objective == objective and arm.training != "untrained"]
        same = [{name: value for name, value in arm.items() if name not in ("training", "seed")} for arm in own]
        assert len(own) == 4 and all(arm == same[0] for arm in same)
    assert {arm.objective: dict(arm.options) for arm in arms[:-2]} == {"tcr": {}, "simclr": {"temperature": 0.2}}
    tcr = comparison.arms(["tcr"], [0, 1], recipe, {"simclr": {"options": {"temperature": 0.2}}})  # one line changed
    assert tcr == [arm for arm in arms if arm.objective == "tcr"]


def test_a_varied_recipe_differs_in_what_is_said_and_sees_as_many_crops():
    recipe = {name: value for name, value in RECIPE.items() if name not in ("batch_size", "epochs")} | {"views": 4}
    how = {"crops_per_step": 128, "epochs": 2.0}

    def varied(settings, **overrides):
        return comparison.varied("tcr", [0], recipe, overrides, settings, **how)[0]

    plain = varied({})
    assert (plain.training, plain.views, plain.batch_size, plain.epochs) == ("patch-based", 4, 32, 2)
    changed = {"views": (8, 16, 1.0), "projector_dim": (4, 32, 2.0)}
    for name, expected in changed.items():
        other = varied({name: 8 if name == "views" else 16})
        assert (other.views, other.batch_size, other.epochs) == expected
        assert {key for key, value in other.to_dict().items() if value != plain.to_dict()[key]} <= {
            name, "batch_size", "epochs"}
        assert other.steps(1600) * other.crops_per_step == plain.steps(1600) * plain.crops_per_step
    assert varied({"training": "multi-scale"}).training == "multi-scale"
    assert varied({}, tcr={"views": 16}).batch_size == 8
    overridden = varied({"views": 8, "options": {"invariance": 30}}, tcr={"options": {"invariance": 100}, "hue": 0.3})
    assert (overridden.views, overridden.batch_size, overridden.hue) == (8, 16, 0.3)  # what is tried comes last
    assert overridden.options == {"invariance": 30}
    for wrong in (3, {"epochs": 3}, {"batch_size": 8}, {"seed": 1}):
        with pytest.raises(InputError, match="mapping|set by the notebook"):
            varied(wrong)


def test_options_of_an_objective_in_the_recipe_are_not_the_untrained_encoders():
    arms = comparison.arms(["simclr"], [0], {**RECIPE, "options": {"temperature": 0.2}}, {})
    assert [dict(arm.options) for arm in arms] == [{"temperature": 0.2}] * 2 + [{}]


def test_a_setting_that_does_not_exist_is_refused():
    with pytest.raises(InputError, match="unknown setting 'vieuws'"):
        comparison.arms(["tcr"], [0], {**RECIPE, "vieuws": 3}, {})


def test_measuring_gives_a_row_per_run_k_and_probe_and_is_kept(images, finished, monkeypatch):
    how = {"features": ["h", "z"], "scale": 0.2, "progress": False}
    measured = comparison.measure_all(finished, *images, [0, 1, 4], **how)
    assert len(measured) == len(finished) * 3 * 2 * 2
    right = unpack_correct(measured["correct"].iloc[0], len(images[1]))
    assert 100 * right.mean() == pytest.approx(measured["accuracy"].iloc[0])
    monkeypatch.setattr(evaluation, "embed_bags", None)  # the second time nothing is embedded
    pd.testing.assert_frame_equal(comparison.measure_all(finished, *images, [0, 1, 4], **how), measured)

    table = comparison.over_seeds(measured)
    assert list(table.columns[:8]) == comparison.COLUMNS
    assert set(table["seeds"]) == {2} and len(table) == 5 * 3 * 2 * 2
    row = {"objective": "tcr", "training": "multi-scale", "k": 4, "probe": "knn", "feature": "z"}
    own = measured[(measured[list(row)] == list(row.values())).all(axis=1)]["accuracy"]
    assert comparison.value(table, **row) == pytest.approx(own.mean())
    chosen = table[(table[list(row)] == list(row.values())).all(axis=1)]
    assert chosen["accuracy_std"].iloc[0] == pytest.approx(np.std(own, ddof=1))
    with pytest.raises(KeyError):
        comparison.value(table, objective="tcr")


def test_other_test_images_or_patches_are_another_protocol(images, finished):
    run, (train, test) = finished[0], images
    def rows(**how):
        how = {"scale": 0.2, "probes": ["knn"], "progress": False, **how}
        return evaluate(run, train, how.pop("test", test), [4], **how)[0]["correct"]

    def kept():
        return len(list(run.path.glob("evaluations/*.json")))

    before = kept()
    rows(), rows(scale=0.5), rows(test=test.take(torch.arange(50))), rows()
    assert kept() == before + 3
    for path in run.path.glob("evaluations/*.json"):  # damaged, it is measured again
        path.write_text(path.read_text()[:50])
    assert rows() == rows()


def test_bags_of_several_scales_are_probed_side_by_side(images, finished):
    run, (train, test) = finished[0], images
    encoder, how = load_encoder(run), {"size": run.config["size"], "device": "cpu"}

    def features(split, seed):
        return torch.cat([embed_bags(encoder, split.pixels, [4], scale=s, seed=seed, **how)[4] for s in (0.1, 0.5)], 1)

    expected = knn(features(train, 0), train.labels, features(test, 1), test.labels)
    (row,) = evaluate(run, train, test, [4], scale=(0.1, 0.5), probes=["knn"], progress=False)
    assert np.array_equal(unpack_correct(row["correct"], len(test)), expected.correct.numpy())
    (alone,) = evaluate(run, train, test, [4], scale=0.1, probes=["knn"], progress=False)
    assert alone["correct"] != row["correct"]  # negative control


def test_the_whole_image_has_no_scale_and_stands_once_beside_bags_of_several(images, finished, monkeypatch):
    run, (train, test), dims = finished[0], images, []
    monkeypatch.setitem(evaluation.PROBES, "knn", lambda *features: dims.append(features[0].shape[1]) or knn(*features))
    evaluate(run, train, test, [0, 4], scale=(0.1, 0.5), probes=["knn"], seed=5, progress=False)
    dim = load_encoder(run).dim
    assert dims == [dim, 2 * dim]


def test_a_share_of_the_training_images_is_held_out(images, finished):
    run, train = finished[0], images[0]
    bag = embed_bags(load_encoder(run), train.pixels, [4], scale=0.3, size=run.config["size"], device="cpu")[4]
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    held, rest = (order[:60].sort().values, order[60:].sort().values)
    expected = knn(bag[rest], train.labels[rest], bag[held], train.labels[held])
    (row,) = evaluate(run, train, 60 / len(train), [4], scale=0.3, probes=["knn"], progress=False)
    assert np.array_equal(unpack_correct(row["correct"], 60), expected.correct.numpy())
    seen = knn(bag, train.labels, bag[held], train.labels[held])
    assert seen.value > expected.value  # negative control: with the held-out images in its index, kNN finds them


def test_a_bag_is_embedded_once_in_a_process(images, finished, monkeypatch):
    asked = []

    def counted(encoder, pixels, ks, **how):
        asked.append((len(pixels), list(ks), how["scale"]))
        return embed_bags(encoder, pixels, ks, **how)

    monkeypatch.setattr(evaluation, "embed_bags", counted)
    monkeypatch.setattr(evaluation, "_recent", {})
    run, (train, test), how = finished[0], images, {"probes": ["knn"], "progress": False}
    for scale in (0.15, 0.35):
        evaluate(run, train, 0.25, [3], scale=scale, **how)
    evaluate(run, train, test, [0, 3], scale=0.35, **how)
    both = evaluate(run, train, test, [3], scale=(0.15, 0.35), **how)
    n, m = len(train), len(test)
    assert asked == [(n, [3], 0.15), (n, [3], 0.35), (n, [0], 0.35), (m, [0, 3], 0.35), (m, [3], 0.15)]
    monkeypatch.setattr(evaluation, "RECENT", 0)  # without memory, the same
    for path in run.path.glob("evaluations/*.json"):
        path.unlink()
    assert evaluate(run, train, test, [3], scale=(0.15, 0.35), **how) == both and not evaluation._recent


@pytest.mark.parametrize("share", [0.0, 1.0, 1e-9, -0.5, 2.0])
def test_a_share_that_leaves_a_side_empty_is_refused(images, finished, share):
    with pytest.raises(InputError, match="held out"):
        evaluate(finished[0], images[0], share, [1], scale=0.2, progress=False)


@pytest.mark.parametrize("wrong", [{"probes": ["svm"]}, {"features": ["g"]}, {"ks": []}, {"ks": [-1]}, {"ks": ["a"]},
                                   {"features": []}, {"scale": 2.0}, {"scale": 0.0}])
def test_senseless_protocols_are_refused(images, finished, wrong):
    with pytest.raises(InputError):
        evaluate(finished[0], *images, **{"ks": [1], "scale": 0.2, "progress": False, **wrong})


def made_up(points, seeds):
    """Measurements in which the patch-based bag of 16 has `points` more than every other arm."""
    rows = []
    for training in ("patch-based", "multi-scale", "untrained"):
        for k in (0, 1, 16):
            for seed in range(seeds):
                best = training == "patch-based" and k == 16
                accuracy = 50 + (points + 0.1 * seed if best else 0)
                right = np.arange(1000) < 10 * accuracy
                rows.append({"objective": "none" if training == "untrained" else "tcr", "training": training,
                             "seed": seed, "k": k, "probe": "knn", "feature": "h", "accuracy": accuracy,
                             "correct": np.packbits(right).tobytes().hex()})  # fmt: skip
    return pd.DataFrame(rows)


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize(("points", "verdict"), [(10, "above"), (-10, "below"), (-0.3, "undecided")])
def test_a_difference_counts_when_its_interval_excludes_zero(seeds, points, verdict):
    gains = comparison.gains(made_up(points, seeds), [0, 1, 16], 1000)
    assert len(gains) == 5
    own = gains[gains["first"] == "patch-based, K = 16"]
    assert len(own) == 4 and set(own["verdict"]) == {verdict}
    (other,) = gains[gains["first"] == "multi-scale, K = 16"].to_dict("records")  # no difference was made up
    assert other["second"] == "untrained, K = 16" and other["verdict"] == "undecided" and other["points"] == 0
    assert ((gains["low"] <= gains["points"]) & (gains["points"] <= gains["high"])).all()
    assert comparison.sentences(gains).count(f"{points + 0.05 * (seeds - 1):+.1f} points") == 4


def test_models_of_other_seeds_make_no_pairs():
    rows = made_up(1, 3).query("training == 'patch-based' and k == 16")
    with pytest.raises(InputError, match=r"seeds \[0, 1, 2\] and \[0, 1\] make no pairs"):
        comparison.difference(rows, rows[rows["seed"] < 2], 1000)


@pytest.mark.parametrize("seeds", [1, 3])
def test_how_much_more_one_gains_than_another_is_drawn_on_the_same_images(seeds):
    generator = np.random.default_rng(0)

    def rows(share):  # one row per seed, of which each image is right with the same luck in all four
        right = [luck < share for luck in lucks]
        return pd.DataFrame({"seed": range(seeds), "accuracy": [100 * each.mean() for each in right],
                             "correct": [np.packbits(each).tobytes().hex() for each in right]})  # fmt: skip

    lucks = generator.random((seeds, 4000))
    a, b, c, d = (rows(share) for share in (0.7, 0.6, 0.5, 0.45))
    found = comparison.difference(a, b, 4000, (c, d))
    first, second = comparison.difference(a, b, 4000), comparison.difference(c, d, 4000)
    assert found["points"] == pytest.approx(first["points"] - second["points"]) and found["seeds"] == seeds
    right = [np.mean([unpack_correct(each, 4000) for each in rows["correct"]], axis=0) for rows in (a, b, c, d)]
    each = 100 * (right[0] - right[1] - right[2] + right[3])
    drawn = each[np.random.default_rng(1).integers(0, 4000, (4000, 4000))].mean(axis=1)
    ends = [found[name] for name in (("low", "high") if seeds == 1 else ("images_low", "images_high"))]
    assert ends == pytest.approx(np.percentile(drawn, (2.5, 97.5)), abs=0.15)
    assert comparison.difference(c, d, 4000, (a, b))["points"] == pytest.approx(-found["points"])
    assert comparison.difference(a, b, 4000, (a, b))["verdict"] == "undecided"  # nobody gains more than himself
    with pytest.raises(InputError, match="make no pairs"):
        comparison.difference(a, b, 4000, (c, d[:0]))


def test_over_several_seeds_the_interval_over_images_stands_beside():
    """It is that of images drawn anew, seeds averaged; with one seed there is no other to stand beside."""
    measured = made_up(10, 3)
    row = comparison.gains(measured, [0, 16], 1000).iloc[0]
    mean = {training: np.mean([unpack_correct(each, 1000) for each in measured[
        (measured["training"] == training) & (measured["k"] == 16)]["correct"]], axis=0)
        for training in ("patch-based", "multi-scale")}  # fmt: skip
    each = 100 * (mean["patch-based"] - mean["multi-scale"])
    drawn = np.random.default_rng(1).integers(0, 1000, (4000, 1000))
    low, high = np.percentile(each[drawn].mean(axis=1), (2.5, 97.5))
    assert (row["images_low"], row["images_high"]) == (pytest.approx(low, abs=0.3), pytest.approx(high, abs=0.3))
    assert high - low > 5 * (row["high"] - row["low"])  # these seeds differ by a tenth of a point
    said = comparison.sentences(comparison.gains(measured, [0, 16], 1000))
    assert f"over images {row['images_low']:+.1f} to {row['images_high']:+.1f}" in said
    alone = comparison.gains(made_up(10, 1), [0, 16], 1000)
    assert "images_low" not in alone and "over images" not in comparison.sentences(alone)


def test_along_a_training_stand_the_runs_that_end_there(images, tmp_path):
    few = images[0].take(torch.arange(40))
    arms = comparison.arms(["tcr"], [0], {**RECIPE, "epochs": 2}, {})
    found = comparison.along(arms, few, [2, 1], root=tmp_path, progress=False)
    assert list(found) == ["patch-based", "multi-scale"]
    for training, ends in found.items():
        crops = [run.metrics["crops"] for run in ends.values()]
        assert list(ends) == crops == sorted(crops) and crops[0] == 0 and crops[2] == 2 * crops[1]
        assert ends[0].config["training"] == "untrained"
        assert [run.config.get("until", 2.0) for run in list(ends.values())[1:]] == [1.0, 2.0]
        assert all(run.config["training"] == training for run in list(ends.values())[1:])
    assert found["patch-based"][0] == found["multi-scale"][0]


def test_a_bag_is_compared_with_one_patch_only_if_one_patch_was_measured():
    measured = made_up(10, 1)
    gains = comparison.gains(measured[measured["k"] != 1], [0, 16], 1000)
    assert len(gains) == 4 and not gains["second"].str.contains("K = 1$").any()


def test_the_median_difference_over_pairs_has_the_bootstrap_interval_of_its_images():
    def rows(right):
        correct = np.packbits(right).tobytes().hex()
        return pd.DataFrame({"seed": [0], "accuracy": [100 * right.mean()], "correct": [correct]})

    generator, images = np.random.default_rng(0), 4000
    base = generator.random(images) < 0.5
    better = [base | (generator.random(images) < share) for share in (0.02, 0.2, 0.6)]
    pairs = [(rows(right), rows(base)) for right in better]
    found = comparison.median_difference(pairs, images)
    assert found["points"] == pytest.approx(100 * (better[1].mean() - base.mean()))  # of the middle pair
    alone = comparison.difference(*pairs[1], images)  # far from the others, the median is always the middle pair
    assert [found["low"], found["high"]] == pytest.approx([alone["low"], alone["high"]], abs=0.15)
    assert found["low"] > 0 > comparison.median_difference([(b, a) for a, b in pairs], images)["high"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"objectives": []}, {"seeds": []}, {"seeds": [0, 0]}, {"objectives": ["tcr", "tcr"]},
        {"overrides": {"trc": {"epochs": 2}}}, {"overrides": {"tcr": 3}}, {"recipe": {"dataset": "../x"}},
    ],
)  # fmt: skip
def test_senseless_arms_are_refused(wrong):
    with pytest.raises(InputError) as error:
        comparison.arms(**{"objectives": ["tcr"], "seeds": [0], "recipe": RECIPE, "overrides": {}, **wrong})
    assert "\n" not in str(error.value)


def test_the_records_of_runs_are_kept(images, finished, tmp_path, monkeypatch):
    table = comparison.provenance(tmp_path, finished, {"training": images[0]})
    kept = tmp_path / "runs" / finished[0].path.name
    assert {"config.json", "metrics.json", "history.csv", "provenance.json"} <= {path.name for path in kept.iterdir()}
    assert {path.name for path in tmp_path.rglob("*.safetensors")} == {HALF}
    comparison.provenance(tmp_path / "opened", finished, {"training": images[0]}, opened=True)
    assert {path.name for path in (tmp_path / "opened").rglob("*.safetensors")} == {WEIGHTS}
    assert table.loc["training data", "value"] == images[0].fingerprint[:16]
    assert all(run.key in table.loc["runs", "value"] for run in finished)
    monkeypatch.setenv("BAGSSL_COMMITTED", "1")  # by `bagssl notebooks`; and again, over what is there
    shown = comparison.provenance(tmp_path, finished, {"training": images[0]}, {"seeds": [0, 1]})
    assert set(table.index) - set(shown.index) == {"commit", "changed since", "time (UTC)"}
    assert "| parameter seeds | [0, 1] " in re.sub(" +", " ", repr(tables.Table(shown)))


def test_an_outsiders_objective_and_dataset_appear_in_the_table(monkeypatch, tmp_path):
    """One function and one name each, as the README says under "Change one thing"."""
    @objectives.objective(weight=1.0)
    def toy(z, weight):
        return {"loss": weight * (z.square().mean() - 1) ** 2 + z.var(0).mean()}

    def stripes(split):
        labels = torch.arange(60) % 2
        lines = torch.arange(16) % 4 < 2
        pixels = torch.stack([lines.expand(16, 16), lines.expand(16, 16).T])[labels] * 200 + len(split)
        return pixels[:, None].repeat(1, 3, 1, 1).byte(), labels, ("across", "along")

    monkeypatch.setitem(objectives.OBJECTIVES, "toy", objectives.OBJECTIVES.pop("toy"))  # forgotten at the end
    monkeypatch.setitem(data.EMBEDDED, "stripes", stripes)
    recipe = {**RECIPE, "dataset": "stripes"}
    arms = comparison.arms(["toy"], [0], recipe, {"toy": {"options": {"weight": 2.0}}}, ["patch-based"])
    train, test = (load("stripes", split) for split in ("train", "test"))
    trained = comparison.train_all(arms, train, root=tmp_path, progress=False)
    how = {"scale": 0.25, "probes": ["knn"], "progress": False}
    table = tables.comparison_table(comparison.over_seeds(comparison.measure_all(trained, train, test, [4], **how)))
    assert ("kNN", "toy", "patch-based") in table.index
    assert "stripes" in catalogue.names(tmp_path)
    with pytest.raises(InputError, match="toy has no option 'wieght': it has weight"):
        comparison.arms(["toy"], [0], recipe, {"toy": {"options": {"wieght": 2.0}}})
