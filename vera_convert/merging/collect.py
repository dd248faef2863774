"""Collect the changes that adapters make to a base.

This module reads headers and the adapters' small vectors. Of the base's values, the module reads
only the weights that an adapter stores a copy of.
"""

from __future__ import annotations

from functools import cached_property

from vera_convert import rules
from vera_convert.adapter.saved_modules import SavedModules, replaced_name
from vera_convert.adapter.sorting import same_tensor
from vera_convert.assembly.addends import Term
from vera_convert.base.match import Match, embedding_of_head
from vera_convert.base.quantized.targets import refuse_quantized
from vera_convert.base.quantized.unpack import unpacked
from vera_convert.base.replacements import (
    incomplete_modules,
    is_unused,
    replacing_tensors,
    stored_otherwise,
    unknown_tensor,
)
from vera_convert.base.resizes import biases_of_logits, followers, resizes, shape_differs
from vera_convert.base.saved_places import Part
from vera_convert.base.tied import (
    is_head,
    is_tied_head,
    lone_embeddings,
    name_of_head,
    scale_findings,
    tied_head,
)
from vera_convert.base.vocabulary import shared_embedding, tied_copies
from vera_convert.embeddings import is_embedding
from vera_convert.errors import UsageError, refuse
from vera_convert.files.tensorfile import TensorData
from vera_convert.merging.adapters import MatchedAdapter
from vera_convert.merging.base_files import has_own_head
from vera_convert.merging.changes import Changes, ReplacedRows, Replacement, ResizedBias
from vera_convert.merging.inputs import MergeInputs
from vera_convert.merging.options import Tied
from vera_convert.rules import Finding, errors_of
from vera_convert.text import printable


def collect(inputs: MergeInputs) -> Changes:
    """Collect the changes of all adapters, and refuse changes that contradict each other.

    Raises:
        CheckpointError: an adapter contradicts the base or another adapter, or replaces a tensor
            that stays quantized; with all findings.
        UsageError: the head to untie lacks a known name.
    """
    collector = _Collector(inputs)
    for matched in inputs.adapters:
        collector.add_terms(matched)
    for matched in inputs.adapters:
        collector.replace(matched)
    collector.resize_heads()
    for matched in inputs.adapters:
        collector.part_pairs(matched)
        collector.part_stacks(matched)
    collector.settle_copies()
    changes = collector.changes
    for name in sorted(changes.rows.keys() & changes.replaced.keys()):
        reason = "one adapter replaces this tensor, another replaces some rows of this tensor."
        collector.defects.append(rules.REPLACEMENTS_DIFFER.in_tensor(name, reason))
    if inputs.options.tied is not None and not collector.meets_tied_head:
        reason = "the adapter changes no output head that is tied to the embedding."
        changes.findings.append(rules.OPTION_WITHOUT_EFFECT.at("--tied", reason))
    replacing = changes.replacing
    shapes = {name: each.stored.shape for name, each in replacing.items()}
    heads = [name for name, each in replacing.items() if each.is_of_classifier]
    changes.resizes = resizes(shapes, inputs.base.model, heads=heads)
    refuse((*collector.defects, *errors_of(changes.findings), *changes.resizes.findings))
    if inputs.base.packed is None:
        refuse_quantized(unpacked(inputs.base.model), (*changes.replaced, *changes.rows))
    changes.resized_biases = {
        name: ResizedBias(inputs.base.tensor(name), count)
        for name, count in biases_of_logits(changes.resizes, inputs.base.model)
    }
    return changes


class _Collector:
    """Collects the changes of one adapter after the other, with the defects.

    The deltas of all adapters come first, then the tensors that adapters replace. Last, an
    embedding that an adapter replaces alone is parted from the head that is tied to the embedding.
    """

    def __init__(self, inputs: MergeInputs) -> None:
        self.files = inputs.base
        self.base = inputs.base.model
        self._choice = inputs.options.tied
        self._copies = dict(tied_copies(self.base))
        self.meets_tied_head = False
        self.changes = Changes()
        self.defects: list[Finding] = []
        self._outputs: dict[str, int] = {}
        self._resized_heads: list[tuple[str, Replacement]] = []

    def _meet_tied_head(self) -> Tied | None:
        """Note that a change meets a tied head, and return the caller's choice for the head.

        A head with values of its own stays a separate tensor, whatever the caller chooses.
        """
        if self._has_own_head:
            self.meets_tied_head = self._choice is not Tied.ADD
            return Tied.UNTIE
        self.meets_tied_head = True
        return self._choice

    @cached_property
    def _has_own_head(self) -> bool:
        return has_own_head(self.files)

    # --- deltas ----------------------------------------------------------------------------------

    def add_terms(self, matched: MatchedAdapter) -> None:
        """Add the delta of each layer of an adapter to the layer's tensors."""
        match, terms = matched.match, self.changes.terms
        for module, layer in matched.adapter.layers.items():
            names = self._targets(module, match)
            outputs, rows = layer.out_features, None
            if module in match.parts:
                first_row = match.parts[module].first
                assert first_row is not None  # noqa: S101 -- `resolve_base` refuses the others
                rows = slice(first_row, first_row + outputs)
                outputs = self.base.tensors[match.tensors[module]].info.shape[0]
            d, b = layer.lambda_d, layer.lambda_b
            term = Term(matched.pair.A, matched.pair.B, d, b, matched.weight, rows)
            for name in names:
                terms[name] = (*terms.get(name, ()), term)
                first = self._outputs.setdefault(name, outputs)
                if first != outputs:
                    reason = f"one delta has {first:,} rows, another {outputs:,}."
                    self.defects.append(rules.REPLACEMENTS_DIFFER.in_tensor(name, reason))
                if match.layers[module].conv1d:
                    self.changes.conv1d.add(name)
        for module, copy in matched.adapter.base_copies.items():
            self._compare_copy(module, copy, matched)

    def _targets(self, module: str, match: Match) -> list[str]:
        """Return the tensors that a layer's delta changes; empty if the caller must choose."""
        name = match.tensors[module]
        embedding = embedding_of_head(module, match, self.base)
        if embedding is None:
            return [name]
        tied = self._meet_tied_head()
        if tied is None:
            reason = f'the layer "{printable(module)}" shares {printable(name)} with the embedding.'
            self.defects.append(rules.HEAD_TIED.at(self.base.location.label, reason))
            return []
        if tied is Tied.ADD:
            return [*dict.fromkeys((embedding, name))]
        self.changes.unties = True
        head = name_of_head(module, match)
        if module in match.tied:
            self.changes.heads[head] = embedding
        return [head]

    def _compare_copy(self, module: str, copy: TensorData, matched: MatchedAdapter) -> None:
        """Compare a weight that PEFT stored for an adapted layer with the base's weight.

        The stored weight of a head with another number of rows replaces the base's: PEFT loads the
        stored weight, also into the embedding that is tied to the head. A dry run that
        has only the base's headers compares the shapes alone.
        """
        match = matched.match
        stored = match.tensors[module]
        replacement = Replacement.of(matched, copy, Part(stored, copy.shape))
        own, layer = self.files.tensor(stored), match.layers[module]
        if copy.shape not in (own.shape, (layer.out_features, layer.in_features)):
            shapes = f"{list(copy.shape)}, the base's {list(own.shape)}"
            reason = f"the stored weight has shape {shapes}."
            self.defects.append(rules.BASE_COPY_DIFFERS.in_tensor(copy.name, reason))
        elif self.files.has_values and not own.is_copied_by(replacement.stored):
            reason = f"the stored values differ from {printable(stored)} of the base."
            self.defects.append(rules.BASE_COPY_DIFFERS.in_tensor(copy.name, reason))
        elif copy.shape != own.shape:
            tied_to = embedding_of_head(module, match, self.base)
            embedding = None if self._has_own_head else tied_to
            unties = embedding is not None and self._meet_tied_head() is Tied.UNTIE
            head = name_of_head(module, match) if unties else stored
            self._resized_heads += [
                (name, replacement) for name in dict.fromkeys((head, embedding or head))
            ]

    # --- replacements ----------------------------------------------------------------------------

    def replace(self, matched: MatchedAdapter) -> None:
        """Record the tensors of an adapter that replace tensors of the base, or are new."""
        adapter = matched.adapter
        found = replacing_tensors(adapter, matched.match, self.base)
        self.defects += found.refusals
        for tensor in adapter.trained_replacements:
            if is_unused(tensor.name, adapter):
                reason = "the merged model keeps the values from before the training."
                self.changes.findings.append(rules.EMBEDDING_UNUSED.in_tensor(tensor.name, reason))
        # Embeddings come first, because the check of a head depends on the embedding.
        for target, (tensor, part) in sorted(
            found.whole.items(), key=lambda item: is_head(item[0], self.base)
        ):
            replacement = Replacement.of(matched, tensor, part)
            if is_unused(tensor.name, adapter):
                continue
            if target in self.changes.terms:
                self._refuse_delta(target, replacement)
            elif is_tied_head(target, self.base):
                self._replace_head(target, replacement)
            elif target in self.base.tensors:
                self._record(target, replacement)
            else:
                self._bring(target, replacement)
        for target, parts in found.rows.items():
            for first, tensor in parts.items():
                replacement = Replacement.of(matched, tensor, Part(target, tensor.shape))
                self._replace_rows(target, first, replacement)
        missing = incomplete_modules(adapter, matched.match, self.base, found.targets)
        self.changes.findings += missing

    def _replace_rows(self, target: str, first: int, replacement: Replacement) -> None:
        """Record a tensor that replaces the rows of one layer in a tensor of several layers."""
        rows, terms = self.changes.rows, self.changes.terms.get(target, ())
        if any(term.rows is None or term.rows.start == first for term in terms):
            self._refuse_delta(target, replacement)
        taken = rows[target].parts if target in rows else {}
        self._refuse_other(target, taken.get(first, replacement), replacement)
        rows[target] = ReplacedRows(self.files.tensor(target), {first: replacement, **taken})

    def _record(self, target: str, replacement: Replacement) -> None:
        """Record a replacement; refuse a tensor for which another adapter has other values."""
        changes = self.changes
        taken = changes.replaced if target in self.base.tensors else changes.new
        self._refuse_other(target, taken.setdefault(target, replacement), replacement)

    def _refuse_other(self, target: str, first: Replacement, replacement: Replacement) -> None:
        """Refuse a replacement by other values than those of the first replacement."""
        if first is not replacement and not same_tensor(first.tensor, replacement.tensor):
            both = f"{first.owner.label} and {replacement.owner.label}"
            reason = f"{both} replace this tensor by different values."
            self.defects.append(rules.REPLACEMENTS_DIFFER.in_tensor(target, reason))

    def _refuse_delta(self, target: str, replacement: Replacement) -> None:
        """Refuse a replacement of a tensor that a delta is added to."""
        own, terms = replacement.owner.pair.A, self.changes.terms[target]
        if is_embedding(_module(target)) and any(term.A is own for term in terms):
            reason = "the adapter replaces the embedding, and changes the head by a delta."
            self.defects.append(rules.HEAD_TIED.at(printable(target), reason))
            return
        reason = "one delta is added to this tensor, and one tensor replaces this tensor."
        self.defects.append(rules.REPLACEMENTS_DIFFER.in_tensor(target, reason))

    def _bring(self, target: str, replacement: Replacement) -> None:
        """Record a tensor that the base lacks, unless no loader would use the tensor."""
        name = replacement.tensor.name
        module = _module(replaced_name(name))
        saved = SavedModules(replacement.owner.adapter.config)
        layout = stored_otherwise(name, self.base)
        # PEFT also saves the head after a resize of the vocabulary.
        is_read = target in self._copies or saved.of(module) or is_head(target, self.base)
        if layout or not is_read:
            self.defects.append(layout or unknown_tensor(name, target))
        elif "experts" in module.split("."):
            reason = f"the base stores the experts of {printable(name)} in another form."
            self.defects.append(rules.REPLACEMENT_UNKNOWN.at(printable(target), reason))
        else:
            self._record(target, replacement)

    # --- tied heads ------------------------------------------------------------------------------

    def _replace_head(self, target: str, replacement: Replacement) -> None:
        """Record a head of the adapter's own in place of a head that is tied to the embedding."""
        embedding = self._embedding_of(target, replacement)
        own = self.changes.replaced.get(embedding or "")
        if own is not None and same_tensor(own.tensor, replacement.tensor):
            # The adapter saved one tensor under two names: the training tied head and embedding.
            if target in self.base.tensors:
                self._record(target, replacement)
            return
        tied = self._meet_tied_head()
        if tied is Tied.UNTIE:
            self.changes.unties = True
            self._record(target, replacement)
        elif tied is Tied.ADD and embedding is not None and own is None:
            self._share(embedding, target, replacement)
        else:
            other = "" if own is None else ", another than its embedding"
            reason = f"the adapter stores an output head{other}; the base ties head and embedding."
            self.defects.append(rules.HEAD_TIED.at(printable(target), reason))

    def _embedding_of(self, target: str, head: Replacement) -> str | None:
        """Return the embedding that the base ties to a head; None if there is none.

        If the adapter also replaces the embedding, the head may have another number of rows.
        """
        shape = head.stored.shape
        for name, each in self.changes.replaced.items():
            if is_embedding(_module(name)) and each.stored.shape == shape:
                shape = self.base.tensors[name].info.shape
                break
        return shared_embedding(self.base, target, *shape) if len(shape) == 2 else None

    def resize_heads(self) -> None:
        """Record the stored weights of resized heads, unless an adapter replaces the embedding."""
        for name, replacement in self._resized_heads:
            if name in self.changes.terms or name not in self.changes.replaced:
                self._record(name, replacement)
                self.changes.heads.pop(name, None)

    def part_pairs(self, matched: MatchedAdapter) -> None:
        """Keep the base's head if the adapter replaces only the embedding tied to the head."""
        replaced = self.changes.replaced
        own = {name: each.tensor for name, each in replaced.items() if each.owner is matched}
        for embedding, head in lone_embeddings(matched.adapter, matched.match, self.base, own):
            if head in replaced or head in self.changes.new:
                continue
            tied = self._meet_tied_head()
            if tied is None:
                reason = f"the adapter replaces {printable(embedding)} alone; the base ties "
                reason += "head and embedding, and PEFT keeps the head."
                self.defects.append(rules.HEAD_TIED.at(printable(head), reason))
            elif tied is Tied.ADD:
                self._share(embedding, head, replaced[embedding])
            else:
                self._keep_head(embedding, head)

    def _share(self, embedding: str, head: str, replacement: Replacement) -> None:
        """Let a tensor of an adapter replace an embedding and the head tied to the embedding."""
        reason = f"--tied add replaces {printable(embedding)} and {printable(head)} alike."
        self.changes.findings += [rules.EMBEDDING_SHARED.in_tensor(replacement.tensor.name, reason)]
        for name in (embedding, head):
            if name in self.base.tensors:
                self._record(name, replacement)

    def _keep_head(self, embedding: str, head: str) -> None:
        """Give the head the values that the embedding has in the base."""
        shape = self.changes.replaced[embedding].stored.shape
        if shape != self.base.tensors[embedding].info.shape:
            more = ", and the adapter stores no output head of the new size"
            self.defects.append(shape_differs(embedding, shape, self.base, more))
        elif head in self.base.tensors:
            self.changes.unties = True
        elif "auto_map" in self.base.config:
            raise UsageError(
                "--tied untie: the base has a class of its own, whose name for the output head is "
                "not known. Give --tied add to change head and embedding."
            )
        else:
            self.changes.unties = True
            self.changes.heads[head] = embedding

    def part_stacks(self, matched: MatchedAdapter) -> None:
        """Untie the head if the adapter stores the embedding of a stack.

        If the head is tied, transformers 4 gives each stack the shared embedding, not the stored.
        """
        changes, base = self.changes, self.base
        brought = (copy for copy in self._copies if copy in changes.new)
        stack = next((copy for copy in brought if is_embedding(_module(copy))), None)
        source = self._copies.get(stack or "")
        if source is None or changes.unties or base.model_type == "udop":
            return
        shape = base.tensors[source].info.shape
        head = tied_head(shape, matched.adapter, matched.match, base)
        if head is not None and not self._has_own_head:
            changes.unties = True
            self._settle(head, source)

    def settle_copies(self) -> None:
        """Give the values of PEFT's model to each tensor that transformers ties by one field."""
        if self.changes.unties and not self._has_own_head:
            self.changes.findings += scale_findings(self.base)
        for copy, source in self._copies.items():
            self._settle(copy, source)
        replacing = self.changes.replacing
        shapes = {name: each.stored.shape for name, each in replacing.items()}
        for name, other in followers(shapes, self.base):
            self.changes.replaced[name] = replacing[other]

    def _settle(self, copy: str, source: str) -> None:
        """Settle a tensor tied to another: see `tied_copies`."""
        changes = self.changes
        own, other = changes.replacing.get(copy), changes.replaced.get(source)
        if own is not None and copy.endswith(".bias"):
            # The model computes with the copy; transformers 4 gives both the values of the source.
            changes.replaced.setdefault(source, own)
            if not changes.unties and self.base.tie_word_embeddings is not False:
                changes.new.pop(copy, None)
        elif own is None and changes.unties and copy not in self.base.tensors:
            if other is not None and not other.is_of_copy:
                changes.new[copy] = other
            else:
                changes.heads[copy] = source


def _module(name: str) -> str:
    return name.rpartition(".")[0]
