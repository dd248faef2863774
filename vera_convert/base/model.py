"""Read a base model from its headers: names, shapes, dtypes and files.

A model is a single safetensors file, or shards under an index, of transformers or diffusers, in a
folder or on the Hub. On the Hub, a range request of some kilobytes reads the header of a file.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import NamedTuple

from vera_convert import rules
from vera_convert.base.quantized.formats import MAX_SHAPE_BYTES, tells_shape
from vera_convert.errors import CheckpointError, refuse
from vera_convert.files.header import Header, TensorInfo, read_header
from vera_convert.files.reading import ByteSource, LocalFile
from vera_convert.files.shards import (
    PIPELINE,
    find_weights,
    index_findings,
    named_weights,
    read_weight_map,
    require_shards,
    stray_weights,
)
from vera_convert.files.strict_json import NOT_FINITE, parse_json, read_json
from vera_convert.hub.header_cache import Beginning
from vera_convert.hub.lookup import HubAccess, Location, list_files, open_file
from vera_convert.hub.range_file import RemoteFile
from vera_convert.hub.repos import kept_bytes
from vera_convert.rules import Finding
from vera_convert.text import printable

CONFIG_LIMIT = 16 << 20
"""The most bytes of a model's config.json; class names of image models fill a megabyte."""
INDEX_LIMIT = 100_000_000
"""The most bytes of an index; an index is as large as all headers together."""
_REQUESTS = 8
_NEAR = 32 << 10
"""Reading so many bytes between two small tensors costs less than a second request."""


@dataclass(frozen=True, slots=True)
class BaseTensor:
    """One tensor of the base: the name of the file, and the record in the file's header."""

    file: str
    info: TensorInfo


@dataclass(frozen=True, slots=True, eq=False)
class BaseModel:
    """A base model, every tensor accounted for.

    Attributes:
        location: where the base lies.
        config: the ``config.json``; empty if absent.
        files: header of each weight file, by name relative to the location, sorted.
        tensors: by name, in the order of the files, then of each header.
        prefix: the component's folder inside a pipeline, like ``transformer/``; empty for a
            model.
        index: the name of the shards' index, if present.
        strays: safetensors files beside the base's weights.
        values: the bytes of the small tensors with the shapes of packed weights, by name.
    """

    location: Location
    config: Mapping[str, object]
    files: Mapping[str, Header]
    tensors: Mapping[str, BaseTensor]
    prefix: str = ""
    index: str | None = None
    strays: tuple[str, ...] = ()
    values: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def model_type(self) -> str | None:
        """The config's ``model_type``, for example ``llama``."""
        found = self.config.get("model_type")
        return found if isinstance(found, str) else None

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes in the config's ``architectures``, for example ``LlamaForCausalLM``."""
        found = self.config.get("architectures")
        names = found if isinstance(found, list) else []
        return tuple(name for name in names if isinstance(name, str))

    @property
    def tie_word_embeddings(self) -> bool | None:
        """Whether the config ties the output head to the embedding; None if left open."""
        parts = (part for part in self.config.values() if isinstance(part, Mapping))
        for part in (self.config, *parts):
            found = part.get("tie_word_embeddings")
            if isinstance(found, bool):
                return found
        return None

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Warnings about the base."""
        place = self.location.label
        return tuple(
            rules.STRAY_WEIGHTS.at(place, f"{printable(name)} is left out.") for name in self.strays
        )

    @property
    def weights_size(self) -> int:
        """Bytes of all weight files."""
        return sum(header.file_size for header in self.files.values())


def read_base(location: Location, access: HubAccess, *, component: str = "") -> BaseModel:
    """Read a base from the headers, and compare index and shards.

    Args:
        location: where the base lies.
        access: how the Hub is reached.
        component: the folder of a pipeline's component, like ``transformer_2/``; empty for a
            model, and for the main component of a pipeline.

    Raises:
        CheckpointError: safetensors weights are absent, a file is malformed, or shards are
            missing or belong to another save.
        SurroundingsError: a file cannot be read.
    """
    names = list_files(location, access)
    source = _Source(location, access)
    is_model = not component and PIPELINE not in names and source.has("config.json", names)
    config = source.read_config("config.json") if is_model else {}
    named = named_weights(config)
    weights = find_weights(names, place=location.label, component=component, named=named)
    config_name = weights.prefix + "config.json"
    if not is_model and source.has(config_name, names):
        config = source.read_config(config_name)
    weight_map = None
    if weights.index is not None:
        weight_map = source.read_index(weights.index)
        require_shards(set(weight_map.values()), names, place=location.label)
    shards = {*weight_map.values()} if weight_map is not None else {weights.single or ""}
    files = source.read_headers(sorted(shards))
    if weight_map is not None:
        stored = {file: header.tensors.keys() for file, header in files.items()}
        refuse(index_findings(weight_map, stored, place=location.label))
    tensors = {
        name: BaseTensor(file, info)
        for file, header in files.items()
        for name, info in header.tensors.items()
    }
    strays = stray_weights(names, weights, files)
    values = source.read_values(files)
    return BaseModel(
        location, config, files, tensors, weights.prefix, weights.index, strays, values
    )


def listed_components(location: Location, access: HubAccess) -> frozenset[str]:
    """Return the folders of the components in a pipeline's index, each with a `/`.

    A malformed index gives an empty set.

    Raises:
        SurroundingsError: the index cannot be read.
    """
    return frozenset(
        f"{name}/"
        for name, value in _pipeline_index(location, access).items()
        if isinstance(value, list) and all(isinstance(each, str) for each in value)
    )


def pipeline_class(base: BaseModel, access: HubAccess) -> str:
    """Return the class of the pipeline that a base is a component of; empty if no index names one.

    Raises:
        SurroundingsError: the index cannot be read.
    """
    pipeline = base.location if base.prefix else _around(base.location, access)
    found = _pipeline_index(pipeline, access).get("_class_name") if pipeline is not None else ""
    return found if isinstance(found, str) else ""


def _around(component: Location, access: HubAccess) -> Location | None:
    """Return the pipeline around the folder of a component; None without an index there."""
    if component.repo_id is None:
        around = component.fetched.resolve().parent
        found = replace(component, label=printable(str(around)), folder=around)
        return found if (around / PIPELINE).is_file() else None
    if not component.subfolder:
        return None
    outer, _, name = component.subfolder.rpartition("/")
    label = component.label.removesuffix(f"/{name}")
    found = replace(component, label=label, folder=None, subfolder=outer)
    return found if PIPELINE in list_files(found, access) else None


def _pipeline_index(location: Location, access: HubAccess) -> Mapping[str, object]:
    """Return the index of a pipeline; empty if the index is malformed."""
    try:
        return _Source(location, access).read_config(PIPELINE)
    except CheckpointError:
        return {}


def read_model_config(location: Location, access: HubAccess) -> Mapping[str, object] | None:
    """Return a model's ``config.json``; None if absent.

    Raises:
        CheckpointError: the config is malformed.
        SurroundingsError: the file cannot be read.
    """
    source = _Source(location, access)
    if not source.has("config.json", list_files(location, access)):
        return None
    return source.read_config("config.json")


def read_config_file(source: ByteSource) -> Mapping[str, object]:
    """Read a model's ``config.json`` as transformers reads it.

    Raises:
        CheckpointError: the config is malformed.
        SurroundingsError: the file cannot be read.
    """
    document, _ = read_json(source, limit=CONFIG_LIMIT, pythons_numbers=True)
    return _config_of(document, source.place)


def parse_config_file(text: bytes, *, place: str) -> Mapping[str, object]:
    """Return the value of a ``config.json`` from its bytes; see `read_config_file`."""
    return _config_of(parse_json(text, place=place, pythons_numbers=True), place)


def _config_of(document: object, place: str) -> Mapping[str, object]:
    if not isinstance(document, dict):
        raise CheckpointError(rules.MODEL_CONFIG_FORM.at(place, "the config is no JSON object."))
    return {name: _with_floats(value) for name, value in document.items()}


def _with_floats(value: object) -> object:
    """Return a value with each ``{"__float__": "Infinity"}`` of transformers 5 as the float."""
    if isinstance(value, list):
        return [_with_floats(item) for item in value]
    if not isinstance(value, dict):
        return value
    tag = value.get("__float__")
    if len(value) == 1 and isinstance(tag, str) and tag in NOT_FINITE:
        return NOT_FINITE[tag]
    return {name: _with_floats(item) for name, item in value.items()}


class _Range(NamedTuple):
    """The bytes of a small tensor in a file."""

    file: str
    start: int
    size: int
    tensor: str


@dataclass(frozen=True, slots=True)
class _Source:
    """The files of a location, in a folder or on the Hub."""

    location: Location
    access: HubAccess

    def open(self, name: str) -> LocalFile | RemoteFile:
        return open_file(self.location, name, self.access)

    def has(self, name: str, names: Collection[str]) -> bool:
        """Say whether a name exists; `open` refuses anything but a regular file.

        Args:
            name: the name of a file.
            names: the names of all regular files.
        """
        folder = self.location.folder
        return name in names or (folder is not None and os.path.lexists(folder / name))

    def read_config(self, name: str) -> Mapping[str, object]:
        with self.open(name) as file:
            return read_config_file(file)

    def read_index(self, name: str) -> dict[str, str]:
        with self.open(name) as file:
            document, _ = read_json(file, limit=INDEX_LIMIT, pythons_numbers=True)
        return read_weight_map(document, name, place=file.place)

    def read_headers(self, names: Collection[str]) -> dict[str, Header]:
        """Read the headers of files, and raise the defects of all files together."""
        if self.location.folder is not None:
            results = [self._header(name) for name in names]
        else:
            with ThreadPoolExecutor(_REQUESTS) as pool:
                results = list(pool.map(self._header, names))
        refuse(
            found
            for result in results
            if isinstance(result, CheckpointError)
            for found in result.findings
        )
        headers = (result for result in results if isinstance(result, Header))
        return dict(zip(names, headers, strict=True))

    def read_values(self, files: Mapping[str, Header]) -> dict[str, bytes]:
        """Read the small tensors with the shapes of packed weights; kept for the next run."""
        ranges = sorted(
            _Range(name, header.data_start + info.start, info.nbytes, info.name)
            for name, header in files.items()
            for info in header.tensors.values()
            if tells_shape(info.name) and info.nbytes <= MAX_SHAPE_BYTES
        )
        if not ranges:
            return {}
        if self.location.folder is not None:
            data = self._read(ranges)
        else:
            kept = kept_bytes(self.location, repr([*map(tuple, ranges)]), self.access)
            earlier = kept.load()
            data = earlier.data if earlier is not None else self._read(ranges)
            if earlier is None:
                kept.save(Beginning(len(data), (self.location.commit, None), data))
        ends = accumulate(each.size for each in ranges)
        return {
            each.tensor: data[end - each.size : end] for each, end in zip(ranges, ends, strict=True)
        }

    def _read(self, ranges: Sequence[_Range]) -> bytes:
        """Read ranges of files, joined; a single request reads ranges near each other."""
        runs: list[list[_Range]] = []
        for each in ranges:
            last = runs[-1][-1] if runs else None
            if last is not None and last.file == each.file and each.start - last.start <= _NEAR:
                runs[-1].append(each)
            else:
                runs.append([each])
        with ExitStack() as stack:
            opened: dict[str, LocalFile | RemoteFile] = {}
            for file in {each.file for each in ranges}:
                opened[file] = self.open(file)
                stack.enter_context(opened[file])

            def read(run: Sequence[_Range]) -> bytes:
                first, last = run[0], run[-1]
                size = last.start + last.size - first.start
                data = opened[first.file].read_at(first.start, size)
                return b"".join(data[each.start - first.start :][: each.size] for each in run)

            with ThreadPoolExecutor(_REQUESTS) as pool:
                return b"".join(pool.map(read, runs))

    def _header(self, name: str) -> Header | CheckpointError:
        try:
            with self.open(name) as file:
                return read_header(file)
        except CheckpointError as error:
            return error
