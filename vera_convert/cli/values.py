"""The kinds of values that options and arguments take, each parsed by the library's own check."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import click

from vera_convert.arguments import base_dtype_name, dtype_name, peft_version, texts
from vera_convert.dtypes import BASE_NAMES
from vera_convert.errors import UsageError
from vera_convert.text import printable

GENERATORS = (
    "float32-fused",
    "float32-separate",
    "float64-fused",
    "float64-separate",
    "bfloat16-torch2.11",
    "bfloat16-torch2.12-fused",
    "bfloat16-torch2.12-separate",
    "float16-torch2.11",
    "float16-torch2.12-fused",
    "float16-torch2.12-separate",
)
"""The values of `generator.Variant`, repeated because `--help` must start without NumPy."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a question with the known word nearest to a mistyped word; empty if all are far.

    The hyphens that every option begins with do not count.
    """
    import difflib

    names = {each.lstrip("-"): each for each in known}
    near = difflib.get_close_matches(word.lstrip("-"), names, n=1)
    return f" Did you mean {names[near[0]]!r}?" if near else ""


def name_of(parameter: click.Parameter) -> str:
    """Return the name of an option or argument, as a user types the option or reads the usage."""
    is_option = isinstance(parameter, click.Option)
    return max(parameter.opts, key=len) if is_option else parameter.human_readable_name.strip(".")


class Parsed(click.ParamType):  # type: ignore[type-arg] # generic only from click 8.4
    """A value, parsed by a function of the option's name and the text."""

    def __init__(self, name: str, parse: Callable[[str, str], object]) -> None:
        self.name = name
        self.parse = parse

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> object:
        """Return the parsed value; a default comes parsed already."""
        if not isinstance(value, str) or param is None:
            return value
        return self.parse(name_of(param), value)


class Choice(click.Choice):  # type: ignore[type-arg] # generic only from click 8.2
    """A choice that names the nearest value when a value is mistyped."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> object:
        """Return the chosen value."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            word = str(value).lower()
            near = did_you_mean(word, self.likely(word))
            raise click.BadParameter(f"{error.message}{near}", ctx=ctx, param=param) from None

    def likely(self, word: str) -> Iterable[str]:
        """Return the choices that a mistyped word can mean."""
        return self.choices


class Dtype(Choice):
    """A dtype in any usual spelling, such as bf16; the help lists the spelling of torch."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> object:
        """Return the spelling that the choices have."""
        with suppress(UsageError):
            read = base_dtype_name if BASE_NAMES[-1] in self.choices else dtype_name
            value = read("dtype", value)
        return super().convert(value, param, ctx)

    def likely(self, word: str) -> Iterable[str]:
        """Return the dtypes with the number of bits of a mistyped word: float8 is no float64."""
        bits = _bits(word)
        return [each for each in self.choices if not bits or _bits(each) == bits]


def _bits(dtype: str) -> str:
    """Return the number of bits in a dtype's name, such as 8 in float8_e4m3fn; empty for none."""
    found = re.search("[0-9]+", dtype)
    return found[0] if found else ""


def _key_map(option: str, value: str) -> tuple[str, str]:
    from vera_convert.base.facts import parse_key_map

    return parse_key_map(option, value)


def _named_base(option: str, value: str) -> tuple[str, str]:
    name, _, model = value.partition("=")
    if not name or not model:
        raise UsageError(
            f"{option} is {printable(value)}: give NAME=MODEL, such as org/model=./model."
        )
    return name, model


def _codes(option: str, value: str) -> tuple[str, ...]:
    return tuple(code.upper() for code in texts(option, value))


KEY_MAP = Parsed("OLD=NEW", _key_map)
NAMED_BASE = Parsed("NAME=MODEL", _named_base)
NAMES = Parsed("NAME[,NAME]", texts)
CODES = Parsed("CODE[,CODE]", _codes)
PEFT_VERSION = Parsed("VERSION", peft_version)
