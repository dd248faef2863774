"""The folder of an adapter: sort the files beside the weights, and write a new folder."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from vera_convert.adapter.config import read_config
from vera_convert.errors import CheckpointError, SurroundingsError, VeraConvertError
from vera_convert.files.file_names import (
    CONFIG_NAME,
    PICKLED_NAME,
    WEIGHTS_NAME,
    is_strange,
    is_training_state,
)
from vera_convert.files.header import read_header
from vera_convert.files.reading import ByteSource, blocks, file_sha256, open_local
from vera_convert.files.tensorfile import TensorData, write_tensors
from vera_convert.files.walk import is_regular, walk
from vera_convert.text import read_back_differs

_OF_AN_ADAPTER = frozenset(
    (CONFIG_NAME, WEIGHTS_NAME, PICKLED_NAME, "adapter_model.pt", "vera_config.json")
)
"""Names by which a folder is known as the folder of an adapter."""

_OTHER_MODEL = re.compile(
    r"(pytorch_|tf_|flax_|rust_|diffusion_pytorch_)?model([-_.].*)?"
    r"\.(safetensors|bin|h5|msgpack|ot)(\.index\.json)?"
    r"|consolidated.*\.(pth|safetensors)|.*\.(gguf|ggml)"
)
"""Names of the weights of a complete model, which a loader could take for the base."""


def module_folders(names: Collection[str]) -> frozenset[str]:
    """Return the folders with a config beside an adapter."""
    paths = (PurePosixPath(name) for name in names if name.endswith("config.json") and "/" in name)
    return frozenset(str(path.parent) for path in paths)


def is_left_out(name: str, modules: Collection[str]) -> bool:
    """Say whether a file beside an adapter is never copied.

    Such a file comes from a training run or an operating system, or holds weights of a complete
    model, and not of a module of the adapter.

    Args:
        name: the relative path of the file.
        modules: the folders of modules; see `module_folders`.
    """
    path = PurePosixPath(name)
    is_model = str(path.parent) not in modules and _OTHER_MODEL.fullmatch(path.name) is not None
    return is_model or is_training_state(name) or is_strange(name)


@dataclass(frozen=True, slots=True)
class SideFiles:
    """The files beside an adapter, copied and left out; paths are relative, with `/`.

    Attributes:
        copied: copied byte for byte, in sorted order.
        left_out: files of a training run, a download or another model; never copied.
        outside: links that lead out of the folder, to nowhere or to a folder; never followed.
        adapters: subfolders with an adapter.
    """

    copied: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()


def side_files(folder: Path, *, not_fetched: Collection[str] = ()) -> SideFiles:
    """Sort the files of an adapter's folder, without the config and the weights.

    Hidden files are ignored.

    Args:
        folder: the folder of the adapter.
        not_fetched: files left on the Hub; the cache can hold some of the files by chance.
    """
    copied, left_out = [], []
    names, outside, adapters = _sorted_entries(folder)
    modules = module_folders(names)
    for name in sorted(names - {CONFIG_NAME, WEIGHTS_NAME, *not_fetched}):
        if is_left_out(name, modules):
            left_out.append(name)
            continue
        try:
            open_local(folder / name, within=folder).close()
        except CheckpointError:
            outside.append(name)
        else:
            copied.append(name)
    unfollowed = tuple(sorted(outside))
    return SideFiles(tuple(copied), (*left_out, *not_fetched), unfollowed, tuple(adapters))


def _sorted_entries(root: Path) -> tuple[set[str], list[str], list[str]]:
    """Return the entries below a folder: regular files, links elsewhere, and adapters' folders.

    Links to regular files are regular files; other links lead to folders or to nowhere. A subfolder
    that is an adapter is not entered.
    """
    files, links, adapters = set(), [], []
    for folder in walk(root):
        for entry in [*folder.entries]:
            name = folder.path_of(entry)
            if entry.is_dir(follow_symlinks=False):
                if os.path.lexists(Path(entry.path, CONFIG_NAME)):
                    adapters.append(name)
                    folder.entries.remove(entry)
            elif is_regular(entry):
                files.add(name)
            elif entry.is_symlink():
                links.append(name)
    return files, links, adapters


def adapters_below(
    tree: Path, *, unreadable: dict[str, VeraConvertError] | None = None
) -> Iterator[str]:
    """Yield the folder of each adapter below a folder, relative to `tree`, in sorted order.

    Args:
        tree: the folder.
        unreadable: receives the error of each subfolder that cannot be listed. If None, the first
            such error is raised.

    Raises:
        SurroundingsError: listing the folder fails; without `unreadable`, also a subfolder.
    """
    for folder in walk(tree, failed=unreadable):
        if any(entry.name in _OF_AN_ADAPTER for entry in folder.entries):
            yield folder.name or "."


class AdapterContent(NamedTuple):
    """The content of a new adapter's folder.

    Attributes:
        tensors: the tensors, in any order; the file gets the canonical order.
        metadata: the safetensors metadata.
        config_text: the bytes of ``adapter_config.json``.
        folder: the folder of the source adapter, whose side files are copied.
        not_fetched: the side files left on the Hub.
        check_unchanged: raises if the source adapter changed during the reading.
        weights: the weights file of the source adapter, to copy byte for byte if nothing changes.
    """

    tensors: Sequence[TensorData]
    metadata: Mapping[str, str]
    config_text: bytes
    folder: Path
    not_fetched: tuple[str, ...]
    check_unchanged: Callable[[], None]
    weights: ByteSource | None = None


def is_vera(folder: Path) -> bool:
    """Say whether a folder holds a VeRA adapter, so that ``--force`` may replace the folder."""
    try:
        with open_local(folder / CONFIG_NAME, within=folder) as source:
            return not read_config(source).wrong
    except (CheckpointError, SurroundingsError):
        return False


def written_files(folder: Path, *, not_fetched: Collection[str] = ()) -> tuple[str, ...]:
    """Return the files written by a conversion of an adapter's folder."""
    return (CONFIG_NAME, WEIGHTS_NAME, *side_files(folder, not_fetched=not_fetched).copied)


def write_adapter(content: AdapterContent, folder: Path) -> SideFiles:
    """Write an adapter into an empty folder and read every file back."""
    sides = side_files(content.folder, not_fetched=content.not_fetched)
    _require_space(content, sides, folder)
    (folder / CONFIG_NAME).write_bytes(content.config_text)
    path = folder / WEIGHTS_NAME
    written = {
        CONFIG_NAME: sha256(content.config_text).hexdigest(),
        WEIGHTS_NAME: write_tensors(path, content.tensors, content.metadata)
        if content.weights is None
        else _copy(content.weights, path),
    }
    _read_back(folder, written)
    copy_files(content.folder, sides.copied, folder)
    content.check_unchanged()
    return sides


def _require_space(content: AdapterContent, sides: SideFiles, folder: Path) -> None:
    """Refuse files larger than the free space, such as sparse files, before a byte is copied."""
    needed = sum((content.folder / name).stat().st_size for name in sides.copied)
    needed += sum(tensor.nbytes for tensor in content.tensors)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise SurroundingsError(
            f"the adapter takes {needed:,} bytes, and the disk of OUT has {free:,} free. "
            "Free some space, or choose an OUT on another disk."
        )


def copy_files(folder: Path, names: Iterable[str], target: Path) -> None:
    """Copy files byte for byte from a folder into another, and read the copies back.

    Raises:
        CheckpointError: a file leads out of the folder.
        SurroundingsError: a file changed while it was read, or came back otherwise.
    """
    for name in names:  # in turn, because the number of open files is limited
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        with open_local(folder / name, within=folder) as source:
            written = _copy(source, target / name)
            source.check_unchanged()
        _read_back(target, {name: written})


def _copy(source: ByteSource, target: Path) -> str:
    """Copy a file and return the SHA-256 of its bytes."""
    digest = sha256()
    with target.open("xb") as sink:
        for block in blocks(source):
            digest.update(block)
            sink.write(block)
    return digest.hexdigest()


def _read_back(folder: Path, written: Mapping[str, str]) -> None:
    """Read every file again and compare the hashes."""
    for name, expected in written.items():
        with open_local(folder / name) as source:
            found = file_sha256(source)
            if name == WEIGHTS_NAME:
                read_header(source)
        if found != expected:
            raise SurroundingsError(read_back_differs(name))
