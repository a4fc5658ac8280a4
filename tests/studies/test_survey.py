"""Which points make up a front, and which of them get the final measurement: from reports written by hand."""

import pytest

from robust_peft.files import write_json
from robust_peft.studies import Measurement, Method, Study, grid
from robust_peft.studies.store import PointFolder
from robust_peft.studies.survey import accuracies, counted, survey

VANILLA = grid("vanilla", "surgery.lam", (0.0, 0.5), {"surgery.name": "vanilla"})
CA_AT = grid("CA-AT", "surgery.gamma", (0.5, 0.8, 1.0), {"surgery.name": "ca-at"})
SETTINGS = {"threat.eps": "0.2"}


def row(verdicts, attack=None, eps=0.2):
    return {"verdicts": verdicts} if attack is None else {"attack": attack, "norm": "linf", "eps": eps} | row(verdicts)


def counts(standard, adversarial):
    """Of ten images so many are right, and so many stay right under the first of two attacks; all under the second."""
    attacked = row("1" * adversarial + "0" * (10 - adversarial), "pgd")
    return [row("1" * standard + "0" * (10 - standard)), attacked, row("1" * 10, "fgsm")]


@pytest.fixture
def write(tmp_path):
    """A function that writes a study's measured points: (method's label, seed) -> rows of its report, None: failed."""

    def to_folder(study, rows):
        for point in study.points():
            files = PointFolder(tmp_path, point)
            files.notes.mkdir(parents=True)
            of_point = rows(point.method.label, point.seed)
            if of_point is None:
                files.write_failure("train", None, "E: x", "")
                continue
            write_json(files.run / "evaluation.json", {})
            (files.run / "README.md").touch()
            files.write_report("measured", study.measure, {"results": of_point})
        return survey(study, tmp_path)

    return to_folder


def study_of(*methods, **given):
    return Study(**{"name": "s", "methods": methods, "settings": SETTINGS, **given})


def chosen(findings):
    return sorted({finding.point.method.label for finding in findings if finding.chosen})


def test_what_another_of_the_family_beats_is_not_confirmed(write):
    at = {"lam 0.0": (9, 2), "lam 0.5": (8, 5), "gamma 0.5": (8, 4), "gamma 0.8": (7, 4), "gamma 1.0": (6, 6)}
    methods = (*VANILLA, *grid("CA-AT", "surgery.gamma", (0.5, 0.8), {"surgery.name": "ca-at"}))
    findings = write(study_of(*methods, seeds=(0, 1)), lambda label, seed: counts(*at[label]))
    assert chosen(findings) == ["gamma 0.5", "lam 0.0", "lam 0.5"]
    assert [finding.to_confirm for finding in findings] == [True, True, True, False] * 2


def test_a_sample_counts_that_withstood_every_attack(write):
    rows = [row("11110"), row("11001", "pgd"), row("01101", "fgsm"), row("00000", "pgd", eps=0.3)]
    (finding,) = write(study_of(Method("A")), lambda label, seed: rows)
    assert accuracies(finding.point, finding.measured) == (4 / 5, 1 / 5)


def test_a_repeated_training_neither_beats_others_nor_is_confirmed(write):
    """gamma 1 is Vanilla(0), which would beat all of CA-AT."""
    at = {"lam 0.0": (9, 5), "lam 0.5": (8, 6), "gamma 0.5": (8, 4), "gamma 0.8": (7, 5), "gamma 1.0": (9, 5)}
    findings = write(study_of(*VANILLA, *CA_AT), lambda label, seed: counts(*at[label]))
    assert chosen(findings) == ["gamma 0.5", "gamma 0.8", "lam 0.0", "lam 0.5"]


def test_a_repeated_training_counts_where_its_twin_failed(write):
    at = {"lam 0.5": (8, 6), "gamma 0.5": (8, 4), "gamma 0.8": (7, 5), "gamma 1.0": (9, 5)}
    findings = write(study_of(*VANILLA, *CA_AT), lambda label, seed: counts(*at[label]) if label in at else None)
    assert chosen(findings) == ["gamma 1.0", "lam 0.5"]


def test_methods_are_chosen_by_the_seeds_that_all_have(write):
    """Seed 1 is the harder one, and lam 0.0 failed there."""

    def rows(label, seed):
        if label == "lam 0.0":
            return counts(7, 5) if seed == 0 else None
        return counts(8, 6) if seed == 0 else counts(4, 2)

    assert chosen(write(study_of(*VANILLA, seeds=(0, 1)), rows)) == ["lam 0.5"]


def test_without_a_shared_seed_each_method_is_taken_with_its_own(write):
    def rows(label, seed):
        return counts(*{("lam 0.0", 0): (7, 5), ("lam 0.5", 1): (8, 6)}[label, seed]) if key(label, seed) else None

    def key(label, seed):
        return (label, seed) in (("lam 0.0", 0), ("lam 0.5", 1))

    assert chosen(write(study_of(*VANILLA, seeds=(0, 1)), rows)) == ["lam 0.5"]


@pytest.mark.parametrize(
    ("measured", "replaced", "seeds"),
    [
        ({"a": [0, 1], "b": [0, 1], "c": [1, 2]}, {"b": "a"}, (1,)),
        ({"a": [0], "b": [0, 1], "c": [1, 0]}, {"a": "b"}, (0, 1)),
        ({"b": [3], "c": []}, {"a": "b"}, (3,)),
        ({"a": [0], "c": [1]}, {"b": "a"}, ()),
        ({}, {"b": "a"}, ()),
    ],
)
def test_who_counts_and_on_which_seeds(measured, replaced, seeds):
    assert counted({("p", "b"): "a", ("q", "c"): "a"}, "p", measured) == (replaced, seeds)


def test_nothing_is_chosen_before_a_panel_is_through(write, tmp_path):
    axes = {"rate": {"low": {"optim.lr": 0.001}, "high": {"optim.lr": 0.002}}}
    study = study_of(*VANILLA, axes=axes, measure=Measurement(("clean", "pgd"), split="validation"))
    write(study, lambda label, seed: counts(8, 4))
    last = PointFolder(tmp_path, study.points()[-1])
    (last.notes / "measured.json").unlink()
    assert [(f.point.panel_name, f.chosen) for f in survey(study, tmp_path)] == [
        *(("low", True),) * 2,
        *(("high", None),) * 2,
    ]
