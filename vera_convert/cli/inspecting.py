"""The commands without output files: info, count."""

from __future__ import annotations

from pathlib import Path

from vera_convert.cli.command import adapter_argument, command
from vera_convert.cli.options import (
    INPUT,
    PATH,
    AdapterOptions,
    CommonOptions,
    ProjectionChoice,
    option,
)
from vera_convert.cli.output import show
from vera_convert.cli.values import NAMES
from vera_convert.errors import UsageError


class InfoOptions(AdapterOptions, ProjectionChoice):
    """Options of `info`."""


@command(
    InfoOptions,
    adapter_argument(),
    examples="""
    vera-convert info ./adapter
    vera-convert info org/adapter@v1 --base ./model --json
    """,
)
def info(adapter: str, options: InfoOptions) -> None:
    """Show an adapter's rank, targets, projections and sizes."""
    from vera_convert.formats.results import info_text
    from vera_convert.summary import info as summarize

    result = summarize(adapter, projections=options.projections, **options.inputs())
    show(options, result, info_text)


class CountOptions(CommonOptions):
    """Options of `count`."""

    config: Path | None = option(INPUT, "FILE", "The config.json of a model.", type=PATH)
    base: str | None = option(INPUT, "MODEL", "A model, a folder or a repo on the Hub.")
    base_revision: str | None = option(INPUT, "REV", "Branch, tag or commit of the model's repo.")
    rank: int = option(INPUT, "R", "The rank of the adapter.", type=int, required=True)
    targets: tuple[tuple[str, ...], ...] = option(
        INPUT,
        "NAME[,NAME]",
        "Layers to adapt, as in target_modules, or all-linear (default: PEFT's default targets "
        "for the model).",
        "--target",
        type=NAMES,
        multiple=True,
    )


@command(
    CountOptions,
    examples="""
    vera-convert count --base org/model --rank 256
    vera-convert count --config ./config.json --rank 64 --target q_proj,v_proj
    """,
)
def count(options: CountOptions) -> None:
    """Count the parameters and bytes of a planned adapter.

    The numbers of a LoRA of the same rank are shown for comparison. --base or --config gives the
    model; only the headers of the weights are read.
    """
    from vera_convert.counting import count as run
    from vera_convert.counting import layers_of_base, layers_of_config_file
    from vera_convert.formats.results import count_text

    if options.base is not None and options.config is None:
        model = layers_of_base(
            options.base, revision=options.base_revision, access=options.access()
        )
    elif options.config is not None and options.base is None:
        model = layers_of_config_file(options.config)
    else:
        raise UsageError("give either --base MODEL or --config FILE.")
    targets = [name for names in options.targets for name in names]
    result = run(model, rank=options.rank, targets=targets)
    show(options, result, count_text)
