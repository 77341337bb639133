"""A small Hub on 127.0.0.1: what huggingface_hub really asks for, over local directories, with every request recorded.

    GET       /api/models/ID[/revision/REV]    commit, card, names of files
    GET       /api/models/ID/tree/REV          files with sizes
    HEAD GET  /ID/resolve/REV/FILE             a file; safetensors are redirected to a second server, as the Hub does

It can be told to fail: see the fields of `Hub` and of `Repo`.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

_PIECE_BYTES = 1 << 16
SIGNATURE = "signature=do-not-print-me"
"""Stands in every redirect's URL, like the signatures of the Hub's storage."""


@dataclass(frozen=True)
class Request:
    """What was asked, and how many bytes of the body went out."""

    method: str
    path: str
    range: str
    authorized: bool
    status: int
    sent: int


@dataclass
class Repo:
    """One model: a directory per commit, and the names of its commits."""

    card: dict[str, Any]
    commits: dict[str, Path] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)
    gated: bool = False


@dataclass
class Hub:
    """The repositories, what goes wrong, and the record."""

    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    url: str = ""
    storage_url: str = ""
    ignores_range: bool = False
    cut_after: int | None = None
    """Bytes of a safetensors body after which the connection is cut..."""
    cuts: int = 0
    """...this many times."""
    status: int | None = None
    """Answers everything with this."""
    garbage: bytes | None = None
    """Answers everything with this, as if all were well."""

    def add(self, name: str, directory: Path, card: dict[str, Any] | None = None, revision: str = "main") -> str:
        """Publishes a directory as a revision of `name`; returns its commit."""
        commit = hashlib.sha1(f"{name}@{revision}:{directory}".encode()).hexdigest()
        repo = self.repos.setdefault(name, Repo(card or {}))
        repo.commits[commit] = directory
        repo.revisions[revision] = repo.revisions[commit] = commit
        return commit

    def bodies(self, suffix: str = "") -> list[Request]:
        """The requests that fetched bytes of files whose name ends so."""
        return [
            r for r in self.requests if r.method == "GET" and "/api/" not in r.path and r.status < 300 and r.path.endswith(suffix)
        ]


@contextmanager
def serve() -> Iterator[Hub]:
    """A Hub, and its storage on a port (so: an origin) of its own, until the block ends."""
    hub = Hub()
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": hub})) for _ in range(2)]
    hub.url, hub.storage_url = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    threads = [threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Keeps quiet; `Hub.requests` is the record."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if self.hub.status is not None:
            return self.refuse(self.hub.status, "", "out of order")
        if self.hub.garbage is not None:
            return self.send(200, {"Content-Type": "application/json"}, self.hub.garbage)
        if found := re.fullmatch(r"/storage/(.+?)/([0-9a-f]{40})/([^/]+)", path):
            return self.body(self.hub.repos[found[1]].commits[found[2]] / found[3], {})
        if found := re.fullmatch(r"/api/models/(.+?)(?:/(revision|tree)/(.+))?", path):
            return self.api(found[1], found[2] or "revision", found[3] or "main")
        if found := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path):
            return self.resolve(found[1], found[2], found[3])
        return self.refuse(404, "", "no such page")

    @property
    def authorized(self) -> bool:
        return "Authorization" in self.headers

    def find(self, name: str, revision: str) -> tuple[Repo, str] | None:
        """The repository and commit; None where an error was sent."""
        repo = self.hub.repos.get(name)
        if repo is None:
            self.refuse(404 if self.authorized else 401, "RepoNotFound", "Repository not found")
            return None
        if revision not in repo.revisions:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repo, repo.revisions[revision]

    def api(self, name: str, kind: str, revision: str) -> None:
        if (found := self.find(name, revision)) is None:
            return
        repo, commit = found
        root = repo.commits[commit]
        files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
        if kind == "tree":
            sizes = {file: (root / file).stat().st_size for file in files}
            self.json(
                [{"type": "file", "path": f, "size": n, "oid": hashlib.sha1(f.encode()).hexdigest()} for f, n in sizes.items()]
            )
        else:
            siblings = [{"rfilename": file} for file in files]
            self.json(
                {
                    "id": name,
                    "sha": commit,
                    "cardData": repo.card,
                    "siblings": siblings,
                    "gated": "manual" if repo.gated else False,
                }
            )

    def resolve(self, name: str, revision: str, file: str) -> None:
        if (found := self.find(name, revision)) is None:
            return
        repo, commit = found
        if repo.gated:
            return self.refuse(403 if self.authorized else 401, "GatedRepo", f"Access to model {name} is restricted.")
        path = repo.commits[commit] / file
        headers = {"X-Repo-Commit": commit}
        if not path.is_file():
            return self.refuse(404, "EntryNotFound", "Entry not found", headers)
        etag = hashlib.sha256(path.read_bytes()).hexdigest()
        if not file.endswith(".safetensors"):
            return self.body(path, {**headers, "ETag": f'"{etag}"'})
        headers |= {"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(path.stat().st_size)}
        headers["Location"] = f"{self.hub.storage_url}/storage/{name}/{commit}/{file}?{SIGNATURE}"
        return self.send(302, headers, b"")

    def body(self, path: Path, headers: dict[str, str]) -> None:
        data = path.read_bytes()
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span is None or self.hub.ignores_range:
            return self.send(200, headers, data)
        start, stop = int(span[1]), min(int(span[2] or len(data) - 1), len(data) - 1)
        return self.send(206, {**headers, "Content-Range": f"bytes {start}-{stop}/{len(data)}"}, data[start : stop + 1])

    def json(self, content: Any) -> None:
        self.send(200, {"Content-Type": "application/json"}, json.dumps(content).encode())

    def refuse(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        self.send(status, {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})}, b"")

    def send(self, status: int, headers: dict[str, str], data: bytes) -> None:
        """Sends an answer, piece by piece, and records how much of it went out."""
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        sent, limit = 0, 0 if self.command == "HEAD" else len(data)
        cut = self.hub.cuts > 0 and self.hub.cut_after is not None and self.path.startswith("/storage/")
        if cut:
            self.hub.cuts -= 1
            limit = min(limit, self.hub.cut_after or 0)
        try:
            while sent < limit:
                sent += self.wfile.write(data[sent : min(sent + _PIECE_BYTES, limit)])
            if cut:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            self.close_connection = True
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(Request(self.command, path, self.headers.get("Range", ""), self.authorized, status, sent))
