"""Check what a caller passes to a public function, once, where the value enters.

An option with named choices takes the member or the member's string; a dtype takes any usual
spelling; a size takes a number of bytes or a text such as ``5GB``. Everything else raises
`ParameterError`, a `UsageError` that names the argument and the choices. The command line parses
options with the same functions.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from vera_convert.dtypes import BASE_NAMES, FLOAT_NAMES, float_name
from vera_convert.errors import ParameterError
from vera_convert.text import printable

Choice = TypeVar("Choice", bound=StrEnum)
Kind = TypeVar("Kind")
Checked = TypeVar("Checked")
Progress = Callable[[int, int], None]
"""A function that is called now and then with the amount done so far, and with the total."""
Called = TypeVar("Called", bound=Callable[..., object])

_SIZE = re.compile(r"(\d{1,20}(?:\.\d{1,9})?)\s*([kmgt])?(i)?(b)?", re.IGNORECASE | re.ASCII)
_UNITS = {"k": 1, "m": 2, "g": 3, "t": 4}
_VERSION = re.compile(r"\d{1,4}\.\d{1,4}(\.\d{1,4})?", re.ASCII)

OLDEST_PEFT = (0, 11)
"""The first release of PEFT with VeRA."""
NEWEST_PEFT = (0, 21)
"""The newest release of PEFT known here."""


def one_of(name: str, kind: type[Choice], value: object) -> Choice:
    """Return the member of a `StrEnum` for the member or the string of a caller.

    Raises:
        UsageError: the value is unknown; the message names all members.
    """
    if isinstance(value, str) and value in [*kind]:
        return kind(value)
    raise ParameterError(name, f"is {_shown(value)}: give one of {', '.join(kind)}.")


def dtype_name(name: str, value: object, *, choices: Sequence[str] = FLOAT_NAMES) -> str:
    """Return torch's name of a dtype, from any usual spelling such as ``bf16`` or ``BF16``.

    Raises:
        UsageError: the value is unknown; the message names the choices.
    """
    is_named = isinstance(value, str) or type(value).__module__ == "torch"
    found = float_name(str(value), choices) if is_named else None
    if found is None:
        raise ParameterError(name, f"is {_shown(value)}: give one of {', '.join(choices)}.")
    return found


def base_dtype_name(name: str, value: object) -> str:
    """Return torch's name of the dtype that the layers of a base have in memory; see `dtype_name`.

    Raises:
        UsageError: the value is unknown; the message names the choices.
    """
    return dtype_name(name, value, choices=BASE_NAMES)


def size_in_bytes(name: str, value: object) -> int:
    """Return a size in bytes: a whole number, or a text such as ``5GB``, ``500MB`` or ``0.5GiB``.

    Raises:
        UsageError: the value has another form, or is less than one byte.
    """
    if isinstance(value, str):
        match = _SIZE.fullmatch(value.strip())
        if match is None or not (match[2] or match[4]) or (match[3] and not match[2]):
            raise ParameterError(name, f"is {_shown(value)}: give a size such as 5GB or 500MB.")
        factor = (1024 if match[3] else 1000) ** _UNITS.get((match[2] or "").lower(), 0)
        whole, _, decimals = match[1].partition(".")
        value = int(whole + decimals) * factor // 10 ** len(decimals)
    return whole_number(name, value)


def peft_version(name: str, value: object) -> tuple[int, ...]:
    """Return a version of PEFT, such as ``"0.13"`` or ``(0, 13, 2)``, as a tuple of numbers.

    Raises:
        UsageError: the text has another form, or names a PEFT without VeRA.
    """
    if isinstance(value, tuple | list) and all(type(each) is int for each in value):
        value = ".".join(map(str, value))
    if not isinstance(value, str) or not _VERSION.fullmatch(value):
        raise ParameterError(name, f"is {_shown(value)}: give a version such as 0.13 or 0.13.2.")
    version = tuple(map(int, value.split(".")))
    if version < OLDEST_PEFT:
        raise ParameterError(name, f"is {value}: PEFT has VeRA since 0.11, so give 0.11 or later.")
    return version


def whole_number(name: str, value: object, *, least: int | None = 1) -> int:
    """Return a whole number, which is at least `least`.

    Raises:
        UsageError: the value is of another kind, or too small.
    """
    index = getattr(type(value), "__index__", None)
    if index is None or is_flag(value):
        raise ParameterError(name, f"is {_shown(value)}: give a whole number.")
    found: int = index(value)
    if least is not None and found < least:
        raise ParameterError(name, f"is {found}: give a whole number from {least} on.")
    return found


def number(name: str, value: object) -> float:
    """Return a finite number.

    Raises:
        UsageError: the value is of another kind, infinite or NaN.
    """
    if not is_flag(value) and not isinstance(value, str | bytes):
        try:
            converted = float(value)  # type: ignore[arg-type] # tried here
        except (TypeError, ValueError, OverflowError):
            converted = math.nan
        if math.isfinite(converted):
            return converted
    raise ParameterError(name, f"is {_shown(value)}: give a finite number.")


def is_flag(value: object) -> bool:
    """Return whether a value is True or False, NumPy's included."""
    return type(value).__name__ in ("bool", "bool_")


def require_flags(**values: object) -> None:
    """Raise `UsageError` unless each of these arguments is True or False."""
    for name, value in values.items():
        if not is_flag(value):
            raise ParameterError(name, f"is {_shown(value)}: give True or False.")


def require_content(name: str, value: object) -> None:
    """Raise `UsageError` for an empty text, which a shell passes for an unset variable."""
    if value in ("", b""):
        raise ParameterError(name, "is empty: give a value.")


def text(name: str, value: object) -> str:
    """Return a text unchanged.

    Raises:
        UsageError: the value is of another kind, or empty.
    """
    if not isinstance(value, str):
        raise ParameterError(name, f"is {_shown(value)}: give a text.")
    require_content(name, value)
    return value


def texts(name: str, value: object) -> tuple[str, ...]:
    """Return a list of texts; a caller may also pass a text with commas.

    Raises:
        UsageError: the value is of another kind, a text without any name, or has an empty item.
    """
    if isinstance(value, str):
        parts = tuple(part.strip() for part in value.split(",") if part.strip())
        require_content(name, ",".join(parts))
        return parts
    if isinstance(value, bytes | Mapping) or not isinstance(value, Sequence | set | frozenset):
        raise ParameterError(name, f"is {_shown(value)}: give a list of texts.")
    return tuple(text(f"an item of {name}", each) for each in value)


def place(name: str, value: object) -> str:
    """Return a folder, a file or a repo as a text, as on a command line.

    Raises:
        UsageError: the value is of another kind, is empty, or has a NUL.
    """
    if isinstance(value, str | os.PathLike):
        found = os.fspath(value)
        require_content(name, found)  # pathlib would take an empty text for the working directory
        if "\0" in str(found):
            raise ParameterError(name, "contains a NUL character: give the name without the NUL.")
        if isinstance(found, str):
            return found
    raise ParameterError(name, f"is {_shown(value)}: give a text or a pathlib.Path.")


def places(name: str, value: object) -> tuple[str, ...]:
    """Return one place or several; see `place`.

    Raises:
        UsageError: the value is of another kind.
    """
    if isinstance(value, str | os.PathLike):
        return (place(name, value),)
    if isinstance(value, bytes | Mapping) or not isinstance(value, Iterable):
        raise ParameterError(name, f"is {_shown(value)}: give a text, a pathlib.Path, or a list.")
    return tuple(place(name, each) for each in value)


def path(name: str, value: object) -> Path:
    """Return a path on this machine; ``~`` is the home folder, unless a file has this name.

    Raises:
        UsageError: see `place`.
    """
    written = Path(place(name, value))
    if not written.parts[:1] or not written.parts[0].startswith("~") or os.path.lexists(written):
        return written
    return Path(os.path.expanduser(written))  # noqa: PTH111 -- Path's can raise


def adapter_and_weight(name: str, value: object) -> tuple[str, float | None]:
    """Split ``ADAPTER=WEIGHT`` at the last equals sign, if a number follows.

    Without a number, the weight is None.

    Raises:
        UsageError: the value is of another kind, or a text follows the folder of an adapter.
    """
    written = place(name, value)
    adapter, equals, weight = written.rpartition("=")
    if not equals or not adapter:
        return written, None
    try:
        return adapter, float(weight)
    except ValueError:
        if Path(adapter).is_dir() and not Path(written).exists():
            reason = f"is {_shown(value)}: give a number as the weight, such as {adapter}=0.5."
            raise ParameterError(name, printable(reason)) from None
    return written, None


def instance(name: str, kind: type[Kind], value: object) -> Kind:
    """Return an object of a required class.

    Raises:
        UsageError: the value is of another class.
    """
    if not isinstance(value, kind):
        raise ParameterError(name, f"is {_shown(value)}: give a {kind.__name__}.")
    return value


def function(name: str, value: Called) -> Called:
    """Return a function to call later.

    Raises:
        UsageError: the value cannot be called.
    """
    if not callable(value):
        raise ParameterError(name, f"is {_shown(value)}: give a function.")
    return value


def progress_function(name: str, value: Progress | None) -> Progress:
    """Return the function to call with the progress; for None, a function without effect.

    Raises:
        UsageError: the value cannot be called.
    """
    return no_progress if value is None else function(name, value)


def no_progress(_done: int, _of: int) -> None:
    """Do nothing with the progress of a call that nobody watches."""


def optional(check: Callable[..., Checked], name: str, *rest: object) -> Checked | None:
    """Return None for None, and the result of `check` for any other value."""
    return None if rest[-1] is None else check(name, *rest)


def set_checked(record: object, **values: object) -> None:
    """Put checked values into the fields of a frozen dataclass, from its ``__post_init__``."""
    for name, value in values.items():
        object.__setattr__(record, name, value)


def _shown(value: object) -> str:
    """Return a wrong value for a message: a text in quotes, or else the class."""
    if isinstance(value, str):
        return f'"{printable(value)}"'
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    if value is None or is_flag(value) or isinstance(value, int | float):
        return str(value)
    return f"a {type(value).__name__}"
