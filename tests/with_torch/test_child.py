"""Hostile models in the process that runs models: requests for code and files have no effect."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmodels
import transformers
from torchmodels import configured, job, saved, trained

from vera_convert import VerifyOptions, merge, verify
from vera_convert.errors import SurroundingsError
from vera_convert.verification.model_comparison import Stage
from vera_convert.verification.running import Limit, Limits, run_models
from vera_convert.with_torch.build import blueprint
from vera_convert.with_torch.config_fields import known_fields

UNSET = (None, "eager")
"""The attention kernel if no config names a kernel; transformers before 5.0 says "eager"."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a folder with `base`, `adapter` and `merged`, which tests must not change."""
    folder = tmp_path_factory.mktemp("llama")
    base = saved(torchmodels.built("llama", "bfloat16"), folder / "base")
    adapter = trained(base, folder / "adapter", "llama")
    merge(adapter, folder / "merged", base=base)
    return folder


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_whole_model_is_verified_in_a_child(llama: Path, scratch: Path) -> None:
    told: list[tuple[int, int]] = []
    result = verify(
        llama / "adapter",
        base=llama / "base",
        merged=llama / "merged",
        options=VerifyOptions(samples=3),
        runs=lambda *given: told.append(given),
    )
    assert result.passed, result
    assert result.model is not None
    assert result.model.model_class == "LlamaForCausalLM"
    runs = list(dict.fromkeys(told))
    assert runs[0] == (0, 15)
    assert runs == sorted(runs)
    assert runs[-1] == (14, 15)
    assert [*scratch.iterdir()] == []


# --- fields of a config --------------------------------------------------------------------------


def fields(kind: str, document: Mapping[str, object]) -> dict[str, object]:
    return known_fields(transformers.CONFIG_MAPPING[kind], document)


@pytest.mark.parametrize("name", ["foo", "hidden_act", "architectures"])
def test_a_config_cannot_rename_its_fields(name: str) -> None:
    document = {
        "attribute_map": {name: "_attn_implementation_internal", "bar": "quantization_config"},
        name: "example/kernel",
        "bar": {"quant_method": "fp8"},
        "vocab_size": 7,
    }
    kept = fields("llama", document)
    assert kept == {"vocab_size": 7} | ({} if name == "foo" else {name: "example/kernel"})
    config = transformers.LlamaConfig.from_dict(kept)
    assert config._attn_implementation in UNSET
    assert not hasattr(config, "quantization_config")


def test_field_renames_of_the_config_class_are_resolved() -> None:
    assert fields("gpt2", {"hidden_size": 8, "n_layer": 2, "n_other": 3}) == {
        "hidden_size": 8,
        "n_layer": 2,
    }


@pytest.mark.parametrize(
    "name",
    [
        *("_attn_implementation", "attn_implementation", "_experts_implementation_internal"),
        *("auto_map", "quantization_config", "transformers_weights", "fusion_config"),
        *("use_pretrained_backbone", "sub_configs", "__class__", "to_dict", "evil"),
    ],
)
def test_fields_that_name_code_or_files_are_left_out_at_every_depth(name: str) -> None:
    inside: dict[str, object] = {"model_type": "llama", name: "example/kernel", "vocab_size": 9}
    record: dict[str, object] = {"rope_type": "default", name: "example/kernel"}
    kept = fields("llava", {name: "example/kernel", "text_config": inside})
    assert kept == {"text_config": {"model_type": "llama", "vocab_size": 9}}
    kept = fields("llama", {"rope_scaling": record, "vocab_size": 9})
    rope = kept["rope_scaling"]
    assert isinstance(rope, dict)
    assert rope.get("rope_type") == "default"
    # a record of this kind calls no code
    assert not {name} & {*rope} or name in ("to_dict", "evil")


def test_a_field_that_only_the_code_of_the_model_reads_is_kept() -> None:
    assert "head_dim" not in vars(transformers.Starcoder2Config())
    assert fields("starcoder2", {"head_dim": 64, "other": 1}) == {"head_dim": 64}


@pytest.mark.parametrize(
    "kind",
    [
        *("llama", "gpt2", "bert", "t5", "vit", "mamba", "mixtral", "qwen3_moe", "llava", "clip"),
        *("gemma3", "whisper", "deepseek_v3", "deberta-v2", "albert", "phi3", "qwen2_vl", "falcon"),
        # The code of the model, or of its config, reads fields that the nested configs lack.
        *("fast_vlm", "mistral3", "omdet-turbo", "pp_ocrv5_server_rec", "rf_detr"),
    ],
)
def test_all_fields_that_a_model_needs_are_kept(kind: str) -> None:
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip(f"needs a later transformers than {transformers.__version__}: one with {kind}")
    whole = json.loads(json.dumps(transformers.CONFIG_MAPPING[kind]().to_dict()))
    kept = transformers.CONFIG_MAPPING[kind].from_dict(fields(kind, whole)).to_dict()
    again = transformers.CONFIG_MAPPING[kind].from_dict(whole).to_dict()
    assert json.dumps(kept, sort_keys=True, default=str) == json.dumps(
        again, sort_keys=True, default=str
    )


def test_a_kernel_that_a_renamed_field_names_is_not_used(llama: Path, tmp_path: Path) -> None:
    base = configured(
        llama / "base",
        tmp_path / "base",
        attribute_map={"foo": "_attn_implementation"},
        foo="example/kernel",
    )
    assert blueprint(base, label="base").config._attn_implementation in UNSET


# --- limits --------------------------------------------------------------------------------------


def test_a_config_of_a_hundred_million_groups_ends_in_a_clear_error(
    tmp_path: Path, scratch: Path
) -> None:
    config = transformers.AlbertConfig(
        vocab_size=64, embedding_size=8, hidden_size=16, num_attention_heads=2, intermediate_size=16
    )
    base = saved(transformers.AlbertModel(config), tmp_path / "good")
    adapter = trained_encoder(base, tmp_path / "adapter")
    evil = configured(base, tmp_path / "evil", num_hidden_groups=10**8)
    times = dict.fromkeys(Stage, Limit(60)) | {Stage.BUILD: Limit(6)}
    limits = Limits(memory=2 << 30, times=times)
    with pytest.raises(SurroundingsError, match=r"--layers-only"):
        run_models(job(evil, evil, adapter), limits=limits)
    assert [*scratch.iterdir()] == []


def trained_encoder(base: Path, folder: Path) -> Path:
    """Save an adapter of a model without a head."""
    from vera_convert.with_torch import VeraConfig, VeraModel

    vera = VeraModel(
        transformers.AutoModel.from_pretrained(base),
        VeraConfig(r=4, target_modules=("query", "value")),
    )
    for parameter in vera.trainable_parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape)
    vera.save_pretrained(folder)
    return folder


def bad_tokenizer(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {**split, "invert": False},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "[UNK]": 2}, "unk_token": "[UNK]"},
    }


@pytest.mark.parametrize("pattern", ["(?:a|aa)+$", "(" * 5000 + ")" * 5000])
def test_a_tokenizer_that_panics_or_never_ends_is_a_clear_error_or_harmless(
    pattern: str, llama: Path, tmp_path: Path, scratch: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(llama / "base", base)
    (base / "tokenizer.json").write_text(json.dumps(bad_tokenizer(pattern)))
    (base / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    text = tmp_path / "text"
    text.write_text("a" * 3000 + "b\n")
    times = dict.fromkeys(Stage, Limit(120)) | {Stage.TEXT: Limit(4)}
    try:
        run_models(
            job(base, llama / "merged", llama / "adapter", text=text),
            limits=Limits(times=times),
        )
    except SurroundingsError as error:
        assert "--layers-only" in str(error)  # noqa: PT017 -- either outcome is a right one
    assert [*scratch.iterdir()] == []


def test_memory_is_limited(llama: Path, scratch: Path) -> None:
    limits = Limits(memory=60 << 20, memory_per_core=0, memory_factor=0)
    with pytest.raises(SurroundingsError, match=r"--layers-only"):
        run_models(
            job(llama / "base", llama / "merged", llama / "adapter"),
            limits=limits,
        )
    assert [*scratch.iterdir()] == []
