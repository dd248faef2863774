"""`verify` passes right results, names each wrong result, and trusts no file."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from adapterdefects import bare, drawn, fields, renamed
from adapters import good_adapter, good_tensors
from folders import CONFIG_NAME, bytes_by_name
from fp8 import fp8_base
from heads import HEAD, TIED, head, on_the_head
from hub_server import HubServer
from merges import FIXTURES, filled_base, merged_with, tensors_of
from wrongmerges import PROVENANCE, WRONG, Array, Q, V, codes, edit, layers, rewrite

from vera_convert.base.facts import BaseOptions
from vera_convert.conversion.migration import Mode, migrate
from vera_convert.conversion.projections import ProjectionSource
from vera_convert.conversion.strip_embed import embed, strip
from vera_convert.draws.generator import Variant
from vera_convert.errors import CheckpointError, SurroundingsError, UsageError
from vera_convert.formats.document import result_document
from vera_convert.formats.verification import verification_text
from vera_convert.hub.lookup import HubAccess
from vera_convert.merging.adapters import AdapterSpec
from vera_convert.merging.options import Tied
from vera_convert.verification import diagnosis, merged, model_comparison, pairs
from vera_convert.verification import verify as verifying
from vera_convert.verification.comparator import LIMIT, last_bits
from vera_convert.verification.model_comparison import ModelComparison, ModelJob
from vera_convert.verification.options import VerifyOptions
from vera_convert.verification.verify import Verification, verify

SchemaErrors = Callable[..., list[str]]
PREFIX = "base_model.model."
DTYPES = ("float32", "bfloat16", "float16", "float64")


@pytest.fixture
def model(tmp_path: Path, adapter: Path, base: Path) -> Path:
    merged_with(adapter, base, tmp_path / "merged")
    return tmp_path / "merged"


def kinds(result: Verification) -> dict[str, str]:
    """Return the kind of each tensor that differs from the base's."""
    assert result.merged is not None
    checks = result.merged.tensors.checks
    return {check.name: str(check.kind) for check in checks if check.kind != "same"}


# --- what is merged rightly ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards", [1, 3])
def test_a_merge_passes(tmp_path: Path, adapter: Path, dtype: str, shards: int) -> None:
    base = filled_base(tmp_path / "base", dtype=dtype, shards=shards)
    merged_with(adapter, base, tmp_path / "out")
    result = layers(adapter, base, tmp_path / "out")
    assert (result.passed, codes(result)) == (True, [])
    names = {f"model.layers.{n}.self_attn.{t}_proj.weight" for n in (0, 1) for t in "qv"}
    assert kinds(result) == dict.fromkeys(names, "added")
    assert result.merged is not None
    assert {c.name for c in result.merged.tensors.checks} == tensors_of(base).keys()
    stored = tensors_of(tmp_path / "out").values()
    assert result.merged.tensors.nbytes == sum(array.nbytes for array in stored)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merge_into_another_dtype_passes(tmp_path: Path, adapter: Path, dtype: str) -> None:
    base = filled_base(tmp_path / "base", dtypes={"q_proj": "bfloat16", "norm": "float64"})
    merged_with(adapter, base, tmp_path / "out", dtype=dtype)
    result = layers(adapter, base, tmp_path / "out")
    assert codes(result) == []
    assert {*kinds(result).values()} == {"added", "converted"}


def test_several_adapters_with_weights_pass_in_any_order(
    tmp_path: Path, adapter: Path, base: Path
) -> None:
    values = np.random.default_rng(5)
    larger = {
        name: values.normal(size=[6 if n == 4 else n for n in array.shape]).astype(array.dtype)
        for name, array in good_tensors().items()
    }
    second = good_adapter(tmp_path / "second", r=6, tensors=larger)
    add = (AdapterSpec(second, -2.0),)
    merged_with(adapter, base, tmp_path / "out", weight=0.5, add=add)
    result = layers(adapter, base, tmp_path / "out", add=(AdapterSpec(second),))
    assert codes(result) == []
    assert result.merged is not None
    assert [each.weight for each in result.merged.adapters] == [0.5, -2.0]
    turned = layers(second, base, tmp_path / "out", add=(AdapterSpec(adapter),))
    assert codes(turned) == []
    assert turned.merged is not None
    assert [each.weight for each in turned.merged.adapters] == [-2.0, 0.5]


def test_one_adapter_can_be_merged_with_two_weights(
    tmp_path: Path, adapter: Path, base: Path
) -> None:
    merged_with(adapter, base, tmp_path / "out", weight=0.5, add=(AdapterSpec(adapter, 0.25),))
    result = layers(adapter, base, tmp_path / "out", add=(AdapterSpec(adapter),))
    assert codes(result) == []
    assert result.merged is not None
    assert [each.weight for each in result.merged.adapters] == [0.5, 0.25]


@pytest.mark.parametrize("version", ["0.11.0", "0.21.2"])
@pytest.mark.parametrize(
    "name", ["gpt2_fp32_proj", "bert_cls_fp32_proj", "llama_bf16_proj", "llama_bf16_noproj"]
)
@pytest.mark.parametrize("projections", [ProjectionSource.AUTO, ProjectionSource.KEY])
def test_merges_of_adapters_of_peft_pass(
    tmp_path: Path, version: str, name: str, projections: ProjectionSource
) -> None:
    adapter = FIXTURES / version / name
    base = FIXTURES / json.loads((adapter / "expected.json").read_bytes())["base"]
    merged_with(adapter, base, tmp_path / "out", projections=projections)
    assert layers(adapter, base, tmp_path / "out").errors == ()


@pytest.mark.parametrize("tied", Tied)
@pytest.mark.parametrize("beside", [False, True])
def test_a_tied_head_passes(tmp_path: Path, tied: Tied, *, beside: bool) -> None:
    adapter = on_the_head(tmp_path / "a")
    stored = {} if beside else {"lm_head.weight": None}
    base = filled_base(tmp_path / "base", tensors=stored, config=TIED, shards=2)
    merged_with(adapter, base, tmp_path / "out", tied=tied)
    result = layers(adapter, base, tmp_path / "out")
    assert codes(result) == []
    touched = kinds(result)
    assert ("model.embed_tokens.weight" in touched) is (tied is Tied.ADD)
    assert touched.get("lm_head.weight") == ("added" if beside or tied is Tied.UNTIE else None)


def test_heads_of_an_adapter_pass(tmp_path: Path) -> None:
    adapter = good_adapter(tmp_path / "a", tensors=head(0.3), modules_to_save=["score"])
    base = filled_base(tmp_path / "base", tensors=HEAD, dtypes={"score": "bfloat16"})
    merged_with(adapter, base, tmp_path / "out")
    result = layers(adapter, base, tmp_path / "out")
    assert codes(result) == []
    assert kinds(result)["score.weight"] == "replaced"
    edit(tmp_path / "out", {"score.weight": tensors_of(base)["score.weight"]})
    result = layers(adapter, base, tmp_path / "out")
    assert codes(result) == ["V602"]
    assert "score.weight: 48 of 48 values" in str(result.findings[0])
    without = filled_base(tmp_path / "without")
    merged_with(adapter, without, tmp_path / "new")
    result = layers(adapter, without, tmp_path / "new")
    assert (result.passed, codes(result)) == (True, ["V533"])  # the merge gave the same warning
    assert kinds(result)["score.weight"] == "new"


def test_a_dequantized_merge_passes(tmp_path: Path, adapter: Path) -> None:
    fp8_base(tmp_path / "base")
    merged_with(adapter, tmp_path / "base", tmp_path / "out", dequantize=True)
    result = layers(adapter, tmp_path / "base", tmp_path / "out")
    assert (result.passed, codes(result)) == (True, ["V555"])  # the merge gave the same note
    assert {*kinds(result).values()} == {"added", "converted"}
    with pytest.raises(CheckpointError, match="V550"):
        layers(adapter, tmp_path / "base", tmp_path / "out", dequantize=False)


def test_a_key_map_is_taken_from_the_provenance(tmp_path: Path, adapter: Path) -> None:
    renamed(lambda name: name.replace("model.layers", "inner.layers"))(adapter)
    base = filled_base(tmp_path / "base")
    pair = (("inner", "model"),)
    merged_with(adapter, base, tmp_path / "out", key_map=pair)
    assert codes(layers(adapter, base, tmp_path / "out")) == []
    (tmp_path / "out" / PROVENANCE).unlink()
    assert codes(layers(adapter, base, tmp_path / "out", key_map=pair)) == ["V608"]


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_a_merge_on_another_device_passes(tmp_path: Path, adapter: Path, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    from vera_convert.with_torch.compute import on_device

    base = filled_base(tmp_path / "base", dtype=dtype)
    merged_with(adapter, base, tmp_path / "out", device=on_device(torch.device("cpu")))
    assert codes(layers(adapter, base, tmp_path / "out")) == []


def test_only_the_order_of_a_sum_is_free(tmp_path: Path) -> None:
    values = np.random.default_rng(3)
    sizes: dict[str, Any] = {"model.layers.0.self_attn.q_proj.weight": (128, 256)}
    shapes: dict[str, Any] = {"base_model.vera_A": (64, 256), "base_model.vera_B": (128, 64)}
    shapes |= {f"{PREFIX}{Q}.vera_lambda_b": (128,), f"{PREFIX}{Q}.vera_lambda_d": (64,)}
    stored = {name: values.normal(size=shape).astype("f4") for name, shape in shapes.items()}
    gone = {name: None for name in good_tensors() if name not in stored}
    adapter = good_adapter(
        tmp_path / "a", tensors={**stored, **gone}, r=64, target_modules=["q_proj"]
    )
    fields({"layers_to_transform": [0], "layers_pattern": ["layers"]})(adapter)
    base = filled_base(tmp_path / "base", tensors=sizes)
    merged_with(adapter, base, tmp_path / "out")
    weight = tensors_of(base)[f"{Q}.weight"]
    A, B, b, d = stored.values()
    total = weight.copy()
    left, right = b[:, None] * B, d[:, None] * A
    backwards = np.zeros_like(total)
    for n in reversed(range(64)):
        backwards += np.outer(left[:, n], right[n])
    edit(tmp_path / "out", {f"{Q}.weight": total + backwards})
    result = layers(adapter, base, tmp_path / "out")
    assert codes(result) == []
    assert result.merged is not None
    (found,) = [c.comparison for c in result.merged.tensors.checks if c.kind == "added"]
    assert found.off > found.values / 10
    assert 0 < found.excess < LIMIT / 2
    narrow = (left @ right).astype(np.float16).astype("f4")
    edit(tmp_path / "out", {f"{Q}.weight": total + narrow})
    assert codes(layers(adapter, base, tmp_path / "out")) == ["V601"]


# --- what is merged wrongly ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_merge_of_one_layer_is_found(
    name: str, dtype: str, tmp_path: Path, adapter: Path
) -> None:
    base = filled_base(tmp_path / "base", dtype=dtype)
    merged_with(adapter, base, tmp_path / "out")
    spoil, said = WRONG[name]
    weight = tensors_of(base)[f"{Q}.weight"]
    edit(tmp_path / "out", {f"{Q}.weight": spoil(adapter, Q, weight)})
    result = layers(adapter, base, tmp_path / "out")
    assert codes(result) == ["V601"]
    (finding,) = result.findings
    assert finding.place == f"{Q}.weight"
    assert said in finding.reason
    assert "WRONG " + finding.place in verification_text(result)


def test_the_worst_layer_is_named_first(
    adapter: Path, base: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs, "BLOCK_VALUES", 32)
    right, before = tensors_of(model), tensors_of(base)
    slightly = right[f"{Q}.weight"].copy()
    slightly[5, 3] *= np.float32(1 + 2**-10)
    edit(model, {f"{Q}.weight": slightly, f"{V}.weight": before[f"{V}.weight"]})
    result = layers(adapter, base, model)
    assert [finding.place for finding in result.errors] == [f"{V}.weight", f"{Q}.weight"]
    assert "1 of 256 values differ" in result.errors[1].reason
    assert "value at [5, 3]" in result.errors[1].reason
    listed = [line for line in verification_text(result).splitlines() if "WRONG" in line]
    assert [V in line for line in listed] == [True, False]


def test_a_model_that_is_merged_again_is_found(
    tmp_path: Path, adapter: Path, base: Path, model: Path
) -> None:
    merged_with(adapter, model, tmp_path / "again")
    result = layers(adapter, base, tmp_path / "again")
    assert codes(result) == ["V601"] * 4
    assert all("added twice" in finding.reason for finding in result.findings)


def test_the_base_itself_is_no_merge(adapter: Path, base: Path) -> None:
    result = layers(adapter, base, base)
    assert codes(result) == ["V601"] * 4 + ["V608"]
    assert all("delta was not added" in finding.reason for finding in result.errors)


def test_a_wrong_conv1d_is_found(tmp_path: Path) -> None:
    adapter, base = FIXTURES / "0.21.2/gpt2_fp32_proj", FIXTURES / "bases/gpt2-fp32"
    merged_with(adapter, base, tmp_path / "out")
    changed = {
        name: array
        for name, array in tensors_of(tmp_path / "out").items()
        if not np.array_equal(array, tensors_of(base)[name])
    }
    name, array = next((n, a) for n, a in changed.items() if a.shape[0] != a.shape[1])
    weight = tensors_of(base)[name]
    added = (array - weight).T.reshape(weight.shape)
    edit(tmp_path / "out", {name: weight + added})
    result = layers(adapter, base, tmp_path / "out")
    assert [finding.place for finding in result.errors] == [name]


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight"])
def test_tensors_without_an_adapted_layer_equal_the_base_s(
    name: str, adapter: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs, "_BLOCK_BYTES", 16)
    base = model.parent / "base"
    other = tensors_of(base)[name].copy()
    other.reshape(-1).view(np.uint8)[-4] ^= 1
    edit(model, {name: other})
    result = layers(adapter, base, model)
    assert codes(result) == ["V602"]
    index = "[15]" if other.ndim == 1 else "[31, 15]"
    assert f"{name}: 1 of {other.size} values differ; the value at {index}" in str(
        result.findings[0]
    )


def test_small_tensors_are_read_together_and_compared_separately(
    tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = {f"model.experts.{n:02}.weight": (n % 5 + 1, 3) for n in range(40)}
    base = filled_base(tmp_path / "base", tensors=many, dtypes={"experts.07": "bfloat16"})
    merged_with(adapter, base, tmp_path / "out")
    reads: list[int] = []
    raw = pairs.Pair.raw

    def counted(pair: pairs.Pair, first: int, last: int, buffers: pairs.Buffers) -> Any:
        reads.append(last - first)
        return raw(pair, first, last, buffers)

    monkeypatch.setattr(pairs.Pair, "raw", counted)
    result = layers(adapter, base, tmp_path / "out")
    assert codes(result) == []
    assert len(reads) < 20
    assert result.merged is not None
    for check in result.merged.tensors.checks:
        assert check.comparison.values == np.prod(check.shape), check.name
    for limit in (8 << 20, 64):
        monkeypatch.setattr(pairs, "_BLOCK_BYTES", limit)
        changed = tensors_of(base)["model.experts.07.weight"].copy()
        changed[1, 2] += 1
        edit(tmp_path / "out", {"model.experts.07.weight": changed})
        (finding,) = layers(adapter, base, tmp_path / "out").findings
        assert finding.code == "V602"
        assert finding.place == "model.experts.07.weight"
        assert "1 of 9 values differ; the value at [1, 2]" in finding.reason


def test_a_converted_tensor_is_rounded_once(tmp_path: Path, adapter: Path, base: Path) -> None:
    merged_with(adapter, base, tmp_path / "out", dtype="bfloat16")
    name = "model.layers.0.mlp.up_proj.weight"
    stored = tensors_of(base)[name]
    down = stored.astype(np.float16).astype(np.float32).astype(ml_dtypes.bfloat16)
    assert not np.array_equal(down, stored.astype(ml_dtypes.bfloat16))
    edit(tmp_path / "out", {name: down})
    assert codes(layers(adapter, base, tmp_path / "out")) == ["V602"]


def test_nan_and_infinite_values_of_the_base_are_kept(tmp_path: Path, adapter: Path) -> None:
    base = filled_base(tmp_path / "base")
    name = "model.norm.weight"
    edit(base, {name: np.array([np.nan, np.inf, -np.inf, -0.0] * 4, np.float32)})
    for dtype in ("float32", "bfloat16", "float64"):
        merged_with(adapter, base, tmp_path / dtype, dtype=dtype)
        assert codes(layers(adapter, base, tmp_path / dtype)) == []
    values = tensors_of(tmp_path / "bfloat16")[name]
    values[1] = 3
    edit(tmp_path / "bfloat16", {name: values})
    (finding,) = layers(adapter, base, tmp_path / "bfloat16").findings
    assert "1 of 16 values differ; the value at [1] is 3.0 instead of inf" in str(finding)


def test_missing_and_unknown_tensors_and_other_shapes_and_dtypes_are_named(
    adapter: Path, base: Path, model: Path
) -> None:
    weight = tensors_of(model)[f"{V}.weight"]
    edit(
        model,
        {
            f"{Q}.weight": None,
            "model.extra.weight": np.zeros(3, np.float32),
            "model.norm.weight": np.zeros(17, np.float32),
            f"{V}.weight": weight.astype(np.float16),
        },
    )
    result = layers(adapter, base, model)
    assert sorted((f.code, f.place) for f in result.findings) == [
        ("V603", f"{Q}.weight"),
        ("V604", "model.extra.weight"),
        ("V605", f"{V}.weight"),
        ("V605", "model.norm.weight"),
    ]


def test_every_wrong_tensor_has_a_finding_and_the_text_is_short(
    tmp_path: Path, adapter: Path
) -> None:
    many = {f"model.more.{n}.weight": (2,) for n in range(60)}
    base = filled_base(tmp_path / "base", tensors=many)
    merged_with(adapter, base, tmp_path / "out")
    edit(tmp_path / "out", dict.fromkeys(many))
    result = layers(adapter, base, tmp_path / "out")
    assert (codes(result), result.passed) == (["V603"] * 60, False)
    text = verification_text(result)
    assert "FAILED: 60 errors" in text
    assert text.count("WRONG V603 model.more.0.weight and 59 more: ") == text.count("WRONG") == 1
    edit(tmp_path / "out", {name: np.ones(2, np.float32) for name in many})
    result = layers(adapter, base, tmp_path / "out")
    assert codes(result) == ["V602"] * 60
    assert "FAILED: 60 tensors differ" in verification_text(result)


def test_a_tied_head_without_a_recorded_option_is_a_usage_error(
    tmp_path: Path,
) -> None:
    for place, stored in enumerate(({"lm_head.weight": None}, {})):
        adapter = on_the_head(tmp_path / f"a{place}")
        base = filled_base(tmp_path / f"base{place}", tensors=stored, config=TIED)
        merged_with(adapter, base, tmp_path / f"out{place}", tied=Tied.UNTIE)
        (tmp_path / f"out{place}" / PROVENANCE).unlink()
        with pytest.raises(UsageError, match=r"V524 .*--tied"):
            layers(adapter, base, tmp_path / f"out{place}")


@pytest.mark.parametrize("tie", [True, None])
def test_a_config_with_another_tie_is_found(tmp_path: Path, *, tie: bool | None) -> None:
    adapter = on_the_head(tmp_path / "a")
    base = filled_base(tmp_path / "base", tensors={"lm_head.weight": None}, config=TIED)
    merged_with(adapter, base, tmp_path / "out", tied=Tied.UNTIE)
    config = {**TIED, "tie_word_embeddings": tie}
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    assert codes(layers(adapter, base, tmp_path / "out")) == ["V606"]


def test_an_index_that_does_not_agree_is_refused(tmp_path: Path, adapter: Path) -> None:
    base = filled_base(tmp_path / "base", shards=3)
    merged_with(adapter, base, tmp_path / "out")
    index = tmp_path / "out/model.safetensors.index.json"
    document = json.loads(index.read_bytes())
    del document["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="V510"):
        layers(adapter, base, tmp_path / "out")


# --- options and provenance ----------------------------------------------------------------------


def test_given_options_override_the_recorded_ones(
    tmp_path: Path, adapter: Path, base: Path
) -> None:
    merged_with(adapter, base, tmp_path / "out", weight=0.5)
    assert codes(layers(adapter, base, tmp_path / "out")) == []
    result = layers(adapter, base, tmp_path / "out", weight=1.0)
    assert codes(result) == ["V601"] * 4
    assert "merge-provenance.json records: leave out --weight." in str(result.findings[0])
    found = layers(adapter, base, tmp_path / "out", dtype="float16").findings
    assert {(each.code, each.reason) for each in found} == {
        ("V605", "the dtype is F32 instead of F16.")
    }
    assert len({each.tensor for each in found}) == len(tensors_of(tmp_path / "out")) == 17
    (tmp_path / "out" / PROVENANCE).unlink()
    assert codes(layers(adapter, base, tmp_path / "out", weight=0.5)) == ["V608"]


def test_every_merged_adapter_must_be_given(
    tmp_path: Path, adapter: Path, base: Path, model: Path
) -> None:
    second = good_adapter(tmp_path / "second", stripped=True)
    merged_with(adapter, base, tmp_path / "out", add=(AdapterSpec(second, 0.25),))
    with pytest.raises(UsageError, match=r"2 adapters were merged, and 1 given\..*--add second"):
        layers(adapter, base, tmp_path / "out")
    with pytest.raises(UsageError, match="2 adapters are given, and 1 merged"):
        layers(adapter, base, model, add=(AdapterSpec(second),))


def test_another_form_of_the_adapter_passes_and_another_adapter_fails(
    tmp_path: Path, adapter: Path, base: Path, model: Path
) -> None:
    strip(adapter, tmp_path / "stripped", base=BaseOptions(str(base)))
    result = layers(tmp_path / "stripped", base, model)
    assert (result.passed, codes(result)) == (True, ["V609"])
    values = good_tensors()
    name = f"{PREFIX}{Q}.vera_lambda_d"
    other = good_adapter(tmp_path / "other", tensors={name: values[name] * 2}, vera_dropout=0.5)
    result = layers(other, base, model)
    assert codes(result) == ["V601", "V609"]
    assert '"adapter" was merged instead' in str(result.findings[1])


def test_another_base_is_a_warning(tmp_path: Path, adapter: Path, model: Path) -> None:
    base = filled_base(tmp_path / "other", shards=2)
    result = layers(adapter, base, model)
    assert (result.passed, codes(result)) == (True, ["V610"])


def put(*path: Any, value: Any) -> Callable[[Any], None]:
    """Return a function that sets a member of a document."""

    def change(document: Any) -> None:
        for name in path[:-1]:
            document = document[name]
        document[path[-1]] = value

    return change


def drop(*path: Any) -> Callable[[Any], None]:
    """Return a function that removes a member of a document."""

    def change(document: Any) -> None:
        for name in path[:-1]:
            document = document[name]
        del document[path[-1]]

    return change


@pytest.mark.parametrize(
    "spoil",
    [
        lambda _: [],
        lambda _: "merged",
        put("format", value=2),
        put("format", value=None),
        drop("adapters"),
        put("adapters", value=[]),
        put("adapters", value={}),
        put("adapters", value=[{}] * 1001),
        put("adapters", 0, value=None),
        put("adapters", 0, "source", value="adapter"),
        put("adapters", 0, "source", value={}),
        put("adapters", 0, "weight", value="1"),
        put("adapters", 0, "weight", value=True),
        put("adapters", 0, "weight", value=None),
        put("adapters", 0, "config_sha256", value="0"),
        put("adapters", 0, "header_sha256", value=None),
        drop("options"),
        put("options", value=[]),
        put("options", "projections", value="some"),
        put("options", "projections", value=["auto"]),
        put("options", "generator", value="float31"),
        put("options", "base_dtype", value="F32"),
        put("options", "base_dtype", value={}),
        put("options", "key_map", value="a=b"),
        put("options", "key_map", value=["a"]),
        put("options", "key_map", value=[3]),
        put("options", "key_map", value=["a=b"] * 1001),
        put("options", "dtype", value="int8"),
        put("options", "tied", value="both"),
        put("options", "dequantize", value=1),
        put("options", "architecture", value="no name"),
        put("options", "labels", value=["same", "same"]),
        put("options", "labels", value=[1]),
        put("base", value=None),
        put("base", "files", value={}),
        put("base", "files", value=[3]),
        put("base", "files", value=[{"name": 3}]),
        put("base", "files", value=[{"name": "x", "header_sha256": "\u202e"}]),
    ],
)
def test_a_provenance_is_not_trusted(
    spoil: Callable[[Any], Any], adapter: Path, base: Path, model: Path
) -> None:
    rewrite(model, spoil)
    with pytest.raises(CheckpointError, match="V607") as caught:
        layers(adapter, base, model)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "text", [b"", b"{", b'{"format": NaN}', b"[" * 10_000, b'{"a": 1, "a": 2}', b"\xff"]
)
def test_a_provenance_that_is_no_json_is_not_trusted(
    text: bytes, adapter: Path, base: Path, model: Path
) -> None:
    (model / PROVENANCE).write_bytes(text)
    with pytest.raises(CheckpointError, match="V0"):
        layers(adapter, base, model)


def test_names_in_a_provenance_are_escaped(adapter: Path, base: Path, model: Path) -> None:
    rewrite(model, put("adapters", 0, "source", value={"folder": "a\u202e\n"}))
    fields({"vera_dropout": 0.5})(adapter)
    (finding,) = layers(adapter, base, model).findings
    assert finding.code == "V609"
    assert str(finding).isprintable()


# --- the whole model -----------------------------------------------------------------------------


COMPARED = ModelComparison(
    model_class="LlamaForCausalLM",
    dtype="float32",
    samples=3,
    tokens=48,
    largest_difference=1e-6,
    remerged_difference=float("inf"),
    kl=0.0,
    top1=1.0,
    effect=0.5,
    threshold_difference=1e-4,
    threshold_remerged=1e-5,
    threshold_kl=1e-6,
    threshold_top1=0.99,
    wrapped=True,
    conclusive=True,
    passed=True,
    reason="",
)


def comparing(
    monkeypatch: pytest.MonkeyPatch, result: ModelComparison | SurroundingsError
) -> list[Any]:
    """Replace the comparison of models, which needs torch; return the recorded calls."""
    asked: list[Any] = []

    def run_models(job: ModelJob, **options: Any) -> ModelComparison:
        asked.append((job, options))
        options["progress"](0, 5)
        if isinstance(result, SurroundingsError):
            raise result
        return result

    monkeypatch.setattr(verifying, "run_models", run_models)
    monkeypatch.setattr(model_comparison, "find_spec", lambda _name: object())
    return asked


def test_the_model_is_run_with_the_options_of_the_merge(
    tmp_path: Path,
    adapter: Path,
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
    schema_errors: SchemaErrors,
) -> None:
    merged_with(adapter, base, tmp_path / "out", weight=0.5, projections=ProjectionSource.KEY)
    rewrite(tmp_path / "out", put("options", "base_dtype", value="float32"))
    asked = comparing(monkeypatch, COMPARED)
    options = VerifyOptions(samples=3)
    result = verify(adapter, base=str(base), merged=tmp_path / "out", options=options)
    assert result.passed
    assert result.model is COMPARED
    ((job, _),) = asked
    assert result.merged is not None
    assert result.merged.settings.projections is ProjectionSource.KEY
    assert result.merged.settings.base_dtype == "float32"
    assert job == ModelJob(
        ((adapter, 0.5),),
        base,
        tmp_path / "out",
        weights=result.merged.tensors.nbytes,
        samples=3,
        settings=result.merged.settings,
    )
    assert schema_errors("verification", result_document(result)) == []
    text = verification_text(result)
    assert "LlamaForCausalLM in float32, 3 samples, 48 positions" in text
    assert "adapter changes logits by up to 0.5" in text
    assert f"{result.seconds:.1f} s" in text.splitlines()[-2]
    assert result.seconds >= result.merged.seconds


def test_a_model_with_other_outputs_fails(
    adapter: Path, base: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "its logits differ by up to 0.3."
    comparing(monkeypatch, dataclasses.replace(COMPARED, passed=False, reason=reason))
    result = verify(adapter, base=str(base), merged=model)
    assert codes(result) == ["V611"]
    assert reason in str(result.findings[0])


@pytest.mark.parametrize(("moved", "code"), [(True, "V618"), (False, "V617")])
def test_an_inconclusive_run_is_no_error_if_the_weights_changed(
    adapter: Path, base: Path, monkeypatch: pytest.MonkeyPatch, *, moved: bool, code: str
) -> None:
    comparing(monkeypatch, dataclasses.replace(COMPARED, passed=False, conclusive=False))
    size = 0.5 if moved else 0.0
    vectors = {n: size * array for n, array in good_tensors().items() if "lambda_b" in n}
    small = good_adapter(adapter.parent / "small", tensors=vectors)
    merged_with(small, base, adapter.parent / "out")
    result = verify(small, base=str(base), merged=adapter.parent / "out")
    assert code in codes(result)
    assert result.passed is moved


def test_the_reason_why_a_model_was_not_run_is_reported_with_the_layers(
    adapter: Path,
    base: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    schema_errors: SchemaErrors,
) -> None:
    comparing(monkeypatch, SurroundingsError("transformers cannot run it."))
    result = verify(adapter, base=str(base), merged=model)
    assert (result.passed, result.errors, result.model) == (False, (), None)
    text = verification_text(result)
    assert "4 of 4 tensors verified" in text
    assert "NOT RUN: transformers cannot run it." in text
    document = result_document(result)
    assert document["not_run"] == "transformers cannot run it."
    assert schema_errors("verification", document) == []


def test_a_model_whose_weights_are_wrong_is_not_run(
    adapter: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = comparing(monkeypatch, COMPARED)
    result = verify(adapter, base=str(base), merged=base)
    assert not result.passed
    assert asked == []
    assert "not run: fix the errors below first" in verification_text(result)


def test_without_torch_the_message_names_layers_only(
    adapter: Path, base: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        model_comparison, "find_spec", lambda name: None if name == "torch" else object()
    )
    with pytest.raises(SurroundingsError, match=r"needs torch\..*convert\[torch\].*--layers-only"):
        verify(adapter, base=str(base), merged=model)
    assert layers(adapter, base, model).passed


def test_a_missing_text_is_reported_before_any_comparison(
    tmp_path: Path, adapter: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = comparing(monkeypatch, COMPARED)
    options = VerifyOptions(text=tmp_path / "gone.txt")
    with pytest.raises(SurroundingsError, match=r"gone\.txt: there is no such file"):
        verify(adapter, base=str(base), merged=base, options=options)
    assert asked == []


# --- another form --------------------------------------------------------------------------------


def same_form(adapter: Path, other: Path, **options: Any) -> Verification:
    base = options.pop("base", None)
    return verify(adapter, base=base, other=other, options=VerifyOptions(**options))


def test_results_of_strip_embed_and_migrate_pass(
    tmp_path: Path, adapter: Path, base: Path, schema_errors: SchemaErrors
) -> None:
    base_options = BaseOptions(str(base))
    strip(adapter, tmp_path / "stripped", base=base_options)
    embed(tmp_path / "stripped", tmp_path / "embedded")
    migrate(adapter, tmp_path / "old", to=Mode.STRIPPED, base=base_options, peft_version=(0, 13))
    for one, other in (
        (adapter, "stripped"),
        (tmp_path / "stripped", "embedded"),
        (adapter, "embedded"),
        (adapter, "old"),
    ):
        for given in (None, base_options):
            result = same_form(one, tmp_path / other, base=given)
            assert result.passed, (one, other)
            assert result.form is not None
            assert result.form.effects[0].same
            assert result.form.tensors == 8
            assert schema_errors("verification", result_document(result)) == []
            assert verification_text(result).endswith("verified")


def test_a_form_that_migrate_can_repair_is_repaired_while_read(
    tmp_path: Path, adapter: Path
) -> None:
    good = shutil.copytree(adapter, tmp_path / "good")
    renamed(lambda name: f"_orig_mod.{name}")(adapter)
    assert codes(same_form(adapter, good)) == []
    with pytest.raises(CheckpointError, match="V215"):
        same_form(good, adapter)


def test_the_form_that_peft_writes_depends_on_the_base(
    tmp_path: Path, adapter: Path, base: Path
) -> None:
    other = shutil.copytree(adapter, tmp_path / "bare")
    bare(other)
    result = same_form(adapter, other)
    assert (result.passed, codes(result)) == (True, ["V624"])
    assert "only on a base in float32" in str(result.findings[0])
    assert codes(same_form(adapter, other, base=str(base))) == []
    half = filled_base(tmp_path / "half", dtype="bfloat16")
    result = same_form(adapter, other, base=str(half))
    assert codes(result) == ["V623"]
    assert "vera_A: the value at [0, 0] is" in str(result.findings[0])


def test_an_adapter_with_another_key_fails(tmp_path: Path, adapter: Path) -> None:
    other = shutil.copytree(adapter, tmp_path / "other")
    bare(other)
    fields({"projection_prng_key": 8})(other)
    result = same_form(adapter, other)
    assert codes(result)[:2] == ["V622", "V623"]
    assert "projection_prng_key is 7 in the adapter, and 8" in str(result.findings[0])
    edited = good_adapter(tmp_path / "edited", target_modules=["v_proj"])
    said = " ".join(finding.reason for finding in same_form(adapter, edited).findings)
    assert 'and ["v_proj"] in the other form' in said


@pytest.mark.parametrize("name", ["base_model.vera_A", "base_model.vera_B"])
def test_a_single_other_value_of_a_projection_fails(tmp_path: Path, name: str) -> None:
    unlike = {n: 2 * good_tensors()[n] for n in ("base_model.vera_A", "base_model.vera_B")}
    # A and B that are almost the key's would be refused
    one = good_adapter(tmp_path / "one", tensors=unlike)
    stored = unlike[name].copy()
    stored[3, 1] = np.nextafter(stored[3, 1], np.float32(9))
    other = good_adapter(tmp_path / "other", tensors={**unlike, name: stored})
    result = same_form(one, other)
    assert [finding.code for finding in result.errors] == ["V623"]
    assert "the value at [3, 1] is" in str(result.findings[0])


def test_projections_that_no_layer_uses_may_be_cut_off(
    tmp_path: Path, adapter: Path, base: Path
) -> None:
    stored = good_tensors()
    wide = np.concatenate([stored["base_model.vera_A"], np.ones((4, 3), "f4")], axis=1)
    other = good_adapter(tmp_path / "other", tensors={"base_model.vera_A": wide})
    assert same_form(other, adapter, base=str(base)).passed
    narrow = good_adapter(
        tmp_path / "narrow", tensors={"base_model.vera_A": stored["base_model.vera_A"][:, :15]}
    )
    with pytest.raises(CheckpointError):
        same_form(adapter, narrow, base=str(base))


def test_trained_tensors_are_compared_byte_by_byte(tmp_path: Path, adapter: Path) -> None:
    stored = good_tensors()
    b, d = f"{PREFIX}{Q}.vera_lambda_b", f"{PREFIX}{Q}.vera_lambda_d"
    changed = stored[b].copy()
    changed[5] *= -1
    other = good_adapter(
        tmp_path / "other",
        tensors={b: changed, d: stored[d].astype(np.float16), **head(0.5)},
        modules_to_save=["score"],
    )
    result = same_form(adapter, other)
    found = {(finding.code, finding.place) for finding in result.errors}
    assert found == {
        ("V620", b),
        ("V620", d),
        ("V621", f"{PREFIX}score.weight"),
        ("V622", CONFIG_NAME),
    }
    said = {finding.place: finding.reason for finding in result.errors}
    assert "the value at [5] is" in said[b]
    assert "the tensor is F32 [4], in the other form F16 [4]" in said[d]


def test_the_order_of_names_in_a_config_does_not_matter(tmp_path: Path, adapter: Path) -> None:
    other = good_adapter(tmp_path / "other", target_modules=["v_proj", "q_proj"])
    fields({"peft_version": "0.20.0", "inference_mode": False})(other)
    assert codes(same_form(adapter, other)) == []


def test_form_and_model_can_be_verified_at_once(
    tmp_path: Path, adapter: Path, base: Path, model: Path
) -> None:
    strip(adapter, tmp_path / "stripped", base=BaseOptions(str(base)))
    options = VerifyOptions(layers_only=True)
    both = verify(
        adapter, base=str(base), other=tmp_path / "stripped", merged=model, options=options
    )
    assert both.passed
    assert both.form is not None
    assert both.merged is not None


def test_a_and_b_that_peft_would_draw_differently_are_a_warning(
    tmp_path: Path, adapter: Path, base: Path
) -> None:
    drawn(Variant.FLOAT32_SEPARATE)(adapter)
    strip(adapter, tmp_path / "stripped", base=BaseOptions(str(base)), accept_change=True)
    result = same_form(adapter, tmp_path / "stripped", base=str(base))
    assert (result.passed, codes(result)) == (True, ["V624"])
    assert "with PEFT, A and B differ on a base in float32" in result.findings[0].reason
    assert result.form is not None
    assert [(e.dtype, e.same, e.same_in_peft) for e in result.form.effects] == [
        ("float32", True, False)
    ]


# --- from the Hub --------------------------------------------------------------------------------


def test_adapter_base_and_model_can_lie_on_the_hub(
    tmp_path: Path, server: HubServer, adapter: Path, base: Path
) -> None:
    strip(adapter, tmp_path / "stripped", base=BaseOptions(str(base)))
    merged_with(adapter, base, tmp_path / "merged", dtype="bfloat16")
    names = {"adapter": adapter, "stripped": tmp_path / "stripped", "base": base}
    for name, folder in {**names, "merged": tmp_path / "merged"}.items():
        server.add(f"org/{name}", bytes_by_name(folder))
    result = verify(
        "org/adapter",
        base="org/base",
        other="org/stripped",
        merged="org/merged",
        options=VerifyOptions(layers_only=True),
        access=HubAccess(cache_dir=tmp_path / "cache", progress=False),
    )
    assert result.passed
    assert result.merged is not None
    assert result.merged.settings.dtype == "bfloat16"
    assert result.merged.label.startswith("org/merged@")
    assert not any("README" in path for path in server.paths("GET"))


# --- how it is done ------------------------------------------------------------------------------


def test_memory_does_not_grow_with_a_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs, "BLOCK_VALUES", 1 << 13)
    monkeypatch.setattr(pairs, "_BLOCK_BYTES", 1 << 13)
    monkeypatch.setattr(diagnosis, "_MOST_VALUES", 1 << 13)
    # The search for other A and B takes memory in proportion to A and B.
    monkeypatch.setattr(merged, "right_with_other_projections", lambda *_given: {})
    peaks = []
    for rows in (256, 4096):
        folder = tmp_path / str(rows)
        shapes: dict[str, Any] = {
            f"{Q}.weight": (rows, 64),
            "model.embed_tokens.weight": (rows, 64),
        }
        stored: dict[str, Any] = dict.fromkeys(good_tensors())
        stored |= {
            f"{PREFIX}{Q}.vera_lambda_b": np.linspace(1, 2, rows, dtype="f4"),
            f"{PREFIX}{Q}.vera_lambda_d": np.ones(1, "f4"),
            "base_model.vera_A": np.linspace(1, 2, 64, dtype="f4")[None],
            "base_model.vera_B": np.linspace(1, 2, rows, dtype="f4")[:, None],
        }
        adapter = good_adapter(folder / "a", tensors=stored, r=1, target_modules=["q_proj"])
        fields({"layers_to_transform": [0], "layers_pattern": ["layers"]})(adapter)
        base = filled_base(folder / "base", tensors=shapes)
        merged_with(adapter, base, folder / "out")
        edit(folder / "out", {f"{Q}.weight": tensors_of(base)[f"{Q}.weight"]})
        tracemalloc.start()
        result = layers(adapter, base, folder / "out", jobs=1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert codes(result) == ["V601"]
    # The vectors and B take 32 KiB more; the 960 KiB more of each tensor are not held.
    assert peaks[1] - peaks[0] < 200_000


@pytest.mark.parametrize("jobs", [1, 3])
def test_the_number_of_threads_does_not_change_the_result(
    adapter: Path, base: Path, model: Path, jobs: int
) -> None:
    one, other = (layers(adapter, base, base, jobs=n) for n in (1, jobs))
    assert one.findings == other.findings
    assert one.merged is not None
    assert other.merged is not None
    assert one.merged.tensors.checks == other.merged.tensors.checks
    assert other.merged.tensors.jobs == jobs
    assert layers(adapter, base, model, jobs=jobs).passed


def test_progress_ends_at_the_number_of_compared_bytes(
    adapter: Path, base: Path, model: Path
) -> None:
    told: list[tuple[int, int]] = []
    options = VerifyOptions(layers_only=True)
    result = verify(
        adapter,
        base=str(base),
        merged=model,
        options=options,
        progress=lambda done, of: told.append((done, of)),
    )
    assert result.merged is not None
    assert told[-1] == (result.merged.tensors.nbytes,) * 2


@pytest.mark.parametrize("kind", ["F16", "F32", "F64"])
def test_last_bits_are_counted_in_the_dtype(kind: str) -> None:
    dtype = np.dtype(f"f{int(kind[1:]) // 8}")
    info = np.finfo(dtype)
    values = np.array(
        [0, info.smallest_subnormal, info.tiny, 1, 1.5, 2 - info.eps, 2, 1000, info.max], dtype
    )
    expected = np.spacing(np.where(values == info.max, values / 2, values)).astype("f8")
    expected[-1] *= 2
    assert last_bits(values.astype("f8"), kind).tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"samples": 0}, "^samples is 0"),
        ({"jobs": 0}, "^jobs is 0"),
        ({"dtype": "int8"}, "^dtype is"),
        ({"weight": float("nan")}, "finite"),
        ({"add": ("x=inf",)}, "finite"),
        ({"weight": 2.0, "tied": Tied.ADD}, "^weight, tied: only for a merged model"),
        ({"add": (AdapterSpec("x"),)}, "^add: only for a merged model"),
    ],
)
def test_options_out_of_range_are_refused(
    adapter: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        verify(adapter, other=adapter, options=VerifyOptions(**options))
    with pytest.raises(UsageError, match="--adapter OTHER, --merged MODEL"):
        verify(adapter)


def test_the_document_satisfies_its_schema(
    adapter: Path, base: Path, model: Path, schema_errors: SchemaErrors
) -> None:
    not_a_number: Array = np.full((16, 16), np.nan, np.float32)
    edit(model, {f"{Q}.weight": not_a_number, "model.norm.weight": not_a_number[0]})
    for result in (
        layers(adapter, base, model),
        layers(adapter, base, base),
        same_form(adapter, adapter),
    ):
        document = result_document(result)
        text = json.dumps(document, allow_nan=False)
        assert schema_errors("verification", json.loads(text)) == []
    wrong = layers(adapter, base, model)
    assert sorted(codes(wrong)) == ["V601", "V602"]
