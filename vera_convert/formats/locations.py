"""Where a finding lies: inside of its adapter for people, and in which file for programs."""

from __future__ import annotations

import os
import re
from pathlib import PurePosixPath

from vera_convert.adapter.config import CONFIG_NAME
from vera_convert.adapter.tensors import WEIGHTS_NAME
from vera_convert.rules import Finding
from vera_convert.text import printable
from vera_convert.validation.validation import Checked

_INSIDE_A_FILE = re.compile(r" (?:header|tensor \".*)$")
_ABSOLUTE = re.compile(r"/|[A-Za-z]:/")


def _folder(path: str) -> PurePosixPath:
    return PurePosixPath(path.replace(os.sep, "/"))


def place_in(checked: Checked, finding: Finding) -> str:
    """Return where a finding lies, without the folder that is named above it anyway."""
    if checked.path is None:
        return finding.place
    folder = printable(str(_folder(checked.path))) + "/"
    if finding.place.replace("\\", "/").startswith(folder):
        return finding.place[len(folder) :]
    return finding.place


def file_name(checked: Checked, finding: Finding) -> str:
    """Return the file of the adapter's folder that a finding is best shown at, with ``/``."""
    place = place_in(checked, finding)
    named = next((name for name in (CONFIG_NAME, WEIGHTS_NAME) if place.startswith(name)), None)
    match finding.code[:2]:
        case "V0":
            return named or _other_file(checked, place) or _missing_file(finding)
        case "V2" | "V3" | "V4":
            return WEIGHTS_NAME
        case _:
            return CONFIG_NAME


def _other_file(checked: Checked, place: str) -> str | None:
    """Return the file that a place names; None if it is the folder, or leads out of it."""
    name = _INSIDE_A_FILE.sub("", place)
    folder = _folder(checked.path or checked.label).name
    parts = name.replace("\\", "/").split("/")
    if name == printable(folder) or {"", ".", ".."} & {*parts} or ":" in parts[0]:
        return None
    return "/".join(parts)


def _missing_file(finding: Finding) -> str:
    return CONFIG_NAME if CONFIG_NAME in finding.rule.title else WEIGHTS_NAME


def file_path(checked: Checked, finding: Finding) -> str | None:
    """Return the path of `file_name` as the folder was given; None on the Hub."""
    if checked.path is None:
        return None
    return str(_folder(checked.path) / file_name(checked, finding))


def file_uri(checked: Checked, finding: Finding) -> str:
    """Return the same as a URI, relative where the folder was."""
    from urllib.parse import quote  # programs alone want URIs

    path = file_path(checked, finding)
    if path is None:
        return f"hf://{quote(checked.label, safe='/@')}/{quote(file_name(checked, finding))}"
    quoted = quote(os.fsencode(path))  # the very bytes of a name, whatever they are
    if _ABSOLUTE.match(path):
        return f"file://{'' if path.startswith('/') else '/'}{quoted.replace('%3A', ':', 1)}"
    return quoted
