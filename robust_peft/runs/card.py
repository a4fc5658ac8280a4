"""The model card that a run folder carries as its README.md."""

from __future__ import annotations

from robust_peft.config import RunConfig
from robust_peft.files import read_json
from robust_peft.runs.parts import describe_surgery, make_training_attack
from robust_peft.runs.result import RunResult


def card(config: RunConfig, result: RunResult) -> str:
    description = read_json(result.folder / "config.json")
    lines = [
        f"# {result.folder.name}",
        "",
        f"{config.backbone.name} fine-tuned on {config.data.name} by {config.adapter.name} "
        f"({result.trainable_parameters:,} trainable parameters, {result.bytes_on_disk / 1e6:.2f} MB), "
        f"{describe_surgery(config.surgery)}, loss {config.loss.name}, {make_training_attack(config)}; "
        f"{config.optim.epochs} epoch(s) in {result.fit.seconds:.0f} s on {description['device']}, "
        f"{description['precision']}, {description['processes']} process(es), seed {config.seed}.",
        "",
    ]
    if result.report is not None:
        lines += ["| measured on test images | accuracy, 95 % interval |", "| --- | --- |"]
        for row in result.report.results:
            name = "no attack" if row.threat is None else f"{row.attack}, {row.threat}"
            name = name if row.own else f"after {name}"
            lines.append(f"| {name} | {row.accuracy} |")
        lines.append("")
    lines += [
        "An accuracy under attack is an upper bound: a stronger attack may find more. `robust-peft evaluate` with "
        "`--attacks autoattack` runs the standard one, and `robust-peft audit` tells whether a figure can be believed.",
        "",
        "```python",
        "import robust_peft as rp",
        "",
        f'model = rp.load_run("{result.folder.as_posix()}")  # pixels of shape [B, 3, H, W] in [0, 1] -> logits',
        "```",
        "",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in description["versions"].items()) + ".",
        "",
    ]
    return "\n".join(lines)
