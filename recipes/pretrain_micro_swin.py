"""The embedded backbone: a Swin of 3 M parameters, trained adversarially on all of CIFAR-10 from random weights.

    python recipes/pretrain_micro_swin.py

Reads ``train.parquet`` and ``test.parquet`` (``--data.train``, ``--data.test`` name others): CIFAR-10 in the Hub's
schema (columns ``img`` and ``label``; ``uoft-cs/cifar10``). On two CPU cores, two processes of one thread each keep
both busy, and a long run comes in pieces:

    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 recipes/pretrain_micro_swin.py --data.batch-size 64 \
        --time-limit 3600
    ... the same with --resume

A trial in a minute: ``--data.limit 512 --optim.epochs 2 --no-compile``.
"""

import sys

from robust_peft.cli import train

if __name__ == "__main__":
    sys.exit(train("pretrain_micro_swin", output="runs/pretrain_micro_swin", prog="pretrain_micro_swin.py"))
