"""The tensors that an adapter saves whole: heads, biases and embeddings in place of the base's."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import NamedTuple

from vera_convert import rules
from vera_convert.adapter.adapter import Adapter
from vera_convert.adapter.config import VeraConfig
from vera_convert.adapter.names import PREFIX
from vera_convert.adapter.saved_modules import SavedModules, replaced_name
from vera_convert.adapter.sorting import same_tensor
from vera_convert.base.match import Match
from vera_convert.base.model import BaseModel
from vera_convert.base.renames import release_names
from vera_convert.base.saved_places import ORIGINAL, Part, Places
from vera_convert.base.shared_layers import shared_replacements
from vera_convert.base.task_classes import class_of_head
from vera_convert.base.unsupported_layouts import Layers, other_layout
from vera_convert.embeddings import is_embedding, is_output_head
from vera_convert.errors import CheckpointError
from vera_convert.files.file_names import WEIGHTS_NAME
from vera_convert.files.tensorfile import TensorData
from vera_convert.rules import Finding, Severity
from vera_convert.targets.built import BuiltLayers
from vera_convert.text import listed, printable

_EXPERT = re.compile(r"\.experts\.\d+\.")
_OLD_BUFFERS = frozenset(("inv_freq", "masked_bias", "position_ids"))
"""Tensors that earlier releases of transformers stored, and that later releases compute."""
_PRETRAINING_HEAD = re.compile(r"(?:^|\.)cls\.(?:predictions|seq_relationship)\.")


class Replacing(NamedTuple):
    """The tensors of an adapter that replace tensors of the base.

    Attributes:
        whole: for each replaced tensor of the base, the adapter's tensor and the part to take.
        rows: for each tensor of the base that several layers share, the adapter's tensors by the
            first row or value that each replaces.
        refusals: why a merge refuses tensors; PEFT loads these.
    """

    whole: dict[str, tuple[TensorData, Part]]
    rows: dict[str, dict[int, TensorData]]
    refusals: list[Finding]

    @property
    def targets(self) -> frozenset[str]:
        """The names of all replaced tensors of the base."""
        return frozenset((*self.whole, *self.rows))


def replacing_tensors(adapter: Adapter, match: Match, base: BaseModel) -> Replacing:
    """Return the tensors of an adapter that replace tensors of the base, or rows of these.

    Args:
        adapter: the adapter.
        match: the match of the adapter's layers.
        base: the base. A tensor that the base lacks, such as a new head, keeps the plain name.

    Raises:
        CheckpointError: two tensors replace the same tensor.
    """
    tensors = {each.name: each for each in used_replacements(adapter)}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    matched = match_replacements(shapes, match, base)
    found = {
        part.target: (tensors[name], part) for name, parts in matched.items() for part in parts
    }
    copies, refused = shared_replacements({name: own for name, (own, _) in found.items()}, base)
    for target, stored in copies.items():
        own, place = found.pop(target)
        found[stored] = own, place._replace(target=stored)
    lost = {target: tensor for target, (tensor, _) in found.items() if target not in base.tensors}
    for target in refused.keys() & lost.keys():
        del found[target], lost[target]
    saved = SavedModules(adapter.config)
    places = Places(match, base) if lost else None
    for target, tensor in lost.items():
        part = None if places is None else _tied_bias(tensor, saved, places, base)
        if part is None:
            continue
        del found[target]
        first, _ = found.setdefault(part.target, (tensor, part))
        if not same_tensor(first, tensor):
            raise CheckpointError(_clash(part.target, first.name, tensor.name))
    rows: dict[str, dict[int, TensorData]] = {}
    left = {target: tensor for target, tensor in lost.items() if target in found}
    for target, name, first_row in _places_in_joined(left, match, base):
        rows.setdefault(name, {})[first_row] = found.pop(target)[0]
    return Replacing(found, rows, [*refused.values()])


def _places_in_joined(
    tensors: Mapping[str, TensorData], match: Match, base: BaseModel
) -> Iterator[tuple[str, str, int]]:
    """Yield the places of weights and biases that the base stores in a tensor of several layers.

    Args:
        tensors: the adapter's tensors, by the names that the base lacks.
        match: the match of the adapter's layers.
        base: the base.

    Yields:
        The name that the base lacks, the name of the base's tensor, and the first row there.
    """
    if not tensors:
        return
    layers = Layers(base)
    undos = (each.undo for each in release_names(base))
    ways_back: list[Callable[[str], str | None]] = [match.strategy.undo, str, *undos]
    for target, tensor in tensors.items():
        module, _, parameter = replaced_name(tensor.name).rpartition(".")
        if parameter not in ("weight", "bias") or not tensor.shape:
            continue
        for undo in ways_back:
            inside = layers.inside(module, tensor.shape[0], undo)
            if inside is None or inside.first is None:
                continue
            weight = inside.tensors[0]
            name = re.sub(r"weight$", parameter, weight)
            shape = (base.tensors[weight].info.shape[0], *tensor.shape[1:])
            if name in base.tensors and base.tensors[name].info.shape == shape:
                yield target, name, inside.first
                break


def used_replacements(adapter: Adapter) -> Iterator[TensorData]:
    """Yield each tensor that PEFT computes with in place of the base's.

    The encoder and the decoder have separate embeddings, and PEFT wraps only `shared`. The stacks
    keep the values from before the wrapping, which PEFT stores if the vocabulary was resized.
    Without these values, the unused copy itself is yielded: see `is_unused`.
    """
    stored = {each.name: each for each in adapter.tensors}
    for tensor in adapter.trained_replacements:
        own = tensor.name
        if is_unused(own, adapter):
            own = own.removesuffix(".weight") + ORIGINAL + ".weight"
        yield stored.get(own, tensor)


def is_unused(name: str, adapter: Adapter) -> bool:
    """Say whether a tensor is the copy of an encoder-decoder's `shared`, which no layer reads."""
    module = replaced_name(name).rpartition(".")[0]
    is_shared = module.rpartition(".")[2] == "shared"
    return is_shared and bool(SavedModules(adapter.config).of(module))


def _tied_bias(
    tensor: TensorData, saved: SavedModules, places: Places, base: BaseModel
) -> Part | None:
    """Return the part for a bias that shares its values with a bias of the base; else None.

    A head such as BERT's or FLAVA's has one bias under two names, ``X.bias`` and
    ``X.decoder.bias``. The base stores one name, and PEFT stores two. A module in modules_to_save
    has its own bias.
    """
    module, _, parameter = replaced_name(tensor.name).rpartition(".")
    if parameter != "bias" or saved.of(module):
        return None
    parent, _, last = module.rpartition(".")
    other = parent if last == "decoder" else f"{module}.decoder"
    if not other:
        return None
    name = f"{PREFIX}{other}.bias"
    (part,) = places.of(name, tensor.shape)
    return part if part.target in base.tensors else None


def _clash(target: str, first: str, second: str) -> Finding:
    reason = f'"{printable(first)}" and "{printable(second)}" both replace this tensor.'
    return rules.REPLACEMENT_CLASH.in_tensor(target, reason)


def match_replacements(
    shapes: Mapping[str, tuple[int, ...]], match: Match, base: BaseModel
) -> dict[str, tuple[Part, ...]]:
    """Return the base's tensors that each saved tensor of an adapter replaces.

    Args:
        shapes: the shapes of heads, biases and other saved modules in the adapter's file, by name.
        match: the match of the adapter's layers, whose strategy also renames saved modules.
        base: the base. A tensor that the base lacks, such as a new head, keeps the plain name.

    Raises:
        CheckpointError: two tensors replace the same tensor.
    """
    found: dict[str, tuple[Part, ...]] = {}
    if not shapes:
        return found  # the views of a large base take a second
    owners: dict[str, str] = {}
    places = Places(match, base)
    for name, shape in shapes.items():
        found[name] = places.of(name, shape)
        for part in found[name]:
            first = owners.setdefault(part.target, name)
            if first != name:
                raise CheckpointError(_clash(part.target, first, name))
    return found


def is_of_classifier(config: VeraConfig, name: str) -> bool:
    """Say whether a tensor belongs to a classifier: saved whole, and no output head.

    Args:
        config: the adapter's.
        name: the tensor's in the adapter's file.
    """
    module = replaced_name(name).rpartition(".")[0]
    is_saved = bool(SavedModules(config).of(module))
    return is_saved and not is_output_head(module) and not is_embedding(module)


def brought(config: VeraConfig, name: str, target: str, base: BaseModel) -> Finding | None:
    """Return the finding for a tensor that the base lacks, or None for a head of a known class.

    A merge names the class of a new head in the config.

    Args:
        config: the adapter's config.
        name: the tensor's name in the adapter's file.
        target: the tensor's name in the base.
        base: the base.
    """
    layout = stored_otherwise(name, base)
    if layout is not None:
        return layout.as_note()  # PEFT loads the adapter on this base
    if not SavedModules(config).of(replaced_name(name).rpartition(".")[0]):
        return unknown_tensor(name, target)
    if class_of_head(config, base) is not None:
        return None
    reason = "the base has no such tensor, and no class with this tensor is known."
    return rules.REPLACEMENT_NEW.in_tensor(target, reason)


def unknown_tensor(name: str, target: str) -> Finding:
    """Return the finding that a merge cannot place a tensor.

    Args:
        name: the tensor's name in the adapter's file.
        target: the tensor's name in the base.
    """
    return rules.REPLACEMENT_UNKNOWN.in_tensor(target, f"{printable(name)} would replace it.")


def stored_otherwise(name: str, base: BaseModel) -> Finding | None:
    """Return the reason why the base has a layer's tensor in another form; None for other tensors.

    Args:
        name: the tensor's name in the adapter's file.
        base: the base.
    """
    module, _, parameter = replaced_name(name).rpartition(".")
    return other_layout([module], base) if parameter in ("weight", "bias") else None


def incomplete_modules(
    adapter: Adapter, match: Match, base: BaseModel, targets: Collection[str]
) -> Iterator[Finding]:
    """Yield a finding for each tensor that the adapter lacks of a module saved whole.

    The base tells whether a module has a weight and a bias. Other tensors of the base can belong
    to a quantizer, and count only if the adapter stores no tensor of the module.

    Args:
        adapter: the adapter.
        match: the match of the adapter's layers.
        base: the base.
        targets: the base's tensors that the adapter's tensors replace.
    """
    saved = SavedModules(adapter.config)
    if not saved:
        return
    in_file = _ModulesInFile(adapter, base, saved)
    stored = {*targets, *match.tensors.values()}
    stores_experts = any(map(_EXPERT.search, stored))
    stored_heads = frozenset(map(_pretraining_head, stored))
    for name, tensor in base.tensors.items():
        path, _, parameter = match.strategy.in_memory(name).rpartition(".")
        modules = saved.of(path)
        is_parameter = parameter == "weight" or (
            len(tensor.info.shape) == 1
            if parameter == "bias"
            else in_file.names.isdisjoint(modules)
        )
        # Transformers 5 builds one module for all experts, which has the layers of none.
        is_built = stores_experts or _EXPERT.search(name) is None
        is_due = bool(modules) and is_parameter and is_built and parameter not in _OLD_BUFFERS
        head = _pretraining_head(name)
        if is_due and name not in stored and (head is None or head in stored_heads):
            yield from in_file.lacking(name, path)


class _ModulesInFile:
    """The modules that an adapter's file stores whole, and the stacks of layers that it trains."""

    def __init__(self, adapter: Adapter, base: BaseModel, saved: SavedModules) -> None:
        own = [replaced_name(each.name).rpartition(".")[0] for each in adapter.replacements]
        trained = [*adapter.layers, *own]
        self._saved = saved
        self._built = BuiltLayers(base.config, trained)
        self._paths = {path for each in own for path in saved.around(each)}
        self.names = frozenset[str]().union(*map(saved.of, own))
        self._stacks = {*map(_stack_of, trained)}.difference([None])

    def lacking(self, name: str, path: str) -> Iterator[Finding]:
        """Yield the finding for a tensor of the base that the file lacks, if the class builds it.

        PEFT saves all modules of a name. A file with another module of the name is complete if
        the adapter's class leaves out the module of `name`, such as the second classifier of a
        distilled DeiT. Classes differ in heads and towers, not in the layers of a trained stack.

        Args:
            name: the tensor's name in the base.
            path: the path of the tensor's module in the adapter.
        """
        if self._built.has(path) is False:
            return
        is_hole = _stack_of(path) in self._stacks
        is_hole |= not self._paths.isdisjoint(self._saved.around(path))
        reason = "the base has it, and PEFT saves the module whole, but the adapter lacks it."
        if is_hole or self.names.isdisjoint(self._saved.of(path)):
            yield rules.MODULE_TO_SAVE_MISSING.in_tensor(name, reason)
            return
        reason = (
            "the base has it, and the file has other modules of this name alone. This is right if "
            "the adapter's class has no such module."
        )
        yield rules.MODULE_TO_SAVE_MISSING.as_note().in_tensor(name, reason)


def _stack_of(path: str) -> str | None:
    """Return the part of a path before the first number; None for a path without a number."""
    found = re.match(r"(.*?)\.\d+(?:\.|\Z)", path)
    return found[1] if found else None


def _pretraining_head(name: str) -> str | None:
    """Return the beginning of the names of a tensor's pretraining head; None outside such a head.

    BERT has one or two pretraining heads, depending on the class. The adapter stores the heads of
    its own class, so a head without any stored tensor belongs to another class.
    """
    head = _PRETRAINING_HEAD.search(name)
    return None if head is None else name[: head.end()]


def lost_biases(adapter: Adapter, match: Match, base: BaseModel) -> Iterator[Finding]:
    """Warn if the config trains biases that the base has and the adapter's file lacks.

    PEFT 0.20 and earlier never saved biases; the reader of the adapter warns of those files.
    """
    read = [finding for finding in adapter.findings if finding.code == rules.BIAS_NOT_STORED.code]
    if not read or read[0].severity is not Severity.NOTE:
        return
    saved = SavedModules(adapter.config)  # PEFT stores these biases with any value of `bias`
    own = {f"{name.removesuffix('.weight')}.bias" for name in match.tensors.values()}
    trained = own if adapter.config.bias != "all" else None
    candidates = [
        name
        for name, tensor in base.tensors.items()
        if name.endswith(".bias")
        and len(tensor.info.shape) == 1
        and (trained is None or name in trained)
    ]
    # A release can have another name for a tensor beside the adapted layers.
    strategies = [match.strategy, *release_names(base)] if candidates else []
    found = [
        name
        for name in candidates
        if all(each.in_memory(name).endswith(".bias") for each in strategies)
        and not saved.of(match.strategy.in_memory(name).removesuffix(".bias"))
    ]
    if found:
        reason = f"the base has {listed(found, 1)}, and the file holds no bias."
        yield rules.BIAS_NOT_STORED.in_file(WEIGHTS_NAME, reason)
