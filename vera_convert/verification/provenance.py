"""The provenance of a merged model, read as what it is: a stranger's file.

Options are taken from it only where each has a form that this package writes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn, TypeVar

from vera_convert.base.facts import parse_key_map
from vera_convert.conversion.projections import ProjectionSource
from vera_convert.draws.generator import Variant
from vera_convert.dtypes import FLOAT_NAMES
from vera_convert.errors import CheckpointError, UsageError
from vera_convert.files.reading import ByteSource
from vera_convert.files.strict_json import read_json
from vera_convert.merging.changes import Tied
from vera_convert.merging.provenance import FORMAT, PROVENANCE_LIMIT
from vera_convert.rules import PROVENANCE_MALFORMED
from vera_convert.text import printable

_MOST_ADAPTERS = 1_000
_MOST_RENAMES = 1_000
_SHA256 = re.compile("[0-9a-f]{64}")

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class RecordedAdapter:
    """One adapter that was merged.

    Attributes:
        name: its repo, or the name of its folder.
        weight: the factor of its deltas.
        config_sha256: of its config.
        header_sha256: of the header of its weights.
    """

    name: str
    weight: float
    config_sha256: str
    header_sha256: str


@dataclass(frozen=True, slots=True)
class MergeSettings:
    """The options that a merge is held against; the usual ones, where nothing else is said.

    Attributes:
        projections: which A and B were meant.
        generator: how they were drawn, where no fingerprint says it.
        base_dtype: the dtype that the base was taken to be loaded in.
        key_map: pairs (OLD, NEW) that renamed modules.
        dtype: what float tensors became, in torch's names; None if each kept its own.
        tied: what became of a head that shares its tensor with the embedding.
        dequantize: whether an fp8 base was made a 16-bit model.
        architecture: the class of the result, if the caller of the merge named it.
        labels: the names of a classifier's labels, if the caller of the merge gave them.
        recorded: whether they come from a provenance, but for those that are given.
        given: names of those that the caller gave, ``weight`` among them.
    """

    projections: ProjectionSource = ProjectionSource.AUTO
    generator: Variant | None = None
    base_dtype: str | None = None
    key_map: tuple[tuple[str, str], ...] = ()
    dtype: str | None = None
    tied: Tied | None = None
    dequantize: bool = False
    architecture: str | None = None
    labels: tuple[str, ...] = ()
    recorded: bool = False
    given: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Provenance:
    """What a merge recorded of itself, as far as it decides what must have come out.

    Attributes:
        adapters: in the order in which their deltas were added.
        base_headers: SHA-256 of the header of each weight file of the base, by name.
        settings: the options.
    """

    adapters: tuple[RecordedAdapter, ...]
    base_headers: Mapping[str, str]
    settings: MergeSettings


def read_provenance(source: ByteSource) -> Provenance:
    """Read the provenance of a merged model.

    Raises:
        CheckpointError: it is malformed, or of a format that is not known.
        SurroundingsError: it cannot be read.
    """
    document, _ = read_json(source, limit=PROVENANCE_LIMIT)
    reader = _Reader(source.place)
    top = reader.mapping(document, "it")
    if top.get("format") != FORMAT:
        reader.refuse(f"its format is not {FORMAT}, the one that is known.")
    listed = reader.array(top.get("adapters"), "adapters")
    if not 1 <= len(listed) <= _MOST_ADAPTERS:
        reader.refuse(f"it lists {len(listed):,} adapters.")
    options = reader.mapping(top.get("options"), "options")
    renames = reader.array(options.get("key_map"), "options.key_map")
    if len(renames) > _MOST_RENAMES:
        reader.refuse(f"options.key_map has {len(renames):,} entries.")
    base = reader.mapping(top.get("base"), "base")
    return Provenance(
        adapters=tuple(reader.adapter(each, f"adapters[{n}]") for n, each in enumerate(listed)),
        base_headers=reader.headers(base.get("files")),
        settings=_settings(reader, options, renames),
    )


def _settings(
    reader: _Reader, options: Mapping[str, object], renames: Sequence[object]
) -> MergeSettings:
    return MergeSettings(
        projections=reader.one_of(
            ProjectionSource, options.get("projections"), "options.projections"
        ),
        generator=reader.optional(Variant, options.get("generator"), "options.generator"),
        base_dtype=reader.optional(_dtype, options.get("base_dtype"), "options.base_dtype"),
        key_map=tuple(
            reader.one_of(_rename, each, f"options.key_map[{n}]") for n, each in enumerate(renames)
        ),
        dtype=reader.optional(_dtype, options.get("dtype"), "options.dtype"),
        tied=reader.optional(Tied, options.get("tied"), "options.tied"),
        dequantize=reader.truth(options.get("dequantize"), "options.dequantize"),
        architecture=reader.optional(str, options.get("architecture"), "options.architecture"),
        labels=tuple(
            reader.text(each, f"options.labels[{n}]")
            for n, each in enumerate(reader.array(options.get("labels", []), "options.labels"))
        ),
        recorded=True,
    )


def _dtype(text: str) -> str:
    if text not in FLOAT_NAMES:
        raise ValueError(text)
    return text


def _rename(text: str) -> tuple[str, str]:
    try:
        return parse_key_map(text)
    except UsageError as error:
        raise ValueError(text) from error


@dataclass(frozen=True, slots=True)
class _Reader:
    """Takes values out of a document, or refuses it with the name of what is wrong."""

    place: str

    def refuse(self, reason: str) -> NoReturn:
        raise CheckpointError(PROVENANCE_MALFORMED.at(self.place, reason))

    def mapping(self, value: object, name: str) -> Mapping[str, object]:
        if not isinstance(value, dict):
            self.refuse(f"{name} is no object.")
        return value

    def array(self, value: object, name: str) -> list[object]:
        if not isinstance(value, list):
            self.refuse(f"{name} is no list.")
        return value

    def text(self, value: object, name: str) -> str:
        if not isinstance(value, str):
            self.refuse(f"{name} is no text.")
        return value

    def truth(self, value: object, name: str) -> bool:
        if not isinstance(value, bool):
            self.refuse(f"{name} is neither true nor false.")
        return value

    def digest(self, value: object, name: str) -> str:
        text = self.text(value, name)
        if not _SHA256.fullmatch(text):
            self.refuse(f"{name} is no SHA-256.")
        return text

    def number(self, value: object, name: str) -> float:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            self.refuse(f"{name} is no number.")
        return float(value)  # finite, and of no absurd length: so is every number that is read

    def one_of(self, parse: Callable[[str], Value], value: object, name: str) -> Value:
        text = self.text(value, name)
        try:
            return parse(text)
        except ValueError:
            self.refuse(f'{name} is "{printable(text)}", which means nothing here.')

    def optional(self, parse: Callable[[str], Value], value: object, name: str) -> Value | None:
        return None if value is None else self.one_of(parse, value, name)

    def adapter(self, value: object, name: str) -> RecordedAdapter:
        record = self.mapping(value, name)
        source = self.mapping(record.get("source"), f"{name}.source")
        called = source.get("repo_id", source.get("folder"))
        return RecordedAdapter(
            self.text(called, f"{name}.source"),
            self.number(record.get("weight"), f"{name}.weight"),
            self.digest(record.get("config_sha256"), f"{name}.config_sha256"),
            self.digest(record.get("header_sha256"), f"{name}.header_sha256"),
        )

    def headers(self, value: object) -> dict[str, str]:
        found = {}
        for n, each in enumerate(self.array(value, "base.files")):
            record = self.mapping(each, f"base.files[{n}]")
            name = self.text(record.get("name"), f"base.files[{n}].name")
            found[name] = self.digest(record.get("header_sha256"), f"base.files[{n}].header_sha256")
        return found
