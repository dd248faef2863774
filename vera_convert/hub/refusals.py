"""The failures of the Hub: temporary or lasting, with a remedy for each reason."""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Iterator, Mapping
from enum import StrEnum

from vera_convert.errors import SurroundingsError
from vera_convert.hub.redaction import redacted
from vera_convert.tables import table
from vera_convert.text import printable


class TryAgainError(Exception):
    """A request failed for a temporary reason.

    Attributes:
        after: the seconds that the server asks to wait.
        limited: whether the server's rate limit is reached.
    """

    def __init__(self, reason: str, *, after: float = 0.0, limited: bool = False) -> None:
        super().__init__(reason)
        self.after = after
        self.limited = limited


class Refusal(StrEnum):
    """The reason of a refusal."""

    MISSING = "missing"
    PRIVATE = "private"
    GATED = "gated"
    DISABLED = "disabled"
    BAD_TOKEN = "bad token"  # noqa: S105 -- a reason, no secret
    RATE_LIMITED = "rate-limited"


class RefusedError(SurroundingsError):
    """The Hub refuses a repo or a file.

    Attributes:
        refusal: the reason.
    """

    def __init__(self, reason: str, refusal: Refusal, remedy: str = "") -> None:
        super().__init__(reason, remedy)
        self.refusal = refusal


class OutOfReachError(SurroundingsError):
    """The Hub does not answer. The files in the cache may serve instead."""


class TooSlowError(OutOfReachError):
    """The server sends very few bytes."""


class LimitedError(OutOfReachError, RefusedError):
    """The Hub's rate limit is reached."""


# --- answers -------------------------------------------------------------------------------------


def gave_up(what: str, tries: int, error: TryAgainError) -> OutOfReachError:
    """Return the error for a request whose last try has failed."""
    times = "" if tries == 1 else f" in {tries} tries"
    reason = f"{what} could not be read from the Hub{times}: {error}."
    if error.limited:
        return LimitedError(
            f"{reason} The Hub's rate limit is reached.",
            Refusal.RATE_LIMITED,
            "Wait some minutes, or log in with `hf auth login`, which raises the limit.",
        )
    return OutOfReachError(reason, "Check the connection, or try again later.")


def refused(
    what: str, status: int, headers: Mapping[str, str], said: str, *, with_token: bool
) -> TryAgainError | SurroundingsError:
    """Return the error for an unsuccessful answer, whether the failure is temporary or lasting.

    Args:
        what: the repo or file in messages.
        status: the answer's status.
        headers: the answer's headers, in any case.
        said: the answer's text; may be empty.
        with_token: whether the request carried a token.
    """
    if status in (408, 425, 429) or status >= 500:
        limited = status == 429
        reason = f"the Hub answers {status}" + (" (too many requests)" if limited else "")
        return TryAgainError(reason, after=_asked_to_wait(headers), limited=limited)
    code = headers.get("x-error-code", "")
    texts = table(__file__, "refusals.toml")
    if code in texts["not_found"]:
        reason = f"{what} was not found on the Hub: {texts['not_found'][code]}"
        return RefusedError(reason, Refusal.MISSING)
    refusal = _refusal(status, code, said, with_token=with_token)
    if refusal is None:
        return SurroundingsError(f"{what} could not be read from the Hub, which answers {status}.")
    reason = f"{what} could not be read from the Hub: {texts[refusal]['reason']}"
    return RefusedError(reason, refusal, texts[refusal]["remedy"])


def _refusal(status: int, code: str, said: str, *, with_token: bool) -> Refusal | None:
    """Return the lasting reason of an answer; None if the reason is unknown."""
    if code == "GatedRepo":
        return Refusal.GATED
    if "is disabled" in said or status == 451:
        return Refusal.DISABLED
    if status == 401 and with_token and (code != "RepoNotFound" or "credentials" in said):
        return Refusal.BAD_TOKEN
    if status in (401, 403):
        return Refusal.PRIVATE
    return Refusal.MISSING if status in (404, 410) or code == "RepoNotFound" else None


def _asked_to_wait(headers: Mapping[str, str]) -> float:
    """Return the seconds that a server asks to wait: a number, a date, or a rate limit."""
    after = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d{1,9}", after, re.ASCII):
        return float(after)
    limit = re.search(r";\s*r=0\s*;\s*t=(\d{1,9})", headers.get("ratelimit", "")[:200], re.ASCII)
    if limit is not None:
        return float(limit[1])
    from email.utils import parsedate_to_datetime

    try:
        return max(0.0, parsedate_to_datetime(after).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0


# --- errors of libraries -------------------------------------------------------------------------


def _known(cause: BaseException) -> tuple[bool, str] | None:
    """Return whether one of Python's errors is temporary, and the reason for a user."""
    import socket
    import ssl

    reasons = {
        socket.gaierror: (False, "the server's name is not known here"),
        ssl.SSLCertVerificationError: (False, "the server's certificate is not accepted"),
        ConnectionRefusedError: (False, "the connection was refused"),
        ssl.SSLError: (True, "the encryption failed"),
        TimeoutError: (True, "the server did not answer in time"),
        ConnectionError: (True, "the connection was broken off"),
    }
    return next((said for kind, said in reasons.items() if isinstance(cause, kind)), None)


OF_ANSWERS = (ValueError, TypeError, AttributeError, LookupError, RecursionError)
"""Errors of huggingface_hub on an answer of another form than the Hub's, such as a list."""


def failure(
    what: str, error: BaseException, *, with_token: bool
) -> TryAgainError | SurroundingsError:
    """Return the error for an error of huggingface_hub; the text leaves secrets out."""
    name = type(error).__name__
    reason = redacted(f"{name}: {error}".rstrip(": "))
    passes = not isinstance(error, OF_ANSWERS)
    if "Timeout" in name:
        reason = f"the server did not answer in time ({name})"
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        if response is not None:
            said = getattr(cause, "server_message", None) or ""
            return refused(
                what, response.status_code, response.headers, said, with_token=with_token
            )
        if isinstance(cause, OSError) and (cause.filename or cause.errno in _FULL):
            return unwritable(cause)
        known = _known(cause)
        if known is not None:
            passes, reason = known[0], f"{known[1]} ({name})"
            break
        if isinstance(cause, OSError) and cause.errno in errno.errorcode and cause.strerror:
            reason = f"{cause.strerror} ({name})"
            break
    if passes:
        return TryAgainError(printable(reason))
    return OutOfReachError(
        f"{what} could not be read from the Hub: {printable(reason)}.",
        "Check the connection, and HF_ENDPOINT if it is set.",
    )


_FULL = {getattr(errno, name) for name in ("ENOSPC", "EDQUOT") if hasattr(errno, name)}


def unwritable(error: OSError) -> SurroundingsError:
    """Return the error for a cache that cannot be written."""
    where = f": {printable(str(error.filename))}" if error.filename else ""
    return SurroundingsError(
        f"the Hub's cache cannot be written{where}: {printable(error.strerror or str(error))}. "
        "Name another folder with --cache-dir."
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its causes, from `args`, `reason`, `__cause__` or `__context__`."""
    seen: object = error
    for _ in range(10):
        if not isinstance(seen, BaseException):
            return
        yield seen
        inner = next((arg for arg in seen.args if isinstance(arg, BaseException)), None)
        seen = inner or getattr(seen, "reason", None) or seen.__cause__ or seen.__context__
