"""What other libraries' attacks are given in the model's place, and how their answers are taken.

They see pixels in [0, 1], logits of at least float32 that are numbers, and gradients that are numbers; they cannot
move the module or change its modes. torchattacks and foolbox are extras and slow to import, so that they are imported
where they are used; where one of them is wrong, a subclass here mends it and says what.
"""

from __future__ import annotations

import importlib
import math
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from robust_peft.attacks.victim import Confirm, as_victim, full_precision_logits
from robust_peft.objectives import margin
from robust_peft.threat import ThreatModel


@contextmanager
def held(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, the model is a victim; afterwards it, the random states and the grad mode are as they were."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    try:
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.set_grad_enabled(torch.is_grad_enabled()), as_victim(model):
            yield
    finally:
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
        for module, training in modes:
            module.training = training
        for parameter, requires_grad, grad in flags:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad


class Lent(nn.Module):
    """What a library attacks: pixels of shape `[b, C, H, W]` in [0, 1] to logits of shape `[b, K]`, all finite.

    The model is no submodule, so that the library's ``.train()``, ``.to()`` and ``.parameters()`` do not reach it. A
    sample whose logits are not finite gets constant ones that are wrong: it counts as found, and its gradient is zero.

    Args:
        labels: Labels of shape `[b]`; the library calls with these b samples, in this order.
        on_gradient: What becomes of the gradient at the pixels, of shape `[b, C, H, W]` and finite.
    """

    def __init__(
        self,
        model: nn.Module,
        threat: ThreatModel,
        images: Tensor,
        labels: Tensor,
        on_gradient: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        assert threat.box is not None
        self._model = (model,)
        self._dtype, self._labels, self._on_gradient = images.dtype, labels, on_gradient
        self.lowest, self.width = threat.box[0], threat.box[1] - threat.box[0]
        # torchattacks asks the first parameter for the device.
        self.place = nn.Parameter(torch.zeros(0, device=images.device), requires_grad=False)
        self.eval()

    def to_unit(self, images: Tensor) -> Tensor:
        """Pixels in [0, 1], in float32 or better, without the slack that images may have."""
        images = images if images.dtype == torch.float64 else images.float()
        return ((images - self.lowest) / self.width).clamp_(0, 1)

    def from_unit(self, pixels: Tensor) -> Tensor:
        """Pixels in the box."""
        return pixels if (self.lowest, self.width) == (0.0, 1.0) else pixels * self.width + self.lowest

    def forward(self, pixels: Tensor) -> Tensor:
        if pixels.requires_grad:
            pixels = pixels.view_as(pixels)
            pixels.register_hook(self._mend)
        logits = full_precision_logits(self._model[0], self.from_unit(pixels).to(self._dtype))
        if pixels.requires_grad and not logits.requires_grad:
            # A model that cuts the graph (a JPEG layer, say) has a zero gradient, rather than ending the attack.
            logits = logits + 0 * pixels.flatten(1).sum(dim=1, keepdim=True)
        wrong = torch.ones_like(logits).scatter(1, self._labels.unsqueeze(1), 0)
        return torch.where(logits.isfinite().all(dim=1, keepdim=True), logits, wrong)

    def _mend(self, grad: Tensor) -> Tensor:
        grad = torch.where(grad.isfinite(), grad, 0)
        return grad if self._on_gradient is None else self._on_gradient(grad)


class Search:
    """The best image found so far of each sample.

    Attributes:
        clean_logits: Logits of the clean images, of shape `[B, K]`.
        adv_images: Per sample an image that the model gets wrong where one was found (confirmed, with ``confirm``),
            otherwise the one of all offered with the largest margin; always in ball and box.
    """

    def __init__(
        self, model: nn.Module, threat: ThreatModel, images: Tensor, labels: Tensor, confirm: Confirm | None
    ) -> None:
        self._model, self._threat, self._images, self._labels, self._confirm = model, threat, images, labels, confirm
        self.adv_images = threat.project(images, images)
        everyone = torch.arange(len(images), device=images.device)
        self.clean_logits = full_precision_logits(model, self.adv_images)
        self._found, _, self._score = self._judge(self.adv_images, everyone, self.clean_logits)

    def standing(self) -> Tensor:
        """The positions that nothing was found for yet."""
        return (~self._found).nonzero().squeeze(1)

    def lend(
        self, positions: Tensor | None = None, on_gradient: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Lent, Tensor]:
        """What a library attacks in the model's place, and the pixels in [0, 1] that it starts from."""
        images, labels = self._images, self._labels
        if positions is not None:
            images, labels = images[positions], labels[positions]
        lent = Lent(self._model, self._threat, images, labels, on_gradient)
        self._from_unit = lent.from_unit
        return lent, lent.to_unit(images)

    def offer(self, found: Tensor, positions: Tensor | None = None) -> None:
        """Take what a library found, as pixels in [0, 1] of shape `[b, ...]`, where it is better than what there is."""
        if positions is None:
            positions = torch.arange(len(self._images), device=self._images.device)
        images = self._images[positions]
        candidates = into_ball(self._threat, self._from_unit(found), images)
        self._keep(candidates, positions, unconfirmed_too=True)

    def _keep(self, candidates: Tensor, positions: Tensor, unconfirmed_too: bool = False) -> None:
        logits = full_precision_logits(self._model, candidates)
        fools, wrong, score = self._judge(candidates, positions, logits)
        better = ~self._found[positions] & (fools | (score > self._score[positions]))
        chosen = positions[better]
        self.adv_images[chosen], self._score[chosen] = candidates[better], score[better]
        self._found[chosen] = fools[better]
        again = wrong & ~fools & ~self._found[positions]
        if unconfirmed_too and again.any():
            # An image of minimal norm is only just wrong, and not in another precision. Further on in its direction,
            # where the ball ends, it is more wrong.
            again = again.nonzero().squeeze(1)
            images = self._images[positions[again]]
            self._keep(stretched(self._threat, candidates[again], images), positions[again])

    def _judge(self, candidates: Tensor, positions: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Who fools the model in the end, whom the attacked model gets wrong, and the margin; each of shape `[b]`."""
        labels = self._labels[positions]
        finite = logits.isfinite().all(dim=1)
        score = torch.where(finite, margin(logits, labels), torch.inf)
        wrong = (logits.argmax(dim=1) != labels) | ~finite
        fools = wrong.clone()
        if self._confirm is not None and wrong.any():
            fools[wrong] = self._confirm(candidates[wrong], positions[wrong])
        return fools, wrong, score


def into_ball(threat: ThreatModel, found: Tensor, images: Tensor) -> Tensor:
    """The nearest point of ball and box; the clean image where a library returned something that is no image."""
    found = torch.where(column(found.isfinite().flatten(1).all(dim=1), found), found.to(images.dtype), images)
    return threat.project(found, images)


def stretched(threat: ThreatModel, adv_images: Tensor, images: Tensor) -> Tensor:
    """The point on the ball's surface in the direction of ``adv_images``."""
    difference = adv_images - images
    order = math.inf if threat.norm == "linf" else 2
    length = difference.flatten(1).norm(order, dim=1)
    factor = torch.where(length > 0, threat.eps / length, 0)
    return threat.project(images + difference * column(factor, images), images)


# The libraries, each mended where it has to be


def library(name: str) -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # foolbox imports scipy by an old path
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ImportError(f'This attack needs {name}: pip install "robust_peft[attacks]"') from error


def run_foolbox(attack: Any, lent: Lent, pixels: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """``attack.run``, which returns what was found; calling the attack would classify it once more."""
    foolbox = library("foolbox")
    # By default foolbox would move the model to a GPU where there is one.
    model = foolbox.PyTorchModel(lent, bounds=(0, 1), device=pixels.device)
    with torch.enable_grad():
        return attack.run(model, pixels, foolbox.criteria.Misclassification(labels), **options).detach()


def foolbox_mifgsm(steps: int, step_size: float) -> Any:
    foolbox = library("foolbox")

    class WithPaperNormalisation(foolbox.attacks.LinfMomentumIterativeFastGradientMethod):
        def normalize(self, gradients: Any, *, x: Any, bounds: Any) -> Any:
            _, grad = _scaled(gradients.raw)
            size = grad.flatten(1).abs().sum(dim=1)
            return type(gradients)(grad / column(torch.where(size > 0, size, 1), grad))

    return WithPaperNormalisation(steps=steps, abs_stepsize=step_size, random_start=False)


def torchattacks_fab(norm: str, steps: int) -> Callable[[Lent, Tensor, Tensor, Tensor | None], Tensor]:
    torchattacks = library("torchattacks")

    class WithOwnGradients(torchattacks.FAB):
        """``labels``, and ``target_class`` where there are targets, are set before a run."""

        def run(self, pixels: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
            # The run begins by leaving out samples whose prediction is wrong. It is given the labels as predictions:
            # who is attacked is decided here, and what is lent expects the whole batch.
            self.first_prediction = labels
            if targets is None:
                return self.attack_single_run(pixels, labels)
            self.target_class = targets
            return self.attack_single_run_targeted(pixels, labels)

        def _get_predicted_label(self, x: Tensor) -> Tensor:
            if self.first_prediction is not None:
                labels, self.first_prediction = self.first_prediction, None
                return labels
            return self.get_logits(x).argmax(dim=1)

        def get_diff_logits_grads_batch(self, imgs: Tensor, la: Tensor) -> tuple[Tensor, Tensor]:
            pixels = imgs.detach().requires_grad_()
            with torch.enable_grad():
                logits = self.get_logits(pixels)
            others = logits.shape[1] - 1
            best_distance = difference = torch.full_like(pixels[:, 0, 0, 0], torch.inf)
            grad = torch.zeros_like(pixels)
            for other in range(others):
                targets = other + (other >= la).long()
                new_difference, new_grad = self._difference(logits, pixels, la, targets, keep=other < others - 1)
                length = new_grad.flatten(1).norm(1 if norm == "linf" else 2, dim=1)
                distance = torch.where(length > 0, new_difference.abs() / length, torch.finfo(length.dtype).max)
                closer = distance < best_distance
                best_distance = torch.where(closer, distance, best_distance)
                difference = torch.where(closer, new_difference, difference)
                grad = torch.where(column(closer, grad), new_grad, grad)
            return difference.unsqueeze(1), grad.unsqueeze(1)

        def get_diff_logits_grads_batch_targeted(
            self, imgs: Tensor, la: Tensor, la_target: Tensor
        ) -> tuple[Tensor, Tensor]:
            pixels = imgs.detach().requires_grad_()
            with torch.enable_grad():
                logits = self.get_logits(pixels)
            difference, grad = self._difference(logits, pixels, la, la_target, keep=False)
            return difference.unsqueeze(1), grad.unsqueeze(1)

        def _difference(
            self, logits: Tensor, pixels: Tensor, la: Tensor, targets: Tensor, *, keep: bool
        ) -> tuple[Tensor, Tensor]:
            """Target minus label and its gradient, which is scaled to a largest entry of 1: the same hyperplane."""
            rows = torch.arange(len(la), device=la.device)
            directions = torch.zeros_like(logits)
            directions[rows, targets] = 1
            directions[rows, la] = -1
            (grad,) = torch.autograd.grad(logits, pixels, directions, retain_graph=keep)
            # torchattacks takes views of it, which a channels_last model's gradient does not have.
            scale, grad = _scaled(grad.contiguous())
            return (logits[rows, targets] - logits[rows, la]).detach().to(grad.dtype) / scale, grad

    def run(lent: Lent, pixels: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
        name = {"linf": "Linf", "l2": "L2"}[norm]
        attack = WithOwnGradients(lent, norm=name, steps=steps, alpha_max=0.1, eta=1.05, beta=0.9)
        return attack.run(pixels, labels, targets)

    return run


def _scaled(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Each sample's largest entry, of shape `[b]` (1 where all are zero), and the gradient divided by it."""
    scale = grad.flatten(1).abs().amax(dim=1)
    scale = torch.where(scale > 0, scale, 1)
    return scale, grad / column(scale, grad)


def column(values: Tensor, images: Tensor) -> Tensor:
    """One value for each sample, shaped to go with its image."""
    return values.reshape(-1, *[1] * (images.dim() - 1))
