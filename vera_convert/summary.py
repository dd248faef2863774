"""info: what an adapter is, for a person who holds one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from vera_convert.adapter.adapter import Adapter
from vera_convert.adapter.config import VeraConfig
from vera_convert.adapter.fingerprint import METADATA_KEY, Fingerprint
from vera_convert.adapter.names import A_NAME, B_NAME
from vera_convert.adapter.opening import open_adapter
from vera_convert.adapter.tensors import StoredProjections
from vera_convert.arguments import instance, one_of, optional, place, text
from vera_convert.base.facts import BaseFacts, BaseOptions, base_options_of
from vera_convert.base.resolve import Bases, Need, resolve_base
from vera_convert.conversion.projections import ProjectionSource, base_dtypes_of, default_variant
from vera_convert.conversion.proof import other_dims, unproven_draw
from vera_convert.conversion.transforms import embedded, stripped
from vera_convert.counting import lora_file_bytes, lora_parameters
from vera_convert.draws.comparison import Difference
from vera_convert.draws.generator import Draw, Rounding, rounding_on_base
from vera_convert.draws.recognition import recognize
from vera_convert.dtypes import SIXTEEN_BIT, USUAL_OF_BASES
from vera_convert.errors import CheckpointError, UsageError
from vera_convert.files.header import header_bytes, in_order
from vera_convert.files.tensorfile import TensorData
from vera_convert.hub.lookup import HubAccess, Location, fetch_weights, locate
from vera_convert.rules import PROJECTIONS_IGNORED, Finding
from vera_convert.targets.matching import Linear, kind_of
from vera_convert.text import short_repr


@dataclass(frozen=True, slots=True)
class TargetGroup:
    """Adapted layers of one kind and one shape; in_features is None without a base."""

    name: str
    layers: int
    out_features: int
    in_features: int | None


@dataclass(frozen=True, slots=True)
class Effect:
    """Which A and B one range of PEFT versions uses after a load.

    Attributes:
        peft: the versions.
        source: ``file`` or ``key``.
        same_on: the load dtypes of the base on which they are the adapter's own A and B; None
            where nothing tells what those are.
    """

    peft: str
    source: str
    same_on: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of the weights file in each form; None where nothing tells.

    Attributes:
        as_is: as it lies there.
        stripped: what `strip` would write; None where it would refuse.
        embedded: what `embed` would write.
        lora: the exact LoRA in float32.
        merged: the base's weights with the delta added.
    """

    as_is: int
    stripped: int | None
    embedded: int | None
    lora: int | None
    merged: int | None


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """What `info` tells.

    Attributes:
        location: where the adapter lies.
        config: its config.
        groups: its layers, by kind and shape.
        lambda_dtypes: dtypes of the trained vectors.
        projections: shape and dtype of the stored A and B, or None.
        draw: which draw they are; for a stripped adapter, what its fingerprint says.
        difference: how stored ones differ from the nearest draw.
        fingerprint: what a strip recorded.
        effects: what each PEFT uses.
        replacements: tensors that replace the base's.
        parameters: trained values in the lambdas.
        lora_parameters: those of a LoRA of the same rank; None without a base.
        sizes: bytes in each form.
        base_facts: what is known of the base.
        findings: warnings and notes.
    """

    location: Location
    config: VeraConfig
    groups: tuple[TargetGroup, ...]
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
        """How many layers are adapted."""
        return sum(group.layers for group in self.groups)


def info(
    adapter: str | Path,
    *,
    base: BaseOptions | str | Path | None = None,
    projections: ProjectionSource | str = ProjectionSource.AUTO,
    revision: str | None = None,
    access: HubAccess | None = None,
) -> AdapterInfo:
    """Tell what an adapter is.

    Args:
        adapter: a folder or a repo on the Hub.
        base: what the caller says of the base; done without where it cannot be had.
        projections: which A and B are meant.
        revision: the adapter's, on the Hub.
        access: how the Hub is reached.

    Raises:
        CheckpointError: the adapter is malformed.
        SurroundingsError: it cannot be had or read.

    Example:
        >>> found = info("adapter", base="base")
        >>> found.config.r, found.layers, found.findings
        (4, 4, ())
    """
    projections, base_options = (
        one_of("projections", ProjectionSource, projections),
        base_options_of(base),
    )
    access = optional(instance, "access", HubAccess, access) or HubAccess()
    named, revision = place("adapter", adapter), optional(text, "revision", revision)
    location = locate(named, kind="adapter", access=access, revision=revision)
    location = fetch_weights(location, access)
    with open_adapter(location.fetched) as opened:
        base_facts = resolve_base(opened, base_options, bases=Bases(access), need=Need.HELPFUL)
        described = _described(opened, location, base_facts, projections)
        opened.check_unchanged()
    return described


def _described(
    adapter: Adapter, location: Location, base_facts: BaseFacts, projections: ProjectionSource
) -> AdapterInfo:
    draw, difference = _origin(adapter)
    inputs = _inputs(base_facts)
    linears = {
        module: Linear(layer.out_features, inputs[module])
        for module, layer in adapter.layers.items()
        if module in inputs
    }
    complete = len(linears) == len(adapter.layers)
    effects = _effects(adapter, draw, base_facts)
    return AdapterInfo(
        location=location,
        config=adapter.config,
        groups=_groups(adapter, inputs),
        lambda_dtypes=_lambda_dtypes(adapter),
        projections=adapter.projections,
        draw=draw,
        difference=difference,
        fingerprint=adapter.fingerprint,
        effects=effects,
        replacements=tuple(
            tensor.name
            for tensor in adapter.replacements
            if not tensor.name.endswith(".base_layer.weight")  # a copy of the base's
        ),
        parameters=sum(layer.out_features + adapter.config.r for layer in adapter.layers.values()),
        lora_parameters=lora_parameters(linears, rank=adapter.config.r) if complete else None,
        sizes=Sizes(
            as_is=adapter.weights_size,
            stripped=_stripped_bytes(adapter, base_facts, projections),
            embedded=_embedded_bytes(adapter, base_facts, projections),
            lora=lora_file_bytes(linears, rank=adapter.config.r, beside=adapter.replacements)
            if complete
            else None,
            merged=base_facts.base.weights_size if base_facts.base else None,
        ),
        base_facts=base_facts,
        findings=(
            *adapter.findings,
            *base_facts.findings,
            *other_dims(adapter, base_facts),
            *_ignored(adapter, effects),
            *_unknown_origin(adapter),
        ),
    )


def _origin(adapter: Adapter) -> tuple[Draw | None, Difference | None]:
    """Return which draw the adapter's projections are, or how they differ from the nearest."""
    stored, recorded = adapter.projections, adapter.fingerprint
    if stored is not None:
        found = recognize(
            stored.A.array(), stored.B.array(), key=adapter.config.projection_prng_key
        )
        return found.draw, found.difference
    return (recorded.draw if recorded else None), None


def _inputs(base_facts: BaseFacts) -> dict[str, int]:
    """Return in_features by module, as far as the base's headers were read."""
    if base_facts.match is None:
        return {}
    return {module: inputs for module, (_, inputs) in base_facts.match.shapes.items()}


def _groups(adapter: Adapter, inputs: Mapping[str, int]) -> tuple[TargetGroup, ...]:
    found = Counter(
        (kind_of(module), layer.out_features, inputs.get(module))
        for module, layer in adapter.layers.items()
    )
    return tuple(TargetGroup(name, n, out, width) for (name, out, width), n in found.items())


def _lambda_dtypes(adapter: Adapter) -> tuple[str, ...]:
    return tuple(
        sorted(
            {
                tensor.dtype
                for layer in adapter.layers.values()
                for tensor in (layer.lambda_b, layer.lambda_d)
            }
        )
    )


def _effects(adapter: Adapter, draw: Draw | None, base_facts: BaseFacts) -> tuple[Effect, ...]:
    """Tell what each PEFT uses, compared with the stored or recorded projections."""
    origin = adapter.projections or adapter.fingerprint
    redrawn: tuple[str, ...] | None = None
    if origin is not None:
        redrawn = ()
        dims = origin.in_features, origin.out_features
        usual = default_variant(adapter.config, base_facts, *dims)
        if draw and replace(draw, rounding=Rounding.NONE) == usual:
            redrawn = tuple(dtype for dtype in base_dtypes_of(draw) if dtype in USUAL_OF_BASES)
    from_key = Effect("0.11 to 0.20", "key", redrawn)
    if adapter.projections is not None and adapter.config.save_projection:
        return from_key, Effect("0.21 and later", "file", USUAL_OF_BASES)
    return from_key, Effect("0.21 and later", "key", redrawn)


def _ignored(adapter: Adapter, effects: Iterable[Effect]) -> Iterable[Finding]:
    """Warn where no base lets the older PEFTs use what is stored."""
    stored = adapter.projections is not None and adapter.config.save_projection
    if stored and any(effect.same_on == () for effect in effects):
        yield PROJECTIONS_IGNORED.at(adapter.place, "what PEFT draws from the key is not A and B.")


def _unknown_origin(adapter: Adapter) -> Iterable[Finding]:
    """Warn where nothing at all tells which A and B an adapter was trained on.

    There are other trainers of VeRA, whose seed does not give PyTorch's draw.
    """
    unrecorded = adapter.config.peft_version is None
    if adapter.projections is None and adapter.fingerprint is None and unrecorded:
        reason = "it stores no A and B, no fingerprint of them, and no version of PEFT."
        yield unproven_draw(adapter.config, reason, place=adapter.place)


def _stripped_bytes(
    adapter: Adapter, base_facts: BaseFacts, projections: ProjectionSource
) -> int | None:
    try:
        converted = stripped(adapter, base_facts, projections=projections, accept_change=True)
    except CheckpointError:
        return None
    return file_size(converted.tensors, converted.metadata)


def _embedded_bytes(
    adapter: Adapter, base_facts: BaseFacts, projections: ProjectionSource
) -> int | None:
    """Return what `embed` would write; nothing is drawn for it, whatever a fingerprint claims."""
    if adapter.projections is not None:
        try:
            converted = embedded(adapter, base_facts, projections=projections)
        except (CheckpointError, UsageError):
            return None
        return file_size(converted.tensors, converted.metadata)
    known = adapter.fingerprint or base_facts
    if known.in_features is None or known.out_features is None or _is_unfit(adapter, base_facts):
        return None
    rank, dtype = adapter.config.r, _embedded_dtype(adapter, base_facts)
    if dtype is None:
        return None
    pair = [
        TensorData(name, dtype, shape, lambda: iter(()))
        for name, shape in (
            (A_NAME, (rank, known.in_features)),
            (B_NAME, (known.out_features, rank)),
        )
    ]
    metadata = {key: text for key, text in adapter.metadata.items() if key != METADATA_KEY}
    return file_size([*adapter.tensors, *pair], metadata)


def _is_unfit(adapter: Adapter, base_facts: BaseFacts) -> bool:
    """Say whether `embed` would refuse the dims that are known."""
    recorded = adapter.fingerprint
    if recorded is not None:
        return not base_facts.fits(recorded.in_features, recorded.out_features)
    return (base_facts.out_features or 0) < adapter.longest_b


def _embedded_dtype(adapter: Adapter, base_facts: BaseFacts) -> str | None:
    """Return how A and B would be stored; None where only drawing them would tell."""
    if adapter.fingerprint is not None:
        return adapter.fingerprint.dtype
    if base_facts.rounding is None:
        return None
    dtypes = _lambda_dtypes(adapter)
    if len(dtypes) != 1 or dtypes[0] in ("F64", "F32"):
        return dtypes[0] if len(dtypes) == 1 else "F32"
    rounded = next((d for d in SIXTEEN_BIT if rounding_on_base(d) is base_facts.rounding), None)
    if dtypes[0] == "F16" and rounded == "BF16":
        return None  # float16 holds them if none is too small: only the values tell
    return dtypes[0] if dtypes[0] == rounded else "F32"


def file_size(tensors: Iterable[TensorData], metadata: Mapping[str, str]) -> int:
    """Return the bytes of a safetensors file with these tensors."""
    ordered = in_order(tensors)
    return len(header_bytes(ordered, metadata)) + sum(tensor.nbytes for tensor in ordered)
