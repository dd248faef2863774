"""info: an adapter's rank, targets, projections and sizes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from vera_convert import rules
from vera_convert.adapter.adapter import Adapter, StoredProjections
from vera_convert.adapter.config import VeraConfig
from vera_convert.adapter.fingerprint import Fingerprint
from vera_convert.adapter.opening import open_adapter
from vera_convert.arguments import one_of, optional, place, text
from vera_convert.base.bases import Bases
from vera_convert.base.facts import BaseFacts, BaseOptions, base_options_of
from vera_convert.base.model import BaseModel
from vera_convert.base.quantized.unpack import unpacked
from vera_convert.base.resolve import Need, resolve_base
from vera_convert.conversion.projections import ProjectionSource
from vera_convert.conversion.proof import (
    RecognizedPair,
    other_dims,
    recognized,
    same_on,
    unproven_draw,
)
from vera_convert.conversion.sizes import form_sizes
from vera_convert.counting import lora_parameters
from vera_convert.draws.comparison import Difference
from vera_convert.draws.generator import Draw
from vera_convert.dtypes import USUAL_OF_BASES
from vera_convert.hub.lookup import HubAccess, Location, fetch_weights, hub_access_of, locate
from vera_convert.lora.writing import lora_size
from vera_convert.rules import Finding
from vera_convert.targets.linear import LayerGroup, layer_groups
from vera_convert.text import short_repr


@dataclass(frozen=True, slots=True)
class Effect:
    """The A and B that a range of PEFT versions uses after a load.

    Attributes:
        peft: the versions.
        source: ``file`` or ``key``.
        same_on: the dtypes of the base on which A and B are the adapter's own; None if the
            adapter's own A and B are unknown.
    """

    peft: str
    source: str
    same_on: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of the weights file in each form; None if the size is unknown.

    Attributes:
        as_is: the file now.
        stripped: after `strip`; None if `strip` would refuse.
        embedded: after `embed`.
        lora: the exact LoRA in float32 that `to-lora` writes for PEFT.
        merged: the base's weights with the delta added.
    """

    as_is: int
    stripped: int | None
    embedded: int | None
    lora: int | None
    merged: int | None


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """An adapter's rank, targets, projections and sizes.

    Attributes:
        location: where the adapter lies.
        config: the adapter's config.
        groups: the layers, by kind and shape.
        lambda_dtypes: dtypes of the trained vectors.
        projections: shape and dtype of the stored A and B, or None.
        draw: the draw of A and B; for a stripped adapter, the draw in the fingerprint.
        difference: the difference of the stored A and B from the nearest draw.
        fingerprint: the record that `strip` left in the file.
        effects: the A and B that each version of PEFT uses.
        replacements: tensors that replace the base's.
        parameters: trained values in the lambdas.
        lora_parameters: trained values of a LoRA of the same rank; None without a base.
        sizes: bytes in each form.
        base_facts: the base: its name, its dtype, and the sizes of its layers.
        findings: warnings and notes.
    """

    location: Location
    config: VeraConfig
    groups: tuple[LayerGroup, ...]
    lambda_dtypes: tuple[str, ...]
    projections: StoredProjections | None
    draw: Draw | None
    difference: Difference | None
    fingerprint: Fingerprint | None
    effects: tuple[Effect, ...]
    replacements: tuple[str, ...]
    parameters: int
    lora_parameters: int | None
    sizes: Sizes
    base_facts: BaseFacts
    findings: tuple[Finding, ...]

    __repr__ = short_repr

    @property
    def layers(self) -> int:
        """The number of adapted layers."""
        return sum(group.layers for group in self.groups)


def info(
    adapter: str | Path,
    *,
    base: BaseOptions | str | Path | None = None,
    projections: ProjectionSource | str = ProjectionSource.AUTO,
    revision: str | None = None,
    access: HubAccess | None = None,
) -> AdapterInfo:
    """Return an adapter's rank, targets, projections and sizes.

    Args:
        adapter: a folder or a repo on the Hub.
        base: the base, and how to read it; None for the base that the adapter's config names. If
            the base is missing, the sizes of the base are unknown.
        projections: the source of A and B: ``auto``, ``file`` or ``key``.
        revision: the adapter's branch, tag or commit on the Hub.
        access: how the Hub is reached.

    Raises:
        CheckpointError: the adapter is malformed.
        SurroundingsError: the adapter is not found, or cannot be read.

    Example:
        >>> found = info("adapter", base="base")
        >>> found.config.r, found.layers, found.findings
        (4, 4, ())
    """
    projections = one_of("projections", ProjectionSource, projections)
    base_options = base_options_of(base)
    access = hub_access_of(access)
    named, revision = place("adapter", adapter), optional(text, "revision", revision)
    location = locate(named, kind="adapter", access=access, revision=revision)
    location = fetch_weights(location, access)
    with open_adapter(location.fetched) as opened:
        base_facts = resolve_base(opened, base_options, bases=Bases(access), need=Need.HELPFUL)
        stored = opened.projections
        pair = None if stored is None else recognized(opened.config, stored)
        forms = form_sizes(opened, pair, base_facts, projections)
        sizes = Sizes(
            as_is=opened.weights_size,
            stripped=forms.stripped,
            embedded=forms.embedded,
            lora=lora_size(opened, location, base_facts, base_options, projections),
            merged=_merged_size(base_facts.base),
        )
        described = _described(opened, location, base_facts, pair, sizes)
        opened.check_unchanged()
    return described


def _described(
    adapter: Adapter,
    location: Location,
    base_facts: BaseFacts,
    pair: RecognizedPair | None,
    sizes: Sizes,
) -> AdapterInfo:
    config, fingerprint = adapter.config, adapter.fingerprint
    recorded = fingerprint.draw if fingerprint is not None else None
    effects = _effects(adapter, pair or fingerprint, base_facts)
    match = base_facts.match
    outputs = {module: layer.out_features for module, layer in adapter.layers.items()}
    inputs = {} if match is None else {name: its.in_features for name, its in match.layers.items()}
    return AdapterInfo(
        location=location,
        config=config,
        groups=layer_groups((module, out, inputs.get(module)) for module, out in outputs.items()),
        lambda_dtypes=tuple(sorted(adapter.lambda_dtypes)),
        projections=adapter.projections,
        draw=pair.draw if pair is not None else recorded,
        difference=pair.recognition.difference if pair is not None else None,
        fingerprint=fingerprint,
        effects=effects,
        replacements=tuple(tensor.name for tensor in adapter.trained_replacements),
        parameters=sum(out + config.r for out in outputs.values()),
        lora_parameters=None if match is None else lora_parameters(match.layers, rank=config.r),
        sizes=sizes,
        base_facts=base_facts,
        findings=tuple(_findings(adapter, base_facts, effects)),
    )


def _findings(
    adapter: Adapter, base_facts: BaseFacts, effects: Iterable[Effect]
) -> Iterator[Finding]:
    """Yield the warnings and notes about an adapter on its base."""
    yield from adapter.findings
    yield from base_facts.findings
    yield from other_dims(adapter, base_facts)
    config, is_recorded = adapter.config, adapter.projections or adapter.fingerprint
    is_stored = adapter.projections is not None and config.save_projection
    if is_stored and any(effect.same_on == () for effect in effects):
        reason = "PEFT regenerates other matrices from the key."
        yield rules.PROJECTIONS_IGNORED.at(adapter.place, reason)
    # Other trainers of VeRA exist, and their seeds give other matrices than PyTorch's.
    if not is_recorded and config.peft_version is None:
        reason = "A and B, a fingerprint and the version of PEFT are missing."
        yield unproven_draw(config, reason, place=adapter.place)


def _effects(
    adapter: Adapter, own: RecognizedPair | Fingerprint | None, base_facts: BaseFacts
) -> tuple[Effect, ...]:
    """Compare the A and B that each PEFT uses with the stored or recorded ones."""
    from_key = Effect(
        "0.11 to 0.20", "key", None if own is None else same_on(adapter.config, own, base_facts)
    )
    if adapter.projections is not None and adapter.config.save_projection:
        return from_key, Effect("0.21 and later", "file", USUAL_OF_BASES)
    return from_key, replace(from_key, peft="0.21 and later")


def _merged_size(base: BaseModel | None) -> int | None:
    """Return the bytes of a merged model's weights; of a quantized base, those of 16 bits."""
    if base is None:
        return None
    packed = unpacked(base)
    return packed.nbytes if packed.weights and not packed.defects else base.weights_size
