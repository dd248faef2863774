"""Compare packed weights dequantized here and by transformers, for two formats."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from packedlayers import Memory, decoded, layer_of
from releases import needs

from vera_convert.base.quantized import fp8, mxfp4
from vera_convert.with_torch.arrays import to_array


@needs("transformers", "5.20", "fp8 weights are dequantized elsewhere")
@pytest.mark.parametrize("block", [(8, 16), (4, 96), (24, 3)])
@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_equals_transformers(block: tuple[int, int], kind: torch.dtype) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn((24, 96), generator=generator) * 9).to(kind)
    scale = torch.rand((24 // block[0], 96 // block[1]), generator=generator)
    arrays = {"weight": to_array(weight), "weight_scale_inv": to_array(scale)}
    found = decoded(fp8.weights, arrays, {"quant_method": "fp8", "weight_block_size": [*block]})
    reader: Any = Fp8Dequantize(None)
    wanted = reader._dequantize_one(weight, scale, torch.float32)
    np.testing.assert_array_equal(found, to_array(wanted))


@needs("transformers", "4.55", "there is no gpt-oss")
def test_mxfp4_equals_transformers() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (2, 6, 3, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(100, 140, (2, 6, 3), dtype=torch.uint8, generator=generator)
    arrays = {"up_blocks": to_array(blocks), "up_scales": to_array(scales)}
    (weight,) = mxfp4.weights(layer_of(arrays))
    wanted = to_array(convert_moe_packed_tensors(blocks, scales).contiguous())
    assert weight.shape == wanted.shape
    memory = Memory({f"m.{name}": array for name, array in arrays.items()})
    found = weight.decode(memory, 0, weight.matrix[0])
    np.testing.assert_array_equal(
        found.astype(np.float64), wanted.reshape(weight.matrix).astype(np.float64)
    )
