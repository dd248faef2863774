"""A stand-in for the Hub on this machine: repos with commits, files by range, and its refusals.

with HubServer() as hub:
    commit = hub.add("org/name", {"config.json": b"{}"})
    ... HF_ENDPOINT=hub.url ...
    hub.requests, hub.bytes_served
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self
from urllib.parse import unquote, urlsplit

SHOWN = 100
"""How much of a long body a server that breaks off sends."""


@dataclass
class Repo:
    """One model repo: files by commit, commits by branch, and who may see them."""

    token: str | None = None
    gated: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)


@dataclass
class HubServer:
    """Serves repos over HTTP until the context ends.

    Attributes:
        ranges: whether range requests are answered with ranges.
        sizes: whether sizes are told when files are listed, as a mirror may not.
        elsewhere: send file content from another server, as the Hub does with large files.
        failures: statuses to answer the next requests for files with; 0 breaks off in the body.
        requests: method, path and range of each request for something of a repo.
        authorizations: what each of them was authorized with.
        bytes_served: bytes of all bodies sent.
    """

    ranges: bool = True
    sizes: bool = True
    elsewhere: HubServer | None = None
    failures: list[int] = field(default_factory=list)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    authorizations: list[str | None] = field(default_factory=list)
    bytes_served: int = 0
    repos: dict[str, Repo] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> Self:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        """What HF_ENDPOINT has to be."""
        host, port = self._server.server_address[:2]
        return f"http://{host!s}:{port}"

    def add(
        self,
        repo_id: str,
        files: Mapping[str, bytes],
        *,
        ref: str = "main",
        token: str | None = None,
        gated: bool = False,
    ) -> str:
        """Add a commit to a repo, move a ref to it, and return it."""
        repo = self.repos.setdefault(repo_id, Repo(token, gated))
        digest = sha1(usedforsecurity=False)
        for name, content in sorted(files.items()):
            digest.update(f"{ref} {name} {len(content)}\n".encode() + content)
        commit = digest.hexdigest()
        repo.commits[commit] = dict(files)
        repo.refs[ref] = commit
        return commit

    def paths(self, method: str = "GET") -> list[str]:
        """Return the paths that were asked for."""
        return [path for used, path, _ in self.requests if used == method]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer

    def log_message(self, *args: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def _route(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        if info := re.fullmatch(r"/api/models/([^/]+(?:/[^/]+)?)", path):
            self._info(info[1], "main", sizes="blobs" in url.query)
        elif info := re.fullmatch(r"/api/models/([^/]+(?:/[^/]+)?)/revision/(.+)", path):
            self._info(info[1], info[2], sizes="blobs" in url.query)
        elif file := re.fullmatch(r"/([^/]+(?:/[^/]+)?)/resolve/(refs/pr/\d+|[^/]+)/(.+)", path):
            self._file(*file.groups())
        elif path.startswith("/content/"):
            _, _, repo_id, commit, name = path.split("/", 4)
            self._content(self.hub.repos[repo_id.replace("--", "/")].commits[commit][name], {})
        else:
            self._refuse(404, "")

    def _note(self) -> None:
        self.hub.requests.append((self.command, unquote(self.path), self.headers.get("Range")))
        self.hub.authorizations.append(self.headers.get("Authorization"))

    def _repo(self, repo_id: str) -> Repo | None:
        """Return a repo that the caller may see, or refuse him."""
        self._note()
        repo = self.hub.repos.get(repo_id)
        given = self.headers.get("Authorization")
        if repo is None or (repo.token and given != f"Bearer {repo.token}"):
            self._refuse(401, "RepoNotFound")
            return None
        return repo

    def _info(self, repo_id: str, revision: str, *, sizes: bool) -> None:
        repo = self._repo(repo_id)
        if repo is None:
            return
        commit = repo.commit(revision)
        if commit is None:
            self._refuse(404, "RevisionNotFound")
            return
        siblings: list[dict[str, object]] = [
            {"rfilename": name} | ({"size": len(content)} if sizes and self.hub.sizes else {})
            for name, content in repo.commits[commit].items()
        ]
        document = {"id": repo_id, "modelId": repo_id, "sha": commit, "siblings": siblings}
        self._send(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def _file(self, repo_id: str, revision: str, name: str) -> None:
        repo = self._repo(repo_id)
        if repo is None:
            return
        if self.hub.failures and self.command == "GET" and self.hub.failures[0]:
            self._refuse(self.hub.failures.pop(0), "")
            return
        commit = repo.commit(revision)
        if repo.gated or commit is None or name not in repo.commits[commit]:
            status, code = (403, "GatedRepo") if repo.gated else (404, "EntryNotFound")
            self._refuse(status, "RevisionNotFound" if commit is None else code)
            return
        content = repo.commits[commit][name]
        tag = sha1(content, usedforsecurity=False).hexdigest()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{tag}"'}
        if self.hub.elsewhere is None:
            self._content(content, headers)
            return
        headers = {"X-Linked-ETag": f'"{tag}"', "X-Linked-Size": str(len(content)), **headers}
        where = f"{self.hub.elsewhere.url}/content/{repo_id.replace('/', '--')}/{commit}/{name}"
        self._send(302, b"", {**headers, "ETag": '"of-the-redirect"', "Location": where})

    def _content(self, content: bytes, headers: Mapping[str, str]) -> None:
        if self.path.startswith("/content/"):
            self._note()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted is None or not self.hub.ranges or self.command == "HEAD":
            self._send(200, content, headers)
            return
        first, last = int(wanted[1]), min(int(wanted[2]), len(content) - 1)
        if first >= len(content):
            self._send(416, b"", {**headers, "Content-Range": f"bytes */{len(content)}"})
            return
        shown = {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"}
        self._send(206, content[first : last + 1], shown)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.failures and not self.hub.failures[0] and status in (200, 206):
            self.hub.failures.pop(0)
            body = body[:SHOWN]
        for start in range(0, len(body), 1 << 14):
            piece = body[start : start + (1 << 14)]
            try:
                self.wfile.write(piece)
            except (BrokenPipeError, ConnectionResetError):
                return
            with self.hub.lock:
                self.hub.bytes_served += len(piece)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()
