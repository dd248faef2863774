"""The options for the access to the Hub: a token, the cache, offline or not."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from vera_convert.arguments import instance, optional, path, require_flags, set_checked, text
from vera_convert.errors import UsageError

TOKEN = re.compile(r"[\x21-\x7e]+")
"""The form of a token, which an HTTP header can carry."""
_TRUE = ("1", "ON", "YES", "TRUE")


@dataclass(frozen=True, slots=True)
class HubAccess:
    """Options for the access to the Hub, with the defaults of huggingface_hub.

    Attributes:
        token: the token to send; None for HF_TOKEN, or the token stored by `hf auth login`.
        cache_dir: the folder of the cache.
        offline: use only the cache, as with HF_HUB_OFFLINE.
        progress: whether downloads may draw bars on a terminal.

    Example:
        >>> HubAccess(offline=True).is_offline
        True
    """

    token: str | None = field(default=None, repr=False)
    cache_dir: Path | None = None
    offline: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        set_checked(
            self,
            token=optional(text, "token", self.token),
            cache_dir=optional(path, "cache_dir", self.cache_dir),
        )
        require_flags(offline=self.offline, progress=self.progress)
        # An HTTP library would quote a malformed header in the error, and so print the token.
        if self.token is not None and not TOKEN.fullmatch(self.token):
            raise UsageError("the token is empty, or has an impossible character.")

    @property
    def is_offline(self) -> bool:
        """Whether the option or the environment forbids the network."""
        names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
        return self.offline or any(os.environ.get(name, "").upper() in _TRUE for name in names)


def hub_access_of(value: object) -> HubAccess:
    """Return a caller's options for the Hub; the defaults for None.

    Raises:
        UsageError: the value is of another class.
    """
    return optional(instance, "access", HubAccess, value) or HubAccess()
