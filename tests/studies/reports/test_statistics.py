"""Fronts, hypervolumes and comparisons against hand-computed figures and brute force."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_studies import BASE, SEARCH, drawn, records_of, verdicts

from robust_peft.results import hypervolume
from robust_peft.studies.comparisons import Resamples, compare_fronts, compare_methods, representatives
from robust_peft.studies.records import Verdicts
from robust_peft.studies.statistics import expected_hypervolume, panels_of
from robust_peft.studies.study import Method, Study, grid

VANILLA = {"surgery.name": "vanilla"}
CA_AT = {"surgery.name": "ca-at"}


def study_of(*methods, **options):
    return Study("s", methods, BASE, measure=SEARCH, **options)


def counted(standard, withstood, total=10):
    """So many right, and the first so many of them after the attack."""
    return verdicts([i < standard for i in range(total)], ("pgd", [i < withstood for i in range(total)]))


@settings(deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=6), st.data())
def test_expected_hypervolume_is_the_mean_over_all_subsets(points, data):
    size = data.draw(st.integers(1, len(points)))
    subsets = list(itertools.combinations(points, size))
    assert expected_hypervolume(np.array(points), size) == pytest.approx(
        sum(hypervolume(subset) for subset in subsets) / len(subsets)
    )
    assert expected_hypervolume(np.array(points)) == pytest.approx(hypervolume(points))


def test_expected_hypervolume_of_many_sets_at_once():
    sets = np.random.default_rng(0).random((4, 3, 5, 2))
    found = expected_hypervolume(sets, 2)
    assert found.shape == (4, 3)
    assert found[2, 1] == pytest.approx(float(expected_hypervolume(sets[2, 1], 2)))


@pytest.mark.parametrize("points, size", [([], None), ([(0.1, 0.2)], 2), ([(0.1, 0.2)], 0), ([(-0.1, 0.2)], None)])
def test_impossible_points(points, size):
    with pytest.raises(ValueError, match="should be"):
        expected_hypervolume(np.array(points), size)


@pytest.mark.parametrize("each", [False, True])
def test_adversarial_accuracy_is_the_worst_case_under_the_runs_own_threat(tmp_path, each):
    right = [True, True, True, True, False]
    first, second = [True, True, False, True, False], [True, False, True, True, False]
    after = second if each else [a and b for a, b in zip(first, second, strict=True)]
    harder = Verdicts("first", "L-inf 16/255", dict.fromkeys(range(5), False))
    study = study_of(Method("vanilla", settings=VANILLA))
    records = records_of(study, tmp_path, lambda p: (*verdicts(right, ("first", first), ("second", after)), harder))
    (panel,) = panels_of(study, records, "measured")
    assert panel.methods[0].mean == (0.8, 0.4)  # samples 0 and 3 withstand both
    assert (panel.attacks, panel.threat) == (("first", "second"), "L-inf 8/255")
    assert panels_of(study, records, "confirmed") == []


def test_points_are_means_over_seeds_and_fronts_leave_out_what_is_dominated(tmp_path):
    at = {("lam 0", 0): (5, 5), ("lam 0", 1): (7, 3), ("lam 0.5", 0): (8, 3), ("lam 0.5", 1): (8, 3),
          ("lam 1", 0): (7, 2), ("lam 1", 1): (7, 2)}  # fmt: skip
    study = study_of(*grid("vanilla", "surgery.lam", (0, 0.5, 1), VANILLA), seeds=(0, 1))
    records = records_of(study, tmp_path, lambda p: counted(*at[p.method.label, p.seed]))
    (panel,) = panels_of(study, records, "measured")
    (front,) = panel.fronts
    assert front.methods[0].mean == pytest.approx((0.6, 0.4))
    assert front.methods[0].intervals[0] == pytest.approx((0.6 - 1.2706205, 0.6 + 1.2706205))  # t(0.975, 1) = 12.706
    assert [method.label for method in front.best] == ["lam 0", "lam 0.5"]
    assert front.hypervolume_of_means == pytest.approx(0.6 * 0.4 + 0.2 * 0.3)
    assert front.hypervolumes() == pytest.approx((0.5 * 0.5 + 0.3 * 0.3, 0.8 * 0.3))


def test_gamma_one_is_vanilla_zero_and_counts_once(tmp_path):
    methods = (*grid("CA-AT", "surgery.gamma", (0.5, 1.0), CA_AT), *grid("vanilla", "surgery.lam", (0, 1), VANILLA))
    study = study_of(
        *methods, Method("stretched", settings={**CA_AT, "surgery.gamma": 1.0, "surgery.rescale": "vanilla"})
    )
    (panel,) = panels_of(study, records_of(study, tmp_path, lambda p: counted(8, 4)), "measured")
    assert [(m.name, m.same_as) for m in panel.repeated] == [("CA-AT (gamma 1.0)", "vanilla (lam 0)")]
    assert [(f.family, f.size) for f in panel.fronts] == [("CA-AT", 1), ("vanilla", 2), ("stretched", 1)]
    alone = study_of(*grid("CA-AT", "surgery.gamma", (0.5, 1.0), CA_AT))
    (panel,) = panels_of(alone, records_of(alone, tmp_path, lambda p: counted(8, 4)), "measured")
    assert panel.fronts[0].size == 2 and not panel.repeated


def two_families(seeds=6, more=1):
    lams = (0.0, 0.5, 1.0)[: 2 + (more > 0)]
    return study_of(*grid("vanilla", "surgery.lam", lams, VANILLA), *grid("CA-AT", "surgery.gamma", (0.5, 0.8), CA_AT),
                    seeds=range(seeds))  # fmt: skip


def test_the_smaller_family_sets_the_number_of_points(tmp_path):
    study = two_families()
    records = records_of(study, tmp_path, lambda p: drawn(p, 40, ("pgd",)))
    (panel,) = panels_of(study, records, "measured")
    (found,) = compare_fronts(panel)
    vanilla, ca_at = panel.fronts
    assert (found.first, found.second, found.size) == ("CA-AT", "vanilla", 2)
    pairs = [list(itertools.combinations(vanilla.of_seed(s), 2)) for s in range(6)]
    assert found.of_second == pytest.approx([sum(map(hypervolume, of_seed)) / 3 for of_seed in pairs])
    assert found.of_first == pytest.approx([hypervolume(ca_at.of_seed(s)) for s in range(6)])


def test_the_bootstrap_is_the_definitions(tmp_path):
    """One draw at a time, with the accuracies counted anew on the drawn images."""
    study = two_families(seeds=2, more=0)
    records = records_of(study, tmp_path, lambda p: drawn(p, 30, ("pgd",)))
    (panel,) = panels_of(study, records, "measured")
    (found,) = compare_fronts(panel, Resamples(panel, count=50, seed=3))
    rng, values = np.random.default_rng(3), []
    for images in rng.integers(30, size=(50, 30)):
        of_seeds = []
        for seed in (0, 1):
            areas = []
            for front in panel.fronts:
                runs = [next(r for r in m.runs if r.seed == seed) for m in front.methods]
                points = [
                    (np.mean([r.standard[i] for i in images]), np.mean([r.adversarial[i] for i in images]))
                    for r in runs
                ]
                areas.append(hypervolume(points))
            of_seeds.append(areas[1] - areas[0])
        values.append(np.mean(of_seeds))
    assert found.interval == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])))
    fewer = min(sum(v <= 1e-15 for v in values), sum(v >= -1e-15 for v in values))
    assert found.p_samples == pytest.approx(min(1, 2 * (fewer + 1) / 51), abs=0.05)


def test_the_bootstrap_covers_as_often_as_it_says():
    """Two models right with probability 0.7 and 0.6 on each image: the true difference is 0.1."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(200):
        right = rng.random((2, 100)) < np.array([[0.7], [0.6]])
        found = compare_two(right)
        covered += found.interval[0] <= 0.1 <= found.interval[1]
    assert 0.89 <= covered / 200 <= 0.99


def compare_two(right, cache={}):  # noqa: B006 - one study for all calls
    study = cache.setdefault("study", study_of(*grid("vanilla", "surgery.lam", (0.25, 0.5), VANILLA)))
    points = cache.setdefault("points", [p.method.label for p in study.points()])

    def seen(point):
        of_method = right[points.index(point.method.label)]
        return verdicts(list(of_method), ("pgd", list(of_method)))

    from pathlib import Path

    (panel,) = panels_of(study, records_of(study, Path(), seen), "measured")
    return compare_methods(panel, [panel.methods[:2]], Resamples(panel, count=400))[0]


@pytest.mark.parametrize("seeds, shift, verdict", [
    (6, 3, "resolved"), (6, 0, "not resolved"), (3, 3, "resolved (over images only)"), (1, 0, "not resolved"),
])  # fmt: skip
def test_verdicts(tmp_path, seeds, shift, verdict):
    study = two_families(seeds, more=0)

    def seen(point):
        gain = shift * (point.method.family == "CA-AT")
        return counted(60 + gain * 5, 30 + gain * 5 + point.seed % 2, total=100)

    (panel,) = panels_of(study, records_of(study, tmp_path, seen), "measured")
    (found,) = compare_fronts(panel)
    assert found.verdict == verdict and found.resolved == (shift > 0)
    assert (found.p_seeds is None) == (seeds < 6)
    if seeds == 6:
        assert found.p_seeds == (2 / 64 if shift else 1)


def test_holm_takes_all_comparisons_of_a_panel(tmp_path):
    study = study_of(
        *grid("vanilla", "surgery.lam", (0.0, 0.5), VANILLA), *grid("CA-AT", "surgery.gamma", (0.5, 0.8), CA_AT),
        *grid("GradVac", "surgery.target", (0.5, 0.8), {"surgery.name": "gradvac"}), seeds=range(6),
    )  # fmt: skip
    better = {"vanilla": 0, "CA-AT": 15, "GradVac": 15}
    records = records_of(
        study, tmp_path, lambda p: counted(60 + better[p.method.family], 30 + better[p.method.family], 100)
    )
    found = compare_fronts(panels_of(study, records, "measured")[0])
    assert [c.p_seeds for c in found] == [2 / 64, 2 / 64]
    assert [c.p_adjusted for c in found] == [4 / 64, 4 / 64]
    assert {c.verdict for c in found} == {"resolved alone, not after Holm's correction"}


def test_seeds_without_a_whole_front_are_left_out(tmp_path):
    study = two_families(seeds=3)
    records = records_of(study, tmp_path, lambda p: drawn(p, 40, ("pgd",)))
    first = next(i for i, r in enumerate(records) if r.method == "CA-AT (gamma 0.8)" and r.seed == 1)
    records[first] = replace(records[first], status="failed", measured=())
    (panel,) = panels_of(study, records, "measured")
    assert [front.seeds for front in panel.fronts] == [(0, 1, 2), (0, 2)]
    assert compare_fronts(panel)[0].seeds == (0, 2)
    left = [r for r in records if r.family == "vanilla"] + [r for r in records if r.family != "vanilla" and False]
    assert compare_fronts(panels_of(study, left, "measured")[0]) == []


def test_one_point_beside_a_front_is_compared_as_a_method(tmp_path):
    study = study_of(
        *grid("vanilla", "surgery.lam", (0.0, 0.5), VANILLA), Method("MGDA", settings={"surgery.name": "mgda"})
    )
    at = {"lam 0.0": (6, 5), "lam 0.5": (9, 4), "": (8, 4)}
    (panel,) = panels_of(study, records_of(study, tmp_path, lambda p: counted(*at[p.method.label])), "measured")
    assert compare_fronts(panel) == []
    base, alone = representatives(panel)
    assert (base.label, alone.family) == ("lam 0.5", "MGDA")  # 0.9 x 0.4 is more than 0.6 x 0.5
    standard, adversarial = compare_methods(panel, [(alone, base)])
    assert (standard.difference, adversarial.difference) == (pytest.approx(-0.1), 0)
    assert adversarial.verdict == "not resolved" and adversarial.p_samples == 1


def test_what_cannot_be_compared_is_said(tmp_path):
    study = study_of(Method("vanilla", settings=VANILLA), Method("CA-AT", settings=CA_AT))

    def seen(point):
        other = point.method.family == "CA-AT"
        found = counted(6, 3, 8 if other else 10)
        return tuple(replace(v, threat="L2 1" if other and v.threat else v.threat) for v in found)

    (panel,) = panels_of(study, records_of(study, tmp_path, seen), "measured")
    assert len(panel.samples) == 8 and panel.threat == "L-inf 8/255 or L2 1"
    assert any("different images" in note for note in panel.notes)
    assert any("attacked differently" in note for note in panel.notes)
