"""Methods to compare: CA-AT, and what makes a comparison with it fair. Every function returns a tuple of `Method`."""

from __future__ import annotations

from collections.abc import Sequence

from robust_peft.studies.study import Method, Settings, grid

LAMBDAS = (0.0, 0.25, 0.5, 0.75, 1.0)
GAMMAS = (0.5, 0.6, 0.7, 0.8, 0.9)  # below 1, which is Vanilla(0)


def vanilla(lambdas: Sequence[float] = LAMBDAS) -> tuple[Method, ...]:
    """Vanilla adversarial training: a weighted sum of the two gradients.

    Args:
        lambdas: Weights of the adversarial gradient, in [0, 1].
    """
    return grid("vanilla", "surgery.lam", lambdas, {"surgery.name": "vanilla"})


def ca_at(gammas: Sequence[float] = GAMMAS) -> tuple[Method, ...]:
    """CA-AT as the paper has it (Eq. 4).

    Args:
        gammas: Cosines of the cone around the clean gradient, in [0, 1). At 1 it would be Vanilla(0).
    """
    return grid("CA-AT", "surgery.gamma", gammas, {"surgery.name": "ca-at"})


def ca_at_length_matched(gammas: Sequence[float] = GAMMAS, optimizer: str = "adamw") -> tuple[Method, ...]:
    """CA-AT in steps as long as Vanilla(0.5)'s, so that the direction alone is compared.

    Args:
        gammas: As `ca_at`.
        optimizer: "sgd": the update has the length of Vanilla(0.5)'s. "adamw": the change of the parameters has,
            because under AdamW the length of a gradient hardly matters.

    Raises:
        ValueError: For another optimizer.
    """
    matched: dict[str, Settings] = {"sgd": {"surgery.rescale": "vanilla"}, "adamw": {"optim.match_change": "vanilla"}}
    if optimizer not in matched:
        raise ValueError(f"optimizer should be adamw or sgd. Found optimizer = {optimizer!r}.")
    settings = {"surgery.name": "ca-at", **matched[optimizer]}
    return grid("CA-AT, length matched", "surgery.gamma", gammas, settings)


def vanilla_learning_rates(rates: Sequence[float], lam: float = 0.5) -> tuple[Method, ...]:
    """Vanilla at other learning rates: what longer or shorter steps alone would give.

    Args:
        rates: Highest learning rates.
        lam: Weight of the adversarial gradient.
    """
    settings = {"surgery.name": "vanilla", "surgery.lam": lam}
    return grid(f"vanilla {lam:g}, learning rate", "optim.lr", rates, settings)


def trades(betas: Sequence[float] = (1, 3, 6)) -> tuple[Method, ...]:
    """TRADES (Zhang et al., 2019): cross-entropy plus beta times the divergence of the adversarial output.

    In this package the two have weights that sum to 1, so lam is beta / (1 + beta). Under AdamW that is the same but
    for rounding; under SGD the learning rate is 1 + beta times smaller in effect.

    Args:
        betas: The paper's 1/lambda; 6 is its default.
    """
    common = {"loss.name": "trades", "surgery.name": "vanilla"}
    return tuple(Method("TRADES", f"beta {beta:g}", {**common, "surgery.lam": beta / (1 + beta)}) for beta in betas)


def multi_task(cagrad: Sequence[float] = (0.5,), gradvac: Sequence[float] = (0.8,)) -> tuple[Method, ...]:
    """Methods of multi-task learning for conflicting gradients: PCGrad, MGDA, CAGrad and GradVac.

    Args:
        cagrad: Radii c of CAGrad's search; none leaves it out.
        gradvac: Target cosines of GradVac; none leaves it out.
    """
    found = [Method("PCGrad", settings={"surgery.name": "pcgrad"}), Method("MGDA", settings={"surgery.name": "mgda"})]
    found += grid("CAGrad", "surgery.c", cagrad, {"surgery.name": "cagrad"})
    found += grid("GradVac", "surgery.target", gradvac, {"surgery.name": "gradvac"})
    return tuple(found)


def conflict_params(gamma: float = 0.8) -> tuple[Method, ...]:
    """CA-AT with the angle measured on all that trains, and without the head.

    Args:
        gamma: As `ca_at`.
    """
    settings = {"surgery.name": "ca-at", "surgery.gamma": gamma}
    return grid("CA-AT, angle of", "surgery.conflict_params", ("all", "adapters"), settings)


def adapters(
    rates: Sequence[float], reductions: Sequence[int] = (4, 8, 16), ranks: Sequence[int] = (16,)
) -> tuple[Method, ...]:
    """Ways to fine-tune, each at several learning rates, because no one rate suits all of them.

    Args:
        rates: Highest learning rates; the one that suits is chosen on held-out images.
        reductions: Reduction factors of bottleneck adapters.
        ranks: Ranks of LoRA.

    Returns:
        Families "bottleneck /8", "LoRA 16", "normalisation layers", "biases", "linear" and "full".
    """
    kinds: dict[str, Settings] = {
        f"bottleneck /{factor}": {"adapter.name": "bottleneck", "adapter.reduction_factor": factor}
        for factor in reductions
    }
    kinds |= {f"LoRA {rank}": {"adapter.name": "lora", "adapter.rank": rank} for rank in ranks}
    kinds |= {"normalisation layers": {"adapter.name": "layernorm"}, "biases": {"adapter.name": "bias"}}
    kinds |= {"linear": {"adapter.name": "linear"}, "full": {"adapter.name": "full"}}
    return tuple(method for family, settings in kinds.items() for method in grid(family, "optim.lr", rates, settings))
