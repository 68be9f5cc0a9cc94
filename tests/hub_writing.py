"""The loopback Hub, written to: repositories are made, files uploaded, commits taken or refused."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from hub import Handler, Hub, entry, running

LARGE = (".safetensors", ".bin")
# What the tests log in with; it has the shape of a token.
TOKEN = "hf_" + "Canary0Token" * 3


@dataclass
class Trouble:
    """An answer instead of the next ones for a repository; `after`: once it was carried out.

    Status 0 is a line that breaks. 412 is told because somebody else committed just before.
    """

    route: str  # read, create or commit
    status: int
    times: int = 1
    after: bool = False
    headers: dict[str, str] = field(default_factory=dict)


class WritableHub(Hub):
    """Keeps each commit in a folder below `root`. `received`: every body that was sent to it."""

    def __init__(self, root: Path) -> None:
        super().__init__({}, {})
        self.RequestHandlerClass = _Writing  # type: ignore[assignment]
        self.root, self.heads = root, dict[str, str]()
        self.lfs: dict[str, bytes] = {}
        self.received: list[bytes] = []
        self.troubles: dict[str, Trouble] = {}
        self.lies: dict[str, list[dict[str, Any]]] = {}  # what is listed instead, or besides
        self.tokens: list[tuple[str, str]] = []  # (host that was asked, Authorization)
        self.commits: list[str] = []  # whose, in their order

    def commit_of(self, repo: str, name: str) -> str:
        return self.heads.get(repo, "") if name == "main" else name

    def make(self, repo: str, private: bool, files: Mapping[str, bytes] | None = None) -> None:
        self.repos[repo] = {}
        if private:
            self.private.add(repo)
        self.commit(repo, dict(files or {".gitattributes": b"*.safetensors filter=lfs\n"}))

    def commit(self, repo: str, files: dict[str, bytes | None]) -> str:
        """None takes a file away."""
        sha = hashlib.sha1(f"{repo} {len(self.commits)}".encode()).hexdigest()
        folder = self.root / sha
        before = self.repos[repo].get(self.heads.get(repo, ""))
        shutil.copytree(before, folder) if before else folder.mkdir(parents=True)
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                (folder / name).unlink()
            else:
                (folder / name).write_bytes(content)
        self.repos[repo][sha] = folder
        self.heads[repo] = sha
        self.commits.append(repo)
        return sha

    def listing(self, repo: str, folder: Path) -> list[dict[str, Any]]:
        listed = {one["path"]: one for one in super().listing(repo, folder)}
        return list((listed | {one["path"]: one for one in self.lies.get(repo, [])}).values())

    def folder(self, repo: str) -> Path:
        return self.repos[repo][self.heads[repo]]


class _Writing(Handler):
    server: WritableHub

    def do_GET(self) -> None:
        self.server.tokens.append((self.headers["Host"], self.headers["Authorization"] or ""))
        path = unquote(self.path.partition("?")[0])
        asked = re.match(r"/api/models/([^/]+/[^/]+)", path)
        if asked and self._troubled(asked[1], "read"):
            return
        if path.startswith("/lfs/"):
            return self._send(200, self.server.lfs[path[5:]], {})
        large = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if not (large and large[3].endswith(LARGE) and large[1] in self.server.repos):
            return super().do_GET()
        self.server.asked.append(path)
        folder = self.server.repos[large[1]][self.server.commit_of(large[1], large[2])]
        lfs = entry(folder / large[3], folder)["lfs"]
        self.server.lfs[lfs["oid"]] = (folder / large[3]).read_bytes()
        # As the real one: to another host, which must not get the token.
        self._send(
            302,
            b"",
            {
                "Location": f"http://localhost:{self.server.server_address[1]}/lfs/{lfs['oid']}",
                "X-Repo-Commit": self.server.commit_of(large[1], large[2]),
                "X-Linked-Etag": f'"{lfs["oid"]}"',
                "X-Linked-Size": str(lfs["size"]),
            },
        )

    def do_PUT(self) -> None:
        self.server.asked.append(self.path)
        body = self._body()
        self.server.lfs[self.path.rpartition("/")[2]] = body
        self._send(200, b"", {})

    def do_POST(self) -> None:
        path = unquote(self.path.partition("?")[0])
        self.server.asked.append(path)
        body = self._body()
        if not self.headers["Authorization"]:
            return self._error(401, None)
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._json({"warnings": [], "errors": []})
        if path.endswith("/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path)
        if not found or found[1] not in self.server.repos:
            return self._error(404, "RepoNotFound")
        if found[2] == "preupload":
            return self._preupload(found[1], json.loads(body))
        return self._commit(found[1], [json.loads(line) for line in body.splitlines()])

    def _create(self, wanted: dict[str, Any]) -> None:
        repo = f"{wanted['organization']}/{wanted['name']}"
        if self._troubled(repo, "create"):
            return
        if repo in self.server.repos:
            return self._send(409, json.dumps({"url": f"{self.server.url}/{repo}"}).encode(), {})
        # Public unless told, as the real one.
        private = wanted.get("private", False) or wanted.get("visibility") == "private"
        self.server.make(repo, private)
        self._json({"url": f"{self.server.url}/{repo}", "name": repo})

    def _preupload(self, repo: str, wanted: dict[str, Any]) -> None:
        folder, files = self.server.folder(repo), []
        for file in wanted["files"]:
            mode = "lfs" if file["path"].endswith(LARGE) else "regular"
            there = folder / file["path"]
            known = entry(there, folder) if there.is_file() else {}
            oid = known.get("lfs", known).get("oid")
            files.append({**file, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": files})

    def _batch(self, wanted: dict[str, Any]) -> None:
        place = f"http://localhost:{self.server.server_address[1]}/lfs"
        objects = [
            {**one, "actions": {"upload": {"href": f"{place}/{one['oid']}"}}}
            for one in wanted["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        if self._troubled(repo, "commit"):
            return
        parent = lines[0]["value"].get("parentCommit")
        if parent and parent != self.server.heads[repo]:
            return self._error(412, None)
        files: dict[str, bytes | None] = {}
        for line in lines[1:]:
            value, key = line["value"], line["key"]
            if key == "deletedFile":
                files[value["path"]] = None
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                files[value["path"]] = self.server.lfs[value["oid"]]
        sha = self.server.commit(repo, files)
        if not self._troubled(repo, "commit", after=True):
            url = f"{self.server.url}/{repo}/commit/{sha}"
            self._json({"success": True, "commitOid": sha, "commitUrl": url})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.received.append(self.path.encode() + b"\n" + body)
        # What git would carry as text travels in base64.
        for line in body.splitlines() if b'"base64"' in body else ():
            content = json.loads(line)["value"].get("content", "")
            self.server.received.append(base64.b64decode(content))
        return body

    def _troubled(self, repo: str, route: str, after: bool = False) -> bool:
        trouble = self.server.troubles.get(repo)
        if not trouble or (trouble.route, trouble.after) != (route, after) or not trouble.times:
            return False
        trouble.times -= 1
        if trouble.status == 0:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            if trouble.status == 412:
                self.server.commit(repo, {"theirs.txt": b"somebody else's"})
            self._send(trouble.status, b"{}", trouble.headers)
        return True


@contextmanager
def writable(root: Path) -> Iterator[WritableHub]:
    """A running Hub to write to, stopped at the end of the block."""
    hub = WritableHub(root)
    with running(hub):
        yield hub
