"""Check one adapter, step by step.

    files ─► config ─► tensors ─► targets ─► values ─► projections ─► base (headers alone)

If an earlier step failed to read the input of a step, the report lists the step as not checked.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from vera_convert import rules
from vera_convert.adapter.adapter import MAX_PROJECTION_BYTES, MAX_WIDTH, Adapter, StoredProjections
from vera_convert.adapter.config import VeraConfig
from vera_convert.adapter.folder import is_left_out, module_folders, side_files
from vera_convert.adapter.names import A_NAME
from vera_convert.adapter.opening import Examined, examine, examined_folder
from vera_convert.base.facts import BaseFacts, BaseOptions, loaded_in
from vera_convert.conversion.proof import recognized
from vera_convert.draws.generator import Rounding
from vera_convert.dtypes import FLOATS
from vera_convert.errors import CheckpointError, SurroundingsError
from vera_convert.files.file_names import CONFIG_NAME, WEIGHTS_NAME, is_pickle, is_training_state
from vera_convert.files.reading import LocalFile
from vera_convert.files.value_range import value_ranges
from vera_convert.hub.lookup import (
    HubAccess,
    Location,
    fetch_weights,
    locate,
    open_file,
)
from vera_convert.rules import Finding
from vera_convert.text import printable, there_are
from vera_convert.validation.config import (
    TARGET_FIELDS,
    config_findings,
    target_findings,
    undeclared_embeddings,
    uneven_findings,
)
from vera_convert.validation.result import Checked
from vera_convert.validation.tensors import stored_findings, stripped_findings, value_findings

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz")
_REMOTE = Path(os.devnull, "on-the-hub")
"""The folder of an adapter left on the Hub; such a folder cannot exist."""


@dataclass(frozen=True, slots=True)
class CheckOptions:
    """The options of a check, the same for every adapter.

    Attributes:
        base: the options of the base.
        check_on_base: returns the base facts for an adapter, and the findings for the adapter on
            the base; None without a base.
        access: how the Hub is reached.
        deep: whether to fetch weights, and to prove fingerprints.
        revision: the revision of the adapters on the Hub.
    """

    base: BaseOptions
    check_on_base: Callable[[Adapter], tuple[BaseFacts, list[Finding]]] | None
    access: HubAccess
    deep: bool
    revision: str | None


def check_adapter(named: str, options: CheckOptions) -> Checked:
    """Check one adapter; an unreadable adapter is a result, too.

    Args:
        named: the adapter as given by the caller.
        options: the options of the check.
    """
    check = _Check(options, Checked(printable(named), path=named))
    try:
        location = locate(named, kind="adapter", access=options.access, revision=options.revision)
        path = named if location.folder is not None else None
        check.checked = Checked(location.label, path)
        if options.deep:
            location = fetch_weights(location, options.access)
        with check.opened(location) as examined:
            check.run(examined, location.folder)
    except CheckpointError as error:
        check.findings += error.findings
    except SurroundingsError as error:
        if isinstance(error.__cause__, PermissionError):
            check.findings.append(rules.FILE_UNREADABLE.at(check.checked.label, error.reason))
            check.not_checked.append("the contents of unreadable files.")
        else:
            check.checked = replace(check.checked, failure=error)
    findings = tuple(_placed(finding, named) for finding in check.findings)
    return replace(check.checked, findings=findings, not_checked=tuple(check.not_checked))


def _placed(finding: Finding, named: str) -> Finding:
    """Return a finding with place and file relative to the adapter's folder."""
    folder = printable(f"{Path(named)}{os.sep}")
    file = finding.file and finding.file.removeprefix(folder)
    return replace(finding, place=finding.place.removeprefix(folder), file=file)


@dataclass(slots=True)
class _Check:
    """The check of one adapter, with the results so far.

    Attributes:
        options: the options of the check.
        checked: the results, without findings and checks left out.
        findings: the findings so far.
        not_checked: the checks left out so far.
    """

    options: CheckOptions
    checked: Checked
    findings: list[Finding] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)

    @contextmanager
    def opened(self, location: Location) -> Iterator[Examined]:
        """Open an adapter in its folder, or on the Hub, where only config and header are read."""
        access = self.options.access
        if location.folder is not None:
            with examined_folder(location.folder) as examined:
                yield examined
                self.checked = replace(self.checked, bytes_read=0 if location.repo_id else None)
            return
        from vera_convert.hub.repos import adapter_files

        self.findings += _names_findings(adapter_files(location, access), place=location.label)
        with (
            open_file(location, CONFIG_NAME, access) as config,
            open_file(location, WEIGHTS_NAME, access) as weights,
        ):
            yield examine(_REMOTE, config, weights, values=False)
            remote = (each for each in (config, weights) if not isinstance(each, LocalFile))
            self.checked = replace(self.checked, bytes_read=sum(each.bytes_read for each in remote))

    def run(self, examined: Examined, folder: Path | None) -> None:
        """Run every check whose input could be read; `folder` is None for a repo on the Hub."""
        if examined.other_method is not None:
            self.findings = [*examined.findings]
            self.checked = replace(self.checked, other_method=examined.other_method.method)
            return
        self.findings += examined.findings
        self.checked = replace(self.checked, embedded=_is_embedded(examined))
        base_facts = self._on_base(examined.adapter)
        elsewhere = {rules.MODEL_FOLDER, rules.ADAPTER_BELOW, rules.CONFIG_MISSING}
        is_here = elsewhere.isdisjoint(finding.rule for finding in examined.findings)
        if folder is not None and is_here:
            self._step("the other files", lambda: _folder_findings(folder))
        if examined.config is not None:
            self._config(examined, examined.config, has_base=base_facts.base is not None)
        self._values(examined, base_facts, is_here=folder is not None)
        if examined.config is None or examined.tensors is None:
            return
        if examined.wrong_fields & {"projection_prng_key", "save_projection"}:
            self.not_checked.append("the source of A and B: fix the config first.")
            return
        config, stored = examined.config, examined.tensors.projections
        longest_b = examined.tensors.longest_b
        if stored is None and not config.save_projection:
            self._step("A and B", lambda: self._stripped(config, examined, base_facts))
        elif stored is not None and folder is not None:
            self._step("A and B", lambda: self._stored(config, stored, base_facts, longest_b))

    def _step(self, step: str, find: Callable[[], Iterable[Finding]]) -> None:
        """Add the findings of a step; record a failed step, and continue."""
        try:
            self.findings += find()
        except CheckpointError as error:
            self.findings += error.findings
        except SurroundingsError as error:
            self.checked = replace(self.checked, failure=self.checked.failure or error)
            self.not_checked.append(f"{step}: {error}")

    def _on_base(self, adapter: Adapter | None) -> BaseFacts:
        """Return the base facts, and add the findings for an adapter on the base."""
        dtype, check_on_base = self.options.base.dtype, self.options.check_on_base
        base_facts = BaseFacts() if dtype is None else loaded_in(BaseFacts(), dtype)
        if check_on_base is None:
            self.not_checked.append("the base: give --base MODEL to compare with a base.")
            return base_facts
        if adapter is None:
            self.not_checked.append("the base: fix the errors first.")
            return base_facts

        def find() -> list[Finding]:
            nonlocal base_facts
            try:
                base_facts, findings = check_on_base(adapter)
            except CheckpointError:
                self.not_checked.append("the further checks on the base: fix the errors first.")
                raise
            self.checked = replace(self.checked, base=base_facts.source)
            return findings

        self._step("the base", find)
        return base_facts

    def _config(self, examined: Examined, config: VeraConfig, *, has_base: bool) -> None:
        self._step("the config", lambda: config_findings(config, examined.wrong_fields))
        layers = [*examined.tensors.layers] if examined.tensors is not None else []
        if examined.tensors is not None:
            self.findings += undeclared_embeddings(config, examined.tensors.replacements)
        if not examined.wrong_fields.isdisjoint(TARGET_FIELDS):
            return
        if examined.adapter is not None and not has_base:
            self.findings += uneven_findings(config, layers)
        self._step("the targets", lambda: target_findings(config, layers, alone=not has_base))

    def _values(self, examined: Examined, base_facts: BaseFacts, *, is_here: bool) -> None:
        layers = [*examined.tensors.layers.values()] if examined.tensors is not None else []
        if not is_here:
            self.not_checked.append(
                "values, and the source of A and B: --deep fetches the weights."
            )
        elif examined.file is not None and layers:
            is_float16 = base_facts.rounding is Rounding.FP16
            found = value_ranges(examined.file)
            self.findings += value_findings(
                examined.file, examined.config, layers, found, on_float16=is_float16
            )

    def _stored(
        self, config: VeraConfig, stored: StoredProjections, base_facts: BaseFacts, longest_b: int
    ) -> Iterator[Finding]:
        """Compare stored A and B with draws."""
        if _are_unfit(stored, config):
            self.not_checked.append("the source of A and B: fix the errors of A and B first.")
            return
        pair = recognized(config, stored)
        self.checked = replace(self.checked, draw=pair.draw)
        # Without a lambda under its proper name, the layers' outputs are unknown.
        tallest = longest_b or stored.B.shape[0]
        yield from stored_findings(config, pair, base_facts, tallest=tallest)

    def _stripped(
        self, config: VeraConfig, examined: Examined, base_facts: BaseFacts
    ) -> Iterator[Finding]:
        """Compare a fingerprint with draws."""
        fingerprint = examined.fingerprint
        yield from stripped_findings(config, fingerprint, base_facts)
        if fingerprint is None:
            return
        self.checked = replace(self.checked, draw=fingerprint.draw)
        if self.options.deep or fingerprint.is_small:
            from vera_convert.conversion.transforms import prove

            prove(fingerprint, place=WEIGHTS_NAME)
        else:
            self.not_checked.append(
                "the hashes of the fingerprint: --deep draws A and B to prove the hashes."
            )


def _is_embedded(examined: Examined) -> bool | None:
    """Return whether A and B are stored; None if no name shows this."""
    names = examined.file.header.tensors if examined.file is not None else ()
    if A_NAME in names:
        return True
    misnamed = any(".vera_A" in f".{name}" for name in names)
    return None if misnamed or not any(".vera_lambda_" in name for name in names) else False


def _are_unfit(stored: StoredProjections, config: VeraConfig) -> bool:
    """Return whether shape, dtype or size of A and B rule out a comparison with draws."""
    pair = (stored.A, stored.B)
    return (
        any(len(tensor.shape) != 2 or 0 in tensor.shape for tensor in pair)
        or any(tensor.dtype not in FLOATS for tensor in pair)
        or (stored.A.shape[0], stored.B.shape[1]) != (config.r, config.r)
        or stored.nbytes > MAX_PROJECTION_BYTES
        or stored.A.shape[1] > MAX_WIDTH
    )


# --- the other files -----------------------------------------------------------------------------


def _folder_findings(folder: Path) -> Iterator[Finding]:
    """Yield findings for the other files in an adapter's folder.

    Raises:
        SurroundingsError: a subfolder cannot be listed.
    """
    place = printable(folder.name or str(folder))
    sides = side_files(folder)
    for name in sides.outside:
        if name in (CONFIG_NAME, WEIGHTS_NAME):
            continue  # reported by the reader
        yield rules.LINK_NOT_CARRIED.in_file(
            printable(name), "the link leads out of the folder, or to a missing file."
        )
    yield from _left_out(sides.left_out, place)
    yield from _unread_weights(sides.copied, place)


def _names_findings(names: Collection[str], *, place: str) -> Iterator[Finding]:
    """Yield findings for the names of a repo's files, relative to the adapter, with ``/``."""
    pickled = sorted(
        name for name in names if name.startswith("adapter_model.") and is_pickle(name)
    )
    if pickled:
        yield rules.BOTH_KINDS.at(place, f"there is {printable(min(pickled))}, which is not used.")
    beside = frozenset(names) - {CONFIG_NAME, WEIGHTS_NAME}
    modules = module_folders(beside)
    left_out = [name for name in sorted(beside) if is_left_out(name, modules)]
    yield from _left_out(left_out, place)
    yield from _unread_weights(sorted(beside.difference(left_out)), place)


def _left_out(names: Iterable[str], place: str) -> Iterator[Finding]:
    """Yield a note on files of a training run, and a note on foreign files."""
    names = [name for name in names if not name.startswith("adapter_model.bin")]
    for rule, chosen in (
        (rules.TRAINING_STATE, [name for name in names if is_training_state(name)]),
        (rules.STRANGE_FILES, [name for name in names if not is_training_state(name)]),
    ):
        if chosen:
            yield rule.at(place, f"{there_are(chosen)}.")


def _unread_weights(names: Collection[str], place: str) -> Iterator[Finding]:
    """Yield a note on weights that PEFT ignores, except modules with a separate config."""
    folders = module_folders(names)
    unread = [
        name for name in names if name.endswith(_WEIGHTS) and name.rpartition("/")[0] not in folders
    ]
    if unread:
        yield rules.UNREAD_WEIGHTS.at(place, f"{there_are(unread)}.")
