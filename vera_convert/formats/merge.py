"""A merge's result as text for people."""

from __future__ import annotations

import math
from collections.abc import Iterable

from vera_convert.base.strategies import AS_THEY_ARE
from vera_convert.formats.shared import Row, labelled, origin_text
from vera_convert.merging.adapters import MergedAdapter
from vera_convert.merging.merge import Merge
from vera_convert.merging.output import FilePlan
from vera_convert.merging.report import ReplacedTensor, total, values_in_words, worst
from vera_convert.text import and_more, counted, listed, printable

_MOST_LISTED = 12


def merge_text(result: Merge) -> str:
    """Return the text about a merge, or about the plan of a merge."""
    out = printable(str(result.out))
    size = f"{result.needed:,} bytes in {len(result.files)} files and merge-provenance.json"
    done = f"{counted(result.resumed, 'shard')} of {len(_weights(result))}"
    return labelled(
        ("wrote" if result.written else "would write", f"{out}, {size}"),
        ("base", printable(result.base)),
        *(row for adapter in result.adapters for row in adapter_rows(adapter, draw=True)),
        ("resumed", f"{done} finished by an earlier run" if result.resumed else None),
        *(_number_rows(result) if result.written else _plan_rows(result)),
        ("modules_to_save", _replaced_lines(result)),
        *_side_rows(result),
    )


def adapter_rows(adapter: MergedAdapter, *, draw: bool = False) -> list[Row]:
    """Return the rows about an adapter of a merged model, on request with the draw of A and B."""
    weight = "" if adapter.weight == 1 else f", weight {adapter.weight:g}"
    drawn = f", {adapter.draw.description}" if draw and adapter.draw is not None else ""
    layers = f"{counted(adapter.layers, 'layer')} of rank {adapter.rank}{weight}"
    is_same = adapter.strategy == AS_THEY_ARE.name
    return [
        ("adapter", f"{printable(adapter.label)}, {layers}"),
        ("  layer names", "same as in the base" if is_same else adapter.strategy),
        ("  A and B", f"{origin_text(adapter.origin)}{drawn}"),
    ]


def _number_rows(result: Merge) -> list[Row]:
    numbers = total(result.tensors)
    last = worst(result.tensors)
    rows: list[Row] = [("time", f"{result.seconds:.1f} s in {result.jobs} threads")]
    if last is None:
        return rows
    most = f"{last[1].relative_loss:.3g}, in {printable(last[0])}"
    return [
        *rows,
        ("changed", f"{numbers.changed_share:.1%} of {values_in_words(result.tensors)}"),
        ("delta", f"{numbers.relative_change:.3g} times the norm of the weights"),
        ("rounding error", f"{numbers.relative_loss:.3g} of the delta; largest: {most}"),
    ]


def _weights(result: Merge) -> list[FilePlan]:
    return [file for file in result.files if file.name.endswith(".safetensors")]


def _plan_rows(result: Merge) -> list[Row]:
    weights = _weights(result)
    return [
        ("space", f"{result.needed:,} bytes needed, {result.free:,} free"),
        ("estimate", f"{result.seconds:.1f} s in {result.jobs} threads"),
        *((f"  {printable(file.name)}", _file_text(file)) for file in weights[:_MOST_LISTED]),
        ("", and_more(len(weights) - _MOST_LISTED, "shard").lstrip()),
    ]


def _file_text(file: FilePlan) -> str:
    tensors = counted(file.tensors, "tensor")
    return f"{file.copied:,} bytes copied, {file.computed:,} bytes in {tensors} computed"


def _replaced_lines(result: Merge) -> list[str]:
    """Return a line for each replaced tensor, with the largest changes first."""

    def change(tensor: ReplacedTensor) -> float:
        return tensor.numbers.relative_change if tensor.numbers is not None else math.inf

    tensors = sorted(result.replaced, key=change, reverse=True)
    more = and_more(len(tensors) - _MOST_LISTED).lstrip()
    return [
        *(f"{printable(each.name)}: {each.change}" for each in tensors[:_MOST_LISTED]),
        more and f"{more}: see README.md or merge-provenance.json",
    ]


def _side_rows(result: Merge) -> list[Row]:
    beside = result.beside
    written = {file.name for file in result.files} - {*beside.tokenizer, *beside.copied}
    tokenizer = _joined(beside.tokenizer)
    return [
        ("copied", _joined(name for name in result.sides.copied if name in written)),
        ("tokenizer", tokenizer and f"the adapter's own: {tokenizer}"),
        ("adapter's own", _joined(beside.copied)),
        ("left out", _joined((*result.sides.unneeded, *beside.left_out))),
    ]


def _joined(names: Iterable[str]) -> str:
    return listed(names, 30)
