"""The questions that an audit asks, one after another, with the rule for each answer.

Every threshold is a constant at the top of the file of its check, with its reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from robust_peft.evaluation.checks import bench, gradients, outputs, samples, strength
from robust_peft.evaluation.checks.bench import Bench
from robust_peft.evaluation.checks.finding import FAILED, NOT_RUN, PASSED, STATUSES, WARNING, Check, Finding, said

__all__ = ["Bench", "Check", "FAILED", "Finding", "NOT_RUN", "PASSED", "QUESTIONS", "Question", "STATUSES", "WARNING"]


@dataclass(frozen=True)
class Question:
    """One check: how it is measured, and what it is judged by."""

    name: str
    text: str
    threshold: str
    source: str
    measure: Callable[[Bench], Finding]
    attacks: bool = True
    """Whether it means something only for images inside the box."""

    def answer(self, on: Bench) -> Check:
        """Measure. An exception of the model ends this check alone, which then was not run."""
        if self.attacks and not on.in_box:
            finding = Finding(NOT_RUN, "The images lie outside the box.")
        else:
            try:
                finding = self.measure(on)
            except Exception as error:
                finding = Finding(NOT_RUN, said(error))
        return Check(
            self.name, self.text, finding.status, finding.evidence, self.threshold, self.source, finding.numbers
        )  # fmt: skip


CARLINI = "Carlini et al. 2019, arXiv:1902.06705"
ATHALYE = "Athalye et al. 2018, arXiv:1802.00420"
CROCE = "Croce and Hein 2020, arXiv:2003.01690"
ADAPTIVE = "Croce et al. 2022, arXiv:2202.13711"
PINTOR = "Pintor et al. 2022, arXiv:2106.09947"


def _percent(share: float) -> str:
    return f"{100 * share:g} %"


_RESOLVED = f"a paired test at {_percent(bench.CONFIDENCE)}"
_GAIN = f"fails from {100 * bench.CLEAR_GAIN:g} points on that {_RESOLVED} resolves; less, but resolved, is a warning"

QUESTIONS: tuple[Question, ...] = (
    Question(
        "randomised outputs",
        "Does the model give one answer to one batch?",
        f"Fails if logits of {outputs.REPEATS} passes differ by more than {outputs.ROUNDING:g} of their spread "
        f"({outputs.ROUNDING_HALF:g} for models in half precision).",
        f"{CARLINI}, section 4.6; {ATHALYE}, section 4.2; {ADAPTIVE}",
        outputs.randomised_outputs,
        attacks=False,
    ),
    Question(
        "probabilities",
        "Are the outputs logits?",
        f"Fails if all lie in [0, 1] and all rows sum to 1 within {outputs.SUM_SLACK:g}; outputs in [0, 1] alone are a "
        "warning.",
        f"{CARLINI}, section 4.7; {CROCE}, section 4",
        outputs.probabilities,
        attacks=False,
    ),
    Question(
        "zero gradients",
        "Do gradients reach the pixels?",
        f"Fails if more than {_percent(gradients.UNUSABLE_SHARE)} of the samples have neither at the image nor at a "
        "random point of the ball a gradient, of cross-entropy or of the margin, that is worth more than float32's "
        "rounding over the whole ball; any such sample is a warning.",
        f"{ATHALYE}, section 3; {CARLINI}, section 4.7; {PINTOR}",
        gradients.zero_gradients,
    ),
    Question(
        "wrong gradients",
        "Is the gradient that of the function?",
        f"Fails if on more than {_percent(gradients.SLOPE_FAILED)} of the samples the margin's change over a step of "
        f"{gradients.SLOPE_STEP:g} in each pixel differs from the gradient's promise by more than a factor of "
        f"{gradients.SLOPE_FACTOR:g}; more than {_percent(gradients.SLOPE_WARNING)} are a warning.",
        f"{ATHALYE}, section 4.1; {CARLINI}, section 4.7",
        gradients.wrong_gradients,
    ),
    Question(
        "saturated cross-entropy",
        "Does cross-entropy break what objectives without a scale break?",
        f"A stronger DLR (margin, for two classes) or cross-entropy on rescaled logits {_GAIN}. Fails also if "
        f"cross-entropy alone has a zero gradient on more than {_percent(gradients.UNUSABLE_SHARE)} of the samples. "
        "Only a warning where the audited attack does not suffer from it.",
        f"{CROCE}, section 4; {CARLINI}, section 4.7",
        gradients.saturated_cross_entropy,
    ),
    Question(
        "single step",
        "Are many steps stronger than one?",
        f"Fails if FGSM breaks more samples than {bench.TRACED_STEPS} steps of PGD and {_RESOLVED} resolves it; more, "
        "but not resolved, is a warning.",
        f"{CARLINI}, section 5.2; {ATHALYE}, section 3.1",
        strength.single_step,
    ),
    Question(
        "more steps or restarts",
        "Has the audited attack converged?",
        f"At least {strength.LONG} steps and at least twice its own, {strength.RESTARTS} further starts, or both "
        f"together: what they break more {_GAIN}.",
        f"{CARLINI}, section 4.8; {PINTOR}",
        strength.more_steps_or_restarts,
    ),
    Question(
        "reach",
        "Can the audited attack reach its budget?",
        f"Fails if steps times step size are less than {strength.REACH:g} budget, if (where they are unknown) no "
        f"standing sample was moved {_percent(strength.MEASURED_REACH)} of the way that ball and box allow, or if an "
        "image left ball or box.",
        f"{CARLINI}, section 4.9; {PINTOR}",
        strength.reach,
    ),
    Question(
        "large budget",
        "Does accuracy fall with the budget, down to nothing?",
        f"Fails if more than {_percent(strength.LARGE_ACCURACY)} of the samples stand where every image can be made "
        "plain grey (cross-entropy alone leaving more is a warning), or if accuracy rises with the budget by "
        f"{100 * strength.RISE:g} points that {_RESOLVED} resolves.",
        f"{CARLINI}, sections 5.2 and 5.3; {ATHALYE}, section 3.1",
        strength.accuracy_at_a_large_budget,
    ),
    Question(
        "black box",
        "Are attacks with gradients stronger than those without?",
        f"Fails if Square, noise or transfer break {_percent(strength.BLACK_BOX_FAILED)} of the samples that the "
        f"audited attack did not and {_RESOLVED} resolves it; more than "
        f"{_percent(strength.BLACK_BOX_WARNING)} are a warning.",
        f"{CARLINI}, sections 4.4, 4.5, 4.11 and 5.4; {ATHALYE}, section 3.1; {CROCE}",
        strength.black_box,
    ),
    Question(
        "batch company",
        "Does an answer belong to its image alone?",
        f"Fails if logits alone, in another order or among strangers differ by more than {outputs.ROUNDING:g} of their "
        f"spread ({outputs.ROUNDING_HALF:g} for models in half precision).",
        f"{CARLINI}, section 2.2 (what the adversary may change); {ADAPTIVE}",
        outputs.batch_company,
        attacks=False,
    ),
    Question(
        "normalisation",
        "Does the model take the pixels that it was given?",
        "Fails if pixels lie outside the box, or if one of the usual normalisations raises the accuracy by "
        f"{100 * samples.NORMALISATION_GAIN:g} points that {_RESOLVED} resolves; images that take up less than "
        f"{_percent(samples.LEAST_RANGE)} of the box are a warning.",
        f"{CARLINI}, section 3.1 (attacks are given the whole defence, end to end)",
        samples.normalisation,
        attacks=False,
    ),
    Question(
        "train mode",
        "Was the model handed over in eval mode?",
        "A submodule in train mode is a warning; it never fails, because the audit itself uses eval mode.",
        f"{CARLINI}, sections 2.6 and 5.7 (say what was evaluated, and how)",
        outputs.train_mode,
        attacks=False,
    ),
    Question(
        "train images",
        "Are the samples new to the model?",
        f"Fails if more than {_percent(samples.SEEN_SHARE)} of the samples equal a training image in 8 bits; any is a "
        "warning.",
        "Barz and Denzler 2020, arXiv:1902.00423",
        samples.train_images,
        attacks=False,
    ),
)
