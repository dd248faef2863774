"""Check the other files in an adapter's folder."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from vera_convert import rules
from vera_convert.adapter.folder import is_left_out, module_folders, side_files
from vera_convert.files.file_names import CONFIG_NAME, WEIGHTS_NAME, is_pickle, is_training_state
from vera_convert.rules import Finding
from vera_convert.text import printable, there_are

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz")


def folder_findings(folder: Path) -> Iterator[Finding]:
    """Yield findings for the other files in an adapter's folder.

    Raises:
        SurroundingsError: a subfolder cannot be listed.
    """
    place = printable(folder.name or str(folder))
    sides = side_files(folder)
    for name in sides.outside:
        if name in (CONFIG_NAME, WEIGHTS_NAME):
            continue  # reported by the reader
        yield rules.LINK_NOT_CARRIED.in_file(
            printable(name), "the link leads out of the folder, or to a missing file."
        )
    yield from _left_out(sides.left_out, place)
    yield from _unread_weights(sides.copied, place)


def names_findings(names: Collection[str], *, place: str) -> Iterator[Finding]:
    """Yield findings for the names of a repo's files, relative to the adapter, with ``/``."""
    pickled = sorted(
        name for name in names if name.startswith("adapter_model.") and is_pickle(name)
    )
    if pickled:
        yield rules.BOTH_KINDS.at(place, f"there is {printable(min(pickled))}, which is not used.")
    beside = frozenset(names) - {CONFIG_NAME, WEIGHTS_NAME}
    modules = module_folders(beside)
    left_out = [name for name in sorted(beside) if is_left_out(name, modules)]
    yield from _left_out(left_out, place)
    yield from _unread_weights(sorted(beside.difference(left_out)), place)


def _left_out(names: Iterable[str], place: str) -> Iterator[Finding]:
    """Yield a note on files of a training run, and a note on foreign files."""
    names = [name for name in names if not name.startswith("adapter_model.bin")]
    for rule, chosen in (
        (rules.TRAINING_STATE, [name for name in names if is_training_state(name)]),
        (rules.STRANGE_FILES, [name for name in names if not is_training_state(name)]),
    ):
        if chosen:
            yield rule.at(place, f"{there_are(chosen)}.")


def _unread_weights(names: Collection[str], place: str) -> Iterator[Finding]:
    """Yield a note on weights that PEFT ignores, except modules with a separate config."""
    folders = module_folders(names)
    unread = [
        name for name in names if name.endswith(_WEIGHTS) and name.rpartition("/")[0] not in folders
    ]
    if unread:
        yield rules.UNREAD_WEIGHTS.at(place, f"{there_are(unread)}.")
