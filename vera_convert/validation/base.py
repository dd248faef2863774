"""Check an adapter against a base: names, heads, quantized layers, sizes.

Only headers are read, and a few rows of a stored head that the config calls tied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from vera_convert import rules
from vera_convert.adapter.adapter import Adapter
from vera_convert.adapter.folder import side_files
from vera_convert.adapter.saved_modules import replaced_name
from vera_convert.base.bases import Bases
from vera_convert.base.facts import BaseFacts, BaseOptions
from vera_convert.base.match import Match, embedding_of_head
from vera_convert.base.model import BaseModel
from vera_convert.base.quantized.targets import misdescribed, quantized_elsewhere, target_findings
from vera_convert.base.quantized.unpack import Unpacked, unpacked
from vera_convert.base.replacements import (
    brought,
    incomplete_modules,
    is_of_classifier,
    replacing_tensors,
)
from vera_convert.base.resizes import resizes
from vera_convert.base.resolve import Need, resolve_base
from vera_convert.base.strategies import AS_THEY_ARE
from vera_convert.base.tied import is_saved_twice, is_tied_head, lone_embeddings, shows_own_head
from vera_convert.base.vocabulary import check_own_tokens, tied_copies
from vera_convert.embeddings import is_output_head
from vera_convert.errors import CheckpointError
from vera_convert.files.file_names import CONFIG_NAME, WEIGHTS_NAME
from vera_convert.files.tensorfile import TensorData
from vera_convert.hub.lookup import HubAccess
from vera_convert.rules import Finding
from vera_convert.text import printable


def resolver(
    base_options: BaseOptions, access: HubAccess
) -> Callable[[Adapter], tuple[BaseFacts, list[Finding]]]:
    """Find a base, and return a function that checks an adapter against the base.

    The function returns the base facts and the findings.

    Args:
        base_options: the options of the base, with its name.
        access: how the Hub is reached.

    Raises:
        SurroundingsError: reading the base fails; raised once for all adapters.
    """
    bases = Bases(access)
    assert base_options.model is not None  # noqa: S101 -- the caller checked
    bases.located(base_options.model, base_options.revision)

    def resolved(adapter: Adapter) -> tuple[BaseFacts, list[Finding]]:
        base_facts = resolve_base(adapter, base_options, bases=bases, need=Need.NONE)
        # The check of the targets reports an error if these match no layer.
        reported = rules.TARGETS_MATCH_NOTHING.code
        others = (each for each in base_facts.findings if each.code != reported)
        return base_facts, [*others, *base_findings(adapter, base_facts, access)]

    return resolved


def base_findings(adapter: Adapter, base_facts: BaseFacts, access: HubAccess) -> Iterator[Finding]:
    """Yield the findings for an adapter on a base with the adapter's layers.

    Args:
        adapter: the adapter.
        base_facts: the facts from `resolve_base`, whose findings are not repeated.
        access: how the Hub is reached, for a few rows of a stored head.
    """
    match = base_facts.match
    if base_facts.base is None or match is None:
        return
    whole = unpacked(base_facts.base)
    base = whole.view
    if match.strategy.name != AS_THEY_ARE.name:
        yield rules.NAMES_RENAMED.at(
            base.location.label, f"they fit after this change: {match.strategy.name}."
        )
    yield from _orientation(adapter, match)
    quantized = [*target_findings(whole, match.tensors.values())]
    yield from quantized
    yield from misdescribed(whole, match.tensors.values())
    elsewhere = None if quantized else quantized_elsewhere(whole.stored)
    yield from [elsewhere] if elsewhere else []
    yield from _replacements(adapter, match, whole, access)
    yield from _tokens(adapter, base)


def _orientation(adapter: Adapter, match: Match) -> Iterator[Finding]:
    said = adapter.config.fan_in_fan_out
    if all(match.layers[module].conv1d != said for module in adapter.layers):
        kinds = "plain linear layers" if said else "Conv1D layers"
        reason = f"fan_in_fan_out is {str(said).lower()}, but the layers are {kinds}."
        yield rules.ORIENTATION_WRONG.in_file(CONFIG_NAME, reason)


def _tied_pairs(
    adapter: Adapter, match: Match, base: BaseModel, replaced: Mapping[str, TensorData]
) -> Iterator[Finding]:
    """Yield a warning for each head or embedding that changes alone, although the two are tied."""
    for module in match.tensors:
        shared = embedding_of_head(module, match, base)
        if shared is not None:
            reason = f"the base uses {printable(shared)} for both."
            yield rules.HEAD_SHARED.at(printable(module), reason)
    for embedding, head in lone_embeddings(adapter, match, base, replaced):
        reason = f"PEFT keeps the head {printable(head)}, and the base uses this tensor for both."
        yield rules.HEAD_SHARED.at(printable(embedding), reason)
    for target, tensor in replaced.items():
        if is_tied_head(target, base) and not is_saved_twice(tensor, adapter, base):
            reason = "the adapter stores an output head; the base ties head and embedding."
            yield rules.HEAD_SHARED.at(printable(target), reason)


def _replacements(
    adapter: Adapter, match: Match, whole: Unpacked, access: HubAccess
) -> Iterator[Finding]:
    """Yield findings for heads, biases and embeddings."""
    base = whole.view
    try:
        replacing = replacing_tensors(adapter, match, base)
    except CheckpointError as error:
        yield from error.findings
        return
    yield from (each.as_note() for each in replacing.refusals)  # PEFT loads the adapter
    tensors = {target: tensor for target, (tensor, _) in replacing.whole.items()}
    copies = dict(tied_copies(base))
    for target, tensor in tensors.items():
        module = replaced_name(tensor.name).rpartition(".")[0]
        is_lm_head = is_output_head(module, base.model_type)
        if target not in base.tensors and target not in copies and not is_lm_head:
            found = brought(adapter.config, tensor.name, target, base)
            yield from [found] if found is not None else []
    shared = [*_tied_pairs(adapter, match, base, tensors)]
    is_tied = bool(shared) and not shows_own_head(whole.stored, access)
    yield from shared if is_tied else ()
    heads = [name for name, each in tensors.items() if is_of_classifier(adapter.config, each.name)]
    new_shapes = {target: part.shape for target, (_, part) in replacing.whole.items()}
    for module, copy in adapter.base_copies.items():  # PEFT loads the copy, also a resized one
        new_shapes.setdefault(match.tensors[module], copy.shape)
        if is_tied and (embedding := embedding_of_head(module, match, base)) is not None:
            new_shapes.setdefault(embedding, copy.shape)
    yield from resizes(new_shapes, base, heads=heads).findings
    yield from incomplete_modules(adapter, match, base, replacing.targets)


def _tokens(adapter: Adapter, base: BaseModel) -> Iterator[Finding]:
    """Yield a finding if the adapter's tokenizer has more tokens than the embedding has rows."""
    folder = adapter.folder
    names = side_files(folder).copied if folder.is_dir() else ()  # the files that a merge copies
    try:
        check_own_tokens(adapter, names, base, place=WEIGHTS_NAME)
    except CheckpointError as error:
        yield from error.findings
