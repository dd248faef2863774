"""Plan all files of a merged model: weights, index, config, card and copied files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from vera_convert._version import __version__
from vera_convert.assembly.writer import Computed, CopiedRange, NewFile
from vera_convert.base.model import read_base
from vera_convert.base.side_files import of_dtype, untied
from vera_convert.base.vocabulary import check_tokens, embedding_rows
from vera_convert.errors import SurroundingsError
from vera_convert.files.file_names import CARD_NAME
from vera_convert.files.json_edit import removed_member
from vera_convert.files.reading import open_local
from vera_convert.files.shards import REDIRECTION
from vera_convert.hub.lookup import HubAccess, Location
from vera_convert.hub.repo_name import is_repo_id
from vera_convert.merging.adapter_files import MODULES_NAME
from vera_convert.merging.changes import Changes
from vera_convert.merging.collect import collect
from vera_convert.merging.dequantize import dequantized_config
from vera_convert.merging.inputs import MergeInputs
from vera_convert.merging.model_config import ConfigEdits, config_edits
from vera_convert.merging.plan import WeightsPlan, plan_weights
from vera_convert.merging.report import ReplacedTensor, replaced_tensors
from vera_convert.text import printable, read_back_differs


@dataclass(frozen=True, slots=True, eq=False)
class MergePlan:
    """A planned merge.

    Attributes:
        inputs: the adapters, the base and the options.
        changes: the changes to the base.
        edits: the members of the base's config that change.
        replaced: the tensors that come from an adapter.
        weights: the plan of the weight files.
        files: all files of the output except the provenance, the weights first.
    """

    inputs: MergeInputs
    changes: Changes
    edits: ConfigEdits
    replaced: tuple[ReplacedTensor, ...]
    weights: WeightsPlan
    files: tuple[NewFile, ...]

    @property
    def size(self) -> int:
        """The size of the output, in bytes."""
        return sum(file.size for file in self.files)


def plan_merge(inputs: MergeInputs) -> MergePlan:
    """Plan a merge, and refuse inputs that clash."""
    base = inputs.base
    changes = collect(inputs)
    _check_tokenizer(inputs, changes)
    edits = config_edits(inputs, changes)
    weights = plan_weights(inputs, changes)
    replaced = replaced_tensors(inputs, changes)
    files = [*weights.files]
    if base.sides.config is not None:
        config = _config_text(inputs, changes, edits, base.texts[base.sides.config])
        files.append(NewFile(base.sides.config, config))
    card = model_card(
        base.model.location,
        [(matched.location, matched.weight) for matched in inputs.adapters],
        library=_library(inputs),
        trained_on=inputs.adapters[0].adapter.config.base_model_name_or_path,
        replaced=replaced,
    )
    files.append(NewFile(CARD_NAME, card.encode()))
    for name, file in inputs.side_files.items():
        pieces = (CopiedRange(file, 0, file.size, 0),) if file.size else ()
        files.append(NewFile(name, pieces=pieces))
    return MergePlan(inputs, changes, edits, replaced, weights, tuple(files))


def _check_tokenizer(inputs: MergeInputs, changes: Changes) -> None:
    """Refuse an adapter's tokenizer that has tokens beyond the rows of the embedding."""
    resized = changes.resizes.vocabulary
    rows = resized[1] if resized is not None else embedding_rows(inputs.base.model)
    with ExitStack() as stack:
        tokenizer = inputs.beside.tokenizer.items()
        opened = {name: stack.enter_context(file.open()) for name, file in tokenizer}
        check_tokens(opened, rows, place=inputs.adapters[0].label)


def _config_text(inputs: MergeInputs, changes: Changes, edits: ConfigEdits, text: bytes) -> bytes:
    """Return the text of the merged model's config.

    Args:
        inputs: the adapters, the base and the options.
        changes: the changes to the base, which can untie head and embedding.
        edits: the members that the adapters decide.
        text: the text of the base's config.
    """
    config, dtype = inputs.base.model.config, inputs.options.dtype
    if inputs.base.packed is not None:
        text = dequantized_config(text, config)
    if changes.unties:
        text = untied(text, config)
    if dtype is not None:
        text = of_dtype(text, config, dtype)
    if REDIRECTION in config:
        text = removed_member(text, (REDIRECTION,))  # the weights get the usual name
    return edits.of_text(text)


def _library(inputs: MergeInputs) -> str:
    if "_class_name" in inputs.base.model.config or inputs.base.model.prefix:
        return "diffusers"
    return "sentence-transformers" if MODULES_NAME in inputs.side_files else "transformers"


# --- for people ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FilePlan:
    """A file of the output, in numbers.

    Attributes:
        name: relative to the output folder, with `/`.
        size: the file's size in bytes.
        copied: bytes copied from an input.
        computed: bytes of computed tensors.
        tensors: the number of computed tensors.
        products: floating-point operations of the products.
        sha256: the checksum, if asked for.
    """

    name: str
    size: int
    copied: int
    computed: int
    tensors: int
    products: int
    sha256: str | None = None


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


# --- reading back --------------------------------------------------------------------------------


def check_staged(folder: Path, plan: MergePlan) -> None:
    """Read the output again before the publication: sizes, headers, index against shards.

    Raises:
        SurroundingsError: a file does not read back as written.
    """
    headers = plan.weights.headers
    for file in plan.files:
        path = folder / file.name
        head = b"" if file.name in headers else file.head
        with open_local(path) as source:
            if source.size != file.size or source.read_at(0, len(head)) != head:
                raise SurroundingsError(read_back_differs(file.name))
    merged, component = Location("the merged model", folder), plan.inputs.base.model.prefix
    model = read_base(merged, HubAccess(offline=True), component=component)
    found = {name: header.raw for name, header in model.files.items()}
    differing = [name for name in {**found, **headers} if found.get(name) != headers.get(name)]
    if differing:
        raise SurroundingsError(read_back_differs(", ".join(differing)))


# --- the model card -------------------------------------------------------------------------------


def model_card(
    base: Location,
    adapters: Sequence[tuple[Location, float]],
    *,
    library: str,
    trained_on: str | None = None,
    replaced: Sequence[ReplacedTensor] = (),
) -> str:
    """Return the text of the card, without any path of this machine.

    Args:
        base: where the base lies.
        adapters: where each adapter lies, and the factor of the adapter's deltas.
        library: the Hub's name of the library that loads the result.
        trained_on: the base that the first adapter's config names; used if the given base is a
            folder.
        replaced: the tensors that come from an adapter.
    """
    is_known = trained_on is not None and is_repo_id(trained_on)
    base_model = base.repo_id or (trained_on if is_known else None)
    fields = [
        # A text of JSON is valid YAML.
        *([f"base_model: {json.dumps(printable(base_model))}"] if base_model else []),
        *(["base_model_relation: finetune"] if base_model else []),
        f"library_name: {library}",
        "tags:",
        "- vera",
        "- merged",
    ]
    rows = [_row("Base", base, "")]
    rows += [_row("Adapter", location, repr(weight)) for location, weight in adapters]
    several = "adapters" if len(adapters) > 1 else "adapter"
    return "\n".join(
        [
            "---",
            *fields,
            "---",
            "",
            "# Merged model",
            "",
            f"The weights of the base plus those of the VeRA {several}, each sum rounded once to",
            f"the type of its tensor. Made by vera-convert {__version__}; `merge-provenance.json`",
            "beside this card names every input, option and change.",
            "",
            "| | name | revision | weight |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
            *(_replaced(replaced, several) if replaced else ()),
        ]
    )


def _replaced(tensors: Sequence[ReplacedTensor], several: str) -> list[str]:
    """Return the lines that name the replaced tensors."""
    return [
        f"These tensors are not sums; they are the {several}'s own:",
        "",
        "| tensor | change |",
        "| --- | --- |",
        *(f"| {_code(each.name)} | {each.change} |" for each in tensors),
        "",
    ]


def _row(kind: str, location: Location, weight: str) -> str:
    name = "/".join(filter(None, (location.name, location.subfolder)))
    return f"| {kind} | {_code(name)} | {_code(location.commit or '')} | {weight} |"


def _code(text: str) -> str:
    """Return text as Markdown code that cannot end early or split a table cell."""
    shown = printable(text).replace("`", "'").replace("|", "\\|")
    return f"`{shown}`" if shown else ""
