"""Find the commit of a repo, list the files, open a file for range requests, or fetch files."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

from vera_convert import rules
from vera_convert.errors import CheckpointError, SurroundingsError
from vera_convert.files.file_names import (
    CONFIG_NAME,
    PICKLED_NAME,
    WEIGHTS_NAME,
    clean_name,
    is_training_state,
)
from vera_convert.files.reading import LocalFile, open_local
from vera_convert.files.walk import file_sizes
from vera_convert.hub.checksum import RepoFile
from vera_convert.hub.client import asking_for, endpoint, repo_info
from vera_convert.hub.download import (
    cache_of_repo,
    cached_commit,
    download,
    is_sound,
    remember_commit,
    snapshot_of,
)
from vera_convert.hub.header_cache import HeaderCache
from vera_convert.hub.location import HubAccess, Location, inside, not_cached, on_hub
from vera_convert.hub.range_file import RemoteFile
from vera_convert.hub.refusals import OutOfReachError
from vera_convert.hub.repo_name import RepoName
from vera_convert.text import printable

SIDE_FILE_LIMIT = 10_000_000
"""The most bytes of a fetched file other than an adapter's config and weights."""
TOKENIZER_LIMIT = 100_000_000
"""The most bytes of a fetched ``tokenizer.json``; large vocabularies take 11 to 35 million."""


def resolve(name: RepoName, access: HubAccess) -> Location:
    """Return the commit of a revision: from the Hub, or from the cache if the Hub is silent."""
    cached = cached_commit(name, access)
    if cached is not None and (access.is_offline or name.revision == cached):
        return _at(name, cached)
    if access.is_offline:
        raise not_cached(f"{name.repo_id}@{name.revision or 'main'}")
    try:
        found = repo_info(name.repo_id, name.revision, access)
    except OutOfReachError:
        if cached is None:
            raise
        return _at(name, cached)
    return _at(name, found.commit, found.files)


def resolve_base(name: RepoName, access: HubAccess) -> Location:
    """Return the cached commit of a revision if the cache has weights, else as `resolve`."""
    cached = cached_commit(name, access)
    if cached is not None and any(snapshot_of(name.repo_id, cached, access).rglob("*.safetensors")):
        return _at(name, cached)
    return resolve(name, access)


def _at(name: RepoName, commit: str, listed: Mapping[str, RepoFile] | None = None) -> Location:
    place = name.repo_id, commit, name.subfolder, name.revision
    found = Location("", None, *place, listed=listed)
    return replace(found, label=printable(found.address or ""))


def list_files(location: Location, access: HubAccess) -> dict[str, int]:
    """Return the sizes of a repo's files: see `lookup.list_files`."""
    repo_id, commit = on_hub(location)
    cached = snapshot_of(repo_id, commit, access) / location.subfolder
    if access.is_offline and not cached.is_dir():
        raise not_cached(location.label)
    if access.is_offline:
        return file_sizes(cached)
    try:
        files = _files_of(location, access)
    except OutOfReachError:
        if not cached.is_dir():
            raise
        return file_sizes(cached)
    listed = _below(location.subfolder, {name: file.size for name, file in files.items()})
    if location.subfolder and not listed:
        raise SurroundingsError(f"{location.label}: the repo has no such folder.")
    return listed


def _files_of(location: Location, access: HubAccess) -> Mapping[str, RepoFile]:
    """Return the Hub's list of all files of a repo, with at most one request."""
    if location.listed is not None:
        return location.listed
    repo_id, commit = on_hub(location)
    return _listed_at(repo_id, commit, access, endpoint())


@lru_cache(maxsize=64)
def _listed_at(
    repo_id: str, commit: str, access: HubAccess, _endpoint: str
) -> Mapping[str, RepoFile]:
    """Ask the Hub for the files of a commit; the result never changes."""
    return repo_info(repo_id, commit, access).files


def _below(subfolder: str, names: Mapping[str, int]) -> dict[str, int]:
    prefix = f"{subfolder}/" if subfolder else ""
    relative = {
        name.removeprefix(prefix): size for name, size in names.items() if name.startswith(prefix)
    }
    shown = (name for name in relative if not re.search(r"(^|/)\.", name))
    return {name: relative[name] for name in sorted(shown)}


def open_file(location: Location, filename: str, access: HubAccess) -> LocalFile | RemoteFile:
    """Open a file in the cache, else by range requests: see `lookup.open_file`."""
    repo_id, commit = on_hub(location)
    name = inside(location, filename)
    snapshot = snapshot_of(repo_id, commit, access)
    if (snapshot / name).exists():
        return open_local(snapshot / name, within=snapshot)
    place = f"{location.label}/{printable(filename)}"
    if access.is_offline:
        raise not_cached(place)
    return RemoteFile(
        place,
        asking_for(repo_id, str(name), commit=commit, place=place, access=access),
        listed=location.listed.get(str(name)) if location.listed is not None else None,
        kept=_header_cache(repo_id, commit, str(name), access),
    )


def kept_bytes(location: Location, key: str, access: HubAccess) -> HeaderCache:
    """Return the place where runs keep the bytes that `key` describes, of a repo at a commit."""
    repo_id, commit = on_hub(location)
    return _header_cache(repo_id, commit, f"\0{key}", access)


def _header_cache(repo_id: str, commit: str, name: str, access: HubAccess) -> HeaderCache:
    """Return the place of the first bytes of a file, separate for each Hub."""
    key = sha256(f"{endpoint()}\0{commit}\0{name}".encode("utf-8", "surrogatepass"))
    return HeaderCache(cache_of_repo(repo_id, access) / "vera-convert" / key.hexdigest())


def fetch_adapter(location: Location, access: HubAccess) -> Location:
    """Fetch an adapter: see `lookup.fetch_adapter`."""
    names = adapter_files(location, access)
    beside = {name: size for name, size in names.items() if name not in (CONFIG_NAME, WEIGHTS_NAME)}
    small = [
        name
        for name, size in beside.items()
        if 0 <= size <= _limit(name) and _is_clean(name) and not is_training_state(name)
    ]
    folder = _download(location, [CONFIG_NAME, WEIGHTS_NAME, *small], access)
    left_out = tuple(name for name in beside if name not in small)
    return replace(location, folder=folder, left_out=left_out)


def _limit(name: str) -> int:
    """Return the most bytes of a fetched file of this name."""
    return TOKENIZER_LIMIT if name == "tokenizer.json" else SIDE_FILE_LIMIT


def fetch_weights(location: Location, access: HubAccess) -> Location:
    """Fetch the config and the weights of an adapter."""
    adapter_files(location, access)
    return replace(location, folder=_download(location, [CONFIG_NAME, WEIGHTS_NAME], access))


def adapter_files(location: Location, access: HubAccess) -> dict[str, int]:
    """Return the sizes of an adapter's files on the Hub, without adapters in subfolders.

    Raises:
        CheckpointError: config or weights are missing.
        SurroundingsError: the Hub does not answer.
    """
    listed = list_files(location, access)
    others = tuple(
        name.removesuffix(CONFIG_NAME) for name in listed if name.endswith(f"/{CONFIG_NAME}")
    )
    names = {name: size for name, size in listed.items() if not name.startswith(others)}
    _require_adapter(location, names, others)
    return names


def _is_clean(name: str) -> bool:
    try:
        clean_name(name, place=name)
    except CheckpointError:
        return False
    return True


def _require_adapter(location: Location, names: Collection[str], others: Sequence[str]) -> None:
    place = location.label
    if CONFIG_NAME not in names:
        if others and WEIGHTS_NAME not in names:
            reason = f"{CONFIG_NAME} is missing; the folder {printable(others[0])} is an adapter."
            raise CheckpointError(rules.ADAPTER_BELOW.at(place, reason))
        raise CheckpointError(rules.CONFIG_MISSING.at(place, f"there is no {CONFIG_NAME}."))
    if WEIGHTS_NAME not in names and PICKLED_NAME in names:
        raise CheckpointError(rules.PICKLE_ONLY.at(place, f"there is {PICKLED_NAME} alone."))
    if WEIGHTS_NAME not in names:
        raise CheckpointError(rules.WEIGHTS_MISSING.at(place, f"there is no {WEIGHTS_NAME}."))


def fetch_base(location: Location, access: HubAccess, *, names: Collection[str]) -> Location:
    """Fetch files of a base: see `lookup.fetch_base`."""
    return replace(location, folder=_download(location, sorted(names), access))


def _download(location: Location, names: Sequence[str], access: HubAccess) -> Path:
    """Download files of one commit into the cache, and return the folder of the files."""
    repo_id, commit = on_hub(location)
    snapshot = snapshot_of(repo_id, commit, access)
    files = [inside(location, name) for name in names]
    absent = [name for name in files if not (snapshot / name).exists()]
    for name in files:
        if name not in absent and not is_sound(snapshot / name, cache_of_repo(repo_id, access)):
            place = printable(str((snapshot / name).resolve()))
            raise SurroundingsError(
                f"{place} in the Hub's cache is damaged: the Hub states another "
                "hash. Delete this file, and run the command again."
            )
    if absent and access.is_offline:
        raise not_cached(f"{repo_id}@{commit}/{printable(str(absent[0]))}")
    if absent:
        listed = _files_of(location, access)
        download(repo_id, commit, absent, listed=listed, access=access)
    if not access.is_offline:
        remember_commit(repo_id, location.revision or "main", commit, access)
    return snapshot / location.subfolder
