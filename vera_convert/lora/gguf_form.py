"""A LoRA as one GGUF file for llama.cpp, written layer by layer with the package `gguf`.

The names come from that package's own tables. llama.cpp rotates neighboring values where
transformers rotates halves, so its converter permutes the rows of q and k in models of the
architecture `llama`. The rows of lora_B are permuted alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from vera_convert.adapter.lora_record import GGUF_NAME, RECORD_KEY
from vera_convert.base.facts import BaseFacts
from vera_convert.base.model import BaseModel
from vera_convert.errors import CheckpointError, SurroundingsError
from vera_convert.files.tensorfile import Array
from vera_convert.lora.plan import LoraLayer, LoraPlan
from vera_convert.lora.record import metadata_with
from vera_convert.lora.writing import Computed
from vera_convert.rules import LORA_BASE_UNKNOWN, LORA_NAME_UNKNOWN
from vera_convert.text import printable

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
}
"""llama.cpp's architecture, by the model_type of transformers."""
PERMUTED = "llama"
"""The architecture whose rows of q and k llama.cpp orders in another way."""
_MOST_LAYERS = 10_000


@dataclass(frozen=True, slots=True)
class GgufModel:
    """The base as llama.cpp knows it.

    Attributes:
        architecture: llama.cpp's name of the architecture.
        heads: the number of attention heads, and of heads of keys and values.
        names: llama.cpp's name of each layer's weight, by the module that the LoRA writes.
    """

    architecture: str
    heads: tuple[int, int]
    names: Mapping[str, str]

    weights = GGUF_NAME
    config = None

    def stored_B(self, layer: LoraLayer, lora_B: Array) -> Array:  # noqa: N802 -- a matrix
        """Return lora_B with its rows in llama.cpp's order."""
        last = layer.written.rpartition(".")[2]
        if self.architecture != PERMUTED or last not in ("q_proj", "k_proj"):
            return lora_B
        halves = lora_B.reshape(self.heads[last == "k_proj"], 2, -1, lora_B.shape[1])
        return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(lora_B.shape))


def restored_B(stored: Array, heads: int) -> Array:  # noqa: N802 -- a matrix
    """Return lora_B with its rows in transformers' order, from that of llama.cpp."""
    neighbors = stored.reshape(heads, -1, 2, stored.shape[1])
    return np.ascontiguousarray(neighbors.swapaxes(1, 2).reshape(stored.shape))


def head_counts(base: BaseModel | None, place: str) -> tuple[int, int]:
    """Return the numbers of attention heads, and of heads of keys and values, of a base.

    Raises:
        CheckpointError: the base is not known, or its config gives no usable numbers.
    """
    config = {} if base is None else base.config
    heads = config.get("num_attention_heads")
    pairs = config.get("num_key_value_heads", heads)
    if not (_is_size(heads) and _is_size(pairs)):
        reason = "its config gives no numbers of heads."
        raise CheckpointError(LORA_BASE_UNKNOWN.at(place, reason))
    return heads, pairs


def _is_size(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and 0 < value <= _MOST_LAYERS


def gguf_model(plan: LoraPlan, base_facts: BaseFacts) -> GgufModel:
    """Return the base as llama.cpp knows it.

    Raises:
        CheckpointError: the kind of the base or a layer is not known.
        SurroundingsError: the package `gguf` is not installed.
    """
    base = base_facts.base
    place = base_facts.source or "the base"
    kind = base.model_type if base is not None else None
    if base is None or kind not in ARCHITECTURES:
        reason = f"its model_type is {printable(kind or 'not known')}."
        raise CheckpointError(LORA_BASE_UNKNOWN.at(place, reason))
    heads, pairs = head_counts(base, place)
    count = base.config.get("num_hidden_layers")
    if not _is_size(count):
        raise CheckpointError(LORA_BASE_UNKNOWN.at(place, "its config gives no number of layers."))
    architecture, gguf = ARCHITECTURES[kind], gguf_package()
    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(known[architecture], count)
    names = {layer.written: table.get_name(layer.written) for layer in plan.layers}
    for layer in plan.layers:
        if names[layer.written] is None:
            reason = "llama.cpp has no such layer in a model of this kind."
            raise CheckpointError(LORA_NAME_UNKNOWN.at(printable(layer.written), reason))
        last, out = layer.written.rpartition(".")[2], layer.shape.out_features
        rows = {"q_proj": 2 * heads, "k_proj": 2 * pairs}.get(last, 1)
        if architecture == PERMUTED and out % rows:
            reason = f"its {out} outputs are no whole number of heads."
            raise CheckpointError(LORA_BASE_UNKNOWN.at(printable(layer.module), reason))
    return GgufModel(architecture, (heads, pairs), names)


def write_gguf(
    path: Path,
    model: GgufModel,
    record: Mapping[str, object],
    computed: Computed,
    progress: Callable[[int, int], None],
) -> None:
    """Write a LoRA as a GGUF file.

    The record stands before the tensors and states the error, which is known last. Its length does
    not depend on the error, so the record is written again at the end.

    Raises:
        CheckpointError: a value is too large for the dtype.
    """
    gguf, plan = gguf_package(), computed.plan
    writer = gguf.GGUFWriter(path, model.architecture)
    first = metadata_with(record, 0.0, {})[RECORD_KEY]
    writer.add_string("general.type", "adapter")
    writer.add_string(RECORD_KEY, first)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(plan.rank))
    kinds = gguf.GGMLQuantizationType
    kind = {"F32": kinds.F32, "F16": kinds.F16, "BF16": kinds.BF16}[plan.dtype]
    width = 4 if plan.dtype == "F32" else 2
    for layer in plan.layers:
        sizes = (plan.rank, layer.shape.in_features), (layer.shape.out_features, plan.rank)
        for part, size in zip("ab", sizes, strict=True):
            name = f"{model.names[layer.written]}.weight.lora_{part}"
            writer.add_tensor_info(name, size, np.float32, size[0] * size[1] * width, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    done = 0
    for layer in plan.layers:
        found = computed.of(layer)
        for matrix in (found.lora_A, model.stored_B(layer, found.lora_B)):
            writer.write_tensor_data(np.ascontiguousarray(matrix).view(f"u{width}"))
            done += matrix.nbytes
        progress(done, plan.nbytes)
    writer.close()
    last = metadata_with(record, computed.measured.worst, {})[RECORD_KEY]
    with path.open("r+b") as file:
        start = file.read(len(first) + 4096).index(first.encode())
        file.seek(start)
        file.write(last.encode())


def gguf_package() -> Any:  # noqa: ANN401 -- the package has no types
    """Return the package `gguf`, or raise `SurroundingsError` if the package is not installed."""
    try:
        return import_module("gguf")
    except ImportError as error:
        raise SurroundingsError(
            "a GGUF file needs the package gguf. Install it with: pip install 'vera-convert[gguf]'."
        ) from error
