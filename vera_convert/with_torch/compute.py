"""Compute the sums of a merge on a GPU, block by block."""

from __future__ import annotations

import torch
from torch import Tensor

from vera_convert.assembly.addends import Sum
from vera_convert.assembly.blocks import (
    BufferSizes,
    Device,
    Workspace,
    kept_rows,
    product_sha256,
    weighted,
)
from vera_convert.delta import Array
from vera_convert.errors import SurroundingsError, UsageError
from vera_convert.text import printable
from vera_convert.with_torch.arrays import TORCH_DTYPE, to_array, to_tensor


def on_gpu(name: str) -> Device:
    """Return a GPU as a device of a merge.

    Args:
        name: ``cuda``, or ``cuda:1`` for the second GPU.

    Raises:
        UsageError: the name stands for no GPU.
        SurroundingsError: PyTorch does not see the GPU.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {printable(name)}: give cpu, cuda or cuda:N.") from error
    if device.type != "cuda":
        raise UsageError(f"--device {printable(name)}: give cpu, cuda or cuda:N.")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= count:
        raise SurroundingsError(
            f"--device {name}: PyTorch {torch.__version__} sees {count or 'no'} GPU here. "
            "Merge with --device cpu, or install a PyTorch for this machine's GPU and driver."
        )
    return on_device(device)


def on_device(device: torch.device) -> Device:
    """Return a device of torch as a device of a merge."""
    torch.set_float32_matmul_precision("highest")

    def multiply(left: Array, right: Array) -> Array:
        there = to_tensor(left).to(device) @ to_tensor(right).to(device)
        return to_array(there)

    return Device(
        str(device),
        lambda sizes, all_rows: _DeviceWorkspace(sizes, device, all_rows=all_rows),
        lambda: product_sha256(multiply),
    )


class _DeviceWorkspace(Workspace):
    """A workspace that adds on the device, and holds the stored blocks on the CPU."""

    def __init__(self, sizes: BufferSizes, device: torch.device, *, all_rows: bool) -> None:
        super().__init__(BufferSizes(stored=sizes.stored, written=sizes.written), all_rows=all_rows)
        self._device = device
        self._matrices: dict[tuple[int, torch.dtype], Tensor] = {}
        self._operands: list[tuple[Tensor, Tensor, Tensor]] = []

    def _prepare(self, tensor: Sum) -> None:
        """Copy the vectors to the device, and scale the shared operand of all blocks."""
        self._prepared, self._operands = None, []
        dtype, width = TORCH_DTYPE[tensor.working], tensor.shape[1]
        for term in tensor.terms:
            A, B = self._matrix(term.A, dtype), self._matrix(term.B, dtype)
            vectors = term.vectors()
            d, b = vectors[0], weighted(vectors[1], term.weight, tensor.working)
            d, b = (to_tensor(vector).to(self._device).to(dtype) for vector in (d, b))
            if tensor.conv1d:
                self._operands.append((d, A, b[:, None] * B[:width]))
            else:
                self._operands.append((b, B, d[:, None] * A[:, :width]))
        self._prepared = tensor

    def _matrix(self, array: Array, dtype: torch.dtype) -> Tensor:
        """Return A or B on the device; each is copied once."""
        key = (id(array), dtype)
        if key not in self._matrices:
            self._matrices[key] = to_tensor(array).to(self._device).to(dtype)
        return self._matrices[key]

    def _sum(
        self, tensor: Sum, rows: slice, stored: Array, written: Array, sampled: slice
    ) -> tuple[Array, bool]:
        total = to_tensor(stored).to(self._device).to(TORCH_DTYPE[tensor.working])
        change = torch.zeros_like(total[sampled])
        for term, (vector, matrix, shared) in zip(tensor.terms, self._operands, strict=True):
            if tensor.conv1d:
                delta = (vector[:, None] * matrix[:, rows]).T @ shared.T
            else:
                in_block, in_layer = term.overlap(rows)
                left = matrix.new_zeros(len(stored), len(term.A))
                left[in_block] = vector[in_layer, None] * matrix[in_layer]
                delta = left @ shared
            for kept in kept_rows(term, rows):
                delta[kept] = -0.0
            change += delta[sampled]
            total += delta
        if tensor.written.itemsize < 4:
            total = total.float()
        rounded = total.to(TORCH_DTYPE[tensor.written])
        written[...] = to_array(rounded)
        return to_array(change), bool(torch.isfinite(rounded).all())
