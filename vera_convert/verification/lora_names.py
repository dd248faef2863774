"""Find each layer of an adapter in a LoRA, whose names can be those of the base's files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from vera_convert import rules
from vera_convert.adapter.adapter import Adapter
from vera_convert.base.facts import BASE_REMEDY, BaseFacts
from vera_convert.errors import CheckpointError, UsageError
from vera_convert.lora.gguf_form import PERMUTED, head_counts
from vera_convert.lora.gguf_reading import gguf_names
from vera_convert.lora.reading import ReadLora
from vera_convert.text import printable


def layer_names(lora: ReadLora, adapter: Adapter, base_facts: BaseFacts) -> dict[str, str | None]:
    """Return the LoRA's name for each module of the adapter; None if the LoRA has no such layer.

    A LoRA has the adapter's names, those of the base's files, or llama.cpp's.
    """
    known = {module: [*_known_names(module, base_facts)] for module in adapter.layers}
    if lora.architecture:
        own = gguf_names(lora.architecture, lora.layers, known)
        known = {module: [own[module]] if module in own else [] for module in known}
    return {
        module: next((name for name in names if name in lora.layers), None)
        for module, names in known.items()
    }


def _known_names(module: str, base_facts: BaseFacts) -> Iterator[str]:
    yield module
    if base_facts.match is not None:
        yield base_facts.match.tensors.get(module, "").removesuffix(".weight")
        yield base_facts.match.strategy.rename(module) or ""


def in_transformers_order(
    lora: ReadLora, names: Mapping[str, str | None], base_facts: BaseFacts
) -> ReadLora:
    """Return a LoRA of llama.cpp whose rows of q and k will be read in transformers' order.

    Raises:
        UsageError: the base, and thus the number of its heads, is unknown.
        CheckpointError: the rows are no whole number of heads.
    """
    if lora.architecture != PERMUTED:
        return lora
    layers, place = dict(lora.layers), base_facts.source or "the base"
    for module, name in names.items():
        last = module.rpartition(".")[2]
        if name is None or last not in ("q_proj", "k_proj"):
            continue
        if base_facts.base is None:
            raise UsageError(
                "llama.cpp orders the rows of q and k by the base's heads, and the base is not "
                f"known. {BASE_REMEDY}"
            )
        heads = head_counts(base_facts.base, place)[last == "k_proj"]
        layer = lora.layers[name]
        if layer.shape[0] % (2 * heads):
            reason = f"its {layer.shape[0]} outputs are no whole number of heads."
            raise CheckpointError(rules.LORA_UNREADABLE.at(printable(name), reason))
        layers[name] = replace(layer, heads=heads)
    return replace(lora, layers=layers)
