"""The commands about merged models: merge, verify."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vera_convert.cli.command import adapter_argument, command, out_argument
from vera_convert.cli.options import MergeChoices, VerifyChoices
from vera_convert.cli.output import progress_bar, show, shown_command, tell
from vera_convert.errors import CheckpointError, is_resumable
from vera_convert.text import and_more

if TYPE_CHECKING:
    from vera_convert.merging.options import MergeOptions
    from vera_convert.verification.options import VerifyOptions


@command(
    MergeChoices,
    adapter_argument(),
    out_argument("The folder of the merged model; it must not exist, unless --force is given."),
    examples="""
    vera-convert merge ./adapter ./merged --base org/model
    vera-convert merge ./adapter ./merged --add ./other=0.5 --max-shard-size 5GB
    vera-convert merge ./adapter ./merged --dry-run
    """,
)
def merge(adapter: str, out: Path, options: MergeChoices) -> None:
    """Merge an adapter into its base model.

    The model is written shard by shard, in memory that does not grow with the model, and without
    PyTorch.
    """
    from vera_convert.formats.merge import merge_document, merge_text
    from vera_convert.merging.merge import merge as run

    with _telling_how_to_continue(), progress_bar(options, "merged") as progress:
        result = run(
            adapter,
            out,
            base=options.base_options(),
            options=_merge_options(options),
            revision=options.revision,
            access=options.access(),
            progress=progress,
        )
    show(options, result.findings, merge_text(result), lambda: merge_document(result))


def _merge_options(options: MergeChoices) -> MergeOptions:
    from vera_convert.merging.adapters import AdapterSpec
    from vera_convert.merging.options import MergeOptions

    return MergeOptions(
        weight=options.weight,
        add=tuple(
            AdapterSpec(adapter, 1.0 if weight is None else weight)
            for adapter, weight in options.add
        ),
        projections=options.projections,  # type: ignore[arg-type] # checked by the record
        generator=options.generator,  # type: ignore[arg-type] # checked by the record
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        tied=options.tied,  # type: ignore[arg-type] # checked by the record
        dequantize=options.dequantize,
        architecture=options.architecture,
        labels=options.labels or (),
        device=options.device,  # type: ignore[arg-type] # checked by the record
        jobs=options.jobs,
        check=options.check,
        checksums=options.checksums,
        resume=options.resume,
        dry_run=options.dry_run,
        force=options.force,
    )


@contextmanager
def _telling_how_to_continue() -> Iterator[None]:
    """Name the command that continues a merge which failed or was stopped, if there is one."""
    try:
        yield
    except BaseException as error:
        if is_resumable(error):
            words = _without_token(click.get_current_context().obj)
            tell("note", f"finished shards are kept; this continues: {shown_command(words)}")
        raise


def _without_token(arguments: Sequence[str]) -> list[str]:
    """Return the words of a command line without the token, which is never printed."""
    kept: list[str] = []
    skips = False
    for argument in arguments:
        if not skips and not argument.startswith("--token="):
            skips = argument == "--token"
            kept += [] if skips else [argument]
        else:
            skips = False
    return kept


@command(
    VerifyChoices,
    adapter_argument(),
    examples="""
    vera-convert verify ./adapter --merged ./merged --base ./model
    vera-convert verify ./adapter --merged ./merged --layers-only
    vera-convert verify ./adapter --adapter ./stripped
    vera-convert verify ./adapter --lora ./lora
    """,
)
def verify(adapter: str, options: VerifyChoices) -> None:
    """Check a converted adapter, a merged model or a LoRA.

    Every tensor of the merged model is computed again and compared. Then the merged model is run on
    sample sequences, and compared with the base that has the adapter.
    """
    from vera_convert.formats.verification import verification_document, verification_text
    from vera_convert.verification.verify import verify as run

    with (
        progress_bar(options, "compared") as progress,
        progress_bar(options, "models run", unit="run") as runs,
    ):
        result = run(
            adapter,
            base=options.base_options(),
            other=options.other,
            merged=options.merged,
            lora=options.lora,
            options=_verify_options(options),
            revision=options.revision,
            access=options.access(),
            progress=progress,
            runs=runs,
        )
    show(options, result.findings, verification_text(result), lambda: verification_document(result))
    if result.errors:
        more = f" ({and_more(result.wrong - 1).lstrip()})" if result.wrong > 1 else ""
        tell("error", f"{result.errors[0]}{more}")
        raise click.exceptions.Exit(CheckpointError.status)
    if result.not_run is not None:
        tell("error", str(result.not_run))
        raise click.exceptions.Exit(result.not_run.status)


def _verify_options(options: VerifyChoices) -> VerifyOptions:
    from vera_convert.merging.adapters import AdapterSpec
    from vera_convert.verification.options import VerifyOptions

    return VerifyOptions(
        weight=options.weight,
        add=tuple(AdapterSpec(adapter, weight) for adapter, weight in options.add),
        projections=options.projections,  # type: ignore[arg-type] # checked by the record
        generator=options.generator,  # type: ignore[arg-type] # checked by the record
        dtype=options.dtype,
        tied=options.tied,  # type: ignore[arg-type] # checked by the record
        dequantize=options.dequantize,
        layers_only=options.layers_only,
        samples=options.samples,
        text=options.text,
        jobs=options.jobs,
    )
