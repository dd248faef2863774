"""Compare the results of `count` with published figures, and with files that PEFT writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import good_adapter, good_tensors
from bases import tiny_base

from vera_convert.base.facts import BaseOptions
from vera_convert.conversion.strip_embed import embed, strip
from vera_convert.counting import count
from vera_convert.errors import CheckpointError, UsageError
from vera_convert.summary import info
from vera_convert.targets.architectures import layers_from_config
from vera_convert.targets.linear import LayerGroup, Linear, ModelLayers, layers_from_shapes

CONFIGS = Path(__file__).parent / "data" / "configs"

LLAMA_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _model(name: str) -> ModelLayers:
    return layers_from_config(json.loads((CONFIGS / f"{name}.json").read_bytes()))


@pytest.mark.parametrize(
    ("name", "targets", "rank", "parameters"),
    [
        ("llama-3.2-3b", ("q_proj", "v_proj"), 256, 129_024),
        ("roberta-base", ("query", "value"), 1024, 43_008),
        ("roberta-large", ("query", "value"), 256, 61_440),
        ("vit-base", ("query", "value"), 256, 24_576),
        ("vit-large", ("query", "value"), 256, 61_440),
        ("gpt2-medium", ("c_attn",), 1024, 98_304),
        ("llama-7b", ("all-linear",), 1024, 1_589_248),
        ("llama-7b", ("all-linear",), 256, 1_417_216),
        ("llama-7b", LLAMA_LINEAR, 256, 1_417_216),
        ("llama-13b", ("All-Linear",), 1024, 2_416_640),
    ],
)
def test_count_gives_the_published_figures_of_vera(
    name: str, targets: tuple[str, ...], rank: int, parameters: int
) -> None:
    result = count(_model(name), rank=rank, targets=targets)
    assert result.vera.parameters == parameters
    assert result.vera.parameter_bytes == 4 * parameters


@pytest.mark.parametrize(
    ("name", "targets", "rank", "parameters"),
    [
        ("roberta-base", ("query", "value"), 8, 294_912),
        ("llama-7b", ("all-linear",), 64, 159_907_840),
        ("llama-13b", ("all-linear",), 64, 250_347_520),
    ],
)
def test_count_gives_the_published_figures_of_lora(
    name: str, targets: tuple[str, ...], rank: int, parameters: int
) -> None:
    assert count(_model(name), rank=rank, targets=targets).lora.parameters == parameters


def test_the_size_of_the_published_file_is_exact() -> None:
    result = count(_model("llama-3.2-3b"), rank=256, targets=("q_proj", "v_proj"))
    assert result.vera.file_bytes == 6_821_968
    assert (result.max_in, result.max_out, result.layers) == (3072, 3072, 56)
    assert result.groups == (
        LayerGroup("self_attn.q_proj", 3072, 3072, 28),
        LayerGroup("self_attn.v_proj", 1024, 3072, 28),
    )


def test_without_targets_peft_s_default_is_used() -> None:
    by_default = count(_model("gpt2-medium"), rank=4)
    assert by_default.groups == count(_model("gpt2-medium"), rank=4, targets=("c_attn",)).groups
    assert by_default.targets == ()
    with pytest.raises(CheckpointError, match="V133"):
        count(_model("vit-base"), rank=4)


def test_a_base_is_counted_from_headers() -> None:
    shapes = {
        "transformer.wte.weight": (96, 32),
        "transformer.h.0.ln_1.weight": (32,),
        "transformer.h.0.attn.c_attn.weight": (32, 96),
        "transformer.h.0.attn.c_attn.bias": (96,),
    }
    model = layers_from_shapes(shapes, model_type="gpt2")
    result = count(model, rank=4, targets=("all-linear",))
    assert result.groups == (LayerGroup("attn.c_attn", 96, 32, 1),)
    assert result.source == "the tensors' headers"


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("qproj", "similar names are q_proj"),
        ("self_attn", "the module holds q_proj, k_proj, v_proj, o_proj"),
        ("embed_tokens", "embedding"),
        ("query", "there are q_proj"),
        (".*q_proj", "q_proj"),
        ("proj", "q_proj"),
        ("", "an item of targets is empty"),
        ("\x1b[31m", r"\x1b"),
    ],
)
def test_the_refusal_of_a_target_without_a_match_names_similar_layers(
    target: str, says: str
) -> None:
    with pytest.raises(UsageError) as caught:
        count(_model("llama-7b"), rank=4, targets=("q_proj", target))
    assert says in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_a_long_list_of_similar_names_is_cut() -> None:
    model = ModelLayers("a model", None, {f"layer{at}": Linear(4, 4) for at in range(40)})
    with pytest.raises(UsageError, match="and 28 more"):
        count(model, rank=1, targets=("zzz",))


@pytest.mark.parametrize("rank", [0, -1, 1 << 25])
def test_an_absurd_rank_is_refused(rank: int) -> None:
    with pytest.raises(UsageError, match="rank"):
        count(_model("llama-7b"), rank=rank, targets=("q_proj",))


def test_all_linear_stands_alone() -> None:
    with pytest.raises(UsageError, match="all-linear"):
        count(_model("llama-7b"), rank=4, targets=("q_proj", "all-linear"))


# --- compared with PEFT --------------------------------------------------------------------------

TINY: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {
        "model_type": "llama",
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
    },
    "GPT2LMHeadModel": {
        "model_type": "gpt2",
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "vocab_size": 96,
    },
    "BertForMaskedLM": {
        "model_type": "bert",
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 96,
    },
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("class_name", "targets"),
    [
        ("LlamaForCausalLM", ["q_proj", "v_proj"]),
        ("LlamaForCausalLM", ["q_proj", "down_proj"]),
        ("LlamaForCausalLM", ["all-linear"]),
        ("LlamaForCausalLM", ["q_proj", "lm_head"]),
        ("GPT2LMHeadModel", ["c_attn"]),
        ("GPT2LMHeadModel", ["all-linear"]),
        ("GPT2LMHeadModel", []),
        ("BertForMaskedLM", ["query", "value"]),
        ("BertForMaskedLM", ["all-linear"]),
        ("BertForMaskedLM", ["decoder"]),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sizes_equal_those_of_peft_s_files(
    class_name: str, targets: list[str], dtype: str, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    document = {**TINY[class_name], "architectures": [class_name], "dtype": dtype}
    model_class = getattr(transformers, class_name)
    in_pefts_form = None if not targets else targets[0] if targets == ["all-linear"] else targets
    result = count(layers_from_config(document), rank=4, targets=targets)

    def written(name: str, config: Any) -> int:
        base = model_class(model_class.config_class(**TINY[class_name])).to(getattr(torch, dtype))
        wrapped = peft.get_peft_model(base, config)
        wrapped.save_pretrained(tmp_path / name)
        if name == "embedded":
            assert wrapped.get_nb_trainable_parameters()[0] == result.vera.parameters
        if name == "lora":
            assert wrapped.get_nb_trainable_parameters()[0] == result.lora.parameters
        return (tmp_path / name / "adapter_model.safetensors").stat().st_size

    vera = {"r": 4, "target_modules": in_pefts_form}
    assert result.vera.file_bytes == written("embedded", peft.VeraConfig(**vera))
    facts = BaseOptions(in_features=result.max_in, out_features=result.max_out, dtype=dtype)
    done = strip(tmp_path / "embedded", tmp_path / "stripped", base=facts)
    assert result.stripped_bytes == (done.out / "adapter_model.safetensors").stat().st_size
    assert result.lora.file_bytes == written("lora", peft.LoraConfig(**vera))


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"peft_type": "VERA", "r": 4}, "this is the config of an adapter"),
        ({"r": 4, "architectures": []}, "the config names no model type and no class"),
        ({"model_type": "new"}, "the model type is new; known types"),
        ({"architectures": ["New"]}, "the class is New; known types"),
        ({"model_type": "a", "architectures": ["B"]}, "the model type is a and the class is B;"),
    ],
    ids=str,
)
def test_an_unknown_config_is_described_in_words(document: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=r"V560") as error:
        count(document, rank=4)
    assert words in str(error.value)
    assert "None" not in str(error.value)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("rank", [4, 300])
def test_sizes_equal_those_of_the_files_of_embed_and_strip(
    dtype: str, rank: int, tmp_path: Path
) -> None:
    base = tiny_base(tmp_path / "base", dtype=dtype)
    vectors = {
        name: np.ones(rank, np.float32) for name in good_tensors() if name.endswith("lambda_d")
    }
    adapter = good_adapter(
        tmp_path / "adapter", stripped=True, tensors=vectors, r=rank, projection_prng_key=0
    )
    embedded = embed(adapter, tmp_path / "embedded", base=base).out
    stripped = strip(embedded, tmp_path / "stripped", base=base).out
    result = count(base, rank=rank, targets=["q_proj", "v_proj"])
    described = info(embedded, base=base).sizes
    sizes = [(each / "adapter_model.safetensors").stat().st_size for each in (embedded, stripped)]
    assert [result.vera.file_bytes, result.stripped_bytes] == sizes
    assert [described.embedded, described.stripped] == sizes
