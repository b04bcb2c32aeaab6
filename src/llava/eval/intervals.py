"""How sure a figure is: bootstrap intervals, and whether two models differ by more than chance.

Questions about one picture stand or fall together, so pictures are drawn, not questions (Efron and Tibshirani 1993,
chapter 8; Cameron, Gelbach and Miller 2008 for clusters). Random, but from a fixed seed: a figure keeps its interval.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_DRAWS = 2000
_AT_ONCE = 50


@dataclass(frozen=True)
class Interval:
    """Where 95 of 100 repetitions of the benchmark would put the figure."""

    low: float
    high: float


def bootstrap(values: Sequence[float], clusters: Sequence[Hashable], *, draws: int = _DRAWS) -> Interval:
    """The 95 % percentile interval of the mean of values; clusters: which belong together. Needs one value."""
    sums, counts = _by_cluster(values, clusters)
    random = np.random.default_rng(0)
    means = []
    for begin in range(0, draws, _AT_ONCE):
        size = min(_AT_ONCE, draws - begin)
        weights = random.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=size)
        means.append((weights @ sums) / (weights @ counts))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Interval(float(low), float(high))


def paired_p_value(one: Sequence[float], other: Sequence[float], clusters: Sequence[Hashable]) -> float:
    """How likely chance alone would make two models differ at least so much on the same questions, two-sided.

    Under chance, each picture's difference might as well have the other sign. With at most one question a picture and
    answers right or wrong that is the exact sign test (McNemar's); else 20,000 random signs from a fixed seed.
    """
    differences, _ = _by_cluster([a - b for a, b in zip(one, other, strict=True)], clusters)
    differences = differences[differences != 0]
    if len(differences) == 0:
        return 1.0
    if np.all(np.abs(differences) == np.abs(differences[0])):
        return _sign_test(int((differences > 0).sum()), len(differences))
    random = np.random.default_rng(0)
    seen = abs(float(differences.sum()))
    reached, draws = 0, 20_000
    for begin in range(0, draws, _AT_ONCE):
        signs = random.integers(0, 2, (min(_AT_ONCE, draws - begin), len(differences))) * 2 - 1
        # a sum of floats in another order may fall short of itself by a rounding
        reached += int((np.abs(signs @ differences) >= seen * (1 - 1e-12)).sum())
    return (reached + 1) / (draws + 1)


def _sign_test(wins: int, total: int) -> float:
    few = min(wins, total - wins)
    log_half = total * math.log(0.5)
    tail = sum(
        math.exp(math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) + log_half)
        for k in range(few + 1)
    )
    return min(1.0, 2 * tail)


def _by_cluster(
    values: Sequence[float], clusters: Sequence[Hashable]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum and number of the values of each cluster."""
    numbers: dict[Hashable, int] = {}
    places = np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters], dtype=np.int64)
    sums = np.bincount(places, weights=np.asarray(values, dtype=np.float64), minlength=len(numbers))
    return sums.astype(np.float64), np.bincount(places, minlength=len(numbers)).astype(np.float64)
