"""The model on the bench: its images, its plain answers, and every attack that the audit makes on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from robust_peft import keyed_random
from robust_peft.attacks.pgd import PGD
from robust_peft.attacks.suite import check_attack_name, components, make_attack
from robust_peft.attacks.victim import Counted, couples_batch
from robust_peft.evaluation.checks.finding import FAILED, PASSED, WARNING
from robust_peft.evaluation.precision import OwnPrecision
from robust_peft.keyed_random import name_key
from robust_peft.objectives import get_objective
from robust_peft.results import mcnemar_p_value
from robust_peft.threat import ThreatModel

# An audit asks some ten questions of a model. At the usual 95 % one sound model in two would be accused by chance of
# something; at 99 % one in ten, and a failed check needs a difference of several points on top of it.
CONFIDENCE = 0.99
# With fewer samples not even a difference on every single one is resolved at that level (2 / 2^7 > 0.01).
LEAST_RIGHT = 8
# Points of accuracy that a stronger attack may gain over a weaker one. On the sound networks of Madry et al. 2018
# (arXiv:1706.06083, tables 1 and 2) 7 to 20 steps gain 4.2 points, and 1 to 20 restarts with 40 to 100 steps 3.9; the
# faults that this is to find gain tens of points. Between the two lies more than twice what a sound network gives.
CLEAR_GAIN = 0.10
# Steps of the attacks whose every step is recorded: twice the usual 20, where Madry et al. 2018 no longer gain.
TRACED_STEPS = 40
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Trace:
    """PGD step by step, on the samples that are right without an attack; the lists have one entry for 0 to K steps."""

    ce: list[float]
    """Mean cross-entropy."""
    margin: list[float]
    """Mean of the best other logit minus the label's; above 0 where the model is wrong."""
    standing: list[int]
    """Samples that were right at this step and at every one before."""
    right_at_the_end: Tensor
    """For each sample of the audit, whether it is right after the last step, a bool tensor of shape `[n]`."""
    broken: Tensor
    """For each sample of the audit, whether any step broke it, re-checked."""


@dataclass
class Bench:
    """What every check works with. Samples are those of the audit, n of them, in the data's order.

    Verdicts are bool tensors of shape `[n]` on the CPU. All are made by passes of their own through the model, in its
    own precision (float32 or better for the arithmetic around it), on images that were found inside ball and box.
    """

    own_model: nn.Module
    threat: ThreatModel
    images: Tensor
    labels: Tensor
    keys: Tensor
    batch_size: int
    attack: Any
    """The audited attack: a name, or an object with ``perturb``."""
    transfer_from: nn.Module | None = None
    train_data: Any = None
    train_mode: tuple[tuple[str, str], ...] = ()
    """Submodules that were in train mode when the model was handed over: name and kind."""
    reported: Tensor | None = None
    """Verdicts of the audited attack, where they were measured before."""

    own_dtype: torch.dtype = torch.float32
    """Of the model's weights."""
    coupled: bool = False
    """Whether a BatchNorm without running statistics lets the samples of a batch depend on each other."""
    half_answers: bool = False
    """Whether the model's logits came in half precision."""
    detached: bool = False
    """Whether the model cut the graph between its input and its output."""
    in_box: bool = True
    """Whether the images lie in [0, 1], so that an attack on them means something."""
    outside: int = 0
    """Images of the audited attack that lie outside ball or box."""
    _done: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parameter = next(iter(self.own_model.parameters()), None)
        if parameter is not None:
            self.own_dtype = parameter.dtype
        half = self.own_dtype in HALF
        self.model = Counted(_Joined(self, OwnPrecision(self.own_model, self.own_dtype) if half else self.own_model))
        # The wrappers' own flags; the model's are the caller's to hold.
        self.model.training = self.model.model.training = False
        self.coupled = couples_batch(self.own_model)
        self.logits = self.logits_of(self.images)
        if self.logits.shape[1] < 2:
            raise ValueError(f"The model should tell at least two classes apart. Found {self.logits.shape[1]} logits.")
        highest = int(self.labels.max())
        if highest >= self.logits.shape[1]:
            raise ValueError(f"labels should be in 0..{self.logits.shape[1] - 1}. Found {highest}.")
        self.right = ~_wrong(self.logits, self.labels).cpu()
        self.broken = ~self.right
        """Samples that anything in the audit broke within the budget, or that are wrong without an attack."""

    @property
    def total(self) -> int:
        """Number of samples, n."""
        return len(self.images)

    @property
    def half(self) -> bool:
        """Whether the model computes in half precision, as far as its weights and its answers say."""
        return self.half_answers or self.own_dtype in HALF

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        """What ``measure`` returns, measured at the first call; an exception is kept and raised again."""
        if name not in self._done:
            try:
                self._done[name] = measure()
            except Exception as error:
                self._done[name] = error
        found = self._done[name]
        if isinstance(found, Exception):
            raise found
        return found

    def known(self, name: str) -> Any:
        """What `once` measured under this name; None where it did not, or an exception came of it."""
        found = self._done.get(name)
        return None if isinstance(found, Exception) else found

    # -- plain passes ---------------------------------------------------------------------------------------------

    def logits_of(self, images: Tensor) -> Tensor:
        """Logits of shape `[m, K]`, batch by batch, without gradients."""
        with torch.no_grad():
            return torch.cat([self.model(part) for part in images.split(self.batch_size)])

    def gradients(self, images: Tensor, labels: Tensor, objective: Callable[[Tensor, Tensor], Tensor] | str) -> Tensor:
        """Gradient of each sample's objective at its own pixels, of the shape of ``images``; as it is, NaN included.

        Args:
            images: Images of shape `[m, C, H, W]`.
            labels: Labels of shape `[m]`.
            objective: A name, or a function of (logits, positions) that returns one number for each sample.
        """
        grads = []
        for start in range(0, len(images), self.batch_size):
            part = images[start : start + self.batch_size].detach().requires_grad_()
            positions = torch.arange(start, start + len(part), device=images.device)
            with torch.enable_grad():
                logits = self.model(part)
                if isinstance(objective, str):
                    values = get_objective(objective)(logits, labels[positions])
                else:
                    values = objective(logits, positions)
                (grad,) = torch.autograd.grad(values.sum(), part)
            grads.append(grad)
        return torch.cat(grads)

    @property
    def scale_free(self) -> str:
        """The objective that no scaling of the logits changes (to a sign or a unit step): dlr, or margin below 3."""
        return "dlr" if self.logits.shape[1] >= 3 else "margin"

    # -- attacks --------------------------------------------------------------------------------------------------

    def tried(self, name: str, attack: Any, among: Tensor, *, victim: nn.Module | None = None, run: int = 0) -> Tensor:
        """Which of the samples ``among`` the attack breaks, a bool tensor of shape `[n]`; remembered under ``name``.

        Args:
            name: Tells this trial from others; its random draws hang on it.
            attack: Anything with ``perturb`` and ``threat``.
            among: Samples to try, of shape `[n]`.
            victim: The model that the attack sees; None: the audited one.
            run: Counts restarts, which draw anew.
        """
        return self.once(f"{name} {run}", lambda: self._try(f"{name}", attack, among, victim, run)[0])

    def _try(
        self, name: str, attack: Any, among: Tensor, victim: nn.Module | None, run: int
    ) -> tuple[Tensor, dict[int, Tensor]]:
        broken, found = torch.zeros(self.total, dtype=torch.bool), {}
        for rows in self._batches(among):
            places = rows.to(self.images.device)
            images, labels = self.images[places], self.labels[places]
            keys = keyed_random.derive(self.keys[places], name_key(f"{name} {attack.threat}"), run)
            adv_images = attack.perturb(victim or self.model, images, labels, keys=keys).detach()
            inside, wrong = self._judge(attack.threat, adv_images, images, labels)
            broken[rows] = (inside & wrong).cpu() & among[rows]
            if name.startswith("audited"):
                self.outside += int((~inside).sum())
            found.update(zip(rows.tolist(), adv_images.cpu(), strict=True))
        self._count(attack.threat, broken)
        return broken, found

    def _count(self, threat: ThreatModel, broken: Tensor) -> None:
        if threat.norm == self.threat.norm and threat.eps <= self.threat.eps:
            self.broken |= broken

    def _judge(self, threat: ThreatModel, adv_images: Tensor, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Whether each image is inside ball and box, and whether the model is wrong on it."""
        with torch.no_grad():
            return threat.contains(adv_images, images), _wrong(self.model(adv_images), labels)

    def _batches(self, among: Tensor) -> Iterator[Tensor]:
        """The samples to try, batch by batch; where a batch's samples depend on each other, always the same batches."""
        if not among.any():
            return
        if not self.coupled:
            yield from among.nonzero().squeeze(1).split(self.batch_size)
            return
        for rows in torch.arange(self.total).split(self.batch_size):
            if among[rows].any():
                yield rows

    def trace(self, objective: str, scale: float = 1.0) -> Trace:
        """`TRACED_STEPS` of PGD on an objective of the logits times ``scale``, from a random start, every step seen."""
        return self.once(f"trace {objective} {scale}", lambda: self._trace(objective, scale))

    def _trace(self, objective: str, scale: float) -> Trace:
        attack = PGD(self.threat, TRACED_STEPS, objective=objective)
        values = torch.zeros(3, TRACED_STEPS + 1)
        at_the_end, broken = torch.zeros(self.total, dtype=torch.bool), torch.zeros(self.total, dtype=torch.bool)
        for rows in self._batches(self.right):
            places = rows.to(self.images.device)
            images, labels = self.images[places], self.labels[places]
            counted = self.right[rows]
            recorder = _Recorder(self.model, labels, scale)
            # One name for every objective: they start at the same points, so that only the objective differs.
            keys = keyed_random.derive(self.keys[places], name_key("trace"))
            last = attack.perturb(recorder, images, labels, keys=keys)
            with torch.no_grad():
                recorder(last)
            wrong = torch.stack(recorder.wrong)[:, counted]
            at_the_end[rows] = ~recorder.wrong[-1] & counted
            values[0] += torch.stack(recorder.ce)[:, counted].sum(dim=1)
            values[1] += torch.stack(recorder.margin)[:, counted].sum(dim=1)
            values[2] += (~wrong).cummin(dim=0).values.sum(dim=1)
            # Passes of their own on what was found, as for every other verdict.
            inside, fooled = self._judge(self.threat, recorder.first_wrong, images, labels)
            broken[rows] = (inside & fooled).cpu() & counted
        self._count(self.threat, broken)
        count = max(1, int(self.right.sum()))
        ce, margin = (values[:2] / count).nan_to_num().tolist()
        return Trace(ce, margin, values[2].int().tolist(), at_the_end, broken)

    # -- the audited attack ---------------------------------------------------------------------------------------

    @property
    def attack_name(self) -> str:
        """What the report calls the audited attack."""
        return check_attack_name(self.attack, self.threat.norm) if isinstance(self.attack, str) else str(self.attack)

    def parts(self) -> list[Any]:
        """The attack, or those that an ensemble runs one after another on what stands."""
        if not isinstance(self.attack, str):
            return [self.attack]
        return self.once("parts", self._make_parts)

    def _make_parts(self) -> list[Any]:
        name = check_attack_name(self.attack, self.threat.norm)
        options: dict[str, Any] = {"early_stop": not self.coupled, "transfer_from": self.transfer_from}
        return [make_attack(part, self.threat, **options) for part in components(name)]

    def audited(self) -> tuple[Tensor, dict[int, Tensor]]:
        """Which samples withstand the audited attack, and the images that it ended with where the audit ran it."""
        return self.once("audited", self._run_audited)

    def _run_audited(self) -> tuple[Tensor, dict[int, Tensor]]:
        if self.reported is not None:
            self.broken |= ~self.reported
            return self.reported, {}
        standing, images = self.right.clone(), {}
        for place, part in enumerate(self.parts()):
            broken, found = self._try(f"audited {place}", part, standing, None, 0)
            images.update(found)
            standing &= ~broken
        return standing, images

    # -- comparisons ----------------------------------------------------------------------------------------------

    def judge_gain(self, weaker: Tensor, stronger: Tensor, clear: float = CLEAR_GAIN) -> tuple[str, float]:
        """How much accuracy the second attack takes beyond the first, and what that means.

        Args:
            weaker: Samples that withstand the first attack, of shape `[n]`.
            stronger: Samples that withstand the second.
            clear: The check fails from so large a gain on, as a fraction of the n samples.

        Returns:
            The status (passed unless the paired test resolves a gain), and the gain.
        """
        gain = (int(weaker.sum()) - int(stronger.sum())) / self.total
        if gain <= 0 or mcnemar_p_value(weaker.tolist(), stronger.tolist()) > 1 - CONFIDENCE:
            return PASSED, gain
        return (FAILED if gain >= clear else WARNING), gain

    def share(self, count: int | Tensor) -> str:
        """A count of samples as text."""
        count = int(count.sum()) if isinstance(count, Tensor) else count
        return f"{count} of {self.total}"


class _Joined(nn.Module):
    """A model whose logits always hang on its pixels, so that one which cuts the graph has a gradient of zero."""

    def __init__(self, bench: Bench, model: nn.Module) -> None:
        super().__init__()
        self._bench = bench
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits = self.model(images)
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(images):
            found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"The model should return logits of shape [{len(images)}, K]. Found {found}.")
        if logits.dtype in HALF:  # weights in float32, but an autocast of its own
            self._bench.half_answers = True
            logits = logits.float()
        if torch.is_grad_enabled() and images.requires_grad and not logits.requires_grad:
            self._bench.detached = True
            logits = logits + 0 * images.flatten(1).sum(dim=1, keepdim=True)
        return logits


class _Recorder(nn.Module):
    """Notes what an attack sees at each of its passes, and keeps the first image that fooled the model."""

    def __init__(self, model: nn.Module, labels: Tensor, scale: float) -> None:
        super().__init__()
        self.model = model
        self.training = False
        self.scale, self.labels = scale, labels
        self.ce: list[Tensor] = []
        self.margin: list[Tensor] = []
        self.wrong: list[Tensor] = []
        self.first_wrong = torch.empty(0)

    def forward(self, images: Tensor) -> Tensor:
        logits = self.model(images)
        plain = logits.detach()
        wrong = _wrong(plain, self.labels)
        if not self.wrong:
            self.first_wrong = images.detach().clone()
            self._found = wrong
        else:
            fresh = (wrong & ~self._found).reshape(-1, *[1] * (images.dim() - 1))
            self.first_wrong = torch.where(fresh, images.detach(), self.first_wrong)
            self._found = self._found | wrong
        self.ce.append(functional.cross_entropy(plain, self.labels, reduction="none").float().cpu())
        self.margin.append(get_objective("margin")(plain, self.labels).float().cpu())
        self.wrong.append(wrong.cpu())
        return logits * self.scale if self.scale != 1 else logits


def _wrong(logits: Tensor, labels: Tensor) -> Tensor:
    # A model that answers NaN is not right, and argmax over NaN would say otherwise for class 0.
    return (logits.argmax(dim=1) != labels) | ~logits.isfinite().all(dim=1)


def clean_margins(logits: Tensor, labels: Tensor) -> Tensor:
    """How far the label's logit is above the best other one, of shape `[m]`."""
    return -get_objective("margin")(logits, labels)


def spread(logits: Tensor) -> float:
    """Median over samples of the distance between the highest and the lowest logit: the scale of a difference."""
    finite = logits[logits.isfinite().all(dim=1)]
    if len(finite) == 0:
        return math.nan
    return float((finite.amax(dim=1) - finite.amin(dim=1)).double().median())


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Largest difference between two passes' logits, as a fraction of their spread; infinite where one is no number."""
    if not torch.equal(a.isfinite(), b.isfinite()):
        return math.inf
    difference = (a.double() - b.double()).nan_to_num(0, 0, 0).abs().max()
    scale = spread(a)
    if float(difference) == 0:
        return 0.0
    return float(difference) / scale if scale > 0 else math.inf


def plain(number: float) -> float | str:
    """The number as JSON can hold it."""
    return number if math.isfinite(number) else str(number)


def first(names: Sequence[str], most: int = 3) -> str:
    """The first few names of a list, as text."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
