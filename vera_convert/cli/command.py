"""A command of the program: parameters from its options, help with examples and exit statuses."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import cloup

from vera_convert.cli.options import parameters
from vera_convert.cli.values import Adapter

EXIT_STATUSES = (
    ("0", "Success: no error was found."),
    ("1", "The adapter or a model has an error, or OUT would lose something."),
    ("2", "The command line is wrong, or OUT exists."),
    ("3", "The system failed: a missing file or package, the disk, the network, memory."),
    ("130, 143", "Interrupted by Ctrl-C, or terminated."),
)
"""The exit statuses of every command, as a help lists them."""

NAMED_AGAIN = {"adapter": "", "revision": "--revision", "base": "--base"}
"""The values that an error repeats in a `validate` command, each with the flag of `validate`."""

ADAPTER_HELP = "A folder, a file of the folder, or a repo: org/name[@revision][/subfolder]."


def adapter_argument(name: str = "adapter", **attributes: Any) -> click.Argument:
    """Return the argument ADAPTER."""
    return cloup.Argument([name], type=Adapter(), help=ADAPTER_HELP, **attributes)


def out_argument(text: str) -> click.Argument:
    """Return the argument OUT, with a help text."""
    return cloup.Argument(["out"], type=click.Path(path_type=Path), help=text)


class Command(cloup.Command):
    """A command whose help ends with examples and exit statuses."""

    examples: tuple[str, ...] = ()
    exit_statuses: tuple[tuple[str, str], ...] = ()

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples and the exit statuses."""
        assert isinstance(formatter, cloup.HelpFormatter)
        if self.examples:
            formatter.write("\n")
            formatter.write_heading("Examples")
            for line in self.examples:  # a command is never broken
                formatter.write(f"  {line}\n")
        if self.exit_statuses:
            rows = [*self.exit_statuses]
            formatter.write_section(cloup.HelpSection("Exit status", rows))


def command(
    options: type[object], *arguments: click.Argument, examples: str
) -> Callable[[Callable[..., None]], Command]:
    """Make a command of a function, which takes the arguments and a dataclass of options.

    Args:
        options: the dataclass; each of its fields is an option.
        arguments: the arguments, in order.
        examples: lines that a help shows as they are.
    """
    names = [str(argument.name) for argument in arguments]

    def decorate(function: Callable[..., None]) -> Command:
        def call(**parsed: Any) -> None:
            meta = click.get_current_context().meta
            meta.update({f"vera_convert.{name}": parsed.get(name) for name in NAMED_AGAIN})
            given = [parsed.pop(name) for name in names]
            chosen = options(**parsed)
            if getattr(chosen, "verbose", False):
                _log_everything()
            function(*given, chosen)

        made = Command(
            function.__name__.replace("_", "-"),
            callback=call,
            params=[*arguments, *parameters(options)],
            help=inspect.getdoc(function),
            short_help=(inspect.getdoc(function) or "").partition("\n")[0].removesuffix("."),
        )
        made.examples = tuple(inspect.cleandoc(examples).splitlines())
        made.exit_statuses = EXIT_STATUSES
        return made

    return decorate


def _log_everything() -> None:
    import logging

    logging.getLogger("vera_convert").setLevel(logging.INFO)
