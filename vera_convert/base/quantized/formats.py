"""The formats that are dequantized: one line for each. A new format is its module and its line."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

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
from vera_convert.base.quantized.layer import Layer, PackedWeight

Cast = Callable[[Mapping[str, object], str], str | None]
"""Says from the settings and the model's dtype what PEFT casts A and B to on such a layer."""

NO_CAST = ""


def _to_model(_settings: Mapping[str, object], dtype: str) -> str | None:
    return dtype


def _to_nothing(_settings: Mapping[str, object], _dtype: str) -> str | None:
    return NO_CAST


def _undecided(_settings: Mapping[str, object], _dtype: str) -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class Format:
    """One way in which weights are quantized.

    Attributes:
        label: its name for people.
        method: the ``quant_method`` of a config.
        weights: yields the weights of a layer, after a look at every part.
        signs: what the names of its tensors look like, the path of the layer left out.
        dtypes: the dtypes of a tensor ``weight`` that is its own.
        cast: what PEFT casts A and B to: a dtype as safetensors names it, `NO_CAST`, or None if
            the base does not decide.
        undecided: what PEFT casts to in which case, if the base does not decide.
        needs_config: whether its tensors mean nothing without the settings of a config.
        dropped: tensors beside and above its layers that a dequantized model has no use for.
        tells_shape: what the name of the small tensor looks like that tells a weight's shape.
    """

    label: str
    method: str
    weights: Callable[[Layer], Iterator[PackedWeight]]
    signs: str
    dtypes: tuple[str, ...]
    cast: Cast
    undecided: str = ""
    needs_config: bool = False
    dropped: frozenset[str] = frozenset()
    tells_shape: str | None = None

    def owns(self, rest: str, dtype: str) -> bool:
        """Say whether a tensor of a layer is one that only this format writes."""
        is_own = rest == "weight" and dtype in self.dtypes
        return is_own or re.fullmatch(self.signs, rest) is not None


_OF_KERNELS = (
    "PEFT rounds to float16 with gptqmodel's torch kernel, and not at all (float32) with its "
    "kernels for CPUs."
)

FORMATS = (
    Format(
        bitsandbytes_4bit.LABEL,
        "bitsandbytes",
        bitsandbytes_4bit.weights,
        r"weight\.(absmax|quant_map|nested_.*|quant_state\..*)",
        ("U8",),
        bitsandbytes_4bit.cast,
        tells_shape=r"weight\.quant_state\.bitsandbytes__.*",
    ),
    Format(
        bitsandbytes_8bit.LABEL,
        "bitsandbytes",
        bitsandbytes_8bit.weights,
        "SCB|weight_format",
        ("I8",),
        _to_nothing,
    ),
    Format(
        fp8.LABEL,
        "fp8",
        fp8.weights,
        "(?!)",
        fp8.DTYPES,
        _undecided,
        "PEFT rounds to the model's dtype if the base is loaded dequantized (on a CPU always), and "
        "to float8_e4m3fn if its layers stay fp8.",
        dropped=fp8.OF_ACTIVATIONS,
    ),
    Format(
        compressed_tensors.LABEL,
        "compressed-tensors",
        compressed_tensors.weights,
        "weight_(packed|shape|scale|zero_point|global_scale|g_idx)",
        ("F8_E4M3", "I8"),
        _to_model,
        needs_config=True,
        dropped=compressed_tensors.DROPPED,
        tells_shape=compressed_tensors.SHAPE,
    ),
    Format(
        gptq.LABEL,
        "gptq",
        gptq.weights,
        "qweight|qzeros|g_idx|scales",
        (),
        _undecided,
        _OF_KERNELS,
        needs_config=True,
    ),
    Format(
        awq.LABEL,
        "awq",
        awq.weights,
        "qweight|qzeros|g_idx|scales",
        (),
        _undecided,
        _OF_KERNELS,
        needs_config=True,
    ),
    Format(mxfp4.LABEL, "mxfp4", mxfp4.weights, "(?!weight_).+_(blocks|scales)", (), _to_model),
    Format(torchao.LABEL, "torchao", torchao.weights, "_weight_.*", (), _to_model),
)

_TELL_SHAPE = re.compile(
    "|".join(rf"(?:.*\.)?{each.tells_shape}" for each in FORMATS if each.tells_shape)
)
MOST_BYTES = bitsandbytes_4bit.MAX_STATE_BYTES
"""The most bytes of a tensor that tells a shape."""


def tells_shape(name: str) -> bool:
    """Say whether a tensor's values tell the shape of a packed weight."""
    return _TELL_SHAPE.fullmatch(name) is not None
