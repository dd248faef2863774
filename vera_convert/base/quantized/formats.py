"""The supported formats. A new format is a module and a line here."""

from __future__ import annotations

import re

from vera_convert.base.quantized import (
    awq,
    bitsandbytes_4bit,
    bitsandbytes_8bit,
    compressed_tensors,
    fp8,
    gptq,
    mxfp4,
    torchao,
)
from vera_convert.base.quantized.layer import Format

FORMATS: tuple[Format, ...] = (
    bitsandbytes_4bit.FORMAT,
    bitsandbytes_8bit.FORMAT,
    fp8.FORMAT,
    compressed_tensors.FORMAT,
    gptq.FORMAT,
    awq.FORMAT,
    mxfp4.FORMAT,
    torchao.FORMAT,
)

_TELL_SHAPE = re.compile(
    "|".join(rf"(?:.*\.)?{each.tells_shape}" for each in FORMATS if each.tells_shape)
)
MAX_SHAPE_BYTES = 4096
"""The most bytes of a tensor that tells a shape; real tensors have 16 to 200 bytes."""


def tells_shape(name: str) -> bool:
    """Return whether a tensor's values tell the shape of a packed weight."""
    return _TELL_SHAPE.fullmatch(name) is not None
