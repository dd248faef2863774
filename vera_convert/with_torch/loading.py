"""Make the tensors of a new adapter, or read the tensors of a stored adapter, for a model.

    config ── complete ──► targets ── draw A and B, round ──► first d and b ─┐
                                                                             ├──► Contents
    folder ── read ──► compare with the model ──► A and B in effect ─────────┘

Values pass through the dtypes of the layers, as in PEFT, so that the results are bit-equal.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from vera_convert import rules
from vera_convert.adapter.adapter import Adapter
from vera_convert.adapter.config import SAVED_BY_TASK, VeraConfig, parse_config
from vera_convert.adapter.names import A_NAME, PREFIX
from vera_convert.adapter.opening import open_adapter
from vera_convert.adapter.saved_modules import replaced_name
from vera_convert.base.dims import shared_dims
from vera_convert.base.facts import BaseFacts
from vera_convert.base.strategies import moved
from vera_convert.conversion.projections import ProjectionSource, check_size
from vera_convert.conversion.proof import other_dims
from vera_convert.draws.generator import Draw, Rounding, Variant, rounding_on_base
from vera_convert.dtypes import NAMES, SIXTEEN_BIT
from vera_convert.errors import CheckpointError, UsageError, refuse
from vera_convert.files.file_names import CONFIG_NAME
from vera_convert.merging.in_effect import in_effect
from vera_convert.rules import Finding
from vera_convert.targets.built import BuiltLayers
from vera_convert.targets.linear import Linear, ModelLayers
from vera_convert.targets.matching import adapted, condensed, matching, resolve
from vera_convert.text import printable
from vera_convert.with_torch.arrays import to_array, to_tensor
from vera_convert.with_torch.layer import weight_dtype
from vera_convert.with_torch.modules import layers_of, modules_of, own_tensors
from vera_convert.with_torch.saving import config_text

_CASTS = {getattr(torch, NAMES[header]): rounding_on_base(header) for header in SIXTEEN_BIT}


@dataclass(frozen=True, slots=True, eq=False)
class Contents:
    """An adapter that fits a model.

    Attributes:
        config: the config to save.
        vectors: d (r,) and b (out,) by the path of the layer, in the model's order.
        A: (r, max_in or more).
        B: (max_out or more, r).
        replacements: values for the model's own parameters, by the parameter's name in the model.
        findings: warnings and notes.
    """

    config: VeraConfig
    vectors: Mapping[str, tuple[Tensor, Tensor]]
    A: Tensor
    B: Tensor
    replacements: Mapping[str, Tensor] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()


def _rounding(layers: Iterable[nn.Module]) -> Rounding:
    """Return the rounding of drawn values by the dtypes of the adapted layers, in order."""
    dtypes = dict.fromkeys(weight_dtype(layer) for layer in layers)
    casts = [_CASTS[dtype] for dtype in dtypes if dtype in _CASTS]
    if casts:
        return Rounding("+".join(casts))
    return Rounding.NONE if set(dtypes) == {torch.float64} else Rounding.FP32


# --- a new adapter -------------------------------------------------------------------------------


def new_contents(config: VeraConfig, model: nn.Module, *, variant: Variant) -> Contents:
    """Return the initial tensors of a new adapter.

    Raises:
        CheckpointError: a field of the config has an invalid value, or the config matches no layer.
        UsageError: the config names a layer that cannot be adapted, or a missing module to save.
    """
    layers = layers_of(model)
    config = _completed(config, model, layers)
    _check_named(config, model, layers.linear)
    targets = adapted(layers, config)
    config = replace(
        config,
        target_modules=_condensed(config, model),
        fan_in_fan_out=[*targets.layers.values()][-1].conv1d,
    )
    modules = {path: model.get_submodule(path) for path in targets.layers}
    rounding, key = _rounding(modules.values()), config.projection_prng_key
    drawn = Draw(variant, key, config.r, targets.max_in, targets.max_out, rounding)
    check_size(drawn, place=layers.source)
    A, B = map(to_tensor, drawn.matrices())
    vectors = {
        path: _first_vectors(config, dims.out_features, weight_dtype(modules[path]))
        for path, dims in targets.layers.items()
    }
    return Contents(config, vectors, A, B)


def _completed(config: VeraConfig, model: nn.Module, layers: ModelLayers) -> VeraConfig:
    """Return a config with all fields that PEFT fills in for a wrapped model.

    Raises:
        CheckpointError: PEFT refuses the value of a field, or no targets are known.
    """
    inference_mode = config.inference_mode  # the file's is always true
    config = parse_config(config_text(config), place=type(config).__name__).config
    described = {
        "base_model_class": type(model).__name__,
        "parent_library": type(model).__module__,
    }
    return replace(
        config,
        inference_mode=inference_mode,
        target_modules=resolve(layers, config),
        modules_to_save=config.saved_modules or None,
        auto_mapping=config.auto_mapping or (None if config.task_type else described),
        base_model_name_or_path=config.base_model_name_or_path
        or getattr(model, "name_or_path", None)
        or None,
    )


def _condensed(config: VeraConfig, model: nn.Module) -> tuple[str, ...] | str | None:
    """Return target_modules as PEFT saves the field: 20 or more names become suffixes."""
    targets = config.target_modules
    if targets is None or isinstance(targets, str):
        return targets
    return condensed([path for path, _ in modules_of(model) if path], targets)


def _check_named(config: VeraConfig, model: nn.Module, linear: Collection[str]) -> None:
    """Refuse targets that cannot be adapted, and modules to save that the model lacks."""
    modules = {path: module for path, module in modules_of(model) if path}
    unfit = matching([path for path in modules if path not in linear], config)
    if unfit:
        kind = type(modules[unfit[0]]).__name__
        raise UsageError(
            f"target_modules matches {printable(unfit[0])}, a {kind}. VeRA adapts torch.nn.Linear, "
            "transformers' Conv1D and their subclasses only: name the layers more closely."
        )
    implied = SAVED_BY_TASK.get(config.task_type or "", ())
    for name in config.modules_to_save or ():
        if name not in implied and not any(path.endswith(name) for path in modules):
            raise UsageError(
                f"modules_to_save names {printable(name)}, which no module's path ends with."
            )


def _first_vectors(
    config: VeraConfig, outputs: int, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Return the initial d (r,) and b (out,) for a layer of this dtype.

    The layer keeps float32 vectors, with values rounded to its dtype.
    """
    d = torch.randn(config.r, dtype=torch.float32)  # always, as in PEFT: later draws must agree
    b = torch.ones(outputs, dtype=torch.float32)
    if config.init_weights:
        d.fill_(config.d_initial)
        b.zero_()
    return d.to(dtype or torch.float32), b.to(dtype or torch.float32)


# --- a stored adapter ----------------------------------------------------------------------------


def stored_contents(
    folder: Path,
    model: nn.Module,
    *,
    config: VeraConfig | None,
    projections: ProjectionSource,
    variant: Variant | None,
    rounding: Rounding | None,
    key_map: Sequence[tuple[str, str]],
) -> Contents:
    """Read an adapter as PEFT 0.21 does: A and B as stored, or drawn and rounded for this model.

    Unlike PEFT, refuse an adapter with a tensor that has no place in the model.

    Args:
        folder: the folder of the adapter.
        model: the model to adapt; layers can be wrapped already.
        config: a config to use instead of the folder's, which may be missing.
        projections: the source of A and B: ``auto``, ``file`` or ``key``.
        variant: the variant of the generator, if A and B are drawn and no fingerprint names it.
        rounding: the rounding of drawn values; None to derive it from the layers' dtypes.
        key_map: pairs (OLD, NEW). If the names do not fit the model, the first pair with which all
            layers fit is used.

    Raises:
        CheckpointError: the adapter is malformed, or does not fit the model.
        UsageError: stored projections are required and missing.
        SurroundingsError: a file cannot be read.
    """
    layers = layers_of(model)
    with _config_file(config) as file, open_adapter(folder, config=file) as opened:
        adapter = _renamed(opened, layers, key_map)
        own = _matched(adapter, layers, model)
        dims = shared_dims(adapter, layers, own, BuiltLayers({}, own, all_built=True))
        base_facts = BaseFacts(
            dims.in_features,
            dims.out_features,
            rounding or _rounding(model.get_submodule(path) for path in dims.adapted),
            source=layers.source,
        )
        pair = in_effect(adapter, base_facts, projections=projections, variant=variant)
        _require_width(pair.A.shape[1], own, layers.source)
        for _ in adapter.layers:
            torch.randn(adapter.config.r)  # PEFT draws d before reading d: see `_first_vectors`
        return Contents(
            config=replace(adapter.config, modules_to_save=adapter.config.saved_modules or None),
            vectors={
                path: (to_tensor(each.lambda_d.array()), to_tensor(each.lambda_b.array()))
                for path in layers.linear
                if (each := adapter.layers.get(path)) is not None
            },
            A=to_tensor(pair.A),
            B=to_tensor(pair.B),
            replacements=_replacements(adapter, own_tensors(model)),
            findings=(
                *adapter.findings,
                *dims.findings,
                *other_dims(adapter, base_facts),
                *pair.findings,
            ),
        )


@contextmanager
def _config_file(config: VeraConfig | None) -> Iterator[Path | None]:
    """Write a config to a temporary file inside the block."""
    if config is None:
        yield None
        return
    with TemporaryDirectory(prefix="vera-convert-") as made:
        path = Path(made, CONFIG_NAME)
        path.write_bytes(config_text(config))
        yield path


def _renamed(adapter: Adapter, layers: ModelLayers, key_map: Sequence[tuple[str, str]]) -> Adapter:
    """Return the adapter with paths renamed by the first pair with which all layers fit."""
    if all(path in layers.linear for path in adapter.layers):
        return adapter
    for old, new in key_map:
        found = {moved(old, new, path): layer for path, layer in adapter.layers.items()}
        if all(path in layers.linear for path in found) and len(found) == len(adapter.layers):
            replacements = (
                tensor._replace(name=PREFIX + moved(old, new, tensor.name.removeprefix(PREFIX)))
                for tensor in adapter.replacements
            )
            return replace(adapter, layers=found, replacements=tuple(replacements))
    return adapter


def _matched(adapter: Adapter, layers: ModelLayers, model: nn.Module) -> dict[str, Linear]:
    """Return the model's layers for the adapter's vectors; none may be missing."""
    absent = [path for path in adapter.layers if path not in layers.linear]
    if absent:
        found = dict(modules_of(model)).get(absent[0])
        kind = "" if found is None else f" (a {type(found).__name__})"
        reason = (
            f'{len(absent)} of {len(adapter.layers)} layers, such as "{printable(absent[0])}"'
            f"{kind}, are no linear layers of the model."
        )
        raise CheckpointError(rules.NAMES_DIFFER.at(layers.source, reason))
    matched = {path: layers.linear[path] for path in adapter.layers}
    wrong = [
        rules.SHAPES_DIFFER.at(
            printable(path),
            f"lambda_b has {adapter.layers[path].out_features} values, the layer "
            f"{dims.out_features} outputs.",
        )
        for path, dims in matched.items()
        if adapter.layers[path].out_features != dims.out_features
    ]
    refuse(wrong)
    return matched


def _require_width(columns: int, own: Mapping[str, Linear], model: str) -> None:
    """Refuse an A with fewer columns than a layer has inputs."""
    widest = max(layer.in_features for layer in own.values())
    if columns < widest:
        reason = f"it has {columns} columns, a layer of {model} {widest} inputs."
        raise CheckpointError(rules.PROJECTIONS_TOO_NARROW.in_tensor(A_NAME, reason))


def _replacements(adapter: Adapter, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the replacements of the model's own tensors, by the model's names."""
    found: dict[str, Tensor] = {}
    wrong: list[Finding] = []
    copies = {*adapter.base_copies.values()}
    for tensor in adapter.replacements:
        name, place = replaced_name(tensor.name), printable(tensor.name)
        target = own.get(name)
        if target is None:
            wrong.append(
                rules.REPLACEMENT_UNKNOWN.at(place, f"the model has no {printable(name)}.")
            )
        elif tuple(target.shape) != tensor.shape:
            reason = f"its shape is {list(tensor.shape)}, the model's {list(target.shape)}."
            wrong.append(rules.REPLACEMENT_SHAPE.at(place, reason))
        elif tensor not in copies:
            found[name] = to_tensor(tensor.array())
        elif (tensor.array().astype(to_array(target).dtype) != to_array(target)).any():
            wrong.append(rules.BASE_COPY_DIFFERS.at(place, "its values differ from the model's."))
    refuse(wrong)
    return found
