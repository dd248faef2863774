"""The command merge."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from vera_convert.cli.command import adapter_argument, command, out_argument
from vera_convert.cli.options import (
    CHECK,
    METHOD,
    OUTPUT,
    AdapterOptions,
    ForceChoice,
    GeneratorChoice,
    MergeChoice,
    ProjectionChoice,
    flag,
    option,
)
from vera_convert.cli.output import progress_bar, show, shown_command, tell
from vera_convert.cli.refusals import without_token
from vera_convert.errors import is_resumable


class MergeChoices(AdapterOptions, GeneratorChoice, ProjectionChoice, MergeChoice, ForceChoice):
    """Options of `merge`."""

    labels: str | None = option(METHOD, "A,B,...", "Names of the labels of a classifier.")
    architecture: str | None = option(
        METHOD, "CLASS", "Class of the merged model, if the adapter adds an output head."
    )
    device: str = option(
        METHOD,
        "DEVICE",
        "Where to compute: cpu (default) or, with the extra torch, cuda or cuda:N.",
        default="cpu",
    )
    max_shard_size: str | None = option(
        OUTPUT,
        "SIZE",
        "Write shards of at most this size, such as 5GB (default: the base's shards).",
    )
    check: bool = flag(CHECK, "Read back every byte, not only headers; report on all values.")
    checksums: bool = flag(CHECK, "Record the SHA-256 of every file.")
    resume: bool = flag(
        OUTPUT, "Continue a run that failed; if this run fails, keep the finished shards."
    )
    dry_run: bool = flag(OUTPUT, "Print the plan, and write nothing.")


@command(
    MergeChoices,
    adapter_argument(),
    out_argument("A new folder for the merged model; with --force, an earlier output is replaced."),
    examples="""
    vera-convert merge ./adapter ./merged --base org/model
    vera-convert merge ./adapter ./merged --add ./other=0.5 --max-shard-size 5GB
    vera-convert merge ./adapter ./merged --dry-run
    """,
)
def merge(adapter: str, out: Path, options: MergeChoices) -> None:
    """Merge an adapter into its base model.

    The model is written shard by shard, without PyTorch; a larger model takes no more memory.
    """
    from vera_convert.formats.merge import merge_text
    from vera_convert.merging.merge import merge as run
    from vera_convert.merging.options import MergeOptions

    with _telling_how_to_continue(), progress_bar(options, "merged") as progress:
        result = run(
            adapter,
            out,
            options=MergeOptions(**options.shared_with(MergeOptions)),
            progress=progress,
            **options.inputs(),
        )
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
