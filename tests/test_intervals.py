"""Intervals against resampling by hand, and against scipy's."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from bagssl import intervals

RIGHT, OTHER = (np.random.default_rng(0).random((2, 300)).T < (0.7, 0.6)).T


def by_hand(columns: np.ndarray, statistic) -> np.ndarray:
    """Low and high of statistic(rows drawn with replacement from columns [images, ...]), 4,000 draws."""
    rows = np.random.default_rng(1).integers(len(columns), size=(4000, len(columns)))
    return np.percentile([statistic(columns[each]) for each in rows], (2.5, 97.5), axis=0)


def near(found: intervals.Estimate, expected: np.ndarray, within: float) -> bool:
    """Two bootstraps of the same thing: their ends differ by chance alone."""
    return bool(np.abs(np.array(found[1:]) - expected).max() < within)


def test_a_proportion_is_resampled():
    found = intervals.proportion(RIGHT)
    assert found.value == pytest.approx(100 * RIGHT.mean()) and found.low < found.value < found.high
    assert near(found, by_hand(RIGHT, lambda drawn: 100 * drawn.mean()), within=1)
    assert not near(found, by_hand(OTHER, lambda drawn: 100 * drawn.mean()), within=1)
    assert intervals.proportion(np.ones(9, bool)) == (100, 100, 100)


def test_a_paired_difference_is_resampled_by_images():
    rng = np.random.default_rng(2)
    alike = RIGHT & (rng.random(300) < 0.95)  # a second answer that is wrong on a few images more
    better = RIGHT.astype(int) - alike
    found = intervals.paired(better)
    assert found.value == pytest.approx(100 * (RIGHT.mean() - alike.mean())) and found.low < found.value < found.high
    assert near(found, by_hand(better, lambda drawn: 100 * drawn.mean()), within=0.5)
    assert intervals.paired(-better).value == -found.value and intervals.paired(0 * better) == (0, 0, 0)
    shuffled = np.stack([RIGHT, rng.permutation(alike)], axis=1)
    apart = by_hand(shuffled, lambda drawn: 100 * np.subtract(*drawn.mean(axis=0)))
    assert found.high - found.low < (apart[1] - apart[0]) / 2  # unpaired, the interval would be far wider


def test_means_and_what_is_made_of_them_are_resampled_by_images():
    values = np.random.default_rng(2).normal(size=(3, 200)) * np.array([[1], [2], [0]]) + 1
    value, low, high = intervals.mean(values)
    assert np.allclose(value, values.mean(1)) and np.allclose([low[2], high[2]], 1)
    for row in range(2):
        assert near(intervals.Estimate(value[row], low[row], high[row]), by_hand(values[row], np.mean), within=0.03)

    def ratio(means: np.ndarray) -> np.ndarray:
        return means[..., 1] / means[..., 0]

    first, second = intervals.bootstrap(values.T, lambda means: np.stack([ratio(means), means[:, 0]], axis=1))
    assert first.value == pytest.approx(ratio(values.mean(1)))
    assert near(first, by_hand(values.T, lambda drawn: ratio(drawn.mean(0))), within=0.03)
    assert second == pytest.approx((value[0], low[0], high[0]))
    assert intervals.bootstrap(values.T, ratio, seed=1)[0] != first == intervals.bootstrap(values.T, ratio)[0]


@pytest.mark.parametrize("seeds", [2, 5])
def test_over_seeds_it_is_students_interval(seeds):
    values = np.random.default_rng(2).normal(size=seeds)
    low, high = stats.t.interval(0.95, seeds - 1, loc=values.mean(), scale=stats.sem(values))
    assert intervals.over_seeds(values) == pytest.approx((values.mean(), low, high))
    assert intervals.over_seeds(values).high != pytest.approx(values.mean() + 1.96 * stats.sem(values), rel=0.1)


def test_the_jackknife_of_a_mean_is_students_interval():
    x = np.random.default_rng(2).normal(size=12)
    without = [np.delete(x, i).mean() for i in range(12)]
    low, high = stats.t.interval(0.95, 11, loc=x.mean(), scale=stats.sem(x))
    assert intervals.jackknife(np.array([x.mean(), *without])) == pytest.approx((x.mean(), low, high))


def test_of_several_seeds_the_interval_is_over_these_and_of_one_over_its_images():
    seeds = np.array([[0.9, 0.8, 1.0], [0.7, 0.1, 0.2], [0.8, 0.3, 0.9]])
    assert intervals.of_seeds(seeds) == intervals.over_seeds(seeds[:, 0])
    assert intervals.of_seeds(seeds[:1]) == intervals.jackknife(seeds[0]) != intervals.of_seeds(seeds[1:2])
