"""Find and open all files of a merge's base."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from vera_convert.assembly.input_files import InputFile, StoredTensor
from vera_convert.base.model import CONFIG_LIMIT, INDEX_LIMIT, BaseModel, parse_config_file
from vera_convert.base.quantized.unpack import Unpacked
from vera_convert.base.side_files import ModelFiles, sort_files
from vera_convert.base.tied import shows_own_head, stored_heads
from vera_convert.errors import SurroundingsError
from vera_convert.files.shards import read_weight_map
from vera_convert.files.strict_json import read_json
from vera_convert.hub.lookup import HubAccess, fetch_base, list_files, open_file
from vera_convert.merging.dequantize import SIDE_FILES, Decoder, Panel, check_values, panels


@dataclass(frozen=True, slots=True, eq=False)
class BaseFiles:
    """A base with its files.

    Attributes:
        model: the base; for a dequantized base, the 16-bit model of the packed weights.
        sides: the files beside the weights, sorted into copied and left out.
        files: every file that a merge reads, by name.
        texts: the bytes of config and index, by name; a base may lack both.
        packed: the packed weights of a dequantized base; None for any other base.
        panel: reads columns of packed weights for all decoders; None for any other base.
        access: how the Hub is reached.
    """

    model: BaseModel
    sides: ModelFiles
    files: Mapping[str, InputFile]
    texts: Mapping[str, bytes]
    packed: Unpacked | None = None
    panel: Panel | None = None
    access: HubAccess = field(default_factory=HubAccess)

    @property
    def copied(self) -> dict[str, InputFile]:
        """The files that belong beside the merged weights, by name."""
        left_out: Collection[str] = SIDE_FILES if self.packed is not None else ()
        return {name: self.files[name] for name in self.sides.copied if name not in left_out}

    @property
    def has_values(self) -> bool:
        """Whether the weights lie here; a dry run has only the headers of a base on the Hub."""
        return self.model.location.folder is not None

    def check_unchanged(self) -> None:
        """Raise `SurroundingsError` if a file changed after the first look."""
        for file in self.files.values():
            file.check_unchanged()

    def tensor(self, name: str) -> StoredTensor:
        """Return the place of a tensor's values, or of the result's shape for a packed weight."""
        tensor = self.model.tensors[name]
        return StoredTensor.of(self.files[tensor.file], self.model.files[tensor.file], tensor.info)

    def decoder(self, name: str) -> Decoder | None:
        """Return the function that computes rows of a packed weight; None for plain values."""
        weight = None if self.packed is None else self.packed.weights.get(name)
        if self.packed is None or weight is None:
            return None
        return Decoder(self.packed.stored, self.files, weight, self.panel)

    def dequantized(self, packed: Unpacked) -> BaseFiles:
        """Return the files of the 16-bit model of packed weights.

        Raises:
            CheckpointError: a part of a weight holds a value that no quantizer writes.
        """
        if self.has_values:
            check_values(packed, self.files)
        model = replace(packed.view, location=self.model.location)
        panel = panels(packed.stored, self.files)
        return replace(self, model=model, packed=packed, panel=panel)


def read_base_files(base: BaseModel, access: HubAccess, *, fetch: bool) -> BaseFiles:
    """Find all files of a base, and read the config and the index completely.

    Args:
        base: the base.
        access: how the Hub is reached.
        fetch: whether to download the files from the Hub; the sizes are enough for a plan.

    Raises:
        SurroundingsError: a file or the Hub fails, or the base changed after the headers were read.
    """
    sizes = list_files(base.location, access)
    sides = sort_files(sizes, base)
    whole = [name for name in (sides.config, base.index) if name is not None]
    names = [*base.files, *whole, *sides.copied]
    if fetch:
        base = replace(base, location=fetch_base(base.location, access, names=names))
    folder = base.location.folder

    def file(name: str) -> InputFile:
        if folder is None:
            return InputFile(Path(name), Path(), (0, 0, sizes[name], 0, 0))
        return InputFile.look(folder / name, within=folder, header=base.files.get(name))

    files = {name: file(name) for name in names}
    texts = {}
    for name in whole:
        with open_file(base.location, name, access) as source:
            limit = max(CONFIG_LIMIT, INDEX_LIMIT)
            texts[name] = read_json(source, limit=limit, pythons_numbers=True)[1]
    _require_same_base(texts, sides, base)
    return BaseFiles(base, sides, files, texts, access=access)


def _require_same_base(texts: Mapping[str, bytes], sides: ModelFiles, base: BaseModel) -> None:
    """Raise `SurroundingsError` unless config and index still describe the base."""
    changed, place = False, base.location.label
    if sides.config is not None:
        changed = parse_config_file(texts[sides.config], place=place) != base.config
    if base.index is not None:
        document = json.loads(texts[base.index])
        files = {name: tensor.file for name, tensor in base.tensors.items()}
        changed |= read_weight_map(document, base.index, place=place) != files
    if changed:
        raise SurroundingsError(
            f"{place} changed while it was read. Try again when nothing writes to it."
        )


def own_heads(files: BaseFiles) -> Iterator[str]:
    """Yield each stored head whose values differ from those of the embedding."""
    for head, embedding in stored_heads(files.model):
        # A packed weight has tensors of its own.
        is_packed = any(map(files.decoder, (head, embedding)))
        if is_packed or not files.tensor(embedding).is_copied_by(files.tensor(head)):
            yield head


def has_own_head(files: BaseFiles) -> bool:
    """Say whether a base stores a head of its own; without the values, by a few rows."""
    if files.has_values:
        return any(own_heads(files))
    stored = files.model if files.packed is None else files.packed.stored
    return shows_own_head(stored, files.access)
