"""The CA-AT paper's synthetic experiment (section 3.2, Fig. 2): does the conflict grow with the square of the budget?

Two MNIST digits at 32 x 32, logistic regression, the inner maximisation solved exactly (`studies.linear_model`), one
model trained for each budget. Where the paper is silent, the choice is said at the argument.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from robust_peft.data import ImageSet, Splits
from robust_peft.results import Accuracy
from robust_peft.studies.linear_model import (
    LogisticRegression,
    conflict_bound,
    exponent,
    gradients,
    largest_batch_eigenvalue,
    largest_eigenvalues,
    linearised_gradients,
    signs,
    worst_images,
)
from robust_peft.surgery import Surgery, Vanilla, conflict
from robust_peft.threat import ThreatModel

BOXES: dict[str, tuple[float, float] | None] = {"no box": None, "box": (0.0, 1.0)}
"""The paper's adversary may leave the pixel range; a real one may not."""
FIXED_FROM = 1e-4
"""The smallest budget around the fixed model."""


def two_digits(data: ImageSet, digits: tuple[int, int] = (1, 2)) -> tuple[Tensor, Tensor]:
    """The images of two digits and their labels.

    Returns:
        Images of shape `[N, 1, H, W]`, float64 in [0, 1] (the three channels of the digits are equal: one is taken),
        and labels 0 and 1 of shape `[N]` for the first and the second digit.
    """
    chosen = (data.labels == digits[0]) | (data.labels == digits[1])
    return data.images[chosen][:, :1].double() / 255, (data.labels[chosen] == digits[1]).long()


@torch.no_grad()
def train(
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    *,
    surgery: Surgery,
    epochs: int,
    lr: float,
    batch_size: int,
    seed: int,
) -> LogisticRegression:
    """Adversarial training with exact adversarial images: plain minibatch SGD in float64, constant learning rate.

    Args:
        images: Images of shape `[N, ...]`.
        labels: 0 or 1, of shape `[N]`.
        threat: The adversary.
        surgery: From the Gramian of a batch's two mean gradients to the update; ``Vanilla(0.5)`` makes it Eq. 3.
        epochs: Passes over the images, each in an order of its own.
        lr: Learning rate.
        batch_size: Images in a batch.
        seed: Of start and order. Weights and bias start uniform in +-1/sqrt(d), as torch's linear layers do.
    """
    generator = torch.Generator().manual_seed(seed)
    pixels = images[0].numel()
    start = (2 * torch.rand(pixels + 1, generator=generator, dtype=torch.float64) - 1) / math.sqrt(pixels)
    model = LogisticRegression(start[:-1], start[-1])
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(batch_size):
            adv_images = worst_images(model, images[batch], labels[batch], threat)
            grads = torch.stack([gradients(model, x, labels[batch]).mean(0) for x in (images[batch], adv_images)])
            update = surgery(grads @ grads.T) @ grads
            model.weight.sub_(lr * update[:-1])
            model.bias.sub_(lr * update[-1])
    return model


def measure(
    model: LogisticRegression, images: Tensor, labels: Tensor, threat: ThreatModel
) -> dict[str, dict[str, float]]:
    """Conflict, its parts and Theorem 1's bound, per sample (means over the samples) and per batch (all as one batch).

    Returns:
        ``{"per sample": {...}, "per batch": {...}}`` with ``mu``, ``clean_norm``, ``adv_norm``, ``one_minus_cos``,
        ``mu_linearised`` (of `g_c + H eps` in place of g_a), ``bound`` (1/2 lambda_max d eps^2, or eps^2 under L2) and
        ``above_bound``: the share of samples whose mu is above their bound (per batch: 0 or 1).
    """
    adv_images = worst_images(model, images, labels, threat)
    clean = gradients(model, images, labels)
    adv = gradients(model, adv_images, labels)
    linearised = linearised_gradients(model, images, labels, adv_images)
    pixels = images[0].numel()
    found = {}
    for scope, pair, linear_pair, eigenvalue in (
        ("per sample", (clean, adv), (clean, linearised), largest_eigenvalues(model, images, labels)),
        (
            "per batch",
            (clean.mean(0), adv.mean(0)),
            (clean.mean(0), linearised.mean(0)),
            largest_batch_eigenvalue(model, images, labels),
        ),
    ):
        real, linear = _conflict(*pair), _conflict(*linear_pair)
        bound = conflict_bound(eigenvalue, threat, pixels)
        values = {
            "mu": real.mu,
            "clean_norm": real.clean_norm,
            "adv_norm": real.adv_norm,
            "one_minus_cos": 1 - real.cos,
            "mu_linearised": linear.mu,
            "bound": bound,
            "above_bound": (real.mu > bound).double(),
        }
        found[scope] = {name: float(value.mean()) for name, value in values.items()}
    return found


def _conflict(clean: Tensor, adv: Tensor) -> Any:
    grads = torch.stack([clean, adv], dim=-2)
    return conflict(grads @ grads.mT)


@torch.no_grad()
def accuracies(
    model: LogisticRegression, images: Tensor, labels: Tensor, threat: ThreatModel
) -> tuple[Accuracy, Accuracy]:
    """Standard accuracy, and adversarial accuracy under the exact worst case: no attack finds more."""
    counts = []
    for shown in (images, worst_images(model, images, labels, threat)):
        counts.append(int((signs(labels) * model.score(shown) > 0).sum()))
    return Accuracy(counts[0], len(images)), Accuracy(counts[1], len(images))


def neighbours_of_other_kind(clean: Tensor, adv: Tensor) -> float:
    """The share of gradients whose nearest neighbour is of the other kind: 0 where g_c and g_a lie apart.

    A number for what the t-SNE shows, measured between the gradients themselves, of shape `[N, P]` each.
    """
    points = torch.cat([clean, adv])
    distances = torch.cdist(points, points).fill_diagonal_(math.inf)
    kind = torch.arange(len(points)) < len(clean)
    return float((kind[distances.argmin(1)] != kind).double().mean())


def embed(points: Tensor, seed: int) -> Tensor:
    """t-SNE to two dimensions by scikit-learn (perplexity 30, or a third of the points if that is less; from PCA).

    Raises:
        ImportError: Where scikit-learn is missing; names the extra that brings it.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise ImportError('t-SNE comes with scikit-learn: pip install "robust_peft[demo]".') from error
    perplexity = min(30.0, (len(points) - 1) / 3)
    found = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(points.numpy())
    return torch.from_numpy(found)


@torch.no_grad()
def run_study(
    splits: Splits,
    *,
    digits: tuple[int, int] = (1, 2),
    norm: str = "linf",
    budgets: Sequence[float] = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3),
    lam: float = 0.5,
    epochs: int = 20,
    lr: float = 0.03,
    batch_size: int = 50,
    seed: int = 0,
    limit: int | None = None,
    tsne_samples: int = 300,
) -> dict[str, Any]:
    """Train a model for each budget, without and with the pixel box, and measure it.

    Args:
        splits: Images whose classes are digits. Models are trained and mu is measured on ``train``, accuracies are on
            ``test``.
        digits: The two digits.
        norm: "linf" or "l2".
        budgets: At least two, rising.
        lam: Weight of the adversarial loss.
        epochs: Passes over the training images.
        lr: Learning rate.
        batch_size: Images in a batch.
        seed: Of training and t-SNE.
        limit: At most so many images of each digit pair and split (for trials).
        tsne_samples: Training images whose gradients go into the t-SNE; 0: none.

    Returns:
        Plain JSON values: ``settings``, ``versions``, ``rows`` (one for each box and budget), ``exponents``, ``fixed``
        (budgets around the one model trained without box at the smallest budget), ``fixed_exponents``, ``tsne``.

    Raises:
        ValueError: If the budgets are not two or more rising numbers, or a split is missing.
    """
    if len(budgets) < 2 or list(budgets) != sorted(set(budgets)) or budgets[0] <= 0:
        raise ValueError(f"budgets should be two or more rising positive numbers. Found budgets = {tuple(budgets)}.")
    if splits.test is None:
        raise ValueError("The study needs test images.")
    images, labels = (part[:limit] for part in two_digits(splits.train, digits))
    test_images, test_labels = (part[:limit] for part in two_digits(splits.test, digits))

    rows, tsne = [], []
    models: list[LogisticRegression] = []
    for name, box in BOXES.items():
        for budget in budgets:
            threat = ThreatModel(norm, budget, box)
            model = train(
                images, labels, threat, surgery=Vanilla(lam), epochs=epochs, lr=lr, batch_size=batch_size, seed=seed
            )
            models.append(model)
            standard, adversarial = accuracies(model, test_images, test_labels, threat)
            adv_images = worst_images(model, images, labels, threat)
            clean_loss, adv_loss = (float(model.loss(x, labels).mean()) for x in (images, adv_images))
            clean, adv = gradients(model, images, labels), gradients(model, adv_images, labels)
            rows.append(
                {
                    "box": name,
                    "budget": budget,
                    "standard_accuracy": _counted(standard),
                    "adversarial_accuracy": _counted(adversarial),
                    "clean_loss": clean_loss,
                    "adv_loss": adv_loss,
                    "objective": (1 - lam) * clean_loss + lam * adv_loss,
                    "weight_l1": float(model.weight.abs().sum()),
                    "neighbours_of_other_kind": neighbours_of_other_kind(clean, adv),
                    **measure(model, images, labels, threat),
                }
            )
            if name == "no box" and tsne_samples:
                shown = min(tsne_samples, len(images))
                places = embed(torch.cat([clean[:shown], adv[:shown]]), seed).double().round(decimals=3)
                kinds = {"clean": places[:shown].tolist(), "adversarial": places[shown:].tolist()}
                tsne.append({"budget": budget, "labels": labels[:shown].tolist(), **kinds})

    steps = math.ceil(4 * math.log10(budgets[-1] / FIXED_FROM)) + 1
    around = torch.logspace(math.log10(FIXED_FROM), math.log10(budgets[-1]), steps, dtype=torch.float64).tolist()
    fixed = [
        {"budget": budget, **measure(models[0], images, labels, ThreatModel(norm, budget, None))} for budget in around
    ]
    trained = {name: [row for row in rows if row["box"] == name] for name in BOXES}
    return {
        "settings": {
            "digits": list(digits), "norm": norm, "budgets": list(budgets), "lam": lam, "epochs": epochs, "lr": lr,
            "batch_size": batch_size, "seed": seed, "optimizer": "SGD, constant learning rate, float64",
            "train_images": len(images), "test_images": len(test_images), "pixels": images[0].numel(),
        },
        "versions": {"python": platform.python_version()}
        | {package: metadata.version(package) for package in ("robust_peft", "torch", "numpy")},
        "rows": rows,
        "exponents": {name: _exponents(found) for name, found in trained.items()},
        "fixed": fixed,
        "fixed_exponents": {"two smallest budgets": _exponents(fixed[:2])}
        | {"the trained budgets' range": _exponents([row for row in fixed if row["budget"] >= 0.99 * budgets[0]])},
        "tsne": tsne,
    }  # fmt: skip


def _counted(accuracy: Accuracy) -> dict[str, Any]:
    counts = {"correct": accuracy.correct, "total": accuracy.total}
    return {"accuracy": accuracy.accuracy, **counts, "interval": list(accuracy.interval)}


def _exponents(rows: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Exponents in the budget, by least squares over the rows; None where a value is zero somewhere."""
    budgets = [row["budget"] for row in rows]
    found: dict[str, dict[str, float | None]] = {}
    for scope in ("per sample", "per batch"):
        found[scope] = {}
        for quantity in ("mu", "mu_linearised", "bound"):
            values = [row[scope][quantity] for row in rows]
            found[scope][quantity] = exponent(budgets, values) if len(rows) > 1 and min(values) > 0 else None
    return found
