"""Patch co-occurrence in closed form: what the claim "the objective models which patches occur together" means.

A joint is p(x1, x2) of two patches of one image, a symmetric float64 tensor [P, P] that sums to 1; its marginal is
p(x) [P]. What is to be modelled is the ratio p(x1, x2) / (p(x1) p(x2)): 1 for patches that meet as often as by
chance. Projections are z [P, D], one row for each of the P patches; joints are in float64, kernels of z in its type.

Two losses (spectral contrastive: HaoChen et al. 2021):

    L_S = -E_joint z1.z2 + lambda E_product (z1.z2)^2          L_C = E_product [w z1.z2 - ratio]^2

Expanding the square of L_C gives w^2 E_product (z1.z2)^2 - 2w E_joint z1.z2 + E_product ratio^2, because the mean of
ratio * f over the product is the mean of f over the joint. Hence L_C = 2w L_S + E_product ratio^2 for all z if and
only if lambda = w / 2; at any other lambda the two differ by w (w - 2 lambda) E_product (z1.z2)^2, which depends on z.

With U = D^1/2 z, D the diagonal of p, and A = D^-1/2 joint D^-1/2, L_C is the squared Frobenius norm of w U U^T - A:
the optimum is the best approximation of A of rank D by Eckart and Young, and known from the eigenvectors of A.
"""

import math
from collections.abc import Callable

import torch
from scipy.linalg import subspace_angles
from torch import Tensor
from torch.nn import functional as F

from bagssl.errors import InputError

Kernel = Callable[[Tensor, Tensor], Tensor]  # z [m, D], z [n, D] -> what they say of the ratio, [m, n]


# ---- a joint


def marginal(joint: Tensor) -> Tensor:
    """p(x) [P] of a joint [P, P]. Raises InputError for what is no joint of two patches of one image."""
    if joint.dtype != torch.float64 or joint.ndim != 2 or joint.shape[0] != joint.shape[1]:
        raise InputError(f"the joint is {joint.dtype} {list(joint.shape)}: give float64 [P, P]")
    p = joint.sum(1)
    if not torch.allclose(joint, joint.T, rtol=0, atol=1e-12) or joint.min() < 0 or p.min() <= 0:
        raise InputError("a joint must be symmetric and not negative, and each patch must occur")
    if abs(p.sum().item() - 1) > 1e-9:
        raise InputError(f"the joint sums to {p.sum().item():.6g}: it must sum to 1")
    return p


def ratio(joint: Tensor) -> Tensor:
    """p(x1, x2) / (p(x1) p(x2)), [P, P]."""
    p = marginal(joint)
    return joint / torch.outer(p, p)


def spectrum(joint: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [P], the largest first, and eigenvectors [P, P] (columns) of A = D^-1/2 joint D^-1/2.

    The first pair is 1 and sqrt p: that patches occur at all. The others say which occur together.
    """
    return _eigen(ratio(joint), marginal(joint))


def _eigen(ratios: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """The same of any symmetric matrix of ratios [P, P], learned or true: of D^1/2 ratios D^1/2."""
    root = p.sqrt()
    values, vectors = torch.linalg.eigh(root[:, None] * (ratios + ratios.T) / 2 * root)
    return values.flip(0), vectors.flip(1)


def mixture(parts: int, classes: int, seed: int) -> Tensor:
    """A random joint [P, P] of patches that are independent given their image's class: A has no negative eigenvalue."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(classes, generator=generator, dtype=torch.float64) + 0.5
    given_class = torch.rand(classes, parts, generator=generator, dtype=torch.float64) ** 3 + 0.01
    given_class /= given_class.sum(1, keepdim=True)
    joint = given_class.T @ (given_class * (weights / weights.sum())[:, None])
    return (joint + joint.T) / 2


def symmetric(parts: int, seed: int) -> Tensor:
    """A random joint [P, P] without structure: A has negative eigenvalues, which no z can fit."""
    joint = torch.rand(parts, parts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 2
    joint = joint + joint.T
    return joint / joint.sum()


# ---- losses


def spectral_loss(z: Tensor, joint: Tensor, lam: float) -> Tensor:
    """L_S = -E_joint z1.z2 + lam E_product (z1.z2)^2 of z [P, D], a scalar."""
    p, products = marginal(joint), z @ z.T
    return lam * p @ products.square() @ p - (joint * products).sum()


def cooccurrence_loss(z: Tensor, joint: Tensor, w: float) -> Tensor:
    """L_C = E_product [w z1.z2 - p(x1, x2) / (p(x1) p(x2))]^2 of z [P, D], a scalar."""
    p = marginal(joint)
    return p @ (w * z @ z.T - ratio(joint)).square() @ p


def constant(joint: Tensor) -> Tensor:
    """What L_C - 2w L_S is at lambda = w / 2, whatever z and w: E_product ratio^2, a scalar."""
    p = marginal(joint)
    return p @ ratio(joint).square() @ p


def optimum(joint: Tensor, dim: int, w: float) -> tuple[Tensor, Tensor]:
    """A minimum z [P, dim] of L_C, unique up to rotation, and its loss.

    z = D^-1/2 V sqrt(values / w), V the eigenvectors of A with the `dim` largest eigenvalues (a negative one counts
    as 0: z zT has none). The loss is the sum of the squares of what is left of the spectrum.
    """
    values, vectors = spectrum(joint)
    kept = values[:dim].clamp(min=0)
    z = marginal(joint).rsqrt()[:, None] * vectors[:, :dim] * (kept / w).sqrt()
    rest = values.square().sum() - kept.square().sum()
    return F.pad(z, (0, dim - z.shape[1])), rest.clamp(min=0)


def descend(joint: Tensor, dim: int, w: float, seed: int, steps: int = 500) -> tuple[Tensor, list[float]]:
    """Minimise L_C by L-BFGS from a random start: the z [P, dim] it ends with, and the loss at each evaluation.

    L_C is not convex in z, but as a low-rank fit it has no local minima beside the global (Ge, Jin and Zheng 2017).
    """
    generator, losses = torch.Generator().manual_seed(seed), []
    z = torch.randn(len(joint), dim, generator=generator, dtype=torch.float64).requires_grad_()
    to_the_end = {"tolerance_grad": 1e-12, "tolerance_change": 0.0, "line_search_fn": "strong_wolfe"}
    descent = torch.optim.LBFGS([z], max_iter=steps, max_eval=2 * steps, history_size=20, **to_the_end)

    def closure() -> Tensor:
        descent.zero_grad()
        loss = cooccurrence_loss(z, joint, w)
        loss.backward()
        losses.append(loss.item())
        return loss

    descent.step(closure)
    return z.detach(), [*losses, cooccurrence_loss(z.detach(), joint, w).item()]


# ---- what was learned


def gram(first: Tensor, second: Tensor) -> Tensor:
    """z1.z2: the ratio itself where an objective has its optimum there (spectral, w = 1)."""
    return first @ second.T


def exponential(z: Tensor, temperature: float) -> Kernel:
    """exp(cos(z1, z2) / T), to scale: SimCLR's optimum has the log-ratio in its logits, but for a constant.

    van den Oord et al. 2018, section 2.3. The constant is such that the mean over cells of different images is 1; z
    [images, cells, D], two images and two cells at least.
    """
    def kernel(first: Tensor, second: Tensor) -> Tensor:
        return (F.normalize(first) @ F.normalize(second).T / temperature).exp()

    mean = kernel(z[0::2, 0], z[1::2, 1]).mean()
    return lambda first, second: kernel(first, second) / mean


def readout(z: Tensor) -> Kernel:
    """The ratio that the subspace of z holds, whatever the scale of its directions, read from the pairs alone.

    VICReg and TCR fix the covariance of z, and so keep the eigenvectors of the co-occurrence but not the eigenvalues
    (Garrido et al. 2022). These are how far the two patches of a pair agree: of all 1 + z1 S z2 (z centred), the best
    fit to the ratio has S = C^-1 E_joint[z1 z2^T] C^-1, C the covariance. z [images, cells, D], patches of one image in
    a row; no part is told.
    """
    z = z.double()
    images, cells, _ = z.shape
    mean = z.mean((0, 1))
    z = z - mean
    own = torch.einsum("ncd,nce->de", z, z)
    pairs = (torch.einsum("ncd,nme->de", z, z) - own) / (images * cells * (cells - 1))
    inverse = torch.linalg.pinv(own / (images * cells), rtol=1e-6, hermitian=True)
    inner = inverse @ pairs @ inverse
    return lambda first, second: 1 + (first.double() - mean) @ inner @ (second.double() - mean).T


def learned_ratio(kernel: Kernel, z: Tensor, part: Tensor, parts: int, groups: int = 20,
                  affine: bool = False) -> Tensor:  # fmt: skip
    """The ratio of parts according to z: the mean of `kernel` over the pairs of their cells from different images.

    Given its part, a cell still differs in position, noise and the light of its image; in the true ratio of patches
    these average out exactly, as the mean of p(x1, x2) / (p(x1) p(x2)) over independent x1 of part a and x2 of part b
    is the ratio of a and b. affine: the kernel is so in either argument, as `gram` and `readout` are; its mean is then
    that of the mean projections, and takes no pairs. z [images, cells, D], part int64 [images, cells], every part in
    several images. The images are taken in `groups`, and pairs from two of them.
    Returns float64 [1 + groups, P, P]: of all images, then without each of the groups.
    """
    zs, shown = z.chunk(groups), [F.one_hot(chunk.flatten(), parts).to(z) for chunk in part.chunk(groups)]
    count = torch.stack([one.sum(0) for one in shown]).double()
    means = [one.T.double() @ group.flatten(0, 1).double() / one.sum(0).clamp(min=1)[:, None]
             for one, group in zip(shown, zs, strict=True)]  # fmt: skip
    sums, counts = (torch.zeros(1 + len(zs), parts, parts, dtype=torch.float64) for _ in range(2))
    for a in range(len(zs)):
        for b in range(a):
            pairs = torch.outer(count[a], count[b])
            if affine:
                said = kernel(means[a], means[b]) * pairs
            else:
                said = kernel(zs[a].flatten(0, 1), zs[b].flatten(0, 1)).to(z)
                said = (shown[a].T @ said @ shown[b]).double()
            for total, block in ((sums, said), (counts, pairs)):
                total[[0, a + 1, b + 1]] += block + block.T
    sums[1:], counts[1:] = sums[0] - sums[1:], counts[0] - counts[1:]
    return sums / counts


def fit(learned: Tensor, joint: Tensor, ranks: tuple[int, ...] = (1,)) -> dict[str, float]:
    """How well learned ratios [P, P] are the true ones: correlation, R2, and an angle in degrees for each rank.

    Over all P x P pairs of parts, the diagonal as well, weighted by p(x1) p(x2), the measure of L_C. R2 = 1 - squared
    error / variance of the true ratio, with nothing fitted, so that it can be below 0. "angle k" is the largest
    principal angle between the k first eigenvectors of the learned and of the true ratios in the metric weighted by
    sqrt p: 0 is the same subspace, 90 means that a direction is missing altogether.
    """
    p = marginal(joint)
    weight, true = torch.outer(p, p), ratio(joint)
    x, y = (values - (weight * values).sum() for values in (learned, true))
    covariance, variances = (weight * x * y).sum(), [(weight * values.square()).sum() for values in (x, y)]
    measures = {"correlation": float(covariance / math.sqrt(variances[0] * variances[1])),
                "R2": float(1 - (weight * (learned - true).square()).sum() / variances[1])}
    ours, theirs = (_eigen(ratios, p)[1].numpy() for ratios in (learned, true))
    for rank in ranks:
        measures[f"angle {rank}"] = math.degrees(subspace_angles(ours[:, :rank], theirs[:, :rank]).max())
    return measures


def fits(learned: Tensor, joint: Tensor, ranks: tuple[int, ...] = (1,)) -> dict[str, Tensor]:
    """`fit` of each of learned ratios [1 + groups, P, P] as from `learned_ratio`: measure -> float64 [1 + groups]."""
    each = [fit(ratios, joint, ranks) for ratios in learned]
    return {name: torch.tensor([found[name] for found in each], dtype=torch.float64) for name in each[0]}
