"""Torch computes the sums of a merge like NumPy, on every device of this machine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from adapters import good_adapter
from merges import assert_same, filled_base, merged_with, tensors_of
from terms import expected_sum, term

from vera_convert.assembly import addends
from vera_convert.assembly.addends import NotFiniteError, Numbers, Sum
from vera_convert.assembly.blocks import buffer_sizes_for
from vera_convert.delta import merged, working_dtype
from vera_convert.errors import SurroundingsError, UsageError

torch = pytest.importorskip("torch")
compute = pytest.importorskip("vera_convert.with_torch.compute")

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def computed_by_torch(tensor: Sum, stored: Any, *, all_rows: bool = False) -> tuple[Any, Numbers]:
    workspace = compute.on_device(HERE).workspace(buffer_sizes_for([tensor]), all_rows)
    numbers, written = Numbers(), []
    for first in range(0, tensor.shape[0], tensor.block_rows):
        last = min(first + tensor.block_rows, tensor.shape[0])
        workspace.stored_bytes(tensor, first, last)[:] = stored[first:last].tobytes()
        numbers += workspace.add(tensor, first, last)
        written.append(bytes(workspace.written_bytes(tensor, first, last)))
    return np.frombuffer(b"".join(written), tensor.written).reshape(tensor.shape), numbers


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addends, "BLOCK_VALUES", 64)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("dtype", ["f4", "f2", BFLOAT16, "f8"], ids=str)
def test_a_tensor_is_the_rounded_sum(dtype: Any, conv1d: bool, count: int) -> None:
    terms = tuple(term(17, 11, seed=n, weight=1.0 - 0.75 * n) for n in range(count))
    shape = (11, 17) if conv1d else (17, 11)
    stored = np.random.default_rng(9).normal(size=shape).astype(dtype)
    working = working_dtype(stored.dtype)
    tensor = Sum("w", shape, stored.dtype, stored.dtype, working, conv1d, terms)
    found, numbers = computed_by_torch(tensor, stored, all_rows=True)
    change = expected_sum(terms, 11)
    wanted = merged(stored, change.T if conv1d else change)
    assert found.dtype == wanted.dtype
    if stored.dtype.itemsize == 2:
        assert np.count_nonzero(found != wanted) <= 1
    else:
        assert np.allclose(found, wanted, rtol=0, atol=3e-6 if dtype == "f4" else 1e-14)
    assert numbers.values == stored.size
    assert numbers.change == pytest.approx(float((change**2).sum()), rel=1e-5)


@pytest.mark.parametrize("dtype", ["f4", "f2", BFLOAT16, "f8"], ids=str)
def test_rows_that_no_term_changes_keep_their_bits(dtype: Any) -> None:
    stored = np.full((17, 11), -0.0).astype(dtype)
    part = replace(term(17, 11, seed=1), rows=slice(5, 12))
    working = working_dtype(stored.dtype)
    tensor = Sum("w", stored.shape, stored.dtype, stored.dtype, working, terms=(part,))
    found, _ = computed_by_torch(tensor, stored)
    for row in range(17):
        is_kept = found[row].tobytes() == stored[row].tobytes()
        assert is_kept == (row not in range(5, 12)), row


def test_the_output_can_have_another_dtype_and_the_input_a_decoder() -> None:
    terms = (term(6, 5, seed=1),)
    stored = np.arange(30, dtype=np.uint8).reshape(6, 5)
    tensor = Sum(
        "w",
        (6, 5),
        stored.dtype,
        np.dtype("f4"),
        terms=terms,
        decode=lambda first, last: stored[first:last] * np.float32(0.5),
    )
    found, _ = computed_by_torch(tensor, stored)
    assert np.allclose(found, stored * 0.5 + expected_sum(terms, 5), rtol=0, atol=1e-5)


def test_a_sum_that_is_not_finite_is_reported() -> None:
    stored = np.ones((40, 4), BFLOAT16)
    stored[27, 3] = np.inf
    tensor = Sum("w", (40, 4), BFLOAT16, BFLOAT16, terms=(term(40, 4, seed=1),))
    with pytest.raises(NotFiniteError) as caught:
        computed_by_torch(tensor, stored)
    assert caught.value.index == (27, 3)


def test_a_merge_by_torch_equals_the_merge_by_numpy(tmp_path: Path) -> None:
    adapter = good_adapter(tmp_path / "adapter")
    base = filled_base(tmp_path / "base", dtypes={"q_proj": "bfloat16"})
    merged_with(adapter, base, tmp_path / "here")
    device = compute.on_device(HERE)
    merged_with(adapter, base, tmp_path / "there", device=device, jobs=2)
    assert_same(tensors_of(tmp_path / "there"), tensors_of(tmp_path / "here"))
    document = json.loads((tmp_path / "there/merge-provenance.json").read_bytes())
    assert document["options"]["device"] == str(HERE)
    assert document["product_sha256"] == device.product()


@pytest.mark.parametrize("name", ["cpu", "tpu", "cuda:x", ""])
def test_a_name_that_is_no_gpu_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="cuda:N"):
        compute.on_gpu(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_missing_gpu_is_reported() -> None:
    with pytest.raises(SurroundingsError, match="sees no GPU here"):
        compute.on_gpu("cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_an_existing_gpu_is_used() -> None:
    assert compute.on_gpu("cuda").name == "cuda"
    with pytest.raises(SurroundingsError):
        compute.on_gpu("cuda:999")
