"""The results of strip, embed, migrate, regenerate, info, count and to-lora as text for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from vera_convert.base.facts import BASE_REMEDY, BaseFacts
from vera_convert.base.strategies import AS_THEY_ARE
from vera_convert.conversion.migration import TreeMigration
from vera_convert.conversion.regeneration import Regenerated
from vera_convert.conversion.work import Conversion
from vera_convert.counting import Count
from vera_convert.errors import CheckpointError, SurroundingsError, UsageError, VeraConvertError
from vera_convert.formats.shared import Row, labelled, origin_text, table
from vera_convert.lora.stored import SAMPLED_COLUMNS, SAMPLED_ROWS
from vera_convert.summary import AdapterInfo, Effect
from vera_convert.targets.linear import LayerGroup
from vera_convert.text import and_more, counted, listed, printable, printable_whole

if TYPE_CHECKING:
    from vera_convert.lora.conversion import LoraConversion

_MOST_GROUPS = 100
"""The most kinds of layers in the text about an adapter; a model has a dozen."""

# --- strip, embed, migrate -----------------------------------------------------------------------


def conversion_text(result: Conversion) -> str:
    """Return the text about a conversion."""
    form = "embedded" if result.embedded else "stripped"
    before, after = f"{result.bytes_before:,}", f"{result.bytes_after:,}"
    was_read = result.base_facts.in_features is not None
    adapters = listed(result.side_files.adapters, 6)
    outside = listed(result.side_files.outside, 6)
    return labelled(
        ("wrote", f"{printable(str(result.out))} ({form})"),
        (
            "changed",
            result.changes or f"nothing: the adapter is {form} already, and was copied",
        ),
        ("weights", f"{before} bytes" if before == after else f"{before} -> {after} bytes"),
        ("base", location_text(result.base_facts) if was_read else None),
        ("copied", listed(result.side_files.copied, 6)),
        ("left out", listed(result.side_files.left_out, 6)),
        ("passed over", adapters and f"adapters of their own: {adapters}"),
        ("not followed", outside and f"links that lead elsewhere: {outside}"),
    )


def location_text(base_facts: BaseFacts) -> str:
    """Return the base in words: the name and the fit of the layers, or why no base was read."""
    if base_facts.match is not None and base_facts.match.strategy.name != AS_THEY_ARE.name:
        return f"{base_facts.source}, {base_facts.match.strategy.name}"
    was_read = base_facts.in_features is not None or base_facts.base is not None
    if was_read:
        return base_facts.source
    remedy = "" if "--" in base_facts.source else f". {BASE_REMEDY.rstrip('.')}"
    return f"not read: {base_facts.source.rstrip('.')}{remedy}"


def tree_text(result: TreeMigration) -> str:
    """Return the text about the migration of a tree, without the remedies of failures."""
    rows: list[Row] = []
    for name, done in result.done.items():
        rows.append((printable(name), "; ".join(done.changes) or "copied: nothing to change"))
        left_out = listed((*done.side_files.left_out, *done.side_files.outside), 6)
        rows.append(("", left_out and f"left out: {left_out}"))
    for name, error in result.failed.items():
        rows.append((printable(name), f"NOT MIGRATED ({_why_failed(error).removesuffix('.')})"))
    for method in sorted({*result.passed_over.values()}):
        names = [name for name, its in result.passed_over.items() if its == method]
        said = f"{counted(len(names), 'adapter')} of {method}: {listed(names, 6)}"
        rows.append(("passed over", said))
    outside = listed(result.outside, 6)
    rows.append(("in no adapter", outside and f"left out: {outside}"))
    wrote = f"wrote {len(result.done)} of {len(result.done) + len(result.failed)} adapters"
    where = f" to {printable(str(result.out))}" if result.done else ", so nothing"
    return f"{labelled(*rows)}\n{wrote}{where}"


def _why_failed(error: VeraConvertError) -> str:
    """Return the code or the reason of an error, without the remedy."""
    if isinstance(error, CheckpointError):
        return error.findings[0].code
    return error.reason if isinstance(error, UsageError | SurroundingsError) else str(error)


# --- regenerate ----------------------------------------------------------------------------------


def regenerated_text(result: Regenerated) -> str:
    """Return the text about regenerated A and B."""
    return labelled(
        ("wrote", f"{printable(str(result.out))}, {result.size:,} bytes"),
        ("generated", f"{result.draw.description}, stored as {result.dtype}"),
        ("vera_A", f"SHA-256 {result.sha256_A}"),
        ("vera_B", f"SHA-256 {result.sha256_B}"),
    )


# --- info ----------------------------------------------------------------------------------------


def info_text(result: AdapterInfo) -> str:
    """Return the text about an adapter."""
    config = result.config
    written = f", written by PEFT {printable(config.peft_version)}" if config.peft_version else ""
    sizes, parameters = result.sizes, f"{result.parameters:,} parameters in b and d"
    no_embedding = (
        "needs the base"
        if result.base_facts.base is None
        else "unknown: A and B were not regenerated"
    )
    lora = "needs the base" if result.lora_parameters is None else f"{result.lora_parameters:,}"
    return labelled(
        ("adapter", f"{result.location.label} (VeRA{written})"),
        ("base", _base_line(result)),
        ("rank", str(config.r)),
        ("key", str(config.projection_prng_key)),
        ("layers", str(result.layers)),
        *_group_rows(result.groups),
        ("lambdas", ", ".join(result.lambda_dtypes)),
        ("modules_to_save", listed(result.replacements, 6)),
        ("projections", _projection_lines(result)),
        *((f"  PEFT {effect.peft}", _effect_text(effect)) for effect in result.effects),
        ("trainable", f"{parameters} (a LoRA of this rank: {lora})"),
        ("size", f"{sizes.as_is:,} bytes"),
        ("  stripped", _bytes_text(sizes.stripped, "cannot be stripped")),
        ("  embedded", _bytes_text(sizes.embedded, no_embedding)),
        ("  as LoRA", _bytes_text(sizes.lora, "needs the base")),
        ("  merged", _bytes_text(sizes.merged, "needs the base")),
    )


def _group_rows(groups: Sequence[LayerGroup]) -> Iterator[Row]:
    """Yield a row for each kind of layer, and the number of the others; a model has few kinds."""
    yield from map(_group_row, groups[:_MOST_GROUPS])
    if len(groups) > _MOST_GROUPS:
        yield "  others", f"{counted(len(groups) - _MOST_GROUPS, 'kind')}, listed by --json"


def _group_row(group: LayerGroup) -> Row:
    shape = f"({group.in_features or '?'} -> {group.out_features})"
    return f"  {printable(group.name)}", f"{group.layers} x {shape}"


def _base_line(result: AdapterInfo) -> str:
    base = result.base_facts.base
    kind = base.model_type if base is not None else None
    return location_text(result.base_facts) + (f" ({printable(kind)})" if kind else "")


def _projection_lines(result: AdapterInfo) -> tuple[str, ...]:
    stored, drawn = result.projections, result.draw.description if result.draw else ""
    if stored is not None:
        shapes = f"A {list(stored.A.shape)}, B {list(stored.B.shape)}, {stored.A.dtype}"
        if result.difference is not None and not drawn:
            drawn = f"from no known generator: {result.difference.description}"
        return f"embedded: {shapes}", drawn
    if drawn:
        return "stripped, with a fingerprint:", drawn
    return ("stripped; a fingerprint with the sizes is missing",)


def _effect_text(effect: Effect) -> str:
    if effect.source == "file":
        return "uses the stored A and B"
    if effect.same_on is None:
        return "regenerates A and B from the key. Not proven: the adapter stores no fingerprint"
    if not effect.same_on:
        return "regenerates other A and B from the key"
    return f"regenerates the same A and B from the key on a {' or '.join(effect.same_on)} base"


def _bytes_text(size: int | None, otherwise: str) -> str:
    return otherwise if size is None else f"{size:,} bytes"


# --- count ---------------------------------------------------------------------------------------


def count_text(result: Count) -> str:
    """Return the text about the parameters and bytes of VeRA and LoRA."""
    body = labelled(
        ("rank", str(result.rank)),
        ("layers", f"{result.layers}, from {printable(result.source)}"),
        *_group_rows(result.groups),
        ("A and B", f"({result.rank}, {result.max_in}) and ({result.max_out}, {result.rank})"),
    )
    return f"{body}\n\n{table(_count_rows(result))}"


def _count_rows(result: Count) -> list[list[str]]:
    vera, lora = result.vera, result.lora
    numbers = {
        "VeRA": (vera.parameters, vera.file_bytes),
        "VeRA, stripped": (vera.parameters, result.stripped_bytes),
        "LoRA": (lora.parameters, lora.file_bytes),
    }
    rows = [["", "trainable parameters", "bytes of the file"]]
    rows += [[name, *(f"{number:,}" for number in pair)] for name, pair in numbers.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [[row[0], *map(str.rjust, row[1:], widths[1:])] for row in rows]


# --- to-lora -------------------------------------------------------------------------------------

_MOST_LISTED = 12


def lora_text(result: LoraConversion) -> str:
    """Return the result for people."""
    plan, engine = result.plan, result.options.target
    verb = "wrote" if result.written else "would write"
    out = printable(str(result.out))
    drawn = f", {result.draw.description}" if result.draw is not None else ""
    zeros = f", {plan.filled:,} of them zeros" if plan.filled else ""
    space = f"{result.size:,} bytes needed, {result.free:,} free"
    return labelled(
        (verb, f"{out}, a LoRA for {engine.title}, {result.size:,} bytes of weights"),
        ("adapter", printable(result.adapter)),
        ("layers", f"{len(plan.layers):,}{zeros}, named {_naming(result)}"),
        ("rank", f"{plan.rank}{_why(result)}"),
        ("A and B", f"{origin_text(result.origin)}{drawn}"),
        ("error", _error(result)),
        *(_error_rows(result) if plan.reduced else ()),
        ("modules_to_save", listed(tensor.name for tensor in result.extras.tensors)),
        ("space", None if result.written else space),
        ("serve with", printable_whole(result.server_arguments)),
    )


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
