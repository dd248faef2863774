"""bitsandbytes 4-bit (nf4 and fp4): a table of 16 values, times the largest value of each block.

    W = cast(table[code] * absmax[block])        product in float32

The codes lie in one flat sequence, two in each byte, the high half first. Blocks run over the ends
of rows, and the last block can be short. "Double" quantization stores absmax itself in 8 bits:

    absmax = float32(nested_quant_map[code] * nested_absmax[block of 256]) + nested_offset
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from vera_convert.base.quantized.layer import (
    Array,
    Check,
    Decode,
    Format,
    Layer,
    PackedWeight,
    PartReader,
    finite,
    size_pair,
)
from vera_convert.base.quantized.packing import (
    DTYPE_OF,
    FLOAT_OF,
    looked_up_rows,
    pair_table,
    scaled_rows,
)
from vera_convert.errors import CheckpointError
from vera_convert.files.strict_json import parse_json
from vera_convert.tables import table

STATE = "weight.quant_state.bitsandbytes__"
TABLES = {
    kind: np.array(values, np.float32)
    for kind, values in table(__file__, "bitsandbytes_4bit.toml").items()
}
_PAIRS = {kind: pair_table(table, high_first=True) for kind, table in TABLES.items()}
_STORAGE = ("U8", "I8", "BF16", "F16", "F32")
_NESTED_BLOCK = 256
_BLOCK_SIZES = frozenset(1 << n for n in range(5, 13))


@dataclass(frozen=True, slots=True)
class State:
    """The contents of a ``quant_state``.

    Attributes:
        kind: ``nf4`` or ``fp4``.
        block: the number of values with a common absmax.
        dtype: the dtype of the dequantized weight, by safetensors' name.
        shape: of the weight.
        offset: the summand of a nested absmax; None if absmax is plain float32.
    """

    kind: str
    block: int
    dtype: str
    shape: tuple[int, int]
    offset: float | None = None


def _decoder(state: State, weight: str, absmax: str, nested: Sequence[str]) -> Decode:
    """Return the decoder of a weight: a function from row numbers to rows.

    Args:
        state: how the weight is packed.
        weight: the tensor of the codes.
        absmax: the tensor of the largest values.
        nested: the table and the scales of nested largest values; empty for plain float32 values.
    """
    (rows, columns), block = state.shape, state.block

    def decode(read: PartReader, first: int, last: int) -> Array:
        begin, stop = first * columns // block, -(-last * columns // block)
        end = min(stop * block, rows * columns)
        packed = read.raw(weight, begin * block // 2, (end + 1) // 2)
        # A short last block gets codes to drop.
        codes = looked_up_rows(_PAIRS[state.kind], np.resize(packed, (stop - begin, block // 2)))
        largest = _largest(read, begin, stop)[:, None]
        dtypes, size = (FLOAT_OF[state.dtype],), (stop - begin, block)
        values = scaled_rows(codes, size, largest, width=block, dtypes=dtypes).reshape(-1)
        skipped = first * columns - begin * block
        return values[skipped:][: (last - first) * columns].reshape(last - first, columns)

    def _largest(read: PartReader, begin: int, stop: int) -> Array:
        """Return the largest value of each block, from block `begin` to `stop` (exclusive)."""
        stored = read.flat(absmax, begin, stop)
        if not nested:
            return stored
        table, scales = nested
        start = begin // _NESTED_BLOCK
        factors = read.flat(scales, start, -(-stop // _NESTED_BLOCK))
        of_blocks = factors[np.arange(begin, stop) // _NESTED_BLOCK - start]
        product = read.flat(table, 0, 256)[stored] * of_blocks
        return np.asarray(product + np.float32(state.offset or 0.0))

    return decode


def weights(layer: Layer) -> Iterator[PackedWeight]:
    """Yield the weight of a layer.

    Raises:
        LayerError: a part is missing, superfluous, malformed, or says something unknown.
    """
    rest = next((each for each in layer.tensors if each.startswith(STATE)), None)
    if rest is None:
        raise layer.missing(f"{STATE}nf4", "it says how the weight is packed.")
    state = _state(layer, rest)
    count = state.shape[0] * state.shape[1]
    _check_codes(layer, count)
    blocks = -(-count // state.block)
    table = layer.part("weight.quant_map", ("F32",), (16,))
    absmax = layer.part("weight.absmax", ("F32" if state.offset is None else "U8",), (blocks,))
    nested: tuple[str, ...] = ()
    if state.offset is not None:
        few = (-(-blocks // _NESTED_BLOCK),)
        nested = (
            layer.part("weight.nested_quant_map", ("F32",), (256,)),
            layer.part("weight.nested_absmax", ("F32",), few),
        )
    checks: dict[str, Check] = {table: lambda values: _table(values, state.kind)}
    checks |= dict.fromkeys(nested or (absmax,), finite)
    weight = layer.name("weight")
    known = {name.removeprefix(layer.name("")) for name in (weight, table, absmax, *nested)}
    parts = layer.refuse_others({rest, *known})
    decode = _decoder(state, weight, absmax, nested)
    yield PackedWeight(weight, state.shape, weight, parts, decode, checks)


def _check_codes(layer: Layer, count: int) -> None:
    """Check that the packed values are bytes in one column, as many as `count` values need.

    Raises:
        LayerError: the packed values are missing, or have another shape or dtype.
    """
    weight = layer.tensors.get("weight")
    if weight is None:
        raise layer.missing("weight", f"{count:,} values of 4 bits are needed.")
    is_column = weight.shape[1:] == (1,) and weight.dtype in _STORAGE
    if not is_column or weight.nbytes != (count + 1) // 2:
        reason = f"its values are {[*weight.shape]} of {weight.dtype}"
        reason += f"; {count:,} values of 4 bits are needed."
        raise layer.malformed("weight", reason)


def _table(values: Array, kind: str) -> str | None:
    same = bool(np.array_equal(values, TABLES[kind]))
    return None if same else f"these are not the 16 values of {kind}."


def _state(layer: Layer, rest: str) -> State:
    """Return the contents of the ``quant_state`` of a layer.

    Raises:
        LayerError: the state is cut, no JSON, or says something unknown.
    """
    wrong = partial(layer.malformed, rest)
    text = layer.values.get(rest)
    if text is None or layer.tensors[rest].dtype != "U8" or len(layer.tensors[rest].shape) != 1:
        raise wrong("it is no U8 vector of up to 4,096 bytes.")
    try:
        document = parse_json(text, place=rest)
    except CheckpointError:
        raise wrong("it is no JSON.") from None
    if not isinstance(document, dict):
        raise wrong("it is no JSON object.")
    kind, block, dtype = (document.get(key) for key in ("quant_type", "blocksize", "dtype"))
    kind, dtype = str(kind), str(dtype).removeprefix("torch.")
    if kind not in TABLES or rest != f"{STATE}{kind}":
        raise wrong("its quant_type must be nf4 or fp4, as its name says.")
    if type(block) is not int or block not in _BLOCK_SIZES or dtype not in DTYPE_OF:
        reason = "a blocksize (a power of two from 32 to 4,096) and a dtype (bfloat16, float16 "
        raise wrong(f"{reason}or float32) are needed.")
    is_nested, offset = any(key.startswith("nested_") for key in document), None
    if is_nested:
        offset = _nested_offset(document)
        if offset is None:
            raise wrong("nested_offset, nested_blocksize 256 and nested_dtype float32 are needed.")
    shape = size_pair(document.get("shape"))
    if shape is None:
        raise wrong("its shape is no pair of sizes.")
    return State(kind, block, DTYPE_OF[dtype], shape, offset)


def _nested_offset(document: Mapping[str, object]) -> float | None:
    """Return the summand of a nested absmax; None if the nested fields of a state are unknown."""
    offset = document.get("nested_offset")
    sizes = document.get("nested_blocksize"), document.get("nested_dtype")
    if isinstance(offset, bool) or sizes != (_NESTED_BLOCK, "float32"):
        return None
    return float(offset) if isinstance(offset, int | float) else None


FORMAT = Format(
    "bitsandbytes 4-bit",
    "bitsandbytes",
    weights,
    signs=r"weight\.(absmax|quant_map|nested_.*|quant_state\..*)",
    dtypes=("U8",),
    cast="computation",
    tells_shape=rf"{re.escape(STATE)}.*",
)
