"""Every format of `--dequantize` on files of the real libraries, compared bit by bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import DATA
from merges import tensors_of
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from vera_convert.base.facts import BaseOptions
from vera_convert.base.quantized.unpack import unpacked
from vera_convert.conversion.projections import ProjectionSource
from vera_convert.counting import count
from vera_convert.errors import CheckpointError, UsageError
from vera_convert.files.reading import open_local
from vera_convert.files.tensorfile import TensorFile, from_array, from_file, write_tensors
from vera_convert.merging.merge import merge
from vera_convert.merging.options import MergeOptions
from vera_convert.summary import info
from vera_convert.validation.validate import validate
from vera_convert.verification.verify import verify

FIXTURES = DATA / "quantized"
NAMES = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir())
Tensors = Mapping[str, NDArray[Any]]


def merged(name: str, out: Path, **options: Any) -> Tensors:
    """Merge a fixture's adapter into the fixture's base with --dequantize."""
    folder = FIXTURES / name
    base = BaseOptions(str(folder / "base"))
    merge(folder / "adapter", out, base=base, options=MergeOptions(dequantize=True, **options))
    return tensors_of(out)


def values(tensor: NDArray[Any]) -> NDArray[np.float64]:
    return tensor.astype(np.float64)


@pytest.mark.parametrize("name", NAMES)
def test_weights_equal_the_library_s_and_merged_weights_have_the_delta(
    name: str, tmp_path: Path
) -> None:
    told = json.loads((FIXTURES / name / "expected.json").read_text(encoding="utf-8"))
    wanted = load_file(FIXTURES / name / "expected.safetensors")
    with safe_open(FIXTURES / name / "base/model.safetensors", "np") as file:
        kept = {key: file.get_tensor(key) for key in told["kept"]}
    found = merged(name, tmp_path / "out")
    with_delta = {key.removeprefix("merged.") for key in wanted if key.startswith("merged.")}
    plain = {key.removeprefix("dequantized.") for key in wanted if key.startswith("deq")}
    assert found.keys() == with_delta | plain | {*told["kept"]}
    for key in (plain | {*told["kept"]}) - with_delta:
        expected = wanted.get(f"dequantized.{key}", kept.get(key))
        assert expected is not None
        assert found[key].dtype == expected.dtype, key
        np.testing.assert_array_equal(values(found[key]), values(expected), key)
    for key in with_delta:
        kinds = [
            wanted[f"{kind}.{key}"]
            for kind in ("merged", "merged_alt")
            if f"{kind}.{key}" in wanted
        ]
        assert found[key].dtype == kinds[0].dtype
        off = [np.count_nonzero(values(found[key]) != values(each)) for each in kinds]
        assert min(off) <= found[key].size // 1000, key


@pytest.mark.parametrize("name", NAMES)
def test_no_file_or_field_of_the_quantizer_is_left(name: str, tmp_path: Path) -> None:
    merged(name, tmp_path / "out")
    out = tmp_path / "out"
    assert "quantization_config" not in (out / "config.json").read_text(encoding="utf-8")
    assert not (out / "quantize_config.json").exists()
    with safe_open(out / "model.safetensors", "np") as file:
        assert set(file.metadata()) <= {"format"}


@pytest.mark.parametrize("name", [name for name in NAMES if "mxfp4" not in name])
def test_validate_says_that_a_merge_can_dequantize_the_base(name: str) -> None:
    folder = FIXTURES / name
    found = validate(folder / "adapter", base=folder / "base")
    codes = {finding.code for finding in found.findings}
    assert found.passed
    assert "V563" in codes
    assert not codes & {"V415", "V550", "V556"}
    (note,) = (finding for finding in found.findings if finding.code == "V563")
    told = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    assert told["format"] in note.reason
    assert "--dequantize" in note.rule.remedy


def with_tensors(source: Path, base: Path, changed: Tensors, left_out: str = "") -> None:
    """Write a copy of a base with changed tensors, without the tensors whose names begin with a
    prefix.
    """
    shutil.copytree(source, base)
    (base / "model.safetensors").unlink()
    with open_local(source / "model.safetensors") as opened:
        file = TensorFile(opened)
        names = [key for key in file.header.tensors if not (left_out and key.startswith(left_out))]
        kept = [from_file(file, key) for key in names if key not in changed]
        more = [from_array(key, array) for key, array in changed.items()]
        write_tensors(base / "model.safetensors", [*kept, *more], file.header.metadata)


PLAIN = "model.layers.0.self_attn.q_proj.weight"


def with_a_plain_layer(name: str, base: Path) -> Tensors:
    """Write a base with a plain layer; return the expected tensors."""
    expected = load_file(FIXTURES / name / "expected.safetensors")
    plain = {PLAIN: expected[f"dequantized.{PLAIN}"]}
    with_tensors(FIXTURES / name / "base", base, plain, left_out=PLAIN.removesuffix("weight"))
    return expected


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("bnb-nf4", ""),
        ("torchao-int8", ""),
        ("ct-fp8-channel", "only if the base is loaded dequantized"),
        ("fp8-block", "only if the base is loaded dequantized"),
    ],
)
def test_a_plain_layer_that_the_config_calls_quantized_is_a_note(
    name: str, told: str, tmp_path: Path
) -> None:
    with_a_plain_layer(name, tmp_path / "base")
    found = validate(FIXTURES / name / "adapter", base=tmp_path / "base")
    (note,) = (finding for finding in found.findings if finding.code == "V563")
    assert told in note.reason
    assert ("plain" in note.reason) == bool(told)
    assert "V556" not in {finding.code for finding in found.findings}


@pytest.mark.parametrize(
    ("name", "is_lost"),
    [("gptq-8bit", True), ("awq-gemm", True), ("bnb-nf4", False), ("ct-fp8-channel", False)],
)
def test_a_plain_layer_that_a_loader_reads_as_packed_is_a_warning(
    name: str, is_lost: bool, tmp_path: Path
) -> None:
    with_a_plain_layer(name, tmp_path / "base")
    given = BaseOptions(str(tmp_path / "base"), dtype="bfloat16")
    dequantize = MergeOptions(dequantize=True, dry_run=True)
    checked = validate(FIXTURES / name / "adapter", base=given).findings
    merged = merge(FIXTURES / name / "adapter", tmp_path / "out", base=given, options=dequantize)
    for findings in (checked, merged.findings):
        warnings = [finding.reason for finding in findings if finding.code == "V559"]
        assert len(warnings) == is_lost
        assert not is_lost or f'1 of the adapter\'s layers plain, such as "{PLAIN}"' in warnings[0]
        assert not is_lost or "random values in their place" in warnings[0]


@pytest.mark.parametrize("name", ["bnb-nf4", "torchao-int8", "ct-fp8-channel"])
def test_a_plain_layer_that_the_config_calls_quantized_is_merged_as_a_plain_layer(
    name: str, tmp_path: Path
) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    expected = with_a_plain_layer(name, base)
    merge(FIXTURES / name / "adapter", out, base=base, options=MergeOptions(dequantize=True))
    wanted = expected[f"merged.{PLAIN}"].astype(np.float32)
    off = np.count_nonzero(tensors_of(out)[PLAIN].astype(np.float32) != wanted)
    assert off <= wanted.size // 1000


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("bnb-nf4", "llm_int8_skip_modules"),
        ("torchao-int8", "modules_to_not_convert"),
        ("ct-fp8-channel", "ignore"),
        ("fp8-block", "modules_to_not_convert"),
        ("awq-gemm", "modules_to_not_convert"),
    ],
)
def test_a_layer_that_the_config_skips_is_plain_and_is_merged(
    name: str, field: str, tmp_path: Path
) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    expected = with_a_plain_layer(name, base)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"][field] = [PLAIN.removesuffix(".weight")]
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    given = BaseOptions(str(base), dtype="bfloat16")
    found = validate(FIXTURES / name / "adapter", base=given)
    (note,) = (finding for finding in found.findings if finding.code == "V563")
    assert "plain" not in note.reason
    merge(FIXTURES / name / "adapter", out, base=given, options=MergeOptions(dequantize=True))
    tensors = tensors_of(out)
    with open_local(base / "model.safetensors") as opened:
        stored = from_file(TensorFile(opened), PLAIN).array().astype(np.float32)
    changed = np.count_nonzero(tensors[PLAIN].astype(np.float32) != stored)
    assert changed > stored.size // 2
    other = "model.layers.0.mlp.up_proj.weight"
    np.testing.assert_array_equal(values(tensors[other]), values(expected[f"dequantized.{other}"]))


@pytest.mark.parametrize(
    ("name", "field", "listed", "count"),
    [
        ("bnb-nf4", "llm_int8_skip_modules", ["self_attn.q_proj"], 1),
        ("bnb-int8-noproj", "llm_int8_skip_modules", ["model.layers.0.self_attn"], 4),
        ("awq-gemm", "modules_to_not_convert", [r"model\.layers\.\d+\.mlp"], 3),
        ("awq-gemm", "modules_to_not_convert", ["layers.0.self_attn", "model.layers.0.self"], 0),
        ("awq-gemm", "modules_to_not_convert", ["("], 0),
        ("gptq-8bit", "modules_in_block_to_quantize", [["q_proj"], ["mlp.up_proj"]], 5),
        ("fp8-block", "modules_to_not_convert", ["q_proj"], 0),
        ("torchao-int8", "modules_to_not_convert", ["q_proj"], 0),
        ("ct-fp8-channel", "ignore", ["re:.*q_proj"], 0),
    ],
)
def test_a_packed_layer_that_a_loader_reads_as_plain_is_a_warning(
    name: str, field: str, listed: list[object], count: int, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(FIXTURES / name / "base", tmp_path / "base"))
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"][field] = listed
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    given = BaseOptions(str(base), dtype="bfloat16")
    dequantize = MergeOptions(dequantize=True, dry_run=True)
    checked = validate(FIXTURES / name / "adapter", base=given).findings
    merged = merge(FIXTURES / name / "adapter", tmp_path / "out", base=given, options=dequantize)
    for findings in (checked, merged.findings):
        warnings = [finding.reason for finding in findings if finding.code == "V559"]
        assert len(warnings) == bool(count)
        assert not count or f"7 packed layers, and quantization_config calls {count}" in warnings[0]


@pytest.mark.parametrize("name", NAMES)
def test_small_shards_hold_the_same_bytes(name: str, tmp_path: Path) -> None:
    whole = merged(name, tmp_path / "whole")
    sharded = merged(name, tmp_path / "shards", max_shard_size=20_000)
    assert len([*(tmp_path / "shards").glob("*.safetensors")]) > 2
    assert whole.keys() == sharded.keys()
    for key, tensor in whole.items():
        assert sharded[key].dtype == tensor.dtype
        assert sharded[key].tobytes() == tensor.tobytes()


def test_a_command_unpacks_a_base_once(tmp_path: Path) -> None:
    unpacked.cache_clear()
    merged("ct-pack-int4-asym-group32", tmp_path / "out")
    assert unpacked.cache_info().misses == 1
    assert unpacked.cache_info().hits > 1


def assert_no_delta(folder: Path, base: Path | BaseOptions, out: Path, match: str) -> None:
    """Check that a merge of the fixture's adapter is refused and writes nothing."""
    with pytest.raises(CheckpointError, match=match):
        merge(folder / "adapter", out, base=base, options=MergeOptions(dequantize=True))
    assert not out.exists()


def found_and_expected(
    folder: Path, base: Path | BaseOptions, out: Path, key: str
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Merge the fixture's adapter; return a dequantized weight and the library's weight."""
    merge(folder / "adapter", out, base=base, options=MergeOptions(dequantize=True))
    wanted = load_file(folder / "expected.safetensors")[f"dequantized.{key}"]
    return tensors_of(out)[key].astype(np.float32), wanted.astype(np.float32)


@pytest.mark.parametrize("name", ["fp8-block", "ct-fp8-channel"])
@pytest.mark.parametrize("layer", ["mlp.up_proj", "self_attn.q_proj"])
def test_an_fp8_value_that_is_nan_stays_nan_and_takes_no_delta(
    name: str, layer: str, tmp_path: Path
) -> None:
    folder, base = FIXTURES / name, tmp_path / "base"
    key = f"model.layers.0.{layer}.weight"
    with open_local(folder / "base/model.safetensors") as opened:
        values = from_file(TensorFile(opened), key).array()
    values.view(np.uint8)[1, 2:4] = 0x7F, 0xFF  # the two NaNs of float8_e4m3fn
    with_tensors(folder / "base", base, {key: values})
    if layer == "self_attn.q_proj":
        assert_no_delta(folder, base, tmp_path / "out", rf"V530 {key}: its value at \[1, 2\]")
        return
    found, wanted = found_and_expected(folder, base, tmp_path / "out", key)
    wanted[1, 2:4] = np.nan
    np.testing.assert_array_equal(found, wanted)


def half_nf4(key: str, parts: Tensors, _row: int) -> Tensors:
    """Change a float16 weight so that its first block exceeds the range of float16."""
    state = f"{key}.quant_state.bitsandbytes__nf4"
    text = parts[state].tobytes().replace(b"bfloat16", b"float16")
    absmax = parts[f"{key}.absmax"].copy()
    absmax[1] = 1e6
    return {state: np.frombuffer(text, np.uint8), f"{key}.absmax": absmax}


def large_gptq(key: str, parts: Tensors, row: int) -> Tensors:
    """Change a scale so that most codes of an output exceed the range of float16."""
    scales = parts[f"{key.removesuffix('weight')}scales"].copy()
    scales[:, row] = 65504
    return {f"{key.removesuffix('weight')}scales": scales}


@pytest.mark.parametrize(("name", "enlarge"), [("bnb-nf4", half_nf4), ("gptq-8bit", large_gptq)])
@pytest.mark.parametrize("layer", ["mlp.up_proj", "self_attn.q_proj"])
def test_a_value_that_overflows_as_in_the_library_is_kept_and_takes_no_delta(
    name: str, enlarge: Callable[[str, Tensors, int], Tensors], layer: str, tmp_path: Path
) -> None:
    folder, base = FIXTURES / name, tmp_path / "base"
    key, row = f"model.layers.0.{layer}.weight", 1
    parts = load_file(folder / "base/model.safetensors")
    with_tensors(folder / "base", base, enlarge(key, parts, row))
    given = BaseOptions(str(base), dtype="float16")
    if layer == "self_attn.q_proj":
        assert_no_delta(folder, given, tmp_path / "out", rf"V530 {key}: its value at \[1, ")
        return
    found, wanted = found_and_expected(folder, given, tmp_path / "out", key)
    is_large = np.isinf(found)
    assert is_large[row].any()
    assert not np.delete(is_large, row, axis=0).any()
    np.testing.assert_array_equal(np.sign(found[is_large]), np.sign(wanted[is_large]))


def test_an_expert_that_overflows_as_in_the_library_is_kept(tmp_path: Path) -> None:
    name, key = "mxfp4-gpt-oss-noproj", "model.layers.0.mlp.experts.down_proj"
    folder, base = FIXTURES / name, tmp_path / "base"
    with open_local(folder / "base/model.safetensors") as opened:
        scales = from_file(TensorFile(opened), f"{key}_scales").array().copy()
    scales[0, 0, 0] = 254
    with_tensors(folder / "base", base, {f"{key}_scales": scales})
    found, wanted = found_and_expected(folder, base, tmp_path / "out", key)
    assert np.isinf(found[0, :32, 0]).any()
    np.testing.assert_array_equal(np.sign(found), np.sign(wanted))


def test_the_refusal_of_a_packed_base_names_dequantize_if_the_option_helps(tmp_path: Path) -> None:
    folder = FIXTURES / "bnb-nf4"
    with pytest.raises(CheckpointError) as caught:
        merge(folder / "adapter", tmp_path / "out", base=folder / "base")
    (finding,) = caught.value.findings
    assert finding.code == "V550"
    assert finding.reason.endswith("With --dequantize, a merge writes a 16-bit model.")


@pytest.mark.parametrize("name", [name for name in NAMES if "mxfp4" not in name])
def test_a_broken_packed_layer_is_refused_with_the_name_of_the_defect(
    name: str, tmp_path: Path
) -> None:
    folder, base = FIXTURES / name, tmp_path / "base"
    shutil.copytree(folder / "base", base)
    with open_local(folder / "base/model.safetensors") as source:
        file = TensorFile(source)
        parts = [each for each in file.header.tensors if ".q_proj." in each]
        for part in (each for each in parts if not each.endswith(("g_idx", "weight_format"))):
            kept = [from_file(file, each) for each in file.header.tensors if each != part]
            (base / "model.safetensors").unlink()
            write_tensors(base / "model.safetensors", kept, file.header.metadata)
            codes = []
            for dequantize in (True, False):
                options = MergeOptions(dequantize=dequantize)
                with pytest.raises(CheckpointError) as caught:
                    merge(folder / "adapter", tmp_path / "out", base=base, options=options)
                codes.append(caught.value.findings[0].code)
            assert codes[0] in ("V552", "V554"), part
            assert codes[1] == "V550", part
            assert f"--dequantize refuses this base: {codes[0]}" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["fp8-block", "gptq-4bit-v1", "awq-gemm"])
def test_a_base_that_does_not_decide_the_rounding_needs_its_dtype(
    name: str, tmp_path: Path
) -> None:
    folder, out = FIXTURES / name, tmp_path / "out"
    options = MergeOptions(dequantize=True, projections=ProjectionSource.KEY)
    with pytest.raises(UsageError, match=r"the adapted layers are quantized .*--base-dtype"):
        merge(folder / "adapter", out, base=folder / "base", options=options)
    for dtype in ("float16", "float8_e4m3fn"):
        base = BaseOptions(str(folder / "base"), dtype=dtype)
        merge(folder / "adapter", tmp_path / dtype, base=base, options=options)
    first, second = (tensors_of(tmp_path / dtype) for dtype in ("float16", "float8_e4m3fn"))
    key = "model.layers.0.self_attn.q_proj.weight"
    assert first[key].tobytes() != second[key].tobytes()


def test_a_4_bit_base_without_settings_does_not_decide_the_rounding(tmp_path: Path) -> None:
    folder, base = FIXTURES / "bnb-nf4-double-noproj", tmp_path / "base"
    shutil.copytree(folder / "base", base)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    del config["quantization_config"]
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    options = MergeOptions(dequantize=True)
    with pytest.raises(UsageError, match=r"does not say in which dtype .*--base-dtype"):
        merge(folder / "adapter", tmp_path / "out", base=base, options=options)
    told = BaseOptions(str(base), dtype="bfloat16")
    merge(folder / "adapter", tmp_path / "out", base=told, options=options)
    wanted = merged("bnb-nf4-double-noproj", tmp_path / "wanted")
    found = tensors_of(tmp_path / "out")
    assert all(found[key].tobytes() == wanted[key].tobytes() for key in wanted)


def test_an_fp8_base_that_fits_two_methods_is_refused(tmp_path: Path) -> None:
    folder, base = FIXTURES / "ct-fp8-channel", tmp_path / "base"
    shutil.copytree(folder / "base", base)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    del config["quantization_config"]
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    options = MergeOptions(dequantize=True)
    with pytest.raises(CheckpointError, match=r"V554 .*names no quant_method"):
        merge(folder / "adapter", tmp_path / "out", base=base, options=options)


@pytest.mark.parametrize("name", NAMES)
def test_layers_of_a_packed_base_are_counted_and_described(name: str) -> None:
    folder = FIXTURES / name
    counted = count(folder / "base", rank=4, targets=("q_proj",))
    shapes = {each.name: (each.out_features, each.in_features) for each in counted.groups}
    assert shapes == {"self_attn.q_proj": (64, 64)}
    described = info(folder / "adapter", base=folder / "base")
    told = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    assert described.base_facts.in_features == (64 if "mxfp4" in name else 128)
    wanted = load_file(folder / "expected.safetensors")
    sizes = (a.nbytes for key, a in wanted.items() if key.startswith("dequantized."))
    assert described.sizes.merged is not None
    assert told["targets"]
    assert described.sizes.merged > (0 if "mxfp4" in name else sum(sizes))


def test_a_scale_that_is_nan_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "gptq-8bit/base", tmp_path / "base")
    path = tmp_path / "base/model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.up_proj.scales"
    tensors[name] = tensors[name].copy()
    tensors[name][0, 5] = np.nan
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=rf"V562 {name}"):
        merge(
            FIXTURES / "gptq-8bit/adapter",
            tmp_path / "out",
            base=tmp_path / "base",
            options=MergeOptions(dequantize=True),
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", NAMES)
def test_parts_of_a_weight_can_lie_in_different_shards(name: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(FIXTURES / name / "base", base)
    (base / "model.safetensors").unlink()
    with open_local(FIXTURES / name / "base/model.safetensors") as source:
        file = TensorFile(source)
        names = sorted(file.header.tensors)
        weight_map: dict[str, str] = {}
        for shard in range(3):
            path = f"model-{shard + 1:05}-of-00003.safetensors"
            tensors = [from_file(file, each) for each in names[shard::3]]
            write_tensors(base / path, tensors, file.header.metadata)
            weight_map |= dict.fromkeys(names[shard::3], path)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    wanted = merged(name, tmp_path / "single")
    options = MergeOptions(dequantize=True, jobs=3)
    merge(FIXTURES / name / "adapter", tmp_path / "out", base=base, options=options)
    found = tensors_of(tmp_path / "out")
    assert found.keys() == wanted.keys()
    assert all(found[key].tobytes() == wanted[key].tobytes() for key in wanted)
    told = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert told["weight_map"].keys() == wanted.keys()
    assert told["metadata"]["total_size"] == sum(array.nbytes for array in wanted.values())
    for out in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(out, "np") as shard_file:
            assert set(shard_file.metadata()) <= {"format"}


def test_a_dequantized_merge_is_verified_and_run(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    for name in ("bnb-int8-noproj", "gptq-8bit"):
        merged(name, tmp_path / name)
        folder = FIXTURES / name
        found = verify(folder / "adapter", base=folder / "base", merged=tmp_path / name)
        assert found.passed, name
