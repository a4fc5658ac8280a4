"""The angle measured on everything that trains, or not on the head, for adapters of every kind."""

import pytest
import torch
from builders import tiny_adapted, tiny_attack, tiny_images, tiny_optim

import robust_peft as rp
from robust_peft.data import train_loader


@pytest.mark.parametrize("method", ["bottleneck", "lora", "layernorm", "bias"])
def test_the_angle_without_the_head(method):
    """One step of SGD tells the gradients: with Vanilla(0) and Vanilla(1), which do not depend on the angle."""
    moved, histories = {}, {}
    for conflict_params in ("all", "adapters"):
        for lam in (0.0, 1.0):
            model = tiny_adapted(method=method).double()
            trainer = rp.Trainer(
                model,
                attack=tiny_attack(),
                surgery=rp.surgery.Vanilla(lam),
                optim=tiny_optim(optimizer="sgd", momentum=0.0, lr=1.0, epochs=1),
                conflict_params=conflict_params,
                precision="fp32",
                progress=False,
            )
            before = {name: p.detach().clone() for name, p in trainer.trainable}
            result = trainer.fit(train_loader(tiny_images(), 24))
            moved[lam] = {name: before[name] - p.detach() for name, p in trainer.trainable}
            histories[conflict_params] = result.history[0]
    head = [name for name in moved[0.0] if "modules_to_save" in name]
    assert len(head) == 2 and len(moved[0.0]) > 4
    cosines = []
    for left_out in ([], head):
        clean, adv = (
            torch.cat([change.flatten() for name, change in moved[lam].items() if name not in left_out])
            for lam in (0.0, 1.0)
        )
        cosines.append((clean @ adv / (clean.norm() * adv.norm())).item())
    found = [histories[name]["cos"] for name in ("all", "adapters")]
    assert found == pytest.approx(cosines, rel=1e-6)
    assert abs(found[0] - found[1]) > 1e-6
