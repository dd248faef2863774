"""compressed-tensors: integers in a stream of bits, int8 or fp8 with scales, and nvfp4.

    W = cast(cast(q - zero) * scale)             all in the dtype of the scale
    nvfp4:  W = bfloat16(value * (scale / global scale)),   the product in float32

Then the library casts to the dtype of the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from vera_convert.base.quantized.layer import (
    SCALE_DTYPES,
    Array,
    Check,
    Format,
    Layer,
    LayerError,
    PackedWeight,
    PartReader,
    cast_to_model,
    finite,
    finite_and_not_zero,
    sizes,
    whole,
)
from vera_convert.base.quantized.packing import (
    BFLOAT16,
    E2M1,
    FLOAT_OF,
    looked_up,
    pair_table,
    pieces,
    stream,
    widened,
)
from vera_convert.errors import CheckpointError, SurroundingsError
from vera_convert.rules import NOT_DEQUANTIZABLE, PART_MALFORMED
from vera_convert.targets.patterns import Pattern, search
from vera_convert.text import printable

SHAPE = "weight_shape"
_PACKED, _ONE_BYTE, _NVFP4 = "pack-quantized", "one byte", "nvfp4-pack-quantized"
_LAYOUTS = {
    "pack-quantized": _PACKED,
    "float-quantized": _ONE_BYTE,
    "naive-quantized": _ONE_BYTE,
    "int-quantized": _ONE_BYTE,
    "nvfp4-pack-quantized": _NVFP4,
}
"""How the formats that are supported lay out a weight."""
_PAIRS = pair_table(E2M1, high_first=False)
_DROPPED = frozenset(
    """
    input_global_scale input_scale input_zero_point output_scale output_zero_point
    k_scale v_scale q_scale
    """.split()  # noqa: SIM905 - words read best as a text
)
"""Scales of the values between layers: of no use in a model that is not quantized."""
_MOST_GROUPS = 64


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a group of the config quantizes weights.

    Attributes:
        layout: one of the layouts of `_LAYOUTS`.
        bits: of a value.
        strategy: ``tensor``, ``channel``, ``group``, ``block`` or ``tensor_group``.
        group: inputs that share one scale; None if the strategy is none of groups.
        block: rows and columns that share one scale; None if the strategy is none of blocks.
        symmetric: whether there are no zero points.
        is_float: whether values are floats, not integers.
    """

    layout: str
    bits: int
    strategy: str
    group: int | None
    block: tuple[int, int] | None
    symmetric: bool
    is_float: bool


def dequantized(q: Array, scales: Array, zeros: Array | None, width: int, dtype: str) -> Array:
    """Return rows of a weight, in the dtype of the model.

    Args:
        q: (n, columns), integers or fp8.
        scales: (n, groups), whose dtype is the one that the library computes in.
        zeros: (n, groups); None if there are none.
        width: columns of a group; the last group may be narrower.
        dtype: of the model, as safetensors names it.
    """
    out = np.empty(q.shape, FLOAT_OF[dtype])
    for part in pieces(*q.shape):
        values, factors = widened(q[part]), scales[part].astype(np.float32)
        shifts = None if zeros is None else zeros[part].astype(np.float32)
        whole_groups = values.shape[1] // width
        inner = values[:, : whole_groups * width].reshape(len(values), whole_groups, width)
        rest = values[:, whole_groups * width :]
        if shifts is not None:
            inner -= shifts[:, :whole_groups, None]
            rest -= shifts[:, whole_groups:]
        # A product of two 16-bit floats is exact in float32, so that it is rounded once.
        inner *= factors[:, :whole_groups, None]
        rest *= factors[:, whole_groups:]
        out[part] = values.astype(scales.dtype, copy=False)
    return out


def dequantized_nvfp4(packed: Array, scales: Array, global_scale: Array, dtype: str) -> Array:
    """Return rows of a weight, in the dtype of the model.

    Args:
        packed: (n, columns / 2) bytes, two codes each, the low half first.
        scales: (n, columns / 16), float8.
        global_scale: (1,), float32, by which the scales are divided.
        dtype: of the model, as safetensors names it.
    """
    out = np.empty((len(packed), packed.shape[1] * 2), FLOAT_OF[dtype])
    factors = widened(scales) / global_scale.astype(np.float32)[0]
    for part in pieces(*out.shape):
        values = looked_up(packed[part], _PAIRS)
        inner = values.reshape(len(values), scales.shape[1], 16)
        inner *= factors[part, :, None]
        out[part] = values.astype(BFLOAT16)
    return out


# --- blocks of rows ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Decoder:
    """Computes rows of integers or fp8 with their scales.

    Attributes:
        weight: the tensor of the values.
        scale: the tensor of the scales.
        zero: the tensor of the zero points; None if there is none.
        grid: rows and columns of scales.
        block: rows and columns that one scale is for.
        columns: of the weight.
        bits: of a value in a stream; 0 for one value in each byte.
        dtype: of the model.
    """

    weight: str
    scale: str
    zero: str | None
    grid: tuple[int, int]
    block: tuple[int, int]
    columns: int
    bits: int
    dtype: str

    def __call__(self, read: PartReader, first: int, last: int) -> Array:
        rows = self.block[0]
        begin, end = first // rows, -(-last // rows)
        of_rows = (np.arange(first, last) // rows) - begin
        scales = read.flat(self.scale, begin * self.grid[1], end * self.grid[1])
        q = read.rows(self.weight, first, last)
        if self.bits:
            q = self._signed(stream(q, self.bits, 0, self.columns))
        zeros = None if self.zero is None else self._zeros(read, begin, end)[of_rows]
        factors = scales.reshape(end - begin, self.grid[1])[of_rows]
        return dequantized(q, factors, zeros, self.block[1], self.dtype)

    def _signed(self, codes: Array) -> Array:
        return codes.astype(np.int16) - (1 << (self.bits - 1))

    def _zeros(self, read: PartReader, begin: int, end: int) -> Array:
        """Return the zero points of rows of scales; those of a stream are packed along rows."""
        assert self.zero is not None  # noqa: S101 -- asked for where there is one
        if not self.bits:
            flat = read.flat(self.zero, begin * self.grid[1], end * self.grid[1])
            return flat.reshape(end - begin, self.grid[1])
        start = begin * self.bits // 32
        words = read.rows(self.zero, start, -(-end * self.bits // 32))
        skipped = begin - start * 32 // self.bits if 32 % self.bits == 0 else 0
        if 32 % self.bits:  # an element can begin in the middle of a word
            words, skipped = read.rows(self.zero, 0, -(-end * self.bits // 32)), begin
        codes = stream(words.T, self.bits, skipped, skipped + end - begin)
        return self._signed(codes.T)


@dataclass(frozen=True, slots=True)
class _Nvfp4Decoder:
    weight: str
    scale: str
    global_scale: str
    dtype: str

    def __call__(self, read: PartReader, first: int, last: int) -> Array:
        return dequantized_nvfp4(
            read.rows(self.weight, first, last),
            read.rows(self.scale, first, last),
            read.flat(self.global_scale, 0, 1),
            self.dtype,
        )


# --- layers --------------------------------------------------------------------------------------


def weights(layer: Layer) -> Iterator[PackedWeight]:
    """Yield the weight of a layer.

    Raises:
        LayerError: a part is missing, superfluous or malformed, or a setting is unsafe.
    """
    main = "weight_packed" if "weight_packed" in layer.tensors else "weight"
    for field_name in ("sparsity_config", "transform_config"):
        found = layer.settings.get(field_name)
        is_dense = field_name == "sparsity_config" and found in ({"format": "dense"}, None)
        if found not in (None, {}) and not is_dense:
            raise layer.error(NOT_DEQUANTIZABLE, main, f"a {field_name} is not supported.")
    schemes = _schemes(layer, main)
    found_weights: list[PackedWeight] = []
    errors: list[LayerError] = []
    for scheme in schemes:
        try:
            found_weights.append(_READERS[scheme.layout](layer, scheme))
        except LayerError as error:
            errors.append(error)
    if errors and not found_weights:
        raise errors[0]
    if len(found_weights) != 1:
        reason = "several groups of the config fit the layer."
        raise layer.error(NOT_DEQUANTIZABLE, main, reason)
    yield found_weights[0]


def _packed(layer: Layer, scheme: Scheme) -> PackedWeight:
    rows, words = layer.main("weight_packed", ("I32",))
    layer.part(SHAPE, ("I64", "I32"), (2,))
    columns = _columns(layer, rows)
    if words != -(-columns * scheme.bits // 32):
        reason = f"{words:,} words of a row do not hold {columns:,} values of {scheme.bits} bits."
        raise layer.error(PART_MALFORMED, "weight_packed", reason)
    grid, block = _grid(layer, scheme, (rows, columns), "weight_packed")
    scale = _scale(layer, grid)
    checks: dict[str, Check] = {scale: finite}
    known = ["weight_packed", SHAPE, "weight_scale"]
    zero = None
    if not scheme.symmetric:
        packed_rows = -(-grid[0] * scheme.bits // 32)
        zero = layer.part("weight_zero_point", ("I32",), (packed_rows, grid[1]))
        known.append("weight_zero_point")
    main = layer.name("weight_packed")
    decode = _Decoder(main, scale, zero, grid, block, columns, scheme.bits, layer.dtype)
    parts = layer.refuse_others(tuple(known), _DROPPED)
    return PackedWeight(layer.name("weight"), (rows, columns), main, parts, decode, checks)


def _one_byte(layer: Layer, scheme: Scheme) -> PackedWeight:
    rows, columns = layer.main("weight", ("F8_E4M3",) if scheme.is_float else ("I8",))
    grid, block = _grid(layer, scheme, (rows, columns), "weight")
    scale = _scale(layer, grid)
    checks: dict[str, Check] = {scale: finite}
    known = ["weight", "weight_scale"]
    zero = None
    if not scheme.symmetric:
        if scheme.is_float:
            reason = "zero points of fp8 are not supported."
            raise layer.error(NOT_DEQUANTIZABLE, "weight", reason)
        shape = layer.tensors["weight_scale"].shape
        zero = layer.part("weight_zero_point", ("I8",), shape)
        known.append("weight_zero_point")
    return PackedWeight(
        layer.name("weight"),
        (rows, columns),
        layer.name("weight"),
        layer.refuse_others(tuple(known), _DROPPED),
        _Decoder(layer.name("weight"), scale, zero, grid, block, columns, 0, layer.dtype),
        checks,
    )


def _nvfp4(layer: Layer, scheme: Scheme) -> PackedWeight:
    rows, half = layer.main("weight_packed", ("U8",))
    if half % 8 or (scheme.group or 16) != 16:
        reason = f"{half * 2:,} inputs are no multiple of a group of 16."
        raise layer.error(NOT_DEQUANTIZABLE, "weight_packed", reason)
    scale = layer.part("weight_scale", ("F8_E4M3",), (rows, half // 8))
    overall = layer.part("weight_global_scale", ("F32",), (1,))
    main = layer.name("weight_packed")
    return PackedWeight(
        layer.name("weight"),
        (rows, half * 2),
        main,
        layer.refuse_others(("weight_packed", "weight_scale", "weight_global_scale"), _DROPPED),
        _Nvfp4Decoder(main, scale, overall, layer.dtype),
        {scale: finite, overall: finite_and_not_zero},
    )


_READERS = {_PACKED: _packed, _ONE_BYTE: _one_byte, _NVFP4: _nvfp4}


def _columns(layer: Layer, rows: int) -> int:
    """Return the inputs that a layer's ``weight_shape`` names."""
    info, text = layer.tensors[SHAPE], layer.values.get(SHAPE, b"")
    sizes = np.frombuffer(text, "<i8" if info.dtype == "I64" else "<i4").tolist()
    if len(sizes) != 2 or sizes[0] != rows or not 0 < sizes[1] < 1 << 40:
        reason = f"it says {sizes}; weight_packed has {rows:,} rows."
        raise layer.error(PART_MALFORMED, SHAPE, reason)
    return int(sizes[1])


def _scale(layer: Layer, grid: tuple[int, int]) -> str:
    shapes: list[tuple[int, ...]] = [grid]
    if grid == (1, 1):
        shapes = [(1,), (1, 1)]
    info = layer.tensors.get("weight_scale")
    fitting = [shape for shape in shapes if info is not None and info.shape == shape]
    return layer.part("weight_scale", SCALE_DTYPES, (fitting or shapes)[0])


def _grid(
    layer: Layer, scheme: Scheme, shape: tuple[int, int], main: str
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return rows and columns of scales, and the rows and columns that one scale is for."""
    rows, columns = shape
    match scheme.strategy:
        case "tensor":
            return (1, 1), (rows, columns)
        case "channel":
            return (rows, 1), (1, columns)
        case "group" if scheme.group and columns % scheme.group == 0:
            return (rows, columns // scheme.group), (1, scheme.group)
        case "block" if scheme.block is not None and scheme.layout == _ONE_BYTE:
            height, width = scheme.block
            return (-(-rows // height), -(-columns // width)), scheme.block
    reason = f'the strategy "{printable(scheme.strategy)}" does not fit {columns:,} inputs.'
    raise layer.error(NOT_DEQUANTIZABLE, main, reason)


# --- the config ----------------------------------------------------------------------------------


def _schemes(layer: Layer, main: str) -> list[Scheme]:
    """Return the different schemes that the config can mean for a layer.

    Raises:
        LayerError: there is none, or one that is not supported.
    """

    def wrong(reason: str) -> LayerError:
        return layer.error(NOT_DEQUANTIZABLE, main, reason)

    groups = layer.settings.get("config_groups")
    named = [*groups.values()] if isinstance(groups, Mapping) else []
    if not named or len(named) > _MOST_GROUPS:
        raise wrong("the config names no groups of layers.")
    covering = [group for group in named if isinstance(group, Mapping) and _covers(group, layer)]
    schemes = []
    for group in covering or named:
        weight = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weight, Mapping):
            raise wrong("a group of the config says nothing of weights.")
        name = group.get("format") or layer.settings.get("format")
        if name not in _LAYOUTS:
            raise wrong(f'the format "{printable(str(name))}" is not supported.')
        scheme = _scheme(_LAYOUTS[str(name)], weight)
        if scheme is None:
            raise wrong("the config's settings of the weights are not supported.")
        schemes.append(scheme)
    return [*dict.fromkeys(schemes)]


def _covers(group: Mapping[str, object], layer: Layer) -> bool:
    """Say whether a group's targets name the layer, or a class of layers."""
    targets = group.get("targets")
    for target in targets if isinstance(targets, list) else []:
        if not isinstance(target, str):
            continue
        if re.fullmatch(r"[A-Z]\w*", target) or target == layer.path:
            return True
        if layer.path.endswith(f".{target}"):
            return True
        if target.startswith("re:"):
            pattern = Pattern("quantization_config", target.removeprefix("re:"))
            try:
                ((hit,),) = search([pattern], [layer.path])
            except (CheckpointError, SurroundingsError):
                return True  # it is not clear, so that the shapes have to tell
            if hit is not None:
                return True
    return False


def _scheme(layout: str, weight: Mapping[str, object]) -> Scheme | None:
    """Return a scheme; None if a setting is not supported."""
    bits, strategy = whole(weight, "num_bits"), weight.get("strategy")
    group = whole(weight, "group_size")
    if strategy is None:
        strategy = "tensor" if group is None else "channel" if group == -1 else "group"
    kind = weight.get("type", "int")
    fits = {
        _PACKED: kind == "int" and bits is not None and 2 <= bits <= 8,
        _ONE_BYTE: kind in ("int", "float") and bits == 8,
        _NVFP4: kind == "float" and bits == 4,
    }[layout]
    if not fits or bits is None or not isinstance(strategy, str):
        return None
    found = sizes(weight.get("block_structure"), 2)
    block = None if found is None else (found[0], found[1])
    symmetric = weight.get("symmetric", True) is True
    return Scheme(layout, bits, strategy, group, block, symmetric, kind == "float")


FORMAT = Format(
    "compressed-tensors",
    "compressed-tensors",
    weights,
    signs="weight_(packed|shape|scale|zero_point|global_scale|g_idx)|input_scale",
    packed="weight_packed",
    dtypes=("F8_E4M3", "I8"),
    cast=cast_to_model,
    needs_config=True,
    dropped=_DROPPED,
    tells_shape=SHAPE,
)
