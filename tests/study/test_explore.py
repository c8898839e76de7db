"""Growing bags against bags embedded one by one, and their HTML as a document that stands alone."""

from __future__ import annotations

import base64
import io
import json
import re

import pytest
import torch
from PIL import Image
from torch import nn

from bagssl import patches, probes
from bagssl.bags import embed_bags
from bagssl.data import Images
from bagssl.errors import InputError
from bagssl.study import explore

pytestmark = pytest.mark.usefixtures("one_thread")

KS, CHOSEN, OPTIONS = [1, 2, 5], [3, 0], {"scale": 0.25, "size": 8}
CLASSES = ("</script><b>a</b>", "b & 'c'", 'd"')
ENCODER = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5)).requires_grad_(False)
ENCODER[1].weight.copy_(torch.randn(5, 3 * 8 * 8, generator=torch.Generator().manual_seed(0)))


def quilts(count: int, seed: int, side: tuple[int, int] = (16, 12)) -> Images:
    """Noise around a colour of each class: neither alike nor all different."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    colour = torch.eye(3)[labels][:, :, None, None] * 60
    noise = torch.randint(0, 196, (count, 3, *side), generator=generator)
    return Images((noise + colour).to(torch.uint8), labels, CLASSES)


TRAIN, TEST = quilts(30, 1), quilts(9, 2)


def bags(**changes) -> explore.GrowingBags:
    how = {"chosen": CHOSEN, "ks": KS, "neighbours": 4, **OPTIONS, **changes}
    return explore.growing_bags(ENCODER, how.pop("train", TRAIN), how.pop("test", TEST), **how)


def content(html: str) -> dict:
    return json.loads(re.search(r"data = (\{.*\});", html).group(1))


def test_a_bag_of_k_is_the_mean_of_the_first_k_patches_that_are_drawn():
    found = bags()
    assert found.boxes.shape == (5, 2, 4)
    for row, n in enumerate(CHOSEN):
        cut = [patches.crop(TEST.pixels[n : n + 1], box[None], 8) for box in found.boxes[:, row]]
        for k in KS:
            mean = torch.stack([ENCODER(patch)[0] for patch in cut[:k]]).mean(0)
            assert torch.allclose(embed_bags(ENCODER, TEST.pixels, [k], seed=1, **OPTIONS)[k][n], mean, atol=1e-5)


def test_votes_neighbours_and_accuracy_are_those_of_the_knn_probe():
    found = bags()
    assert found.votes.shape == (3, 2, 3) and found.neighbours.shape == (3, 2, 4)
    assert torch.allclose(found.votes.sum(2), torch.ones(3, 2))
    for row, k in enumerate(KS):
        train, test = (embed_bags(ENCODER, images.pixels, [k], seed=seed, **OPTIONS)[k]
                       for images, seed in ((TRAIN, 0), (TEST, 1)))  # fmt: skip
        expected = probes.knn(train, TRAIN.labels, test, TEST.labels)
        assert found.accuracy[row] == expected.value
        assert found.votes[row].argmax(1).tolist() == expected.predicted[CHOSEN].tolist()
        for column, n in enumerate(CHOSEN):
            cosines = torch.cosine_similarity(test[n][None], train)
            assert found.neighbours[row, column].tolist() == cosines.argsort(descending=True)[:4].tolist()
    assert len({tuple(row.flatten().tolist()) for row in found.neighbours}) > 1, "they change with K"


def test_the_html_holds_all_that_it_shows_and_loads_nothing():
    found = bags()
    html = found._repr_html_()
    assert html == bags()._repr_html_(), "the same bags, the same bytes"
    shown = content(html)
    used = len(found.neighbours.unique())
    assert shown["classes"] == list(CLASSES) and len(shown["kinds"]) == 2 + used
    with Image.open(io.BytesIO(base64.b64decode(shown.pop("sheet").split(",")[1]))) as sheet:
        assert sheet.size == (12 * explore.COLUMNS, 16 * shown["rows"])
    near = torch.tensor(shown["neighbours"]).transpose(0, 1)
    assert torch.equal(torch.tensor(shown["kinds"])[near], TRAIN.labels[found.neighbours])
    rest = re.sub(r"data:image/webp;base64,[\w+/=]+", "", html).replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"//|src=|import", rest)


def test_a_class_name_cannot_end_the_script():
    html = bags()._repr_html_()
    assert html.count("</script>") == html.count("<script>") == 1 and "<b>a" not in html


def test_large_images_become_tiles():
    train, test = (quilts(count, 1, (160, 320)) for count in (6, 3))
    shown = content(bags(train=train, test=test, chosen=[0])._repr_html_())
    assert shown["side"] == [160, 320] and shown["tile"] == [32, 64]


def test_the_static_figure_has_a_row_for_each_k():
    figure = explore.growth_figure(bags(), image=1, ks=[1, 5])
    assert len(figure.axes) == 2 * (2 + 4)
    assert [axis.get_ylabel().split("\n")[0] for axis in figure.axes[::6]] == ["K = 1", "K = 5"]
    assert [len(axis.patches) for axis in figure.axes[::6]] == [2, 10], "each box in dark and bright"


@pytest.mark.parametrize(("changes", "words"), [
    ({"ks": [0, 1]}, "at least 1"), ({"ks": []}, "at least 1"), ({"chosen": []}, "among 9 test images"),
    ({"chosen": [9]}, "among 9 test images"), ({"chosen": [-1]}, "among 9 test images"),
    ({"neighbours": 31}, "the 30 training images"),
])  # fmt: skip
def test_wrong_input_is_refused_in_one_line(changes, words):
    with pytest.raises(InputError, match=words) as refused:
        bags(**changes)
    assert "\n" not in str(refused.value)
