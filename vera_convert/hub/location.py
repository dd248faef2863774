"""Where a checkpoint lies: a folder here, or a repo on the Hub at one commit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from vera_convert.errors import SurroundingsError
from vera_convert.files.file_names import clean_name
from vera_convert.hub.checksum import RepoFile

ADAPTER_CONFIG = "adapter_config.json"
"""The file whose folder is an adapter."""
ADAPTER_FILES = (ADAPTER_CONFIG, "adapter_model.safetensors")
"""Files that stand for the folder of their adapter."""


@dataclass(frozen=True, slots=True)
class Location:
    """Where a checkpoint lies: in a folder here, or in a repo on the Hub at one commit.

    Attributes:
        label: what messages call it; printable.
        folder: the folder with its files; None while they are on the Hub alone.
        repo_id: the repo on the Hub, if it is one.
        commit: the commit that is meant, forty hexadecimal digits.
        subfolder: the folder inside the repo, with `/`; empty for its root.
        revision: the branch, tag or commit that was asked for; None for the default branch.
        left_out: files of the repo that were not fetched with the others.
        listed: every file of the repo at the commit, if the Hub was asked for the commit.
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
        """The folder, of a location that is known to have been fetched."""
        assert self.folder is not None  # noqa: S101 -- the caller fetched it
        return self.folder


def not_cached(what: str) -> SurroundingsError:
    """Return what to raise for a file or repo that the cache lacks while nothing is fetched."""
    return SurroundingsError(
        f"{what} is not in the local cache, and nothing is fetched offline. "
        "Run again without --offline and HF_HUB_OFFLINE, or download it first with `hf download`."
    )


def on_hub(location: Location) -> tuple[str, str]:
    """Return the repo and the commit of a location that is no folder."""
    if location.repo_id is None or location.commit is None:
        raise ValueError("not a repo on the Hub")
    return location.repo_id, location.commit


def inside(location: Location, filename: str) -> PurePosixPath:
    """Return what the repo calls a file of a location; a name that leads out of it is refused."""
    return PurePosixPath(location.subfolder) / clean_name(filename, place=location.label)
