"""Downloads from a server on this machine that behaves as badly as real ones."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from robust_peft.models import downloads
from robust_peft.models.downloads import cache_folder, check_hash, download

CONTENT = bytes(range(256)) * 4096  # 1 MiB, so that a half is more than one buffer
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `content`, and what `script` says first: one entry for each request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.ranges, self.etag, self.kind = CONTENT, True, '"one"', "application/octet-stream"
        self.script: list[Any] = []
        self.requests: list[dict[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/weights.pth"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        server.requests.append(dict(self.headers))
        act = server.script.pop(0) if server.script else "all"
        if isinstance(act, int):
            self.send_error(act)
            return
        asked = self.headers.get("Range")
        start = 0
        if asked and server.ranges and self.headers.get("If-Range") == server.etag:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
        if start >= len(server.content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        shown = start + 1 if act == "another part" else start
        if start:
            self.send_header("Content-Range", f"bytes {shown}-{len(server.content) - 1}/{len(server.content)}")
        if server.etag:
            self.send_header("ETag", server.etag)
        self.send_header("Content-Type", server.kind)
        self.send_header("Content-Length", str(len(server.content) - start))
        self.end_headers()
        body = server.content[start:]
        self.wfile.write(body[: len(body) // 2] if act == "half" else body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs=dict(poll_interval=0.01))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def fetch(server: Server, target: Path, **options: Any) -> Path:
    return download(server.url, target, first_wait=0.001, **options)


def refusal(server: Server, target: Path, **options: Any) -> str:
    with pytest.raises(OSError) as error:
        fetch(server, target, **options)
    assert not target.exists() and "\n" not in str(error.value)
    return str(error.value)


def leftovers(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir() if path != target and path.suffix != ".lock")


def test_whole_file_once(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "weights.pth"
    assert fetch(server, target, sha256=SHA256.upper()) == target
    assert target.read_bytes() == CONTENT and leftovers(target) == []
    assert fetch(server, target) == target and len(server.requests) == 1  # it is there
    assert "Range" not in server.requests[0]


def test_broken_off_and_resumed(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "weights.pth"
    server.script = ["half", "half", "all"]
    assert fetch(server, target, sha256=SHA256).read_bytes() == CONTENT
    half = len(CONTENT) // 2
    assert [request.get("Range") for request in server.requests] == [
        None,
        f"bytes={half}-",
        f"bytes={half + half // 2}-",
    ]
    assert leftovers(target) == []


def test_resumed_by_the_next_call(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "weights.pth"
    server.script = ["half"]
    assert refusal(server, target, attempts=1).endswith("broke off (524288 of 1048576 bytes)")
    assert leftovers(target) == ["weights.pth.incomplete", "weights.pth.incomplete.version"]
    assert fetch(server, target).read_bytes() == CONTENT
    assert server.requests[-1]["Range"] == "bytes=524288-" and server.requests[-1]["If-Range"] == '"one"'


def test_file_that_changed_meanwhile_is_fetched_anew(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "weights.pth"
    server.script = ["half"]
    refusal(server, target, attempts=1)
    server.content, server.etag = CONTENT[::-1], '"two"'
    assert fetch(server, target).read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize("etag", ['"one"', "", 'W/"weak"'])
def test_server_that_cannot_resume(server: Server, tmp_path: Path, etag: str) -> None:
    target = tmp_path / "weights.pth"
    server.ranges, server.etag, server.script = False, etag, ["half", "all"]
    assert fetch(server, target).read_bytes() == CONTENT
    assert len(server.requests) == 2


@pytest.mark.parametrize("surplus", [0, 5])
def test_partial_file_as_long_as_the_whole_or_longer(server: Server, tmp_path: Path, surplus: int) -> None:
    target = tmp_path / "weights.pth"
    partial = tmp_path / "weights.pth.incomplete"
    partial.write_bytes(bytes(len(CONTENT) + surplus))
    (tmp_path / "weights.pth.incomplete.version").write_text('"one"')
    assert fetch(server, target).read_bytes() == CONTENT


def test_another_part_than_was_asked_for(server: Server, tmp_path: Path) -> None:
    server.script = ["half", "another part", "all"]
    assert fetch(server, tmp_path / "weights.pth").read_bytes() == CONTENT
    assert "Range" not in server.requests[-1]


@pytest.mark.parametrize("status", [503, 500, 429])
def test_server_that_is_busy_at_first(server: Server, tmp_path: Path, status: int) -> None:
    server.script = [status, status, "all"]
    assert fetch(server, tmp_path / "weights.pth").read_bytes() == CONTENT


def test_server_that_stays_busy(server: Server, tmp_path: Path) -> None:
    server.script = [503] * 9
    assert "answered 503 Service Unavailable, 4 times" in refusal(server, tmp_path / "weights.pth")
    assert len(server.requests) == 4


@pytest.mark.parametrize(("status", "words"), [(404, "404 Not Found"), (403, "403 Forbidden")])
def test_file_that_is_not_there(server: Server, tmp_path: Path, status: int, words: str) -> None:
    server.script = [status]
    assert refusal(server, tmp_path / "weights.pth") == f"{server.url} answered {words}"
    assert len(server.requests) == 1  # trying again would not help


def test_web_page_instead(server: Server, tmp_path: Path) -> None:
    server.content, server.kind = b"<!DOCTYPE html><title>Sign in</title>", "text/html"
    target = tmp_path / "weights.pth"
    assert f'{server.url} is an HTML page titled "Sign in"' in refusal(server, target)
    assert leftovers(target) == []


def test_pointer_instead(server: Server, tmp_path: Path) -> None:
    server.content = b"version https://git-lfs.github.com/spec/v1"
    assert "pointer of Git LFS" in refusal(server, tmp_path / "weights.pth")


def test_another_hash(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "weights.pth"
    message = refusal(server, target, sha256="0" * 64)
    assert f"{server.url} should have the SHA-256 {'0' * 64}. Found {SHA256}" in message
    assert leftovers(target) == []  # the next call starts anew


def test_nobody_answers(server: Server, tmp_path: Path) -> None:
    with Server() as closed:
        url = closed.url
    with pytest.raises(OSError, match="127.0.0.1 cannot be reached or broke off .*refused.*, 2 times"):
        download(url, tmp_path / "weights.pth", attempts=2, first_wait=0.001)


def test_no_network_is_told_at_once(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown_host(*_: Any, **__: Any) -> None:
        raise downloads.urllib.error.URLError(downloads.socket.gaierror(-2, "Name or service not known"))

    monkeypatch.setattr(downloads.urllib.request, "urlopen", unknown_host)
    with pytest.raises(OSError, match="example.org cannot be reached or broke off .*Name or service not known"):
        download("https://example.org/weights.pth", tmp_path / "weights.pth", first_wait=60)


def test_offline_mode_asks_nobody(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal(server, tmp_path / "weights.pth")
    assert server.requests == []
    (tmp_path / "weights.pth").write_bytes(b"here")
    assert fetch(server, tmp_path / "weights.pth").read_bytes() == b"here"


def test_several_processes_download_once(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "weights.pth"
    threads = [threading.Thread(target=fetch, args=(server, target)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert target.read_bytes() == CONTENT and len(server.requests) == 1


def test_processes_wait_for_one_another(server: Server, tmp_path: Path) -> None:
    """Two processes: while the other one holds the file's lock, nothing is fetched."""
    target = tmp_path / "weights.pth"
    code = (
        "import sys; from pathlib import Path; from filelock import FileLock\n"
        "with FileLock(sys.argv[1] + '.lock'):\n"
        "    print('held', flush=True); sys.stdin.readline()\n"
        "    Path(sys.argv[1]).write_bytes(b'of the other process')\n"
    )
    command = [sys.executable, "-c", code, str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        waiting = threading.Thread(target=fetch, args=(server, target))
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive() and not target.exists()
        other.communicate("go\n")
        waiting.join()
    assert target.read_bytes() == b"of the other process" and server.requests == []


def test_cache_is_beside_the_hubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_ASSETS_CACHE", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    assert cache_folder("ares") == tmp_path / "home" / "assets" / "robust_peft" / "ares"
    monkeypatch.setenv("HF_ASSETS_CACHE", str(tmp_path / "other"))
    assert cache_folder("ares") == tmp_path / "other" / "robust_peft" / "ares"
    assert not (tmp_path / "other").exists()


def test_hash_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    check_hash(path, None)
    check_hash(path, SHA256)
    with pytest.raises(ValueError, match=f"file should have the SHA-256 {'a' * 64}. Found {SHA256}"):
        check_hash(path, "a" * 64)
