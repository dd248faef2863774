"""The VeRA layer: a frozen linear layer, two shared random matrices, and two trained vectors.

                ┌──────────────────── W (out, in), bias ─────────────────────┐
    x (.., in) ─┤                                                            + ──► y (.., out)
                └─ dropout ─► A (r, in) ─► · d (r) ─► B (out, r) ─► · b (out) ┘

    forward    y = W x + bias + b * (B (d * (A x)))
    merge      W <- round(W + D),   D = diag(b) B diag(d) A      (out, in)

VeRA is "Vector-based Random Matrix Adaptation", Kopiczko, Blankevoort and Asano, arXiv 2310.11454,
where b and d are the diagonal matrices Λ_b and Λ_d. A and B are drawn once for the whole model, at
the width of its widest adapted layers: a layer with fewer inputs or outputs uses the leading
columns of A and the leading rows of B. Only d and b are trained.

The branch computes in the dtype of d and b, which is float32 even if W is in 16 bits. As in PEFT,
the sum is cast to the dtype of the frozen layer's output, and then to the dtype of x; under
autocast the two differ. This module knows no configs, files or whole models.
"""

# mypy: allow-subclassing-any
from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from vera_convert.dtypes import FLOAT_NAMES
from vera_convert.errors import SurroundingsError, UsageError
from vera_convert.targets.linear import Linear


def linear_of(module: nn.Module) -> Linear | None:
    """Return the dims of a layer that VeRA can adapt; None for any other module.

    As in PEFT, the class decides: ``torch.nn.Linear``, the ``Conv1D`` of transformers, the
    quantized layers of `QUANTIZED`, and their subclasses. Another module with the attributes
    ``in_features`` and ``out_features`` may compute something else, or store a transposed weight.
    """
    if type(module) is NonDynamicallyQuantizableLinear:
        return (
            None  # nn.MultiheadAttention reads the weight of this layer and never calls the layer
        )
    if _is_a(module, _CONV1D):
        inputs, outputs = module.weight.shape
        return Linear(int(outputs), int(inputs), conv1d=True)
    if isinstance(module, nn.Linear) or any(_is_a(module, name) for name in QUANTIZED):
        return Linear(int(module.out_features), int(module.in_features))
    return None


_CONV1D = ("transformers.pytorch_utils", "Conv1D")
QUANTIZED = (
    ("hqq.core.quantize", "HQQLinear"),
    ("aqlm", "QuantizedLinear"),
    ("eetq", "EetqLinear"),
    ("gptqmodel.nn_modules.qlinear", "BaseQuantLinear"),
)
"""Module and class of quantized layers that PEFT adapts, outside the subclasses of ``nn.Linear``.

The layers of bitsandbytes and torchao are subclasses of ``nn.Linear``.
"""


def _is_a(module: nn.Module, name: tuple[str, str]) -> bool:
    """Return whether a module is of another library's class, without importing the library."""
    library, kind = name
    defined = getattr(
        sys.modules.get(library), kind, None
    )  # not imported: no object of the class exists
    return isinstance(defined, type) and isinstance(module, defined)


DENSE = tuple(getattr(torch, name) for name in FLOAT_NAMES)
"""The dtypes of weights without quantization."""


def weight_dtype(layer: nn.Module) -> torch.dtype | None:
    """Return the dtype that a layer computes in, wrapped or not; None if unknown."""
    layer = getattr(layer, "base_layer", layer)
    dtype = getattr(getattr(layer, "weight", None), "dtype", None)
    return (
        dtype if dtype in DENSE else getattr(layer, "compute_dtype", None)
    )  # 4-bit layers have this


def check_has_values(tensor: Tensor, name: str) -> None:
    """Raise `SurroundingsError` for a tensor on the meta device."""
    if tensor.is_meta:
        raise SurroundingsError(
            f"{name} is on the meta device and has no values. Load the model's weights before "
            "wrapping the model, and do not move the model to the meta device."
        )


class SharedMatrix(nn.Module):
    """The A, or the B, of each adapter: frozen buffers by the adapter's name, read by all layers.

    The matrix is a part of the model, not of each layer. Adapters with equal matrices share a
    tensor.
    """

    def put(self, adapter: str, matrix: Tensor) -> None:
        """Store the matrix of an adapter."""
        self.register_buffer(adapter, matrix)
        self._pool()

    def drop(self, adapter: str) -> None:
        """Remove the matrix of an adapter."""
        del self._buffers[adapter]

    def like(self, adapter: str, x: Tensor, rows: int | None, columns: int | None) -> Tensor:
        """Return the leading rows and columns of an adapter's matrix, like `x` in device and dtype.

        No converted copy is kept: training cannot use a copy made in inference mode, and a copy
        misses changes of the matrix. Copying the slice of one layer costs little.

        Raises:
            SurroundingsError: the model was moved to the meta device, which keeps no values.
        """
        matrix: Tensor = self._buffers[adapter]
        if matrix.is_meta and not x.is_meta:
            check_has_values(matrix, f"the shared matrix of adapter {adapter}")
        return matrix[:rows, :columns].to(x)

    def _pool(self) -> None:
        """Let adapters with equal matrices share a tensor."""
        kept: list[Tensor] = []
        for adapter, matrix in self._buffers.items():
            same = (other for other in kept if _are_equal(other, matrix))
            self._buffers[adapter] = next(same, matrix)
            kept.append(self._buffers[adapter])

    # torch moves and loads buffers one by one, which would separate shared tensors, or give one
    # adapter's values to another adapter.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:  # noqa: ANN401, FBT001, FBT002
        super()._apply(fn, recurse)
        self._pool()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        self._buffers.update({name: matrix.clone() for name, matrix in self._buffers.items()})
        super()._load_from_state_dict(*args, **kwargs)
        self._pool()


def _are_equal(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are interchangeable; on the meta device this is unknown: False."""
    return (
        (one.device, one.dtype, one.shape) == (other.device, other.dtype, other.shape)
        and not one.is_meta
        and torch.equal(one, other)
    )


def _largest(values: Tensor) -> float:
    """Return the largest absolute value; NaN if any value is NaN."""
    if not values.numel():
        return 0.0
    low, high = values.aminmax()
    return math.nan if math.isnan(low) else max(-float(low), float(high))


class VeraLinear(nn.Module):
    """A linear layer with the VeRA branches of any number of adapters.

    Attributes:
        base_layer: the frozen layer, whose forward is called.
        vera_lambda_d: d by adapter, of shape (r,).
        vera_lambda_b: b by adapter, of shape (out,).
        dropout: by adapter, the dropout probability for the branch's input in training.
        active: the adapters whose branches are added, in this order.
        merged: the adapters whose D is merged into W; with any of these, no branch is added.
    """

    def __init__(self, base_layer: nn.Module, vera_A: SharedMatrix, vera_B: SharedMatrix) -> None:
        super().__init__()
        dims = linear_of(base_layer)
        if dims is None:
            raise UsageError(
                f"VeRA adapts torch.nn.Linear, transformers' Conv1D and their subclasses; "
                f"{type(base_layer).__name__} is none of these."
            )
        self.base_layer = base_layer
        self.in_features, self.out_features = dims.in_features, dims.out_features
        self.conv1d = dims.conv1d
        self.vera_lambda_b = nn.ParameterDict()  # first, as in PEFT: optimizers number parameters
        self.vera_lambda_d = nn.ParameterDict()
        self.dropout: dict[str, float] = {}
        self.active: tuple[str, ...] = ()
        self.merged: tuple[str, ...] = ()
        self._shared = (vera_A, vera_B)  # in a tuple, so that no submodules are registered

    def add(
        self, adapter: str, d: Tensor, b: Tensor, *, dropout: float = 0.0, widened: bool = True
    ) -> None:
        """Add copies of an adapter's vectors d (r,) and b (out,) to the layer, not yet active.

        The copies are on the frozen layer's device, in the dtype of W; `widened` copies are at
        least in float32.
        """
        dtype = weight_dtype(self.base_layer) or torch.float32
        held = chain(self.base_layer.parameters(), self.base_layer.buffers())
        place = {
            "device": next((tensor.device for tensor in held), None),
            "dtype": torch.promote_types(dtype, torch.float32) if widened else dtype,
        }
        self.vera_lambda_d[adapter] = nn.Parameter(d.to(**place, copy=True))
        self.vera_lambda_b[adapter] = nn.Parameter(b.to(**place, copy=True))
        self.dropout[adapter] = dropout if dropout > 0 else 0.0  # NaN means no dropout, as in PEFT

    def remove(self, adapter: str) -> None:
        """Remove an adapter's vectors, if the layer has any, and deactivate the adapter."""
        if adapter in self.vera_lambda_d:
            del self.vera_lambda_d[adapter], self.vera_lambda_b[adapter], self.dropout[adapter]
        self.active = tuple(name for name in self.active if name != adapter)

    # Models read these attributes of layers to find a dtype or a device.

    @property
    def weight(self) -> Any:  # noqa: ANN401 -- a quantized layer may have none
        """The frozen layer's W."""
        return self.base_layer.weight

    @property
    def bias(self) -> Any:  # noqa: ANN401
        """The frozen layer's bias, or None."""
        return getattr(self.base_layer, "bias", None)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """Return y (.., out) for x (.., in); further arguments go to the frozen layer."""
        y = self.base_layer(x, *args, **kwargs)
        if self.merged or not self.active:
            return y.to(x.dtype)
        dtype = y.dtype
        for adapter in self.active:
            branch = self._branch(adapter, x)
            in_place = torch.promote_types(branch.dtype, y.dtype) == branch.dtype
            y = branch.add_(y) if in_place else branch + y  # gradients need neither
        return y.to(dtype).to(x.dtype)

    def _branch(self, adapter: str, x: Tensor) -> Tensor:
        d, b = self.vera_lambda_d[adapter], self.vera_lambda_b[adapter]
        x = functional.dropout(x.to(d.dtype), self.dropout[adapter], self.training)
        A, B = self._slices(adapter, x)
        y = functional.linear(d * functional.linear(x, A), B)
        if torch.is_grad_enabled() or y.dtype != b.dtype:
            return b * y
        return y.mul_(b)  # only the gradient of b needs the old y

    def _slices(self, adapter: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return this layer's A (r, in) and B (out, r), in the device and dtype of `x`."""
        A, B = self._shared
        return A.like(adapter, x, None, self.in_features), B.like(
            adapter, x, self.out_features, None
        )

    def delta(self, adapter: str) -> Tensor:
        """Return D (out, in) of an adapter, in float32, or in float64 for float64 vectors."""
        vectors = self.vera_lambda_d[adapter].detach(), self.vera_lambda_b[adapter].detach()
        d, b = (v.to(torch.promote_types(v.dtype, torch.float32)) for v in vectors)
        A, B = self._slices(adapter, d)
        with torch.autocast(d.device.type, enabled=False):
            return (b[:, None] * B) @ (d[:, None] * A)

    def merge(self, adapters: tuple[str, ...] | None = None) -> None:
        """Add the D of the adapters to W, in turn; None means the active adapters.

        Each sum is rounded once, to W's dtype. An adapter is merged only once.

        Raises:
            UsageError: W is quantized.
            SurroundingsError: W is on the meta device.
        """
        adapters = self.unmerged(self.active if adapters is None else adapters)
        self._add_to_weight(self.dense_weight(), adapters)
        self.merged += adapters

    def unmerged(self, adapters: Iterable[str]) -> tuple[str, ...]:
        """Return the adapters that the layer has and that are not merged."""
        return tuple(
            name for name in adapters if name in self.vera_lambda_b and name not in self.merged
        )

    def unmerge(self) -> None:
        """Subtract the merged D, the last first. W is restored up to rounding, not bit for bit."""
        if self.merged:
            self._add_to_weight(self.dense_weight(), self.merged[::-1], sign=-1)
        self.merged = ()

    def merges_finite(self, adapters: tuple[str, ...] | None = None) -> bool:
        """Return whether every value of W would be finite after `merge` of the adapters.

        A bound on the largest value of the sum nearly always suffices. If the bound is too high,
        the sum is computed in a copy of W.
        """
        adapters = self.unmerged(self.active if adapters is None else adapters)
        weight = self.dense_weight()
        limit = float(torch.finfo(weight.dtype).max) / 2 - _largest(weight)
        if sum(self._largest_delta(adapter) for adapter in adapters) < limit:  # false for NaN
            return True
        weight = weight.clone()
        self._add_to_weight(weight, adapters)
        return bool(weight.isfinite().all())

    def _largest_delta(self, adapter: str) -> float:
        """Return a bound on the values of D and on all intermediate values."""
        d, b = self.vera_lambda_d[adapter].detach(), self.vera_lambda_b[adapter].detach()
        left, right = (
            _largest(vector) * _largest(matrix)
            for vector, matrix in zip((d, b), self._slices(adapter, d), strict=True)
        )
        bound: float = left + right + d.numel() * left * right
        return bound

    def dense_weight(self) -> Tensor:
        """Return W for a merge; raise as `merge` does if nothing can be merged."""
        weight: Any = getattr(self.base_layer, "weight", None)
        shape = (self.out_features, self.in_features)
        shape = shape[::-1] if self.conv1d else shape
        if getattr(weight, "dtype", None) not in DENSE or tuple(weight.shape) != shape:
            kind = type(self.base_layer).__name__
            raise UsageError(
                f"a {kind} layer has no float weight of shape {shape}, so a merge is impossible. "
                "The layer may be quantized."
            )
        check_has_values(weight, "a weight to merge into")
        return weight.detach()

    def _add_to_weight(self, weight: Tensor, adapters: tuple[str, ...], *, sign: int = 1) -> None:
        for adapter in adapters:
            delta = self.delta(adapter)
            # For a W in 16 bits, torch adds in float32 and rounds only the sum.
            weight.add_(delta.T if self.conv1d else delta, alpha=sign)

    def extra_repr(self) -> str:
        """Name the adapters in the layer's `repr`."""
        return f"active={self.active}, merged={self.merged}"
