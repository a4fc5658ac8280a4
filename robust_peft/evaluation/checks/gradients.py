"""Checks of the gradients that an attack follows: are they there, are they the model's, and does the loss keep them?"""

from __future__ import annotations

import torch
from torch import Tensor

from robust_peft import keyed_random
from robust_peft.evaluation.checks.bench import LEAST_RIGHT, Bench, clean_margins
from robust_peft.evaluation.checks.finding import FAILED, NOT_RUN, PASSED, WARNING, Finding, gravest, said
from robust_peft.evaluation.checks.outputs import depends_on_company, is_random
from robust_peft.keyed_random import name_key

# Share of samples that may be without a usable gradient. Each of them counts as robust for no reason, so the share is
# by how much a figure may be too high; five points are the size of the differences that papers report.
UNUSABLE_SHARE = 0.05
# A gradient is vanishing where going through the whole ball along it would change the margin, to first order, by less
# than this fraction of the largest logit: float32 does not hold such a difference.
VANISHING = 1.2e-7

# Length in each pixel of the step that a gradient is compared on. It is a twentieth of an 8-bit level, so that a layer
# that rounds to levels, however fine, gives itself away by not moving; and so short that a network's curvature hardly
# counts (an undefended one needs about a whole level to change its mind).
SLOPE_STEP = 2e-4
# How many times the rounding of the logits a step has to be worth before it says anything.
SLOPE_RESOLUTION = 50
# The model's own change may differ from what the gradient promises by this factor: room for kinks of ReLUs.
SLOPE_FACTOR = 2.0
# Share of samples that may disagree, before it is a warning and before it fails. A kink of a ReLU within so short a
# step bends few samples by a factor of two; a layer with a gradient that is not its own bends nearly all.
SLOPE_WARNING, SLOPE_FAILED = 0.05, 0.20
SLOPE_SAMPLES = 64

# Logits are rescaled until the median clean margin is this: the label is fifty times as likely as the next class, which
# is sure, and float32 resolves the loss around it to six digits.
RESCALED_MARGIN = 4.0


def usable_gradients(bench: Bench) -> dict[str, Tensor]:
    """For "ce" and "margin", which of the samples that are right have a usable gradient; bool tensors of shape `[r]`.

    At the clean image or at a random point of the ball: an attack from a random start needs no more than the second.
    """

    def measure() -> dict[str, Tensor]:
        rows = bench.right.nonzero().squeeze(1).to(bench.images.device)
        images, labels = bench.images[rows], bench.labels[rows]
        keys = keyed_random.derive(bench.keys[rows], name_key("zero gradients"))
        points = (images, bench.threat.random_start(images, keys))
        largest = bench.logits[rows].abs().amax(dim=1).double()
        found = {}
        for objective in ("ce", "margin"):
            usable = torch.zeros(len(rows), dtype=torch.bool, device=images.device)
            for point in points:
                grad = bench.gradients(point, labels, objective).double().flatten(1)
                grad = torch.where(grad.isfinite(), grad, 0)  # as every attack here does
                length = grad.abs().sum(dim=1) if bench.threat.norm == "linf" else grad.norm(dim=1)
                # Cross-entropy vanishes with its own value, and no further than to zero does its direction suffer.
                least = VANISHING * largest if objective == "margin" else torch.zeros_like(largest)
                usable |= (bench.threat.eps * length > least) & (length > 0)
            found[objective] = usable.cpu()
        return found

    return bench.once("usable gradients", measure)


def zero_gradients(bench: Bench) -> Finding:
    count = int(bench.right.sum())
    if count == 0:
        return Finding(NOT_RUN, "No sample is right without an attack.")
    try:
        usable = usable_gradients(bench)
    except RuntimeError as error:
        return Finding(
            FAILED,
            f"No gradient can be computed, so that an attack that needs one says nothing. {said(error)}",
        )
    without = int((~usable["ce"] & ~usable["margin"]).sum())
    numbers = {"samples": count, "without_gradient": without, "graph_is_cut": bench.detached}
    why = " The model cuts the graph between its pixels and its logits." if bench.detached else ""
    evidence = (
        f"{without} of {count} samples have a zero or vanishing gradient of cross-entropy and of margin alike.{why}"
    )
    if without == 0:
        return Finding(PASSED, evidence, numbers)
    return Finding(FAILED if without > UNUSABLE_SHARE * count else WARNING, evidence, numbers)


def wrong_gradients(bench: Bench) -> Finding:
    if bench.half:
        return Finding(NOT_RUN, "The model computes in half precision, where steps this short are lost.")
    if is_random(bench):
        return Finding(NOT_RUN, "The outputs are random, and their noise is larger than the step's effect.")
    if depends_on_company(bench):
        return Finding(NOT_RUN, "A sample's logits also change with its neighbours' pixels.")
    rows = bench.right.nonzero().squeeze(1)[:SLOPE_SAMPLES].to(bench.images.device)
    if len(rows) == 0:
        return Finding(NOT_RUN, "No sample is right without an attack.")
    box = bench.threat.box or (0.0, 1.0)
    images = ((bench.images[rows] * 255).round() / 255).clamp(*box)
    labels = bench.labels[rows]
    before = bench.logits_of(images)
    other = before.scatter(1, labels.unsqueeze(1), -torch.inf).argmax(dim=1)

    # Towards one fixed class: the best other one may change on the way, which is no fault of the gradient.
    def lead(logits: Tensor, positions: Tensor) -> Tensor:
        picked = logits.gather(1, torch.stack([labels[positions], other[positions]], dim=1))
        return picked[:, 1] - picked[:, 0]

    everyone = torch.arange(len(rows), device=images.device)
    grad = bench.gradients(images, labels, lead).nan_to_num(0, 0, 0)
    moved = (images + SLOPE_STEP * grad.sign()).clamp(*box)
    promised = (grad.double() * (moved.double() - images.double())).flatten(1).sum(dim=1)
    after = bench.logits_of(moved)
    kept = lead(after.double(), everyone) - lead(before.double(), everyone)
    rounding = torch.finfo(before.dtype).eps * before.abs().amax(dim=1).double()
    telling = promised > SLOPE_RESOLUTION * rounding
    count = int(telling.sum())
    if count < LEAST_RIGHT:
        return Finding(NOT_RUN, f"The step is worth more than rounding on {count} of {len(rows)} samples only.")
    ratio = (kept / promised)[telling]
    off = int(((ratio < 1 / SLOPE_FACTOR) | (ratio > SLOPE_FACTOR) | ~ratio.isfinite()).sum())
    still = int((kept[telling] == 0).sum())
    typical = float(ratio.nan_to_num().median())
    numbers = {"samples": count, "off": off, "unmoved": still, "median_ratio": typical, "step": SLOPE_STEP}
    evidence = (
        f"Over a step of {SLOPE_STEP:g} along its gradient, a sample's margin moves by {typical:.2f} of what the "
        f"gradient promises (median of {count}); {off} are off by more than a factor of {SLOPE_FACTOR:g}, {still} do "
        "not move at all."
    )
    if off > SLOPE_FAILED * count:
        evidence += (
            " Some layer's gradient is not its own: rounding, compression, or a backward pass that was replaced."
        )
        return Finding(FAILED, evidence, numbers)
    return Finding(WARNING if off > SLOPE_WARNING * count else PASSED, evidence, numbers)


def saturated_cross_entropy(bench: Bench) -> Finding:
    count = int(bench.right.sum())
    if count < LEAST_RIGHT:
        return Finding(NOT_RUN, f"{count} samples are right without an attack; {LEAST_RIGHT} are needed.")
    usable = usable_gradients(bench)
    lost = int((~usable["ce"] & usable["margin"]).sum())
    trace = bench.trace("ce")
    standing = {"ce": bench.right & ~trace.broken}
    scale = float(clean_margins(bench.logits, bench.labels)[bench.right.to(bench.logits.device)].median())
    standing[bench.scale_free] = bench.right & ~bench.trace(bench.scale_free).broken
    if 0 < scale < float("inf"):
        standing["rescaled ce"] = bench.right & ~bench.trace("ce", RESCALED_MARGIN / scale).broken
    others = [name for name in standing if name != "ce"]
    judged = {name: bench.judge_gain(standing["ce"], standing[name]) for name in others}
    status = gravest(*(found for found, _ in judged.values()))
    if lost > UNUSABLE_SHARE * count:
        status = FAILED
    steps = len(trace.ce) - 1
    figures = ", ".join(f"{bench.share(standing[name])} on {name}" for name in others)
    evidence = (
        f"{steps} steps of PGD leave {bench.share(standing['ce'])} samples standing on cross-entropy and {figures}; "
        f"cross-entropy alone has a zero gradient on {lost} of {count}."
    )
    numbers = {
        "standing": {name: int(found.sum()) for name, found in standing.items()},
        "zero_gradient_of_ce_alone": lost,
        "samples": count,
        "median_clean_margin": scale,
    }
    if status == FAILED:
        try:
            audited = bench.audited()[0]
        except Exception:  # said by the checks of the attack itself
            return Finding(status, evidence, numbers)
        left = audited.clone()
        for name in others:
            left &= standing[name]
        # An attack that does without cross-entropy is not hurt by it.
        if bench.judge_gain(audited, left)[0] == PASSED:
            status = WARNING
            evidence += (
                f" The audited attack does not suffer from it: it leaves {bench.share(audited)} standing itself."
            )
        else:
            evidence += " The model's margins are so large that the loss is flat; attack the margin or the DLR."
    return Finding(status, evidence, numbers)
