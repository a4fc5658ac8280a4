"""Where the time of one CA-AT step goes, by kind of operation.

    python benchmarks/profile_step.py --model swin_tiny              # and with --compile

The steps of `step.py`, recorded by torch's profiler after one that warms up. Shares are of the time in operations
themselves (on a CPU the calling thread's, which waits for the others). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter

import torch
from step import GAMMA, MODELS, Ours, build, images_for
from torch.profiler import ProfilerActivity, profile

import robust_peft as rp

KINDS = {  # the first that has a name which the operation's begins with; what is left is "other"
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_addmm", "mkl", "onednn"),
    "convolutions": ("aten::convolution", "aten::mkldnn_convolution", "aten::thnn_conv"),
    "fused attention": ("aten::_scaled_dot_product", "aten::_flash_attention"),
    "softmax": ("aten::_softmax", "aten::softmax"),
    "normalisation": ("aten::native_layer_norm", "aten::native_batch_norm", "aten::layer_norm", "aten::batch_norm"),
    "GELU and ReLU": ("aten::gelu", "aten::relu", "aten::threshold"),
    "copies and casts": ("aten::copy_", "aten::clone", "aten::cat", "aten::roll", "aten::index", "aten::stack"),
    "fused by the compiler": ("## Call CompiledFxGraph", "graph_", "triton_"),
}


def kind_of(name: str) -> str:
    return next((kind for kind, starts in KINDS.items() if name.startswith(starts)), "other")


def main() -> None:
    """Profile one model and print the shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="swin_tiny", choices=list(MODELS))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--steps", type=int, default=2)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    entry = MODELS[arguments.model]
    images, labels = images_for(
        arguments.model, entry.batch_on_gpu if device.type == "cuda" else entry.batch_on_cpu, device
    )
    surgery = rp.surgery.ConflictAware(gamma=GAMMA)
    side = Ours(build(arguments.model, device), surgery, "auto", arguments.compile)
    side(images, labels, 1)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as recorded:
        side(images, labels, arguments.steps - 1)
    times: Counter[str] = Counter()
    others: Counter[str] = Counter()
    for event in recorded.key_averages():
        spent = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        times[kind_of(event.key)] += spent
        if kind_of(event.key) == "other":
            others[event.key] += spent
    total = sum(times.values())
    for kind, spent in times.most_common():
        print(f"{100 * spent / total:5.1f} %  {kind}")
    print("largest of the others:", ", ".join(f"{name} {100 * t / total:.1f} %" for name, t in others.most_common(6)))
    print(
        json.dumps(
            {"model": arguments.model, "compile": arguments.compile, "shares": {k: t / total for k, t in times.items()}}
        )
    )


if __name__ == "__main__":
    main()
