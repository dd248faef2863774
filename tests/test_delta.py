"""Compare the formulas with an explicit sum, and with the merged weights of PEFT."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from exact import exact_delta
from merges import FIXTURES
from numpy.typing import NDArray
from safetensors.numpy import load_file

from vera_convert.adapter.opening import open_adapter
from vera_convert.base.bases import Bases
from vera_convert.base.facts import BaseOptions
from vera_convert.base.resolve import Need, resolve_base
from vera_convert.conversion.projections import ProjectionSource
from vera_convert.delta import delta, merged
from vera_convert.merging.in_effect import in_effect

EXPECTED = sorted(FIXTURES.glob("*/*/expected*.json"))
RANK, INPUTS, OUTPUTS = 3, 5, 4


Operands = tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]


def operands(*dtypes: Any) -> Operands:
    """Return A and B, larger than the layer needs, and d and b."""
    values = np.random.default_rng(0)
    shapes = ((RANK, INPUTS + 2), (OUTPUTS + 3, RANK), (RANK,), (OUTPUTS,))
    A, B, d, b = (
        values.normal(size=shape).astype(dtype) for shape, dtype in zip(shapes, dtypes, strict=True)
    )
    return A, B, d, b


def written_out(*given: Any) -> NDArray[np.float64]:
    """Return the delta, computed value by value."""
    A, B, d, b = (array.astype(np.float64) for array in given)
    return np.array(
        [
            [
                sum(
                    float(b[i]) * float(B[i, k]) * float(d[k]) * float(A[k, j]) for k in range(RANK)
                )
                for j in range(INPUTS)
            ]
            for i in range(OUTPUTS)
        ]
    )


DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_delta_is_the_sum_over_the_ranks(dtype: Any) -> None:
    given = operands(dtype, dtype, dtype, dtype)
    found = delta(*given, INPUTS)
    assert found.dtype == (np.float64 if dtype is np.float64 else np.float32)
    assert np.allclose(found, written_out(*given), rtol=0, atol=2e-6)


def test_each_operand_is_widened_from_its_own_dtype() -> None:
    given = operands(np.float16, np.float32, np.float32, ml_dtypes.bfloat16)
    assert delta(*given, INPUTS).dtype == np.float32
    exact = exact_delta(*given, INPUTS)
    assert np.allclose(exact, written_out(*given), rtol=0, atol=1e-14)
    assert np.allclose(delta(*given, INPUTS), exact, rtol=0, atol=2e-6)


def test_one_float64_operand_makes_the_whole_computation_float64() -> None:
    given = operands(np.float32, np.float32, np.float64, np.float32)
    assert np.allclose(delta(*given, INPUTS), written_out(*given), rtol=0, atol=1e-14)


def test_a_sum_is_rounded_once() -> None:
    # 2^-8 is half of the last bit of 1 in bfloat16, and the even neighbor is 1.
    weight = np.array([1, 1, 1], ml_dtypes.bfloat16)
    change = np.array([2.0**-8, 2.0**-8 + 2.0**-20, 3 * 2.0**-8], np.float32)
    assert merged(weight, change).astype(np.float64).tolist() == [1, 1 + 2.0**-7, 1 + 2.0**-6]


def test_float64_is_rounded_to_float32_before_16_bits_in_a_merge() -> None:
    weight = np.array([1], ml_dtypes.bfloat16)
    change = np.array([2.0**-8 + 2.0**-40])
    assert merged(weight, change).astype(np.float64).tolist() == [1]


@pytest.mark.parametrize("path", EXPECTED, ids=lambda path: path.relative_to(FIXTURES).as_posix())
def test_in_float64_the_formula_gives_every_reference_of_the_fixtures(path: Path) -> None:
    expected = json.loads(path.read_bytes())
    ignored = "ignored the stored" in expected.get("default_semantics_note", "")
    projections = ProjectionSource.KEY if ignored else ProjectionSource.AUTO
    base = FIXTURES / expected["base"]
    weights = load_file(base / "model.safetensors")
    with open_adapter(path.parent) as adapter:
        base_facts = resolve_base(adapter, BaseOptions(str(base)), bases=Bases(), need=Need.VITAL)
        assert base_facts.match is not None
        pair = in_effect(adapter, base_facts, projections=projections)
        for module, layer in adapter.layers.items():
            name = base_facts.match.tensors[module]
            d, b = layer.lambda_d.array(), layer.lambda_b.array()
            change = exact_delta(pair.A, pair.B, d, b, base_facts.match.layers[module].in_features)
            if base_facts.match.layers[module].conv1d:
                change = change.T
            found = sha256(merged(weights[name], change).tobytes()).hexdigest()
            assert found == expected["merged"][name]["sha256_float64_reference"], name
