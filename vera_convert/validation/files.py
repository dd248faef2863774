"""What lies in an adapter's folder beside its config and weights."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path, PurePosixPath

from vera_convert.adapter.config import CONFIG_NAME
from vera_convert.adapter.folder import is_training_state, side_files
from vera_convert.adapter.tensors import WEIGHTS_NAME
from vera_convert.files.reading import is_pickle, printable
from vera_convert.rules import BOTH_KINDS, LINK_NOT_CARRIED, TRAINING_STATE, Finding


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
    yield from _training_states(sides.left_out, place)


def names_findings(names: Collection[str], *, place: str) -> Iterator[Finding]:
    """Yield what the names of a repo's files tell, relative to the adapter, with ``/``."""
    pickled = sorted(
        name for name in names if name.startswith("adapter_model.") and is_pickle(name)
    )
    if pickled:
        yield BOTH_KINDS.at(place, f"there is {printable(min(pickled))}, which is not used.")
    states = [name for name in names if is_training_state(PurePosixPath(name).name)]
    yield from _training_states(states, place)


def _training_states(names: Iterable[str], place: str) -> Iterator[Finding]:
    states = [name for name in names if not name.startswith("adapter_model.")]
    if states:
        more = f" and {len(states) - 3} more" if states[3:] else ""
        shown = ", ".join(map(printable, states[:3]))
        are = "are" if states[1:] else "is"
        yield TRAINING_STATE.at(place, f"there {are} {shown}{more}.")
