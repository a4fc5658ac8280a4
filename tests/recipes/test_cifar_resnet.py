"""Training ResNets from random weights: each loss, solver, BatchNorm mode and model, tiny and on a tiny CIFAR."""

import json
from pathlib import Path

import pytest
import torch

import robust_peft as rp
from robust_peft import cli
from robust_peft.config import ATTACK_PARAMETERS, LOSS_PARAMETERS

ROOT = Path(__file__).parents[2]
RECIPE = "cifar_resnet"
pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = "--data.limit 8 --data.batch-size 4 --data.validation-share 0.2 --optim.epochs 1 --optim.lr 0.05 --seed 3"
QUICK += " --attack.step-size None --attack.steps 2 --validation.steps 1 --evaluation.attacks pgd-1 --precision fp32"


@pytest.fixture(scope="module")
def cifar(tmp_path_factory, layouts):
    folder = tmp_path_factory.mktemp("cifar")
    return {name: layouts.make_cifar_parquet(folder / name, name) for name in ("cifar10", "cifar100")}


def train(cifar, output, *flags, data="cifar10", width=4, quick=QUICK):
    """What the recipe's script does with these flags; the run's folder."""
    given = ["--data.name", data, "--data.root", str(cifar[data]), "--data.partial", "--output", str(output)]
    narrow = ["--backbone.width", str(width)] if width else []
    status = cli.train(RECIPE, [*given, *quick.split(), *narrow, *flags], prog="cifar_resnet.py")
    assert status == 0
    return output


def steps(folder):
    """The records of the optimizer's steps, without what a clock says."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "images_per_second"} for record in records]


def check(folder):
    config = json.loads((folder / "config.json").read_text())["config"]
    taken = [record for record in steps(folder) if record["kind"] == "train"]
    assert len(taken) == 2 and all(record["update_norm"] > 0 for record in taken)
    assert all(torch.tensor([record["clean_loss"], record["adv_loss"]]).isfinite().all() for record in taken)
    model = rp.load_run(folder)
    assert model(torch.rand(3, 3, 32, 32)).shape == (3, {"cifar10": 10, "cifar100": 100}[config["data"]["name"]])
    return config, model


@pytest.mark.parametrize("loss", sorted(LOSS_PARAMETERS))
def test_each_loss(loss, cifar, tmp_path):
    config, _ = check(train(cifar, tmp_path / "run", "--loss.name", loss))
    assert config["loss"]["name"] == loss


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("solver", sorted(ATTACK_PARAMETERS))
def test_each_solver(solver, norm, cifar, tmp_path):
    flags = ["--attack.name", solver, "--threat.norm", norm, "--threat.eps", "16/255" if norm == "linf" else "0.5"]
    quick = QUICK if "step_size" in ATTACK_PARAMETERS[solver] else QUICK.replace("--attack.step-size None ", "")
    if "steps" not in ATTACK_PARAMETERS[solver]:
        quick = quick.replace("--attack.steps 2 ", "")
    config, _ = check(train(cifar, tmp_path / "run", *flags, quick=quick))
    assert config["attack"]["name"] == solver and config["threat"]["norm"] == norm


@pytest.mark.parametrize(
    ("model", "bn", "width"),
    [
        ("resnet18", "running", 4),
        ("resnet18", "batch", 4),
        ("resnet34", "running", 4),
        ("resnet34", "batch", 4),
        ("resnet18", "running", None),
        ("wrn28_10", "batch", None),
    ],
)
def test_each_model_and_batch_norm(model, bn, width, cifar, tmp_path):
    flags = ["--backbone.name", model, "--backbone.bn", bn]
    _, trained = check(train(cifar, tmp_path / "run", *flags, width=width))
    if width is None:
        published = {"resnet18": 11_173_962, "wrn28_10": 36_479_194}
        assert sum(p.numel() for p in trained.parameters()) == published[model]
    norms = [m for m in trained.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and all((norm.running_mean is None) == (bn == "batch") for norm in norms)


def test_cifar_100_with_a_solver_towards_another_class(cifar, tmp_path):
    check(train(cifar, tmp_path / "run", "--attack.num-targets", "2", "--attack.name", "t-apgd-dlr", data="cifar100",
                quick=QUICK.replace("--attack.step-size None ", "")))  # fmt: skip


def test_equal_seeds_give_equal_metrics_and_weights(cifar, tmp_path):
    one, two, other = (
        train(cifar, tmp_path / name, "--seed", seed) for name, seed in (("a", "3"), ("b", "3"), ("c", "4"))
    )
    assert steps(one) == steps(two) != steps(other)
    first, second = (rp.load_run(folder).state_dict() for folder in (one, two))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("variant", ["paper", "official-code"])
def test_presets(variant, cifar, tmp_path):
    config, _ = check(train(cifar, tmp_path / "run", "--preset", variant, "--optim.warmup-epochs", "0"))
    assert config["backbone"]["bn"] == "batch" and config["optim"]["optimizer"] == "sgd"
    assert config["optim"]["nesterov"] == (True if variant == "official-code" else None)


def test_published_presets_are_the_published_settings():
    paper = rp.get_preset(RECIPE, "paper")
    assert (paper.optim.lr, paper.optim.momentum, paper.optim.weight_decay) == (0.4, 0.9, 5e-4)
    assert paper.optim.epochs == 200 and paper.optim.schedule == "onecycle" and paper.data.batch_size == 1024
    assert paper.attack.steps == 10 and paper.attack.step_size == "2/255" and paper.threat.eps == "8/255"
    assert paper.data.rotation > 0 and rp.get_preset(RECIPE, "official-code").data.rotation == 0


def test_the_best_epoch_is_chosen_on_validation_images_and_overfitting_can_be_seen(cifar, tmp_path):
    folder = train(cifar, tmp_path / "run", "--optim.epochs", "3", "--validation.keep", "best")
    records = steps(folder)
    seen = [record for record in records if record["kind"] == "validation"]
    assert [record["epoch"] for record in seen] == [1, 2, 3]
    assert all({"standard_accuracy", "adversarial_accuracy"} <= set(record) for record in seen)
    taken = [record for record in records if record["kind"] == "train"]
    assert all({"clean_correct", "adv_correct", "cos", "mu", "clean_norm", "adv_norm"} <= set(r) for r in taken)


def test_averaged_weights_come_with_averaged_statistics(cifar, tmp_path):
    """Averaging changes nothing in training: with decay 0 it is the plain run, above 0 the statistics lag too."""
    runs = {decay: train(cifar, tmp_path / decay, "--optim.ema-decay", decay) for decay in ("None", "0.0", "0.9")}
    plain, zero, lagging = (rp.load_run(folder).state_dict() for folder in runs.values())
    statistics = [key for key in plain if key.endswith(("running_mean", "running_var"))]
    assert statistics and all(torch.equal(plain[key], zero[key]) for key in plain)
    assert not any(torch.equal(plain[key], lagging[key]) for key in statistics)


def test_crops_that_would_stand_still_are_refused(cifar):
    splits = rp.data.load_splits("cifar10", root=cifar["cifar10"], partial=True).prepared(16)
    model = rp.attach(rp.load_backbone("resnet18", checkpoint="random", width=4), "full")
    trainer = rp.Trainer(model, attack=rp.attacks.PGD(rp.ThreatModel("linf", "8/255"), steps=1), progress=False)
    subset = torch.utils.data.Subset(splits.train, range(8))
    with pytest.raises(ValueError, match="Random crops are drawn anew each epoch"):
        trainer.fit(torch.utils.data.DataLoader(subset, batch_size=4))
