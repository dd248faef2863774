"""A quantized base as the dequantized model: weights by name and shape, with packed values.

    config ──► method ──► layers ──► parts, checked ──► weights ──► the base without the parts

The module reads only headers, and the few small tensors that tell a shape.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from vera_convert import rules
from vera_convert.base.model import BaseModel, BaseTensor
from vera_convert.base.quantized.formats import FORMATS
from vera_convert.base.quantized.layer import Format, Layer, LayerError, PackedWeight
from vera_convert.base.quantized.layer_settings import settings_by_layer
from vera_convert.base.quantized.recognize import (
    kind_of_siblings,
    layer_of,
    method_label,
    method_of,
    sections,
)
from vera_convert.base.renames import model_types
from vera_convert.dtypes import BITS, FLOATS, HEADER_NAMES, SIXTEEN_BIT, float_name
from vera_convert.errors import refuse
from vera_convert.files.header import TensorInfo
from vera_convert.rules import Finding
from vera_convert.targets.linear import CONV1D_LAYERS
from vera_convert.text import listed, printable

_LONGEST_ROW = 1 << 20
"""The most values of a row: a merge holds a few whole rows in memory."""


@dataclass(frozen=True, slots=True, eq=False)
class Unpacked:
    """A base with the weights of the quantized layers.

    Attributes:
        stored: the base of the files.
        view: the base with each weight that can be dequantized in place of the weight's parts: by
            the name, the shape and the dtype in a dequantized model.
        weights: the weights that can be dequantized, by name.
        formats: the format of each of `weights`, by name.
        settings: the quantization settings of the config.
        dtype: the dtype of a dequantized weight, by safetensors' name.
        defects: the obstacles to dequantizing the base; empty if the base can be dequantized.
    """

    stored: BaseModel
    view: BaseModel
    weights: Mapping[str, PackedWeight] = field(default_factory=dict)
    formats: Mapping[str, Format] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)
    dtype: str = ""
    defects: tuple[Finding, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the formats, for people."""
        return tuple(dict.fromkeys(each.label for each in self.formats.values()))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the view."""
        infos = (tensor.info for tensor in self.view.tensors.values())
        return sum(math.prod(info.shape) * BITS[info.dtype] // 8 for info in infos)

    @property
    def first_defect(self) -> str:
        """The first of `defects`, and the number of the others; empty if there is none."""
        if not self.defects:
            return ""
        first, more = self.defects[0], len(self.defects) - 1
        others = f" (and {more:,} more)" if more else ""
        return f"{first.code} {first.place}: {first.reason}{others}"

    def refuse_defects(self) -> None:
        """Refuse a base that cannot be dequantized.

        Raises:
            CheckpointError: with every defect.
        """
        refuse(self.defects)

    def stored_name(self, name: str) -> str:
        """Return the tensor of the base that holds the values of a weight of the view."""
        found = self.weights.get(name)
        return name if found is None else found.main


@lru_cache(maxsize=8)
def unpacked(base: BaseModel) -> Unpacked:
    """Return a base with packed weights by the names and shapes of the dequantized model.

    The cache helps because a command asks several times for the same base.
    """
    layers = _layers(base)
    packed = {path: infos for path, infos in layers.items() if any(map(_is_sign, infos.items()))}
    if not packed:
        return Unpacked(base, base, dtype=result_dtype(base.config))
    reader = _Reader(base, [*packed])
    for path, infos in packed.items():
        reader.read(path, infos)
    dropped = {part for weight in reader.weights.values() for part in weight.parts}
    dropped |= {*_of_activations(layers, packed, reader.formats.values())}
    defects = dict.fromkeys((*reader.defects, *_other_dtypes(base, dropped, packed)))
    return Unpacked(
        base,
        _view(base, reader.weights, dropped, reader.dtype),
        reader.weights,
        reader.formats,
        reader.settings,
        reader.dtype,
        tuple(defects),
    )


def result_dtype(config: Mapping[str, object]) -> str:
    """Return the 16-bit dtype that a config names, or bfloat16."""
    return next((name for name in _dtypes(config) if name in SIXTEEN_BIT), "BF16")


def model_dtype(config: Mapping[str, object]) -> str:
    """Return the float dtype that a config names, or bfloat16."""
    return next(_dtypes(config), "BF16")


def _dtypes(config: Mapping[str, object]) -> Iterator[str]:
    """Yield the dtypes that a config and the config's parts name, by safetensors' names."""
    for part in (config, *(part for part in config.values() if isinstance(part, Mapping))):
        for field_name in ("dtype", "torch_dtype"):
            named = part.get(field_name)
            name = float_name(named) if isinstance(named, str) else None
            if name is not None:
                yield HEADER_NAMES[name]


# --- layers --------------------------------------------------------------------------------------


def _layers(base: BaseModel) -> dict[str, dict[str, TensorInfo]]:
    """Return the tensors of each layer, by the name below the layer's path."""
    found: dict[str, dict[str, TensorInfo]] = {}
    for name, tensor in base.tensors.items():
        path, rest = layer_of(name)
        found.setdefault(path, {})[rest] = tensor.info
    return found


def _is_sign(part: tuple[str, TensorInfo]) -> bool:
    """Say whether a tensor is the sign of a quantized layer."""
    rest, info = part
    return kind_of_siblings(rest) is not None or (rest == "weight" and info.dtype not in FLOATS)


class _Reader:
    """Reads layers in turn, and keeps the defects of the layers."""

    def __init__(self, base: BaseModel, paths: Sequence[str]) -> None:
        self.base = base
        self.dtype = result_dtype(base.config)
        # A float32 model is written in 16 bits, but rounding waits until after the delta.
        self.model_dtype = model_dtype(base.config).replace("F64", "F32")
        self.weights: dict[str, PackedWeight] = {}
        self.formats: dict[str, Format] = {}
        self.defects: list[Finding] = []
        found = [each for each in sections(base.config) if method_of(each)]
        self.settings = found[0] if found else next(sections(base.config), {})
        self.of_layers = settings_by_layer(base, self.settings, paths)
        self.methods = {*map(method_of, found)}
        self.said = listed(dict.fromkeys(map(method_label, sections(base.config))))
        self.is_clear = all(each == self.settings for each in found)
        # Only the model's class tells a transposed layer: a quantizer's bias and shape are silent.
        types = model_types(base.config)
        self.conv1d = frozenset[str]().union(*(CONV1D_LAYERS.get(kind, ()) for kind in types))

    def read(self, path: str, infos: Mapping[str, TensorInfo]) -> None:
        """Read the weights of a layer."""
        fitting = self._format(infos)
        if fitting is None:
            self.defects.append(self._refusal(path, infos))
            return
        layer = self._layer(path, infos, fitting)
        try:
            found = [*fitting.weights(layer)]
            _check_biases(layer, found)
        except LayerError as error:
            self.defects.append(error.finding)
            return
        for weight in found:
            self.weights[weight.name] = weight
            self.formats[weight.name] = fitting
            reason = ""
            if weight.name in self.base.tensors and weight.name not in weight.parts:
                reason = "the layer has a weight that is not packed as well."
            elif path.rpartition(".")[2] in self.conv1d:
                reason = "the model's class stores this weight as (in, out), the quantizer "
                reason += "(out, in)."
            elif max(weight.shape[1:]) > _LONGEST_ROW:
                reason = f"its shape is {[*weight.shape]}; rows of up to {_LONGEST_ROW:,} values "
                reason += "are read."
            if reason:
                reason = f"{fitting.label}: {reason}"
                self.defects.append(rules.NOT_DEQUANTIZABLE.in_tensor(weight.name, reason))

    def _format(self, infos: Mapping[str, TensorInfo]) -> Format | None:
        """Return the format of a layer; None if the layer's format is not supported."""
        own = [
            each
            for each in FORMATS
            if any(each.owns(rest, info.dtype) for rest, info in infos.items())
            and (each.method in self.methods if self.methods else not each.needs_config)
        ]
        if len(own) > 1:  # part names tell more than the dtype of the weight
            own = [each for each in own if any(each.owns(rest, "") for rest in infos)]
        return own[0] if len(own) == 1 and self.is_clear else None

    def _layer(self, path: str, infos: Mapping[str, TensorInfo], fitting: Format) -> Layer:
        start = f"{path}." if path else ""
        values = {
            rest: self.base.values[start + rest]
            for rest in infos
            if start + rest in self.base.values
        }
        files = {self.base.tensors[start + rest].file for rest in infos}
        headers = (self.base.files[file] for file in files if file in self.base.files)
        said = {header.metadata.get(f"{start}weight") for header in headers} - {None}
        metadata = said.pop() if len(said) == 1 else None
        settings, dtype = self.of_layers[path], self.model_dtype
        return Layer(path, infos, settings, dtype, values, metadata, fitting.label)

    def _refusal(self, path: str, infos: Mapping[str, TensorInfo]) -> Finding:
        rest, info = next(filter(_is_sign, infos.items()))
        kind = self.said or kind_of_siblings(rest) or "packed values"
        where = printable(f"{path}.{rest}" if path else rest)
        reason = f"no supported format has this tensor with the dtype {info.dtype}."
        if not self.said:
            reason = "the base's config does not say how the layer is quantized."
        elif not self.is_clear:
            reason = "the base's config has several quantization_configs, and these disagree."
        return rules.NOT_DEQUANTIZABLE.at(where, f"{kind}: {reason}")


def _of_activations(
    layers: Mapping[str, Mapping[str, TensorInfo]],
    packed: Mapping[str, Mapping[str, TensorInfo]],
    used: Iterable[Format],
) -> Iterator[str]:
    """Yield the scales of activations in quantized layers and in the modules around the layers."""
    dropped = frozenset[str]().union(*(each.dropped for each in used))
    around = {*packed} | {path.rpartition(".")[0] for path in packed}
    for path, infos in layers.items():
        if path in around:
            yield from (f"{path}.{rest}" for rest in infos if rest in dropped)


def _other_dtypes(
    base: BaseModel, dropped: set[str], packed: Mapping[str, object]
) -> Iterator[Finding]:
    """Yield a finding for each tensor outside the parts and the plain values."""
    for name, tensor in base.tensors.items():
        path, rest = layer_of(name)
        dtype = tensor.info.dtype
        plain = dtype in FLOATS or (dtype in ("BOOL", "I64", "I32") and "weight" not in rest)
        if name not in dropped and path not in packed and not plain:
            yield rules.NOT_DEQUANTIZABLE.at(printable(name), f"its dtype is {dtype}.")


def _check_biases(layer: Layer, weights: Sequence[PackedWeight]) -> None:
    """Check the tensors of a layer that a dequantized model keeps.

    Raises:
        LayerError: a bias is packed, or has another length than the layer has outputs.
    """
    parts = {part for weight in weights for part in weight.parts}
    for rest, info in layer.tensors.items():
        if layer.name(rest) not in parts and info.dtype not in FLOATS:
            reason = f"its dtype is {info.dtype}; the format does not pack biases."
            raise layer.malformed(rest, reason)
    bias = layer.tensors.get("bias")
    outputs = weights[0].shape[0]
    if bias is not None and bias.shape != (outputs,):
        reason = f"its shape is {[*bias.shape]}, and the layer has {outputs:,} outputs."
        raise layer.malformed("bias", reason)


def _view(
    base: BaseModel, weights: Mapping[str, PackedWeight], dropped: set[str], dtype: str
) -> BaseModel:
    """Return a base with weights in place of the parts, in the order of the base's tensors."""
    by_main = {weight.main: weight for weight in weights.values()}
    tensors = {}
    for name, tensor in base.tensors.items():
        weight = by_main.get(name)
        if weight is not None:
            info = tensor.info
            shown = TensorInfo(weight.name, dtype, weight.shape, info.start, info.end)
            tensors[weight.name] = BaseTensor(tensor.file, shown)
        elif name not in dropped:
            tensors[name] = tensor
    return replace(base, tensors=tensors)
