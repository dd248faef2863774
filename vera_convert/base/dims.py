"""The dimensions of the shared A (r, inputs) and B (outputs, r): one decision for every command.

PEFT sizes A and B by the widest layers that the config's targets match *in the model that PEFT
wrapped*, adapts each of these layers and saves a pair of vectors for each. So the layers in the
adapter's file are the layers that count; the base supplies their numbers of inputs. The base's
files can hold further layers that the targets match. These change the dimensions only if the model
class builds them, and then a file saved by PEFT has their vectors too.

`shared_dims` calls the dimensions proven if one of these holds:

1. No further layer of the base's files that the targets match is wider than the file's layers.
2. The file stores A and B, or the fingerprint of A and B, with the dimensions of the file's layers,
   or with those of these layers and of some of the further layers.
3. The class leaves out every further layer that is wider: the layer's number is not below the
   number of layers in the base's config, or the layer predicts several tokens (``mtp``).

If the dimensions are not proven, the file either is complete, or lacks layers that were adapted:

- The file has a hole (a layer is missing that the class builds and whose name other layers of the
  file have). Then the file was cut, and no reading is safe: `DIMS_AMBIGUOUS` refuses the adapter
  and names the dimensions of both readings. An adapter that stores A and B passes, because no A
  and B are drawn; the dimensions are those that PEFT requires with the missing layers.
- The file has no hole. Then the dimensions of the file's layers are taken, and `TARGETS_DISAGREE`
  warns and names the dimensions of the other reading.

Targets that are listed by full name, 20 or more of them, count even if ``layers_to_transform``
keeps PEFT from adapting the layer: PEFT sizes A and B before it shortens such a list.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from vera_convert.adapter.adapter import Adapter
from vera_convert.adapter.config import VeraConfig
from vera_convert.errors import CheckpointError
from vera_convert.rules import (
    DIMS_AMBIGUOUS,
    PROJECTIONS_TOO_NARROW,
    TARGETS_DISAGREE,
    TARGETS_MATCH_NOTHING,
    Finding,
)
from vera_convert.targets.built import BuiltLayers
from vera_convert.targets.linear import Linear, ModelLayers
from vera_convert.targets.matching import Adapted, adapted
from vera_convert.text import listed, printable


class Dims(NamedTuple):
    """Columns of A and rows of B."""

    inputs: int
    outputs: int

    def __str__(self) -> str:
        return f"{self.inputs} inputs and {self.outputs} outputs"


@dataclass(frozen=True, slots=True)
class SharedDims:
    """The dimensions of A and B.

    Attributes:
        in_features: columns of A.
        out_features: rows of B.
        adapted: the adapted layers, whose dtypes PEFT casts A and B to, in the model's order.
        findings: warnings and notes about the layers that the dimensions come from.
    """

    in_features: int
    out_features: int
    adapted: tuple[str, ...]
    findings: tuple[Finding, ...]


def shared_dims(
    adapter: Adapter, model: ModelLayers, own: Mapping[str, Linear], built: BuiltLayers
) -> SharedDims:
    """Return the dimensions of A and B; the module's docstring says when these are proven.

    Args:
        adapter: the adapter.
        model: the linear layers of the base's files or of a model, by the adapter's names.
        own: the layers of `model` that the adapter's file adapts.
        built: which layers the model's class builds.

    Raises:
        CheckpointError: the targets match narrower layers than the file adapts, or the file has
            holes that could change the dimensions.
    """
    matched = _matched(adapter, model, own)
    findings = [*_unmatched(adapter, own, matched)]
    counted = {**own, **matched.only_sized}
    further = {name: layer for name, layer in matched.further.items() if name not in counted}
    inside = _widest(counted.values())
    reading = _reading(adapter, inside, further, built)
    findings += _further(adapter, reading, inside, further)
    order = tuple(name for name in model.linear if name in own)
    return SharedDims(*reading.dims, order, tuple(findings))


class _Matched(NamedTuple):
    """The layers that the config's targets match.

    Attributes:
        own: layers that the file adapts.
        only_sized: layers that the config lists by full name and PEFT does not adapt.
        further: other layers, by the names and shapes in the base's files.
    """

    own: Mapping[str, Linear]
    only_sized: Mapping[str, Linear]
    further: Mapping[str, Linear]


def _matched(adapter: Adapter, model: ModelLayers, own: Mapping[str, Linear]) -> _Matched:
    config = adapter.config
    everything = _adapted(model, config)
    certain = everything
    targets = config.target_modules
    if isinstance(targets, tuple) and config.layers_to_transform is not None:
        # Other layers of the files must not decide how PEFT shortens the list.
        listed = {*targets}
        certain = _adapted(
            replace(
                model,
                linear={n: each for n, each in model.linear.items() if n in own or n in listed},
            ),
            config,
        )
    return _Matched(
        own={name: layer for name, layer in certain.layers.items() if name in own},
        only_sized={n: each for n, each in certain.only_sized.items() if n not in own},
        further={n: each for n, each in everything.layers.items() if n not in own},
    )


def _adapted(model: ModelLayers, config: VeraConfig) -> Adapted:
    try:
        return adapted(model, config)
    except CheckpointError as error:
        if error.findings[0].rule is not TARGETS_MATCH_NOTHING:
            raise
        return Adapted({}, 0, 0)


def _widest(layers: Iterable[Linear]) -> Dims:
    found = [(layer.in_features, layer.out_features) for layer in layers]
    return Dims(max(inputs for inputs, _ in found), max(outputs for _, outputs in found))


def _unmatched(adapter: Adapter, own: Mapping[str, Linear], matched: _Matched) -> Iterator[Finding]:
    """Warn of layers in the file that the targets do not match, so that PEFT ignores the layers.

    Raises:
        CheckpointError: PEFT's A and B would be too small for these layers.
    """
    fewer = [name for name in own if name not in matched.own]
    if not fewer:
        return
    if matched.own:
        needed = _widest(own.values())
        given = _widest((*matched.own.values(), *matched.only_sized.values()))
        if given.inputs < needed.inputs or given.outputs < needed.outputs:
            reason = (
                f"the layers that target_modules matches have up to {given}, those of the adapter "
                f"{needed}."
            )
            raise CheckpointError(PROJECTIONS_TOO_NARROW.at(adapter.place, reason))
    reason = (
        f"the config's targets match {len(matched.own)} of the {len(own)} layers that the file "
        f"adapts; PEFT leaves {printable(min(fewer))} unadapted."
    )
    yield TARGETS_DISAGREE.at(adapter.place, reason)


# --- layers that only the base's files have ------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Reading:
    """The chosen dimensions, and the reasons.

    Attributes:
        dims: the dimensions.
        other: the dimensions if every further layer were adapted too.
        proven: whether no other dimensions are possible.
        holes: layers that the file should have.
    """

    dims: Dims
    other: Dims
    proven: bool
    holes: tuple[str, ...]


def _reading(
    adapter: Adapter, inside: Dims, further: Mapping[str, Linear], built: BuiltLayers
) -> _Reading:
    possible = {name: each for name, each in further.items() if built.has(name) is not False}
    holes = tuple(name for name in possible if built.is_missing(name))
    other = _joined(inside, possible.values())
    if other == inside:
        return _Reading(inside, other, proven=True, holes=holes)
    cut = _joined(inside, (possible[name] for name in holes))
    # PEFT requires stored A and B that suit every adapted layer, with or without vectors.
    needed = inside if adapter.projections is None else cut
    recorded = _recorded(adapter)
    if recorded is not None and _explains(recorded, inside, needed, possible.values()):
        return _Reading(recorded, other, proven=True, holes=holes)
    if cut != inside and adapter.projections is None and adapter.fingerprint is None:
        raise CheckpointError(DIMS_AMBIGUOUS.at(adapter.place, _two_readings(inside, cut, holes)))
    return _Reading(cut, other, proven=False, holes=holes)


def _recorded(adapter: Adapter) -> Dims | None:
    """Return the dimensions of the stored A and B, or of the fingerprint of A and B."""
    record = adapter.projections or adapter.fingerprint
    return Dims(record.in_features, record.out_features) if record is not None else None


def _explains(dims: Dims, inside: Dims, needed: Dims, further: Iterable[Linear]) -> bool:
    """Say whether dimensions are those of the file's layers and of some of the further layers."""
    fitting = (
        layer
        for layer in further
        if layer.in_features <= dims.inputs and layer.out_features <= dims.outputs
    )
    return _joined(inside, fitting) == dims == _joined(needed, [_as_layer(dims)])


def _joined(dims: Dims, layers: Iterable[Linear]) -> Dims:
    return _widest((_as_layer(dims), *layers))


def _as_layer(dims: Dims) -> Linear:
    return Linear(dims.outputs, dims.inputs)


def _two_readings(inside: Dims, cut: Dims, holes: tuple[str, ...]) -> str:
    return (
        f"the file has no vectors for {_some(holes)}, which the config's targets match in the "
        f"base. A and B have {inside} without {_them(holes)}, and {cut} with {_them(holes)}."
    )


def _further(
    adapter: Adapter, reading: _Reading, inside: Dims, further: Mapping[str, Linear]
) -> Iterator[Finding]:
    """Yield findings on layers of the base that the targets match and the file does not adapt."""
    if not further:
        return
    if reading.holes:
        reason = (
            f"the file has no vectors for {_some(reading.holes)}, which the config's targets match "
            f"in the base; {_them(reading.holes)} would have no effect."
        )
        yield TARGETS_DISAGREE.at(adapter.place, reason)
        return
    some = _some(sorted(further))
    said = f"in the base's files the config's targets match {some} too, which the file lacks"
    if reading.proven:
        reason = f"{said}. A and B have {reading.dims} all the same."
        yield TARGETS_DISAGREE.as_note().at(adapter.place, reason)
        return
    reason = (
        f"{said}. A and B have {inside}, as PEFT draws them for the layers that the file adapts. "
        f"If the model class builds the other layers too, PEFT draws A and B with {reading.other}."
    )
    yield TARGETS_DISAGREE.at(adapter.place, reason)


def _some(names: Iterable[str]) -> str:
    """Name one layer and count the others."""
    return listed(names, 1, noun="layer")


def _them(names: tuple[str, ...]) -> str:
    return "this layer" if len(names) == 1 else "these layers"
