"""Compare each format value by value with a slow reference, for several block sizes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from packedlayers import decoded, layer_of

from vera_convert.base.quantized import (
    awq,
    bitsandbytes_4bit,
    bitsandbytes_8bit,
    compressed_tensors,
    fp8,
    gptq,
    mxfp4,
    torchao,
)
from vera_convert.base.quantized.formats import FORMATS
from vera_convert.base.quantized.layer import Layer, LayerError, PackedWeight
from vera_convert.base.quantized.packing import cast
from vera_convert.files.tensorfile import NUMPY_DTYPE

Array = NDArray[Any]
BF16, F8 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
F16, F32 = np.dtype(np.float16), np.dtype(np.float32)
Arrays = dict[str, Array]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def assert_same(found: Array, wanted: Any, dtype: np.dtype[Any]) -> None:
    expected = np.array(wanted, np.float64).reshape(found.shape)
    assert found.dtype == (F32 if dtype == F16 else dtype)
    np.testing.assert_array_equal(found.astype(np.float64), expected)


@np.errstate(all="ignore")
def floats(values: Any, dtype: np.dtype[Any]) -> float:
    """Return a value rounded to float32 and then to a dtype."""
    return float(np.asarray(values, np.float64).astype(np.float32).astype(dtype))


def extreme(scales: Array) -> Array:
    """Set the first scale to the smallest subnormal and the last scale to the largest finite
    value.
    """
    if scales.size > 1:
        limits = ml_dtypes.finfo(scales.dtype)  # type: ignore[no-untyped-call]
        scales.reshape(-1)[[0, -1]] = limits.smallest_subnormal, limits.max
    return scales


SEEDS = range(4)


# --- bitsandbytes --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(8, 64), (7, 33), (5, 13), (3, 200), (1, 1), (9, 6)])
@pytest.mark.parametrize("nested", [False, True])
@np.errstate(all="ignore")
def test_bitsandbytes_4bit(kind: str, shape: tuple[int, int], nested: bool, seed: int) -> None:
    values = np.random.default_rng(seed)
    rows, columns = shape
    count, block = rows * columns, [32, 64, 128, 4096][seed]
    dtype = ["bfloat16", "float16", "float32", "bfloat16"][seed]
    codes = values.integers(0, 16, count + count % 2)
    state: dict[str, object] = {
        "quant_type": kind,
        "blocksize": block,
        "dtype": dtype,
        "shape": [rows, columns],
    }
    blocks = -(-count // block)
    absmax = values.uniform(0, 3, blocks).astype(F32)
    extreme(absmax)
    arrays: Arrays = {
        "weight": (codes[0::2] * 16 + codes[1::2]).astype(np.uint8)[:, None],
        "weight.quant_map": bitsandbytes_4bit.TABLES[kind],
    }
    if nested:
        table, scales = (values.normal(size=n).astype(F32) for n in (256, -(-blocks // 256)))
        packed = values.integers(0, 256, blocks).astype(np.uint8)
        offset = 0.12648773193359375
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        arrays |= {"weight.nested_quant_map": table, "weight.nested_absmax": scales}
        absmax = np.array(
            [
                np.float32(table[code] * scales[i // 256]) + np.float32(offset)
                for i, code in enumerate(packed)
            ],
            F32,
        )
        arrays["weight.absmax"] = packed
    else:
        arrays["weight.absmax"] = absmax
    name = f"weight.quant_state.bitsandbytes__{kind}"
    arrays[name] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    out = NUMPY_DTYPE[{"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[dtype]]
    table = bitsandbytes_4bit.TABLES[kind]
    wanted = [floats(table[codes[k]] * absmax[k // block], out) for k in range(count)]
    assert_same(decoded(bitsandbytes_4bit.weights, arrays), wanted, out)


@pytest.mark.parametrize("storage", [BF16, F16, F32])
def test_bitsandbytes_4bit_in_wider_storage(storage: np.dtype[Any]) -> None:
    values = np.random.default_rng(0)
    bits = values.integers(0, 256, 32).astype(np.uint8)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [4, 16]}
    arrays: Arrays = {
        "weight": bits.view(storage)[:, None],
        "weight.absmax": np.ones(1, F32),
        "weight.quant_map": bitsandbytes_4bit.TABLES["nf4"],
        "weight.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8),
    }
    table = bitsandbytes_4bit.TABLES["nf4"]
    wanted = [floats(table[code], BF16) for byte in bits for code in (byte >> 4, byte & 15)]
    assert_same(decoded(bitsandbytes_4bit.weights, arrays), wanted, BF16)


@np.errstate(all="ignore")
def test_bitsandbytes_8bit() -> None:
    values = np.random.default_rng(0)
    q = values.integers(-128, 128, (11, 5)).astype(np.int8)
    largest = extreme(values.uniform(0, 9, 11).astype(F32))
    arrays: Arrays = {"weight": q, "SCB": largest, "weight_format": np.zeros((), np.uint8)}
    step = np.float32(0.007874015718698502)
    wanted = [[np.float32(np.float32(x) * largest[i]) * step for x in q[i]] for i in range(11)]
    assert_same(decoded(bitsandbytes_8bit.weights, arrays), wanted, F32)


# --- fp8 and compressed-tensors ------------------------------------------------------------------


@pytest.mark.parametrize("block", [(4, 3), (7, 10), (14, 20), (5, 20)])
@np.errstate(all="ignore")
def test_fp8_in_blocks(block: tuple[int, int]) -> None:
    values = np.random.default_rng(0)
    weight = values.normal(size=(14, 20)).astype(F8)
    scale = extreme(values.uniform(0.1, 3, (-(-14 // block[0]), -(-20 // block[1]))).astype(F32))
    wanted = [
        [np.float32(weight[i, j]) * scale[i // block[0], j // block[1]] for j in range(20)]
        for i in range(14)
    ]
    arrays: Arrays = {"weight": weight, "weight_scale_inv": scale}
    settings = {"quant_method": "fp8", "weight_block_size": [*block]}
    assert_same(decoded(fp8.weights, arrays, settings), wanted, F32)


def packed_stream(codes: Array, bits: int) -> Array:
    """Return rows of codes as dense streams of 32-bit words, lowest bit first."""
    rows, columns = codes.shape
    words = np.zeros((rows, -(-columns * bits // 32)), np.uint32)
    for i in range(rows):
        stream = sum(int(code) << (j * bits) for j, code in enumerate(codes[i]))
        for word in range(words.shape[1]):
            words[i, word] = stream >> (32 * word) & 0xFFFFFFFF
    return words.view(np.int32)


def scheme(layout: str, bits: int, strategy: str, **more: object) -> dict[str, object]:
    weights = {"num_bits": bits, "strategy": strategy, "symmetric": True, "type": "int", **more}
    group = {"targets": ["Linear"], "weights": weights}
    return {"config_groups": {"group_0": group}, "format": layout, "ignore": ["lm_head"]}


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("strategy", "columns"), [("group", 24), ("channel", 19), ("tensor", 6)])
@pytest.mark.parametrize("scale_dtype", [BF16, F16, F32])
@np.errstate(all="ignore")
def test_compressed_tensors_pack_quantized(
    bits: int, symmetric: bool, strategy: str, columns: int, scale_dtype: np.dtype[Any]
) -> None:
    values = np.random.default_rng(bits)
    rows, size = 21, 8 if strategy == "group" else columns
    q = values.integers(0, 1 << bits, (rows, columns))
    grid = (1, 1) if strategy == "tensor" else (rows, columns // size)
    scale = extreme(values.uniform(0.001, 2, grid).astype(scale_dtype))
    zero = values.integers(0, 1 << bits, grid)
    half = 1 << (bits - 1)
    shift = np.full(grid, half) if symmetric else zero
    arrays: Arrays = {
        "weight_packed": packed_stream(q, bits),
        "weight_shape": np.array([rows, columns]),
        "weight_scale": scale.reshape(-1) if strategy == "tensor" else scale,
    }
    if not symmetric:
        arrays["weight_zero_point"] = packed_stream(zero.T, bits).T.copy()
    wanted = []
    for i in range(rows):
        for j in range(columns):
            at = (0, 0) if strategy == "tensor" else (i, j // size)
            difference = np.float32(int(q[i, j]) - int(shift[at])).astype(scale_dtype)
            product = (difference.astype(F32) * scale[at].astype(F32)).astype(scale_dtype)
            wanted.append(floats(product, BF16))
    settings = scheme(
        "pack-quantized",
        bits,
        strategy,
        symmetric=symmetric,
        group_size=8 if strategy == "group" else None,
    )
    assert_same(decoded(compressed_tensors.weights, arrays, settings), wanted, BF16)


@pytest.mark.parametrize("strategy", ["tensor", "channel", "group", "block"])
@pytest.mark.parametrize(
    ("dtype", "symmetric"), [(F8, True), (np.dtype(np.int8), True), (np.dtype(np.int8), False)]
)
@np.errstate(all="ignore")
def test_compressed_tensors_with_one_byte_for_each_value(
    dtype: np.dtype[Any], strategy: str, symmetric: bool
) -> None:
    values = np.random.default_rng(0)
    rows, columns = 13, 20
    block = {"tensor": (13, 20), "channel": (1, 20), "group": (1, 5), "block": (4, 6)}[strategy]
    q = (values.normal(size=(rows, columns)) * 20).astype(dtype)
    grid = (-(-rows // block[0]), -(-columns // block[1]))
    scale = extreme(values.uniform(0.01, 2, grid).astype(BF16))
    zero = values.integers(-128, 128, grid).astype(np.int8)
    arrays: Arrays = {"weight": q, "weight_scale": scale}
    if not symmetric:
        arrays["weight_zero_point"] = zero
    wanted = []
    for i in range(rows):
        for j in range(columns):
            at = i // block[0], j // block[1]
            difference = np.float32(q[i, j]) - (0 if symmetric else np.float32(zero[at]))
            product = difference.astype(BF16).astype(F32) * scale[at].astype(F32)
            wanted.append(floats(product, BF16))
    settings = scheme(
        "float-quantized" if dtype == F8 else "int-quantized",
        8,
        strategy,
        symmetric=symmetric,
        type="float" if dtype == F8 else "int",
        group_size=5 if strategy == "group" else None,
        block_structure=[4, 6] if strategy == "block" else None,
    )
    assert_same(decoded(compressed_tensors.weights, arrays, settings), wanted, BF16)


@pytest.mark.parametrize("model", ["BF16", "F16"])
@np.errstate(all="ignore")
def test_compressed_tensors_nvfp4(model: str) -> None:
    values = np.random.default_rng(0)
    codes = values.integers(0, 16, (5, 48))
    scale = extreme(values.uniform(0.1, 400, (5, 3)).astype(F8))
    overall = np.array([1234.5], F32)
    signed = [*E2M1, *(-value for value in E2M1)]
    wanted = [
        floats(
            np.float32(
                floats(signed[codes[i, j]] * (scale[i, j // 16].astype(F32) / overall[0]), BF16)
            ),
            NUMPY_DTYPE[model],
        )
        for i in range(5)
        for j in range(48)
    ]
    arrays: Arrays = {
        "weight_packed": (codes[:, 0::2] + codes[:, 1::2] * 16).astype(np.uint8),
        "weight_scale": scale,
        "weight_global_scale": overall,
        "input_global_scale": np.ones(1, F32),
    }
    settings = scheme("nvfp4-pack-quantized", 4, "tensor_group", type="float", group_size=16)
    found = decoded(compressed_tensors.weights, arrays, settings, dtype=model)
    assert_same(found, wanted, NUMPY_DTYPE[model])


# --- float16 -------------------------------------------------------------------------------------


@np.errstate(all="ignore")
def test_a_cast_to_float16_has_the_bits_of_numpys_cast() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(F16).astype(F32)
    halves = np.sort(halves[np.isfinite(halves)])
    between = ((halves[1:].astype(np.float64) + halves[:-1]) / 2).astype(F32)  # ties
    near = [np.nextafter(between, np.float32(end), dtype=F32) for end in (-np.inf, np.inf)]
    beyond = np.array([65519.996, 65520, 1e9, np.inf, -np.inf, 1e-38, -1e-45, 0.0, -0.0], F32)
    for values in (halves, between, *near, beyond, *beyond[:, None]):
        wanted = values.astype(F16).astype(F32)
        assert cast(values.copy(), F16).tobytes() == wanted.tobytes()


# --- GPTQ and AWQ --------------------------------------------------------------------------------


def packed_along_rows(codes: Array, bits: int) -> Array:
    """Return codes (n, columns) as words (n * bits / 32, columns), lowest bits first."""
    words = np.zeros((len(codes) * bits // 32 + 1, codes.shape[1]), np.uint64)
    for i, row in enumerate(codes.astype(np.uint64)):
        place, shift = divmod(i * bits, 32)
        words[place] |= (row << np.uint64(shift)) & np.uint64(0xFFFF_FFFF)
        words[place + 1] |= (row << np.uint64(shift)) >> np.uint64(32)
    return words[:-1].astype(np.uint32).view(np.int32)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("order", ["none", "plain", "shuffled"])
@pytest.mark.parametrize("group", [16, -1])
@np.errstate(all="ignore")
def test_gptq(bits: int, version: str, order: str, group: int) -> None:
    values = np.random.default_rng(bits)
    inputs, outputs = (96, 64) if bits < 4 else (48, 24)
    size = inputs if group == -1 else group
    groups = inputs // size
    q = values.integers(0, 1 << bits, (inputs, outputs))
    zeros = values.integers(0, 1 << bits, (groups, outputs))
    zeros[0, :3] = 0  # a zero that is stored less one borrows from its neighbor
    scales = extreme(values.uniform(0.001, 2, (groups, outputs)).astype(F16))
    stored = (zeros - 1) % 8 if (version, bits) == ("gptq", 3) else zeros
    words = packed_along_rows(stored.T, bits).T.copy().view(np.uint32)
    if version == "gptq" and bits != 3:
        words -= np.uint32({2: 0x55555555, 4: 0x11111111, 8: 0x01010101}[bits])
    of_group = np.arange(inputs) // size
    arrays: Arrays = {
        "qweight": packed_along_rows(q, bits),
        "qzeros": words.view(np.int32),
        "scales": scales,
    }
    if order == "shuffled":
        of_group = values.permutation(of_group)
    if order != "none":
        arrays["g_idx"] = of_group.astype(np.int32)
    wanted = [
        [
            floats(
                scales[of_group[i], o].astype(F32)
                * np.float32(int(q[i, o]) - int(zeros[of_group[i], o])),
                F16,
            )
            for i in range(inputs)
        ]
        for o in range(outputs)
    ]
    settings = {"bits": bits, "checkpoint_format": version, "group_size": group}
    settings["desc_act"] = order == "shuffled"
    assert_same(decoded(gptq.weights, arrays, settings), wanted, F16)


@pytest.mark.parametrize("dtype", [F16, BF16])
@np.errstate(all="ignore")
def test_awq(dtype: np.dtype[Any]) -> None:
    values = np.random.default_rng(0)
    inputs, outputs, size = 20, 24, 5
    q = values.integers(0, 16, (inputs, outputs))
    zeros = values.integers(0, 16, (inputs // size, outputs))
    scales = extreme(values.uniform(0.001, 2, zeros.shape).astype(dtype))

    def packed(codes: Array) -> Array:
        words = np.zeros((len(codes), outputs // 8), np.uint32)
        for i, row in enumerate(codes.astype(np.uint32)):
            for word in range(outputs // 8):
                for nibble, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                    words[i, word] |= row[word * 8 + column] << np.uint32(4 * nibble)
        return words.view(np.int32)

    wanted = [
        [
            floats(
                scales[i // size, o].astype(F16).astype(F32)
                * np.float32(int(q[i, o]) - int(zeros[i // size, o])),
                F16,
            )
            for i in range(inputs)
        ]
        for o in range(outputs)
    ]
    arrays: Arrays = {"qweight": packed(q), "qzeros": packed(zeros), "scales": scales}
    settings = {"bits": 4, "version": "GEMM", "group_size": size}
    assert_same(decoded(awq.weights, arrays, settings), wanted, F16)


# --- MXFP4 and torchao ---------------------------------------------------------------------------


def test_mxfp4_with_every_scale() -> None:
    values = np.random.default_rng(0)
    experts, outputs, groups = 5, 17, 3
    blocks = values.integers(0, 256, (experts, outputs, groups, 16)).astype(np.uint8)
    scales = np.arange(255, dtype=np.uint8).reshape(experts, outputs, groups)
    signed = [*E2M1, *(-value for value in E2M1)]
    wanted = np.zeros((experts, groups * 32, outputs))
    for e in range(experts):
        for o in range(outputs):
            for g in range(groups):
                for k in range(32):
                    byte = int(blocks[e, o, g, k // 2])
                    value = signed[byte >> 4 if k % 2 else byte & 15]
                    exact = value * 2.0 ** (int(scales[e, o, g]) - 127)
                    wanted[e, g * 32 + k, o] = floats(exact, BF16)
    arrays: Arrays = {"x_blocks": blocks, "x_scales": scales, "x_bias": np.zeros((5, 17), BF16)}
    assert_same(decoded(mxfp4.weights, arrays), wanted, BF16)


@pytest.mark.parametrize("kind", ["Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor"])
@pytest.mark.parametrize("width", [6, 24])
@np.errstate(all="ignore")
def test_torchao(kind: str, width: int) -> None:
    values = np.random.default_rng(0)
    dtype = F8 if kind == "Float8Tensor" else np.dtype(np.int8)
    q = (values.normal(size=(7, 24)) * 30).astype(dtype)
    scale = extreme(values.uniform(0.01, 2, (7, 24 // width)).astype(F32 if width == 24 else BF16))
    zero = values.integers(-8, 8, scale.shape).astype(np.int8)
    parts = ["qdata", "scale"]
    arrays: Arrays = {"_weight_qdata": q, "_weight_scale": scale}
    if kind != "Float8Tensor":
        parts.append("zero_point")
        arrays["_weight_zero_point"] = zero
    said = {
        "_type": kind,
        "_data": {"block_size": [1, width], "dtype": {"_type": "torch.dtype", "_data": "bfloat16"}},
        "_tensor_data_names": parts,
    }
    wanted = [
        floats(
            (np.float32(q[i, j]) - (np.float32(zero[i, j // width]) if len(parts) > 2 else 0))
            * scale[i, j // width].astype(F32),
            BF16,
        )
        for i in range(7)
        for j in range(24)
    ]
    assert_same(decoded(torchao.weights, arrays, metadata=json.dumps(said)), wanted, BF16)


# --- hostile layers ------------------------------------------------------------------------------


def refused(weights: Callable[[Layer], Iterator[PackedWeight]], layer: Layer) -> str:
    with pytest.raises(LayerError) as caught:
        list(weights(layer))
    return caught.value.finding.code


@pytest.mark.parametrize(
    "state",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 4000,
        b'{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16"}',
        b'{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [4, -4]}',
        b'{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [true, 16]}',
        b'{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [4, 4, 1]}',
        b'{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [1e9, 1e9]}',
        b'{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [99999999999, 9]}',
        b'{"quant_type": "nf4", "blocksize": 48, "dtype": "bfloat16", "shape": [4, 4]}',
        b'{"quant_type": "nf4", "blocksize": 0, "dtype": "bfloat16", "shape": [4, 4]}',
        b'{"quant_type": "nf4", "blocksize": true, "dtype": "bfloat16", "shape": [4, 4]}',
        b'{"quant_type": "fp4", "blocksize": 64, "dtype": "bfloat16", "shape": [4, 4]}',
        b'{"quant_type": "int4", "blocksize": 64, "dtype": "bfloat16", "shape": [4, 4]}',
        b'{"quant_type": "nf4", "blocksize": 64, "dtype": "int8", "shape": [4, 4]}',
        b'{"quant_type": "nf4", "blocksize": 64, "dtype": ["bfloat16"], "shape": [4, 4]}',
        b'{"quant_type": ["nf4"], "blocksize": 64, "dtype": "bfloat16", "shape": [4, 4]}',
        (
            b'{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [4, 4], '
            b'"nested_offset": 1.0}'
        ),
    ],
)
def test_a_wrong_state_is_refused(state: bytes) -> None:
    arrays: Arrays = {
        "weight": np.zeros((8, 1), np.uint8),
        "weight.absmax": np.ones(1, F32),
        "weight.quant_map": bitsandbytes_4bit.TABLES["nf4"],
        "weight.quant_state.bitsandbytes__nf4": np.frombuffer(state, np.uint8),
    }
    assert refused(bitsandbytes_4bit.weights, layer_of(arrays)) == "V553"


@pytest.mark.parametrize("sizes", [[16, 0], [16, -8], [8, 16], [16, 1 << 50], [16], [16, 8, 1], []])
def test_a_wrong_shape_is_refused(sizes: list[int]) -> None:
    arrays: Arrays = {
        "weight_packed": np.zeros((16, 2), np.int32),
        "weight_shape": np.array(sizes, np.int64),
        "weight_scale": np.ones((16, 1), BF16),
    }
    settings = scheme("pack-quantized", 4, "channel")
    assert refused(compressed_tensors.weights, layer_of(arrays, settings)) == "V553"


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("V554", {"bits": 5}),
        ("V554", {"bits": None}),
        ("V554", {"bits": "4"}),
        ("V554", {"checkpoint_format": "marlin"}),
        ("V554", {"group_size": 7}),
        ("V554", {"group_size": 0}),
        ("V554", {"group_size": -2}),
        ("V554", {"group_size": None}),
        ("V554", {"pack_dtype": "int8"}),
        ("V554", {"meta": {"rotation": "hadamard"}}),
        ("V553", {"group_size": 8}),
        ("V554", {"bits": 8}),
    ],
)
def test_unknown_settings_of_gptq_are_refused(code: str, change: Mapping[str, object]) -> None:
    arrays: Arrays = {
        "qweight": np.zeros((2, 16), np.int32),
        "qzeros": np.zeros((1, 2), np.int32),
        "scales": np.ones((1, 16), F16),
        "g_idx": np.zeros(16, np.int32),
    }
    settings = {"bits": 4, "checkpoint_format": "gptq", "group_size": 16, **change}
    assert refused(gptq.weights, layer_of(arrays, settings)) == code


@pytest.mark.parametrize("value", [-1, 1, 2**31 - 1])
def test_a_missing_group_is_refused(value: int) -> None:
    arrays: Arrays = {
        "qweight": np.zeros((2, 16), np.int32),
        "qzeros": np.zeros((1, 2), np.int32),
        "scales": np.ones((1, 16), F16),
        "g_idx": np.zeros(16, np.int32),
    }
    settings = {"bits": 4, "checkpoint_format": "gptq", "group_size": 16}
    (weight,) = gptq.weights(layer_of(arrays, settings))
    check = weight.checks["m.g_idx"]
    assert check(np.zeros(16, np.int32)) is None
    assert check(np.full(16, value, np.int32)) is not None


@pytest.mark.parametrize(
    "change",
    [
        {"version": "gemv"},
        {"version": "gemv_fast"},
        {"format": "marlin"},
        {"version": "exllama"},
        {"checkpoint_format": "marlin"},
        {"bits": 8},
        {"bits": "8"},
        {"w_bit": "8"},
        {"group_size": 3},
        {"group_size": None},
    ],
)
def test_unknown_layouts_of_awq_are_refused(change: Mapping[str, object]) -> None:
    arrays: Arrays = {
        "qweight": np.zeros((16, 2), np.int32),
        "qzeros": np.zeros((1, 2), np.int32),
        "scales": np.ones((1, 16), F16),
    }
    settings = {"bits": 4, "version": "gemm", "group_size": 16, **change}
    assert refused(awq.weights, layer_of(arrays, settings)) == "V554"


INT8 = '"_type": "Int8Tensor", "_data"'
BF = '"dtype": {"_data": "bfloat16"}'


@pytest.mark.parametrize(
    "said",
    [
        None,
        "{",
        "[]",
        "[" * 20_000,
        '{"_type": "Int4Tensor", "_data": {}}',
        '{"_type": ["x"]}',
        '{"_type": "Int8Tensor"}',
        f'{{{INT8}: {{"block_size": [1, 16]}}, "_tensor_data_names": []}}',
        f'{{{INT8}: {{"block_size": [2, 8], {BF}}}, "_tensor_data_names": ["qdata", "scale"]}}',
        f'{{{INT8}: {{"block_size": [1, 5], {BF}}}, "_tensor_data_names": ["qdata", "scale"]}}',
        f'{{{INT8}: {{"block_size": [1, 16], {BF}}}, "_tensor_data_names": ["qdata", "zero"]}}',
    ],
)
def test_a_wrong_header_of_torchao_is_refused(said: str | None) -> None:
    arrays: Arrays = {
        "_weight_qdata": np.zeros((4, 16), np.int8),
        "_weight_scale": np.ones((4, 1), F32),
    }
    layer = layer_of(arrays, metadata=said)
    assert refused(torchao.weights, layer) in ("V552", "V553", "V554")


@pytest.mark.parametrize(
    "change",
    [
        {"sparsity_config": {"format": "sparse-24-bitmask"}},
        {"transform_config": {"config_groups": {}}},
        {"format": "marlin-24"},
        {"format": "mxfp4-pack-quantized"},
        {"config_groups": {}},
        {"config_groups": None},
        {"config_groups": {"a": {"targets": ["Linear"]}}},
        scheme("pack-quantized", 4, "group", group_size=-1),
        {"config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 9}}}},
        {"config_groups": {key: {"targets": ["re:(a+)+$"]} for key in map(str, range(1000))}},
    ],
)
def test_unknown_settings_of_compressed_tensors_are_refused(
    change: Mapping[str, object],
) -> None:
    arrays: Arrays = {
        "weight_packed": np.zeros((16, 2), np.int32),
        "weight_shape": np.array([16, 16]),
        "weight_scale": np.ones((16, 1), BF16),
    }
    settings = {**scheme("pack-quantized", 4, "channel"), **change}
    assert refused(compressed_tensors.weights, layer_of(arrays, settings)) == "V554"


def test_too_many_groups_are_refused_with_the_limit() -> None:
    arrays: Arrays = {"weight": np.zeros((4, 4), np.int8), "weight_scale": np.ones((4, 1), BF16)}
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}}
    for count in (64, 65):
        groups = {str(number): group for number in range(count)}
        settings = {"format": "int-quantized", "config_groups": groups}
        layer = layer_of(arrays, settings)
        if count == 64:
            assert len([*compressed_tensors.weights(layer)]) == 1
            continue
        with pytest.raises(LayerError, match="65 config_groups; up to 64 are read"):
            list(compressed_tensors.weights(layer))


def test_two_groups_of_a_config_that_both_fit_a_layer_are_refused() -> None:
    arrays: Arrays = {"weight": np.zeros((4, 4), np.int8), "weight_scale": np.ones((4, 1), BF16)}
    channel, group = (
        {"num_bits": 8, "strategy": name, "group_size": 4, "symmetric": True}
        for name in ("channel", "group")
    )
    settings = {
        "format": "int-quantized",
        "config_groups": {
            "a": {"targets": ["Linear"], "weights": channel},
            "b": {"targets": ["Module"], "weights": group},
        },
    }
    assert refused(compressed_tensors.weights, layer_of(arrays, settings)) == "V554"


def test_every_format_has_a_name_and_refuses_an_empty_layer() -> None:
    for each in FORMATS:
        layer = layer_of({"bias": np.zeros(4, F32)}, {"bits": 4, "group_size": 4})
        assert refused(each.weights, layer) in ("V552", "V554")
