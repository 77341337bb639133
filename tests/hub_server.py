"""A small Hub on 127.0.0.1: what huggingface_hub really asks for, over local directories, with every request recorded.

    GET       /api/models/ID[/revision/REV]    commit, card, names of files
    GET       /api/models/ID/tree/REV          files with sizes
    HEAD GET  /ID/resolve/REV/FILE             a file; safetensors are redirected to a second server, as the Hub does

It takes uploads as well: hub_uploads.py. It can be told to fail: see the fields of `Hub` and of `Repo`.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from hub_uploads import Uploads

_PIECE_BYTES = 1 << 16
SIGNATURE = "signature=do-not-print-me"
"""Stands in every redirect's URL, like the signatures of the Hub's storage."""
_READING = (
    (r"/storage/(.+?)/([0-9a-f]{40})/([^/]+)", "stored"),
    (r"/api/models/(.+?)/tree/([^/]+)(?:/(.+))?", "tree"),
    (r"/api/models/(.+?)(?:/revision/([^/]+))?", "info"),
    (r"/(.+?)/resolve/([^/]+)/(.+)", "resolve"),
)
"""What is asked with GET -> the method that answers."""


@dataclass(frozen=True)
class Request:
    """What was asked, and how many bytes of the body went out, or came in."""

    method: str
    path: str
    range: str
    authorized: bool
    status: int
    sent: int


@dataclass
class Fault:
    """An answer in place of the right one, to the next requests that match."""

    method: str
    path: str
    """A regex that is found in the path."""
    status: int
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Repo:
    """One model: a directory per commit, and the names of its commits."""

    card: dict[str, Any]
    commits: dict[str, Path] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False
    listed: list[str] = field(default_factory=list)
    """Names that are listed besides those of the files."""
    pulls: list[dict[str, Any]] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    """The header of every commit that was uploaded, with what it did by path."""


@dataclass
class Hub:
    """The repositories, who is logged in, what goes wrong, and the record."""

    folder: Path
    """Where uploads are kept."""
    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    url: str = ""
    storage_url: str = ""
    ignores_range: bool = False
    cut_after: int | None = None
    """Bytes of a safetensors body, sent or received, after which the connection is cut..."""
    cuts: int = 0
    """...this many times..."""
    cut_path: str = ""
    """...in requests with this in their path."""
    status: int | None = None
    """Answers everything with this."""
    garbage: bytes | None = None
    """Answers everything with this, as if all were well."""
    faults: list[Fault] = field(default_factory=list)
    token: str = ""
    """The only token that is taken; empty for any."""
    user: str = "someone"
    orgs: tuple[str, ...] = ("org",)
    role: str = "write"
    part_bytes: int | None = None
    """Size of the parts in which large files are uploaded; None for whole ones."""
    _digests: dict[tuple[Path, int], str] = field(default_factory=dict)

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

    def writes(self, *paths: str) -> list[Request]:
        """The requests that may have changed something, or those of them with one of these words in their path."""
        found = [r for r in self.requests if r.method in ("POST", "PUT", "DELETE")]
        return [r for r in found if not paths or any(path in r.path for path in paths)]

    def files(self, name: str, revision: str = "main") -> dict[str, Path]:
        """The files of a revision, by name."""
        repo = self.repos[name]
        root = repo.commits[repo.revisions[revision]]
        return {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file()}

    def digest(self, path: Path) -> str:
        """sha256 of a file, which is read once."""
        key = (path, path.stat().st_mtime_ns)
        if key not in self._digests:
            with open(path, "rb") as stream:
                self._digests[key] = hashlib.file_digest(stream, "sha256").hexdigest()
        return self._digests[key]


@contextmanager
def serve() -> Iterator[Hub]:
    """A Hub, and its storage at an origin of its own, until the block ends."""
    with tempfile.TemporaryDirectory(prefix="hub-") as folder:
        hub = Hub(Path(folder))
        servers = [ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": hub})) for _ in range(2)]
        # Another name for the same machine: huggingface_hub 1.31 takes two ports of one host for one origin.
        hub.url, hub.storage_url = (f"http://{h}:{s.server_port}" for h, s in zip(("127.0.0.1", "localhost"), servers))
        threads = [threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True) for server in servers]
        for thread in threads:
            thread.start()
        try:
            yield hub
        finally:
            for server in servers:
                server.shutdown()
                server.server_close()


class _Handler(Uploads):
    """Answers requests that read."""

    READING = _READING

    def find(self, name: str, revision: str) -> tuple[Repo, str] | None:
        """The repository and commit; None where an error was sent."""
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self.authorized):
            self.refuse(404 if self.authorized else 401, "RepoNotFound", "Repository not found")
            return None
        if revision not in repo.revisions:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repo, repo.revisions[revision]

    def stored(self, name: str, commit: str, file: str) -> None:
        self.body(self.hub.repos[name].commits[commit] / file, {})

    def tree(self, name: str, revision: str, under: str) -> None:
        if (found := self.find(name, revision)) is None:
            return
        files = {file: path for file, path in self.hub.files(name, found[1]).items() if file.startswith(under)}
        if under and not files:
            return self.refuse(404, "EntryNotFound", "no such folder")
        entries: list[dict[str, Any]] = []
        for file, path in files.items():
            entry = {"type": "file", "path": file, "size": path.stat().st_size, "oid": hashlib.sha1(file.encode()).hexdigest()}
            entries.append(entry)
        entries += [{"type": "file", "path": file, "size": 1, "oid": "0" * 40} for file in found[0].listed]
        self.json(entries)

    def info(self, name: str, revision: str) -> None:
        if (found := self.find(name, revision or "main")) is None:
            return
        repo, commit = found
        self.json(
            {
                "id": name,
                "sha": commit,
                "private": repo.private,
                "cardData": repo.card,
                "siblings": [{"rfilename": file} for file in [*self.hub.files(name, commit), *repo.listed]],
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
        etag = self.hub.digest(path)
        if not file.endswith(".safetensors"):
            return self.body(path, {**headers, "ETag": f'"{etag}"'})
        headers |= {"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(path.stat().st_size)}
        headers["Location"] = f"{self.hub.storage_url}/storage/{name}/{commit}/{file}?{SIGNATURE}"
        return self.send(302, headers, b"")

    def body(self, path: Path, headers: dict[str, str]) -> None:
        size = path.stat().st_size
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span is None or self.hub.ignores_range:
            return self.send(200, headers, path, 0, size)
        start, stop = int(span[1]), min(int(span[2] or size - 1), size - 1)
        self.send(206, {**headers, "Content-Range": f"bytes {start}-{stop}/{size}"}, path, start, stop + 1)

    def send(self, status: int, headers: dict[str, str], data: bytes | Path, start: int = 0, stop: int | None = None) -> None:
        """Sends an answer, or bytes `start:stop` of a file, piece by piece, and records how much of it went out."""
        whole = len(data) if isinstance(data, bytes) else 0
        size = (whole if stop is None else stop) - start
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(size)}.items():
            self.send_header(name, value)
        self.end_headers()
        sent, limit = 0, 0 if self.command == "HEAD" else size
        cut = self.command == "GET" and self.cut_here("/storage/")
        if cut:
            limit = min(limit, self.hub.cut_after or 0)
        try:
            if isinstance(data, bytes):
                sent = self.wfile.write(data[:limit])
            else:
                with open(data, "rb") as stream:
                    stream.seek(start)
                    while sent < limit:
                        sent += self.wfile.write(stream.read(min(_PIECE_BYTES, limit - sent)))
            if cut:
                self.cut()
        except OSError:
            self.close_connection = True
        self.note(status, sent)
