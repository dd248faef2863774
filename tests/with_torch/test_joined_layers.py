"""Layers that the files hold as rows of one tensor: a merge changes the rows as PEFT does."""

# mypy: allow-subclassing-any, allow-untyped-calls
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from releases import has, of_transformers
from theirwarnings import OF_PEFT

from vera_convert import (
    CheckpointError,
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
    "joined layers alone": (
        "Dinov2Model",
        "Dinov2Config",
        {**WIDTHS, "use_swiglu_ffn": True, "image_size": 16, "patch_size": 8},
        ["gate_proj", "up_proj"],
    ),
}


def test_a_trained_bias_that_the_files_join_is_refused_by_the_merge_alone(tmp_path: Path) -> None:
    name, config, fields, targets = KINDS["joined layers alone"]
    model_class, base, adapter = of_transformers(name), tmp_path / "base", tmp_path / "adapter"
    model_class(of_transformers(config)(**fields)).save_pretrained(base)
    wanted = peft.VeraConfig(r=4, target_modules=targets, bias="all")
    adapted = peft.get_peft_model(model_class.from_pretrained(base), wanted)
    adapted.save_pretrained(adapter)
    checked = validate(adapter, base=base, select=["V5"])
    assert checked.passed
    assert {each.code for each in checked.findings} == {"V542"}
    assert strip(adapter, tmp_path / "stripped", base=base).out.is_dir()
    with pytest.raises(CheckpointError, match=r"V542 .*gate_proj\.bias.*join this bias"):
        merge(adapter, tmp_path / "merged", base=base)


def test_trained_biases_of_renamed_norms_replace_those_of_the_base(tmp_path: Path) -> None:
    name, config, fields, _ = KINDS["names of another release"]
    model_class, base, adapter = of_transformers(name), tmp_path / "base", tmp_path / "adapter"
    model_class(of_transformers(config)(**fields)).save_pretrained(base)
    wanted = peft.VeraConfig(r=4, target_modules=["o_proj"], bias="all")
    adapted = peft.get_peft_model(model_class.from_pretrained(base), wanted)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape) * 0.3
    adapted.save_pretrained(adapter)
    theirs = adapted.merge_and_unload().state_dict()
    checked = validate(adapter, base=base, select=["V4", "V5"])
    assert checked.passed, [str(each) for each in checked.findings]
    merge(adapter, tmp_path / "merged", base=base)
    ours = model_class.from_pretrained(tmp_path / "merged").state_dict()
    assert ours.keys() == theirs.keys()
    for key, values in theirs.items():
        torch.testing.assert_close(ours[key], values, msg=key)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_in_one_tensor_are_merged_as_peft_merges_them(kind: str, tmp_path: Path) -> None:
    name, config, fields, targets = KINDS[kind]
    model_class, base, adapter = of_transformers(name), tmp_path / "base", tmp_path / "adapter"
    torch.manual_seed(0)
    model_class(of_transformers(config)(**fields)).save_pretrained(base)
    wanted = peft.VeraConfig(r=4, target_modules=targets)
    adapted = peft.get_peft_model(model_class.from_pretrained(base), wanted)
    for key, parameter in adapted.named_parameters():
        if "vera_lambda" in key:
            parameter.data = torch.randn(parameter.shape) * 0.3
    adapted.save_pretrained(adapter)
    theirs = adapted.merge_and_unload().state_dict()
    checked = validate(adapter, base=base, select=["V4", "V5"])
    assert checked.passed, [str(each) for each in checked.findings]
    merge(adapter, tmp_path / "merged", base=base)
    ours = model_class.from_pretrained(tmp_path / "merged").state_dict()
    assert ours.keys() == theirs.keys()
    for key, values in theirs.items():
        torch.testing.assert_close(ours[key], values, msg=key)
    options = VerifyOptions(layers_only=True)
    assert verify(adapter, merged=tmp_path / "merged", base=base, options=options).passed
    strip(adapter, tmp_path / "stripped", base=base)
    done = embed(tmp_path / "stripped", tmp_path / "embedded", base=base)
    weights = "adapter_model.safetensors"
    assert (done.out / weights).read_bytes() == (adapter / weights).read_bytes()
    to_lora(adapter, tmp_path / "lora", base=base)
    plain = model_class.from_pretrained(base)
    lora = peft.PeftModel.from_pretrained(plain, tmp_path / "lora").merge_and_unload().state_dict()
    for key, values in theirs.items():
        torch.testing.assert_close(lora[key], values, msg=key, rtol=1e-4, atol=1e-5)
