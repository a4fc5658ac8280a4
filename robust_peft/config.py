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

from robust_peft.pixel_units import NORMS, as_number, eps_problem, step_size_problem

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
    "layernorm": (),
    "bias": (),
    "linear": (),
    "full": (),
}
ATTACK_PARAMETERS: dict[str, tuple[str, ...]] = {
    "pgd": ("steps", "step_size", "restarts", "random_start", "objective"),
    "fgsm": ("step_size", "random_start", "objective"),
    "pgd-dlr": ("steps", "step_size", "restarts", "random_start"),
    "apgd": ("steps", "restarts", "objective"),
    "apgd-dlr": ("steps", "restarts"),
    "t-apgd-dlr": ("steps", "restarts", "num_targets"),
}
OPTIMIZER_PARAMETERS: dict[str, tuple[str, ...]] = {"adamw": ("beta2",), "sgd": ("nesterov",)}
LOSS_PARAMETERS: dict[str, tuple[str, ...]] = {"ce": (), "trades": (), "mart": ("beta",), "clp": ("pairing",)}
# Part of a run, the field that names its method, and the methods' parameters.
METHOD_PARAMETERS = (
    ("surgery", "name", SURGERY_PARAMETERS),
    ("adapter", "name", ADAPTER_PARAMETERS),
    ("attack", "name", ATTACK_PARAMETERS),
    ("optim", "optimizer", OPTIMIZER_PARAMETERS),
    ("loss", "name", LOSS_PARAMETERS),
)
BACKBONE_PARAMETERS: dict[str, tuple[str, ...]] = {
    "bn": ("resnet18", "resnet34", "wrn28_10"),
    "width": ("resnet18", "resnet34"),
}
# Data by name, and which of them each setting belongs to ("hub": hub/OWNER/NAME).
NAMED = ("cub200", "stanford_dogs", "cifar10", "cifar100", "mnist", "fashion_mnist")
DATASETS = ("digits", *NAMED, "folder", "parquet")
DATA_PARAMETERS: dict[str, tuple[str, ...]] = {
    "root": (*NAMED, "folder"),
    "train": ("parquet", "folder"),
    "test": ("parquet", "folder"),
    "image_column": (*NAMED, "parquet", "hub"),
    "label_column": (*NAMED, "parquet", "hub"),
    "skip_broken": (*NAMED, "parquet", "folder", "hub"),
    "partial": NAMED,
}
OBJECTIVES = ("ce", "kl", "margin", "dlr")


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
    """micro_swin (embedded), ares/swin_small, timm/NAME, hf/NAME, module.py:factory, ...: see robust-peft zoo."""
    checkpoint: str | None = None
    """Local file with weights for this architecture (.safetensors, .pth); "random" for none."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel in the units of pixels in [0, 1]; None: the backbone's own."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel; None: the backbone's own."""
    image_size: int | None = None
    """Pixels on each side that the architecture is built for; None: its own."""
    bn: Literal["running", "batch"] | None = None
    """resnet18, resnet34, wrn28_10: BatchNorm with running statistics, or always on the batch's (default running)."""
    width: int | None = None
    """resnet18, resnet34: channels of the stem (default 64)."""

    def problems(self) -> list[str]:
        problems = Problems("backbone")
        problems(not self.name, "name is empty.")
        for name, takers in BACKBONE_PARAMETERS.items():
            problems(
                getattr(self, name) is not None and self.name not in takers,
                f"{name} is no setting of {self.name!r} (it is one of: {', '.join(takers)}). "
                f"Found {name} = {getattr(self, name)!r}.",
            )
        problems.at_least("width", self.width, 1)
        if self.bn is not None:
            problems.one_of("bn", self.bn, ("running", "batch"))
        problems.at_least("image_size", self.image_size, 1)
        if self.mean is not None and self.std is not None:
            fits = len(self.mean) == len(self.std)
            problems(not fits, f"mean and std should have equally many entries. Found {self.mean!r} and {self.std!r}.")
        positive = self.std is None or all(value > 0 for value in self.std)
        problems(not positive, f"std should be positive. Found std = {self.std!r}.")
        return problems.found


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(Part):
    """What is inserted and trained."""

    name: Literal["bottleneck", "lora", "layernorm", "bias", "linear", "full"] = "bottleneck"
    """bottleneck adapters, LoRA, normalisation layers, biases, the classifier head alone, or every parameter."""
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

    name: Literal["pgd", "fgsm", "pgd-dlr", "apgd", "apgd-dlr", "t-apgd-dlr"] = "pgd"
    """pgd, fgsm (one step), apgd (AutoPGD), or these on the DLR; t-: towards a wrong class."""
    steps: int | None = None
    """All but fgsm: number of steps (default 10)."""
    step_size: str | None = None
    """pgd, fgsm: in pixel units, e.g. 2/255 (default 2.5 eps / steps; fgsm: eps, 1.25 eps from a random start)."""
    restarts: int | None = None
    """All but fgsm: random restarts (default 1)."""
    random_start: bool | None = None
    """pgd, fgsm: start inside the ball instead of at the image (default: yes for pgd, no for fgsm)."""
    objective: Literal["ce", "kl", "margin", "dlr"] | None = None
    """pgd, fgsm, apgd: what is maximised (default: the loss's own)."""
    num_targets: int | None = None
    """t-apgd-dlr: towards so many classes in turn (default 1, the likeliest wrong one)."""

    def problems(self) -> list[str]:
        problems = Problems("attack")
        if problems.one_of("name", self.name, ATTACK_PARAMETERS):
            problems.only(self, self.name, ATTACK_PARAMETERS)
        for name in ("steps", "restarts", "num_targets"):
            problems.at_least(name, getattr(self, name), 1)
        wrong = None if self.step_size is None else step_size_problem(self.step_size)
        problems(wrong is not None, wrong or "")
        if self.objective is not None:
            problems.one_of("objective", self.objective, OBJECTIVES)
        problems(
            self.objective == "kl" and not self.starts_at_random,
            'objective "kl" needs a random start: without, its gradient is zero.',
        )
        needless = (self.restarts or 1) > 1 and not self.starts_at_random
        problems(needless, "restarts without random_start would repeat one computation.")
        return problems.found

    @property
    def starts_at_random(self) -> bool:
        """Whether the attack starts at a random point of the ball."""
        return self.name != "fgsm" if self.random_start is None else self.random_start

    def parameters(self) -> dict[str, Any]:
        """The named solver's own parameters that are set."""
        return {k: getattr(self, k) for k in ATTACK_PARAMETERS[self.name] if getattr(self, k) is not None}


@dataclass(frozen=True, kw_only=True)
class LossConfig(Part):
    """What training minimises beside the cross-entropy of clean images: the adversarial loss."""

    name: Literal["ce", "trades", "mart", "clp"] = "ce"
    """ce (cross-entropy), trades (KL to the clean output), mart, or clp (logit pairing)."""
    beta: float | None = None
    """mart: weight of the divergence (default 5)."""
    pairing: Literal["logits", "probabilities"] | None = None
    """clp: pair logits, or probabilities as the official code of CA-AT does (default logits)."""

    def problems(self) -> list[str]:
        problems = Problems("loss")
        if problems.one_of("name", self.name, LOSS_PARAMETERS):
            problems.only(self, self.name, LOSS_PARAMETERS)
        problems.at_least("beta", self.beta, 0)
        if self.pairing is not None:
            problems.one_of("pairing", self.pairing, ("logits", "probabilities"))
        return problems.found

    def parameters(self) -> dict[str, Any]:
        """The named loss's own parameters that are set."""
        return {k: getattr(self, k) for k in LOSS_PARAMETERS[self.name] if getattr(self, k) is not None}


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
    """digits, cub200, stanford_dogs, cifar10, cifar100, mnist, fashion_mnist, folder, parquet, or hub/OWNER/NAME."""
    root: str | None = None
    """Local copy of a named dataset (official archive or its folder, parquet files); folder: where the images are."""
    train: str | None = None
    """parquet: the training file; folder: the training images, where they are not in ROOT/train."""
    test: str | None = None
    """parquet: the test file; folder: the test images, where they are not in ROOT/test."""
    image_column: str | None = None
    """Column of the images in parquet files and on the Hub; None: the usual names are tried."""
    label_column: str | None = None
    """Column of the labels; None: the usual names are tried."""
    image_size: int | None = None
    """Pixels on each side that the model sees; None: the backbone's own."""
    resize: int | None = None
    """Pixels of the shorter side before the crop; None: 256/224 of the image size."""
    batch_size: int = 64
    """Images in a micro-batch on one process."""
    validation_share: float = 0.1
    """Part of the training images held out with a fixed seed, in [0, 1)."""
    augment: bool = True
    """Random crop and horizontal flip of training images."""
    rotation: float = 0.0
    """Training images are turned at random by up to so many degrees (with augment)."""
    workers: int | None = None
    """Processes that decode pictures, beside each training process; None: one for each core, at most 8."""
    skip_broken: bool = False
    """Leave out pictures that cannot be decoded and count them; otherwise they are an error."""
    partial: bool = False
    """Accept a named dataset with fewer images than published."""
    limit: int | None = None
    """At most so many images of each split, drawn with a fixed seed (for trials)."""

    def problems(self) -> list[str]:
        problems = Problems("data")
        if not self.name.startswith("hub/"):
            problems.one_of("name", self.name, (*DATASETS, "hub/OWNER/NAME"))
        missing = self.name == "parquet" and self.train is None
        problems(missing, "name = 'parquet' needs data.train, the path of the training file.")
        missing = self.name == "folder" and self.root is None and self.train is None
        problems(missing, "name = 'folder' needs data.root, the folder of the images, or data.train and data.test.")
        for name, takers in DATA_PARAMETERS.items():
            value, taken = getattr(self, name), self.name.startswith("hub/") and "hub" in takers or self.name in takers
            problems(
                value not in (None, False) and not taken,
                f"{name} is no setting of {self.name!r} (it is one of: {', '.join(takers)}). Found {name} = {value!r}.",
            )
        for name in ("batch_size", "image_size", "resize", "limit"):
            problems.at_least(name, getattr(self, name), 1)
        problems.at_least("workers", self.workers, 0)
        too_small = self.resize is not None and self.image_size is not None and self.resize < self.image_size
        problems(too_small, f"resize should be at least image_size = {self.image_size}. Found resize = {self.resize}.")
        angle = self.rotation
        problems(not 0 <= angle <= 180, f"rotation should be in [0, 180] degrees. Found rotation = {angle!r}.")
        problems(angle > 0 and not self.augment, f"rotation = {angle!r} needs augment.")
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
    match_change: Literal["vanilla"] | None = None
    """vanilla: after the optimizer's step the change of the parameters is scaled to the length that Vanilla(0.5) would
    have changed them by from the same place (L2 norm, weight decay included). Takes a second optimizer's memory."""
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
        if self.match_change is not None:
            problems.one_of("match_change", self.match_change, ("vanilla",))
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
    loss: LossConfig = field(default_factory=LossConfig)
    surgery: SurgeryConfig = field(default_factory=SurgeryConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    seed: int = 0
    """Seed of everything random."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 where the hardware multiplies it (GPU, CPU with AMX or AVX512-BF16), else fp32."""
    compile: bool = False
    """Compile the model with torch.compile (slow first step, faster ones after)."""
    gradient_checkpointing: bool = False
    """Keep only each transformer block's input for the backward pass: much less memory, a third more time."""
    channels_last: bool = False
    """Keep images and weights of convolutions in channels-last order, which is faster for ResNets."""
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
        problems.one_of("precision", self.precision, ("auto", "fp32", "bf16", "fp16"))
        problems.at_least("save_every_steps", self.save_every_steps, 1)
        if not self.measure_conflict:
            problems(self.surgery.name != "vanilla", f"surgery {self.surgery.name!r} needs measure_conflict.")
            matched = self.optim.match_change is not None
            problems(matched, "optim.match_change needs both gradients, that is measure_conflict.")
        if self.loss.name == "trades":
            # Checked here because it needs two parts at once.
            kl = self.attack.objective in (None, "kl")
            kl = kl and not self.attack.name.endswith("-dlr")
            start = self.attack.starts_at_random
            problems(kl and not start, 'loss "trades" maximises KL, which needs a random start: attack.random_start.')
        size, eps = as_number(self.attack.step_size or 0), as_number(self.threat.eps)
        if size and eps is not None:
            steps = 1 if self.attack.name == "fgsm" else self.attack.steps or 10
            problems(
                steps * size < eps * (1 - 1e-6),
                f"attack.step_size = {self.attack.step_size} times {steps} step(s) is {steps * size:.3g}, less than "
                f"the budget threat.eps = {self.threat.eps}, which the attack could not reach. Take a larger "
                "step_size, or None for 2.5 eps / steps.",
            )
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
