"""Write a tiny Llama as GGUF and run llama.cpp's server; needs the packages gguf and xllamacpp."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file


def gguf_base(base: Path, out: Path, words: Sequence[str] = ()) -> Path:
    """Write a tiny Llama as GGUF, as llama.cpp's converter does.

    Args:
        base: the folder of the model.
        out: the file to write.
        words: the first tokens of the vocabulary.
    """
    gguf = pytest.importorskip("gguf")
    config = json.loads((base / "config.json").read_bytes())
    heads, pairs = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(pairs)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config.get("rope_parameters", config).get("rope_theta", 10000.0))
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    tokens = [*words, *(f"<{n}>" for n in range(len(words), config["vocab_size"]))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([token.encode() for token in tokens])
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([1] * len(tokens))
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    rows = {"q_proj.weight": heads, "k_proj.weight": pairs}
    for name, tensor in load_file(base / "model.safetensors").items():
        count = next((number for end, number in rows.items() if name.endswith(end)), 0)
        halves = tensor.reshape(count, 2, -1, tensor.shape[1]).swapaxes(1, 2) if count else tensor
        stored = np.ascontiguousarray(halves.reshape(tensor.shape))
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def server(model: Path, adapter: Path | None) -> Any:
    """Start llama.cpp's server inside this process, without flash attention."""
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.n_parallel, params.warmup = 512, 1, False
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.cpuparams.n_threads = 2
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    return xllamacpp.Server(params)


def completion(started: Any, **request: Any) -> Mapping[str, Any]:
    """Ask a server for one completion."""
    answer = started.handle_completions({"cache_prompt": False, **request})
    found: Mapping[str, Any] = json.loads(answer) if isinstance(answer, str) else answer
    return found["choices"][0]  # type: ignore[no-any-return]
