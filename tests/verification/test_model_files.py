"""How loaders read the other files of a merged model, and tensors that were saved differently."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from adapters import good_adapter, good_tensors
from merges import INDEX, exact_change, filled_base, merged_with, tensors_of
from safetensors.numpy import save_file
from wrongmerges import PROVENANCE, Array, Q, V, codes, edit, layers

from vera_convert.delta import merged as merged_weight
from vera_convert.errors import CheckpointError, UsageError
from vera_convert.formats.verification import verification_text
from vera_convert.verification.options import VerifyOptions
from vera_convert.verification.tensors import is_buffer
from vera_convert.verification.verify import Verification, verify

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "use_cache": True,
    "rope_scaling": {"type": "linear", "factor": 2.0},
    "dtype": "float32",
    "sliding_window": 4096,
}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return good_adapter(tmp_path / "adapter", task_type="CAUSAL_LM")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return filled_base(tmp_path / "base", config=CONFIG)


@pytest.fixture
def model(tmp_path: Path, adapter: Path, base: Path) -> Path:
    merged_with(adapter, base, tmp_path / "merged")
    return tmp_path / "merged"


def reasons(result: Verification, code: str) -> list[str]:
    return [finding.reason for finding in result.findings if finding.code == code]


def put_fields(folder: Path, **fields: Any) -> None:
    """Set fields of a model's config; None removes the field."""
    path = folder / "config.json"
    document = {**json.loads(path.read_bytes()), **fields}
    path.write_text(json.dumps({n: value for n, value in document.items() if value is not None}))


def as_peft(model: Path) -> None:
    """Remove the traces of this package from a model."""
    (model / PROVENANCE).unlink()


# --- files ---------------------------------------------------------------------------------------


def test_a_file_that_a_loader_prefers_to_the_shards_is_found(tmp_path: Path, adapter: Path) -> None:
    base = filled_base(tmp_path / "base", shards=2)
    out = tmp_path / "out"
    merged_with(adapter, base, out)
    assert codes(layers(adapter, base, out)) == []
    save_file(tensors_of(base), out / "model.safetensors")
    result = layers(adapter, base, out)
    assert codes(result) == ["V612"]
    assert f"reads model.safetensors instead of {INDEX}" in str(result.findings[0])


def test_a_further_weight_file_is_a_warning(tmp_path: Path, adapter: Path) -> None:
    base = filled_base(tmp_path / "base", shards=2)
    out = tmp_path / "out"
    merged_with(adapter, base, out)
    for name in ("model.safetensors", "old_model.safetensors"):
        save_file(tensors_of(base), out / name)
    result = layers(adapter, base, out)
    assert codes(result) == ["V612", "V512"]
    assert "old_model.safetensors" in result.findings[1].reason


def test_a_field_that_names_other_weights_is_found(adapter: Path, base: Path, model: Path) -> None:
    shutil.copy(base / "model.safetensors", model / "other.safetensors")
    put_fields(model, transformers_weights="other.safetensors")
    result = layers(adapter, base, model)
    assert not result.passed, "a loader reads the base instead"
    shutil.copy(model / "model.safetensors", model / "other.safetensors")
    assert codes(layers(adapter, base, model)) == ["V512"]
    put_fields(model, transformers_weights="model.safetensors")
    assert codes(layers(adapter, base, model)) == ["V512"]


def test_an_adapter_in_the_folder_is_found(adapter: Path, base: Path, model: Path) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(adapter / name, model)
        result = layers(adapter, base, model)
        assert codes(result) == ["V613" if name.endswith("json") else "V631"]


def test_weights_in_another_format_are_a_warning(adapter: Path, base: Path, model: Path) -> None:
    (model / "pytorch_model.bin").write_bytes(b"never read")
    result = layers(adapter, base, model)
    assert (result.passed, codes(result)) == (True, ["V631"])


def test_an_adapter_is_no_merged_model(adapter: Path, base: Path) -> None:
    with pytest.raises(CheckpointError, match=r"V614.*with --adapter"):
        layers(adapter, base, adapter)


def test_the_base_s_own_folder_is_named_as_such(adapter: Path, base: Path) -> None:
    text = verification_text(layers(adapter, base, base))
    assert "THE SAME FOLDER AS THE MERGED MODEL" in text
    assert "WRONG 4 of 4 layers: The weight equals the base's: the delta was not added." in text


# --- the config ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "of_copy", "of_saved"),
    [
        ({"hidden_act": "relu"}, ["V615"], ["V615"]),
        ({"rms_norm_eps": 1e-5}, ["V615"], ["V615"]),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, ["V615"], ["V615"]),
        ({"architectures": ["LlamaForTokenClassification"]}, ["V615"], ["V615"]),
        ({"use_cache": False}, ["V615"], ["V616"]),
        ({"sliding_window": None, "head_dim": 4}, ["V615"], ["V616"]),
        ({"rope_scaling": {"type": "x", "rope_type": "y", "factor": 2.0}}, ["V615"], ["V616"]),
        ({"dtype": "bfloat16", "torch_dtype": "float16", "transformers_version": "5"}, [], []),
    ],
    ids=str,
)
def test_a_config_that_makes_another_model_is_found(
    fields: dict[str, Any],
    of_copy: list[str],
    of_saved: list[str],
    adapter: Path,
    model: Path,
) -> None:
    base = model.parent / "base"
    put_fields(model, **fields)
    assert codes(layers(adapter, base, model)) == of_copy
    as_peft(model)
    assert [c for c in codes(layers(adapter, base, model)) if c != "V608"] == of_saved


def test_the_fields_are_named(adapter: Path, base: Path, model: Path) -> None:
    put_fields(model, hidden_act="relu\u202e", use_cache=False)
    as_peft(model)
    result = layers(adapter, base, model)
    assert reasons(result, "V615") == ["hidden_act is relu\\u202e instead of silu."]
    assert reasons(result, "V616") == ["use_cache differ."]


def test_a_missing_config_is_reported(adapter: Path, base: Path, model: Path) -> None:
    (model / "config.json").unlink()
    result = layers(adapter, base, model)
    assert "V615" in codes(result)
    assert "no loader knows" in reasons(result, "V615")[0]


def test_a_tie_that_the_base_s_config_does_not_state_must_fit_the_tensors(
    adapter: Path, base: Path, model: Path
) -> None:
    put_fields(model, tie_word_embeddings=True)
    assert codes(layers(adapter, base, model)) == ["V606"]
    embedding = tensors_of(base)["model.embed_tokens.weight"]
    for folder in (base, model):
        edit(folder, {"lm_head.weight": embedding})
    assert "V606" not in codes(layers(adapter, base, model))


# --- tensors that were saved differently ---------------------------------------------------------


def test_buffers_that_models_compute_may_be_added_or_missing(
    adapter: Path, base: Path, model: Path
) -> None:
    ids = np.arange(16)[None]
    edit(model, {"model.embeddings.position_ids": ids, "model.a.inv_freq": np.ones(4, "f4")})
    result = layers(adapter, base, model)
    assert (result.passed, codes(result)) == (True, ["V619"])
    assert [f.place.partition(" ")[2] for f in result.findings if f.code == "V619"] == [
        "and 1 more buffer"
    ]
    assert reasons(result, "V619") == ["not stored in the base."]
    result = layers(adapter, model, base)
    assert reasons(result, "V619") == ["not stored in the merged model."]


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "expected"),
    [
        ("embeddings.position_ids", "I64", (1, 16), True),
        ("embeddings.position_ids", "F32", (1, 16), False),
        ("h.0.attn.bias", "BOOL", (1, 1, 8, 8), True),
        ("h.0.attn.bias", "F32", (8,), False),
        ("h.0.attn.masked_bias", "F32", (), True),
        ("h.0.mlp.masked_bias", "F32", (8,), False),
        ("model.rotary_emb.inv_freq", "F32", (8,), True),
        ("model.norm.weight", "F32", (8,), False),
    ],
)
def test_buffers_are_recognized_by_name_dtype_and_shape(
    name: str, dtype: str, shape: tuple[int, ...], *, expected: bool
) -> None:
    assert is_buffer(name, dtype, shape) is expected


def widened(_: Path, __: Path, found: Array) -> Array:
    return found.astype(np.float32)


def summed_wider(adapter: Path, base: Path, _: Array) -> Array:
    weight = tensors_of(base)[f"{Q}.weight"].astype(np.float32)
    return merged_weight(weight, exact_change(adapter, Q, 16).astype(np.float32))


def spoilt(adapter: Path, base: Path, found: Array) -> Array:
    other = summed_wider(adapter, base, found)
    other[3, 3] *= 1.5
    return other


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("save", "found"), [(widened, "V630"), (summed_wider, "V630"), (spoilt, "V601")]
)
def test_a_wider_dtype_is_right_with_the_same_values_or_the_sum(
    save: Callable[..., Array], found: str, dtype: str, tmp_path: Path, adapter: Path
) -> None:
    base = filled_base(tmp_path / "base", dtype=dtype)
    out = tmp_path / "out"
    merged_with(adapter, base, out)
    norm = tensors_of(base)["model.norm.weight"].astype(np.float32)
    right = tensors_of(out)[f"{Q}.weight"]
    edit(out, {f"{Q}.weight": save(adapter, base, right), "model.norm.weight": norm})
    result = layers(adapter, base, out)
    assert codes(result) == ["V605"] * 2  # the merge recorded no wider dtype
    as_peft(out)
    result = layers(adapter, base, out)
    assert found in codes(result)
    assert result.passed is (found == "V630")
    if result.passed:
        assert result.merged is not None
        narrow = "F16" if dtype == "float16" else "BF16"
        rounded = narrow if save is widened else "F32"
        assert result.merged.tensors.wider == {f"{Q}.weight": rounded, "model.norm.weight": "F32"}


def test_a_base_that_was_rounded_first_is_named(tmp_path: Path, adapter: Path, base: Path) -> None:
    out = tmp_path / "out"
    merged_with(adapter, base, out, dtype="bfloat16")
    rounded = {}
    for module in (Q, V):
        weight = tensors_of(base)[f"{module}.weight"].astype(ml_dtypes.bfloat16)
        total = weight.astype(np.float64) + exact_change(adapter, module, 16)
        rounded[f"{module}.weight"] = total.astype(np.float32).astype(ml_dtypes.bfloat16)
    edit(out, rounded)
    as_peft(out)
    result = layers(adapter, base, out, dtype="bfloat16")
    assert [c for c in codes(result) if c != "V608"] == ["V601", "V601"]
    assert all("rounded to BF16 before the delta" in r for r in reasons(result, "V601"))


@pytest.mark.parametrize("factor", [1.001, 0.99])
def test_an_uncertain_cause_is_not_reported(
    factor: float, adapter: Path, base: Path, model: Path
) -> None:
    weight = tensors_of(base)[f"{Q}.weight"]
    edit(model, {f"{Q}.weight": merged_weight(weight, factor * exact_change(adapter, Q, 16))})
    (reason,) = reasons(layers(adapter, base, model), "V601")
    assert "on the way" not in reason


def test_a_flipped_bit_is_not_called_an_intermediate_rounding(
    tmp_path: Path, adapter: Path
) -> None:
    base = filled_base(tmp_path / "base", dtype="bfloat16")
    out = tmp_path / "out"
    merged_with(adapter, base, out)
    flipped = tensors_of(out)[f"{Q}.weight"].copy()
    flipped.reshape(-1).view(np.uint16)[7] ^= 1
    edit(out, {f"{Q}.weight": flipped})
    (reason,) = reasons(layers(adapter, base, out), "V601")
    assert "1 of 256 values differ" in reason
    assert "on the way" not in reason


# --- options and inputs --------------------------------------------------------------------------


def test_verify_repeats_the_findings_of_the_merge(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    more = good_adapter(tmp_path / "more", target_modules=["q_proj", "v_proj", "k_proj"])
    said = merged_with(more, base, tmp_path / "out")
    assert said.findings
    result = layers(more, base, tmp_path / "out")
    assert result.findings == said.findings
    assert adapter.is_dir()


def test_the_source_of_each_option_is_reported(tmp_path: Path, adapter: Path, base: Path) -> None:
    out = tmp_path / "out"
    merged_with(adapter, base, out, dtype="float16", weight=0.5)
    text = verification_text(layers(adapter, base, out))
    assert "dtype float16, weight 0.5 (recorded by the merge)" in text
    text = verification_text(layers(adapter, base, out, weight=0.5))
    assert "weight 0.5 (given); dtype float16 (recorded by the merge)" in text


def test_options_that_would_be_ignored_are_refused(adapter: Path, model: Path) -> None:
    with pytest.raises(UsageError, match=r"^samples: layers_only runs no model"):
        verify(adapter, merged=model, options=VerifyOptions(layers_only=True, samples=3))
    with pytest.raises(UsageError, match=r"^layers_only, jobs: only for a merged model"):
        verify(adapter, other=adapter, options=VerifyOptions(layers_only=True, jobs=1))


def test_forms_with_another_width_of_a_need_the_base(tmp_path: Path, adapter: Path) -> None:
    name = "base_model.vera_A"
    narrow = np.ascontiguousarray(good_tensors()[name][:, :8])
    other = good_adapter(tmp_path / "other", tensors={name: narrow}, task_type="CAUSAL_LM")
    for one, two in ((adapter, other), (other, adapter)):
        result = verify(one, other=two)
        assert "V623" in codes(result)
        assert "give --base" in reasons(result, "V623")[0]
        assert "are (4, 16) and (16, 4) in" in reasons(verify(adapter, other=other), "V623")[0]


def test_errors_of_files_and_config_are_listed_with_wrong_tensors(
    adapter: Path, base: Path, model: Path
) -> None:
    edit(model, {f"{Q}.weight": None, f"{V}.weight": 0 * tensors_of(base)[f"{V}.weight"]})
    put_fields(model, hidden_act="relu")
    text = verification_text(layers(adapter, base, model))
    assert [line.split()[1] for line in text.splitlines() if line.startswith("WRONG")] == [
        "V603",
        "V615",
        f"{V}.weight:",
    ]
