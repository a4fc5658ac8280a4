"""Tables of encoded images and labels: parquet files and the Hub's datasets, read with the package datasets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from robust_peft.data.sets import EncodedImages, TableRow

IMAGE_COLUMNS = ("img", "image")  # the usual names, in the order in which they are tried
LABEL_COLUMNS = ("label", "fine_label", "labels")  # fine_label: CIFAR-100


def import_datasets() -> Any:
    """The package datasets, or an ImportError that says how to get it."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "Parquet files and the Hub are read with the package datasets: pip install datasets."
        ) from error
    return datasets


def read_parquet(path: Path, image_column: str | None = None, label_column: str | None = None) -> EncodedImages:
    """The images and labels of a parquet file, the images still encoded and on disk.

    Args:
        path: The file.
        image_column: Column of the encoded images; None: "img" or "image".
        label_column: Column of the labels, integers; None: "label", "fine_label" or "labels".

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is no parquet file, has no rows, or a column or a label is missing.
        ImportError: Where the package datasets is missing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    datasets = import_datasets()
    try:
        table = datasets.Dataset.from_parquet(str(path))
    except Exception as error:  # datasets raises its own kinds for no rows and for what is no parquet file
        reason = "it is empty" if "no data" in str(error) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} cannot be read as parquet ({_one_line(reason)}).") from error
    return read_table(table, str(path), path.stem, image_column, label_column)


def read_table(
    table: Any, source: str, name: str, image_column: str | None = None, label_column: str | None = None
) -> EncodedImages:
    """The images and labels of a `datasets.Dataset`, which errors call ``source``. Columns as in `read_parquet`."""
    from datasets import ClassLabel, Image

    image_columns = IMAGE_COLUMNS if image_column is None else (image_column,)
    label_columns = LABEL_COLUMNS if label_column is None else (label_column,)
    found = [_first(names, table.column_names) for names in (image_columns, label_columns)]
    missing = [" or ".join(n) for n, f in zip((image_columns, label_columns), found, strict=True) if f is None]
    if missing:
        raise ValueError(f"{source} has no column {', '.join(missing)}. Found {', '.join(table.column_names)}.")
    images, label = found
    values = table[label][:]
    if None in values:
        raise ValueError(f"{source}, row {values.index(None)}: the label is missing.")
    if not all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        raise ValueError(f"{source}: labels should be integers. Found {table.features[label]}.")
    labels = torch.tensor(values, dtype=torch.int64)
    feature = table.features[label]
    count = int(labels.max()) + 1 if len(labels) else 0
    classes = tuple(feature.names) if isinstance(feature, ClassLabel) else tuple(str(i) for i in range(count))
    try:
        column = table.cast_column(images, Image(decode=False))[images]
    except Exception as error:  # an Arrow error of one kind or another
        reason = _one_line(str(error))
        raise ValueError(f"{source}: the column {images} holds no encoded images ({reason}).") from error
    try:
        return EncodedImages([TableRow(source, column, row) for row in range(len(labels))], labels, classes, name)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def find_parquet(root: Path, part: str) -> list[Path]:
    """The files of one part (train, test) in a local copy of a dataset of the Hub, in their order.

    They are called ``train.parquet`` or ``train-00000-of-00002.parquet`` and lie in ``root`` or up to two folders below
    it; those of one folder belong together.

    Raises:
        ValueError: If several folders hold some, or some are missing.
    """
    pattern = re.compile(rf"{part}(-(\d+)-of-(\d+))?\.parquet")
    found = sorted(
        p for depth in ("", "*/", "*/*/") for p in root.glob(f"{depth}*.parquet") if pattern.fullmatch(p.name)
    )
    folders = {path.parent for path in found}
    if len(folders) > 1:
        several = ", ".join(sorted(str(folder) for folder in folders))
        raise ValueError(f"{root}: {part} files lie in several folders ({several}); name one of them.")
    numbered = [match for path in found if (match := pattern.fullmatch(path.name)) and match[1]]
    if numbered and (len(numbered) < len(found) or {int(m[2]) for m in numbered} != set(range(int(numbered[0][3])))):
        names = ", ".join(path.name for path in found[:3])
        raise ValueError(f"{found[0].parent} should hold {numbered[0][3]} {part} files. Found {len(found)}: {names}.")
    return found


def read_parquet_parts(
    paths: Sequence[Path], name: str, image_column: str | None = None, label_column: str | None = None
) -> EncodedImages:
    """Several parquet files as one set."""
    parts = [read_parquet(path, image_column, label_column) for path in paths]
    classes = max((part.classes for part in parts), key=len)  # plain labels: as many as the largest says
    files = [file for part in parts for file in part.files]
    return EncodedImages(files, torch.cat([part.labels for part in parts]), classes, name)


def _first(names: Sequence[str], present: Sequence[str]) -> str | None:
    return next((name for name in names if name in present), None)


def _one_line(text: str) -> str:
    return " ".join(text.split())
