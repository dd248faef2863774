"""A quantized layer as data: the tensors in the base's files, and the resulting weight.

A format reads a `Layer` (names, dtypes, shapes, settings) and returns a `PackedWeight`: the name
and shape of the weight, the checks of its parts, and a function that computes blocks of rows.
Before a merge starts, only headers and a few small tensors are read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from vera_convert import rules
from vera_convert.files.header import TensorInfo
from vera_convert.rules import Finding, Rule
from vera_convert.text import printable

Array = NDArray[Any]

SCALE_DTYPES = ("F32", "BF16", "F16")
KERNELS_DECIDE = (
    "PEFT rounds to float16 with gptqmodel's torch kernel, and not at all (float32) with its "
    "kernels for CPUs."
)
"""The casts of A and B on a layer of GPTQ or AWQ."""
KEPT_IF_DEQUANTIZED = (
    "Some of these weights are plain. A merge keeps a plain weight; transformers keeps it only if "
    "the base is loaded dequantized."
)
"""The use of a plain weight where compressed-tensors or fp8 is expected."""


class PartReader(Protocol):
    """Reads ranges of a packed weight's tensors."""

    def rows(self, name: str, first: int, last: int) -> Array:
        """Return rows `first` to `last` (exclusive) of a tensor, along the first axis."""

    def columns(self, name: str, first: int, last: int) -> Array:
        """Return columns `first` to `last` (exclusive) of a matrix."""

    def flat(self, name: str, first: int, last: int) -> Array:
        """Return elements `first` to `last` (exclusive) of a tensor in row-major order."""

    def raw(self, name: str, first: int, last: int) -> NDArray[np.uint8]:
        """Return bytes `first` to `last` (exclusive) of a tensor."""


Decode = Callable[[PartReader, int, int], Array]
"""Computes the rows `first` to `last` (exclusive) of a weight as the library does.

The array has the library's dtype; float16s are float32s, which a sum needs.
"""
Check = Callable[[Array], str | None]
"""Says why values of a part are unsafe; None if the values are safe."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """A quantized weight.

    Attributes:
        name: the weight's name in a dequantized model.
        shape: the weight's shape in a dequantized model.
        main: the tensor that holds the packed values.
        parts: all tensors that a dequantized model leaves out, `main` included.
        decode: computes rows of the weight; a weight of more than two dimensions is taken as the
            matrix of its last dimension.
        checks: the check of each part with possibly unsafe values, by the part's name.
    """

    name: str
    shape: tuple[int, ...]
    main: str
    parts: tuple[str, ...]
    decode: Decode
    checks: Mapping[str, Check] = field(default_factory=dict)

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns."""
        return math.prod(self.shape[:-1]), self.shape[-1]


class LayerError(Exception):
    """A quantized layer cannot be dequantized.

    Attributes:
        finding: why.
    """

    def __init__(self, finding: Finding) -> None:
        super().__init__(str(finding))
        self.finding = finding


@dataclass(frozen=True, slots=True)
class Layer:
    """The tensors of a quantized layer.

    Attributes:
        path: the layer's path in the base's files.
        tensors: the layer's tensors, by the name below the path, such as ``qweight``.
        settings: the quantization settings of the layer.
        dtype: the float dtype of the model by its config, up to F32.
        values: the bytes of the small tensors that tell a shape, by the name below the path.
        metadata: the entry for the layer's weight in the metadata of the file's header.
        label: the name of the format, for messages.
    """

    path: str
    tensors: Mapping[str, TensorInfo]
    settings: Mapping[str, object]
    dtype: str
    values: Mapping[str, bytes] = field(default_factory=dict)
    metadata: str | None = None
    label: str = ""

    def name(self, rest: str) -> str:
        """Return the whole name of a tensor of the layer."""
        return f"{self.path}.{rest}" if self.path else rest

    def missing(self, rest: str, reason: str) -> LayerError:
        """Return the error for a tensor that the layer lacks."""
        return self._error(rules.PART_MISSING, rest, reason)

    def malformed(self, rest: str, reason: str) -> LayerError:
        """Return the error for a tensor that the quantizer cannot have written."""
        return self._error(rules.PART_MALFORMED, rest, reason)

    def unsupported(self, rest: str, reason: str) -> LayerError:
        """Return the error for a tensor or a setting that this package does not dequantize."""
        return self._error(rules.NOT_DEQUANTIZABLE, rest, reason)

    def _error(self, rule: Rule, rest: str, reason: str) -> LayerError:
        return LayerError(rule.at(printable(self.name(rest)), f"{self.label}: {reason}"))

    def part(self, rest: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> str:
        """Return the name of a tensor after a check of the dtype and the shape.

        Raises:
            LayerError: the tensor is missing, or has another dtype or shape.
        """
        info = self.tensors.get(rest)
        if info is None:
            raise self.missing(rest, f"the layer needs it in the shape {[*shape]}.")
        if info.dtype not in dtypes or info.shape != shape:
            wanted = f"{[*shape]} of {' or '.join(dtypes)}"
            reason = f"its shape is {[*info.shape]} of {info.dtype}; {wanted} is needed."
            raise self.malformed(rest, reason)
        return self.name(rest)

    def main(self, rest: str, dtypes: tuple[str, ...], dimensions: int = 2) -> tuple[int, ...]:
        """Return the shape of the packed values after a check of the dtype.

        Raises:
            LayerError: the tensor is missing, empty, or has another dtype or number of dimensions.
        """
        info = self.tensors.get(rest)
        if info is None:
            raise self.missing(rest, "the layer has no such tensor.")
        if info.dtype not in dtypes or len(info.shape) != dimensions or 0 in info.shape:
            reason = f"its shape is {[*info.shape]} of {info.dtype}; "
            reason += f"{dimensions} dimensions of {' or '.join(dtypes)} are needed."
            raise self.malformed(rest, reason)
        return info.shape

    def refuse_others(
        self, known: Collection[str], dropped: Collection[str] = ()
    ) -> tuple[str, ...]:
        """Return the names of the layer's parts that a dequantized model leaves out.

        Args:
            known: the parts that the format read.
            dropped: optional parts, useless in a dequantized model.

        Raises:
            LayerError: the layer has a tensor outside the format.
        """
        found = []
        for rest in self.tensors:
            if rest in known or rest in dropped:
                found.append(self.name(rest))
            elif rest != "bias":
                raise self.unsupported(rest, "the format has no such part.")
        return tuple(found)


# --- formats -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Format:
    """A format of quantized weights.

    Attributes:
        label: the format's name for people.
        method: the ``quant_method`` of a config.
        weights: yields the weights of a layer, and checks every part.
        signs: a pattern of the names of a layer's tensors that only quantizers write, without the
            path of the layer.
        packed: the name of the packed values, without the path of the layer.
        dtypes: the dtypes of packed values that are called ``weight``.
        cast: PEFT's cast of A and B on a layer of the format: to the dtype of the ``model``, to the
            dtype of the ``computation`` in the config, or ``none``; empty if the base leaves the
            cast open.
        undecided: the possible casts and when each happens, if `cast` is None.
        needs_config: whether the tensors have a meaning only with the settings of a config.
        dropped: tensors in and around the layers that a dequantized model leaves out.
        tells_shape: a pattern of the name of the small tensor that tells a weight's shape.
        plain: how loaders treat a plain weight that the config calls quantized; empty if loaders
            keep such a weight, None if loaders lose such a weight.
    """

    label: str
    method: str
    weights: Callable[[Layer], Iterator[PackedWeight]]
    signs: str
    packed: str = "weight"
    dtypes: tuple[str, ...] = ()
    cast: Literal["model", "computation", "none"] | None = None
    undecided: str = ""
    needs_config: bool = False
    dropped: frozenset[str] = frozenset()
    tells_shape: str | None = None
    plain: str | None = ""

    def has_sign(self, rest: str) -> bool:
        """Return whether the format writes a tensor of the name beside a weight."""
        return re.fullmatch(self.signs, rest) is not None

    def owns(self, rest: str, dtype: str) -> bool:
        """Return whether a tensor of a layer can belong to the format."""
        return (rest == "weight" and dtype in self.dtypes) or self.has_sign(rest)


# --- settings ------------------------------------------------------------------------------------


def whole(settings: Mapping[str, object], field_name: str) -> int | None:
    """Return a setting if the setting is a whole number; else None."""
    found = settings.get(field_name)
    return found if type(found) is int else None


def texts_of(settings: Mapping[str, object], names: Iterable[str]) -> set[str]:
    """Return the different values of several settings as texts in lower case.

    The result leaves out absent, null and empty settings.
    """
    found = (settings.get(name) for name in names)
    return {str(value).lower() for value in found if value not in (None, "")}


def size_pair(value: object) -> tuple[int, int] | None:
    """Return a list of two whole numbers from 1 up as a tuple; None for any other value."""
    if not isinstance(value, list) or [*map(type, value)] != [int, int] or min(value) < 1:
        return None
    return value[0], value[1]


def group_count(layer: Layer, inputs: int) -> int:
    """Return the number of groups of inputs in a layer of GPTQ or AWQ.

    Raises:
        LayerError: the config's group size does not divide the inputs, or the config excludes the
            layer.
    """
    if layer.settings.get("dynamic"):
        reason = "the config's dynamic leaves the layer plain, or holds something unknown."
        raise layer.unsupported("qweight", reason)
    size = whole(layer.settings, "group_size")
    if size is None or size < -1 or size == 0:
        raise layer.unsupported("qweight", "the config names no group_size.")
    size = inputs if size == -1 else size
    if inputs % size:
        reason = f"{inputs:,} inputs are no multiple of the group size, {size:,}."
        raise layer.unsupported("qweight", reason)
    return inputs // size


# --- checks --------------------------------------------------------------------------------------


def finite(values: Array) -> str | None:
    """Say that a value is infinite or NaN."""
    if bool(np.isfinite(values.astype(np.float32)).all()):
        return None
    return "a value is infinite or NaN."


def finite_and_not_zero(values: Array) -> str | None:
    """Say that a value is infinite, NaN or zero."""
    return finite(values) or (None if bool(values.all()) else "a value is 0, and is divided by.")
