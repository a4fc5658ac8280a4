"""The evaluator: verdicts are counted over samples, and nothing but a confirmed success counts against the model."""

import json

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import robust_peft as rp
from robust_peft.data import ImageSet
from robust_peft.evaluation import Report, evaluator
from robust_peft.results import Accuracy

THREAT = rp.ThreatModel("linf", 0.1)
WIDER = rp.ThreatModel("linf", 0.3)


class Brightness(nn.Module):
    """Two classes by mean brightness: above or below 0.5. What any attack can reach is known exactly."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(10.0, dtype=dtype))

    def forward(self, images):
        z = self.scale * (images.flatten(1).mean(dim=1) - 0.5)
        return torch.stack([-z, z], dim=1)


def images_at(levels, labels=None):
    levels = torch.tensor(levels)
    images = levels[:, None, None, None].expand(-1, 3, 4, 4).clone()
    labels = (levels > 0.5).long() if labels is None else torch.tensor(labels)
    return ImageSet(images, labels, ("dark", "bright"), "levels")


LEVELS = [0.1, 0.45, 0.3, 0.55, 0.95, 0.65]  # distances to the boundary: 0.4 0.05 0.2 0.05 0.45 0.15


def test_verdicts_are_the_known_ones():
    data = images_at(LEVELS)
    report = rp.evaluate(Brightness(), data, [THREAT, WIDER], ["clean", "fgsm", "pgd-5"], batch_size=4)
    assert report.clean == Accuracy(6, 6)
    assert report.find("pgd-5", THREAT).correct == (True, False, True, False, True, True)
    assert report.find("pgd-5", WIDER).correct == (True, False, False, False, True, False)
    assert report[THREAT, "fgsm"] == report.worst_case(THREAT) == Accuracy(4, 6)
    assert report.worst_case(WIDER) == Accuracy(2, 6)


def test_a_sample_that_is_wrong_without_attack_is_broken_under_every_attack():
    data = images_at(LEVELS, [1, 0, 0, 1, 1, 1])
    report = rp.evaluate(Brightness(), data, [THREAT], ["pgd-1"])
    assert report.clean == Accuracy(5, 6)
    assert report.find("pgd-1", THREAT).correct[0] is False


@pytest.mark.parametrize("cheat", ["outside the ball", "outside the box", "not a number"])
def test_an_attack_that_leaves_ball_or_box_is_an_error_and_no_verdict(monkeypatch, cheat):
    def cheated(model, images, labels, *, keys):
        flipped = (1 - images).clone()
        return {
            "outside the ball": flipped,
            "outside the box": images - 5 * (images > 0.5) + 5 * (images < 0.5),
            "not a number": torch.full_like(images, float("nan")),
        }[cheat]

    class Cheat:
        perturb = staticmethod(cheated)

    monkeypatch.setattr(evaluator, "make_attack", lambda name, threat: Cheat)
    with pytest.raises(RuntimeError, match="pgd-1 left the ball or the box"):
        rp.evaluate(Brightness(), images_at(LEVELS), [THREAT], ["pgd-1"])


def test_gradients_that_are_no_numbers_do_not_make_a_model_robust():
    class Poisoned(Brightness):
        def forward(self, images):
            # Adds nothing, but its gradient at a zero pixel is 0 * inf.
            return super().forward(images) + 0 * images[:, 0, 0, :1].clamp(max=0).neg().sqrt()

    data = images_at(LEVELS)
    sound = rp.evaluate(Brightness(), data, [WIDER], ["pgd-5"])
    assert (
        rp.evaluate(Poisoned(), data, [WIDER], ["pgd-5"])[WIDER, "pgd-5"].correct <= sound[WIDER, "pgd-5"].correct + 1
    )


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_the_callers_matmul_precision_comes_back(precision):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        rp.evaluate(Brightness(), images_at(LEVELS), [THREAT], ["pgd-1"])
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_model_that_answers_nan_is_not_right():
    class Nan(Brightness):
        def forward(self, images):
            return super().forward(images) * float("nan")

    report = rp.evaluate(Nan(), images_at(LEVELS, [0] * 6), [], [])
    assert report.clean == Accuracy(0, 6)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_batch_size_changes_no_verdict(batch_size):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, 2)).double()
    generator = torch.Generator().manual_seed(3)
    data = ImageSet(torch.rand(31, 3, 4, 4, generator=generator), torch.arange(31) % 2, ("a", "b"))
    args = (model, data, [rp.ThreatModel("l2", 0.3)], ["pgd-3"])
    assert rp.evaluate(*args, batch_size=batch_size).to_dict() == rp.evaluate(*args, batch_size=7).to_dict()


def test_an_attacks_figure_does_not_depend_on_its_company():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    data = ImageSet(
        torch.rand(40, 3, 4, 4, generator=torch.Generator().manual_seed(3)), torch.arange(40) % 2, ("a", "b")
    )
    alone = rp.evaluate(model, data, [THREAT], ["pgd-1"])
    among = rp.evaluate(model, data, [WIDER, THREAT], ["fgsm", "clean", "pgd-2", "pgd-1"])
    assert alone.find("pgd-1", THREAT) == among.find("pgd-1", THREAT)


def test_uint8_and_float_images_give_the_same():
    images = (torch.tensor(LEVELS) * 255).round().to(torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4).clone()
    labels = (torch.tensor(LEVELS) > 0.5).long()
    as_bytes = ImageSet(images, labels, ("a", "b"), "x")
    as_floats = ImageSet(images.float() / 255, labels, ("a", "b"), "x")
    reports = [rp.evaluate(Brightness(), data, [THREAT], ["pgd-2"]).to_dict() for data in (as_bytes, as_floats)]
    assert reports[0] == reports[1]


def test_a_loaders_dataset_is_taken_in_order():
    data = images_at(LEVELS)
    shuffled = DataLoader(data, batch_size=2, shuffle=True)
    model = Brightness()
    assert (
        rp.evaluate(model, shuffled, [THREAT], ["fgsm"]).to_dict()
        == rp.evaluate(model, data, [THREAT], ["fgsm"]).to_dict()
    )


def test_the_model_and_the_switches_are_left_as_they_were():
    model = nn.Sequential(Brightness(), nn.Dropout(0.5)).train()
    before = torch.backends.cudnn.allow_tf32
    with torch.autocast("cpu", torch.bfloat16):
        rp.evaluate(model, images_at(LEVELS), [THREAT], ["pgd-1"])
        assert torch.is_autocast_enabled("cpu")
    assert torch.backends.cudnn.allow_tf32 == before
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_autocast_of_the_caller_does_not_reach_the_verdicts():
    # In bfloat16 a brightness just above a half rounds to it.
    data = images_at([0.5 + 1e-4] * 3, [1, 1, 1])
    with torch.autocast("cpu", torch.bfloat16):
        assert rp.evaluate(Brightness(), data, []).clean == Accuracy(3, 3)


def test_a_report_survives_json(tmp_path):
    report = rp.evaluate(
        Brightness(), images_at(LEVELS), [THREAT, rp.ThreatModel("l2", 1.0)], ["pgd-2", "fgsm"], seed=5
    )
    report.save(tmp_path / "evaluation.json")
    loaded = Report.load(tmp_path / "evaluation.json")
    assert loaded == report
    plain = json.loads((tmp_path / "evaluation.json").read_text())
    assert [row["attack"] for row in plain["results"]] == ["clean", "pgd-2", "fgsm", "pgd-2", "fgsm"]
    assert "n=6" in str(report) and "L2 1" in str(report)


def test_what_was_not_measured_is_said():
    report = rp.evaluate(Brightness(), images_at(LEVELS), [THREAT], ["fgsm"])
    with pytest.raises(KeyError, match="pgd-20 under L-inf.*was not measured. Measured: clean, fgsm"):
        report[THREAT, "pgd-20"]
    with pytest.raises(KeyError, match="No attack was measured under"):
        report.worst_case(WIDER)


def test_limit_takes_the_first():
    report = rp.evaluate(Brightness(), images_at(LEVELS), [THREAT], ["fgsm"], limit=2)
    assert report.find("fgsm", THREAT).correct == (True, False)


@pytest.mark.parametrize(
    ("data", "attacks", "message"),
    [
        (torch.utils.data.TensorDataset(torch.rand(0, 3, 4, 4), torch.zeros(0)), [], "is empty"),
        (images_at(LEVELS), ["pgd"], "attack should be one of"),
        (images_at(LEVELS), ["pgd-0"], "attack should be one of"),
        (
            torch.utils.data.TensorDataset(torch.rand(2, 3, 4, 4), torch.tensor([0, 2])),
            [],
            "labels should be in 0..1. Found 2",
        ),
        (torch.utils.data.TensorDataset(torch.rand(2, 3, 4, 4), torch.tensor([0, -1])), [], "should not be negative"),
        (
            torch.utils.data.TensorDataset(torch.rand(2, 3, 4, 4) - 1, torch.tensor([0, 0])),
            ["fgsm"],
            "images should lie in",
        ),
        (
            torch.utils.data.TensorDataset(torch.rand(2, 3, 4, 4) * 255, torch.tensor([0, 0])),
            [],
            "images should lie in",
        ),
        (torch.utils.data.TensorDataset(torch.ones(2, 3, 4, 4).long(), torch.tensor([0, 0])), [], "uint8 or floating"),
    ],
)
def test_bad_input(data, attacks, message):
    with pytest.raises(ValueError, match=message):
        rp.evaluate(Brightness(), data, [THREAT], attacks)
