"""CIFAR-10 or CIFAR-100 at 224 pixels: CA-AT by adapters in ARES's adversarially pretrained Swin-S.

    accelerate launch recipes/cifar_swin.py
    accelerate launch recipes/cifar_swin.py --data.name cifar100 --output runs/cifar100_swin

The images are enlarged from 32 to 256 pixels (bicubic), of which 224 are cut out, as of any other picture; the budget,
8/255, is one of the enlarged pixels, as in the paper's experiments with adapters: accuracies are not comparable with
those at 32 pixels. Local copies: `--data.root` with the Hub's parquet files or the binary version of the official
archive; `cub_swin.py` tells the rest.
"""

import sys

from robust_peft.cli import train

if __name__ == "__main__":
    sys.exit(train("cifar_swin", output="runs/cifar_swin", prog="cifar_swin.py"))
