"""Recognize the folder of a LoRA, and read the record that this package leaves in its LoRAs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from vera_convert import rules
from vera_convert.adapter.config import LORA, OtherMethodError
from vera_convert.errors import CheckpointError, SurroundingsError
from vera_convert.files.file_names import WEIGHTS_NAME
from vera_convert.files.header import read_header
from vera_convert.files.reading import ByteSource, open_local
from vera_convert.text import printable

RECORD_KEY = "vera_convert.lora"
"""The key of the record in the metadata of the weights."""

GGUF_NAME = "adapter.gguf"
DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"
MLX_NAME = "adapters.safetensors"
LORA_WEIGHTS = (WEIGHTS_NAME, DIFFUSERS_NAME, MLX_NAME, GGUF_NAME)
"""The files of weights in all forms of a LoRA, each with a record."""

_GGUF_BEGINNING = 1 << 16
"""Bytes of a GGUF file in which the record lies."""


def is_lora(folder: Path) -> bool:
    """Say whether a folder holds a LoRA that this package wrote: what ``--force`` may replace."""
    return lora_record(folder) is not None


def lora_record(folder: Path) -> dict[str, object] | None:
    """Return the record in a folder's weights; None for weights of another program."""
    return next(iter(lora_records(folder).values()), None)


def lora_records(folder: Path) -> dict[str, dict[str, object]]:
    """Return the record of each file of weights that this package wrote, by the file's name."""
    found = {}
    for name in LORA_WEIGHTS:
        with suppress(CheckpointError, SurroundingsError):
            with open_local(folder / name, within=folder) as source:
                record = record_in(source)
            if record is not None:
                found[name] = record
    return found


def record_in(source: ByteSource) -> dict[str, object] | None:
    """Return the record in a file of weights; None if there is none.

    Raises:
        CheckpointError: the file is malformed, or has another format than safetensors and GGUF.
        SurroundingsError: the file cannot be read.
    """
    beginning = source.read_at(0, min(source.size, _GGUF_BEGINNING))
    if not beginning.startswith(b"GGUF"):
        return parse_record(read_header(source).metadata.get(RECORD_KEY))
    _, found, rest = beginning.partition(RECORD_KEY.encode())
    length = int.from_bytes(rest[4:12], "little")  # after the number of the type
    return parse_record(rest[12 : 12 + length].decode("utf-8", "replace")) if found else None


def parse_record(text: str | None) -> dict[str, object] | None:
    """Return a record from the metadata of weights; None for any other text."""
    try:
        record = json.loads(text or "null")
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def lora_without_config(folder: Path) -> OtherMethodError | None:
    """Return the error for a LoRA that has no config; None if a folder holds no known LoRA."""
    record, found = lora_record(folder), "this is a LoRA"
    if record is None:
        if (folder / WEIGHTS_NAME).exists() or not (folder / DIFFUSERS_NAME).exists():
            return None
        found = f"{DIFFUSERS_NAME} is a LoRA for Diffusers"
    place = printable(str(folder))
    return OtherMethodError(rules.NOT_VERA.at(place, _reason(record, found)), LORA)


def lora_with_config(folder: Path, weights: ByteSource | None, *, place: str) -> OtherMethodError:
    """Return the error for a LoRA, by its config.

    Args:
        place: how messages call the config.
        folder: the folder; its weights are searched for a record.
        weights: ``adapter_model.safetensors``, which is searched instead.
    """
    try:
        record = record_in(weights) if weights is not None else lora_record(folder)
    except (CheckpointError, SurroundingsError):
        record = None
    return OtherMethodError(rules.NOT_VERA.in_file(place, _reason(record, "this is a LoRA")), LORA)


def _reason(record: Mapping[str, object] | None, found: str) -> str:
    made = f"vera-convert made this LoRA from {_source(record)}" if record is not None else found
    return f"{made}; `vera-convert verify ADAPTER --lora LORA` checks a LoRA."


def _source(record: Mapping[str, object]) -> str:
    """Return the name of the adapter that a LoRA was made from, as the record has the name."""
    source = record.get("source")
    fields = source if isinstance(source, Mapping) else {}
    name, commit = fields.get("repo_id") or fields.get("folder"), fields.get("commit")
    if not isinstance(name, str):
        return "a VeRA adapter that the record does not name"
    at = f" at commit {printable(str(commit))}" if commit else ""
    return f'the VeRA adapter "{printable(name)}"{at}'
