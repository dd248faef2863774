"""Adapters of single experts on bases that store the experts separately or as stacks."""

# mypy: allow-untyped-calls, allow-subclassing-any
from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from releases import has, of_transformers
from safetensors.torch import load_file, save_file
from smallmodels import LLM
from theirwarnings import OF_PEFT
from torch import nn
from trainedmodels import randomized

from vera_convert import (
    BaseOptions,
    CheckpointError,
    VerifyOptions,
    embed,
    merge,
    strip,
    to_lora,
    validate,
    verify,
)

pytestmark = [
    OF_PEFT,
    # PEFT applies the pattern to the parameter of all experts, but searches only the modules.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
]

if not has("transformers", "5.0"):
    pytest.skip("needs transformers 5.0, which stacks experts", allow_module_level=True)

WEIGHTS = "adapter_model.safetensors"
KINDS: Mapping[str, tuple[str, Mapping[str, Any], list[str]]] = {
    "Qwen3MoeForCausalLM": (
        "Qwen3MoeConfig",
        {**LLM, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12},
        ["gate_proj", "up_proj", "down_proj"],
    ),
    "MixtralForCausalLM": (
        "MixtralConfig",
        {**LLM, "num_local_experts": 3},
        ["w1", "w2", "w3"],
    ),
}


def tree(tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """Build a model of linear layers from names of tensors, as transformers 4 builds experts."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *path, last, _ = name.split(".")
        place = root
        for part in path:
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = getattr(place, part)
        layer = nn.Linear(tensor.shape[1], tensor.shape[0], bias=False)
        layer.weight.data = tensor.clone()
        place.add_module(last, layer)
    return root


class Bases:
    """A model in two folders, with separate experts and with stacked experts, and an adapter."""

    def __init__(self, kind: str, folder: Path) -> None:
        config, fields, targets = KINDS[kind]
        self.model_class = of_transformers(kind)
        self.single, self.stacked = folder / "single", folder / "stacked"
        self.adapter = folder / "adapter"
        torch.manual_seed(0)
        model = self.model_class(of_transformers(config)(**fields))
        model.save_pretrained(self.single)
        self.stacked.mkdir()
        shutil.copy(self.single / "config.json", self.stacked)
        state = {key: value.contiguous() for key, value in model.state_dict().items()}
        save_file(state, self.stacked / "model.safetensors", {"format": "pt"})
        tensors = load_file(self.single / "model.safetensors")
        linear = {key: each for key, each in tensors.items() if each.ndim == 2 and "emb" not in key}
        peft_config = peft.VeraConfig(r=4, target_modules=["q_proj", *targets])
        adapted = peft.get_peft_model(tree(linear), peft_config)
        randomized(adapted).save_pretrained(self.adapter)

    def state(self, base: Path, lora: Path | None = None) -> Mapping[str, torch.Tensor]:
        """Return the state of the model from a folder, with a LoRA that PEFT merges."""
        model = self.model_class.from_pretrained(base)
        if lora is not None:
            model = peft.PeftModel.from_pretrained(model, lora).merge_and_unload()
        found: Mapping[str, torch.Tensor] = model.state_dict()
        return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_sizes_of_stacked_experts_are_known_to_every_command(kind: str, tmp_path: Path) -> None:
    bases = Bases(kind, tmp_path)
    merge(bases.adapter, tmp_path / "merged", base=bases.single)
    wanted = bases.state(tmp_path / "merged")
    for base in (bases.single, bases.stacked):
        out = tmp_path / f"of-{base.name}"
        checked = validate(bases.adapter, base=base, select=["V4", "V5"])
        assert checked.passed
        told = {each.code for each in checked.findings}
        assert told == ({"V544"} if base == bases.stacked else set())
        strip(bases.adapter, out / "stripped", base=base)
        done = embed(out / "stripped", out / "embedded", base=base)
        assert (done.out / WEIGHTS).read_bytes() == (bases.adapter / WEIGHTS).read_bytes()
        lora = to_lora(out / "stripped", out / "lora", base=base).out
        options = VerifyOptions(layers_only=True)
        assert verify(out / "stripped", lora=lora, base=base, options=options).passed
        found = bases.state(base, lora)
        for key, values in wanted.items():
            torch.testing.assert_close(found[key], values, msg=key, rtol=1e-4, atol=1e-5)
    with pytest.raises(CheckpointError, match=r"V544 .*experts"):
        merge(bases.adapter, tmp_path / "refused", base=bases.stacked)


def test_peft_needs_the_lora_of_every_expert_of_a_stack(tmp_path: Path) -> None:
    bases = Bases("Qwen3MoeForCausalLM", tmp_path)
    tensors = load_file(bases.adapter / WEIGHTS)
    some = {key: each for key, each in tensors.items() if ".experts.2." not in key}
    save_file(some, bases.adapter / WEIGHTS, {"format": "pt"})
    path = bases.adapter / "adapter_config.json"
    config = {**json.loads(path.read_text()), "target_modules": r".*(q_proj|experts\.[01]\..*)"}
    path.write_text(json.dumps(config))
    for base in (bases.single, bases.stacked):
        with pytest.raises(CheckpointError) as caught:
            to_lora(bases.adapter, tmp_path / "lora", base=base)
        assert [each.rule.code for each in caught.value.findings] == ["V714"] * 12


def test_a_lora_with_the_names_of_a_key_map_is_verified_as_peft_loads_the_lora(
    tmp_path: Path,
) -> None:
    bases = Bases("Qwen3MoeForCausalLM", tmp_path)
    merge(bases.adapter, tmp_path / "merged", base=bases.single)
    tensors = load_file(bases.adapter / WEIGHTS)
    other = {key.replace(".model.layers.", ".other.layers."): each for key, each in tensors.items()}
    save_file(other, bases.adapter / WEIGHTS, {"format": "pt"})
    base = BaseOptions(str(bases.single), key_map=[("other", "model")])
    lora = to_lora(bases.adapter, tmp_path / "lora", base=base).out
    checked = verify(bases.adapter, lora=lora, base=base, options=VerifyOptions(layers_only=True))
    assert checked.passed, [str(each) for each in checked.findings]
    wanted, found = bases.state(tmp_path / "merged"), bases.state(bases.single, lora)
    for key, values in wanted.items():
        torch.testing.assert_close(found[key], values, msg=key, rtol=1e-4, atol=1e-5)
