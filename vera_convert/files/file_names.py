"""File names from strangers: names that stay inside a folder, and names of pickles."""

from __future__ import annotations

import unicodedata
from pathlib import PurePosixPath

from vera_convert import rules
from vera_convert.errors import CheckpointError
from vera_convert.text import printable

CONFIG_NAME = "adapter_config.json"
"""The config of an adapter: a folder with this file is an adapter."""
WEIGHTS_NAME = "adapter_model.safetensors"
"""The weights of an adapter."""
PICKLED_NAME = "adapter_model.bin"
"""The weights of an adapter as a pickle."""
PICKLE_SUFFIXES = frozenset({".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"})
"""Endings of pickled weight files, which this package never opens."""


def is_pickle(name: str) -> bool:
    """Return whether a file name has the ending of a pickle."""
    return PurePosixPath(name).suffix.lower() in PICKLE_SUFFIXES


def clean_name(name: str, *, place: str) -> PurePosixPath:
    """Return a file name from an index, a config or a command line as a path inside a folder.

    Raises:
        CheckpointError: on some system the name leads out of the folder, or to a device.
    """
    parts = name.split("/")
    reason = ""
    if not name:
        reason = "is empty"
    elif any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
        reason = "has a control character"
    elif "\\" in name:
        reason = "has a backslash, which separates folders on Windows"
    elif ":" in name:
        reason = "has a colon, which names a drive or a stream on Windows"
    elif name.startswith("/"):
        reason = "is absolute"
    elif ".." in parts:
        reason = "has '..' in it"
    elif "" in parts or "." in parts:
        reason = "has an empty part or '.' in it"
    if reason:
        raise CheckpointError(
            rules.NAME_UNSAFE.in_file(place, f'the name "{printable(name)}" {reason}.')
        )
    return PurePosixPath(name)
