"""The command verify."""

from __future__ import annotations

from pathlib import Path

import click

from vera_convert.cli.command import adapter_argument, command
from vera_convert.cli.options import (
    CHECK,
    INPUT,
    PATH,
    PROJECTIONS,
    SOURCES,
    AdapterOptions,
    GeneratorChoice,
    MergeChoice,
    flag,
    option,
)
from vera_convert.cli.output import progress_bar, show, tell
from vera_convert.errors import CheckpointError
from vera_convert.text import and_more


class VerifyChoices(AdapterOptions, GeneratorChoice, MergeChoice):
    """Options of `verify`; an option left out has the value that the merge recorded."""

    other: str | None = option(
        INPUT, "OTHER", "The stripped, embedded or migrated adapter.", "--adapter"
    )
    merged: str | None = option(INPUT, "MODEL", "The model that ADAPTER was merged into.")
    lora: str | None = option(INPUT, "LORA", "The LoRA that to-lora made of ADAPTER.")
    projections: str | None = option(
        PROJECTIONS,
        "SOURCE",
        "Which A and B were merged: auto, file or key (default: as the merge recorded, else auto).",
        type=SOURCES,
    )
    samples: int | None = option(
        CHECK, "N", "Number of sequences to run both models on (default: 8).", type=int
    )
    text: Path | None = option(
        CHECK,
        "FILE",
        "Take the sequences from this text (default: random token ids).",
        type=PATH,
    )
    layers_only: bool = flag(CHECK, "Compare the weights alone; torch is not needed.")


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

    An omitted merge option has the value recorded by the merge.
    """
    from vera_convert.formats.verification import verification_text
    from vera_convert.verification.options import VerifyOptions
    from vera_convert.verification.verify import verify as run

    with (
        progress_bar(options, "compared") as progress,
        progress_bar(options, "models run", unit="run") as runs,
    ):
        result = run(
            adapter,
            other=options.other,
            merged=options.merged,
            lora=options.lora,
            options=VerifyOptions(**options.shared_with(VerifyOptions)),
            progress=progress,
            runs=runs,
            **options.inputs(),
        )
    show(options, result, verification_text)
    if result.errors:
        more = f" ({and_more(result.wrong - 1).lstrip()})" if result.wrong > 1 else ""
        tell("error", f"{result.errors[0]}{more}")
        raise click.exceptions.Exit(CheckpointError.status)
    if result.not_run is not None:
        tell("error", str(result.not_run))
        raise click.exceptions.Exit(result.not_run.status)
