"""Two questions put to frozen features: k nearest neighbours (Wu et al. 2018), and a linear classifier.

Features are [images, dim], labels [images]; both probes run where the features lie (CPU or CUDA); the linear one also
on a device that has no room for them, block by block. Nothing that a probe chooses depends on the test labels: they are
read once, to count what is right.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bagssl import intervals
from bagssl.devices import room
from bagssl.errors import InputError
from bagssl.intervals import Estimate

STRENGTHS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
BLOCK = 2**15  # images that are brought to a device at a time, if not all fit
COPIES = {"knn": 3, "linear": 8}  # of float32 features that lie on a device while they are probed

Parts = Callable[[], Iterable[Tensor]]  # features [images, dim], on the device: all, or block by block, each time anew


@dataclass(frozen=True, eq=False)
class Accuracy:
    """Top-1 accuracy in per cent, with its 95 % bootstrap interval over the test images, and top-5 accuracy."""

    value: float
    low: float
    high: float
    correct: Tensor  # bool [images], CPU
    predicted: Tensor  # int64 [images], CPU
    top5: Estimate  # per cent; a class that shares its score with others comes after them
    settings: dict  # what the probe was and what it chose; plain numbers, ready for JSON


@dataclass(frozen=True, eq=False)
class Classifier:
    """A fitted linear probe, its standardisation folded in: logits = features @ weights.T + intercept, in float64."""

    weights: Tensor  # [classes, dim]
    intercept: Tensor  # [classes]
    classes: Tensor  # int64 [classes], the label of each row
    centre: Tensor  # [dim], the mean of the features it was fitted to
    settings: dict  # as in `Accuracy`

    def logits(self, features: Tensor) -> Tensor:
        """Logits float64 [..., classes] of features [..., dim]."""
        return F.linear(features.double(), self.weights, self.intercept)


def fits(probe: str, features: Tensor, labels: Tensor, device: torch.device) -> bool:
    """Whether a device has room for training features [images, dim] and what a probe makes of them."""
    scores = 3 * 8 * (int(labels.max()) + 1) if probe == "linear" else 0
    return room(len(features) * (COPIES[probe] * 4 * features.shape[1] + scores), device)


def knn(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, *, k: int = 200,
        temperature: float = 0.1) -> Accuracy:
    """Vote of the k nearest training images by cosine similarity s, each with weight exp(s / temperature).

    Wu et al. 2018, "Unsupervised feature learning via non-parametric instance discrimination", section 3.4. k is
    clipped to the number of training images; equal votes go to the smaller label. In fp32, in blocks of test
    images whose similarities take 64 MiB.

    Raises InputError for features or labels that cannot be probed, ValueError for k or temperature out of range.
    """
    if k < 1 or not temperature > 0:
        raise ValueError(f"k must be at least 1 and temperature above 0, not {k} and {temperature}")
    classes, targets = _check(train, train_labels, test, test_labels)
    k = min(k, len(train))
    bank, queries = F.normalize(train.float(), dim=1), F.normalize(test.float(), dim=1)
    votes = (vote(block @ bank.T, targets, len(classes), k, temperature)
             for block in queries.split(max(1, 2**24 // len(bank))))
    settings = {"probe": "knn", "metric": "cosine", "k": k, "temperature": temperature}
    return _accuracy(votes, classes, test_labels, settings)


def vote(similarity: Tensor, targets: Tensor, classes: int, k: int = 200, temperature: float = 0.1) -> Tensor:
    """The votes of the k nearest, [queries, classes], of which the largest is the answer.

    similarity: cosines [queries, training images]; targets: the place of each training image's class.
    """
    similarity, nearest = similarity.topk(min(k, len(targets)), dim=1, sorted=False)
    # less the largest, so that a low temperature does not overflow: the order of the votes stays
    weight = ((similarity - similarity.amax(dim=1, keepdim=True)) / temperature).exp()
    return weight.new_zeros(len(weight), classes).scatter_add_(1, targets[nearest], weight)


def linear(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, **options: Any) -> Accuracy:
    """Accuracy of `fit_linear`'s classifier on the test images, with its options. Raises as it does."""
    _check(train, train_labels, test, test_labels)
    classifier = fit_linear(train, train_labels, **options)
    logits = (classifier.logits(block.to(classifier.weights.device)) for block in test.split(2**14))
    return _accuracy(logits, classifier.classes, test_labels, classifier.settings)


def fit_linear(train: Tensor, train_labels: Tensor, *, regularisations: Sequence[float] = STRENGTHS,
               held_out: float = 0.1, seed: int = 0, device: torch.device | str | None = None,
               block: int | None = None) -> Classifier:
    """Multinomial logistic regression on standardised features, with its strength chosen on held-out images.

    Minimises mean cross-entropy + strength / 2 * |weights|^2, the intercept free: a strength is 1 / (C n) in the
    terms of scikit-learn, n being the number of training images. Each strength is fitted to 1 - `held_out` of
    every class and judged on the rest; the best (of equals the strongest) is fitted again to all. While the best
    lies at an end of the grid, the grid grows by a factor of 10, three times at most; settings["at_end"] says
    that it lies there still. One strength alone is taken as it is.
    block: images of which the features are brought to `device` at a time, again at each step: the same but for
    rounding, and for features that it has no room for. By default all are held at once, where they lie.

    Raises InputError for features or labels that cannot be probed, ValueError for senseless strengths or shares.
    """
    grid = sorted({float(strength) for strength in regularisations}, reverse=True)
    if not grid or not (grid[-1] > 0 and grid[0] < float("inf")):
        raise ValueError(f"regularisations must be positive and finite, not {tuple(regularisations)}")
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must lie between 0 and 1, not {held_out}")
    classes, targets = _check(train, train_labels)
    device = train.device if device is None or block is None else torch.device(device)
    classes, targets = classes.to(device), targets.to(device)
    chosen, start, settings = grid[0], None, {}
    if len(grid) > 1:
        judged = _held_out(targets, held_out, seed)
        if not judged.any():
            raise InputError("no class has the two training images that choosing a regularisation takes: add images")
        fitted, asked = (_parts(train, torch.float32, device, block, part) for part in (~judged, judged))
        chosen, start, scores = _choose(fitted, asked, targets, len(classes), judged, grid, block)
        tried = sorted(scores, reverse=True)
        settings = {"grid": tried, "held_out_accuracy": [scores[strength] for strength in tried],
                    "held_out_images": int(judged.sum()), "at_end": chosen in (tried[0], tried[-1])}
    # in double precision, where the line search sees past rounding
    parts = _parts(train, torch.float64, device, block)
    centre, weights, last = _fit(parts, targets, len(classes), chosen, start, 1e-6, block)
    strength = {"probe": "linear", "regularisation": chosen, "C": 1 / (chosen * len(train))}
    return Classifier(weights[:, :-1], weights[:, -1], classes, centre, {**strength, **settings, **last})


def _accuracy(blocks: Iterable[Tensor], classes: Tensor, labels: Tensor, settings: dict) -> Accuracy:
    """Of the scores of test images, [n, classes] of some at a time."""
    wanted, predicted, near = labels.to(classes.device)[:, None] == classes, [], []
    for scores in blocks:
        predicted.append(classes[scores.argmax(dim=1)])
        own, wanted = wanted[: len(scores)], wanted[len(scores) :]
        own = scores.masked_fill(~own, -torch.inf).amax(dim=1, keepdim=True)  # -inf for a class that was never seen
        near.append(((scores >= own).sum(dim=1) <= 5) & own.isfinite()[:, 0])
    predicted, labels = torch.cat(predicted).cpu(), labels.cpu()
    correct, near = predicted == labels, torch.cat(near).cpu()
    return Accuracy(*intervals.proportion(correct.numpy()), correct, predicted, intervals.proportion(near.numpy()),
                    settings)  # fmt: skip


def _check(train: Tensor, train_labels: Tensor, *test: Tensor) -> tuple[Tensor, Tensor]:
    """The classes seen in training, ascending, and each training image's place among them.

    test: features and labels, where there are some to be classified.
    """
    for name, features, labels in (("training", train, train_labels), *[("test", *test)] * bool(test)):
        if features.ndim != 2 or labels.shape != features.shape[:1] or labels.is_floating_point():
            raise ValueError(f"{name} features must be [images, dim] and labels integers [images], "
                             f"not {tuple(features.shape)} and {labels.dtype} {tuple(labels.shape)}")
        if not features.numel():
            raise InputError(f"there are no {name} features to probe: give at least one image")
        if not torch.isfinite(features).all():
            wrong = int((~torch.isfinite(features)).any(dim=1).sum())
            raise InputError(f"{wrong} of {len(features)} {name} images have NaN or infinite features: "
                             "the encoder has diverged, train it again with a lower learning rate")
    if test and train.shape[1] != test[0].shape[1]:
        raise ValueError(f"training features have {train.shape[1]} dimensions and test features {test[0].shape[1]}")
    classes, targets = train_labels.to(train.device).unique(return_inverse=True)
    if len(classes) < 2:
        raise InputError("the training images are all of one class: a probe needs two or more")
    return classes, targets


def _held_out(targets: Tensor, share: float, seed: int) -> Tensor:
    """A mask [images] of about `share` of each class, at least one image of each class that has two."""
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    shuffled, mask = targets.cpu()[order], torch.zeros(len(targets), dtype=torch.bool)
    for members in order[shuffled.argsort(stable=True)].split(shuffled.bincount().tolist()):
        mask[members[: min(max(1, round(share * len(members))), len(members) - 1)]] = True
    return mask.to(targets.device)


def _parts(x: Tensor, dtype: torch.dtype, device: torch.device, block: int | None, mask: Tensor | None = None) -> Parts:
    """Features [images, dim], of the images of a mask: held, or `block` of them at a time."""
    if block is None:
        held = [x.to(dtype) if mask is None else x.to(dtype)[mask]]
        return lambda: held
    places = torch.arange(len(x)) if mask is None else mask.nonzero()[:, 0].to(x.device)
    return lambda: (x[some].to(device, dtype) for some in places.split(block))


def _choose(fitted: Parts, asked: Parts, y: Tensor, classes: int, judged: Tensor, grid: list[float],
            block: int | None = None) -> tuple[float, Tensor, dict]:
    """The strength that is best on the judged images, its weights, and the accuracy in per cent of each tried."""
    mean, scale = _standard(fitted)
    solve = _solver(lambda: ((x - mean) / scale for x in fitted()), y[~judged], classes, block)
    scores, weights = {}, {}

    def judge(strength: float, start: Tensor | None) -> None:
        weights[strength], _ = solve(strength, start, 1e-4)
        predicted = [_logits((x - mean) / scale, weights[strength]).argmax(dim=1) for x in asked()]
        scores[strength] = 100 * (torch.cat(predicted) == y[judged]).double().mean().item()

    def best() -> float:
        return max(scores, key=lambda strength: (scores[strength], strength))

    # from strong to weak, each from where the last ended
    for last, strength in zip([None, *grid], grid):
        judge(strength, weights.get(last))
    for _ in range(3):
        if (end := best()) in (max(scores), min(scores)):
            judge(end * 10 if end == max(scores) else end / 10, weights[end])
    return best(), weights[best()], scores


def _standard(parts: Parts) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each feature; a feature that does not vary keeps its scale."""
    count, mean, deviation = 0, None, None
    for x in parts():
        m, d = x.mean(dim=0), x.std(dim=0, correction=0)
        if count:  # Chan, Golub & LeVeque 1983: of two parts
            share = len(x) / (count + len(x))
            d = ((1 - share) * deviation**2 + share * d**2 + share * (1 - share) * (m - mean) ** 2).sqrt()
            m = mean + share * (m - mean)
        count, mean, deviation = count + len(x), m, d
    return mean, torch.where(deviation > 1e-6 * mean.abs(), deviation, torch.ones_like(deviation))


def _logits(x: Tensor, weights: Tensor) -> Tensor:
    return torch.addmm(weights[:, -1], x, weights[:, :-1].T)


def _fit(parts: Parts, y: Tensor, classes: int, strength: float, start: Tensor | None, tolerance: float,
         block: int | None = None) -> tuple[Tensor, Tensor, dict]:
    """Logistic regression on features that are standardised here: their mean, weights [classes, dim + 1] for them as
    they are, and how the descent ended.
    """
    mean, scale = _standard(parts)
    start = None if start is None else start.to(mean)
    solve = _solver(lambda: ((x - mean) / scale for x in parts()), y, classes, block)
    weights, last = solve(strength, start, tolerance)
    slopes = weights[:, :-1] / scale
    return mean, torch.cat([slopes, weights[:, -1:] - slopes @ mean[:, None]], dim=1), last


def _solver(parts: Parts, y: Tensor, classes: int, block: int | None
            ) -> Callable[[float, Tensor | None, float], tuple[Tensor, dict]]:  # fmt: skip
    """The function strength, start, tolerance -> weights [classes, dim + 1], and how the descent ended.

    Full-batch L-BFGS. Along the principal axes of the features the Hessian of the first step is diagonal, variance /
    classes + strength, and stays near it; scaled by its root the problem takes tens of evaluations, not thousands.
    """
    count, targets = len(y), y.split(block or len(y))
    variance, axes = torch.linalg.eigh(sum(x.T @ x for x in parts()) / count)
    dim, images = len(axes), torch.arange(len(targets[0]), device=y.device)

    def rotated() -> Iterable[Tensor]:
        # one class or feature per row: thin products are several times faster than with columns
        return (axes.T @ x.T for x in parts())

    held = None if block else list(rotated())

    def solve(strength: float, start: Tensor | None, tolerance: float) -> tuple[Tensor, dict]:
        scale = axes.new_full((dim + 1,), classes**0.5)
        scale[:-1] = (variance.clamp_min(0) / classes + strength).rsqrt()
        point = axes.new_zeros(classes, dim + 1)
        if start is not None:
            point = torch.cat([start[:, :-1] @ axes, start[:, -1:]], dim=1) / scale

        def loss() -> Tensor:
            weights = point * scale
            slopes, intercepts = weights[:, :-1], weights[:, -1:]
            value, gradient = 0, 0
            for x, labels in zip(rotated() if block else held, targets, strict=True):
                log_p, places = torch.addmm(intercepts, slopes, x).log_softmax(dim=0), (labels, images[: len(labels)])
                value = value - log_p[places].double().mean() * (len(labels) / count)
                residual = log_p.exp_()
                residual[places] -= 1
                gradient = gradient + torch.cat([residual @ x.T, residual.sum(dim=1, keepdim=True)], dim=1)
            gradient = gradient / count
            gradient[:, :-1] += strength * slopes
            point.grad = gradient * scale
            return value + strength / 2 * slopes.double().square().sum()

        descent = torch.optim.LBFGS([point], max_iter=500, max_eval=1000, history_size=20, tolerance_grad=tolerance,
                                    tolerance_change=tolerance**2, line_search_fn="strong_wolfe")
        descent.step(loss)
        loss()  # the line search may have ended with another point's gradient
        last = {"gradient": point.grad.abs().max().item(), "evaluations": descent.state[point]["func_evals"]}
        weights = point * scale
        return torch.cat([weights[:, :-1] @ axes.T, weights[:, -1:]], dim=1), last

    return solve
