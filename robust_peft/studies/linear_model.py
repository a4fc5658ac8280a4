"""Logistic regression under attack, where everything that the CA-AT paper's theory speaks of has a closed form.

The model is `f(x) = w^T x + b` for two classes y = -1, +1 (paper, appendix B), the loss `log(1 + exp(-y f(x)))`. With
`s = sigmoid(-y f(x))`, `r = s (1 - s)` and parameters theta = (w, b):

    g(x) = -y s (x, 1)                           gradient of the loss over theta
    H    = dg/dx = -y s (I; 0) + r (x, 1) w^T    mixed second derivative, of shape [d + 1, d]

and the worst perturbation depends on w and y alone (Eq. 15). As it is a constant to the gradient over theta (Danskin),
the adversarial gradient is `g(x + eps)`, which is also the derivative of Eq. 16.

Everything is float64, because mu is a difference of nearly equal numbers where the budget is small. Labels are 0 and 1,
for y = -1 and +1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from robust_peft.threat import ThreatModel


class LogisticRegression(nn.Module):
    """`f(x) = w^T x + b`, as a model of two classes.

    Its logits are `(-f/2, f/2)`, so that cross-entropy is `log(1 + exp(-y f))`, and attacks take it as any other model.
    The paper's text has two weight vectors in place of its appendix's one. That is the same set of models (f is the
    difference of the two logits), with gradients that are twice as long in the square.

    Args:
        weight: w of shape `[d]`.
        bias: b of shape `[]`.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.double())
        self.bias = nn.Parameter(bias.double())

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[B, 2]` of images of shape `[B, ...]` with d pixels each."""
        score = self.score(images)
        return torch.stack([-score / 2, score / 2], dim=1)

    def score(self, images: Tensor) -> Tensor:
        """f of shape `[B]`: positive for class 1."""
        return images.double().flatten(1) @ self.weight + self.bias

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """`log(1 + exp(-y f))` of shape `[B]` (paper, Eq. 13)."""
        return functional.softplus(-signs(labels) * self.score(images))


def signs(labels: Tensor) -> Tensor:
    """y of labels 0 and 1: -1 and +1, in float64."""
    return 2.0 * labels.double() - 1.0


@torch.no_grad()
def worst_images(model: LogisticRegression, images: Tensor, labels: Tensor, threat: ThreatModel) -> Tensor:
    """The images that maximise the loss inside ball and box, exactly.

    The loss falls with `y w^T x`, so that is what is minimised:

    - L-inf without a box: `x - y eps sign(w)` (paper, Eq. 15). With a box the same, clipped: every pixel is free of the
      others. Where w is 0 a pixel changes nothing and stays.
    - L2 without a box: `x - y eps w / ||w||`. With a box: `clip(x - t y w)` with the t that spends the whole budget, or
      every pixel at its end where the budget is not spent even then.

    Args:
        model: The model.
        images: Images of shape `[B, ...]` in the box.
        labels: 0 or 1, of shape `[B]`.
        threat: Norm, budget and box; the paper's experiment has ``box=None``.

    Returns:
        Images of the shape of ``images``.
    """
    flat = images.double().flatten(1)
    downhill = -signs(labels)[:, None] * model.weight  # [B, d], the direction in which the loss grows
    if threat.norm == "linf":
        worst = flat + threat.eps * downhill.sign()
    elif threat.box is None:
        length = downhill.norm(dim=1, keepdim=True)
        worst = flat + threat.eps * torch.where(length > 0, downhill / length, 0.0)
    else:
        worst = flat + _step_to_the_surface(flat, downhill, threat.eps, threat.box)[:, None] * downhill
    if threat.box is not None:
        worst = worst.clamp(*threat.box)
    return worst.reshape(images.shape)


def _step_to_the_surface(flat: Tensor, direction: Tensor, eps: float, box: tuple[float, float]) -> Tensor:
    """The t for which `clip(x + t direction) - x` has length eps, of shape `[B]`; where none is long enough, a t at
    which every pixel has reached the box's end.

    Its squared length is `sum_i min(t |direction_i|, room_i)^2`. Between the points where one more pixel reaches its
    end it is `spent + t^2 * free`, so these points, in order, give t without a search.
    """
    room = torch.where(direction > 0, box[1] - flat, flat - box[0]).clamp(min=0)
    speed = direction.abs()
    room = torch.where(speed > 0, room, 0.0)
    arrival, order = torch.where(speed > 0, room / speed.clamp(min=torch.finfo(speed.dtype).tiny), 0.0).sort(dim=1)
    room, speed = room.gather(1, order), speed.gather(1, order)
    # Before pixel k arrives, the first k have spent their room and the others are on their way.
    spent = functional.pad(room.square().cumsum(1), (1, 0))[:, :-1]
    free = speed.square().flip(1).cumsum(1).flip(1)
    enough = spent + arrival.square() * free >= eps**2
    first = enough.int().argmax(dim=1, keepdim=True)
    left = (eps**2 - spent.gather(1, first)).clamp(min=0)
    step = (left / free.gather(1, first).clamp(min=torch.finfo(speed.dtype).tiny)).sqrt().squeeze(1)
    return torch.where(enough.any(dim=1), step, arrival[:, -1])


@torch.no_grad()
def gradients(model: LogisticRegression, images: Tensor, labels: Tensor) -> Tensor:
    """Each sample's gradient of the loss over (w, b), of shape `[B, d + 1]`. At `worst_images` it is g_a."""
    slope = -signs(labels) * _misfit(model, images, labels)
    return slope[:, None] * _with_one(images)


@torch.no_grad()
def mixed_derivative(model: LogisticRegression, images: Tensor, labels: Tensor) -> Tensor:
    """H of each sample, of shape `[B, d + 1, d]` (paper, Eq. 6): for small d; the functions below do without it."""
    s = _misfit(model, images, labels)
    d = model.weight.numel()
    identity = torch.eye(d + 1, d, dtype=torch.float64)
    outer = _with_one(images)[:, :, None] * model.weight
    return (-signs(labels) * s)[:, None, None] * identity + (s * (1 - s))[:, None, None] * outer


@torch.no_grad()
def linearised_gradients(model: LogisticRegression, images: Tensor, labels: Tensor, adv_images: Tensor) -> Tensor:
    """`g_c + H (adv_images - images)` of shape `[B, d + 1]`: the g_a that Theorem 1 speaks of (paper, Eq. 6)."""
    s = _misfit(model, images, labels)
    change = adv_images.double().flatten(1) - images.double().flatten(1)
    direct = (-signs(labels) * s)[:, None] * functional.pad(change, (0, 1))
    through_score = (s * (1 - s) * (change @ model.weight))[:, None] * _with_one(images)
    return gradients(model, images, labels) + direct + through_score


@torch.no_grad()
def largest_eigenvalues(model: LogisticRegression, images: Tensor, labels: Tensor) -> Tensor:
    """lambda_max(H^T H) of each sample, of shape `[B]`, for images of two pixels or more.

    `H^T H = s^2 I - y s r (x w^T + w x^T) + r^2 (||x||^2 + 1) w w^T` differs from `s^2 I` in the plane of x and w
    alone, where a quadratic equation gives its eigenvalues.
    """
    s = _misfit(model, images, labels)
    r = s * (1 - s)
    flat = images.double().flatten(1)
    pixels, weights, inner = flat.square().sum(1), model.weight.square().sum(), flat @ model.weight
    mixed = -signs(labels) * s * r
    trace = 2 * mixed * inner + r.square() * (pixels + 1) * weights
    determinant = -mixed.square() * (pixels * weights - inner.square()).clamp(min=0)
    return s.square() + (trace + (trace.square() - 4 * determinant).sqrt()) / 2


@torch.no_grad()
def largest_batch_eigenvalue(model: LogisticRegression, images: Tensor, labels: Tensor) -> Tensor:
    """lambda_max of the mean of `H_i H_i^T` over the batch, of shape `[]`: what stands for lambda_max(H^T H) per batch.

    The batch's g_a - g_c is `(H_1, ..., H_B) / B` times all perturbations one below the other. Its squared length is at
    most lambda_max(mean of H_i H_i^T) / B times the sum of the `||eps_i||^2`, so at most lambda_max times the square of
    the longest.
    """
    s = _misfit(model, images, labels)
    r = s * (1 - s)
    extended = _with_one(images)
    mean_outer = (extended * r.square()[:, None]).T @ extended / len(extended) * model.weight.square().sum()
    cross = torch.outer(functional.pad(model.weight, (0, 1)), (signs(labels) * s * r) @ extended / len(extended))
    direct = s.square().mean() * torch.ones(len(model.weight), dtype=torch.float64)
    return torch.linalg.eigvalsh(functional.pad(direct, (0, 1)).diag() - cross - cross.T + mean_outer)[-1]


def conflict_bound(eigenvalue: Tensor, threat: ThreatModel, pixels: int) -> Tensor:
    """Theorem 1's bound on mu: `1/2 lambda_max ||eps||^2`, with `||eps||^2 <= d eps^2` (L-inf) or `eps^2` (L2).

    The paper has `d^2 eps^2` for L-inf in place of `d eps^2`, which is more than the norms ask for. The bound holds for
    the linearised g_a around one model; the real g_a of a large budget may exceed it.

    Args:
        eigenvalue: Of `largest_eigenvalues` or `largest_batch_eigenvalue`, any shape.
        threat: Norm and budget.
        pixels: d, the number of pixels of an image.

    Returns:
        The bound, of the shape of ``eigenvalue``.
    """
    return 0.5 * eigenvalue * threat.eps**2 * (pixels if threat.norm == "linf" else 1)


def exponent(budgets: list[float], values: list[float]) -> float:
    """The slope of log(value) over log(budget), by least squares: 2 where a value grows with the square of the budget.

    Raises:
        ValueError: With fewer than two budgets, or where a number is not positive.
    """
    if len(budgets) < 2 or len(budgets) != len(values) or min(*budgets, *values) <= 0:
        raise ValueError(f"budgets and values should be two or more positive pairs. Found {budgets}, {values}.")
    x, y = [math.log(budget) for budget in budgets], [math.log(value) for value in values]
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - x_mean) ** 2 for a in x)


def _misfit(model: LogisticRegression, images: Tensor, labels: Tensor) -> Tensor:
    """s: the probability that the model gives the wrong class, of shape `[B]`."""
    return torch.sigmoid(-signs(labels) * model.score(images))


def _with_one(images: Tensor) -> Tensor:
    """(x, 1) of shape `[B, d + 1]`."""
    return functional.pad(images.double().flatten(1), (0, 1), value=1.0)
