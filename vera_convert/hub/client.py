"""The few calls to huggingface_hub, and what the Hub's refusals mean to a user.

This is the only module that imports huggingface_hub, and only inside functions: it is slow to load
and seldom needed. What is used of it is the same from version 0.34 on: its settings, its headers,
and its HTTP session, which is one of requests before 1.0 and one of httpx or httpx2 since. Requests
and downloads are made here, not by its functions, whose retries, waiting times and log lines differ
from version to version.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

from vera_convert._version import __version__
from vera_convert.arguments import optional, path, require_flags, set_checked, text
from vera_convert.errors import SurroundingsError, UsageError
from vera_convert.hub.checksum import RepoFile, digest_of
from vera_convert.hub.refusals import (
    Refusal,
    RefusedError,
    TryAgainError,
    failure,
    refused,
    transient,
    unexpected,
)
from vera_convert.hub.repo_name import COMMIT
from vera_convert.hub.requests import Answer, Ask, until_answered
from vera_convert.hub.secrets import redacted
from vera_convert.text import printable

logger = logging.getLogger(__name__)

_LIBRARY = "vera-convert"
_TRUE = ("1", "ON", "YES", "TRUE")
_TOKEN = re.compile(r"[\x21-\x7e]+")
_MOST_LISTED = 64 << 20
"""The most bytes of a repo's description: a hundred thousand files take a third."""
_MOST_EXPLAINED = 64 << 10
"""The most bytes of a refusal that are read to understand it."""
_BLOCK = 256 << 10


@dataclass(frozen=True, slots=True)
class HubAccess:
    """How the Hub is reached; everything left out is as huggingface_hub has it.

    Attributes:
        token: sent to the Hub; None for HF_TOKEN or the one that `hf auth login` stored.
        cache_dir: the folder of the cache.
        offline: use the cache alone, as with HF_HUB_OFFLINE.
        progress: whether downloads may draw bars on a terminal.

    Example:
        >>> HubAccess(offline=True).is_offline
        True
    """

    token: str | None = field(default=None, repr=False)
    cache_dir: Path | None = None
    offline: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        set_checked(
            self,
            token=optional(text, "token", self.token),
            cache_dir=optional(path, "cache_dir", self.cache_dir),
        )
        require_flags(offline=self.offline, progress=self.progress)
        # An HTTP library would quote a malformed header in its error, and so print the token.
        if self.token is not None and not _TOKEN.fullmatch(self.token):
            raise UsageError("the token is empty, or has a character in it that no token has.")

    @property
    def is_offline(self) -> bool:
        """Whether the network is not to be touched, by option or environment."""
        names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
        return self.offline or any(os.environ.get(name, "").upper() in _TRUE for name in names)


@dataclass(frozen=True, slots=True)
class RepoInfo:
    """A repo at one commit: the commit, and its files by name."""

    commit: str
    files: Mapping[str, RepoFile]


class _Response(Protocol):
    """What the answers of requests, httpx and httpx2 have in common."""

    status_code: int
    headers: Mapping[str, str]

    @property
    def history(self) -> Sequence[_Response]:
        """The redirects on the way to this answer."""

    def iter_content(self, size: int) -> Iterator[bytes]:
        """Yield the body (requests alone; httpx has `iter_raw`)."""


# --- settings ------------------------------------------------------------------------------------


def close_sessions() -> None:
    """Close every connection that huggingface_hub holds, so that new settings take effect."""
    from huggingface_hub import utils

    name = "reset_sessions" if hasattr(utils, "reset_sessions") else "close_session"
    getattr(utils, name)()  # the former before 1.0


@contextmanager
def no_network() -> Iterator[None]:
    """Keep off the Hub, inside the block, whatever library reaches for it by huggingface_hub."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    close_sessions()  # before 1.0, a session reads the setting only when it is made
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
        close_sessions()


def endpoint() -> str:
    """Return the address of the Hub, or of the mirror that HF_ENDPOINT names."""
    from huggingface_hub import constants

    found = os.environ.get("HF_ENDPOINT", "").rstrip("/") or constants.ENDPOINT
    if not re.fullmatch(r"https?://[^\s/?#@\[\]]+(/[^\s?#]*)?", found):
        raise UsageError("HF_ENDPOINT is no web address: write it as `https://hub.example`.")
    return found


def cache_root(access: HubAccess) -> Path:
    """Return the folder of the Hub's cache."""
    from huggingface_hub import constants

    return (access.cache_dir or Path(constants.HF_HUB_CACHE)).expanduser()


def _headers(access: HubAccess) -> dict[str, str]:
    """Return the headers of a request, the token's among them.

    Raises:
        RefusedError: the token in the environment or the stored one is malformed.
    """
    from huggingface_hub import constants, get_token

    # Not by build_hf_headers, which in later versions sends a request of its own.
    headers = {"user-agent": f"{_LIBRARY}/{__version__}", "accept-encoding": "identity"}
    implicit = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    token = access.token or implicit
    if token is None:
        return headers
    if not _TOKEN.fullmatch(token):
        raise RefusedError(
            "the token in HF_TOKEN, or the one that `hf auth login` stored, has a character in it "
            "that no token has. Set HF_TOKEN anew, or log in again with `hf auth login`.",
            Refusal.BAD_TOKEN,
        )
    return {**headers, "authorization": f"Bearer {token}"}


# --- requests ------------------------------------------------------------------------------------


def repo_info(repo_id: str, revision: str | None, access: HubAccess) -> RepoInfo:
    """Ask the Hub for the commit of a revision, its files, their sizes and their hashes.

    Sizes and hashes are left out where the Hub, or a mirror of it, does not tell.

    Raises:
        OutOfReachError: no answer.
        RefusedError: no such repo or revision, or no access to it.
    """
    at = "" if revision is None else f"/revision/{quote(revision, safe='')}"
    url = f"{endpoint()}/api/models/{repo_id}{at}?blobs=true"
    headers = _headers(access)

    def ask() -> bytes:
        with _answered(url, headers, what=repo_id) as (response, blocks):
            if response.status_code != 200:
                raise unexpected(repo_id, response.status_code)
            data = b"".join(_up_to(blocks, _MOST_LISTED + 1))
        if len(data) > _MOST_LISTED:
            raise SurroundingsError(
                f"the Hub's description of {repo_id} has more than {_MOST_LISTED:,} bytes."
            )
        return data

    return _repo_info(until_answered(ask, what=repo_id), repo_id)


def asking_for(repo_id: str, filename: str, *, commit: str, place: str, access: HubAccess) -> Ask:
    """Return how to ask for bytes of a file at a commit; `place` is how messages call the file."""
    url = f"{endpoint()}/{repo_id}/resolve/{commit}/{quote(filename)}"
    return partial(_ask, url, _headers(access), place=place, commit=commit)


@contextmanager
def _ask(
    url: str, headers: Mapping[str, str], first: int, last: int, *, place: str, commit: str
) -> Iterator[Answer]:
    """Ask the Hub for some bytes, following it to the server where they are stored."""
    asked = {**headers, "range": f"bytes={first}-{last}"}
    with _answered(url, asked, what=place) as (response, blocks):
        if response.status_code not in (200, 206, 416):
            raise unexpected(place, response.status_code)
        hops = (*response.history, response)
        named = next((hop for hop in hops if "x-repo-commit" in hop.headers), response)
        found = named.headers.get("x-repo-commit", commit)
        if found != commit:
            raise SurroundingsError(f"{place}: the Hub sent it from commit {printable(found)}.")
        tag = named.headers.get("x-linked-etag") or named.headers.get("etag")
        lowered = {name.lower(): value for name, value in response.headers.items()}
        yield Answer(response.status_code, lowered, (found, tag), blocks)


@contextmanager
def _answered(
    url: str, headers: Mapping[str, str], *, what: str
) -> Iterator[tuple[_Response, Iterator[bytes]]]:
    """Send one request; the answer is a success of some kind, or an error is raised.

    Raises:
        TryAgainError: a failure that may pass.
        SurroundingsError: one that does not.
    """
    from huggingface_hub import constants, get_session

    _keep_secrets_from_logs()
    logger.info("requesting %s", what)
    session: Any = get_session()
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with _failures(what):
        if callable(session.stream):  # a method of httpx, and a setting of requests
            context = session.stream(
                "GET", url, headers=headers, timeout=timeout, follow_redirects=True
            )
        else:
            context = session.get(url, headers=headers, timeout=timeout, stream=True)
        response = context.__enter__()
    try:
        with _failures(what):
            if response.status_code >= 400 and response.status_code != 416:
                raise _failed(what, response, with_token="authorization" in headers)
        yield response, _body(response, what)
    finally:
        with _failures(what):
            context.__exit__(None, None, None)


def _body(response: _Response, what: str) -> Iterator[bytes]:
    """Yield the body as it comes."""
    with _failures(what):
        yield from _raw(response)


def _raw(response: _Response) -> Iterator[bytes]:
    # requests would decode a compressed body, but such an answer is refused
    raw = getattr(response, "iter_raw", None) or partial(response.iter_content, _BLOCK)
    blocks: Iterator[bytes] = raw()
    return blocks


def _up_to(blocks: Iterator[bytes], limit: int) -> Iterator[bytes]:
    left = limit
    for block in blocks:
        yield block[:left]
        left -= len(block)
        if left <= 0:
            return


def _repo_info(data: bytes, repo_id: str) -> RepoInfo:
    try:
        document = json.loads(data)
        listed = {file["rfilename"]: _repo_file(file) for file in document.get("siblings") or ()}
        commit = document["sha"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise SurroundingsError(
            f"the Hub's description of {repo_id} cannot be read. If HF_ENDPOINT names a mirror, "
            "the mirror is at fault."
        ) from None
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        raise SurroundingsError(f"the Hub does not say which commit of {repo_id} is meant.")
    return RepoInfo(commit, {name: file for name, file in listed.items() if isinstance(name, str)})


def _repo_file(file: Mapping[str, Any]) -> RepoFile:
    large = file.get("lfs") or {}
    digest = digest_of(large.get("sha256") or large.get("oid") or file.get("blobId"))
    size = file.get("size", large.get("size"))
    sound = isinstance(size, int) and not isinstance(size, bool) and size >= 0
    return RepoFile(size if sound else -1, digest)


# --- what can go wrong ---------------------------------------------------------------------------


@contextmanager
def _failures(what: str) -> Iterator[None]:
    """Turn every failure of the HTTP library inside the block into one that may pass."""
    from huggingface_hub import errors

    # HTTPError is that of the HTTP library below, which is not the same in every version.
    http: type[Exception] = getattr(errors, "HTTPError", OSError)
    try:
        yield
    except errors.OfflineModeIsEnabled:
        raise SurroundingsError(
            f"{what} could not be read from the Hub: huggingface_hub is set to be offline."
        ) from None
    except (OSError, http) as error:
        # Without the cause: its text and its traceback may hold signed addresses.
        raise failure(what, error) from None


def _failed(
    what: str, response: _Response, *, with_token: bool
) -> TryAgainError | SurroundingsError:
    """Return what to raise for an answer that is no success."""
    status, headers = response.status_code, response.headers
    said = headers.get("x-error-message", "")
    passing = transient(status, headers)
    return passing or refused(
        what, status, headers, said or _explanation(response), with_token=with_token
    )


def _explanation(response: _Response) -> str:
    """Return the error that the body of a refusal names, an empty text if there is none."""
    try:
        document = json.loads(b"".join(_up_to(_raw(response), _MOST_EXPLAINED)))
    except (ValueError, RecursionError):
        return ""
    said = document.get("error") if isinstance(document, dict) else None
    return said if isinstance(said, str) else ""


class _Redacting(logging.Filter):
    """Takes secrets out of log lines: huggingface_hub writes addresses with their signatures."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redacted(record.getMessage()), ()
        if record.exc_info:
            record.exc_text = redacted(logging.Formatter().formatException(record.exc_info))
            record.exc_info = None
        return True


_REDACTING = _Redacting()


def _keep_secrets_from_logs() -> None:
    for handler in logging.getLogger("huggingface_hub").handlers:
        handler.addFilter(_REDACTING)  # a second time does nothing
