"""Set or remove members of a JSON text, and keep every other byte."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import NamedTuple


class _Member(NamedTuple):
    """One member of the top-level object, with positions in the text."""

    name: str
    start: int
    value_start: int
    value_end: int


def edited_object(
    text: bytes, changes: Mapping[str, object], remove: frozenset[str] = frozenset()
) -> bytes:
    """Return a JSON object's text with members set or removed, and every other byte kept."""
    for name in remove:
        text = removed_member(text, (name,))
    for name, value in changes.items():
        text = edited_member(text, (name,), value)
    return text


def edited_member(text: bytes, path: Sequence[str], value: object) -> bytes:
    """Return a JSON object's text with the member at `path` set, and every other byte kept.

    A new member is added at the end, in the style of the others.

    Raises:
        KeyError: an object on the path is missing.
    """
    return _edited(text, path, lambda content, name: _with(content, name, json.dumps(value)))


def removed_member(text: bytes, path: Sequence[str]) -> bytes:
    """Return a JSON object's text without the member at `path`, and every other byte kept.

    Raises:
        KeyError: an object on the path is missing.
    """
    return _edited(text, path, _without)


def _edited(text: bytes, path: Sequence[str], edit: Callable[[str, str], str]) -> bytes:
    """Edit the object around a member, with the text of the object and the member's name."""
    *through, name = path
    content = text.decode()
    start, end = 0, len(content)
    for outer in through:
        spans = {member.name: member for member in _members(content[start:end])}
        start, end = start + spans[outer].value_start, start + spans[outer].value_end
    return (content[:start] + edit(content[start:end], name) + content[end:]).encode()


def _with(content: str, name: str, value: str) -> str:
    members = _members(content)
    for member in members:
        if member.name == name:
            return content[: member.value_start] + value + content[member.value_end :]
    if not members:
        opening = content.index("{") + 1
        return f"{content[:opening]}{json.dumps(name)}: {value}{content[opening:]}"
    last = members[-1]
    before_last = content.rindex("{" if len(members) == 1 else ",", 0, last.start) + 1
    indent = content[before_last : last.start]
    new = f"{indent}{json.dumps(name)}: {value}"
    return f"{content[: last.value_end]},{new}{content[last.value_end :]}"


def _without(content: str, name: str) -> str:
    members = _members(content)
    for index, member in enumerate(members):
        if member.name != name:
            continue
        if index:
            return content[: members[index - 1].value_end] + content[member.value_end :]
        if len(members) > 1:
            return content[: member.start] + content[members[1].start :]
        return content[: member.start] + content[member.value_end :]
    return content


def _members(content: str) -> list[_Member]:
    """Return the spans of an object's members; the text is known to be valid JSON."""
    decoder = json.JSONDecoder()
    members = []
    at = _skip(content, content.index("{") + 1)
    while content[at] != "}":
        name, after_name = scanstring(content, at + 1, True)  # noqa: FBT003 -- C takes no keyword
        value_start = _skip(content, _skip(content, after_name) + 1)
        _, value_end = decoder.raw_decode(content, value_start)
        members.append(_Member(name, at, value_start, value_end))
        at = _skip(content, value_end)
        if content[at] == ",":
            at = _skip(content, at + 1)
    return members


def _skip(content: str, at: int) -> int:
    while content[at] in " \t\n\r":
        at += 1
    return at
