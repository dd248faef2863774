"""The factors of a LoRA as they are stored: one rank, one dtype, each value rounded once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vera_convert.errors import CheckpointError
from vera_convert.files.tensorfile import NUMPY_DTYPE
from vera_convert.lora.factors import (
    Factors,
    Float64,
    balancing_powers,
    decompose,
    input_basis,
    relative_error,
    rounding_error,
)
from vera_convert.lora.plan import LoraLayer, LoraPlan
from vera_convert.rules import LORA_OVERFLOW
from vera_convert.text import printable

Array = NDArray[Any]

SAMPLED_ROWS = 16
"""Outputs of a layer on which rounding to float32 or bfloat16 is measured."""
_HALF = 0x8000
_LOW = 0xFFFF


@dataclass(frozen=True, slots=True, eq=False)
class StoredLayer:
    """The factors of one layer as they are written.

    Attributes:
        lora_A: (rank, in).
        lora_B: (out, rank).
        error: the relative Frobenius error of the layer's delta; 0 for a delta of zeros.
        vanished: the share of the values of both factors that float16 rounds to 0.
    """

    lora_A: Array  # noqa: N815 -- the matrix is called A
    lora_B: Array  # noqa: N815
    error: float = 0.0
    vanished: float = 0.0


def stored_layer(layer: LoraLayer, plan: LoraPlan) -> StoredLayer:
    """Return the factors of one layer in the rank and dtype of a plan, and measure their error.

    The error compares the stored delta with the adapter's. If the rank is not reduced, rounding to
    float32 and bfloat16 is measured on 16 outputs of the layer, spread evenly.

    Raises:
        CheckpointError: a value is too large for the dtype.
    """
    factors = layer.factors()
    if len(plan.rows) < factors.rank:
        factors = factors.select(plan.rows)
    try:
        if plan.reduced or plan.dtype == "F16":
            return _approximated(factors, plan)
        return _rounded(factors, plan.dtype)
    except OverflowError as error:
        raise CheckpointError(LORA_OVERFLOW.at(printable(layer.module), f"{error}.")) from error


def _require_finite(*matrices: Array) -> None:
    for matrix in matrices:
        if not np.isfinite(matrix).all():
            raise OverflowError(f"a value of its LoRA is too large for {matrix.dtype}")


def _rounded(factors: Factors, dtype: str) -> StoredLayer:
    """Return the exact factors, rounded."""
    kind = NUMPY_DTYPE[dtype]
    if factors.A.dtype == kind:
        lora_A = np.ascontiguousarray(factors.A)
    else:
        lora_A = rounded_once(factors.lora_A(), dtype)
    lora_B = np.empty((factors.out_features, factors.rank), kind)
    first = 0
    for block in factors.lora_B_blocks():
        lora_B[first : first + len(block)] = rounded_once(block, dtype)
        first += len(block)
    _require_finite(lora_A, lora_B)
    return StoredLayer(lora_A, lora_B, rounding_error(factors, lora_A, lora_B, _sample(factors.b)))


def _sample(b: Array) -> NDArray[np.intp]:
    """Return outputs that the layer changes, 16 at most, spread evenly."""
    changed = np.flatnonzero(b)
    count = min(len(changed), SAMPLED_ROWS)
    return changed[np.linspace(0, max(len(changed) - 1, 0), count).astype(np.intp)]


def _approximated(factors: Factors, plan: LoraPlan) -> StoredLayer:
    """Return the factors of the plan's rank, and measure their error on every output."""
    lora_A, lora_B = _of_rank(factors, plan)
    powers = np.zeros(len(lora_A), np.int64)
    if plan.dtype == "F16":
        norms = np.linalg.norm(lora_A, axis=1), np.linalg.norm(lora_B, axis=0)
        powers = balancing_powers(*norms)
    balanced = np.ldexp(lora_A, powers[:, None]), np.ldexp(lora_B, -powers)
    stored_A, stored_B = (rounded_once(matrix, plan.dtype) for matrix in balanced)
    _require_finite(stored_A, stored_B)
    # Compared without the powers of two, so that rounding alone differs.
    plain = (
        np.ldexp(stored_A.astype(np.float64), -powers[:, None]),
        np.ldexp(stored_B.astype(np.float64), powers),
    )
    error = relative_error(factors.lora_A(), factors.lora_B_blocks(), *plain)
    lost = sum(
        int(np.count_nonzero(values) - np.count_nonzero(stored))
        for values, stored in zip(balanced, (stored_A, stored_B), strict=True)
    )
    missing = plan.rank - len(stored_A)
    return StoredLayer(
        np.pad(stored_A, ((0, missing), (0, 0))),
        np.pad(stored_B, ((0, 0), (0, missing))),
        error,
        lost / (stored_A.size + stored_B.size) if plan.dtype == "F16" else 0.0,
    )


def _of_rank(factors: Factors, plan: LoraPlan) -> tuple[Float64, Float64]:
    """Return factors of at most the plan's rank: exact ones if d has no more values than that."""
    if not plan.reduced:
        return factors.lora_A(), factors.lora_B()
    used = np.flatnonzero(factors.d)
    if len(used) <= plan.rank:
        own = factors.select(used)
        return own.lora_A(), own.lora_B()
    return decompose(input_basis(factors, plan.bases), factors.lora_B()).truncated(plan.rank)


def rounded_once(values: Float64, dtype: str) -> Array:
    """Return float64 values in a narrower dtype, each rounded to nearest, ties to even, once.

    ml_dtypes rounds float64 to bfloat16 by way of float32, which rounds twice. A float32 value that
    lies halfway between two bfloat16 values although the float64 value does not is therefore moved
    by one unit towards the float64 value first.
    """
    with np.errstate(over="ignore", under="ignore"):
        if dtype != "BF16":
            return values.astype(NUMPY_DTYPE[dtype])
        narrow = values.astype(np.float32)
    halfway = (narrow.view(np.uint32) & _LOW) == _HALF
    tied = np.flatnonzero(halfway & (narrow.astype(np.float64) != values))
    flat, exact = narrow.reshape(-1), values.reshape(-1)
    towards = np.where(exact[tied] > flat[tied], np.inf, -np.inf).astype(np.float32)
    flat[tied] = np.nextafter(flat[tied], towards)
    return narrow.astype(NUMPY_DTYPE["BF16"])
