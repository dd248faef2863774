"""The result of a conversion to LoRA as text for people."""

from __future__ import annotations

from vera_convert.formats.shared import Row, labelled, origin_text
from vera_convert.lora.conversion import LoraConversion
from vera_convert.lora.stored import SAMPLED_COLUMNS, SAMPLED_ROWS
from vera_convert.text import and_more, listed, printable, printable_whole

_MOST_LISTED = 12


def lora_text(result: LoraConversion) -> str:
    """Return the result for people."""
    plan, engine = result.plan, result.options.target
    verb = "wrote" if result.written else "would write"
    out = printable(str(result.out))
    drawn = f", {result.draw.description}" if result.draw is not None else ""
    space = f"{result.size:,} bytes needed, {result.free:,} free"
    return labelled(
        (verb, f"{out}, a LoRA for {engine.title}, {result.size:,} bytes of weights"),
        ("adapter", printable(result.adapter)),
        ("layers", f"{len(plan.layers):,}{_filled(plan.filled)}, named {_naming(result)}"),
        ("rank", f"{plan.rank}{_why(result)}"),
        ("A and B", f"{origin_text(result.origin)}{drawn}"),
        ("error", _error(result)),
        *(_error_rows(result) if plan.reduced else ()),
        ("modules_to_save", listed(tensor.name for tensor in result.extras.tensors)),
        ("space", None if result.written else space),
        ("serve with", printable_whole(result.server_arguments)),
    )


def _filled(count: int) -> str:
    return f", {count:,} of them zeros" if count else ""


def _naming(result: LoraConversion) -> str:
    """Say how the LoRA names layers, and show the first name that is not the adapter's."""
    others = {new: old for old, new in result.names.items() if new != old}
    if not others:
        return result.naming
    new, old = next(iter(others.items()))
    return f"{result.naming}: {printable(new)} for {printable(old)}"


def _why(result: LoraConversion) -> str:
    plan = result.plan
    if plan.reduced:
        return f", the best LoRA of this rank; the adapter's rank is {result.source_rank}"
    if plan.rank < result.source_rank:
        return f", exact; the adapter's rank is {result.source_rank}, but d is 0 in the other rows"
    return ", exact"


def _error(result: LoraConversion) -> str:
    if not result.measured.errors:
        return "none"
    worst = max(result.measured.errors, key=lambda module: result.measured.errors[module])
    where = (
        f", measured on up to {SAMPLED_ROWS} outputs and {SAMPLED_COLUMNS} inputs of each layer"
        if not result.plan.reduced
        else ""
    )
    error = f"{result.measured.worst:.2g} of the delta in {result.options.dtype}"
    return f"at most {error}{where}; largest in {printable(worst)}"


def _error_rows(result: LoraConversion) -> list[Row]:
    """Return the layers with the largest errors, the largest first."""
    errors = sorted(result.measured.errors.items(), key=lambda item: -item[1])
    more = and_more(len(errors) - _MOST_LISTED, "layer").lstrip()
    return [
        *((f"  {error:.3f}", printable(module)) for module, error in errors[:_MOST_LISTED]),
        ("", more and f"{more}; --json lists all"),
    ]
