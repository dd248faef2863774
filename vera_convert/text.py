"""The phrases that messages and reports share: names shown safely, lists, counts, plurals.

Every text from a file passes through `printable` before anybody sees the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sized
from dataclasses import fields
from pathlib import PurePath

_LONGEST_SHOWN = 300
# Letters and marks that are printable for Python and invisible for a reader.
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)


def printable(text: str) -> str:
    """Escape a text from a file: the result is a visible line of bounded length.

    Control characters, line separators, bidirectional and zero-width marks, private and unpaired
    code points become escapes as Python writes them. A text of more than 300 characters is cut, and
    its length is added.
    """
    shown = printable_whole(text[:_LONGEST_SHOWN])
    if len(text) > _LONGEST_SHOWN:
        shown += f"… ({len(text):,} characters)"
    return shown


def printable_whole(text: str) -> str:
    """Escape a complete text as `printable` does: a command or a path to copy."""
    if text.isprintable() and not _INVISIBLE.search(text):
        return text
    return "".join(map(_escaped, text))


def _escaped(letter: str) -> str:
    if letter.isprintable() and not _INVISIBLE.match(letter):
        return letter
    return letter.encode("unicode_escape").decode("ascii")


def counted(number: int, noun: str) -> str:
    """Return a number and its noun: ``1 error``, ``1,000 errors``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def there_are(names: list[str]) -> str:
    """Return ``there is a`` for one name, ``there are a, b, c and 2 more`` for several."""
    return f"there {'is' if len(names) == 1 else 'are'} {listed(names)}"


def and_more(number: int, noun: str = "") -> str:
    """Return `` and 5 more`` or `` and 1 more layer`` to end a list; empty if none are left."""
    if number < 1:
        return ""
    more = f" and {number:,} more"
    return f"{more} {noun if number == 1 else f'{noun}s'}" if noun else more


def listed(names: Iterable[str], most: int = 3, *, noun: str = "") -> str:
    """Return up to `most` names, escaped, and the number of the others.

    >>> listed(["q_proj", "k_proj", "v_proj"], 2)
    'q_proj, k_proj and 1 more'
    """
    names = list(names)
    shown = ", ".join(map(printable, names[:most]))
    return shown + and_more(len(names) - most, noun)


def short_repr(record: object) -> str:
    """Return the class and the plain fields of a dataclass, for `repr`: a short line.

    A collection is shown by its length, and a record with a label by the label. Other records, and
    None, are left out.
    """
    shown = []
    for field in fields(record):  # type: ignore[arg-type] # a dataclass
        value = getattr(record, field.name)
        value = getattr(value, "label", value)
        if isinstance(value, str | PurePath):
            shown.append(f"{field.name}={printable(str(value))!r}")
        elif isinstance(value, Sized):
            shown.append(f"{field.name}=<{len(value)}>")
        elif isinstance(value, int | float):
            shown.append(f"{field.name}={value!r}")
    return f"{type(record).__name__}({', '.join(shown)})"


def read_back_differs(name: str, where: str = "") -> str:
    """Return the message for a written file that reads back with different bytes."""
    return (
        f"{printable(name)} reads back with other bytes than were written{where}, so nothing was "
        "published. The disk or its driver may be faulty: check the disk, or use another disk."
    )


_KEPT_WHOLE = re.compile(r'`[^`]*`|python -c ".*"')


def wrapped(text: str, width: int | None, *, first: str = "", indent: str = "") -> list[str]:
    """Break a text into lines of at most `width` columns; None breaks no line.

    Names and commands stay whole, to be copied, even if one is longer than a line.
    """
    if width is None or len(first) + len(text) <= width:
        return [first + text]
    import textwrap

    kept = _KEPT_WHOLE.sub(lambda match: match[0].replace(" ", "\0"), text)
    lines = textwrap.wrap(
        kept,
        width,
        initial_indent=first,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace("\0", " ") for line in lines]
