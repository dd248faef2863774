"""The dimensions of the shared A (r, inputs) and B (outputs, r): the same for every command.

PEFT matches the config's targets with the layers *of the wrapped model*. The widest of the
layers give A and B their dimensions, and PEFT saves two vectors for each layer. The adapter's file
therefore names the relevant layers, and the base supplies the numbers of inputs.

The files of a base can hold further layers, also matched by the targets. A further layer changes
the dimensions only if the model class builds the layer. PEFT then saves vectors for the layer, too.

`shared_dims` calls the dimensions proven in three cases:

1. Every further layer is at most as wide as the layers of the adapter's file.
2. The file stores A and B, or the fingerprint of A and B. The stored dimensions fit the layers of
   the file, alone or together with some of the further layers.
3. The class leaves out every wider further layer. The layer's number is at least the number of
   layers in the base's config, or the layer predicts several tokens (``mtp``).

In all other cases the file is either complete, or was cut after the training:

- A file with a hole was cut. A hole is a layer built by the class and absent from the file,
  although other layers of the file have the name of the hole. `DIMS_AMBIGUOUS` refuses the adapter
  and names the dimensions with the hole and without the hole. An adapter with stored A and B
  passes, because nothing is drawn; PEFT requires the dimensions with the hole.
- A file without a hole counts as complete. The layers of the file give the dimensions, and
  `TARGETS_DISAGREE` warns and names the dimensions with the further layers.

PEFT sizes A and B before it shortens a list of 20 or more full names. Each listed layer therefore
counts, even if ``layers_to_transform`` keeps PEFT from adapting the layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from vera_convert import rules
from vera_convert.adapter.adapter import Adapter
from vera_convert.adapter.config import VeraConfig
from vera_convert.errors import CheckpointError
from vera_convert.files.file_names import CONFIG_NAME
from vera_convert.rules import Finding
from vera_convert.targets.built import BuiltLayers
from vera_convert.targets.linear import Linear, ModelLayers
from vera_convert.targets.matching import Adapted, adapted
from vera_convert.text import listed, printable

Layers = Mapping[str, Linear]


class Dims(NamedTuple):
    """Columns of A and rows of B."""

    inputs: int
    outputs: int

    def __str__(self) -> str:
        return f"{self.inputs} inputs and {self.outputs} outputs"


class SharedDims(NamedTuple):
    """The dimensions of A and B.

    Attributes:
        in_features: columns of A.
        out_features: rows of B.
        adapted: the adapted layers, in the model's order. PEFT casts A and B to the layers' dtypes.
        findings: warnings and notes about the layers behind the dimensions.
    """

    in_features: int
    out_features: int
    adapted: tuple[str, ...]
    findings: tuple[Finding, ...]


def shared_dims(
    adapter: Adapter, model: ModelLayers, own: Layers, built: BuiltLayers
) -> SharedDims:
    """Return the dimensions of A and B, proven or with a warning.

    Args:
        adapter: the adapter.
        model: the linear layers of the base's files or of a model, by the adapter's names.
        own: the layers of `model` with vectors in the adapter's file.
        built: which layers the model's class builds.

    Raises:
        CheckpointError: the targets match narrower layers than the file adapts, or the file has
            holes with a possible effect on the dimensions.
    """
    matched = _matched(adapter, model, own)
    findings = [*_unmatched(adapter, own, matched)]
    counted = {**own, **matched.only_sized}
    in_file = _widest(_sizes(counted))
    further = {name: each for name, each in matched.further.items() if name not in counted}
    possible = {name: each for name, each in further.items() if built.has(name) is not False}
    holes = {name: each for name, each in possible.items() if built.is_missing(name)}
    dims, is_proven = _dims(adapter, in_file, possible, holes)
    if holes:
        reason = f"{_lacking(holes)}; {_these(holes)} would have no effect."
        findings.append(rules.TARGETS_DISAGREE.at(adapter.place, reason))
    elif further:
        other = None if is_proven else _widest([in_file, *_sizes(possible)])
        findings.append(_also_matched(adapter, further, dims, other))
    order = tuple(name for name in model.linear if name in own)
    return SharedDims(*dims, order, tuple(findings))


def _sizes(layers: Layers) -> list[Dims]:
    return [Dims(each.in_features, each.out_features) for each in layers.values()]


def _widest(sizes: Iterable[Dims]) -> Dims:
    """Return the smallest dimensions with room for every size."""
    inputs, outputs = zip(*sizes, strict=True)
    return Dims(max(inputs), max(outputs))


def _suffice(dims: Dims, size: Dims) -> bool:
    return _widest([dims, size]) == dims


# --- the matches of the config's targets ---------------------------------------------------------


class _Matched(NamedTuple):
    """The layers that the config's targets match.

    Attributes:
        own: layers with vectors in the file.
        only_sized: layers in the config's list of full names, left out by PEFT when adapting.
        further: other layers, by the names and shapes in the base's files.
    """

    own: Layers
    only_sized: Layers
    further: Layers


def _matched(adapter: Adapter, model: ModelLayers, own: Layers) -> _Matched:
    config, targets = adapter.config, adapter.config.target_modules
    everything = certain = _adapted(model, config)
    if isinstance(targets, tuple) and config.layers_to_transform is not None:
        # Other layers of the files must not decide how PEFT shortens the list.
        known = {*own, *targets}
        linear = {name: each for name, each in model.linear.items() if name in known}
        certain = _adapted(model._replace(linear=linear), config)
    return _Matched(
        own={name: each for name, each in certain.layers.items() if name in own},
        only_sized={name: each for name, each in certain.only_sized.items() if name not in own},
        further={name: each for name, each in everything.layers.items() if name not in own},
    )


def _adapted(model: ModelLayers, config: VeraConfig) -> Adapted:
    try:
        return adapted(model, config)
    except CheckpointError as error:
        if error.findings[0].rule is not rules.TARGETS_MATCH_NOTHING:
            raise
        return Adapted({}, 0, 0)


def _unmatched(adapter: Adapter, own: Layers, matched: _Matched) -> Iterator[Finding]:
    """Warn of layers in the file if the targets miss the layers, so PEFT ignores the vectors.

    Raises:
        CheckpointError: PEFT's A and B would be too small for the ignored layers.
    """
    fewer = [name for name in own if name not in matched.own]
    if not fewer:
        return
    if matched.own:
        needed = _widest(_sizes(own))
        given = _widest([*_sizes(matched.own), *_sizes(matched.only_sized)])
        if not _suffice(given, needed):
            reason = (
                f"the layers that target_modules matches have up to {given}, those of the adapter "
                f"{needed}."
            )
            raise CheckpointError(rules.PROJECTIONS_TOO_NARROW.at(adapter.place, reason))
    elif not matched.only_sized:
        reason = f"the config's targets match none of the {len(own)} layers that the file adapts."
        yield rules.TARGETS_MATCH_NOTHING.as_warning().in_file(CONFIG_NAME, reason)
        return
    reason = (
        f"the config's targets match {len(matched.own)} of the {len(own)} layers that the file "
        f"adapts; PEFT leaves layers such as {printable(min(fewer))} unadapted."
    )
    yield rules.TARGETS_DISAGREE.at(adapter.place, reason)


# --- layers of the base's files alone ------------------------------------------------------------


def _dims(adapter: Adapter, in_file: Dims, possible: Layers, holes: Layers) -> tuple[Dims, bool]:
    """Return the dimensions, and whether other dimensions are impossible.

    Args:
        adapter: the adapter.
        in_file: the dimensions of the layers in the adapter's file.
        possible: further layers, perhaps built by the model's class.
        holes: the layers of `possible` expected in the file.

    Raises:
        CheckpointError: the file lacks layers with a possible effect on the dimensions.
    """
    if _widest([in_file, *_sizes(possible)]) == in_file:
        return in_file, True
    with_holes = _widest([in_file, *_sizes(holes)])
    record = adapter.projections or adapter.fingerprint
    if record is not None:
        dims = Dims(record.in_features, record.out_features)
        inside = [size for size in _sizes(possible) if _suffice(dims, size)]
        # PEFT requires stored A and B to suit every adapted layer, even a layer without vectors.
        least = in_file if adapter.projections is None else with_holes
        if _widest([in_file, *inside]) == dims and _suffice(dims, least):
            return dims, True
    elif with_holes != in_file:
        reason = (
            f"{_lacking(holes)}. A and B have {in_file} without {_these(holes)}, and {with_holes} "
            f"with {_these(holes)}."
        )
        raise CheckpointError(rules.DIMS_AMBIGUOUS.at(adapter.place, reason))
    return with_holes, False


def _lacking(holes: Layers) -> str:
    names = listed(holes, 1, noun="layer")
    return f"the file has no vectors for {names}, which the config's targets match in the base"


def _these(holes: Layers) -> str:
    return "this layer" if len(holes) == 1 else "these layers"


def _also_matched(adapter: Adapter, further: Layers, dims: Dims, other: Dims | None) -> Finding:
    """Return the finding on further layers, matched by the targets and absent from the file.

    Args:
        adapter: the adapter.
        further: the further layers.
        dims: the dimensions of A and B.
        other: the dimensions if PEFT adapts the further layers, too; None if `dims` are proven.
    """
    names = listed(sorted(further), 1, noun="layer")
    said = f"in the base's files the config's targets match {names} too, which the file lacks"
    if other is None:
        reason = f"{said}. A and B have {dims} in either case."
        return rules.TARGETS_DISAGREE.as_note().at(adapter.place, reason)
    reason = (
        f"{said}. A and B have {dims}, as PEFT draws them for the layers that the file adapts. "
        f"If the model class builds the other layers too, PEFT draws A and B with {other}."
    )
    return rules.TARGETS_DISAGREE.at(adapter.place, reason)
