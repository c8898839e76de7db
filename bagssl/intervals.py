"""Values with their 95 % intervals, over test images or over seeds.

Images are independent of each other; the patches of one image are not. So whatever is measured is resampled, or left
out, by images. The bootstraps are percentile intervals (Efron 1979) of RESAMPLES draws that follow from a seed: the
same images are drawn for each measure, and differences are paired.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 1000


class Estimate(NamedTuple):
    """A value with the two ends of its 95 % interval."""

    value: float
    low: float
    high: float


@lru_cache(maxsize=8)
def _resamples(images: int, seed: int) -> np.ndarray:
    """A bootstrap over images as weights [RESAMPLES, images]: counts drawn from the multinomial, over their sum."""
    return np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), RESAMPLES) / images


def bootstrap(columns: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], seed: int = 0) -> list[Estimate]:
    """What `statistic` makes of the means over images of columns [images, columns], by the bootstrap over images.

    statistic: [means, columns] -> [means] or [means, values], a row for each draw; one Estimate for each value.
    """
    means = np.vstack([columns.mean(axis=0), _resamples(len(columns), seed) @ columns])
    values = np.asarray(statistic(means)).reshape(len(means), -1)
    low, high = _ends(values[1:])
    return [Estimate(*map(float, each)) for each in zip(values[0], low, high, strict=True)]


def mean(values: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over images of values [..., images], low and high by the bootstrap over images: three arrays [...]."""
    return values.mean(-1), *_ends(values @ _resamples(values.shape[-1], seed).T, axis=-1)


def proportion(right: np.ndarray) -> Estimate:
    """The share of true ones among bool [images], in per cent.

    Resampling n images of which a share p is true counts Binomial(n, p) true ones: exactly the bootstrap.
    """
    count, share = len(right), float(np.mean(right))
    draws = np.random.default_rng(0).binomial(count, share, RESAMPLES)
    return Estimate(100 * share, *_ends(100 * draws / count).tolist())


def paired(difference: np.ndarray, seed: int = 0) -> Estimate:
    """The mean of per-image differences -1, 0 or 1 [images], in points: 100 times as much.

    A resample is exactly a draw of their multinomial.
    """
    count = len(difference)
    more, less = int((difference > 0).sum()), int((difference < 0).sum())
    shares = np.array([more, less, count - more - less]) / count
    draws = np.random.default_rng(seed).multinomial(count, shares, RESAMPLES)
    return Estimate(100 * (more - less) / count, *_ends(100 * (draws[:, 0] - draws[:, 1]) / count).tolist())


def over_seeds(values: np.ndarray) -> Estimate:
    """The mean of values [seeds], at least two, with Student's interval."""
    value, n = float(np.mean(values)), len(values)
    half = _student(n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Estimate(value, value - half, value + half)


def jackknife(values: ArrayLike) -> Estimate:
    """The first of values [1 + groups], those of all images and without each group of images.

    With n groups the variance is (n - 1) / n times the sum of the squared deviations of the values without one group
    from their mean (Efron and Stein 1981); t quantile with n - 1 degrees of freedom. Differences of values are values.
    """
    value, without = float(values[0]), np.asarray(values[1:], float)
    n = len(without)
    half = _student(n - 1) * math.sqrt((n - 1) / n * float(np.square(without - without.mean()).sum()))
    return Estimate(value, value - half, value + half)


def of_seeds(values: Sequence[ArrayLike]) -> Estimate:
    """Of values [1 + groups] for each seed, as `jackknife` takes them: `over_seeds`, or with one seed its jackknife."""
    return jackknife(values[0]) if len(values) == 1 else over_seeds(np.array([float(each[0]) for each in values]))


def _ends(draws: np.ndarray, axis: int = 0) -> np.ndarray:
    """Low and high [2, ...] among draws along `axis`."""
    return np.percentile(draws, (2.5, 97.5), axis=axis)


def _student(freedom: int) -> float:
    from scipy.stats import t  # slow to import, and training needs no scipy

    return float(t.ppf(0.975, freedom))
