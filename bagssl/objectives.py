"""The self-supervised objectives: one pure function each, from projections z [views, batch, dim] to named terms.

Every function takes any number of views V >= 2. Objectives that are defined on two views are averaged over the
pairs of views. Each returns a dictionary of scalars: `loss`, which is minimised, and the terms that make it up.

`@objective` makes such a function known by its name, and declares its options with their defaults.
"""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Terms = dict[str, Tensor]


class Objective:
    """A loss and what it declares: options -> defaults; needs_target: whether it takes an averaged network's z as well;
    reference: where it was proposed, a key of notebooks/references.bib.

    It is computed in float32 at least, whatever the precision of z or of an autocast around it: bf16 Gram matrices
    break the log-determinant.
    """

    def __init__(self, function: Callable[..., Terms], reference: str = "", needs_target: bool = False,
                 **options: float):  # fmt: skip
        functools.update_wrapper(self, function)
        self.function, self.reference, self.needs_target, self.options = function, reference, needs_target, options

    def __call__(self, *z: Tensor, **options: float) -> Terms:
        with torch.autocast(z[0].device.type, enabled=False):
            return self.function(*map(_at_least_float32, z), **{**self.options, **options})


OBJECTIVES: dict[str, Objective] = {}


def objective(reference: str = "", needs_target: bool = False,
              **options: float) -> Callable[[Callable[..., Terms]], Objective]:  # fmt: skip
    """Put the decorated function into OBJECTIVES, by its name, with what it declares: see `Objective`."""
    def known(function: Callable[..., Terms]) -> Objective:
        OBJECTIVES[function.__name__] = Objective(function, reference, needs_target, **options)
        return OBJECTIVES[function.__name__]

    return known


def coding_rate(z: Tensor, epsilon2: float = 0.2) -> Tensor:
    """Total coding rate R(Z) = 1/2 logdet(I + D / (B eps^2) Z^T Z) of z [..., batch, dim] -> [...], in nats.

    Yu et al. 2020, eq. 1. By logdet(I + c Z^T Z) = logdet(I + c Z Z^T) it is taken on the smaller side; Cholesky
    factors of all views come from one batched call. At least float32.
    """
    batch, dim = z.shape[-2:]
    z = _at_least_float32(z)
    gram = z.mT @ z if dim <= batch else z @ z.mT
    gram = gram * (dim / (batch * epsilon2)) + torch.eye(gram.shape[-1], dtype=z.dtype, device=z.device)
    # logdet = 2 sum log diag of the Cholesky factor, so that half of it is the sum
    return torch.linalg.cholesky_ex(gram).L.diagonal(dim1=-2, dim2=-1).log().sum(-1)


@objective("li2022manifold", invariance=200.0, epsilon2=0.2)
def tcr(z: Tensor, invariance: float, epsilon2: float) -> Terms:
    """Total coding rate with cosine invariance: -invariance * mean cos(z_i, mean z) - mean over views of R(Z_v).

    z [views, batch, dim] is l2-normalised here. Li et al. 2022 use invariance = 30 with two views, Tong et al. 2023
    (EMP-SSL) 200 with 20 to 200 patches.
    """
    z = F.normalize(z, dim=-1)
    similarity = F.cosine_similarity(z, z.mean(0, keepdim=True), dim=-1).mean()
    rate = coding_rate(z, epsilon2).mean()
    return {"loss": -invariance * similarity - rate, "similarity": similarity, "coding_rate": rate}


@objective("chen2020simclr", temperature=0.5)
def simclr(z: Tensor, temperature: float) -> Terms:
    """NT-Xent (Chen et al. 2020, eq. 1) of z [views, batch, dim], averaged over the pairs of views.

    For a pair (a, b) an image's negatives are the other images in a and in b.
    """
    z = F.normalize(z, dim=-1)
    views, batch, _ = z.shape
    logits = torch.einsum("aid,bjd->abij", z, z) / temperature
    same = torch.eye(views, device=z.device, dtype=torch.bool)
    itself = same[:, :, None, None] & torch.eye(batch, device=z.device, dtype=torch.bool)
    partition = logits.masked_fill(itself, -math.inf).logsumexp(-1)  # [a, b, i]: view a's image i against all of b
    within = partition.diagonal(dim1=0, dim2=1).mT[:, None]  # [a, 1, i]: against all of a but itself
    positive = logits.diagonal(dim1=2, dim2=3)  # [a, b, i]
    pairs = (~same).to(z.dtype)[:, :, None] / (views * (views - 1) * batch)
    alignment = (positive * pairs).sum()
    uniformity = (torch.logaddexp(partition, within) * pairs).sum()
    return {"loss": uniformity - alignment, "alignment": alignment * temperature, "uniformity": uniformity}


@objective("bardes2022vicreg", invariance=25.0, variance=25.0, covariance=1.0)
def vicreg(z: Tensor, invariance: float, variance: float, covariance: float) -> Terms:
    """VICReg (Bardes et al. 2022, eq. 1-6) of z [views, batch, dim], averaged over the pairs of views.

    For two views: 25 MSE(z1, z2) + 25 * 1/2 sum over views of mean hinge(1 - std) + sum over views of the squared
    off-diagonal covariances / dim. The sum of squares is taken on the smaller of the two Gram matrices.
    """
    _, batch, dim = z.shape
    centred = z - z.mean(1, keepdim=True)
    # the mean over pairs of (za - zb)^2 is twice the unbiased variance over views
    distance = 2 * z.var(0).mean()
    hinge = F.relu(1 - torch.sqrt(centred.square().sum(1) / (batch - 1) + 1e-4)).mean()
    gram = centred.mT @ centred if dim <= batch else centred @ centred.mT
    diagonal = centred.square().sum(1)
    off_diagonal = (gram.square().sum((1, 2)) - diagonal.square().sum(1)) / ((batch - 1) ** 2 * dim)
    redundancy = 2 * off_diagonal.mean()
    loss = invariance * distance + variance * hinge + covariance * redundancy
    return {"loss": loss, "invariance": distance, "variance": hinge, "covariance": redundancy}


@objective("zbontar2021barlow", redundancy=5e-3)
def barlow(z: Tensor, redundancy: float) -> Terms:
    """Barlow Twins (Zbontar et al. 2021, eq. 1) of z [views, batch, dim], averaged over the pairs of views.

    Sum over i of (1 - C_ii)^2 + redundancy * sum over i != j of C_ij^2, C the cross-correlation of two views.
    """
    views, batch, _ = z.shape
    centred = z - z.mean(1, keepdim=True)
    z = centred * (centred.square().mean(1, keepdim=True) + 1e-5).rsqrt()  # batch_norm's epsilon, as the authors
    a, b = torch.triu_indices(views, views, 1, device=z.device)
    correlation = z[a].mT @ z[b] / batch
    diagonal = correlation.diagonal(dim1=1, dim2=2)
    on_diagonal = (diagonal - 1).square().sum(1).mean()
    off_diagonal = (correlation.square().sum((1, 2)) - diagonal.square().sum(1)).mean()
    loss = on_diagonal + redundancy * off_diagonal
    return {"loss": loss, "on_diagonal": on_diagonal, "off_diagonal": off_diagonal}


@objective("grill2020byol", needs_target=True)
def byol(z: Tensor, target: Tensor) -> Terms:
    """BYOL (Grill et al. 2020, eq. 2): mean over ordered pairs of views a != b of 2 - 2 cos(z_a, target_b).

    z [views, batch, dim] are the predictor's outputs, `target` the same shape from the averaged network; no gradient
    flows into `target`.
    """
    z = F.normalize(z, dim=-1)
    target = F.normalize(target.detach(), dim=-1)
    views, batch, _ = z.shape
    every = (z.sum(0) * target.sum(0)).sum() - (z * target).sum()  # all ordered pairs, less a == b
    similarity = every / (views * (views - 1) * batch)
    return {"loss": 2 - 2 * similarity, "similarity": similarity}


@objective("chen2021mocov3", needs_target=True, temperature=0.2)
def moco(z: Tensor, target: Tensor, temperature: float) -> Terms:
    """MoCo v3 (Chen et al. 2021, eq. 1): mean over ordered pairs of views a != b of InfoNCE of z_a against target_b.

    z [views, batch, dim] are the predictor's outputs (queries), `target` the same shape from the averaged network
    (keys); an image's negatives are the other images' keys in view b. Without the paper's factor 2 * temperature.
    """
    z = F.normalize(z, dim=-1)
    target = F.normalize(target.detach(), dim=-1)
    logits = torch.einsum("aid,bjd->abij", z, target) / temperature
    views, batch = z.shape[:2]
    pairs = (1 - torch.eye(views, dtype=z.dtype, device=z.device))[:, :, None] / (views * (views - 1) * batch)
    alignment = (logits.diagonal(dim1=2, dim2=3) * pairs).sum()
    uniformity = (logits.logsumexp(-1) * pairs).sum()
    return {"loss": uniformity - alignment, "alignment": alignment * temperature, "uniformity": uniformity}


@objective("haochen2021spectral")
def spectral(z: Tensor) -> Terms:
    """Spectral contrastive loss (HaoChen et al. 2021) of z [views, batch, dim], which is not normalised.

    -2 mean of z1.z2 over the pairs of different views of an image + mean of (z1.z2)^2 over all pairs of patches of
    different images. That is 2 L_S at lambda = 1/2, hence L_C less its constant at w = 1: at the optimum z1.z2 is the
    best fit of rank dim to p(x1, x2) / (p(x1) p(x2)). See cooccurrence.py.
    """
    views, batch, dim = z.shape
    total = z.sum(0).square().sum() - z.square().sum()  # all ordered pairs of different views
    alignment = total / (views * (views - 1) * batch)
    flat = z.flatten(0, 1)
    gram = flat.mT @ flat if dim <= len(flat) else flat @ flat.mT  # of the same sum of squares
    own = torch.einsum("aid,bid->iab", z, z)
    squares = (gram.square().sum() - own.square().sum()) / (views**2 * batch * (batch - 1))
    return {"loss": squares - 2 * alignment, "alignment": alignment, "squares": squares}


def spread(z: Tensor) -> Tensor:
    """How far projections of different images differ: 1 - mean cosine over the images of a view; 0 is collapse."""
    z = F.normalize(_at_least_float32(z), dim=-1)
    batch = z.shape[-2]
    return 1 - ((z.sum(-2).square().sum(-1) - batch) / (batch * (batch - 1))).mean()


def _at_least_float32(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()
