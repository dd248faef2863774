"""Terms of a sum, the expected sum in float64, and the sum that a workspace computes."""

from __future__ import annotations

from typing import Any

import numpy as np
from exact import exact_delta
from numpy.typing import NDArray

from vera_convert.assembly.addends import Numbers, Sum, Term
from vera_convert.assembly.blocks import Workspace, buffer_sizes_for
from vera_convert.files.tensorfile import from_array

Array = NDArray[Any]


def term(outputs: int, inputs: int, *, seed: int, weight: float = 1.0, dtype: Any = "f4") -> Term:
    values = np.random.default_rng(seed)
    rank = 3 + seed
    return Term(
        values.normal(size=(rank, inputs + 2)).astype(dtype),
        values.normal(size=(outputs + 1, rank)).astype(dtype),
        from_array("d", values.normal(size=rank).astype(dtype)),
        from_array("b", values.normal(size=outputs).astype(dtype)),
        weight,
    )


def expected_sum(terms: tuple[Term, ...], inputs: int) -> Array:
    total: Array = np.zeros(())
    for each in terms:
        d, b = each.vectors()
        total = total + each.weight * exact_delta(each.A, each.B, d, b, inputs)
    return total


def computed_in_blocks(
    tensor: Sum, stored: Array, *, all_rows: bool = False
) -> tuple[Array, Numbers]:
    """Compute a tensor in a workspace, block by block."""
    workspace = Workspace(buffer_sizes_for([tensor]), all_rows=all_rows)
    numbers, written = Numbers(), []
    for first in range(0, tensor.shape[0], tensor.block_rows):
        last = min(first + tensor.block_rows, tensor.shape[0])
        workspace.stored_bytes(tensor, first, last)[:] = stored[first:last].tobytes()
        numbers += workspace.add(tensor, first, last)
        written.append(bytes(workspace.written_bytes(tensor, first, last)))
    return np.frombuffer(b"".join(written), tensor.written).reshape(tensor.shape), numbers
