"""The evaluator: verdicts are counted over samples, and nothing but a confirmed success counts against the model."""

import json
import random

import numpy as np
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

    monkeypatch.setattr(evaluator, "make_attack", lambda name, threat, **options: Cheat)
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
    args = (
        model,
        data,
        [rp.ThreatModel("l2", 0.3)],
        ["pgd-3", "apgd-ce-5", "t-apgd-dlr-5", "t-pgd-3", "t-fab-3", "square-20"],
    )
    assert rp.evaluate(*args, batch_size=batch_size) == rp.evaluate(*args, batch_size=7)


def test_an_attacks_figure_does_not_depend_on_its_company():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    data = ImageSet(
        torch.rand(40, 3, 4, 4, generator=torch.Generator().manual_seed(3)), torch.arange(40) % 2, ("a", "b")
    )
    alone = rp.evaluate(model, data, [THREAT], ["pgd-1"])
    among = rp.evaluate(model, data, [WIDER, THREAT], ["fgsm", "clean", "pgd-2", "pgd-1"], each=True)
    assert alone.find("pgd-1", THREAT) == among.find("pgd-1", THREAT)


def test_uint8_and_float_images_give_the_same():
    images = (torch.tensor(LEVELS) * 255).round().to(torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4).clone()
    labels = (torch.tensor(LEVELS) > 0.5).long()
    as_bytes = ImageSet(images, labels, ("a", "b"), "x")
    as_floats = ImageSet(images.float() / 255, labels, ("a", "b"), "x")
    reports = [rp.evaluate(Brightness(), data, [THREAT], ["pgd-2"]) for data in (as_bytes, as_floats)]
    assert reports[0] == reports[1]


def test_a_loaders_dataset_is_taken_in_order():
    data = images_at(LEVELS)
    shuffled = DataLoader(data, batch_size=2, shuffle=True)
    model = Brightness()
    assert rp.evaluate(model, shuffled, [THREAT], ["fgsm"]) == rp.evaluate(model, data, [THREAT], ["fgsm"])


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


# --- several attacks ---


def three_classes(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)


def noise(count=40, dtype=torch.float32, shape=(3, 4, 4)):
    images = torch.rand(count, *shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    return ImageSet(images, torch.arange(count) % 3, ("a", "b", "c"), "noise")


def test_a_broken_sample_is_spared_the_next_attacks_unless_each_is_asked():
    names = ["fgsm", "pgd-5", "apgd-ce-10"]
    spared = rp.evaluate(three_classes(), noise(), [THREAT], names)
    each = rp.evaluate(three_classes(), noise(), [THREAT], names, each=True)
    assert spared.find("fgsm", THREAT).verdicts == each.find("fgsm", THREAT).verdicts  # the first attack
    broken = [i for i, v in enumerate(spared.find("fgsm", THREAT).verdicts) if v == "0"]
    wrong = [i for i, v in enumerate(spared.find("clean", None).verdicts) if v == "0"]
    later = spared.find("apgd-ce-10", THREAT)
    assert len(broken) > len(wrong) > 0
    assert {i for i, v in enumerate(later.verdicts) if v == "."} >= set(broken) - set(wrong)
    assert all(later.verdicts[i] == "0" for i in wrong)
    assert later.forwards < each.find("apgd-ce-10", THREAT).forwards
    assert not later.own and each.find("apgd-ce-10", THREAT).own
    # The randomness is each sample's own, so what is tried gives the same verdict in any company.
    assert spared.worst_case(THREAT) == each.worst_case(THREAT) == later.accuracy
    assert "after apgd-ce-10" in str(spared) and "after" not in str(each)


def test_the_mean_over_attacks_needs_each_attacks_own_figure():
    names = ["fgsm", "pgd-5"]
    with pytest.raises(ValueError, match=r"evaluate with each=True \(pgd-5\)"):
        rp.evaluate(three_classes(), noise(), [THREAT], names).adversarial_mean_accuracy()
    report = rp.evaluate(three_classes(), noise(), [THREAT, WIDER], names, each=True)
    figures = [report[t, n].accuracy for t in (THREAT, WIDER) for n in names]
    assert report.adversarial_mean_accuracy() == pytest.approx(sum(figures) / 4)
    assert report.adversarial_mean_accuracy([WIDER]) == pytest.approx(sum(figures[2:]) / 2)


def test_an_ensemble_has_a_verdict_for_each_component():
    report = rp.evaluate(three_classes(), noise(), [THREAT], ["autoattack-5"])
    whole = report.find("autoattack-5", THREAT)
    assert [row.attack for row in whole.components] == ["apgd-ce-5", "t-apgd-dlr-5", "t-fab-5", "square"]
    broken: set[int] = set()
    for row in whole.components:
        own = {i for i, v in enumerate(row.verdicts) if v == "0"}
        assert all(row.verdicts[i] == "." for i in broken - own)
        broken |= own
    assert broken == {i for i, v in enumerate(whole.verdicts) if v == "0"}
    assert whole.accuracy == whole.components[-1].accuracy and whole.own
    assert whole.forwards == sum(row.forwards for row in whole.components) > 0
    alone = rp.evaluate(three_classes(), noise(), [THREAT], ["apgd-ce-5"])
    assert alone.find("apgd-ce-5", THREAT).verdicts == whole.components[0].verdicts
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_an_ensemble_after_its_own_component_does_not_run_it_twice():
    report = rp.evaluate(three_classes(), noise(), [THREAT], ["apgd-ce-5", "autoattack-5"])
    first = report.find("apgd-ce-5", THREAT)
    whole = report.find("autoattack-5", THREAT)
    assert whole.components[0] == first
    assert whole.own  # its verdicts are complete all the same: its first component is what had broken the others


def test_several_budgets_in_one_call_give_a_falling_curve():
    threats = [rp.ThreatModel("linf", eps) for eps in (0.0, 0.05, 0.1, 0.3)]
    report = rp.evaluate(three_classes(), noise(), threats, ["pgd-10"])
    curve = [report[threat, "pgd-10"].correct for threat in threats]
    assert curve[0] == report.clean.correct and curve == sorted(curve, reverse=True) and curve[-1] < curve[0]


def test_transfer_needs_a_second_model_and_only_that_ones_gradients():
    with pytest.raises(ValueError, match="transfer needs a second model"):
        rp.evaluate(Brightness(), images_at(LEVELS), [WIDER], ["transfer"])
    other = Brightness()
    other.scale.data.fill_(3.0)
    report = rp.evaluate(Brightness(), images_at(LEVELS), [WIDER], ["transfer-10"], transfer_from=other)
    assert report.find("transfer-10", WIDER).correct == (True, False, False, False, True, False)  # as white-box attacks
    assert report.find("transfer-10", WIDER).forwards == 0


def test_a_suite_depends_on_the_norm():
    l2 = rp.ThreatModel("l2", 0.3)
    report = rp.evaluate(three_classes(), noise(3), [THREAT, l2], suite="paper-official-code", each=True)
    assert report.find("mifgsm@2/255", THREAT).own
    assert report.find("t-pgd-10@2/225", l2).own
    with pytest.raises(ValueError, match="suite should be one of paper, paper-official-code"):
        rp.evaluate(three_classes(), noise(3), [THREAT], suite="all")


# --- precision ---


class BlindInHalf(Brightness):
    """In bfloat16 it is wrong about everything; in float32 it is as robust as `Brightness`."""

    def __init__(self):
        super().__init__()
        self.sensor = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.sensor.weight)

    def forward(self, images):
        sign = -1.0 if self.sensor.weight.dtype == torch.bfloat16 else 1.0
        return sign * super().forward(images)


BY_SEARCH = ["pgd-5", "pgd-5x3", "apgd-ce-10", "t-apgd-dlr-10", "t-pgd-5", "square-50", "t-fab-5"]


@pytest.mark.parametrize("attack", BY_SEARCH)
def test_a_success_in_bfloat16_counts_only_where_float32_confirms_it(attack):
    data = images_at(LEVELS)
    plain = rp.evaluate(Brightness(), data, [rp.ThreatModel("linf", 1e-6)], [attack])
    blind = rp.evaluate(BlindInHalf(), data, [rp.ThreatModel("linf", 1e-6)], [attack], precision="bf16")
    assert plain.worst_case(rp.ThreatModel("linf", 1e-6)) == Accuracy(6, 6)
    assert blind.worst_case(rp.ThreatModel("linf", 1e-6)) == Accuracy(6, 6)


def test_the_search_in_bfloat16_is_as_good_where_the_margin_is_clear():
    data = images_at(LEVELS)
    for attack in ("pgd-5", "apgd-ce-10", "square-200"):
        reports = [rp.evaluate(Brightness(), data, [WIDER], [attack], precision=p) for p in ("fp32", "bf16")]
        assert reports[0].find(attack, WIDER).verdicts == reports[1].find(attack, WIDER).verdicts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_other_precisions_are_measured_as_they_are(dtype):
    report = rp.evaluate(three_classes(dtype), noise(), [THREAT], ["pgd-3", "square-20"])
    plain = rp.evaluate(three_classes(), noise(), [THREAT], ["pgd-3", "square-20"])
    assert abs(report.worst_case(THREAT).correct - plain.worst_case(THREAT).correct) <= 1
    if dtype != torch.float32:
        with pytest.raises(ValueError, match='precision="bf16" is for float32 models'):
            rp.evaluate(three_classes(dtype), noise(), [THREAT], ["pgd-3"], precision="bf16")


class NearlyRight(Brightness):
    """In bfloat16 it is wrong from the start; in float32 it gives way to who goes on searching."""

    def __init__(self):
        super().__init__()
        self.sensor = nn.Linear(1, 1, bias=False)

    def forward(self, images):
        third = 30.0 if self.sensor.weight.dtype == torch.bfloat16 else -30.0
        return torch.cat([super().forward(images), torch.full((len(images), 1), third)], dim=1)


@pytest.mark.parametrize("attack", ["pgd-5x3", "apgd-ce-10", "apgd-dlr-10", "t-apgd-ce-10", "t-pgd-5"])
def test_a_false_success_in_bfloat16_does_not_end_the_search(attack):
    # What float32 does not confirm is attacked on: without that every one of these would stop at once, at the image.
    data = images_at(LEVELS)
    found = rp.evaluate(NearlyRight(), data, [WIDER], [attack], precision="bf16")
    assert found.find(attack, WIDER).verdicts == "100010"
    assert "Searched in bf16, judged in float32." in str(found)


# --- random models ---


class Noisy(Brightness):
    def forward(self, images):
        logits = super().forward(images)
        return logits + 3 * torch.randn_like(logits)


def test_a_random_model_is_judged_by_its_mean_and_said_to_be_random():
    data = images_at([0.1, 0.2, 0.3, 0.7, 0.8, 0.9] * 10)
    nothing = rp.ThreatModel("linf", 0.0)
    report = rp.evaluate(Noisy(), data, [nothing], ["fgsm", "pgd-2", "pgd-3", "autoattack-rand-2"])
    # At a budget of 0 nothing is to be gained, however many attacks draw again.
    assert report.clean.correct >= 59 and report.worst_case(nothing).correct >= 57
    assert report.randomised and "The model is random" in str(report)
    assert not rp.evaluate(Brightness(), data, [nothing], ["fgsm"]).randomised


# --- batches that couple their samples ---


def batch_normalised():
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(16, track_running_stats=False)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 16), norm, nn.Tanh(), nn.Linear(16, 3))


def test_under_batch_statistics_batches_are_fixed_and_nobody_leaves_them(tmp_path):
    model, data = batch_normalised(), noise(23)
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    report = rp.evaluate(model, data, [THREAT], ["pgd-3", "apgd-ce-5", "square-9"], batch_size=10)
    assert report.fixed_batches == 10 and "ordered batches of 10" in str(report)
    assert set(seen) == {10, 3}
    # The clean verdicts are those of the ordered batches.
    with torch.no_grad():
        right = torch.cat([model(part).argmax(1) for part in data.images.split(10)]) == data.labels
    assert report.find("clean", None).correct == tuple(right.tolist())
    assert rp.evaluate(three_classes(), noise(23), [THREAT], ["fgsm"]).fixed_batches is None
    source = rp.evaluate(three_classes(), noise(23), [THREAT], ["transfer-2"], transfer_from=model, batch_size=10)
    assert source.fixed_batches == 10
    for refused in ({"precision": "bf16"}, {"save_images": True, "output": tmp_path}):
        with pytest.raises(ValueError, match="cannot be judged alone"):
            rp.evaluate(model, data, [THREAT], ["fgsm"], **refused)


def test_autoattack_of_a_coupled_batch_keeps_it_whole():
    model, data = batch_normalised(), noise(20)
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    rp.attacks.AutoAttack(rp.ThreatModel("linf", 0.02))(model, data.images, data.labels)
    assert set(seen) == {20}


# --- what people bring ---


@pytest.mark.parametrize("attack", ["pgd-5", "pgd-5x2", "t-pgd-5", "apgd-ce-5", "square-50", "t-fab-5"])
def test_an_answer_that_is_no_number_is_wrong_also_for_class_0(attack):
    class Fragile(Brightness):
        def forward(self, images):
            logits = super().forward(images)
            return torch.where((images.flatten(1).mean(dim=1) > 0.42)[:, None], torch.nan, logits)

    data = images_at([0.4, 0.35, 0.1])
    assert rp.evaluate(Fragile(), data, [THREAT], [attack]).find(attack, THREAT).verdicts == "001"


def test_a_model_that_cuts_the_graph_is_attacked_on_without_gradients():
    class Cut(Brightness):
        def forward(self, images):
            return super().forward(images.detach()).detach()

    report = rp.evaluate(Cut(), images_at(LEVELS), [WIDER], ["pgd-3", "autoattack-5"])
    assert report.find("autoattack-5", WIDER).finished
    assert report.find("autoattack-5", WIDER).components[-1].accuracy.correct < 6  # Square needs none


def test_infinite_logits_are_refused():
    class Masked(Brightness):
        def forward(self, images):
            return torch.cat([super().forward(images), torch.full((len(images), 1), -torch.inf)], dim=1)

    with pytest.raises(ValueError, match="give masked classes a large negative logit"):
        rp.evaluate(Masked(), images_at(LEVELS), [THREAT], ["fgsm"])


def test_a_loader_that_chooses_samples_is_refused():
    data = images_at(LEVELS)
    chosen = DataLoader(data, sampler=torch.utils.data.SubsetRandomSampler([0, 1]))
    with pytest.raises(ValueError, match=r"give it the samples to measure as a dataset \(torch.utils.data.Subset\)"):
        rp.evaluate(Brightness(), chosen, [THREAT], ["fgsm"])
    assert rp.evaluate(Brightness(), torch.utils.data.Subset(data, [0, 1]), [THREAT], ["fgsm"]).clean.total == 2


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"batch_size": -1}, {"limit": 0}, {"limit": -5}])
def test_numbers_are_checked(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} should be an integer of at least 1. Found {name} = "):
        rp.evaluate(Brightness(), images_at(LEVELS), [THREAT], ["fgsm"], **wrong)


def test_a_suite_stands_in_place_of_attacks():
    with pytest.raises(ValueError, match="suite stands in place of attacks"):
        rp.evaluate(Brightness(), images_at(LEVELS), [THREAT], ["fgsm"], suite="paper")


def test_results_are_found_by_alias():
    report = rp.evaluate(three_classes(), noise(4), [THREAT], ["AutoPGD-CE", "mifgsm-10"])
    assert report[THREAT, "autopgd"] == report[THREAT, "apgd-ce"]
    assert report[THREAT, "MI-FGSM"] == report[THREAT, "mifgsm"]


class Grey(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(16, 3)

    def forward(self, images):
        return self.layer(images.flatten(1))


SHORT = ["fgsm", "pgd-2", "t-pgd-2", "apgd-ce-3", "t-apgd-dlr-3", "t-fab-3", "square-5"]


def test_grey_images():
    report = rp.evaluate(Grey(), noise(9, shape=(1, 4, 4)), [THREAT, rp.ThreatModel("l2", 0.3)], SHORT)
    assert report.finished


@pytest.mark.parametrize("count", [1, 2])
def test_very_few_samples(count):
    report = rp.evaluate(three_classes(), noise(count), [THREAT, rp.ThreatModel("l2", 0.3)], SHORT)
    assert report.clean.total == count


@pytest.mark.parametrize("classes", [2, 3, 200])
def test_two_three_and_many_classes(classes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, classes))
    images = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        labels = model(images).argmax(dim=1)
    data = ImageSet(images, labels, tuple(str(i) for i in range(classes)))
    names, threat = [*SHORT, "fab-3"] if classes < 200 else SHORT, rp.ThreatModel("linf", 0.5)
    report = rp.evaluate(model, data, [threat], [*names, "autoattack-5"], each=True)
    # Linear and unprotected, and the budget reaches the grey image: who finds the gradient breaks everybody.
    assert report.find("autoattack-5", threat).accuracy.correct == 0


@pytest.mark.parametrize("layout", ["non-contiguous", "channels_last"])
def test_memory_layouts_change_nothing(layout):
    data = noise(9)
    images = data.images
    if layout == "channels_last":
        other = images.to(memory_format=torch.channels_last)
    else:
        other = images.transpose(2, 3).contiguous().transpose(2, 3)
    assert not other.is_contiguous() and torch.equal(other, images)
    reports = [
        rp.evaluate(three_classes(), ImageSet(x, data.labels, data.classes, "noise"), [THREAT], SHORT)
        for x in (images, other)
    ]
    assert [r.verdicts for r in reports[0].results] == [r.verdicts for r in reports[1].results]


def test_rounding_outside_the_box_is_accepted_and_more_is_refused():
    data = noise(6)
    images = data.images.clone()
    images[0, 0, 0, 0], images[1, 0, 0, 0] = 1 + 1e-6, -1e-6
    slack = ImageSet(images, data.labels, data.classes, "noise")
    assert rp.evaluate(three_classes(), slack, [THREAT], SHORT).finished
    images[0, 0, 0, 0] = 1.1
    beyond = ImageSet(images, data.labels, data.classes, "noise")
    with pytest.raises(ValueError, match="normalisation belongs inside the model"):
        rp.evaluate(three_classes(), beyond, [THREAT], ["fgsm"])


# --- what is the caller's stays as it was ---

EVERY = {
    "linf": ["fgsm", "pgd-2x2", "t-pgd-2", "mifgsm-2", "apgd-ce-3", "apgd-dlr-3", "t-apgd-ce-3", "t-apgd-dlr-3",
             "fab-2", "t-fab-2", "square-5", "autoattack-2", "autoattack-rand-2", "cw-2", "transfer-3"],
    "l2": ["cw-2", "ddn-2", "t-fab-2", "square-5"],
}  # fmt: skip


class Dropping(nn.Module):
    """Half in train mode, half frozen, with a gradient of its own; raises in its so many-th forward pass."""

    def __init__(self, raise_at=None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.drop, self.second = nn.Linear(48, 16), nn.Dropout(0.5), nn.Linear(16, 3)
        self.drop.eval()
        self.second.requires_grad_(False)
        self.first.weight.grad = torch.ones_like(self.first.weight)
        self.left = raise_at

    def forward(self, images):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise ZeroDivisionError("the model's own mistake")
        return self.second(self.drop(self.first(images.flatten(1)).tanh()))


def state_of(model):
    parameters = [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    return modes, parameters, torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()


def same(one, other):
    grads = [(a, b) for (_, a), (_, b) in zip(one[1], other[1], strict=True)]
    return (
        one[0] == other[0]
        and [flag for flag, _ in one[1]] == [flag for flag, _ in other[1]]
        and all((a is None and b is None) or torch.equal(a, b) for a, b in grads)
        and torch.equal(one[2], other[2])
        and (one[3] == other[3]).all()
        and one[4] == other[4]
        and not torch.is_inference_mode_enabled()
        and torch.is_grad_enabled()
    )


@pytest.mark.parametrize(("norm", "attack"), [(norm, name) for norm, names in EVERY.items() for name in names])
@pytest.mark.parametrize("raising", [False, True])
def test_model_and_random_states_are_left_as_they_were(norm, attack, raising):
    model, source = Dropping(3 if raising else None), Dropping(0 if raising and "transfer" in attack else None)
    before = [state_of(model), state_of(source)]
    arguments = (model, noise(8), [rp.ThreatModel(norm, 0.05)], [attack])
    if raising:
        with pytest.raises(ZeroDivisionError, match="the model's own mistake"):
            rp.evaluate(*arguments, transfer_from=source)
    else:
        rp.evaluate(*arguments, transfer_from=source)
    assert same(before[0], state_of(model)) and same(before[1], state_of(source))


def test_every_attack_is_among_those():
    from robust_peft.attacks import ENTRIES
    from robust_peft.attacks.suite import parse_attack_name

    tried = {parse_attack_name(name).entry.name for names in EVERY.values() for name in names}
    assert tried == {entry.name for entry in ENTRIES} - {"clean"}
