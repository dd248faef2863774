"""The content of an adapter without A and B, and with A and B, before anything is written.

A and B are dropped only if a proof shows that PEFT or `embed` regenerates the same matrices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from vera_convert import rules
from vera_convert.adapter.adapter import Adapter, StoredProjections
from vera_convert.adapter.fingerprint import METADATA_KEY, Fingerprint, to_text
from vera_convert.base.facts import BaseFacts
from vera_convert.conversion.projections import ProjectionSource, as_tensors, pair_in_effect
from vera_convert.conversion.proof import (
    accepted_mismatch,
    damage,
    is_undecided,
    other_dims,
    recognized,
    unfit_dims,
    unproven,
    unproven_draw,
)
from vera_convert.draws.generator import Draw, Rounding, Variant
from vera_convert.errors import CheckpointError, UsageError, refuse
from vera_convert.files.header import Entry, header_bytes, in_order
from vera_convert.files.tensorfile import TensorData
from vera_convert.rules import Finding

REPLACED_BY_KEYS = "replaced A and B by the draw of the config's key"

IDLE_GENERATOR = rules.OPTION_WITHOUT_EFFECT.at(
    "--generator", "A and B are stored, so neither is regenerated."
)
"""The warning if a caller names a generator and nothing is drawn."""


@dataclass(frozen=True, slots=True)
class NewAdapter:
    """The content of a converted adapter, with the findings about this content.

    Attributes:
        adapter: the adapter before the conversion.
        tensors: the tensors of the new file.
        metadata: the metadata of the new file.
        config_text: the bytes of the new config.
        changes: one phrase for each change; empty if the adapter had this form already.
        draw: the draw that the projections are, if known.
        findings: warnings and notes.
    """

    adapter: Adapter
    tensors: tuple[TensorData, ...]
    metadata: Mapping[str, str]
    config_text: bytes
    changes: tuple[str, ...] = ()
    draw: Draw | None = None
    findings: tuple[Finding, ...] = ()

    @property
    def keeps_weights(self) -> bool:
        """Whether the file of weights stays the same."""
        return not self.changes and self.tensors is self.adapter.tensors

    @property
    def weights_size(self) -> int:
        """The bytes of the new file of weights."""
        if self.keeps_weights:
            return self.adapter.weights_size
        return file_size(self.tensors, self.metadata)


def file_size(tensors: Iterable[Entry], metadata: Mapping[str, str]) -> int:
    """Return the size of a safetensors file in bytes."""
    ordered = in_order(tensors)
    return len(header_bytes(ordered, metadata)) + sum(tensor.nbytes for tensor in ordered)


def as_it_is(adapter: Adapter, draw: Draw | None = None) -> NewAdapter:
    """Return an adapter's content unchanged."""
    return NewAdapter(
        adapter,
        adapter.tensors,
        adapter.metadata,
        adapter.config_file.text,
        draw=draw,
        findings=adapter.findings,
    )


def already_stripped(adapter: Adapter) -> NewAdapter:
    """Return a stripped adapter unchanged.

    Raises:
        CheckpointError: `FINGERPRINT_NOT_MET`, if the check takes no time.
    """
    recorded = adapter.fingerprint
    if recorded is not None and recorded.is_small:
        prove(recorded, place=adapter.place)
    return as_it_is(adapter, recorded.draw if recorded else None)


def _still_true(adapter: Adapter) -> tuple[Finding, ...]:
    """Return an adapter's findings after the config's flag is set to agree with the file."""
    return tuple(f for f in adapter.findings if f.rule is not rules.PROJECTIONS_UNANNOUNCED)


def _with_flag(adapter: Adapter, *, save_projection: bool) -> bytes:
    if adapter.config.save_projection == save_projection:
        return adapter.config_file.text
    return adapter.config_file.edited({"save_projection": save_projection}).text


def stripped(
    adapter: Adapter,
    base_facts: BaseFacts,
    *,
    projections: ProjectionSource = ProjectionSource.AUTO,
    accept_change: bool = False,
) -> NewAdapter:
    """Return an adapter without A and B, if the key is proven to regenerate both.

    Args:
        adapter: the adapter; a stripped adapter is returned unchanged.
        base_facts: the facts of the base that the adapter will be loaded on.
        projections: the source of A and B: ``auto``, ``file`` or ``key``.
        accept_change: drop A and B even if PEFT would draw others; `embedded` restores the pair.

    Raises:
        CheckpointError: A and B are no draw, the draw of another key, or (without `accept_change`)
            another draw than PEFT makes.
    """
    original = adapter
    adapter = pair_in_effect(adapter, base_facts, projections)
    stored = adapter.projections
    if stored is None:
        return already_stripped(adapter)
    own = recognized(adapter.config, stored)
    change = accepted_mismatch(adapter, own, base_facts, projections)
    if stored.A.dtype != stored.B.dtype:  # a fingerprint records one dtype
        reason = f"A is {stored.A.dtype}, B is {stored.B.dtype}."
        raise CheckpointError(rules.PROJECTION_TYPES_DIFFER.at(adapter.place, reason))
    if change is not None and not accept_change:
        raise CheckpointError(rules.OTHER_DRAW.at(adapter.place, change))
    assert own.draw is not None  # noqa: S101 -- another pair was refused
    warned = () if change is not None else unproven(adapter, own, base_facts)
    changes = [REPLACED_BY_KEYS] if adapter is not original else []
    changes.append(f"dropped A and B ({own.draw.description}), {stored.nbytes:,} bytes")
    if adapter.repeated:
        changes.append(f"dropped {len(adapter.repeated)} copies of A and B")
    if change is not None:
        changes.append(f"accepted: {change}")
    hashes = stored.A.sha256(), stored.B.sha256()
    tensors, metadata = without_pair(adapter, fingerprint_of(stored, own.draw, hashes))
    return NewAdapter(
        adapter,
        tensors=tensors,
        metadata=metadata,
        config_text=_with_flag(adapter, save_projection=False),
        changes=tuple(changes),
        draw=own.draw,
        findings=(*_still_true(adapter), *base_facts.findings, *warned),
    )


def fingerprint_of(stored: StoredProjections, draw: Draw, hashes: tuple[str, str]) -> Fingerprint:
    """Return the record of a stored pair that is this draw."""
    return Fingerprint(
        variant=draw.variant,
        key=draw.key,
        rank=draw.rank,
        in_features=stored.in_features,
        out_features=stored.out_features,
        drawn_in_features=draw.in_features,
        drawn_out_features=draw.out_features,
        rounding=draw.rounding,
        dtype=stored.A.dtype,
        sha256_A=hashes[0],
        sha256_B=hashes[1],
    )


def without_pair(
    adapter: Adapter, fingerprint: Fingerprint
) -> tuple[tuple[TensorData, ...], dict[str, str]]:
    """Return the tensors and the metadata of an adapter whose A and B are only recorded."""
    return adapter.trained, {**adapter.metadata, METADATA_KEY: to_text(fingerprint)}


def embedded(
    adapter: Adapter,
    base_facts: BaseFacts,
    *,
    projections: ProjectionSource = ProjectionSource.AUTO,
    variant: Variant | None = None,
) -> NewAdapter:
    """Return an adapter with A and B stored, drawn as the fingerprint records or as PEFT draws.

    Args:
        adapter: the adapter, returned unchanged if the config says that A and B are stored.
        base_facts: dims and rounding of the base; with a fingerprint, neither is needed.
        projections: the source of A and B: ``auto``, ``file`` or ``key``.
        variant: the generator's variant, if no fingerprint names the variant.

    Raises:
        CheckpointError: the drawn A and B have other hashes than the fingerprint, or the dims do
            not fit the adapter.
        UsageError: the dims or the rounding are unknown.
    """
    original = adapter
    adapter = pair_in_effect(adapter, base_facts, projections, variant)
    if adapter.projections is not None:
        kept = _announced(adapter, base_facts, projections, redrawn=adapter is not original)
        is_idle = projections is not ProjectionSource.KEY and variant is not None
        return replace(kept, findings=(*kept.findings, IDLE_GENERATOR)) if is_idle else kept
    recorded = adapter.fingerprint
    if recorded is not None and projections is not ProjectionSource.KEY:
        return _restored(adapter, recorded, base_facts, variant)
    if recorded is not None:  # the recorded dims count, even if the recorded draw does not
        base_facts = replace(
            base_facts,
            in_features=base_facts.in_features or recorded.in_features,
            out_features=base_facts.out_features or recorded.out_features,
        )
    return _redrawn(adapter, base_facts, variant or Variant.FLOAT32_FUSED)


def _announced(
    adapter: Adapter, base_facts: BaseFacts, projections: ProjectionSource, *, redrawn: bool
) -> NewAdapter:
    """Keep the stored A and B, and set the config's flag for stored A and B."""
    assert adapter.projections is not None  # noqa: S101 -- the caller looked
    changes = [REPLACED_BY_KEYS] if redrawn else []
    findings = [*_still_true(adapter), *other_dims(adapter, base_facts)]
    drawn = None
    if not redrawn:
        own = recognized(adapter.config, adapter.projections)
        damaged = damage(own, place=adapter.place)
        if damaged is not None:
            raise CheckpointError(damaged)
        if is_undecided(adapter, projections):
            accepted_mismatch(adapter, own, base_facts, projections)  # refuses every mismatch
            drawn = own.draw
            findings += unproven(adapter, own, base_facts)
    if not adapter.config.save_projection:
        changes.append("set save_projection to true")
    return replace(
        as_it_is(adapter, drawn),
        config_text=_with_flag(adapter, save_projection=True),
        changes=tuple(changes),
        findings=tuple(findings),
    )


def _restored(
    adapter: Adapter, fingerprint: Fingerprint, base_facts: BaseFacts, variant: Variant | None
) -> NewAdapter:
    """Draw the pair that the fingerprint records, and compare the hashes."""
    place = adapter.place
    if variant is not None and variant is not fingerprint.variant:
        raise UsageError(
            f"the adapter's fingerprint says that A and B were drawn as {fingerprint.variant}; "
            f"leave --generator {variant} out."
        )
    refuse(unfit_dims(fingerprint, base_facts, place=place))
    pair = prove(fingerprint, place=place)
    proof = "proven identical by the fingerprint"
    return _with_drawn(adapter, pair, fingerprint.draw, proof, ())


def prove(fingerprint: Fingerprint, *, place: str) -> StoredProjections:
    """Draw and return the pair that a fingerprint records, if A and B have the recorded hashes.

    Raises:
        CheckpointError: `FINGERPRINT_NOT_MET`, or the pair is absurdly large.
    """
    pair = as_tensors(
        fingerprint.draw,
        dtype=fingerprint.dtype,
        place=place,
        stored=(fingerprint.in_features, fingerprint.out_features),
    )
    for name, tensor, recorded in (
        ("vera_A", pair.A, fingerprint.sha256_A),
        ("vera_B", pair.B, fingerprint.sha256_B),
    ):
        found = tensor.sha256()
        if found != recorded:
            reason = f"{name} has SHA-256 {found[:16]}…, the fingerprint says {recorded[:16]}…."
            raise CheckpointError(rules.FINGERPRINT_NOT_MET.at(place, reason))
    return pair


def _redrawn(adapter: Adapter, base_facts: BaseFacts, variant: Variant) -> NewAdapter:
    """Draw A and B for a base; nothing proves that the adapter was trained with this pair."""
    if base_facts.in_features is None or base_facts.out_features is None:
        why = f" ({base_facts.source.rstrip('.')})" if base_facts.source else ""
        raise UsageError(
            "A and B cannot be drawn from the adapter alone, because the widest layer of the base "
            f"decides their size{why}.",
            base_facts.size_remedy,
        )
    if base_facts.rounding is None and base_facts.unclear:
        raise UsageError(
            "A and B are drawn from the key and rounded, and the base does not decide to which "
            f"dtype: {base_facts.unclear}",
            "Give the dtype with --base-dtype.",
        )
    if base_facts.rounding is None:
        raise UsageError(
            "PEFT rounds A and B to the dtype that the base is loaded in, which is not known.",
            "Give --base or --base-dtype.",
        )
    if base_facts.out_features < adapter.longest_b:
        reason = (
            f"B would have {base_facts.out_features} rows; a layer has {adapter.longest_b} outputs."
        )
        raise CheckpointError(rules.PROJECTIONS_TOO_NARROW.at(adapter.place, reason))
    drawn = Draw(
        variant,
        adapter.config.projection_prng_key,
        adapter.config.r,
        base_facts.in_features,
        base_facts.out_features,
    ).rounded(base_facts.rounding)
    pair = as_tensors(drawn, dtype=stored_dtype(adapter), place=adapter.place)
    exact = drawn.rounding is Rounding.NONE and drawn.variant.dtype.name == "float64"
    if pair.A.dtype == "F32" and exact:
        drawn = replace(drawn, rounding=Rounding.FP32)  # float32 cannot hold the further bits
    reason = f"A and B were regenerated: {drawn.description}. No fingerprint proves these matrices."
    finding = unproven_draw(adapter.config, reason, place=adapter.place)
    return _with_drawn(
        adapter, pair, drawn, "not proven: there is no fingerprint", (*base_facts.findings, finding)
    )


def stored_dtype(adapter: Adapter) -> str:
    """Return the dtype of the lambdas, or float32 if the lambdas have several dtypes."""
    dtypes = adapter.lambda_dtypes
    return min(dtypes) if len(dtypes) == 1 else "F32"


def with_pair(
    adapter: Adapter, pair: StoredProjections
) -> tuple[tuple[TensorData, ...], dict[str, str]]:
    """Return the tensors and the metadata of a stripped adapter whose A and B are stored again."""
    metadata = {key: text for key, text in adapter.metadata.items() if key != METADATA_KEY}
    return (*adapter.tensors, *pair), metadata


def _with_drawn(
    adapter: Adapter,
    pair: StoredProjections,
    drawn: Draw,
    proof: str,
    findings: tuple[Finding, ...],
) -> NewAdapter:
    tensors, metadata = with_pair(adapter, pair)
    return NewAdapter(
        adapter,
        tensors=tensors,
        metadata=metadata,
        config_text=_with_flag(adapter, save_projection=True),
        changes=(f"regenerated A and B ({drawn.description}), {pair.nbytes:,} bytes, {proof}",),
        draw=drawn,
        findings=(*adapter.findings, *findings),
    )
