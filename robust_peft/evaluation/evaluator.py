"""How accurate and how robust a model is: verdicts for each sample, counted, with intervals.

Float32 with TF32 off. An adversarial image counts only where a pass of its own finds it misclassified, and an attack
that leaves ball or box is an internal error, never a sample that withstood; a sample that is misclassified as it is
counts as broken under every attack, because the clean image is in the ball. Randomness belongs to the sample, so that
neither batch size nor number of processes changes a draw.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, SequentialSampler
from tqdm.auto import tqdm

from robust_peft import keyed_random
from robust_peft.attacks import as_victim
from robust_peft.attacks.suite import (
    SUITES,
    check_attack_name,
    check_installed,
    components,
    forwards_of,
    make_attack,
)
from robust_peft.attacks.victim import Counted, couples_batch
from robust_peft.evaluation.precision import PRECISIONS, ReducedPrecision, in_own_precision, plain_float32
from robust_peft.evaluation.report import BROKEN, BROKEN_BEFORE, UNKNOWN, WITHSTOOD, AttackResult, Report
from robust_peft.evaluation.saved_images import recheck_images
from robust_peft.evaluation.saved_images import save_images as write_images
from robust_peft.evaluation.store import VerdictStore
from robust_peft.models.checkpoints import fingerprint_of_all
from robust_peft.processes import gather, process_state
from robust_peft.threat import ThreatModel

RANDOM_PASSES = 20  # over which a random model's logits are averaged for a verdict
# A changed version of any of these may change a verdict, so figures of two are not one measurement.
VERSIONED = ("robust_peft", "torch", "torchattacks", "foolbox")


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: Dataset | DataLoader,
    threats: Sequence[ThreatModel],
    attacks: Sequence[str] | None = None,
    *,
    suite: str | None = None,
    batch_size: int = 128,
    limit: int | None = None,
    seed: int = 0,
    each: bool = False,
    precision: str = "fp32",
    transfer_from: nn.Module | None = None,
    output: str | Path | None = None,
    save_images: bool = False,
    time_limit: float | None = None,
    name: str | None = None,
    progress: bool = False,
) -> Report:
    """Measure a model's accuracy without an attack and under each attack of each threat model.

    Args:
        model: Pixels of shape `[B, C, H, W]` in [0, 1] to logits of shape `[B, K]`, on its device; left as it was.
        data: Samples ``(image, label)``, images uint8 or floats in [0, 1]; a DataLoader's dataset is taken, its batch
            size and order are not.
        threats: Threat models.
        attacks: Names from `robust_peft.attacks.ENTRIES`, e.g. "pgd-20", "apgd-ce", "autoattack". "clean" is always
            measured. Under each threat model they run in this order. None: "clean" and "pgd-20".
        suite: Name of a list of attacks (`robust_peft.attacks.SUITES`), in place of ``attacks``.
        batch_size: Images in a batch.
        limit: Only the first so many samples.
        seed: Seed of the attacks' random draws.
        each: Try every attack on every sample that is right without one, so that each attack's figure is its own.
            Otherwise a sample that one attack has broken is spared the next ones: the worst case is the same for less.
        precision: "fp32", or "bf16" for the attacks' iterations. A success counts only where float32 confirms it.
        transfer_from: The second model, for the attack "transfer".
        output: Folder that keeps every batch's verdicts, so that the same call goes on where it was interrupted; more
            attacks, threat models or samples may be added. None: nothing is kept.
        save_images: Also keep the adversarial images there, and re-check them from the files at the end.
        time_limit: Seconds after which to stop cleanly between two batches; the report is then not ``finished``.
        name: What the report calls the data; None: the dataset's ``name``.
        progress: Whether to show a progress bar.

    Returns:
        The report, the same on every process; each process does its share of the batches.

    Raises:
        ValueError: For an empty dataset, an unknown attack or one that the norm does not have, labels outside the
            classes, images out of range, or an ``output`` that was begun with other data, weights or settings.
        FileExistsError: If ``output`` holds something else.
    """
    _check_numbers(batch_size=batch_size, limit=limit)
    dataset = _dataset_of(data)
    total = len(dataset) if limit is None else min(limit, len(dataset))
    title = str(name or getattr(dataset, "name", type(dataset).__name__))
    if total == 0:
        raise ValueError(f"The dataset {title!r} is empty.")
    if precision not in PRECISIONS:
        raise ValueError(f"precision should be one of {', '.join(PRECISIONS)}. Found precision = {precision!r}.")
    if save_images and output is None:
        raise ValueError("save_images needs output, the folder to keep them in.")
    if suite is not None and attacks is not None:
        raise ValueError("suite stands in place of attacks; give one of them.")
    jobs = _jobs(threats, ("pgd-20",) if attacks is None else attacks, suite)
    for part in {part for _, attack in jobs for part in components(attack)}:
        check_installed(part)  # now, not after hours of other attacks
    if transfer_from is None and any(attack.startswith("transfer") for _, attack in jobs):
        raise ValueError("The attack transfer needs a second model: give it as transfer_from.")
    measuring = _Measuring(
        model, dataset, total, batch_size=batch_size, seed=seed, precision=precision, transfer_from=transfer_from,
        progress=progress, deadline=None if time_limit is None else time.monotonic() + time_limit,
    )  # fmt: skip
    if measuring.coupled and (save_images or precision != "fp32"):
        raise ValueError(
            "Predictions depend on who else is in the batch (BatchNorm without running statistics), so that an image "
            'cannot be judged alone: neither save_images nor precision="bf16" is possible.'
        )
    store = VerdictStore(None if output is None else Path(output), measuring.settings(title, save_images))
    try:
        with as_victim(model), plain_float32():
            measuring.check_content(store, total)
            measuring.run("clean", None, range(total), store, None)
            wrong = {i for i, right in store["clean"].correct.items() if not right}
            for threat in threats:
                broken = set(wrong)
                for attack in (a for t, a in jobs if t == threat):
                    own_broken = set(wrong if each else broken)
                    for part in components(attack):
                        todo = [i for i in range(total) if i not in own_broken]
                        measuring.run(part, threat, todo, store, Path(output) if output and save_images else None)
                        correct = store[measuring.job_key(part, threat)].correct
                        own_broken |= {i for i in todo if not correct.get(i, True)}
                    broken |= own_broken
            report = Report(title, seed, _results(jobs, store, total, each, measuring.job_key), precision)
            report.randomised = measuring.randomised
            report.fixed_batches = batch_size if measuring.coupled else None
            if save_images and report.finished and process_state().is_main_process:
                report.rechecked = str(recheck_images(output or "", measuring.is_right, measuring.images_and_labels))
    finally:
        store.close()
    return report


def _check_numbers(**numbers: int | None) -> None:
    for name, value in numbers.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} should be an integer of at least 1. Found {name} = {value!r}.")


def _dataset_of(data: Any) -> Any:
    """The dataset; of a loader, only where nothing but batch size and order would be lost with it."""
    if not isinstance(data, DataLoader):
        return data
    if type(data.sampler) not in (SequentialSampler, RandomSampler):
        raise ValueError(
            f"The loader chooses samples by a {type(data.sampler).__name__}, which an evaluation would pass over: "
            "give it the samples to measure as a dataset (torch.utils.data.Subset)."
        )
    return data.dataset


def _jobs(threats: Sequence[ThreatModel], attacks: Sequence[str], suite: str | None) -> list[tuple[ThreatModel, str]]:
    if suite is not None and suite not in SUITES:
        raise ValueError(f"suite should be one of {', '.join(SUITES)}. Found suite = {suite!r}.")
    jobs = []
    for name in attacks:
        check_attack_name(name)  # also where there is no threat model
    for threat in dict.fromkeys(threats):
        chosen = attacks if suite is None else SUITES[suite][threat.norm]
        names = dict.fromkeys(check_attack_name(name, threat.norm) for name in chosen)
        jobs += [(threat, name) for name in names if name != "clean"]
    return jobs


def _results(
    jobs: list[tuple[ThreatModel, str]], store: VerdictStore, total: int, each: bool, job_key: Callable[..., str]
) -> list[AttackResult]:
    """The attacks' verdicts from those of their components, in the order in which they ran."""
    clean = store["clean"]
    verdicts = "".join(UNKNOWN if i not in clean.correct else "01"[clean.correct[i]] for i in range(total))
    results = [AttackResult("clean", None, verdicts, (), clean.forwards, clean.backwards, clean.seconds)]
    wrong = {i for i in range(total) if verdicts[i] == BROKEN}
    broken: dict[ThreatModel, set[int]] = {}
    ran: set[tuple[ThreatModel, str]] = set()  # a component may have run before, as an attack of its own
    for threat, attack in jobs:
        spared = set() if each else broken.setdefault(threat, set())
        own_broken: set[int] = set()
        rows = []
        for part in components(attack):
            found = store[job_key(part, threat)]
            row = []
            for i in range(total):
                if i in wrong:
                    row.append(BROKEN)
                elif i in own_broken:
                    row.append(BROKEN_BEFORE)
                elif i in spared and ((threat, part) not in ran or found.correct.get(i, True)):
                    row.append(BROKEN_BEFORE)  # also where an earlier call with this folder had tried it
                else:
                    row.append(UNKNOWN if i not in found.correct else WITHSTOOD if found.correct[i] else BROKEN)
            ran.add((threat, part))
            own_broken |= {i for i in range(total) if row[i] == BROKEN}
            costs = (found.forwards, found.backwards, found.seconds)
            rows.append(AttackResult(part, threat, "".join(row), (), *costs))
        if len(rows) == 1:
            result = rows[0]
        else:
            whole = ""
            for i, of_sample in enumerate(zip(*(row.verdicts for row in rows), strict=True)):
                first = [v for v in (BROKEN, UNKNOWN, BROKEN_BEFORE) if v in of_sample]
                whole += BROKEN if i in own_broken else (first or [WITHSTOOD])[0]
            costs = [sum(getattr(row, cost) for row in rows) for cost in ("forwards", "backwards", "seconds")]
            result = AttackResult(attack, threat, whole, tuple(rows), *costs)
        results.append(result)
        broken.setdefault(threat, set()).update(i for i in range(total) if result.verdicts[i] == BROKEN)
    return results


class _Measuring:
    """A model and its data, and how one attack is tried on one batch."""

    def __init__(
        self,
        model: nn.Module,
        dataset: Any,
        total: int,
        *,
        batch_size: int,
        seed: int,
        precision: str,
        transfer_from: nn.Module | None,
        progress: bool,
        deadline: float | None,
    ) -> None:
        parameter = next(iter(model.parameters()), None)
        own = torch.float32 if parameter is None else parameter.dtype
        self.device = torch.device("cpu") if parameter is None else parameter.device
        self.own_model = model
        self.model = in_own_precision(model)
        self.dtype = torch.float64 if own == torch.float64 else torch.float32
        if precision == "bf16" and own != torch.float32:
            raise ValueError(f'precision="bf16" is for float32 models. Found weights in {own}.')
        self.searched = ReducedPrecision(model).eval() if precision == "bf16" else self.model
        self.coupled = couples_batch(model) or (transfer_from is not None and couples_batch(transfer_from))
        self.dataset, self.total, self.batch_size, self.seed = dataset, total, batch_size, seed
        self.precision, self.transfer_from, self.transfer_key = precision, None, ""
        if transfer_from is not None:
            self.transfer_from = in_own_precision(transfer_from)
            self.transfer_key = fingerprint_of_all(transfer_from)[:16]
        self.progress, self.deadline = progress, deadline
        self.stopped = False
        self.num_classes = 0
        self.randomised = False

    def settings(self, title: str, save_images: bool) -> dict[str, Any]:
        """What every call that goes on with a folder must agree on."""
        versions = {}
        for package in VERSIONED:
            try:
                versions[package] = metadata.version(package)
            except metadata.PackageNotFoundError:
                continue
        return {
            "data": title,
            "model_sha256": fingerprint_of_all(self.own_model),
            "seed": self.seed,
            "precision": self.precision,
            "fixed_batches": self.batch_size if self.coupled else None,
            "save_images": save_images,
            "versions": versions,
        }

    def job_key(self, attack: str, threat: ThreatModel | None) -> str:
        """What the store calls an attack under a threat model."""
        source = f" from {self.transfer_key}" if attack.startswith("transfer") else ""
        return attack if threat is None else f"{attack} {threat.norm} {threat.eps!r} {threat.box}{source}"

    def fetch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, list[str]]:
        """A batch on the model's device and in the dtype of its images, and a hash of each sample's content."""
        samples = [self.dataset[index] for index in indices]
        images = torch.stack([torch.as_tensor(sample[0]) for sample in samples])
        labels = torch.tensor([int(sample[1]) for sample in samples])
        if not (images.dtype == torch.uint8 or images.is_floating_point()):
            raise ValueError(f"images should be uint8 or floating point in [0, 1]. Found {images.dtype}.")
        hashes = [content_hash(image, int(label)) for image, label in zip(images, labels, strict=True)]
        images = images.to(self.device)
        images = images.to(self.dtype) / 255 if images.dtype == torch.uint8 else images.to(self.dtype)
        # A pixel beyond the box by rounding alone is accepted and brought back: the clean image belongs to its ball.
        ThreatModel("linf", 0).check_images(images)
        images = images.clamp(0, 1)
        if labels.min() < 0:
            raise ValueError(f"labels should not be negative. Found {int(labels.min())}.")
        return images, labels.to(self.device), hashes

    def images_and_labels(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A batch without its hashes."""
        images, labels, _ = self.fetch(indices)
        return images, labels

    def is_right(self, images: Tensor, labels: Tensor) -> Tensor:
        """Whether the model is right, a bool tensor of shape `[B]`; on average, where it is random."""
        logits = self.model(images)
        for _ in range(RANDOM_PASSES - 1 if self.randomised else 0):
            logits = logits + self.model(images)
        self.num_classes = logits.shape[1]
        if int(labels.max()) >= logits.shape[1]:
            raise ValueError(f"labels should be in 0..{logits.shape[1] - 1}. Found {int(labels.max())}.")
        # A model that answers NaN is not right, and argmax over NaN would say otherwise for class 0.
        return (logits.argmax(dim=1) == labels) & logits.isfinite().all(dim=1)

    def check_content(self, store: VerdictStore, total: int) -> None:
        """Look at the model, and refuse a model or data that are not what the store's verdicts were measured on."""
        images, labels = self.images_and_labels(range(min(self.batch_size, total) if self.coupled else 1))
        self.is_right(images, labels)  # the first error, if any, and the number of classes
        logits, again = self.model(images), self.model(images)
        if logits.isinf().any():
            raise ValueError(
                "logits should be finite. Found infinite ones; give masked classes a large negative logit."
            )
        self.randomised = not torch.allclose(logits, again, rtol=1e-4, atol=1e-5, equal_nan=True)
        known = sorted(index for index in store.hashes if index < total)
        for start in range(0, len(known), self.batch_size):
            indices = known[start : start + self.batch_size]
            for index, found in zip(indices, self.fetch(indices)[2], strict=True):
                if found != store.hashes[index]:
                    raise ValueError(
                        f"Sample {index} is not the one that was evaluated before (its content differs): the data was "
                        "changed or shuffled. Name another folder."
                    )
        if not self.randomised and not self.coupled and logits.isfinite().all():
            # Weights alone do not say what a forward pass makes of them.
            store.check_probe(logits[0].tolist())

    def run(
        self, part: str, threat: ThreatModel | None, todo: Sequence[int], store: VerdictStore, images_to: Path | None
    ) -> None:
        """Try an attack on samples, batch by batch, each process its share; what is known already is left alone."""
        state, wanted = process_state(), set(todo)
        known = store[self.job_key(part, threat)].correct
        if self.coupled:
            # Nobody may leave its batch, and a batch in which nobody is of interest is left out whole.
            starts = range(0, self.total, self.batch_size)
            chunks = [range(s, min(s + self.batch_size, self.total)) for s in starts]
            chunks = [chunk for chunk in chunks if any(i in wanted and i not in known for i in chunk)]
        else:
            batches = [todo[s : s + self.batch_size] for s in range(0, len(todo), self.batch_size)]
            # A batch is cut before what is known leaves it, so that going on after an interruption finds the same.
            chunks = [[i for i in batch if i not in known] for batch in batches]
        own = [chunk for chunk in chunks[state.process_index :: state.num_processes] if len(chunk)]
        per_image = 1 if threat is None else forwards_of(part, threat.norm, self.num_classes)
        title = part if threat is None else f"{part} {threat}"
        with tqdm(
            total=sum(map(len, own)) * per_image, desc=title, unit="pass", unit_scale=True, leave=False,
            disable=not (self.progress and own and state.is_main_process),
        ) as bar:  # fmt: skip
            done = 0
            for chunk in own:
                if self.stopped or (self.deadline is not None and time.monotonic() > self.deadline):
                    self.stopped = True
                    break
                self._one_batch(part, threat, chunk, wanted, store, images_to, bar)
                done += len(chunk) * per_image
                bar.update(done - bar.n)
        store.share()
        self.stopped = any(gather([self.stopped]))

    def _one_batch(
        self,
        part: str,
        threat: ThreatModel | None,
        chunk: Sequence[int],
        wanted: set[int],
        store: VerdictStore,
        images_to: Path | None,
        bar: Any,
    ) -> None:
        began, key = time.monotonic(), self.job_key(part, threat)
        images, labels, hashes = self.fetch(chunk)
        for index, found in zip(chunk, hashes, strict=True):
            if store.hashes.get(index, found) != found:
                raise ValueError(
                    f"Sample {index} is another one each time that it is fetched: switch the data's augmentation off."
                )
        indices = torch.tensor(list(chunk), device=self.device)
        if threat is None:
            right = self.is_right(images, labels).tolist()
            seconds = time.monotonic() - began
            store.add(key, list(chunk), right, hashes=hashes, forwards=len(chunk), seconds=seconds)
            return
        attack = make_attack(part, threat, early_stop=not self.coupled, transfer_from=self.transfer_from)
        # By name, so that an attack's figure does not depend on which others were asked for.
        keys = keyed_random.derive(
            keyed_random.sample_keys(self.seed, 0, indices), keyed_random.name_key(f"{part} {threat}")
        )
        # Without gradients bfloat16 spares little, and its rounding of the pixels hides small changes from a search.
        searched = self.model if part.startswith("square") else self.searched
        counted = Counted(searched, lambda count: bar.update(min(count, bar.total - bar.n)))
        options: dict[str, Any] = {}
        if searched is not self.model:

            def confirm(adv_images: Tensor, positions: Tensor) -> Tensor:
                adv_images = adv_images.to(images.dtype)
                inside = threat.contains(adv_images, images[positions])
                return inside & ~self.is_right(adv_images, labels[positions])

            options["confirm"] = confirm
        adv_images = attack.perturb(counted, images, labels, keys=keys, **options)
        if not threat.contains(adv_images, images).all():
            raise RuntimeError(f"Internal error: {part} left the ball or the box of {threat}.")
        right = self.is_right(adv_images, labels)
        interest = torch.tensor([i in wanted for i in chunk], device=self.device)
        if images_to is not None:
            fooled = interest & ~right
            write_images(images_to, part, threat, indices[fooled], adv_images[fooled])
        store.add(
            key,
            indices[interest].tolist(),
            right[interest].tolist(),
            forwards=counted.forwards,
            backwards=counted.backwards,
            seconds=time.monotonic() - began,
        )


def content_hash(image: Tensor, label: int) -> str:
    """Sixteen hexadecimal digits of SHA-256 over an image's shape, dtype, bytes and label."""
    digest = hashlib.sha256(f"{list(image.shape)} {image.dtype} {label} ".encode())
    digest.update(image.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
