"""Evaluates a small model, alone or as one of torchrun's processes, and saves the verdicts and what was drawn."""

import json
import sys

import torch
from torch import nn

import robust_peft as rp
from robust_peft import keyed_random
from robust_peft.data import ImageSet
from robust_peft.processes import gather, leave, process_state

THREATS = [rp.ThreatModel("linf", 0.03), rp.ThreatModel("l2", 0.2)]
ATTACKS = ["pgd-3", "apgd-ce-5", "t-apgd-dlr-5", "t-fab-3", "square-20"]


def main(output: str, folder: str, dtype: str, batch_size: int) -> None:
    state = process_state()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    model = model.to(getattr(torch, dtype))
    images = torch.rand(200, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        labels = model(images.to(getattr(torch, dtype))).argmax(dim=1)
    draws: dict[int, float] = {}
    drawing = keyed_random.uniform

    def noted(keys, shape, *options):
        drawn = drawing(keys, shape, *options)
        draws.update(zip(keys.tolist(), drawn.flatten(1).sum(dim=1).tolist(), strict=True))
        return drawn

    keyed_random.uniform = noted
    report = rp.evaluate(
        model, ImageSet(images, labels, tuple("abcde"), "noise"), THREATS, ATTACKS,
        batch_size=batch_size, output=folder or None,
    )  # fmt: skip
    keyed_random.uniform = drawing
    joined = dict(pair for found in gather([draws]) for pair in found.items())
    if state.is_main_process:
        with open(output, "w") as file:
            rows = {f"{r.attack} {r.threat}": r.verdicts for r in report.results}
            json.dump({"world": state.num_processes, "verdicts": rows, "draws": joined}, file)
    leave()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
