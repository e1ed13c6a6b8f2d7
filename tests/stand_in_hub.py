"""A local replacement of the hub: answers the requests of `huggingface_hub` from a folder.

`FOLDER/datasets/OWNER/NAME/…` and `FOLDER/models/OWNER/NAME/…` are the repositories, with one commit each.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

API = re.compile(r"/api/(datasets|models)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?")
FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
DATE = "2026-01-01T00:00:00.000Z"


def commit_of(repository: Path) -> str:
    """40 hex digits that change with the files' contents."""
    digest = hashlib.sha1()
    for path in sorted(repository.rglob("*")):
        if path.is_file():
            digest.update(str(path.relative_to(repository)).encode() + path.read_bytes())
    return digest.hexdigest()


class Handler(BaseHTTPRequestHandler):
    folder: Path
    requested: list[str]
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        given = json.loads(body) if "json" in self.headers.get("Content-Type", "") else parse_qs(body)
        self.answer(given.get("paths", []))

    def answer(self, paths: list[str] | None = None) -> None:
        url = unquote(urlsplit(self.path).path)
        type(self).requested.append(f"{self.command} {url}")
        if result := API.fullmatch(url):
            kind, name, what, _, below = result.groups()
            repository = self.folder / kind / name
            if repository.is_dir():
                return self.send_api(repository, name, what, (below or "").strip("/"), paths)
        elif result := FILE.fullmatch(url):
            dataset, name, _, file = result.groups()
            repository = self.folder / ("datasets" if dataset else "models") / name
            if (repository / file).is_file():
                return self.send_file(repository, repository / file)
            if repository.is_dir():
                return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
        return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def send_api(self, repository: Path, name: str, what: str | None, below: str, paths: list[str] | None) -> None:
        everything = sorted(path for path in repository.rglob("*"))
        if what in (None, "revision"):
            files = [{"rfilename": str(path.relative_to(repository))} for path in everything if path.is_file()]
            metadata = {"id": name, "sha": commit_of(repository), "siblings": files, "tags": [], "private": False,
                     "gated": False, "disabled": False, "downloads": 0, "likes": 0, "lastModified": DATE}  # fmt: skip
            return self.send_json(metadata)
        if what == "paths-info":
            chosen = [repository / path for path in paths or [] if (repository / path).exists()]
        elif not (repository / below).is_dir():
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
        else:
            deep = "recursive=true" in self.path.lower()
            chosen = [path for path in everything if (repository / below) in (path.parents if deep else [path.parent])]
        return self.send_json([self.entry(repository, path) for path in chosen])

    def entry(self, repository: Path, path: Path) -> dict:
        name = str(path.relative_to(repository))
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
        return {"type": "file", "path": name, "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
                "size": path.stat().st_size}  # fmt: skip

    def send_file(self, repository: Path, path: Path) -> None:
        data = path.read_bytes()
        tag = hashlib.sha1(data).hexdigest()
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": commit_of(repository), "Accept-Ranges": "bytes"}
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(span[1]), min(int(span[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            return self.send(206, data[start : end + 1], headers)
        return self.send(200, data, headers)

    def send_json(self, value: object) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextlib.contextmanager
def stand_in_hub(folder: Path) -> Iterator[tuple[dict[str, str], list[str]]]:
    """Serve the repositories in a folder; yields the clients' environment variables and the received requests."""
    handler = type("Served", (Handler,), {"folder": folder, "requested": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        home = folder / "home"
        environment = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }
        yield environment, handler.requested
    finally:
        server.shutdown()
        server.server_close()
