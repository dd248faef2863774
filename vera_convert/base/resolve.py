"""Resolve the base of an adapter: find and read the base, and derive the facts behind A and B.

PEFT casts A and B to the dtype of each adapted layer in turn, and the widest layers give the
dimensions of A and B. An adapter without stored A and B leaves dtypes and inputs open.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import IntEnum, auto

from vera_convert import rules
from vera_convert.adapter.adapter import Adapter
from vera_convert.base.bases import Bases, component_of
from vera_convert.base.casts import casts_on
from vera_convert.base.dims import shared_dims
from vera_convert.base.facts import BASE_REMEDY, BaseFacts, BaseOptions, loaded_in
from vera_convert.base.identity import disagreements
from vera_convert.base.match import Match, match_modules
from vera_convert.base.model import BaseModel, read_model_config
from vera_convert.base.quantized.unpack import unpacked
from vera_convert.base.replacements import lost_biases
from vera_convert.base.strategies import key_map_strategy, moved
from vera_convert.base.task_classes import class_without_body
from vera_convert.base.unsupported_layouts import experts_beside
from vera_convert.errors import (
    CheckpointError,
    ConflictError,
    SurroundingsError,
    UsageError,
    VeraConvertError,
)
from vera_convert.files.shards import component_folders
from vera_convert.hub.lookup import AmbiguousBaseError, Location, list_files
from vera_convert.rules import Finding
from vera_convert.targets.architectures import layers_from_config
from vera_convert.targets.built import BuiltLayers
from vera_convert.targets.linear import Linear, ModelLayers, layers_from_shapes
from vera_convert.text import printable

_MOST_NOTES = 3


class Need(IntEnum):
    """How much a command needs a base if only the adapter's config names the base.

    Each member includes the needs of the members before it.
    """

    NONE = auto()
    """The command skips the search for the base."""
    HELPFUL = auto()
    """The command goes on if the search for the base, or reading the base, fails."""
    VITAL = auto()
    """The command needs the base, or the base's dims from the caller."""
    SIZES = auto()
    """The command needs the size of each adapted layer; dims alone are too little."""
    WHOLE = auto()
    """The command needs the base's tensors; sizes alone are too little."""
    DEQUANTIZED = auto()
    """The command needs the base's tensors, and dequantizes quantized tensors."""


def resolve_base(
    adapter: Adapter, base_options: BaseOptions, *, bases: Bases, need: Need
) -> BaseFacts:
    """Return the facts of an adapter's base.

    Args:
        adapter: the adapter.
        base_options: the caller's options; a base in the options must be found.
        bases: the bases of this run.
        need: how much the command needs a base if only the config names the base.

    Raises:
        CheckpointError: the base is malformed, or the adapter does not fit the base.
        UsageError: options clash, or the base is ambiguous.
        SurroundingsError: finding or reading the base fails, and the caller names the base or the
            command needs the base.
    """
    facts = _Resolver(adapter, base_options, bases, need).facts()
    idle = idle_key_maps(base_options.key_map, [(adapter, facts.match)])
    facts = replace(facts, findings=(*facts.findings, *idle))
    return facts if base_options.dtype is None else loaded_in(facts, base_options.dtype)


@dataclass(frozen=True, slots=True)
class _Resolver:
    """The arguments of `resolve_base`."""

    adapter: Adapter
    options: BaseOptions
    bases: Bases
    need: Need

    def facts(self) -> BaseFacts:
        options, config = self.options, self.adapter.config
        if options.in_features is not None or options.out_features is not None:
            return _from_options(options)
        model = options.model
        if model is None and self.need is not Need.NONE:
            model = dict(options.places).get(config.base_model_name_or_path or "")
        if model is not None:
            return self._from_base(self.bases.located(model, options.revision))
        return BaseFacts() if self.need is Need.NONE else self._from_name()

    @property
    def _remedy(self) -> str:
        """How to pass the base, if the base that the config names was not found."""
        name = self.adapter.config.base_model_name_or_path
        if not self.bases.of_tree:
            return BASE_REMEDY
        if not name:
            return "Migrate this adapter alone, with --base."
        return f"Pass the base with --base-for {printable(name)}=MODEL."

    def _from_name(self) -> BaseFacts:
        """Read the base named by the config, or return the reason why facts are missing."""
        config = self.adapter.config
        revision = self.options.revision or config.revision
        missing = BaseFacts(remedy=self._remedy)
        try:
            named = self.bases.named(config.base_model_name_or_path, revision)
            missing = replace(missing, source=named.reason)
            if named.location is None:
                if self.need >= Need.SIZES:
                    raise UsageError(f"{named.reason.rstrip('.')}.", missing.remedy)
                return missing
            facts = self._from_base(named.location)
            if not named.reason:
                return facts
            inside = rules.BASE_IN_FOLDER.at(self.adapter.place, named.reason)
            return replace(facts, findings=(inside, *facts.findings))
        except (AmbiguousBaseError, SurroundingsError, CheckpointError) as error:
            is_needed = self.need >= Need.VITAL
            if is_needed and isinstance(error, SurroundingsError):
                remedy = missing.size_remedy if self.need is Need.VITAL else missing.remedy
                raise SurroundingsError(error.reason, remedy) from error
            is_of_adapter = isinstance(error, CheckpointError) and not all(
                finding.code.startswith(("V0", "V5")) for finding in error.findings
            )
            if is_needed or is_of_adapter:
                raise
            reason = error.reason if isinstance(error, SurroundingsError) else str(error)
            return replace(missing, source=reason)

    def _from_base(self, location: Location) -> BaseFacts:
        """Return the facts from a base's headers, or from the config if weights are absent."""
        base: BaseModel | None = None
        try:
            if component_folders(list_files(location, self.bases.access)):
                trained_on = self.adapter.config.base_model_name_or_path
                base, match = component_of(location, self.bases, self._match, trained_on)
            else:
                base = self.bases.read(location)
                match = self._match(base)
        except CheckpointError as error:
            has_no_weights = error.findings[0].rule is rules.BASE_WITHOUT_WEIGHTS
            if has_no_weights and self.need < Need.WHOLE:
                return self._from_config(location, error)
            if base is not None and self.need is Need.DEQUANTIZED:
                unpacked(base).refuse_defects()  # a defect can be why layers do not fit
            are_packed = all(each.rule is rules.QUANTIZED_TARGET for each in error.findings)
            if base is None or self.need >= Need.WHOLE or not are_packed:
                raise
            return _packed(self.adapter, base, error.findings)
        if match.refusals and self.need >= Need.WHOLE:
            raise CheckpointError.of(match.refusals)
        facts = _from_match(self.adapter, base, match)
        notes = [each.as_note() for each in match.refusals[:_MOST_NOTES]]
        return replace(facts, findings=(*facts.findings, *notes))

    def _match(self, base: BaseModel) -> Match:
        adapter = self.adapter
        strange = class_without_body(adapter.config, base)
        if strange is not None and all(path.startswith("transformer.") for path in adapter.layers):
            reason = f"{printable(strange)} looks for layers named transformer, the base has model."
            raise CheckpointError(rules.BODY_NOT_LOADED.at(base.location.label, reason))
        return match_modules(
            {module: layer.out_features for module, layer in adapter.layers.items()},
            base,
            widest=adapter.projections.in_features if adapter.projections else None,
            fan_in_fan_out=adapter.config.fan_in_fan_out,
            key_map=self.options.key_map,
            copies={module: copy.shape for module, copy in adapter.base_copies.items()},
        )

    def _from_config(self, location: Location, error: CheckpointError) -> BaseFacts:
        """Return the dims from the config of a known model type, for a base without weights."""
        config = read_model_config(location, self.bases.access)
        if config is None:
            raise error
        model, own = _layers_by_config(self.adapter, config, location)
        dims = shared_dims(self.adapter, model, own, BuiltLayers(config, own))
        return BaseFacts(
            dims.in_features,
            dims.out_features,
            source=f"{location.label} (its config alone)",
            location=location,
            layers=own,
            modules=frozenset(model.linear),
            findings=dims.findings,
        )


def idle_key_maps(
    key_map: Sequence[tuple[str, str]], adapters: Sequence[tuple[Adapter, Match | None]]
) -> Iterator[Finding]:
    """Yield a warning for each --key-map without an effect on any adapter.

    Args:
        key_map: pairs (OLD, NEW).
        adapters: each adapter with the match; None if no base was matched.
    """
    for old, new in key_map:
        place = f"--key-map {old}={new}"
        layers = (path for adapter, _ in adapters for path in adapter.layers)
        if old and not any(f"{path}.".startswith(f"{old}.") for path in layers):
            reason = f"no module of the adapter begins with {old}."
            yield rules.OPTION_WITHOUT_EFFECT.at(place, reason)
        elif all(match is not None and _leaves_out(match, old, new) for _, match in adapters):
            reason = "the adapter's names fit the base without this key map."
            yield rules.OPTION_WITHOUT_EFFECT.at(place, reason)


def _leaves_out(match: Match, old: str, new: str) -> bool:
    """Say whether a match ignores a key map that leads to other tensors."""
    given = key_map_strategy(old, new)
    return match.strategy.name != given.name and any(
        tensor != f"{moved(old, new, module)}.weight"
        for module, tensor in match.tensors.items()
        if module not in match.tied and moved(old, new, module) != module
    )


def _from_options(options: BaseOptions) -> BaseFacts:
    if options.model is not None:
        sentence = "give either {} or {} and {}, not both."
        raise ConflictError(sentence, "base", "in_features", "out_features")
    if options.in_features is None or options.out_features is None:
        sentence = "{} and {} belong together: give both."
        raise ConflictError(sentence, "in_features", "out_features")
    return BaseFacts(
        options.in_features,
        options.out_features,
        source="the sizes given with --in-features and --out-features",
    )


def _from_match(adapter: Adapter, base: BaseModel, match: Match) -> BaseFacts:
    """Return the facts of a base, given the match with the adapter's layers."""
    own = match.layers
    whole = unpacked(base)
    view = whole.view
    tensors = _as_adapter_names_them(view, match)
    shapes = {module + ".weight": view.tensors[name].info.shape for module, name in tensors.items()}
    model = layers_from_shapes(shapes, model_type=base.model_type)
    # The match has each layer's orientation, and the heads stored as the embedding.
    model = model._replace(
        linear={**model.linear, **own}, output_heads=model.output_heads | match.tied
    )
    built = BuiltLayers(base.config, own)
    dims = shared_dims(adapter, model, own, built)
    casts = casts_on(whole, (match.tensors[module] for module in dims.adapted))
    unclear = [rules.ROUNDING_UNCLEAR.at(base.location.label, casts.reason)] if casts.reason else []
    if whole.formats and adapter.projections is not None:
        unclear = []  # A and B are stored, so PEFT draws neither on a quantized base
    return BaseFacts(
        dims.in_features,
        dims.out_features,
        casts.rounding,
        casts.possible,
        casts.reason,
        source=base.location.label,
        location=base.location,
        base=base,
        match=match,
        layers=own,
        modules=frozenset(tensors),
        findings=(
            *base.findings,
            *disagreements(adapter, view, built, tensors.keys() | own.keys()),
            *dims.findings,
            *unclear,
            *lost_biases(adapter, match, view),
        ),
    )


def _packed(adapter: Adapter, base: BaseModel, findings: Sequence[Finding]) -> BaseFacts:
    """Return the facts of a base with packed adapted layers.

    The config of a known type tells the sizes of the layers; packed tensors hide the sizes.
    """
    warnings = [rules.TARGET_IS_QUANTIZED.at(each.place, each.reason) for each in findings]
    source = f"{base.location.label} packs the adapted layers, so their sizes are not known"
    if defect := unpacked(base).first_defect:
        source += f": {defect}"
    layers: Mapping[str, Linear] = {}
    with suppress(VeraConvertError):  # the type of the base is not known
        _, layers = _layers_by_config(adapter, base.config, base.location)
    return BaseFacts(
        source=source,
        remedy="Pass the original 16-bit model with --base.",
        location=base.location,
        base=base,
        layers=layers,
        findings=(*base.findings, *warnings),
    )


def _as_adapter_names_them(base: BaseModel, match: Match) -> dict[str, str]:
    """Return the base's weights by module path, in the names of the adapter's model.

    The config's targets are matched with the adapter's names. The result leaves out weights
    outside the adapter's model.
    """
    named: dict[str, str] = {}
    for layer, part in match.parts.items():
        if layer not in named:  # the first expert of a stack has named all others
            beside = experts_beside(layer, part.experts) if part.experts else (layer,)
            named |= dict.fromkeys(beside, part.tensors[0])
    divided = {name for part in match.parts.values() for name in part.tensors}
    for name in base.tensors:
        path = name.removesuffix(".weight")
        module = match.strategy.undo(path) if path != name else None
        if module is not None and name not in divided:
            named[module] = name
    return named


def _layers_by_config(
    adapter: Adapter, config: Mapping[str, object], location: Location
) -> tuple[ModelLayers, Mapping[str, Linear]]:
    """Return the layers of a known model type by the adapter's names, and the adapted layers.

    Raises:
        CheckpointError: the type is unknown, or a layer of the adapter is absent or differs.
    """
    place = f"{location.label}/config.json"
    model = layers_from_config(config, place=place)
    names = {module: _name_of(module, model) for module in adapter.layers}
    absent = [module for module, name in names.items() if name is None]
    if absent:
        reason = (
            f"{len(absent)} of {len(names)} layers have no counterpart, such as "
            f'"{printable(absent[0])}".'
        )
        raise CheckpointError(rules.NAMES_DIFFER.at(place, reason))
    ours = {name: module for module, name in names.items()}
    model = model._replace(linear={ours.get(n, n): each for n, each in model.linear.items()})
    own = {module: model.linear[module] for module in adapter.layers}
    for module, linear in own.items():
        found = adapter.layers[module].out_features
        if found != linear.out_features:
            reason = f"lambda_b has {found} values, the layer {linear.out_features} outputs."
            raise CheckpointError(rules.SHAPES_DIFFER.at(printable(module), reason))
    return model, own


def _name_of(module: str, model: ModelLayers) -> str | None:
    """Return the model's name of a layer; the two names may differ by a prefix."""
    if module in model.linear:
        return module
    found = [
        name for name in model.linear if name.endswith(f".{module}") or module.endswith(f".{name}")
    ]
    return found[0] if len(found) == 1 else None
