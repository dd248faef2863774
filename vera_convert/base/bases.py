"""The bases of one run, each looked up and read once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from vera_convert.base.model import BaseModel, read_base
from vera_convert.errors import VeraConvertError
from vera_convert.hub.lookup import HubAccess, Location, NamedBase, base_from_config, locate

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
