"""The synthetic world: the same everywhere, its parts ambiguous one by one, clear in a bag, and as stated."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from bagssl import data, synthetic

FINGERPRINTS = {
    "train": "29d01c1be63d954038c606d0baff893a398a604cbd9c00e43bce8a4368446cd7",
    "test": "d7c06264d47a67f96398411c44ac4166926cd78b07f890ad5a53466e94870e22",
}


@pytest.fixture(scope="module")
def splits():
    return {split: synthetic.draw(split) for split in synthetic.SPLITS}


@pytest.fixture(scope="module")
def world():
    return synthetic.world()


@pytest.fixture(scope="module")
def many():
    return synthetic.generate(8_000, seed=3)


def pairs(parts):
    """How often parts a and b meet in two different cells of one image, as shares of all such pairs."""
    counts = torch.nn.functional.one_hot(parts.flatten(1), 36).sum(1).double()
    meetings = counts.T @ counts - counts.sum(0).diag()  # without each cell's pair with itself
    return meetings / meetings.sum()


def mismatch(world, parts):
    """Chi-square of the empirical co-occurrence against `joint`, by degrees of freedom: about 1 for a match.

    Only cells 2i and 2i+1 are paired, so that pairs are independent given the class, as the statistic wants.
    """
    first, second = parts.flatten(1)[:, 0::2].flatten(), parts.flatten(1)[:, 1::2].flatten()
    found = torch.bincount(first * 36 + second, minlength=36**2).double()
    expected = world.joint.flatten() * len(first)
    return ((found - expected) ** 2 / expected).sum().item() / (36**2 - 1)


def accuracy(world, labels, parts, k):
    """Accuracy of the exact Bayes classifier that is told the parts of k cells."""
    scores = world.class_part.log()[:, parts.flatten(1)[:, :k]].sum(-1)
    return (scores.argmax(0) == labels).double().mean().item()


def linear_probe(train, train_labels, test, test_labels, regularisation=1.0):
    mean, scale = train.mean(0), train.std(0)
    probe = LogisticRegression(C=regularisation, max_iter=200).fit((train - mean) / scale, train_labels)
    return probe.score((test - mean) / scale, test_labels)


@pytest.mark.parametrize("split", ["train", "test"])
def test_pixels_are_the_same_on_every_machine(splits, split):
    pixels, labels, _ = splits[split]
    assert data.fingerprint(pixels, labels, synthetic.CLASSES) == FINGERPRINTS[split]


def test_images_are_balanced_and_use_the_range(splits):
    pixels, labels, parts = splits["train"]
    assert pixels.shape == (4000, 3, 32, 32) and pixels.dtype == torch.uint8
    assert labels.bincount().tolist() == [400] * 10
    assert parts.shape == (4000, 4, 4) and parts.flatten().bincount().min() > 0
    assert len(pixels.flatten(1).unique(dim=0)) == 4000
    assert ((pixels == 0) | (pixels == 255)).double().mean() < 0.02  # colours are not clipped away


def test_train_and_test_are_different_images(splits):
    both = torch.cat([splits["train"][0], splits["test"][0]]).flatten(1)
    assert len(both.unique(dim=0)) == 5000


def test_cells_show_the_parts_they_report(splits, world):
    """A cell correlates with its own part, at one of the windows, more than with nearly any other part."""
    pixels, _, parts = (tensor[:40] for tensor in splits["test"])
    cells = pixels.reshape(40, 3, 4, 8, 4, 8).permute(0, 2, 4, 1, 3, 5).reshape(640, 192).double()
    windows = world.parts.unfold(2, 8, 1).unfold(3, 8, 1).permute(0, 2, 3, 1, 4, 5).reshape(900, 192).double()
    centred = [rows - rows.mean(1, keepdim=True) for rows in (cells, windows)]
    cells, windows = (torch.nn.functional.normalize(rows, dim=1) for rows in centred)
    found = (cells @ windows.T).argmax(1) // 25
    assert (found == parts.flatten()).double().mean() > 0.9


def test_joint_is_a_distribution_of_rank_ten(world):
    torch.testing.assert_close(world.class_part.sum(1), torch.ones(10, dtype=torch.float64))
    torch.testing.assert_close(world.joint.sum(), torch.ones((), dtype=torch.float64))
    assert torch.equal(world.joint, world.joint.T)
    values = torch.linalg.eigvalsh(world.joint)
    assert values.min() > -1e-15 and (values > 1e-9).sum() == 10
    torch.testing.assert_close(world.joint.sum(0), world.class_part.mean(0))


def test_joint_is_the_mixture_over_classes(world):
    mixture = sum(torch.outer(p, p) for p in world.class_part) / 10
    torch.testing.assert_close(world.joint, mixture)
    independent = torch.outer(world.joint.sum(0), world.joint.sum(0))
    assert ((world.joint - independent) / independent).abs().max() > 0.5  # parts of an image go together


def test_generated_parts_have_the_stated_cooccurrence(world, many):
    parts = many[2]
    assert (pairs(parts) - world.joint).abs().max() < 2e-4  # the largest entry is 2e-3
    # of 1 ± 0.04: 64,000 pairs, independent given the class, and 1,295 degrees of freedom
    assert 0.8 < mismatch(world, parts) < 1.2


def test_shuffled_parts_do_not_have_it(world, many):
    """Negative control: with cells exchanged between images parts are as frequent, but do not meet so.

    A mismatch grows with the number of pairs, beyond the 1 ± 0.04 of a match.
    """
    parts = many[2]
    order = torch.randperm(parts.numel(), generator=torch.Generator().manual_seed(0))
    shuffled = parts.flatten()[order].reshape(parts.shape)
    assert mismatch(world, shuffled) > 3
    relabelled = torch.randperm(36, generator=torch.Generator().manual_seed(0))[parts]
    assert mismatch(world, relabelled) > 3


def test_colour_does_not_tell_the_class_and_a_motif_tells_little(world):
    by_motif_and_colour = world.class_part.reshape(10, 6, 6)
    uniform = torch.full((10, 6), 1 / 6, dtype=torch.float64)
    torch.testing.assert_close(by_motif_and_colour.sum(1), uniform)
    motif = by_motif_and_colour.sum(2)
    assert (motif.argsort(1)[:, -2:].sort(1).values.unique(dim=0)).shape == (10, 2)  # a pair of its own
    assert motif.max() < 0.5  # and either of the pair is shared with three other classes


def test_one_part_is_ambiguous_and_a_bag_is_not(world, many):
    """Accuracy of the exact Bayes classifier; chance is 0.1."""
    assert 0.2 < world.class_part.max(0).values.sum() / 10 < 0.3
    _, labels, parts = many
    one, four, sixteen = (accuracy(world, labels, parts, k) for k in (1, 4, 16))
    assert one == pytest.approx(world.class_part.max(0).values.sum().item() / 10, abs=0.015)
    assert 0.6 < four < 0.7
    assert sixteen > 0.95


def test_pixels_do_not_give_the_class_to_a_linear_probe(splits):
    """Mean colour and raw pixels tell little; the histogram of the parts, a bag, does not."""
    (train, labels, parts), (test, test_labels, test_parts) = splits["train"], splits["test"]
    colour = [pixels.double().mean((2, 3)).numpy() for pixels in (train, test)]
    assert linear_probe(colour[0], labels, colour[1], test_labels) < 0.2
    pixels = [pixels.flatten(1)[:, ::2].float().numpy() for pixels in (train, test)]
    assert linear_probe(pixels[0], labels, pixels[1], test_labels, 1e-4) < 0.3
    bags = [np.stack([np.bincount(row, minlength=36) for row in p.flatten(1)]) for p in (parts, test_parts)]
    assert linear_probe(bags[0], labels, bags[1], test_labels) > 0.9


def test_seeds_differ_and_repeat():
    first, again, other = (synthetic.generate(20, seed)[0] for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)
