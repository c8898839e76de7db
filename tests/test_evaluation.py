"""A run measured: one pass over the patches for h and z, and a record that is believed only as it was written."""

import pytest

from bagssl import evaluation
from bagssl.config import PretrainConfig
from bagssl.data import load, subset
from bagssl.encoders import Encoder
from bagssl.evaluation import evaluate
from bagssl.pretraining import pretrain

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


def test_the_whole_image_is_embedded_once_for_all_scales(measure):
    (_, one), (_, three) = measure(["h"], ks=(0, 1), scale=0.25), measure(["h"], ks=(0, 1), scale=[0.25, 0.5, 0.9])
    looked = 2 * 2 * 4  # crops of both splits by which the network is compared with its folded copy
    assert one == 500 + 500 + looked and three == 500 + 3 * 500 + 3 * looked
