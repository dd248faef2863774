"""The commands that convert an adapter: strip, embed, migrate, to-lora, regenerate."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vera_convert.cli.command import OUT_FOLDER, adapter_argument, command, flags_of, out_argument
from vera_convert.cli.options import (
    CHECK,
    INPUT,
    LORA,
    OUTPUT,
    PROJECTIONS,
    AcceptChoice,
    AdapterOptions,
    CommonOptions,
    DimsChoice,
    ForceChoice,
    GeneratorChoice,
    ProjectionChoice,
    flag,
    option,
)
from vera_convert.cli.output import print_result, progress_bar, show, tell, warn
from vera_convert.cli.refusals import reason
from vera_convert.cli.values import NAMED_BASE, PEFT_VERSION, Choice, Dtype
from vera_convert.errors import UsageError
from vera_convert.lora.engines import EngineName
from vera_convert.text import listed, printable

if TYPE_CHECKING:
    from vera_convert.base.facts import BaseOptions
    from vera_convert.conversion.migration import TreeMigration


class StripOptions(AdapterOptions, ProjectionChoice, AcceptChoice, ForceChoice):
    """Options of `strip`."""


@command(StripOptions, adapter_argument(), out_argument(OUT_FOLDER))
def strip(adapter: str, out: Path, options: StripOptions) -> None:
    """Remove A and B from an adapter if PEFT can regenerate them.

    Before anything is removed, A and B are regenerated and compared bit for bit with the stored
    matrices.

    Examples:
        vera-convert strip ./adapter ./stripped
        vera-convert strip org/adapter ./stripped --base ./model
    """
    from vera_convert.conversion.strip_embed import strip as run
    from vera_convert.formats.results import conversion_text

    show(options, options.call(run, adapter, out), conversion_text)


class EmbedOptions(DimsChoice, GeneratorChoice, ProjectionChoice, ForceChoice):
    """Options of `embed`."""


@command(EmbedOptions, adapter_argument(), out_argument(OUT_FOLDER))
def embed(adapter: str, out: Path, options: EmbedOptions) -> None:
    """Regenerate A and B and store them in an adapter.

    Examples:
        vera-convert embed ./stripped ./embedded
        vera-convert embed ./stripped ./embedded --base ./model --base-dtype bfloat16
    """
    from vera_convert.conversion.strip_embed import embed as run
    from vera_convert.formats.results import conversion_text

    show(options, options.call(run, adapter, out), conversion_text)


class MigrateOptions(StripOptions):
    """Options of `migrate`.

    Attributes:
        to: The form of OUT: embedded, with A and B; stripped, without; asis, the form of ADAPTER.
        recursive: Migrate every adapter in the folder ADAPTER into the same subfolder of OUT.
        base_for: Use MODEL for the adapters whose config calls their base NAME.
        peft_version: Write a config for this version of PEFT, such as 0.13.
    """

    to: str = option(OUTPUT, "FORM", type=Choice(("embedded", "stripped", "asis")))
    recursive: bool = flag(INPUT)
    base_for: tuple[tuple[str, str], ...] = option(INPUT, "NAME=MODEL", type=NAMED_BASE)
    peft_version: tuple[int, ...] | None = option(OUTPUT, "VERSION", type=PEFT_VERSION)

    def base_options(self) -> BaseOptions:
        """Return the library's record of the base, with the bases of --base-for."""
        return replace(super().base_options(), places=self.base_for)


@command(MigrateOptions, adapter_argument(), out_argument(OUT_FOLDER))
def migrate(adapter: str, out: Path, options: MigrateOptions) -> None:
    """Repair an adapter and bring it to PEFT's current form.

    Every change is listed.

    Examples:
        vera-convert migrate ./adapter ./current --to asis
        vera-convert migrate ./adapters ./stripped --to stripped --recursive
    """
    from vera_convert.conversion import migration
    from vera_convert.formats.results import conversion_text

    if options.recursive and options.revision is not None:
        raise UsageError("--recursive takes a folder, which has no --revision.")
    if options.recursive:
        _show_tree(adapter, options, options.call(migration.migrate_tree, adapter, out))
    else:
        show(options, options.call(migration.migrate, adapter, out), conversion_text)


def _show_tree(tree: str, options: CommonOptions, result: TreeMigration) -> None:
    from vera_convert.formats.results import tree_text

    warn(result.findings, options)
    for name, conversion in result.done.items():
        warn(conversion.findings, options, f"{printable(name)}: ")
    alike: dict[str, list[str]] = {}
    for name, error in result.failed.items():
        alike.setdefault(reason(error, {"adapter": f"{tree}/{name}"}), []).append(name)
    for said, names in alike.items():
        tell("error", f"{listed(names)}: {said}")
    print_result(options, result, tree_text)
    if result.failed:
        raise click.exceptions.Exit(min(error.status for error in result.failed.values()))


_ENGINES = tuple(name.value for name in EngineName)


class LoraChoices(AdapterOptions, GeneratorChoice, ProjectionChoice, ForceChoice):
    """Options of `to-lora`.

    Attributes:
        engine: The engine that will load the LoRA: {first} (default), {others}.
        rank: Write the best LoRA of this rank (default: the rank of an exact LoRA).
        max_error: Write the smallest rank whose relative error is at most E in every layer.
        accept_error: Write even if the relative error of a layer is above 0.5.
        fill_layers: Write zeros for layers that the engine needs and ADAPTER leaves out.
        drop_head: Leave out modules_to_save and trained biases.
        check: Read every written byte back, and compare.
        dtype: Store the LoRA in this dtype: float32 (default), bfloat16, float16.
        dry_run: Measure and print the result, and write nothing.
    """

    engine: str = option(LORA, "ENGINE", "--for", default="peft", type=Choice(_ENGINES))
    rank: int | None = option(LORA, "R")
    max_error: float | None = option(LORA, "E")
    accept_error: bool = flag(LORA)
    fill_layers: bool = flag(LORA)
    drop_head: bool = flag(LORA)
    check: bool = flag(CHECK)
    dtype: str = option(
        OUTPUT, "DTYPE", default="float32", type=Dtype(("float32", "bfloat16", "float16"))
    )
    dry_run: bool = flag(OUTPUT)


@command(LoraChoices, adapter_argument(), out_argument(OUT_FOLDER))
def to_lora(adapter: str, out: Path, options: LoraChoices) -> None:
    """Write the LoRA with the same delta, for engines without VeRA.

    Examples:
        vera-convert to-lora ./adapter ./lora --for vllm
        vera-convert to-lora ./adapter ./lora --rank 64 --dtype bfloat16
    """
    from vera_convert.formats.results import lora_text
    from vera_convert.lora.conversion import to_lora as run
    from vera_convert.lora.options import LoraOptions

    with progress_bar(options, "written") as progress:
        record = options.record(LoraOptions)
        result = options.call(run, adapter, out, options=record, progress=progress)
    show(options, result, lora_text)


class RegenerateOptions(DimsChoice, GeneratorChoice, ForceChoice):
    """Options of `regenerate`.

    Attributes:
        adapter: Regenerate A and B of this adapter.
        rank: Rows of A and columns of B.
        key: The seed, projection_prng_key (default: 0).
        rounding: Round A and B as PEFT does on a base of this dtype: bfloat16, float16.
    """

    adapter: str | None = option(INPUT, "ADAPTER", "--for")
    rank: int | None = option(PROJECTIONS, "R")
    key: int | None = option(PROJECTIONS, "N")
    rounding: str | None = option(
        PROJECTIONS, "DTYPE", "--round", type=Dtype(("bfloat16", "float16"))
    )


_OF_DRAW = ("rank", "in_features", "out_features", "key", "rounding")
_OF_ADAPTER = ("base", "base_revision", "base_dtype", "key_map", "revision")
"""The options of `regenerate` without --for ADAPTER, and those with it."""


@command(
    RegenerateOptions,
    out_argument("A new .safetensors file to write; with --force, an earlier output is replaced."),
)
def regenerate(out: Path, options: RegenerateOptions) -> None:
    """Write A and B alone, regenerated from a key.

    Give --rank, --in-features and --out-features, or --for ADAPTER.

    Examples:
        vera-convert regenerate ab.safetensors --for ./adapter
        vera-convert regenerate ab.safetensors --rank 256 --in-features 4096 --out-features 4096
    """
    from vera_convert.conversion.regeneration import regenerate as run
    from vera_convert.conversion.regeneration import regenerate_for
    from vera_convert.formats.results import regenerated_text

    of_draw = options.given(*_OF_DRAW)
    if options.adapter is not None:
        _refuse_together("--for", of_draw)
        result = options.call(regenerate_for, out=out)
    else:
        missing = [name for name in ("rank", "in_features", "out_features") if name not in of_draw]
        if missing:
            raise UsageError(f"{flags_of(missing)} must be given, or --for ADAPTER.")
        _refuse_together("--rank", options.given(*_OF_ADAPTER))
        result = run(out, force=options.force, **options.given("generator"), **of_draw)
    show(options, result, regenerated_text)


def _refuse_together(given: str, others: Iterable[str]) -> None:
    """Refuse options of one way to regenerate beside `given`, an option of the other way."""
    if names := flags_of(others):
        raise UsageError(f"{names} cannot go with {given}: leave one out.")
