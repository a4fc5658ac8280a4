"""Datasets of the Hugging Face Hub."""

from __future__ import annotations

import re

from robust_peft.data.sets import EncodedImages
from robust_peft.data.tables import import_datasets, read_table

VALIDATION_NAMES = ("validation", "valid", "val", "dev")


def read_hub(
    repository: str, image_column: str | None = None, label_column: str | None = None
) -> dict[str, EncodedImages]:
    """The parts "train", "validation" and "test" of a dataset on the Hub, as far as it has them.

    It is downloaded into the Hub's cache the first time, and read from there without network later.

    Args:
        repository: "OWNER/NAME".
        image_column: Column of the images; None: the usual names.
        label_column: Column of the labels; None: the usual names.

    Raises:
        OSError: If the Hub cannot be reached and nothing is cached, or does not have it.
        ValueError: If it needs a script of its own, has several configurations, no train part, or no such column.
        ImportError: Where the package datasets is missing.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"A dataset of the Hub should be named hub/OWNER/NAME. Found hub/{repository}.")
    datasets = import_datasets()
    from datasets.exceptions import DatasetNotFoundError

    copy = "Where there is no network, --data.root (root=...) takes a local copy of its parquet files or archive."
    try:
        found = datasets.load_dataset(repository)
    except DatasetNotFoundError as error:
        raise FileNotFoundError(
            f"The Hub has no dataset {repository}, or it needs a login (hf auth login). {copy}"
        ) from error
    except OSError as error:  # no network, a failing server, a full disk: each a kind of OSError
        reason = " ".join(str(error).split())[:200]
        raise OSError(f"The dataset {repository} cannot be had from the Hub ({reason}). {copy}") from error
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        if "script" in reason.lower():
            reason = "it needs a script of its own, and such datasets are no longer loaded"
        raise ValueError(f"The dataset {repository} cannot be read ({reason}).") from error
    names = {name: name for name in ("train", "test") if name in found}
    validation = next((name for name in VALIDATION_NAMES if name in found), None)
    if validation is not None:
        names["validation"] = validation
    if "train" not in names:
        raise ValueError(f"The dataset {repository} has no part train. Found {', '.join(map(str, found))}.")
    title = repository.rpartition("/")[2]
    return {
        part: read_table(found[name], f"{repository} {name}", f"{title} {part}", image_column, label_column)
        for part, name in names.items()
    }
