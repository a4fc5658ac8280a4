"""Checks of what the model answers: is it one answer, is it logits, and whom does it depend on?"""

from __future__ import annotations

import torch
from torch import Tensor

from robust_peft.evaluation.checks.bench import Bench, first, plain, relative_difference
from robust_peft.evaluation.checks.finding import FAILED, NOT_RUN, PASSED, WARNING, Finding, said

# Passes of one batch. Additive noise shows in the second one; four also show a coin that falls the same way often.
REPEATS = 4
# Differences between logits, as a fraction of their spread (highest minus lowest), that are rounding: another order of
# summation moves float32 logits by some 1e-6 of it, a deep half-precision network by some 1e-2. What is added on
# purpose, or comes from the rest of the batch, is larger, or it would defend against nothing.
ROUNDING = 1e-4
ROUNDING_HALF = 5e-2
# How far a row of probabilities may be from 1: half-precision rounding of up to a thousand classes. Rows of logits that
# do not come from a softmax are nowhere near, let alone all of them.
SUM_SLACK = 1e-2
# Samples that are asked again in another company, and alone: BatchNorm on batch statistics shows in each of them.
ASKED = 32
ALONE = 8


def _rounding(bench: Bench) -> float:
    return ROUNDING_HALF if bench.half else ROUNDING


def randomness(bench: Bench) -> float:
    """Largest difference between passes of the same batch, as a fraction of the logits' spread."""

    def measure() -> float:
        images = bench.images[: bench.batch_size]
        passes = [bench.logits_of(images) for _ in range(REPEATS)]
        return max(relative_difference(passes[0], other) for other in passes[1:])

    return bench.once("randomness", measure)


def is_random(bench: Bench) -> bool:
    """Whether the model answers one batch in more than one way."""
    return randomness(bench) > _rounding(bench)


def company(bench: Bench) -> tuple[float, str]:
    """Largest difference that the rest of the batch makes, as a fraction of the logits' spread, and which company."""

    def measure() -> tuple[float, str]:
        count = min(ASKED, bench.total)
        images = bench.images[:count]
        usual = bench.logits_of(images)
        noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)).to(images)

        def ask(part: Tensor) -> Tensor:
            with torch.no_grad():
                return bench.model(part)

        # Each company is a batch of its own, whatever the audit's batch size.
        together = ask(images)
        answers = {
            "in another order": ask(images.flip(0)).flip(0),
            "among noise": ask(torch.cat([noise, images]))[count:],
            "among copies of the first": ask(torch.cat([images[:1].expand_as(images), images]))[count:],
            "in the audit's batches": usual,
        }
        found = [(relative_difference(together, answer), name) for name, answer in answers.items()]
        try:
            alone = torch.cat([ask(image) for image in images[:ALONE].split(1)])
            found.append((relative_difference(together[:ALONE], alone), "alone"))
        except (ValueError, RuntimeError) as error:  # BatchNorm on batch statistics refuses a batch of one
            found.append((float("inf"), f"alone, where the model raises an error ({said(error).rstrip('.')})"))
        return max(found)

    return bench.once("company", measure)


def depends_on_company(bench: Bench) -> bool:
    """Whether an answer depends on who else is in the batch."""
    return bench.coupled or (not is_random(bench) and company(bench)[0] > _rounding(bench))


def randomised_outputs(bench: Bench) -> Finding:
    largest = randomness(bench)
    numbers = {"largest_difference": plain(largest), "passes": REPEATS}
    evidence = (
        f"In {REPEATS} passes of one batch in eval mode the logits differ by up to {largest:.1e} of their spread."
    )
    if is_random(bench):
        evidence += " An attack has to average over the randomness (EOT); one pass decides nothing."
    return Finding(FAILED if is_random(bench) else PASSED, evidence, numbers)


def probabilities(bench: Bench) -> Finding:
    logits = bench.logits
    usable = logits[logits.isfinite().all(dim=1)]
    if len(usable) == 0:
        return Finding(NOT_RUN, "No sample has finite outputs.")
    lowest, highest = usable.min().item(), usable.max().item()
    off = (usable.double().sum(dim=1) - 1).abs().max().item()
    numbers = {"lowest": lowest, "highest": highest, "largest_distance_of_a_sum_from_1": off}
    within = f"Outputs lie between {lowest:.3g} and {highest:.3g}"
    if lowest >= -SUM_SLACK and highest <= 1 + SUM_SLACK and off <= SUM_SLACK:
        return Finding(
            FAILED,
            f"{within}, and every row sums to 1 within {off:.1e}: the model ends in a softmax. Cross-entropy on its "
            "outputs applies a second one, which flattens the loss where the model is sure; leave the softmax away.",
            numbers,
        )
    if lowest >= 0 and highest <= 1 and lowest != highest:
        return Finding(
            WARNING,
            f"{within} and their rows do not sum to 1: the model may end in a sigmoid, which flattens the loss where "
            "it is sure.",
            numbers,
        )
    evidence = f"{within}; rows are up to {off:.3g} away from a sum of 1."
    if highest <= SUM_SLACK and usable.double().logsumexp(dim=1).abs().max() <= SUM_SLACK:
        evidence += " They are log-probabilities, which are as good as logits: a softmax of them is the same softmax."
    return Finding(PASSED, evidence, numbers)


def batch_company(bench: Bench) -> Finding:
    if is_random(bench):
        return Finding(NOT_RUN, "The outputs are random, so that the batch's part in them cannot be told from chance.")
    if bench.total == 1:
        return Finding(NOT_RUN, "There is only one sample.")
    largest, which = company(bench)
    numbers = {"largest_difference": plain(largest), "company": which}
    if largest > _rounding(bench):
        size = "" if largest == float("inf") else f", by up to {largest:.1e} of the logits' spread"
        return Finding(
            FAILED,
            f"Logits change with the rest of the batch, most {which}{size}. A figure holds for its batches only, and "
            "an attack on a batch also changes its clean neighbours' answers.",
            numbers,
        )
    return Finding(
        PASSED,
        f"Alone, in another order and among strangers, logits change by at most {largest:.1e} of their spread.",
        numbers,
    )


def train_mode(bench: Bench) -> Finding:
    count = len(bench.train_mode)
    if count == 0:
        return Finding(PASSED, "Every submodule was in eval mode when the model was handed over.", {"modules": 0})
    telling = [f"{name or 'the model itself'} ({kind})" for name, kind in bench.train_mode if "Drop" in kind]
    telling += [f"{name or 'the model itself'} ({kind})" for name, kind in bench.train_mode if "BatchNorm" in kind]
    named = f", among them {first(telling)}" if telling else ", none of them a dropout or a BatchNorm"
    return Finding(
        WARNING,
        f"{count} submodules were in train mode when the model was handed over{named}. The audit used eval mode; a "
        "figure measured in train mode is another model's.",
        {"modules": count, "telling": telling},
    )
