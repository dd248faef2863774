"""The stored factors of a LoRA: of equal rank and dtype, each value rounded once."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vera_convert import rules
from vera_convert.assembly.direct import memory_for
from vera_convert.delta import Array
from vera_convert.dtypes import BITS
from vera_convert.errors import CheckpointError
from vera_convert.files.tensorfile import NUMPY_DTYPE
from vera_convert.lora.factors import (
    PRODUCT_VALUES,
    Decomposition,
    Factors,
    Float64,
    balancing_powers,
    product,
    relative_error,
    rounding_error,
)
from vera_convert.lora.plan import LoraLayer, LoraPlan
from vera_convert.text import printable

SAMPLED_ROWS = 16
"""Outputs of a layer on which the rounding of exact factors is measured."""
SAMPLED_COLUMNS = 512
"""Inputs of a layer on which the rounding of exact factors is measured."""
_HALF = 0x8000
_LOW = 0xFFFF


@dataclass(frozen=True, slots=True, eq=False)
class StoredLayer:
    """The written factors of a layer.

    Attributes:
        lora_A: (rank, in).
        lora_B: (out, rank).
        error: the relative Frobenius error of the layer's delta; 0 for a delta of zeros.
        vanished: the share of both factors' values rounded to 0 by float16.
    """

    lora_A: Array  # noqa: N815 -- the matrix is called A
    lora_B: Array  # noqa: N815
    error: float = 0.0
    vanished: float = 0.0


class _InputSide(NamedTuple):
    """The input side of exact factors, which layers with as many inputs share.

    Attributes:
        lora_A: (rank, in), as stored.
        exact: (rank, up to 512) in float32, the columns of A on which the rounding is measured.
        stored: the same columns of lora_A.
    """

    lora_A: Array  # noqa: N815 -- the matrix is called A
    exact: Array
    stored: Array


class Shared:
    """The memory and the matrices that the layers of a LoRA share.

    Attributes:
        room: memory for the largest lora_B. New memory for each layer would take longer to get.
        start: where the first tensor starts in the file, for `memory_for`.
        inputs: the input sides so far, by the number of inputs.
    """

    def __init__(self, plan: LoraPlan, start: int) -> None:
        outputs = max(layer.shape.out_features for layer in plan.layers)
        self.room = memory_for(start, outputs * plan.rank * BITS[plan.dtype] // 8)
        self.start = start
        self.inputs: dict[int, _InputSide] = {}


def stored_layer(layer: LoraLayer, plan: LoraPlan, shared: Shared) -> StoredLayer:
    """Return a layer's factors in the rank and dtype of a plan, and measure the error.

    The error compares the stored delta with the adapter's: on every output of an approximated
    layer, and else on up to 16 outputs and 512 inputs, spread evenly.

    Args:
        layer: the layer.
        plan: the plan.
        shared: the memory and the matrices that the plan's layers share.

    Raises:
        CheckpointError: a value is too large for the dtype.
    """
    factors = layer.factors()
    if len(plan.rows) < factors.rank:
        factors = factors.select(plan.rows)
    used = np.flatnonzero(factors.d)
    try:
        if not plan.reduced:
            return _exact(factors, plan.dtype, shared, shared.inputs)
        if len(used) > plan.rank:
            return _approximated(factors, plan, shared.room)
        return _padded(_exact(factors.select(used), plan.dtype, shared, {}), plan.rank)
    except OverflowError as error:
        raise CheckpointError(
            rules.LORA_OVERFLOW.at(printable(layer.module), f"{error}.")
        ) from error


def _exact(
    factors: Factors, dtype: str, shared: Shared, known: dict[int, _InputSide]
) -> StoredLayer:
    """Return the exact factors, rounded; for float16, each row of rank is balanced.

    Args:
        factors: the layer's operands.
        dtype: the stored dtype, as safetensors names it.
        shared: the memory.
        known: the input sides so far, of layers with these rows of A, by the number of inputs.
    """
    powers = balancing_powers(factors) if dtype == "F16" else np.zeros(factors.rank, np.int64)
    balanced = bool(powers.any())
    side = known.get(factors.in_features)
    if side is None or balanced:
        side = _input_side(factors.A, powers, dtype, shared.start)
    if not balanced:
        known[factors.in_features] = side
    lost = _vanished(factors.A, side.lora_A)
    lora_B = _empty_B(factors, factors.rank, side.lora_A.dtype, shared.room)
    shrunk = np.ldexp(1.0, -powers)
    for place, block in factors.lora_B_blocks():
        exact = np.multiply(block, shrunk, out=block) if balanced else block
        rounded_once(exact, dtype, lora_B[place])
        lost += _vanished(exact, lora_B[place])
    sample = replace(factors, A=side.exact)
    error = rounding_error(sample, side.stored, lora_B, _sample(factors.b), powers)
    return StoredLayer(side.lora_A, lora_B, error, lost / max(1, side.lora_A.size + lora_B.size))


def _input_side(A: Array, powers: NDArray[np.int64], dtype: str, start: int) -> _InputSide:
    """Return the input side of exact factors, with lora_A in `memory_for` the file."""
    kind = NUMPY_DTYPE[dtype]
    lora_A = memory_for(start, A.size * kind.itemsize).view(kind).reshape(A.shape)
    for row, values in enumerate(A):
        exact = values.astype(np.float64) * np.ldexp(1.0, powers[row])
        rounded_once(exact, dtype, lora_A[row])
    columns = slice(None, None, -(-A.shape[1] // SAMPLED_COLUMNS))
    exact = np.ascontiguousarray(A[:, columns], np.float32)
    return _InputSide(lora_A, exact, np.ascontiguousarray(lora_A[:, columns]))


def _approximated(factors: Factors, plan: LoraPlan, room: NDArray[np.uint8]) -> StoredLayer:
    """Return the best factors of the plan's rank, and measure the error on every output."""
    found = Decomposition.of(factors, plan.inputs)
    left, right = found.truncated(plan.rank)
    exact = product(left, factors.A)
    # Singular vectors have no sign of their own: the largest entry of each row is made positive.
    signs = np.sign(exact[np.arange(len(exact)), np.abs(exact).argmax(axis=1)])
    exact, right = exact * signs[:, None], right * signs
    lora_A = rounded_once(exact, plan.dtype)
    lost = _vanished(exact, lora_A)
    lora_B = _empty_B(factors, len(left), lora_A.dtype, room)
    for place, block in factors.lora_B_blocks(PRODUCT_VALUES):
        exact = block @ right
        rounded_once(exact, plan.dtype, lora_B[place])
        lost += _vanished(exact, lora_B[place])
    error = relative_error(factors, found.size, lora_A, lora_B)
    vanished = lost / (lora_A.size + lora_B.size)
    return _padded(StoredLayer(lora_A, lora_B, error, vanished), plan.rank)


def _empty_B(  # noqa: N802 -- the matrix is called B
    factors: Factors, rank: int, kind: np.dtype[Any], room: NDArray[np.uint8]
) -> Array:
    shape = (factors.out_features, rank)
    return room[: math.prod(shape) * kind.itemsize].view(kind).reshape(shape)


def _padded(layer: StoredLayer, rank: int) -> StoredLayer:
    """Return a layer with rows and columns of zeros up to a rank."""
    missing = rank - len(layer.lora_A)
    lora_A = np.pad(layer.lora_A, ((0, missing), (0, 0)))
    return replace(layer, lora_A=lora_A, lora_B=np.pad(layer.lora_B, ((0, 0), (0, missing))))


def _vanished(exact: Array, stored: Array) -> int:
    """Return how many values float16 rounds to 0; other dtypes keep the smallest values."""
    if stored.dtype != np.float16:
        return 0
    return int(np.count_nonzero(exact) - np.count_nonzero(stored))


def _sample(b: Array) -> NDArray[np.intp]:
    """Return up to 16 outputs with a change by the layer, spread evenly."""
    changed = np.flatnonzero(b)
    count = min(len(changed), SAMPLED_ROWS)
    return changed[np.linspace(0, max(len(changed) - 1, 0), count).astype(np.intp)]


def rounded_once(values: Float64, dtype: str, out: Array | None = None) -> Array:
    """Return float64 values in a narrower dtype, each rounded to nearest, ties to even, once.

    ml_dtypes rounds float64 to bfloat16 by way of float32, which rounds twice. A float32 value that
    lies halfway between two bfloat16 values although the float64 value does not is therefore moved
    by one unit towards the float64 value first.

    Args:
        values: the values, all finite.
        dtype: the narrower dtype, as safetensors names it.
        out: filled and returned, if given.

    Raises:
        OverflowError: a value is too large for the dtype.
    """
    out = np.empty(values.shape, NUMPY_DTYPE[dtype]) if out is None else out
    try:
        with np.errstate(over="raise", under="ignore"):
            if dtype != "BF16":
                np.copyto(out, values, casting="same_kind")
                return out
            narrow = values.astype(np.float32)
    except FloatingPointError as error:
        raise _too_large(out) from error
    flat, exact = narrow.reshape(-1), values.reshape(-1)
    halfway = np.flatnonzero((flat.view(np.uint32) & _LOW) == _HALF)
    near, exact = flat[halfway], exact[halfway]
    towards = np.where(exact > near, np.inf, -np.inf).astype(np.float32)
    flat[halfway] = np.where(exact == near, near, np.nextafter(near, towards))
    out[...] = narrow
    if not np.isfinite(out).all():  # ml_dtypes raises no flag
        raise _too_large(out)
    return out


def _too_large(out: Array) -> OverflowError:
    return OverflowError(f"a value of its LoRA is too large for {out.dtype}")
