"""A stand-in for the Hub on this machine: repos with commits, files by range, and failures.

with HubServer() as hub:
commit = hub.add("org/name", {"config.json": b"{}"})
hub.failures = [503, 0, Fault("reset"), Fault(429, {"Retry-After": "1"})]
... HF_ENDPOINT=hub.url ...
hub.requests, hub.bytes_served
"""

from __future__ import annotations

import json
import re
import socket
import struct
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Literal, Self
from urllib.parse import unquote, urlsplit

SHOWN = 100
"""The number of bytes that a server sends before it cuts off a long body."""


@dataclass(frozen=True)
class Fault:
    """The failure of one request.

    Attributes:
    kind: the status of the answer; or "reset" for a reset connection, "silence" for some seconds
    without an answer, "cut" for a body that ends early, "trickle" for slow headers without end.
    headers: further headers of the answer.
    body: the body of the answer.
    """

    kind: int | Literal["reset", "silence", "cut", "trickle"]
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


SILENCE = 3.0
"""The seconds of a "silence"."""


@dataclass
class Repo:
    """A model repo: files by commit, commits by branch, and the token that opens the repo."""

    token: str | None = None
    gated: bool = False
    disabled: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)


@dataclass
class HubServer:
    """Serve repos over HTTP until the context ends.

    Attributes:
    ranges: whether a request for a range gets only that range.
    sizes: whether a list of files states sizes; some mirrors do not.
    elsewhere: another server that sends the content of files, as the Hub does for large files.
    hashes: whether lists and answers state the hashes of files.
    signature: the signature in the address of the other server.
    failures: the failures of the next requests for files, each a status or a `Fault`; 0 cuts the
    body off.
    info_failures: the failures of the next requests for the description of a repo.
    refused_token: a token that no account has.
    damaged: the files that are sent with one wrong bit in the middle.
    requests: method, path and range of each request for a file or a description.
    authorizations: the Authorization header of each of these requests.
    addresses: the address of each of these requests, with the query.
    everything: the address of every request of any kind.
    bytes_served: the number of bytes in all bodies sent.
    """

    ranges: bool = True
    sizes: bool = True
    hashes: bool = True
    elsewhere: HubServer | None = None
    signature: str = ""
    failures: list[int | Fault] = field(default_factory=list)
    info_failures: list[int | Fault] = field(default_factory=list)
    refused_token: str | None = None
    damaged: set[str] = field(default_factory=set)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    authorizations: list[str | None] = field(default_factory=list)
    addresses: list[str] = field(default_factory=list)
    everything: list[str] = field(default_factory=list)
    bytes_served: int = 0
    repos: dict[str, Repo] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    closing: threading.Event = field(default_factory=threading.Event)

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
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        """The address of this server, for HF_ENDPOINT."""
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
        disabled: bool = False,
    ) -> str:
        """Add a commit to a repo, move a ref to the commit, and return the commit."""
        repo = self.repos.setdefault(repo_id, Repo(token, gated, disabled))
        digest = sha1(usedforsecurity=False)
        for name, content in sorted(files.items()):
            digest.update(f"{ref} {name} {len(content)}\n".encode() + content)
        commit = digest.hexdigest()
        repo.commits[commit] = dict(files)
        repo.refs[ref] = commit
        return commit

    def paths(self, method: str = "GET") -> list[str]:
        """Return the paths of all requests."""
        return [path for used, path, _ in self.requests if used == method]


def is_large(name: str) -> bool:
    """Say whether the Hub stores a file of this name outside git."""
    return name.endswith((".safetensors", ".bin", ".pt"))


def stated(name: str, content: bytes) -> str:
    """Return the hash that the Hub states: SHA-256, or git's blob hash for a small file."""
    if is_large(name):
        return sha256(content).hexdigest()
    return sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    cut = False

    def log_message(self, *args: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def _route(self) -> None:
        self.hub.everything.append(self.path)
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
            content = self.hub.repos[repo_id.replace("--", "/")].commits[commit][name]
            self._content(name, content, {})
        else:
            self._refuse(404, "")

    def _note(self) -> None:
        self.hub.requests.append(
            (self.command, unquote(urlsplit(self.path).path), self.headers.get("Range"))
        )
        self.hub.authorizations.append(self.headers.get("Authorization"))
        self.hub.addresses.append(self.path)

    def _repo(self, repo_id: str) -> Repo | None:
        """Return a repo that the caller may see; otherwise send a refusal and return None."""
        self._note()
        repo = self.hub.repos.get(repo_id)
        given = self.headers.get("Authorization")
        if given is not None and given == f"Bearer {self.hub.refused_token}":
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif repo is None or (repo.token and given != f"Bearer {repo.token}"):
            self._refuse(404 if given else 401, "RepoNotFound")
        elif repo.disabled:
            self._refuse(403, "", "Access to this resource is disabled.")
        else:
            return repo
        return None

    def _fails(self, failures: list[int | Fault]) -> bool:
        """Fail as the next entry of `failures` says; return False if no failure is due."""
        if not failures or self.command == "HEAD":
            return False
        fault = failures.pop(0)
        if not isinstance(fault, Fault):
            fault = Fault(fault or "cut")
        if fault.kind == "cut":
            self.cut = True
            return False
        if fault.kind == "silence":
            threading.Event().wait(SILENCE)  # not `time.sleep`, which tests replace
        elif fault.kind == "trickle":
            self._trickle()
        elif fault.kind == "reset":
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.shutdown(socket.SHUT_RD)
        else:
            self._send(fault.kind, fault.body, fault.headers)
        self.close_connection = True
        return True

    def _trickle(self) -> None:
        """Send a header without end, byte by byte, until the client or the test closes."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        with suppress(OSError):
            while not self.hub.closing.wait(0.05):
                self.wfile.write(b"x")

    def _info(self, repo_id: str, revision: str, *, sizes: bool) -> None:
        repo = self._repo(repo_id)
        if repo is None or self._fails(self.hub.info_failures):
            return
        commit = repo.commit(revision)
        if commit is None:
            self._refuse(404, "RevisionNotFound")
            return
        siblings = [
            self._listed(name, content, sizes=sizes)
            for name, content in repo.commits[commit].items()
        ]
        document = {"id": repo_id, "modelId": repo_id, "sha": commit, "siblings": siblings}
        self._send(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def _listed(self, name: str, content: bytes, *, sizes: bool) -> dict[str, object]:
        listed: dict[str, object] = {"rfilename": name}
        if sizes and self.hub.sizes:
            listed["size"] = len(content)
        if sizes and self.hub.hashes and is_large(name):
            large = {"sha256": stated(name, content), "size": len(content), "pointerSize": 130}
            listed |= {"blobId": sha1(b"pointer", usedforsecurity=False).hexdigest(), "lfs": large}
        elif sizes and self.hub.hashes:
            listed["blobId"] = stated(name, content)
        return listed

    def _file(self, repo_id: str, revision: str, name: str) -> None:
        repo = self._repo(repo_id)
        if repo is None or self._fails(self.hub.failures):
            return
        commit = repo.commit(revision)
        if repo.gated or commit is None or name not in repo.commits[commit]:
            status, code = (403, "GatedRepo") if repo.gated else (404, "EntryNotFound")
            self._refuse(status, "RevisionNotFound" if commit is None else code)
            return
        content = repo.commits[commit][name]
        tag = stated(name, content) if self.hub.hashes else f"of-a-mirror-{len(content)}"
        headers = {"X-Repo-Commit": commit, "ETag": f'"{tag}"'}
        if self.hub.elsewhere is None:
            self._content(name, content, headers)
            return
        headers = {"X-Linked-ETag": f'"{tag}"', "X-Linked-Size": str(len(content)), **headers}
        where = f"{self.hub.elsewhere.url}/content/{repo_id.replace('/', '--')}/{commit}/{name}"
        where += f"?X-Amz-Signature={self.hub.signature}" if self.hub.signature else ""
        self._send(302, b"", {**headers, "ETag": '"of-the-redirect"', "Location": where})

    def _content(self, name: str, content: bytes, headers: Mapping[str, str]) -> None:
        if self.path.startswith("/content/"):
            self._note()
            if self._fails(self.hub.failures):
                return
        if name in self.hub.damaged:
            at = len(content) // 2
            content = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
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
        if self.cut:
            body = body[: min(SHOWN, len(body) - 1)]
        for start in range(0, len(body), 1 << 14):
            piece = body[start : start + (1 << 14)]
            try:
                self.wfile.write(piece)
            except (BrokenPipeError, ConnectionResetError):
                return
            with self.hub.lock:
                self.hub.bytes_served += len(piece)

    def _refuse(self, status: int, code: str, message: str = "") -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        if message:
            self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()
