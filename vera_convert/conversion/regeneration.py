"""regenerate: draw the two shared matrices and write both to one file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from vera_convert import rules
from vera_convert.adapter.adapter import Adapter
from vera_convert.adapter.config import KEY_RANGE, MAX_RANK
from vera_convert.adapter.names import A_NAME, B_NAME
from vera_convert.arguments import one_of, optional, path, whole_number
from vera_convert.base.bases import Bases
from vera_convert.base.facts import BaseFacts, BaseOptions, base_options_of
from vera_convert.base.resolve import Need, resolve_base
from vera_convert.conversion.projections import check_size, drawn_from_key, without_projections
from vera_convert.conversion.transforms import embedded
from vera_convert.conversion.work import opened
from vera_convert.draws.generator import Draw, Rounding, Variant, rounding_on_base
from vera_convert.dtypes import FLOAT_NAMES
from vera_convert.errors import (
    CheckpointError,
    ConflictError,
    ParameterError,
    SurroundingsError,
    UsageError,
)
from vera_convert.files.header import read_header
from vera_convert.files.reading import file_sha256, open_local
from vera_convert.files.tensorfile import from_array, write_tensors
from vera_convert.hub.lookup import HubAccess
from vera_convert.publish.publishing import Output
from vera_convert.rules import Finding
from vera_convert.text import read_back_differs, short_repr

_STORED_REMEDY = (
    "If the adapter was trained with the stored A and B, read both from adapter_model.safetensors. "
    "To try another draw of the key, pass --generator."
)
"""The remedy if OUT has other matrices than the adapter stores."""


@dataclass(frozen=True, slots=True)
class Regenerated:
    """The report of `regenerate`.

    Attributes:
        out: the file that was written, with ``vera_A`` (r, in) and ``vera_B`` (out, r).
        draw: the draw that A and B are.
        dtype: the stored dtype.
        sha256_A: SHA-256 of A's bytes, in hex.
        sha256_B: SHA-256 of B's bytes, in hex.
        size: bytes of the file.
        findings: warnings and notes.
    """

    out: Path
    draw: Draw
    dtype: str
    sha256_A: str  # noqa: N815 -- the matrix is called A everywhere
    sha256_B: str  # noqa: N815
    size: int
    findings: tuple[Finding, ...] = ()

    __repr__ = short_repr


def regenerate(
    out: str | Path,
    *,
    rank: int,
    in_features: int,
    out_features: int,
    key: int = 0,
    generator: Variant | str = Variant.FLOAT32_FUSED,
    rounding: Rounding | str = Rounding.NONE,
    force: bool = False,
) -> Regenerated:
    """Draw A (rank, in_features), then B (out_features, rank), and write A and B to a file.

    Args:
        out: the ``.safetensors`` file to write, with tensors ``vera_A`` and ``vera_B``.
        rank: rows of A and columns of B.
        in_features: columns of A.
        out_features: rows of B.
        key: the seed, `projection_prng_key` of a config.
        generator: how PyTorch drew A and B; the variant decides the dtype of both.
        rounding: the cast that a base of another dtype applies.
        force: replace an `out` that an earlier call wrote.

    Raises:
        UsageError: a number is out of range, or `out` exists.
        SurroundingsError: the disk fails.

    Example:
        >>> regenerate("ab.safetensors", rank=4, in_features=16, out_features=16).dtype
        'F32'
    """
    variant, cast = one_of("generator", Variant, generator), rounding_of(rounding)
    key, rank = whole_number("key", key, least=None), whole_number("rank", rank)
    in_features = whole_number("in_features", in_features)
    out_features = whole_number("out_features", out_features)
    output = Output(path("out", out), is_pair, force, is_folder=False)
    if rank > MAX_RANK:
        raise ParameterError("rank", f"is {rank}: give a rank up to {MAX_RANK}.")
    if key not in KEY_RANGE:
        raise ParameterError("key", f"is {key}: give a whole number from -2^63 to 2^64 - 1.")
    drawn = Draw(variant, key, rank, in_features, out_features, cast)
    try:
        check_size(drawn, place="the options")
    except CheckpointError as error:
        raise UsageError(f"{error.findings[0].reason} Give smaller sizes.") from error
    if cast is not Rounding.NONE and variant.dtype.itemsize == 2:
        sentence = f"{{}} is {variant}, which draws 16-bit values: leave {{}} out."
        raise ConflictError(sentence, "generator", "rounding")
    return _write(output, drawn, drawn.matrices())


def rounding_of(value: Rounding | str) -> Rounding:
    """Return the rounding that a member, a member's string or the dtype of a base names.

    Raises:
        UsageError: the value names no rounding.
    """
    is_dtype = value in FLOAT_NAMES
    return one_of("rounding", Rounding, rounding_on_base(value) if is_dtype else value)


def regenerate_for(
    adapter: str | Path,
    out: str | Path,
    *,
    base: BaseOptions | str | Path | None = None,
    generator: Variant | str | None = None,
    force: bool = False,
    revision: str | None = None,
    access: HubAccess | None = None,
) -> Regenerated:
    """Draw A and B of an adapter from the key and the base, and write A and B to a file.

    The dims are those of the fingerprint, else of the stored projections, else of the base.

    Args:
        adapter: a folder or a repo on the Hub.
        out: the ``.safetensors`` file to write, with tensors ``vera_A`` and ``vera_B``.
        base: the options of the base, or the base itself: a folder or a repo on the Hub.
        generator: how PyTorch drew A and B, if nothing in the adapter tells.
        force: replace an `out` that an earlier call wrote.
        revision: the branch, tag or commit of the adapter's repo.
        access: how the Hub is reached.

    Raises:
        CheckpointError: the adapter is malformed, or the drawn A and B have other hashes than the
            fingerprint.
        UsageError: dims or dtype are not known; `out` exists, or overlaps the adapter.
        SurroundingsError: a file, a repo or the disk fails.

    Example:
        >>> regenerate_for("adapter", "ab.safetensors").draw.key
        7
    """
    base_options = base_options_of(base)
    output = Output(path("out", out), is_pair, force, is_folder=False)
    given = optional(one_of, "generator", Variant, generator)
    with opened(adapter, output, revision=revision, access=access) as work:
        source = work.adapter
        stored, key = source.projections, source.config.projection_prng_key
        found = None if stored is None else drawn_from_key(stored, key)
        need = _need(source, found)
        base_facts = resolve_base(source, base_options, bases=Bases(work.access), need=need)
        drawn, pair, findings = _drawn_for(source, base_facts, found, given)
        source.check_unchanged()
        inputs = (source.folder, *base_facts.folders)
        return _write(replace(output, inputs=inputs), drawn, pair, findings)


def _drawn_for(
    adapter: Adapter, base_facts: BaseFacts, found: Draw | None, given: Variant | None
) -> tuple[Draw, tuple[NDArray[Any], NDArray[Any]], tuple[Finding, ...]]:
    """Draw A and B of an adapter as `embed` would; return the draw, the pair and the findings.

    Args:
        adapter: the adapter.
        base_facts: the facts of the base.
        found: the draw of the config's key that the stored pair is, or None.
        given: the variant of the caller, or None.
    """
    bare, base_facts = _without_stored(adapter, base_facts, found)
    variant = found.variant if found is not None and given is None else given
    converted = embedded(bare, base_facts, variant=variant)
    drawn = converted.draw
    assert drawn is not None  # noqa: S101 -- a bare adapter is drawn for
    # A stored pair can have a narrower dtype; this file keeps the dtype of the draw.
    if drawn.rounding is Rounding.FP32 and base_facts.rounding is Rounding.NONE:
        drawn = replace(drawn, rounding=Rounding.NONE)
    shapes = {tensor.name: tensor.shape for tensor in converted.tensors}
    A, B = drawn.matrices()
    kind = drawn.variant.dtype
    pair = (
        A[:, : shapes[A_NAME][1]].astype(kind, copy=False),
        B[: shapes[B_NAME][0]].astype(kind, copy=False),
    )
    findings = adapter.findings if drawn == found else converted.findings
    if adapter.projections is not None and found is None:
        reason = f"the adapter stores other A and B than OUT, which has {drawn.description}."
        other = rules.UNPROVEN_DRAW.at(adapter.place, reason).with_remedy(_STORED_REMEDY)
        findings = (*adapter.findings, other)
    return drawn, pair, tuple(dict.fromkeys((*findings, *base_facts.idle_options)))


def _need(adapter: Adapter, found: Draw | None) -> Need:
    if found is not None or adapter.fingerprint is not None:
        return Need.NONE
    return Need.VITAL if adapter.projections is None else Need.HELPFUL


def _without_stored(
    adapter: Adapter, base_facts: BaseFacts, found: Draw | None
) -> tuple[Adapter, BaseFacts]:
    """Return the adapter without stored A and B, and the base facts with the pair's dims.

    If the pair is a draw, the base facts also get the draw's rounding.
    """
    stored = adapter.projections
    if stored is None:
        return adapter, base_facts
    known = replace(
        base_facts,
        in_features=base_facts.in_features or stored.in_features,
        out_features=base_facts.out_features or stored.out_features,
        rounding=found.rounding if found and base_facts.rounding is None else base_facts.rounding,
    )
    return without_projections(adapter), known


def is_pair(path: Path) -> bool:
    """Say whether a file holds vera_A and vera_B alone, so that ``--force`` may replace it."""
    try:
        with open_local(path) as source:
            return set(read_header(source).tensors) == {"vera_A", "vera_B"}
    except (CheckpointError, SurroundingsError):
        return False


def _write(
    output: Output,
    drawn: Draw,
    pair: tuple[NDArray[Any], NDArray[Any]],
    findings: tuple[Finding, ...] = (),
) -> Regenerated:
    A, B = from_array("vera_A", pair[0]), from_array("vera_B", pair[1])
    with output.staged() as staging:
        digest = write_tensors(staging, (A, B), {"format": "pt"})
        with open_local(staging) as written:
            if file_sha256(written) != digest:
                raise SurroundingsError(read_back_differs(output.path.name))
    size = output.path.stat().st_size
    return Regenerated(output.path, drawn, A.dtype, A.sha256(), B.sha256(), size, findings)
