"""A VeRA adapter as a record: config, lambdas by layer, A and B, and replaced tensors.

Every `Adapter` is sound: all checks are done before an `Adapter` exists.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from vera_convert.adapter.config import ConfigFile, VeraConfig
from vera_convert.adapter.fingerprint import Fingerprint
from vera_convert.adapter.names import A_NAME, B_NAME, PREFIX
from vera_convert.files.file_names import WEIGHTS_NAME
from vera_convert.files.reading import ByteSource
from vera_convert.files.tensorfile import TensorData, TensorFile
from vera_convert.rules import Finding

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

    @property
    def nbytes(self) -> int:
        """The bytes of A and B."""
        return self.A.nbytes + self.B.nbytes


@dataclass(frozen=True, slots=True)
class Adapter:
    """A VeRA adapter, every tensor accounted for.

    Attributes:
        folder: the folder of the adapter.
        config_file: the config with the text of the file.
        metadata: the safetensors metadata.
        tensors: every tensor in the file's order; the copies of a saved head's bias, which PEFT
            writes and ignores, are in no other field.
        layers: the adapted layers by module path, in the file's order.
        projections: A and B if stored.
        repeated: copies of A and B stored with layers, equal to the shared pair.
        replacements: tensors that replace base tensors (heads, biases, embeddings).
        fingerprint: the record of the projections dropped by vera-convert.
        changes: the repairs made on reading, a phrase for each; empty if nothing was repaired.
        findings: warnings and notes.
        config_source: the open config file, for `check_unchanged`.
        file: the open weights file.
    """

    folder: Path
    config_file: ConfigFile
    metadata: Mapping[str, str]
    tensors: tuple[TensorData, ...]
    layers: Mapping[str, AdaptedLayer]
    projections: StoredProjections | None
    repeated: tuple[TensorData, ...]
    replacements: tuple[TensorData, ...]
    fingerprint: Fingerprint | None
    changes: tuple[str, ...]
    findings: tuple[Finding, ...]
    config_source: ByteSource
    file: TensorFile

    @property
    def config(self) -> VeraConfig:
        """The fields of the config."""
        return self.config_file.config

    @property
    def longest_b(self) -> int:
        """Length of the longest lambda_b; B needs at least this number of rows."""
        return max(layer.out_features for layer in self.layers.values())

    @property
    def lambda_dtypes(self) -> frozenset[str]:
        """The dtypes of the trained vectors (safetensors' names)."""
        pairs = ((layer.lambda_b, layer.lambda_d) for layer in self.layers.values())
        return frozenset(tensor.dtype for pair in pairs for tensor in pair)

    @property
    def trained(self) -> tuple[TensorData, ...]:
        """Every tensor except A, B and the copies of A and B."""
        drawn = {A_NAME, B_NAME, *(copy.name for copy in self.repeated)}
        return tuple(tensor for tensor in self.tensors if tensor.name not in drawn)

    @property
    def weights_size(self) -> int:
        """Bytes of the weights file."""
        return self.file.source.size

    @property
    def base_copies(self) -> dict[str, TensorData]:
        """The base's weights that PEFT stored for adapted heads, by module path."""
        ending = ".base_layer.weight"
        found = {
            tensor.name.removeprefix(PREFIX).removesuffix(ending): tensor
            for tensor in self.replacements
            if tensor.name.endswith(ending)
        }
        return {module: tensor for module, tensor in found.items() if module in self.layers}

    @property
    def trained_replacements(self) -> tuple[TensorData, ...]:
        """The tensors in place of the base's, without PEFT's copies of the base's weights."""
        copies = {*self.base_copies.values()}
        return tuple(each for each in self.replacements if each not in copies)

    @property
    def place(self) -> str:
        """The name of the weights file in messages."""
        return WEIGHTS_NAME

    def check_unchanged(self) -> None:
        """Raise `SurroundingsError` if a file changed after its opening."""
        for source in (self.config_source, self.file.source):
            source.check_unchanged()
