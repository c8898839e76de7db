"""The objectives as mathematical facts: identities, bounds, invariances, agreement with float64 algebra and lightly."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from lightly.loss import BarlowTwinsLoss, NTXentLoss, VICRegLoss
from lightly.loss.negative_cosine_similarity import NegativeCosineSimilarity

from bagssl.objectives import (
    OBJECTIVES,
    barlow,
    byol,
    coding_rate,
    moco,
    simclr,
    spectral,
    spread,
    tcr,
    vicreg,
)
from bagssl.study.cooccurrence import mixture, spectral_loss

SELF_CONTAINED = [name for name in OBJECTIVES if not OBJECTIVES[name].needs_target]


def projections(views=3, batch=12, dim=8, seed=0, dtype=torch.float64):
    """Views that share an image's signal, as training sees them: [views, batch, dim]."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(1, batch, dim, generator=generator, dtype=dtype)
    return image + 0.5 * torch.randn(views, batch, dim, generator=generator, dtype=dtype)


def apart(**shape):
    """Perfectly invariant and spread out: all views of an image are alike, images differ."""
    z = projections(**shape)
    return z[:1].expand_as(z)


def collapsed(**shape):
    """Perfectly invariant and, but for a trace, the same for every image."""
    z = apart(**shape)
    return z[:, :1] + 1e-3 * z


def dense_rate(z, epsilon2, side):
    batch, dim = z.shape
    gram = z.T @ z if side == "D" else z @ z.T
    return 0.5 * torch.logdet(torch.eye(len(gram), dtype=z.dtype) + dim / (batch * epsilon2) * gram)


@pytest.mark.parametrize(("batch", "dim"), [(12, 8), (8, 12), (5, 40), (40, 5), (9, 9)])
def test_coding_rate_is_the_same_on_both_sides_of_the_determinant_identity(batch, dim):
    z = F.normalize(projections(1, batch, dim)[0], dim=-1)
    ours = coding_rate(z)
    for side in "DB":
        torch.testing.assert_close(ours, dense_rate(z, 0.2, side), rtol=1e-12, atol=0)
    # negative control: another epsilon is another number
    assert abs(ours - dense_rate(z, 0.25, "D")) > 1e-2


def test_coding_rate_is_bounded_by_orthonormal_directions():
    """R is largest when B unit vectors have B orthogonal directions (Yu et al. 2020, lemma A.2)."""
    batch = dim = 8
    best = 0.5 * dim * math.log(1 + 1 / 0.2)
    assert coding_rate(torch.eye(batch, dtype=torch.float64)).item() == pytest.approx(best, rel=1e-12)
    assert coding_rate(F.normalize(projections(1, batch, dim)[0], dim=-1)).item() < best


def test_tcr_is_its_formula():
    z = projections()
    unit = F.normalize(z, dim=-1)
    mean = unit.mean(0)
    cosines = [F.cosine_similarity(view, mean, dim=-1).mean() for view in unit]
    rates = [dense_rate(view, 0.2, "D") for view in unit]
    expected = -7.0 * sum(cosines) / 3 - sum(rates) / 3
    torch.testing.assert_close(tcr(z, invariance=7.0)["loss"], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", SELF_CONTAINED)
def test_collapse_scores_worse_than_spread(name):
    objective = OBJECTIVES[name]
    assert objective(collapsed(batch=32))["loss"] > objective(apart(batch=32))["loss"]


def test_the_wrong_sign_of_the_coding_rate_rewards_collapse():
    """Negative control of the test above: adding the coding rate makes collapse score better."""
    def wrong(z):
        terms = tcr(z)
        return terms["loss"] + 2 * terms["coding_rate"]

    assert wrong(collapsed(batch=32)) < wrong(apart(batch=32))


def test_spread_tells_collapse():
    assert spread(collapsed()) < 1e-4
    assert spread(projections()) > 0.1


@pytest.mark.parametrize("name", SELF_CONTAINED)
@pytest.mark.parametrize(("batch", "dim"), [(6, 4), (4, 6)])
def test_gradients_are_those_of_finite_differences(name, batch, dim):
    z = projections(3, batch, dim).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: OBJECTIVES[name](z)["loss"], z)


@pytest.mark.parametrize("objective", [byol, moco])
def test_the_gradient_reaches_the_prediction_and_not_the_target(objective):
    z, target = projections(seed=1).requires_grad_(), projections(seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: objective(z, target)["loss"], z)
    objective(z, target)["loss"].backward()
    assert z.grad.abs().sum() > 0 and target.grad is None


@pytest.mark.parametrize("views", [2, 4])
@pytest.mark.parametrize(("batch", "dim"), [(12, 8), (8, 12)])
def test_pairwise_objectives_are_lightlys_averaged_over_pairs(views, batch, dim):
    z = projections(views, batch, dim, dtype=torch.float32)
    pairs = list(itertools.combinations(range(views), 2))

    def mean(loss):
        return sum(loss(z[a], z[b]) for a, b in pairs) / len(pairs)

    torch.testing.assert_close(simclr(z, temperature=0.2)["loss"], mean(NTXentLoss(temperature=0.2)))
    torch.testing.assert_close(vicreg(z)["loss"], mean(VICRegLoss()))
    torch.testing.assert_close(barlow(z)["loss"], mean(BarlowTwinsLoss()))
    # lightly's BYOL criterion is the negative cosine: 2 - 2 cos is 2 + 2 times it, averaged over both directions
    target = projections(views, batch, dim, seed=5, dtype=torch.float32)
    cosine = NegativeCosineSimilarity()
    both = sum(cosine(z[a], target[b]) for a, b in itertools.permutations(range(views), 2)) / (2 * len(pairs))
    torch.testing.assert_close(byol(z, target)["loss"], 2 + 2 * both)
    # negative control: the whole variance term, not half of it, is what some libraries compute
    assert abs(vicreg(z, variance=50.0)["loss"] - mean(VICRegLoss())) > 1e-2 * vicreg(z)["variance"]


def test_moco_is_the_cross_entropy_of_queries_with_keys():
    queries, keys = projections(3, seed=1), projections(3, seed=2)
    logits = {(a, b): F.normalize(queries[a], dim=-1) @ F.normalize(keys[b], dim=-1).T / 0.3
              for a, b in itertools.permutations(range(3), 2)}  # fmt: skip
    losses = [F.cross_entropy(pair, torch.arange(len(pair))) for pair in logits.values()]
    expected = sum(losses) / len(losses)
    torch.testing.assert_close(moco(queries, keys, temperature=0.3)["loss"], expected, rtol=1e-12, atol=0)
    # negative control: a view's query against its own key is no pair
    assert abs(moco(queries, queries, temperature=0.3)["loss"] - expected) > 1e-2


def test_vicreg_is_its_formula_in_float64():
    z = projections(2)
    distance = (z[0] - z[1]).square().mean()
    hinge = sum(F.relu(1 - torch.sqrt(view.var(0) + 1e-4)).mean() for view in z) / 2
    covariance = sum((torch.cov(v.T) - torch.diag(torch.diag(torch.cov(v.T)))).square().sum() / v.shape[1] for v in z)
    torch.testing.assert_close(vicreg(z)["loss"], 25 * distance + 25 * hinge + covariance, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("views", "batch", "dim"), [(2, 5, 3), (4, 5, 3), (3, 4, 40)])
def test_spectral_is_its_formula_over_all_pairs(views, batch, dim):
    z = projections(views, batch, dim)
    patches = [(v, i) for v in range(views) for i in range(batch)]
    pairs = list(itertools.product(patches, repeat=2))
    positive = [z[v, i] @ z[u, j] for (v, i), (u, j) in pairs if i == j and u != v]
    negative = [(z[v, i] @ z[u, j]) ** 2 for (v, i), (u, j) in pairs if i != j]
    expected = -2 * sum(positive) / len(positive) + sum(negative) / len(negative)
    torch.testing.assert_close(spectral(z)["loss"], expected, rtol=1e-12, atol=1e-12)


def test_spectral_estimates_twice_the_spectral_contrastive_loss_at_half():
    """On pairs drawn from a known joint, within five standard errors; at lambda = 1 it does not."""
    joint, generator = mixture(8, 3, seed=0), torch.Generator().manual_seed(0)
    each = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    found = []
    for _ in range(50):
        pair = torch.multinomial(joint.flatten(), 500, replacement=True, generator=generator)
        found.append(spectral(torch.stack([each[pair // 8], each[pair % 8]]))["loss"])
    found = torch.stack(found)
    error = found.std() / math.sqrt(len(found))
    assert abs(found.mean() - 2 * spectral_loss(each, joint, 0.5)) < 5 * error
    assert abs(found.mean() - 2 * spectral_loss(each, joint, 1.0)) > 20 * error


@pytest.mark.parametrize("name", SELF_CONTAINED)
def test_objectives_do_not_depend_on_the_order_of_views_or_images(name):
    z = projections(4)
    loss = OBJECTIVES[name](z)["loss"]
    torch.testing.assert_close(OBJECTIVES[name](z.flip(0))["loss"], loss)
    torch.testing.assert_close(OBJECTIVES[name](z.flip(1))["loss"], loss)
    # negative control: images shuffled in one view only are other pairs
    mixed = torch.cat([z[:1].flip(1), z[1:]])
    assert OBJECTIVES[name](mixed)["loss"] > loss


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_half_precision_projections_give_float32_losses(name, device):
    seeds = range(1 + OBJECTIVES[name].needs_target)
    z = [projections(4, 64, 96, seed=seed, dtype=torch.float32).bfloat16() for seed in seeds]
    terms = OBJECTIVES[name](*(each.to(device) for each in z))
    exact = OBJECTIVES[name](*(each.double() for each in z))
    for term, value in terms.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double().cpu(), exact[term], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", SELF_CONTAINED)
def test_no_loss_waits_for_two_views_only(name):
    for views in (2, 3, 8):
        assert OBJECTIVES[name](projections(views))["loss"].isfinite()
