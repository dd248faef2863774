"""The tensors of an adapter as records: the two vectors of each layer, and the shared A and B."""

from __future__ import annotations

from typing import NamedTuple

from vera_convert.files.tensorfile import TensorData

MAX_PROJECTION_BYTES = 2 << 30
"""The limit of A and B together, thirty times the need of the largest models at rank 1,024."""
MAX_WIDTH = 1 << 20
"""The limit of the columns of A, whose rows are compared whole; layers have up to 60,000 inputs."""


class AdaptedLayer(NamedTuple):
    """The two trained vectors of one layer.

    Attributes:
        module: path of the layer in the wrapped model.
        lambda_b: b, of shape (out,).
        lambda_d: d, of shape (r,).
    """

    module: str
    lambda_b: TensorData
    lambda_d: TensorData

    @property
    def out_features(self) -> int:
        """Number of outputs of the layer."""
        return self.lambda_b.shape[0]


class StoredProjections(NamedTuple):
    """The stored shared pair: A of shape (r, in), B of shape (out, r)."""

    A: TensorData
    B: TensorData

    @property
    def in_features(self) -> int:
        """Columns of A."""
        return self.A.shape[1]

    @property
    def out_features(self) -> int:
        """Rows of B."""
        return self.B.shape[0]
