"""Completion of commands, options and values in a shell."""

from __future__ import annotations

import os

import click

from vera_convert.cli.help import Argument, Command
from vera_convert.cli.output import say
from vera_convert.cli.values import Choice

PROGRAM = "vera-convert"
VARIABLE = "_VERA_CONVERT_COMPLETE"
"""A shell sets this environment variable when it asks for completions."""

SHELLS = ("bash", "zsh", "fish")


def completed(program: click.Group) -> bool:
    """Answer a shell that asks for completions; return whether a shell asked."""
    asked = os.environ.get(VARIABLE)
    if not asked:
        return False
    from click.shell_completion import shell_complete

    shell_complete(program, {}, PROGRAM, VARIABLE, asked)
    return True


def _print_script(shell: str) -> None:
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    say(kind(click.Command(PROGRAM), {}, PROGRAM, VARIABLE).source())


def completion() -> Command:
    """Return the command that prints the script."""
    return Command(
        "completion",
        callback=_print_script,
        params=[
            Argument("shell", type=Choice(SHELLS), metavar="SHELL", text=f"{', '.join(SHELLS)}.")
        ],
        short_help="Print a script that completes commands in a shell",
        help="""Print a script that completes commands in a shell.

        With the script, the Tab key completes commands, options, values and paths. Add the line
        for your shell to the file named after the #.""",
        examples=(
            'eval "$(vera-convert completion bash)"    # ~/.bashrc',
            'eval "$(vera-convert completion zsh)"     # ~/.zshrc, below compinit',
            "vera-convert completion fish | source     # ~/.config/fish/config.fish",
        ),
        statuses=(),
    )
