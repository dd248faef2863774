"""A block of a sum is rounded once, for any number of terms; values that are not finite raise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from terms import computed_in_blocks, expected_sum, term

from vera_convert.assembly import addends, blocks
from vera_convert.assembly.addends import NotFiniteError, Numbers, Sum, Term
from vera_convert.assembly.blocks import Workspace, buffer_sizes_for
from vera_convert.delta import merged, working_dtype
from vera_convert.files.tensorfile import from_array

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
Array = NDArray[Any]


def off_by(found: Array, wanted: Array) -> int:
    """Return by how many representable 16-bit values two arrays differ at most."""
    ordered = [
        np.where(bits < 0, -(bits & 0x7FFF), bits)
        for bits in (array.view(np.int16).astype(np.int64) for array in (found, wanted))
    ]
    return int(np.abs(ordered[0] - ordered[1]).max())


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addends, "BLOCK_VALUES", 64)
    monkeypatch.setattr(blocks, "_CHUNK_VALUES", 10)


@pytest.mark.parametrize("parts", [[(0, 6)], [(5, 12)], [(11, 17)], [(0, 3), (9, 13)]])
@pytest.mark.parametrize("dtype", ["f4", "f2", BFLOAT16, "f8"], ids=str)
def test_rows_that_no_term_changes_keep_their_bits(
    dtype: Any, parts: list[tuple[int, int]]
) -> None:
    stored = np.full((17, 11), -0.0).astype(dtype)
    terms = [replace(term(17, 11, seed=n), rows=slice(*part)) for n, part in enumerate(parts)]
    working = working_dtype(stored.dtype)
    tensor = Sum("w", stored.shape, stored.dtype, stored.dtype, working, terms=tuple(terms))
    found, _ = computed_in_blocks(tensor, stored.copy())
    changed = {row for part in parts for row in range(*part)}
    for row in range(17):
        is_kept = found[row].tobytes() == stored[row].tobytes()
        assert is_kept == (row not in changed), row


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("dtype", ["f4", "f2", BFLOAT16, "f8"], ids=str)
def test_a_tensor_is_the_rounded_sum_of_itself_and_its_terms(
    dtype: Any, conv1d: bool, count: int
) -> None:
    outputs, inputs = 17, 11
    terms = tuple(term(outputs, inputs, seed=n, weight=1.0 - 0.75 * n) for n in range(count))
    shape = (inputs, outputs) if conv1d else (outputs, inputs)
    stored = np.random.default_rng(9).normal(size=shape).astype(dtype)
    working = working_dtype(stored.dtype)
    tensor = Sum("w", shape, stored.dtype, stored.dtype, working, conv1d, terms)
    found, _ = computed_in_blocks(tensor, stored)
    change = expected_sum(terms, inputs)
    wanted = merged(stored, change.T if conv1d else change)
    assert found.dtype == stored.dtype
    if stored.dtype.itemsize == 2:
        # The product is float32 and the reference float64, so a tie may be rounded to the other
        # side.
        assert np.count_nonzero(found != wanted) <= 1
        assert off_by(found, wanted) <= 1
    else:
        rest = np.abs(found.astype("f8") - wanted.astype("f8")).max()
        assert rest < (1e-14 if dtype == "f8" else 3e-6)


@pytest.mark.parametrize("dtype", ["f2", BFLOAT16, "f4", "f8"], ids=str)
def test_operands_of_any_dtype_are_widened(dtype: Any) -> None:
    terms = (term(6, 7, seed=1, dtype=dtype),)
    stored = np.zeros((6, 7), np.float32)
    working = working_dtype(stored.dtype, *terms[0].dtypes)
    found, _ = computed_in_blocks(
        Sum("w", (6, 7), stored.dtype, stored.dtype, working, terms=terms), stored
    )
    assert np.allclose(found, expected_sum(terms, 7), rtol=0, atol=2e-6)


def test_a_sum_is_written_in_another_dtype_after_one_rounding() -> None:
    terms = (term(6, 7, seed=1),)
    stored = np.random.default_rng(0).normal(size=(6, 7)).astype(BFLOAT16)
    wide = Sum("w", (6, 7), BFLOAT16, np.dtype("f4"), terms=terms)
    found, _ = computed_in_blocks(wide, stored)
    assert np.allclose(found, stored.astype("f8") + expected_sum(terms, 7), rtol=0, atol=2e-6)
    narrow = Sum("w", (6, 7), np.dtype("f4"), BFLOAT16, terms=terms)
    rounded, _ = computed_in_blocks(narrow, stored.astype("f4"))
    assert off_by(rounded, found.astype(BFLOAT16)) == 0


def test_without_terms_only_the_dtype_changes() -> None:
    stored = np.array([[1 + 2.0**-8, -0.0, np.inf, np.nan]], np.float32)
    found, numbers = computed_in_blocks(Sum("w", (1, 4), stored.dtype, BFLOAT16), stored)
    assert found.tobytes() == stored.astype(BFLOAT16).tobytes()
    assert numbers == Numbers()


def test_a_decoder_turns_stored_bytes_into_values() -> None:
    stored = np.arange(30, dtype=np.uint8).reshape(6, 5)
    scales = np.arange(1, 7, dtype=np.float32)

    def decode(first: int, last: int) -> Array:
        scaled: Array = stored[first:last].astype(np.float32) * scales[first:last, None]
        return scaled

    terms = (term(6, 5, seed=1),)
    tensor = Sum("w", (6, 5), stored.dtype, np.dtype("f4"), terms=terms, decode=decode)
    found, numbers = computed_in_blocks(tensor, stored, all_rows=True)
    base = stored * scales[:, None]
    assert np.allclose(found, base + expected_sum(terms, 5), rtol=0, atol=1e-4)
    assert numbers.base == pytest.approx(float((base.astype("f8") ** 2).sum()))


# --- numbers -------------------------------------------------------------------------------------


def test_numbers_of_all_rows_equal_those_of_the_complete_tensor() -> None:
    terms = (term(40, 30, seed=1, weight=1e-4), term(40, 30, seed=2, weight=1e-4))
    stored = np.random.default_rng(0).normal(size=(40, 30)).astype(BFLOAT16)
    found, numbers = computed_in_blocks(
        Sum("w", stored.shape, BFLOAT16, BFLOAT16, terms=terms), stored, all_rows=True
    )
    before, after, change = stored.astype("f8"), found.astype("f8"), expected_sum(terms, 30)
    assert numbers.values == stored.size
    assert numbers.changed == np.count_nonzero(before != after)
    assert 0 < numbers.changed < stored.size
    assert numbers.base == pytest.approx((before**2).sum())
    assert numbers.change == pytest.approx((change**2).sum(), rel=1e-5)
    assert numbers.loss == pytest.approx(((after - before - change) ** 2).sum(), rel=1e-3)


def test_sampled_numbers_come_from_some_rows_of_every_block() -> None:
    terms = (term(640, 4, seed=1),)
    stored = np.zeros((640, 4), np.float32)
    tensor = Sum("w", stored.shape, stored.dtype, stored.dtype, terms=terms)
    _, numbers = computed_in_blocks(tensor, stored)
    assert numbers.values == 32 * 4
    assert numbers.changed == numbers.values


def test_all_values_of_a_small_tensor_are_sampled() -> None:
    terms = (term(7, 4, seed=1),)
    stored = np.ones((7, 4), np.float32)
    _, numbers = computed_in_blocks(
        Sum("w", (7, 4), stored.dtype, stored.dtype, terms=terms), stored
    )
    assert numbers.values == 28


# --- what is not finite --------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", ["f4", "f2", BFLOAT16, "f8"], ids=str)
def test_the_first_value_that_is_not_finite_is_named(dtype: Any, value: float) -> None:
    stored = np.ones((40, 4), dtype)
    stored[27, 3], stored[28, 0] = value, value
    working = working_dtype(stored.dtype)
    tensor = Sum("w", (40, 4), stored.dtype, stored.dtype, working, terms=(term(40, 4, seed=1),))
    with pytest.raises(NotFiniteError) as caught:
        computed_in_blocks(tensor, stored)
    assert caught.value.index == (27, 3)


@pytest.mark.parametrize("bits", [0x7FC0, 0xFFC0, 0x7F81, 0x7FFF, 0xFFFF, 0x7F80, 0xFF80])
def test_every_nan_and_infinity_of_bfloat16_is_found(bits: int) -> None:
    stored = np.zeros((1, 4), np.uint16)
    stored[0, 2] = bits
    tensor = Sum("w", (1, 4), BFLOAT16, BFLOAT16, terms=(term(1, 4, seed=1),))
    with pytest.raises(NotFiniteError):
        computed_in_blocks(tensor, stored.view(BFLOAT16))


def test_a_sum_beyond_the_dtype_is_found() -> None:
    stored = np.full((2, 3), 65504, np.float16)
    tensor = Sum("w", (2, 3), stored.dtype, stored.dtype, terms=(term(2, 3, seed=1, weight=1e3),))
    with pytest.raises(NotFiniteError):
        computed_in_blocks(tensor, stored)


def test_a_finite_value_that_is_lost_in_a_narrower_dtype_is_found() -> None:
    stored = np.array([[1.0, np.inf], [1e6, 1.0]], np.float32)
    with pytest.raises(NotFiniteError) as caught:
        computed_in_blocks(Sum("w", (2, 2), stored.dtype, np.dtype("f2")), stored)
    assert caught.value.index == (1, 0)


# --- the size of blocks, and workspaces ----------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "rows"), [((10, 6), 10), ((11, 6), 6), ((1, 1000), 1), ((3, 1000), 1), ((0, 5), 0)]
)
def test_blocks_depend_only_on_shapes(shape: tuple[int, int], rows: int) -> None:
    assert Sum("w", shape, BFLOAT16, BFLOAT16).block_rows == rows


def test_a_large_rank_makes_smaller_blocks() -> None:
    values = np.zeros((32, 4), np.float32)
    large = Term(values, values.T, from_array("d", values[:, 0]), from_array("b", values[0]))
    assert Sum("w", (100, 4), BFLOAT16, BFLOAT16, terms=(large,)).block_rows == 2


def test_a_workspace_has_room_for_the_largest_of_several_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(addends, "BLOCK_VALUES", 1 << 20)
    wide = Sum("w", (4, 50), BFLOAT16, BFLOAT16, terms=(term(4, 50, seed=0),))
    tall = Sum(
        "t", (60, 3), BFLOAT16, np.dtype("f4"), terms=(term(60, 3, seed=1), term(60, 3, seed=2))
    )
    workspace = Workspace(buffer_sizes_for([wide, tall]))
    for tensor in (wide, tall, wide):
        rows = tensor.shape[0]
        stored = np.random.default_rng(0).normal(size=tensor.shape).astype(BFLOAT16)
        workspace.stored_bytes(tensor, 0, rows)[:] = stored.tobytes()
        workspace.add(tensor, 0, rows)
        alone, _ = computed_in_blocks(tensor, stored)
        assert bytes(workspace.written_bytes(tensor, 0, rows)) == alone.tobytes()
