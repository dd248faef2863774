"""Completion of commands, options and values in a shell."""

from __future__ import annotations

import os

import click

from vera_convert.cli.command import command
from vera_convert.cli.help import Argument
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


@command(
    None, Argument("shell", type=Choice(SHELLS), metavar="SHELL", text=f"{', '.join(SHELLS)}.")
)
def completion(shell: str) -> None:
    """Print a script that completes commands in a shell.

    With the script, the Tab key completes commands, options, values and paths. Add the line
    for your shell to the file named after the #.

    Examples:
        eval "$(vera-convert completion bash)"    # ~/.bashrc
        eval "$(vera-convert completion zsh)"     # ~/.zshrc, below compinit
        vera-convert completion fish | source     # ~/.config/fish/config.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    say(kind(click.Command(PROGRAM), {}, PROGRAM, VARIABLE).source())
