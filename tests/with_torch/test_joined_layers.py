"""Layers that the files hold as rows of one tensor: a merge changes these rows as PEFT does."""

# mypy: allow-subclassing-any, allow-untyped-calls
from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
from releases import has, of_transformers
from safetensors.torch import load_file, save_file
from theirwarnings import OF_PEFT
from trainedmodels import randomized

from vera_convert import (
    AdapterSpec,
    CheckpointError,
    MergeOptions,
    VerifyOptions,
    embed,
    merge,
    strip,
    to_lora,
    validate,
    verify,
)

pytestmark = OF_PEFT

if not has("transformers", "5.0"):
    pytest.skip(
        "needs transformers 5.0: earlier releases join the layers in memory too",
        allow_module_level=True,
    )

WIDTHS: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
KINDS: Mapping[str, tuple[str, str, Mapping[str, Any], list[str]]] = {
    "names that only the joined layers have otherwise": (
        "HrmTextForCausalLM",
        "HrmTextConfig",
        {**WIDTHS, "num_key_value_heads": 4, "head_dim": 8, "vocab_size": 64, "pad_token_id": 0},
        ["gate_proj", "v_proj", "down_proj"],
    ),
    "names of another release": (
        "NomicBertModel",
        "NomicBertConfig",
        {**WIDTHS, "vocab_size": 64, "pad_token_id": 0},
        ["q_proj", "k_proj", "o_proj"],
    ),
    "a q of more rows than k and v": (
        "Molmo2TextModel",
        "Molmo2TextConfig",
        {**WIDTHS, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64},
        ["q_proj", "k_proj", "v_proj", "gate_proj"],
    ),
    "joined layers alone": (
        "Dinov2Model",
        "Dinov2Config",
        {**WIDTHS, "use_swiglu_ffn": True, "image_size": 16, "patch_size": 8},
        ["gate_proj", "up_proj"],
    ),
}
SWIN: Mapping[str, Any] = {
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [1, 2],
    "window_size": 2,
}
RENAMED: Mapping[str, tuple[str, str, Mapping[str, Any], list[str]]] = {
    "norms of a known family": (
        "SegformerModel",
        "SegformerConfig",
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [8, 16],
            "patch_sizes": [3, 3],
            "strides": [2, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
        },
        ["q_proj", "fc2"],
    ),
    "a table of biases": ("SwinModel", "SwinConfig", SWIN, ["q_proj", "fc2"]),
    "biases of the layers": (
        "VideoMAEModel",
        "VideoMAEConfig",
        {**WIDTHS, "image_size": 16, "patch_size": 8, "num_frames": 4},
        ["query", "value"],
    ),
    "norms of another release": (*KINDS["names of another release"][:3], ["o_proj"]),
}
"""Models whose files use other names for trained biases."""


JOINED_TENSOR = re.compile(r"weights_in\.|Wqkv\.|att_proj\.")


class Trained(NamedTuple):
    """A model of transformers in ``base``, and an adapter of PEFT for the model in ``adapter``."""

    base: Path
    adapter: Path
    model_class: Any
    merged: Mapping[str, torch.Tensor]
    """The state of the model that PEFT merged."""


def trained(kind: str, folder: Path, **wanted: Any) -> Trained:
    """Write a model and an adapter, with random values in every tensor that PEFT trains."""
    name, config, fields, targets = {**KINDS, **RENAMED}[kind]
    model_class, base, adapter = of_transformers(name), folder / "base", folder / "adapter"
    torch.manual_seed(0)
    model_class(of_transformers(config)(**fields)).save_pretrained(base)
    peft_config = peft.VeraConfig(**{"r": 4, "target_modules": targets, **wanted})
    adapted = peft.get_peft_model(model_class.from_pretrained(base), peft_config)
    randomized(adapted).save_pretrained(adapter)
    return Trained(base, adapter, model_class, adapted.merge_and_unload().state_dict())


def assert_merged_as_peft(model: Trained, out: Path) -> None:
    """Validate the adapter, merge into `out`, and compare every tensor with PEFT's merge."""
    checked = validate(model.adapter, base=model.base, select=["V4", "V5"])
    assert checked.passed, [str(each) for each in checked.findings]
    merge(model.adapter, out, base=model.base)
    ours = model.model_class.from_pretrained(out).state_dict()
    assert ours.keys() == model.merged.keys()
    for key, values in model.merged.items():
        torch.testing.assert_close(ours[key], values, msg=key)


JOINED: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "all biases": ("joined layers alone", {"bias": "all"}),
    "biases of one of two layers": (
        "joined layers alone",
        {"bias": "vera_only", "target_modules": ["up_proj"]},
    ),
    "a weight beside a delta": (
        "names of another release",
        {"target_modules": ["q_proj", "o_proj"], "modules_to_save": ["k_proj"]},
    ),
    "weights and biases of one layer": (
        "joined layers alone",
        {"target_modules": ["down_proj"], "modules_to_save": ["gate_proj"]},
    ),
    "a weight after a longer one": (
        "a q of more rows than k and v",
        {"target_modules": ["q_proj"], "modules_to_save": ["v_proj"]},
    ),
}
"""Tensors that PEFT saves separately, and that the base's files join with other tensors."""


@pytest.mark.parametrize("case", JOINED)
def test_saved_tensors_replace_their_rows_in_a_joined_tensor(case: str, tmp_path: Path) -> None:
    kind, wanted = JOINED[case]
    model = trained(kind, tmp_path, **wanted)
    base, adapter, merged = model.base, model.adapter, tmp_path / "merged"
    assert_merged_as_peft(model, merged)
    options = VerifyOptions(layers_only=True)
    assert verify(adapter, merged=merged, base=base, options=options).passed
    weights = merged / "model.safetensors"
    tensors = load_file(weights)
    changed = load_file(base / "model.safetensors")
    name = next(name for name in changed if JOINED_TENSOR.search(name))
    save_file({**tensors, name: changed[name]}, weights, {"format": "pt"})
    assert not verify(adapter, merged=merged, base=base, options=options).passed


@pytest.mark.parametrize(("layer", "is_merged"), [("k_proj", False), ("v_proj", True)])
def test_a_delta_on_rows_that_another_adapter_replaces_is_refused(
    layer: str, is_merged: bool, tmp_path: Path
) -> None:
    kind, wanted = JOINED["a weight beside a delta"]
    model = trained(kind, tmp_path / "one", **wanted)
    other = trained(kind, tmp_path / "other", target_modules=[layer]).adapter
    with nullcontext() if is_merged else pytest.raises(CheckpointError, match=r"V534 .*Wqkv"):
        options = MergeOptions(add=[AdapterSpec(other)])
        merge(model.adapter, tmp_path / "merged", base=model.base, options=options)


def test_an_adapter_that_replaces_a_tensor_is_refused_if_another_replaces_its_rows(
    tmp_path: Path,
) -> None:
    kind, wanted = "joined layers alone", {"target_modules": ["down_proj"]}
    model = trained(kind, tmp_path / "one", modules_to_save=["gate_proj"], **wanted)
    whole = trained(kind, tmp_path / "other", **wanted).adapter
    weights, config = whole / "adapter_model.safetensors", whole / "adapter_config.json"
    joined = {
        f"base_model.model.{name}": each
        for name, each in load_file(model.base / "model.safetensors").items()
        if JOINED_TENSOR.search(name)
    }
    save_file({**load_file(weights), **joined}, weights, {"format": "pt"})
    document = json.loads(config.read_text())
    config.write_text(json.dumps({**document, "modules_to_save": ["weights_in"]}))
    options = MergeOptions(add=[AdapterSpec(whole)])
    with pytest.raises(CheckpointError, match=r"V534 .*weights_in.*some rows"):
        merge(model.adapter, tmp_path / "merged", base=model.base, options=options)


def test_a_report_counts_the_values_of_a_joined_tensor_once(tmp_path: Path) -> None:
    kind, wanted = JOINED["a weight beside a delta"]
    model = trained(kind, tmp_path, **wanted)
    options = MergeOptions(check=True)
    result = merge(model.adapter, tmp_path / "merged", base=model.base, options=options)
    joined = [each for each in result.tensors if JOINED_TENSOR.search(each.name)]
    assert len(joined) == 2
    for each in joined:
        assert each.numbers is not None
        assert each.numbers.values == math.prod(each.shape)
        assert each.numbers.changed == each.numbers.values // 3, "q alone has a delta"


def test_a_saved_layer_whose_rows_are_in_another_order_is_refused(tmp_path: Path) -> None:
    wanted = {"target_modules": ["down_proj"], "modules_to_save": ["gate_proj"]}
    base, adapter, *_ = trained("joined layers alone", tmp_path, **wanted)
    config = base / "config.json"
    # Inkling's files alternate the rows of gate_proj and up_proj.
    config.write_text(config.read_text().replace('"dinov2"', '"inkling_mm_model"'))
    tensors = load_file(base / "model.safetensors")
    renamed = {
        name.replace("weights_in", "w13_dn").replace("weights_out", "down_proj"): each
        for name, each in tensors.items()
    }
    save_file(renamed, base / "model.safetensors", {"format": "pt"})
    assert strip(adapter, tmp_path / "stripped", base=base).out.is_dir()
    with pytest.raises(CheckpointError, match=r"V543 .*gate_proj"):
        merge(adapter, tmp_path / "merged", base=base)


@pytest.mark.parametrize("bias", ["vera_only", "all"])
@pytest.mark.parametrize("kind", RENAMED)
def test_renamed_biases_replace_the_base_s_biases(kind: str, bias: str, tmp_path: Path) -> None:
    assert_merged_as_peft(trained(kind, tmp_path, bias=bias), tmp_path / "merged")


@pytest.mark.parametrize("kind", KINDS)
def test_layers_in_one_tensor_are_merged_as_by_peft(kind: str, tmp_path: Path) -> None:
    model = trained(kind, tmp_path)
    base, adapter = model.base, model.adapter
    assert_merged_as_peft(model, tmp_path / "merged")
    options = VerifyOptions(layers_only=True)
    assert verify(adapter, merged=tmp_path / "merged", base=base, options=options).passed
    strip(adapter, tmp_path / "stripped", base=base)
    done = embed(tmp_path / "stripped", tmp_path / "embedded", base=base)
    weights = "adapter_model.safetensors"
    assert (done.out / weights).read_bytes() == (adapter / weights).read_bytes()
    to_lora(adapter, tmp_path / "lora", base=base)
    plain = model.model_class.from_pretrained(base)
    lora = peft.PeftModel.from_pretrained(plain, tmp_path / "lora").merge_and_unload().state_dict()
    for key, values in model.merged.items():
        torch.testing.assert_close(lora[key], values, msg=key, rtol=1e-4, atol=1e-5)
