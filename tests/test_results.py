"""Intervals against the formula and the literature, tests against exact counts, fronts against brute force."""

import itertools
import math
import subprocess
import sys
from statistics import NormalDist

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robust_peft.results import (
    Accuracy,
    difference_interval,
    holm,
    hypervolume,
    mcnemar_p_value,
    mean_interval,
    non_dominated,
    paired_resolved,
    resolved,
    sign_flip_p_value,
    wilson_interval,
)

properties = settings(deadline=None, derandomize=True)
counts = st.integers(1, 2000).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total)))
# A coarse grid, so that ties and duplicates are common, and areas are exact integers.
grid_points = st.lists(st.tuples(st.integers(-2, 8), st.integers(-2, 8)), max_size=12)


# --- One proportion ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        # z = 1.959964, z^2 = 3.841459. 0/n: high = z^2 / (n + z^2); 5/10: 1/2 -+ z sqrt(n + z^2) / (2 (n + z^2)).
        (0, 10, 0, 3.841459 / 13.841459),
        (10, 10, 10 / 13.841459, 1),
        (5, 10, 0.5 - 1.959964 / (2 * math.sqrt(13.841459)), 0.5 + 1.959964 / (2 * math.sqrt(13.841459))),
        # Newcombe 1998 (Statistics in Medicine 17, 857-872), table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_values(correct, total, low, high):
    # Half a unit of the printed fourth digit.
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=5e-5)


@properties
@given(counts, st.sampled_from([0.5, 0.9, 0.95, 0.999]))
def test_wilson_ends_solve_its_equation(count, confidence):
    correct, total = count
    low, high = wilson_interval(correct, total, confidence)
    share, z = correct / total, NormalDist().inv_cdf((1 + confidence) / 2)
    assert 0 <= low <= share <= high <= 1
    for end in (low, high):
        assert (share - end) ** 2 == pytest.approx(z**2 * end * (1 - end) / total, rel=1e-6, abs=1e-12)
    # What is wrong is what is not right; more confidence is wider; more data is narrower.
    assert wilson_interval(total - correct, total, confidence) == pytest.approx((1 - high, 1 - low), abs=1e-12)
    assert wilson_interval(correct, total, 0.9999)[0] <= low
    wide = wilson_interval(4 * correct, 4 * total, confidence)
    assert wide[1] - wide[0] < high - low


def test_wilson_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    for correct, total in [(0, 1), (1, 1), (3, 7), (583, 1000), (9999, 10000)]:
        reference = stats.binomtest(correct, total).proportion_ci(0.9, method="wilson")
        assert wilson_interval(correct, total, 0.9) == pytest.approx((reference.low, reference.high), abs=1e-12)


def test_accuracy():
    accuracy = Accuracy(583, 1000)
    assert accuracy.accuracy == 0.583
    assert accuracy.interval == wilson_interval(583, 1000)
    assert str(accuracy) == "58.3 % [55.2, 61.3] (n=1000)"
    assert str(Accuracy(0, 10)) == "0.0 % [0.0, 27.8] (n=10)"
    assert str(Accuracy(1, 1)) == "100.0 % [20.7, 100.0] (n=1)"
    assert accuracy == Accuracy(correct=583, total=1000)


@pytest.mark.parametrize(("correct", "total"), [(0, 0), (-1, 5), (6, 5), (0.5, 1), (1, 2.0), (None, 1)])
def test_impossible_counts(correct, total):
    for make in (Accuracy, wilson_interval):
        with pytest.raises(ValueError, match=r"0 <= correct <= total .* Found correct = .*, total = "):
            make(correct, total)


@pytest.mark.parametrize("confidence", [0, 1, 95, -0.1, math.nan])
def test_impossible_confidence(confidence):
    for call in (
        lambda: wilson_interval(1, 2, confidence),
        lambda: resolved(Accuracy(1, 2), Accuracy(2, 2), confidence),
        lambda: paired_resolved([True], [False], confidence),
    ):
        with pytest.raises(ValueError, match=r"confidence should be in \(0, 1\)\. Found"):
            call()


# --- Two proportions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "low", "high"),
    [
        # Newcombe 1998 (Statistics in Medicine 17, 873-890), table II, method 10.
        (Accuracy(56, 70), Accuracy(48, 80), 0.0524, 0.3339),
        (Accuracy(9, 10), Accuracy(3, 10), 0.1705, 0.8090),
        (Accuracy(6, 7), Accuracy(2, 7), 0.0582, 0.8062),
        (Accuracy(5, 56), Accuracy(0, 29), -0.0381, 0.1926),
        (Accuracy(0, 10), Accuracy(0, 20), -0.1611, 0.2775),
        (Accuracy(10, 10), Accuracy(0, 20), 0.6791, 1.0000),
    ],
)
def test_difference_values(a, b, low, high):
    assert difference_interval(a, b) == pytest.approx((low, high), abs=5e-5)
    assert resolved(a, b) == resolved(b, a) == (low > 0)


@properties
@given(counts, counts)
def test_difference_properties(first, second):
    a, b = Accuracy(*first), Accuracy(*second)
    low, high = difference_interval(a, b)
    assert -1 - 1e-12 <= low <= a.accuracy - b.accuracy <= high <= 1 + 1e-12
    assert difference_interval(b, a) == pytest.approx((-high, -low), abs=1e-12)
    assert not resolved(a, a)
    if a.interval[0] > b.interval[1]:  # disjoint intervals imply it; it does not imply disjoint intervals
        assert resolved(a, b)


def test_resolved_needs_enough_samples():
    assert not resolved(Accuracy(60, 100), Accuracy(55, 100))
    assert resolved(Accuracy(6000, 10000), Accuracy(5500, 10000))
    assert not resolved(Accuracy(6000, 10000), Accuracy(5870, 10000), confidence=0.99)
    assert resolved(Accuracy(6000, 10000), Accuracy(5860, 10000), confidence=0.95)


def verdicts(only_a: int, only_b: int, same: int = 3) -> tuple[list[bool], list[bool]]:
    return [True] * only_a + [False] * only_b + [True] * same, [False] * only_a + [True] * only_b + [True] * same


@pytest.mark.parametrize(
    ("only_a", "only_b", "p_value"),
    [(0, 0, 1), (1, 0, 1), (5, 5, 1), (0, 5, 2 / 32), (6, 0, 2 / 64), (8, 2, 2 * (1 + 10 + 45) / 1024)],
)
def test_mcnemar_values(only_a, only_b, p_value):
    assert mcnemar_p_value(*verdicts(only_a, only_b)) == p_value
    assert mcnemar_p_value(*verdicts(only_b, only_a, same=50)) == p_value  # neither order nor agreement matters
    assert paired_resolved(*verdicts(only_a, only_b)) == (p_value <= 0.05)


@properties
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=12))
def test_mcnemar_is_the_count_of_all_splits(pairs):
    a, b = zip(*pairs, strict=True)
    ours = [x for x, y in pairs if x != y]
    uneven = abs(2 * sum(ours) - len(ours))
    splits = list(itertools.product([0, 1], repeat=len(ours)))
    assert mcnemar_p_value(a, b) == sum(abs(2 * sum(s) - len(s)) >= uneven for s in splits) / len(splits)


def test_mcnemar_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    for only_a, only_b in [(3, 9), (40, 61), (700, 811), (3000, 3000), (2, 4000)]:
        reference = stats.binomtest(only_a, only_a + only_b).pvalue
        assert mcnemar_p_value(*verdicts(only_a, only_b)) == pytest.approx(reference, rel=1e-9, abs=1e-300)


@pytest.mark.parametrize(("a", "b"), [([], []), ([True], [True, False])])
def test_mcnemar_needs_pairs(a, b):
    with pytest.raises(ValueError, match=r"same samples, at least one\. Found \d and \d"):
        mcnemar_p_value(a, b)


def test_pairing_sees_what_separate_samples_cannot():
    # 1 % better on the same images, without one image lost: certain there, lost in the noise of separate samples.
    a, b = verdicts(only_a=10, only_b=0, same=990)
    assert paired_resolved(a, b)
    assert not resolved(Accuracy(810, 1000), Accuracy(800, 1000))


# --- Means over seeds -----------------------------------------------------------------------------------------------


def test_mean_interval_is_students():
    # t(0.975, 2) = 4.302653; 1, 2, 3 have standard deviation 1.
    assert mean_interval([1, 2, 3]) == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)))
    assert mean_interval([0.4]) is None and mean_interval([]) is None
    assert mean_interval([5, 5, 5, 5]) == (5, 5)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6, 7, 12, 31, 200])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_mean_interval_is_scipys(count, confidence):
    t = pytest.importorskip("scipy.stats").t
    values = [math.sin(k) for k in range(count)]
    low, high = mean_interval(values, confidence)
    margin = t.ppf(0.5 + confidence / 2, count - 1) * math.sqrt(
        sum((v - sum(values) / count) ** 2 for v in values) / (count - 1) / count
    )
    assert (high - low) / 2 == pytest.approx(margin, rel=1e-9)
    assert (high + low) / 2 == pytest.approx(sum(values) / count, abs=1e-12)


@properties
@given(st.lists(st.integers(-4, 4).map(lambda k: k / 10), min_size=1, max_size=9))
def test_sign_flips_are_all_counted(differences):
    tenths = [round(10 * d) for d in differences]  # as integers, so that equal sums are equal
    sums = [
        sum(s * d for s, d in zip(signs, tenths, strict=True))
        for signs in itertools.product((1, -1), repeat=len(tenths))
    ]
    assert sign_flip_p_value(differences) == sum(abs(s) >= abs(sum(tenths)) for s in sums) / len(sums)


def test_sign_flip_values():
    assert sign_flip_p_value([0.1, 0.3, 0.2, 0.5, 0.1, 0.4]) == 2 / 64  # six alike are the least that reaches 5 %
    assert sign_flip_p_value([0.1] * 30) == 2 / 2**30
    assert sign_flip_p_value([0, 0, 0]) == 1
    for wrong in ([], [1.0] * 41, [math.nan]):
        with pytest.raises(ValueError, match="differences should be"):
            sign_flip_p_value(wrong)


def test_holm_values():
    # Holm 1979's procedure by hand: 3 x 0.01, then 2 x 0.03, then 1 x 0.04 which may not fall below the one before.
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0] and holm([]) == [] and holm([0.02]) == [0.02]


# --- Fronts --------------------------------------------------------------------------------------------------------


@properties
@given(grid_points)
def test_non_dominated_is_the_definition(points):
    def beaten(p):
        return any(q[0] >= p[0] and q[1] >= p[1] and q != p for q in points)

    assert non_dominated(points) == [i for i, p in enumerate(points) if not beaten(p)]


def test_non_dominated_keeps_duplicates_and_order():
    points = [(0.7, 0.4), (0.8, 0.3), (0.7, 0.4), (0.6, 0.4), (0.5, 0.5), (0.8, 0.2)]
    assert non_dominated(points) == [0, 1, 2, 4]
    assert non_dominated([]) == []


@properties
@given(grid_points, st.tuples(st.integers(-2, 3), st.integers(-2, 3)))
def test_hypervolume_counts_unit_squares(points, reference):
    cells = itertools.product(range(reference[0], 8), range(reference[1], 8))
    covered = sum(any(x >= i + 1 and y >= j + 1 for x, y in points) for i, j in cells)
    assert hypervolume(points, reference) == covered
    assert hypervolume([points[i] for i in non_dominated(points)], reference) == covered  # the front is all of it


def test_hypervolume_values():
    assert hypervolume([]) == 0
    assert hypervolume([(0.5, 0.4)]) == pytest.approx(0.2)
    assert hypervolume([(0.5, 0.4), (0.8, 0.1)]) == pytest.approx(0.2 + 0.03)
    assert hypervolume([(0.5, 0.4)], reference=(0.5, 0.0)) == 0
    assert hypervolume([(0.9, 0.9)], reference=(1, 1)) == 0


@pytest.mark.parametrize("point", [(math.nan, 0), (0, math.inf), (1,), (1, 2, 3)])
def test_points_are_finite_pairs(point):
    for call in (non_dominated, hypervolume):
        with pytest.raises(ValueError, match="pairs of finite numbers"):
            call([(0.1, 0.2), point])


def test_needs_no_torch():
    check = "import sys, robust_peft.results; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
