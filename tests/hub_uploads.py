"""The Hub's side of uploads: login, repositories, branches and pull requests, large files, commits.

    GET   /api/whoami-v2                         who the token belongs to
    GET   /api/models/ID/refs, /discussions      branches; pull requests
    POST  /api/repos/create, /api/validate-yaml  409 where the name is taken; 400 for metadata that is none
    POST  /api/models/ID/preupload/REV           which files are large, and which are there already
    POST  /ID.git/info/lfs/objects/batch         where to put large files, whole or in parts; nowhere, if they are there
    PUT   /lfs/OID[/PART]                        on the storage's port
    POST  /api/models/ID/commit/REV              lines of JSON: a header, then files; ?create_pr=1 proposes it

Files are never held in memory: they go to `Hub.folder`, and a commit is a directory of hard links.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import socket
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from hub_server import Hub, Repo

_PIECE_BYTES = 1 << 16
_SIGNED = "signature=do-not-print-me"
_LICENCES = {"apache-2.0", "mit", "cc-by-4.0", "llama3", "gemma", "other"}
_WRITING = (
    (r"/api/repos/create", "create"),
    (r"/api/validate-yaml", "validate"),
    (r"/api/models/(.+?)/preupload/([^/]+)", "preupload"),
    (r"/api/models/(.+?)/branch/([^/]+)", "branch"),
    (r"/api/models/(.+?)/commit/([^/]+)", "commit"),
    (r"/(.+?)\.git/info/lfs/objects/batch", "batch"),
    (r"/lfs/complete/(.+?)/([0-9a-f]{64})", "complete"),
    (r"/api/lfs/verify", "verify"),
)
"""What is asked with POST -> the method that answers."""
_ASKING = (
    (r"/api/whoami-v2", "whoami"),
    (r"/api/models/(.+?)/refs", "refs"),
    (r"/api/models/(.+?)/discussions", "discussions"),
)


class Uploads(BaseHTTPRequestHandler):
    """Answers requests that write; what is common to all."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    READING: tuple[tuple[str, str], ...] = ()

    def log_message(self, *_: Any) -> None:
        """Keeps quiet; `Hub.requests` is the record."""

    def answer(self, routes: tuple[tuple[str, str], ...]) -> None:
        """Calls the method for the path, unless the Hub is told to fail."""
        path = urlsplit(self.path).path
        if self.hub.status is not None:
            return self.refuse(self.hub.status, "", "out of order")
        if self.hub.garbage is not None:
            return self.send(200, {"Content-Type": "application/json"}, self.hub.garbage)
        for fault in self.hub.faults:
            if fault.times and fault.method == self.command and re.search(fault.path, unquote(path)):
                fault.times -= 1
                # What is being sent is not read.
                self.close_connection = True
                return self.send(fault.status, {"Connection": "close", **fault.headers}, b"{}")
        if self.hub.token and self.authorized and self.headers["Authorization"] != f"Bearer {self.hub.token}":
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        for pattern, method in routes:
            if found := re.fullmatch(pattern, path):
                return getattr(self, method)(*(unquote(part or "") for part in found.groups()))  # type: ignore[no-any-return]
        return self.refuse(404, "", "no such page")

    def do_HEAD(self) -> None:
        self.answer(self.READING)

    def do_GET(self) -> None:
        self.answer((*_ASKING, *self.READING))

    def do_POST(self) -> None:
        self.answer(_WRITING)

    def do_PUT(self) -> None:
        self.answer(((r"/lfs/([0-9a-f]{64})(?:/(\d+))?", "put"),))

    @property
    def authorized(self) -> bool:
        return "Authorization" in self.headers

    def may_write(self, name: str) -> bool:
        """Whether the token may write there; sends an error otherwise."""
        if not self.authorized:
            self.refuse(401, "", "Invalid username or password.")
        elif name.partition("/")[0] not in (self.hub.user, *self.hub.orgs) or self.hub.role == "read":
            self.refuse(403, "", "You don't have the rights to create a model under this namespace")
        else:
            return True
        return False

    # Who, and what is there.

    def whoami(self) -> None:
        if not self.authorized:
            return self.refuse(401, "", "Invalid username or password.")
        orgs = [{"name": name, "type": "org"} for name in self.hub.orgs]
        auth = {"accessToken": {"displayName": "test", "role": self.hub.role}}
        self.json({"type": "user", "name": self.hub.user, "orgs": orgs, "auth": auth})

    def refs(self, name: str) -> None:
        if (found := self.find(name, "main")) is None:
            return
        named = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in found[0].revisions.items() if n != c]
        self.json({"branches": named, "converts": [], "tags": [], "pullRequests": []})

    def discussions(self, name: str) -> None:
        if (found := self.find(name, "main")) is not None:
            self.json({"discussions": found[0].pulls, "count": len(found[0].pulls), "start": 0})

    # Making places.

    def create(self) -> None:
        from hub_server import Repo

        asked = json.loads(self.received())
        name = f"{asked.get('organization') or self.hub.user}/{asked['name']}"
        if not self.may_write(name):
            return
        if name in self.hub.repos:
            return self.json({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409)
        repo = self.hub.repos[name] = Repo({}, private=asked.get("visibility") == "private")
        self.commit_to(repo, "main", {".gitattributes": b"*.safetensors filter=lfs\n"}, {}, [])
        self.json({"url": f"{self.hub.url}/{name}", "name": name})

    def branch(self, name: str, branch: str) -> None:
        self.received()
        if not self.may_write(name) or (found := self.find(name, "main")) is None:
            return
        if branch in found[0].revisions:
            return self.json({"error": "Reference already exists"}, 409)
        found[0].revisions[branch] = found[1]
        self.json({})

    def validate(self) -> None:
        import yaml

        text = json.loads(self.received())["content"]
        block = re.match(r"---\n(.*?)^---$", text, re.DOTALL | re.MULTILINE)
        found = yaml.safe_load(block[1]) if block else None
        if not isinstance(found, dict):
            return self.json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
        wrong = [n for n in [found.get("license", "other")] if n not in _LICENCES]
        wrong = [{"message": f'"license" must be one of [{", ".join(sorted(_LICENCES))}]'} for _ in wrong]
        self.json({"errors": wrong, "warnings": []}, 400 if wrong else 200)

    # Large files.

    def preupload(self, name: str, revision: str) -> None:
        asked = json.loads(self.received())["files"]
        if (found := self.find(name, revision)) is None:
            return
        there, answer = self.hub.files(name, found[1]), []
        for file in asked:
            large = file["path"].endswith(".safetensors") or file["size"] > 10 << 20
            oid = None
            if (path := there.get(file["path"])) is not None:
                oid = self.hub.digest(path) if large else git_hash(path.read_bytes())
            mode = "lfs" if large else "regular"
            answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.json({"files": answer})

    def batch(self, name: str) -> None:
        asked = json.loads(self.received())
        # Who proposes names no branch, and need not be allowed to write.
        if "ref" in asked and not self.may_write(name):
            return
        self.json({"transfer": "basic", "objects": [self.place_for(name, **each) for each in asked["objects"]]})

    def place_for(self, name: str, oid: str, size: int) -> dict[str, Any]:
        """Where to put an object; no action for one that is there."""
        if self.object(oid).exists():
            return {"oid": oid, "size": size}
        url, parts = f"{self.hub.storage_url}/lfs/{oid}", self.hub.part_bytes
        upload: dict[str, Any] = {"href": f"{url}?{_SIGNED}"}
        if parts is not None and size > parts:
            numbers = range(1, -(-size // parts) + 1)
            header = {"chunk_size": str(parts), **{str(number): f"{url}/{number}?{_SIGNED}" for number in numbers}}
            upload = {"href": f"{self.hub.url}/lfs/complete/{name}/{oid}", "header": header}
        return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": {"href": f"{self.hub.url}/api/lfs/verify"}}}

    def object(self, oid: str, part: str = "") -> Path:
        """Where an object, or a part of one, is kept."""
        return self.hub.folder / "objects" / (f"{oid}.{part}" if part else oid)

    def put(self, oid: str, part: str) -> None:
        place, length = self.object(oid, part), int(self.headers["Content-Length"])
        place.parent.mkdir(exist_ok=True)
        partial = place.with_name(f"{place.name}.tmp")
        digest, done = hashlib.sha256(), 0
        limit = min(length, self.hub.cut_after or 0) if (cut := self.cut_here("/lfs/")) else length
        with open(partial, "wb") as stream:
            while done < limit and (piece := self.rfile.read(min(_PIECE_BYTES, limit - done))):
                digest.update(piece)
                done += stream.write(piece)
        if cut or done < length:
            self.cut()
            return self.note(0, done)
        if not part and digest.hexdigest() != oid:
            return self.refuse(400, "", "other bytes than were promised")
        partial.rename(place)
        self.send(200, {"ETag": f'"{digest.hexdigest()}"'}, b"")

    def complete(self, name: str, oid: str) -> None:
        asked = json.loads(self.received())
        digest, whole = hashlib.sha256(), self.object(oid).with_suffix(".tmp")
        with open(whole, "wb") as stream:
            for number in range(1, len(asked["parts"]) + 1):
                with open(self.object(oid, str(number)), "rb") as part:
                    while piece := part.read(_PIECE_BYTES):
                        digest.update(piece)
                        stream.write(piece)
        assert digest.hexdigest() == oid == asked["oid"]
        whole.rename(self.object(oid))
        self.json({})

    def verify(self) -> None:
        asked = json.loads(self.received())
        there = self.object(asked["oid"])
        fine = there.exists() and there.stat().st_size == asked["size"]
        self.json({}, 200 if fine else 404)

    # Commits.

    def commit(self, name: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.received().splitlines()]
        if (found := self.find(name, revision)) is None:
            return
        repo, header = found[0], lines[0]["value"]
        proposed = "create_pr=1" in self.path
        if not proposed and not self.may_write(name):
            return
        done = {kind: [line["value"] for line in lines if line["key"] == kind] for kind in ("file", "lfsFile", "deletedFile")}
        small = {each["path"]: base64.b64decode(each["content"]) for each in done["file"]}
        large = {each["path"]: each["oid"] for each in done["lfsFile"]}
        gone = [each["path"] for each in done["deletedFile"]]
        if any(not self.object(oid).exists() for oid in large.values()):
            return self.refuse(400, "", "a large file was not uploaded")
        url = None
        if proposed:
            number = len(repo.pulls) + 1
            revision, base = f"refs/pr/{number}", found[1]
            repo.revisions[revision], url = base, f"{self.hub.url}/{name}/discussions/{number}"
            repo.pulls.append(
                {
                    "num": number, "title": header["summary"], "author": {"name": self.hub.user}, "status": "open",
                    "createdAt": "2026-01-01T00:00:00.000Z", "repo": {"name": name, "type": "model"}, "isPullRequest": True,
                }
            )  # fmt: skip
        commit = self.commit_to(repo, revision, small, large, gone)
        repo.history.append({**header, "revision": revision, "files": sorted([*small, *large]), "deleted": gone})
        answer = {"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{name}/commit/{commit}"}
        self.json({**answer, "pullRequestUrl": url})

    def commit_to(self, repo: Repo, revision: str, small: dict[str, bytes], large: dict[str, str], gone: list[str]) -> str:
        """A new commit on top of a revision; returns its id."""
        before = repo.revisions.get(revision)
        commit = hashlib.sha1(f"{id(repo)} {before} {len(repo.commits)}".encode()).hexdigest()
        root = self.hub.folder / "commits" / commit
        if before is not None:
            shutil.copytree(repo.commits[before], root, copy_function=os.link)
        for name in (*small, *large, *gone):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).unlink(missing_ok=True)
        for name, data in small.items():
            (root / name).write_bytes(data)
        for name, oid in large.items():
            os.link(self.object(oid), root / name)
        repo.commits[commit] = root
        repo.revisions[revision] = repo.revisions[commit] = commit
        return commit

    # What all answers need.

    def received(self) -> bytes:
        """The body of a request that fits in memory."""
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def cut_here(self, where: str) -> bool:
        """Whether this connection is to be cut; counts it."""
        cut = (
            self.hub.cuts > 0
            and self.hub.cut_after is not None
            and self.path.startswith(where)
            and self.hub.cut_path in self.path
        )
        self.hub.cuts -= cut
        return cut

    def cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def json(self, content: Any, status: int = 200) -> None:
        self.send(status, {"Content-Type": "application/json"}, json.dumps(content).encode())

    def refuse(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        self.close_connection = self.command != "GET" and self.command != "HEAD"
        self.send(status, {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})}, b"")

    def note(self, status: int, sent: int) -> None:
        """Records a request."""
        from hub_server import Request

        path, span = unquote(urlsplit(self.path).path), self.headers.get("Range", "")
        self.hub.requests.append(Request(self.command, path, span, self.authorized, status, sent))

    def find(self, name: str, revision: str) -> tuple[Repo, str] | None:
        raise NotImplementedError

    def send(self, status: int, headers: dict[str, str], data: bytes | Path, start: int = 0, stop: int | None = None) -> None:
        raise NotImplementedError


def git_hash(data: bytes) -> str:
    """The id that git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
