"""A LoRA on disk, by any writer: the factors of each layer, read when asked for.

Nothing but the files' own words is trusted: shapes and dtypes are checked before values are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from vera_convert import rules
from vera_convert.adapter.lora_record import (
    DIFFUSERS_NAME,
    GGUF_NAME,
    LORA_WEIGHTS,
    MLX_NAME,
    RECORD_KEY,
    parse_record,
)
from vera_convert.adapter.names import PREFIX
from vera_convert.dtypes import FLOATS
from vera_convert.errors import CheckpointError, SurroundingsError
from vera_convert.files.file_names import CONFIG_NAME, WEIGHTS_NAME
from vera_convert.files.reading import ByteSource, open_local
from vera_convert.files.strict_json import read_json
from vera_convert.files.tensorfile import TensorData, TensorFile, from_file
from vera_convert.lora.engines import EngineName, Form
from vera_convert.lora.forms import DIFFUSERS_METADATA
from vera_convert.lora.gguf_form import restored_B
from vera_convert.lora.gguf_reading import read_gguf
from vera_convert.tables import table
from vera_convert.text import printable

_CONFIG_LIMIT = 10_000_000
_FORMS = {WEIGHTS_NAME: Form.PEFT, DIFFUSERS_NAME: Form.DIFFUSERS, MLX_NAME: Form.MLX}
_FORM_REMEDY = "Pass the LoRA's folder. To compare two forms of an adapter, use --adapter."
_PARTS = {".lora_A.weight": 0, ".lora_B.weight": 1, ".lora_a": 0, ".lora_b": 1}


Scaling = Callable[[str, int], float]
"""Returns the factor of a module's product, by the path and the rank of the module."""


@dataclass(frozen=True, slots=True)
class ReadLayer:
    """One layer of a LoRA on disk.

    Attributes:
        lora_A: (rank, in), or (in, rank) if transposed.
        lora_B: (out, rank), or (rank, out) if transposed.
        scaling: the factor of the product.
        transposed: whether the factors are stored in MLX-LM's orientation.
        heads: if not 0, the rows of lora_B lie in llama.cpp's order for so many heads.
    """

    lora_A: TensorData  # noqa: N815 -- the matrix is called A
    lora_B: TensorData  # noqa: N815
    scaling: float
    transposed: bool = False
    heads: int = 0

    @property
    def rank(self) -> int:
        """The rank."""
        return self.lora_A.shape[1 if self.transposed else 0]

    @property
    def shape(self) -> tuple[int, int]:
        """The layer's outputs and inputs."""
        if self.transposed:
            return self.lora_B.shape[1], self.lora_A.shape[0]
        return self.lora_B.shape[0], self.lora_A.shape[1]

    def factors(self) -> tuple[NDArray[Any], NDArray[np.float64]]:
        """Read lora_A (rank, in), and lora_B (out, rank) times the scaling."""
        lora_A, lora_B = self.lora_A.array(), self.lora_B.array().astype(np.float64) * self.scaling
        lora_B = restored_B(lora_B, self.heads) if self.heads else lora_B
        return (lora_A.T, lora_B.T) if self.transposed else (lora_A, lora_B)


@dataclass(frozen=True, slots=True)
class ReadLora:
    """A LoRA on disk.

    Attributes:
        layers: the layers, by the path of the module.
        others: tensors of no layer, by name: heads and biases.
        record: what this package recorded when it wrote the LoRA; None for another's LoRA.
        form: the files in which the LoRA lies.
        config: the config of PEFT or MLX-LM, or Diffusers' metadata; None if there is none.
        architecture: of a GGUF file, llama.cpp's name of the base's architecture; else empty.
    """

    layers: Mapping[str, ReadLayer]
    others: Mapping[str, TensorData] = field(default_factory=dict)
    record: Mapping[str, object] | None = None
    form: Form = Form.PEFT
    config: Mapping[str, object] | None = None
    architecture: str = ""

    @property
    def engine(self) -> str:
        """The engine in the record; PEFT without a record."""
        return str(self.options.get("for", EngineName.PEFT))

    @property
    def options(self) -> Mapping[str, object]:
        """The options of the conversion, from the record."""
        found = (self.record or {}).get("options")
        return found if isinstance(found, Mapping) else {}


@contextmanager
def open_lora(folder: Path) -> Iterator[ReadLora]:
    """Open the LoRA in a folder; the tensors can be read until the context ends.

    Raises:
        CheckpointError: the files are malformed, or are of no LoRA.
        SurroundingsError: there is no such folder, or a file cannot be read.
    """
    if not folder.is_dir():
        raise SurroundingsError(f"there is no folder {printable(str(folder))}.")
    weights = next((name for name in LORA_WEIGHTS if (folder / name).exists()), None)
    if weights is None:
        raise _unreadable(folder.name, f"the folder holds none of {', '.join(LORA_WEIGHTS)}")
    with open_local(folder / weights, within=folder) as source:
        if weights == GGUF_NAME:
            yield _in_gguf(source)
            return
        file = TensorFile(source)
        metadata, form = file.header.metadata, _FORMS[weights]
        config = _metadata(metadata) if form is Form.DIFFUSERS else _config(folder)
        tensors = {name: from_file(file, name) for name in file.header.tensors}
        layers, others = _sorted(tensors, _scaling(config, form), form)
        yield ReadLora(layers, others, parse_record(metadata.get(RECORD_KEY)), form, config)


def _in_gguf(source: ByteSource) -> ReadLora:
    file = read_gguf(source)
    if not _is_number(file.alpha):
        raise _unreadable(GGUF_NAME, "its alpha is no usable number")
    scaling = _by_alpha({"lora_alpha": file.alpha or None}, None)
    layers, others = _sorted(file.tensors, scaling, Form.GGUF)
    record = file.metadata.get(RECORD_KEY)
    record = parse_record(record) if isinstance(record, str) else None
    return ReadLora(layers, others, record, Form.GGUF, architecture=file.architecture)


def _config(folder: Path) -> Mapping[str, object]:
    with open_local(folder / CONFIG_NAME, within=folder) as source:
        config, _ = read_json(source, limit=_CONFIG_LIMIT, pythons_numbers=True)
    if not isinstance(config, dict):
        raise _unreadable(CONFIG_NAME, "it is no JSON object")
    return config


def _metadata(metadata: Mapping[str, str]) -> Mapping[str, object] | None:
    """Return Diffusers' metadata of a LoRA without the component's name."""
    found = parse_record(metadata.get(DIFFUSERS_METADATA))
    return found and {name.rpartition(".")[2]: value for name, value in found.items()}


def _scaling(config: Mapping[str, object] | None, form: Form) -> Scaling:
    """Return the scaling that a config of PEFT or MLX-LM, or Diffusers' metadata asks for."""
    fields = config or {}
    if form is Form.DIFFUSERS:
        return _by_alpha(fields, None)
    if form is Form.MLX:
        parameters = fields.get("lora_parameters")
        factor = parameters.get("scale") if isinstance(parameters, dict) else None
        if fields.get("fine_tune_type", "lora") != "lora" or not _is_number(factor):
            raise _unreadable(CONFIG_NAME, "its fine_tune_type is not lora, or it has no scale")
        return lambda _module, _rank: float(factor)
    kind = fields.get("peft_type")
    if kind == "VERA":
        reason = "this is a VeRA adapter, not a LoRA."
        found = rules.LORA_UNREADABLE.at(CONFIG_NAME, reason).with_remedy(_FORM_REMEDY)
        raise CheckpointError(found)
    if kind != "LORA":
        raise _unreadable(CONFIG_NAME, f"its peft_type is {printable(str(kind))}, not LORA")
    return _by_alpha(fields, 8)


def _by_alpha(config: Mapping[str, object], default: float | None) -> Scaling:
    """Return the scaling by PEFT's fields, which divide an alpha by the rank or by its root.

    Args:
        config: the fields; the alphas of single modules stand by a path or the end of a path.
        default: the alpha if the config names none; None for the rank, which is a scaling of 1.
    """
    alpha, patterns = config.get("lora_alpha", default), config.get("alpha_pattern") or {}
    malformed = _unreadable(CONFIG_NAME, "lora_alpha or alpha_pattern is malformed")
    if not isinstance(patterns, dict) or not all(map(_is_number, patterns.values())):
        raise malformed
    if alpha is not None and not _is_number(alpha):
        raise malformed
    others = table(__file__, "peft_targets.toml")["other_loras"].split()
    other = next((field for field in others if config.get(field)), None)
    if other is not None:
        raise _unreadable(CONFIG_NAME, f"{other} is set, so the layers are no plain LoRA")
    is_rank_stabilized = bool(config.get("use_rslora"))

    def scaling(module: str, rank: int) -> float:
        own = (each for name, each in patterns.items() if f".{module}".endswith(f".{name}"))
        own_alpha = next(own, alpha)
        divisor = math.sqrt(rank) if is_rank_stabilized else rank
        return 1.0 if own_alpha is None else own_alpha / divisor

    return scaling


def _sorted(
    tensors: Mapping[str, TensorData], scaling: Scaling, form: Form
) -> tuple[dict[str, ReadLayer], dict[str, TensorData]]:
    """Return the layers, and the other tensors by name."""
    found: dict[str, list[TensorData | None]] = {}
    others: dict[str, TensorData] = {}
    for name, tensor in tensors.items():
        ending = next((end for end in _PARTS if name.endswith(end)), None)
        if ending is None:
            others[name] = tensor
            continue
        module = name.removesuffix(ending)
        if form is Form.GGUF:
            module = module.removesuffix(".weight")
        # Diffusers puts the component of the pipeline before the path.
        is_diffusers = form is Form.DIFFUSERS
        module = module.partition(".")[2] if is_diffusers else module.removeprefix(PREFIX)
        found.setdefault(module, [None, None])[_PARTS[ending]] = tensor
    layers = {}
    for module, (lora_A, lora_B) in found.items():
        if lora_A is None or lora_B is None:
            raise _unreadable(module, "one of lora_A and lora_B is missing")
        layer = ReadLayer(lora_A, lora_B, 1.0, transposed=form is Form.MLX)
        _require_sound(module, layer)
        layers[module] = replace(layer, scaling=scaling(module, layer.rank))
    return layers, others


def _require_sound(module: str, layer: ReadLayer) -> None:
    """Refuse factors whose shapes or dtypes make no product."""
    lora_A, lora_B = layer.lora_A, layer.lora_B
    if len(lora_A.shape) != 2 or len(lora_B.shape) != 2:
        raise _unreadable(module, "lora_A or lora_B is no matrix")
    other_rank = lora_B.shape[0 if layer.transposed else 1]
    if layer.rank != other_rank or not math.prod((*lora_A.shape, *lora_B.shape)):
        reason = f"lora_A is {list(lora_A.shape)}, lora_B {list(lora_B.shape)}"
        raise _unreadable(module, reason)
    if not {lora_A.dtype, lora_B.dtype} <= FLOATS:
        raise _unreadable(module, f"its factors are {lora_A.dtype} and {lora_B.dtype}")


def _unreadable(place: str, reason: str) -> CheckpointError:
    return CheckpointError(rules.LORA_UNREADABLE.at(printable(place), f"{reason}."))


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9
