"""Can this robust accuracy be believed? Named checks, each with evidence, a threshold and a source.

An audit looks for the ways in which figures of this field have come out too high. It cannot prove that one is right:
what it passes has withstood the attacks that it names, and an attack made for this model alone may still do better.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from robust_peft import keyed_random
from robust_peft.attacks import as_victim
from robust_peft.attacks.lending import held
from robust_peft.attacks.suite import check_attack_name
from robust_peft.evaluation.checks import FAILED, NOT_RUN, PASSED, QUESTIONS, WARNING, Bench, Check
from robust_peft.evaluation.checks.strength import CURVE_STEPS
from robust_peft.evaluation.precision import plain_float32
from robust_peft.evaluation.report import Report
from robust_peft.files import read_json, write_json, write_text
from robust_peft.plots import plot_accuracies, plot_panels
from robust_peft.processes import process_state
from robust_peft.results import Accuracy
from robust_peft.threat import ThreatModel

NOT_ASKED = "It was not asked for."
STEPS_PICTURE, BUDGETS_PICTURE = "loss_against_step.png", "accuracy_against_budget.png"


@dataclass
class Audit:
    """What `audit` found.

    ``audit.failed`` and ``audit.warnings`` are the checks that a reader has to be told of, ``audit.checks`` all of
    them, ``audit["zero gradients"]`` one.
    """

    data: str
    threat: ThreatModel
    attack: str
    """The attack whose figure is audited."""
    seed: int
    clean: Accuracy
    """Without an attack."""
    figure: Accuracy | None
    """Under the audited attack; None where the model raised an exception, the images lie outside the box, or no check
    was asked for that is about an attack."""
    lowest: Accuracy
    """What all attacks of the audit within the budget leave together: the accuracy is no higher than this."""
    checks: list[Check] = field(default_factory=list)
    steps: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """For PGD on each objective: mean ``ce``, mean ``margin`` and ``standing`` samples after 0, 1, ... steps."""
    budgets: list[tuple[float, Accuracy]] = field(default_factory=list)
    """Accuracy under PGD on cross-entropy at each budget, from 0 on."""
    forwards: int = 0
    """Images that the audit sent forwards through the model."""
    backwards: int = 0

    def __getitem__(self, name: str) -> Check:
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(f"There is no check {name!r}. Found: {', '.join(check.name for check in self.checks)}.")

    @property
    def failed(self) -> list[Check]:
        """Checks that say that the figure cannot be believed."""
        return self._with(FAILED)

    @property
    def warnings(self) -> list[Check]:
        """Checks that ask for a look."""
        return self._with(WARNING)

    @property
    def passed(self) -> list[Check]:
        """Checks that found nothing."""
        return self._with(PASSED)

    @property
    def not_run(self) -> list[Check]:
        """Checks that could not be made; their evidence says why."""
        return self._with(NOT_RUN)

    def _with(self, status: str) -> list[Check]:
        return [check for check in self.checks if check.status == status]

    @property
    def verdict(self) -> str:
        """The answer in one sentence."""
        counts = f"{len(self.passed)} passed, {len(self.warnings)} warnings, {len(self.not_run)} not run"
        if self.failed:
            return f"The figure cannot be believed: {', '.join(check.name for check in self.failed)} failed ({counts})."
        return f"No check failed ({counts})."

    def __str__(self) -> str:
        figure = "not measured" if self.figure is None else str(self.figure)
        width = max((len(check.name) for check in self.checks), default=0)
        lines = [self.verdict, f"{self.data}, {self.threat}"]
        lines += [f"  {'without an attack':<{width}}  {self.clean}", f"  {self.attack:<{width}}  {figure}"]
        lines += [f"  {'whole audit':<{width}}  {self.lowest}", ""]
        lines += [f"  {check.name:<{width}}  {check.status}" for check in self.checks] + [""]
        lines += [f"{c.name} ({c.status}): {c.evidence}" for c in self.checks if c.evidence != NOT_ASKED]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        threat = {"norm": self.threat.norm, "eps": self.threat.eps, "box": self.threat.box}
        return {
            "verdict": self.verdict,
            "data": self.data,
            **threat,
            "attack": self.attack,
            "seed": self.seed,
            "confidence": 0.95,
            "clean": _counted(self.clean),
            "figure": None if self.figure is None else _counted(self.figure),
            "lowest": _counted(self.lowest),
            "checks": [asdict(check) for check in self.checks],
            "steps": self.steps,
            "budgets": [{"eps": eps} | _counted(accuracy) for eps, accuracy in self.budgets],
            "forwards": self.forwards,
            "backwards": self.backwards,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Audit:
        """The audit that `to_dict` wrote down."""
        box = values["box"]
        figure = values["figure"]
        return cls(
            values["data"],
            ThreatModel(values["norm"], values["eps"], box if box is None else tuple(box)),
            values["attack"],
            values["seed"],
            _accuracy(values["clean"]),
            None if figure is None else _accuracy(figure),
            _accuracy(values["lowest"]),
            [Check(**check) for check in values["checks"]],
            values["steps"],
            [(point["eps"], _accuracy(point)) for point in values["budgets"]],
            values["forwards"],
            values["backwards"],
        )

    def save(self, path: str | Path) -> None:
        """Write the audit as JSON, whole or not at all."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Audit:
        """Read what `save` wrote."""
        return cls.from_dict(read_json(path))

    def write(self, folder: str | Path) -> Path:
        """Write audit.json, the report audit.md, and its two pictures where matplotlib is installed.

        Returns:
            The report's path.
        """
        folder = Path(folder)
        self.save(folder / "audit.json")
        try:
            pictures = self._draw(folder)
        except ImportError as error:
            pictures = [f"The pictures are left out. {error}"]
        return write_text(folder / "audit.md", "\n".join(self._report(pictures)) + "\n")

    def _draw(self, folder: Path) -> list[str]:
        lines = []
        if self.steps:
            total = self.clean.total
            series = {f"PGD on {name}": values for name, values in self.steps.items()}
            panels = {
                "mean cross-entropy": {name: values["ce"] for name, values in series.items()},
                "mean margin": {name: values["margin"] for name, values in series.items()},
                "standing (%)": {n: [100 * count / total for count in v["standing"]] for n, v in series.items()},
            }
            title = f"{self.data}, {self.threat}"
            plot_panels(panels, folder / STEPS_PICTURE, x_label="step", title=title)
            lines += [f"![Loss, margin and accuracy against the attack's step]({STEPS_PICTURE})", ""]
        if self.budgets:
            name, norm = f"PGD-{CURVE_STEPS}", str(self.threat).rsplit(" ", 1)[0]
            plot_accuracies(
                {name: self.budgets},
                folder / BUDGETS_PICTURE,
                x_label=f"budget ({norm}, pixels in [0, 1])",
                title=self.data,
                mark=(self.threat.eps, f"audited, {self.threat}"),
            )
            lines += [f"![Accuracy against the budget, with 95 % intervals]({BUDGETS_PICTURE})", ""]
        return lines

    def _report(self, pictures: Sequence[str]) -> list[str]:
        figure = "not measured" if self.figure is None else str(self.figure)
        lines = [f"# Audit of {self.data}, {self.threat}", "", f"**{self.verdict}**", ""]
        lines += ["| | accuracy, 95 % interval |", "| --- | --- |", f"| without an attack | {self.clean} |"]
        lines += [f"| {self.attack}, the audited figure | {figure} |"]
        lines += [f"| every attack of this audit together | {self.lowest} |", ""]
        lines += ["| check | status | evidence |", "| --- | --- | --- |"]
        lines += [f"| {check.name} | {check.status} | {_cell(check.evidence)} |" for check in self.checks] + [""]
        lines += [*pictures, ""] if pictures else []
        lines += ["## The checks", ""]
        for check in self.checks:
            lines += [f"**{check.name}.** {check.question} {check.threshold} ({check.source}.)", ""]
        lines += [
            "A figure that passes has withstood these attacks and no others: one that is made for this model alone may "
            f"do better. Seed {self.seed}; {self.forwards} images went forwards and {self.backwards} backwards."
        ]
        return lines


@torch.no_grad()
def audit(
    model: nn.Module,
    data: Dataset | DataLoader,
    threat: ThreatModel,
    *,
    attack: Any = "pgd-20",
    limit: int | None = 200,
    batch_size: int = 128,
    seed: int = 0,
    train_data: Dataset | None = None,
    transfer_from: nn.Module | None = None,
    report: Report | None = None,
    checks: Sequence[str] | None = None,
    output: str | Path | None = None,
    name: str | None = None,
    progress: bool = False,
) -> Audit:
    """Check whether a model's robust accuracy under a threat model can be believed.

    Args:
        model: Pixels of shape `[B, C, H, W]` in [0, 1] to logits of shape `[B, K]`, on its device; left as it was.
        data: Samples ``(image, label)``, images uint8 or floats in [0, 1]; a DataLoader's dataset is taken. Images that
            lie outside [0, 1] are a finding, not an error.
        threat: The threat model of the figure, with a budget above 0.
        attack: The attack that the figure was measured with: a name (`robust_peft.attacks.suite`), or an object with
            ``threat`` and ``perturb(model, images, labels, keys=)``, such as a `PGD` with a step size of its own.
        limit: Only the first so many samples; None: all. Differences of less than some 5 points show from 200 on.
        batch_size: Images in a batch.
        seed: Seed of the attacks' random draws.
        train_data: The training images, as ``data``, to look for the samples in.
        transfer_from: A second model with the same classes, to make adversarial images on.
        report: What `evaluate` found for this model and these samples; its verdicts of ``attack`` are then audited
            instead of measured again.
        checks: Names of the checks to make; None: all.
        output: Folder for audit.json, audit.md and the pictures.
        name: What the audit calls the data; None: the dataset's ``name``.
        progress: Whether to show a progress bar.

    Returns:
        The audit. A check during which the model raises an exception is "not run", and its evidence names it.

    Raises:
        ValueError: For an empty dataset, labels outside the classes, an unknown attack or check, an attack under
            another threat model, a budget of 0, or a report of other samples or another model.
        KeyError: If the report has no such attack.
    """
    dataset: Any = data.dataset if isinstance(data, DataLoader) else data
    title = str(name or getattr(dataset, "name", type(dataset).__name__))
    _check_arguments(threat, attack, limit, batch_size, checks)
    total = len(dataset) if limit is None else min(limit, len(dataset))
    if total == 0:
        raise ValueError(f"The dataset {title!r} is empty.")
    parameter = next(iter(model.parameters()), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    double = parameter is not None and parameter.dtype == torch.float64
    images, labels = _fetch(dataset, total, device, torch.float64 if double else torch.float32)
    in_box = _in_box(images)
    train_mode = tuple((module, type(m).__name__) for module, m in model.named_modules() if m.training)
    other = nullcontext() if transfer_from is None else as_victim(transfer_from)
    with torch.inference_mode(False), held(model, device), other, plain_float32():
        # For a model with randomness of its own. Not torch.manual_seed, which reaches devices whose state is not kept.
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)
        bench = Bench(
            model, threat, images.clamp(0, 1) if in_box else images, labels,
            keyed_random.sample_keys(seed, 0, torch.arange(total, device=device)), batch_size, attack,
            transfer_from=transfer_from, train_data=train_data, train_mode=train_mode, in_box=in_box,
        )  # fmt: skip
        bench.parts()  # a name without what it needs is an error at once
        bench.reported = None if report is None else _reported(report, bench)
        found = []
        asked = [q for q in QUESTIONS if checks is None or q.name in checks]
        with tqdm(total=len(asked), unit="check", disable=not progress) as bar:
            for question in QUESTIONS:
                if question not in asked:
                    rule = (question.threshold, question.source)
                    found.append(Check(question.name, question.text, NOT_RUN, NOT_ASKED, *rule))
                    continue
                bar.set_description(question.name)
                found.append(question.answer(bench))
                bar.update()
        # The figure is measured along with anything that is about an attack.
        figure = bench.in_box and any(question.attacks for question in asked)
        result = _conclude(bench, title, seed, found, figure)
    if output is not None and process_state().is_main_process:
        result.write(output)
    return result


def _conclude(bench: Bench, title: str, seed: int, found: list[Check], measure_figure: bool) -> Audit:
    """The figures and curves, as far as they were measured."""
    figure, steps = None, {}
    if measure_figure:
        with suppress(Exception):  # what the model raises under the attack has been said by the checks by now
            figure = Accuracy(int(bench.audited()[0].sum()), bench.total)
    for objective in ("ce", bench.scale_free):
        trace = bench.known(f"trace {objective} 1.0")
        if trace is not None:
            steps[objective] = {"ce": trace.ce, "margin": trace.margin, "standing": trace.standing}
    curve = bench.known("budget curve") or []
    budgets = [(eps, Accuracy(int(standing.sum()), bench.total)) for eps, standing in curve]
    return Audit(
        title,
        bench.threat,
        bench.attack_name,
        seed,
        Accuracy(int(bench.right.sum()), bench.total),
        figure,
        Accuracy(bench.total - int(bench.broken.sum()), bench.total),
        found,
        steps,
        budgets,
        bench.model.forwards,
        bench.model.backwards,
    )


def _check_arguments(
    threat: ThreatModel, attack: Any, limit: int | None, batch_size: int, checks: Sequence[str] | None
) -> None:
    if threat.eps <= 0:
        raise ValueError(f"The budget should be above 0, or there is nothing to audit. Found eps = {threat.eps!r}.")
    for argument, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{argument} should be an integer of at least 1. Found {argument} = {value!r}.")
    unknown = set(checks or ()) - {question.name for question in QUESTIONS}
    if unknown:
        names = ", ".join(question.name for question in QUESTIONS)
        raise ValueError(f"checks should be names out of {names}. Found {', '.join(sorted(unknown))}.")
    if isinstance(attack, str):
        if check_attack_name(attack, threat.norm) == "clean":
            raise ValueError('"clean" is the accuracy without an attack; there is nothing to audit.')
    elif not hasattr(attack, "perturb"):
        raise ValueError(f"attack should be a name or have a method perturb. Found attack = {attack!r}.")
    elif getattr(attack, "threat", None) != threat:
        raise ValueError(f"attack should be one under {threat}. Found {getattr(attack, 'threat', None)}.")


def _fetch(dataset: Any, total: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The images as they are, floats in [0, 1] if they were bytes, and the labels."""
    samples = [dataset[index] for index in range(total)]
    images = torch.stack([torch.as_tensor(sample[0]) for sample in samples])
    labels = torch.tensor([int(sample[1]) for sample in samples])
    if not (images.dtype == torch.uint8 or images.is_floating_point()):
        raise ValueError(f"images should be uint8 or floating point in [0, 1]. Found {images.dtype}.")
    if images.dim() != 4:
        raise ValueError(f"images should be of shape [C, H, W] each. Found {list(images.shape[1:])}.")
    if not images.isfinite().all():
        raise ValueError("images should be finite numbers. Found NaN or infinity.")
    if labels.min() < 0:
        raise ValueError(f"labels should not be negative. Found {int(labels.min())}.")
    pixels = images.to(device)
    return (pixels.to(dtype) / 255 if images.dtype == torch.uint8 else pixels.to(dtype)), labels.to(device)


def _in_box(images: Tensor) -> bool:
    """Whether the images lie in [0, 1], up to rounding."""
    try:
        ThreatModel("linf", 0).check_images(images)
    except ValueError:
        return False
    return True


def _reported(report: Report, bench: Bench) -> Tensor:
    """The report's verdicts of the audited attack on the audit's samples. ValueError where they cannot be."""
    if not isinstance(bench.attack, str):
        raise ValueError("With a report the attack should be one of its names.")
    verdicts = report.find(bench.attack_name, bench.threat)
    clean = report.find("clean", None).correct
    if len(clean) < bench.total or not verdicts.finished:
        raise ValueError(f"The report should have a verdict on all of the {bench.total} samples. Found {len(clean)}.")
    differing = sum(a != b for a, b in zip(clean, bench.right.tolist(), strict=False))
    # One sample may sit on the boundary, where rounding decides.
    if differing > 1:
        raise ValueError(
            f"Without an attack, the model's answers differ from the report's on {differing} of {bench.total} samples: "
            "another model, or other samples."
        )
    return torch.tensor(verdicts.correct[: bench.total]) & bench.right


def _counted(accuracy: Accuracy) -> dict[str, Any]:
    values = {"accuracy": accuracy.accuracy, "correct": accuracy.correct, "total": accuracy.total}
    return values | {"interval": list(accuracy.interval)}


def _accuracy(values: dict[str, Any]) -> Accuracy:
    return Accuracy(values["correct"], values["total"])


def _cell(text: str) -> str:
    """Text that cannot end a table's cell or row."""
    return " ".join(text.split()).replace("|", "\\|")
