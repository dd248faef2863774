"""The commands that look at an adapter or a model and write nothing: info, count."""

from __future__ import annotations

from vera_convert.cli.command import adapter_argument, command
from vera_convert.cli.options import CountOptions, InfoOptions
from vera_convert.cli.output import show
from vera_convert.errors import UsageError


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
    from vera_convert.formats.results import info_document, info_text
    from vera_convert.summary import info as summarize

    result = summarize(
        adapter,
        base=options.base_options(),
        projections=options.projections,
        revision=options.revision,
        access=options.access(),
    )
    show(options, result.findings, info_text(result), lambda: info_document(result))


@command(
    CountOptions,
    examples="""
    vera-convert count --base org/model --rank 256
    vera-convert count --config ./config.json --rank 64 --target q_proj,v_proj
    """,
)
def count(options: CountOptions) -> None:
    """Count the parameters and bytes of a planned adapter.

    The numbers of a LoRA of the same rank are shown for comparison. The model is given by --base or
    by --config; no weights are downloaded.
    """
    from vera_convert.base.layers import layers_of_base, layers_of_config_file
    from vera_convert.counting import count as run
    from vera_convert.formats.results import count_document, count_text

    if options.revision is not None:
        raise UsageError(
            "count reads no adapter, so --revision has no effect: give --base-revision."
        )
    if options.base is not None and options.config_file is None:
        model = layers_of_base(
            options.base, revision=options.base_revision, access=options.access()
        )
    elif options.config_file is not None and options.base is None:
        model = layers_of_config_file(options.config_file)
    else:
        raise UsageError("give one of --base and --config.")
    targets = [name for names in options.targets for name in names]
    result = run(model, rank=options.rank, targets=targets)
    show(options, (), count_text(result), lambda: count_document(result))
