"""Read the provenance of a merged model, a file from a stranger.

An option is used only if its value has a form that this package writes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn, TypeVar

from vera_convert.base.facts import parse_key_map
from vera_convert.conversion.projections import ProjectionSource
from vera_convert.draws.generator import Variant
from vera_convert.dtypes import BASE_NAMES, FLOAT_NAMES
from vera_convert.errors import CheckpointError, UsageError
from vera_convert.files.reading import ByteSource
from vera_convert.files.strict_json import read_json
from vera_convert.merging.changes import Tied
from vera_convert.merging.options import MergeOptions
from vera_convert.merging.provenance import FORMAT, PROVENANCE_LIMIT
from vera_convert.rules import PROVENANCE_MALFORMED
from vera_convert.text import printable

_MOST_ADAPTERS = 1_000
_MOST_RENAMES = 1_000
_SHA256 = re.compile("[0-9a-f]{64}")

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class RecordedAdapter:
    """One adapter of a recorded merge.

    Attributes:
        name: the repo of the adapter, or the name of its folder.
        weight: the factor of the adapter's deltas.
        config_sha256: the SHA-256 of the adapter's config.
        header_sha256: the SHA-256 of the header of the adapter's weights.
    """

    name: str
    weight: float
    config_sha256: str
    header_sha256: str


@dataclass(frozen=True, slots=True)
class MergeSettings:
    """The options of a merge.

    Attributes:
        projections: the source of A and B.
        generator: the variant of the generator, if no fingerprint names the variant.
        base_dtype: the dtype that the base was loaded in; None for the stored dtype.
        key_map: pairs (OLD, NEW) that renamed modules.
        dtype: the dtype of all float tensors, in torch's names; None if each kept its dtype.
        tied: how a head that shares its tensor with the embedding was merged.
        dequantize: whether an fp8 base was converted to a 16-bit model.
        architecture: the class of the result, if the call of the merge named the class.
        labels: the names of a classifier's labels, if the call of the merge gave names.
        recorded: whether the options that were not given come from a provenance.
        given: the names of the options that the caller gave, including ``weight``.
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

    @property
    def merge_options(self) -> MergeOptions:
        """The options for a merge that gives the same model."""
        return MergeOptions(
            projections=self.projections,
            generator=self.generator,
            dtype=self.dtype,
            tied=self.tied,
            dequantize=self.dequantize,
            architecture=self.architecture,
            labels=self.labels,
        )


@dataclass(frozen=True, slots=True)
class Provenance:
    """The part of a merge's record that determines the merged model.

    Attributes:
        adapters: the adapters, in the order in which their deltas were added.
        base_headers: the SHA-256 of the header of each weight file of the base, by name.
        settings: the options.
    """

    adapters: tuple[RecordedAdapter, ...]
    base_headers: Mapping[str, str]
    settings: MergeSettings


def read_provenance(source: ByteSource) -> Provenance:
    """Read the provenance of a merged model.

    Raises:
        CheckpointError: the provenance is malformed, or its format is unknown.
        SurroundingsError: the file cannot be read.
    """
    document, _ = read_json(source, limit=PROVENANCE_LIMIT)
    reader = _Reader(source.place)
    top = reader.mapping(document, "the document")
    if top.get("format") != FORMAT:
        reader.refuse(f"its format is not {FORMAT}, the only known format.")
    listed = reader.array(top.get("adapters"), "adapters")
    if not 1 <= len(listed) <= _MOST_ADAPTERS:
        reader.refuse(f"it lists {len(listed):,} adapters.")
    options = reader.mapping(top.get("options"), "options")
    renames = reader.array(options.get("key_map"), "options.key_map")
    if len(renames) > _MOST_RENAMES:
        reader.refuse(f"options.key_map has {len(renames):,} entries.")
    base = reader.mapping(top.get("base"), "base")
    settings = _settings(reader, options, renames)
    try:
        _ = settings.merge_options
    except UsageError as error:
        reader.refuse(f"a merge would refuse its options: {error}")
    return Provenance(
        adapters=tuple(reader.adapter(each, f"adapters[{n}]") for n, each in enumerate(listed)),
        base_headers=reader.headers(base.get("files")),
        settings=settings,
    )


def _settings(
    reader: _Reader, options: Mapping[str, object], renames: Sequence[object]
) -> MergeSettings:
    return MergeSettings(
        projections=reader.one_of(
            ProjectionSource, options.get("projections"), "options.projections"
        ),
        generator=reader.optional(Variant, options.get("generator"), "options.generator"),
        base_dtype=reader.optional(_base_dtype, options.get("base_dtype"), "options.base_dtype"),
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


def _base_dtype(text: str) -> str:
    if text not in BASE_NAMES:
        raise ValueError(text)
    return text


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
    """Take values from a document, or refuse the document with the name of the wrong value."""

    place: str

    def refuse(self, reason: str) -> NoReturn:
        raise CheckpointError(PROVENANCE_MALFORMED.at(self.place, reason))

    def mapping(self, value: object, name: str) -> Mapping[str, object]:
        if not isinstance(value, dict):
            self.refuse(f"{name} is not an object.")
        return value

    def array(self, value: object, name: str) -> list[object]:
        if not isinstance(value, list):
            self.refuse(f"{name} is not a list.")
        return value

    def text(self, value: object, name: str) -> str:
        if not isinstance(value, str):
            self.refuse(f"{name} is not a text.")
        return value

    def truth(self, value: object, name: str) -> bool:
        if not isinstance(value, bool):
            self.refuse(f"{name} is neither true nor false.")
        return value

    def digest(self, value: object, name: str) -> str:
        text = self.text(value, name)
        if not _SHA256.fullmatch(text):
            self.refuse(f"{name} is not a SHA-256.")
        return text

    def number(self, value: object, name: str) -> float:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            self.refuse(f"{name} is not a number.")
        return float(value)  # the reader accepts only finite numbers of bounded length

    def one_of(self, parse: Callable[[str], Value], value: object, name: str) -> Value:
        text = self.text(value, name)
        try:
            return parse(text)
        except ValueError:
            self.refuse(f'{name} is "{printable(text)}", which is not a known value.')

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
