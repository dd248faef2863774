"""The command verify."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from vera_convert.cli.command import adapter_argument, command
from vera_convert.cli.options import (
    CHECK,
    INPUT,
    PATH,
    PROJECTIONS,
    SOURCES,
    TIED_CHOICES,
    AdapterOptions,
    GeneratorChoice,
    MergeChoice,
    flag,
    option,
    retold,
)
from vera_convert.cli.output import progress_bar, show, tell
from vera_convert.cli.refusals import with_number_of_others
from vera_convert.dtypes import FLOAT_NAMES
from vera_convert.errors import CheckpointError


class VerifyChoices(AdapterOptions, GeneratorChoice, MergeChoice):
    """Options of `verify`; an option left out has the value that the merge recorded."""

    other: str | None = option(
        INPUT, "OTHER", "The stripped, embedded or migrated adapter to check.", "--adapter"
    )
    merged: str | None = option(INPUT, "MODEL", "The merged model to check.")
    lora: str | None = option(INPUT, "LORA", "The LoRA to check.")
    weight: float | None = retold(
        MergeChoice, "weight", "The factor of the adapter's delta (default: as recorded, else 1)."
    )
    add: tuple[str, ...] = retold(
        MergeChoice,
        "add",
        "Another adapter of the merge, and the factor W (default: as recorded, else 1).",
    )
    tied: str | None = retold(
        MergeChoice,
        "tied",
        "How an output head tied to the embedding was merged (default: as recorded): "
        f"{TIED_CHOICES}.",
    )
    dequantize: bool | None = retold(
        MergeChoice,
        "dequantize",
        "The merge turned a quantized base into a 16-bit model (default: as recorded).",
    )
    dtype: str | None = retold(
        MergeChoice,
        "dtype",
        f"The dtype of the merged float tensors: {', '.join(FLOAT_NAMES)} (default: as recorded, "
        "else the dtype of each tensor in the base).",
    )
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

    The merge options tell how MODEL was merged; an omitted option has the value that the merge
    recorded in MODEL.
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
        first = result.errors[0]
        if not options.quiet and not options.as_json:
            first = replace(first, reason="see WRONG in the report.")
        tell("error", with_number_of_others(first, result.wrong))
        raise click.exceptions.Exit(CheckpointError.status)
    if result.not_run is not None:
        tell("error", str(result.not_run))
        raise click.exceptions.Exit(result.not_run.status)
