"""Checks of the images: are they what the model expects, and has it seen them before?"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from robust_peft.evaluation.checks.bench import CLEAR_GAIN, Bench
from robust_peft.evaluation.checks.finding import FAILED, NOT_RUN, PASSED, WARNING, Finding, gravest

# Usual normalisations: mean and standard deviation of each channel for pixels in [0, 1].
NORMALISATIONS = {
    "ImageNet's mean and deviation": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "CIFAR-10's mean and deviation": ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.262)),
    "MNIST's mean and deviation": ((0.1307,), (0.3081,)),
    "-1 to 1": ((0.5,), (0.5,)),
    "0 to 255": ((0.0,), (1 / 255,)),
}
# A model that is right more often by this much on normalised pixels was made for them. Normalising twice costs a sound
# model accuracy, whatever the statistics.
NORMALISATION_GAIN = CLEAR_GAIN
# Least part of the box that the images should take up together: below, the budget is not what it seems.
LEAST_RANGE = 0.25

# Share of test samples that may be found among the training images. Public sets have a few (Barz and Denzler 2020,
# arXiv:1902.00423); each adds no more than itself to a figure.
SEEN_SHARE = 0.01


def normalisation(bench: Bench) -> Finding:
    images = bench.images
    lowest, highest = (value.item() for value in torch.aminmax(images))
    box = bench.threat.box or (0.0, 1.0)
    if not bench.in_box:
        return Finding(
            FAILED,
            f"Pixels go from {lowest:.3g} to {highest:.3g}, the box from {box[0]:g} to {box[1]:g}: they were "
            "normalised before they came. An attack on them stops at the wrong box, and its budget is in other units; "
            "put the normalisation inside the model (robust_peft.models.Normalized).",
            {"lowest": lowest, "highest": highest},
        )
    channels = images.shape[1]
    accuracy = {"as they are": bench.right}
    for name, (mean, std) in NORMALISATIONS.items():
        changed = (images - _channels(mean, channels, images)) / _channels(std, channels, images)
        logits = bench.logits_of(changed)
        right = (logits.argmax(dim=1) == bench.labels) & logits.isfinite().all(dim=1)
        accuracy[name] = right.cpu()
    best = max((name for name in accuracy if name != "as they are"), key=lambda name: int(accuracy[name].sum()))
    status, gain = bench.judge_gain(accuracy[best], bench.right, clear=NORMALISATION_GAIN)
    evidence = (
        f"On pixels as they are, {lowest:.3g} to {highest:.3g}, the model is right on {bench.share(bench.right)} "
        f"samples; of the usual normalisations the best one ({best}) makes it {bench.share(accuracy[best])}."
    )
    if status == FAILED:
        evidence += " Normalisation seems to lie outside the model; put it inside (robust_peft.models.Normalized)."
    if highest - lowest < LEAST_RANGE * (box[1] - box[0]):
        status = gravest(status, WARNING)
        evidence += f" The images take up a small part of the box from {box[0]:g} to {box[1]:g}."
    numbers = {"lowest": lowest, "highest": highest, "right": {n: int(r.sum()) for n, r in accuracy.items()}}
    return Finding(status, evidence, numbers)


def _channels(values: tuple[float, ...], channels: int, like: Tensor) -> Tensor:
    """One value for each channel: their mean where the images have another number of channels."""
    chosen = values if len(values) == channels else (sum(values) / len(values),)
    return torch.tensor(chosen, dtype=like.dtype, device=like.device).reshape(1, -1, 1, 1)


def train_images(bench: Bench) -> Finding:
    if bench.train_data is None:
        return Finding(NOT_RUN, "No training images were given.")
    wanted: dict[bytes, list[int]] = {}
    for row, digest in enumerate(_digests(bench.images)):
        wanted.setdefault(digest, []).append(row)
    seen: set[int] = set()
    shapes, count = set(), 0
    for part in _parts(bench.train_data):
        count += len(part)
        shapes.add(tuple(part.shape[1:]))
        for digest in _digests(part):
            seen.update(wanted.get(digest, ()))
    shape = tuple(bench.images.shape[1:])
    if shape not in shapes:
        return Finding(NOT_RUN, f"Training images of shape {list(min(shapes))} cannot equal images of {list(shape)}.")
    numbers = {"seen": len(seen), "train": count, "first": sorted(seen)[:20]}
    evidence = f"{bench.share(len(seen))} samples are among the {count} training images, pixel by pixel."
    if not seen:
        return Finding(PASSED, evidence, numbers)
    return Finding(FAILED if len(seen) > SEEN_SHARE * bench.total else WARNING, evidence, numbers)


def _parts(data: Any) -> Any:
    """The images of a data set, in batches of shape `[m, C, H, W]`; images of several sizes come one by one."""
    images = getattr(data, "images", None)
    if isinstance(images, Tensor) and images.dim() == 4:
        yield from images.split(4096)
        return
    for index in range(len(data)):
        yield torch.as_tensor(data[index][0]).unsqueeze(0)


def _digests(images: Tensor) -> list[bytes]:
    """A hash of each image's pixels in 8 bits, so that uint8 and float copies of one image are the same."""
    if images.dtype != torch.uint8:
        images = (images.double().clamp(0, 1) * 255).round().to(torch.uint8)
    rows = images.detach().cpu().contiguous().flatten(1).numpy()
    return [hashlib.sha256(row.tobytes()).digest() for row in rows]
