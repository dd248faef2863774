"""Options: how an option is declared, and the groups of options that several commands share.

A class attribute declares an option: its type, flags and default. The docstring of the class has
the help. `parameters` makes click's parameters from the attributes; a command receives the class
with the values that a user gave. The options of a single command stand beside the command.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click

from vera_convert.arguments import require_content
from vera_convert.cli.values import GENERATORS, KEY_MAP, Choice, Dtype, name_of
from vera_convert.dtypes import BASE_NAMES, FLOAT_NAMES

if TYPE_CHECKING:
    from vera_convert.base.facts import BaseOptions
    from vera_convert.hub.lookup import HubAccess

INPUT = "Input options"
PROJECTIONS = "Projection options"
METHOD = "Merge options"
LORA = "LoRA options"
CHECK = "Check options"
OUTPUT = "Output options"
HUB = "Hub options"
DISPLAY = "Display options"
TITLES = (INPUT, PROJECTIONS, METHOD, LORA, CHECK, OUTPUT, HUB, DISPLAY)
"""The groups of options, in the order in which a help lists the groups."""

_TYPES = {"int": click.INT, "float": click.FLOAT, "Path": click.Path(path_type=Path)}
"""The type of an option, by the annotation."""
SOURCES = Choice(("auto", "file", "key"))

Result = TypeVar("Result")


class Declared(NamedTuple):
    """An option as a class declares the option: see `option`."""

    group: str
    flags: tuple[str, ...]
    attributes: dict[str, Any]


class NonEmpty(click.Parameter):
    """A parameter without empty values, so that an unset variable of a shell is an error."""

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        """Return the value as the parameter's type has the value; refuse an empty text."""
        for each in value if isinstance(value, list | tuple) else (value,):
            require_content(name_of(self), each)
        return super().type_cast_value(ctx, value)


class Option(NonEmpty, click.Option):
    """An option that a help lists in a group."""

    def __init__(self, *names: str, group: str, **attributes: Any) -> None:
        super().__init__(names, **attributes)
        self.group = group


class Options:
    """The options of a command, or of a group of commands, with the values that a user gave."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    def given(self, *names: str) -> dict[str, Any]:
        """Return the values that a user gave for these options, by the option's name."""
        return {
            name: getattr(self, name) for name in names if getattr(self, name) not in (None, ())
        }

    def record(self, kind: Callable[..., Result]) -> Result:
        """Return a dataclass with the values that a user gave for the fields of the same names."""
        fields = inspect.signature(kind).parameters
        return kind(**self.given(*(name for name in fields if name in vars(self))))


def option(group: str, metavar: str | None, *flags: str, **attributes: Any) -> Any:
    """Declare an option as an attribute of a class.

    The docstring of the class, or of a class that inherits the option, has the help. The annotation
    of the attribute says whether the option must be given. An option that can be None may be left
    out, and an option with a tuple may be given several times. Any other option without a default
    is required.

    Args:
        group: the group in which a help lists the option.
        metavar: the name of the value in the help.
        flags: the option's names; by default, the name of the attribute, with ``--`` and hyphens.
        attributes: further arguments of `click.Option`, such as a ``default``, or a ``type`` other
            than the annotation's.
    """
    return Declared(group, flags, {"metavar": metavar, **attributes})


def flag(group: str, *flags: str) -> Any:
    """Declare an option without a value; left out, the option is None or False."""
    return option(group, None, *flags, is_flag=True)


def parameters(options: type[Options]) -> list[Option]:
    """Return an option of click for each option that a class declares, sorted by group."""
    texts: dict[str, str] = {}
    declared: dict[str, tuple[Declared, str]] = {}
    for kind in reversed(options.__mro__):
        texts |= _texts(kind)
        for name, each in vars(kind).items():
            if isinstance(each, Declared):
                declared[name] = each, kind.__annotations__[name]
    made = [
        Option(
            name,
            *(each.flags or (f"--{name.replace('_', '-')}",)),
            group=each.group,
            help=_with_choices(texts.get(name, ""), each.attributes.get("type")),
            **_attributes(each, annotation),
        )
        for name, (each, annotation) in declared.items()
    ]
    return sorted(made, key=lambda option: TITLES.index(option.group))


def _texts(kind: type) -> dict[str, str]:
    """Return the help of each option that the docstring of a class describes."""
    text = inspect.cleandoc(kind.__doc__ or "")  # since Python 3.13 the compiler removes indents
    _, _, described = text.partition("Attributes:\n")
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", described, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def _with_choices(text: str, kind: object) -> str:
    """Return a help with the choices of a value in the places for the choices."""
    if not isinstance(kind, Choice):
        return text
    first, *others = kind.choices
    return text.format(choices=", ".join(kind.choices), first=first, others=", ".join(others))


def _attributes(declared: Declared, annotation: str) -> dict[str, Any]:
    """Return the arguments of `click.Option`, also those that follow from the annotation."""
    kind = annotation.removesuffix(" | None")
    implied: dict[str, Any] = {"type": _TYPES.get(kind)}
    if kind != annotation:
        implied["default"] = None
    elif kind.startswith("tuple"):
        implied["multiple"] = True
    elif kind == "bool":
        implied["default"] = False
    else:
        implied["required"] = "default" not in declared.attributes
    return implied | declared.attributes


# --- groups that several commands share ----------------------------------------------------------


class CommonOptions(Options):
    """The access to the Hub, and the output on the terminal: options of every command.

    Attributes:
        token: Access token for the Hub (default: HF_TOKEN).
        cache_dir: Cache folder of the Hub (default: HF_HOME).
        offline: Read repos from the cache alone; open no connection.
        as_json: Print the result as one JSON document.
        quiet: Print warnings and errors only.
        verbose: Print to stderr each request to the Hub, and each file read or written.
        progress: Show progress (default: only on a terminal).
        debug: Show a Python traceback if the command fails.
    """

    token: str | None = option(HUB, "TOKEN")
    cache_dir: Path | None = option(HUB, "DIR")
    offline: bool = flag(HUB)
    as_json: bool = flag(DISPLAY, "--json")
    quiet: bool = flag(DISPLAY, "-q", "--quiet")
    verbose: bool = flag(DISPLAY, "-v", "--verbose")
    progress: bool | None = flag(DISPLAY, "--progress/--no-progress")
    debug: bool = flag(DISPLAY)

    def access(self) -> HubAccess:
        """Return the library's record of the access to the Hub."""
        from vera_convert.hub.lookup import HubAccess

        return HubAccess(
            token=self.token,
            cache_dir=self.cache_dir,
            offline=self.offline,
            progress=self.progress is not False and not self.quiet,
        )

    def values(self) -> dict[str, Any]:
        """Return the values of all options, as the library's functions take the values."""
        return {**vars(self), "access": self.access()}

    def call(self, function: Callable[..., Result], *arguments: object, **more: object) -> Result:
        """Call a function of the library; pass each option to the parameter of the same name.

        Args:
            function: the function.
            arguments: the arguments before the options.
            more: further arguments, also in place of an option of the same name.
        """
        values = {**self.values(), **more}
        parameters = inspect.signature(function).parameters
        return function(*arguments, **{name: values[name] for name in parameters if name in values})


class AdapterOptions(CommonOptions):
    """The adapter's revision and base: options of every command that reads an adapter.

    Attributes:
        base: The base model, a folder or a repo on the Hub (default: the base that the adapter's
            config names).
        base_revision: Branch, tag or commit of the base's repo.
        base_dtype: Dtype that the base is loaded in, which decides how A and B are rounded:
            {choices}.
        key_map: If the adapter's module names do not fit the base, replace their beginning OLD by
            NEW.
        revision: Branch, tag or commit of the adapter's repo.
    """

    base: str | None = option(INPUT, "MODEL")
    base_revision: str | None = option(INPUT, "REV")
    base_dtype: str | None = option(INPUT, "DTYPE", type=Dtype(BASE_NAMES))
    key_map: tuple[tuple[str, str], ...] = option(INPUT, "OLD=NEW", type=KEY_MAP)
    revision: str | None = option(HUB, "REV")

    def base_options(self) -> BaseOptions:
        """Return the library's record of the base."""
        from vera_convert.base.facts import BaseOptions

        return BaseOptions(
            model=self.base,
            revision=self.base_revision,
            dtype=self.base_dtype,
            key_map=self.key_map,
        )

    def values(self) -> dict[str, Any]:
        """Return the values of all options; a base is a record of the library."""
        return {**super().values(), "base": self.base_options()}


class DimsChoice(AdapterOptions):
    """The sizes of A and B, if no base is at hand.

    Attributes:
        in_features: Columns of A, if no base is given.
        out_features: Rows of B, if no base is given.
    """

    in_features: int | None = option(PROJECTIONS, "N", type=click.IntRange(min=1))
    out_features: int | None = option(PROJECTIONS, "N", type=click.IntRange(min=1))

    def base_options(self) -> BaseOptions:
        """Return the library's record of the base, with the sizes of A and B."""
        return replace(
            super().base_options(), in_features=self.in_features, out_features=self.out_features
        )


class ProjectionChoice(Options):
    """The A and B that an adapter's user means.

    Attributes:
        projections: Which A and B to use: auto, the choice of PEFT 0.21 (default); file, the stored
            matrices; key, the matrices regenerated from the key.
    """

    projections: str = option(PROJECTIONS, "SOURCE", default="auto", type=SOURCES)


class GeneratorChoice(Options):
    """The algorithm that drew A and B.

    Attributes:
        generator: How PyTorch drew A and B, if the adapter does not record the variant. VARIANT is
            one of {first} (default), {others}.
    """

    generator: str | None = option(PROJECTIONS, "VARIANT", type=Choice(GENERATORS))


class ForceChoice(Options):
    """Whether an output may replace an earlier output.

    Attributes:
        force: Replace OUT, if OUT is empty or an output of the same kind.
    """

    force: bool = flag(OUTPUT)


class AcceptChoice(Options):
    """Whether to strip matrices that PEFT would regenerate differently.

    Attributes:
        accept_change: Strip even if PEFT would regenerate different matrices, if embed can restore
            the stored matrices.
    """

    accept_change: bool = flag(PROJECTIONS)


class MergeChoice(Options):
    """How a merge is computed; `verify` asks how the merge was computed.

    Attributes:
        weight: Scale the adapter's delta by this factor (default: 1).
        add: Add the delta of another adapter, scaled by W (default: 1).
        tied: How to merge into an output head tied to the embedding: add changes the embedding too,
            as PEFT's merge does; untie gives the head a tensor of its own.
        dequantize: Turn a quantized base into a 16-bit model.
        dtype: Write float tensors in this dtype: {choices} (default: keep the dtype of each
            tensor).
        jobs: Number of threads (default: one for each core, at most four).
    """

    weight: float | None = option(METHOD, "W")
    add: tuple[str, ...] = option(METHOD, "ADAPTER[=W]")
    tied: str | None = option(METHOD, None, type=Choice(("add", "untie")))
    dequantize: bool | None = flag(METHOD)
    dtype: str | None = option(METHOD, "DTYPE", type=Dtype(FLOAT_NAMES))
    jobs: int | None = option(METHOD, "N")
