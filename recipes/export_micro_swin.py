"""From the finished pretraining run to the weights in the package: rounded to float16, measured as they ship.

    python recipes/export_micro_swin.py --source runs/pretrain_micro_swin --test test.parquet

Writes ``micro_swin.safetensors`` and its card ``micro_swin.json`` (how it was trained, the curve on validation images,
accuracies on all test images) to OUTPUT, and the curve as a picture beside them. ``torchrun --nproc_per_node 2`` shares
the measuring between processes. A trial: ``--limit 64``.
"""

import dataclasses
import json
import sys
from pathlib import Path

from robust_peft.cli import guarded, parse
from robust_peft.files import read_json, write_json, write_whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Round, measure and describe the embedded backbone."""

    source: str
    """Finished run folder of recipes/pretrain_micro_swin.py."""
    test: str
    """Parquet file of CIFAR-10's test images."""
    output: str = "robust_peft/models/weights"
    """Folder for weights, card and curve."""
    attacks: tuple[str, ...] = ("clean", "fgsm", "pgd-20")
    """Attacks by name."""
    limit: int | None = None
    """Only the first so many test images."""


def main(arguments: Export) -> None:
    """Write weights, then measure what was written, then the card."""
    from safetensors.torch import load_file, save_file

    from robust_peft.data import parquet
    from robust_peft.evaluation import evaluate
    from robust_peft.models import load_backbone
    from robust_peft.plots import plot_curve
    from robust_peft.processes import process_state
    from robust_peft.runs import load_run_config, make_threat, make_training_attack

    run, output = Path(arguments.source), Path(arguments.output)
    weights = output / "micro_swin.safetensors"
    state = process_state()
    if state.is_main_process:
        trained = {name.removeprefix("backbone."): t.half() for name, t in load_file(run / "model.safetensors").items()}
        write_whole(weights, lambda temporary: save_file(trained, temporary, metadata={"format": "pt"}))
    state.wait_for_everyone()
    config, description = load_run_config(run), read_json(run / "config.json")
    images = parquet(arguments.test, None, 0.0).train
    threat = make_threat(config)
    model = load_backbone("micro_swin", checkpoint=weights).eval().to(state.device)
    report = evaluate(
        model,
        images,
        [threat],
        arguments.attacks,
        batch_size=250,
        limit=arguments.limit,
        name="CIFAR-10 test",
        progress=True,
    )
    if not state.is_main_process:
        return
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    curve = [record for record in records if record["kind"] == "validation"]
    rows = [{k: v for k, v in row.items() if k != "verdicts"} for row in report.to_dict()["results"]]
    card = {
        "name": "micro_swin",
        "parameters": sum(p.numel() for p in model.parameters()),
        "training": {
            key: description[key] for key in ("config", "images", "device", "precision", "processes", "versions")
        },
        "attack": str(make_training_attack(config)),
        "optimizer_steps": sum(record["kind"] == "train" for record in records),
        "seconds": read_json(run / "evaluation.json")["training"]["seconds"],
        "validation": curve,
        "test": rows,
    }
    write_json(output / "micro_swin.json", card)
    epochs = [record["epoch"] for record in curve]
    plot_curve(
        {
            "standard accuracy": (epochs, [100 * r["standard_accuracy"] for r in curve]),
            f"adversarial accuracy, {curve[-1]['attack']}": (epochs, [100 * r["adversarial_accuracy"] for r in curve]),
        },
        output / "micro_swin.png",
        x_label="epoch",
        y_label=f"accuracy on {curve[-1]['total']} validation images (%)",
        title="micro_swin: adversarial training on CIFAR-10 (moving average of weights)",
    )
    print(report)


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(parse(Export, sys.argv[1:], prog="export_micro_swin.py"))))
