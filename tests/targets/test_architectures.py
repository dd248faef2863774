"""Compare the table of known model types with the classes of transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from releases import has

from vera_convert.errors import CheckpointError
from vera_convert.targets.architectures import MAX_LAYERS, classes, families, layers_from_config
from vera_convert.targets.linear import Linear, layers_from_shapes

CONFIGS = Path(__file__).parents[1] / "data" / "configs"

_CAUSAL = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
}
_ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "id2label": {"0": "a", "1": "b", "2": "c"},
}
_T5 = {"d_model": 32, "d_ff": 56, "d_kv": 6, "num_heads": 3, "num_layers": 2, "vocab_size": 96}
TINY: dict[str, list[dict[str, Any]]] = {
    "llama": [
        _CAUSAL,
        {**_CAUSAL, "num_key_value_heads": 2},
        {**_CAUSAL, "num_key_value_heads": None, "head_dim": None},
        {**_CAUSAL, "head_dim": 20, "num_key_value_heads": 1},
    ],
    "mistral": [_CAUSAL, {**_CAUSAL, "head_dim": 20}],
    "qwen2": [_CAUSAL, {**_CAUSAL, "num_key_value_heads": 2, "num_labels": 5}],
    "gemma": [_CAUSAL, {**_CAUSAL, "head_dim": 8, "num_key_value_heads": 1}],
    "gpt2": [
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96},
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 72, "add_cross_attention": True},
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "n_inner": None},
    ],
    "bert": [_ENCODER, {**_ENCODER, "is_decoder": True, "add_cross_attention": True}],
    "roberta": [_ENCODER],
    "t5": [
        _T5,
        {**_T5, "feed_forward_proj": "gated-gelu", "num_decoder_layers": 3},
        {**_T5, "num_decoder_layers": None, "num_labels": 4},
    ],
    "vit": [_ENCODER, {**_ENCODER, "pooler_output_size": 20}, {**_ENCODER, "id2label": {}}],
}

# The names of ViT's modules in memory (transformers 5) and in the files.
_VIT_ON_DISK = [
    (r"(^|\.)layers\.(\d+)\.attention\.([qkv])_proj$", None),
    (r"(^|\.)layers\.(\d+)\.attention\.o_proj$", r"\1encoder.layer.\2.attention.output.dense"),
    (r"(^|\.)layers\.(\d+)\.mlp\.fc1$", r"\1encoder.layer.\2.intermediate.dense"),
    (r"(^|\.)layers\.(\d+)\.mlp\.fc2$", r"\1encoder.layer.\2.output.dense"),
]
_PARTS = {"q": "query", "k": "key", "v": "value"}


def _on_disk(model_type: str, name: str) -> str:
    for pattern, replacement in _VIT_ON_DISK if model_type == "vit" else ():
        match = re.search(pattern, name)
        if match and replacement is None:
            part = _PARTS[match[3]]
            start = name[: match.start()] + match[1]
            return f"{start}encoder.layer.{match[2]}.attention.attention.{part}"
        if match and replacement is not None:
            return re.sub(pattern, replacement, name)
    return name


def _real(document: dict[str, Any], class_name: str) -> Any:
    """Build the class on the meta device: with shapes and without memory."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model_class = getattr(transformers, class_name)
    with torch.device("meta"):
        return model_class(model_class.config_class.from_dict(dict(document)))


def _real_layers(model_type: str, model: Any) -> dict[str, Linear]:
    torch = pytest.importorskip("torch")
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            found[_on_disk(model_type, name)] = Linear(*module.weight.shape)
        elif isinstance(module, conv1d):
            rows, columns = module.weight.shape
            found[name] = Linear(columns, rows, conv1d=True)
    return found


def _real_head(model: Any) -> set[str]:
    head = model.get_output_embeddings()
    return {name for name, module in model.named_modules() if module is head}


def _cases() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, model_class in classes().items():
        for document in TINY[model_class.model_type]:
            yield name, document


@pytest.mark.parametrize(("name", "document"), list(_cases()))
def test_every_class_has_the_layers_of_the_real_class(name: str, document: dict[str, Any]) -> None:
    model_type = classes()[name].model_type
    document = {"model_type": model_type, "architectures": [name], **document}
    real = _real(document, name)
    torch = pytest.importorskip("torch")
    if "pooler_output_size" in document and not has("transformers", "5.0"):
        pytest.skip("needs transformers 5.0: earlier releases have no pooler_output_size")

    layers = layers_from_config(document)

    assert layers.linear == _real_layers(model_type, real)
    assert layers.output_heads == _real_head(real)
    for table in layers.embeddings:
        assert isinstance(real.get_submodule(table), torch.nn.Embedding)
    assert layers.source == name


@pytest.mark.parametrize("model_type", list(families()))
def test_missing_fields_have_the_defaults_of_the_real_class(model_type: str) -> None:
    name = families()[model_type]["default"]

    layers = layers_from_config({"model_type": model_type})

    assert layers.source == name
    assert layers.linear == _real_layers(model_type, _real({}, name))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_real_sizes_have_the_layers_of_the_real_class(path: Path) -> None:
    document = json.loads(path.read_text())
    layers = layers_from_config(document)
    real = _real(document, layers.source)
    assert layers.linear == _real_layers(document["model_type"], real)


@pytest.mark.parametrize("model_type", list(families()))
def test_the_paths_equal_those_of_the_tensors_in_the_files(model_type: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    safetensors = pytest.importorskip("safetensors")
    document = {"model_type": model_type, **TINY[model_type][0]}
    if model_type == "vit":
        document |= {"image_size": 8, "patch_size": 4}
    layers = layers_from_config(document)
    model_class = getattr(transformers, layers.source)
    torch.manual_seed(0)
    model_class(model_class.config_class.from_dict(dict(document))).save_pretrained(tmp_path)
    with safetensors.safe_open(tmp_path / "model.safetensors", "np") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118

    from_headers = layers_from_shapes(shapes, model_type=model_type)

    tied = layers.output_heads - from_headers.output_heads
    assert from_headers.linear == {
        name: layer for name, layer in layers.linear.items() if name not in tied
    }
    assert set(layers.embeddings) <= set(from_headers.embeddings)


def test_the_class_of_a_config_shows_the_type() -> None:
    layers = layers_from_config({"architectures": ["LlamaModel"], "num_hidden_layers": 1})
    assert (layers.model_type, next(iter(layers.linear))) == ("llama", "layers.0.self_attn.q_proj")


def test_the_dtype_is_read_under_both_names_of_the_field() -> None:
    document = {"model_type": "vit"}
    assert layers_from_config({**document, "dtype": "bfloat16"}).dtype == "BF16"
    assert layers_from_config({**document, "torch_dtype": "torch.float16"}).dtype == "F16"
    assert layers_from_config(document).dtype == "F32"


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"model_type": "mixtral"},
        {"model_type": ["llama"]},
        {"model_type": "llama", "architectures": ["LlamaForWishes"]},
        {"model_type": "llama", "architectures": [{}]},
        {"model_type": "bert", "architectures": ["LlamaForCausalLM"]},
    ],
)
def test_an_unknown_model_is_refused(document: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError) as caught:
        layers_from_config(document)
    assert [finding.code for finding in caught.value.findings] == ["V560"]
    assert "gpt2" in str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "change"),
    [
        ("llama", {"hidden_size": 0}),
        ("llama", {"hidden_size": True}),
        ("llama", {"hidden_size": "4096"}),
        ("llama", {"hidden_size": 4096.0}),
        ("llama", {"hidden_size": None}),
        ("llama", {"hidden_size": 1 << 60}),
        ("llama", {"hidden_size": 4097}),
        ("llama", {"num_hidden_layers": MAX_LAYERS + 1}),
        ("llama", {"num_key_value_heads": -1}),
        ("gemma", {"head_dim": None}),
        ("gpt2", {"n_embd": 770}),
        ("gpt2", {"add_cross_attention": "no"}),
        ("t5", {"feed_forward_proj": "gated-gelu-new-x"}),
        ("t5", {"feed_forward_proj": 3}),
        ("t5", {"num_layers": MAX_LAYERS + 1}),
        ("bert", {"intermediate_size": []}),
        ("bert", {"architectures": ["BertModel"], "vocab_size": -1}),
        ("vit", {"num_labels": -2}),
    ],
)
def test_an_absurd_size_is_refused(model_type: str, change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError) as caught:
        layers_from_config({"model_type": model_type, **change})
    assert [finding.code for finding in caught.value.findings] == ["V561"]
    assert caught.value.findings[0].place == "config.json"


@pytest.mark.parametrize("model_type", ["gpt2", "bert", "roberta", "vit"])
def test_a_field_without_a_name_changes_nothing(model_type: str) -> None:
    plain = layers_from_config({"model_type": model_type})
    assert layers_from_config({"model_type": model_type, "": 5}) == plain
