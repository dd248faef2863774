"""The stored factors of a LoRA: of equal rank and dtype, each value rounded once."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vera_convert import rules
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


def stored_layer(layer: LoraLayer, plan: LoraPlan, room: NDArray[np.uint8]) -> StoredLayer:
    """Return a layer's factors in the rank and dtype of a plan, and measure the error.

    The error compares the stored delta with the adapter's: on every output of an approximated
    layer, and else on up to 16 outputs and 512 inputs, spread evenly.

    Args:
        layer: the layer.
        plan: the plan.
        room: bytes for lora_B, `room_for` the plan.

    Raises:
        CheckpointError: a value is too large for the dtype.
    """
    factors = layer.factors()
    if len(plan.rows) < factors.rank:
        factors = factors.select(plan.rows)
    used = np.flatnonzero(factors.d)
    try:
        if not plan.reduced:
            return _exact(factors, plan.dtype, room)
        if len(used) > plan.rank:
            return _approximated(factors, plan, room)
        return _padded(_exact(factors.select(used), plan.dtype, room), plan.rank)
    except OverflowError as error:
        raise CheckpointError(
            rules.LORA_OVERFLOW.at(printable(layer.module), f"{error}.")
        ) from error


def _require_finite(*matrices: Array) -> None:
    for matrix in matrices:
        if not np.isfinite(matrix).all():
            raise OverflowError(f"a value of its LoRA is too large for {matrix.dtype}")


def _exact(factors: Factors, dtype: str, room: NDArray[np.uint8]) -> StoredLayer:
    """Return the exact factors, rounded; for float16, each row of rank is balanced."""
    powers = balancing_powers(factors) if dtype == "F16" else np.zeros(factors.rank, np.int64)
    lora_A, lost = _exact_A(factors, powers, dtype)
    lora_B = _empty_B(factors, factors.rank, lora_A.dtype, room)
    for place, block in factors.lora_B_blocks():
        exact = np.ldexp(block, -powers, out=block) if powers.any() else block
        rounded_once(exact, dtype, lora_B[place])
        _require_finite(lora_B[place])  # now, while the block is in the core's cache
        lost += _vanished(exact, lora_B[place])
    inputs = slice(None, None, -(-factors.in_features // SAMPLED_COLUMNS))
    sample = factors.inputs(inputs)
    error = rounding_error(sample, lora_A[:, inputs], lora_B, _sample(factors.b), powers)
    return StoredLayer(lora_A, lora_B, error, lost / max(1, lora_A.size + lora_B.size))


def _exact_A(  # noqa: N802 -- the matrix is called A
    factors: Factors, powers: NDArray[np.int64], dtype: str
) -> tuple[Array, int]:
    """Return lora_A, and how many values float16 rounds to 0; A itself is never copied."""
    kind, lost = NUMPY_DTYPE[dtype], 0
    if factors.A.dtype == kind and not powers.any():
        return factors.A, lost
    lora_A = np.empty(factors.A.shape, kind)
    for row, values in enumerate(factors.A):
        exact = np.ldexp(values.astype(np.float64), powers[row])
        rounded_once(exact, dtype, lora_A[row])
        lost += _vanished(exact, lora_A[row])
    _require_finite(lora_A)
    return lora_A, lost


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
    _require_finite(lora_A, lora_B)
    error = relative_error(factors, found.size, lora_A, lora_B)
    vanished = lost / (lora_A.size + lora_B.size)
    return _padded(StoredLayer(lora_A, lora_B, error, vanished), plan.rank)


def room_for(plan: LoraPlan) -> NDArray[np.uint8]:
    """Return memory for the largest lora_B. New memory for each layer would take longer to get."""
    outputs = max(layer.shape.out_features for layer in plan.layers)
    return np.empty(outputs * plan.rank * BITS[plan.dtype] // 8, np.uint8)


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


def _vanished(exact: Float64, stored: Array) -> int:
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
        values: the values.
        dtype: the narrower dtype, as safetensors names it.
        out: filled and returned, if given.
    """
    out = np.empty(values.shape, NUMPY_DTYPE[dtype]) if out is None else out
    with np.errstate(over="ignore", under="ignore"):
        if dtype != "BF16":
            np.copyto(out, values, casting="same_kind")
            return out
        narrow = values.astype(np.float32)
    flat, exact = narrow.reshape(-1), values.reshape(-1)
    halfway = np.flatnonzero((flat.view(np.uint32) & _LOW) == _HALF)
    near, exact = flat[halfway], exact[halfway]
    towards = np.where(exact > near, np.inf, -np.inf).astype(np.float32)
    flat[halfway] = np.where(exact == near, near, np.nextafter(near, towards))
    out[...] = narrow
    return out
