"""From what a user wrote to where it lies: a folder here, or a repo on the Hub at one commit.

With ``--offline`` or HF_HUB_OFFLINE nothing here opens a socket: what the local cache lacks cannot
be had.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Literal

from vera_convert.errors import CheckpointError, SurroundingsError, UsageError
from vera_convert.files.reading import LocalFile, clean_name, open_local, printable, unreadable
from vera_convert.hub.beginnings import kept_beginning
from vera_convert.hub.cache import cached_commit, remember_commit, snapshot_of
from vera_convert.hub.calls import HubAccess, asking_for, endpoint, repo_info
from vera_convert.hub.checksum import RepoFile
from vera_convert.hub.downloading import download
from vera_convert.hub.refusals import OutOfReachError
from vera_convert.hub.remotefile import RemoteFile
from vera_convert.hub.reponame import (
    SCHEME,
    RepoName,
    is_repo_id,
    is_revision,
    looks_like_path,
    parse_repo_name,
)
from vera_convert.rules import ADAPTER_BELOW, CONFIG_MISSING, PICKLE_ONLY, WEIGHTS_MISSING

__all__ = (
    "AmbiguousBaseError",
    "HubAccess",
    "Location",
    "NamedBase",
    "adapter_files",
    "base_from_config",
    "fetch_adapter",
    "fetch_base",
    "fetch_weights",
    "list_files",
    "locate",
    "open_remote",
)

_DEEPEST = 100
SIDE_FILE_LIMIT = 10_000_000
"""The most bytes of a file beside an adapter's weights that is fetched from the Hub."""
_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"


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


@dataclass(frozen=True, slots=True)
class NamedBase:
    """The base that an adapter's config names.

    Attributes:
        location: where it lies; None if the name is not followed.
        reason: why the name is not followed; or, where it is a folder here, why that is read.
    """

    location: Location | None
    reason: str = ""


class AmbiguousBaseError(UsageError):
    """The base's name in a config is a model here and a repo on the Hub."""


# --- what was written ----------------------------------------------------------------------------


def locate(
    text: str,
    *,
    kind: Literal["adapter", "base"],
    access: HubAccess,
    revision: str | None = None,
) -> Location:
    """Find what an argument of the command line means; a path that exists wins.

    Args:
        text: a folder, or ``org/name[@revision][/subfolder]``, or that after ``hf://``.
        kind: only a base may be a repo without an organisation, such as ``gpt2``.
        access: how the Hub is reached.
        revision: branch, tag or commit, from an option of its own.

    Returns:
        A folder; or a repo with its commit resolved and nothing fetched yet.

    Raises:
        UsageError: malformed, a file, or a revision of something that has none.
        SurroundingsError: no such folder, repo or revision; gated, offline or no network.
    """
    folder = _existing_folder(text)
    if folder is not None:
        if revision is not None:
            raise UsageError(f"{printable(text)} is a folder here, so it has no revision.")
        return Location(printable(text), folder)
    bare = re.search("[/@]", text) is None
    if looks_like_path(text) or (bare and kind == "adapter"):
        hint = " A repo on the Hub is written org/name." if bare else ""
        raise SurroundingsError(f"there is no folder {printable(text)}.{hint}")
    try:
        name = parse_repo_name(text, bare=kind == "base")
    except ValueError as error:
        raise UsageError(
            f"{printable(text)} is no folder here, nor can it be a repo on the Hub: {error}. "
            "A repo is written org/name, org/name@revision or org/name@revision/subfolder."
        ) from None
    try:
        return _resolve(_with_revision(name, revision), access)
    except SurroundingsError as error:
        error.args = (f"there is no folder {printable(text)}, and {error}",)
        raise


def base_from_config(name: str | None, revision: str | None, access: HubAccess) -> NamedBase:
    """Find the base that an adapter's config names, in the cache first.

    A text that can only be a path is never followed. A name such as ``models/llama`` can be a repo
    and a folder below the working directory. The folder counts only if it holds a model; then it is
    read if the Hub's repo cannot be had, and the result says so.

    Raises:
        AmbiguousBaseError: a model lies here under this name and on the Hub; ``--base`` decides.
        SurroundingsError: no such repo or revision; gated, offline or no network.
    """
    if not name:
        return NamedBase(None, "the adapter's config names no base")
    if not is_repo_id(name):
        return NamedBase(None, f"the config calls the base {printable(name)}, which is no repo")
    if revision is not None and not is_revision(revision):
        return NamedBase(None, f"{printable(revision)} is no revision of the base {name}")
    if not _holds_model(Path(name)):
        return NamedBase(_named_repo(RepoName(name, revision), access))
    try:
        _named_repo(RepoName(name, revision), access)
    except SurroundingsError:
        reason = (
            f"the adapter's config calls the base {name}. A model lies in the folder {name} here, "
            "and no repo of that name could be had from the Hub."
        )
        return NamedBase(Location(printable(name), Path(name)), reason)
    raise AmbiguousBaseError(
        f"the adapter's config calls the base {name}, which is a model in a folder here and a repo "
        f"on the Hub: say which with --base ./{name} or --base {SCHEME}{name}."
    )


def _named_repo(wanted: RepoName, access: HubAccess) -> Location:
    """Find the repo of a base, in the cache first."""
    cached = cached_commit(wanted, access)
    if cached is not None and any(
        snapshot_of(wanted.repo_id, cached, access).rglob("*.safetensors")
    ):
        return _at(wanted, cached)
    return _resolve(wanted, access)


def _holds_model(folder: Path) -> bool:
    """Return whether a folder here holds a model: its config, or weights that are no adapter's."""
    try:
        names = {entry.name for entry in os.scandir(folder)}
    except OSError:
        return False
    weights = (".safetensors", ".bin", ".safetensors.index.json")
    return not names.isdisjoint(("config.json", "model_index.json")) or (
        _CONFIG not in names and any(name.endswith(weights) for name in names)
    )


def _existing_folder(text: str) -> Path | None:
    """Return the folder that `text` is the path of, None if nothing is there."""
    if not text or "\0" in text:
        raise UsageError("a folder or a repo has to be named: this is empty or has a NUL in it.")
    if text.startswith(SCHEME):
        return None
    for path in dict.fromkeys((text, os.path.expanduser(text))):  # noqa: PTH111 - Path's can raise
        try:
            found = os.stat(path)  # noqa: PTH116 - as above
        except (FileNotFoundError, NotADirectoryError, ValueError):
            continue
        except OSError as error:
            # No file can have such a name, so it may still be a repo.
            if error.errno in (errno.ENAMETOOLONG, errno.EINVAL):
                continue
            raise unreadable(printable(text), error) from error
        if not stat.S_ISDIR(found.st_mode):
            raise UsageError(f"{printable(text)} is no folder; pass the folder that it lies in.")
        return Path(path)
    return None


def _with_revision(name: RepoName, revision: str | None) -> RepoName:
    if revision is None:
        return name
    if not is_revision(revision):
        raise UsageError(f"{printable(revision)} is no revision that git allows.")
    if name.revision not in (None, revision):
        raise UsageError(
            f"two revisions of {name.repo_id} are asked for: {name.revision} after the @ and "
            f"{printable(revision)} by the option."
        )
    return replace(name, revision=revision)


# --- commits and the cache -----------------------------------------------------------------------


def _at(name: RepoName, commit: str, listed: Mapping[str, RepoFile] | None = None) -> Location:
    label = "/".join(filter(None, (f"{name.repo_id}@{commit}", name.subfolder)))
    return Location(
        printable(label),
        None,
        name.repo_id,
        commit,
        name.subfolder,
        name.revision,
        listed=listed,
    )


def _resolve(name: RepoName, access: HubAccess) -> Location:
    """Find the commit of a revision: from the Hub, or the cache if that cannot be asked."""
    cached = cached_commit(name, access)
    if cached is not None and (access.is_offline or name.revision == cached):
        return _at(name, cached)
    if access.is_offline:
        raise _not_cached(f"{name.repo_id}@{name.revision or 'main'}")
    try:
        found = repo_info(name.repo_id, name.revision, access)
    except OutOfReachError:
        if cached is None:
            raise
        return _at(name, cached)
    return _at(name, found.commit, found.files)


def _not_cached(what: str) -> SurroundingsError:
    return SurroundingsError(
        f"{what} is not in the local cache, and nothing is fetched offline. "
        "Run again without --offline and HF_HUB_OFFLINE, or download it first with `hf download`."
    )


def _on_hub(location: Location) -> tuple[str, str]:
    if location.repo_id is None or location.commit is None:
        raise ValueError("not a repo on the Hub")
    return location.repo_id, location.commit


def _inside(location: Location, filename: str) -> PurePosixPath:
    return PurePosixPath(location.subfolder) / clean_name(filename, place=location.label)


# --- files ---------------------------------------------------------------------------------------


def list_files(location: Location, access: HubAccess) -> dict[str, int]:
    """Return the files of a location with their sizes, hidden ones left out, in sorted order.

    Names are relative to the location, with `/`; a size that the Hub does not tell is -1. Where the
    Hub cannot be asked, what the cache holds of the commit is listed.

    Raises:
        SurroundingsError: the folder is not there or cannot be read; gated, no network.
    """
    if location.folder is not None:
        return dict(_walk(location.folder))
    repo_id, commit = _on_hub(location)
    cached = snapshot_of(repo_id, commit, access) / location.subfolder
    if access.is_offline and not cached.is_dir():
        raise _not_cached(location.label)
    if access.is_offline:
        return dict(_walk(cached))
    try:
        files = _files_of(location, access)
    except OutOfReachError:
        if not cached.is_dir():
            raise
        return dict(_walk(cached))
    listed = _below(location.subfolder, {name: file.size for name, file in files.items()})
    if location.subfolder and not listed:
        raise SurroundingsError(f"{location.label}: the repo has no such folder.")
    return listed


def _files_of(location: Location, access: HubAccess) -> Mapping[str, RepoFile]:
    """Return the files of a whole repo as the Hub lists them, asking it once at most."""
    if location.listed is not None:
        return location.listed
    repo_id, commit = _on_hub(location)
    return _listed_at(repo_id, commit, access, endpoint())


@lru_cache(maxsize=64)
def _listed_at(
    repo_id: str, commit: str, access: HubAccess, _endpoint: str
) -> Mapping[str, RepoFile]:
    """Ask the Hub for the files of a commit, which never change."""
    return repo_info(repo_id, commit, access).files


def _below(subfolder: str, names: Mapping[str, int]) -> dict[str, int]:
    prefix = f"{subfolder}/" if subfolder else ""
    relative = {
        name.removeprefix(prefix): size for name, size in names.items() if name.startswith(prefix)
    }
    shown = (name for name in relative if not re.search(r"(^|/)\.", name))
    return {name: relative[name] for name in sorted(shown)}


def _walk(folder: Path, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Yield the regular files below a folder, links to files included but no linked folder."""
    if prefix.count("/") > _DEEPEST:
        raise SurroundingsError(f"{printable(str(folder))}: folders lie too deep in each other.")
    try:
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(Path(entry.path), f"{prefix}{entry.name}/")
            elif _is_file(entry):
                yield prefix + entry.name, entry.stat().st_size
    except OSError as error:
        raise unreadable(printable(str(folder)), error) from error


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link in a circle leads nowhere, as one to nothing does
            return False
        raise


def open_remote(location: Location, filename: str, access: HubAccess) -> LocalFile | RemoteFile:
    """Open a file of a repo to be read by position: from the cache, else by range requests.

    Args:
        location: a repo at its commit.
        filename: relative to the location, with `/`.
        access: how the Hub is reached.

    Raises:
        CheckpointError: the name leads out of the repo.
        SurroundingsError: it cannot be had.
    """
    repo_id, commit = _on_hub(location)
    name = _inside(location, filename)
    snapshot = snapshot_of(repo_id, commit, access)
    if (snapshot / name).exists():
        return open_local(snapshot / name, within=snapshot)
    place = f"{location.label}/{printable(filename)}"
    if access.is_offline:
        raise _not_cached(place)
    return RemoteFile(
        place,
        asking_for(repo_id, str(name), commit=commit, place=place, access=access),
        listed=location.listed.get(str(name)) if location.listed is not None else None,
        keeper=kept_beginning(repo_id, commit, str(name), access),
    )


def fetch_adapter(
    location: Location, access: HubAccess, *, is_training_state: Callable[[str], bool]
) -> Location:
    """Fetch an adapter: its config, its weights of any size, and small files beside them.

    Left out, and named in the result: pickled weights, training states, files of more than 10 MB,
    and names that not every system allows. Hidden files and subfolders that are adapters themselves
    are passed over in silence.

    Args:
        location: a folder, returned as it is, or a repo.
        access: how the Hub is reached.
        is_training_state: whether a file is never copied, by its relative path.

    Raises:
        CheckpointError: config or weights are not there.
        SurroundingsError: a file cannot be had.
    """
    if location.folder is not None:
        return location
    names = adapter_files(location, access)
    beside = {name: size for name, size in names.items() if name not in (_CONFIG, _WEIGHTS)}
    small = [
        name
        for name, size in beside.items()
        if 0 <= size <= SIDE_FILE_LIMIT and _is_clean(name) and not is_training_state(name)
    ]
    folder = _download(location, [_CONFIG, _WEIGHTS, *small], access)
    left_out = tuple(name for name in beside if name not in small)
    return replace(location, folder=folder, left_out=left_out)


def fetch_weights(location: Location, access: HubAccess) -> Location:
    """Fetch an adapter's config and weights alone; otherwise as `fetch_adapter`."""
    if location.folder is not None:
        return location
    adapter_files(location, access)
    return replace(location, folder=_download(location, [_CONFIG, _WEIGHTS], access))


def adapter_files(location: Location, access: HubAccess) -> dict[str, int]:
    """Return the sizes of an adapter's files on the Hub, those of adapters below it left out.

    Raises:
        CheckpointError: config or weights are not there.
        SurroundingsError: the Hub cannot be asked.
    """
    listed = list_files(location, access)
    others = tuple(name.removesuffix(_CONFIG) for name in listed if name.endswith(f"/{_CONFIG}"))
    names = {name: size for name, size in listed.items() if not name.startswith(others)}
    _demand_adapter(location, names, others)
    return names


def _is_clean(name: str) -> bool:
    try:
        clean_name(name, place=name)
    except CheckpointError:
        return False
    return True


def _demand_adapter(location: Location, names: Collection[str], others: Sequence[str]) -> None:
    place = location.label
    if _CONFIG not in names:
        if others and _WEIGHTS not in names:
            reason = f"its folder {printable(others[0])} is an adapter, it has none of its own."
            raise CheckpointError(ADAPTER_BELOW.at(place, reason))
        raise CheckpointError(CONFIG_MISSING.at(place, f"there is no {_CONFIG}."))
    if _WEIGHTS not in names and _PICKLED in names:
        raise CheckpointError(PICKLE_ONLY.at(place, f"there is {_PICKLED} alone."))
    if _WEIGHTS not in names:
        raise CheckpointError(WEIGHTS_MISSING.at(place, f"there is no {_WEIGHTS}."))


def fetch_base(location: Location, access: HubAccess, *, names: Collection[str]) -> Location:
    """Fetch files of a base through the cache.

    Args:
        location: a folder, returned as it is, or a repo.
        access: how the Hub is reached.
        names: the files that are needed, as `list_files` names them; at least one.

    Raises:
        SurroundingsError: a file cannot be had.
    """
    if location.folder is not None:
        return location
    return replace(location, folder=_download(location, sorted(names), access))


def _download(location: Location, names: Sequence[str], access: HubAccess) -> Path:
    """Bring files of one commit into the cache and return the folder that holds them all."""
    repo_id, commit = _on_hub(location)
    snapshot = snapshot_of(repo_id, commit, access)
    files = [_inside(location, name) for name in names]
    absent = [name for name in files if not (snapshot / name).exists()]
    if absent and access.is_offline:
        raise _not_cached(f"{repo_id}@{commit}/{printable(str(absent[0]))}")
    if absent:
        listed = _files_of(location, access)
        download(repo_id, commit, absent, listed=listed, access=access)
    if not access.is_offline:
        remember_commit(repo_id, location.revision or "main", commit, access)
    return snapshot / location.subfolder
