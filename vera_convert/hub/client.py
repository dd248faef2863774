"""Send requests to the Hub through huggingface_hub's settings, token and HTTP session.

No other module imports huggingface_hub; the functions here import the library when they run,
because the import is slow. These parts of the library are the same from version 0.34 on, except
that the session belongs to requests before 1.0, and to httpx or httpx2 since.

Descriptions of repos and ranges of files are requested here, because in huggingface_hub the size of
an answer and the pauses that a server asks for have no bound. huggingface_hub downloads complete
files.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

from vera_convert._version import __version__
from vera_convert.errors import SurroundingsError, UsageError
from vera_convert.hub.checksum import RepoFile, digest_of
from vera_convert.hub.location import TOKEN, HubAccess
from vera_convert.hub.range_file import MOST_WITHOUT_RANGES, Answer, Ask
from vera_convert.hub.redaction import keep_secrets_from_logs
from vera_convert.hub.refusals import OF_ANSWERS, Refusal, RefusedError, failure, refused
from vera_convert.hub.repo_name import COMMIT
from vera_convert.hub.retry import at_least_slowly, until_answered
from vera_convert.text import printable

logger = logging.getLogger(__name__)

_LIBRARY = "vera-convert"
_MOST_LISTED = 64 << 20
"""The most bytes of a repo's description; 100,000 files take a third of this."""
_MOST_EXPLAINED = 64 << 10
"""The most bytes that are read of the body of a refusal."""
_BLOCK = 256 << 10


@dataclass(frozen=True, slots=True)
class RepoInfo:
    """A repo at a commit: the commit, and the repo's files by name."""

    commit: str
    files: Mapping[str, RepoFile]


class _Response(Protocol):
    """The common part of the responses of requests, httpx and httpx2."""

    status_code: int
    headers: Mapping[str, str]

    @property
    def history(self) -> Sequence[_Response]:
        """The redirects that led to this answer."""

    def iter_content(self, size: int) -> Iterator[bytes]:
        """Yield the body (requests only; httpx has `iter_raw`)."""


# --- settings ------------------------------------------------------------------------------------


def close_sessions() -> None:
    """Close all connections of huggingface_hub, so new settings take effect."""
    from huggingface_hub import utils

    name = "reset_sessions" if hasattr(utils, "reset_sessions") else "close_session"
    getattr(utils, name)()  # reset_sessions before 1.0


@contextmanager
def no_network() -> Iterator[None]:
    """Forbid requests to the Hub inside the block, for every user of huggingface_hub."""
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
    """Return the address of the Hub, or of the mirror that HF_ENDPOINT names.

    Raises:
        UsageError: HF_ENDPOINT is no web address.
    """
    from huggingface_hub import constants

    found = os.environ.get("HF_ENDPOINT", "").rstrip("/") or constants.ENDPOINT
    if not re.fullmatch(r"https?://[^\s/?#@\[\]]+(/[^\s?#]*)?", found):
        raise UsageError("HF_ENDPOINT must be a web address such as `https://hub.example`.")
    return found


def cache_root(access: HubAccess) -> Path:
    """Return the folder of the Hub's cache."""
    from huggingface_hub import constants

    return (access.cache_dir or Path(constants.HF_HUB_CACHE)).expanduser()


def _token(access: HubAccess) -> str | None:
    """Return the token to send, if any.

    Raises:
        RefusedError: the token in the environment or the stored one is malformed.
    """
    from huggingface_hub import constants, get_token

    stored = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    token = access.token or stored
    if token is not None and not TOKEN.fullmatch(token):
        raise RefusedError(
            "the token in HF_TOKEN, or the token stored by `hf auth login`, has an impossible "
            "character. Set HF_TOKEN anew, or log in again with `hf auth login`.",
            Refusal.BAD_TOKEN,
        )
    return token


def _headers(token: str | None) -> dict[str, str]:
    # build_hf_headers of later versions sends a request of its own
    headers = {"user-agent": f"{_LIBRARY}/{__version__}", "accept-encoding": "identity"}
    return headers if token is None else {**headers, "authorization": f"Bearer {token}"}


# --- requests ------------------------------------------------------------------------------------


def repo_info(repo_id: str, revision: str | None, access: HubAccess) -> RepoInfo:
    """Ask the Hub for the commit of a revision, and for the names, sizes and hashes of its files.

    A mirror may state no sizes or hashes.

    Raises:
        OutOfReachError: no answer.
        RefusedError: the repo or revision is missing, or access is denied.
    """
    at = "" if revision is None else f"/revision/{quote(revision, safe='')}"
    url = f"{endpoint()}/api/models/{repo_id}{at}?blobs=true"
    get = partial(_get, url, _headers(_token(access)), what=repo_id, most=_MOST_LISTED + 1)
    data = until_answered(get, what=repo_id).data
    if len(data) > _MOST_LISTED:
        raise SurroundingsError(
            f"the Hub's description of {repo_id} has more than {_MOST_LISTED:,} bytes."
        )
    return _repo_info(data, repo_id)


def asking_for(repo_id: str, filename: str, *, commit: str, place: str, access: HubAccess) -> Ask:
    """Return a function that requests bytes of a file.

    Args:
        repo_id: the repo.
        filename: the file's name in the repo.
        commit: the commit.
        place: the file's name in messages.
        access: the access to the Hub.

    Raises:
        RefusedError: the token in the environment, or the stored token, is malformed.
    """
    url = f"{endpoint()}/{repo_id}/resolve/{commit}/{quote(filename)}"
    headers = _headers(_token(access))

    def ask(first: int, last: int) -> Answer:
        span = {"range": f"bytes={first}-{last}"}
        answer = _get(url, headers | span, what=place, most=last - first + 1, skip=first)
        found = answer.identity[0] or commit
        if found != commit:
            raise SurroundingsError(f"{place}: the Hub sent it from commit {printable(found)}.")
        return answer

    return ask


def _get(url: str, headers: Mapping[str, str], *, what: str, most: int, skip: int = 0) -> Answer:
    """Send one request, and return the answer with up to `most` bytes of the body.

    If the server sends the complete file instead of a range, `skip` bytes come before the range.

    Raises:
        TryAgainError: a temporary failure.
        SurroundingsError: a lasting failure.
    """
    keep_secrets_from_logs()
    logger.info("requesting %s", what)
    data = bytearray()

    def send() -> Answer:
        with failures_of(what), _sent(url, headers) as response:
            found = _checked(response, what, with_token="authorization" in headers)
            limit = most + (skip if found.status == 200 else 0)
            if found.status == 206 or limit <= max(most, MOST_WITHOUT_RANGES):
                _read(response, data, limit)
        return Answer(found.status, found.headers, found.identity, bytes(data))

    return at_least_slowly(send, lambda: len(data), what=what)


def _sent(url: str, headers: Mapping[str, str]) -> AbstractContextManager[_Response]:
    """Send a request, and follow redirects to the server that stores the file."""
    from huggingface_hub import constants, get_session

    session: Any = get_session()
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    sent: AbstractContextManager[_Response]
    if callable(session.stream):  # a method of httpx, and a setting of requests
        sent = session.stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True)
    else:
        sent = session.get(url, headers=headers, timeout=timeout, stream=True)
    return sent


def _checked(response: _Response, what: str, *, with_token: bool) -> Answer:
    """Return a successful answer without the body.

    Raises:
        TryAgainError: a temporary failure.
        SurroundingsError: a lasting failure.
    """
    status = response.status_code
    if status not in (200, 206, 416):
        raise refused(what, status, response.headers, _explanation(response), with_token=with_token)
    hops = (*response.history, response)
    named = next((hop for hop in hops if "x-repo-commit" in hop.headers), response)
    tag = named.headers.get("x-linked-etag") or named.headers.get("etag")
    lowered = {name.lower(): value for name, value in response.headers.items()}
    return Answer(status, lowered, (named.headers.get("x-repo-commit"), tag), b"")


def _explanation(response: _Response) -> str:
    """Return the error text of a refusal, or an empty text."""
    if "x-error-message" in response.headers:
        return response.headers["x-error-message"]
    body = bytearray()
    _read(response, body, _MOST_EXPLAINED)
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    said = document.get("error") if isinstance(document, dict) else None
    return said if isinstance(said, str) else ""


def _read(response: _Response, data: bytearray, limit: int) -> None:
    """Add up to `limit` bytes of the body to `data` on arrival."""
    # requests would decode a compressed body, but a compressed answer is refused
    raw = getattr(response, "iter_raw", None) or partial(response.iter_content, _BLOCK)
    for block in raw():
        data += block[: limit - len(data)]
        if len(data) >= limit:
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
        raise SurroundingsError(f"the Hub names no commit for {repo_id}.")
    return RepoInfo(commit, {name: file for name, file in listed.items() if isinstance(name, str)})


def _repo_file(file: Mapping[str, Any]) -> RepoFile:
    large = file.get("lfs") or {}
    digest = digest_of(large.get("sha256") or large.get("oid") or file.get("blobId"))
    size = file.get("size", large.get("size"))
    sound = isinstance(size, int) and not isinstance(size, bool) and size >= 0
    return RepoFile(size if sound else -1, digest)


def download_file(repo_id: str, name: str, *, commit: str, place: str, access: HubAccess) -> None:
    """Let huggingface_hub download a complete file into the cache, once.

    Raises:
        TryAgainError: a temporary failure.
        SurroundingsError: a lasting failure.
    """
    from huggingface_hub import hf_hub_download

    keep_secrets_from_logs()
    logger.info("downloading %s", place)
    token = _token(access)
    with _bars(shown=access.progress), failures_of(place, with_token=token is not None):
        hf_hub_download(
            repo_id,
            name,
            revision=commit,
            cache_dir=cache_root(access),
            endpoint=endpoint(),
            token=token or False,
            library_name=_LIBRARY,
            library_version=__version__,
        )


@contextmanager
def _bars(*, shown: bool) -> Iterator[None]:
    """Hide the progress bars of huggingface_hub in the block, unless `shown`."""
    import huggingface_hub.utils

    utils: Any = huggingface_hub.utils
    if shown or utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()


# --- failures ------------------------------------------------------------------------------------


@contextmanager
def failures_of(what: str, *, with_token: bool = False) -> Iterator[None]:
    """Turn every error of huggingface_hub inside the block into an error of this package.

    Raises:
        TryAgainError: a temporary failure.
        SurroundingsError: a lasting failure.
    """
    from huggingface_hub import errors

    # HTTPError belongs to the HTTP library below, which depends on the version.
    http: type[Exception] = getattr(errors, "HTTPError", OSError)
    try:
        yield
    except errors.OfflineModeIsEnabled:
        raise SurroundingsError(
            f"{what} could not be read from the Hub: huggingface_hub is set to be offline."
        ) from None
    except (OSError, RuntimeError, http, *OF_ANSWERS) as error:  # hf_xet raises RuntimeError
        # The cause is dropped, because text and traceback may hold signed addresses.
        raise failure(what, error, with_token=with_token) from None
