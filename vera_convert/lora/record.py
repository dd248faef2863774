"""The provenance of a LoRA, which is stored in the metadata of its weights.

The same inputs and options give the same record: there is no time in it, and no path.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

from vera_convert._version import __version__
from vera_convert.adapter.adapter import Adapter
from vera_convert.adapter.tensors import WEIGHTS_NAME
from vera_convert.base.facts import BaseOptions
from vera_convert.errors import CheckpointError, SurroundingsError
from vera_convert.files.header import read_header
from vera_convert.files.reading import ByteSource, open_local
from vera_convert.hub.lookup import Location
from vera_convert.lora.options import LoraOptions
from vera_convert.lora.plan import LoraPlan
from vera_convert.merging.in_effect import InEffect
from vera_convert.merging.provenance import source_of

METADATA_KEY = "vera_convert.lora"
"""The key of the record in the metadata of safetensors."""

GGUF_NAME = "adapter.gguf"
RECORDED_IN = (
    WEIGHTS_NAME,
    "pytorch_lora_weights.safetensors",
    "adapters.safetensors",
    GGUF_NAME,
)
"""The files of weights in all forms, each with a record."""

_GGUF_BEGINNING = 1 << 16
"""Bytes of a GGUF file in which the record lies."""
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Origin:
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


def record_of(origin: Origin, plan: LoraPlan) -> dict[str, object]:
    """Return the record of a LoRA, but for its error."""
    adapter, pair = origin.adapter, origin.pair
    return {
        "format": 1,
        "vera_convert": __version__,
        "source": source_of(origin.location),
        "source_sha256": _sha256(adapter.file.source),
        "config_sha256": sha256(adapter.config_file.text).hexdigest(),
        "source_rank": adapter.config.r,
        "rank": plan.rank,
        "layers": len(plan.layers),
        "projections": {
            "origin": pair.origin,
            "draw": asdict(pair.draw) if pair.draw is not None else None,
        },
        "options": dict(origin.options.record(origin.base)),
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
    own = {METADATA_KEY: json.dumps({**record, "relative_error": shown})}
    return {"format": "pt", **others, **own}


def _sha256(source: ByteSource) -> str:
    digest = sha256()
    for start in range(0, source.size, _BLOCK):
        digest.update(source.read_at(start, min(_BLOCK, source.size - start)))
    return digest.hexdigest()


def is_lora(folder: Path) -> bool:
    """Say whether a folder holds a LoRA that this package wrote: what ``--force`` may replace."""
    return any(lora_record(folder, name) is not None for name in RECORDED_IN)


def lora_record(folder: Path, name: str) -> dict[str, object] | None:
    """Return the record in a file of weights; None if this package did not write the file."""
    try:
        with open_local(folder / name, within=folder) as source:
            if name == GGUF_NAME:
                return record_in_gguf(source.read_at(0, min(source.size, _GGUF_BEGINNING)))
            return parse_record(read_header(source).metadata.get(METADATA_KEY))
    except (CheckpointError, SurroundingsError):
        return None


def record_in_gguf(beginning: bytes) -> dict[str, object] | None:
    """Return the record in the first bytes of a GGUF file; None if there is none."""
    _, found, rest = beginning.partition(METADATA_KEY.encode())
    if not found or not beginning.startswith(b"GGUF"):
        return None
    length = int.from_bytes(rest[4:12], "little")  # after the number of the type
    return parse_record(rest[12 : 12 + length].decode("utf-8", "replace"))


def parse_record(text: str | None) -> dict[str, object] | None:
    """Return a record from the metadata of weights; None if the text is no record."""
    try:
        record = json.loads(text or "null")
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
