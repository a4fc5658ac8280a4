"""How accurate and how robust a model is: verdicts for each sample, counted, with intervals.

Float32 with TF32 off. An adversarial image counts only where a pass of its own finds it misclassified, and an attack
that leaves ball or box is an internal error, never a sample that withstood; a sample that is misclassified as it is
counts as broken under every attack, because the clean image is in the ball. Randomness belongs to the sample, so that
neither batch size nor number of processes changes a draw.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from robust_peft import keyed_random
from robust_peft.attacks import as_victim, check_attack_name, make_attack
from robust_peft.files import read_json, write_json
from robust_peft.processes import gather, process_state
from robust_peft.results import Accuracy
from robust_peft.threat import ThreatModel


@dataclass(frozen=True)
class AttackResult:
    """Verdicts of one attack under one threat model; the clean accuracy has neither."""

    attack: str
    threat: ThreatModel | None
    correct: tuple[bool, ...]
    """For each sample, in the data's order, whether the model was right throughout."""

    @property
    def accuracy(self) -> Accuracy:
        """The count behind it, its share and its 95 % Wilson interval."""
        return Accuracy(sum(self.correct), len(self.correct))


@dataclass
class Report:
    """What `evaluate` found.

    ``report[threat, "pgd-20"]`` is the `Accuracy` under that attack, ``report.clean`` the one without an attack,
    ``report.worst_case(threat)`` counts the samples that withstood every attack under the threat model.
    """

    data: str
    seed: int
    results: list[AttackResult] = field(default_factory=list)

    def find(self, attack: str, threat: ThreatModel | None) -> AttackResult:
        """The verdicts of one attack. KeyError that lists what was measured where there are none."""
        for result in self.results:
            if result.attack == attack.lower() and result.threat == threat:
                return result
        there = ", ".join(f"{r.attack} ({r.threat})" if r.threat else r.attack for r in self.results)
        raise KeyError(f"{attack} under {threat} was not measured. Measured: {there}.")

    def __getitem__(self, key: tuple[ThreatModel, str]) -> Accuracy:
        threat, attack = key
        return self.find(attack, None if attack == "clean" else threat).accuracy

    @property
    def clean(self) -> Accuracy:
        """Accuracy without an attack."""
        return self.find("clean", None).accuracy

    def worst_case(self, threat: ThreatModel) -> Accuracy:
        """Samples that withstood every attack measured under ``threat``, and no attack at all."""
        found = [r.correct for r in self.results if r.threat == threat]
        if not found:
            raise KeyError(f"No attack was measured under {threat}.")
        withstood = [all(verdicts) for verdicts in zip(*found, strict=True)]
        return Accuracy(sum(withstood), len(withstood))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: counts and intervals for people, verdicts as a string of 0 and 1 for programs."""
        rows = []
        for result in self.results:
            accuracy = result.accuracy
            row: dict[str, Any] = {"attack": result.attack}
            if result.threat is not None:
                row |= {"norm": result.threat.norm, "eps": result.threat.eps, "box": result.threat.box}
            row |= {"accuracy": accuracy.accuracy, "correct": accuracy.correct, "total": accuracy.total}
            row |= {"interval": list(accuracy.interval)}
            row |= {"verdicts": "".join("1" if correct else "0" for correct in result.correct)}
            rows.append(row)
        return {"data": self.data, "seed": self.seed, "confidence": 0.95, "results": rows}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Report:
        """The report that `to_dict` wrote down."""
        report = cls(values["data"], values["seed"])
        for row in values["results"]:
            box = row.get("box")
            threat = ThreatModel(row["norm"], row["eps"], box if box is None else tuple(box)) if "norm" in row else None
            report.results.append(AttackResult(row["attack"], threat, tuple(v == "1" for v in row["verdicts"])))
        return report

    def save(self, path: str | Path) -> None:
        """Write the report as JSON, whole or not at all."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read what `save` wrote."""
        return cls.from_dict(read_json(path))

    def __str__(self) -> str:
        lines = [f"{self.data}:"]
        for result in self.results:
            lines.append(f"  {result.attack:<10} {str(result.threat or ''):<14} {result.accuracy}")
        return "\n".join(lines)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: Dataset | DataLoader,
    threats: Sequence[ThreatModel],
    attacks: Sequence[str] = ("clean", "pgd-20"),
    *,
    batch_size: int = 128,
    limit: int | None = None,
    seed: int = 0,
    name: str | None = None,
    progress: bool = False,
) -> Report:
    """Measure a model's accuracy without an attack and under each attack of each threat model.

    Args:
        model: Pixels of shape `[B, C, H, W]` in [0, 1] to logits of shape `[B, K]`, on its device; left as it was.
        data: Samples ``(image, label)``, images uint8 or floats in [0, 1]; a DataLoader's dataset is taken, its batch
            size and order are not.
        threats: Threat models.
        attacks: Names: "clean", "fgsm", "pgd-K" for K steps. "clean" is always measured.
        batch_size: Images in a batch.
        limit: Only the first so many samples.
        seed: Seed of the attacks' random starts.
        name: What the report calls the data; None: the dataset's ``name``.
        progress: Whether to show a progress bar.

    Returns:
        The report, the same on every process; each process does its share of the batches.

    Raises:
        ValueError: For an empty dataset, an unknown attack, labels outside the classes, or images out of range.
    """
    dataset = data.dataset if isinstance(data, DataLoader) else data
    total = len(dataset) if limit is None else min(limit, len(dataset))  # type: ignore[arg-type]
    title = name or getattr(dataset, "name", type(dataset).__name__)
    if total == 0:
        raise ValueError(f"The dataset {title!r} is empty.")
    names = [check_attack_name(attack) for attack in attacks]
    names = ["clean", *dict.fromkeys(n for n in names if n != "clean")]
    jobs: list[tuple[str, ThreatModel | None]] = [("clean", None)]
    jobs += [(n, threat) for threat in threats for n in names if n != "clean"]
    state = process_state()

    # Verdicts of this process's batches: sample index -> one bool for each job.
    own: dict[int, list[bool]] = {}
    starts = range(0, total, batch_size)[state.process_index :: state.num_processes]
    with (
        as_victim(model),
        _plain_float32(),
        tqdm(total=sum(min(batch_size, total - s) for s in starts), unit="img", disable=not progress) as bar,
    ):
        for start in starts:
            indices = range(start, min(start + batch_size, total))
            images, labels, keys = _fetch(dataset, indices, model, seed)
            standing = _is_right(model, images, labels)
            verdicts = [standing]
            for attack_name, threat in jobs[1:]:
                assert threat is not None
                verdicts.append(standing.clone())
                chosen = standing.nonzero().squeeze(1)
                if len(chosen) == 0:
                    continue
                attack = make_attack(attack_name, threat)
                # By name, so that an attack's figure does not depend on which others were asked for.
                own_keys = keyed_random.derive(keys[chosen], zlib.crc32(f"{attack_name} {threat}".encode()))
                adv_images = attack.perturb(model, images[chosen], labels[chosen], keys=own_keys)
                if not threat.contains(adv_images, images[chosen]).all():
                    raise RuntimeError(f"Internal error: {attack_name} left the ball or the box of {threat}.")
                verdicts[-1][chosen] = _is_right(model, adv_images, labels[chosen])
            for index, column in zip(indices, torch.stack(verdicts).T.tolist(), strict=True):
                own[index] = column
            bar.update(len(indices))
    gathered = gather(sorted(own.items()))
    verdicts_of = dict(gathered)
    if len(verdicts_of) != len(gathered) or sorted(verdicts_of) != list(range(total)):
        raise RuntimeError("Internal error: the processes' verdicts do not cover each sample once.")
    report = Report(str(title), seed)
    for job, (attack_name, threat) in enumerate(jobs):
        correct = tuple(verdicts_of[index][job] for index in range(total))
        report.results.append(AttackResult(attack_name, threat, correct))
    return report


def _fetch(dataset: Any, indices: range, model: nn.Module, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A batch on the model's device and in its dtype, with the samples' random keys."""
    parameter = next(model.parameters())
    samples = [dataset[index] for index in indices]
    images = torch.stack([torch.as_tensor(sample[0]) for sample in samples]).to(parameter.device)
    labels = torch.tensor([int(sample[1]) for sample in samples], device=parameter.device)
    dtype = parameter.dtype if parameter.dtype == torch.float64 else torch.float32
    if not (images.dtype == torch.uint8 or images.is_floating_point()):
        raise ValueError(f"images should be uint8 or floating point in [0, 1]. Found {images.dtype}.")
    images = images.to(dtype) / 255 if images.dtype == torch.uint8 else images.to(dtype)
    ThreatModel("linf", 0).check_images(images)
    if labels.min() < 0:
        raise ValueError(f"labels should not be negative. Found {int(labels.min())}.")
    keys = keyed_random.sample_keys(seed, 0, torch.tensor(list(indices), device=parameter.device))
    return images, labels, keys


def _is_right(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    logits = model(images)
    if int(labels.max()) >= logits.shape[1]:
        raise ValueError(f"labels should be in 0..{logits.shape[1] - 1}. Found {int(labels.max())}.")
    # A model that answers NaN is not right, and argmax over NaN would say otherwise for class 0.
    return (logits.argmax(dim=1) == labels) & logits.isfinite().all(dim=1)


@contextmanager
def _plain_float32() -> Iterator[None]:
    """No TF32, no bfloat16 in float32's name and no autocast of the caller's: a verdict must not hang on precision.

    By torch's switch for each backend; the older ones (allow_tf32) cannot be mixed with it.
    """
    backends: Any = torch.backends
    places = ((backends.cuda, "matmul"), (backends.cudnn, "conv"), (backends.cudnn, "rnn"))
    places += ((backends.mkldnn, "matmul"), (backends.mkldnn, "conv"))
    switches: list[Any] = [getattr(backend, name, None) for backend, name in places]
    switches = [switch for switch in switches if hasattr(switch, "fp32_precision")]
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value
