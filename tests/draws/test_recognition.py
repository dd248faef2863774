from __future__ import annotations

import math
import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vera_convert.draws.comparison import Difference, difference
from vera_convert.draws.generator import Draw, Rounding, Variant, redrawn
from vera_convert.draws.recognition import Recognition, recognize, searched_keys

USUAL = Draw(Variant.FLOAT32_FUSED, key=3, rank=8, in_features=96, out_features=64)
DRAWS = [
    pytest.param(variant, rounding, id=f"{variant}-{rounding}")
    for variant in Variant
    for rounding in Rounding
    if rounding is not Rounding.FP32 or variant.dtype == np.float64
]
FEW_DRAWS = [
    (Variant.FLOAT32_FUSED, Rounding.NONE),
    (Variant.FLOAT32_FUSED, Rounding.BF16),
    (Variant.FLOAT32_SEPARATE, Rounding.FP16_BF16),
    (Variant.FLOAT64_FUSED, Rounding.NONE),
    (Variant.FLOAT64_FUSED, Rounding.FP32),
    (Variant.BFLOAT16_2_11, Rounding.NONE),
    (Variant.FLOAT16_2_11, Rounding.NONE),
    (Variant.FLOAT16_2_12_FUSED, Rounding.NONE),
]
STORED = {"F64": np.float64, "F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}

Pair = tuple[NDArray[Any], NDArray[Any]]


def pair_of(made: Draw, *, dtype: Any = None, inputs: int = 0, outputs: int = 0) -> Pair:
    """Return A and B of a draw as a file would hold both, cut to this number of inputs and
    outputs.
    """
    A, B = made.matrices()
    A, B = A[:, : inputs or None], B[: outputs or None]
    if dtype is None:
        dtype = A.dtype
    return np.ascontiguousarray(A.astype(dtype)), np.ascontiguousarray(B.astype(dtype))


def assert_is(recognition: Recognition, made: Draw, A: NDArray[Any], B: NDArray[Any]) -> None:
    """Check that a recognition names the draw of the pair, or an equal draw that comes first."""
    found = recognition.draw
    assert found is not None
    assert recognition.nearest == found
    assert recognition.difference is None
    assert (found.key, found.rank) == (made.key, made.rank)
    assert found.in_features == made.in_features
    order = [(variant, rounding) for variant in Variant for rounding in Rounding]
    first = order.index((found.variant, found.rounding))
    assert first <= order.index((made.variant, made.rounding))
    again = pair_of(found, inputs=A.shape[1], outputs=B.shape[0])
    for stored, matrix in zip((A, B), again, strict=True):
        assert stored.astype(np.float64).tobytes() == matrix.astype(np.float64).tobytes()


# --- the recognized draw -------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "rounding"), DRAWS)
def test_every_variant_and_rounding_is_recognized(variant: Variant, rounding: Rounding) -> None:
    made = Draw(variant, 3, rank=8, in_features=96, out_features=64, rounding=rounding)
    A, B = pair_of(made)
    recognition = recognize(A, B, key=3, search=False)
    assert_is(recognition, made, A, B)


@pytest.mark.parametrize(("variant", "rounding"), FEW_DRAWS)
def test_the_stored_dtype_does_not_matter(variant: Variant, rounding: Rounding) -> None:
    made = Draw(variant, 3, rank=8, in_features=96, out_features=64, rounding=rounding)
    exact = pair_of(made)
    expected = recognize(*exact, key=3).draw
    seen = 0
    for dtype in STORED.values():
        pair = pair_of(made, dtype=dtype)
        if all(
            np.array_equal(a.astype(float), b.astype(float))
            for a, b in zip(pair, exact, strict=True)
        ):
            assert recognize(*pair, key=3).draw == expected
            seen += 1
    assert seen >= 1


@pytest.mark.parametrize(
    ("variant", "rounding"),
    [
        (Variant.FLOAT32_SEPARATE, Rounding.NONE),
        (Variant.FLOAT64_SEPARATE, Rounding.NONE),
        (Variant.BFLOAT16_2_12_FUSED, Rounding.NONE),
        (Variant.FLOAT16_2_12_FUSED, Rounding.NONE),
        (Variant.FLOAT32_FUSED, Rounding.BF16_FP16),
        (Variant.FLOAT32_FUSED, Rounding.FP16_BF16),
        (Variant.FLOAT64_FUSED, Rounding.FP32),
    ],
)
def test_draws_that_differ_in_few_values_are_distinguished(
    variant: Variant, rounding: Rounding
) -> None:
    made = Draw(variant, 3, rank=64, in_features=300, out_features=500, rounding=rounding)
    assert recognize(*pair_of(made), key=3).draw == made


def test_float32_fused_is_preferred_if_variants_agree() -> None:
    for variant in (Variant.FLOAT32_SEPARATE, Variant.BFLOAT16_2_12_SEPARATE):
        made = Draw(variant, 11, rank=2, in_features=12, out_features=4, rounding=Rounding.BF16)
        found = recognize(*pair_of(made), key=11).draw
        assert found is not None
        assert (found.variant, found.rounding) == (Variant.FLOAT32_FUSED, Rounding.BF16)


def test_the_key_of_the_config_is_named_if_it_gives_the_same_draw() -> None:
    A, B = pair_of(USUAL)
    recognition = recognize(A, B, key=3 - 2**32)
    assert recognition.draw is not None
    assert recognition.draw.key == 3 - 2**32
    assert recognition.draw.has_key(3)
    assert not recognition.draw.has_key(4)


def test_arrays_of_any_memory_layout_are_recognized() -> None:
    A, B = pair_of(USUAL)
    wide = np.zeros((8, 200), np.float32)
    wide[:, :96] = A
    assert recognize(wide[:, :96], np.asfortranarray(B), key=3).draw == USUAL


# --- other dims, other keys ----------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "rounding"), FEW_DRAWS)
@pytest.mark.parametrize(
    ("dims", "cut", "key"),
    [
        ((4, 80, 48), (40, 24), 3),
        ((4, 80, 48), (79, 48), 3),
        ((1, 176, 64), (64, 64), 3),
        ((3, 4096, 9), (30, 9), 3),
        ((3, 4096, 9), (30, 9), 4),
    ],
)
def test_slices_of_a_larger_draw_are_recognized(
    variant: Variant,
    rounding: Rounding,
    dims: tuple[int, int, int],
    cut: tuple[int, int],
    key: int,
) -> None:
    made = Draw(variant, 3, *dims, rounding)
    inputs, outputs = cut
    A, B = pair_of(made, inputs=inputs, outputs=outputs)
    recognition = recognize(A, B, key=key)
    assert_is(recognition, made, A, B)
    # The rows of B that were cut off leave no trace in the first rows.
    assert recognition.nearest.out_features == outputs


@pytest.mark.parametrize("width", [2, 3, 5, 9])
def test_a_narrow_slice_is_recognized_with_the_configs_key(width: int) -> None:
    made = Draw(Variant.FLOAT32_FUSED, 3, rank=4, in_features=width, out_features=20)
    A, B = pair_of(made, inputs=1)
    assert_is(recognize(A, B, key=3), made, A, B)


@pytest.mark.parametrize(("variant", "rounding"), FEW_DRAWS)
def test_the_draw_of_another_key_is_recognized(variant: Variant, rounding: Rounding) -> None:
    made = Draw(variant, 65535, rank=4, in_features=80, out_features=48, rounding=rounding)
    A, B = pair_of(made)
    recognition = recognize(A, B, key=12)
    assert_is(recognition, made, A, B)


@given(
    key=st.integers(0, 65535),
    rank=st.integers(1, 9),
    inputs=st.integers(1, 30),
    outputs=st.integers(8, 30),
)
@settings(max_examples=10, deadline=None)
def test_another_key_is_found_for_all_dims(key: int, rank: int, inputs: int, outputs: int) -> None:
    made = Draw(Variant.FLOAT32_FUSED, key, rank, inputs, outputs)
    A, B = pair_of(made)
    assert_is(recognize(A, B, key=-1), made, A, B)


def test_the_search_names_only_the_key() -> None:
    for key, rounding in ((0, Rounding.NONE), (40_000, Rounding.BF16)):
        made = Draw(Variant.FLOAT32_FUSED, key, 4, 80, 48, rounding)
        assert searched_keys(*pair_of(made)) == [key]


def test_keys_beyond_the_searched_range_are_not_found() -> None:
    A, B = pair_of(Draw(Variant.FLOAT32_FUSED, 65536, 4, 80, 48))
    assert recognize(A, B, key=0).draw is None
    assert recognize(A, B, key=65536).draw is not None


def test_other_keys_are_searched_only_on_request() -> None:
    for A, B in (pair_of(USUAL, inputs=40), pair_of(Draw(Variant.FLOAT32_FUSED, 4, 8, 96, 64))):
        recognition = recognize(A, B, key=3, search=False)
        assert recognition.draw is None
        assert recognize(A, B, key=3).draw is not None


# --- matrices that are no draw -------------------------------------------------------------------


def test_unrelated_matrices_are_compared_with_the_usual_draw() -> None:
    random = np.random.default_rng(0)
    A = random.standard_normal((8, 96)).astype(np.float32)
    B = random.standard_normal((64, 8)).astype(np.float32)
    drawn_A, drawn_B = pair_of(USUAL)
    recognition = recognize(A, B, key=3)
    assert recognition.draw is None
    assert recognition.nearest == USUAL
    largest = max(np.abs(A.astype(float) - drawn_A).max(), np.abs(B.astype(float) - drawn_B).max())
    assert recognition.difference == Difference(
        tensor="vera_A",
        index=(0, 0),
        found=float(A[0, 0]),
        expected=float(drawn_A[0, 0]),
        largest=largest,
        count=A.size + B.size,
    )


def flipped(array: NDArray[Any], value: int, bit: int) -> NDArray[Any]:
    changed = array.copy()
    patterns = changed.view(f"u{array.itemsize}").reshape(-1)
    patterns[value] ^= patterns.dtype.type(1 << bit)
    return changed


@pytest.mark.parametrize(
    ("made", "dtype"),
    [
        (USUAL, np.float32),
        (USUAL, np.float64),
        (Draw(Variant.FLOAT64_FUSED, 3, 8, 96, 64), np.float64),
        (Draw(Variant.FLOAT32_FUSED, 3, 8, 96, 64, Rounding.BF16), np.float32),
        (Draw(Variant.FLOAT32_FUSED, 3, 8, 96, 64, Rounding.BF16), ml_dtypes.bfloat16),
        (Draw(Variant.FLOAT32_FUSED, 3, 8, 96, 64, Rounding.FP16), np.float16),
    ],
)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_every_flipped_bit_is_found(made: Draw, dtype: Any, data: st.DataObject) -> None:
    A, B = pair_of(made, dtype=dtype)
    tensor = data.draw(st.sampled_from(["vera_A", "vera_B"]))
    whole = A if tensor == "vera_A" else B
    value = data.draw(st.integers(0, whole.size - 1))
    bit = data.draw(st.integers(0, 8 * whole.itemsize - 1))
    damaged = flipped(whole, value, bit)
    pair = (damaged, B) if tensor == "vera_A" else (A, damaged)

    found = difference(*pair, made)
    assert found is not None
    assert (found.tensor, found.index) == (tensor, divmod(value, whole.shape[1]))
    assert found.count == 1
    assert found.expected == float(whole.reshape(-1)[value])
    np.testing.assert_equal(found.found, float(damaged.reshape(-1)[value]))
    recognition = recognize(*pair, key=3)
    assert recognition.draw != made
    if dtype == np.float32 and made is USUAL:
        assert recognition.draw is None
        assert recognition.nearest == made
        np.testing.assert_equal(recognition.difference, found)


def test_a_flipped_sign_of_zero_is_found() -> None:
    made = Draw(Variant.BFLOAT16_2_11, 3, 8, 96, 64)
    A, B = pair_of(made)
    value = int(np.flatnonzero(A == 0)[0])
    recognition = recognize(flipped(A, value, 15), B, key=3)
    assert recognition.draw is None
    assert recognition.difference is not None
    assert recognition.difference.index == divmod(value, 96)
    assert math.copysign(1, recognition.difference.found) == -1
    assert recognition.difference.largest == 0
    assert recognition.difference.count == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_differ_infinitely(value: float) -> None:
    A, B = pair_of(USUAL)
    A[0, 5] = value
    B[63, 7] = value
    recognition = recognize(A, B, key=3)
    assert recognition.draw is None
    assert recognition.difference is not None
    assert recognition.difference.index == (0, 5)
    assert recognition.difference.largest == math.inf
    assert recognition.difference.count == 2


def test_matrices_of_only_nan_are_no_draw() -> None:
    for value in (math.nan, math.inf, 0.0):
        A = np.full((8, 96), value, np.float32)
        B = np.full((64, 8), value, np.float32)
        assert recognize(A, B, key=3).draw is None


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**-60, 2.0**-140])
def test_no_draw_of_an_absurd_width_is_computed(scale: float) -> None:
    A, B = pair_of(USUAL)
    assert recognize(A * np.float32(scale), B, key=3).draw is None


@pytest.mark.parametrize("rounding", [Rounding.NONE, Rounding.BF16])
@pytest.mark.parametrize("place", [(0, 0), (7, 39)])
def test_a_damaged_slice_is_compared_with_the_larger_draw(
    rounding: Rounding, place: tuple[int, int]
) -> None:
    made = Draw(Variant.FLOAT32_FUSED, 3, 8, 96, 64, rounding)
    A, B = pair_of(made, inputs=40)
    A[place] += 1
    recognition = recognize(A, B, key=3)
    assert recognition.draw is None
    assert recognition.nearest == made
    assert recognition.difference is not None
    assert recognition.difference.index == place
    assert recognition.difference.largest == pytest.approx(1)


# --- single functions ----------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 100, 10_000])
def test_leading_slices_are_regenerated_in_blocks(block: int) -> None:
    made = Draw(Variant.FLOAT32_FUSED, 3, 8, 96, 64, Rounding.BF16)
    A, B = pair_of(made, inputs=40, outputs=30)
    parts: dict[str, list[NDArray[Any]]] = {"vera_A": [], "vera_B": []}
    for tensor, row, rows in redrawn(made, in_features=40, out_features=30, block=block):
        assert row == sum(len(part) for part in parts[tensor])
        parts[tensor].append(rows)
    assert np.concatenate(parts["vera_A"]).tobytes() == A.tobytes()
    assert np.concatenate(parts["vera_B"]).tobytes() == B.tobytes()


def test_a_difference_from_another_draw_is_measured_on_the_slices() -> None:
    A, B = pair_of(USUAL)
    assert difference(A, B, USUAL) is None
    wider = Draw(Variant.FLOAT32_FUSED, 3, 8, 97, 70)
    drawn_A, drawn_B = pair_of(wider)
    found = difference(A, B, wider)
    assert found is not None
    gaps_A = np.abs(A.astype(float) - drawn_A[:, :96])
    gaps_B = np.abs(B.astype(float) - drawn_B[:64])
    assert found.largest == max(gaps_A.max(), gaps_B.max())


@pytest.mark.parametrize(
    "smaller", [Draw(Variant.FLOAT32_FUSED, 3, *dims) for dims in ((7, 96, 64), (8, 95, 64))]
)
def test_a_smaller_draw_cannot_be_compared(smaller: Draw) -> None:
    with pytest.raises(ValueError, match="no slices"):
        difference(*pair_of(USUAL), smaller)


@pytest.mark.parametrize(
    ("A", "B"), [((4, 8), (6, 5)), ((4,), (6, 4)), ((4, 0), (6, 4)), ((0, 4), (6, 0))]
)
def test_matrices_that_are_no_pair_are_refused(A: tuple[int, ...], B: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="not of shapes"):
        recognize(np.zeros(A, np.float32), np.zeros(B, np.float32), key=0)


def test_a_key_that_torch_refuses_is_refused() -> None:
    with pytest.raises(ValueError, match="the key must"):
        recognize(*pair_of(USUAL), key=2**64)


def test_a_draw_is_described_in_one_phrase() -> None:
    assert USUAL.description == ("the float32-fused draw of key 3 for r = 8, 96 inputs, 64 outputs")
    both = Draw(Variant.FLOAT64_FUSED, -1, 8, 96, 64, Rounding.FP16_BF16)
    assert both.description == (
        "the float64-fused draw of key -1 for r = 8, 96 inputs, 64 outputs, "
        "rounded to float16, then to bfloat16"
    )


def test_a_difference_is_described_in_one_sentence() -> None:
    one = Difference("vera_B", (63, 7), found=0.5, expected=-0.25, largest=0.75, count=1)
    assert one.description == (
        "one value differs, first vera_B[63, 7]: stored 0.5, drawn -0.25; "
        "the largest difference is 0.75"
    )
    assert "1,280 values differ" in Difference("vera_A", (0, 0), 1, 2, 3, 1280).description


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e200])
def test_absurd_values_are_no_draw_and_are_rejected_soon(value: float) -> None:
    A, B = np.full((4, 16), value), np.full((16, 4), value)
    A[0, 0] = 0.25
    with np.errstate(all="ignore"):
        found = recognize(A, B, key=7)
    assert found.draw is None
    assert found.difference is not None
    assert found.difference.count == A.size + B.size


def test_a_search_takes_little_memory() -> None:
    values = np.random.default_rng(0)
    A, B = (values.normal(size=shape).astype(np.float32) for shape in ((4, 64), (32, 4)))
    recognize(A, B, key=0)  # modules that are loaded once do not count
    tracemalloc.start()
    assert recognize(A, B, key=0).draw is None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 << 20
