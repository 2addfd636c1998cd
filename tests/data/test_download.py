"""Downloads: whole or not there."""

from __future__ import annotations

import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from rankwise.data.sources.download import fetch_npm, fetch_url
from rankwise.errors import DataError

CONTENT = bytes(range(256)) * 10_000


class Server(http.server.BaseHTTPRequestHandler):
    """On this machine only: /whole is all of CONTENT, /broken stops halfway, all else is not there."""

    def do_GET(self) -> None:
        if self.path not in ("/whole", "/broken"):
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT if self.path == "/whole" else CONTENT[: len(CONTENT) // 2])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def silent(what: str, done: int, total: int) -> None:
    pass


def test_a_download_arrives_whole_and_reports(site: str, tmp_path: Path) -> None:
    """The file has every byte, and the last report says so."""
    told: list[tuple[str, int, int]] = []
    fetch_url(f"{site}/whole", tmp_path / "new/file", lambda *event: told.append(event))
    assert (tmp_path / "new/file").read_bytes() == CONTENT
    assert told[-1] == ("downloading file", len(CONTENT), len(CONTENT))


@pytest.mark.parametrize("page", ["broken", "missing"])
def test_a_failed_download_leaves_nothing(page: str, site: str, tmp_path: Path) -> None:
    """A connection that breaks off or a page that is not there is one error and no file."""
    with pytest.raises(DataError, match=page):
        fetch_url(f"{site}/{page}", tmp_path / "file", silent)
    assert list(tmp_path.iterdir()) == []


def test_a_site_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    """A refused connection is one error."""
    with pytest.raises(DataError, match="cannot be had"):
        fetch_url("http://127.0.0.1:9/file", tmp_path / "file", silent)


def pretend_npm(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_npm_brings_the_tarball(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever npm calls the tarball, it ends where it is wanted."""
    pretend_npm(tmp_path / "bin", 'echo "$2" > what-1.tgz', monkeypatch)
    fetch_npm("what@1", tmp_path / "cache/file.tgz", silent)
    assert (tmp_path / "cache/file.tgz").read_text() == "what@1\n"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["file.tgz"]


@pytest.mark.parametrize(
    ("script", "said"),
    [("echo no such; echo package >&2; exit 3", "exit code 3: package"), ("true", "left 0 files")],
)
def test_a_failing_npm_is_one_error(
    script: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What npm said is in the error, and nothing is left behind."""
    pretend_npm(tmp_path / "bin", script, monkeypatch)
    with pytest.raises(DataError, match=said):
        fetch_npm("what@1", tmp_path / "cache/file.tgz", silent)
    assert list((tmp_path / "cache").iterdir()) == []


def test_without_npm_the_error_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without npm gets a plain word."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"npm, .* is not installed"):
        fetch_npm("what@1", tmp_path / "file.tgz", silent)
