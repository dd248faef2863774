"""compressed-tensors: integers in a stream of bits, int8 or fp8 with scales, and nvfp4.

    W = cast(cast(q - zero) * scale)             all in the dtype of the scale
    nvfp4:  W = bfloat16(value * (scale / global scale)),   the product in float32

Then the library casts to the dtype of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from vera_convert.base.quantized.layer import (
    KEPT_IF_DEQUANTIZED,
    SCALE_DTYPES,
    Array,
    Format,
    Layer,
    LayerError,
    PackedWeight,
    PartReader,
    finite,
    finite_and_not_zero,
    size_pair,
    whole,
)
from vera_convert.base.quantized.packing import (
    BFLOAT16,
    E2M1,
    FLOAT_OF,
    Rows,
    integers,
    looked_up_rows,
    pair_table,
    rows_of,
    scaled_rows,
    stream,
    widened,
)
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
"""The layouts of a weight in the supported formats."""
_PAIRS = pair_table(E2M1, high_first=False)
_DROPPED = frozenset(
    """
    input_global_scale input_scale input_zero_point output_scale output_zero_point
    k_scale v_scale q_scale
    """.split()  # noqa: SIM905 - words read best as a text
)
"""Scales of the values between layers: a dequantized model leaves these scales out."""
_MOST_GROUPS = 64
_UNORDERED = (None, False, "weight", "static")
"""Values of ``actorder`` under which each group consists of neighboring inputs."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a group of the config quantizes weights.

    Attributes:
        layout: one of the layouts of `_LAYOUTS`.
        bits: of a value.
        strategy: ``tensor``, ``channel``, ``group``, ``block`` or ``tensor_group``.
        group: the number of inputs for each scale; None if the strategy has no groups.
        block: the rows and columns for each scale; None if the strategy has no blocks.
        symmetric: whether the weight lacks zero points.
        is_float: whether values are floats, not integers.
    """

    layout: str
    bits: int
    strategy: str
    group: int | None
    block: tuple[int, int] | None
    symmetric: bool
    is_float: bool


# --- layers --------------------------------------------------------------------------------------


def weights(layer: Layer) -> Iterator[PackedWeight]:
    """Yield the weight of a layer.

    Raises:
        LayerError: a part is missing, superfluous or malformed, or a setting is unsafe.
    """
    main = "weight_packed" if "weight_packed" in layer.tensors else "weight"
    for field_name in ("sparsity_config", "transform_config"):
        setting = layer.settings.get(field_name)
        is_dense = field_name == "sparsity_config" and setting == {"format": "dense"}
        if setting not in (None, {}) and not is_dense:
            raise layer.unsupported(main, f"a {field_name} is not supported.")
    groups = layer.settings.get("config_groups")
    named = [*groups.values()] if isinstance(groups, Mapping) else []
    reason = "" if named else "the config names no groups of layers."
    if len(named) > _MOST_GROUPS:
        reason = f"the config has {len(named):,} config_groups; up to {_MOST_GROUPS} are read."
    if reason:
        raise layer.unsupported(main, reason)
    found: dict[Scheme, PackedWeight] = {}
    errors: list[LayerError] = []
    for group in named:
        try:
            scheme = _scheme(layer, main, group)
            found[scheme] = _READERS[scheme.layout](layer, scheme)
        except LayerError as error:
            errors.append(error)
    if not found:
        raise errors[0]
    if len(found) > 1:
        raise layer.unsupported(main, "several groups of the config fit the layer.")
    yield from found.values()


def _packed(layer: Layer, scheme: Scheme) -> PackedWeight:
    rows, words = layer.main("weight_packed", ("I32",))
    layer.part(SHAPE, ("I64", "I32"), (2,))
    columns, bits = _columns(layer, rows), scheme.bits
    if words != -(-columns * bits // 32):
        reason = f"{words:,} words of a row do not hold {columns:,} values of {bits} bits."
        raise layer.malformed("weight_packed", reason)
    main = layer.name("weight_packed")

    def codes(read: PartReader, first: int, last: int) -> Rows:
        return integers(read.rows(main, first, last), bits, columns, -(1 << (bits - 1)))

    return _on_grid(layer, scheme, (rows, columns), codes, ("weight_packed", SHAPE))


def _one_byte(layer: Layer, scheme: Scheme) -> PackedWeight:
    rows, columns = layer.main("weight", ("F8_E4M3",) if scheme.is_float else ("I8",))
    if scheme.is_float and not scheme.symmetric:
        raise layer.unsupported("weight", "zero points of fp8 are not supported.")
    main = layer.name("weight")

    def values(read: PartReader, first: int, last: int) -> Rows:
        return rows_of(read.rows(main, first, last))

    return _on_grid(layer, scheme, (rows, columns), values, ("weight",))


def _on_grid(
    layer: Layer,
    scheme: Scheme,
    shape: tuple[int, int],
    values: Callable[[PartReader, int, int], Rows],
    known: tuple[str, ...],
) -> PackedWeight:
    """Return a weight of integers or fp8, with a scale for each block of a grid.

    Args:
        layer: the layer.
        scheme: how the layer is quantized.
        shape: outputs and inputs.
        values: reads rows before the multiplication by the scales.
        known: the checked parts, the packed values first.
    """
    grid, block = _grid(layer, scheme, shape, known[0])
    scale = _scale(layer, grid)
    zero = None if scheme.symmetric else _zero_point(layer, scheme, grid)
    bits = scheme.bits if scheme.layout == _PACKED else 0

    def rows(read: PartReader, first: int, last: int) -> Array:
        begin, end = first // block[0], -(-last // block[0])
        of_rows = np.arange(first, last) // block[0] - begin

        def on_grid(name: str) -> Array:
            return read.flat(name, begin * grid[1], end * grid[1]).reshape(-1, grid[1])

        zeros, factors = None, on_grid(scale)[of_rows]
        if zero is not None:
            zeros = _unpacked_rows(read, zero, begin, end, bits) if bits else on_grid(zero)
            zeros = zeros[of_rows]
        dtypes = factors.dtype, FLOAT_OF[layer.dtype]
        q, size = values(read, first, last), (last - first, shape[1])
        return scaled_rows(q, size, factors, zeros, width=block[1], dtypes=dtypes)

    more = ("weight_scale",) if zero is None else ("weight_scale", "weight_zero_point")
    parts = layer.refuse_others((*known, *more), _DROPPED)
    main, checks = layer.name(known[0]), {scale: finite}
    return PackedWeight(layer.name("weight"), shape, main, parts, rows, checks)


def _zero_point(layer: Layer, scheme: Scheme, grid: tuple[int, int]) -> str:
    """Return the name of the zero points, which a stream of bits packs along the rows."""
    if scheme.layout != _PACKED:
        return layer.part("weight_zero_point", ("I8",), layer.tensors["weight_scale"].shape)
    packed_rows = -(-grid[0] * scheme.bits // 32)
    return layer.part("weight_zero_point", ("I32",), (packed_rows, grid[1]))


def _unpacked_rows(read: PartReader, name: str, first: int, last: int, bits: int) -> Array:
    """Return rows of zero points from words packed along the rows."""
    words = read.rows(name, first // 32 * bits, -(-last * bits // 32))
    skipped = first % 32  # every 32 elements fill whole words
    codes = stream(words.T, bits, skipped, skipped + last - first).T
    return codes.astype(np.int16) - (1 << (bits - 1))


def _nvfp4(layer: Layer, scheme: Scheme) -> PackedWeight:
    rows, half = layer.main("weight_packed", ("U8",))
    if half % 8 or (scheme.group or 16) != 16:
        reason = f"{half * 2:,} inputs are no multiple of a group of 16."
        raise layer.unsupported("weight_packed", reason)
    scale = layer.part("weight_scale", ("F8_E4M3",), (rows, half // 8))
    overall = layer.part("weight_global_scale", ("F32",), (1,))
    main = layer.name("weight_packed")

    def decode(read: PartReader, first: int, last: int) -> Array:
        factors = widened(read.rows(scale, first, last)) / read.flat(overall, 0, 1)
        packed, dtypes = read.rows(main, first, last), (BFLOAT16, FLOAT_OF[layer.dtype])
        values, size = looked_up_rows(_PAIRS, packed), (last - first, half * 2)
        return scaled_rows(values, size, factors, width=16, dtypes=dtypes)

    known = ("weight_packed", "weight_scale", "weight_global_scale")
    parts, checks = (
        layer.refuse_others(known, _DROPPED),
        {scale: finite, overall: finite_and_not_zero},
    )
    return PackedWeight(layer.name("weight"), (rows, half * 2), main, parts, decode, checks)


_READERS = {_PACKED: _packed, _ONE_BYTE: _one_byte, _NVFP4: _nvfp4}


def _columns(layer: Layer, rows: int) -> int:
    """Return the inputs that a layer's ``weight_shape`` names."""
    info, text = layer.tensors[SHAPE], layer.values.get(SHAPE, b"")
    sizes = np.frombuffer(text, "<i8" if info.dtype == "I64" else "<i4").tolist()
    if len(sizes) != 2 or sizes[0] != rows or not 0 < sizes[1] < 1 << 40:
        reason = f"it says {sizes}; weight_packed has {rows:,} rows."
        raise layer.malformed(SHAPE, reason)
    return int(sizes[1])


def _scale(layer: Layer, grid: tuple[int, int]) -> str:
    info = layer.tensors.get("weight_scale")
    is_single = grid == (1, 1) and (info is None or info.shape != grid)
    return layer.part("weight_scale", SCALE_DTYPES, (1,) if is_single else grid)


def _grid(
    layer: Layer, scheme: Scheme, shape: tuple[int, int], main: str
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return rows and columns of scales, and the rows and columns of a block for each scale."""
    rows, columns = shape
    match scheme.strategy:
        case "tensor":
            return (1, 1), (rows, columns)
        case "channel":
            return (rows, 1), (1, columns)
        case "group" if scheme.group and scheme.group > 0 and columns % scheme.group == 0:
            return (rows, columns // scheme.group), (1, scheme.group)
        case "block" if scheme.block is not None and scheme.layout == _ONE_BYTE:
            height, width = scheme.block
            return (-(-rows // height), -(-columns // width)), scheme.block
    reason = f'the strategy "{printable(scheme.strategy)}" does not fit {columns:,} inputs.'
    raise layer.unsupported(main, reason)


# --- the config ----------------------------------------------------------------------------------


def _scheme(layer: Layer, main: str, group: object) -> Scheme:
    """Return the scheme of a group of the config.

    Raises:
        LayerError: the scheme is not supported.
    """
    wrong = partial(layer.unsupported, main)
    weight = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(group, Mapping) or not isinstance(weight, Mapping):
        raise wrong("a group of the config says nothing of weights.")
    name = str(group.get("format") or layer.settings.get("format"))
    if name not in _LAYOUTS:
        raise wrong(f'the format "{printable(name)}" is not supported.')
    if weight.get("actorder") not in _UNORDERED:
        raise wrong("an order of the inputs (actorder) is not supported.")
    bits, strategy = whole(weight, "num_bits"), weight.get("strategy")
    size = whole(weight, "group_size")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    layout, kind = _LAYOUTS[name], weight.get("type", "int")
    fits = {
        _PACKED: kind == "int" and bits is not None and 2 <= bits <= 8,
        _ONE_BYTE: kind in ("int", "float") and bits == 8,
        _NVFP4: kind == "float" and bits == 4,
    }[layout]
    if not fits or bits is None or not isinstance(strategy, str):
        raise wrong("the config's settings of the weights are not supported.")
    block, symmetric = (
        size_pair(weight.get("block_structure")),
        weight.get("symmetric", True) is True,
    )
    return Scheme(layout, bits, strategy, size, block, symmetric, kind == "float")


FORMAT = Format(
    "compressed-tensors",
    "compressed-tensors",
    weights,
    signs="weight_(packed|shape|scale|zero_point|global_scale|g_idx)|input_scale",
    packed="weight_packed",
    dtypes=("F8_E4M3", "I8"),
    cast="model",
    needs_config=True,
    dropped=_DROPPED,
    tells_shape=SHAPE,
    plain=KEPT_IF_DEQUANTIZED,
)
