"""One picture from its file: 8-bit RGB, whatever it was saved as."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from PIL import Image


class BrokenPicture(ValueError):
    """A picture that cannot be decoded; the message names it, in one line also when a worker process met it."""

    def __init__(self, message: str) -> None:
        # A DataLoader raises what a worker raised anew, with the worker's traceback as the message; what was said in
        # the first place is its last line.
        last = message.strip().splitlines()[-1]
        super().__init__(last.rpartition(f"{type(self).__name__}: ")[2])


def decode(file: str | Path | BinaryIO) -> Image.Image:
    """The picture in a file as 8-bit RGB, whatever its mode (grey, palette, CMYK; transparency is dropped).

    The orientation that a camera notes in EXIF is not applied, as torchvision's ImageFolder does not. 16-bit grey is
    scaled to 8 bits, where Pillow would turn nearly everything white.

    Raises:
        ValueError: For grey values of 32 bits, whose range is not known.
        OSError: For a broken picture, as Pillow says it (other kinds for some formats).
    """
    import numpy
    from PIL import Image

    with Image.open(file) as picture:
        if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PNG"):
            return Image.fromarray((numpy.asarray(picture) / 257).round().astype(numpy.uint8)).convert("RGB")
        if picture.mode in ("I", "F"):
            raise ValueError(f"mode {picture.mode} has 32 bits for a grey value; save it with 8 or 16")
        if picture.mode in ("P", "PA", "LA"):
            return picture.convert("RGBA").convert("RGB")  # Pillow warns of palettes with transparency otherwise
        return picture.convert("RGB")
