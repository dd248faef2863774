"""Find out whether wrong tensors are right with the recorded options, or with other A and B."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from vera_convert.conversion.projections import ProjectionSource
from vera_convert.dtypes import USUAL_OF_BASES
from vera_convert.errors import VeraConvertError
from vera_convert.merging.base_files import BaseFiles
from vera_convert.verification.merge_inputs import RepeatedMerge
from vera_convert.verification.provenance import MergeSettings
from vera_convert.verification.tensors import check_tensors

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
