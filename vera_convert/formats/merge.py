"""A merge's result as text for people and as a JSON document."""

from __future__ import annotations

import math

from vera_convert.base.strategies import AS_THEY_ARE
from vera_convert.formats.document import Document, document
from vera_convert.formats.shared import origin_text, table
from vera_convert.merging.adapters import MergedAdapter
from vera_convert.merging.merge import Merge
from vera_convert.merging.output import FilePlan
from vera_convert.merging.replaced import ReplacedTensor
from vera_convert.merging.report import (
    changed_share,
    numbers_record,
    relative_change,
    relative_loss,
    total,
    worst,
)
from vera_convert.text import and_more, counted, printable

_MOST_LISTED = 12


def merge_text(result: Merge) -> str:
    """Return the text about a merge, or about the plan of a merge."""
    out = printable(str(result.out))
    size = f"{result.needed:,} bytes in {len(result.files)} files"
    rows = [["wrote" if result.written else "would write", f"{out}, {size}"]]
    rows.append(["base", printable(result.base)])
    for adapter in result.adapters:
        rows += _adapter_rows(adapter)
    if result.resumed:
        done = counted(result.resumed, "shard")
        rows.append(["resumed", f"{done} of {len(_weights(result))} finished by an earlier run"])
    rows += _number_rows(result) if result.written else _plan_rows(result)
    rows += _replaced_rows(result)
    rows += _side_rows(result)
    return table(rows)


def _adapter_rows(adapter: MergedAdapter) -> list[list[str]]:
    weight = "" if adapter.weight == 1 else f", weight {adapter.weight:g}"
    drawn = f", {adapter.draw.description}" if adapter.draw is not None else ""
    layers = f"{adapter.layers} layers of rank {adapter.rank}{weight}"
    return [
        ["adapter", f"{printable(adapter.label)}, {layers}"],
        ["  layer names", _layer_names(adapter.strategy)],
        ["  A and B", f"{origin_text(adapter.origin)}{drawn}"],
    ]


def _layer_names(strategy: str) -> str:
    return "same as in the base" if strategy == AS_THEY_ARE.name else strategy


def _number_rows(result: Merge) -> list[list[str]]:
    numbers = total(result.tensors)
    last = worst(result.tensors)
    rows = [["time", f"{result.seconds:.1f} s in {result.jobs} threads"]]
    if last is None or last.numbers is None:
        return rows
    most = f"{relative_loss(last.numbers):.3g}, in {printable(last.name)}"
    return [
        *rows,
        ["changed", f"{changed_share(numbers):.1%} of {numbers.values:,} sampled values"],
        ["delta", f"{relative_change(numbers):.3g} times the norm of the weights"],
        ["rounding error", f"{relative_loss(numbers):.3g} of the delta; largest: {most}"],
    ]


def _weights(result: Merge) -> list[FilePlan]:
    return [file for file in result.files if file.name.endswith(".safetensors")]


def _plan_rows(result: Merge) -> list[list[str]]:
    rows = [
        ["space", f"{result.needed:,} bytes needed, {result.free:,} free"],
        ["estimate", f"{result.seconds:.1f} s in {result.jobs} threads"],
    ]
    weights = _weights(result)
    for file in weights[:_MOST_LISTED]:
        copied = f"{file.copied:,} bytes copied"
        rows.append(
            [
                f"  {printable(file.name)}",
                f"{copied}, {file.computed:,} bytes in {counted(file.tensors, 'tensor')} computed",
            ]
        )
    if len(weights) > _MOST_LISTED:
        rows.append(["", and_more(len(weights) - _MOST_LISTED, "shard").lstrip()])
    return rows


def _replaced_rows(result: Merge) -> list[list[str]]:
    """Return the replaced tensors, with the largest changes first."""

    def change(tensor: ReplacedTensor) -> float:
        return relative_change(tensor.numbers) if tensor.numbers is not None else math.inf

    tensors = sorted(result.replaced, key=change, reverse=True)
    rows = [
        ["" if number else "replaced", f"{printable(each.name)}: {each.change}"]
        for number, each in enumerate(tensors[:_MOST_LISTED])
    ]
    more = len(tensors) - _MOST_LISTED
    if more > 0:
        rows.append(["", f"{and_more(more).lstrip()}: see README.md or merge-provenance.json"])
    return rows


def _side_rows(result: Merge) -> list[list[str]]:
    rows = []
    own = {*result.beside.tokenizer, *result.beside.copied}
    written = {file.name for file in result.files} - own
    copied = [name for name in result.sides.copied if name in written]
    if copied:
        rows.append(["copied", ", ".join(map(printable, copied))])
    for label, names in (
        ("tokenizer", result.beside.tokenizer),
        ("adapter's own", result.beside.copied),
    ):
        if names:
            of = "the adapter's own: " if label == "tokenizer" else ""
            rows.append([label, of + ", ".join(map(printable, names))])
    left_out = [*result.sides.unneeded, *result.beside.left_out]
    if left_out:
        rows.append(["left out", ", ".join(map(printable, left_out))])
    return rows


def merge_document(result: Merge) -> Document:
    """Return the document about a merge, or about its plan (schema ``merge``)."""
    files = [
        {
            "name": file.name,
            "bytes": file.size,
            "carried_bytes": file.copied,
            "computed_bytes": file.computed,
            "computed_tensors": file.tensors,
            "sha256": result.sha256.get(file.name),
        }
        for file in result.files
    ]
    sides, beside = result.sides, result.beside
    return document(
        "merge",
        result,
        files=files,
        tensors=[report.record() for report in result.tensors],
        replaced=[tensor.record() for tensor in result.replaced],
        numbers=numbers_record(total(result.tensors)) if result.written else None,
        left_out=[*sides.other_weights, *sides.adapter, *sides.unneeded],
        adapter_left_out=[*beside.unmerged, *beside.not_fetched, *beside.left_out],
    )
