"""Terms that sum to the logit, against scikit-learn; maps and curves against the plain way, pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from bagssl import patches, probes
from bagssl.bags import embed_bags, patch_embeddings
from bagssl.encoders import build_encoder
from bagssl.study import attribution
from bagssl.synthetic import generate

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES, DIM, PATCHES, IMAGES = 4, 6, 9, 30
STRENGTH = 1e-2


def embeddings(images: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches of classes that only their mean tells apart, with features of very different sizes, off centre."""
    world, draw = (torch.Generator().manual_seed(s) for s in (0, seed))
    centres, sizes = torch.randn(CLASSES, DIM, generator=world), 10 ** torch.linspace(-2, 2, DIM)
    labels = torch.randint(CLASSES, (images,), generator=draw)
    h = centres[labels] + 3 * torch.randn(PATCHES, images, DIM, generator=draw)
    return (h + 5) * sizes, labels


TRAIN, LABELS = embeddings(400, 1)
TEST, TEST_LABELS = embeddings(IMAGES, 2)
PROBE = probes.fit_linear(TRAIN.mean(0), LABELS, regularisations=[STRENGTH])
TERMS = attribution.terms(PROBE, TEST)
NOTHING = PROBE.logits(PROBE.centre)
PREDICTED = TERMS.sum(0).argmax(1)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


# ---- the classifier and its terms


def test_terms_sum_to_the_logits_of_scikit_learn():
    bags, test = TRAIN.double().mean(0).numpy(), TEST.double().mean(0).numpy()
    scale = StandardScaler().fit(bags)
    model = LogisticRegression(C=1 / (STRENGTH * len(bags)), tol=1e-10, max_iter=5000)
    model.fit(scale.transform(bags), LABELS.numpy())
    expected = model.decision_function(scale.transform(test))
    # what all classes share is free: no softmax sees it
    ours = (TERMS.sum(0) - TERMS.sum(0).mean(1, keepdim=True)).numpy()
    assert np.abs(ours - (expected - expected.mean(1, keepdims=True))).max() < 1e-4 * np.abs(expected).max()


def test_terms_are_complete():
    assert TERMS.shape == (PATCHES, IMAGES, CLASSES) and TERMS.dtype == torch.float64
    logits = PROBE.logits(TEST.double().mean(0))
    assert (TERMS.sum(0) - logits).abs().max() < 1e-10
    # the mean of a bag is kept in float32, and even so
    assert (TERMS.sum(0) - PROBE.logits(TEST.mean(0))).abs().max() < 1e-5
    # the controls: another pooling has no such terms, nor has a probe with a kink
    assert (TERMS.sum(0) - PROBE.logits(TEST.amax(0))).abs().max() > 0.1
    squares, square = attribution.terms(PROBE, TEST.relu().square()), PROBE.logits(TEST.mean(0).relu().square())
    assert (squares.sum(0) - square).abs().max() > 0.1


def test_the_classifier_is_the_probe():
    probe = probes.linear(TRAIN.mean(0), LABELS, TEST.mean(0), TEST_LABELS, regularisations=[STRENGTH])
    assert torch.equal(PROBE.classes[PROBE.logits(TEST.mean(0)).argmax(1)], probe.predicted)
    assert PROBE.settings == probe.settings
    moved = probes.fit_linear(TRAIN.mean(0), 7 * LABELS - 3, regularisations=[STRENGTH])
    assert torch.equal(moved.classes, 7 * PROBE.classes - 3) and torch.equal(moved.weights, PROBE.weights)


def test_evidence_for_all_classes_sums_to_zero_and_the_average_image_says_nothing():
    assert TERMS.sum(2).abs().max() < 1e-4 * TERMS.abs().max()
    shares = LABELS.bincount() / len(LABELS)  # the intercept is free: the mean prediction is the classes' shares
    assert (PROBE.logits(TRAIN.mean(0)).softmax(1).mean(0) - shares).abs().max() < 1e-4
    assert (NOTHING.softmax(0) - 1 / CLASSES).abs().max() < 0.2


def test_a_network_s_bag_is_the_sum_of_its_patches():
    pixels, labels, _ = generate(60, seed=5)
    encoder = build_encoder("resnet10", 4).eval()
    boxes = torch.stack([*patches.evaluation_boxes(8, 60, 32, 32, 0.2, torch.Generator().manual_seed(0))])
    bags = embed_bags(encoder, pixels, [8], scale=0.2, size=8)[8]
    probe = probes.fit_linear(bags, labels, regularisations=[1e-2])
    single = patch_embeddings(encoder, pixels, boxes, 8)
    assert (attribution.terms(probe, single).sum(0) - probe.logits(bags)).abs().max() < 1e-4
    assert (attribution.terms(probe, single.flip(1)).sum(0) - probe.logits(bags)).abs().max() > 1e-2


def test_an_encoder_is_taken_apart_in_as_few_images_at_a_time_as_memory_holds(monkeypatch):
    pixels, labels, _ = generate(30, seed=5)
    encoder = build_encoder("resnet10", 4).eval()
    boxes = patches.grid_boxes(32, 32, 14, 6)[:, None].expand(-1, 30, -1)
    single = patch_embeddings(encoder, pixels, boxes, 8)
    probe = probes.fit_linear(single.mean(0), labels, regularisations=[1e-2])
    held = []
    monkeypatch.setattr(attribution, "patch_embeddings", lambda *each: held.append(patch_embeddings(*each)) or held[-1])
    for block, times in ((attribution.BLOCK, 1), (7 * len(boxes) * encoder.dim, 5), (1, 30)):
        monkeypatch.setattr(attribution, "BLOCK", block)
        held.clear()
        terms, pooled = attribution.take_apart(encoder, probe, pixels, boxes, 8)
        assert len(held) == times and max(each.numel() for each in held) <= max(block, len(boxes) * encoder.dim)
        assert torch.allclose(terms, attribution.terms(probe, single), atol=1e-5)
        bags = {"mean": single.double().mean(0), "mean in float32": single.mean(0), "maximum": single.amax(0)}
        assert all(torch.allclose(pooled[name], bag, atol=1e-5) for name, bag in bags.items()) and len(pooled) == 3
        assert not torch.allclose(terms, attribution.terms(probe, single.flip(1)), atol=1e-2)  # images in their order


# ---- evidence on the pixels


def plain_maps(terms: torch.Tensor, boxes: torch.Tensor, height: int, width: int) -> np.ndarray:
    total = np.zeros((terms.shape[1], terms.shape[2], height, width))
    coverage = np.zeros((terms.shape[1], 1, height, width))
    for k, n in np.ndindex(*boxes.shape[:2]):
        top, left, high, wide = boxes[k, n].tolist()
        place = slice(top, top + high), slice(left, left + wide)
        total[n, :, *place] += len(terms) * terms[k, n].numpy()[:, None, None]
        coverage[n, :, *place] += 1
    return np.divide(total, coverage, out=np.full_like(total, np.nan), where=coverage > 0)


@pytest.mark.parametrize("count", [1, 2, 9])
def test_maps_are_the_mean_over_the_boxes_on_a_pixel(count):
    boxes = patches.evaluation_boxes(count, 5, 12, 10, 0.2, torch.Generator().manual_seed(0))
    boxes[0, 2] = torch.tensor([3, 1, 7, 2])  # boxes may differ in size
    terms = draw(count, 5, 3)
    ours, expected = attribution.evidence_maps(terms, boxes, 12, 10).numpy(), plain_maps(terms, boxes, 12, 10)
    assert np.array_equal(np.isnan(ours), np.isnan(expected)) and np.isnan(ours).any()
    assert np.nanmax(np.abs(ours - expected)) < 1e-12
    assert not np.allclose(ours[0], expected[1], equal_nan=True)


def test_equal_patches_give_a_flat_map_at_the_logit():
    boxes = patches.grid_boxes(8, 8, 4, 1)[:, None].expand(-1, 2, -1)
    logits = draw(1, 2, 3)
    maps = attribution.evidence_maps(logits.expand(len(boxes), -1, -1) / len(boxes), boxes, 8, 8)
    assert (maps - logits[0][:, :, None, None]).abs().max() < 1e-12


# ---- deletion and insertion


def test_bags_that_shrink_and_grow_are_means_over_what_is_left():
    order = attribution.at_random(PATCHES, IMAGES)
    removed, added = (curve(TERMS, order, NOTHING) for curve in (attribution.deletion, attribution.insertion))
    assert removed.shape == added.shape == (PATCHES + 1, IMAGES, CLASSES)
    for n, m in np.ndindex(IMAGES, PATCHES):
        patches_of = TEST[order[:, n], n].double()
        assert torch.allclose(removed[m, n], PROBE.logits(patches_of[m:].mean(0)), atol=1e-9)
        assert torch.allclose(added[m + 1, n], PROBE.logits(patches_of[: m + 1].mean(0)), atol=1e-9)


def test_nothing_and_everything():
    for order in (attribution.by_evidence(TERMS, PREDICTED), attribution.at_random(PATCHES, IMAGES)):
        removed, added = (curve(TERMS, order, NOTHING) for curve in (attribution.deletion, attribution.insertion))
        assert torch.allclose(removed[0], TERMS.sum(0)) and torch.allclose(added[-1], TERMS.sum(0))
        assert torch.equal(removed[-1], NOTHING.expand(IMAGES, -1)) and torch.equal(added[0], removed[-1])


def of_class(logits: torch.Tensor) -> torch.Tensor:
    """The logit of the predicted class of each image, [patches + 1, images]."""
    return logits.gather(2, PREDICTED[None, :, None].expand(len(logits), -1, 1))[..., 0]


def test_the_order_of_evidence_is_steeper_than_any_other_at_every_step():
    order = attribution.by_evidence(TERMS, PREDICTED)
    assert torch.equal(order.sort(0).values, torch.arange(PATCHES)[:, None].expand(-1, IMAGES))
    steepest = of_class(attribution.deletion(TERMS, order, NOTHING))[:-1]
    flattest = of_class(attribution.deletion(TERMS, order.flip(0), NOTHING))[:-1]
    assert (steepest.diff(dim=0) <= 1e-9).all() and (flattest.diff(dim=0) >= -1e-9).all()
    for seed in range(5):
        random = of_class(attribution.deletion(TERMS, attribution.at_random(PATCHES, IMAGES, seed), NOTHING))[:-1]
        assert (steepest <= random + 1e-9).all() and (random <= flattest + 1e-9).all()
        assert (random.diff(dim=0) > 1e-9).any() and (random.diff(dim=0) < -1e-9).any()  # need not be monotone
    growing = of_class(attribution.insertion(TERMS, order, NOTHING))[1:]
    assert (growing.diff(dim=0) <= 1e-9).all() and torch.allclose(growing[-1], steepest[0])


def test_on_a_linear_toy_with_one_telling_patch_it_is_found_first():
    terms = torch.zeros(5, 2, 3, dtype=torch.float64)
    terms[3, 0, 1], terms[2, 1, 1] = 1, 0.5
    order = attribution.by_evidence(terms, torch.tensor([1, 1]))
    assert order[0].tolist() == [3, 2]
    nothing = torch.zeros(3, dtype=torch.float64)
    assert attribution.insertion(terms, order, nothing)[1].tolist() == [[0, 5, 0], [0, 2.5, 0]]
    assert (attribution.deletion(terms, order, nothing)[1:] == 0).all()
    assert attribution.by_evidence(terms, torch.tensor([0, 2]))[0].tolist() == [0, 0]  # equals stay in their order


def test_random_orders_follow_from_the_seed_and_differ_between_images():
    order = attribution.at_random(PATCHES, IMAGES, 1)
    assert torch.equal(order, attribution.at_random(PATCHES, IMAGES, 1))
    assert not torch.equal(order, attribution.at_random(PATCHES, IMAGES, 2))
    assert len(order.T.unique(dim=0)) > IMAGES // 2


# ---- what the synthetic world knows of a patch


def test_shares_of_parts_are_counted_in_pixels():
    parts = torch.randint(7, (4, 3, 2), generator=torch.Generator().manual_seed(0))
    boxes = patches.evaluation_boxes(6, 4, 12, 8, 0.3, torch.Generator().manual_seed(1))
    shares = attribution.part_shares(boxes, parts, cell=4, types=7)
    painted = parts.repeat_interleave(4, 1).repeat_interleave(4, 2)
    for k, n in np.ndindex(6, 4):
        top, left, high, wide = boxes[k, n].tolist()
        seen = painted[n, top : top + high, left : left + wide].flatten().bincount(minlength=7)
        assert torch.allclose(shares[k, n], seen.double() / seen.sum())


def test_the_evidence_of_parts_is_that_of_least_squares():
    shares, terms = draw(5, 40, 7).softmax(2), draw(5, 40, 3)
    ones = torch.ones(40, dtype=torch.float64)
    expected = np.linalg.lstsq(shares.flatten(0, 1).numpy(), 5 * terms.flatten(0, 1).numpy())[0]
    assert np.allclose(attribution.part_evidence(terms, shares, ones), expected)
    truth = draw(7, 3)
    assert torch.allclose(attribution.part_evidence(shares @ truth / 5, shares, ones), truth)
    assert not torch.allclose(attribution.part_evidence(shares @ truth, shares, ones), truth)

    # an image that counts twice is there twice, one that counts nothing is not there
    weights = torch.ones(2, 40, dtype=torch.float64)
    weights[1, :10], weights[1, 10:20] = 2, 0
    found = attribution.part_evidence(terms, shares, weights)
    rows = torch.tensor([*range(10), *range(10), *range(20, 40)])
    assert torch.allclose(found[0], torch.from_numpy(expected))
    assert torch.allclose(found[1], attribution.part_evidence(terms[:, rows], shares[:, rows], ones[rows]))
