"""A VeRA adapter as it lies on disk: config, lambdas by layer, A and B, and what else it replaces.

The model is total: what opens as an `Adapter` has no error, so that nobody after it needs guards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vera_convert.adapter.config import ConfigFile, VeraConfig
from vera_convert.adapter.fingerprint import Fingerprint
from vera_convert.adapter.tensors import WEIGHTS_NAME, AdaptedLayer, StoredProjections
from vera_convert.files.reading import ByteSource
from vera_convert.files.tensorfile import TensorData, TensorFile
from vera_convert.rules import Finding


@dataclass(frozen=True, slots=True)
class Adapter:
    """A VeRA adapter, every tensor accounted for.

    Attributes:
        folder: where it lies.
        config_file: the config with its text.
        metadata: the safetensors metadata.
        tensors: every tensor in the file's order; the copies of a saved head's bias, which PEFT
            writes and does not read, are in no other field.
        layers: the adapted layers by module path, in the file's order.
        projections: A and B if they are stored.
        repeated: copies of A and B stored with layers; they equal the shared ones.
        replacements: tensors that replace base tensors (heads, biases, embeddings).
        fingerprint: what dropped projections were, where a tool of ours dropped them.
        findings: warnings and notes.
        config_source: the open config; `check_unchanged` looks at it again.
        file: the open weights, as they are stored.
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
    findings: tuple[Finding, ...]
    config_source: ByteSource
    file: TensorFile

    @property
    def config(self) -> VeraConfig:
        """The fields of the config."""
        return self.config_file.config

    @property
    def longest_b(self) -> int:
        """Length of the longest lambda_b: B needs that many rows at least."""
        return max(layer.out_features for layer in self.layers.values())

    @property
    def weights_size(self) -> int:
        """Bytes of the file with the weights."""
        return self.file.source.size

    @property
    def place(self) -> str:
        """How messages call the weights."""
        return WEIGHTS_NAME

    def check_unchanged(self) -> None:
        """Raise `SurroundingsError` if a file changed since it was opened."""
        for source in (self.config_source, self.file.source):
            source.check_unchanged()
