"""strip and embed: drop or draw A and B of an adapter, and write a new folder."""

from __future__ import annotations

from pathlib import Path

from vera_convert.adapter.adapter import Adapter
from vera_convert.adapter.folder import is_vera
from vera_convert.arguments import one_of, optional, path, require_flags
from vera_convert.base.bases import Bases
from vera_convert.base.facts import BaseOptions, base_options_of
from vera_convert.base.resolve import Need, resolve_base
from vera_convert.conversion.projections import ProjectionSource
from vera_convert.conversion.transforms import embedded, stripped
from vera_convert.conversion.work import Conversion, opened, publish
from vera_convert.draws.generator import Variant
from vera_convert.hub.lookup import HubAccess
from vera_convert.publish.publishing import Output


def strip(
    adapter: str | Path,
    out: str | Path,
    *,
    base: BaseOptions | str | Path | None = None,
    projections: ProjectionSource | str = ProjectionSource.AUTO,
    accept_change: bool = False,
    force: bool = False,
    revision: str | None = None,
    access: HubAccess | None = None,
) -> Conversion:
    """Write an adapter without A and B, if the key is proven to regenerate both.

    Args:
        adapter: a folder or a repo on the Hub.
        out: the folder to write.
        base: the base; by default the base of the config, if that base can be read.
        projections: the source of A and B: ``auto``, ``file`` or ``key``.
        accept_change: drop A and B even if only `embed` regenerates them.
        force: replace an adapter that lies at `out`.
        revision: the adapter's revision on the Hub.
        access: how the Hub is reached.

    Raises:
        CheckpointError: the adapter is malformed, or the key does not regenerate A and B.
        UsageError: `out` exists, or overlaps the adapter.
        SurroundingsError: a file, a repo or the disk fails.

    Example:
        >>> strip("adapter", "stripped", base="base").bytes_after
        1624
    """
    projections = one_of("projections", ProjectionSource, projections)
    base_options = base_options_of(base)
    require_flags(accept_change=accept_change)
    output = Output(path("out", out), is_vera, force)
    with opened(adapter, output, revision=revision, access=access) as work:
        need = Need.NONE if work.adapter.projections is None else Need.HELPFUL
        base_facts = resolve_base(work.adapter, base_options, bases=Bases(work.access), need=need)
        converted = stripped(
            work.adapter,
            base_facts,
            projections=projections,
            accept_change=accept_change,
        )
        return publish(work, converted, base_facts)


def embed(
    adapter: str | Path,
    out: str | Path,
    *,
    base: BaseOptions | str | Path | None = None,
    generator: Variant | str | None = None,
    projections: ProjectionSource | str = ProjectionSource.AUTO,
    force: bool = False,
    revision: str | None = None,
    access: HubAccess | None = None,
) -> Conversion:
    """Write an adapter with A and B stored, drawn from the key.

    Args:
        adapter: a folder or a repo on the Hub.
        out: the folder to write.
        base: the base: a model, or dims and dtype.
        generator: the variant, if no fingerprint names the variant; float32-fused by default.
        projections: the source of A and B: ``auto``, ``file`` or ``key``.
        force: replace an adapter that lies at `out`.
        revision: the adapter's revision on the Hub.
        access: how the Hub is reached.

    Raises:
        CheckpointError: the adapter is malformed, or the drawn A and B have other hashes than the
            fingerprint.
        UsageError: dims or dtype are not known; `out` exists, or overlaps the adapter.
        SurroundingsError: a file, a repo or the disk fails.

    Example:
        >>> from vera_convert import strip
        >>> _ = strip("adapter", "stripped", base="base")
        >>> embed("stripped", "embedded").embedded
        True
    """
    projections = one_of("projections", ProjectionSource, projections)
    base_options = base_options_of(base)
    variant = optional(one_of, "generator", Variant, generator)
    output = Output(path("out", out), is_vera, force)
    with opened(adapter, output, revision=revision, access=access) as work:
        need = need_to_embed(work.adapter, base_options, projections)
        base_facts = resolve_base(work.adapter, base_options, bases=Bases(work.access), need=need)
        converted = embedded(work.adapter, base_facts, projections=projections, variant=variant)
        return publish(work, converted, base_facts)


def need_to_embed(
    adapter: Adapter, base_options: BaseOptions, projections: ProjectionSource
) -> Need:
    """Say how much `embed` needs the base, which is vital if nothing else records the dims."""
    if (
        projections is ProjectionSource.KEY
        and (adapter.projections or adapter.fingerprint) is not None
    ):
        return Need.VITAL if base_options.dtype is None else Need.HELPFUL
    if adapter.projections is None:
        return Need.VITAL if adapter.fingerprint is None else Need.NONE
    return Need.NONE if adapter.config.save_projection else Need.HELPFUL
