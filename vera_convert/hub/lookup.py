"""Find the location that a user names: a folder here, or a repo on the Hub at one commit.

The rest of the package asks this module for locations and files. Each further way to use the Hub,
such as pushing a result, gets a separate module beside `download`, built on the requests of
`client`.

With ``--offline`` or HF_HUB_OFFLINE the local cache alone is read. A folder needs nothing of the
Hub: only a repo loads `repos`, which takes a part of the time of a start.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vera_convert.errors import ParameterError, SurroundingsError, UsageError
from vera_convert.files.file_names import CONFIG_NAME, WEIGHTS_NAME
from vera_convert.files.reading import LocalFile, open_local, unreadable
from vera_convert.files.walk import file_sizes
from vera_convert.hub.location import HubAccess, Location, hub_access_of
from vera_convert.hub.repo_name import (
    SCHEME,
    RepoName,
    is_repo_id,
    is_revision,
    looks_like_path,
    parse_repo_name,
)
from vera_convert.text import printable

if TYPE_CHECKING:
    from vera_convert.hub.range_file import RemoteFile

__all__ = (
    "AmbiguousBaseError",
    "HubAccess",
    "Location",
    "NamedBase",
    "base_from_config",
    "fetch_adapter",
    "fetch_base",
    "fetch_weights",
    "hub_access_of",
    "list_files",
    "locate",
    "open_file",
)


_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".7z", ".rar")


@dataclass(frozen=True, slots=True)
class NamedBase:
    """The base that an adapter's config names.

    Attributes:
        location: the base; None if the name leads to no usable base.
        reason: why `location` is None; or why the base is a folder here.
    """

    location: Location | None
    reason: str = ""


class AmbiguousBaseError(UsageError):
    """The name of a base is both a model here and a repo on the Hub."""


# --- names of adapters and bases -----------------------------------------------------------------


def locate(
    text: str,
    *,
    kind: Literal["adapter", "base"],
    access: HubAccess,
    revision: str | None = None,
) -> Location:
    """Find the folder or repo that an argument names; an existing path wins.

    Args:
        text: a folder, or ``org/name[@revision][/subfolder]``, also after ``hf://``.
        kind: a base may lack the organization, such as ``gpt2``; an adapter must have one.
        access: the access to the Hub.
        revision: branch, tag or commit, from a separate option.

    Returns:
        A folder; or a repo at a resolved commit, whose files are still to fetch.

    Raises:
        UsageError: the text is malformed or names a file, or a revision is given for a folder.
        SurroundingsError: the folder, repo or revision is missing; gated, offline or no network.
    """
    folder = _existing_folder(text, files=(CONFIG_NAME, WEIGHTS_NAME) if kind == "adapter" else ())
    if folder is not None:
        if revision is not None:
            option = "revision" if kind == "adapter" else "base_revision"
            reason = f"must be left out, because {printable(text)} is a folder, which has no "
            raise ParameterError(option, f"{reason}revision.")
        return Location(printable(text), folder)
    bare = re.search("[/@]", text) is None
    if looks_like_path(text) or (bare and kind == "adapter"):
        hint = " A repo on the Hub is written org/name." if bare else ""
        slashed = text.replace("\\", "/")
        if "\\" in text and is_repo_id(slashed):
            hint = f" A repo on the Hub is written with a slash: {slashed}."
        raise SurroundingsError(f"there is no folder {printable(text)}.{hint}")
    try:
        name = parse_repo_name(text, bare=kind == "base")
    except ValueError as error:
        raise UsageError(
            f"{printable(text)} is neither a folder here nor a repo on the Hub: {error}. "
            "A repo is written org/name, org/name@revision or org/name@revision/subfolder."
        ) from None
    from vera_convert.hub.repos import resolve

    try:
        return resolve(_with_revision(name, revision), access)
    except SurroundingsError as error:
        if "://" not in text:
            error.args = (f"there is no folder {printable(text)}, and {error}",)
        raise


def base_from_config(name: str | None, revision: str | None, access: HubAccess) -> NamedBase:
    """Find the base that an adapter's config names, in the cache first.

    A text that can only be a path is ignored. A name such as ``models/llama`` can be a repo
    and a folder below the working directory. The folder is the base only if the folder holds a
    model and the Hub (offline: the cache) has no such repo; the result then says so. A silent
    Hub decides nothing.

    Raises:
        AmbiguousBaseError: a model lies here under this name and on the Hub; ``--base`` decides.
        SurroundingsError: the repo or revision is missing; gated, offline or no network.
    """
    if not name:
        return NamedBase(None, "the adapter's config names no base")
    if not is_repo_id(name):
        return NamedBase(
            None, f"the config calls the base {printable(name)}, which is not a repo on the Hub"
        )
    if revision is not None and not is_revision(revision):
        return NamedBase(None, f"{printable(revision)} is no revision of the base {name}")
    from vera_convert.hub.refusals import Refusal, RefusedError
    from vera_convert.hub.repos import resolve_base

    if not _holds_model(Path(name)):
        return NamedBase(resolve_base(RepoName(name, revision), access))
    try:
        resolve_base(RepoName(name, revision), access)
    except SurroundingsError as error:
        refusal = error.refusal if isinstance(error, RefusedError) else None
        if access.is_offline or refusal in (Refusal.MISSING, Refusal.PRIVATE):
            lacks = "the Hub's cache holds" if access.is_offline else "the Hub shows this account"
            reason = (
                f"the adapter's config calls the base {name}. A model lies in the folder {name} "
                f"here, and {lacks} no repo of that name."
            )
            return NamedBase(Location(printable(name), Path(name)), reason)
        if refusal not in (Refusal.GATED, Refusal.DISABLED):
            remedy = (
                f"A model lies in the folder {name} here; if it is the base, give --base ./{name}."
            )
            error.args, error.reason = (f"{error} {remedy}",), f"{error.reason} {remedy}"
            raise
    raise AmbiguousBaseError(
        f"the adapter's config calls the base {name}, which is a model in a folder here and a repo "
        f"on the Hub: say which with --base ./{name} or --base {SCHEME}{name}."
    )


def _holds_model(folder: Path) -> bool:
    """Return whether a folder holds a model: a config, or weights other than an adapter's."""
    try:
        names = {entry.name for entry in os.scandir(folder)}
    except OSError:
        return False
    weights = (".safetensors", ".bin", ".safetensors.index.json")
    return not names.isdisjoint(("config.json", "model_index.json")) or (
        CONFIG_NAME not in names and any(name.endswith(weights) for name in names)
    )


def _existing_folder(text: str, *, files: Collection[str]) -> Path | None:
    """Return the folder at the path `text`; None if there is no folder.

    Args:
        text: perhaps a path.
        files: names of files that stand for the file's folder.
    """
    if text.startswith(SCHEME):
        return None
    for path in dict.fromkeys((text, os.path.expanduser(text))):  # noqa: PTH111 - Path's can raise
        try:
            found = os.stat(path)  # noqa: PTH116 - as above
        except (FileNotFoundError, NotADirectoryError, ValueError):
            continue
        except OSError as error:
            # No file can have such a name, but a repo can.
            if error.errno in (errno.ENAMETOOLONG, errno.EINVAL):
                continue
            raise unreadable(printable(text), error) from error
        if stat.S_ISREG(found.st_mode) and Path(path).name in files:
            return Path(path).parent
        if not stat.S_ISDIR(found.st_mode):
            shown = printable(text)
            if text.endswith(_ARCHIVES):
                raise UsageError(f"{shown} is an archive. Unpack the archive, and pass the folder.")
            raise UsageError(f"{shown} is a file. Pass the folder that holds the file.")
        return Path(path)
    return None


def _with_revision(name: RepoName, revision: str | None) -> RepoName:
    if revision is None:
        return name
    if not is_revision(revision):
        raise UsageError(f"{printable(revision)} is an impossible name of a revision in git.")
    if name.revision not in (None, revision):
        raise UsageError(
            f"two revisions of {name.repo_id} are asked for: {name.revision} after the @ and "
            f"{printable(revision)} by the option. Give one of the two."
        )
    return replace(name, revision=revision)


# --- files of a location -------------------------------------------------------------------------


def list_files(location: Location, access: HubAccess) -> dict[str, int]:
    """Return the sizes of a location's files by name, in sorted order, without hidden files.

    Names are relative to the location, with `/`. An unstated size is -1. If the
    Hub does not answer, the result lists the cached files of the commit.

    Raises:
        SurroundingsError: the folder is missing or unreadable; the repo is gated; no network.
    """
    if location.folder is not None:
        return file_sizes(location.folder)
    from vera_convert.hub import repos

    return repos.list_files(location, access)


def open_file(location: Location, filename: str, access: HubAccess) -> LocalFile | RemoteFile:
    """Open a file for reading by position: in a folder or in the cache, else by range requests.

    Args:
        location: a folder, or a repo at a commit.
        filename: the path relative to the location, with `/`.
        access: the access to the Hub.

    Raises:
        CheckpointError: the name leads out of the repo.
        SurroundingsError: the file is missing or unreadable.
    """
    if location.folder is not None:
        return open_local(location.folder / filename, within=location.folder)
    from vera_convert.hub import repos

    return repos.open_file(location, filename, access)


def fetch_adapter(location: Location, access: HubAccess) -> Location:
    """Fetch an adapter: the config, the weights of any size, and small other files.

    The result names the omitted files: pickled weights, training states, files of more than 10 MB
    (a tokenizer of more than 100 MB), and names that some systems forbid. Hidden files
    and subfolders that are adapters are ignored.

    Args:
        location: a folder, which is returned unchanged, or a repo.
        access: the access to the Hub.

    Raises:
        CheckpointError: config or weights are missing.
        SurroundingsError: a file is missing, or the download fails.
    """
    if location.folder is not None:
        return location
    from vera_convert.hub import repos

    return repos.fetch_adapter(location, access)


def fetch_weights(location: Location, access: HubAccess) -> Location:
    """Fetch only the config and weights of an adapter; otherwise like `fetch_adapter`."""
    if location.folder is not None:
        return location
    from vera_convert.hub import repos

    return repos.fetch_weights(location, access)


def fetch_base(location: Location, access: HubAccess, *, names: Collection[str]) -> Location:
    """Fetch files of a base through the cache.

    Args:
        location: a folder, which is returned unchanged, or a repo.
        access: the access to the Hub.
        names: the files to fetch, named as by `list_files`; at least one.

    Raises:
        SurroundingsError: a file is missing, or the download fails.
    """
    if location.folder is not None:
        return location
    from vera_convert.hub import repos

    return repos.fetch_base(location, access, names=names)
