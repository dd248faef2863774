"""Find the component of a diffusers pipeline for an adapter.

A pipeline holds several models, each in a folder, and an adapter's file leaves the model unnamed.
The layers decide: an adapter fits the component with a tensor of the right shape for each layer of
the adapter. Wan 2.2 has two transformers with equal layers, and other pipelines have two
equal text encoders. An adapter with several fitting components is refused, because a guess could
add the deltas to the wrong model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from vera_convert import rules
from vera_convert.base.bases import Bases
from vera_convert.base.match import Match
from vera_convert.base.model import BaseModel, listed_components
from vera_convert.errors import CheckpointError
from vera_convert.files.shards import component_folders, kind_of_component
from vera_convert.hub.lookup import Location, list_files
from vera_convert.rules import Finding
from vera_convert.text import printable

_MAIN = ("transformer", "unet")
"""The usual components for an adapter; an error in a usual component is reported first."""


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A folder or repo of a diffusers pipeline.

    Attributes:
        location: where the pipeline lies.
        bases: the bases of this run.
    """

    location: Location
    bases: Bases

    def component_of(
        self, find: Callable[[BaseModel], Match], trained_on: str | None
    ) -> tuple[BaseModel, Match]:
        """Return the only component with an adapter's layers, and the match of the layers.

        Args:
            find: finds the adapter's layers in a component, or raises `CheckpointError`.
            trained_on: the base's name in the adapter's config. A path ending with a component's
                folder decides between equal components.

        Raises:
            CheckpointError: no component or several components have the layers.
        """
        bases, errors = self._read_all()
        found: dict[str, tuple[BaseModel, Match]] = {}
        for folder, base in bases.items():
            try:
                found[folder] = base, find(base)
            except CheckpointError as error:
                errors[folder] = error
        if not found:
            raise errors[min(errors, key=_order)]
        own_folder = (trained_on or "").rstrip("/").rpartition("/")[2] + "/"
        if own_folder in found:
            return found[own_folder]
        for folder in errors.keys() - bases.keys():
            if kind_of_component(folder) in map(kind_of_component, found):
                raise errors[folder]
        possible = {*found, *self._absent_equals(found)}
        if len(possible) > 1:
            raise CheckpointError(self._ambiguous(possible))
        return next(iter(found.values()))

    def _read_all(self) -> tuple[dict[str, BaseModel], dict[str, CheckpointError]]:
        """Read every component with weights, and collect the errors of malformed components."""
        bases, errors = {}, {}
        for folder in component_folders(list_files(self.location, self.bases.access)):
            try:
                bases[folder] = self.bases.read(self.location, folder)
            except CheckpointError as error:
                errors[folder] = error
        return bases, errors

    def _absent_equals(self, found: Mapping[str, object]) -> frozenset[str]:
        """Return the listed components without weights here, of a kind in `found`."""
        present = component_folders(list_files(self.location, self.bases.access))
        kinds = {kind_of_component(folder) for folder in found}
        listed = listed_components(self.location, self.bases.access)
        return frozenset(
            folder
            for folder in listed
            if folder not in present and kind_of_component(folder) in kinds
        )

    def _ambiguous(self, folders: Collection[str]) -> Finding:
        shown = [printable(folder.rstrip("/")) for folder in sorted(folders)]
        ways = " or ".join(f"--base {self.location.label}/{name}" for name in shown)
        reason = (
            f"the adapter's layers fit {' and '.join(shown)}, and the adapter does not name the "
            f"component that it was trained on. Choose with {ways}."
        )
        return rules.BASE_AMBIGUOUS.at(self.location.label, reason)


def _order(folder: str) -> tuple[bool, str]:
    return kind_of_component(folder) not in _MAIN, folder
