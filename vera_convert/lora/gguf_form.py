"""A LoRA as one GGUF file for llama.cpp, written layer by layer with the package `gguf`.

The names come from that package's own tables. llama.cpp rotates neighboring values where
transformers rotates halves, so its converter permutes the rows of q and k in models of the
architecture `llama`. The rows of lora_B are permuted alike.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeGuard

import numpy as np

from vera_convert import rules
from vera_convert.adapter.lora_record import GGUF_NAME, RECORD_KEY
from vera_convert.arguments import Progress
from vera_convert.base.facts import BaseFacts
from vera_convert.base.model import BaseModel
from vera_convert.delta import Array
from vera_convert.dtypes import BITS
from vera_convert.errors import CheckpointError, SurroundingsError
from vera_convert.files.reading import open_local
from vera_convert.lora.engines import EngineName, engines, engines_for
from vera_convert.lora.gguf_reading import gguf_package, name_table, read_gguf
from vera_convert.lora.plan import LoraLayer, LoraPlan
from vera_convert.lora.record import metadata_with
from vera_convert.lora.stored import ComputedFactors, Measured
from vera_convert.targets.architectures import MAX_LAYERS
from vera_convert.text import printable, read_back_differs

PERMUTED = "llama"
"""The architecture whose rows of q and k llama.cpp orders in another way."""
_ALIGNMENT = 32
"""GGUF's default: each part of a file begins at a multiple of so many bytes."""


@dataclass(frozen=True, slots=True)
class GgufModel:
    """The base as llama.cpp knows it.

    Attributes:
        architecture: llama.cpp's name of the architecture.
        heads: the number of attention heads, and of heads of keys and values.
        names: llama.cpp's name of each layer's weight, by the module's name in the LoRA.
    """

    architecture: str
    heads: tuple[int, int]
    names: Mapping[str, str]

    weights = GGUF_NAME
    config = None
    naming = "as in llama.cpp"

    def name(self, layer: LoraLayer) -> str:
        """Return the name of a layer in the file."""
        return self.names[layer.written]

    def stored_B(self, layer: LoraLayer, lora_B: Array) -> Array:  # noqa: N802 -- a matrix
        """Return lora_B with its rows in llama.cpp's order."""
        last = layer.written.rpartition(".")[2]
        if self.architecture != PERMUTED or last not in ("q_proj", "k_proj"):
            return lora_B
        halves = lora_B.reshape(self.heads[last == "k_proj"], 2, -1, lora_B.shape[1])
        return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(lora_B.shape))


def restored_B(stored: Array, heads: int) -> Array:  # noqa: N802 -- a matrix
    """Return lora_B with the rows in transformers' order, from llama.cpp's order."""
    neighbors = stored.reshape(heads, -1, 2, stored.shape[1])
    return np.ascontiguousarray(neighbors.swapaxes(1, 2).reshape(stored.shape))


def head_counts(base: BaseModel, place: str) -> tuple[int, int]:
    """Return the numbers of attention heads, and of heads of keys and values, of a base.

    Raises:
        CheckpointError: the config gives no usable numbers.
    """
    heads = base.config.get("num_attention_heads")
    pairs = base.config.get("num_key_value_heads", heads)
    if not (_is_size(heads) and _is_size(pairs)):
        raise _unknown(place, "its config gives no usable numbers of heads.")
    return heads, pairs


def _is_size(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and 0 < value <= MAX_LAYERS


def _unknown(place: str, reason: str) -> CheckpointError:
    return CheckpointError(rules.LORA_BASE_UNKNOWN.at(place, reason))


def gguf_model(plan: LoraPlan, base_facts: BaseFacts) -> GgufModel:
    """Return the base as llama.cpp knows it.

    Raises:
        CheckpointError: the kind of the base or a layer is not known.
        SurroundingsError: the package `gguf` is not installed.
    """
    base, place = base_facts.base, base_facts.source or "the base"
    if base is None:
        raise _unknown(place, "its weights are missing.")
    architectures = engines()[EngineName.GGUF].architectures
    architecture = architectures.get(base.model_type or "")
    if architecture is None:
        known_types = f"to-lora knows llama.cpp's names for {', '.join(sorted(architectures))}."
        kind = printable(base.model_type or "missing")
        found = rules.LORA_BASE_UNKNOWN.at(place, f"its model_type is {kind}; {known_types}")
        raise CheckpointError(found.with_remedy(f"{engines_for(base)} Or merge the adapter."))
    heads, pairs = head_counts(base, place)
    count = base.config.get("num_hidden_layers")
    if not _is_size(count):
        raise _unknown(place, "its config gives no usable number of layers.")
    table = name_table(architecture, count)
    names = {layer.written: table.get_name(layer.written) for layer in plan.layers}
    for layer in plan.layers:
        if names[layer.written] is None:
            reason = "llama.cpp has no such layer in a model of this kind."
            raise CheckpointError(rules.LORA_NAME_UNKNOWN.at(printable(layer.written), reason))
        last, out = layer.written.rpartition(".")[2], layer.shape.out_features
        rows = {"q_proj": 2 * heads, "k_proj": 2 * pairs}.get(last, 1)
        if architecture == PERMUTED and out % rows:
            reason = f"its {out} outputs are no whole number of heads."
            raise _unknown(printable(layer.module), reason)
    return GgufModel(architecture, (heads, pairs), names)


@dataclass(frozen=True, slots=True, eq=False)
class GgufWeights:
    """The weights of a LoRA in a GGUF file.

    Attributes:
        model: the base as llama.cpp knows it.
        record: the LoRA's record, but for its error.
        plan: the LoRA.
    """

    model: GgufModel
    record: Mapping[str, object]
    plan: LoraPlan

    def file_size(self) -> int:
        """Return the bytes of the file; the beginning is written to a temporary folder."""
        with TemporaryDirectory() as folder:
            path = Path(folder) / GGUF_NAME
            self._begun(path).close()
            beginning = path.stat().st_size
        parts = [beginning, *(self._width * math.prod(size) for _, size in self._infos())]
        return sum(-(-part // _ALIGNMENT) * _ALIGNMENT for part in parts)

    def write(self, path: Path, progress: Progress, *, check: bool) -> Measured:
        """Write the file, read back the header, and with `check` every byte; return the errors.

        Raises:
            CheckpointError: a value is too large for the dtype.
            SurroundingsError: other bytes came back than were written.
        """
        computed, written, total = ComputedFactors(self.plan), hashlib.sha256(), self.file_size()
        done = total - self.plan.nbytes
        writer = self._begun(path)
        for layer in self.plan.layers:
            found = computed.of(layer)
            for matrix in (found.lora_A, self.model.stored_B(layer, found.lora_B)):
                values = np.ascontiguousarray(matrix).view(f"u{self._width}")
                writer.write_tensor_data(values)
                written.update(values.data if check else b"")
                done += matrix.nbytes
            progress(done, total)
        writer.close()
        self._state_error(path, computed.measured.worst)
        with open_local(path) as source:
            file = read_gguf(source)
            same = source.size == total and [*file.tensors] == [name for name, _ in self._infos()]
            same = same and file.metadata[RECORD_KEY] == self._text(computed.measured.worst)
            if check and same:
                digest = hashlib.sha256()
                for tensor in file.tensors.values():
                    for block in tensor.blocks():
                        digest.update(block)
                same = digest.digest() == written.digest()
        if not same:
            raise SurroundingsError(read_back_differs(path.name))
        return computed.measured

    @property
    def _width(self) -> int:
        return BITS[self.plan.dtype] // 8

    def _text(self, error: float) -> str:
        return metadata_with(self.record, error, {})[RECORD_KEY]

    def _infos(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Yield name and shape of each tensor, in the order of the file."""
        for layer in self.plan.layers:
            for part, shape in zip("ab", self.plan.shapes(layer), strict=True):
                yield f"{self.model.name(layer)}.weight.lora_{part}", shape

    def _begun(self, path: Path) -> Any:  # noqa: ANN401 -- the package has no types
        """Write everything before the values, and return the package's writer."""
        gguf = gguf_package()
        writer = gguf.GGUFWriter(path, self.model.architecture)
        writer.add_string("general.type", "adapter")
        writer.add_string(RECORD_KEY, self._text(0.0))
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", float(self.plan.rank))
        kind = gguf.GGMLQuantizationType[self.plan.dtype]
        for name, shape in self._infos():
            size = self._width * math.prod(shape)
            writer.add_tensor_info(name, shape, np.float32, size, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        return writer

    def _state_error(self, path: Path, error: float) -> None:
        """Write the record again, with the error."""
        first = self._text(0.0).encode()
        with path.open("r+b") as file:
            start = file.read(len(first) + 4096).index(first)
            file.seek(start)
            file.write(self._text(error).encode())
