"""CIFAR-10 or CIFAR-100: adversarial training of ResNets from random weights, the second half of the CA-AT paper.

    accelerate launch recipes/cifar_resnet.py
    accelerate launch recipes/cifar_resnet.py --preset paper           # BatchNorm on batch statistics, as the paper
    accelerate launch recipes/cifar_resnet.py --preset official-code   # Nesterov, shorter rise, no rotation, best epoch
    accelerate launch recipes/cifar_resnet.py --surgery.name vanilla --surgery.lam 0.5 --output runs/cifar_vanilla
    accelerate launch recipes/cifar_resnet.py --data.name cifar100 --backbone.name resnet34 --loss.name trades

Models resnet18, resnet34, wrn28_10; losses ce, trades, mart, clp; inner solvers (`--attack.name`) pgd, pgd-dlr, apgd,
apgd-dlr, t-apgd-dlr, under any budget. CIFAR comes from the Hub, or from `--data.root` (the Hub's parquet files or the
binary version of the official archive). 200 epochs come in pieces: `--time-limit SECONDS`, then the same command with
`--resume`. `robust-peft evaluate RUN --attacks autoattack` and `robust-peft audit RUN` say what the result is worth.

A narrow network and a part of the data, for a CPU: `--backbone.width 16 --data.limit 5000 --data.batch-size 128
--optim.lr 0.1 --optim.epochs 15`.
"""

import sys

from robust_peft.cli import train

if __name__ == "__main__":
    sys.exit(train("cifar_resnet", output="runs/cifar_resnet", prog="cifar_resnet.py"))
