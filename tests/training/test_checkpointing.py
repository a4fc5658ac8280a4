"""Gradient checkpointing changes what is kept, not what comes out."""

import pytest
import torch
from builders import CLASSES, tiny_adapted, tiny_attack, tiny_images, tiny_optim
from torch import nn
from torch.testing import assert_close

import robust_peft as rp
from robust_peft.data import train_loader
from robust_peft.models.micro_swin import micro_swin
from robust_peft.training.checkpointing import block_names, checkpointed_blocks


def trained(loss: str, **options) -> tuple[dict, dict]:
    """The last step's record and the trained tensors, with stochastic depth."""
    model = tiny_adapted(drop_path_rate=0.5)
    trainer = rp.Trainer(
        model, attack=tiny_attack(), loss=loss, optim=tiny_optim(), precision="fp32", progress=False, **options
    )
    result = trainer.fit(train_loader(tiny_images(), 6))
    return result.history[-1], {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("loss", ["ce", "trades"])
def test_training_takes_the_same_steps(loss):
    record, weights = trained(loss)
    checkpointed_record, checkpointed_weights = trained(loss, gradient_checkpointing=True)
    assert checkpointed_record["adv_loss"] == pytest.approx(record["adv_loss"], rel=1e-5)
    for name, tensor in weights.items():
        assert_close(checkpointed_weights[name], tensor, rtol=1e-4, atol=1e-6)


def test_blocks_keep_their_input_alone():
    swin = micro_swin(CLASSES, image_size=16, width=8, depths=(8,), num_heads=(1,), window_size=2)
    model, images = rp.attach(swin, "bottleneck").eval(), torch.rand(4, 3, 16, 16, requires_grad=True)
    weights = {parameter.data_ptr() for parameter in model.parameters()}

    def kept() -> int:
        sizes = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(images)
        return sum(size for place, size in sizes.items() if place not in weights)

    everything = kept()
    with checkpointed_blocks(model):
        assert kept() < everything / 3
    assert kept() == everything
    assert all("forward" not in vars(module) for module in model.modules())


def test_blocks_are_those_of_the_network():
    names = block_names(tiny_adapted())
    assert len(names) == 2 and all(hasattr(tiny_adapted().get_submodule(name), "attn") for name in names)


def test_a_network_without_blocks_is_refused():
    model = rp.attach(nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3)), "full")
    with pytest.raises(ValueError, match="transformer blocks. Found none"):
        rp.Trainer(model, attack=tiny_attack(), gradient_checkpointing=True, progress=False)
