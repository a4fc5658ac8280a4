"""The audit fires on every fault that it is for, names the check that finds it, and leaves sound models alone.

Each fault is put in front of or behind one small network that was trained in the session; beside each stands its sound
twin, the same network without the fault, on which the same check must pass. The thresholds are the package's.
"""

import builtins
import copy
import dataclasses
import importlib
import io
import json
import random
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import robust_peft as rp
from robust_peft.attacks import FGSM, PGD
from robust_peft.data import ImageSet
from robust_peft.evaluation import Audit, audit
from robust_peft.evaluation.checks import QUESTIONS
from robust_peft.evaluation.checks.finding import STATUSES
from robust_peft.results import Accuracy

audit_module = importlib.import_module("robust_peft.evaluation.audit")  # as an attribute that name is the function
THREAT = rp.ThreatModel("linf", 0.1)
COUNT = 64
CIFAR = Path(__file__).parents[3] / "shared" / "data" / "cifar10" / "test.parquet"


def network(batch_norm=None):
    """A convolutional network for digits; batch_norm is None, "running" or "batch" (statistics)."""
    norms = [
        [] if batch_norm is None else [nn.BatchNorm2d(c, track_running_stats=batch_norm != "batch")] for c in (16, 32)
    ]
    return nn.Sequential(
        nn.Conv2d(3, 16, 4, 2, 1), *norms[0], nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), *norms[1], nn.ReLU(),
        nn.Flatten(), nn.Linear(2048, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def trained(model, data, prepare=None, epochs=2):
    """The model after two epochs of ordinary training, in eval mode."""
    generator = torch.Generator().manual_seed(0)
    images, labels = data.images.float() / 255, data.labels
    if prepare is not None:
        images = prepare(images)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=generator).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    return model.eval()


def seeded(batch_norm=None):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return network(batch_norm)


@pytest.fixture(scope="session")
def digits():
    return rp.data.digits()


@pytest.fixture(scope="session")
def undefended(digits):
    return trained(seeded(), digits.train)


@pytest.fixture(scope="session")
def with_running_statistics(digits):
    return trained(seeded("running"), digits.train)


@pytest.fixture
def test_set(digits):
    return digits.test.subset(torch.arange(COUNT), "digits")


# -- faults ------------------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    def forward(self, logits):
        return 1e4 * logits


class Rounded(nn.Module):
    """Pixels in 16 levels. Its gradient is zero, or, with straight_through, that of a layer that does nothing."""

    def __init__(self, straight_through=False, levels=15):
        super().__init__()
        self.straight_through, self.levels = straight_through, levels

    def forward(self, images):
        rounded = (images * self.levels).round() / self.levels
        return images + (rounded - images).detach() if self.straight_through else rounded


class Jpeg(nn.Module):
    def __init__(self, straight_through=False):
        super().__init__()
        self.straight_through = straight_through

    @staticmethod
    def coded(image):
        pixels = (image * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
        file = io.BytesIO()
        Image.fromarray(pixels.numpy()).save(file, "jpeg", quality=75)
        return torch.from_numpy(numpy.asarray(Image.open(file)).copy()).permute(2, 0, 1) / 255

    def forward(self, images):
        coded = torch.stack([self.coded(image) for image in images.detach()]).to(images)
        return images + (coded - images).detach() if self.straight_through else coded


class Noisy(nn.Module):
    def forward(self, images):
        return images + 0.1 * torch.randn_like(images)


class _NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images):
        return images.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.zeros_like(grad)


class Masked(nn.Module):
    def forward(self, images):
        return _NoBackward.apply(images)


class _BackwardOnLevels(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images):
        ctx.save_for_backward(images)
        return images.clone()

    @staticmethod
    def backward(ctx, grad):
        (images,) = ctx.saved_tensors
        clean = ((images * 255).round() - images * 255).abs().flatten(1).amax(dim=1) < 1e-3
        return grad * clean.reshape(-1, 1, 1, 1)


class MaskedOffTheImages(nn.Module):
    """Gradients at images of whole 8-bit levels only: the first step finds its way, the second one does not."""

    def forward(self, images):
        return _BackwardOnLevels.apply(images)


# fault -> (what stands before the network, what behind it, the check that must fail)
FAULTS = {
    "logits times 1e4": (None, Scaled(), "saturated cross-entropy"),
    "softmax outputs": (None, nn.Softmax(dim=1), "probabilities"),
    "rounding": (Rounded(), None, "zero gradients"),
    "rounding, straight through": (Rounded(True), None, "wrong gradients"),
    "rounding to 8 bits, straight through": (Rounded(True, 255), None, "wrong gradients"),
    "jpeg": (Jpeg(), None, "zero gradients"),
    "jpeg, straight through": (Jpeg(True), None, "wrong gradients"),
    "noise": (Noisy(), None, "randomised outputs"),
    "zeroed backward pass": (Masked(), None, "zero gradients"),
    "zeroed backward pass, seen by the black box": (Masked(), None, "black box"),
    "zeroed backward pass, seen at a large budget": (Masked(), None, "large budget"),
    "gradients at the images alone": (MaskedOffTheImages(), None, "single step"),
}


def with_fault(name, model):
    before, behind, check = FAULTS[name]
    return nn.Sequential(*[part for part in (before, model, behind) if part is not None]).eval(), check


@pytest.mark.parametrize("fault", FAULTS)
def test_the_audit_fires(fault, undefended, test_set):
    faulty, check = with_fault(fault, undefended)
    found = audit(faulty, test_set, THREAT, checks=[check])
    assert [c.name for c in found.failed] == [check], found[check]
    assert check in found.verdict and "cannot be believed" in found.verdict


@pytest.mark.parametrize("check", sorted({check for _, _, check in FAULTS.values()}))
def test_the_same_check_passes_without_the_fault(check, undefended, test_set):
    assert audit(undefended, test_set, THREAT, checks=[check])[check].status == "passed"


def test_the_audit_fires_on_batch_statistics(digits, with_running_statistics, test_set):
    on_batches = trained(seeded("batch"), digits.train, epochs=1)
    found = audit(on_batches, test_set, THREAT, limit=24)
    assert "batch company" in [c.name for c in found.failed]
    assert found["wrong gradients"].status == "not run"  # nobody's gradient is its own there
    assert audit(with_running_statistics, test_set, THREAT, checks=["batch company"]).failed == []


def test_dependence_on_the_batch_is_found_without_a_batch_norm(undefended, test_set):
    class Centred(nn.Module):
        def forward(self, images):
            return images - 0.1 * images.mean(dim=0, keepdim=True)

    found = audit(nn.Sequential(Centred(), undefended).eval(), test_set, THREAT, checks=["batch company"])
    assert [c.name for c in found.failed] == ["batch company"]


@pytest.mark.parametrize("threat", [THREAT, rp.ThreatModel("l2", 1.0)], ids=str)
def test_the_audit_fires_on_an_attack_that_cannot_reach_its_budget(undefended, test_set, threat):
    short = PGD(threat, 10, step_size=threat.eps / 20)
    found = audit(undefended, test_set, threat, attack=short, checks=["reach"])
    assert [c.name for c in found.failed] == ["reach"]
    assert found["reach"].numbers["reach"] == pytest.approx(threat.eps / 2)
    enough = PGD(threat, 10, step_size=threat.eps / 10)
    assert audit(undefended, test_set, threat, attack=enough, checks=["reach"])["reach"].status == "passed"


def test_an_attack_whose_steps_are_unknown_is_measured(undefended, test_set):
    @dataclasses.dataclass(frozen=True)
    class Timid:
        threat: rp.ThreatModel
        part: float

        def perturb(self, model, images, labels, *, keys):
            return self.threat.project(images + self.part * self.threat.eps * torch.sign(0.5 - images), images)

    for part, status in ((0.5, "failed"), (1.0, "passed"), (0.0, "not run")):
        found = audit(undefended, test_set, THREAT, attack=Timid(THREAT, part), checks=["reach"])
        assert found["reach"].status == status
        assert found.figure is not None and found.figure.correct > COUNT / 2


def test_an_attack_that_leaves_the_ball_is_a_fault_and_breaks_nothing(undefended, test_set):
    class Cheat:
        threat = THREAT

        def perturb(self, model, images, labels, *, keys):
            return 1 - images

    found = audit(undefended, test_set, THREAT, attack=Cheat(), checks=["reach"])
    assert [c.name for c in found.failed] == ["reach"] and "outside the ball" in found["reach"].evidence
    assert found.figure == found.clean


@pytest.mark.parametrize("seen", [0, 1, COUNT // 2, COUNT])
@pytest.mark.parametrize("as_floats", [False, True])
def test_the_audit_fires_on_train_images(digits, undefended, test_set, seen, as_floats):
    """One in 64 is more than the 1 % that public sets have."""
    images = torch.cat([digits.train.images[:seen], test_set.images[seen:]])
    labels = torch.cat([digits.train.labels[:seen], test_set.labels[seen:]])
    data = ImageSet(images.float() / 255 if as_floats else images, labels, digits.train.classes, "mixed")
    found = audit(undefended, data, THREAT, train_data=digits.train, checks=["train images"])
    assert found["train images"].status == ("failed" if seen else "passed")
    assert found["train images"].numbers["seen"] == seen


def test_few_train_images_are_a_warning_and_other_sizes_are_said(digits, undefended):
    images = torch.cat([digits.train.images[:1], digits.test.images[:149]])
    labels = torch.cat([digits.train.labels[:1], digits.test.labels[:149]])
    data = ImageSet(images, labels, digits.train.classes)
    args = (undefended, data, THREAT)
    assert audit(*args, train_data=digits.train, checks=["train images"])["train images"].status == "warning"
    smaller = TensorDataset(digits.train.images[:5, :, 2:, 2:], digits.train.labels[:5])
    assert audit(*args, train_data=smaller, checks=["train images"])["train images"].status == "not run"
    assert audit(*args, checks=["train images"])["train images"].status == "not run"


def test_the_audit_fires_on_an_attack_that_is_not_done(undefended, test_set):
    found = audit(undefended, test_set, THREAT, attack="pgd-10@0.002", checks=["more steps or restarts"])
    assert [c.name for c in found.failed] == ["more steps or restarts"]
    args = (undefended, test_set, THREAT)
    assert audit(*args, attack="pgd-20", checks=["more steps or restarts"])["more steps or restarts"].status == "passed"


@pytest.mark.parametrize(("mean", "std"), [((0.5,) * 3, (0.5,) * 3), ((0.0,) * 3, (1 / 255,) * 3)])
def test_the_audit_fires_on_normalisation_outside_the_model(digits, mean, std):
    data = digits.test.subset(torch.arange(150), "digits")
    inside = rp.Normalized(seeded(), mean, std)
    trained(inside, digits.train, epochs=1)
    found = audit(inside.backbone, data, THREAT, checks=["normalisation"])
    assert [c.name for c in found.failed] == ["normalisation"]
    assert audit(inside, data, THREAT, checks=["normalisation"])["normalisation"].status == "passed"


def test_normalised_images_are_a_fault_and_not_attacked(undefended, test_set):
    data = TensorDataset((test_set.images.float() / 255 - 0.13) / 0.31, test_set.labels)
    found = audit(undefended, data, THREAT)
    assert [c.name for c in found.failed] == ["normalisation"]
    assert "were normalised before" in found["normalisation"].evidence
    assert found.figure is None and found["single step"].status == "not run" and not found.budgets
    within_rounding = TensorDataset(test_set.images.float() / 255 + 1e-6, test_set.labels)
    assert audit(undefended, within_rounding, THREAT, checks=["normalisation"])["normalisation"].status == "passed"


def test_images_in_a_corner_of_the_box_are_a_warning(undefended, test_set):
    data = TensorDataset(test_set.images.float() / 255 / 255, test_set.labels)
    found = audit(undefended, data, THREAT, checks=["normalisation"])["normalisation"]
    assert found.status in ("warning", "failed") and "small part of the box" in found.evidence


def test_train_mode_is_a_warning_that_names_what_it_changes(test_set, undefended):
    model = nn.Sequential(nn.Dropout(0.5), undefended)
    for module in (model, model[0]):
        module.training = True
    found = audit(model, test_set, THREAT, checks=["train mode"])
    assert [c.name for c in found.warnings] == ["train mode"]
    assert "2 submodules" in found["train mode"].evidence and "0 (Dropout)" in found["train mode"].evidence
    assert model.training and model[0].training and not undefended.training


def test_transfer_finds_what_masked_gradients_hide(undefended, test_set):
    masked, _ = with_fault("zeroed backward pass", undefended)
    found = audit(masked, test_set, THREAT, transfer_from=undefended, checks=["black box"])["black box"]
    assert found.status == "failed"
    assert found.numbers["each"]["transfer"] > COUNT / 2


def test_a_saturated_loss_is_a_warning_where_the_attack_does_without_it(undefended, test_set):
    faulty, check = with_fault("logits times 1e4", undefended)
    by_margin = PGD(THREAT, 20, objective="dlr")
    found = audit(faulty, test_set, THREAT, attack=by_margin, checks=[check])
    assert found[check].status == "warning" and "does not suffer" in found[check].evidence


def test_log_probabilities_are_logits(undefended, test_set):
    model = nn.Sequential(undefended, nn.LogSoftmax(dim=1)).eval()
    found = audit(model, test_set, THREAT, checks=["probabilities"])["probabilities"]
    assert found.status == "passed" and "log-probabilities" in found.evidence
    squashed = nn.Sequential(undefended, nn.Sigmoid()).eval()
    assert audit(squashed, test_set, THREAT, checks=["probabilities"])["probabilities"].status == "warning"


# -- sound models ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def whole(digits, undefended):
    data = digits.test.subset(torch.arange(COUNT), "digits")
    return audit(undefended, data, THREAT, seed=3, train_data=digits.train)


def test_silent_on_an_undefended_network(whole):
    assert whole.verdict == f"No check failed ({len(QUESTIONS)} passed, 0 warnings, 0 not run).", str(whole)
    assert whole.failed == whole.warnings == whole.not_run == [] and len(whole.passed) == len(QUESTIONS)


def test_silent_on_an_undefended_network_under_l2(digits, undefended, test_set):
    found = audit(undefended, test_set, rp.ThreatModel("l2", 1.5), limit=32, train_data=digits.train)
    assert len(found.passed) == len(QUESTIONS), str(found)


def test_silent_on_the_network_trained_on_digits_adversarially(mnist_convnet, digits):
    found = audit(mnist_convnet, digits.test, rp.ThreatModel("linf", 0.3), limit=40, train_data=digits.train)
    assert found.failed == [] and found.not_run == [], found


@pytest.mark.slow
def test_silent_on_the_network_trained_on_digits_adversarially_at_length(mnist_convnet, digits):
    """Its warning is a true one, of the audited attack: one start of PGD-20 is not all that gradients can do here.

    Square breaks a few samples that it left standing; so do more steps and further starts, and more of them.
    """
    found = audit(mnist_convnet, digits.test, rp.ThreatModel("linf", 0.3), train_data=digits.train)
    assert found.failed == [] and found.not_run == [], found
    assert {check.name for check in found.warnings} <= {"black box"}, found
    gained = found["more steps or restarts"].numbers
    assert gained["audited"] - gained["both"] >= found["black box"].numbers["broken_beyond"]


def test_silent_on_the_embedded_backbone_where_it_is_right(digits):
    """The twin of the next test, with images that the package has: digits, with the model's own answers for labels."""
    model = rp.load_backbone("micro_swin").eval()
    images = digits.test.images[:10]
    with torch.no_grad():
        labels = model(images.float() / 255).argmax(dim=1)
    data = ImageSet(images, labels, tuple("0123456789"))
    # What takes the most passes is left to the other test.
    quick = ["randomised outputs", "probabilities", "zero gradients", "wrong gradients", "reach", "batch company"]
    found = audit(model, data, rp.ThreatModel("linf", "8/255"), attack="pgd-5", checks=[*quick, "normalisation"])
    assert found.failed == [] and len(found.passed) == len(quick) + 1, found


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR.is_file(), reason="CIFAR-10's test images are not on this machine")
def test_silent_on_the_embedded_backbone():
    from robust_peft.data.catalog import parquet

    data = parquet(CIFAR, None, 0).train
    found = audit(rp.load_backbone("micro_swin").eval(), data, rp.ThreatModel("linf", "8/255"), limit=100)
    assert found.failed == [], found
    assert [check.name for check in found.not_run] == ["train images"]


# -- what comes out ----------------------------------------------------------------------------------------------------


def test_every_check_says_what_why_and_whence(whole):
    assert [check.name for check in whole.checks] == [question.name for question in QUESTIONS]
    for check in whole.checks:
        assert check.status in STATUSES and check.question.endswith("?")
        assert check.threshold.endswith(".") and any(letter.isdigit() for letter in check.threshold + check.source)
        assert check.evidence.endswith(".") and check.source
    assert whole["reach"].name == "reach"
    with pytest.raises(KeyError, match="no check 'arrive'. Found: randomised outputs"):
        whole["arrive"]


def test_the_figures_are_those_of_the_evaluation(whole, undefended, test_set):
    report = rp.evaluate(undefended, test_set, [THREAT], ["pgd-20"], seed=3)
    assert whole.clean == report.clean
    # The same attack with other random draws.
    assert abs(whole.figure.correct - report[THREAT, "pgd-20"].correct) <= 2
    assert whole.lowest.correct <= whole.figure.correct


def test_curves(whole):
    assert set(whole.steps) == {"ce", "dlr"}
    for values in whole.steps.values():
        assert len(values["ce"]) == len(values["margin"]) == len(values["standing"]) == 41
        assert values["standing"] == sorted(values["standing"], reverse=True)
        assert values["standing"][0] <= whole.clean.correct
    # It is what each of them climbs that rises.
    assert whole.steps["ce"]["ce"][-1] > whole.steps["ce"]["ce"][0]
    assert whole.steps["dlr"]["margin"][-1] > whole.steps["dlr"]["margin"][0]
    budgets = [eps for eps, _ in whole.budgets]
    assert budgets == sorted(budgets) and budgets[0] == 0 and THREAT.eps in budgets and budgets[-1] == 0.5
    assert whole.budgets[0][1] == whole.clean and whole.budgets[-1][1].correct == 0


def test_an_audit_survives_json(whole, tmp_path):
    whole.save(tmp_path / "audit.json")
    assert Audit.load(tmp_path / "audit.json") == whole
    values = json.loads((tmp_path / "audit.json").read_text())
    assert values["verdict"] == whole.verdict and values["figure"]["total"] == COUNT


def test_the_report_and_its_pictures(whole, tmp_path):
    path = whole.write(tmp_path)
    text = path.read_text(encoding="utf-8")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "accuracy_against_budget.png", "audit.json", "audit.md", "loss_against_step.png",
    ]  # fmt: skip
    assert whole.verdict in text and all(check.evidence in text for check in whole.checks)
    for name in ("accuracy_against_budget.png", "loss_against_step.png"):
        assert f"({name})" in text and (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_report_says_so(whole, tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *rest, **options):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    text = whole.write(tmp_path).read_text(encoding="utf-8")
    assert "pictures are left out" in text and 'pip install "robust_peft[plots]"' in text and ".png" not in text
    assert Audit.load(tmp_path / "audit.json") == whole


def test_text_has_the_verdict_first_and_every_check(whole):
    lines = str(whole).splitlines()
    assert lines[0] == whole.verdict
    assert all(any(line.startswith(f"  {check.name} ") for line in lines) for check in whole.checks)


def test_output_is_written(undefended, test_set, tmp_path):
    found = audit(undefended, test_set, THREAT, limit=8, checks=["probabilities"], output=tmp_path / "a", name="mine")
    assert Audit.load(tmp_path / "a" / "audit.json") == found and found.data == "mine"
    assert found["single step"].evidence == "It was not asked for."


def test_the_same_seed_gives_the_same_audit_whatever_the_batches(undefended, test_set):
    """In float64, where no verdict hangs on the rounding that the batch size changes."""
    args = (undefended.double(), test_set, THREAT)
    try:
        first, again, smaller = (
            audit(*args, limit=12, seed=1, batch_size=b, checks=["single step", "black box"]) for b in (12, 12, 5)
        )
    finally:
        undefended.float()
    assert first == again
    assert [c.numbers for c in first.checks] == [c.numbers for c in smaller.checks]
    assert first.lowest == smaller.lowest


# -- reports of an evaluation ------------------------------------------------------------------------------------------


def test_a_reports_verdicts_are_audited(undefended, test_set):
    name = "pgd-10@0.002"
    report = rp.evaluate(undefended, test_set, [THREAT], [name])
    found = audit(undefended, test_set, THREAT, attack=name, report=report, checks=["more steps or restarts"])
    assert found.figure == report[THREAT, name]
    assert [c.name for c in found.failed] == ["more steps or restarts"]


def test_a_report_of_something_else_is_refused(undefended, test_set, digits):
    report = rp.evaluate(undefended, test_set, [THREAT], ["fgsm"], limit=20)
    args = (undefended, test_set, THREAT)
    with pytest.raises(ValueError, match="a verdict on all of the 64 samples. Found 20"):
        audit(*args, attack="fgsm", report=report)
    with pytest.raises(KeyError, match="pgd-20 under L-inf 0.1 was not measured"):
        audit(*args, report=report, limit=20)
    with pytest.raises(ValueError, match="one of its names"):
        audit(*args, attack=FGSM(THREAT), report=report, limit=20)
    with pytest.raises(ValueError, match="differ from the report's on .* another model, or other samples"):
        audit(seeded().eval(), test_set, THREAT, attack="fgsm", report=report, limit=20)


# -- the model is left alone -------------------------------------------------------------------------------------------


class Breaking(nn.Module):
    """Raises at the n-th pass."""

    def __init__(self, model, at):
        super().__init__()
        self.model, self.at, self.passes = model, at, 0

    def forward(self, images):
        self.passes += 1
        torch.rand(1)  # uses the global generator, as a randomised model does
        if self.passes >= self.at:
            raise RuntimeError("the model broke")
        return self.model(images)


def state_of(model):
    return (
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()],
        {name: value.clone() for name, value in model.state_dict().items()},
    )


@pytest.mark.parametrize("breaks_at", [None, 1, 2, 30])
def test_the_model_and_the_random_states_are_left_as_they_were(with_running_statistics, test_set, breaks_at):
    model = Breaking(with_running_statistics, breaks_at or 10**9)
    model.train()
    with_running_statistics[1].eval()  # a mixture of modes and flags
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    parameters[1].grad = torch.ones_like(parameters[1])
    before = state_of(model)
    random.seed(5), numpy.random.seed(5), torch.manual_seed(5)
    states = (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state())
    try:
        if breaks_at == 1:
            with pytest.raises(RuntimeError, match="the model broke"):
                audit(model, test_set, THREAT, limit=16)
        else:
            found = audit(model, test_set, THREAT, limit=16)
            if breaks_at is not None:
                broken = [c for c in found.not_run if "the model broke" in c.evidence]
                assert broken and found.verdict.startswith(("No check failed", "The figure cannot"))
        after = state_of(model)
        assert after[0] == before[0] and after[1] == before[1]
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(after[2], before[2], strict=True))
        assert all(torch.equal(after[3][name], before[3][name]) for name in before[3])
        assert random.getstate() == states[0]
        assert numpy.random.get_state()[1].tolist() == states[1]
        assert torch.equal(torch.get_rng_state(), states[2])
    finally:
        model.eval()
        parameters[0].requires_grad_(True)
        parameters[1].grad = None


def test_one_broken_check_does_not_end_the_others(undefended, test_set, monkeypatch):
    def broken(bench):
        raise RuntimeError("out of memory")

    changed = [dataclasses.replace(q, measure=broken) if q.name == "reach" else q for q in QUESTIONS]
    monkeypatch.setattr(audit_module, "QUESTIONS", tuple(changed))
    found = audit(undefended, test_set, THREAT, limit=16, checks=["reach", "single step"])
    assert found["reach"].status == "not run" and found["reach"].evidence == "RuntimeError: out of memory."
    assert found["single step"].status == "passed"


def test_a_model_whose_gradient_raises_fails_for_that(undefended, test_set):
    class ByNumpy(nn.Module):
        def forward(self, images):
            return torch.from_numpy(images.numpy())

    model = nn.Sequential(ByNumpy(), undefended).eval()
    found = audit(model, test_set, THREAT, limit=16)
    assert [c.name for c in found.failed] == ["zero gradients"]
    assert "RuntimeError" in found["zero gradients"].evidence and found.figure is None


def test_under_no_grad_and_inference_mode_and_autocast(undefended, test_set):
    args = {"limit": 12, "checks": ["zero gradients", "wrong gradients"]}
    usual = audit(undefended, test_set, THREAT, **args)
    with torch.no_grad():
        assert audit(undefended, test_set, THREAT, **args) == usual
    with torch.inference_mode():
        assert audit(undefended, test_set, THREAT, **args) == usual
    with torch.autocast("cpu", torch.bfloat16):
        assert audit(undefended, test_set, THREAT, **args) == usual
    assert usual.failed == [] and len(usual.passed) == 2


# -- kinds of models and data ------------------------------------------------------------------------------------------


class Brightness(nn.Module):
    """Classes by mean brightness. It has no parameters, and takes grey images as well as coloured ones."""

    def __init__(self, classes):
        super().__init__()
        self.register_buffer("levels", (torch.arange(classes) + 0.5) / classes)

    def forward(self, images):
        return -40 * (images.flatten(1).mean(dim=1, keepdim=True) - self.levels).square()


@pytest.mark.parametrize("classes", [2, 3, 200])
@pytest.mark.parametrize("channels", [1, 3])
def test_few_and_many_classes_and_grey_images(classes, channels):
    labels = torch.arange(24) % classes
    images = ((labels + 0.5) / classes).reshape(-1, 1, 1, 1).expand(-1, channels, 4, 4)  # not contiguous
    found = audit(Brightness(classes), TensorDataset(images, labels), rp.ThreatModel("linf", 0.3 / classes))
    assert found.clean == Accuracy(24, 24)
    # Neighbouring classes meet half a width away, farther than the budget.
    assert found.lowest == Accuracy(24, 24)
    assert found.failed == [], found


def test_one_sample_and_no_right_one(undefended, test_set):
    one = audit(undefended, test_set, THREAT, limit=1)
    assert one["single step"].status == "not run" and "8 are needed" in one["single step"].evidence
    wrong = TensorDataset(test_set.images, (test_set.labels + 1) % 10)
    none = audit(undefended, wrong, THREAT, limit=4)
    assert none.clean.correct == 0 and none["zero gradients"].status == "not run"


class Autocast(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(images)


@pytest.mark.parametrize("kind", ["weights", "autocast"])
def test_half_precision(undefended, test_set, kind):
    model = copy.deepcopy(undefended).to(torch.bfloat16) if kind == "weights" else Autocast(undefended).eval()
    found = audit(model, test_set, THREAT, limit=24)
    assert found.failed == [], found
    assert found["wrong gradients"].status == "not run"


def test_a_loaders_dataset_is_taken_and_the_progress_is_shown(undefended, test_set, capsys):
    loader = DataLoader(test_set, batch_size=4, shuffle=True)
    args = {"limit": 16, "checks": ["probabilities"]}
    assert audit(undefended, loader, THREAT, progress=True, **args) == audit(undefended, test_set, THREAT, **args)
    assert "check" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit should be an integer of at least 1"),
        ({"batch_size": 0}, "batch_size should be"),
        ({"checks": ["reech"]}, "checks should be names out of randomised outputs, .*Found reech"),
        ({"attack": "pgd"}, "attack should be one of"),
        ({"attack": "clean"}, "nothing to audit"),
        ({"attack": "transfer"}, "needs a second model"),
        ({"attack": 3}, "a method perturb"),
        ({"attack": PGD(rp.ThreatModel("linf", 0.2))}, "attack should be one under L-inf 0.1. Found L-inf 0.2"),
        ({"threat": rp.ThreatModel("linf", 0)}, "budget should be above 0"),
        ({"data": TensorDataset(torch.rand(0, 3, 32, 32), torch.zeros(0))}, "is empty"),
        (
            {"data": TensorDataset(torch.rand(2, 3, 32, 32), torch.tensor([0, 10]))},
            "labels should be in 0..9. Found 10",
        ),
        ({"data": TensorDataset(torch.rand(2, 3, 32, 32), torch.tensor([0, -1]))}, "should not be negative"),
        ({"data": TensorDataset(torch.ones(2, 3, 32, 32).long(), torch.tensor([0, 1]))}, "uint8 or floating"),
        ({"data": TensorDataset(torch.full((2, 3, 32, 32), torch.nan), torch.tensor([0, 1]))}, "finite numbers"),
        ({"data": TensorDataset(torch.rand(2, 32, 32), torch.tensor([0, 1]))}, r"shape \[C, H, W\]"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(3072, 1))}, "at least two classes"),
        ({"model": nn.Flatten(0)}, r"logits of shape \[64, K\]"),
    ],
)
def test_bad_input(undefended, test_set, options, message):
    arguments = {"model": undefended, "data": test_set, "threat": THREAT} | options
    with pytest.raises(ValueError, match=message):
        audit(arguments.pop("model"), arguments.pop("data"), arguments.pop("threat"), **arguments)
