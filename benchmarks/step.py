"""A whole CA-AT step of this package beside the same step as peers write it: time, memory, share of the hardware.

    python benchmarks/step.py                                    # swin_tiny, vit_small, micro_swin, resnet18
    python benchmarks/step.py --model micro_swin --quick         # within a minute

One step is PGD-10 at L-inf 8/255, a clean and an adversarial backward pass over bottleneck adapters (reduction 8) and
head (over everything for resnet18), the paper's Eq. 4, and AdamW. `reference_step.py` holds the reference, float32 and
eager; it is timed once more under bfloat16 autocast. The sides take turns in one process on the same images; a ratio
is the median over rounds, with the quartiles behind it. Peak memory above the loaded model comes from a process of
its own for each side. The floor: operations counted in one of our steps over the device's matrix rate, measured here.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import time
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from memory import Peak
from reference_step import ca_at_step
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import robust_peft as rp
from robust_peft.training.optim import make_optimizer, make_schedule
from robust_peft.training.precision import autocast_for, resolve_precision
from robust_peft.training.state import RunState
from robust_peft.training.update import Update

EPS, STEP_SIZE, STEPS, GAMMA = 8 / 255, 2 / 255, 10, 0.8


class Entry(NamedTuple):
    """A model of the benchmark, and how many images make a batch."""

    backbone: str
    image_size: int
    batch_on_cpu: int
    batch_on_gpu: int


MODELS = {
    "micro_swin": Entry("micro_swin", 32, 32, 512),
    "swin_tiny": Entry("timm/swin_tiny_patch4_window7_224", 224, 8, 64),
    "vit_small": Entry("timm/vit_small_patch16_224", 224, 8, 64),
    "swin_small": Entry("timm/swin_small_patch4_window7_224", 224, 8, 64),
    "vit_base": Entry("timm/vit_base_patch16_224", 224, 8, 64),
    "resnet18": Entry("resnet18", 32, 32, 1024),
}


def build(name: str, device: torch.device) -> nn.Module:
    """The model with its adapters, the same each time."""
    torch.manual_seed(0)
    backbone = MODELS[name].backbone
    if name == "resnet18":
        from robust_peft.models.resnet import cifar_resnet

        return rp.attach(rp.load_backbone(cifar_resnet(18, 10)), "full").to(device)
    checkpoint = None if name == "micro_swin" else "random"
    model = rp.load_backbone(backbone, num_classes=10, checkpoint=checkpoint)
    return rp.attach(model, rp.BottleneckConfig(reduction_factor=8)).to(device)


def images_for(name: str, batch_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random images and labels; time does not depend on what they show."""
    size = MODELS[name].image_size
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch_size, 3, size, size, generator=generator)
    return images.to(device), torch.randint(0, 10, (batch_size,), generator=generator).to(device)


class Ours:
    """A `Trainer`, timed by its own log: what its user gets, from the batch's arrival to the record of the step."""

    def __init__(
        self,
        model: nn.Module,
        surgery: Any,
        precision: str,
        compile: bool,
        measure: bool = True,
        checkpointing: bool = False,
    ) -> None:
        self.trainer = rp.Trainer(
            model,
            attack=rp.attacks.PGD(rp.ThreatModel("linf", EPS), steps=STEPS, step_size=STEP_SIZE),
            surgery=surgery,
            optim=rp.OptimConfig(lr=1e-3, epochs=1, schedule="constant"),
            precision=precision,
            compile=compile,
            channels_last=any(isinstance(module, nn.BatchNorm2d) for module in model.modules()),
            measure_conflict=measure,
            gradient_checkpointing=checkpointing,
            progress=False,
        )

    def __call__(self, images: Tensor, labels: Tensor, steps: int) -> list[float]:
        """Seconds of each of so many steps on this batch, after one that is not counted."""
        pixels = (images * 255).to(torch.uint8).cpu().repeat(steps + 1, 1, 1, 1)
        data = rp.data.ImageSet(pixels, labels.cpu().repeat(steps + 1), tuple(map(str, range(10))), "random images")
        history = self.trainer.fit(rp.data.train_loader(data, len(images))).history
        return [record["images"] / record["images_per_second"] for record in history if record["kind"] == "train"][1:]


class Reference:
    """The reference's step, in float32 or under autocast."""

    def __init__(self, model: nn.Module, precision: str, device: torch.device) -> None:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        context = nullcontext if precision == "fp32" else partial(autocast_for, precision, device)
        options: dict[str, Any] = dict(eps=EPS, step_size=STEP_SIZE, steps=STEPS, gamma=GAMMA, context=context)
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
        self.step = partial(ca_at_step, model, optimizer, **options)

    def __call__(self, images: Tensor, labels: Tensor, steps: int) -> list[float]:
        """Seconds of each of so many steps on this batch, after one that is not counted."""
        seconds = []
        for _ in range(steps + 1):
            wait(images.device)
            before = time.perf_counter()
            self.step(images, labels)
            wait(images.device)
            seconds.append(time.perf_counter() - before)
        return seconds[1:]


Side = Ours | Reference


def make_sides(name: str, device: torch.device, precision: str, compile: bool, checkpointing: bool) -> dict[str, Side]:
    """What is timed, each on a model of its own."""
    reduced = precision if precision != "fp32" else "bf16"
    ca_at, vanilla = rp.surgery.ConflictAware(gamma=GAMMA), rp.surgery.Vanilla(lam=0.5)

    def ours(surgery: Any, measure: bool = True) -> Ours:
        return Ours(build(name, device), surgery, precision, compile, measure, checkpointing)

    return {
        "reference": Reference(build(name, device), "fp32", device),
        "reference under autocast": Reference(build(name, device), reduced, device),
        "ours": ours(ca_at),
        "ours, vanilla": ours(vanilla),
        "ours, vanilla, one backward pass": ours(vanilla, measure=False),
    }


def wait(device: torch.device) -> None:
    """Until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_sides(
    sides: dict[str, Side], images: Tensor, labels: Tensor, rounds: int, most_seconds: float
) -> dict[str, list[float]]:
    """Seconds of each side's step in each round; the sides take turns. A first round warms up (and compiles).

    Each round begins with another side, so that none always follows the same one.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    started = time.monotonic()
    for turn in range(rounds + 1):
        first = turn % len(sides)
        for name in [*sides][first:] + [*sides][:first]:
            seconds[name] += sides[name](images, labels, 1 if turn else 0)
        if turn == 0:
            started = time.monotonic()
        elif turn >= 2 and time.monotonic() - started > most_seconds:
            break
    return seconds


def ratio(slow: list[float], fast: list[float]) -> tuple[float, float, float]:
    """Median of the rounds' ratios, and its quartiles."""
    ratios = sorted(a / b for a, b in zip(slow, fast, strict=True))
    if len(ratios) < 4:
        return statistics.median(ratios), ratios[0], ratios[-1]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, low, high


def matrix_rate(device: torch.device, precision: str) -> float:
    """Floating-point operations per second of a large matrix product, the best of several."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    size = 8192 if device.type == "cuda" else 2048
    one, other = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        wait(device)
        before = time.perf_counter()
        torch.mm(one, other)
        wait(device)
        best = min(best, time.perf_counter() - before)
    return 2 * size**3 / best


class Operations(TorchDispatchMode):
    """Counts multiplications and additions by torch's own table (its FlopCounterMode fails on gradients of inputs)."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


def count_operations(name: str, images: Tensor, labels: Tensor) -> int:
    """Floating-point operations of one of our steps, eager and in float32."""
    side = Ours(build(name, images.device), rp.surgery.ConflictAware(gamma=GAMMA), "fp32", False)
    totals = []
    for steps in (0, 1):  # what a training does once is in both
        counter = Operations()
        with sdpa_kernel(SDPBackend.MATH), counter:  # attention as the matrix products that it is made of
            side(images, labels, steps)
        totals.append(counter.total)
    return totals[1] - totals[0]


def seconds_of_surgery(name: str, device: torch.device) -> float:
    """What an update takes beyond the optimizer's own step: Gramian, weights, combination, norms, the record's numbers.

    Measured on random gradients: it depends on the number of trainable parameters alone.
    """
    model = build(name, device)
    trainer = Ours(model, rp.surgery.ConflictAware(gamma=GAMMA), "fp32", False).trainer
    optimizer = make_optimizer(trainer.trainable, trainer.optim)
    schedule = make_schedule(optimizer, trainer.optim, 10**6)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    options: dict[str, Any] = {"scope": "all", "clip_norm": None, "all_reduce": None}
    update = Update(trainer.pair, trainer.surgery, optimizer, schedule, scaler, **options)
    run = RunState()
    whole, alone = [], []
    for _ in range(21):
        trainer.pair.rows.normal_()
        trainer.pair.extras.fill_(1)
        wait(device)
        before = time.perf_counter()
        update(run)
        wait(device)
        whole.append(time.perf_counter() - before)
        trainer.pair.write()
        wait(device)
        before = time.perf_counter()
        optimizer.step()
        wait(device)
        alone.append(time.perf_counter() - before)
    return statistics.median(whole[1:]) - statistics.median(alone[1:])


def peak_memory(
    name: str, side: str, batch_size: int, precision: str, compile: bool, threads: int, checkpointing: bool = False
) -> int:
    """Bytes above the loaded model at the peak of two steps of one side. To be called in a fresh process.

    A step on the same batch comes first: what libraries set up once is nobody's. What lives as long as a training (the
    optimizer's state, the buffer of the pair) is not in it.
    """
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(name, device)
    images, labels = images_for(name, batch_size, device)
    ours = side == "ours"
    ca_at = rp.surgery.ConflictAware(gamma=GAMMA)
    options: dict[str, Any] = {"checkpointing": checkpointing}
    step = Ours(model, ca_at, precision, compile, **options) if ours else Reference(model, "fp32", device)
    step(images, labels, 0)
    peak = Peak(device)
    step(images, labels, 1)
    return peak.above()


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything about one model."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = resolve_precision(arguments.precision, device)
    entry = MODELS[name]
    batch_size = arguments.batch_size or (entry.batch_on_gpu if device.type == "cuda" else entry.batch_on_cpu)
    images, labels = images_for(name, batch_size, device)
    sides = make_sides(name, device, precision, arguments.compile, arguments.gradient_checkpointing)
    seconds = time_sides(sides, images, labels, arguments.rounds, arguments.seconds)
    operations = count_operations(name, images, labels)
    rate = matrix_rate(device, precision)
    ours = statistics.median(seconds["ours"])
    found: dict[str, Any] = {
        "model": name, "batch_size": batch_size, "precision": precision, "compile": arguments.compile,
        "rounds": len(seconds["ours"]), "seconds": {side: statistics.median(s) for side, s in seconds.items()},
        "ratio": ratio(seconds["reference"], seconds["ours"]),
        "ratio_autocast": ratio(seconds["reference under autocast"], seconds["ours"]),
        "ca_at_over_vanilla": ratio(seconds["ours"], seconds["ours, vanilla"]),
        "ca_at_over_one_backward": ratio(seconds["ours"], seconds["ours, vanilla, one backward pass"]),
        "operations": operations, "matrix_rate": rate, "floor_seconds": operations / rate,
        "share_of_peak": operations / rate / ours, "images_per_second": batch_size / ours,
        "surgery_share": seconds_of_surgery(name, device) / ours,
    }  # fmt: skip
    if not arguments.no_memory:
        spawn = multiprocessing.get_context("spawn")
        for side in ("reference", "ours"):
            pool = spawn.Pool(1)
            options = (precision, arguments.compile, torch.get_num_threads(), arguments.gradient_checkpointing)
            found[f"memory_{side}"] = pool.apply(peak_memory, (name, side, batch_size, *options))
            pool.close()
            pool.join()
        found["memory_ratio"] = found["memory_ours"] / found["memory_reference"]
    return found


def main() -> None:
    """Measure each model and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    standard = ["swin_tiny", "vit_small", "micro_swin", "resnet18"]
    parser.add_argument("--model", nargs="+", default=standard, choices=list(MODELS))
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"], help="of our side")
    parser.add_argument("--compile", action="store_true", help="compile our side's model")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="on our side")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=300, help="a model's rounds end after so many (two at least)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-memory", action="store_true", help="skip the processes that measure memory")
    parser.add_argument("--quick", action="store_true", help="few rounds, small batch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.quick:
        arguments.rounds, arguments.seconds = 5, 20
        arguments.batch_size = arguments.batch_size or 16
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    print(f"{gpu}, {torch.backends.cpu.get_cpu_capability()}, {arguments.threads} threads of {os.cpu_count()}")
    results = [measure(name, arguments) for name in arguments.model]
    print("| model | batch | reference, s | ours, s | ratio [quartiles] | over autocast | memory | share of peak |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in results:
        shown = [f"{middle:.2f} [{low:.2f}, {high:.2f}]" for middle, low, high in (row["ratio"], row["ratio_autocast"])]
        memory = f"{row['memory_ratio']:.2f}" if "memory_ratio" in row else ""
        print(
            f"| {row['model']} | {row['batch_size']} | {row['seconds']['reference']:.3f} | "
            f"{row['seconds']['ours']:.3f} ({row['precision']}{', compiled' if row['compile'] else ''}) | {shown[0]} | "
            f"{shown[1]} | {memory} | {100 * row['share_of_peak']:.0f} % |"
        )
        for key in ("ca_at_over_vanilla", "ca_at_over_one_backward"):
            middle, low, high = row[key]
            print(f"  {row['model']}: {key.replace('_', ' ')} {middle:.3f} [{low:.3f}, {high:.3f}]")
        print(f"  {row['model']}: surgery and its log take {100 * row['surgery_share']:.2f} % of a step")
    print(json.dumps(results[0] if len(results) == 1 else results))


if __name__ == "__main__":
    main()
