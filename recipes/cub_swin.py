"""CUB-200 birds: CA-AT by adapters in ARES's adversarially pretrained Swin-S.

    accelerate launch recipes/cub_swin.py
    accelerate launch recipes/cub_swin.py --surgery.name vanilla --surgery.lam 0.5 --output runs/cub_vanilla
    accelerate launch recipes/cub_swin.py --preset roli                # a sibling study's published settings

Bottleneck adapters (reduction 8) and a new head are trained; the head starts from a robust linear probe. Images and
weights come from the Hub and from ARES's page. Without network: `--data.root CUB_200_2011.tgz` (or the folder) and
`--backbone.checkpoint ARES_Swin_small_patch4_window7_224_AT.pth` name local copies. There is no public robust Swin-T,
so that Swin-S stands in for the paper's "Swin-T"; `--backbone.name ares/swin_base` takes the next larger one.

Several GPUs or nodes: `accelerate config` once, then the same command; batch size and learning rate are per process and
per step. A run that was stopped (`--time-limit SECONDS`) goes on with `--resume`. A trial in minutes on a CPU:
`--data.limit 16 --data.batch-size 4 --optim.epochs 1 --optim.warmup-epochs 0 --adapter.head-epochs 1
--evaluation.limit 4 --attack.steps 4`.
"""

import sys

from robust_peft.cli import train

if __name__ == "__main__":
    sys.exit(train("cub_swin", output="runs/cub_swin", prog="cub_swin.py"))
