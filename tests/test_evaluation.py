"""A run measured: one pass over the patches for h and z, and a record that is believed only as it was written."""

import pytest
import torch

from bagssl import evaluation, patches, probes
from bagssl.config import PretrainConfig
from bagssl.data import load, subset
from bagssl.encoders import Encoder
from bagssl.errors import InputError
from bagssl.evaluation import evaluate
from bagssl.pretraining import load_encoder, pretrain

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """Accuracies by feature and K, and how many crops went through the encoder for them."""
    train, test = (subset(load("synthetic", split), count) for split, count in (("train", 400), ("test", 100)))
    config = PretrainConfig(width=8, size=8, batch_size=32, views=2, epochs=1)
    crops, forward = [], Encoder.forward

    def counted(self, patches):
        crops.append(len(patches))
        return forward(self, patches)

    monkeypatch.setattr(Encoder, "forward", counted)

    def measured(features, store="runs", ks=(0, 1, 4), **protocol):
        run = pretrain(config, train, tmp_path / store, progress=False)
        monkeypatch.setattr(evaluation, "_recent", {})
        crops.clear()
        rows = evaluate(run, train, test, ks, features=features, progress=False, **{"scale": 0.25, **protocol})
        return {(row["feature"], row["k"], row["probe"]): (row["accuracy"], row["correct"]) for row in rows}, sum(crops)

    return measured


def test_h_and_z_come_from_one_pass_over_the_patches(measure):
    (both, passes), (h, once), (z, again) = (measure(features) for features in (["h", "z"], ["h"], ["z"]))
    assert both == h | z and len(both) == 12
    assert passes == once == again
    # negative control: z is another feature, not h by another name
    assert any(h["h", k, "linear"] != z["z", k, "linear"] for k in (0, 1, 4))


def test_coloured_patches_are_measured_apart_from_plain_ones(measure):
    (plain, _), (coloured, passes), (again, none) = (measure(["h"], ks=(0, 4), colour=colour)
                                                     for colour in (False, True, True))  # fmt: skip
    assert passes and not none and again == coloured
    assert coloured["h", 4, "linear"] != plain["h", 4, "linear"]
    assert coloured["h", 0, "linear"] == plain["h", 0, "linear"]  # the centre crop has no colour
    assert measure(["h"], ks=(0, 4)) == (plain, 0)


def test_the_whole_image_is_embedded_once_for_all_scales(measure):
    (_, one), (_, three) = measure(["h"], ks=(0, 1), scale=0.25), measure(["h"], ks=(0, 1), scale=[0.25, 0.5, 0.9])
    looked = 2 * 2 * 4  # crops of both splits by which the network is compared with its folded copy
    assert one == 500 + 500 + looked and three == 500 + 3 * 500 + 3 * looked


@pytest.mark.parametrize("pool", ["max", "with centre crop"])
def test_other_ways_to_one_vector_are_what_they_say_and_kept_apart(pool, tmp_path, monkeypatch):
    """Against the patches embedded one by one; the mean is found as it was."""
    images = subset(load("synthetic", "train"), 40)
    config = PretrainConfig(width=8, size=8, batch_size=16, views=2, epochs=1)
    run = pretrain(config, images, tmp_path, progress=False, device="cpu")
    seen = []
    monkeypatch.setitem(evaluation.PROBES, "knn", lambda *each: seen.append(each) or probes.knn(*each))
    how = {"probes": ["knn"], "progress": False, "device": "cpu"}
    evaluate(run, images, images, [0, 3], scale=[0.3, 0.6], pool=pool, **how)
    network, size = load_encoder(run), run.config["size"]
    whole = network(patches.centre_crop(images.pixels, size))
    found = {}
    for scale in (0.3, 0.6):
        boxes = patches.evaluation_boxes(3, 40, *images.pixels.shape[2:], scale, torch.Generator().manual_seed(0))
        h = torch.stack([network(patches.crop(images.pixels, each, size)) for each in boxes])
        found[scale] = {"max": h.amax(dim=0), "with centre crop": h.mean(dim=0)}[pool]
    expected = torch.cat([*[whole] * (pool == "with centre crop"), *found.values()], dim=1)
    by_dim = {each[0].shape[1]: each[0] for each in seen}
    torch.testing.assert_close(by_dim[expected.shape[1]], expected, atol=1e-5, rtol=1e-4)
    files = set(run.path.glob("evaluations/*.json"))
    rows = evaluate(run, images, images, [0, 3], scale=[0.3, 0.6], **how)
    assert len(files) == 1 and len(set(run.path.glob("evaluations/*.json"))) == 2
    assert rows != evaluate(run, images, images, [0, 3], scale=[0.3, 0.6], pool=pool, **how)
    with pytest.raises(InputError, match="unknown pool 'min'"):
        evaluate(run, images, images, [3], scale=0.3, pool="min", **how)
