"""Our AutoAttack beside pyautoattack: how many images each leaves standing, component by component, and in what time.

    python benchmarks/autoattack.py --cifar10 cifar10/test.parquet --output runs/autoattack

Each cell (model, norm, seed, attack, side) is one JSON file with its adversarial images beside it; a cell that is there
is not measured again (unless images or versions differ), so the command can be stopped and repeated; after a change of
this package's attacks remove its cells. Both sides attack the same images of the same float32
model on the same number of threads, one after the other. Every image that a side counts as broken is re-checked by
`recheck`, which uses numpy and a plain forward pass and nothing of the evaluator. The last line is JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import platform
import re
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import robust_peft as rp

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
# The reference's names of the components on the left, ours on the right.
OURS = {"standard": "autoattack", "apgd-ce": "apgd-ce", "apgd-t": "t-apgd-dlr", "fab-t": "t-fab", "square": "square"}
BUDGETS = {("micro_swin", "linf"): "8/255", ("micro_swin", "l2"): "0.5", ("mnist", "linf"): "0.3"}


def load_images(model: str, count: int, cifar10: Path | None) -> tuple[Tensor, Tensor]:
    """The first test images, float32 in [0, 1]."""
    if model == "mnist":
        test = rp.data.digits().test
        assert test is not None
        return test.images[:count].float() / 255, test.labels[:count]
    if cifar10 is None:
        raise SystemExit("micro_swin is measured on CIFAR-10: give its test.parquet as --cifar10.")
    import pyarrow.parquet
    from PIL import Image

    table = pyarrow.parquet.read_table(cifar10).slice(0, count)
    pictures = [np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in table["img"].to_pylist()]
    # In contiguous memory: pyautoattack 0.2.0 fails on channels_last images (grad.view).
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous().float() / 255
    return images, torch.tensor(table["label"].to_pylist())


def load_model(name: str) -> nn.Module:
    """The model under attack, in eval mode and float32."""
    if name == "mnist":
        from mnist_convnet import trained

        return trained()
    return rp.load_backbone("micro_swin").eval()


def run_reference(
    model: nn.Module, images: Tensor, labels: Tensor, norm: str, eps: float, seed: int, attack: str
) -> tuple[Tensor, dict[str, float]]:
    """Adversarial images of pyautoattack, and the seconds that each component took."""
    import pyautoattack

    said: list[str] = []
    logger = logging.getLogger("auto-attack")
    logger.setLevel(logging.DEBUG)
    listener = logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(listener)
    options: dict[str, Any] = {"norm": {"linf": "Linf", "l2": "L2"}[norm], "eps": eps, "seed": seed}
    options |= {"version": "standard"} if attack == "standard" else {"version": "custom", "attacks": [attack]}
    reference = pyautoattack.AutoAttack(model, **options)
    if attack != "standard":  # as `version="standard"` sets them
        reference.apgd.n_restarts = reference.fab.n_restarts = 1
        reference.fab.n_target_classes = reference.apgd_targeted.n_target_classes = 9
    adv_images, _ = reference.run_standard_evaluation(images, labels, batch_size=len(images))
    logger.removeHandler(listener)
    seconds, before = {}, 0.0
    for sentence in said:
        found = re.fullmatch(r"robust accuracy after (\S+): \S+ \(total time (\S+) s\)", sentence)
        if found:
            seconds[found.group(1).lower()] = float(found.group(2)) - before
            before = float(found.group(2))
    return adv_images, seconds


def run_ours(
    model: nn.Module, images: Tensor, labels: Tensor, norm: str, eps: float, seed: int, attack: str, precision: str
) -> tuple[Tensor, dict[str, float]]:
    """Adversarial images of this package's evaluator, and the seconds that each component took."""
    from robust_peft.evaluation.saved_images import load_images

    threat, data = rp.ThreatModel(norm, eps), rp.data.ImageSet(images, labels, tuple("0123456789"), "benchmark")
    with tempfile.TemporaryDirectory() as folder:
        report = rp.evaluate(
            model, data, [threat], [OURS[attack]], batch_size=len(images), seed=seed, precision=precision,
            output=folder, save_images=True,
        )  # fmt: skip
        adv_images = images.clone()
        result = report.find(OURS[attack], threat)
        if "0" in result.verdicts and result.accuracy.correct < report.clean.correct:
            for saved in load_images(folder):
                adv_images[saved.indices] = saved.adv_images
    theirs = {ours: name for name, ours in OURS.items()}
    return adv_images, {theirs[row.attack]: row.seconds for row in result.components or (result,)}


def recheck(
    model: nn.Module, images: Tensor, adv_images: Tensor, labels: Tensor, norm: str, eps: float
) -> tuple[list[int], list[int]]:
    """Samples that are broken (misclassified inside ball and box), and those that left the ball or the box."""
    difference = (adv_images.numpy().astype(np.float64) - images.numpy().astype(np.float64)).reshape(len(images), -1)
    size = np.abs(difference).max(axis=1) if norm == "linf" else np.sqrt((difference**2).sum(axis=1))
    inside = (size <= eps * (1 + 1e-5)) & (adv_images.numpy().reshape(len(images), -1).min(axis=1) >= 0)
    inside &= adv_images.numpy().reshape(len(images), -1).max(axis=1) <= 1
    with torch.no_grad():
        logits = torch.cat([model(part) for part in adv_images.split(50)]).numpy()
    wrong = logits.argmax(axis=1) != labels.numpy()
    return np.flatnonzero(wrong & inside).tolist(), np.flatnonzero(~inside).tolist()


def measure(arguments: argparse.Namespace, name: str, norm: str, seed: int, attack: str, side: str) -> dict:
    """One cell: attack, time, re-check, write."""
    path = arguments.output / f"{name}-{norm}-{attack}-{side}-{seed}.json"
    versions = {p: metadata.version(p) for p in ("torch", "timm", "pyautoattack", "torchattacks")}
    if path.is_file():
        cell = json.loads(path.read_text())
        if cell["images"] == arguments.images and cell["versions"] == versions:
            return cell
    torch.manual_seed(seed)
    images, labels = load_images(name, arguments.images, arguments.cifar10)
    model, eps = load_model(name), rp.ThreatModel(norm, BUDGETS[name, norm]).eps
    wall, cpu = time.perf_counter(), time.process_time()
    if side == "reference":
        adv_images, components = run_reference(model, images, labels, norm, eps, seed, attack)
    else:
        precision = {"ours": "fp32", "ours-bf16": "bf16"}[side]
        adv_images, components = run_ours(model, images, labels, norm, eps, seed, attack, precision)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    broken, outside = recheck(model, images, adv_images, labels, norm, eps)
    cell = {
        "model": name, "norm": norm, "eps": eps, "seed": seed, "attack": attack, "side": side, "images": len(images),
        "standing": len(images) - len(broken), "broken": broken, "outside": outside,
        "seconds": wall, "cpu_seconds": cpu, "component_seconds": components,
        "threads": torch.get_num_threads(), "cpu": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "versions": versions,
    }  # fmt: skip
    arguments.output.mkdir(parents=True, exist_ok=True)
    save_file({"adv_images": adv_images.contiguous()}, path.with_suffix(".safetensors"))
    path.write_text(json.dumps(cell, indent=2) + "\n")
    print(f"{path.stem}: {cell['standing']} of {cell['images']} standing, {wall:.0f} s ({cpu:.0f} CPU s)", flush=True)
    return cell


def table(cells: list[dict]) -> str:
    """Markdown: one row for each model, norm, attack and seed, both sides beside each other."""
    keys = dict.fromkeys((c["model"], c["norm"], c["attack"], c["seed"]) for c in cells)
    sides = [side for side in ("reference", "ours", "ours-bf16") if any(c["side"] == side for c in cells)]
    head = ["model", "threat", "attack", "seed", *(f"{s}: standing, seconds" for s in sides)]
    head += [f"time of {s} / {sides[0]}" for s in sides[1:]]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    for key in keys:
        found = {c["side"]: c for c in cells if (c["model"], c["norm"], c["attack"], c["seed"]) == key}
        some = next(iter(found.values()))
        row = [key[0], str(rp.ThreatModel(key[1], some["eps"])), key[2], str(key[3])]
        row += [f"{found[s]['standing']}, {found[s]['seconds']:.0f}" if s in found else "" for s in sides]
        base = found.get(sides[0])
        row += [f"{found[s]['seconds'] / base['seconds']:.2f}" if base and s in found else "" for s in sides[1:]]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure the cells that are missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", type=Path, help="CIFAR-10's test.parquet (columns img and label)")
    parser.add_argument("--output", type=Path, default=Path("runs/autoattack"), help="folder of the cells")
    parser.add_argument("--images", type=int, default=200, help="first so many test images")
    parser.add_argument("--cases", nargs="+", default=[":".join(case) for case in BUDGETS], help="model:norm")
    parser.add_argument("--attacks", nargs="+", default=["standard"], choices=list(OURS), help="whole or by component")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--sides", nargs="+", default=["reference", "ours"], choices=["reference", "ours", "ours-bf16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cells = []
    for case in arguments.cases:
        name, norm = case.split(":")
        for seed in arguments.seeds:
            for attack in arguments.attacks:
                cells += [measure(arguments, name, norm, seed, attack, side) for side in arguments.sides]
    print(table(cells))
    standing: dict[str, dict[str, int]] = {}
    for cell in cells:
        row = standing.setdefault(f"{cell['model']} {cell['norm']} {cell['attack']} {cell['seed']}", {})
        row[cell["side"]] = cell["standing"]
    seconds = {side: sum(c["seconds"] for c in cells if c["side"] == side) for side in arguments.sides}
    print(json.dumps({"standing": standing, "seconds": seconds}))


if __name__ == "__main__":
    main()
