"""What a study is: its points, their settings, and what is wrong with it before anything runs."""

from dataclasses import replace

import pytest

from robust_peft.config import RunConfig, SurgeryConfig, to_dict
from robust_peft.studies import Measurement, Method, Study, grid
from robust_peft.studies.study import apply_settings

METHODS = grid("CA-AT", "surgery.gamma", (0.5, 0.8), {"surgery.name": "ca-at"})
DATA = {"8": {"MNIST": {"data.batch_size": 8}, "CUB": {"data.batch_size": 9}}}


def test_points_come_seed_by_seed_for_each_panel():
    study = Study(name="s", methods=METHODS, axes=DATA, seeds=(0, 1, 2), panel_seeds={"CUB": (7,)})
    points = [(point.panel_name, point.method.label, point.seed) for point in study.points()]
    assert points == [
        ("MNIST", "gamma 0.5", 0),
        ("MNIST", "gamma 0.8", 0),
        ("CUB", "gamma 0.5", 7),
        ("CUB", "gamma 0.8", 7),
        ("MNIST", "gamma 0.5", 1),
        ("MNIST", "gamma 0.8", 1),
        ("MNIST", "gamma 0.5", 2),
        ("MNIST", "gamma 0.8", 2),
    ]
    for point in study.points():
        assert point.config.seed == point.seed and point.config.evaluation.attacks == ()
        assert point.config.surgery.gamma == float(point.method.label.split()[1])
        assert point.config.data.batch_size == {"MNIST": 8, "CUB": 9}[point.panel_name]
    folders = [point.folder for point in study.points()]
    assert len(set(folders)) == 8 and folders[0].startswith("mnist-ca_at_gamma_0.5-seed0-")


def test_a_point_keeps_its_folder_as_long_as_its_settings_stay():
    first = Study(name="s", methods=METHODS).points()
    second = Study(name="t", methods=METHODS[1:], seeds=(1, 0), measure=Measurement(("clean", "fgsm"))).points()
    assert first[1].folder == second[1].folder and first[1].folder != second[0].folder
    other = Study(name="s", methods=METHODS, settings={"optim.lr": 1.0}).points()
    assert not {point.folder for point in first} & {point.folder for point in other}


def test_a_point_keeps_its_folder_when_runs_get_another_setting(monkeypatch):
    before = Study(name="s", methods=METHODS).points()[0].folder

    def with_more(config):
        plain = to_dict(config)
        return {**plain, "optim": {**plain["optim"], "new": "off"}, "newer": 1}

    monkeypatch.setattr("robust_peft.studies.study.to_dict", with_more)
    assert Study(name="s", methods=METHODS).points()[0].folder == before


def test_methods_that_train_alike_are_known():
    vanilla = grid("vanilla", "surgery.lam", (0.0, 0.5), {"surgery.name": "vanilla"})
    cones = grid("CA-AT", "surgery.gamma", (0.8, 1.0), {"surgery.name": "ca-at"})
    rescaled = [replace(m, family="long", settings={**m.settings, "surgery.rescale": "vanilla"}) for m in cones]
    again = Method("again", settings={"surgery.name": "ca-at", "surgery.gamma": 0.8})
    axes = {"rate": {"low": {"optim.lr": 0.1}, "high": {"optim.lr": 1.0}}}
    study = Study(name="s", methods=(*cones, *rescaled, again, *vanilla), axes=axes, seeds=(0, 1))
    of_panel = {"CA-AT (gamma 1.0)": "vanilla (lam 0.0)", "again": "CA-AT (gamma 0.8)"}
    assert study.repeated() == {(panel, name): kept for panel in axes["rate"] for name, kept in of_panel.items()}
    assert Study(name="s", methods=(*cones, *vanilla[1:])).repeated() == {}


ON_TEST = Measurement(("clean", "fgsm"))


def test_what_is_chosen_by_some_images_is_not_confirmed_on_them():
    for split in ("test", "validation"):
        same = replace(ON_TEST, split=split)
        with pytest.raises(ValueError, match=f"Found split = '{split}' for both, and several methods of CA-AT. Let"):
            Study(name="s", methods=METHODS, measure=same, confirm=replace(same, limit=10))
        assert Study(name="s", methods=METHODS, measure=same, confirm=None).points()
        # One method each: nothing is chosen. gamma 1 is Vanilla(0) and no second method of CA-AT.
        cones = grid("CA-AT", "surgery.gamma", (0.8, 1.0), {"surgery.name": "ca-at"})
        vanilla = grid("vanilla", "surgery.lam", (0.0,), {"surgery.name": "vanilla"})
        assert Study(name="s", methods=(*cones, *vanilla), measure=same, confirm=same).points()
    with pytest.raises(ValueError, match="several methods of CA-AT"):
        replace(Study(name="s", methods=METHODS), measure=ON_TEST)


def test_further_sections_are_no_part_of_a_point():
    plain, more = Study(name="s", methods=METHODS), Study(name="s", methods=METHODS, extra=lambda *given: [])
    assert [point.folder for point in plain.points()] == [point.folder for point in more.points()]


def test_budgets_may_name_another_norm():
    measurement = Measurement(("clean", "pgd-20"), eps=("4/255", "l2 0.5", "linf 0.1"))
    assert measurement.budgets("l2") == [("l2", "4/255"), ("l2", "0.5"), ("linf", "0.1")]


def test_long_names_make_no_folder_that_a_file_system_refuses():
    axes = {"data": {"a" * 300: {}}}
    (point,) = Study(name="s", methods=[Method("b" * 300, "c" * 300)], axes=axes).points()
    assert len(point.folder) < 220


def test_another_method_drops_the_parameters_of_the_old_one():
    config = RunConfig(surgery=SurgeryConfig(name="ca-at", gamma=0.9))
    assert apply_settings(config, {"surgery.name": "vanilla"}).surgery == SurgeryConfig(name="vanilla")
    changed = apply_settings(config, {"surgery.name": "vanilla", "surgery.lam": 0.3, "seed": 4})
    assert changed.surgery == SurgeryConfig(name="vanilla", lam=0.3) and changed.seed == 4
    assert apply_settings(config, {"surgery.name": "ca-at"}) == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "a b"}, "name should be of letters"),
        ({"methods": ()}, "methods is empty"),
        ({"methods": [Method("A"), Method("A")]}, "Found A more than once"),
        ({"panel_seeds": {"CUP": (1,)}, "axes": DATA}, "Found CUP"),
        ({"settings": {"optim.rate": 1}}, "Found 'optim.rate'"),
        ({"settings": {"optim": 1}}, "Found 'optim'"),
        ({"methods": [Method("A", settings={"surgery.gamma": 2.0})]}, r"s: all, A, seed 0: .*gamma should be in"),
        ({"base": "quickest"}, "preset should be one of"),
        ({"seeds": 2}, r"seeds should be different whole numbers, e.g. \(0, 1, 2\). Found 2"),
        ({"seeds": ()}, r"Found \(\)"),
        ({"seeds": (0, 1, 0)}, r"seeds should be different whole numbers.* Found \(0, 1, 0\)"),
        ({"seeds": (0.5,)}, "different whole numbers"),
        ({"settings": {"optim.epochs": "one"}}, "value of the wrong type .*Found {'optim.epochs': 'one'}"),
        ({"confirm_seeds": 0}, "confirm_seeds should be at least 1 or None. Found confirm_seeds = 0"),
    ],
)
def test_what_is_wrong_is_said_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        Study(**{"name": "s", "methods": METHODS, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attacks": ("clean",)}, "clean and at least one attack"),
        ({"attacks": ("pgd-20",)}, "clean and at least one attack"),
        ({"attacks": "clean, pgd-20"}, "clean and at least one attack, by name. Found 'clean, pgd-20'"),
        ({"attacks": ("clean", "pgd-20"), "limit": "all"}, "limit should be at least 1 or None. Found limit = 'all'"),
        ({"attacks": ("clean", "pgd-20"), "split": "train"}, "split should be validation or test"),
        ({"attacks": ("clean", "pgd-20"), "limit": 0}, "limit should be at least 1"),
        ({"attacks": ("clean", "pgd-20"), "eps": ("4/0",)}, "Found '4/0'"),
        ({"attacks": ("clean", "pgd-20"), "eps": ("l3 0.5",)}, "Found 'l3 0.5'"),
        ({"attacks": ("clean", "pgd-20"), "eps": ("0.1", "linf 8")}, "Found 'linf 8'"),
    ],
)
def test_wrong_measurements(arguments, message):
    with pytest.raises(ValueError, match=message):
        Measurement(**arguments)
