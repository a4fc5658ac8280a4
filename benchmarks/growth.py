"""How time and memory of a CA-AT step grow: with batch, attack steps, image size, reduction factor and processes.

    python benchmarks/growth.py --output runs/growth

One figure each, the expected law beside what was measured, and the numbers as JSON. The model is the architecture of
the embedded backbone (random weights, so that it can take any image size), 32 pixels, batch 32, PGD-10, adapters with
reduction 8, one thread; each point in a process of its own.

The laws, with a forward pass as the unit of time: an attack step is 2 (forward, and backward to the pixels), the two
passes of training are about 2 each, so K attack steps cost 2 K + 4. Time and memory follow the number of images and,
in a Swin, the number of pixels. An adapter of reduction r adds 2 d^2 / r products to a block's 12 d^2. Processes share
a batch: n of them take 1/n of the time as long as each has a core.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from memory import Peak
from step import EPS, GAMMA, STEP_SIZE

import robust_peft as rp
from robust_peft.models.micro_swin import micro_swin
from robust_peft.plots import plot_lines

STANDARD = {"batch_size": 32, "attack_steps": 10, "image_size": 32, "reduction": 8, "processes": 1}
VALUES = {
    "batch_size": (4, 8, 16, 32, 64),
    "attack_steps": (1, 2, 5, 10, 20, 40),
    "image_size": (16, 32, 48, 64),
    "reduction": (1, 2, 4, 8, 16, 32),
    "processes": (1, 2),
}
# Of each: its law, up to a factor.
LAWS: dict[str, Callable[[float], float]] = {
    "batch_size": lambda batch: batch,
    "attack_steps": lambda steps: 2 * steps + 4,
    "image_size": lambda size: size**2,
    "reduction": lambda reduction: 12 + 2 / reduction,
    "processes": lambda count: 1 / count,
}
CONSTANT_MEMORY = ("attack_steps",)


def take_steps(settings: dict[str, int]) -> dict[str, float]:
    """Seconds of the fastest of three steps, and bytes above the loaded model at the peak, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    size, batch = settings["image_size"], settings["batch_size"] // settings["processes"]
    backbone = rp.Normalized(micro_swin(10, image_size=size), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    model = rp.attach(backbone, rp.BottleneckConfig(reduction_factor=settings["reduction"]))

    def train(steps: int, batch: int) -> list[dict[str, Any]]:
        trainer = rp.Trainer(
            model,
            attack=rp.attacks.PGD(rp.ThreatModel("linf", EPS), steps=settings["attack_steps"], step_size=STEP_SIZE),
            surgery=rp.surgery.ConflictAware(gamma=GAMMA),
            optim=rp.OptimConfig(lr=1e-3, epochs=1, schedule="constant"),
            progress=False,
        )
        count = steps * batch * settings["processes"]
        pixels = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
        data = rp.data.ImageSet(pixels, torch.arange(count) % 10, tuple(map(str, range(10))), "random images")
        return trainer.fit(rp.data.train_loader(data, batch)).history

    train(1, batch)  # what libraries set up once is nobody's
    peak = Peak(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    history = train(4, batch)
    if not history:  # rank 0 keeps the log
        return {}
    return {"seconds": min(r["images"] / r["images_per_second"] for r in history[1:]), "bytes": peak.above()}


def in_own_process(settings: dict[str, int]) -> dict[str, float]:
    """`take_steps` in a fresh process; in several, what rank 0 saw."""
    if settings["processes"] == 1:
        pool = multiprocessing.get_context("spawn").Pool(1)
        found = pool.apply(take_steps, (settings,))
        pool.close()
        pool.join()
        return found
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += [str(settings["processes"]), __file__, "--settings", json.dumps(settings)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout.strip().splitlines()[-1])


def draw(what: str, points: list[dict[str, float]], folder: Path) -> None:
    """Time and memory over one setting, each beside its law through the standard point."""
    x = [point[what] for point in points]
    at = x.index(STANDARD[what]) if STANDARD[what] in x else 0
    panels: dict[str, dict[str, Any]] = {}
    for name, key, unit in (("seconds per step", "seconds", 1.0), ("MB above the model", "bytes", 1e6)):
        y = [point[key] / unit for point in points]
        flat = key == "bytes" and what in CONSTANT_MEMORY
        law = [1.0 if flat else LAWS[what](value) for value in x]
        panels[name] = {"measured": (x, y), "law": (x, [y[at] * value / law[at] for value in law])}
    label = what.replace("_", " ")
    unit = {"image_size": ", pixels", "batch_size": ", images", "reduction": " factor"}.get(what, "")
    title = f"A CA-AT step by {label}"
    plot_lines(panels, folder / f"{what}.png", x_label=label + unit, title=title, log=True, ticks=x)


def main() -> None:
    """Measure every point, draw, write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/growth"))
    parser.add_argument("--only", nargs="+", default=list(VALUES), choices=list(VALUES))
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.settings:
        found = take_steps(json.loads(arguments.settings))
        if int(os.environ["RANK"]) == 0:
            print(json.dumps(found))
        return
    arguments.output.mkdir(parents=True, exist_ok=True)
    print(f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, one thread")
    everything: dict[str, list[dict[str, float]]] = {}
    for what in arguments.only:
        points = []
        for value in VALUES[what]:
            settings = {**STANDARD, what: value}
            points.append({what: value, **in_own_process(settings)})
            print(f"{what} {value}: {points[-1]['seconds']:.3f} s, {points[-1]['bytes'] / 1e6:.0f} MB", flush=True)
        draw(what, points, arguments.output)
        everything[what] = points
    (arguments.output / "growth.json").write_text(json.dumps(everything, indent=1) + "\n")
    print(f"Figures and growth.json: {arguments.output}")


if __name__ == "__main__":
    main()
