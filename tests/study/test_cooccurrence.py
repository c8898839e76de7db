"""The theory of co-occurrence: identities in float64, optima against SVD, measures against loops and known worlds."""

import itertools
import math

import numpy as np
import pytest
import torch

from bagssl import intervals, synthetic
from bagssl.errors import InputError
from bagssl.study import cooccurrence as co

pytestmark = pytest.mark.usefixtures("one_thread")

JOINTS = {"mixture": co.mixture(12, 5, seed=0), "symmetric": co.symmetric(12, seed=0),
          "larger": co.mixture(40, 7, seed=1)}
joints = pytest.mark.parametrize("joint", JOINTS.values(), ids=JOINTS.keys())
weights = pytest.mark.parametrize("w", [0.3, 1.0, 2.5])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def deviation(z, joint, w, lam):
    return (co.cooccurrence_loss(z, joint, w) - 2 * w * co.spectral_loss(z, joint, lam) - co.constant(joint)).item()


def loops(z, joint, w, lam):
    """Both losses, term by term."""
    z, joint = z.numpy(), joint.numpy()
    p = joint.sum(1)
    spectral = cooccurrence = 0.0
    for a, b in itertools.product(range(len(p)), repeat=2):
        product = sum(z[a, d] * z[b, d] for d in range(z.shape[1]))
        spectral += -joint[a, b] * product + lam * p[a] * p[b] * product**2
        cooccurrence += p[a] * p[b] * (w * product - joint[a, b] / (p[a] * p[b])) ** 2
    return spectral, cooccurrence


# ---------------------------------------------------------------------------------------------------- the identity


@joints
def test_losses_are_their_formulas(joint):
    z = normal(len(joint), 4)
    spectral, cooccurrence = loops(z, joint, 1.7, 0.6)
    assert co.spectral_loss(z, joint, 0.6).item() == pytest.approx(spectral, rel=1e-12)
    assert co.cooccurrence_loss(z, joint, 1.7).item() == pytest.approx(cooccurrence, rel=1e-12)


@joints
@weights
def test_the_losses_differ_by_a_constant_at_half_w(joint, w):
    for seed in range(5):
        assert abs(deviation(normal(len(joint), 4, seed=seed), joint, w, w / 2)) < 1e-10


@joints
@weights
def test_at_any_other_lambda_they_do_not(joint, w):
    """Negative control: the difference depends on z, by w (w - 2 lambda) times the mean square of z1.z2."""
    p = co.marginal(joint)
    for lam in (0.9 * w / 2, 1.1 * w / 2, w, 0.0):
        found = []
        for seed in range(5):
            z = normal(len(joint), 4, seed=seed)
            found.append(deviation(z, joint, w, lam))
            assert found[-1] == pytest.approx(w * (w - 2 * lam) * (p @ (z @ z.T).square() @ p).item(), rel=1e-9)
        assert np.ptp(found) > 1e-3


# ---------------------------------------------------------------------------------------------------- the optimum


@weights
@pytest.mark.parametrize("dim", [1, 3, 5, 12, 15])
def test_without_negative_eigenvalues_the_optimum_is_eckart_and_youngs(w, dim):
    joint = JOINTS["mixture"]
    p = joint.sum(1).numpy()
    left, values, right = np.linalg.svd(joint.numpy() / np.sqrt(np.outer(p, p)))
    z, loss = co.optimum(joint, dim, w)
    best = (left[:, :dim] * values[:dim]) @ right[:dim] / np.sqrt(np.outer(p, p))
    assert z.shape == (12, dim) and z.dtype == torch.float64
    np.testing.assert_allclose(w * (z @ z.T).numpy(), best, atol=1e-9)
    assert loss.item() == pytest.approx((values[dim:] ** 2).sum(), abs=1e-12)
    assert co.cooccurrence_loss(z, joint, w).item() == pytest.approx(loss.item(), abs=1e-12)


@joints
@weights
def test_the_closed_form_is_a_minimum(joint, w):
    z, loss = co.optimum(joint, 4, w)
    z.requires_grad_()
    reached = co.cooccurrence_loss(z, joint, w)
    (slope,) = torch.autograd.grad(reached, z)
    assert slope.abs().max() < 1e-12 and reached.item() == pytest.approx(loss.item(), abs=1e-12)
    z = z.detach()
    for seed, size in itertools.product(range(20), (1e-3, 1e-1, 1.0)):
        assert co.cooccurrence_loss(z + size * normal(*z.shape, seed=seed), joint, w) > loss
    # negative control: the optimum for another w, and the eigenvectors after the first four, are none
    assert co.cooccurrence_loss(co.optimum(joint, 4, 1.2 * w)[0], joint, w) > loss + 1e-2
    values, vectors = co.spectrum(joint)
    others = co.marginal(joint).rsqrt()[:, None] * vectors[:, 1:5] * (values[1:5].clamp(min=0) / w).sqrt()
    assert co.cooccurrence_loss(others, joint, w) > loss + 1e-2


def test_negative_eigenvalues_stay_unfitted():
    joint = JOINTS["symmetric"]
    values, _ = co.spectrum(joint)
    assert values.min() < -0.1
    _, loss = co.optimum(joint, 12, 1.0)
    assert loss.item() == pytest.approx(values[values < 0].square().sum().item(), rel=1e-9)


def test_with_enough_dimensions_the_gram_is_the_ratio():
    joint = JOINTS["mixture"]
    z, loss = co.optimum(joint, 5, 2.0)
    torch.testing.assert_close(2.0 * z @ z.T, co.ratio(joint), rtol=0, atol=1e-10)
    assert loss < 1e-12
    values, vectors = co.spectrum(joint)
    assert values[0].item() == pytest.approx(1, abs=1e-12)  # that patches occur at all
    torch.testing.assert_close(vectors[:, 0].abs(), joint.sum(1).sqrt())


@joints
def test_descent_from_five_random_starts_ends_at_the_optimum(joint):
    _, best = co.optimum(joint, 4, 1.0)
    for seed in range(5):
        z, losses = co.descend(joint, 4, 1.0, seed)
        assert -1e-12 < losses[-1] - best.item() < 1e-4
        assert losses[0] - best.item() > 1  # it did not start there
        assert co.cooccurrence_loss(z, joint, 1.0).item() == losses[-1]
    # negative control: one dimension fewer does not get there
    assert co.descend(joint, 3, 1.0, 0)[1][-1] - best.item() > 1e-3


@pytest.mark.parametrize(
    "wrong",
    [
        torch.ones(3, 3) / 9, torch.ones(3, 3, dtype=torch.float64), torch.tensor([[0.5, 0.2], [0.3, 0.0]]).double(),
        torch.tensor([[1.0, 0.0], [0.0, 0.0]]).double(), torch.tensor([[0.8, -0.1], [-0.1, 0.4]]).double(),
    ],
)  # fmt: skip
def test_what_is_no_joint_is_refused(wrong):
    with pytest.raises(InputError):
        co.marginal(wrong)


# ---------------------------------------------------------------------------------------------------- measures


def quilts(count=60, cells=4, dim=5, parts=6, seed=0):
    """Random projections and parts of the cells of `count` images."""
    part = torch.randint(parts, (count, cells), generator=torch.Generator().manual_seed(seed))
    return normal(count, cells, dim, seed=seed), part


def test_learned_ratio_is_the_mean_over_pairs_of_different_groups():
    z, part = quilts()
    learned = co.learned_ratio(co.gram, z, part, 6, groups=10)
    assert learned.shape == (11, 6, 6) and learned.dtype == torch.float64
    sums, counts, each, shown = np.zeros((6, 6)), np.zeros((6, 6)), z.numpy(), part.numpy()
    for i, j in itertools.product(range(60), repeat=2):
        if i // 6 != j // 6:
            for a, b in itertools.product(range(4), repeat=2):
                sums[shown[i, a], shown[j, b]] += each[i, a] @ each[j, b]
                counts[shown[i, a], shown[j, b]] += 1
    np.testing.assert_allclose(learned[0].numpy(), sums / counts, rtol=1e-9)
    rest = torch.ones(60, dtype=torch.bool)
    rest[18:24] = False
    torch.testing.assert_close(learned[4], co.learned_ratio(co.gram, z[rest], part[rest], 6, groups=9)[0])


def test_of_an_affine_kernel_the_mean_over_pairs_is_that_of_the_means():
    z, part = quilts()
    part[part == 5] = 0
    part[-12:] = 5  # a part that most groups lack
    for kernel in (co.gram, co.readout(z)):
        pairs, means = (co.learned_ratio(kernel, z, part, 6, groups=10, affine=affine) for affine in (False, True))
        torch.testing.assert_close(means, pairs, equal_nan=True)
        assert pairs[0].isfinite().all()
    # the control: of another kernel it is not
    curved = co.exponential(z, 0.5)
    pairs, means = (co.learned_ratio(curved, z, part, 6, groups=10, affine=affine) for affine in (False, True))
    assert (means - pairs)[0].abs().max() > 0.1


def test_patches_of_one_image_are_never_compared():
    _, part = quilts()
    image = torch.eye(60)[:, None].expand(60, 4, 60)  # each image's patches agree with each other and with nothing
    assert co.learned_ratio(co.gram, image, part, 6).abs().max() == 0


def test_a_perfect_fit_and_a_shuffled_one():
    joint = JOINTS["larger"]
    perfect = co.fit(co.ratio(joint), joint, (3, 7))
    assert perfect["correlation"] == pytest.approx(1) and perfect["R2"] == pytest.approx(1)
    assert perfect["angle 3"] < 1e-4 and perfect["angle 7"] < 1e-4
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    shuffled = co.fit(co.ratio(joint)[order][:, order], joint, (3, 7))
    assert shuffled["correlation"] < 0.5 and shuffled["R2"] < 0.5 and shuffled["angle 7"] > 45


def test_measures_are_weighted_correlation_and_r2():
    joint = JOINTS["larger"]
    noisy = co.ratio(joint) + 0.1 * normal(40, 40)
    p = co.marginal(joint).numpy()
    found, weight = co.fit(noisy, joint), np.outer(p, p).ravel()
    x, y = noisy.numpy().ravel(), co.ratio(joint).numpy().ravel()
    cov = np.cov(x, y, aweights=weight, ddof=0)
    assert found["correlation"] == pytest.approx(cov[0, 1] / math.sqrt(cov[0, 0] * cov[1, 1]), rel=1e-9)
    assert found["R2"] == pytest.approx(1 - np.average((x - y) ** 2, weights=weight) / cov[1, 1], rel=1e-9)
    # a scale and a shift are seen by R2 alone
    moved = co.fit(2 * noisy + 1, joint)
    assert moved["correlation"] == pytest.approx(found["correlation"]) and moved["R2"] < 0


def test_measures_know_no_order_of_parts_and_no_axes_of_z():
    joint = JOINTS["larger"]
    z = co.optimum(joint, 4, 1.0)[0] + 0.1 * normal(40, 4)
    found = co.fit(co.gram(z, z), joint, (3,))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    assert co.fit(co.gram(z[order], z[order]), joint[order][:, order], (3,)) == pytest.approx(found)
    turned = z @ torch.linalg.qr(normal(4, 4)).Q
    assert co.fit(co.gram(turned, turned), joint, (3,)) == pytest.approx(found)
    # negative control: the order of one side alone, or a stretched axis, is another fit
    assert co.fit(co.gram(z[order], z[order]), joint, (3,))["correlation"] < found["correlation"] - 0.1
    stretched = z * torch.tensor([1, 1, 1, 3.0])
    assert co.fit(co.gram(stretched, stretched), joint, (3,))["R2"] < found["R2"] - 0.1


@pytest.fixture(scope="module")
def world():
    """The true parts of quilts, as one-hot projections [images, 16, 36]: what is best learned, but for a linear map."""
    _, _, part = synthetic.generate(3000, seed=9)
    return part.flatten(1), torch.nn.functional.one_hot(part.flatten(1), 36).float(), synthetic.world().joint


def test_the_readout_finds_the_worlds_ratio_in_any_coordinates(world):
    part, z, joint = world
    plain = co.learned_ratio(co.readout(z), z[:500], part[:500], 36)[0]
    assert co.fit(plain, joint)["correlation"] > 0.98  # 3,000 quilts have nearly the world's co-occurrence
    turned = z @ normal(36, 36).float() + 3
    readout = co.learned_ratio(co.readout(turned), turned[:500], part[:500], 36)[0]
    torch.testing.assert_close(readout, plain, rtol=0, atol=1e-2)
    assert abs(co.fit(co.learned_ratio(co.gram, turned[:500], part[:500], 36)[0], joint)["correlation"]) < 0.9
    # negative control: cells that are shuffled between images meet by chance
    shuffled = z.flatten(0, 1)[torch.randperm(48_000, generator=torch.Generator().manual_seed(0))].view_as(z)
    assert co.fit(co.learned_ratio(co.readout(shuffled), z[:500], part[:500], 36)[0], joint)["correlation"] < 0.5


def test_the_exponential_has_mean_one_and_knows_no_length():
    z, _ = quilts(count=200)
    kernel = co.exponential(z, 0.5)
    assert kernel(z[0::2, 0], z[1::2, 1]).mean().item() == pytest.approx(1)
    torch.testing.assert_close(co.exponential(3 * z, 0.5)(z[:, 0], 7 * z[:, 1]), kernel(z[:, 0], z[:, 1]))
    logs = kernel(z[:, 0], z[:, 1]).log()
    cosines = torch.nn.functional.cosine_similarity(z[:, None, 0], z[None, :, 1], dim=-1)
    torch.testing.assert_close(logs - logs[0, 0], (cosines - cosines[0, 0]) / 0.5)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    """Noisy one-hot projections of a known joint: the jackknife's interval of a linear measure, over many draws."""
    joint = co.mixture(4, 2, seed=3)
    generator, inside = torch.Generator().manual_seed(0), 0
    expected = co.fit(co.gram(torch.eye(4).double(), torch.eye(4).double()), joint)["correlation"]
    for _ in range(40):
        part = torch.randint(4, (80, 4), generator=generator)
        z = torch.nn.functional.one_hot(part, 4) + 1.0 * torch.randn(80, 4, 4, generator=generator, dtype=torch.float64)
        found = co.fits(co.learned_ratio(co.gram, z, part, 4, groups=8), joint)
        value, low, high = intervals.jackknife(found["correlation"])
        assert low < value < high
        inside += low < expected < high
    assert inside >= 34
