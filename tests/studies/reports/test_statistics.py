"""Fronts, hypervolumes and comparisons against hand-computed figures and brute force."""

import itertools
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_studies import BASE, SEARCH, drawn, records_of, verdicts

from robust_peft.results import hypervolume, mean_interval
from robust_peft.studies import comparisons
from robust_peft.studies.comparisons import Comparison, Resamples, compare_fronts, compare_methods, representatives
from robust_peft.studies.records import Record, Verdicts
from robust_peft.studies.statistics import Front, MethodResult, Panel, SeedResult, expected_hypervolume, panels_of
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
    assert front.methods[0].intervals == (None, None)  # two seeds say nothing of their spread
    assert [method.label for method in front.best] == ["lam 0", "lam 0.5"]
    assert front.hypervolume() == pytest.approx(0.6 * 0.4 + 0.2 * 0.3)
    assert front.hypervolume(1) == pytest.approx((0.6 * 0.4 + 0.8 * 0.3 + 0.7 * 0.2) / 3)


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


def with_status(records, status, **which):
    """The same records, those of a method and seed without a result."""
    return [
        replace(r, status=status, measured=(), confirmed=())
        if all(getattr(r, name) == value for name, value in which.items())
        else r
        for r in records
    ]


def means(front):
    return [method.mean for method in front.methods]


def test_the_smaller_family_sets_the_number_of_points(tmp_path):
    study = two_families()
    records = records_of(study, tmp_path, lambda p: drawn(p, 40, ("pgd",)))
    (panel,) = panels_of(study, records, "measured")
    (found,) = compare_fronts(panel)
    vanilla, ca_at = panel.fronts
    assert (found.first, found.second, found.size, found.tries) == ("CA-AT", "vanilla", 2, (2, 3))
    pairs = list(itertools.combinations(means(vanilla), 2))
    assert found.of_second == pytest.approx(sum(map(hypervolume, pairs)) / 3)
    assert found.of_first == pytest.approx(hypervolume(means(ca_at)))


def test_in_the_final_measurement_all_points_count(tmp_path):
    study = two_families()
    seen = {"lam 0.0": (5, 5), "lam 0.5": (6, 4), "lam 1.0": (9, 2), "gamma 0.5": (6, 5), "gamma 0.8": (5, 5)}
    final = {name: at for name, at in seen.items() if name != "gamma 0.8"}

    def confirmed(point):
        return counted(*final[point.method.label]) if point.method.label in final else ()

    records = records_of(study, tmp_path, lambda p: counted(*seen[p.method.label]), confirmed)
    (panel,) = panels_of(study, records, "confirmed")
    (found,) = compare_fronts(panel)
    assert (found.size, found.tries) == (None, (2, 3))
    assert found.of_first == pytest.approx(0.30) and found.of_second == pytest.approx(0.25 + 0.04 + 0.06)


def test_a_method_without_a_model_counts_as_a_try(tmp_path):
    study = two_families(seeds=2, more=0)
    at = {"lam 0.0": (5, 5), "lam 0.5": (8, 4), "gamma 0.5": (8, 4), "gamma 0.8": (9, 1)}
    records = records_of(study, tmp_path, lambda p: counted(*at[p.method.label]))
    failed = with_status(records, "failed", label="gamma 0.8")
    (panel,) = panels_of(study, failed, "measured")
    assert [front.tries for front in panel.fronts] == [2, 2] and any("tries that reached" in n for n in panel.notes)
    (found,) = compare_fronts(panel)
    assert (found.size, found.of_first) == (2, pytest.approx(0.32))
    assert panel.fronts[1].hypervolume(1) == pytest.approx(0.16)  # the mean of 0.32 and nothing
    (waiting,) = panels_of(study, with_status(records, "waiting", label="gamma 0.8"), "measured")
    assert waiting.fronts[1].pending == ("CA-AT (gamma 0.8)",) and compare_fronts(waiting) == []


def test_the_bootstrap_of_few_seeds_is_the_definitions(tmp_path):
    """One draw at a time, with the accuracies counted anew on the drawn images."""
    study = two_families(seeds=2, more=0)
    records = records_of(study, tmp_path, lambda p: drawn(p, 30, ("pgd",)))
    (panel,) = panels_of(study, records, "measured")
    (found,) = compare_fronts(panel, Resamples(panel, count=50, seed=3))
    rng = np.random.default_rng(3)

    def difference(images):
        areas = []
        for front in panel.fronts:
            points = [
                [np.mean([of_run[i] for run in method.runs for of_run in [getattr(run, kind)] for i in images])
                 for kind in ("standard", "adversarial")]
                for method in front.methods
            ]  # fmt: skip
            areas.append(hypervolume([tuple(point) for point in points]))
        return areas[1] - areas[0]

    values = np.array([difference(images) for images in rng.integers(30, size=(50, 30))])
    assert found.difference == pytest.approx(difference(range(30)))
    low, high = np.quantile(values, [0.025, 0.975])
    assert found.interval == pytest.approx((2 * found.difference - high, 2 * found.difference - low))
    centre = 2 * found.difference
    fewer = min(np.sum(values <= centre + 1e-9), np.sum(values >= centre - 1e-9))
    assert found.p_value == pytest.approx(min(1, 2 * (fewer + 1) / 51)) and not found.over_seeds


def test_no_draw_beyond_zero_gives_the_smallest_p(tmp_path):
    study = study_of(*grid("vanilla", "surgery.lam", (0.25, 0.5), VANILLA))
    at = {"lam 0.25": (10, 10), "lam 0.5": (0, 0)}
    (panel,) = panels_of(study, records_of(study, tmp_path, lambda p: counted(*at[p.method.label])), "measured")
    standard, _ = compare_methods(panel, [panel.methods[:2]], Resamples(panel, count=99))
    assert standard.p_value == pytest.approx(2 / 100) and standard.interval == (1, 1)


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

    (panel,) = panels_of(study, records_of(study, Path(), seen), "measured")
    return compare_methods(panel, [panel.methods[:2]], Resamples(panel, count=400))[0]


def made_up_panel(right):
    """A panel of two families from an array of verdicts, `[family, method, seed, image, 2]`."""
    families = []
    for family, of_family in zip(("vanilla", "CA-AT"), right, strict=True):
        methods = []
        for label, of_method in enumerate(of_family):
            record = Record("", {}, family, str(label), 0, Path(), "done")
            runs = [
                SeedResult(replace(record, seed=seed), dict(enumerate(run[:, 0])), dict(enumerate(run[:, 1])))
                for seed, run in enumerate(of_method)
            ]
            methods.append(MethodResult(family, str(label), tuple(runs)))
        families.append(Front(family, tuple(methods), len(methods)))
    seeds, images = right.shape[2:4]
    return Panel("made up", "measured", tuple(families), (), ("pgd",), "L-inf 8/255", tuple(range(seeds)),
                 tuple(range(images)), True, ())  # fmt: skip


def alike_in_area(rng, spread, images, seeds=6, scatter=0.05):
    """Two families of equal true hypervolume, the one spread out or with one good point, the other close together."""
    one = [(0.6, 0.5), (0.7, 0.45), (0.8, 0.4), (0.86, 0.3), (0.95, 0.05)]
    if not spread:
        one = [(0.8, 0.4), (0.6, 0.2), (0.6, 0.25), (0.6, 0.3), (0.6, 0.1)]
    other = np.array([(0.793, 0.491), (0.803, 0.484), (0.812, 0.476), (0.822, 0.468), (0.831, 0.461)])
    if not spread:
        other = np.array([(0.8, 0.4)] * 5)
    other = other * np.sqrt(hypervolume(one) / hypervolume([tuple(point) for point in other]))
    limits = np.vectorize(NormalDist().inv_cdf)(np.array([one, other]))[:, :, None, None]
    limits = limits + rng.normal(0, scatter, (2, 5, seeds, 1, 2))
    ease = np.sqrt(0.8) * rng.normal(size=images) + np.sqrt(0.2) * rng.normal(size=(2, 5, seeds, images))
    right = ease < limits[..., 0]
    return np.stack([right, right & (ease < limits[..., 1])], axis=-1)


@pytest.mark.parametrize("spread", [True, False])
def test_families_that_are_alike_are_seldom_told_apart(spread):
    """Points close together have the largest best-of-many; averaging each seed's area found 30 to 60 % of these."""
    rng, resolved, covered = np.random.default_rng(0), 0, 0
    for trial in range(40):
        panel = made_up_panel(alike_in_area(rng, spread, images=100))
        (found,) = compare_fronts(panel, Resamples(panel, count=200, seed=trial))
        resolved += found.p_value <= 0.05
        covered += found.interval[0] <= 0 <= found.interval[1]
    assert resolved <= 5 and covered >= 35  # of 40, at a level of 5 %


def test_seeds_that_scatter_are_drawn_anew():
    """Each seed's models are all right or all wrong, so that images tell nothing: 6 seeds give Student's interval."""
    of_seeds = np.array([0.9, 0.7, 0.6, 0.8, 0.4, 0.2])
    right = np.zeros((2, 2, 6, 100, 2), dtype=bool)
    for seed, share in enumerate(of_seeds):
        right[1, :, seed, : int(100 * share)] = True
    right[1] = np.stack([np.roll(right[1, 0], 7 * k, axis=1) for k in range(2)])
    panel = made_up_panel(right)
    found = compare_methods(panel, [(panel.fronts[1].methods[0], panel.fronts[0].methods[0])])[0]
    low, high = mean_interval(list(of_seeds))
    assert found.over_seeds and found.by_seed == pytest.approx(of_seeds)
    assert found.interval[1] - found.interval[0] == pytest.approx(high - low, rel=0.1)  # images add a little


@pytest.mark.parametrize("seeds, shift, verdict", [
    (6, 3, "resolved"), (6, -3, "resolved"), (6, 0, "not resolved"),
    (3, 3, "resolved (for these models, on other images)"), (1, 0, "not resolved"),
])  # fmt: skip
def test_verdicts(tmp_path, seeds, shift, verdict):
    study = two_families(seeds, more=0)

    def seen(point):
        gain = shift * (point.method.family == "CA-AT")
        return counted(60 + gain * 5, 30 + gain * 5 + point.seed % 2, total=100)

    (panel,) = panels_of(study, records_of(study, tmp_path, seen), "measured")
    (found,) = compare_fronts(panel)
    assert found.verdict == verdict and found.resolved == (verdict == "resolved")
    assert found.over_seeds == (seeds >= 6) and found.p_seeds is None
    standard, adversarial = compare_methods(panel, [(panel.fronts[1].methods[0], panel.fronts[0].methods[0])])
    assert standard.verdict == adversarial.verdict == verdict
    assert standard.p_seeds == (None if seeds < 6 else 2 / 64 if shift else 1)


def test_the_exact_test_over_seeds_can_undo_a_verdict(tmp_path):
    study = two_families(6, more=0)

    def seen(point):
        gain = 0 if point.method.family == "vanilla" else -1 if point.seed == 5 else 30
        return counted(50 + gain, 50 + gain, total=100)

    (panel,) = panels_of(study, records_of(study, tmp_path, seen), "measured")
    standard, _ = compare_methods(panel, [(panel.fronts[1].methods[0], panel.fronts[0].methods[0])])
    assert standard.p_value <= 0.05 < standard.p_seeds == 4 / 64 and standard.verdict == "not resolved"


def test_holm_takes_all_comparisons_of_a_panel():
    values = [0.02, 0.04]
    base = Comparison("a", "b", "hypervolume", None, None, (0,), 0.5, 0.4, (0.1,), (0.05, 0.15), 0.0, True, None)
    adjusted = comparisons._adjusted([replace(base, p_value=p) for p in values])
    assert [c.p_adjusted for c in adjusted] == [0.04, 0.04]
    adjusted = comparisons._adjusted([replace(base, p_value=p) for p in (0.03, 0.04)])
    assert {c.verdict for c in adjusted} == {"resolved alone, not after Holm's correction"}


def test_seeds_that_not_all_have_are_left_out(tmp_path):
    study = two_families(seeds=3)
    records = records_of(study, tmp_path, lambda p: drawn(p, 40, ("pgd",)))
    lacking = with_status(records, "failed", method="CA-AT (gamma 0.8)", seed=1)
    (panel,) = panels_of(study, lacking, "measured")
    assert panel.seeds == (0, 2) and {method.seeds for method in panel.methods} == {(0, 2)}
    assert any("CA-AT (gamma 0.8) is without seed 1" in note for note in panel.notes)
    assert compare_fronts(panel)[0].seeds == (0, 2)
    left = [record for record in records if record.family == "vanilla"]
    assert compare_fronts(panels_of(study, left, "measured")[0]) == []


def test_methods_that_share_no_seed_are_shown_and_not_compared(tmp_path):
    study = two_families(seeds=2, more=0)
    records = records_of(study, tmp_path, lambda p: drawn(p, 40, ("pgd",)))
    records = with_status(with_status(records, "failed", family="CA-AT", seed=1), "failed", family="vanilla", seed=0)
    (panel,) = panels_of(study, records, "measured")
    assert panel.seeds == () and not panel.comparable and len(panel.methods) == 4
    assert compare_fronts(panel) == [] and compare_methods(panel, [panel.methods[:2]]) == []
    with pytest.raises(ValueError, match="comparable"):
        Resamples(panel)


def test_one_setting_beside_a_front_is_compared_as_a_method(tmp_path):
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
    assert adversarial.verdict == "not resolved" and adversarial.p_value == 1


def test_a_family_that_selection_left_with_one_point_is_still_a_front(tmp_path):
    study = two_families(more=0)
    at = {"lam 0.0": (5, 5), "lam 0.5": (9, 4), "gamma 0.5": (8, 4)}

    def confirmed(point):
        return counted(*at[point.method.label]) if point.method.label in at else ()

    records = records_of(study, tmp_path, lambda p: counted(*at.get(p.method.label, (7, 3))), confirmed)
    (panel,) = panels_of(study, records, "confirmed")
    (found,) = compare_fronts(panel)
    assert found.of_first == pytest.approx(0.32) and found.of_second == pytest.approx(0.36 + 0.05)


@pytest.mark.parametrize("change, note", [
    (lambda v: tuple(replace(x, threat="L2 1" if x.threat else "") for x in v), "attacked differently"),
    (lambda v: (v[0], replace(v[1], attack="fgsm")), "attacked differently"),
])  # fmt: skip
def test_what_was_attacked_differently_is_not_compared(tmp_path, change, note):
    study = two_families(seeds=1)
    records = records_of(study, tmp_path, lambda p: drawn(p, 20, ("pgd",)))
    records = [replace(r, measured=change(r.measured)) if r.label == "gamma 0.8" else r for r in records]
    (panel,) = panels_of(study, records, "measured")
    assert any(note in said for said in panel.notes) and compare_fronts(panel) == []


def test_other_images_and_other_versions_are_noticed(tmp_path):
    study = two_families(seeds=1)
    records = records_of(study, tmp_path, lambda p: drawn(p, 20, ("pgd",)))

    def measured_with(images, torch):
        stamped = [replace(r, images={"measured": "a"}, versions={"measured": {"torch": "2.11"}}) for r in records]
        other = {"images": {"measured": images}, "versions": {"measured": {"torch": torch}}}
        (panel,) = panels_of(study, [*stamped[:-1], replace(stamped[-1], **other)], "measured")
        return panel

    assert compare_fronts(measured_with("a", "2.11")) and not measured_with("a", "2.11").notes
    assert compare_fronts(measured_with("a", "2.12"))  # said, but no reason to stop
    assert "torch 2.11 and 2.12" in measured_with("a", "2.12").notes[0]
    assert compare_fronts(measured_with("b", "2.11")) == [] and "content" in measured_with("b", "2.11").notes[0]


def test_fewer_images_than_others_are_said(tmp_path):
    study = study_of(Method("vanilla", settings=VANILLA), Method("CA-AT", settings=CA_AT))
    (panel,) = panels_of(
        study, records_of(study, tmp_path, lambda p: counted(6, 3, 8 if p.method.family == "CA-AT" else 10)), "measured"
    )
    assert len(panel.samples) == 8 and any("different images" in note for note in panel.notes)


def test_gamma_one_stands_in_where_its_twin_failed(tmp_path):
    study = study_of(
        *grid("vanilla", "surgery.lam", (0.0, 0.5), VANILLA), *grid("CA-AT", "surgery.gamma", (0.5, 1.0), CA_AT)
    )
    records = records_of(study, tmp_path, lambda p: counted(8, 4))
    (panel,) = panels_of(study, with_status(records, "failed", label="lam 0.0"), "measured")
    assert [(f.family, f.size, f.tries) for f in panel.fronts] == [("vanilla", 1, 1), ("CA-AT", 2, 2)]
    assert not any(method.same_as for method in panel.methods)


def test_domination_as_measured(tmp_path):
    study = two_families(seeds=1, more=0)
    at = {"lam 0.0": (5, 5), "lam 0.5": (9, 4), "gamma 0.5": (8, 4), "gamma 0.8": (5, 5)}
    (panel,) = panels_of(study, records_of(study, tmp_path, lambda p: counted(*at[p.method.label])), "measured")
    vanilla, ca_at = panel.fronts
    assert [m.label for m in ca_at.dominated_by(vanilla)] == ["gamma 0.5"]  # equal points do not dominate each other
    assert vanilla.dominated_by(ca_at) == ()
