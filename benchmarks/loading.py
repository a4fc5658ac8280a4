"""Does decoding or augmentation make a training wait? Images per second of each, and whole steps with and without.

    python benchmarks/loading.py

Pictures of 500 x 375 pixels (JPEG, as CUB's and Dogs' are on average) are written to class folders, decoded, resized
to 256 and cut to 224 by one worker process; images of 32 pixels are cropped, flipped and turned on the device, in the
batch of 128 in which they arrive. Then a ViT-S takes CA-AT steps on pictures that are decoded meanwhile and on the same
ones in memory, in turns. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from step import MODELS, Ours, build

import robust_peft as rp

PICTURE = (500, 375)


def write_pictures(folder: Path, count: int) -> None:
    """JPEG files of two classes, with about as many bytes as photographs (smooth shapes and some noise)."""
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        coarse = torch.rand(1, 3, 12, 16, generator=generator)
        width, height = PICTURE
        pixels = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0].clamp(0, 1)
        pixels = (pixels + 0.03 * torch.randn(pixels.shape, generator=generator)).clamp(0, 1)
        path = folder / "train" / ("a", "b")[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        array = (pixels * 255).to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(array).save(path, quality=90)


def decoding(folder: Path, workers: int) -> float:
    """Images per second that a loader of so many worker processes delivers, without its start."""
    splits = rp.data.load_splits("folder", root=folder, validation_share=0.0).prepared(224)
    batches = iter(rp.data.train_loader(splits.train, 8, workers=workers))
    next(batches)
    before, images = time.perf_counter(), 0
    for batch in batches:
        images += len(batch[0])
    return images / (time.perf_counter() - before)


def augmentation(device: torch.device) -> float:
    """Images of 32 pixels per second through crop, flip and rotation on the device."""
    augment = rp.data.CropFlip(padding=4, rotation=15.0)
    images = torch.rand(128, 3, 32, 32, device=device)
    keys = torch.arange(128)
    rounds, before = 0, time.perf_counter()
    while rounds < 3 or time.perf_counter() - before < 2:
        float(augment(images, keys + rounds)[0, 0, 0, 0])  # waits for the device
        rounds += 1
    return 128 * rounds / (time.perf_counter() - before)


def steps(folder: Path, device: torch.device, workers: int, rounds: int) -> dict[str, list[float]]:
    """Images per second of a ViT-S's steps on pictures being decoded and on the same in memory, in turns."""
    batch_size = MODELS["vit_small"].batch_on_gpu if device.type == "cuda" else MODELS["vit_small"].batch_on_cpu
    trainer = Ours(build("vit_small", device), rp.surgery.ConflictAware(gamma=0.8), "auto", False).trainer
    splits = rp.data.load_splits("folder", root=folder, validation_share=0.0).prepared(224)
    decoded = splits.train.subset(torch.arange(batch_size * 4))
    found = [decoded[index] for index in range(len(decoded))]
    pixels, labels = torch.stack([item[0] for item in found]), torch.tensor([item[1] for item in found])
    in_memory = rp.data.ImageSet(pixels, labels, ("a", "b"), "in memory")
    speeds: dict[str, list[float]] = {"decoded meanwhile": [], "in memory": []}
    for _ in range(rounds):
        for name, data, count in (("decoded meanwhile", decoded, workers), ("in memory", in_memory, 0)):
            history = trainer.fit(rp.data.train_loader(data, batch_size, workers=count)).history
            speeds[name] += [record["images_per_second"] for record in history if record["kind"] == "train"][1:]
    return speeds


def main() -> None:
    """Measure everything and say it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=300)
    parser.add_argument("--workers", type=int, default=1, help="processes that decode during the steps")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pictures(folder, arguments.pictures)
        size = statistics.mean(path.stat().st_size for path in folder.rglob("*.jpg"))
        decoded, augmented = decoding(folder, 1), augmentation(device)
        speeds = steps(folder, device, arguments.workers, arguments.rounds)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    print(f"decoding, resizing and cutting {PICTURE} JPEG of {size / 1e3:.0f} kB: {decoded:.0f} images/s a worker")
    print(f"crop, flip and rotation of 32 pixels on the {device.type}: {augmented:.0f} images/s")
    for name, values in speeds.items():
        print(f"ViT-S, {name}: {medians[name]:.2f} images/s [{min(values):.2f}, {max(values):.2f}], n={len(values)}")
    found = {"jpeg_bytes": size, "decoded_per_second": decoded, "augmented_per_second": augmented, "steps": speeds}
    print(json.dumps({**found, "ratio": medians["decoded meanwhile"] / medians["in memory"]}))


if __name__ == "__main__":
    main()
