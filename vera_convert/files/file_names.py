"""File names: safe ones, and those of pickles, training runs and operating systems."""

from __future__ import annotations

import re
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
CARD_NAME = "README.md"
"""The model card of a model or an adapter."""
PICKLE_SUFFIXES = frozenset({".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"})
"""Endings of pickled weight files, which this package never opens."""
_TRAINING_STATE = re.compile(
    r"(adapter_model|training_args)\.bin"
    r"|(optimizer|scheduler|scaler)(_\d+)?\.(bin|pt|pth|safetensors)"
    r"|rng_state(_\d+)?\.(pt|pth)|random_states_\d+\.pkl"
    r"|.*_(optim|model)_states\.pt|.*\.distcp"
    r"|trainer_state\.json|trainer_log\.jsonl|events\.out\.tfevents\..*|latest|zero_to_fp32\.py"
)
"""Names of pickled weights, and of the states and logs of a training run."""
_TRAINING_FOLDERS = frozenset(("wandb", "mlruns", "lightning_logs"))
"""Folders into which training runs write their logs."""
_STRANGE = re.compile(
    r".*[:\uf03a](Zone\.Identifier|com\.dropbox\..*|mshield)|Thumbs\.db|desktop\.ini|.*\.pyc"
)
"""Names of files added to a folder by an operating system; U+F03A is WSL's colon."""
_STRANGE_FOLDERS = frozenset(("__MACOSX", "__pycache__"))


def is_pickle(name: str) -> bool:
    """Return whether a file name has the ending of a pickle."""
    return PurePosixPath(name).suffix.lower() in PICKLE_SUFFIXES


def is_training_state(name: str) -> bool:
    """Say whether a file comes from a training run and is never copied, by the relative path."""
    path = PurePosixPath(name)
    in_logs = not _TRAINING_FOLDERS.isdisjoint(path.parts[:-1])
    return in_logs or _TRAINING_STATE.fullmatch(path.name) is not None


def is_strange(name: str) -> bool:
    """Say whether an operating system or Python added a file, by the relative path."""
    path = PurePosixPath(name)
    in_folder = not _STRANGE_FOLDERS.isdisjoint(path.parts[:-1])
    return in_folder or _STRANGE.fullmatch(path.name) is not None


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
