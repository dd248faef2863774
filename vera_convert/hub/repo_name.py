"""Parse the name of a repo on the Hub: ``org/name[@revision][/subfolder]``."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from vera_convert.errors import CheckpointError
from vera_convert.files.file_names import clean_name

SCHEME = "hf://"
_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_PAGES = ("tree", "blob", "resolve", "raw", "commit")
COMMIT = re.compile(r"[0-9a-f]{40}")

_PART = re.compile(r"\w(?:[\w.-]{0,94}\w)?", re.ASCII)
_REVISION = re.compile(r"(?!-)[^\s\x00-\x20\x7f~^:?*\[\\@/]+(?:/[^\s\x00-\x20\x7f~^:?*\[\\@/]+)*")
_SLASHED_REVISION = re.compile(r"refs/(?:pr/\d+|convert/[\w.-]+)(?=/|$)", re.ASCII)
_REPO_TYPES = frozenset(
    ("model", "dataset", "space", "kernel", "bucket", "datasets", "spaces", "kernels", "buckets")
)
"""First elements of an ``hf://`` address that name no model (or misspell ``models``)."""


@dataclass(frozen=True, slots=True)
class RepoName:
    """The parts of a well-formed repo name.

    Attributes:
        repo_id: ``org/name``, or a bare ``name``.
        revision: branch, tag, commit or ``refs/pr/N``; None for the default branch.
        subfolder: the folder inside the repo, with `/`; empty for the root.
    """

    repo_id: str
    revision: str | None = None
    subfolder: str = ""


def looks_like_path(text: str) -> bool:
    """Return whether `text` can only be a path, and so is never sent to the Hub."""
    return re.match(r"[./~]|[A-Za-z]:", text) is not None or "\\" in text


def is_repo_id(text: str) -> bool:
    """Return whether `text` is a ``name`` or ``org/name`` that the Hub allows."""
    parts = text.split("/")
    return (
        len(parts) <= 2
        and all(_PART.fullmatch(part) for part in parts)
        and "--" not in text
        and ".." not in text
        and not text.endswith(".git")
    )


def is_revision(text: str) -> bool:
    """Return whether `text` can be a branch, tag or commit in git."""
    return _REVISION.fullmatch(text) is not None and all(
        re.search(r"^\.|\.\.|\.$|\.lock$", part) is None for part in text.split("/")
    )


def parse_repo_name(text: str, *, bare: bool) -> RepoName:
    """Parse a repo's name.

    Args:
        text: ``org/name[@revision][/subfolder]``, with or without ``hf://`` or ``hf://models/``;
            or the address of a page, ``https://huggingface.co/org/name[/tree/revision[/subfolder]]``,
            also without ``https://``; or the address that git clones.
        bare: allow a ``name`` without an organization.

    Raises:
        ValueError: the name is malformed; the message says where.
    """
    address = _as_address(text)
    if address is not None:
        repo_id, revision, subfolder = _of_address(address)
    elif text.startswith(SCHEME):
        body = _without_type(text.removeprefix(SCHEME)).strip("/")
        repo_id, revision, subfolder = _split(body)
        # As in huggingface_hub, %2F stands for a slash in a branch.
        revision = unquote(revision) if revision else revision
    elif "://" in text:
        raise ValueError("an address of the Hub is written hf://org/name")
    else:
        repo_id, revision, subfolder = _split(text.removesuffix("/"))
    repo_id = repo_id.removesuffix(".git")  # the Hub allows no such name
    if not is_repo_id(repo_id) or ("/" not in repo_id and not bare):
        raise ValueError("the repo is not of the form org/name")
    if revision is not None and not is_revision(revision):
        raise ValueError("git allows no such revision as the text after @")
    if subfolder is not None:
        try:
            subfolder = str(clean_name(subfolder, place=subfolder))
        except CheckpointError:
            raise ValueError("the subfolder is not a clean relative name") from None
    return RepoName(repo_id, revision, subfolder or "")


def _as_address(text: str) -> str | None:
    """Return the web address that `text` stands for; None for any other text."""
    cloned = re.fullmatch(r"(?:ssh://)?git@([\w.-]+)[:/](.+)", text)
    if cloned is not None:
        return f"https://{cloned[1]}/{cloned[2]}"
    if text.startswith(tuple(f"{host}/" for host in _HOSTS)):  # no organization has this name
        return f"https://{text}"
    return text if re.match(r"https?://", text) else None


def _without_type(body: str) -> str:
    kind, slash, rest = body.partition("/")
    if kind in _REPO_TYPES:
        raise ValueError("only models are read: hf://org/name or hf://models/org/name")
    return rest if slash and kind == "models" else body


def _of_address(text: str) -> tuple[str, str | None, str | None]:
    """Parse the address of a repo's page: ``https://huggingface.co/org/name/tree/REV/sub``."""
    address = urlsplit(text)
    if address.hostname not in {*_HOSTS, urlsplit(os.environ.get("HF_ENDPOINT", "")).hostname}:
        raise ValueError("the address does not belong to the Hub")
    parts = _without_type(address.path.strip("/")).split("/")
    marks = [at for at in (1, 2) if len(parts) > at and parts[at] in _PAGES]
    if not marks:
        if len(parts) > 2:
            raise ValueError("the address names neither a repo nor a folder in a repo")
        return "/".join(parts), None, None
    repo, page, rest = parts[: marks[0]], parts[marks[0]], parts[marks[0] + 1 :]
    found = _SLASHED_REVISION.match("/".join(rest))
    length = found.group().count("/") + 1 if found else 1
    revision, inside = "/".join(rest[:length]), rest[length:]
    if page != "tree":  # the page of a file stands for the folder
        inside = inside[:-1]
    return "/".join(repo), unquote(revision) or None, unquote("/".join(inside)) or None


def _split(body: str) -> tuple[str, str | None, str | None]:
    """Split into repo id, revision and subfolder; a missing part is None."""
    before, at, after = body.partition("@")
    if not at or before.count("/") > 1:
        # An @ after the second slash belongs to the subfolder's name.
        organization, *rest = body.split("/", 2)
        return "/".join((organization, *rest[:1])), None, rest[1] if len(rest) > 1 else None
    slashed = _SLASHED_REVISION.match(after)
    if slashed is None:
        revision, slash, subfolder = after.partition("/")
    else:
        revision = slashed.group()
        slash, subfolder = after[slashed.end() :][:1], after[slashed.end() + 1 :]
    return before, revision, subfolder if slash else None
