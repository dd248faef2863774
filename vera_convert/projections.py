"""A and B dropped, and drawn again: what an adapter becomes by it, before anything is written.

Nothing is dropped that cannot be proven to come back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vera_convert.adapter import Adapter
from vera_convert.adaptertensors import A_NAME, B_NAME, MAX_PROJECTION_BYTES, StoredProjections
from vera_convert.errors import CheckpointError, UsageError
from vera_convert.fingerprint import METADATA_KEY, Fingerprint, to_text
from vera_convert.generator import Rounding, Variant, draw, rounded
from vera_convert.onbase import OnBase
from vera_convert.recognition import Draw, difference, recognise
from vera_convert.rules import (
    FINGERPRINT_DISAGREES,
    FINGERPRINT_NOT_MET,
    NOT_A_DRAW,
    OTHER_DIMS,
    OTHER_DRAW,
    OTHER_KEY,
    PROJECTION_TYPES_DIFFER,
    PROJECTIONS_CONTRADICT,
    PROJECTIONS_TOO_LARGE,
    PROJECTIONS_TOO_NARROW,
    ROUNDING_UNPROVEN,
    UNPROVEN_DRAW,
    UNPROVEN_ROWS,
    Finding,
)
from vera_convert.tensorfile import NUMPY_DTYPE, TensorData, from_array

REPLACED_BY_KEYS = "replaced A and B by the draw of the config's key"
LOAD_DTYPES = {
    "float32": Rounding.NONE,
    "bfloat16": Rounding.BF16,
    "float16": Rounding.FP16,
}
"""The dtypes that bases are loaded in, and what each does to projections drawn from the key."""


class Meant(StrEnum):
    """Which A and B are meant where the file and the key could give different ones."""

    AUTO = "auto"
    """As PEFT 0.21: the file's where save_projection is true, the key's where it is false."""
    FILE = "file"
    """The stored ones whatever the flag says."""
    KEY = "key"
    """The key's in any case, as PEFT 0.11 to 0.20."""


@dataclass(frozen=True, slots=True)
class Converted:
    """An adapter's content after a conversion, with what is to be said about it.

    Attributes:
        tensors: the tensors of the new file.
        metadata: its metadata.
        config_text: the bytes of its config.
        changes: what was changed, one phrase each; empty if the adapter was in that form already.
        draw: which draw the projections are, where that is known.
        findings: warnings and notes.
    """

    tensors: tuple[TensorData, ...]
    metadata: Mapping[str, str]
    config_text: bytes
    changes: tuple[str, ...] = ()
    draw: Draw | None = None
    findings: tuple[Finding, ...] = ()


def check_size(rank: int, in_features: int, out_features: int, *, place: str) -> None:
    """Refuse dimensions whose projections would not fit any machine, before memory is taken."""
    needed = 8 * rank * (in_features + out_features)
    if needed > MAX_PROJECTION_BYTES:
        raise CheckpointError(
            PROJECTIONS_TOO_LARGE.at(
                place,
                f"r = {rank} with {in_features} inputs and {out_features} outputs would take "
                f"{needed:,} bytes; the limit is {MAX_PROJECTION_BYTES:,}.",
            )
        )


# --- strip ---------------------------------------------------------------------------------------


def as_cast(variant: Variant, rounding: Rounding) -> Rounding:
    """Return a rounding as recognition calls it: `NONE` where it changes no drawn value."""
    exact = {
        "float64": (),
        "float32": (Rounding.FP32,),
        "bfloat16": (Rounding.FP32, Rounding.BF16),
        "float16": (Rounding.FP32, Rounding.FP16),
    }
    return Rounding.NONE if rounding in exact[variant.dtype.name] else rounding


def usual_draw(adapter: Adapter, on_base: OnBase, stored: StoredProjections | Fingerprint) -> Draw:
    """Return what PEFT draws on nearly every machine, not rounded yet.

    Its dims are those of the base where they are known, else those that are stored or recorded.
    """
    return Draw(
        Variant.FLOAT32_FUSED,
        adapter.config.projection_prng_key,
        adapter.config.r,
        on_base.in_features or stored.in_features,
        on_base.out_features or stored.out_features,
    )


def as_meant(adapter: Adapter, on_base: OnBase, meant: Meant) -> Adapter:
    """Return the adapter with the projections that are meant in place of the stored ones.

    Only `Meant.KEY` changes anything: what PEFT up to 0.20 draws from the key on this base takes
    the place of stored projections that are not just that.

    Raises:
        UsageError: neither the base nor what is stored tells the rounding.
    """
    stored = adapter.projections
    if stored is None or meant is not Meant.KEY:
        return adapter
    A, B = stored.A.array(), stored.B.array()
    drawn = usual_draw(adapter, on_base, stored)
    if on_base.rounding is not None:
        drawn = replace(drawn, rounding=as_cast(drawn.variant, on_base.rounding))
    else:
        found = recognise(A, B, key=drawn.key, search=False).draw
        if found is None or replace(found, rounding=Rounding.NONE) != drawn:
            raise UsageError(
                "drawing A and B from the key needs the dtype that the base is loaded in: "
                "give --base or --base-dtype."
            )
        drawn = found
    check_size(drawn.rank, drawn.in_features, drawn.out_features, place=adapter.place)
    of_size = (drawn.in_features, drawn.out_features) == (stored.in_features, stored.out_features)
    if of_size and difference(A, B, drawn) is None:
        return adapter
    pair = as_tensors(drawn, dtype=stored.A.dtype, place=adapter.place)
    replaced = {A_NAME: pair.A, B_NAME: pair.B}
    return replace(
        adapter,
        projections=pair,
        tensors=tuple(replaced.get(tensor.name, tensor) for tensor in adapter.tensors),
    )


def stripped(
    adapter: Adapter,
    on_base: OnBase,
    *,
    meant: Meant = Meant.AUTO,
    accept_change: bool = False,
) -> Converted:
    """Return an adapter without A and B, if they are proven to be redrawable.

    Args:
        adapter: the adapter; one without projections comes back as it is.
        on_base: what is known of the base that it will be loaded on.
        meant: which projections count where file, flag and key disagree.
        accept_change: drop also what PEFT would draw differently but `embedded` can restore.

    Raises:
        CheckpointError: they are no draw, the draw of another key, or (without `accept_change`)
            not the draw that PEFT makes.
    """
    original = adapter
    adapter = as_meant(adapter, on_base, meant)
    stored = adapter.projections
    if stored is None:
        return as_it_is(adapter, adapter.fingerprint.draw if adapter.fingerprint else None)
    drawn = redrawable(adapter, stored, meant)
    _demand_proof_of_rows(adapter, stored, on_base)
    change = _change(adapter, stored, drawn, on_base)
    if change is not None and _undecided(adapter, meant):
        raise CheckpointError(PROJECTIONS_CONTRADICT.at(adapter.place, change))
    if change is not None and not accept_change:
        raise CheckpointError(OTHER_DRAW.at(adapter.place, change))
    unproven = () if change is not None else _unproven(adapter, stored, drawn, on_base)
    fingerprint = Fingerprint(
        variant=drawn.variant,
        key=drawn.key,
        rank=drawn.rank,
        in_features=stored.in_features,
        out_features=stored.out_features,
        drawn_in_features=drawn.in_features,
        drawn_out_features=drawn.out_features,
        rounding=drawn.rounding,
        dtype=stored.A.dtype,
        sha256_A=_sha256(stored.A),
        sha256_B=_sha256(stored.B),
    )
    dropped = {stored.A.name, stored.B.name, *(copy.name for copy in adapter.repeated)}
    changes = [REPLACED_BY_KEYS] if adapter is not original else []
    changes.append(f"dropped A and B ({drawn.description}), {_size(stored):,} bytes")
    if adapter.repeated:
        changes.append(f"dropped {len(adapter.repeated)} copies of A and B")
    if change is not None:
        changes.append(f"accepted: {change}")
    return Converted(
        tensors=tuple(tensor for tensor in adapter.tensors if tensor.name not in dropped),
        metadata={**adapter.metadata, METADATA_KEY: to_text(fingerprint)},
        config_text=_with_flag(adapter, save_projection=False),
        changes=tuple(changes),
        draw=drawn,
        findings=(*adapter.findings, *on_base.findings, *unproven),
    )


def as_it_is(adapter: Adapter, draw: Draw | None = None) -> Converted:
    """Return an adapter's content unchanged."""
    return Converted(
        adapter.tensors,
        adapter.metadata,
        adapter.config_file.text,
        draw=draw,
        findings=adapter.findings,
    )


def _with_flag(adapter: Adapter, *, save_projection: bool) -> bytes:
    if adapter.config.save_projection == save_projection:
        return adapter.config_file.text
    return adapter.config_file.edited(save_projection=save_projection).text


def _undecided(adapter: Adapter, meant: Meant) -> bool:
    """Say whether the config denies what is stored and nobody said which is meant."""
    return not adapter.config.save_projection and meant is Meant.AUTO


def redrawable(adapter: Adapter, stored: StoredProjections, meant: Meant) -> Draw:
    """Return the draw of the config's key that the stored projections are, or refuse.

    Raises:
        CheckpointError: `NOT_A_DRAW`, `OTHER_KEY`, or `PROJECTIONS_CONTRADICT` where the config
            says that they are not stored at all; `PROJECTION_TYPES_DIFFER`.
    """
    key = adapter.config.projection_prng_key
    recognition = recognise(stored.A.array(), stored.B.array(), key=key)
    drawn = recognition.draw
    if drawn is None or not drawn.has_key(key):
        if _undecided(adapter, meant):
            reason = "they are not the draw of the config's key."
            raise CheckpointError(PROJECTIONS_CONTRADICT.at(adapter.place, reason))
        if drawn is not None:
            reason = f"they are the draw of key {drawn.key}; the config says {key}."
            raise CheckpointError(OTHER_KEY.at(adapter.place, reason))
        detail = f" {recognition.difference.description}." if recognition.difference else ""
        reason = f"no variant of key {key} gives them.{detail}"
        raise CheckpointError(NOT_A_DRAW.at(adapter.place, reason))
    if stored.A.dtype != stored.B.dtype:
        reason = f"A is {stored.A.dtype}, B is {stored.B.dtype}."
        raise CheckpointError(PROJECTION_TYPES_DIFFER.at(adapter.place, reason))
    return drawn


def _demand_proof_of_rows(adapter: Adapter, stored: StoredProjections, on_base: OnBase) -> None:
    if on_base.in_features is None and stored.out_features > adapter.longest_b:
        raise CheckpointError(
            UNPROVEN_ROWS.at(
                adapter.place,
                f"it has {stored.out_features} rows, the longest lambda_b {adapter.longest_b}.",
            )
        )


def _unproven(
    adapter: Adapter, stored: StoredProjections, drawn: Draw, on_base: OnBase
) -> Iterator[Finding]:
    """Warn where no base proves the width of A and the rounding of what PEFT will draw."""
    unproven = []
    if on_base.in_features is None:
        unproven.append(f"the width of A ({stored.in_features})")
    if on_base.rounding is None:
        unproven.append("the rounding")
    if unproven:
        dtypes = [name for name, rounding in LOAD_DTYPES.items() if rounding is drawn.rounding]
        comes_back = f"on a base loaded in {dtypes[0]}" if dtypes else "on no base of one dtype"
        why = f" ({on_base.source.rstrip('.')})" if on_base.source else ""
        reason = f"they come back {comes_back}; not proven: {' and '.join(unproven)}{why}."
        yield ROUNDING_UNPROVEN.at(adapter.place, reason)


def _change(
    adapter: Adapter, stored: StoredProjections, drawn: Draw, on_base: OnBase
) -> str | None:
    """Say how what PEFT will draw differs from what is stored, or None if it need not."""
    usual = usual_draw(adapter, on_base, stored)
    possible = on_base.roundings or (drawn.rounding,)
    if on_base.rounding is not None:
        possible = (on_base.rounding,)
    said = [
        _difference(stored, drawn, replace(usual, rounding=as_cast(usual.variant, rounding)))
        for rounding in possible
    ]
    return None if None in said else said[0]


def _difference(stored: StoredProjections, drawn: Draw, expected: Draw) -> str | None:
    """Say how stored projections differ from what is expected, or None if they do not."""
    if expected == drawn:
        return None
    reason = f"stored is {drawn.description}, PEFT would draw {expected.description}"
    if expected.in_features < stored.in_features or expected.out_features < stored.out_features:
        return f"{reason}, which is smaller."
    check_size(expected.rank, expected.in_features, expected.out_features, place=A_NAME)
    # A wider draw is compared where both have values: a layer uses the leading slice.
    found = difference(stored.A.array(), stored.B.array(), expected)
    largest = 0.0 if found is None else found.largest
    dims = expected.in_features, expected.out_features
    if largest == 0 and dims == (stored.in_features, stored.out_features):
        return None  # variants can agree in every value, as small or 16-bit matrices do
    return f"{reason}; the largest difference is {largest:.3g}."


def materialised(drawn: Draw) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return A and B of a draw, rounded as it says."""
    A, B = draw(
        drawn.variant,
        key=drawn.key,
        rank=drawn.rank,
        in_features=drawn.in_features,
        out_features=drawn.out_features,
    )
    return rounded(A, drawn.rounding), rounded(B, drawn.rounding)


def _sha256(tensor: TensorData) -> str:
    digest = sha256()
    for block in tensor.blocks():
        digest.update(block)
    return digest.hexdigest()


def _size(stored: StoredProjections) -> int:
    return stored.A.nbytes + stored.B.nbytes


# --- embed ---------------------------------------------------------------------------------------


def embedded(
    adapter: Adapter,
    on_base: OnBase,
    *,
    meant: Meant = Meant.AUTO,
    variant: Variant | None = None,
) -> Converted:
    """Return an adapter with A and B stored, drawn as the fingerprint says or as PEFT would.

    Args:
        adapter: the adapter; one with announced projections comes back as it is.
        on_base: dims and rounding, from a base's headers or given; a fingerprint needs neither.
        meant: which projections count where file, flag and key disagree.
        variant: the generator's variant where no fingerprint names it.

    Raises:
        CheckpointError: the fingerprint is not met, or the dims do not fit the adapter.
        UsageError: dims or rounding are not known from anywhere.
    """
    original = adapter
    adapter = as_meant(adapter, on_base, meant)
    if adapter.projections is not None:
        return _announced(adapter, on_base, meant, redrawn=adapter is not original)
    if adapter.fingerprint is not None:
        return _restored(adapter, adapter.fingerprint, on_base, variant)
    return _redrawn(adapter, on_base, variant or Variant.FLOAT32_FUSED)


def _announced(adapter: Adapter, on_base: OnBase, meant: Meant, *, redrawn: bool) -> Converted:
    """Keep stored projections and make the config say that they are there."""
    changes = [REPLACED_BY_KEYS] if redrawn else []
    findings = [*adapter.findings, *other_dims(adapter, on_base)]
    drawn = None
    if not adapter.config.save_projection:
        if adapter.projections is not None and _undecided(adapter, meant):
            drawn = redrawable(adapter, adapter.projections, meant)
            _demand_proof_of_rows(adapter, adapter.projections, on_base)
            change = _change(adapter, adapter.projections, drawn, on_base)
            if change is not None:
                raise CheckpointError(PROJECTIONS_CONTRADICT.at(adapter.place, change))
            findings += _unproven(adapter, adapter.projections, drawn, on_base)
        changes.append("set save_projection to true")
    return replace(
        as_it_is(adapter, drawn),
        config_text=_with_flag(adapter, save_projection=True),
        changes=tuple(changes),
        findings=tuple(findings),
    )


def other_dims(adapter: Adapter, on_base: OnBase) -> Iterator[Finding]:
    """Warn that stored projections have not the dims that PEFT demands on the base."""
    stored = adapter.projections
    if stored is not None and not on_base.fits(stored.in_features, stored.out_features):
        reason = (
            f"they are for {stored.in_features} inputs and {stored.out_features} outputs; "
            f"{on_base.dims_text}."
        )
        yield OTHER_DIMS.at(adapter.place, reason)


def _restored(
    adapter: Adapter, fingerprint: Fingerprint, on_base: OnBase, variant: Variant | None
) -> Converted:
    """Draw what the fingerprint records and prove that it came back."""
    place = adapter.place
    if variant is not None and variant is not fingerprint.variant:
        raise UsageError(
            f"the adapter's fingerprint says that A and B were drawn as {fingerprint.variant}; "
            f"leave --generator {variant} out."
        )
    if not on_base.fits(fingerprint.in_features, fingerprint.out_features):
        reason = (
            f"the fingerprint gives A and B for {fingerprint.in_features} inputs and "
            f"{fingerprint.out_features} outputs; {on_base.dims_text}."
        )
        raise CheckpointError(FINGERPRINT_DISAGREES.at(place, reason))
    drawn = fingerprint.draw
    pair = as_tensors(
        drawn,
        dtype=fingerprint.dtype,
        place=place,
        stored=(fingerprint.in_features, fingerprint.out_features),
    )
    for name, tensor, recorded in (
        ("vera_A", pair.A, fingerprint.sha256_A),
        ("vera_B", pair.B, fingerprint.sha256_B),
    ):
        found = _sha256(tensor)
        if found != recorded:
            reason = f"{name} has SHA-256 {found[:16]}…, the fingerprint says {recorded[:16]}…."
            raise CheckpointError(FINGERPRINT_NOT_MET.at(place, reason))
    proof = "proven by the fingerprint to be the same matrices"
    return _with_pair(adapter, pair, drawn, proof, ())


def _redrawn(adapter: Adapter, on_base: OnBase, variant: Variant) -> Converted:
    """Draw A and B for the base that is known, with nothing to prove them by."""
    if on_base.in_features is None or on_base.out_features is None:
        why = f" ({on_base.source.rstrip('.')})" if on_base.source else ""
        raise UsageError(
            "A and B cannot be drawn from the adapter alone: their width is that of the widest "
            f"layer of the base{why}. Give --base, or --in-features and --out-features."
        )
    if on_base.rounding is None:
        raise UsageError(
            "A and B are rounded to the dtype that the base is loaded in, and it is not known: "
            "give --base or --base-dtype."
        )
    if on_base.out_features < adapter.longest_b:
        reason = (
            f"B would have {on_base.out_features} rows; a layer has {adapter.longest_b} outputs."
        )
        raise CheckpointError(PROJECTIONS_TOO_NARROW.at(adapter.place, reason))
    drawn = Draw(
        variant,
        adapter.config.projection_prng_key,
        adapter.config.r,
        on_base.in_features,
        on_base.out_features,
        as_cast(variant, on_base.rounding),
    )
    pair = as_tensors(drawn, dtype=_stored_dtype(adapter), place=adapter.place)
    unproven = UNPROVEN_DRAW.at(adapter.place, f"drew {drawn.description}.")
    return _with_pair(adapter, pair, drawn, "not proven", (*on_base.findings, unproven))


def _stored_dtype(adapter: Adapter) -> str:
    """Return the lambdas' dtype, or float32 where they have several."""
    dtypes = {
        tensor.dtype
        for layer in adapter.layers.values()
        for tensor in (layer.lambda_b, layer.lambda_d)
    }
    return dtypes.pop() if len(dtypes) == 1 else "F32"


def as_tensors(
    drawn: Draw, *, dtype: str, place: str, stored: tuple[int, int] | None = None
) -> StoredProjections:
    """Draw A and B and give them the form in which they are stored.

    Args:
        drawn: what to draw.
        dtype: wanted dtype (safetensors' name); float32 where it could not hold the values.
        place: for messages.
        stored: (in_features, out_features) of the leading slices to keep; None keeps all.
    """
    check_size(drawn.rank, drawn.in_features, drawn.out_features, place=place)
    A, B = materialised(drawn)
    if stored is not None:
        A, B = A[:, : stored[0]], B[: stored[1]]
    if not (_is_exact_in(A, NUMPY_DTYPE[dtype]) and _is_exact_in(B, NUMPY_DTYPE[dtype])):
        dtype = "F32"
    return StoredProjections(from_array(A_NAME, A, dtype), from_array(B_NAME, B, dtype))


def _is_exact_in(matrix: NDArray[Any], dtype: np.dtype[Any]) -> bool:
    return matrix.dtype == dtype or bool(
        np.array_equal(matrix.astype(dtype).astype(matrix.dtype), matrix)
    )


def _with_pair(
    adapter: Adapter,
    pair: StoredProjections,
    drawn: Draw,
    proof: str,
    findings: tuple[Finding, ...],
) -> Converted:
    metadata = {key: text for key, text in adapter.metadata.items() if key != METADATA_KEY}
    return Converted(
        tensors=(*adapter.tensors, pair.A, pair.B),
        metadata=metadata,
        config_text=_with_flag(adapter, save_projection=True),
        changes=(f"drew A and B ({drawn.description}), {_size(pair):,} bytes, {proof}",),
        draw=drawn,
        findings=(*adapter.findings, *findings),
    )
