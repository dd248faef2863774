"""Merges into fp8 bases: the 16-bit result, and the refused bases."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import RANK, good_adapter, good_tensors
from bases import LAYER, TENSORS
from fp8 import BF16, CONFIG, E5M2, F8, FORMS, SUFFIX, Arrays, fp8_base
from heads import on_the_head
from numpy.typing import NDArray

from vera_convert.assembly.input_files import InputFile
from vera_convert.base.facts import BaseOptions
from vera_convert.base.model import read_base
from vera_convert.base.quantized.fp8 import dequantized
from vera_convert.base.quantized.unpack import unpacked
from vera_convert.delta import delta
from vera_convert.errors import CheckpointError, UsageError
from vera_convert.files.reading import open_local
from vera_convert.files.tensorfile import TensorFile, from_array, from_file, write_tensors
from vera_convert.hub.lookup import HubAccess, Location
from vera_convert.merging.dequantize import Decoder, dequantized_config
from vera_convert.merging.merge import Merge, merge
from vera_convert.merging.options import MergeOptions, Tied
from vera_convert.verification.options import VerifyOptions
from vera_convert.verification.verify import verify


def adapter_of(folder: Path) -> tuple[Path, Arrays]:
    """Write an adapter for the Llama of `fp8_base`; return the path and the deltas by tensor."""
    stored = good_tensors()
    A, B = stored["base_model.vera_A"], stored["base_model.vera_B"]
    deltas = {}
    for key in stored:
        module = key.removeprefix("base_model.model.").removesuffix(".vera_lambda_b")
        if key.endswith("vera_lambda_b"):
            d = stored[key.replace("lambda_b", "lambda_d")]
            deltas[f"{module}.weight"] = delta(A, B, d, stored[key], 16)
    return good_adapter(folder), deltas


def tensors_in(folder: Path) -> Arrays:
    found: Arrays = {}
    for path in sorted(folder.glob("*.safetensors")):
        with open_local(path) as source:
            file = TensorFile(source)
            found |= {name: from_file(file, name).array() for name in file.header.tensors}
    return found


def run(adapter: Path, out: Path, base: Path, **options: Any) -> Merge:
    return merge(adapter, out, base=BaseOptions(model=str(base)), options=MergeOptions(**options))


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [(6, 5), (6, 6), (1, 20), (14, 20), (4, 4), (7, 10), (128, 128)])
@pytest.mark.parametrize("dtype", [F8, E5M2])
def test_blocks_of_rows_are_scaled_wherever_they_begin(
    block: tuple[int, int], dtype: np.dtype[Any]
) -> None:
    shape = (14, 20)
    values = np.random.default_rng(1)
    stored = values.normal(size=shape).astype(dtype)
    scales = values.uniform(0.1, 3, size=[-(-n // b) for n, b in zip(shape, block, strict=True)])
    expected = np.array(
        [
            [
                np.float32(stored[row, column])
                * np.float32(scales[row // block[0], column // block[1]])
                for column in range(shape[1])
            ]
            for row in range(shape[0])
        ],
        np.float32,
    )
    for first in range(0, shape[0], 3):
        last = min(first + 3, shape[0])
        factors = scales[first // block[0] : -(-last // block[0])]
        found = dequantized(stored[first:last], factors, first=first % block[0], block=block)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected[first:last])


@pytest.mark.parametrize("form", FORMS)
def test_scales_are_read_for_the_requested_rows(tmp_path: Path, form: str) -> None:
    config = CONFIG if form == "block" else {**CONFIG, "quantization_config": {}}
    meant = fp8_base(tmp_path / "base", form=form, config=config)
    base = read_base(Location("base", tmp_path / "base"), HubAccess())
    files = {name: InputFile.look(tmp_path / "base" / name, within=tmp_path) for name in base.files}
    name = "model.layers.1.mlp.up_proj.weight"
    decode = Decoder(base, files, unpacked(base).weights[name])
    for first in range(len(meant[name])):
        last = min(first + 7, len(meant[name]))
        np.testing.assert_array_equal(decode(first, last), meant[name][first:last])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale_name", ["weight_scale_inv", "weight_scale"])
def test_a_merge_equals_the_merge_into_the_16_bit_model(
    tmp_path: Path, form: str, scale_name: str
) -> None:
    size = {"block": [6, 5]}.get(form)
    quantization = {"quant_method": "fp8", "weight_block_size": size}
    config = {**CONFIG, "quantization_config": quantization}
    meant = fp8_base(tmp_path / "base", form=form, scale_name=scale_name, config=config)
    adapter, deltas = adapter_of(tmp_path / "adapter")
    result = run(adapter, tmp_path / "out", tmp_path / "base", dequantize=True)
    merged = tensors_in(tmp_path / "out")
    assert merged.keys() == TENSORS.keys()
    for name, values in meant.items():
        assert merged[name].dtype == BF16
        exact = values.astype(np.float64) + deltas.get(name, 0)
        expected = (values + deltas.get(name, np.float32(0))).astype(BF16)
        np.testing.assert_allclose(merged[name].astype(np.float64), exact, rtol=2**-8, atol=1e-6)
        assert np.count_nonzero(merged[name] != expected) <= 1  # the order of summation may differ
    assert {report.name for report in result.tensors} == deltas.keys()
    (note,) = (finding for finding in result.findings if finding.code == "V555")
    assert note.reason == "12 weights (fp8) become BF16; 12 scales and other parts are left out."


def test_quantization_config_index_entries_and_scales_are_removed_together(tmp_path: Path) -> None:
    config = {
        **CONFIG,
        "dtype": "float16",
        "text_config": {"compression_config": {}, "vocab_size": 32},
    }
    fp8_base(tmp_path / "base", shards=3, config=config)
    (tmp_path / "base/hf_quant_config.json").write_text("{}")
    (tmp_path / "base/generation_config.json").write_text("{}")
    adapter, _ = adapter_of(tmp_path / "adapter")
    run(adapter, tmp_path / "out", tmp_path / "base", dequantize=True)
    out = tmp_path / "out"
    assert (out / "config.json").read_text() == json.dumps(
        {
            "model_type": "llama",
            "torch_dtype": "bfloat16",
            "hidden_size": 16,
            "dtype": "float16",
            "text_config": {"vocab_size": 32},
        },
        indent=2,
    )
    merged = tensors_in(out)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == merged.keys() == TENSORS.keys()
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in merged.values())
    assert {merged[name].dtype for name in TENSORS if name.endswith(SUFFIX)} == {np.dtype("f2")}
    assert (out / "generation_config.json").exists()
    assert not (out / "hf_quant_config.json").exists()


def test_a_shard_of_scales_alone_disappears(tmp_path: Path) -> None:
    fp8_base(tmp_path / "base", shards=2)
    base = tmp_path / "base"
    stored = tensors_in(base)
    scales = {name for name in stored if name.endswith("scale_inv")}
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    for file, names in zip(files, (stored.keys() - scales, scales), strict=True):
        (base / file).unlink()
        write_tensors(base / file, [from_array(name, stored[name]) for name in sorted(names)], {})
    weight_map = {name: files[name in scales] for name in stored}
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    adapter, _ = adapter_of(tmp_path / "adapter")
    run(adapter, tmp_path / "out", base, dequantize=True)
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == [files[0]]


def test_scales_of_activations_are_removed_and_16_bit_scales_are_read(tmp_path: Path) -> None:
    attention = "model.layers.0.self_attn"
    more: Arrays = {
        f"{attention}.q_proj.input_scale": np.ones(1, np.float32),
        f"{attention}.k_scale": np.ones(1, np.float32),
        "model.extra.q_scale": np.ones(1, np.float32),
    }
    meant = fp8_base(tmp_path / "base", scale_dtype=BF16, change=more)
    adapter, _ = adapter_of(tmp_path / "adapter")
    run(adapter, tmp_path / "out", tmp_path / "base", dequantize=True, dtype="float32")
    merged = tensors_in(tmp_path / "out")
    assert merged.keys() == {*TENSORS, "model.extra.q_scale"}
    name = "model.layers.1.mlp.up_proj.weight"
    np.testing.assert_array_equal(merged[name], meant[name])


def test_a_replaced_weight_comes_in_16_bits(tmp_path: Path) -> None:
    meant = fp8_base(tmp_path / "base")
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(2)]
    values = {name: meant[name] + 1 for name in names}
    adapter = good_adapter(
        tmp_path / "adapter",
        tensors={f"base_model.model.{name}": values[name] for name in names},
        modules_to_save=["up_proj"],
    )
    with pytest.raises(CheckpointError, match="V550"):
        run(adapter, tmp_path / "out", tmp_path / "base")
    run(adapter, tmp_path / "out", tmp_path / "base", dequantize=True)
    for name in names:
        found = tensors_in(tmp_path / "out")[name]
        np.testing.assert_array_equal(found, values[name].astype(BF16))


# --- refusals ------------------------------------------------------------------------------------

Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("V552", {f"{Q}.weight_scale_inv": None}),
        ("V553", {f"{Q}.weight_scale_inv": np.ones((2, 2), np.float32)}),
        ("V553", {f"{Q}.weight_scale_inv": np.ones((16, 16), np.float32)}),
        ("V553", {f"{Q}.weight_scale_inv": np.ones((16, 1), np.float32)}),
        ("V553", {f"{Q}.weight_scale_inv": np.ones((1, 1), np.float32)}),
        ("V553", {f"{Q}.weight_scale_inv": np.ones((), np.float32)}),
        ("V553", {f"{Q}.weight_scale_inv": np.ones((3, 4), np.int32)}),
        ("V553", {f"{Q}.weight_scale": np.ones((3, 4), np.float32)}),
        ("V554", {"model.layers.1.mlp.up_proj.weight": np.ones((24, 8), np.uint8)}),
        ("V554", {f"{Q}.weight_zero_point": np.ones((3, 4), np.int8)}),
        ("V554", {"model.other.qweight": np.ones((2, 16), np.int32)}),
        ("V553", {"model.stack.weight": np.ones((2, 4, 4), F8)}),
    ],
)
def test_a_base_that_cannot_be_dequantized_is_refused(
    tmp_path: Path, code: str, change: Mapping[str, NDArray[Any] | None]
) -> None:
    if "model.stack.weight" in change:
        change = {**change, "model.stack.weight_scale_inv": np.ones((2, 1, 1), np.float32)}
    fp8_base(tmp_path / "base", change=change)
    adapter, _ = adapter_of(tmp_path / "adapter")
    with pytest.raises(CheckpointError) as error:
        run(adapter, tmp_path / "out", tmp_path / "base", dequantize=True)
    assert code in {finding.code for finding in error.value.findings}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_without_the_option_an_fp8_base_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    # R50: a scale that is never applied corrupts the result silently.
    fp8_base(tmp_path / "base")
    for adapter in (
        adapter_of(tmp_path / "adapter")[0],
        good_adapter(tmp_path / "stripped", stripped=True),
    ):
        with pytest.raises(CheckpointError, match=r"V550.*4 of 4 layers.*fp8.*--dequantize"):
            run(adapter, tmp_path / "out", tmp_path / "base")
    assert not (tmp_path / "out").exists()


def test_drawn_projections_are_rounded_as_on_the_16_bit_model(tmp_path: Path) -> None:
    meant = fp8_base(tmp_path / "base")
    adapter = good_adapter(tmp_path / "adapter", stripped=True)
    with pytest.raises(UsageError, match="--base-dtype"):
        run(adapter, tmp_path / "out", tmp_path / "base", dequantize=True)
    base = BaseOptions(str(tmp_path / "base"), dtype="bfloat16")
    merge(adapter, tmp_path / "out", base=base, options=MergeOptions(dequantize=True))
    stored = good_tensors()
    A, B = (stored[f"base_model.vera_{n}"].astype(BF16).astype(np.float32) for n in "AB")
    key = "base_model.model.model.layers.0.self_attn.v_proj.vera_lambda_"
    added = delta(A, B, stored[f"{key}d"], stored[f"{key}b"], 16)
    name = "model.layers.0.self_attn.v_proj.weight"
    expected = (meant[name] + added).astype(BF16)
    assert np.count_nonzero(tensors_in(tmp_path / "out")[name] != expected) <= 1
    assert len(A) == RANK


def test_a_base_whose_quantized_layers_are_not_adapted_is_merged_with_a_warning(
    tmp_path: Path,
) -> None:
    kept = {"modules_to_not_convert": ["self_attn"], "quant_method": "fp8"}
    config = {**CONFIG, "quantization_config": kept}
    meant = fp8_base(tmp_path / "base", only="up_proj.weight", config=config)
    before = tensors_in(tmp_path / "base")
    adapter, deltas = adapter_of(tmp_path / "adapter")
    for name, dtype in (("out", None), ("wide", "float32")):
        result = run(adapter, tmp_path / name, tmp_path / "base", dtype=dtype)
        assert "V551" in {finding.code for finding in result.findings}
        after = tensors_in(tmp_path / name)
        assert after.keys() == before.keys()
        for tensor, values in before.items():
            if "up_proj" in tensor:  # the merge must convert neither weights nor scales
                assert after[tensor].dtype == values.dtype
                assert after[tensor].tobytes() == values.tobytes()
        for tensor, added in deltas.items():
            written = after[tensor].dtype
            expected = (meant[tensor] + added).astype(written)
            np.testing.assert_allclose(
                after[tensor].astype(np.float32), expected.astype(np.float32), rtol=2**-7
            )
    assert (tmp_path / "out/config.json").read_bytes() == (
        tmp_path / "base/config.json"
    ).read_bytes()


# --- the plan ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ({"torch_dtype": "float16"}, "F16"),
        ({"dtype": "torch.bfloat16"}, "BF16"),
        ({"torch_dtype": "float32"}, "BF16"),
        ({"text_config": {"dtype": "float16"}}, "F16"),
        ({}, "BF16"),
    ],
)
def test_the_dtype_is_that_of_the_config(
    tmp_path: Path, dtypes: Mapping[str, object], expected: str
) -> None:
    fp8_base(tmp_path / "base", form="tensor", config={"model_type": "llama", **dtypes})
    base = read_base(Location("base", tmp_path / "base"), HubAccess())
    packed = unpacked(base)
    assert packed.dtype == expected
    assert len(packed.weights) == 2 * sum(name.endswith(SUFFIX) for name in LAYER)
    assert packed.view.tensors.keys() == TENSORS.keys()


def test_a_base_without_fp8_is_not_dequantized(tmp_path: Path) -> None:
    fp8_base(tmp_path / "base", only="nothing")
    base = read_base(Location("base", tmp_path / "base"), HubAccess())
    packed = unpacked(base)
    assert packed.weights == {}
    assert packed.view is base


def test_only_the_quantization_fields_leave_the_config() -> None:
    text = b'{"a": 1,\n  "quantization_config": {"x": [1]},'
    text += b' "text_config": {"quantization_config": {}}}'
    assert dequantized_config(text, json.loads(text)) == b'{"a": 1, "text_config": {}}'


@pytest.mark.parametrize("tied", Tied)
@pytest.mark.parametrize("stored", [False, True])
def test_a_tied_head_of_a_quantized_base_passes_verify(
    tmp_path: Path, tied: Tied, *, stored: bool
) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    embedding = np.random.default_rng(3).normal(size=(32, 16)).astype(BF16)
    change = {
        "model.embed_tokens.weight": embedding,
        "lm_head.weight": embedding if stored else None,
    }
    fp8_base(base, change=change, config={**CONFIG, "tie_word_embeddings": True})
    adapter = on_the_head(tmp_path / "adapter")
    run(adapter, out, base, dequantize=True, tied=tied)
    merged = tensors_in(out)
    is_changed = merged["model.embed_tokens.weight"] != embedding
    assert is_changed.any() == (tied is Tied.ADD)
    options = VerifyOptions(layers_only=True)
    checked = verify(adapter, merged=out, base=str(base), options=options)
    assert checked.passed, [str(each) for each in checked.findings]
    assert not {"V601", "V602", "V606"} & {each.code for each in checked.findings}
