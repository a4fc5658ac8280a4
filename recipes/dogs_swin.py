"""Stanford Dogs: CA-AT by adapters in ARES's adversarially pretrained Swin-S.

    accelerate launch recipes/dogs_swin.py
    accelerate launch recipes/dogs_swin.py --preset roli               # a sibling study's published settings

As `cub_swin.py`, which tells the rest; local copies: `--data.root FOLDER` with images.tar and lists.tar (or with
Images/ and lists/). Stanford Dogs is built from ImageNet training images: the backbone may have seen its test images.
"""

import sys

from robust_peft.cli import train

if __name__ == "__main__":
    sys.exit(train("dogs_swin", output="runs/dogs_swin", prog="dogs_swin.py"))
