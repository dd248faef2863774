"""Read the provenance of a merged model, a file from a stranger.

An option counts only if the value has a form that this package writes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NoReturn, TypeVar

from vera_convert import rules
from vera_convert.base.facts import parse_key_map
from vera_convert.conversion.projections import ProjectionSource
from vera_convert.draws.generator import Variant
from vera_convert.dtypes import BASE_NAMES, FLOAT_NAMES
from vera_convert.errors import CheckpointError, UsageError
from vera_convert.files.reading import ByteSource
from vera_convert.files.strict_json import read_json
from vera_convert.merging.options import MergeOptions, Tied
from vera_convert.merging.provenance import FORMAT, PROVENANCE_LIMIT
from vera_convert.text import printable

_MOST_ADAPTERS = 1_000
_MOST_RENAMES = 1_000
_SHA256 = re.compile("[0-9a-f]{64}")

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class RecordedAdapter:
    """An adapter of a recorded merge.

    Attributes:
        name: the adapter's repo, or the name of the folder.
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
        base_dtype: the dtype of the loaded base; None for the stored dtype.
        key_map: pairs (OLD, NEW) that renamed modules.
        dtype: the dtype of all float tensors, in torch's names; None for the stored dtypes.
        tied: how a head that shares a tensor with the embedding was merged.
        dequantize: whether a quantized base was converted to a 16-bit model.
        architecture: the class of the result, if the call of the merge named the class.
        labels: the names of a classifier's labels, if the call of the merge gave names.
        recorded: whether the other options come from a provenance.
        given: the names of the caller's options, including ``weight``.
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
    def given_flags(self) -> tuple[str, ...]:
        """The caller's options as on the command line, sorted."""
        return tuple(sorted(f"--{name.replace('_', '-')}" for name in self.given))

    @property
    def merge_options(self) -> MergeOptions:
        """The options of a merge with the same result."""
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
        adapters: the adapters, in the order of the merge.
        base_headers: the SHA-256 of the header of each weight file of the base, by name.
        settings: the options.
    """

    adapters: tuple[RecordedAdapter, ...]
    base_headers: Mapping[str, str]
    settings: MergeSettings


def read_provenance(source: ByteSource) -> Provenance:
    """Read the provenance of a merged model.

    Raises:
        CheckpointError: the provenance is malformed, or of an unknown format.
        SurroundingsError: the file cannot be read.
    """
    document, _ = read_json(source, limit=PROVENANCE_LIMIT)
    top = _Record(source.place, document)
    if top.fields.get("format") != FORMAT:
        top.refuse(f"its format is not {FORMAT}, the only known format.")
    adapters = top.records("adapters")
    if not 1 <= len(adapters) <= _MOST_ADAPTERS:
        top.refuse(f"it lists {len(adapters):,} adapters.")
    files = top.record("base").records("files")
    settings = _settings(top.record("options"))
    try:
        _ = settings.merge_options
    except UsageError as error:
        top.refuse(f"a merge would refuse its options: {error}")
    return Provenance(
        adapters=tuple(map(_adapter, adapters)),
        base_headers={file.text("name"): file.sha256("header_sha256") for file in files},
        settings=settings,
    )


def _adapter(record: _Record) -> RecordedAdapter:
    source = record.record("source")
    return RecordedAdapter(
        source.text("repo_id" if "repo_id" in source.fields else "folder"),
        record.number("weight"),
        record.sha256("config_sha256"),
        record.sha256("header_sha256"),
    )


def _settings(options: _Record) -> MergeSettings:
    key_map = options.texts("key_map")
    if len(key_map) > _MOST_RENAMES:
        options.refuse(f"options.key_map has {len(key_map):,} entries.")
    rename = partial(parse_key_map, "key_map")
    return MergeSettings(
        projections=options.one_of("projections", ProjectionSource),
        generator=options.optional("generator", Variant),
        base_dtype=options.optional("base_dtype", _member_of(BASE_NAMES)),
        key_map=tuple(options.known("key_map", rename, each) for each in key_map),
        dtype=options.optional("dtype", _member_of(FLOAT_NAMES)),
        tied=options.optional("tied", Tied),
        dequantize=options.get("dequantize", bool, "neither true nor false"),
        architecture=options.optional("architecture", str),
        labels=tuple(options.texts("labels")) if "labels" in options.fields else (),
        recorded=True,
    )


def _member_of(names: Collection[str]) -> Callable[[str], str]:
    """Return a parser of known names; the parser raises `KeyError` for other texts."""
    return {name: name for name in names}.__getitem__


class _Record:
    """An object of the document; a malformed value refuses the document by the value's path."""

    def __init__(self, place: str, value: object, path: str = "") -> None:
        self._place = place
        self._path = path
        if not isinstance(value, dict):
            self.refuse(f"{path or 'the document'} is not an object.")
        self.fields: Mapping[str, object] = value

    def refuse(self, reason: str) -> NoReturn:
        raise CheckpointError(rules.PROVENANCE_MALFORMED.at(self._place, reason))

    def _path_of(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path else key

    def get(self, key: str, kind: type[Value], otherwise: str) -> Value:
        """Return the value of a key; refuse a value of another type in the given words."""
        value = self.fields.get(key)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            self.refuse(f"{self._path_of(key)} is {otherwise}.")
        return value

    def record(self, key: str) -> _Record:
        return _Record(self._place, self.fields.get(key), self._path_of(key))

    def records(self, key: str) -> list[_Record]:
        values: list[object] = self.get(key, list, "not a list")
        path = self._path_of(key)
        return [_Record(self._place, value, f"{path}[{n}]") for n, value in enumerate(values)]

    def texts(self, key: str) -> list[str]:
        values: list[object] = self.get(key, list, "not a list")
        if not all(isinstance(value, str) for value in values):
            self.refuse(f"{self._path_of(key)} is not a list of texts.")
        return [str(value) for value in values]

    def text(self, key: str) -> str:
        return self.get(key, str, "not a text")

    def number(self, key: str) -> float:
        # The reader accepts only finite numbers of bounded length.
        return float(self.get(key, (int, float), "not a number"))  # type: ignore[arg-type]

    def sha256(self, key: str) -> str:
        text = self.text(key)
        if not _SHA256.fullmatch(text):
            self.refuse(f"{self._path_of(key)} is not a SHA-256.")
        return text

    def one_of(self, key: str, parse: Callable[[str], Value]) -> Value:
        return self.known(key, parse, self.text(key))

    def optional(self, key: str, parse: Callable[[str], Value]) -> Value | None:
        return None if self.fields.get(key) is None else self.one_of(key, parse)

    def known(self, key: str, parse: Callable[[str], Value], text: str) -> Value:
        """Return a parsed text; refuse an unknown text."""
        try:
            return parse(text)
        except (KeyError, ValueError, UsageError):
            path = self._path_of(key)
            self.refuse(f'{path} is "{printable(text)}", which is not a known value.')
