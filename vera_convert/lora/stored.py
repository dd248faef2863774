"""The stored factors of a LoRA: of equal rank and dtype, each value rounded once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

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


@dataclass(slots=True)
class Measured:
    """The measurements taken while layers were computed.

    Attributes:
        errors: the relative error of each layer's delta, by the adapter's module path.
        vanished: the share of values rounded to 0 by float16, likewise.
    """

    errors: dict[str, float] = field(default_factory=dict)
    vanished: dict[str, float] = field(default_factory=dict)

    @property
    def worst(self) -> float:
        """The largest relative error of a layer; 0 without layers."""
        return max(self.errors.values(), default=0.0)


class ComputedFactors:
    """Computes the factors of layers; the last layer is kept, because a layer has two tensors.

    Attributes:
        measured: errors of the layers so far.
    """

    def __init__(self, plan: LoraPlan, *, start: int = 0) -> None:
        """Compute nothing yet.

        Args:
            plan: the LoRA.
            start: where the first tensor starts in the file, for `memory_for`.
        """
        self.measured = Measured()
        self._plan = plan
        self._start = start
        self._inputs: dict[int, _InputSide] = {}
        self._last: tuple[str, StoredLayer] | None = None

    @cached_property
    def _buffer(self) -> NDArray[np.uint8]:
        """The memory of the largest lora_B; new memory for each layer would take longer to get."""
        outputs = max(layer.shape.out_features for layer in self._plan.layers)
        size = outputs * self._plan.rank * BITS[self._plan.dtype] // 8
        return memory_for(self._start, size)

    def of(self, layer: LoraLayer) -> StoredLayer:
        """Return a layer's factors in the rank and dtype of the plan, and measure the error.

        The error compares the stored delta with the adapter's: on every output of an approximated
        layer, and else on up to 16 outputs and 512 inputs, spread evenly.

        Raises:
            CheckpointError: a value is too large for the dtype.
        """
        if self._last is None or self._last[0] != layer.module:
            self._last = None  # two layers would take twice the memory
            try:
                found = self._stored(layer.factors())
            except OverflowError as error:
                raise CheckpointError(
                    rules.LORA_OVERFLOW.at(printable(layer.module), f"{error}.")
                ) from error
            if layer.vectors is not None:
                self.measured.errors[layer.module] = found.error
                self.measured.vanished[layer.module] = found.vanished
            self._last = layer.module, found
        return self._last[1]

    def _stored(self, factors: Factors) -> StoredLayer:
        plan = self._plan
        if len(plan.rows) < factors.rank:
            factors = factors.select(plan.rows)
        if not plan.reduced:
            return self._exact(factors, self._inputs)
        used = np.flatnonzero(factors.d)
        if len(used) > plan.rank:
            return self._approximated(factors)
        return _padded(self._exact(factors.select(used), {}), plan.rank)

    def _exact(self, factors: Factors, known: dict[int, _InputSide]) -> StoredLayer:
        """Return the exact factors, rounded; for float16, each row of rank is balanced.

        Args:
            factors: the layer's operands.
            known: the input sides so far, of layers with these rows of A, by the number of inputs.
        """
        dtype = self._plan.dtype
        powers = balancing_powers(factors) if dtype == "F16" else np.zeros(factors.rank, np.int64)
        balanced = bool(powers.any())
        side = known.get(factors.in_features)
        if side is None or balanced:
            side = self._input_side(factors.A, powers)
        if not balanced:
            known[factors.in_features] = side
        lost = _vanished(factors.A, side.lora_A)
        lora_B = self._empty_B(factors.out_features, factors.rank)
        shrunk = np.ldexp(1.0, -powers)
        for place, block in factors.lora_B_blocks():
            exact = np.multiply(block, shrunk, out=block) if balanced else block
            rounded_once(exact, dtype, lora_B[place])
            lost += _vanished(exact, lora_B[place])
        sample = replace(factors, A=side.exact)
        error = rounding_error(sample, side.stored, lora_B, _sample(factors.b), powers)
        vanished = lost / max(1, side.lora_A.size + lora_B.size)
        return StoredLayer(side.lora_A, lora_B, error, vanished)

    def _input_side(self, A: Array, powers: NDArray[np.int64]) -> _InputSide:
        """Return the input side of exact factors, with lora_A in `memory_for` the file."""
        kind = NUMPY_DTYPE[self._plan.dtype]
        lora_A = memory_for(self._start, A.size * kind.itemsize).view(kind).reshape(A.shape)
        for row, values in enumerate(A):
            exact = values.astype(np.float64) * np.ldexp(1.0, powers[row])
            rounded_once(exact, self._plan.dtype, lora_A[row])
        columns = slice(None, None, -(-A.shape[1] // SAMPLED_COLUMNS))
        exact = np.ascontiguousarray(A[:, columns], np.float32)
        return _InputSide(lora_A, exact, np.ascontiguousarray(lora_A[:, columns]))

    def _approximated(self, factors: Factors) -> StoredLayer:
        """Return the best factors of the plan's rank, and measure the error on every output."""
        plan = self._plan
        found = Decomposition.of(factors, plan.inputs)
        left, right = found.truncated(plan.rank)
        exact = product(left, factors.A)
        # Singular vectors have no sign: the largest entry of each row is made positive.
        signs = np.sign(exact[np.arange(len(exact)), np.abs(exact).argmax(axis=1)])
        exact, right = exact * signs[:, None], right * signs
        lora_A = rounded_once(exact, plan.dtype)
        lost = _vanished(exact, lora_A)
        lora_B = self._empty_B(factors.out_features, len(left))
        for place, block in factors.lora_B_blocks(PRODUCT_VALUES):
            exact = block @ right
            rounded_once(exact, plan.dtype, lora_B[place])
            lost += _vanished(exact, lora_B[place])
        error = relative_error(factors, found.size, lora_A, lora_B)
        vanished = lost / (lora_A.size + lora_B.size)
        return _padded(StoredLayer(lora_A, lora_B, error, vanished), plan.rank)

    def _empty_B(self, outputs: int, rank: int) -> Array:  # noqa: N802 -- the matrix is called B
        kind = NUMPY_DTYPE[self._plan.dtype]
        return self._buffer[: outputs * rank * kind.itemsize].view(kind).reshape(outputs, rank)


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
