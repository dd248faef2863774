"""The sizes of an adapter's weights after strip and after embed, by arithmetic."""

from __future__ import annotations

from typing import NamedTuple

from vera_convert.adapter.adapter import Adapter, StoredProjections
from vera_convert.adapter.fingerprint import NO_SHA256
from vera_convert.adapter.names import A_NAME, B_NAME
from vera_convert.base.facts import BaseFacts
from vera_convert.conversion.projections import (
    ProjectionSource,
    draw_of_key,
    draw_on_base,
    with_projections,
)
from vera_convert.conversion.proof import RecognizedPair, accepted_mismatch, damage, is_undecided
from vera_convert.conversion.transforms import (
    file_size,
    fingerprint_of,
    stored_dtype,
    with_pair,
    without_pair,
)
from vera_convert.draws.generator import Draw, Rounding
from vera_convert.errors import CheckpointError
from vera_convert.files.tensorfile import TensorData

NO_HASHES = (NO_SHA256, NO_SHA256)


class FormSizes(NamedTuple):
    """The bytes of the weights file in both forms; None if the command refuses the adapter.

    Attributes:
        stripped: the bytes that `strip --accept-change` writes.
        embedded: the bytes that `embed` writes; None also if only values tell the dtype.
    """

    stripped: int | None
    embedded: int | None


def form_sizes(
    adapter: Adapter,
    own: RecognizedPair | None,
    base_facts: BaseFacts,
    projections: ProjectionSource,
) -> FormSizes:
    """Return the sizes of an adapter's weights after strip and after embed.

    Args:
        adapter: the adapter.
        own: the stored pair; None if the adapter stores none.
        base_facts: the facts of the base.
        projections: the source of A and B: ``auto``, ``file`` or ``key``.

    Raises:
        UsageError: the key's pair counts, and its rounding is not known.
    """
    stored = adapter.projections
    if stored is None or own is None:
        pair = _pair_to_draw(adapter, base_facts)
        return FormSizes(
            file_size(adapter.tensors, adapter.metadata),
            file_size(*with_pair(adapter, pair)) if pair else None,
        )
    if projections is ProjectionSource.KEY:
        return _sizes_of_key(adapter, stored, base_facts)
    embedded = file_size(adapter.tensors, adapter.metadata)
    is_damaged = damage(own, place=adapter.place) is not None
    try:
        accepted_mismatch(adapter, own, base_facts, projections)
    except CheckpointError:
        refused = is_damaged or is_undecided(adapter, projections)
        return FormSizes(None, None if refused else embedded)
    if stored.A.dtype != stored.B.dtype:
        return FormSizes(None, embedded)
    assert own.draw is not None  # noqa: S101 -- another pair was refused
    fingerprint = fingerprint_of(stored, own.draw, NO_HASHES)
    return FormSizes(file_size(*without_pair(adapter, fingerprint)), embedded)


def _sizes_of_key(adapter: Adapter, stored: StoredProjections, base_facts: BaseFacts) -> FormSizes:
    """Return the sizes if the draw of the key replaces the stored pair."""
    draw = draw_of_key(adapter, stored, base_facts)
    pair = _pair_of(draw, stored.A.dtype)
    if pair is None:
        return FormSizes(None, None)
    return FormSizes(
        file_size(*without_pair(adapter, fingerprint_of(pair, draw, NO_HASHES))),
        file_size(with_projections(adapter, pair).tensors, adapter.metadata),
    )


def _pair_to_draw(adapter: Adapter, base_facts: BaseFacts) -> StoredProjections | None:
    """Return the form of the pair that `embed` draws; None if the dims or the dtype are unknown."""
    recorded = adapter.fingerprint
    if recorded is not None:
        if not base_facts.fits(recorded.in_features, recorded.out_features):
            return None
        dims = recorded.in_features, recorded.out_features
        return empty_pair(adapter.config.r, *dims, dtype=recorded.dtype)
    draw = draw_on_base(adapter.config, base_facts)
    if draw is None or draw.out_features < adapter.longest_b:
        return None
    return _pair_of(draw, stored_dtype(adapter))


def _pair_of(draw: Draw, wanted: str) -> StoredProjections | None:
    """Return the form in which a float32 draw is stored; None if only the values tell the dtype.

    Args:
        draw: the draw with its rounding.
        wanted: the dtype that is used if this dtype holds every value; else float32 is used.
    """
    exact_in = {
        Rounding.BF16: "BF16",
        Rounding.FP16_BF16: "BF16",
        Rounding.FP16: "F16",
        Rounding.BF16_FP16: "F16",
    }.get(draw.rounding)
    dtype = wanted if wanted in ("F64", "F32", exact_in) else "F32"
    # One 16-bit dtype can hold the values of the other one if no value is too small or too large.
    if dtype != wanted and exact_in and draw.rounding is not Rounding.FP16:
        return None
    return empty_pair(draw.rank, draw.in_features, draw.out_features, dtype=dtype)


def empty_pair(rank: int, inputs: int, outputs: int, *, dtype: str) -> StoredProjections:
    """Return names, shapes and dtype of A and B, without values."""
    return StoredProjections(
        TensorData(A_NAME, dtype, (rank, inputs), lambda: iter(())),
        TensorData(B_NAME, dtype, (outputs, rank), lambda: iter(())),
    )
