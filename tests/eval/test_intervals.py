from __future__ import annotations

from itertools import product

import pytest

from llava.eval.intervals import bootstrap, paired_p_value


def test_the_interval_of_independent_answers_is_the_binomials() -> None:
    values = [1.0] * 60 + [0.0] * 40
    found = bootstrap(values, range(100))
    # 1.96 * sqrt(.6 * .4 / 100) = .096; the bootstrap's own error with 2,000 draws is about .01
    assert found.low == pytest.approx(0.504, abs=0.015)
    assert found.high == pytest.approx(0.696, abs=0.015)


def test_answers_about_one_picture_count_as_one_observation() -> None:
    values = [float(n < 5) for n in range(10) for _ in range(10)]
    alone, together = bootstrap(values, range(100)), bootstrap(values, [n // 10 for n in range(100)])
    assert together.high - together.low > 2.5 * (alone.high - alone.low)


def test_one_cluster_or_equal_values_have_no_width() -> None:
    assert bootstrap([0.3, 0.5], ["a", "a"]).low == pytest.approx(0.4)
    assert bootstrap([1.0] * 5, range(5)).low == 1.0


def test_an_interval_is_the_same_each_time() -> None:
    assert bootstrap([0.0, 1.0, 1.0], range(3)) == bootstrap([0.0, 1.0, 1.0], range(3))


def brute_force(differences: list[float]) -> float:
    seen = abs(sum(differences))
    signs = list(product((-1, 1), repeat=len(differences)))
    return sum(abs(sum(s * d for s, d in zip(row, differences, strict=True))) >= seen - 1e-9 for row in signs) / len(
        signs
    )


@pytest.mark.parametrize("wins", range(9))
def test_right_or_wrong_is_the_exact_sign_test(wins: int) -> None:
    one = [1.0] * wins + [0.0] * (8 - wins) + [1.0, 0.0]
    other = [0.0] * wins + [1.0] * (8 - wins) + [1.0, 0.0]
    expected = brute_force([a - b for a, b in zip(one, other, strict=True) if a != b])
    assert paired_p_value(one, other, range(10)) == pytest.approx(expected, rel=1e-9)


def test_parts_of_points_and_pictures_come_near_all_sign_changes() -> None:
    one, other = [0.9, 0.3, 1.0, 0.6, 1.0, 0.0, 0.3], [0.3, 0.6, 0.0, 0.6, 0.3, 0.3, 0.0]
    expected = brute_force([a - b for a, b in zip(one, other, strict=True) if a != b])
    assert paired_p_value(one, other, range(7)) == pytest.approx(expected, abs=0.015)
    clusters = [0, 0, 1, 1, 2, 2, 3]
    sums = [0.6 - 0.3, 1.0, 0.7 - 0.3, 0.3]
    assert paired_p_value(one, other, clusters) == pytest.approx(brute_force(sums), abs=0.015)


def test_equal_answers_are_no_difference() -> None:
    assert paired_p_value([1.0, 0.0], [1.0, 0.0], range(2)) == 1.0


def test_a_large_benchmark_does_not_overflow() -> None:
    one, other = [1.0] * 5200 + [0.0] * 4800, [0.0] * 5200 + [1.0] * 4800
    assert 1e-5 < paired_p_value(one, other, range(10_000)) < 1e-3
