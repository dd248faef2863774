"""What all conversions share: open an adapter, write a new folder, and return a report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from vera_convert.adapter.adapter import Adapter
from vera_convert.adapter.folder import AdapterContent, SideFiles, write_adapter, written_files
from vera_convert.adapter.names import A_NAME
from vera_convert.adapter.opening import Repair, open_adapter
from vera_convert.adapter.values import refuse_values
from vera_convert.arguments import optional, place, text
from vera_convert.base.facts import BaseFacts
from vera_convert.conversion.transforms import NewAdapter
from vera_convert.draws.generator import Draw
from vera_convert.files.value_range import ValueRange
from vera_convert.hub.lookup import HubAccess, Location, fetch_adapter, hub_access_of, locate
from vera_convert.publish.publishing import Output, files_but
from vera_convert.rules import Finding
from vera_convert.text import short_repr


@dataclass(frozen=True, slots=True)
class Conversion:
    """The report of `strip`, `embed` or `migrate`.

    Attributes:
        adapter: the caller's name for the adapter, with the commit on the Hub.
        out: the folder that was written.
        embedded: whether the new folder stores A and B.
        changes: one phrase for each change; empty if the adapter was only copied.
        draw: the draw that the projections are, if known.
        base_facts: the facts of the base.
        findings: warnings and notes.
        side_files: the files beside the weights, copied and left out.
        bytes_before: size of ``adapter_model.safetensors`` as read.
        bytes_after: size of the new file.
    """

    adapter: str
    out: Path
    embedded: bool
    changes: tuple[str, ...]
    draw: Draw | None
    base_facts: BaseFacts
    findings: tuple[Finding, ...]
    side_files: SideFiles
    bytes_before: int
    bytes_after: int

    __repr__ = short_repr


@dataclass(frozen=True, slots=True)
class Work:
    """An opened adapter and the output of the conversion.

    Attributes:
        location: where the adapter lies.
        adapter: the adapter.
        values: the ranges of values of the adapter's tensors, by name.
        output: the folder or file to write.
        access: how the Hub is reached.
    """

    location: Location
    adapter: Adapter
    values: Mapping[str, ValueRange]
    output: Output
    access: HubAccess


@contextmanager
def opened(
    adapter: str | Path,
    output: Output,
    *,
    revision: str | None,
    access: HubAccess | None,
    repair: Repair | None = None,
) -> Iterator[Work]:
    """Find and open an adapter, after a check that the output may be written.

    Args:
        adapter: a folder or a repo on the Hub.
        output: the folder or file to write.
        revision: the adapter's revision on the Hub.
        access: how the Hub is reached; None for the defaults.
        repair: brings known old and damaged forms to the current form.

    Raises:
        CheckpointError: the adapter is malformed, or has a wrong value.
        UsageError: the output exists and may not be replaced, or overlaps the adapter.
        SurroundingsError: the adapter is not found, or cannot be read.
    """
    access = hub_access_of(access)
    named, revision = place("adapter", adapter), optional(text, "revision", revision)
    location = locate(named, kind="adapter", access=access, revision=revision)
    replace(output, inputs=[location.folder] if location.folder else []).check()
    location = fetch_adapter(location, access)
    with open_adapter(location.fetched, repair=repair) as found:
        yield Work(location, found, refuse_values(found), output, access)


def content_of(converted: NewAdapter, *, not_fetched: tuple[str, ...] = ()) -> AdapterContent:
    """Return the content of the new folder; an unchanged file of weights is copied."""
    adapter = converted.adapter
    return AdapterContent(
        converted.tensors,
        converted.metadata,
        converted.config_text,
        adapter.folder,
        not_fetched,
        adapter.check_unchanged,
        adapter.file.source if converted.keeps_weights else None,
    )


def publish(work: Work, converted: NewAdapter, base_facts: BaseFacts) -> Conversion:
    """Write a conversion completely or not at all, read it back, and return the report.

    Raises:
        UsageError: OUT exists and may not be replaced, holds files that are not written again, or
            overlaps an input.
        SurroundingsError: the disk fails, or the input changed during the reading.
    """
    content = content_of(converted, not_fetched=work.location.left_out)
    written = {*written_files(content.folder, not_fetched=content.not_fetched)}
    output = replace(
        work.output,
        inputs=(content.folder, *base_facts.folders),
        strangers=lambda folder: files_but(folder, written),
    )
    with output.staged() as staging:
        sides = write_adapter(content, staging)
    return reported(converted, base_facts, sides, label=work.location.label, out=output.path)


def reported(
    converted: NewAdapter, base_facts: BaseFacts, sides: SideFiles, *, label: str, out: Path
) -> Conversion:
    """Return the report of a conversion.

    Args:
        converted: the content that was written.
        base_facts: the facts of the base.
        sides: the files beside the weights, copied and left out.
        label: how the caller named the adapter.
        out: where the conversion lies, or will lie.
    """
    return Conversion(
        adapter=label,
        out=out,
        embedded=any(tensor.name == A_NAME for tensor in converted.tensors),
        changes=converted.changes,
        draw=converted.draw,
        base_facts=base_facts,
        findings=tuple(dict.fromkeys((*converted.findings, *base_facts.idle_options))),
        side_files=sides,
        bytes_before=converted.adapter.weights_size,
        bytes_after=converted.weights_size,
    )
