"""A Hub on this machine: the routes by which the unmodified client reads models and data sets."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from processes import run

SHA = "c0ffee" + "0" * 34
OLDER = "b0a7" + "1" * 36
# Names that stand for an answer instead of a model: name -> (status, X-Error-Code).
ANSWERS = {
    "org/gated-no-token": (401, "GatedRepo"),
    "org/gated-refused": (403, "GatedRepo"),
    "org/blocked": (403, None),
    "org/missing": (404, "RepoNotFound"),
    "org/down": (503, None),
}
# The client takes a 401 without a code for a model that is private or not there.
ANSWERS["org/private"] = (401, None)
_REPO = r"((?:datasets/)?[^/]+/[^/]+)"


class Hub(ThreadingHTTPServer):
    """Serves `repos`: {id: {revision's sha: folder}}; `refs`: {branch or tag: sha}.

    The id of a data set begins with `datasets/`.
    """

    daemon_threads = True

    def __init__(self, repos: dict[str, dict[str, Path]], refs: dict[str, str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.refs = repos, refs
        self.asked: list[str] = []
        self.private: set[str] = set()

    def commit_of(self, repo: str, name: str) -> str:
        return self.refs.get(name, name)

    def listing(self, repo: str, folder: Path) -> list[dict[str, Any]]:
        return [entry(f, folder) for f in sorted(folder.rglob("*")) if f.is_file()]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(path)
        path = path.replace("/api/models/", "/api/")
        if re.fullmatch(rf"/api/{_REPO}/tree/[^/]+/.+", path):  # no model here has folders to list
            return self._error(404, "EntryNotFound")
        api = re.fullmatch(rf"/api/{_REPO}(?:/(revision|tree)/([^/]+))?", path)
        file = re.fullmatch(rf"/{_REPO}/resolve/([^/]+)/(.+)", path)
        model = (api or file or [None, ""])[1]
        if model.removeprefix("datasets/") in ANSWERS:
            return self._error(*ANSWERS[model.removeprefix("datasets/")])
        if model not in self.server.repos:
            return self._error(404, "RepoNotFound")
        name = (api[3] if api else file[2] if file else None) or "main"
        sha = self.server.commit_of(model, name)
        folder = self.server.repos[model].get(sha)
        if folder is None:
            return self._error(404, "RevisionNotFound")
        if api and api[2] == "tree":
            return self._json(self.server.listing(model, folder))
        if api:
            private = model in self.server.private
            return self._json({"id": model, "sha": sha, "siblings": [], "private": private})
        assert file
        wanted = folder / unquote(file[3])
        if not wanted.is_file():
            return self._error(404, "EntryNotFound")
        found = entry(wanted, folder)
        etag = found["lfs"]["oid"] if "lfs" in found else found["oid"]
        return self._send(200, wanted.read_bytes(), {"X-Repo-Commit": sha, "ETag": f'"{etag}"'})

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str | None) -> None:
        self._send(status, b"{}", {"X-Error-Code": code} if code else {})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def entry(file: Path, folder: Path) -> dict[str, Any]:
    """As the Hub lists a file: large ones lie in LFS, under their sha256, the rest in git."""
    content = file.read_bytes()
    git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    listed: dict[str, Any] = {
        "type": "file",
        "path": str(file.relative_to(folder)),
        "size": len(content),
        "oid": git,
    }
    if file.suffix in (".safetensors", ".bin", ".parquet"):
        oid = hashlib.sha256(content).hexdigest()
        listed["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 130}
    return listed


@contextmanager
def serving(repos: dict[str, dict[str, Path]], refs: dict[str, str]) -> Iterator[Hub]:
    """A running Hub, stopped at the end of the block."""
    hub = Hub(repos, refs)
    with running(hub):
        yield hub


@contextmanager
def running(hub: ThreadingHTTPServer) -> Iterator[None]:
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def settings(endpoint: str, home: Path, **environment: str) -> dict[str, str]:
    """The environment of a process that sees this Hub alone: read when the client is imported."""
    kept = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "HF_HUB_CACHE")}
    return kept | {
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(home),
        "NO_PROXY": "127.0.0.1",
        **environment,
    }


def client(code: str, endpoint: str, home: Path, **environment: str) -> list[Any]:
    """Run code in a process that sees this Hub alone; returns the JSON lines it prints."""
    done = run([sys.executable, "-c", code], env=settings(endpoint, home, **environment))
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]
