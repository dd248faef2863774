"""PEFT rounds regenerated A and B to the dtype of the base as `rounding_on_base` says."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import peft
import pytest
import theirwarnings
import torch
from torch import nn

from vera_convert.draws.generator import (
    Draw,
    Rounding,
    Variant,
    rounded,
    rounding_on_base,
)
from vera_convert.dtypes import FLOAT_NAMES

pytestmark = theirwarnings.OF_PEFT


@pytest.fixture(params=["float32", "float64"])
def drawn_in(request: pytest.FixtureRequest) -> Iterator[str]:
    """Set the default dtype while PEFT draws, which decides the dtype of the draw."""
    torch.set_default_dtype(getattr(torch, request.param))
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", FLOAT_NAMES)
def test_a_base_rounds_a_draw_as_the_table_of_dtypes_says(drawn_in: str, dtype: str) -> None:
    base = nn.Sequential(nn.Linear(24, 16, dtype=getattr(torch, dtype)))
    model = peft.get_peft_model(base, peft.VeraConfig(r=4, target_modules=["0"]))
    theirs = model.base_model.model[0].vera_A["default"].to(torch.float64).numpy()
    variant = Variant(f"{drawn_in}-fused")
    draw = Draw(variant, key=0, rank=4, in_features=24, out_features=16)
    ours, _ = draw.matrices()
    applied = rounding_on_base(dtype)
    effective = draw.rounded(applied).rounding
    assert np.array_equal(rounded(ours, applied).astype(np.float64), theirs)
    assert np.array_equal(rounded(ours, effective).astype(np.float64), theirs)
    assert (effective is Rounding.NONE) == np.array_equal(theirs, ours.astype(np.float64))
