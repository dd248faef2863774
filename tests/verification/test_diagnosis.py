"""`verify` names the right cause of a wrong merge, and no other cause."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from adapters import good_adapter, good_tensors
from merges import filled_base, merged_with, tensors_of
from numpy.typing import NDArray
from wrongmerges import PROVENANCE, Q, edit, layers

from vera_convert.conversion.projections import ProjectionSource
from vera_convert.draws.generator import Draw, Variant
from vera_convert.formats.verification import verification_text
from vera_convert.merging.adapters import AdapterSpec

Array = NDArray[Any]
RANK, INPUTS, OUTPUTS = 8, 160, 128
NARROW = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
F32 = np.dtype(np.float32)


class Operands(NamedTuple):
    """The operands of the delta of the only adapted layer."""

    A: Array
    B: Array
    d: Array
    b: Array

    def delta(self) -> Array:
        made: Array = (self.b[:, None] * self.B) @ (self.d[:, None] * self.A)
        return made


def operands(*, key: int = 7, seed: int = 0, size: float = 0.3) -> Operands:
    values = np.random.default_rng(seed)
    A, B = Draw(
        Variant.FLOAT32_FUSED, key=key, rank=RANK, in_features=INPUTS, out_features=OUTPUTS
    ).matrices()
    d, b = (values.normal(0, size, n).astype(np.float32) for n in (RANK, OUTPUTS))
    return Operands(A, B, d, b)


def one_layer(folder: Path, made: Operands, **config: Any) -> Path:
    """Write an adapter of a single layer."""
    stored: dict[str, Any] = dict.fromkeys(good_tensors())
    stored |= {"base_model.vera_A": made.A, "base_model.vera_B": made.B}
    stored |= {
        f"base_model.model.{Q}.vera_lambda_d": made.d,
        f"base_model.model.{Q}.vera_lambda_b": made.b,
    }
    fields = {"layers_to_transform": [0], "layers_pattern": ["layers"], **config}
    return good_adapter(folder, tensors=stored, r=RANK, target_modules=["q_proj"], **fields)


def base_of(folder: Path, dtype: str = "float32") -> Path:
    return filled_base(folder, tensors={f"{Q}.weight": (OUTPUTS, INPUTS)}, dtype=dtype)


def reason_of(tmp_path: Path, dtype: str, made: Operands, merge: Callable[[Array], Array]) -> str:
    """Merge a layer in another way, and return the reason that `verify` gives."""
    adapter = one_layer(tmp_path / "adapter", made)
    base = base_of(tmp_path / "base", dtype)
    merged_with(adapter, base, tmp_path / "out")
    weight = tensors_of(base)[f"{Q}.weight"]
    edit(tmp_path / "out", {f"{Q}.weight": merge(weight).astype(weight.dtype)})
    (finding,) = layers(adapter, base, tmp_path / "out").findings
    assert finding.code == "V601"
    return finding.reason


def through(values: Array, narrow: np.dtype[Any]) -> Array:
    return values.astype(narrow).astype(np.float32)


# --- factors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("factor", [1.001, 0.999, 1.01, 0.5, -0.5, 3.0])
def test_a_factor_very_near_to_one_is_named(tmp_path: Path, dtype: str, factor: float) -> None:
    made = operands(size=1.0)
    reason = reason_of(
        tmp_path, dtype, made, lambda w: w.astype(F32) + F32.type(factor) * made.delta()
    )
    assert "rounded" not in reason
    found = float(reason.partition("The delta was added ")[2].partition(" times.")[0])
    assert abs(found - factor) < max(3e-4, 0.01 * abs(factor - 1))
    assert found != 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_factor_that_rounding_hides_gets_no_wrong_cause(tmp_path: Path, dtype: str) -> None:
    made = operands(size=0.2)
    reason = reason_of(
        tmp_path, dtype, made, lambda w: w.astype(F32) + F32.type(1.0003) * made.delta()
    )
    assert reason.count(". ") <= 1 or "The delta was added 1.000" in reason
    assert "rounded" not in reason


def test_damaged_values_are_not_called_a_factor(tmp_path: Path) -> None:
    made = operands()

    def damaged(weight: Array) -> Array:
        total = weight + made.delta()
        total[5, :40] += 0.3 * made.delta()[5, :40]
        return total

    reason = reason_of(tmp_path, "float32", made, damaged)
    assert "times" not in reason
    assert "rounded" not in reason


# --- rounding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("size", [0.1, 0.6])
def test_a_delta_that_was_rounded_is_named(tmp_path: Path, dtype: str, size: float) -> None:
    made = operands(size=size)
    narrow = NARROW.get(dtype, NARROW["bfloat16"])
    reason = reason_of(
        tmp_path, dtype, made, lambda w: w.astype(F32) + through(made.delta(), narrow)
    )
    name = dtype if dtype in NARROW else "bfloat16"
    assert f"The delta was rounded to {name} before it was added" in reason


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_vectors_that_were_rounded_are_named(tmp_path: Path, dtype: str) -> None:
    """With autocast_adapter_dtype=False, PEFT holds all vectors in 16 bits."""
    made, narrow = operands(size=0.6), NARROW[dtype]
    coarse = Operands(*(through(each, narrow) for each in made))
    reason = reason_of(
        tmp_path, dtype, made, lambda w: w.astype(F32) + through(coarse.delta(), narrow)
    )
    assert f"The vectors, A and B were rounded to {dtype}, and the delta too" in reason
    assert "autocast_adapter_dtype=False" in reason


def test_a_delta_that_was_computed_in_16_bits_is_named(tmp_path: Path) -> None:
    made, narrow = operands(size=0.6), NARROW["bfloat16"]
    A, B, d, b = (through(each, narrow) for each in made)
    left, right = through(b[:, None] * B, narrow), through(d[:, None] * A, narrow)
    delta = through(left @ right, narrow)
    reason = reason_of(tmp_path, "bfloat16", made, lambda w: w.astype(F32) + delta)
    assert "computed in bfloat16 throughout, as PEFT 0.11 does" in reason


def test_a_base_in_a_wider_dtype_is_not_called_an_intermediate_rounding(tmp_path: Path) -> None:
    made = operands()
    adapter = one_layer(tmp_path / "adapter", made)
    wide = base_of(tmp_path / "wide")
    for name in ("float16", "bfloat16"):
        base = base_of(tmp_path / name, name)
        narrow = {n: t.astype(NARROW[name]) for n, t in tensors_of(wide).items()}
        edit(base, narrow)
        out = tmp_path / f"out-{name}"
        merged_with(adapter, wide, out, dtype=name)
        (out / PROVENANCE).unlink()
        reason = next(f.reason for f in layers(adapter, base, out).findings if f.code == "V601")
        assert "fits a base in a wider dtype" in reason
        assert "on the way" not in reason


def test_a_sum_that_was_rounded_after_each_adapter_is_named(tmp_path: Path) -> None:
    one, two = operands(size=0.5), operands(size=0.5, seed=1)
    first, second = one_layer(tmp_path / "one", one), one_layer(tmp_path / "two", two)
    base = base_of(tmp_path / "base", "bfloat16")
    merged_with(first, base, tmp_path / "out", add=(AdapterSpec(second),))
    weight = tensors_of(base)[f"{Q}.weight"].astype(np.float32)
    narrow = NARROW["bfloat16"]
    total = (through(weight + one.delta(), narrow) + two.delta()).astype(narrow)
    edit(tmp_path / "out", {f"{Q}.weight": total})
    (finding,) = layers(first, base, tmp_path / "out", add=(AdapterSpec(second),)).findings
    assert "rounded after each adapter, as PEFT does" in finding.reason


# --- other adapters ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("key", [7, 8])
def test_a_merged_adapter_that_was_not_given_is_named(tmp_path: Path, key: int, dtype: str) -> None:
    one, two = operands(size=1.0), operands(key=key, seed=1, size=1.0)
    reason = reason_of(tmp_path, dtype, one, lambda w: w.astype(F32) + one.delta() + two.delta())
    assert "another adapter was merged too" in reason
    assert "--add" in reason


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_vectors_and_other_matrices_are_distinguished(tmp_path: Path, dtype: str) -> None:
    made = operands(size=1.0)
    for key, words in ((7, "the same A and B but other vectors"), (8, "Another matrix was added")):
        other = operands(key=key, seed=1, size=1.0).delta()

        def added(weight: Array, other: Array = other) -> Array:
            return weight.astype(F32) + other

        reason = reason_of(tmp_path / str(key), dtype, made, added)
        assert words in reason
        assert "--add" not in reason


def test_one_cause_of_many_layers_is_printed_once(tmp_path: Path) -> None:
    adapter = good_adapter(tmp_path / "a")
    other = good_adapter(
        tmp_path / "b",
        projection_prng_key=8,
        tensors=dict(
            zip(
                ("base_model.vera_A", "base_model.vera_B"),
                Draw(
                    Variant.FLOAT32_FUSED, key=8, rank=4, in_features=16, out_features=16
                ).matrices(),
                strict=True,
            )
        ),
    )
    base = filled_base(tmp_path / "base")
    merged_with(other, base, tmp_path / "out")
    result = layers(adapter, base, tmp_path / "out")
    text = verification_text(result)
    assert text.count("Another matrix was added") == 1
    assert "WRONG 4 of 4 layers: " in text


# --- other A and B -------------------------------------------------------------------------------


def test_a_merge_with_a_and_b_of_the_other_source_is_named(tmp_path: Path) -> None:
    """PEFT 0.11 to 0.20 merge A and B of the key, rounded to the base; 0.21 merges the stored A and
    B.
    """
    adapter = good_adapter(tmp_path / "adapter")
    base = filled_base(tmp_path / "base", dtype="bfloat16")
    for merged, verified in (
        (ProjectionSource.KEY, ProjectionSource.AUTO),
        (ProjectionSource.FILE, ProjectionSource.KEY),
    ):
        out = tmp_path / f"out-{merged}"
        merged_with(adapter, base, out, projections=merged)
        result = layers(adapter, base, out, projections=verified)
        assert {finding.code for finding in result.errors} == {"V601"}
        advice = f"verify with --projections {merged}."
        assert all(advice in finding.reason for finding in result.errors)
        assert verification_text(result).count(advice) == 1
        assert layers(adapter, base, out, projections=merged).passed


def test_the_dtype_of_rounded_a_and_b_is_named(tmp_path: Path) -> None:
    adapter = good_adapter(tmp_path / "adapter", stripped=True)
    base = filled_base(tmp_path / "base")
    merged_with(adapter, base, tmp_path / "out", base_dtype="bfloat16")
    (tmp_path / "out" / PROVENANCE).unlink()
    result = layers(adapter, base, tmp_path / "out")
    assert "verify with --projections key --base-dtype bfloat16." in result.errors[0].reason


def test_a_merge_that_other_a_and_b_do_not_explain_keeps_its_cause(tmp_path: Path) -> None:
    adapter = good_adapter(tmp_path / "adapter")
    base = filled_base(tmp_path / "base", dtype="bfloat16")
    merged_with(adapter, base, tmp_path / "out", weight=0.5)
    (tmp_path / "out" / PROVENANCE).unlink()
    result = layers(adapter, base, tmp_path / "out", weight=1.0)
    assert [finding.code for finding in result.errors] == ["V601"] * 4
    assert all("The delta was added 0.5" in finding.reason for finding in result.errors)


@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_a_weight_other_than_the_recorded_one_is_named(weight: float, tmp_path: Path) -> None:
    adapter = good_adapter(tmp_path / "adapter")
    base = filled_base(tmp_path / "base", dtype="bfloat16")
    merged_with(adapter, base, tmp_path / "out")
    result = layers(adapter, base, tmp_path / "out", weight=weight)
    said = "right with the options that merge-provenance.json records: leave out "
    assert [finding.code for finding in result.errors] == ["V601"] * 4
    assert all(f"{said}--weight." in finding.reason for finding in result.errors)
