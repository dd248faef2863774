"""validate: every way in which adapters are wrong, each finding with its code, at once.

    files ─► config ─► tensors ─► targets ─► values ─► projections ─► base (headers alone)

What a step needs and the steps before could not read is told as not checked, and not guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from vera_convert.adapter.adapter import Adapter
from vera_convert.adapter.config import CONFIG_NAME, VeraConfig
from vera_convert.adapter.folder import adapters_below
from vera_convert.adapter.opening import Examined, examine, examined_folder
from vera_convert.adapter.tensors import (
    A_NAME,
    FLOAT_DTYPES,
    MAX_PROJECTION_BYTES,
    WEIGHTS_NAME,
    StoredProjections,
)
from vera_convert.base.onbase import BaseWish, OnBase, loaded_in, wish_of
from vera_convert.draws.recognition import Draw
from vera_convert.errors import CheckpointError, SurroundingsError, VeraConvertError
from vera_convert.files.extents import extents
from vera_convert.files.reading import ByteSource, printable
from vera_convert.hub.lookup import (
    HubAccess,
    Location,
    demand_adapter,
    fetch_weights,
    locate,
    open_remote,
)
from vera_convert.hub.remotefile import RemoteFile
from vera_convert.rules import FILE_UNREADABLE, Finding, Severity
from vera_convert.validation.config import config_findings
from vera_convert.validation.files import folder_findings
from vera_convert.validation.projections import recognised, stored_findings, stripped_findings
from vera_convert.validation.selection import check_codes, selected
from vera_convert.validation.targets import target_findings
from vera_convert.validation.validation import Checked, Validation
from vera_convert.validation.values import value_findings

Learn = Callable[[Adapter], tuple[OnBase, list[Finding]]]
"""Says what is known of the base of an adapter, and what is wrong with the adapter on it."""

_REMOTE = Path("on-the-hub")
"""The folder of an adapter that was not fetched; nothing lies there."""


def validate(
    adapters: Sequence[str | Path],
    *,
    base: BaseWish | str | Path | None = None,
    recursive: bool = False,
    deep: bool = False,
    select: Sequence[str] = (),
    ignore: Sequence[str] = (),
    fail_on: Severity = Severity.ERROR,
    revision: str | None = None,
    access: HubAccess | None = None,
) -> Validation:
    """Find everything that is wrong with adapters; nothing is written and no base is guessed.

    Args:
        adapters: folders, files of an adapter (which stand for their folder), or repos on the Hub,
            of which only config and header are read.
        base: the model to hold them against, by its headers; None holds them against none.
        recursive: search the folders for adapters.
        deep: fetch the weights of repos too, and draw what a fingerprint promises.
        select: the only codes that count, or beginnings of codes; none means all.
        ignore: codes that do not count.
        fail_on: from which severity on the call fails.
        revision: the adapters', on the Hub.
        access: how the Hub is reached.

    Raises:
        UsageError: an unknown code, or a name that can be no adapter's.
        SurroundingsError: the base cannot be had, or there is no adapter in a searched folder.
    """
    check_codes((*select, *ignore))
    access, wish = access or HubAccess(), wish_of(base)
    learn: Learn | None = None
    if wish.model is not None:
        from vera_convert.validation.base import learner  # takes as long to load as all the rest

        learn = learner(wish, access)
    checked = [
        named
        if isinstance(named, Checked)
        else _checked(named, wish, learn, access, deep=deep, revision=revision)
        for named in _named(adapters, recursive=recursive)
    ]
    chosen = (
        replace(one, findings=selected(one.findings, select=select, ignore=ignore))
        for one in checked
    )
    return Validation(tuple(chosen), fail_on)


# --- which adapters ------------------------------------------------------------------------------


def _named(adapters: Sequence[str | Path], *, recursive: bool) -> Iterator[str | Checked]:
    """Yield each adapter once, by its folder or its name on the Hub; or why it cannot be read."""
    seen: set[str] = set()
    for adapter in adapters:
        text = str(adapter)
        if Path(text).name in (CONFIG_NAME, WEIGHTS_NAME) and not Path(text).is_dir():
            text = str(Path(text).parent)
        unreadable: dict[str, VeraConvertError] = {}
        below = _below(Path(text), unreadable) if recursive else [text]
        for name in below:
            if name not in seen:
                seen.add(name)
                yield name
        for name, error in unreadable.items():
            path = str(Path(text, name))
            yield Checked(printable(path), path, failure=error)


def _below(tree: Path, unreadable: dict[str, VeraConvertError]) -> list[str]:
    if not tree.is_dir():
        raise SurroundingsError(
            f"there is no folder {printable(str(tree))}; --recursive searches folders only."
        )
    found = [str(tree / name) for name in adapters_below(tree, unreadable=unreadable)]
    if not found and not unreadable:
        raise SurroundingsError(f"no adapter lies below {printable(str(tree))}.")
    return found


# --- one adapter ---------------------------------------------------------------------------------


@dataclass(slots=True)
class _Told:
    """What is to be told of one adapter, as it is found."""

    findings: list[Finding] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)
    draw: Draw | None = None
    base: str = ""


def _checked(
    named: str,
    wish: BaseWish,
    learn: Learn | None,
    access: HubAccess,
    *,
    deep: bool,
    revision: str | None,
) -> Checked:
    """Check one adapter; that it cannot be had is a result as well."""
    label, remote = printable(named), False
    read: int | None = None
    embedded: bool | None = None
    told = _Told()
    try:
        location = locate(named, kind="adapter", access=access, revision=revision)
        label = location.label
        remote = location.folder is None
        if deep and location.folder is None:
            location = fetch_weights(location, access)
        with _examined(location, access) as (examined, sources):
            told.findings += examined.findings
            embedded = _is_embedded(examined)
            _check(examined, location, wish, learn, told, deep=deep)
            read = _bytes_read(sources)
    except CheckpointError as error:
        told.findings += error.findings
    except SurroundingsError as error:
        if not isinstance(error.__cause__, PermissionError):
            return Checked(label, None if remote else named, failure=error)
        told.findings.append(FILE_UNREADABLE.at(label, str(error)))
    return Checked(
        label,
        None if remote else named,
        tuple(told.findings),
        told.draw,
        embedded,
        told.base,
        tuple(told.not_checked),
        read if remote else None,
    )


@contextmanager
def _examined(
    location: Location, access: HubAccess
) -> Iterator[tuple[Examined, tuple[ByteSource, ...]]]:
    """Open an adapter in its folder; or on the Hub, where its config and header alone are read."""
    if location.folder is not None:
        with examined_folder(location.folder) as examined:
            yield examined, ()
        return
    demand_adapter(location, access)
    with (
        open_remote(location, CONFIG_NAME, access) as config,
        open_remote(location, WEIGHTS_NAME, access) as weights,
    ):
        yield examine(_REMOTE, config, weights, values=False), (config, weights)


def _bytes_read(sources: Sequence[ByteSource]) -> int:
    return sum(source.bytes_read for source in sources if isinstance(source, RemoteFile))


def _is_embedded(examined: Examined) -> bool | None:
    if examined.file is None:
        return None
    return A_NAME in examined.file.header.tensors


def _check(
    examined: Examined,
    location: Location,
    wish: BaseWish,
    learn: Learn | None,
    told: _Told,
    *,
    deep: bool,
) -> None:
    """Run every check for which enough could be read."""
    config, by_meaning = examined.config, examined.sorted
    if location.folder is not None:
        told.findings += folder_findings(location.folder)
    layers = by_meaning.layers if by_meaning is not None else {}
    if config is not None and examined.config_is_sound:
        told.findings += config_findings(config)
        told.findings += target_findings(config, [*layers])
    if location.folder is None:
        told.not_checked.append("values, and whether A and B are a draw: --deep fetches them.")
    elif examined.file is not None:
        found = extents(examined.file)
        told.findings += value_findings(examined.file, [*layers.values()], found)
    on_base = _on_base(examined, wish, learn, told)
    if config is not None and not examined.config_is_sound:
        told.not_checked.append("whether A and B are a draw: mend the config first.")
    elif config is not None and by_meaning is not None:
        here = location.folder is not None
        _check_projections(config, examined, on_base, told, here=here, deep=deep)


def _on_base(examined: Examined, wish: BaseWish, learn: Learn | None, told: _Told) -> OnBase:
    """Return what is known of the base, and tell what is wrong with an adapter on it."""
    dtype = OnBase() if wish.dtype is None else loaded_in(OnBase(), wish.dtype)
    if learn is None:
        return dtype
    if examined.adapter is None:
        told.not_checked.append("the base: mend the errors first.")
        return dtype
    try:
        on_base, findings = learn(examined.adapter)
    except CheckpointError as error:
        told.findings += error.findings
        return dtype
    told.base = on_base.source
    told.findings += findings
    return on_base


def _check_projections(
    config: VeraConfig, examined: Examined, on_base: OnBase, told: _Told, *, here: bool, deep: bool
) -> None:
    """Hold A and B against draws: stored ones, if their values may be read, or what was dropped."""
    stored = examined.sorted.projections if examined.sorted is not None else None
    fingerprint = examined.fingerprint
    if stored is None and not config.save_projection:
        told.draw = fingerprint.draw if fingerprint else None
        told.findings += stripped_findings(config, fingerprint, on_base)
        if deep and fingerprint is not None:
            from vera_convert.conversion.transforms import prove

            prove(fingerprint, place=WEIGHTS_NAME)
    elif stored is not None and here and _are_unfit(stored, config):
        told.not_checked.append("whether A and B are a draw: mend their errors first.")
    elif stored is not None and here:
        pair = recognised(config, stored.A.array(), stored.B.array())
        told.draw = pair.recognition.draw
        told.findings += stored_findings(config, pair, on_base)


def _are_unfit(stored: StoredProjections, config: VeraConfig) -> bool:
    """Say whether A and B cannot be compared with a draw: the wrong shape, type or size."""
    pair = (stored.A, stored.B)
    return (
        any(len(tensor.shape) != 2 or 0 in tensor.shape for tensor in pair)
        or any(tensor.dtype not in FLOAT_DTYPES for tensor in pair)
        or (stored.A.shape[0], stored.B.shape[1]) != (config.r, config.r)
        or stored.A.nbytes + stored.B.nbytes > MAX_PROJECTION_BYTES
    )
