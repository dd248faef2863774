"""The provenance of a LoRA, stored in the metadata of the weights.

The same inputs and options give the same record, without times and paths.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256

from vera_convert._version import __version__
from vera_convert.adapter.adapter import Adapter
from vera_convert.adapter.lora_record import RECORD_KEY
from vera_convert.base.facts import BaseOptions
from vera_convert.hub.lookup import Location
from vera_convert.lora.options import LoraOptions
from vera_convert.lora.plan import LoraPlan
from vera_convert.merging.in_effect import InEffect


@dataclass(frozen=True, slots=True)
class LoraSource:
    """The source of a LoRA.

    Attributes:
        location: where the VeRA adapter lies.
        adapter: the VeRA adapter.
        pair: the A and B in effect.
        options: the options of the conversion.
        base: the options of the base.
    """

    location: Location
    adapter: Adapter
    pair: InEffect
    options: LoraOptions
    base: BaseOptions


def record_of(source: LoraSource, plan: LoraPlan, *, source_sha256: str) -> dict[str, object]:
    """Return the record of a LoRA, but for its error.

    Args:
        source: the source of the LoRA.
        plan: the LoRA.
        source_sha256: the SHA-256 of the adapter's weights; `NO_SHA256` to measure the record.
    """
    adapter, pair = source.adapter, source.pair
    return {
        "format": 1,
        "vera_convert": __version__,
        "source": source.location.record,
        "source_sha256": source_sha256,
        "config_sha256": sha256(adapter.config_file.text).hexdigest(),
        "source_rank": adapter.config.r,
        "rank": plan.rank,
        "layers": len(plan.layers),
        "projections": {
            "origin": pair.origin,
            "draw": asdict(pair.draw) if pair.draw is not None else None,
        },
        "options": dict(source.options.record(source.base)),
    }


def metadata_with(
    record: Mapping[str, object], error: float, others: Mapping[str, str]
) -> dict[str, str]:
    """Return the metadata of the weights; the length does not depend on the error.

    Args:
        record: the record.
        error: the largest relative error of a layer's delta, from 0 to 99.
        others: further metadata.
    """
    shown = f"{error if error >= 1e-99 else 0.0:.2e}"
    own = {RECORD_KEY: json.dumps({**record, "relative_error": shown})}
    return {"format": "pt", **others, **own}
