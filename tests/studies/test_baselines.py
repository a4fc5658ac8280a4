"""Ready-made methods, and the small studies that are made of them."""

import pytest

from robust_peft.config import RunConfig
from robust_peft.studies import Study, baselines, built_in_studies, load_study
from robust_peft.studies.study import apply_settings


def configs(methods):
    return {method.name: apply_settings(RunConfig(), method.settings) for method in methods}


def test_vanilla_and_ca_at():
    found = configs((*baselines.vanilla(), *baselines.ca_at()))
    assert [(run.surgery.name, run.surgery.lam, run.surgery.gamma) for run in found.values()] == [
        *(("vanilla", lam, None) for lam in (0, 0.25, 0.5, 0.75, 1)),
        *(("ca-at", None, gamma) for gamma in (0.5, 0.6, 0.7, 0.8, 0.9)),
    ]


def test_steps_as_long_as_vanilla_s():
    for optimizer, expected in (("sgd", ("vanilla", None)), ("adamw", (None, "vanilla"))):
        for run in configs(baselines.ca_at_length_matched((0.8,), optimizer)).values():
            assert (run.surgery.name, run.surgery.gamma) == ("ca-at", 0.8)
            assert (run.surgery.rescale, run.optim.match_change) == expected
    with pytest.raises(ValueError, match="optimizer should be adamw or sgd"):
        baselines.ca_at_length_matched(optimizer="adam")


def test_learning_rates():
    found = configs(baselines.vanilla_learning_rates((0.1, 0.2), lam=0.25))
    assert {(run.surgery.name, run.surgery.lam) for run in found.values()} == {("vanilla", 0.25)}
    assert [run.optim.lr for run in found.values()] == [0.1, 0.2]


def test_trades_weighs_the_divergence_beta_times_as_much():
    for beta, run in zip((1, 3, 6), configs(baselines.trades()).values(), strict=True):
        assert (run.loss.name, run.surgery.name) == ("trades", "vanilla")
        assert run.surgery.lam / (1 - run.surgery.lam) == pytest.approx(beta)


def test_multi_task_methods():
    found = configs(baselines.multi_task(cagrad=(0.2, 0.5)))
    surgeries = [run.surgery for run in found.values()]
    assert [surgery.name for surgery in surgeries] == ["pcgrad", "mgda", "cagrad", "cagrad", "gradvac"]
    assert [surgery.c for surgery in surgeries] == [None, None, 0.2, 0.5, None] and surgeries[-1].target == 0.8


def test_angle_with_and_without_the_head():
    found = configs(baselines.conflict_params(gamma=0.7))
    assert [run.surgery.conflict_params for run in found.values()] == ["all", "adapters"]
    assert {run.surgery.gamma for run in found.values()} == {0.7}


def test_adapters_each_at_each_rate():
    found = configs(baselines.adapters((0.01, 0.03)))
    assert len(found) == 16
    names = ("bottleneck", "bottleneck", "bottleneck", "lora", "layernorm", "bias", "linear", "full")
    assert [run.adapter.name for run in found.values()] == [name for name in names for _ in range(2)]
    assert [run.adapter.reduction_factor for run in found.values()][:6] == [4, 4, 8, 8, 16, 16]
    assert [run.optim.lr for run in found.values()] == [0.01, 0.03] * 8


def test_all_of_them_in_one_study():
    methods = (
        *baselines.vanilla(), *baselines.ca_at(), *baselines.ca_at_length_matched(), *baselines.multi_task(),
        *baselines.vanilla_learning_rates((0.01,)), *baselines.trades(), *baselines.conflict_params(),
    )  # fmt: skip
    points = Study(name="all", methods=methods).points()
    # CA-AT (gamma 0.8) measures the angle on all that trains: one run with two names.
    assert len(points) == 25 and len({point.key for point in points}) == 24


@pytest.mark.parametrize(
    ("name", "scale", "runs"),
    [
        ("small/fronts", None, 6 * 17),
        ("small/fronts", "all", 9 * 17),
        ("small/adapters", None, 72),
        ("small/precision", None, 9),
    ],
)
def test_small_studies(name, scale, runs):
    assert name in built_in_studies()
    study = load_study(name, scale)
    points = study.points()
    assert len({point.folder for point in points}) == runs
    assert {point.config.backbone.name for point in points} == {"micro_swin"}
    assert study.measure.split == ("test" if name == "small/precision" else "validation")


def test_an_unknown_scale_is_named():
    with pytest.raises(ValueError, match="scale should be digits or all. Found scale = 'paper'"):
        load_study("small/fronts", "paper")
