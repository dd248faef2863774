"""Compare the formulas of a LoRA with dense matrices."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from vera_convert.lora.factors import (
    Decomposition,
    Factors,
    balancing_powers,
    product,
    relative_error,
    rounding_error,
    smallest_rank,
    squared_norm,
)
from vera_convert.lora.stored import rounded_once

SHAPES = [(8, 12, 20), (8, 20, 12), (24, 10, 16), (24, 16, 10), (1, 5, 7), (6, 1, 9), (300, 40, 40)]
"""Rank, outputs, inputs."""


def factors(rank: int, out: int, width: int, *, b: float = 1.0) -> Factors:
    values = np.random.default_rng(rank + out)
    shapes = (rank, width), (out, rank), (rank,), (out,)
    A, B, d, scale = (values.normal(size=shape).astype(np.float32) for shape in shapes)
    return Factors(A, B, d, (scale * b).astype(np.float32))


def dense(layer: Factors) -> NDArray[np.float64]:
    A, B, d, b = (each.astype(np.float64) for each in (layer.A, layer.B, layer.d, layer.b))
    product: NDArray[np.float64] = np.diag(b) @ B @ np.diag(d) @ A
    return product


def decomposed(layer: Factors) -> Decomposition:
    return Decomposition.of(layer, {})


def truncated(layer: Factors, rank: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return lora_A and lora_B of the best approximation of a rank."""
    left, right = decomposed(layer).truncated(rank)
    return product(left, layer.A), layer.lora_B() @ right


def truncation_error(values: NDArray[np.float64], rank: int) -> float:
    """Return the relative Frobenius error of the best approximation of a rank, by singular
    values.
    """
    total = float(np.linalg.norm(values))
    return float(np.linalg.norm(values[rank:])) / total if total else 0.0


def relative(found: NDArray[np.float64], expected: NDArray[np.float64]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_factors_multiply_to_the_delta(shape: tuple[int, int, int]) -> None:
    layer = factors(*shape)
    assert relative(layer.lora_B() @ layer.A.astype(np.float64), dense(layer)) < 1e-15


@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_of_lora_b_are_the_product_value_by_value(shape: tuple[int, int, int]) -> None:
    layer = factors(*shape)
    b, B, d = (each.astype(np.float64) for each in (layer.b, layer.B, layer.d))
    assert np.array_equal(layer.lora_B(), (B * d) * b[:, None])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_a_truncation_is_the_best_of_its_rank_and_its_error_is_known(
    shape: tuple[int, int, int], share: float
) -> None:
    layer = factors(*shape)
    found = decomposed(layer)
    rank = max(1, int(len(found.values) * share))
    lora_A, lora_B = truncated(layer, rank)
    delta, values = dense(layer), np.linalg.svd(dense(layer), compute_uv=False)
    best = np.sqrt(np.square(values[rank:]).sum() / np.square(values).sum())
    assert relative(lora_B @ lora_A, delta) == pytest.approx(best, abs=1e-7)
    assert truncation_error(found.values, rank) == pytest.approx(best, abs=1e-7)
    assert len(lora_A) == rank


def test_a_rank_equal_to_the_smallest_side_is_exact() -> None:
    layer = factors(24, 10, 16)
    lora_A, lora_B = truncated(layer, 10)
    assert relative(lora_B @ lora_A, dense(layer)) < 1e-12


def test_zeros_in_d_and_b_do_not_spoil_a_decomposition() -> None:
    layer = factors(12, 16, 20)
    layer.d[3:9] = 0
    layer.b[::2] = 0
    lora_A, lora_B = truncated(layer, 6)
    assert relative(lora_B @ lora_A, dense(layer)) < 1e-12


def test_a_higher_rank_has_a_smaller_error_and_the_smallest_rank_within_a_limit_is_found() -> None:
    values = decomposed(factors(30, 40, 50)).values
    errors = [truncation_error(values, rank) for rank in range(1, 31)]
    assert errors == sorted(errors, reverse=True)
    for wanted in (0.0, 0.01, 0.2, 0.5, 0.9):
        rank = smallest_rank(values, wanted)
        assert truncation_error(values, rank) <= wanted + 1e-12
        assert rank == 1 or truncation_error(values, rank - 1) > wanted


def _pair(layer: Factors) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return layer.A.astype(np.float64), layer.lora_B()


def test_a_delta_of_zeros_has_rank_one_and_no_error() -> None:
    assert smallest_rank(np.zeros(4), 0.1) == 1
    assert truncation_error(np.zeros(4), 1) == 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_a_measured_error_equals_the_error_of_dense_matrices(
    shape: tuple[int, int, int], dtype: str
) -> None:
    layer = factors(*shape)
    stored = [rounded_once(each, dtype) for each in _pair(layer)]
    wide = [each.astype(np.float64) for each in stored]
    expected = relative(wide[1] @ wide[0], dense(layer))
    found = relative_error(layer, squared_norm(layer), *stored)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-12)
    every, powers = np.arange(layer.out_features), np.zeros(layer.rank, np.int64)
    sampled = rounding_error(layer, stored[0], stored[1], every, powers)
    assert sampled == pytest.approx(expected, rel=0.01, abs=1e-12)


def test_an_error_between_ranks_equals_the_error_of_dense_matrices() -> None:
    layer = factors(30, 40, 50)
    stored = truncated(layer, 7)
    expected = relative(stored[1] @ stored[0], dense(layer))
    found = relative_error(layer, decomposed(layer).size, *stored)
    assert found == pytest.approx(expected, rel=1e-9)


def test_the_error_relative_to_a_delta_of_zeros_is_infinite_or_zero() -> None:
    layer = factors(4, 6, 8)
    nothing = Factors(layer.A, layer.B, np.zeros_like(layer.d), layer.b)
    assert relative_error(nothing, squared_norm(nothing), layer.A, layer.B) == float("inf")
    assert relative_error(nothing, squared_norm(nothing), layer.A, np.zeros((6, 4))) == 0


def test_a_wrong_factor_has_a_large_error() -> None:
    layer = factors(8, 12, 20)
    wrong = {
        "d left out": layer.B.astype(np.float64) * layer.b[:, None],
        "b left out": layer.B.astype(np.float64) * layer.d,
        "rows in another order": layer.lora_B()[::-1],
    }
    for what, lora_B in wrong.items():
        assert relative_error(layer, squared_norm(layer), layer.A, lora_B) > 0.1, what
        assert rounding_error(layer, layer.A, lora_B, np.arange(12), np.zeros(8, np.int64)) > 0.1, (
            what
        )


def test_balancing_evens_out_norms_by_powers_of_two() -> None:
    A, B = np.ones((4, 1), np.float32), np.ones((1, 4), np.float32)
    A[:, 0] = 1, 4, 0, 2
    d = np.array([2.0**-16, 4, 3, 0], np.float32)
    assert balancing_powers(Factors(A, B, d, np.ones(1))).tolist() == [-8, 0, 0, 0]


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_equal_those_of_qr_and_svd(shape: tuple[int, int, int]) -> None:
    """Compare eigenvalues of a small matrix of squares with factorizations that square nothing."""
    layer = factors(*shape)
    layer.b[::3] *= 1e-3
    layer.d[::2] *= 1e-3
    _, of_B = np.linalg.qr(layer.lora_B())
    _, of_A = np.linalg.qr(layer.A.astype(np.float64).T)
    expected = np.linalg.svd(of_B @ of_A.T, compute_uv=False)
    found = decomposed(layer).values[: len(expected)]
    assert np.abs(found - expected).max() < 1e-7 * expected[0]


@pytest.mark.parametrize("nudge", [0.0, 1e-12, -1e-12, 1e-9, -1e-9, 1e-4, -1e-4])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_bfloat16_is_rounded_once_to_the_nearest_ties_to_even(nudge: float, sign: float) -> None:
    bits = np.random.default_rng(5).integers(0x3000, 0x4000, 200).astype(np.uint16)
    below, above = (each.view(ml_dtypes.bfloat16).astype(np.float64) for each in (bits, bits + 1))
    middle = (below + above) / 2 + nudge * (above - below)
    even = np.where(bits % 2 == 0, below, above)
    nearest = above if nudge > 0 else below if nudge < 0 else even
    assert np.array_equal(rounded_once(sign * middle, "BF16").astype(np.float64), sign * nearest)


def test_bfloat16_is_not_rounded_by_way_of_float32() -> None:
    value = np.array([1 + 2**-8 + 2**-40])
    assert value.astype(np.float32).astype(ml_dtypes.bfloat16) == 1
    assert rounded_once(value, "BF16") == 1 + 2**-7


@pytest.mark.parametrize(("dtype", "value"), [("F32", 1e39), ("F16", 7e4), ("BF16", 3.4e38)])
def test_a_value_too_large_for_a_dtype_is_refused(dtype: str, value: float) -> None:
    values = np.full((3, 400), 1.0)
    rounded_once(values, dtype)
    values[2, 7] = -value
    with pytest.raises(OverflowError, match="too large"):
        rounded_once(values, dtype)


def test_float32_keeps_the_largest_value() -> None:
    largest = np.array([float(np.finfo(np.float32).max), 1e-46])
    assert rounded_once(largest, "F32").tolist() == [largest[0], 0]
