"""Images: where they come from, how they are split, prepared, augmented and batched."""

from robust_peft.data.catalog import load_splits, parquet
from robust_peft.data.digits import digits
from robust_peft.data.loaders import evaluation_loader, train_loader
from robust_peft.data.preparation import PreparedImages
from robust_peft.data.sets import EncodedImages, ImageSet
from robust_peft.data.sources import load_images
from robust_peft.data.splits import Splits
from robust_peft.data.transforms import CropFlip

__all__ = [
    "CropFlip",
    "EncodedImages",
    "ImageSet",
    "PreparedImages",
    "Splits",
    "digits",
    "evaluation_loader",
    "load_images",
    "load_splits",
    "parquet",
    "train_loader",
]
