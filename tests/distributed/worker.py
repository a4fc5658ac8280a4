"""Trains the tiny model on the joined batch and saves what came out; run by torchrun or alone."""

import json
import sys

import torch
from accelerate import PartialState

sys.path.insert(0, sys.argv[1])
from builders import ListTracker, tiny_adapted, tiny_attack, tiny_images, tiny_optim  # noqa: E402

import robust_peft as rp  # noqa: E402
from robust_peft.data import CropFlip, evaluation_loader, train_loader  # noqa: E402
from robust_peft.processes import leave  # noqa: E402


def main(output: str, joined_batch: int, accumulation: int, dtype: str, loss: str) -> None:
    world = PartialState(cpu=True).num_processes
    model = tiny_adapted(drop_path_rate=0.2, seed=PartialState().process_index)  # rank 0's is what all start from
    model = model.double() if dtype == "float64" else model
    starts = []

    class Noting(rp.attacks.PGD):
        def perturb(self, model, images, labels, *, keys=None, objective=None, targets=None):
            starts.append((keys.tolist(), self.threat.random_start(images, keys).sum(dim=(1, 2, 3)).tolist()))
            return super().perturb(model, images, labels, keys=keys, objective=objective, targets=targets)

    tracker = ListTracker()
    attack = Noting(rp.ThreatModel("linf", "8/255"), steps=3)
    assert type(tiny_attack()) is rp.attacks.PGD
    trainer = rp.Trainer(
        model,
        attack=attack,
        loss=loss,
        surgery=rp.surgery.ConflictAware(gamma=0.9),
        optim=tiny_optim(epochs=2, accumulation=accumulation, lr=1e-3),
        augment=CropFlip(padding=2),
        precision="fp32",
        progress=False,
        log_with=(tracker,),
    )
    images = tiny_images(24)
    loader = train_loader(images, joined_batch // world // accumulation)
    result = trainer.fit(loader, evaluation_loader(tiny_images(23, seed=1), 5))
    assert len(tracker.logged) == (len(result.history) if PartialState().is_main_process else 0)
    report = rp.evaluate(model, tiny_images(23, seed=1), [attack.threat], ["pgd-3"], batch_size=4)
    draws = [dict(zip(keys, sums, strict=True)) for keys, sums in starts]
    gathered = [draws]
    if world > 1:
        gathered = [None] * world
        torch.distributed.all_gather_object(gathered, draws)
    if PartialState().is_main_process:
        joined: dict = {}
        for found in gathered:
            for step in found:
                joined |= step
        torch.save(
            {
                "world": world,
                "steps": result.steps,
                "parameters": {name: p.detach() for name, p in model.named_parameters() if p.requires_grad},
                "history": json.dumps(result.history),
                "verdicts": [list(r.correct) for r in report.results],
                "draws": joined,
            },
            output,
        )
    leave()


if __name__ == "__main__":
    main(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5], sys.argv[6])
