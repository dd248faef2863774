"""The one careful reader of what comes from outside: bytes, JSON and file names.

Nothing here trusts a file: it is regular or refused, opened without blocking, read by position
and never through a mapping, held against its size before memory is taken, and looked at again
afterwards.
"""

from __future__ import annotations

import codecs
import errno
import json
import logging
import math
import os
import re
import stat
import threading
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import NoReturn, Protocol, Self

from vera_convert.errors import CheckpointError, SurroundingsError
from vera_convert.rules import (
    FILE_EMPTY,
    FILE_TOO_LARGE,
    JSON_BOM,
    JSON_DUPLICATE_KEY,
    JSON_NESTING,
    JSON_NOT_FINITE,
    JSON_NOT_UTF8,
    JSON_NUMBER,
    JSON_SURROGATE,
    JSON_SYNTAX,
    JSON_TOO_MANY,
    LINK_OUTSIDE,
    NAME_UNSAFE,
    NOT_REGULAR,
    Finding,
    Rule,
)
from vera_convert.text import printable

logger = logging.getLogger(__name__)

PICKLE_SUFFIXES = frozenset({".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"})
"""Endings of weight files that are pickles; nothing in this package opens one."""


def is_pickle(name: str) -> bool:
    """Whether a file of this name is a pickle by its ending."""
    return PurePosixPath(name).suffix.lower() in PICKLE_SUFFIXES


# --- bytes ---------------------------------------------------------------------------------------


class ByteSource(Protocol):
    """A file that is read by position: a local one, or one on the Hub by range request."""

    @property
    def place(self) -> str:
        """How messages call it; printable."""

    @property
    def size(self) -> int:
        """Its length in bytes when it was opened."""

    def read_at(self, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes; `SurroundingsError` if they cannot be had."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill a writable buffer of bytes; `SurroundingsError` if that cannot be done."""

    def check_unchanged(self) -> None:
        """Raise `SurroundingsError` if the file changed since it was opened."""


_OPEN_FLAGS = os.O_RDONLY
for _flag in ("O_NONBLOCK", "O_CLOEXEC", "O_NOCTTY", "O_BINARY", "O_NOINHERIT"):
    _OPEN_FLAGS |= getattr(os, _flag, 0)
_NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_LARGEST_READ = 1 << 30  # macOS refuses more than 2 GiB at once, Linux cuts it


class LocalFile:
    """A regular file, open for reading by position; safe to share between threads.

    Made by `open_local`. A context manager; it also closes when the last reference goes.
    """

    def __init__(self, fd: int, place: str) -> None:
        self._fd = fd
        self._lock = threading.Lock()
        self.place = place
        self.identity = self._look()
        self.size = self.identity[2]

    def _look(self) -> tuple[int, int, int, int, int]:
        found = os.fstat(self._fd)
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns

    def fileno(self) -> int:
        """Return the descriptor, for what the system does with whole ranges of a file."""
        return self._fd

    def read_at(self, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes from `offset`.

        Raises:
            ValueError: the range lies outside of the file as it was opened.
            SurroundingsError: the file shrank, or the system cannot read it.
        """
        self._check_range(offset, length)
        data = bytearray(length)
        self.read_into(offset, memoryview(data))
        return bytes(data)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`; raises as `read_at` does."""
        view = buffer.cast("B") if buffer.nbytes else buffer
        self._check_range(offset, buffer.nbytes)
        done = 0
        while done < buffer.nbytes:
            try:
                count = self._read_some(offset + done, view[done : done + _LARGEST_READ])
            except OSError as error:
                raise unreadable(self.place, error) from error
            if not count:
                raise SurroundingsError(f"{self.place} changed while it was read: it shrank.")
            done += count

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ValueError(f"bytes {offset} to {offset + length} of {self.size}")

    def _read_some(self, offset: int, view: memoryview) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._fd, [view], offset)
        with self._lock:  # Windows has no positioned read
            os.lseek(self._fd, offset, os.SEEK_SET)
            data = os.read(self._fd, len(view))
        view[: len(data)] = data
        return len(data)

    def check_unchanged(self) -> None:
        """Raise `SurroundingsError` if size, times or identity are not what they were."""
        try:
            found = self._look()
        except OSError as error:
            raise unreadable(self.place, error) from error
        if found != self.identity:
            raise SurroundingsError(
                f"{self.place} changed while it was read. Try again when nothing writes to it."
            )

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            self.close()


def open_local(
    path: Path,
    *,
    within: Path | None = None,
    limit: int | None = None,
    missing: Rule | None = None,
) -> LocalFile:
    """Open a regular file without ever blocking on what turns out to be something else.

    Args:
        path: the file.
        within: with links resolved, the file must lie inside this folder, or among the blobs of the
            Hub cache that the folder is a snapshot of.
        limit: the most bytes that a file of this kind can have.
        missing: the rule that a missing file breaks; without one it is the surroundings' fault.

    Raises:
        CheckpointError: not regular, outside, too large, or missing.
        SurroundingsError: it cannot be opened.
    """
    place = printable(str(path))
    try:
        file = _opened(path, place) if within is None else _opened_inside(path, within, place)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in _NOWHERE:
            _refuse_missing(path, place, missing, error)
        raise unreadable(place, error) from error
    if limit is not None and file.size > limit:
        raise CheckpointError(too_large(file, limit))
    logger.info("reading %s (%d bytes)", path, file.size)
    return file


def _opened(
    path: Path | str, place: str, *, folder: int | None = None, flags: int = 0
) -> LocalFile:
    """Open a regular file; the file that was opened is checked, since another may lie there now."""
    found = os.stat(path, dir_fd=folder, follow_symlinks=not flags)
    if stat.S_ISLNK(found.st_mode):
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    _require_regular(found, place)  # opening some devices has effects of its own
    file = LocalFile(os.open(path, _OPEN_FLAGS | flags, dir_fd=folder), place)
    _require_regular(os.fstat(file.fileno()), place)
    return file


_NO_FOLLOW: int = getattr(os, "O_NOFOLLOW", 0)
_SEARCHED = _NO_FOLLOW | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_PATH", os.O_RDONLY)


def _opened_inside(path: Path, within: Path, place: str) -> LocalFile:
    """Open a file whose path, with every link resolved, lies inside of a folder.

    The way down from the folder is opened name by name and follows no link, so a link that is put
    there after the path was resolved does not lead out. Windows cannot do that; there the path is
    resolved once more.
    """
    target, folder = _resolved_inside(path, within, place)
    if not _NO_FOLLOW or os.open not in os.supports_dir_fd:
        file = _opened(target, place)
        if _resolved_inside(path, within, place)[0] != target:
            file.close()
            raise _swapped(place)
        return file
    *parents, name = target.relative_to(folder).parts
    opened = [os.open(folder, _SEARCHED & ~_NO_FOLLOW)]
    try:
        for parent in parents:
            opened.append(os.open(parent, _SEARCHED, dir_fd=opened[-1]))
        return _opened(name, place, folder=opened[-1], flags=_NO_FOLLOW)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise _swapped(place) from error
        raise
    finally:
        for each in opened:
            os.close(each)


def _swapped(place: str) -> SurroundingsError:
    return SurroundingsError(
        f"{place} changed while it was opened. Try again when nothing writes to it."
    )


def too_large(source: ByteSource, limit: int) -> Finding:
    """Return the finding that a source has more than `limit` bytes."""
    return FILE_TOO_LARGE.at(source.place, f"has {source.size:,} bytes; the limit is {limit:,}.")


def unreadable(place: str, error: OSError | ValueError) -> SurroundingsError:
    """Return what to raise where the system refuses to open or read a file."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return SurroundingsError(f"{place} cannot be read: {printable(reason)}.")


def too_deep(folder: Path, limit: int) -> str:
    """Return the message that a folder lies deeper in others than folders are searched."""
    shown = printable(f"…/{'/'.join(folder.parts[-3:])}")
    return f"{shown} lies more than {limit} folders deep; deeper folders are not searched."


def _refuse_missing(path: Path, place: str, missing: Rule | None, error: OSError) -> NoReturn:
    reason = "there is no such file."
    if path.is_symlink():
        reason = f"is a link to {printable(str(path.readlink()))}, which leads nowhere."
    if missing is not None:
        raise CheckpointError(missing.at(place, reason)) from error
    raise SurroundingsError(f"{place}: {reason}") from error


def _require_regular(found: os.stat_result, place: str) -> None:
    if stat.S_ISREG(found.st_mode):
        return
    kinds: dict[Callable[[int], bool], str] = {
        stat.S_ISDIR: "a folder",
        stat.S_ISFIFO: "a named pipe",
        stat.S_ISSOCK: "a socket",
    }
    kind = next((name for test, name in kinds.items() if test(found.st_mode)), "a device")
    raise CheckpointError(NOT_REGULAR.at(place, f"is {kind}."))


def _resolved_inside(path: Path, within: Path, place: str) -> tuple[Path, Path]:
    """Return `path` with every link resolved, and the folder that holds it and may be trusted.

    Raises:
        CheckpointError: the path leads out of `within`.
    """
    folder = Path(os.path.realpath(within, strict=True))
    target = Path(os.path.realpath(path, strict=True))
    if target == folder:  # a folder of that name is no file
        return target, target.parent
    if target.is_relative_to(folder):
        return target, folder
    blobs = _cached_blobs(target, folder)
    if blobs is not None:
        return target, blobs
    raise CheckpointError(LINK_OUTSIDE.at(place, f"leads to {printable(str(target))}."))


def _cached_blobs(target: Path, folder: Path) -> Path | None:
    """Return the folder of blobs of the Hub cache that `folder` is a snapshot, or inside of one.

    A cache holds ``models--org--name/snapshots/COMMIT/…``, which are links to
    ``models--org--name/blobs/…``; those can be links to ``blobs/xx/xx…``, shared by all its repos.

    Returns:
        None if `target` is no blob of that cache.
    """
    for snapshot in (folder, *folder.parents):
        repo = snapshot.parent.parent
        if snapshot.parent.name == "snapshots" and repo.name.startswith("models--"):
            if target.parent == repo / "blobs":
                return target.parent
            shared = repo.parent / "blobs"
            is_shared = re.fullmatch("[0-9a-f]{64}", target.name)
            return shared if is_shared and target.parent == shared / target.name[:2] else None
    return None


# --- names and text ------------------------------------------------------------------------------


def clean_name(name: str, *, place: str) -> PurePosixPath:
    """Return a name from an index, a config or a command line as a path inside its folder.

    Raises:
        CheckpointError: on some system the name could lead out of the folder, or to a device.
    """
    parts = name.split("/")
    reason = ""
    if not name:
        reason = "is empty"
    elif any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
        reason = "has a control character"
    elif "\\" in name:
        reason = "has a backslash, which separates folders on Windows"
    elif ":" in name:
        reason = "has a colon, which names a drive or a stream on Windows"
    elif name.startswith("/"):
        reason = "is absolute"
    elif ".." in parts:
        reason = "has '..' in it"
    elif "" in parts or "." in parts:
        reason = "has an empty part or '.' in it"
    if reason:
        raise CheckpointError(NAME_UNSAFE.at(place, f'the name "{printable(name)}" {reason}.'))
    return PurePosixPath(name)


# --- JSON ----------------------------------------------------------------------------------------

_DEEPEST = 64
_MOST_VALUES = 4_000_000
_MOST_QUOTES = 1_000_000
_LONGEST_NUMBER = 64
_LONGEST_IN_PYTHON = 4300
"""The most digits of an integer that Python's json reads; the time grows with their square."""
NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""Names of the floats that JSON does not have, as Python's json and transformers write them."""
_MOST_FINDINGS = 50

# What gives JSON its structure, with one kind of bracket; everything else is deleted.
_ONE_BRACKET = bytes.maketrans(b"{}", b"[]")
_NO_STRUCTURE = bytes(sorted(set(range(256)) - set(b'"{}[],')))
_ALL_ONES = bytes.maketrans(b"0123456789", b"1" * 10)


def read_json(
    source: ByteSource, *, limit: int, pythons_numbers: bool = False
) -> tuple[object, bytes]:
    """Read a whole JSON file of at most `limit` bytes; returns its value and its bytes.

    Raises:
        CheckpointError: too large, empty, or not JSON as `parse_json` demands it.
        SurroundingsError: it cannot be read, or changed meanwhile.
    """
    if source.size > limit:
        raise CheckpointError(too_large(source, limit))
    if source.size == 0:
        raise CheckpointError(FILE_EMPTY.at(source.place, "has no bytes."))
    data = source.read_at(0, source.size)
    source.check_unchanged()
    return parse_json(data, place=source.place, pythons_numbers=pythons_numbers), data


def parse_json(
    data: bytes,
    *,
    place: str,
    duplicates: list[Finding] | None = None,
    pythons_numbers: bool = False,
) -> object:
    """Parse strict JSON: what two readers could understand in two ways is refused.

    No byte order mark, no duplicate keys, no NaN or Infinity, no number that is absurdly long or
    overflows, no unpaired surrogate, at most 64 levels and four million values.

    transformers and PEFT write and read configs with Python's json. For these files
    `pythons_numbers` also accepts the numbers that Python's json accepts: ``NaN``, ``Infinity``,
    ``-Infinity``, ``1e400`` (infinity), ``-0``, and up to 4,300 digits. Every NaN is the one object
    `math.nan`, so two equal configs compare as equal.

    Args:
        data: the text as UTF-8.
        place: how messages call it.
        duplicates: where findings of duplicate keys go; without it they are raised.
        pythons_numbers: accept each number that Python's json accepts.

    Raises:
        CheckpointError: with the line and column where there is one.
    """
    text = _decoded(data, place)
    _check_structure(data, place)
    hooks = (_PythonsNumbers if pythons_numbers else _Hooks)(place)
    try:
        value: object = json.loads(
            text,
            object_pairs_hook=hooks.make_object,
            parse_int=hooks.make_integer if _has_odd_integer(data) else int,
            parse_float=hooks.make_float,
            parse_constant=hooks.make_constant,
        )
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise CheckpointError(JSON_SYNTAX.at(place, f"{where}: {error.msg}.")) from None
    if re.search(rb"\\u[dD][89a-fA-F]", data):
        _check_surrogates(value, place)
    if duplicates is not None:
        duplicates += hooks.duplicates
    elif hooks.duplicates:
        raise CheckpointError.of(hooks.duplicates)
    return value


def _decoded(data: bytes, place: str) -> str:
    if data.startswith(codecs.BOM_UTF8):
        raise CheckpointError(JSON_BOM.at(place, "begins with the bytes EF BB BF."))
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        reason = f"byte {error.start:,} (0x{data[error.start]:02X}) is not UTF-8."
        raise CheckpointError(JSON_NOT_UTF8.at(place, reason)) from None


def _check_structure(data: bytes, place: str) -> None:
    """Refuse what would exhaust the parser, before it runs and in linear time.

    Strings are cut away, first escapes, then empty ones, then all, so that what is in them does not
    count.
    """
    bare = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    bare = bare.translate(_ONE_BRACKET, _NO_STRUCTURE).replace(b'""', b"")
    if bare.count(b'"') > _MOST_QUOTES:
        raise CheckpointError(JSON_TOO_MANY.at(place, "has millions of texts full of brackets."))
    outside = b"".join(bare.split(b'"')[::2])
    if len(outside) > _MOST_VALUES:
        reason = f"has {len(outside):,} brackets and commas; the limit is {_MOST_VALUES:,}."
        raise CheckpointError(JSON_TOO_MANY.at(place, reason))
    import numpy as np  # here, since --help reads no JSON

    brackets = np.frombuffer(outside.replace(b",", b""), np.int8)
    steps = np.where(brackets == ord("["), np.int8(1), np.int8(-1))
    depth = int(steps.cumsum(dtype=np.int32).max(initial=0))
    if depth > _DEEPEST:
        raise CheckpointError(
            JSON_NESTING.at(place, f"has {depth:,} levels; the limit is {_DEEPEST}.")
        )


def _has_odd_integer(data: bytes) -> bool:
    """Whether there can be an integer that `int` must not see; asking each one is twice as slow."""
    return b"-0" in data or b"1" * _LONGEST_NUMBER in data.translate(_ALL_ONES)


class _Hooks:
    """What the JSON parser asks on its way; everything that JSON readers disagree on ends here."""

    def __init__(self, place: str) -> None:
        self.place = place
        self.duplicates: list[Finding] = []

    def make_object(self, pairs: list[tuple[str, object]]) -> dict[str, object]:
        made = dict(pairs)
        if len(made) != len(pairs) and len(self.duplicates) < _MOST_FINDINGS:
            last = {key: place for place, (key, _) in enumerate(pairs)}
            twice = next(key for place, (key, _) in enumerate(pairs) if last[key] != place)
            reason = f'the key "{printable(twice)}" stands twice in one object.'
            self.duplicates.append(JSON_DUPLICATE_KEY.at(self.place, reason))
        return made

    def make_integer(self, digits: str) -> int:
        # "-0" is the integer 0 to Python and the float -0.0 to serde.
        if len(digits) > _LONGEST_NUMBER or digits == "-0":
            self._refuse_number(digits)
        return int(digits)

    def make_float(self, digits: str) -> float:
        value = float(digits)
        if len(digits) > _LONGEST_NUMBER or math.isinf(value):
            self._refuse_number(digits)
        return value

    def _refuse_number(self, digits: str) -> NoReturn:
        shown = digits if len(digits) <= 24 else f"{digits[:20]}… ({len(digits):,} characters)"
        raise CheckpointError(JSON_NUMBER.at(self.place, f"holds the number {shown}."))

    def make_constant(self, name: str) -> float:
        raise CheckpointError(JSON_NOT_FINITE.at(self.place, f"holds {name}."))


class _PythonsNumbers(_Hooks):
    """Makes of each number what Python's json makes of it, within Python's own limit of digits."""

    def make_integer(self, digits: str) -> int:
        if len(digits.lstrip("-")) > _LONGEST_IN_PYTHON:
            self._refuse_number(digits)
        try:
            return int(digits)
        except ValueError:  # the user lowered the limit with PYTHONINTMAXSTRDIGITS
            self._refuse_number(digits)

    def make_float(self, digits: str) -> float:
        if len(digits) > _LONGEST_IN_PYTHON:
            self._refuse_number(digits)
        return float(digits)

    def make_constant(self, name: str) -> float:
        return NOT_FINITE[name]


def _check_surrogates(value: object, place: str) -> None:
    for text in _texts(value):
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            reason = f'the text "{printable(text)}" has an unpaired surrogate.'
            raise CheckpointError(JSON_SURROGATE.at(place, reason))


def _texts(value: object) -> Iterator[str]:
    """Yield every key and text inside of a JSON value."""
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            left += [*item, *item.values()]
        elif isinstance(item, list):
            left += item
