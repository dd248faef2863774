"""Modules with a number in the files and a name in memory: every command finds these modules."""

# mypy: allow-untyped-calls
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from merges import tensors_of
from releases import of_transformers
from safetensors.numpy import save_file
from smallmodels import LLM, TINY
from theirwarnings import OF_PEFT
from trainedmodels import randomized

from vera_convert import VerifyOptions, embed, merge, strip, to_lora, validate, verify

pytestmark = OF_PEFT

TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = {**LLM, **TOKENS, "num_key_value_heads": 2}
EYE = {**TINY, "patch_size": 4}
IMAGE = 39


def rope(*sections: int) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [*sections]}


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def logits_of_image(model: Any) -> torch.Tensor:
    ids = torch.tensor([[3, 4, *[IMAGE] * 4, 5, 6]])
    return torch.as_tensor(model(input_ids=ids, pixel_values=noise(1, 3, 16, 16)).logits)


def logits_of_patches(model: Any, *, tokens: int = 1) -> torch.Tensor:
    ids = torch.tensor([[3, 4, *[IMAGE] * tokens, 5, 6]])
    patches = {"pixel_values": noise(4, 3 * 4 * 4), "image_grid_thw": torch.tensor([[1, 2, 2]])}
    more = {"mm_token_type_ids": (ids == IMAGE).int()}
    return torch.as_tensor(model(input_ids=ids, **patches, **more).logits)


def boxes(model: Any) -> torch.Tensor:
    return torch.as_tensor(model(pixel_values=noise(1, 3, 32, 32)).logits)


def flow(model: Any) -> torch.Tensor:
    times = [torch.tensor([[0.1]]), torch.tensor([[0.6]])]
    return torch.as_tensor(model.get_submodule("flow_head")(noise(1, 8), noise(1, 16), times))


@dataclass(frozen=True)
class Numbered:
    """A class of transformers whose files number modules.

    Attributes:
    fields: the fields of the class's config.
    targets: the adapted layers, as a regular expression.
    saved: the modules in modules_to_save.
    numbered: a name with such a number in the files.
    run: a function that returns outputs that depend on the numbered modules.
    bias: the biases that are trained.
    published: a part of the names that transformers writes, and the other part that published files
    have; transformers loads both.
    """

    fields: Mapping[str, Any]
    targets: str
    saved: tuple[str, ...]
    numbered: str
    run: Callable[[Any], torch.Tensor]
    bias: str = "all"
    published: tuple[str, str] = ("", "")

    def outputs(self, model: Any) -> torch.Tensor:
        with torch.no_grad():
            return self.run(model.eval())


CLASSES = {
    "QianfanOCRForConditionalGeneration": Numbered(
        {
            "text_config": {**TEXT, "model_type": "qwen3"},
            "vision_config": {**EYE, "image_size": [16, 16], "patch_size": [4, 4]},
            "image_token_id": IMAGE,
        },
        r".*language_model.*v_proj|.*linear_1",
        ("linear_2", "multi_modal_projector.layer_norm"),
        "mlp1.1.weight",
        logits_of_image,
        bias="vera_only",  # the files join the biases of the vision tower
        published=("language_model.model.encoder.", "language_model.model."),
    ),
    "Ernie4_5_VLMoeForConditionalGeneration": Numbered(
        {
            "text_config": {
                **TEXT,
                "rope_parameters": rope(1, 1, 2),
                "moe_intermediate_size": [8, 8],
                "moe_num_experts": 4,
                "moe_k": 2,
                "mlp_layer_types": ["dense", "sparse"],
            },
            "vision_config": {
                "depth": 2,
                "hidden_size": 16,
                "num_heads": 2,
                "intermediate_size": 24,
                "patch_size": 4,
            },
            "image_token_id": IMAGE,
        },
        r".*(v_proj|linear.fc1|mlp.fc1)",
        ("spatial_linear.fc2", "temporal_linear.ln"),
        "model.resampler_model.temporal_linear.0.bias",
        logits_of_patches,
        published=("model.vision_model.", "vision_model."),
    ),
    "HunYuanVLForConditionalGeneration": Numbered(
        {
            "text_config": {**TEXT, "rope_parameters": rope(1, 1, 1, 1)},
            "vision_config": {**EYE, "out_hidden_size": 16, "text_hidden_size": 16},
            "image_token_id": IMAGE,
        },
        r".*language_model.*v_proj",
        ("patch_merger",),
        "vit.perceive.proj.2.bias",
        partial(logits_of_patches, tokens=4),
    ),
    "RfDetrForObjectDetection": Numbered(
        {
            "backbone_config": {
                "model_type": "rf_detr_dinov2",
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "mlp_ratio": 2,
                "image_size": 32,
                "patch_size": 4,
                "num_windows": 2,
                "window_block_indexes": [0],
                "out_features": ["stage1", "stage2"],
            },
            "decoder_ffn_dim": 24,
            "decoder_layers": 2,
            "decoder_self_attention_heads": 2,
            "decoder_cross_attention_heads": 2,
            "num_queries": 5,
            "group_detr": 2,
            "d_model": 16,
        },
        r".*backbone.*(v_proj|fc1)",
        ("backbone.projector",),
        "backbone.0.projector.stages.0.0.m.1.cv1.bn.bias",
        boxes,
        bias="vera_only",  # the files join the biases of the decoder
    ),
    "GradiumPhononTTSForConditionalGeneration": Numbered(
        {
            **TEXT,
            "flow_head_config": {
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "latent_dim": 8,
                "condition_dim": 16,
                "frequency_embedding_size": 8,
                "loss_weighting_hidden_size": 8,
            },
            "latent_dim": 8,
            "audio_prompt_dim": 16,
        },
        r".*(fc1|adaln_proj)",
        ("layers.1.fc2", "timestep_embeddings.1.norm"),
        "flow_lm.flow_net.time_embed.1.mlp.3.alpha",
        flow,
    ),
}


PUBLISHED = [name for name, kind in CLASSES.items() if kind.published[0]]


@pytest.mark.parametrize(
    ("name", "is_published"),
    [*((name, False) for name in CLASSES), *((name, True) for name in PUBLISHED)],
)
def test_modules_with_numbers_in_the_files_are_merged_as_peft_runs_them(
    name: str, *, is_published: bool, tmp_path: Path
) -> None:
    kind, model_class = CLASSES[name], of_transformers(name)
    base, adapter, merged = (tmp_path / part for part in ("base", "adapter", "merged"))
    torch.manual_seed(0)
    model_class(model_class.config_class(**kind.fields)).save_pretrained(base)
    if is_published:
        tensors = tensors_of(base)
        renamed = {key.replace(*kind.published): values for key, values in tensors.items()}
        assert renamed.keys() != tensors.keys()
        save_file(renamed, base / "model.safetensors", {"format": "pt"})
    assert kind.numbered in tensors_of(base)
    config = peft.VeraConfig(
        r=4, target_modules=kind.targets, modules_to_save=[*kind.saved], bias=kind.bias
    )
    plain = model_class.from_pretrained(base)
    before = kind.outputs(plain)
    randomized(peft.get_peft_model(plain, config)).save_pretrained(adapter)
    adapted = peft.PeftModel.from_pretrained(model_class.from_pretrained(base), adapter)
    expected = kind.outputs(adapted.get_base_model())
    assert (expected - before).abs().max() > 1e-3

    assert validate(adapter, base=base).passed
    merge(adapter, merged, base=base)
    assert tensors_of(merged).keys() == tensors_of(base).keys()
    model, info = model_class.from_pretrained(merged, output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(kind.outputs(model), expected, rtol=0, atol=1e-5)
    options = VerifyOptions(layers_only=True)
    assert verify(adapter, merged=merged, base=base, options=options).passed

    strip(adapter, tmp_path / "stripped", base=base)
    done = embed(tmp_path / "stripped", tmp_path / "embedded", base=base)
    weights = "adapter_model.safetensors"
    assert (done.out / weights).read_bytes() == (adapter / weights).read_bytes()
    to_lora(adapter, tmp_path / "lora", base=base)
    again = model_class.from_pretrained(base)
    lora = peft.PeftModel.from_pretrained(again, tmp_path / "lora")
    torch.testing.assert_close(kind.outputs(lora.get_base_model()), expected, rtol=0, atol=1e-5)
