"""Plan all files of a merged model: weights, index, config, card and copied files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vera_convert.assembly.input_files import InputFile
from vera_convert.assembly.writer import Computed, CopiedRange, NewFile
from vera_convert.base.model import BaseModel, read_base
from vera_convert.base.side_files import CARD_NAME, check_tokens, of_dtype, untied
from vera_convert.base.vocabulary import embedding_rows
from vera_convert.dtypes import NAMES
from vera_convert.errors import SurroundingsError
from vera_convert.files.json_edit import removed_member
from vera_convert.files.reading import LocalFile, open_local
from vera_convert.files.shards import REDIRECTION
from vera_convert.hub.lookup import HubAccess, Location
from vera_convert.hub.repo_name import is_repo_id
from vera_convert.merging.adapter_files import MODULES_NAME
from vera_convert.merging.card import ModelSource, model_card
from vera_convert.merging.changes import Changes
from vera_convert.merging.dequantize import SIDE_FILES, dequantized_config
from vera_convert.merging.inputs import MergeInputs
from vera_convert.merging.model_config import ConfigEdits
from vera_convert.merging.plan import WeightsPlan
from vera_convert.merging.provenance import folder_name
from vera_convert.merging.replaced import ReplacedTensor
from vera_convert.text import read_back_differs


@dataclass(frozen=True, slots=True)
class FilePlan:
    """One file of the output, in numbers.

    Attributes:
        name: relative to the output folder, with `/`.
        size: the file's size in bytes.
        copied: bytes that are copied from an input.
        computed: bytes of tensors that are computed.
        tensors: the number of computed tensors.
        products: floating-point operations of the products.
    """

    name: str
    size: int
    copied: int
    computed: int
    tensors: int
    products: int


def file_plan(file: NewFile) -> FilePlan:
    """Return a file in numbers."""
    computed = [piece for piece in file.pieces if isinstance(piece, Computed)]
    return FilePlan(
        file.name,
        file.size,
        sum(piece.size for piece in file.pieces if isinstance(piece, CopiedRange)),
        sum(piece.size for piece in computed),
        len(computed),
        sum(
            2 * len(term.A) * piece.tensor.shape[0] * piece.tensor.shape[1]
            for piece in computed
            for term in piece.tensor.terms
        ),
    )


def plan_files(
    inputs: MergeInputs,
    weights: WeightsPlan,
    config: bytes,
    replaced: Sequence[ReplacedTensor],
) -> tuple[NewFile, ...]:
    """Return all files of the output except the provenance, the weights first.

    Args:
        inputs: the adapters and the base.
        weights: the plan of the weight files.
        config: the text of the merged model's config; unused if the base has no config.
        replaced: the tensors that come from an adapter.
    """
    files = [*weights.files]
    if weights.index is not None:
        files.append(NewFile(*weights.index))
    if inputs.sides.config is not None:
        files.append(NewFile(inputs.sides.config, config))
    card = model_card(
        _origin(inputs.base.location),
        [_origin(matched.location, matched.weight) for matched in inputs.adapters],
        library=_library(inputs),
        trained_on=_trained_on(inputs),
        replaced=[(each.name, each.change) for each in replaced],
    )
    files.append(NewFile(CARD_NAME, card.encode()))
    files += [NewFile(name, pieces=(*_whole(file),)) for name, file in files_beside(inputs).items()]
    return tuple(files)


def config_text(
    inputs: MergeInputs, changes: Changes, edits: ConfigEdits, dtype: str | None
) -> bytes:
    """Return the text of the merged model's config; empty if the base has no config.

    Args:
        inputs: the adapters and the base.
        changes: the changes to the base, which can untie head and embedding.
        edits: the members that the adapters decide.
        dtype: the dtype of all float tensors, in safetensors' names; None keeps each dtype.
    """
    if inputs.sides.config is None:
        return b""
    base, text = inputs.base.config, inputs.texts[inputs.sides.config]
    if inputs.dequantization is not None:
        text = dequantized_config(text, base)
    if changes.unties:
        text = untied(text, base)
    if dtype is not None:
        text = of_dtype(text, base, NAMES[dtype])
    if REDIRECTION in base:
        text = removed_member(text, (REDIRECTION,))  # the weights get the usual name
    return edits.of_text(text)


def _whole(file: InputFile) -> Iterator[CopiedRange]:
    if file.size:
        yield CopiedRange(file, 0, file.size, 0)


def files_beside(inputs: MergeInputs) -> dict[str, InputFile]:
    """Return the files beside the merged weights; the adapter's files replace the base's."""
    copied = dict(inputs.copied)
    if inputs.dequantization is not None:
        copied = {name: file for name, file in copied.items() if name not in SIDE_FILES}
    return inputs.beside.over(copied)


def _origin(location: Location, weight: float | None = None) -> ModelSource:
    if location.repo_id is None:
        return ModelSource(folder_name(location), weight=weight)
    return ModelSource(location.repo_id, location.commit or "", is_repo=True, weight=weight)


def _trained_on(inputs: MergeInputs) -> str | None:
    name = inputs.adapters[0].adapter.config.base_model_name_or_path
    return name if name is not None and is_repo_id(name) else None


def _library(inputs: MergeInputs) -> str:
    if "_class_name" in inputs.base.config or inputs.base.prefix:
        return "diffusers"
    return "sentence-transformers" if MODULES_NAME in files_beside(inputs) else "transformers"


def check_tokenizer(inputs: MergeInputs, changes: Changes) -> None:
    """Refuse an adapter's tokenizer that has tokens beyond the rows of the embedding."""
    resized = changes.resizes.vocabulary
    rows = resized[1] if resized is not None else embedding_rows(inputs.base)
    opened: dict[str, LocalFile] = {}
    try:
        for name, file in inputs.beside.tokenizer.items():
            opened[name] = file.open()
        check_tokens(opened, rows, place=inputs.adapters[0].label)
    finally:
        for source in opened.values():
            source.close()


# --- reading back --------------------------------------------------------------------------------


def check_staged(folder: Path, files: Mapping[str, NewFile], weights: WeightsPlan) -> None:
    """Read the output again before it is published: sizes, headers, index against shards.

    Raises:
        SurroundingsError: a file does not read back as written.
    """
    for name, file in files.items():
        if (folder / name).lstat().st_size != file.size:
            raise _came_back(name)
        if name not in weights.headers and file.head:
            with open_local(folder / name) as source:
                if source.read_at(0, len(file.head)) != file.head:
                    raise _came_back(name)
    merged = Location("the merged model", folder)
    model: BaseModel = read_base(merged, HubAccess(offline=True), component=weights.component)
    if model.files.keys() != weights.headers.keys():
        raise _came_back(", ".join(model.files.keys() ^ weights.headers.keys()))
    for name, header in model.files.items():
        if header.raw != weights.headers[name]:
            raise _came_back(name)


def _came_back(name: str) -> SurroundingsError:
    return SurroundingsError(read_back_differs(name))
