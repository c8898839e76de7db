"""Which patches speak for which class: a linear probe on a mean of patch embeddings, taken apart exactly.

A bag is h = mean of h_k over K patches, and a linear probe reads from it the logits W h + b. They are the sum over
patches of (W h_k + b) / K: one term per patch and class, with nothing left over. A term is evidence in units of the
logit; what is shared by all classes tells nothing, and the weights of a regularised probe sum to zero over classes.

Terms are float64 [patches, images, classes], boxes int64 [patches, images, 4] (top, left, height, width) in pixels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bagssl.bags import patch_embeddings
from bagssl.errors import InputError
from bagssl.probes import Classifier

BLOCK = 2**27  # numbers of embeddings kept at a time


def terms(classifier: Classifier, embeddings: Tensor) -> Tensor:
    """What each patch adds to each logit of its bag: [patches, images, dim] -> [patches, images, classes].

    The intercept and the centring of the features are spread evenly over the patches, so that
    terms.sum(0) = classifier.logits(embeddings.mean(0)) but for rounding.
    """
    return classifier.logits(embeddings) / len(embeddings)


def take_apart(encoder: nn.Module, classifier: Classifier, pixels: Tensor, boxes: Tensor, size: int,
               **options: Any) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The terms of all patches, and their bags by three poolings, name -> [images, dim]: the mean, the mean in float32
    and the maximum.

    boxes, size and options as in `bags.patch_embeddings`. Embeddings are kept of as many images at a time as BLOCK
    numbers hold: on a dense grid those of a large encoder are many GiB.
    """
    images = torch.arange(len(pixels)).split(max(1, BLOCK // (len(boxes) * encoder.dim)))
    every, pooled = [], {"mean": [], "mean in float32": [], "maximum": []}
    for some in images:
        h = patch_embeddings(encoder, pixels[some], boxes[:, some], size, **options)
        every.append(terms(classifier, h))
        for found, bag in zip(pooled.values(), (h.double().mean(0), h.mean(0), h.amax(0)), strict=True):
            found.append(bag)
    return torch.cat(every, dim=1), {name: torch.cat(found) for name, found in pooled.items()}


def evidence_maps(terms: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """The mean logit of the patches that cover a pixel, [images, classes, height, width]; NaN where none does.

    A patch alone in its bag would have the logit patches × term. Each is spread over the pixels of its box, and the
    sum divided by the number of boxes over the pixel. Taken as a double cumulative sum over corners of boxes.
    """
    patches, images, classes = terms.shape
    values = torch.cat([patches * terms, terms.new_ones(patches, images, 1)], dim=2)
    corners = values.new_zeros(images, (height + 1) * (width + 1), classes + 1)
    top, left, high, wide = boxes.unbind(2)
    for row, column, sign in ((0, 0, 1), (0, 1, -1), (1, 0, -1), (1, 1, 1)):
        place = (top + row * high) * (width + 1) + left + column * wide
        corners.scatter_add_(1, place.T[:, :, None].expand(-1, -1, classes + 1), sign * values.transpose(0, 1))
    sums = corners.view(images, height + 1, width + 1, -1).cumsum(1).cumsum(2)[:, :height, :width]
    coverage = sums[..., -1:]
    return torch.where(coverage > 0, sums[..., :-1] / coverage, torch.nan).permute(0, 3, 1, 2)


def by_evidence(terms: Tensor, classes: Tensor) -> Tensor:
    """Places int64 [patches, images] of the patches, strongest evidence for each image's class in `classes` first."""
    chosen = classes[None, :, None].expand(len(terms), -1, 1)
    return terms.gather(2, chosen)[..., 0].argsort(dim=0, descending=True, stable=True)


def at_random(patches: int, images: int, seed: int = 0) -> Tensor:
    """An order of its own for each image, [patches, images]."""
    return torch.rand(patches, images, generator=torch.Generator().manual_seed(seed)).argsort(dim=0)


def insertion(terms: Tensor, order: Tensor, nothing: Tensor) -> Tensor:
    """Logits [patches + 1, images, classes] of the bags of the first 0, 1, ... all patches in `order`.

    The mean is taken anew over what is in the bag. nothing: float64 [classes], the logits of the empty bag; those
    of the average training image, `classifier.logits(classifier.centre)`, say no more than the classes' shares.
    """
    logits = len(terms) * terms.gather(0, order[..., None].expand_as(terms))
    count = torch.arange(1, len(terms) + 1, dtype=terms.dtype)
    return torch.cat([nothing.expand_as(logits[:1]), logits.cumsum(0) / count[:, None, None]])


def deletion(terms: Tensor, order: Tensor, nothing: Tensor) -> Tensor:
    """Logits [patches + 1, images, classes] after the first 0, 1, ... all patches in `order` were taken out."""
    return insertion(terms, order.flip(0), nothing).flip(0)


def part_shares(boxes: Tensor, parts: Tensor, cell: int, types: int) -> Tensor:
    """How much of each patch shows each type of part: float64 [patches, images, types], summing to 1.

    parts: int64 [images, rows, columns], the type in each cell of `cell` pixels, as `synthetic.generate` gives them.
    """
    top, left, high, wide = boxes.unbind(2)
    overlaps = []
    for start, length, cells in ((top, high, parts.shape[1]), (left, wide, parts.shape[2])):
        edges = cell * torch.arange(cells)
        ends = torch.minimum((start + length)[..., None], edges + cell)
        overlaps.append((ends - torch.maximum(start[..., None], edges)).clamp_min(0).double() / length[..., None])
    share = torch.einsum("kni,knj->knij", *overlaps).flatten(2)
    return torch.einsum("knc,ncp->knp", share, F.one_hot(parts.flatten(1), types).double())


def check_parts(parts: Tensor, types: int) -> None:
    """Raises InputError unless each type of part is in two of the images at least, so that one may be left out.

    parts: as for `part_shares`.
    """
    if (F.one_hot(parts.flatten(1), types).amax(1).sum(0) < 2).any():
        raise InputError(f"images = {len(parts)}: not all {types} parts are in two of them, so that the evidence of "
                         "some cannot be told: take more images")  # fmt: skip


def part_evidence(terms: Tensor, shares: Tensor, weights: Tensor) -> Tensor:
    """The evidence of each type of part for each class that best explains the patches, float64 [..., types, classes].

    The logit of a patch alone in its bag, patches × term, is fitted by least squares with the sum over types of
    share × evidence; shares as from `part_shares`. weights: float64 [..., images], how much each image counts: 0,
    and it is left out.
    """
    gram = torch.einsum("knp,knq->npq", shares, shares)
    cross = torch.einsum("knp,knc->npc", shares, len(terms) * terms)
    return torch.linalg.solve(*(torch.einsum("...n,npq->...pq", weights, matrix) for matrix in (gram, cross)))
