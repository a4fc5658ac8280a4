"""The loaders that feed a training or an evaluation."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate


def train_loader(images: Dataset, batch_size: int, *, seed: int = 0, workers: int = 0) -> DataLoader:
    """Shuffled batches for training; the last incomplete one is dropped, unless it is the only one.

    Args:
        images: An `ImageSet`, `EncodedImages` or what `Splits.prepared` gives.
        batch_size: Images in a batch.
        seed: Of the order, which is another one in each epoch.
        workers: Processes that decode pictures beside this one, one thread each. They start anew in each epoch, so
            that they see the epoch that was set. The batches are the same with any number of them.
    """
    return DataLoader(
        images,
        batch_size=min(batch_size, len(images)),  # type: ignore[arg-type]
        shuffle=True,
        drop_last=True,
        collate_fn=collate,
        generator=torch.Generator().manual_seed(seed),
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    )


def evaluation_loader(images: Dataset, batch_size: int, *, workers: int = 0) -> DataLoader:
    """Every sample once, in order; ``workers`` as for `train_loader`."""
    return DataLoader(
        images,
        batch_size=batch_size,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    )


def collate(batch: Any) -> Any:
    """Images, labels and indices of a batch as tensors; a batch that was made at once is left as it is.

    Raises:
        ValueError: For images of several sizes.
    """
    if isinstance(batch, tuple):
        return batch
    sizes = sorted({tuple(sample[0].shape) for sample in batch})
    if len(sizes) > 1:
        raise ValueError(
            f"The images of a batch should have one size. Found {len(sizes)}, for example {sizes[0]} and {sizes[1]}; "
            "splits.prepared(image_size) makes them one."
        )
    return tuple(default_collate(batch))
