"""A and B are as large as PEFT's for real classes that build fewer layers than the files hold."""

# mypy: allow-subclassing-any, allow-untyped-calls
from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from releases import has
from safetensors.torch import load_file, save_file
from theirwarnings import OF_PEFT
from torch import nn

from vera_convert.base.facts import BaseOptions
from vera_convert.conversion.strip_embed import embed, strip
from vera_convert.merging.merge import merge
from vera_convert.rules import Severity
from vera_convert.summary import info
from vera_convert.validation.validate import validate
from vera_convert.with_torch import VeraModel

pytestmark = OF_PEFT


if not has("transformers", "5.0"):
    pytest.skip(
        "needs transformers 5.0: earlier releases build every layer that their files hold",
        allow_module_level=True,
    )

TEXT: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS: Mapping[str, Any] = {
    "moe_intermediate_size": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
MLP = ["gate_proj", "up_proj", "down_proj"]


class Blocks(nn.Module):
    """A model with the names of a transformer of Diffusers."""

    def __init__(self) -> None:
        super().__init__()
        block = lambda: nn.ModuleDict({name: nn.Linear(32, 32) for name in ("to_q", "to_v")})  # noqa: E731
        self.transformer_blocks = nn.ModuleList(nn.ModuleDict({"attn": block()}) for _ in range(2))


def save_blocks(folder: Path) -> None:
    """Save a `Blocks` as Diffusers does."""
    folder.mkdir()
    torch.manual_seed(0)
    save_file(Blocks().state_dict(), folder / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "TinyTransformer2DModel", "num_layers": 2}
    (folder / "config.json").write_text(json.dumps(config))


def load_blocks(folder: Path) -> Blocks:
    """Load a `Blocks` as Diffusers does, without the tensors that the class does not build."""
    model = Blocks()
    model.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"), strict=False)
    return model


@dataclass(frozen=True)
class Kind:
    """A base, the class in which an adapter is trained, and the layers that only the files have."""

    save: Callable[[Path], None]
    load: Callable[[Path], Any]
    targets: list[str]
    more: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    severity: Severity | None = None


def kind(
    model: str, config: Any, targets: list[str], *, trained: str | None = None, **more: Any
) -> Kind:
    """Make a `Kind` from a class of transformers."""

    def save(folder: Path) -> None:
        torch.manual_seed(0)
        getattr(transformers, model)(config).save_pretrained(folder)

    return Kind(save, getattr(transformers, trained or model).from_pretrained, targets, **more)


def gemma3() -> Any:
    """A text model with a wider vision tower."""
    vision = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    return transformers.Gemma3Config(
        text_config={**TEXT, "sliding_window": 16},
        vision_config={**vision, "num_attention_heads": 4, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )


def bart() -> Any:
    """An encoder that is wider than the decoder."""
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    widths = {"d_model": 32, "encoder_ffn_dim": 80, "decoder_ffn_dim": 48}
    layers = {"encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 64}
    tokens = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    more = {"decoder_start_token_id": 2, "forced_eos_token_id": 2}
    return transformers.BartConfig(**heads, **widths, **layers, **tokens, **more)


def qwen3_next() -> Any:
    """A hybrid model with fused experts and a shared expert."""
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    heads = {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    wide = {**EXPERTS, "shared_expert_intermediate_size": 24}
    return transformers.Qwen3NextConfig(
        **{**TEXT, "num_hidden_layers": 4}, **linear, **heads, **wide
    )


KINDS = {
    "mixture of experts": kind(
        "Qwen3MoeForCausalLM",
        transformers.Qwen3MoeConfig(**TEXT, **EXPERTS, mlp_only_layers=[0]),
        ["q_proj", "v_proj", *MLP],
        severity=Severity.WARNING,
    ),
    "hybrid with experts": kind(
        "Qwen3NextForCausalLM",
        qwen3_next(),
        ["q_proj", "in_proj_qkvz", *MLP],
        more={"mtp.layers.0.self_attn.q_proj.weight": (200, 90)},
        severity=Severity.WARNING,
    ),
    "decoder alone": kind(
        "BartForConditionalGeneration",
        bart(),
        ["q_proj", "fc1", "fc2"],
        trained="BartForCausalLM",
        severity=Severity.WARNING,
    ),
    "text of a multimodal model": kind(
        "Gemma3ForConditionalGeneration",
        gemma3(),
        ["q_proj", "v_proj"],
        trained="Gemma3ForCausalLM",
        severity=Severity.WARNING,
    ),
    "layer behind the last one": kind(
        "LlamaForCausalLM",
        transformers.LlamaConfig(**TEXT),
        ["q_proj", "down_proj"],
        more={"model.layers.2.self_attn.q_proj.weight": (200, 90)},
        severity=Severity.NOTE,
    ),
    "block for several tokens": kind(
        "LlamaForCausalLM",
        transformers.LlamaConfig(**TEXT),
        ["q_proj", "down_proj"],
        more={"mtp.layers.0.mlp.down_proj.weight": (200, 90)},
        severity=Severity.NOTE,
    ),
    "conv1d": kind(
        "GPT2LMHeadModel",
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64),
        ["c_attn", "c_proj"],
        more={"transformer.h.2.attn.c_attn.weight": (90, 300)},
        severity=Severity.NOTE,
    ),
    "blocks of diffusers": Kind(
        save_blocks,
        load_blocks,
        ["to_q", "to_v"],
        {"controlnet.transformer_blocks.0.attn.to_q.weight": (90, 300)},
        Severity.WARNING,
    ),
}


def make(one: Kind, folder: Path, *, stored: bool) -> tuple[Path, Path]:
    """Save a base, and save an adapter that PEFT makes for the trained class."""
    base, adapter = folder / "base", folder / "adapter"
    one.save(base)
    (weights,) = base.glob("*.safetensors")
    more = {name: torch.ones(shape) for name, shape in one.more.items()}
    save_file({**load_file(weights), **more}, weights, {"format": "pt"})
    config = peft.VeraConfig(r=4, target_modules=one.targets, save_projection=stored)
    model = peft.get_peft_model(one.load(base), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vera_lambda" in name:
                parameter.normal_()
    model.save_pretrained(adapter)
    return base, adapter


@pytest.mark.parametrize("stored", [False, True], ids=["from the key", "stored"])
@pytest.mark.parametrize("one", KINDS.values(), ids=KINDS)
def test_a_and_b_are_as_large_as_peft_s(one: Kind, stored: bool, tmp_path: Path) -> None:
    base, adapter = make(one, tmp_path, stored=stored)
    theirs = peft.PeftModel.from_pretrained(one.load(base), adapter)
    A, B = theirs.base_model.vera_A["default"], theirs.base_model.vera_B["default"]
    done = embed(adapter, tmp_path / "embedded", base=base)
    found = load_file(done.out / "adapter_model.safetensors")
    assert torch.equal(found["base_model.vera_A"], A)
    assert torch.equal(found["base_model.vera_B"], B)
    strip(done.out, tmp_path / "stripped", base=base)
    peft.PeftModel.from_pretrained(one.load(base), done.out)
    described = info(adapter, base=base).base_facts
    assert (described.in_features, described.out_features) == (A.shape[1], B.shape[0])
    merge(adapter, tmp_path / "merged", base=base)
    before, after = tensors_of(base), tensors_of(tmp_path / "merged")
    assert described.match is not None
    for module, name in described.match.tensors.items():
        delta = theirs.base_model.model.get_submodule(module).get_delta_weight("default")
        assert torch.allclose(after.pop(name) - before.pop(name), delta, atol=1e-6), name
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def tensors_of(folder: Path) -> dict[str, Any]:
    """Return the tensors of a model with one weight file."""
    (file,) = folder.glob("*.safetensors")
    return dict(load_file(file))


@pytest.mark.parametrize("one", KINDS.values(), ids=KINDS)
def test_findings_name_the_layers_that_the_class_does_not_build(one: Kind, tmp_path: Path) -> None:
    base, adapter = make(one, tmp_path, stored=False)
    (checked,) = validate([adapter], base=base, select=["V4"], ignore=["V410"]).adapters
    told = {finding.code: finding.severity for finding in checked.findings}
    assert told == ({"V411": one.severity} if one.severity else {})
    embed(adapter, tmp_path / "embedded", base=base)
    (checked,) = validate([tmp_path / "embedded"], base=base, select=["V4"]).adapters
    told = {finding.code: finding.severity for finding in checked.findings}
    assert told == ({"V411": Severity.NOTE} if one.severity else {})


def test_shapes_from_peft_decide_the_dims(tmp_path: Path) -> None:
    one = KINDS["mixture of experts"]
    base, adapter = make(one, tmp_path, stored=False)
    model = peft.PeftModel.from_pretrained(one.load(base), adapter)
    A, B = model.base_model.vera_A["default"], model.base_model.vera_B["default"]
    sizes = BaseOptions(in_features=A.shape[1], out_features=B.shape[0], dtype="float32")
    done = embed(adapter, tmp_path / "embedded", base=sizes)
    assert torch.equal(load_file(done.out / "adapter_model.safetensors")["base_model.vera_A"], A)
    for each, severity in ((adapter, Severity.WARNING), (done.out, Severity.NOTE)):
        (checked,) = validate([each], base=base, select=["V411"]).adapters
        assert [finding.severity for finding in checked.findings] == [severity]


@pytest.mark.parametrize("one", KINDS.values(), ids=KINDS)
def test_the_layer_in_torch_has_matrices_of_the_same_size(one: Kind, tmp_path: Path) -> None:
    base, adapter = make(one, tmp_path, stored=False)
    theirs = peft.PeftModel.from_pretrained(one.load(base), adapter)
    ours = VeraModel.from_pretrained(one.load(base), adapter)
    ours.save_pretrained(tmp_path / "again")
    embed(tmp_path / "again", tmp_path / "embedded", base=base)
    found = load_file(tmp_path / "embedded" / "adapter_model.safetensors")
    assert torch.equal(found["base_model.vera_A"], theirs.base_model.vera_A["default"])


def test_full_names_in_target_modules_count_despite_layers_to_transform(
    tmp_path: Path,
) -> None:
    def load(_: Path) -> Any:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**{**TEXT, "num_hidden_layers": 3})
        model = transformers.LlamaForCausalLM(config)
        for name, shape in (
            ("up_proj", (32, 80)),
            ("gate_proj", (32, 80)),
            ("down_proj", (80, 32)),
        ):
            setattr(model.model.layers[2].mlp, name, nn.Linear(*shape, bias=False))
        return model

    base, adapter = tmp_path / "base", tmp_path / "adapter"
    load(base).save_pretrained(base)
    linear = [name for name, each in load(base).named_modules() if isinstance(each, nn.Linear)]
    linear.remove("lm_head")
    config = peft.VeraConfig(
        r=4, target_modules=linear, layers_to_transform=[0], save_projection=False
    )
    peft.get_peft_model(load(base), config).save_pretrained(adapter)
    for listed, width in ((None, 48), (linear, 80)):
        if listed is not None:
            path = adapter / "adapter_config.json"
            document = {**json.loads(path.read_bytes()), "target_modules": listed}
            path.write_text(json.dumps(document))
        theirs = peft.PeftModel.from_pretrained(load(base), adapter).base_model.vera_A["default"]
        assert theirs.shape[1] == width
        embed(adapter, tmp_path / f"out-{width}", base=base)
        found = load_file(tmp_path / f"out-{width}" / "adapter_model.safetensors")
        assert torch.equal(found["base_model.vera_A"], theirs)
