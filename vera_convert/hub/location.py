"""The access to the Hub, and the place of a checkpoint: a folder here, or a repo at one commit."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from vera_convert.arguments import instance, optional, path, require_flags, set_checked, text
from vera_convert.errors import SurroundingsError, UsageError
from vera_convert.files.file_names import clean_name
from vera_convert.hub.checksum import RepoFile

TOKEN = re.compile(r"[\x21-\x7e]+")
"""The form of a token, which an HTTP header can carry."""
_TRUE = ("1", "ON", "YES", "TRUE")


@dataclass(frozen=True, slots=True)
class HubAccess:
    """Options for the access to the Hub, with the defaults of huggingface_hub.

    Attributes:
        token: the token to send; None for HF_TOKEN, or the token stored by `hf auth login`.
        cache_dir: the folder of the cache.
        offline: use only the cache, as with HF_HUB_OFFLINE.
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
        # An HTTP library would quote a malformed header in the error, and so print the token.
        if self.token is not None and not TOKEN.fullmatch(self.token):
            raise UsageError("the token is empty, or has an impossible character.")

    @property
    def is_offline(self) -> bool:
        """Whether the option or the environment forbids the network."""
        names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
        return self.offline or any(os.environ.get(name, "").upper() in _TRUE for name in names)


def hub_access_of(value: object) -> HubAccess:
    """Return a caller's options for the Hub; the defaults for None.

    Raises:
        UsageError: the value is of another class.
    """
    return optional(instance, "access", HubAccess, value) or HubAccess()


@dataclass(frozen=True, slots=True)
class Location:
    """The place of a checkpoint: a folder here, or a repo on the Hub at one commit.

    Attributes:
        label: the name for messages; printable.
        folder: the folder with the files; None until the files are fetched.
        repo_id: the repo on the Hub; None for a folder.
        commit: the commit, forty hexadecimal digits.
        subfolder: the folder inside the repo, with `/`; empty for the root.
        revision: the requested branch, tag or commit; None for the default branch.
        left_out: files of the repo that were not fetched.
        listed: all files of the repo at the commit, if the Hub was asked for the commit.
    """

    label: str
    folder: Path | None
    repo_id: str | None = None
    commit: str | None = None
    subfolder: str = ""
    revision: str | None = None
    left_out: tuple[str, ...] = ()
    listed: Mapping[str, RepoFile] | None = field(default=None, repr=False, compare=False)

    @property
    def fetched(self) -> Path:
        """The folder of a fetched location."""
        assert self.folder is not None  # noqa: S101 -- the caller fetched it
        return self.folder

    @property
    def address(self) -> str | None:
        """The repo with its commit and subfolder, as a command line takes it; None for a folder."""
        if self.repo_id is None:
            return None
        return "/".join(filter(None, (f"{self.repo_id}@{self.commit}", self.subfolder)))

    @property
    def name(self) -> str:
        """The repo, or the name of the folder without the path to the folder."""
        return self.repo_id or (self.folder or Path()).resolve().name

    @property
    def record(self) -> dict[str, object]:
        """The place without paths of this machine: repo and commit, or the folder's name."""
        if self.repo_id is None:
            return {"folder": self.name}
        found: dict[str, object] = {"repo_id": self.repo_id, "commit": self.commit}
        return found | ({"subfolder": self.subfolder} if self.subfolder else {})


def not_cached(what: str) -> SurroundingsError:
    """Return the error for a file or repo that the cache lacks in an offline run."""
    return SurroundingsError(
        f"{what} is not in the local cache (this run is offline).",
        "Run again without --offline and HF_HUB_OFFLINE, or download the repo first with "
        "`hf download`.",
    )


def on_hub(location: Location) -> tuple[str, str]:
    """Return the repo and the commit of a location on the Hub.

    Raises:
        ValueError: the location is a folder.
    """
    if location.repo_id is None or location.commit is None:
        raise ValueError("not a repo on the Hub")
    return location.repo_id, location.commit


def inside(location: Location, filename: str) -> PurePosixPath:
    """Return a file's name in the repo; refuse a name that leads out of the repo."""
    return PurePosixPath(location.subfolder) / clean_name(filename, place=location.label)
