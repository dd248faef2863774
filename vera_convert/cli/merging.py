"""The commands merge and verify."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import click

from vera_convert.cli.command import adapter_argument, command, out_argument
from vera_convert.cli.options import (
    CHECK,
    INPUT,
    METHOD,
    OUTPUT,
    PROJECTIONS,
    SOURCES,
    AdapterOptions,
    ForceChoice,
    GeneratorChoice,
    MergeChoice,
    ProjectionChoice,
    flag,
    option,
)
from vera_convert.cli.output import progress_bar, show, shown_command, tell
from vera_convert.cli.refusals import with_number_of_others, without_token
from vera_convert.errors import CheckpointError, is_resumable


class MergeChoices(AdapterOptions, GeneratorChoice, ProjectionChoice, MergeChoice, ForceChoice):
    """Options of `merge`.

    Attributes:
        labels: Names of the labels of a classifier.
        architecture: Class of the merged model, if the adapter adds an output head.
        device: Where to compute: cpu (default) or, with the extra torch, cuda or cuda:N.
        max_shard_size: Write shards of at most this size, such as 5GB (default: the base's shards).
        check: Read back every byte, not only headers; report on all values.
        checksums: Record the SHA-256 of every file.
        resume: Continue a run that failed; if this run fails, keep the finished shards.
        dry_run: Print the plan, and write nothing.
    """

    labels: str | None = option(METHOD, "A,B,...")
    architecture: str | None = option(METHOD, "CLASS")
    device: str = option(METHOD, "DEVICE", default="cpu")
    max_shard_size: str | None = option(OUTPUT, "SIZE")
    check: bool = flag(CHECK)
    checksums: bool = flag(CHECK)
    resume: bool = flag(OUTPUT)
    dry_run: bool = flag(OUTPUT)


@command(
    MergeChoices,
    adapter_argument(),
    out_argument("A new folder for the merged model; with --force, an earlier output is replaced."),
)
def merge(adapter: str, out: Path, options: MergeChoices) -> None:
    """Merge an adapter into its base model.

    The model is written shard by shard, without PyTorch; a larger model takes no more memory.

    Examples:
        vera-convert merge ./adapter ./merged --base org/model
        vera-convert merge ./adapter ./merged --add ./other=0.5 --max-shard-size 5GB
        vera-convert merge ./adapter ./merged --dry-run
    """
    from vera_convert.formats.merge import merge_text
    from vera_convert.merging.merge import merge as run
    from vera_convert.merging.options import MergeOptions

    with _telling_how_to_continue(), progress_bar(options, "merged") as progress:
        record = options.record(MergeOptions)
        result = options.call(run, adapter, out, options=record, progress=progress)
    show(options, result, merge_text)


@contextmanager
def _telling_how_to_continue() -> Iterator[None]:
    """If a merge failed or was stopped and can continue, print the command for this."""
    try:
        yield
    except BaseException as error:
        if is_resumable(error):
            words, _ = without_token(click.get_current_context().obj)
            tell("note", f"finished shards are kept; this continues: {shown_command(words)}")
        raise


class VerifyChoices(AdapterOptions, GeneratorChoice, MergeChoice):
    """Options of `verify`; an option left out has the value that the merge recorded.

    Attributes:
        other: The stripped, embedded or migrated adapter to check.
        merged: The merged model to check.
        lora: The LoRA to check.
        weight: The factor of the adapter's delta (default: as recorded, else 1).
        add: Another adapter of the merge, and the factor W (default: as recorded, else 1).
        tied: How an output head tied to the embedding was merged (default: as recorded): add
            changes the embedding too, as PEFT's merge does; untie gives the head a tensor of its
            own.
        dequantize: The merge turned a quantized base into a 16-bit model (default: as recorded).
        dtype: The dtype of the merged float tensors: {choices} (default: as recorded, else the
            dtype of each tensor in the base).
        projections: Which A and B were merged: auto, file or key (default: as the merge recorded,
            else auto).
        samples: Number of sequences to run both models on (default: 8).
        text: Take the sequences from this text (default: random token ids).
        layers_only: Compare the weights alone; torch is not needed.
    """

    other: str | None = option(INPUT, "OTHER", "--adapter")
    merged: str | None = option(INPUT, "MODEL")
    lora: str | None = option(INPUT, "LORA")
    projections: str | None = option(PROJECTIONS, "SOURCE", type=SOURCES)
    samples: int | None = option(CHECK, "N")
    text: Path | None = option(CHECK, "FILE")
    layers_only: bool = flag(CHECK)


@command(VerifyChoices, adapter_argument())
def verify(adapter: str, options: VerifyChoices) -> None:
    """Check a converted adapter, a merged model or a LoRA.

    Every tensor of the merged model is computed again and compared. Then the merged model is run on
    sample sequences, and compared with the base that has the adapter.

    The merge options tell how MODEL was merged; an omitted option has the value that the merge
    recorded in MODEL.

    Examples:
        vera-convert verify ./adapter --merged ./merged --base ./model
        vera-convert verify ./adapter --merged ./merged --layers-only
        vera-convert verify ./adapter --adapter ./stripped
        vera-convert verify ./adapter --lora ./lora
    """
    from vera_convert.formats.verification import verification_text
    from vera_convert.verification.options import VerifyOptions
    from vera_convert.verification.verify import verify as run

    with (
        progress_bar(options, "compared") as progress,
        progress_bar(options, "models run", unit="run") as runs,
    ):
        record = options.record(VerifyOptions)
        result = options.call(run, adapter, options=record, progress=progress, runs=runs)
    show(options, result, verification_text)
    if result.errors:
        first = result.errors[0]
        if not options.quiet and not options.as_json:
            first = replace(first, reason="see WRONG in the report.")
        tell("error", with_number_of_others(first, result.wrong))
        raise click.exceptions.Exit(CheckpointError.status)
    if result.not_run is not None:
        tell("error", str(result.not_run))
        raise click.exceptions.Exit(result.not_run.status)
