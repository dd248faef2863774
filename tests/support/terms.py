"""Terms of a sum, the sum by float64 arithmetic, and the sum that a workspace computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from exact import exact_delta
from numpy.typing import NDArray

from vera_convert.assembly.addends import Numbers, Sum, Term
from vera_convert.assembly.blocks import Workspace, buffer_sizes_for

Array = NDArray[Any]


@dataclass(frozen=True)
class Vectors:
    d: Array
    b: Array

    @property
    def dtypes(self) -> tuple[np.dtype[Any], ...]:
        return self.d.dtype, self.b.dtype

    def vectors(self) -> tuple[Array, Array]:
        return self.d, self.b


def term(outputs: int, inputs: int, *, seed: int, weight: float = 1.0, dtype: Any = "f4") -> Term:
    values = np.random.default_rng(seed)
    rank = 3 + seed
    return Term(
        values.normal(size=(rank, inputs + 2)).astype(dtype),
        values.normal(size=(outputs + 1, rank)).astype(dtype),
        Vectors(values.normal(size=rank).astype(dtype), values.normal(size=outputs).astype(dtype)),
        weight,
    )


def change_of(terms: tuple[Term, ...], inputs: int) -> Array:
    total: Array = np.zeros(())
    for each in terms:
        d, b = each.layer.vectors()
        total = total + each.weight * exact_delta(each.A, each.B, d, b, inputs)
    return total


def worked(tensor: Sum, stored: Array, *, all_rows: bool = False) -> tuple[Array, Numbers]:
    """Compute a tensor in a workspace, block by block."""
    workspace = Workspace(buffer_sizes_for([tensor]), all_rows=all_rows)
    numbers, written = Numbers(), []
    for first in range(0, tensor.shape[0], tensor.block_rows):
        last = min(first + tensor.block_rows, tensor.shape[0])
        workspace.stored_bytes(tensor, first, last)[:] = stored[first:last].tobytes()
        numbers += workspace.add(tensor, first, last)
        written.append(bytes(workspace.written_bytes(tensor, first, last)))
    return np.frombuffer(b"".join(written), tensor.written).reshape(tensor.shape), numbers
