"""Remove secrets from the texts and the logs of HTTP libraries: tokens, and signed addresses."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from logging import LogRecord

_PATTERNS = (
    (re.compile(r"\bhf_[A-Za-z0-9_.-]+"), "hf_***"),
    (re.compile(r"(?i)\b(bearer)\s+[^\s'\",]+"), r"\1 ***"),
    (re.compile(r"(://)[^\s/@'\"]{1,500}@"), r"\1***@"),
    # The query of an address may hold a signature.
    (re.compile(r"\?[^\s'\"<>=]{1,200}=[^\s'\"<>]*"), "?***"),
)


def redacted(text: str, *secrets: str | None) -> str:
    """Return `text` with tokens and the queries of addresses replaced by asterisks.

    Args:
        text: a library's message, or a traceback.
        secrets: further texts to hide; HF_TOKEN is always hidden.
    """
    for secret in (*secrets, os.environ.get("HF_TOKEN")):
        if secret and len(secret.strip()) >= 4:
            text = text.replace(secret.strip(), "***")
    for pattern, instead in _PATTERNS:
        text = pattern.sub(instead, text)
    return text


def keep_secrets_from_logs() -> None:
    """Let no handler of huggingface_hub write a secret."""
    import logging  # only the Hub's client logs

    for handler in logging.getLogger("huggingface_hub").handlers:
        handler.addFilter(_without_secrets)  # a second time is harmless


def _without_secrets(record: LogRecord) -> bool:
    """Remove secrets from a log line: huggingface_hub logs addresses with signatures."""
    from logging import Formatter

    record.msg, record.args = redacted(record.getMessage()), ()
    if record.exc_info:
        record.exc_text = redacted(Formatter().formatException(record.exc_info))
        record.exc_info = None
    return True
