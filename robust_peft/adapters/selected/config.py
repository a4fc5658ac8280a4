from __future__ import annotations

from dataclasses import dataclass

from peft.config import PeftConfig

PEFT_TYPE = "ROBUST_PEFT_SELECTED"
"""The name under which peft knows the method."""

SELECTIONS = ("layernorm", "bias")


@dataclass
class SelectedConfig(PeftConfig):
    """Trains parameters that the network has anyway: those of its normalisation layers, or its biases.

    Sources: BitFit for biases, Ben Zaken et al. 2021 (arXiv:2106.10199); normalisation layers as in Zhao et al. 2023
    (arXiv:2312.11420), but all of them and not those of the attention alone. peft has `LNTuningConfig` for these, which
    wants every layer named and warns of each, and nothing for biases.

    Args:
        select: "layernorm" (weights and biases of LayerNorm, BatchNorm, GroupNorm, RMSNorm and their like) or "bias"
            (vectors called `bias` or `..._bias`: those of linear layers, convolutions, attentions and normalisation
            layers; not Swin's table of relative position biases).
        modules_to_save: modules that are trained and saved as a whole, usually the classifier head. Parameters inside
            them are not selected a second time.

    Raises:
        ValueError: for an unknown selection, or a bare string as `modules_to_save`.
    """

    select: str = "layernorm"
    target_modules: str | None = None  # peft asks for it; filled in when the model is known
    modules_to_save: list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        problems = []
        if self.select not in SELECTIONS:
            problems.append(f"select should be one of {', '.join(SELECTIONS)}. Found {self.select!r}")
        if self.target_modules is not None:
            problems.append(f"target_modules should be None: select says what trains. Found {self.target_modules!r}")
        if isinstance(self.modules_to_save, str):
            # The likely slip; peft would read it letter by letter.
            problems.append(
                f"modules_to_save should be a list of module names or None. Found {self.modules_to_save!r}. "
                "Put a single name into a list"
            )
        if problems:
            raise ValueError("SelectedConfig: " + "; ".join(problems) + ".")
