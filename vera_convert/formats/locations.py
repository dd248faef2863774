"""Name the file that shows a finding, as a path and as a URI."""

from __future__ import annotations

import os
import re
from pathlib import PurePosixPath

from vera_convert.files.file_names import CONFIG_NAME, WEIGHTS_NAME
from vera_convert.rules import Finding
from vera_convert.validation.result import Checked

_ABSOLUTE = re.compile(r"/|[A-Za-z]:/")


def file_name(finding: Finding) -> str:
    """Return the file of the adapter's folder that shows a finding best, with ``/``."""
    named = _inside(finding.file) if finding.file is not None else None
    if named is not None:
        return named
    match finding.code[:2]:
        case "V0":
            return CONFIG_NAME if CONFIG_NAME in finding.rule.title else WEIGHTS_NAME
        case "V2" | "V3" | "V4":
            return WEIGHTS_NAME
        case _:
            return CONFIG_NAME


def _inside(file: str) -> str | None:
    """Return a file's name with ``/``; None if the name leads out of the adapter's folder."""
    parts = file.replace("\\", "/").split("/")
    return None if {"", ".", ".."} & {*parts} or ":" in parts[0] else "/".join(parts)


def file_path(checked: Checked, finding: Finding) -> str | None:
    """Return the path of `file_name` as the folder was given; None on the Hub."""
    if checked.path is None:
        return None
    return str(PurePosixPath(checked.path.replace(os.sep, "/")) / file_name(finding))


def file_uri(checked: Checked, finding: Finding) -> str:
    """Return the same as a URI, relative where the folder was."""
    from urllib.parse import quote  # programs alone want URIs

    path = file_path(checked, finding)
    if path is None:
        return f"hf://{quote(checked.label, safe='/@')}/{quote(file_name(finding))}"
    quoted = quote(os.fsencode(path))  # the very bytes of a name, whatever they are
    if _ABSOLUTE.match(path):
        return f"file://{'' if path.startswith('/') else '/'}{quoted.replace('%3A', ':', 1)}"
    return quoted
