"""The size of the LoRA that `to-lora` writes of an adapter, without computing the LoRA."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vera_convert.adapter.adapter import Adapter
from vera_convert.adapter.fingerprint import NO_SHA256
from vera_convert.base.facts import BaseFacts, BaseOptions
from vera_convert.conversion.projections import ProjectionSource, draw_on_base
from vera_convert.hub.lookup import Location
from vera_convert.lora.forms import extras_of, files_of
from vera_convert.lora.options import LoraOptions
from vera_convert.lora.plan import plan_lora
from vera_convert.lora.record import LoraSource, record_of
from vera_convert.lora.writing import SafetensorsWeights
from vera_convert.merging.in_effect import InEffect, Origin


def lora_size(
    adapter: Adapter,
    location: Location,
    base_facts: BaseFacts,
    base_options: BaseOptions,
    projections: ProjectionSource,
) -> int | None:
    """Return the bytes of the weights that `to-lora` writes for PEFT, exact and in float32.

    Args:
        adapter: the adapter.
        location: where the adapter lies.
        base_facts: the facts of the base.
        base_options: the caller's options for the base, which the file records.
        projections: the source of A and B: ``auto``, ``file`` or ``key``.

    Returns:
        The bytes; None if the sizes of the layers or the rounding of A and B are not known.
    """
    pair = _pair(adapter, base_facts, projections)
    if pair is None or not adapter.layers.keys() <= base_facts.layers.keys():
        return None
    options = LoraOptions(projections=projections)
    plan, extras = plan_lora(adapter, base_facts, pair, options), extras_of(adapter)
    files = files_of(options.target, adapter.config, plan, extras, base_facts)
    source = LoraSource(location, adapter, pair, options, base_options)
    record = record_of(source, plan, source_sha256=NO_SHA256)
    return SafetensorsWeights(files, extras.stored, record, plan).file_size()


def _pair(
    adapter: Adapter, base_facts: BaseFacts, projections: ProjectionSource
) -> InEffect | None:
    """Return the origin of the A and B in effect, with a matrix of the right rank and no values."""
    nothing = np.empty((adapter.config.r, 0), np.float32)
    found = InEffect(nothing, nothing.T, Origin.KEY)
    if projections is not ProjectionSource.KEY:
        if adapter.projections is not None:
            return replace(found, origin=Origin.FILE)
        if adapter.fingerprint is not None:
            return replace(found, origin=Origin.FINGERPRINT, draw=adapter.fingerprint.draw)
    draw = draw_on_base(adapter.config, base_facts)
    return None if draw is None else replace(found, draw=draw)
