"""Print results and documents to stdout, and findings and progress to stderr."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import IO, TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from vera_convert.arguments import Progress, no_progress
from vera_convert.cli.options import CommonOptions
from vera_convert.errors import SurroundingsError
from vera_convert.progress import watched
from vera_convert.rules import alike
from vera_convert.text import and_more, printable_whole, wrapped

if TYPE_CHECKING:
    from tqdm import tqdm

    from vera_convert.rules import Finding

WRITES_NOTHING = frozenset(("info", "validate", "verify", "count", "completion"))
"""Commands that only print; an interruption leaves the disk as before."""

DELAY = 2
"""Seconds that work takes before a progress bar appears."""

_COLORS = {"error": "1;31", "warning": "1;33", "note": "36"}
_LABEL = re.compile(r"\s*\S(?:\S| (?! ))*  +|\s+")
"""The label of a line, with the spaces behind the label."""

Result = TypeVar("Result")


class NotPrintedError(SurroundingsError):
    """Standard output does not take the result, as on a full disk."""


# --- text ----------------------------------------------------------------------------------------


def say(text: str, *, err: bool = False) -> None:
    """Print a text; a closed pipe is ignored, because the work of the command is done."""
    stream = sys.stderr if err else sys.stdout
    if stream is None:  # closed before the program began
        return
    with suppress(OSError if err else BrokenPipeError):
        try:
            click.echo(text, err=err, color=in_color(stream))
        except BrokenPipeError:
            raise
        except OSError as error:
            raise NotPrintedError(
                f"the result could not be printed: {error.strerror or error}."
            ) from error


def tell(severity: str, text: str) -> None:
    """Print an error, a warning or a note to stderr: one line, unless a window is narrower."""
    width = window() if _is_terminal(sys.stderr) else None
    message = "\n".join(wrapped(text, width, first=f"{severity}: ", indent="  "))
    if in_color(sys.stderr):
        colored = f"\x1b[{_COLORS[severity]}m{severity}\x1b[0m"
        message = message.replace(severity, colored, 1)
    say(message, err=True)


def print_document(document: Mapping[str, object]) -> None:
    """Print a JSON document."""
    import json

    say(json.dumps(document, indent=2))


def show(options: CommonOptions, result: Result, text: Callable[[Result], str]) -> None:
    """Print the warnings and notes of a result to stderr, and the result to stdout.

    Args:
        options: the options of the command.
        result: a record of the library.
        text: the function that writes the record for people.
    """
    warn(getattr(result, "findings", ()), options)
    print_result(options, result, text)


def warn(findings: Sequence[Finding], options: CommonOptions, before: str = "") -> None:
    """Print warnings to stderr, and notes without --quiet.

    Findings that differ in the place alone share a line.
    """
    shown_severities = ("warning",) if options.quiet else ("warning", "note")
    for first, *others in alike(findings):
        if first.severity in shown_severities:
            shown = replace(first, place=first.place + and_more(len(others)))
            tell(first.severity, f"{before}{shown}")


def print_result(options: CommonOptions, result: Result, text: Callable[[Result], str]) -> None:
    """Print a result as text or as a document, as the options ask."""
    command = click.get_current_context().info_name
    try:
        if options.as_json:
            from vera_convert.formats.document import result_document

            print_document(result_document(result, command=command))
        elif not options.quiet:
            say(fitted(text(result), columns()))
    except NotPrintedError as error:
        if command in WRITES_NOTHING:
            raise
        raise NotPrintedError(f"{error} OUT is written and complete.") from error


# --- the terminal --------------------------------------------------------------------------------


def _is_terminal(stream: IO[str] | None) -> bool:
    return stream is not None and stream.isatty()


def in_color(stream: IO[str] | None) -> bool:
    """Return whether a stream shows colors: NO_COLOR and FORCE_COLOR decide, else a terminal."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR", "0") not in ("", "0"):
        return True
    return _is_terminal(stream) and os.environ.get("TERM") != "dumb"


def columns() -> int | None:
    """Return the columns of a text: those of the window; None off a terminal."""
    return window() if _is_terminal(sys.stdout) else None


def window() -> int:
    """Return the columns of the window, from 40 to 100; COLUMNS stands for the window's."""
    return min(max(shutil.get_terminal_size().columns, 40), 100)


def fitted(text: str, width: int | None) -> str:
    """Wrap the lines longer than `width`, each below the first value of the line.

    The values go on below their label if the label is wider than half a line. Rows of a table keep
    their columns.
    """
    lines: list[str] = []
    for line in text.split("\n"):
        match = _LABEL.match(line)
        label = match[0] if match is not None else ""
        rest = line[len(label) :]
        indent = " " * (len(label) if width is None or len(label) <= width // 2 else 4)
        lines += [line] if "  " in rest else wrapped(rest, width, first=label, indent=indent)
    return "\n".join(lines)


def _shows_progress(options: CommonOptions) -> bool:
    if options.progress is not None:
        return options.progress
    hidden = options.quiet or os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS")
    return not hidden and _is_terminal(sys.stderr)


@contextmanager
def progress_of_parts(options: CommonOptions) -> Iterator[None]:
    """Draw a bar for each large matrix or file that the block regenerates or writes."""
    with ExitStack() as stack:
        if _shows_progress(options):
            stack.enter_context(watched(lambda title: _bar(options, title, "B", stack)))
        yield


@contextmanager
def progress_bar(options: CommonOptions, title: str, *, unit: str = "B") -> Iterator[Progress]:
    """Draw a bar of bytes or of another unit, with the rate and the time that remains.

    The bar appears on a terminal after `DELAY` seconds of work; on request, it appears at once.
    """
    with ExitStack() as stack:
        is_shown = _shows_progress(options)
        yield _bar(options, title, unit, stack) if is_shown else no_progress


def _bar(options: CommonOptions, title: str, unit: str, stack: ExitStack) -> Progress:
    """Return a function that draws a bar; a full bar vanishes, as all bars of the stack do."""
    bars: list[tqdm[NoReturn]] = []
    start = time.monotonic()
    delay = 0 if options.progress else DELAY

    def report(done: int, of: int) -> None:
        if not bars:
            if time.monotonic() - start < delay or done >= of:
                return
            from tqdm import tqdm

            drawn: dict[str, Any] = {"unit_scale": True} if unit == "B" else {}
            drawn |= {"initial": done, "leave": False, "file": sys.stderr}
            bars.append(stack.enter_context(tqdm(desc=title, total=of, unit=unit, **drawn)))
        bars[0].total = of
        bars[0].update(done - bars[0].n)
        if done >= of:
            bars[0].close()

    return report


# --- other commands, as a shell takes them -------------------------------------------------------


def shown_command(words: Sequence[str]) -> str:
    """Return a complete command line in the quoting of a shell."""
    import shlex

    return printable_whole(shlex.join(["vera-convert", *words]))
