"""The scan behind the demo's preset: budget and learning rate, chosen on validation digits; test digits stay unseen.

    python recipes/quickstart_scan.py --output runs/quickstart-scan

For each budget and learning rate, vanilla adversarial training with lam 0, 0.5 and 1; prints standard and adversarial
accuracy on the 500 validation digits (PGD-10 under the run's own budget). Finished runs are not repeated.
"""

import dataclasses
import json
import sys
from pathlib import Path

from robust_peft.cli import guarded, is_main_process, parse
from robust_peft.config import EvaluationConfig, SurgeryConfig, ThreatConfig, ValidationConfig, differences
from robust_peft.files import read_json
from robust_peft.presets import get_preset


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scan:
    """Vanilla adversarial training over budgets and learning rates, on validation digits."""

    output: str = "runs/quickstart-scan"
    """Folder for the run folders."""
    eps: tuple[str, ...] = ("0.1", "0.2", "0.3")
    """Budgets, L-inf, in pixel units."""
    lr: tuple[float, ...] = (0.003, 0.01, 0.03)
    """Learning rates."""
    lam: tuple[float, ...] = (0.0, 0.5, 1.0)
    """Weights of the adversarial gradient."""
    epochs: int | None = None
    """Epochs of each run (default: the preset's)."""
    limit: int | None = None
    """At most so many digits of each split (for trials)."""
    seed: int = 0
    """Seed of each run."""


def main(arguments: Scan) -> None:
    """Run what is missing and print one line for each run."""
    from robust_peft.runs import load_run_config, run

    preset = get_preset("quickstart")
    epochs = arguments.epochs or preset.optim.epochs
    for eps in arguments.eps:
        for lr in arguments.lr:
            for lam in arguments.lam:
                config = dataclasses.replace(
                    preset,
                    threat=ThreatConfig(norm="linf", eps=eps),
                    surgery=SurgeryConfig(name="vanilla", lam=lam),
                    optim=dataclasses.replace(preset.optim, lr=lr, epochs=epochs),
                    data=dataclasses.replace(preset.data, limit=arguments.limit),
                    validation=ValidationConfig(every=1),
                    evaluation=EvaluationConfig(attacks=()),
                    seed=arguments.seed,
                )
                folder = Path(arguments.output) / f"eps{eps}-lr{lr:g}-lam{lam:g}"
                if (folder / "config.json").exists() and differences(load_run_config(folder), config):
                    raise ValueError(f"{folder} holds a run with other settings. Name another --output.")
                if not (folder / "evaluation.json").exists():
                    run(config, folder, resume=(folder / "config.json").exists(), progress=False)
                if is_main_process():
                    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
                    found = [line for line in lines if '"validation"' in line]
                    seconds = read_json(folder / "evaluation.json")["training"]["seconds"]
                    print(f"eps {eps} lr {lr:g} lam {lam:g} ({seconds:.0f} s): {summary(found[-1])}", flush=True)


def summary(line: str) -> str:
    """The accuracies of a validation record of metrics.jsonl."""
    record = json.loads(line)
    return (
        f"standard {record['standard_accuracy']:.1%}, adversarial ({record['attack']}) "
        f"{record['adversarial_accuracy']:.1%}, n={record['total']}"
    )


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(parse(Scan, sys.argv[1:], prog="quickstart_scan.py"))))
