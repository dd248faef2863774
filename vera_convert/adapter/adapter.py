"""A VeRA adapter as it lies on disk: config, lambdas by layer, A and B, and what else it replaces.

The model is total: what opens as an `Adapter` has no error, so that nobody after it needs guards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vera_convert.adapter.config import CONFIG_NAME, ConfigFile, VeraConfig, read_config
from vera_convert.adapter.fingerprint import METADATA_KEY, Fingerprint, disagreement, from_text
from vera_convert.adapter.tensors import (
    WEIGHTS_NAME,
    AdaptedLayer,
    StoredProjections,
    sort_tensors,
)
from vera_convert.errors import CheckpointError, SurroundingsError
from vera_convert.files.reading import ByteSource, open_local, printable
from vera_convert.files.tensorfile import TensorData, TensorFile, from_file, pickled_weights
from vera_convert.rules import CONFIG_MISSING, WEIGHTS_MISSING, Finding, Severity


@dataclass(frozen=True, slots=True)
class Adapter:
    """A VeRA adapter, every tensor accounted for.

    Attributes:
        folder: where it lies.
        config_file: the config with its text.
        metadata: the safetensors metadata.
        tensors: every tensor in the file's order.
        layers: the adapted layers by module path, in the file's order.
        projections: A and B if they are stored.
        repeated: copies of A and B stored with layers; they equal the shared ones.
        replacements: tensors that replace base tensors (heads, biases, embeddings).
        fingerprint: what dropped projections were, where a tool of ours dropped them.
        findings: warnings and notes.
        sources: the open files; `check_unchanged` looks at them again.
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
    sources: tuple[ByteSource, ...]

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
        return self.sources[-1].size

    @property
    def place(self) -> str:
        """How messages call the weights."""
        return WEIGHTS_NAME

    def check_unchanged(self) -> None:
        """Raise `SurroundingsError` if a file changed since it was opened."""
        for source in self.sources:
            source.check_unchanged()


Repair = Callable[[Sequence[TensorData], ConfigFile], tuple[Sequence[TensorData], ConfigFile]]


@contextmanager
def open_adapter(folder: Path, *, repair: Repair | None = None) -> Iterator[Adapter]:
    """Open the adapter in a folder; its tensors can be read until the context ends.

    Args:
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        repair: brings known old and damaged forms to the current one before they are judged.

    Raises:
        CheckpointError: with every defect of config and tensors at once.
        SurroundingsError: no such folder, or a file cannot be read.
    """
    findings = [*_missing_files(folder)]
    if findings:
        raise CheckpointError.of(findings)
    with (
        open_local(folder / CONFIG_NAME, within=folder) as config_source,
        open_local(folder / WEIGHTS_NAME, within=folder) as weights_source,
    ):
        config_file, weights = _read_both(config_source, weights_source)
        tensors: Sequence[TensorData] = [
            from_file(weights, name) for name in weights.header.tensors
        ]
        if repair is not None:
            tensors, config_file = repair(tensors, config_file)
        yield _assemble(folder, config_file, weights, tensors, (config_source, weights_source))


def _missing_files(folder: Path) -> Iterator[Finding]:
    place = printable(folder.name or str(folder))
    if not folder.is_dir():
        raise SurroundingsError(f"there is no folder {printable(str(folder))}.")
    if not (folder / CONFIG_NAME).exists():
        yield CONFIG_MISSING.at(place, f"there is no {CONFIG_NAME}.{_hint(folder)}")
    elif not (folder / WEIGHTS_NAME).exists():
        yield pickled_weights(folder) or WEIGHTS_MISSING.at(place, f"there is no {WEIGHTS_NAME}.")


def _hint(folder: Path) -> str:
    """Name the subfolders that are adapters, if there are any."""
    named = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}"))
    shown = ", ".join(map(printable, named[:3]))
    return f" It holds adapters in subfolders ({shown}): did you mean one of them?" if named else ""


def _read_both(
    config_source: ByteSource, weights_source: ByteSource
) -> tuple[ConfigFile, TensorFile]:
    """Read config and header each to the end, so that one run shows the defects of both."""
    findings: list[Finding] = []
    config_file, weights = None, None
    try:
        config_file = read_config(config_source)
    except CheckpointError as error:
        findings += error.findings
    try:
        weights = TensorFile(weights_source)
    except CheckpointError as error:
        findings += error.findings
    if config_file is None or weights is None:
        raise CheckpointError.of(findings)
    return config_file, weights


def _assemble(
    folder: Path,
    config_file: ConfigFile,
    weights: TensorFile,
    tensors: Sequence[TensorData],
    sources: tuple[ByteSource, ...],
) -> Adapter:
    sorted_names = sort_tensors(tensors, config_file.config)
    findings = [*config_file.findings, *sorted_names.findings]
    pickled = pickled_weights(folder)
    findings += [pickled] if pickled else []
    metadata = weights.header.metadata
    fingerprint = None
    if METADATA_KEY in metadata and not any(f.severity is Severity.ERROR for f in findings):
        fingerprint = from_text(metadata[METADATA_KEY], place=WEIGHTS_NAME)
        longest = max(layer.out_features for layer in sorted_names.layers.values())
        wrong = disagreement(fingerprint, config_file.config, longest, place=WEIGHTS_NAME)
        findings += [wrong] if wrong else []
    errors = [finding for finding in findings if finding.severity is Severity.ERROR]
    if errors:
        raise CheckpointError.of(errors)
    return Adapter(
        folder=folder,
        config_file=config_file,
        metadata=metadata,
        tensors=tuple(tensors),
        layers=sorted_names.layers,
        projections=sorted_names.projections,
        repeated=sorted_names.repeated,
        replacements=sorted_names.replacements,
        fingerprint=fingerprint,
        findings=tuple(findings),
        sources=sources,
    )
