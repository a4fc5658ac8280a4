"""Archives, unpacked once into the Hub's cache: reading a compressed one at random places would take for ever."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tarfile
import tempfile
from pathlib import Path

from filelock import FileLock

logger = logging.getLogger("robust_peft")


def unpacked_folder(archive: Path) -> Path:
    """Where an archive is unpacked: ``$HF_HOME/robust_peft/archives/NAME-KEY``; KEY: its path, size and time."""
    from huggingface_hub import constants

    found = archive.stat()
    key = hashlib.sha256(f"{archive.resolve()} {found.st_size} {found.st_mtime_ns}".encode()).hexdigest()[:16]
    return Path(constants.HF_HOME) / "robust_peft" / "archives" / f"{archive.name.split('.')[0]}-{key}"


def unpack(archive: Path) -> Path:
    """The folder with a tar archive's content (plain, .gz, .bz2 or .xz). It is unpacked the first time.

    Of several processes one unpacks and the others wait. The folder is there whole or not at all.

    Raises:
        ValueError: If the file is no tar archive, is damaged or incomplete, or has a member that would be written
            outside the folder; nothing is left of it then.
    """
    folder = unpacked_folder(archive)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if folder.is_dir():
            return folder
        logger.info("Unpacking %s into %s, once.", archive, folder)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(temporary, filter="data")
            os.replace(temporary, folder)
        except tarfile.FilterError as error:
            raise ValueError(f"{archive} is refused: {error}.") from error
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk, not the archive
            # The decompressors raise EOFError, zlib.error, lzma.LZMAError, ...
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{archive} cannot be unpacked ({type(error).__name__}: {reason}); is it a tar archive, and complete?"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder
