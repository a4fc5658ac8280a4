"""What an adversary may do: a norm ball around each image, cut by the pixel box."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from robust_peft import keyed_random
from robust_peft.pixel_units import NORMS, as_number, eps_problem


@dataclass(frozen=True)
class ThreatModel:
    """The set of images that the adversary may choose from: ``{x' in box : ||x' - x|| <= eps}``.

    Args:
        norm: "linf" or "l2".
        eps: The budget in the units of the pixels, for images in [0, 1] as a number or a fraction like "8/255".
        box: Lowest and highest pixel value, or None for no box (for theory; images have one).

    Raises:
        ValueError: For an unknown norm, a budget that is no number, negative or (L-inf) wider than the box.
    """

    norm: str
    eps: float
    box: tuple[float, float] | None = (0.0, 1.0)

    def __init__(self, norm: str, eps: str | float, box: tuple[float, float] | None = (0.0, 1.0)) -> None:
        if norm not in NORMS:
            raise ValueError(f"norm should be one of {', '.join(NORMS)}. Found norm = {norm!r}.")
        if box is not None and not _is_interval(box):
            raise ValueError(f"box should be (lowest, highest) or None. Found box = {box!r}.")
        object.__setattr__(self, "norm", norm)
        wrong = eps_problem(norm, eps, box)
        if wrong:
            raise ValueError(wrong)
        object.__setattr__(self, "eps", as_number(eps))
        object.__setattr__(self, "box", None if box is None else (float(box[0]), float(box[1])))

    def __str__(self) -> str:
        as_pixels, readable = self.eps * 255, format(self.eps, "g")
        if self.norm == "linf" and len(readable) > 5 and abs(as_pixels - round(as_pixels)) < 1e-6:
            readable = f"{as_pixels:g}/255"
        return f"{ {'linf': 'L-inf', 'l2': 'L2'}[self.norm] } {readable}"

    def random_start(self, images: Tensor, keys: Tensor) -> Tensor:
        """A point drawn uniformly from the ball and moved into the box.

        Args:
            images: Images of shape `[B, ...]`.
            keys: Keys of shape `[B]`, int64 (see `robust_peft.keyed_random`).
        """
        shape = tuple(images.shape[1:])
        dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
        if self.norm == "linf":
            noise = keyed_random.uniform(keys, shape, dtype).mul_(2).sub_(1).mul_(self.eps)
        else:
            # Uniform in a d-ball: a normal vector's direction, and a radius whose d-th power is uniform.
            direction = _normalised(keyed_random.normal(keys, shape, dtype))
            radius = keyed_random.uniform(keyed_random.derive(keys, 1), (1,), dtype) ** (1 / math.prod(shape))
            noise = direction * _per_sample(radius.squeeze(1), images) * self.eps
        return self.project(images + noise.to(images.dtype), images)

    def step(self, adv_images: Tensor, grad: Tensor, step_size: float) -> Tensor:
        """Go ``step_size`` in the direction of steepest ascent: sign of the gradient (L-inf), unit gradient (L2).

        A zero L2 gradient gives no step, nor does one that is not finite. The result is not projected.
        """
        if self.norm == "linf":
            return torch.add(adv_images, grad.sign(), alpha=step_size)
        return torch.add(adv_images, _normalised(grad), alpha=step_size)

    def project(self, adv_images: Tensor, images: Tensor) -> Tensor:
        """The nearest point of the ball, then of the box (which keeps it in the ball, as ``images`` lie in the box)."""
        if self.norm == "linf":
            lowest, highest = images - self.eps, images + self.eps
            if self.box is not None:
                lowest, highest = lowest.clamp_(min=self.box[0]), highest.clamp_(max=self.box[1])
            return torch.clamp(adv_images, lowest, highest)
        difference = adv_images - images
        length = difference.flatten(1).norm(dim=1)
        # A point that is outside by no more than the rounding of its pixels stays (half a unit in the last place near
        # 1, in each of them), so that the projection of a projection is itself.
        rounding = torch.finfo(images.dtype).eps * (math.sqrt(math.prod(images.shape[1:])) / 4 + 4 * self.eps)
        factor = torch.where(length > self.eps + rounding, self.eps / length, torch.ones_like(length))
        projected = images + difference * _per_sample(factor, images)
        return projected if self.box is None else projected.clamp_(*self.box)

    def contains(self, adv_images: Tensor, images: Tensor, tolerance: float = 1e-5) -> Tensor:
        """Whether each image is inside ball and box, a bool tensor of shape `[B]`.

        Args:
            adv_images: Images of shape `[B, ...]`.
            images: The clean ones, of the same shape.
            tolerance: Slack for rounding, absolute in pixels and relative to eps under L2.
        """
        difference = (adv_images.double() - images.double()).flatten(1)
        if self.norm == "linf":
            inside = difference.abs().amax(dim=1) <= self.eps + tolerance
        else:
            inside = difference.norm(dim=1) <= self.eps * (1 + tolerance) + tolerance
        if self.box is not None:
            flat = adv_images.flatten(1)
            inside &= (flat.amin(dim=1) >= self.box[0] - tolerance) & (flat.amax(dim=1) <= self.box[1] + tolerance)
        return inside

    def check_images(self, images: Tensor, tolerance: float = 1e-5) -> None:
        """Refuse images outside the box.

        Float slack is tolerated. Raises ValueError that says what was found and that normalisation belongs into the
        model: an attack on normalised images would be stopped at the wrong box.
        """
        if self.box is None or images.numel() == 0:
            return
        lowest, highest = (value.item() for value in torch.aminmax(images.detach()))
        if not (lowest >= self.box[0] - tolerance and highest <= self.box[1] + tolerance):
            raise ValueError(
                f"images should lie in [{self.box[0]:g}, {self.box[1]:g}]. Found {lowest:g} to {highest:g}; "
                "normalisation belongs inside the model (robust_peft.models.Normalized), not before the attack."
            )


def _per_sample(values: Tensor, images: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (images.dim() - 1)).to(images.dtype)


def _normalised(vectors: Tensor) -> Tensor:
    # Divide by the largest entry first: squares of gradients near 1e-30 would underflow to a zero norm.
    flat = vectors.flatten(1)
    largest = flat.abs().amax(dim=1, keepdim=True) if flat.numel() else flat.new_zeros(len(flat), 1)
    usable = (largest > 0) & largest.isfinite()
    flat = torch.where(usable, flat / torch.where(usable, largest, 1), 0)
    return (flat / torch.where(usable, flat.norm(dim=1, keepdim=True), 1)).reshape(vectors.shape)


def _is_interval(box: object) -> bool:
    numbers = isinstance(box, (tuple, list)) and len(box) == 2 and all(isinstance(end, (int, float)) for end in box)
    return numbers and box[0] < box[1]  # type: ignore[index]
