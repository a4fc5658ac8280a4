"""The CA-AT paper's synthetic experiment (Fig. 2): logistic regression on two MNIST digits, its attacks solved exactly.

    python recipes/mnist_logistic.py                      # about a minute on one CPU core, to runs/mnist-logistic
    python recipes/mnist_logistic.py --norm l2 --budgets 0.5 1 1.5 2 2.5 3 --output runs/mnist-logistic-l2

For each budget a model is trained on the weighted sum of standard and adversarial loss, without the pixel box as in the
paper and with it, and the conflict mu of the two gradients is measured per sample and per batch, beside Theorem 1's
bound; then again around one fixed model. Prints the tables and writes to OUTPUT:

    fig2a-tsne.png                                    t-SNE of the samples' gradients at each budget (Fig. 2a)
    fig2b-accuracy-*.png, -mu-*.png, -parts-*.png     accuracies, mu with its bound, norms and 1 - cos (Fig. 2b)
    fixed-model.png                                   mu, its linearisation and the bound around one model
    results.json, results.csv, tables.md              every number

A trial in seconds: ``--limit 40 --epochs 2``.
"""

import dataclasses
import sys

from robust_peft.cli import guarded, parse


@dataclasses.dataclass(frozen=True, kw_only=True)
class Synthetic:
    """Conflict against budget where the inner maximisation has a closed form."""

    output: str = "runs/mnist-logistic"
    """Folder for tables and pictures."""
    norm: str = "linf"
    """linf or l2."""
    budgets: tuple[float, ...] = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
    """Budgets in pixel units, rising; a model is trained for each."""
    lam: float = 0.5
    """Weight of the adversarial loss."""
    epochs: int = 20
    """Passes over the training digits."""
    lr: float = 0.03
    """Learning rate of plain SGD."""
    batch_size: int = 50
    """Digits in a batch."""
    seed: int = 0
    """Seed of start, order and t-SNE."""
    limit: int | None = None
    """At most so many digits of each split (for trials)."""
    tsne_samples: int = 300
    """Training digits in the t-SNE; 0 leaves it out."""


def main(arguments: Synthetic) -> None:
    """Train, measure, print, draw."""
    from robust_peft.data import digits
    from robust_peft.studies.synthetic import run_study
    from robust_peft.studies.synthetic_report import describe, write_study

    chosen = dataclasses.asdict(arguments)
    output = chosen.pop("output")
    results = run_study(digits(), **chosen)
    written = write_study(results, output)
    print(describe(results))
    print(f"Written to {output}: {', '.join(path.name for path in written)}.")


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(parse(Synthetic, sys.argv[1:], prog="mnist_logistic.py"))))
