"""The command to-lora."""

from __future__ import annotations

from pathlib import Path

from vera_convert.cli.command import OUT_FOLDER, adapter_argument, command, out_argument
from vera_convert.cli.options import (
    CHECK,
    LORA,
    OUTPUT,
    AdapterOptions,
    ForceChoice,
    GeneratorChoice,
    ProjectionChoice,
    flag,
    listed_choices,
    option,
)
from vera_convert.cli.output import progress_bar, show
from vera_convert.cli.values import Choice, Dtype
from vera_convert.lora.engines import EngineName

_ENGINES = tuple(name.value for name in EngineName)


class LoraChoices(AdapterOptions, GeneratorChoice, ProjectionChoice, ForceChoice):
    """Options of `to-lora`."""

    engine: str = option(
        LORA,
        "ENGINE",
        f"The engine that will load the LoRA: {listed_choices(_ENGINES)}.",
        "--for",
        default="peft",
        type=Choice(_ENGINES),
    )
    rank: int | None = option(
        LORA,
        "R",
        "Write the best LoRA of this rank (default: the rank of an exact LoRA).",
        type=int,
    )
    max_error: float | None = option(
        LORA,
        "E",
        "Write the smallest rank whose relative error is at most E in every layer.",
        type=float,
    )
    accept_error: bool = flag(LORA, "Write even if the relative error of a layer is above 0.5.")
    fill_layers: bool = flag(
        LORA, "Write zeros for layers that the engine needs and ADAPTER leaves out."
    )
    drop_head: bool = flag(LORA, "Leave out modules_to_save and trained biases.")
    check: bool = flag(CHECK, "Read every written byte back, and compare.")
    dtype: str = option(
        OUTPUT,
        "DTYPE",
        "Store the LoRA in this dtype: float32 (default), bfloat16, float16.",
        default="float32",
        type=Dtype(("float32", "bfloat16", "float16")),
    )
    dry_run: bool = flag(OUTPUT, "Measure and print the result, and write nothing.")


@command(
    LoraChoices,
    adapter_argument(),
    out_argument(OUT_FOLDER),
    examples="""
    vera-convert to-lora ./adapter ./lora --for vllm
    vera-convert to-lora ./adapter ./lora --rank 64 --dtype bfloat16
    """,
)
def to_lora(adapter: str, out: Path, options: LoraChoices) -> None:
    """Write the LoRA with the same delta, for engines without VeRA."""
    from vera_convert.formats.lora import lora_text
    from vera_convert.lora.conversion import to_lora as run
    from vera_convert.lora.options import LoraOptions

    with progress_bar(options, "written") as progress:
        result = run(
            adapter,
            out,
            options=LoraOptions(**options.shared_with(LoraOptions)),
            progress=progress,
            **options.inputs(),
        )
    show(options, result, lora_text)
