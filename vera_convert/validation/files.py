"""What lies in an adapter's folder beside its config and weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vera_convert.adapter.config import CONFIG_NAME
from vera_convert.adapter.folder import side_files
from vera_convert.adapter.tensors import WEIGHTS_NAME
from vera_convert.files.reading import printable
from vera_convert.rules import LINK_NOT_CARRIED, TRAINING_STATE, Finding


def folder_findings(folder: Path) -> Iterator[Finding]:
    """Yield what is wrong with the files beside an adapter.

    Raises:
        SurroundingsError: a subfolder cannot be listed.
    """
    place = printable(folder.name or str(folder))
    sides = side_files(folder)
    for name in sides.outside:
        if name in (CONFIG_NAME, WEIGHTS_NAME):
            continue  # told for itself
        yield LINK_NOT_CARRIED.at(printable(name), "it leads out of the folder, or nowhere.")
    states = [name for name in sides.left_out if not name.startswith("adapter_model.")]
    if states:
        more = f" and {len(states) - 3} more" if states[3:] else ""
        shown = ", ".join(map(printable, states[:3]))
        yield TRAINING_STATE.at(place, f"there are {shown}{more}.")
