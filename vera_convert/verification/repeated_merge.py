"""Open the inputs of a merge again, and compare the inputs with the record of the merge.

If tensors are wrong, try the options of the record, and other A and B.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256

from vera_convert import rules
from vera_convert.base.facts import BaseOptions
from vera_convert.base.model import BaseModel
from vera_convert.conversion.projections import ProjectionSource
from vera_convert.dtypes import USUAL_OF_BASES
from vera_convert.errors import CheckpointError, UsageError, VeraConvertError
from vera_convert.hub.lookup import HubAccess
from vera_convert.merging.adapters import AdapterSpec, MatchedAdapter, find_adapters
from vera_convert.merging.base_files import BaseFiles
from vera_convert.merging.changes import Changes, MergedTensor, merged_tensors
from vera_convert.merging.collect import collect
from vera_convert.merging.inputs import MergeInputs, open_inputs
from vera_convert.rules import Finding
from vera_convert.text import printable
from vera_convert.verification.provenance import MergeSettings, Provenance, RecordedAdapter
from vera_convert.verification.tensors import check_tensors


@dataclass(frozen=True, slots=True, eq=False)
class OpenedMerge:
    """The opened inputs of a merge.

    Attributes:
        inputs: the base, and the adapters with the weights of the merge.
        changes: the changes that the adapters make to the base.
        findings: differences between the record, and the adapters and the base.
    """

    inputs: MergeInputs
    changes: Changes
    findings: tuple[Finding, ...]

    @property
    def expected(self) -> dict[str, MergedTensor]:
        """The expected tensors of the merged model, by name."""
        inputs = self.inputs
        return merged_tensors(inputs.base, self.changes, dtype=inputs.options.header_dtype)


@dataclass(frozen=True, slots=True, eq=False)
class RepeatedMerge:
    """A merge to compute again: the named inputs, and the options.

    Attributes:
        adapters: the adapters, in the order of the merge.
        base: the caller's options for the base.
        settings: the options of the merge.
        provenance: the record of the merge; None without a record.
        access: how the Hub is reached.
    """

    adapters: Sequence[AdapterSpec]
    base: BaseOptions
    settings: MergeSettings
    provenance: Provenance | None
    access: HubAccess

    @property
    def may_be_wider(self) -> bool:
        """Whether tensors may have a wider dtype than the base: another program saved the model."""
        return self.settings.dtype is None and self.provenance is None

    @contextmanager
    def opened(self) -> Iterator[OpenedMerge]:
        """Open the inputs as the merge does.

        Raises:
            CheckpointError: the adapters are malformed, or do not fit together or the base.
            UsageError: an adapter changes a tied head, and `tied` is not set.
            SurroundingsError: a file or a repo is missing or cannot be read.
        """
        options, found = self.settings.merge_options, find_adapters(self.adapters, self.access)
        dtype, key_map = self.settings.base_dtype, self.settings.key_map
        base = replace(self.base, dtype=dtype, key_map=key_map)
        with open_inputs(found, base, options, self.access) as opened:
            adapters, findings = _weighted(opened.adapters, self.adapters, self.provenance)
            inputs = replace(opened, adapters=adapters)
            if self.provenance is not None:
                findings += _other_base(inputs.base.model, self.provenance)
            yield OpenedMerge(inputs, _changes(inputs), tuple(findings))


def _changes(inputs: MergeInputs) -> Changes:
    try:
        return collect(inputs)
    except CheckpointError as error:
        if any(finding.rule is not rules.HEAD_TIED for finding in error.findings):
            raise
        raise UsageError(
            f"{error} The merged model has no record of the merge: give the `--tied` of the merge."
        ) from error


# --- the record ----------------------------------------------------------------------------------


def _weighted(
    adapters: Sequence[MatchedAdapter], given: Sequence[AdapterSpec], provenance: Provenance | None
) -> tuple[tuple[MatchedAdapter, ...], list[Finding]]:
    """Return the adapters with the weights of the merge, and findings about other adapters.

    Hashes identify an adapter, so the order does not matter. An adapter without a recorded hash
    takes the weight of the next unused record.
    """
    findings: list[Finding] = []
    records = _records(adapters, provenance)
    weighted = []
    for matched, spec, record in zip(adapters, given, records, strict=True):
        weight = spec.weight
        if weight is None:
            weight = record.weight if record is not None else 1.0
        weighted.append(replace(matched, weight=weight))
        if record is not None and _hashes(matched) != (record.config_sha256, record.header_sha256):
            reason = f'"{printable(record.name)}" was merged instead.'
            findings.append(rules.OTHER_ADAPTER_MERGED.at(matched.label, reason))
    return tuple(weighted), findings


def _records(
    adapters: Sequence[MatchedAdapter], provenance: Provenance | None
) -> list[RecordedAdapter | None]:
    """Return the record of each adapter by hash, or else the next unused record."""
    if provenance is None:
        return [None] * len(adapters)
    left = [*provenance.adapters]
    found: list[RecordedAdapter | None] = []
    for matched in adapters:
        same = [r for r in left if (r.config_sha256, r.header_sha256) == _hashes(matched)]
        found.append(same[0] if same else None)
        if same:
            left.remove(same[0])
    return [record or left.pop(0) for record in found]


def _hashes(matched: MatchedAdapter) -> tuple[str, str]:
    config, header = matched.adapter.config_file.text, matched.header.raw
    return sha256(config).hexdigest(), sha256(header).hexdigest()


def _other_base(base: BaseModel, provenance: Provenance) -> Iterator[Finding]:
    headers = {name: sha256(header.raw).hexdigest() for name, header in base.files.items()}
    if headers != dict(provenance.base_headers):
        names = {*headers.items()} ^ {*provenance.base_headers.items()}
        reason = f"{printable(min(names)[0])} differs from the recorded file."
        yield rules.OTHER_BASE_MERGED.at(base.location.label, reason)


# --- other options -------------------------------------------------------------------------------


_SENTENCES = {
    ProjectionSource.KEY: (
        "The tensor is right with A and B drawn from the key, as PEFT 0.11 to 0.20 merges: verify "
        "with --projections key"
    ),
    ProjectionSource.FILE: (
        "The tensor is right with the stored A and B, as PEFT 0.21 merges if save_projection is "
        "true: verify with --projections file"
    ),
}


def right_with_other_projections(
    merge: RepeatedMerge, merged: BaseFiles, names: Sequence[str]
) -> dict[str, str]:
    """Return the cause for each wrong tensor that is right with other A and B or options.

    Args:
        merge: the merge.
        merged: the merged model.
        names: the wrong tensors, the worst first.
    """
    for projections, dtype in _others(merge.settings):
        settings = replace(merge.settings, projections=projections, base_dtype=dtype)
        other = replace(merge, settings=settings)
        # The two worst tensors rule out most of the others.
        if _right(other, merged, names[:2]):
            sentence = _SENTENCES[projections]
            if dtype != merge.settings.base_dtype:
                sentence += f" --base-dtype {dtype}"
            return dict.fromkeys(_right(other, merged, names), f"{sentence}.")
    return _right_as_recorded(merge, merged, names)


def _right_as_recorded(
    merge: RepeatedMerge, merged: BaseFiles, names: Sequence[str]
) -> dict[str, str]:
    """Return the cause for each wrong tensor that is right with the options of the record."""
    if merge.provenance is None or not merge.settings.given:
        return {}
    adapters = [replace(each, weight=None) for each in merge.adapters]
    recorded = replace(merge, adapters=adapters, settings=merge.provenance.settings)
    sentence = (
        "The tensor is right with the options that merge-provenance.json records: leave out "
        f"{' and '.join(merge.settings.given_flags)}."
    )
    return dict.fromkeys(_right(recorded, merged, names), sentence)


def _others(settings: MergeSettings) -> Iterator[tuple[ProjectionSource, str | None]]:
    own = settings.base_dtype
    for projections in (ProjectionSource.KEY, ProjectionSource.FILE):
        if projections is not settings.projections:
            yield projections, own
    for dtype in USUAL_OF_BASES:
        if dtype != own:
            yield ProjectionSource.KEY, dtype


def _right(merge: RepeatedMerge, merged: BaseFiles, names: Sequence[str]) -> list[str]:
    """Return the tensors that are right, if the first two are."""
    try:
        with merge.opened() as source:
            expected = source.expected
            found = check_tensors(
                {name: expected[name] for name in names if name in expected},
                merged,
                wider_too=merge.may_be_wider,
                explain=lambda wrong: dict.fromkeys(wrong, "not with these"),
            )
    except VeraConvertError:  # the adapter has no such A and B
        return []
    right = {check.name for check in found.checks if check.passed}
    return [name for name in names if name in right] if right.issuperset(names[:2]) else []
