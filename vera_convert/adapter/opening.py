"""Open an adapter's folder: read config and tensors, and report every defect.

config ──► fields ──┐
├──► tensors by meaning ──► fingerprint ──► an `Adapter`, or findings
weights ─► header ──┘
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from vera_convert import rules
from vera_convert.adapter.adapter import Adapter
from vera_convert.adapter.config import LORA, ConfigFile, OtherMethodError, VeraConfig, read_config
from vera_convert.adapter.fingerprint import METADATA_KEY, Fingerprint, disagreement, from_text
from vera_convert.adapter.lora_record import lora_with_config, lora_without_config
from vera_convert.adapter.sorting import SortedTensors, sort_tensors
from vera_convert.errors import CheckpointError, SurroundingsError
from vera_convert.files.file_names import CONFIG_NAME, WEIGHTS_NAME
from vera_convert.files.reading import ByteSource, open_local, too_large
from vera_convert.files.tensorfile import TensorData, TensorFile, from_file, pickled_weights
from vera_convert.rules import Finding, errors_of
from vera_convert.text import listed, printable

_MODEL_WEIGHTS = "model.safetensors"
MAX_WEIGHTS_BYTES = 64 << 30
"""Three times the embedding and the head of the largest models in float32."""


Source = TypeVar("Source")
Part = TypeVar("Part")


class Repaired(NamedTuple):
    """The tensors and the config after a repair, with a phrase for each change."""

    tensors: Sequence[TensorData]
    config_file: ConfigFile
    changes: tuple[str, ...]


Repair = Callable[[Sequence[TensorData], ConfigFile], Repaired]


@contextmanager
def open_adapter(
    folder: Path, *, repair: Repair | None = None, config: Path | None = None
) -> Iterator[Adapter]:
    """Open the adapter in a folder; the tensors can be read until the context ends.

    Args:
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        repair: brings known old and damaged forms to the current form before the checks.
        config: a config file to read instead of the folder's, which may be missing.

    Raises:
        CheckpointError: with every defect of config and tensors at once.
        SurroundingsError: the folder is missing, or reading a file fails.
    """
    with examined_folder(folder, repair=repair, config=config) as found:
        if found.other_method is not None:
            raise found.other_method
        if found.adapter is None:
            raise CheckpointError.of(errors_of(found.findings))
        yield found.adapter


class Examined(NamedTuple):
    """The readable parts of an adapter, sound or not; each unreadable part is a finding.

    Attributes:
        findings: every defect.
        config_file: the config; None for a config of another method.
        file: the open weights; None if the header is wrong.
        tensors: the tensors by meaning, repaired on request; None without config or weights.
        fingerprint: the fingerprint, if readable.
        adapter: the adapter; None if any finding is an error.
        other_method: the error, if the adapter is of another method than VeRA; nothing else is
            read then.
    """

    findings: tuple[Finding, ...]
    config_file: ConfigFile | None = None
    file: TensorFile | None = None
    tensors: SortedTensors | None = None
    fingerprint: Fingerprint | None = None
    adapter: Adapter | None = None
    other_method: OtherMethodError | None = None

    @property
    def config(self) -> VeraConfig | None:
        """The sound fields of the config; None for an unknown rank."""
        return _with_rank(self.config_file)

    @property
    def wrong_fields(self) -> frozenset[str]:
        """The names of the wrong fields of the config."""
        return self.config_file.wrong if self.config_file else frozenset()


def _with_rank(file: ConfigFile | None) -> VeraConfig | None:
    return file.config if file is not None and "r" not in file.wrong else None


@contextmanager
def examined_folder(
    folder: Path, *, repair: Repair | None = None, config: Path | None = None
) -> Iterator[Examined]:
    """Open the files of an adapter in a folder, sound or not; see `open_adapter`.

    Raises:
        CheckpointError: a repair cannot be made.
        SurroundingsError: the folder is missing, or reading a file fails.
    """
    if not folder.is_dir():
        raise SurroundingsError(f"there is no folder {printable(str(folder))}.")
    paths = {CONFIG_NAME: config or folder / CONFIG_NAME, WEIGHTS_NAME: folder / WEIGHTS_NAME}
    lora = None if paths[CONFIG_NAME].exists() else lora_without_config(folder)
    if lora is not None:
        yield Examined(lora.findings, other_method=lora)
        return
    findings = [*_missing_files(folder, paths[CONFIG_NAME])]
    with ExitStack() as opened:
        sources: dict[str, ByteSource] = {}
        for name, path in paths.items():
            if path.exists():
                try:
                    sources[name] = opened.enter_context(open_local(path, within=path.parent))
                except CheckpointError as error:
                    findings += error.findings
        source, weights = sources.get(CONFIG_NAME), sources.get(WEIGHTS_NAME)
        yield examine(folder, source, weights, findings, repair=repair)


def examine(
    folder: Path,
    config_source: ByteSource | None,
    weights_source: ByteSource | None,
    findings: Iterable[Finding] = (),
    *,
    repair: Repair | None = None,
    values: bool = True,
) -> Examined:
    """Read the whole config and the whole header, to show every defect in a single run.

    Args:
        folder: where the adapter lies.
        config_source: the open ``adapter_config.json``, or None.
        weights_source: ``adapter_model.safetensors``, likewise.
        findings: the known defects of the folder.
        repair: see `open_adapter`.
        values: whether tensors may be read, and not only the header.

    Raises:
        CheckpointError: the repair cannot be made.
        SurroundingsError: a file cannot be read.
    """
    found = [*findings]
    try:
        config_file = _read(read_config, config_source, found)
    except OtherMethodError as error:
        other, place = error, error.findings[0].place
        if error.method == LORA:
            other = lora_with_config(folder, weights_source, place=place)
        return Examined(other.findings, other_method=other)
    found += config_file.findings if config_file is not None else ()
    weights = _read(_weights, weights_source, found)
    if weights is None:
        return Examined(tuple(found), config_file)
    as_read = config_file
    tensors, config_file, changes = _repaired(weights, config_file, repair)
    if as_read is not None and config_file is not None and config_file is not as_read:
        # The repair can have removed the fields of some findings.
        found = [*(f for f in found if f not in as_read.findings), *config_file.findings]
    config, by_meaning, adapter = _with_rank(config_file), None, None
    if config is not None:
        by_meaning = sort_tensors(tensors, config, values=values)
        found += by_meaning.findings
    fingerprint = _fingerprint(weights, config, by_meaning, found)
    if not errors_of(found) and config_source and config_file and by_meaning:
        adapter = Adapter(
            folder=folder,
            config_file=config_file,
            metadata=weights.header.metadata,
            tensors=tuple(tensors),
            layers=by_meaning.layers,
            projections=by_meaning.projections,
            repeated=by_meaning.repeated,
            replacements=by_meaning.replacements,
            fingerprint=fingerprint,
            changes=changes,
            findings=tuple(found),
            config_source=config_source,
            file=weights,
        )
    return Examined(tuple(found), config_file, weights, by_meaning, fingerprint, adapter)


def _read(
    read: Callable[[Source], Part], source: Source | None, found: list[Finding]
) -> Part | None:
    """Read a source; return None without a source, or if the source has defects.

    Args:
        read: reads the source.
        source: the source, or None.
        found: the list that gets the defects.

    Raises:
        OtherMethodError: the config is of another method than VeRA.
    """
    if source is None:
        return None
    try:
        return read(source)
    except OtherMethodError:
        raise
    except CheckpointError as error:
        found += error.findings
        return None


def _weights(source: ByteSource) -> TensorFile:
    file = TensorFile(source)
    # Every value would be read, and a sparse file can have any size.
    if source.size > MAX_WEIGHTS_BYTES:
        raise CheckpointError(too_large(source, MAX_WEIGHTS_BYTES))
    return file


def _repaired(
    weights: TensorFile, config_file: ConfigFile | None, repair: Repair | None
) -> tuple[Sequence[TensorData], ConfigFile | None, tuple[str, ...]]:
    """Return tensors and config, repaired on request if the config is sound, and the changes."""
    tensors = [from_file(weights, name) for name in weights.header.tensors]
    if repair is None or config_file is None or config_file.wrong:
        return tensors, config_file, ()
    return repair(tensors, config_file)


def _fingerprint(
    weights: TensorFile,
    config: VeraConfig | None,
    by_meaning: SortedTensors | None,
    found: list[Finding],
) -> Fingerprint | None:
    """Read the fingerprint and compare it with the sound parts of the adapter."""
    text = weights.header.metadata.get(METADATA_KEY)
    fingerprint = _read(partial(from_text, place=WEIGHTS_NAME), text, found)
    if fingerprint is not None and config is not None and by_meaning is not None:
        wrong = disagreement(fingerprint, config, by_meaning.longest_b, place=WEIGHTS_NAME)
        found += [wrong] if wrong else []
    return fingerprint


# --- what is missing -----------------------------------------------------------------------------


def _missing_files(folder: Path, config: Path) -> Iterator[Finding]:
    """Yield the missing files of a folder; weights count only if there is a config."""
    place = printable(str(folder))
    if not config.exists():
        yield _no_config(folder, place)
    elif (folder / WEIGHTS_NAME).exists():
        pickled = pickled_weights(folder)
        yield from [pickled] if pickled else []
    else:
        yield pickled_weights(folder) or _no_weights(folder, place)


def _no_config(folder: Path, place: str) -> Finding:
    try:
        names = {entry.name for entry in os.scandir(folder)}
    except OSError as error:
        raise SurroundingsError(f"cannot list {place}: {error.strerror or error}.") from error
    below = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}"))
    if WEIGHTS_NAME not in names and below:
        return rules.ADAPTER_BELOW.at(
            place, f"it holds adapters in subfolders only ({listed(below)})."
        )
    if WEIGHTS_NAME not in names and "config.json" in names:
        return rules.MODEL_FOLDER.at(place, f"there is a model's config.json and no {CONFIG_NAME}.")
    if CONFIG_NAME in names:
        return rules.CONFIG_MISSING.at(place, f"{CONFIG_NAME} is a link that leads nowhere.")
    hint = ", but a vera_config.json, which is PaddleNLP's" if "vera_config.json" in names else ""
    return rules.CONFIG_MISSING.at(place, f"there is no {CONFIG_NAME}{hint}.")


def _no_weights(folder: Path, place: str) -> Finding:
    """Return the finding for missing weights, or for weights under the name of a model."""
    reason = f"there is no {WEIGHTS_NAME}"
    if os.path.lexists(folder / WEIGHTS_NAME):
        return rules.WEIGHTS_MISSING.at(place, f"{WEIGHTS_NAME} is a link that leads nowhere.")
    if any(folder.glob("adapter_model*-of-*.safetensors")):
        reason += (
            ", and the tensors lie in several files. PEFT loads a single file: join them into one."
        )
        return rules.WEIGHTS_MISSING.at(place, reason)
    try:
        with open_local(folder / _MODEL_WEIGHTS, within=folder) as source:
            names = [*TensorFile(source).header.tensors]
    except (CheckpointError, SurroundingsError):
        names = []
    if any(".vera_lambda_" in name for name in names):
        return rules.ADAPTER_AS_MODEL.at(
            place, f"{reason}, but {_MODEL_WEIGHTS} holds vectors of VeRA."
        )
    return rules.WEIGHTS_MISSING.at(place, f"{reason}.")
