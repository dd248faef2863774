"""The help of the program and of a command: arguments, options in groups, examples, statuses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click

from vera_convert.cli.options import DISPLAY, NonEmpty, Option
from vera_convert.cli.output import window
from vera_convert.text import wrapped

EXIT_STATUSES = (
    ("0", "Success: no error was found."),
    ("1", "The adapter or a model has an error, or OUT would lose something."),
    ("2", "The command line is wrong, or OUT exists."),
    ("3", "The system failed: a missing file or package, the disk, the network, memory."),
    ("130, 143", "Interrupted by Ctrl-C, or terminated."),
)
"""The exit statuses of every command, as a help lists them."""

_MOST_COLUMNS = 22
"""Columns of the longest name beside a text; a longer name stands above the text."""

_LEAST_BESIDE = 60
"""Columns of the narrowest window in which texts stand beside names."""

Rows = Sequence[tuple[str, str]]


class Formatter(click.HelpFormatter):
    """Writes a help with bold headings and colored names; click drops both off a terminal."""

    def write_heading(self, heading: str) -> None:
        """Write the heading of a section."""
        self.write(f"{click.style(f'{heading}:', bold=True)}\n")

    def write_sections(self, sections: Mapping[str, Rows]) -> None:
        """Write sections of names and texts; all texts begin in the same column."""
        names = [name for rows in sections.values() for name, _ in rows]
        most = _MOST_COLUMNS if self.width >= _LEAST_BESIDE else 0
        width = max((len(name) for name in names if len(name) <= most), default=4)
        for title, rows in sections.items():
            with self.section(title):
                for name, text in rows:
                    self._write_row(name, text, width)

    def _write_row(self, name: str, text: str, width: int) -> None:
        """Write a name and a text; the text begins below a name that is too long."""
        first = f"  {click.style(name, fg='cyan')}{' ' * (width - len(name))}  "
        indent = " " * (width + 4)
        if len(name) > width:
            first = f"{first.rstrip()}\n{indent}"
        lines = wrapped(text, self.width - len(indent))
        self.write(first + f"\n{indent}".join(lines) + "\n")

    def write_lines(self, title: str, lines: Iterable[str]) -> None:
        """Write a section of unbroken lines."""
        with self.section(title):
            for line in lines:
                self.write(f"  {line}\n")


class Context(click.Context):
    """The context of a running command; `Formatter` writes the help."""

    def make_formatter(self) -> Formatter:
        """Return a formatter for lines as wide as the window."""
        return Formatter(width=window())


class Argument(NonEmpty, click.Argument):
    """An argument with a text for the help."""

    def __init__(self, name: str, *, text: str, **attributes: Any) -> None:
        super().__init__([name], **attributes)
        self.help = text


class Command(click.Command):
    """A command whose help has its options in groups, and ends with examples and exit statuses."""

    context_class = Context

    def __init__(self, name: str, *, examples: Sequence[str], statuses: Rows, **rest: Any) -> None:
        super().__init__(name, **rest)
        self.examples = examples
        self.statuses = statuses

    def format_arguments(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write nothing: `format_options` writes the arguments, which click does from 8.5 on."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the arguments and the options, each group below its title."""
        sections: dict[str, list[tuple[str, str]]] = {}
        arguments = [each for each in self.params if isinstance(each, Argument)]
        if arguments:
            sections["Positional arguments"] = [
                (each.get_usage_pieces(ctx)[0].strip("[]"), each.help or "") for each in arguments
            ]
        grouped = any(isinstance(each, Option) for each in self.params)
        for each in self.get_params(ctx):
            record = each.get_help_record(ctx)
            if record is not None and not isinstance(each, click.Argument):
                others = DISPLAY if grouped else "Options"
                title = each.group if isinstance(each, Option) else others
                sections.setdefault(title, []).append(record)
        assert isinstance(formatter, Formatter)
        formatter.write_sections(sections)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples and the exit statuses."""
        assert isinstance(formatter, Formatter)
        formatter.write_lines("Examples", self.examples)
        if self.statuses:
            formatter.write_sections({"Exit status": self.statuses})
