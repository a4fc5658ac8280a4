"""What would cost time in the inner loop, counted: parameter gradients, and waiting for the device."""

from functools import partial
from typing import Any

import pytest
import torch
from builders import CLASSES, tiny_adapted, tiny_attack, tiny_images, tiny_optim
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import robust_peft as rp
from robust_peft import keyed_random
from robust_peft.attacks.victim import as_victim
from robust_peft.data import train_loader
from robust_peft.training.optim import make_optimizer, make_schedule
from robust_peft.training.state import RunState
from robust_peft.training.step import Batch, add_gradients
from robust_peft.training.update import Update

STEPS = 3


class Counting(TorchDispatchMode):
    """Counts products' operations, and the operations at which a program on a GPU waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.waits = 0, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in flop_registry:
            self.operations += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        if packet.__name__ in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique2"):
            self.waits.append(packet.__name__)
        return result


def a_batch() -> Batch:
    images = tiny_images(6)
    labels = torch.as_tensor(images.labels)
    return Batch(images.images.float() / 255, labels, keyed_random.sample_keys(0, 0, torch.arange(6)))


def one_pass(model: nn.Module, batch: Batch) -> int:
    """Operations of one forward and a backward pass to pixels and whatever else asks for a gradient."""
    images = batch.images.clone().requires_grad_()
    wanted = [images, *(p for p in model.parameters() if p.requires_grad)]
    with Counting() as counted:
        torch.autograd.grad(nn.functional.cross_entropy(model(images), batch.labels), wanted)
    return counted.operations


def test_an_attack_takes_no_parameter_gradient():
    model, batch = tiny_adapted().eval(), a_batch()
    with as_victim(model):
        pixels_alone = one_pass(model, batch)
    assert pixels_alone < one_pass(model, batch), "the count would not notice"
    with Counting() as counted:
        tiny_attack(steps=STEPS).perturb(model.train(), batch.images, batch.labels, keys=batch.keys)
    assert counted.operations == STEPS * pixels_alone


def test_a_compiled_attack_takes_no_parameter_gradient():
    """The backward graphs of the attack have one result, the pixels' gradient; that of training has the parameters'."""
    model, batch = tiny_adapted(), a_batch()
    results: list[int] = []

    def look(graph: torch.fx.GraphModule, _: Any) -> Any:
        (output,) = graph.graph.find_nodes(op="output")
        results.append(sum(value is not None for value in output.args[0]))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph.forward), bw_compiler=look)
    compiled = torch.compile(model, backend=backend)
    tiny_attack(steps=STEPS).perturb(compiled, batch.images, batch.labels, keys=batch.keys)
    assert results == [1]
    wanted = [p for p in model.parameters() if p.requires_grad]
    torch.autograd.grad(compiled(batch.images).sum(), wanted)
    assert results == [1, len(wanted)]
    torch._dynamo.reset()


def noting(method: Any, name: str, names: list[str]) -> Any:
    """The method, which notes its name before it runs."""

    def noted(*args: Any, **kwargs: Any) -> Any:
        names.append(name)
        return method(*args, **kwargs)

    return noted


@pytest.mark.parametrize("loss", ["ce", "trades", "mart", "clp"])
@pytest.mark.parametrize("surgery", [rp.surgery.ConflictAware(gamma=0.8), rp.surgery.Vanilla()])
def test_a_step_waits_for_the_device_once(loss: str, surgery: Any, monkeypatch: pytest.MonkeyPatch):
    model, batch = tiny_adapted(), a_batch()
    options: dict[str, Any] = {"attack": tiny_attack(steps=STEPS), "loss": loss, "surgery": surgery}
    # SGD: AdamW keeps its step count on the host and reads it there, which is no wait.
    trainer = rp.Trainer(model, optim=tiny_optim(optimizer="sgd"), precision="fp32", progress=False, **options)
    optimizer = make_optimizer(trainer.trainable, trainer.optim)
    schedule = make_schedule(optimizer, trainer.optim, 10)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    settings: dict[str, Any] = {"scope": "all", "clip_norm": 1.0, "all_reduce": None}
    update, run = Update(trainer.pair, surgery, optimizer, schedule, scaler, **settings), RunState()

    reads: list[str] = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        monkeypatch.setattr(Tensor, name, noting(getattr(Tensor, name), name, reads))

    def step() -> None:
        trainer.pair.clear()
        add_gradients(trainer.pair, batch, model=model.train(), attack=trainer.attack, loss=trainer.loss)
        update(run)

    step()  # the optimizer makes its state
    reads.clear()
    with Counting() as counted:
        step()
    assert counted.operations > 0 and CLASSES == model(batch.images).shape[1]
    assert reads == ["tolist"] and counted.waits == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_sees_cast_weights_and_leaves_the_backbone_alone(precision: str):
    model, seen = tiny_adapted(), []
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dtypes = {name: tensor.dtype for name, tensor in before.items()}

    def look(module: nn.Module, _: Any) -> None:
        seen.append({p.dtype for name, p in module.named_parameters() if "qkv" in name})

    model.register_forward_pre_hook(look)
    trainer = rp.Trainer(model, attack=tiny_attack(), optim=tiny_optim(), precision=precision, progress=False)
    trainer.fit(train_loader(tiny_images(), 6))
    inside = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert {inside} in seen
    after = model.state_dict()
    assert {name: tensor.dtype for name, tensor in after.items()} == dtypes
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == trainable


def test_training_on_compiles_nothing_anew(monkeypatch: pytest.MonkeyPatch):
    """A second `fit` of one trainer finds the graphs of the first, with drop paths and cast weights too."""
    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    options: dict[str, Any] = {"attack": tiny_attack(), "optim": tiny_optim(epochs=1), "precision": "bf16"}
    trainer = rp.Trainer(tiny_adapted(drop_path_rate=0.5), compile=True, progress=False, **options)
    trainer.fit(train_loader(tiny_images(), 6))
    first = counter.frame_count
    trainer.fit(train_loader(tiny_images(), 6))
    assert first >= 2  # the attack's and the training's
    assert counter.frame_count == first
    torch._dynamo.reset()
