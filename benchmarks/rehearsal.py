"""A full-size rehearsal of the fine-tuning recipes: real architectures and image sizes, no download.

    python benchmarks/rehearsal.py --backbones ares/vit_small ares/swin_small --batch-size 8 --steps 3

Random weights are written to a file in the layout of the published checkpoints (timm 0.6: old Swin keys) and loaded
from it as a downloaded one would be; images are random. Times whole steps of the preset (its adapters, attack and
surgery), each backbone in a process of its own, and projects them to the preset's epochs. The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from memory import Peak
from torch import Tensor, nn

import robust_peft as rp
from robust_peft.runs import make_training_attack
from robust_peft.runs.parts import adapter_method
from robust_peft.surgery import make_surgery

TRAIN_IMAGES = {"cub200": 5394, "stanford_dogs": 10800}


def old_layout(model: nn.Module) -> dict[str, Tensor]:
    """A timm model's weights under the keys that timm 0.6 gave them (Swin; ViT's have not changed)."""
    found = {}
    for key, tensor in model.state_dict().items():
        parts = key.split(".")
        if parts[0] == "layers" and parts[2] == "downsample":  # was the end of the stage before
            key = ".".join([parts[0], str(int(parts[1]) - 1), *parts[2:]])
        found[key.replace("head.fc.", "head.")] = tensor
    return found


def write_random_checkpoint(backbone: str, path: Path) -> None:
    """A checkpoint of a zoo entry's architecture with random weights, as its authors would have saved it."""
    torch.manual_seed(0)
    model = rp.load_backbone(backbone, checkpoint="random").backbone
    torch.save(old_layout(model), path)


def rehearse(backbone: str, preset: str, batch_size: int, steps: int, threads: int) -> dict[str, Any]:
    """Load through the zoo, attach, train a few steps, and say what it took."""
    torch.set_num_threads(threads)
    config = rp.get_preset(preset)
    classes = {"cub200": 200, "stanford_dogs": 120}[config.data.name]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "weights.pth"
        write_random_checkpoint(backbone, checkpoint)
        started = time.perf_counter()
        loaded = rp.load_backbone(backbone, checkpoint=checkpoint, num_classes=classes)
        loading = time.perf_counter() - started
    model: Any = rp.attach(loaded, adapter_method(config.adapter, loaded))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in model.parameters())
    count = (steps + 1) * batch_size
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 224, 224), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, classes, (count,), generator=generator)
    data = rp.data.ImageSet(images, labels, tuple(map(str, range(classes))), "random images")
    trainer = rp.Trainer(
        model,
        attack=make_training_attack(config),
        surgery=make_surgery(config.surgery.name, **config.surgery.parameters()),
        optim=dataclasses.replace(config.optim, epochs=1, warmup_epochs=0),
        augment=rp.data.CropFlip(padding=0, rotation=config.data.rotation),
        progress=False,
    )
    with torch.no_grad():  # what libraries allocate at the first call is nobody's
        model(torch.zeros(1, 3, 224, 224, device=trainer.device))
    peak = Peak(trainer.device)
    result = trainer.fit(rp.data.train_loader(data, batch_size))
    memory = peak.above()
    records = [r for r in result.history if "images_per_second" in r][1:]  # the first step warms up
    seconds = [r["images"] / r["images_per_second"] for r in records]
    median = statistics.median(seconds)
    steps_in_all = TRAIN_IMAGES[config.data.name] // config.data.batch_size * config.optim.epochs
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        saved = (Path(folder) / "adapter_model.safetensors").stat().st_size
    return {
        "backbone": backbone, "batch_size": batch_size, "precision": trainer.precision, "threads": threads,
        "device": str(trainer.device), "seconds_to_load": loading, "seconds_per_step": seconds, "median": median,
        "peak_memory_above_loaded_mb": memory / 1e6,
        "parameters": everything, "trainable": trainable, "saved_mb": saved / 1e6,
        "clean_loss": records[-1]["clean_loss"], "cos": records[-1]["cos"],
        "projected_hours": median / batch_size * config.data.batch_size * steps_in_all / 3600,
        "schedule": f"{preset}: {steps_in_all} steps of {config.data.batch_size} images",
    }  # fmt: skip


def main() -> None:
    """Rehearse each backbone in a fresh process, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=["ares/vit_small", "ares/swin_small"])
    parser.add_argument("--preset", default="cub_swin", choices=["cub_swin", "dogs_swin", "dogs_vit"])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one that warms up")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    # Spawned anew for each, so that one backbone's memory is not the other's.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        jobs = [
            pool.apply_async(
                rehearse, (name, arguments.preset, arguments.batch_size, arguments.steps, arguments.threads)
            )
            for name in arguments.backbones
        ]
        found = [job.get() for job in jobs]
    print("| backbone | trainable | MB saved | s per step | peak memory above the loaded model, MB | projected |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in found:
        print(
            f"| {row['backbone']} ({row['parameters'] / 1e6:.1f} M) | {row['trainable']:,} | {row['saved_mb']:.1f} | "
            f"{row['median']:.2f} ({row['precision']}, batch {row['batch_size']}) | "
            f"{row['peak_memory_above_loaded_mb']:.0f} | {row['projected_hours']:.1f} h ({row['schedule']}) |"
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
