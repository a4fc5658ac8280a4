"""The step that speed is measured against is the one that peers take, and ours gives the same gradients."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import robust_peft as rp
from robust_peft.models.micro_swin import micro_swin
from robust_peft.training.step import Batch, add_gradients

PATH = Path(__file__).parents[1] / "benchmarks" / "reference_step.py"
EPS, STEP_SIZE, STEPS, GAMMA = 8 / 255, 2 / 255, 4, 0.8


@pytest.fixture(scope="module")
def peers():
    spec = importlib.util.spec_from_file_location("reference_step", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model():
    torch.manual_seed(0)
    backbone = micro_swin(5, width=16, depths=(1, 1), num_heads=(1, 2))
    adapted = rp.attach(rp.load_backbone(backbone, mean=(0.5,) * 3, std=(0.2,) * 3), rp.BottleneckConfig())
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return adapted


def samples(count=6):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 3, 32, 32, generator=generator), torch.randint(0, 5, (count,), generator=generator)


def test_its_attack_is_that_of_torchattacks(peers, model):
    torchattacks = pytest.importorskip("torchattacks")
    images, labels = samples()
    model.eval()
    torch.manual_seed(7)
    theirs = torchattacks.PGD(model, eps=EPS, alpha=STEP_SIZE, steps=STEPS)(images, labels)
    torch.manual_seed(7)
    own = peers.pgd(model, images, labels, eps=EPS, step_size=STEP_SIZE, steps=STEPS)
    assert torch.equal(theirs, own) and not torch.equal(own, images)


@pytest.mark.parametrize("seed", range(5))
def test_its_projection_is_ours(peers, seed):
    generator = torch.Generator().manual_seed(seed)
    clean, adv = torch.randn(2, 50, generator=generator, dtype=torch.float64)
    adv = adv + (seed - 2) * clean  # from opposite to inside the cone
    rows = torch.stack([clean, adv])
    weights = rp.surgery.ConflictAware(gamma=GAMMA)(rows @ rows.T)
    assert_close(peers.combine(clean, adv, GAMMA), weights @ rows, rtol=1e-9, atol=1e-12)


def test_one_step_from_one_state_gives_equal_gradients(peers, model):
    """The same start, float32, no compilation: clean and adversarial gradient agree to 1e-5 of their length."""
    images, labels = samples()
    threat = rp.ThreatModel("linf", EPS)
    trainer = rp.Trainer(
        model,
        attack=rp.attacks.PGD(threat, steps=STEPS, step_size=STEP_SIZE),
        precision="fp32",
        progress=False,
    )
    keys = torch.arange(len(images))
    attack_keys = []

    class Remembering:
        """The trainer's attack, which notes the keys of its random start."""

        threat = trainer.attack.threat
        objective = trainer.attack.objective

        def perturb(self, *arguments, keys, **options):
            attack_keys.append(keys)
            return trainer.attack.perturb(*arguments, keys=keys, **options)

    trainer.pair.clear()
    model.train()
    add_gradients(trainer.pair, Batch(images, labels, keys), model=model, attack=Remembering(), loss=trainer.loss)
    ours = trainer.pair.rows / len(images)

    from robust_peft import keyed_random

    start = threat.random_start(images, keyed_random.derive(attack_keys[0], 0))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    adv_images = peers.pgd(model, images, labels, eps=EPS, step_size=STEP_SIZE, steps=STEPS, start=start)
    model.train()
    for row, pixels in zip(ours, (images, adv_images), strict=True):
        reference = peers.flat_gradient(model, parameters, pixels, labels, lambda: torch.autocast("cpu", enabled=False))
        assert reference.norm() > 0
        assert (row - reference).norm() <= 1e-5 * reference.norm()


def test_its_step_moves_what_is_trainable_and_nothing_else(peers, model):
    images, labels = samples()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    peers.ca_at_step(model, optimizer, images, labels, eps=EPS, step_size=STEP_SIZE, steps=1, gamma=GAMMA)
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert isinstance(model, nn.Module) and len(moved) > 5
