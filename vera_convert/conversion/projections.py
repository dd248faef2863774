"""Draw A and B for an adapter, round both matrices, and convert both to the stored dtype."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vera_convert import rules
from vera_convert.adapter.adapter import MAX_PROJECTION_BYTES, Adapter, StoredProjections
from vera_convert.adapter.config import VeraConfig
from vera_convert.adapter.names import A_NAME, B_NAME
from vera_convert.base.facts import BaseFacts
from vera_convert.draws.comparison import equals
from vera_convert.draws.generator import Draw, Rounding, Variant
from vera_convert.draws.recognition import recognize
from vera_convert.errors import CheckpointError, UsageError
from vera_convert.files.tensorfile import NUMPY_DTYPE, from_array


class ProjectionSource(StrEnum):
    """Which A and B count if the file and the key give different matrices."""

    AUTO = "auto"
    """As in PEFT 0.21: the file's if save_projection is true, the key's if it is false."""
    FILE = "file"
    """The stored matrices, even if save_projection is false."""
    KEY = "key"
    """The matrices of the key, as in PEFT 0.11 to 0.20."""


def check_size(draw: Draw, *, place: str) -> None:
    """Refuse a draw whose A and B would fit no machine, before memory is allocated.

    Raises:
        CheckpointError: `PROJECTIONS_TOO_LARGE`, at `place`.
    """
    needed = 8 * draw.rank * (draw.in_features + draw.out_features)
    if needed > MAX_PROJECTION_BYTES:
        reason = (
            f"r = {draw.rank} with {draw.in_features} inputs and {draw.out_features} outputs would "
            f"take {needed:,} bytes; the limit is {MAX_PROJECTION_BYTES:,}."
        )
        raise CheckpointError(rules.PROJECTIONS_TOO_LARGE.at(place, reason))


def usual_draw(
    config: VeraConfig, base_facts: BaseFacts, in_features: int, out_features: int
) -> Draw:
    """Return the draw that PEFT makes on nearly every machine, before rounding.

    Args:
        config: the adapter's config.
        base_facts: the facts of the base, whose dims count if known.
        in_features: columns of the stored or recorded A, which count if the base's are not known.
        out_features: rows of B, likewise.
    """
    return Draw(
        Variant.FLOAT32_FUSED,
        config.projection_prng_key,
        config.r,
        base_facts.in_features or in_features,
        base_facts.out_features or out_features,
    )


def draw_on_base(config: VeraConfig, base_facts: BaseFacts) -> Draw | None:
    """Return the usual draw, rounded as on this base; None if dims or rounding are unknown."""
    inputs, outputs = base_facts.in_features, base_facts.out_features
    if inputs is None or outputs is None or base_facts.rounding is None:
        return None
    return usual_draw(config, base_facts, inputs, outputs).rounded(base_facts.rounding)


def draw_of_key(
    adapter: Adapter,
    stored: StoredProjections,
    base_facts: BaseFacts,
    variant: Variant | None = None,
) -> Draw:
    """Return the draw that PEFT up to 0.20 makes from the config's key instead of a stored pair.

    Args:
        adapter: the adapter.
        stored: the stored pair.
        base_facts: dims and rounding of the base.
        variant: the generator's variant; None for the variant of nearly every machine.

    Raises:
        UsageError: the base and the stored pair both leave the rounding open.
    """
    usual = usual_draw(adapter.config, base_facts, stored.in_features, stored.out_features)
    usual = replace(usual, variant=variant or usual.variant)
    if base_facts.rounding is not None:
        return usual.rounded(base_facts.rounding)
    found = drawn_from_key(stored, usual.key)
    if found is None or replace(found, rounding=Rounding.NONE) != usual:
        raise UsageError(
            "drawing A and B from the key needs the dtype that the base is loaded in: "
            "give --base or --base-dtype."
        )
    return found


def drawn_from_key(stored: StoredProjections, key: int) -> Draw | None:
    """Return the draw of a key that a stored pair is in every bit, or None."""
    return recognize(stored.A.array(), stored.B.array(), key=key, search=False).draw


def pair_in_effect(
    adapter: Adapter,
    base_facts: BaseFacts,
    projections: ProjectionSource,
    variant: Variant | None = None,
) -> Adapter:
    """Return the adapter with the draw of the key in place of a stored pair that differs.

    Args:
        adapter: the adapter.
        base_facts: dims and rounding of the base.
        projections: which A and B count; nothing changes unless this is `ProjectionSource.KEY`.
        variant: the generator's variant, as in `draw_of_key`.

    Raises:
        CheckpointError: the draw would fit no machine.
        UsageError: the base and the stored pair both leave the rounding open.
    """
    stored = adapter.projections
    if stored is None or projections is not ProjectionSource.KEY:
        return adapter
    drawn = draw_of_key(adapter, stored, base_facts, variant)
    check_size(drawn, place=adapter.place)
    has_dims = (drawn.in_features, drawn.out_features) == (stored.in_features, stored.out_features)
    if has_dims and equals(stored.A.array(), stored.B.array(), drawn):
        return adapter
    return with_projections(adapter, as_tensors(drawn, dtype=stored.A.dtype, place=adapter.place))


def without_projections(adapter: Adapter) -> Adapter:
    """Return the adapter with A, B, their copies and the fingerprint removed."""
    return replace(
        adapter, projections=None, repeated=(), fingerprint=None, tensors=adapter.trained
    )


def with_projections(adapter: Adapter, pair: StoredProjections) -> Adapter:
    """Return the adapter with another pair in place of the stored pair and of all copies."""
    return replace(adapter, projections=pair, repeated=(), tensors=(*adapter.trained, *pair))


def as_tensors(
    drawn: Draw, *, dtype: str, place: str, stored: tuple[int, int] | None = None
) -> StoredProjections:
    """Draw A and B and return the tensors to store.

    Args:
        drawn: the draw.
        dtype: the wanted dtype (safetensors' name); float32 is used if some value does not fit.
        place: the name of the file in messages.
        stored: (in_features, out_features) of the leading slices to keep; None keeps everything.
    """
    check_size(drawn, place=place)
    A, B = drawn.matrices()
    if stored is not None:
        A, B = A[:, : stored[0]], B[: stored[1]]
    if not (_is_exact_in(A, NUMPY_DTYPE[dtype]) and _is_exact_in(B, NUMPY_DTYPE[dtype])):
        dtype = "F32"
    return StoredProjections(from_array(A_NAME, A, dtype), from_array(B_NAME, B, dtype))


def _is_exact_in(matrix: NDArray[Any], dtype: np.dtype[Any]) -> bool:
    return matrix.dtype == dtype or bool(
        np.array_equal(matrix.astype(dtype).astype(matrix.dtype), matrix)
    )
