"""The few calls to huggingface_hub, and what its failures mean to a user.

This is the only module that imports it, and only inside functions: it is slow to load and seldom
needed. What is offered here works alike from its version 1.0 on.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from vera_convert._version import __version__
from vera_convert.arguments import optional, path, require_flags, set_checked, text
from vera_convert.errors import SurroundingsError, UsageError
from vera_convert.files.reading import printable
from vera_convert.hub.remotefile import Answer, RemoteFile, TryAgainError
from vera_convert.hub.reponame import COMMIT

Result = TypeVar("Result")

_LIBRARY = "vera-convert"
_TRUE = ("1", "ON", "YES", "TRUE")


@dataclass(frozen=True, slots=True)
class HubAccess:
    """How the Hub is reached; everything left out is as huggingface_hub has it.

    Attributes:
        token: sent to the Hub; None for HF_TOKEN or the one that `hf auth login` stored.
        cache_dir: the folder of the cache.
        offline: use the cache alone, as with HF_HUB_OFFLINE.
        progress: whether downloads may draw bars on a terminal.
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
        if self.token is not None and not re.fullmatch(r"[\x21-\x7e]+", self.token):
            raise UsageError("the token is empty, or has a character in it that no token has.")

    @property
    def is_offline(self) -> bool:
        """Whether the network is not to be touched, by option or environment."""
        names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
        return self.offline or any(os.environ.get(name, "").upper() in _TRUE for name in names)


@contextmanager
def no_network() -> Iterator[None]:
    """Keep off the Hub, inside the block, whatever library reaches for it by huggingface_hub."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


class OutOfReachError(SurroundingsError):
    """The Hub did not answer, or cannot now; what the cache holds may serve instead."""


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or None


def cache_of_repo(repo_id: str, access: HubAccess) -> Path:
    """Return the cache's folder for a model repo: ``refs/``, ``blobs/`` and ``snapshots/``."""
    from huggingface_hub import constants

    cache = access.cache_dir or Path(constants.HF_HUB_CACHE)
    return cache.expanduser() / f"models--{repo_id.replace('/', '--')}"


def repo_info(
    repo_id: str, revision: str | None, access: HubAccess, *, files: bool = False
) -> tuple[str, dict[str, int]]:
    """Ask the Hub for the commit of a revision and, on demand, its files with their sizes.

    A size is -1 where the Hub (or a mirror of it) does not tell.

    Raises:
        OutOfReachError: no answer.
        SurroundingsError: no such repo or revision, or no access to it.
    """
    from huggingface_hub import HfApi, constants

    api = HfApi(_endpoint(), token=access.token, library_name=_LIBRARY, library_version=__version__)
    call = partial(
        api.model_info,
        repo_id,
        revision=revision,
        files_metadata=files,
        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
    )
    info = _answered(call, repo_id)
    if info.sha is None or not COMMIT.fullmatch(info.sha):
        raise SurroundingsError(f"the Hub does not say which commit of {repo_id} is meant.")
    siblings = info.siblings or []
    return info.sha, {file.rfilename: -1 if file.size is None else file.size for file in siblings}


def download(repo_id: str, filename: str, *, revision: str, access: HubAccess) -> Path:
    """Bring a file into the cache, if it is not there, and return its path in the snapshot.

    Raises:
        OutOfReachError: no answer.
        SurroundingsError: no such file, or no access to it, or the disk is full.
    """
    from huggingface_hub import hf_hub_download, utils

    if not access.progress:
        utils.disable_progress_bars()  # type: ignore[attr-defined] # public, but loaded lazily
    call = partial(
        hf_hub_download,
        repo_id,
        filename,
        revision=revision,
        cache_dir=access.cache_dir,
        token=access.token,
        endpoint=_endpoint(),
        library_name=_LIBRARY,
        library_version=__version__,
    )
    return Path(_answered(call, f"{repo_id}/{printable(filename)}"))


def open_by_range(
    repo_id: str, filename: str, *, commit: str, place: str, access: HubAccess
) -> RemoteFile:
    """Open a file at a commit to be read by range requests; `place` is what messages call it.

    Raises:
        SurroundingsError: it cannot be had.
    """
    from huggingface_hub import hf_hub_url, utils

    headers = utils.build_hf_headers(  # type: ignore[attr-defined] # public, but loaded lazily
        token=access.token, library_name=_LIBRARY, library_version=__version__
    )
    url = hf_hub_url(repo_id, filename, revision=commit, endpoint=_endpoint())
    return RemoteFile(place, partial(_ask, url, headers, place=place, commit=commit))


@contextmanager
def _ask(
    url: str, headers: Mapping[str, str], first: int, last: int, *, place: str, commit: str
) -> Iterator[Answer]:
    """Ask the Hub for some bytes, following it to the server where they are stored."""
    from huggingface_hub import constants, get_session

    asked = {**headers, "accept-encoding": "identity", "range": f"bytes={first}-{last}"}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    session = get_session()
    try:
        with session.stream(
            "GET", url, headers=asked, timeout=timeout, follow_redirects=True
        ) as response:
            if response.status_code not in (200, 206, 416):
                raise _refusal(place, response.status_code, response.headers)
            hops = (*response.history, response)
            named = next((hop for hop in hops if "x-repo-commit" in hop.headers), response)
            found = named.headers.get("x-repo-commit", commit)
            if found != commit:
                raise SurroundingsError(f"{place}: the Hub sent it from commit {printable(found)}.")
            tag = named.headers.get("x-linked-etag") or named.headers.get("etag")
            lowered = {name.lower(): value for name, value in response.headers.items()}
            yield Answer(response.status_code, lowered, (found, tag), response.iter_raw())
    except _network_errors() as error:
        raise TryAgainError(_reason(error)) from error


# --- what can go wrong ---------------------------------------------------------------------------


def _network_errors() -> tuple[type[Exception], ...]:
    from huggingface_hub import errors

    # HTTPError is that of the HTTP library below, which is not the same in every version. The
    # transfer of large files raises RuntimeError, or in later versions a class of its own.
    http: type[Exception] = getattr(errors, "HTTPError", OSError)
    transfer: type[Exception] = getattr(errors, "XetDownloadError", RuntimeError)
    return (OSError, http, RuntimeError, transfer)


def _answered(call: Callable[[], Result], what: str) -> Result:
    try:
        return call()
    except _network_errors() as error:
        refused = _response(error)
        if refused is None:
            reason = f"{what} cannot be had from the Hub: {_reason(error)}."
            raise OutOfReachError(reason) from error
        meaning = _refusal(what, *refused)
        if isinstance(meaning, TryAgainError):
            raise OutOfReachError(f"{what} cannot be had: {meaning}. Try again later.") from error
        raise meaning from error


def _response(error: BaseException | None) -> tuple[int, Mapping[str, str]] | None:
    """Return status and headers of the answer that an error stands for, if there was one."""
    while error is not None:
        response = getattr(error, "response", None)
        if response is not None:
            return response.status_code, response.headers
        error = error.__cause__
    return None


def _refusal(
    what: str, status: int, headers: Mapping[str, str]
) -> TryAgainError | SurroundingsError:
    """Return what an answer other than success means, `TryAgainError` if it passes."""
    code = headers.get("x-error-code", "")
    if status in (408, 429) or status >= 500:
        after = headers.get("retry-after", "")
        seconds = float(after) if re.fullmatch(r"\d{1,6}", after, re.ASCII) else 0.0
        return TryAgainError(f"the Hub answers {status}", after=seconds)
    reason = f"the Hub answers {status}"
    if code == "GatedRepo":
        reason = (
            "the repo is gated. Accept its terms on its page on the Hub, then log in with "
            "`hf auth login` or pass --token"
        )
    elif code == "RevisionNotFound":
        reason = "the repo has no such revision. Check the spelling of branch, tag or commit"
    elif code == "EntryNotFound":
        reason = "the repo has no such file at this commit"
    elif code == "RepoNotFound" or status in (401, 403, 404):
        reason = (
            "the Hub has no such repo, or it is private. Check the spelling; "
            "for a private one log in with `hf auth login` or pass --token"
        )
    return SurroundingsError(f"{what} cannot be had: {reason}.")


def _reason(error: BaseException) -> str:
    """Say what went wrong below, without the token that an HTTP library may quote."""
    text = str(error) or str(error.__cause__ or "")
    text = re.sub(r"(?i)(bearer\s+|hf_)[^\s'\"]+", r"\1***", text)
    return printable(f"{type(error).__name__}: {text}" if text else type(error).__name__)
