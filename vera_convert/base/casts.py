"""The dtypes of PEFT's casts of A and B on a base, after drawing A and B from the key.

PEFT casts A and B once for each wrapped layer, in the order of the model. The dtype of a plain
layer's weight is the dtype of the cast; a quantized layer gives the dtype of the computation.
Integer weights leave A and B uncast.
Stored A and B already hold the values after all casts, and stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from vera_convert.base.quantized.packing import DTYPE_OF
from vera_convert.base.quantized.unpack import Unpacked, model_dtype
from vera_convert.draws.generator import Rounding, rounding_on_base
from vera_convert.dtypes import FLOATS
from vera_convert.text import printable


class Casts(NamedTuple):
    """The combined effect of the casts on a base.

    Attributes:
        rounding: the rounding of the values; None if the base leaves the rounding open.
        possible: the possible roundings if `rounding` is None; empty if all roundings are possible.
        reason: why the base leaves the rounding open; empty if the base decides.
    """

    rounding: Rounding | None
    possible: tuple[Rounding, ...] = ()
    reason: str = ""


def casts_on(base: Unpacked, names: Iterable[str]) -> Casts:
    """Return the casts of A and B when PEFT wraps the weights `names` of a base.

    Args:
        base: the base with the packed weights.
        names: the adapted weights, by the names in the view.
    """
    dtypes: set[str] = set()
    for name in dict.fromkeys(names):
        found = base.formats.get(name)
        if found is None:
            dtypes.add(base.view.tensors[name].info.dtype)
        elif found.cast == "model":
            dtypes.add(model_dtype(base.stored.config))
        elif found.cast == "computation":
            dtypes.add(_dtype_of_computation(base.settings))
        elif found.cast is None:
            reason = f"the adapted layers are quantized ({found.label}). {found.undecided}"
            return Casts(None, reason=reason)
    unknown = dtypes - FLOATS
    roundings = {rounding_on_base(dtype) for dtype in dtypes - unknown}
    sixteen = roundings & {Rounding.BF16, Rounding.FP16}
    if unknown or len(sixteen) > 1:
        possible = () if unknown else (Rounding.FP16_BF16, Rounding.BF16_FP16)
        return Casts(None, possible, f"the adapted layers are {', '.join(sorted(dtypes))}.")
    for rounding in (*sixteen, Rounding.FP32):
        if rounding in roundings:
            return Casts(rounding)
    return Casts(Rounding.NONE)


def _dtype_of_computation(settings: Mapping[str, object]) -> str:
    """Return the dtype that a layer of bitsandbytes computes in."""
    if not settings:
        return "quantized, and the config does not say in which dtype they compute"
    found = settings.get("bnb_4bit_compute_dtype")
    name = "float32" if found is None else printable(str(found)).removeprefix("torch.")
    return DTYPE_OF.get(name, name)
