"""Adversarial images on disk, and the proof from the file that each of them is one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from robust_peft.files import write_whole
from robust_peft.threat import ThreatModel

FOLDER = "adversarial"


@dataclass(frozen=True)
class SavedImages:
    """Adversarial images of one attack: samples of shape `[b]` and their images of shape `[b, C, H, W]`."""

    attack: str
    threat: ThreatModel
    indices: Tensor
    adv_images: Tensor


def save_images(folder: Path, attack: str, threat: ThreatModel, indices: Tensor, adv_images: Tensor) -> None:
    """Write a batch's adversarial images as safetensors, whole or not at all. Nothing to write is no file."""
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    if len(indices) == 0:
        return
    described = f"{attack} {threat} {threat.box}"
    name = f"{attack.split('@')[0]}-{threat.norm}-{hashlib.sha256(described.encode()).hexdigest()[:8]}"
    box = "none" if threat.box is None else f"{threat.box[0]!r},{threat.box[1]!r}"
    metadata = {"attack": attack, "norm": threat.norm, "eps": repr(threat.eps), "box": box}
    tensors = {"indices": indices.cpu().contiguous(), "adv_images": adv_images.cpu().contiguous()}
    path = folder / FOLDER / f"{name}-{int(indices[0]):07d}.safetensors"
    write_whole(path, lambda temporary: save_file(tensors, temporary, metadata))


def load_images(folder: str | Path) -> list[SavedImages]:
    """Every batch of adversarial images in an evaluation's folder. FileNotFoundError where none were saved."""
    if not (Path(folder) / FOLDER).is_dir():
        raise FileNotFoundError(f"{folder} holds no adversarial images; evaluate with save_images=True.")
    paths = sorted((Path(folder) / FOLDER).glob("*.safetensors"))
    found = []
    for path in paths:
        with safe_open(path, "pt") as file:
            said = file.metadata()
            ends = None if said["box"] == "none" else [float(end) for end in said["box"].split(",")]
            box = None if ends is None else (ends[0], ends[1])
            threat = ThreatModel(said["norm"], float(said["eps"]), box)
            found.append(SavedImages(said["attack"], threat, file.get_tensor("indices"), file.get_tensor("adv_images")))
    return found


@dataclass(frozen=True)
class Recheck:
    """What the saved images are worth: ``failed`` lists (attack, sample) whose image does not fool inside its ball."""

    images: int
    failed: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        said = f"Adversarial images re-checked from the files: {self.images - len(self.failed)} of {self.images} hold"
        if not self.failed:
            return said
        return f"{said}; not {', '.join(f'{attack} sample {index}' for attack, index in self.failed[:5])}"


@torch.no_grad()
def recheck_images(
    folder: str | Path,
    is_right: Callable[[Tensor, Tensor], Tensor],
    images_and_labels: Callable[[Sequence[int]], tuple[Tensor, Tensor]],
) -> Recheck:
    """Re-check saved images.

    Args:
        folder: The evaluation's folder.
        is_right: Images `[b, C, H, W]` and labels `[b]` to a bool tensor `[b]`: whether the model is right.
        images_and_labels: Sample indices to the clean images and labels.
    """
    failed, count = [], 0
    for saved in load_images(folder):
        images, labels = images_and_labels(saved.indices.tolist())
        adv_images = saved.adv_images.to(images.device)
        holds = saved.threat.contains(adv_images, images) & ~is_right(adv_images, labels)
        count += len(holds)
        bad = saved.indices[~holds.cpu()].tolist()
        failed += [(f"{saved.attack} {saved.threat}", index) for index in bad]
    return Recheck(count, tuple(failed))
