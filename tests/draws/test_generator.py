from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vera_convert.draws import generator
from vera_convert.draws.generator import (
    Draw,
    Rounding,
    Source,
    Variant,
    centered_words,
    check_key,
    first_words,
    redrawn,
    rounded,
    valued,
)

GOLDEN = tuple(
    json.loads((Path(__file__).parents[1] / "data/golden" / name).read_text())
    for name in ("torch_projections.json", "torch_214_215.json")
)
DTYPES = ("float32", "float64", "bfloat16", "float16")
KEYS = st.integers(-(2**63), 2**64 - 1)
REFUSED_KEYS = [2**64, -(2**63) - 1, True, None, 1.0, "0"]


def variant_of(dtype: str, environment: str) -> Variant:
    """Return the variant that an environment such as ``2.7.1+cu126|x86_64|AVX2`` draws."""
    version, machine, capability = environment.split("|")
    major, minor = (int(part) for part in version.split(".")[:2])
    path = "fused" if machine == "aarch64" or capability in ("AVX2", "AVX512") else "separate"
    if dtype in ("float32", "float64"):
        return Variant(f"{dtype}-{path}")
    if (major, minor) < (2, 12):
        return Variant(f"{dtype}-torch2.11")
    return Variant(f"{dtype}-torch2.12-{path}")


def sha256(array: NDArray[Any]) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


def hex_of_first(array: NDArray[Any], count: int) -> list[str]:
    return [value.tobytes().hex() for value in array.flat[:count]]


# --- compared with torch -------------------------------------------------------------------------


def golden_cases() -> list[Any]:
    cases = []
    for document, case in ((each, case) for each in GOLDEN for case in each["cases"]):
        environments = document["env_sets"][case["envs"]]
        for variant in sorted({variant_of(case["default_dtype"], env) for env in environments}):
            name = f"{variant}-{case['seed']}-{case['r']}x{case['in']}x{case['out']}"
            cases.append(pytest.param(variant, case, id=name))
    return cases


@pytest.mark.parametrize(("variant", "case"), golden_cases())
def test_a_draw_has_the_bytes_that_torch_drew(variant: Variant, case: dict[str, Any]) -> None:
    A, B = Draw(
        variant,
        key=case["seed"],
        rank=case["r"],
        in_features=case["in"],
        out_features=case["out"],
    ).matrices()
    assert hex_of_first(A, 4) == case["first4_A"]
    assert hex_of_first(B, 4) == case["first4_B"]
    assert sha256(A) == case["sha256_A"]
    assert sha256(B) == case["sha256_B"]


def test_golden_cases_cover_every_variant() -> None:
    assert {case.values[0] for case in golden_cases()} == set(Variant)


def test_the_page_of_projections_names_the_releases_that_were_checked() -> None:
    environments = (env for golden in GOLDEN for envs in golden["env_sets"] for env in envs)
    releases = {env.split("+")[0].split("|")[0].removesuffix("a0") for env in environments}
    checked = sorted(releases, key=lambda release: tuple(map(int, release.split("."))))
    page = (Path(__file__).parents[2] / "docs" / "projections.md").read_text(encoding="utf-8")
    assert f"PyTorch {', '.join(checked[:-1])} and {checked[-1]}" in " ".join(page.split())


@pytest.mark.parametrize(
    ("key", "variant", "first", "sha_A", "sha_B"),
    [
        (0, "float32-fused", "2b5f06bb df6f163e 4fcf66be", "4999e61f85241f98", "f581c32b52c2afb2"),
        (0, "float32-separate", "005f06bb e06f163e", "ed22b32fa169dd16", "f7f185c60448474c"),
        (1234567, "float32-fused", "a350c93d 0add68be", "6cc073db476399be", "24388c17248dbafe"),
        (1234567, "float32-separate", "a450c93d 0add68be", "9157d61bfe96335a", "fb761bc9a915d320"),
        (-1, "float32-fused", "667a8a3e 49f91f3d", "e1247966341d2497", "e5cd03ed28d6eed7"),
        (0, "float64-fused", "28b776c5337ad03f", "9760d4a2863a2f02", "15de138546735bd8"),
        (0, "bfloat16-torch2.11", "c03d 31be c0bc", "b1243c5659c3838a", "813b56b07e261f2c"),
        (0, "bfloat16-torch2.12-fused", "06bb 163e 67be", "0fb0cde4162522c9", "e1cdb7acc0b8f704"),
        (0, "float16-torch2.11", "d2ad f6af 6231", "4c020c0fcafd3615", "c5eda16721abf32a"),
        (0, "float16-torch2.12-fused", "3398 b330 36b3", "a2f9e6ca3819889c", "cf33e15fe62afadf"),
    ],
)
def test_a_draw_has_the_documented_values(
    key: int, variant: str, first: str, sha_A: str, sha_B: str
) -> None:
    A, B = Draw(Variant(variant), key=key, rank=4, in_features=80, out_features=48).matrices()
    assert hex_of_first(A, len(first.split())) == first.split()
    assert sha256(A)[:16] == sha_A
    assert sha256(B)[:16] == sha_B


def torch_draw(key: int, rank: int, in_features: int, out_features: int, dtype: str) -> list[Any]:
    """Draw A and B with torch, as PEFT does under this default dtype."""
    torch = pytest.importorskip("torch")
    source = torch.Generator("cpu").manual_seed(key)
    pair = []
    for shape in ((rank, in_features), (out_features, rank)):
        matrix = torch.empty(shape, dtype=getattr(torch, dtype))
        torch.nn.init.kaiming_uniform_(matrix, generator=source)
        pair.append(matrix)
    return pair


def bytes_of(matrix: Any) -> bytes:
    torch = pytest.importorskip("torch")
    return bytes(matrix.contiguous().view(torch.uint8).numpy().tobytes())


def variant_of_this_torch(dtype: str) -> Variant:
    torch = pytest.importorskip("torch")
    machine = {"arm64": "aarch64"}.get(platform.machine(), platform.machine())
    capability = torch.backends.cpu.get_cpu_capability()
    return variant_of(dtype, f"{torch.__version__}|{machine}|{capability}")


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40, deadline=None)
@given(
    key=KEYS,
    rank=st.integers(1, 40),
    in_features=st.integers(1, 700),
    out_features=st.integers(1, 700),
)
def test_a_draw_equals_that_of_the_installed_torch(
    dtype: str, key: int, rank: int, in_features: int, out_features: int
) -> None:
    drawn = Draw(
        variant_of_this_torch(dtype),
        key=key,
        rank=rank,
        in_features=in_features,
        out_features=out_features,
    ).matrices()
    expected = torch_draw(key, rank, in_features, out_features, dtype)
    assert [matrix.tobytes() for matrix in drawn] == [bytes_of(matrix) for matrix in expected]


def test_a_draw_equals_that_of_torch_without_vector_instructions() -> None:
    pytest.importorskip("torch")
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("only x86-64 has a path that rounds separately")
    script = (
        "import sys, json, hashlib; sys.path.insert(0, sys.argv[1]); import test_generator as t\n"
        "print(json.dumps({d: [t.variant_of_this_torch(d), *("
        "hashlib.sha256(t.bytes_of(m)).hexdigest() for m in t.torch_draw(-7, 8, 300, 200, d)"
        ")] for d in t.DTYPES}))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(Path(__file__).parent)],
        env={**os.environ, "ATEN_CPU_CAPABILITY": "default"},
        capture_output=True,
        text=True,
        check=True,
    )
    for name, *hashes in json.loads(run.stdout).values():
        assert name.endswith(("-separate", "-torch2.11"))
        pair = Draw(Variant(name), key=-7, rank=8, in_features=300, out_features=200).matrices()
        assert [sha256(matrix) for matrix in pair] == hashes


def test_layers_of_the_peft_documentation_share_the_largest_dims() -> None:
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    model = torch.nn.Sequential(torch.nn.Linear(20, 100), torch.nn.Linear(50, 80))
    config = peft.VeraConfig(r=6, target_modules=["0", "1"], projection_prng_key=5)
    state = peft.get_peft_model_state_dict(peft.get_peft_model(model, config))
    A, B = Draw(
        variant_of_this_torch("float32"), key=5, rank=6, in_features=50, out_features=100
    ).matrices()
    assert A.shape == (6, 50)
    assert B.shape == (100, 6)
    assert bytes_of(state["base_model.vera_A"]) == A.tobytes()
    assert bytes_of(state["base_model.vera_B"]) == B.tobytes()


# --- keys and dims -------------------------------------------------------------------------------


@pytest.mark.parametrize("key", REFUSED_KEYS)
def test_a_key_that_torch_refuses_is_refused(key: Any) -> None:
    with pytest.raises(ValueError, match="the key must"):
        check_key(key)
    with pytest.raises(ValueError, match="the key must"):
        Draw(Variant.FLOAT32_FUSED, key=key, rank=1, in_features=1, out_features=1).matrices()


@pytest.mark.parametrize("key", REFUSED_KEYS)
def test_torch_refuses_the_refused_keys(key: Any) -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        torch.Generator("cpu").manual_seed(key)


@given(KEYS)
def test_every_key_that_torch_accepts_is_accepted(key: int) -> None:
    assert check_key(key) == key


@given(KEYS)
@settings(max_examples=20)
def test_only_the_low_32_bits_of_a_key_count(key: int) -> None:
    one = Draw(Variant.FLOAT32_FUSED, key, rank=2, in_features=3, out_features=4)
    other = replace(one, key=key & 0xFFFFFFFF)
    assert [a.tobytes() for a in one.matrices()] == [a.tobytes() for a in other.matrices()]


@pytest.mark.parametrize("dims", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (-1, 1, 1)])
def test_dims_below_one_are_refused(dims: tuple[int, int, int]) -> None:
    rank, in_features, out_features = dims
    with pytest.raises(ValueError, match="at least one"):
        Draw(
            Variant.FLOAT32_FUSED,
            key=0,
            rank=rank,
            in_features=in_features,
            out_features=out_features,
        ).matrices()


# --- blocks and memory ---------------------------------------------------------------------------


@pytest.mark.parametrize("variant", Variant)
@pytest.mark.parametrize("block", [1, 7, 1000])
def test_blocks_have_the_values_of_the_complete_draw(
    variant: Variant, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    A, B = Draw(variant, key=9, rank=5, in_features=17, out_features=13).matrices()
    monkeypatch.setattr(generator, "BLOCK", 4)  # so that a call takes several steps
    whole = Draw(variant, 9, 5, 17, 13)
    blocks = list(redrawn(whole, in_features=17, out_features=13, block=block))
    assert all(len(rows) == 1 or rows.size <= block for _, _, rows in blocks)
    assert b"".join(rows.tobytes() for _, _, rows in blocks) == A.tobytes() + B.tobytes()


@pytest.mark.parametrize("variant", Variant)
def test_a_draw_takes_memory_for_the_result_and_a_limited_block(variant: Variant) -> None:
    tracemalloc.start()
    try:
        A, B = Draw(variant, key=0, rank=64, in_features=20_000, out_features=20_000).matrices()
        _, peak = tracemalloc.get_traced_memory()
        assert peak - A.nbytes - B.nbytes < 4e6
        del A, B
        tracemalloc.reset_peak()
        whole = Draw(variant, 0, 64, 20_000, 20_000)
        for _ in redrawn(whole, in_features=20_000, out_features=20_000):
            pass
        assert tracemalloc.get_traced_memory()[1] < 8e6
    finally:
        tracemalloc.stop()


# --- rounding ------------------------------------------------------------------------------------


def test_rounding_is_to_nearest_ties_to_even() -> None:
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, -0.0], np.float32)
    assert rounded(ties, Rounding.BF16).tolist() == [1, 1 + 2**-6, -1, 0]
    assert np.signbit(rounded(ties, Rounding.BF16)[3])
    ties = np.array([1 + 2**-11, 1 + 3 * 2**-11, 2**-25, 3 * 2**-25], np.float32)
    assert rounded(ties, Rounding.FP16).tolist() == [1, 1 + 2**-9, 0, 2**-23]


def test_the_order_of_two_roundings_matters() -> None:
    tiny = np.array([2**-25], np.float32)  # too small for float16
    assert rounded(tiny, Rounding.BF16_FP16) == rounded(tiny, Rounding.FP16_BF16) == 0
    value = np.array([2**-23 * (1 + 2**-2 + 2**-9)], np.float32)
    assert rounded(value, Rounding.FP16_BF16)[0] != rounded(value, Rounding.BF16_FP16)[0]


def test_without_rounding_the_array_itself_is_returned() -> None:
    for dtype in (np.float64, np.float32, ml_dtypes.bfloat16, np.float16):
        array = np.ones((2, 3), dtype)
        assert rounded(array, Rounding.NONE) is array


def test_float64_is_rounded_to_float32_before_16_bits() -> None:
    above_ties = np.array([[1 + 2.0**-8 + 2.0**-40], [1 + 2.0**-11 + 2.0**-40]])
    once = rounded(above_ties, Rounding.BF16)
    assert once.dtype == np.float32
    assert once.shape == (2, 1)
    assert once[0, 0] == 1
    assert rounded(above_ties, Rounding.FP16)[1, 0] == 1
    assert rounded(above_ties, Rounding.FP32).dtype == np.float32


@pytest.mark.parametrize("rounding", Rounding)
@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.floats(allow_nan=False), min_size=1, max_size=20),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_rounding_equals_torch_s_casts(rounding: Rounding, values: list[float], dtype: Any) -> None:
    torch = pytest.importorskip("torch")
    if rounding is Rounding.FP8:  # for larger values PyTorch's releases differ; no draw exceeds 2.5
        values = [min(max(value, -448), 448) for value in values]
    with np.errstate(over="ignore"):
        array = np.array(values, dtype)
    tensor = torch.from_numpy(array.copy())
    names = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    names["fp8"] = torch.float8_e4m3fn
    if rounding is not Rounding.NONE:
        for name in rounding.split("+"):
            tensor = tensor.to(names[name])
        tensor = tensor.to(torch.float32)
    assert rounded(array, rounding).tobytes() == tensor.numpy().tobytes()


# --- words ---------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=5), st.integers(1, 227))
@settings(max_examples=20, deadline=None)
def test_words_of_many_keys_equal_those_of_each_key(keys: list[int], count: int) -> None:
    words = first_words(np.array(keys, np.uint32), count)
    for key, column in zip(keys, words.T, strict=True):
        expected = np.random.RandomState(key).randint(0, 2**32, count, dtype=np.uint32)
        assert column.tolist() == expected.tolist()


@pytest.mark.parametrize("variant", Variant)
def test_values_of_words_equal_those_of_the_draw(variant: Variant) -> None:
    words = first_words(np.array([3], np.uint32), 200)
    centered = centered_words(variant, words)[:100, 0]
    assert centered.tolist() == Source(variant, key=3).centered(100).tolist()
    A, _ = Draw(variant, key=3, rank=1, in_features=100, out_features=1).matrices()
    assert valued(variant, centered, fan_in=100).tobytes() == A.tobytes()


def test_widths_broadcast() -> None:
    centered = Source(Variant.FLOAT32_SEPARATE, key=3).centered(50)
    widths = np.array([[50], [51], [4096]])
    table = valued(Variant.FLOAT32_SEPARATE, centered, fan_in=widths)
    for row, width in zip(table, widths.flat, strict=True):
        alone = valued(Variant.FLOAT32_SEPARATE, centered, fan_in=int(width))
        assert row.tobytes() == alone.tobytes()
