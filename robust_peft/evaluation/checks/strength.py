"""Checks of the attack: does it get anywhere, does it get everywhere it may, and would another one get further?"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from robust_peft import keyed_random
from robust_peft.attacks.pgd import FGSM, PGD
from robust_peft.evaluation.checks.bench import LEAST_RIGHT, TRACED_STEPS, Bench
from robust_peft.evaluation.checks.finding import FAILED, NOT_RUN, PASSED, WARNING, Finding, gravest
from robust_peft.threat import ThreatModel

# A longer attack has this many steps at least, and twice those of the audited one: "verify that doubling the number of
# iterations does not increase attack success rate" (Carlini et al. 2019, section 4.8), which says nothing of ten steps.
LONG = 100
# Further random starts; Madry et al. 2018 gain most of what restarts gain with the first few.
RESTARTS = 4

# How far an attack's steps have to carry it, in budgets: to the surface of the ball from its centre.
REACH = 1.0
# Of an attack whose steps are unknown, how near to the surface its images should come.
MEASURED_REACH = 0.9

# Accuracy that may be left where every image can be painted grey: by then there is nothing left to be right about. A
# few per cent are samples on which twenty steps of plain PGD got stuck.
LARGE_ACCURACY = 0.05
# Points by which accuracy may rise with the budget: a larger ball holds the smaller one, so it should not rise at all,
# but every budget's attack is another search.
RISE = 0.05
BUDGETS = (0.25, 0.5, 1, 1.5, 2, 4)
CURVE_STEPS = 20

# Queries of Square. In some hundreds it does not come near to what gradients do in twenty steps, so that whatever it
# finds beyond them is telling; its standard 5,000 are an attack in its own right.
QUERIES = 300
# Draws of noise at the edge of the ball.
DRAWS = 20
TRANSFER_STEPS = 20
# Share of the samples that a black-box attack may break though the audited attack did not: "very few instances"
# (Carlini et al. 2019, section 4.4). Five points are what papers call a difference; one is worth a look.
BLACK_BOX_FAILED, BLACK_BOX_WARNING = 0.05, 0.01


def _too_few(bench: Bench) -> Finding | None:
    count = int(bench.right.sum())
    if count >= LEAST_RIGHT:
        return None
    return Finding(NOT_RUN, f"{count} samples are right without an attack; {LEAST_RIGHT} are needed.")


def single_step(bench: Bench) -> Finding:
    if few := _too_few(bench):
        return few
    one = bench.right & ~bench.tried("fgsm", FGSM(bench.threat), bench.right)
    many = bench.trace("ce").right_at_the_end
    status, gain = bench.judge_gain(many, one, clear=0.0)
    if status == PASSED and gain > 0:
        status = WARNING
    evidence = f"FGSM leaves {bench.share(one)} samples standing and {TRACED_STEPS} steps of PGD {bench.share(many)}."
    if status == FAILED:
        evidence += " The first step is the best one: the gradient elsewhere leads nowhere."
    elif status == WARNING:
        evidence += " So few samples may be chance."
    return Finding(status, evidence, {"single": int(one.sum()), "many": int(many.sum()), "steps": TRACED_STEPS})


def more_steps_or_restarts(bench: Bench) -> Finding:
    if few := _too_few(bench):
        return few
    audited = bench.audited()[0]
    parts = bench.parts()
    own = parts[0] if len(parts) == 1 else PGD(bench.threat, CURVE_STEPS)
    longer, what = _longer(own, bench)
    broken = bench.tried("longer", longer, audited)
    after_steps = audited & ~broken
    again = _with_a_start(own)
    after_restarts = audited.clone()
    for run in range(1, RESTARTS + 1 if again is not None else 1):
        after_restarts &= ~bench.tried("again", again, after_restarts, run=run)
    both = after_steps & after_restarts
    judged = [bench.judge_gain(audited, found) for found in (after_steps, after_restarts, both)]
    restarts = f"{RESTARTS} further starts leave {bench.share(after_restarts)}"
    if again is None:
        restarts = "further starts were not tried"
    evidence = (
        f"{bench.attack_name} leaves {bench.share(audited)} samples standing; {what} leave {bench.share(after_steps)}, "
        f"{restarts}, both {bench.share(both)}."
    )
    numbers = {
        "audited": int(audited.sum()),
        "more_steps": int(after_steps.sum()),
        "more_restarts": int(after_restarts.sum()),
        "both": int(both.sum()),
    }
    return Finding(gravest(*(status for status, _ in judged)), evidence, numbers)


def _longer(attack: Any, bench: Bench) -> tuple[Any, str]:
    """The attack with more of what it iterates, and that in words; another one where it cannot be told."""
    fields = getattr(attack, "__dataclass_fields__", {})
    for name in ("steps", "queries"):
        if name in fields:
            own = getattr(attack, name)
            more = max(LONG, 2 * own) if name == "steps" else 2 * own
            return dataclasses.replace(attack, **{name: more}), f"{more} {name}"
    return PGD(bench.threat, LONG), f"{LONG} steps of PGD"


def _with_a_start(attack: Any) -> Any:
    """The attack with a random start, so that trying again is not repeating; None where it has none."""
    if getattr(attack, "random_start", True):
        return attack
    try:
        return dataclasses.replace(attack, random_start=True)
    except (TypeError, ValueError):
        return None


def reach(bench: Bench) -> Finding:
    threat = bench.threat
    bench.audited()
    if bench.outside:
        return Finding(
            FAILED,
            f"{bench.outside} adversarial images lie outside the ball of {threat} or its box; the audit does not count "
            "them, and a figure that does is another threat model's.",
            {"outside": bench.outside},
        )
    computed = [_computed_reach(part) for part in bench.parts()]
    known = [length for length in computed if length is not None]
    largest = max(known, default=None)
    nearness = _nearness(bench)
    numbers: dict[str, Any] = {"eps": threat.eps, "reach": largest, "standing_measured": len(nearness)}
    measured = ""
    if nearness:
        typical = sorted(nearness)[len(nearness) // 2]
        numbers |= {"median_nearness": typical, "largest_nearness": max(nearness)}
        measured = f" Perturbations of samples that withstood it are {100 * typical:.0f} % of what ball and box allow."
    if largest is not None and len(known) == len(computed):
        steps = f"Its steps together are {largest:.4g} long under the attack's norm, the budget is {threat.eps:.4g}."
        if largest < REACH * threat.eps * (1 - 1e-6):
            return Finding(FAILED, f"{steps}{measured} It cannot reach what it is said to withstand.", numbers)
        return Finding(PASSED, steps + measured, numbers)
    if not nearness:
        return Finding(NOT_RUN, "The attack chooses its own steps, and no sample that withstood it was moved.", numbers)
    chosen = "The attack chooses its own steps."
    if max(nearness) < MEASURED_REACH:
        return Finding(FAILED, f"{chosen}{measured} None comes near to the surface of the ball.", numbers)
    return Finding(PASSED, chosen + measured, numbers)


def _computed_reach(attack: Any) -> float | None:
    """Steps times step size in pixel units, of an attack that says both."""
    attack = getattr(attack, "_pgd", attack)
    steps, size = getattr(attack, "steps", None), getattr(attack, "resolved_step_size", None)
    return steps * size if isinstance(steps, int) and isinstance(size, (int, float)) else None


def _nearness(bench: Bench) -> list[float]:
    """Length of each moved, standing sample's perturbation, as a fraction of the longest that ball and box allow."""
    standing, images = bench.audited()
    found = []
    for row in standing.nonzero().squeeze(1).tolist():
        if row not in images:
            continue
        clean = bench.images[row].cpu().double()
        moved = _length(images[row].double() - clean, bench.threat.norm)
        box = bench.threat.box
        farthest = math.inf if box is None else _length((clean - box[0]).maximum(box[1] - clean), bench.threat.norm)
        longest = min(bench.threat.eps, farthest)
        if moved > 0 and longest > 0:  # a minimal-norm attack that found nothing hands the image back
            found.append(moved / longest)
    return found


def _length(difference: Tensor, norm: str) -> float:
    return float(difference.abs().max() if norm == "linf" else difference.norm())


def large_budget(threat: ThreatModel, shape: torch.Size) -> float:
    """The budget at which every image of that shape can be made plain grey; at least the audited one."""
    lowest, highest = threat.box or (0.0, 1.0)
    half = (highest - lowest) / 2
    return max(threat.eps, half if threat.norm == "linf" else half * math.sqrt(math.prod(shape)))


def budget_curve(bench: Bench) -> list[tuple[float, Tensor]]:
    """Budgets, from 0 on, and which samples withstand PGD on cross-entropy at each; every attack of its own."""

    def measure() -> list[tuple[float, Tensor]]:
        largest = large_budget(bench.threat, bench.images.shape[1:])
        budgets = sorted(
            {bench.threat.eps * times for times in BUDGETS if bench.threat.eps * times < largest} | {largest}
        )
        curve = [(0.0, bench.right.clone())]
        for eps in budgets:
            threat = ThreatModel(bench.threat.norm, eps, bench.threat.box)
            broken = bench.tried(f"budget {eps!r}", PGD(threat, CURVE_STEPS), bench.right)
            curve.append((eps, bench.right & ~broken))
        return curve

    return bench.once("budget curve", measure)


def accuracy_at_a_large_budget(bench: Bench) -> Finding:
    if few := _too_few(bench):
        return few
    curve = budget_curve(bench)
    eps, left = curve[-1]
    threat = ThreatModel(bench.threat.norm, eps, bench.threat.box)
    # A second try from the image itself and by margins: that cross-entropy gets stuck is another check's business.
    second = PGD(threat, CURVE_STEPS, objective=bench.scale_free, random_start=False)
    unbroken = left & ~bench.tried("large budget, second try", second, left)
    status = PASSED
    if int(left.sum()) > LARGE_ACCURACY * bench.total:
        status = WARNING
    if int(unbroken.sum()) > LARGE_ACCURACY * bench.total:
        status = FAILED
    rises = []
    lowest, at = curve[0][1], 0.0
    for budget, standing in curve[1:]:
        if int(standing.sum()) < int(lowest.sum()):
            lowest, at = standing, budget
            continue
        found, gain = bench.judge_gain(standing, lowest, clear=RISE)
        if found != PASSED:
            status = gravest(status, found)
            rises.append(f"accuracy rises by {100 * gain:.0f} points from {at:.3g} to {budget:.3g}")
    evidence = (
        f"At {threat}, where every image can be made plain grey, PGD on cross-entropy leaves {bench.share(left)} "
        f"samples standing, and a second try on {bench.scale_free} {bench.share(unbroken)}"
    )
    evidence += f"; {', '.join(rises)}." if rises else "; accuracy does not rise with the budget."
    numbers = {
        "eps": eps,
        "standing": int(left.sum()),
        "standing_after_second_try": int(unbroken.sum()),
        "rises": rises,
    }
    return Finding(status, evidence, numbers)


def black_box(bench: Bench) -> Finding:
    from robust_peft.attacks.square import Square

    if few := _too_few(bench):
        return few
    audited = bench.audited()[0]
    found = {
        f"Square in {QUERIES} queries": bench.tried(
            "square", Square(bench.threat, queries=QUERIES, early_stop=not bench.coupled), audited
        ),
        f"{DRAWS} draws of noise": bench.tried("noise", _EdgeNoise(bench.threat), audited),
    }
    if bench.transfer_from is not None:
        source = PGD(bench.threat, TRANSFER_STEPS)
        found["transfer"] = bench.tried("transfer", source, audited, victim=bench.transfer_from)
    beyond = torch.stack(list(found.values())).any(dim=0)
    status, gain = bench.judge_gain(audited, audited & ~beyond, clear=BLACK_BOX_FAILED)
    if status != FAILED:
        status = WARNING if gain > BLACK_BOX_WARNING else PASSED
    each = ", ".join(f"{name} {int(broken.sum())}" for name, broken in found.items())
    evidence = (
        f"Of the {bench.share(audited)} samples that withstand {bench.attack_name}, attacks without its gradients "
        f"break {int(beyond.sum())} ({each})."
    )
    if bench.transfer_from is None:
        evidence += " No second model was given to transfer from."
    numbers = {"standing": int(audited.sum()), "broken_beyond": int(beyond.sum())}
    numbers |= {"each": {name: int(broken.sum()) for name, broken in found.items()}}
    return Finding(status, evidence, numbers)


@dataclasses.dataclass(frozen=True)
class _EdgeNoise:
    """The first draw of noise at the ball's edge that fools the model: corners under L-inf, directions under L2."""

    threat: ThreatModel

    def perturb(self, model: Any, images: Tensor, labels: Tensor, *, keys: Tensor) -> Tensor:
        best = images.clone()
        with torch.no_grad():
            for draw in range(DRAWS):
                noise = keyed_random.normal(keyed_random.derive(keys, draw), tuple(images.shape[1:]), torch.float32)
                # A step in a random direction, as long as the budget.
                adv_images = self.threat.project(
                    self.threat.step(images, noise.to(images.dtype), self.threat.eps), images
                )
                logits = model(adv_images)
                wrong = (logits.argmax(dim=1) != labels) | ~logits.isfinite().all(dim=1)
                best = torch.where(wrong.reshape(-1, *[1] * (images.dim() - 1)), adv_images, best)
        return best
