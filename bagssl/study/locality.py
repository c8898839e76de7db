"""What an image's embedding has of its patches (claim C4), and what a patch's has of its place (C5, C6).

Features are [patches K, images N, dim]; those of bags, the means over patches, are [1, N, dim]. A cosine is
centred where from each side its own mean over the images is subtracted first: embeddings are non-negative, so raw
cosines are high whatever the images show.

Images are independent of each other, the patches of one image are not. So a measure is kept as one numerator
and one denominator per image; its value is the ratio of their means, and `estimate` resamples images.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Generator, Tensor, nn

from bagssl import bags, colours, intervals, patches
from bagssl.augmentation import Augmentation
from bagssl.config import PretrainConfig
from bagssl.errors import InputError
from bagssl.intervals import Estimate
from bagssl.study.sizes import check_once

BLOCK = 2**23  # similarities looked at at a time
JITTER = {name: getattr(PretrainConfig, name) for name in ("brightness", "contrast", "saturation", "hue")}  # defaults


@dataclass(frozen=True, eq=False)
class Ratio:
    """A measure: float64 [images] over float64 [images]; its value is the ratio of the two means."""

    over: np.ndarray
    under: np.ndarray


def share(per_image: np.ndarray) -> Ratio:
    """The plain mean of one number per image as a `Ratio`."""
    return Ratio(np.asarray(per_image, float), np.ones(len(per_image)))


def estimate(measure: Ratio, minus: Ratio | None = None, seed: int = 0) -> Estimate:
    """The value of a measure, or of its difference to another one of the same images, in the same order."""
    sides = [measure] if minus is None else [measure, minus]
    columns = np.stack([column for side in sides for column in (side.over, side.under)], axis=1)

    def value(means: np.ndarray) -> np.ndarray:
        ratios = means[:, 0::2] / means[:, 1::2]
        return ratios[:, 0] - (ratios[:, 1] if len(sides) > 1 else 0)

    return intervals.bootstrap(columns, value, seed)[0]


def features(encoder: nn.Module, projector: nn.Module | None, pixels: Tensor, boxes: Tensor, size: int,
             **options) -> dict[str, Tensor]:
    """{"h": embeddings [K, N, dim], "z": projections [K, N, D]} of boxes [K, N, 4], on the CPU; no z of no projector.

    The rest as in `bags.patch_embeddings`; the projector works where it lies.
    """
    h = bags.patch_embeddings(encoder, pixels, boxes, size, **options)
    if projector is None:
        return {"h": h}
    device = next((parameter.device for parameter in projector.parameters()), "cpu")
    with torch.inference_mode():
        z = torch.cat([projector(block.to(device)).float().cpu() for block in h.flatten(0, 1).split(2**14)])
    return {"h": h, "z": z.view(*h.shape[:2], -1)}


def another(count: int, seed: int = 0) -> Tensor:
    """For each of `count` images the index of another one, int64 [count]: one random cycle through all."""
    if count < 2:
        raise InputError("a control by another image takes two images at least")
    order = torch.randperm(count, generator=Generator().manual_seed(seed))
    return torch.empty_like(order).scatter_(0, order, order.roll(-1))


# ---- C4: the whole image and the mean of its patches

C4 = ("centred cosine", "centred cosine over another image's patches", "centred cosine over an untrained encoder")


def convergence(embedded: Mapping[int, Tensor], seed: int = 0) -> pd.DataFrame:
    """How near the mean of K patch embeddings is to the whole image's, for each image and K.

    embedded: {K: [N, dim]} as from `bags.embed_bags`, K = 0 being the whole image. Columns: image, k, patches ("own" or
    "another image's"), centred, cosine, error = |mean of K - whole| / |whole|. Centred: from the whole images'
    embeddings their mean is subtracted, and from the means of patches, for every K, the mean of the largest bags.
    """
    whole, ks = embedded[0].double(), sorted(set(embedded) - {0})
    limit, own = embedded[ks[-1]].double().mean(dim=0), torch.arange(len(whole))
    frames = []
    for centred in (False, True):
        target = whole - whole.mean(dim=0) if centred else whole
        for k in ks:
            mean = embedded[k].double() - (limit if centred else 0)
            for name, index in (("own", own), ("another image's", another(len(whole), seed))):
                error = (mean[index] - target).norm(dim=1) / target.norm(dim=1)
                frames.append(pd.DataFrame({
                    "image": own.numpy(), "k": k, "patches": name, "centred": centred,
                    "cosine": F.cosine_similarity(mean[index], target).numpy(), "error": error.numpy()}))  # fmt: skip
    return pd.concat(frames, ignore_index=True)


def nearness(near: pd.DataFrame, floor: pd.DataFrame | None = None) -> dict[str, Estimate]:
    """The measures of `C4` by the largest bags, from `convergence` of an encoder and of its untrained control; without
    one, as for the control itself, those that need none.
    """
    def cosines(rows: pd.DataFrame, patches: str) -> Ratio:
        rows = rows[rows["centred"] & (rows["patches"] == patches) & (rows["k"] == rows["k"].max())]
        return share(rows.sort_values("image")["cosine"])

    own = cosines(near, "own")
    minus = [None, cosines(near, "another image's"), *([] if floor is None else [cosines(floor, "own")])]
    return {measure: estimate(own, minus=each) for measure, each in zip(C4, minus, strict=False)}


def sampling_error(embedded: Mapping[int, Tensor]) -> tuple[list[int], np.ndarray]:
    """Each K whose double is there too, and the squared distance [N, len(K)] of the mean of K to its limit.

    Bags are nested: the mean of 2K lies halfway between those of the first K and of the next, disjoint K. Half of their
    squared distance is, in expectation, that of either to the limit: for independent patches, variance / K.
    """
    ks = _halves(embedded)
    distances = [2 * (embedded[k] - embedded[2 * k]).double().square().sum(dim=1) for k in ks]
    return ks, torch.stack(distances, dim=1).numpy()


def _halves(ks: Collection[int]) -> list[int]:
    """Each K whose double is there too, two at least."""
    halves = [k for k in sorted(set(ks) - {0}) if 2 * k in ks]
    if len(halves) < 2:
        raise InputError("the fall of an error is read off bags of K, 2K and 4K patches at least: ks lacks them")
    return halves


def check_ks(ks: Sequence[int]) -> None:
    """Raises InputError unless `ks` rises from 1 or more and has what `sampling_error` asks for."""
    if any(k < 1 for k in ks) or list(ks) != sorted(set(ks)):
        raise InputError(f"ks = {list(ks)} must be whole numbers above 0, each larger than the one before")
    _halves(ks)


def whole_error(embedded: Mapping[int, Tensor]) -> tuple[list[int], np.ndarray]:
    """Each K, and the squared distance [N, len(K)] of the mean of K to the whole image, both centred."""
    whole, ks = embedded[0].double(), sorted(set(embedded) - {0})
    whole, limit = whole - whole.mean(dim=0), embedded[ks[-1]].double().mean(dim=0)
    return ks, torch.stack([(embedded[k] - limit - whole).square().sum(dim=1) for k in ks], dim=1).numpy()


def exponent(ks: Sequence[int], squared: np.ndarray, seed: int = 0) -> Estimate:
    """c in error ~ K^c: half the slope of log(mean over images of squared [N, len(ks)]) against log K."""
    return intervals.bootstrap(squared, lambda means: np.polyfit(np.log(ks), np.log(means).T, 1)[0] / 2, seed)[0]


def levelling(embedded: Mapping[int, Tensor], seed: int = 0) -> tuple[Estimate, Estimate]:
    """a and b in mean `whole_error` = a + b / K: what stays, and what more patches take away.

    Patches are drawn independently, so this form is exact, and nothing is fitted: b, the variance of one patch, is the
    mean over K of K x `sampling_error`, and a the mean over K of what b / K leaves of `whole_error`.
    """
    halves, limit = sampling_error(embedded)
    ks, whole = whole_error(embedded)
    falls = (limit * halves).mean(axis=1)
    stays = (whole - falls[:, None] / np.array(ks)).mean(axis=1)
    return tuple(intervals.bootstrap(np.stack([stays, falls], axis=1), lambda means: means, seed))


# ---- C5 and C6: what is kept of a patch's place, and what of its look


def position(features: Tensor, boxes: Tensor, seed: int = 0) -> Ratio:
    """R² of the patches' centres, decoded by ridge regression on half of the images, in the other half.

    features [K, N, dim]; boxes [K, N, 4]. Both coordinates count as in sklearn's r2_score by
    "variance_weighted". The strength is chosen on training images other than those it is fitted to.
    """
    centres = (boxes[..., :2] + boxes[..., 2:] / 2).double()
    train, test = torch.randperm(features.shape[1], generator=Generator().manual_seed(seed)).tensor_split(2)
    x, x_test = (features[:, half].flatten(0, 1).double().numpy() for half in (train, test))
    folds = GroupKFold(min(5, len(train))).split(x, groups=train.repeat(len(features)).numpy())
    model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-1, 7, 9), cv=list(folds)))
    found = torch.from_numpy(model.fit(x, centres[:, train].flatten(0, 1).numpy()).predict(x_test))
    wanted = centres[:, test]
    rest = (found.view_as(wanted) - wanted).square().sum(dim=2).mean(dim=0)
    total = (wanted - wanted.mean(dim=(0, 1))).square().sum(dim=2).mean(dim=0)
    return Ratio((total - rest).numpy(), total.numpy())


def unit(features: Tensor, mean: Tensor | None = None) -> Tensor:
    """Features [K, N, dim] less their mean, or another [dim], at length 1: products are centred cosines."""
    return F.normalize(features - (features.mean(dim=(0, 1)) if mean is None else mean), dim=-1)


def neighbours(features: Tensor, labels: Tensor, boxes: Tensor | None = None,
               k: int = 10) -> dict[str, tuple[Ratio, Ratio]]:
    """What the neighbours of patches, by centred cosine, share with them: {name: (share of them, by chance)}.

    features [K, N, dim]; labels [N]; boxes [K, N, 4], None for features that have no one place. "same image":
    the nearest of all other patches is of the query's image; "same image, apart": of all that have no pixel
    in common with the query. Of the k nearest in other images: "same class", and "same position", a centre
    within half a patch side. By chance: the share of such patches among all that could have been neighbours.
    """
    count, n = features.shape[:2]
    flat = unit(features).transpose(0, 1).flatten(0, 1)  # image by image
    image, label = torch.arange(n).repeat_interleave(count), labels.cpu().repeat_interleave(count)
    if len(flat) - count < k:
        raise InputError(f"{n} images of {count} patches are too few for k = {k} neighbours of other images")
    place = None if boxes is None else boxes.transpose(0, 1).flatten(0, 1).float()
    found: dict[str, list[Tensor]] = {}

    def add(name: str, hits: Tensor, wanted: Tensor, allowed: Tensor) -> None:
        chance = _true(wanted & allowed) / _true(allowed)
        found.setdefault(name, []).append(torch.stack([hits.double(), chance.double()], dim=1))

    for rows in torch.arange(len(flat)).split(max(1, BLOCK // len(flat))):
        cosine, own = flat[rows] @ flat.T, image[rows, None] == image
        shared = {"same class": label[rows, None] == label}
        others = {"same image": torch.ones_like(own).scatter_(1, rows[:, None], False)}  # all but the query
        if place is not None:
            side = place[rows, None, 2]
            offset = (place[rows, None, :2] - place[None, :, :2]).abs()
            shared["same position"] = offset.norm(dim=2) <= side / 2
            others["same image, apart"] = (offset >= side[..., None]).any(dim=2) | ~own
        for name, allowed in others.items():
            first = cosine.masked_fill(~allowed, -2).argmax(dim=1)
            add(name, image[first] == image[rows], own, allowed)
        closest = cosine.masked_fill(own, -2).topk(k, dim=1).indices
        for name, wanted in shared.items():
            add(name, wanted.gather(1, closest).double().mean(dim=1), wanted, ~own)
    each = {name: torch.cat(blocks).view(n, count, 2).mean(dim=1).numpy() for name, blocks in found.items()}
    return {name: (share(both[:, 0]), share(both[:, 1])) for name, both in each.items()}


def _true(marks: Tensor) -> Tensor:
    """How many of each row are true: as bytes they are counted ten times as fast on a CPU."""
    return marks.view(torch.uint8).sum(dim=1, dtype=torch.int32)


def nearest(features: Tensor, patch: int, image: int, k: int) -> tuple[Tensor, Tensor]:
    """The k other images nearest to a patch by centred cosine: their nearest patches [k], the images [k]."""
    directions = unit(features)
    cosine, best = (directions @ directions[patch, image]).max(dim=0)
    cosine[image] = -2
    images = cosine.topk(k).indices
    return best[images], images


def inner_boxes(count: int, pixels: Tensor, scale: float, shifts: Sequence[int], seed: int = 0) -> Tensor:
    """Boxes [count, N, 4] of one scale that stay inside the image under all of `changes`."""
    check_once("shifts", shifts, 1)
    n, _, height, width = pixels.shape
    side = patches.native_size(scale, height, width)
    margin = max(*shifts, math.ceil((math.sqrt(2) - 1) / 2 * side))
    height, width = height - 2 * margin, width - 2 * margin
    if min(height, width) < side:
        raise InputError(f"a patch of {side} px has no room to move by {margin} px in images of {pixels.shape[2]}×"
                         f"{pixels.shape[3]} px: lower shifts or patch_scale")  # fmt: skip
    boxes = patches.evaluation_boxes(count, n, height, width, side**2 / (height * width), Generator().manual_seed(seed))
    return boxes + torch.tensor([margin, margin, 0, 0])


def changes(pixels: Tensor, boxes: Tensor, shifts: Sequence[int], seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """{name: (pixels, boxes)} of patches changed, all those of one image in the one way that is drawn for it.

    "shift d px": up, down, left or right; "scale": twice or half the area about the same centre; "colour":
    the default recipe's jitter of the image's brightness, contrast, saturation and hue; "flip": mirrored.
    """
    n, width, generator = len(pixels), pixels.shape[3], Generator().manual_seed(seed)
    steps = torch.tensor([[1, 0], [-1, 0], [0, 1], [0, -1]])[torch.randint(4, (n,), generator=generator)]
    grow = torch.where(torch.rand(n, generator=generator) < 0.5, math.sqrt(2), math.sqrt(0.5))
    corner, side = boxes[..., :2], boxes[..., 2:]
    scaled = (side * grow[:, None]).round().long()
    jitter = Augmentation((1, 1), (1, 1), pixels.shape[2], jitter=1, **JITTER)
    colour = colours.draw_colour(n, jitter, generator)
    tinted = torch.cat([colours.apply_colour(pixels[part].float() / 255, colour[part])
                        for part in torch.arange(n).split(256)])
    mirrored = boxes.clone()
    mirrored[..., 1] = width - boxes[..., 1] - boxes[..., 3]
    return {
        **{f"shift {d} px": (pixels, torch.cat([corner + d * steps, side], dim=2)) for d in shifts},
        "scale": (pixels, torch.cat([corner + (side - scaled) // 2, scaled], dim=2)),
        "colour": ((tinted * 255).round().byte(), boxes),
        "flip": (pixels.flip(3), mirrored),
    }


def sensitivity(before: Tensor, after: Tensor, seed: int = 0) -> Ratio:
    """How far a change moves features: mean of 1 - cosine with their own, over that with another image's.

    before, after [K, N, dim]; the mean of `before` is subtracted from both. 0: invariant; 1: as far as unrelated.
    """
    mean = before.mean(dim=(0, 1))
    before, after = before - mean, after - mean
    pairs = (after, before[:, another(before.shape[1], seed)])
    moved = [1 - F.cosine_similarity(before, other, dim=2).double().mean(dim=0).numpy() for other in pairs]
    return Ratio(*moved)


def whitened(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Both [K, N, dim], less the mean of `before`, in axes along which `before` has the variance 1.

    A cosine listens to the axes of largest variance, and a space that spreads its variance more evenly seems the more
    sensitive. Here every axis counts the same, as it does for a linear probe.
    """
    flat = before.flatten(0, 1).double()
    variance, axes = torch.linalg.eigh(torch.cov(flat.T))
    scaled = axes / variance.clamp(min=1e-6 * variance[-1]).sqrt()
    return tuple((each.double() - flat.mean(dim=0)) @ scaled for each in (before, after))


def check_measures(pixels: Tensor, *, scale: float, count: int, shifts: Sequence[int], k: int) -> None:
    """Raises InputError for what `measures` cannot do with images [N, 3, H, W]: too few of them, or too small."""
    n = len(pixels)
    if n < 3:
        raise InputError(f"images = {n}: the position of patches is learned from two images and asked of a third")
    if count < 2:
        raise InputError(f"count = {count}: an image has two patches at least, so that they can be compared")
    if not 1 <= k <= 2 * (n - 1):  # of the halves of the other images' bags
        raise InputError(f"k = {k}: choose from 1 to {2 * (n - 1)} neighbours among the half bags of {n} images")
    inner_boxes(1, pixels[:1], scale, shifts)


def measures(encoder: nn.Module, projector: nn.Module | None, pixels: Tensor, labels: Tensor, *, scale: float,
             size: int, count: int = 16, shifts: Sequence[int] = (1, 2, 4), k: int = 10, seed: int = 0,
             **options) -> dict[tuple[str, str, str], Ratio]:
    """All of the above on `count` patches per image: {("h" or "z", "patch" or "bag", name): measure}; of h alone
    without a projector.

    Names: "position R2" (of patches alone), those of `neighbours`, each also with " by chance", and those of
    `changes` with " sensitivity" and " sensitivity, whitened". A bag is the mean over the `count` patches; for
    neighbours, where each needs another of its image, over each half of them. The rest as in `bags.embed_bags`, but
    that progress is shown.
    """
    options = {"progress": True, **options}
    boxes = patches.evaluation_boxes(count, len(pixels), *pixels.shape[2:], scale, Generator().manual_seed(seed))
    inner = inner_boxes(count, pixels, scale, shifts, seed)
    found, before = (features(encoder, projector, pixels, each, size, **options) for each in (boxes, inner))
    table: dict[tuple[str, str, str], Ratio] = {}
    for feature, each in found.items():
        table[feature, "patch", "position R2"] = position(each, boxes, seed)
        halves = torch.stack([half.mean(dim=0) for half in each.tensor_split(2)])
        near = {"patch": neighbours(each, labels, boxes, k), "bag": neighbours(halves, labels, k=k)}
        for level, shares in near.items():
            for name, (own, chance) in shares.items():
                table |= {(feature, level, name): own, (feature, level, f"{name} by chance"): chance}
    for name, change in changes(pixels, inner, shifts, seed).items():
        for feature, after in features(encoder, projector, *change, size, **options).items():
            plain = (before[feature], after)
            for measure, pair in (("sensitivity", plain), ("sensitivity, whitened", whitened(*plain))):
                table[feature, "patch", f"{name} {measure}"] = sensitivity(*pair, seed)
                bagged = (each.mean(dim=0, keepdim=True) for each in pair)
                table[feature, "bag", f"{name} {measure}"] = sensitivity(*bagged, seed)
    return table


def evidence(measured: Mapping[tuple[str, str, str], Ratio], shift: int) -> Iterator[tuple[str, str, Estimate]]:
    """What `measures` say on claims C5 and C6: claim, measure, value; patches are shifted by so many pixels.

    Without a projector there is nothing on C6.
    """
    patch, moved = ("h", "patch"), f"shift {shift} px sensitivity"
    asked: list[tuple[str, str, tuple, tuple | None]] = [  # the measure, and what is subtracted from it
        ("C5", "position R2 of patches", (*patch, "position R2"), None),
        ("C5", "neighbours of the same class over chance", (*patch, "same class"), (*patch, "same class by chance")),
        ("C5", "shift sensitivity, patch over bag", (*patch, moved), ("h", "bag", moved)),
        ("C6", "position R2, h over z", (*patch, "position R2"), ("z", "patch", "position R2"))]  # fmt: skip
    for name, of in {"shift": moved, "scale": "scale sensitivity", "colour": "colour sensitivity"}.items():
        for how in ("", ", whitened"):  # the whitened ones are told, and decide nothing
            asked.append(("C6", f"{name} sensitivity, h over z{how}", (*patch, of + how), ("z", "patch", of + how)))
    for claim, measure, one, minus in asked:
        if (minus or one) in measured:
            yield claim, measure, estimate(measured[one], minus=minus and measured[minus])
