"""The bases of one run, each looked up and read once, and the component of a pipeline.

A pipeline of diffusers holds several models, each in a folder, and an adapter's file leaves the
model unnamed. The layers decide: an adapter fits the component with a tensor of the right shape for
each layer of the adapter. Wan 2.2 has two transformers with equal layers, and other pipelines have
two equal text encoders. An adapter with several fitting components is refused, because a guess
could add the deltas to the wrong model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, TypeVar

from vera_convert import rules
from vera_convert.base.match import Match
from vera_convert.base.model import BaseModel, listed_components, read_base
from vera_convert.errors import CheckpointError, VeraConvertError
from vera_convert.files.shards import component_folders, kind_of_component
from vera_convert.hub.lookup import (
    HubAccess,
    Location,
    NamedBase,
    base_from_config,
    list_files,
    locate,
)
from vera_convert.rules import Finding
from vera_convert.text import printable

_MAIN = ("transformer", "unet")
"""The usual components for an adapter; an error in a usual component is reported first."""

Found = TypeVar("Found")


class Bases:
    """The bases of one run, each looked up and read once.

    Attributes:
        access: how the Hub is reached.
        of_tree: whether the run reads the adapters of a tree, with a base for each name in configs.
    """

    def __init__(self, access: HubAccess | None = None, *, of_tree: bool = False) -> None:
        self.access = access or HubAccess()
        self.of_tree = of_tree
        self._found: dict[tuple[object, ...], Any] = {}

    def located(self, model: str, revision: str | None) -> Location:
        """Find a base by a caller's name or path; see `hub.lookup.locate`."""
        return self._once(
            ("located", model, revision),
            lambda: locate(model, kind="base", access=self.access, revision=revision),
        )

    def named(self, name: str | None, revision: str | None) -> NamedBase:
        """Find a base by the name in a config; see `hub.lookup.base_from_config`."""
        return self._once(
            ("named", name, revision), lambda: base_from_config(name, revision, self.access)
        )

    def read(self, location: Location, component: str = "") -> BaseModel:
        """Read a base's headers; see `base.model.read_base`."""
        return self._once(
            ("read", location.label, location.folder, component),
            lambda: read_base(location, self.access, component=component),
        )

    def _once(self, key: tuple[object, ...], find: Callable[[], Found]) -> Found:
        """Return the result for a key, or raise the error of the first search again."""
        if key not in self._found:
            try:
                self._found[key] = find()
            except VeraConvertError as error:
                self._found[key] = error
        found: Found | VeraConvertError = self._found[key]
        if isinstance(found, VeraConvertError):
            raise found
        return found


# --- pipelines -----------------------------------------------------------------------------------


def component_of(
    pipeline: Location, bases: Bases, find: Callable[[BaseModel], Match], trained_on: str | None
) -> tuple[BaseModel, Match]:
    """Return the only component of a pipeline with an adapter's layers, and the match.

    Args:
        pipeline: where the pipeline of diffusers lies.
        bases: the bases of this run.
        find: finds the adapter's layers in a component, or raises `CheckpointError`.
        trained_on: the base's name in the adapter's config. A path ending with a component's
            folder decides between equal components.

    Raises:
        CheckpointError: no component or several components have the layers.
    """
    present = component_folders(list_files(pipeline, bases.access))
    malformed: dict[str, CheckpointError] = {}
    unfit: dict[str, CheckpointError] = {}
    found: dict[str, tuple[BaseModel, Match]] = {}
    for folder in present:
        try:
            base = bases.read(pipeline, folder)
        except CheckpointError as error:
            malformed[folder] = error
            continue
        try:
            found[folder] = base, find(base)
        except CheckpointError as error:
            unfit[folder] = error
    if not found:
        errors = malformed | unfit
        raise errors[min(errors, key=_order)]
    own_folder = (trained_on or "").rstrip("/").rpartition("/")[2] + "/"
    if own_folder in found:
        return found[own_folder]
    kinds = {kind_of_component(folder) for folder in found}
    refused = next((each for each in malformed if kind_of_component(each) in kinds), None)
    if refused is not None:
        raise malformed[refused]
    absent = listed_components(pipeline, bases.access).difference(present)
    possible = {*found, *(folder for folder in absent if kind_of_component(folder) in kinds)}
    if len(possible) > 1:
        raise CheckpointError(_ambiguous(pipeline.label, possible))
    return next(iter(found.values()))


def _ambiguous(label: str, folders: Collection[str]) -> Finding:
    shown = [printable(folder.rstrip("/")) for folder in sorted(folders)]
    ways = " or ".join(f"--base {label}/{name}" for name in shown)
    reason = (
        f"the adapter's layers fit {' and '.join(shown)}, and the adapter does not name the "
        f"component that it was trained on. Choose with {ways}."
    )
    return rules.BASE_AMBIGUOUS.at(label, reason)


def _order(folder: str) -> tuple[bool, str]:
    return kind_of_component(folder) not in _MAIN, folder
