"""Images: where they come from, how they are split, augmented and batched."""

from robust_peft.data.catalog import Splits, digits, parquet
from robust_peft.data.folders import EncodedImages, load_images
from robust_peft.data.loaders import ImageSet, evaluation_loader, train_loader
from robust_peft.data.transforms import CropFlip

__all__ = [
    "CropFlip",
    "EncodedImages",
    "ImageSet",
    "Splits",
    "digits",
    "evaluation_loader",
    "load_images",
    "parquet",
    "train_loader",
]
