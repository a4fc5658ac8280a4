"""Stanford Dogs: CA-AT by adapters in ARES's adversarially pretrained ViT-B.

    accelerate launch recipes/dogs_vit.py
    accelerate launch recipes/dogs_vit.py --backbone.name ares/vit_small --output runs/dogs_vit_small
    accelerate launch recipes/dogs_vit.py --preset roli                # a sibling study's published settings

As `dogs_swin.py` with another backbone; `cub_swin.py` tells the rest. Stanford Dogs is built from ImageNet training
images: the backbone may have seen its test images.
"""

import sys

from robust_peft.cli import train

if __name__ == "__main__":
    sys.exit(train("dogs_vit", output="runs/dogs_vit", prog="dogs_vit.py"))
