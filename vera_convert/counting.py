"""The parameters and bytes of a VeRA adapter before training, compared with LoRA.

The sizes of files are exact: header, names and padding as PEFT writes.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vera_convert import rules
from vera_convert.adapter.config import MAX_RANK, VeraConfig
from vera_convert.adapter.fingerprint import METADATA_KEY, to_text
from vera_convert.adapter.names import PREFIX
from vera_convert.arguments import optional, place, text, texts, whole_number
from vera_convert.base.model import read_base, read_config_file, read_model_config
from vera_convert.base.quantized.recognize import sections
from vera_convert.base.quantized.targets import hides_shapes
from vera_convert.base.quantized.unpack import unpacked
from vera_convert.conversion.sizes import NO_HASHES, empty_pair
from vera_convert.conversion.transforms import file_size, fingerprint_of
from vera_convert.draws.generator import Draw, Variant, rounding_on_base
from vera_convert.dtypes import BITS, FLOATS
from vera_convert.errors import CheckpointError, ParameterError, UsageError
from vera_convert.files.header import Entry, TensorInfo
from vera_convert.files.reading import open_local
from vera_convert.hub.lookup import HubAccess, hub_access_of, locate
from vera_convert.targets.architectures import layers_from_config
from vera_convert.targets.linear import (
    LayerGroup,
    Linear,
    ModelLayers,
    layer_groups,
    layers_from_shapes,
)
from vera_convert.targets.matching import Adapted, adapted, is_all_linear
from vera_convert.text import listed, printable, short_repr

_METADATA = {"format": "pt"}


@dataclass(frozen=True, slots=True)
class MethodSize:
    """The trainable parameters of one method, and the bytes of the file.

    Attributes:
        parameters: trainable parameters.
        parameter_bytes: bytes of the parameters in float32, the dtype that PEFT keeps.
        file_bytes: bytes of ``adapter_model.safetensors`` as PEFT writes the file.
    """

    parameters: int
    parameter_bytes: int
    file_bytes: int


@dataclass(frozen=True, slots=True)
class Count:
    """The parameters and bytes of a planned adapter on a model.

    Attributes:
        source: the origin of the layers: a model class, or the tensors' headers.
        rank: r, of VeRA and LoRA alike.
        targets: the given names; empty if PEFT's default for the model's type was used.
        groups: the adapted layers, in the model's order.
        max_in: columns of A, which is (r, max_in).
        max_out: rows of B, which is (max_out, r).
        vera: VeRA, with A and B in the file (PEFT's default).
        stripped_bytes: size of the file that `strip` makes of VeRA's file, with the fingerprint.
        lora: LoRA of the same rank on the same layers.
    """

    source: str
    rank: int
    targets: tuple[str, ...]
    groups: tuple[LayerGroup, ...]
    max_in: int
    max_out: int
    vera: MethodSize
    stripped_bytes: int
    lora: MethodSize

    __repr__ = short_repr

    @property
    def layers(self) -> int:
        """The number of adapted layers."""
        return sum(group.layers for group in self.groups)


def count(
    model: ModelLayers | Mapping[str, object] | str | Path | HasConfig,
    *,
    rank: int,
    targets: Sequence[str] | str = (),
    revision: str | None = None,
    access: HubAccess | None = None,
) -> Count:
    """Count the parameters and bytes of a VeRA adapter, and of a LoRA of the same rank.

    Args:
        model: a folder, a repo on the Hub, a ``config.json`` or its value, a config of
            transformers, or the model's layers.
        rank: the rank r.
        targets: names as in PEFT's list form, or all-linear alone; none means PEFT's default.
        revision: the model's branch, tag or commit on the Hub.
        access: how the Hub is reached.

    Raises:
        UsageError: the rank is out of range, or a target matches no layer.
        CheckpointError: no targets are given and PEFT has no default for the model's type.

    Example:
        >>> count("base", rank=4, targets="q_proj,v_proj").vera.parameters
        64
    """
    rank, targets = whole_number("rank", rank), texts("targets", targets)
    if rank > MAX_RANK:
        raise ParameterError("rank", f"is {rank}: give a rank up to {MAX_RANK}.")
    if not isinstance(model, ModelLayers):
        model = _layers(model, revision, access)
    config = VeraConfig(r=rank, target_modules=_checked(model, targets))
    chosen = adapted(model, config)
    heads = [*_copied_heads(model, chosen, targets)]
    vera, lora = [*_vera_tensors(chosen.layers, rank)], [*_lora_tensors(chosen.layers, rank)]
    pair = empty_pair(rank, *chosen.dims, dtype="F32")
    return Count(
        source=model.source,
        rank=rank,
        targets=tuple(targets),
        groups=layer_groups(
            (name, layer.out_features, layer.in_features) for name, layer in chosen.layers.items()
        ),
        max_in=chosen.max_in,
        max_out=chosen.max_out,
        vera=_size(vera, (*heads, *pair)),
        stripped_bytes=file_size((*vera, *heads), _stripped_metadata(chosen, config, model.dtype)),
        lora=_size(lora, heads),
    )


class HasConfig(Protocol):
    """A config of transformers."""

    def to_dict(self) -> dict[str, object]:
        """Return the value of the ``config.json``."""
        ...


def _layers(model: object, revision: str | None, access: HubAccess | None) -> ModelLayers:
    """Read the layers of a model from the model, its ``config.json`` or its config."""
    revision = optional(text, "revision", revision)
    access = hub_access_of(access)
    config = model if isinstance(model, Mapping) else _config_of(model)
    if config is not None:
        if revision is not None:
            raise UsageError("revision has no effect on a config: leave revision out.")
        return layers_from_config(config)
    folder = place("model", model)
    if revision is None and os.path.isfile(folder):  # noqa: PTH113 -- Path's own can raise
        return layers_of_config_file(Path(folder))
    return layers_of_base(folder, revision=revision, access=access)


def _config_of(model: object) -> Mapping[str, object] | None:
    to_dict = getattr(model, "to_dict", None)
    found = to_dict() if callable(to_dict) else None
    return found if isinstance(found, Mapping) else None


def lora_parameters(layers: Mapping[str, Linear], *, rank: int) -> int:
    """Return the parameters of LoRA on these layers: A (r, in) and B (out, r) for each."""
    return sum(rank * (layer.in_features + layer.out_features) for layer in layers.values())


# --- targets -------------------------------------------------------------------------------------


def _checked(model: ModelLayers, targets: Sequence[str]) -> tuple[str, ...] | str | None:
    """Return the targets as a config holds them, each known to match a layer."""
    if not targets:
        return None
    if any(is_all_linear(target) for target in targets):
        if len(targets) > 1:
            raise UsageError("all-linear means every linear layer: leave the other targets out.")
        return targets[0]
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in model.linear):
            reason = f"names {printable(target)}, and no layer of the model has this name"
            raise ParameterError("targets", f"{reason}; {_near(model, target)}.")
    return tuple(targets)


def _near(model: ModelLayers, target: str) -> str:
    if any(f".{name}".endswith(f".{target}") for name in model.embeddings):
        return "this is an embedding, and VeRA adapts linear layers only"
    last_names = list(dict.fromkeys(name.rpartition(".")[2] for name in model.linear))
    inside = dict.fromkeys(
        name.rpartition(".")[2] for name in model.linear if f".{target}." in f".{name}"
    )
    near = difflib.get_close_matches(target, [*last_names, *model.linear], n=4, cutoff=0.5)
    if inside:
        return f"the module holds {listed(inside, 12)}"
    if near:
        return f"similar names are {listed(near, 12)}"
    return f"there are {listed(last_names, 12)}"


# --- files, as PEFT writes them ------------------------------------------------------------------


def _stripped_metadata(chosen: Adapted, config: VeraConfig, dtype: str) -> dict[str, str]:
    """Return metadata as long as the metadata that `strip` writes.

    Args:
        chosen: the adapted layers.
        config: the adapter's config.
        dtype: the dtype of the base (safetensors' name).
    """
    drawn = Draw(Variant.FLOAT32_FUSED, config.projection_prng_key, config.r, *chosen.dims)
    pair = empty_pair(config.r, *chosen.dims, dtype="F32")
    record = fingerprint_of(pair, drawn.rounded(rounding_on_base(dtype)), NO_HASHES)
    return {**_METADATA, METADATA_KEY: to_text(record)}


def _size(trained: Sequence[TensorInfo], others: Iterable[Entry]) -> MethodSize:
    """Return the size of a method with these trained tensors, and a file with others too."""
    parameters = sum(math.prod(tensor.shape) for tensor in trained)
    return MethodSize(parameters, 4 * parameters, file_size((*trained, *others), _METADATA))


def _tensor(name: str, shape: tuple[int, ...], dtype: str = "F32") -> TensorInfo:
    return TensorInfo(name, dtype, shape, 0, BITS[dtype] // 8 * math.prod(shape))


def _vera_tensors(layers: Mapping[str, Linear], rank: int) -> Iterator[TensorInfo]:
    for name, layer in layers.items():
        yield _tensor(f"{PREFIX}{name}.vera_lambda_b", (layer.out_features,))
        yield _tensor(f"{PREFIX}{name}.vera_lambda_d", (rank,))


def _lora_tensors(layers: Mapping[str, Linear], rank: int) -> Iterator[TensorInfo]:
    for name, layer in layers.items():
        yield _tensor(f"{PREFIX}{name}.lora_A.weight", (rank, layer.in_features))
        yield _tensor(f"{PREFIX}{name}.lora_B.weight", (layer.out_features, rank))


def _copied_heads(
    model: ModelLayers, chosen: Adapted, targets: Sequence[str]
) -> Iterator[TensorInfo]:
    """Yield the heads that PEFT writes into the file whole, where lm_head itself is a target."""
    if "lm_head" in targets:
        for name in model.output_heads & chosen.layers.keys():
            shape = (chosen.layers[name].out_features, chosen.layers[name].in_features)
            yield _tensor(f"{PREFIX}{name}.base_layer.weight", shape, model.dtype)


# --- layers of a model ----------------------------------------------------------------------------


def layers_of_base(model: str, *, revision: str | None, access: HubAccess) -> ModelLayers:
    """Return a model's layers from the headers.

    If weights are absent, or if packed weights hide the layers' shapes, the config tells the
    layers.

    Raises:
        CheckpointError: the model is malformed, or the config's model type is unknown.
        SurroundingsError: finding or reading the model fails.
    """
    location = locate(model, kind="base", access=access, revision=revision)
    place = f"{location.label}/config.json"
    try:
        base = read_base(location, access)
    except CheckpointError as error:
        config = read_model_config(location, access)
        if error.findings[0].rule is not rules.BASE_WITHOUT_WEIGHTS or config is None:
            raise
        return layers_from_config(config, place=place)
    whole = unpacked(base)
    if hides_shapes(whole):
        try:
            return layers_from_config(base.config, place=place)
        except CheckpointError:
            if any(sections(base.config)):  # else the tensors only have names as a quantizer's
                whole.refuse_defects()
                raise
    view = whole.view
    shapes = {name: tensor.info.shape for name, tensor in view.tensors.items()}
    layers = layers_from_shapes(shapes, model_type=base.model_type)
    dtypes = (view.tensors[f"{module}.weight"].info.dtype for module in layers.linear)
    return layers._replace(dtype=next(filter(FLOATS.__contains__, dtypes), layers.dtype))


def layers_of_config_file(path: Path) -> ModelLayers:
    """Return a model's layers from a ``config.json``.

    Raises:
        CheckpointError: the config is malformed, or the model type is unknown.
        UsageError: the path leads to a folder.
        SurroundingsError: reading the file fails.
    """
    if os.path.isdir(path):  # noqa: PTH112 -- Path's own can raise
        shown = printable(str(path))
        raise UsageError(
            f"--config {shown} is a folder: give the config.json, or the folder with --base."
        )
    with open_local(path) as source:
        return layers_from_config(read_config_file(source), place=source.place)
