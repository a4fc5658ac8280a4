"""Files from the web into the cache beside the Hub's: whole or absent, resumed where a download was cut off.

By the standard library, because what the Hub's client offers for addresses that are not the Hub's own is no documented
interface and changes with its versions, and torch.hub does not resume.
"""

from __future__ import annotations

import http.client
import os
import re
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from filelock import FileLock
from huggingface_hub import constants
from tqdm import tqdm

from robust_peft.files import sha256 as sha256_of
from robust_peft.models.checkpoints import refuse_foreign

CHUNK = 1 << 20  # bytes
RETRIED = {408, 425, 429, 500, 502, 503, 504}  # statuses that may be others a moment later
TIMEOUT = 30.0  # seconds without a byte


def cache_folder(part: str) -> Path:
    """Where downloaded files of one part of the zoo lie: ``$HF_HOME/assets/robust_peft/PART``.

    As the Hub's client puts what is not its own: in HF_ASSETS_CACHE where that is set, else beside HF_HUB_CACHE.
    """
    given = os.environ.get("HF_ASSETS_CACHE")
    assets = Path(given).expanduser() if given else Path(constants.HF_HUB_CACHE).parent / "assets"
    return assets / "robust_peft" / part


def download(
    url: str, target: str | Path, *, sha256: str | None = None, attempts: int = 4, first_wait: float = 1.0
) -> Path:
    """Fetch a file unless it is there already.

    Until it is whole, the file is called ``NAME.incomplete``; the next call goes on where it ends, if the server can
    and still has the same file. Several processes that want one file wait for the first of them.

    Args:
        url: Address of the file, http or https.
        target: Where it is to lie; missing parent folders are made.
        sha256: What it has to hash to, in hexadecimal; None: not checked.
        attempts: Tries in a row that bring nothing, until it is given up.
        first_wait: Seconds before the second try, doubled each time.

    Returns:
        ``target``.

    Raises:
        OSError: If it cannot be had (no network, an error of the server, no space, offline mode), or what came is a web
            page or hashes to something else. One line that says why.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.is_file():
            if constants.HF_HUB_OFFLINE:
                raise OSError("HF_HUB_OFFLINE is set, so that nothing is downloaded")
            partial = target.with_name(f"{target.name}.incomplete")
            _fetch_patiently(url, partial, attempts, first_wait)
            try:
                refuse_foreign(partial)
                check_hash(partial, sha256)
            except ValueError as error:
                _forget(partial)
                raise OSError(str(error).replace(str(partial), url).rstrip(".")) from error
            os.replace(partial, target)
            _forget(partial)
    return target


def check_hash(path: str | Path, expected: str | None) -> None:
    """ValueError where a file's SHA-256 is another one; None: nothing is expected."""
    if expected is not None and (found := sha256_of(path)) != expected.lower():
        raise ValueError(f"{path} should have the SHA-256 {expected}. Found {found}: another or a damaged file.")


class _CutOff(Exception):
    """The connection ended before the file did."""


def _fetch_patiently(url: str, partial: Path, attempts: int, wait: float) -> None:
    left, pause = attempts, wait
    while True:
        before = _size(partial)
        try:
            return _fetch(url, partial)
        except urllib.error.HTTPError as error:
            error.close()
            reason = f"{url} answered {error.code} {error.reason}"
            if error.code not in RETRIED:
                raise OSError(reason) from error
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, _CutOff) as error:
            cause = getattr(error, "reason", None) or error
            reason = f"{urlsplit(url).hostname} cannot be reached or broke off ({cause or type(error).__name__})"
            if isinstance(cause, socket.gaierror):
                raise OSError(reason) from error  # no network at all, as a rule: trying again would keep people waiting
        if _size(partial) > before:
            left, pause = attempts, wait  # it moves
        left -= 1
        if left <= 0:
            raise OSError(f"{reason}, {attempts} times" if attempts > 1 else reason)
        time.sleep(pause)
        pause *= 2


def _fetch(url: str, partial: Path) -> None:
    """One request: the rest of a file that has begun, or all of it."""
    size, tag = _size(partial), _tag_file(partial)
    headers = {"User-Agent": "robust-peft", "Accept-Encoding": "identity"}
    if size and tag.is_file():
        # If the file on the server has changed since, it answers with all of the new one.
        headers |= {"Range": f"bytes={size}-", "If-Range": tag.read_text()}
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        error.close()
        _forget(partial)  # longer than the file is
        raise _CutOff("the server has no more of it") from error
    with response:
        resumed = response.status == 206
        if resumed and _first_byte(response.headers.get("Content-Range")) != size:
            _forget(partial)
            raise _CutOff("the server sent another part than was asked for")
        if not resumed:
            size = 0
            _forget(partial)
            validator = response.headers.get("ETag") or response.headers.get("Last-Modified")
            if validator and not validator.startswith("W/"):
                tag.write_text(validator)
        length = response.headers.get("Content-Length")
        total = None if length is None else size + int(length)
        bar = tqdm(
            total=total,
            initial=size,
            desc=partial.name.removesuffix(".incomplete"),
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            disable=True if constants.HF_HUB_DISABLE_PROGRESS_BARS else None,  # None: shown on a terminal
        )
        with bar, partial.open("ab") as file:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    if total is not None and _size(partial) != total:
        raise _CutOff(f"{_size(partial)} of {total} bytes")


def _first_byte(content_range: str | None) -> int | None:
    found = re.match(r"bytes (\d+)-", content_range or "")
    return int(found.group(1)) if found else None


def _tag_file(partial: Path) -> Path:
    """Beside the partial file: what the server calls the version that it is a part of."""
    return partial.with_name(f"{partial.name}.version")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _forget(partial: Path) -> None:
    partial.unlink(missing_ok=True)
    _tag_file(partial).unlink(missing_ok=True)
