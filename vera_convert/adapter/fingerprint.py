"""The fingerprint: the record of a stripped adapter's A and B, kept in the safetensors metadata.

PEFT ignores metadata, so the record changes nothing for a loader. After A and B are drawn from the
key, the fingerprint proves that A and B are the dropped matrices.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass

from vera_convert import rules
from vera_convert.adapter.config import KEY_RANGE, MAX_RANK, VeraConfig
from vera_convert.draws.generator import Draw, Rounding, Variant
from vera_convert.dtypes import PRECISION
from vera_convert.errors import CheckpointError
from vera_convert.files.strict_json import parse_json
from vera_convert.rules import Finding
from vera_convert.text import printable

METADATA_KEY = "vera_convert.projection"
FORMAT = 1
MAX_FEATURES = (1 << 32) - 1
NO_SHA256 = "0" * 64
"""In the place of a hash, for the size of a fingerprint alone."""
_SMALL = 1 << 18


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """The draw of a pair of projections, the stored form, and the hashes.

    Attributes:
        variant: the generator's variant.
        key: seed, as in the config.
        rank: r.
        in_features: columns of the stored A (r, in).
        out_features: rows of the stored B (out, r).
        drawn_in_features: columns of A as drawn; more than in_features if A was cut.
        drawn_out_features: rows of B as drawn.
        rounding: the casts caused by the dtype of the base.
        dtype: the stored dtype of A and B (safetensors' name).
        sha256_A: SHA-256 of the stored bytes of A (little endian, row-major), in hex.
        sha256_B: the same of B.
    """

    variant: Variant
    key: int
    rank: int
    in_features: int
    out_features: int
    drawn_in_features: int
    drawn_out_features: int
    rounding: Rounding
    dtype: str
    sha256_A: str  # noqa: N815 -- the matrix is called A everywhere
    sha256_B: str  # noqa: N815

    @property
    def is_small(self) -> bool:
        """Whether the recorded pair is drawn in no time."""
        return self.rank * (self.drawn_in_features + self.drawn_out_features) <= _SMALL

    @property
    def draw(self) -> Draw:
        """The recorded draw."""
        return Draw(
            self.variant,
            self.key,
            self.rank,
            self.drawn_in_features,
            self.drawn_out_features,
            self.rounding,
        )


def to_text(fingerprint: Fingerprint) -> str:
    """Return the compact JSON for the metadata."""
    return json.dumps({"format": FORMAT, **asdict(fingerprint)}, separators=(",", ":"))


def from_text(text: str, *, place: str) -> Fingerprint:
    """Read a fingerprint strictly.

    Raises:
        CheckpointError: `FINGERPRINT_MALFORMED`, with the reason.
    """
    place = f"{place}, metadata {METADATA_KEY}"
    try:
        document = parse_json(text.encode(), place=place)
        reason = _defect(document)
    except CheckpointError as error:
        reason = error.findings[0].reason
    if reason is not None or not isinstance(document, dict):
        raise CheckpointError(rules.FINGERPRINT_MALFORMED.at(place, reason or ""))
    values = {name: document[name] for name in _ALLOWED}
    values["variant"] = Variant(values["variant"])
    values["rounding"] = Rounding(values["rounding"])
    return Fingerprint(**values)


_SIZES = range(1, MAX_FEATURES + 1)
_ALLOWED: dict[str, range | tuple[str, ...]] = {
    "variant": (*Variant,),
    "key": KEY_RANGE,
    "rank": range(1, MAX_RANK + 1),
    "in_features": _SIZES,
    "out_features": _SIZES,
    "drawn_in_features": _SIZES,
    "drawn_out_features": _SIZES,
    "rounding": (*Rounding,),
    "dtype": (*PRECISION,),
    "sha256_A": (),
    "sha256_B": (),
}
"""The fields with the allowed values; the two hashes can have any value."""


def _expected(value: object, allowed: range | tuple[str, ...]) -> str:
    """Return the allowed values in words if a value is none of these; else an empty text."""
    if isinstance(allowed, range):
        fits = type(value) is int and value in allowed
        words = f"a whole number from {allowed.start} to {allowed.stop - 1}"
    elif allowed:
        fits, words = value in allowed, f"one of {', '.join(allowed)}"
    else:
        fits = isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None
        words = "a SHA-256 in hex"
    return "" if fits else words


def _defect(document: object) -> str | None:
    """Describe the defect of a fingerprint's JSON in one sentence; None for a sound record."""
    if not isinstance(document, dict):
        return "it is not a JSON object."
    if _expected(document.get("format"), range(FORMAT, FORMAT + 1)):
        shown = printable(json.dumps(document.get("format")))
        return f"its format is {shown}; this version reads format {FORMAT}."
    if document.keys() != {"format", *_ALLOWED}:
        return f"its fields are not exactly format, {', '.join(_ALLOWED)}."
    for name, allowed in _ALLOWED.items():
        if expected := _expected(document[name], allowed):
            return f"{name} is not {expected}."
    for side in ("in_features", "out_features"):
        if document[side] > document[f"drawn_{side}"]:
            return f"{side} is larger than drawn_{side}."
    return None


def disagreement(
    fingerprint: Fingerprint, config: VeraConfig, longest_b: int, *, place: str
) -> Finding | None:
    """Return the finding that a fingerprint contradicts its own adapter, or None.

    Args:
        fingerprint: the fingerprint.
        config: the adapter's config.
        place: the name of the file in messages.
        longest_b: the length of the longest lambda_b; B needs a row for each value.
    """
    for name, recorded, actual in (
        ("key", fingerprint.key, config.projection_prng_key),
        ("rank", fingerprint.rank, config.r),
    ):
        if recorded != actual:
            return rules.FINGERPRINT_DISAGREES.at(
                place, f"the fingerprint says {name} {recorded}, the config {actual}."
            )
    if fingerprint.out_features < longest_b:
        return rules.FINGERPRINT_DISAGREES.at(
            place,
            f"the fingerprint gives B {fingerprint.out_features} rows, "
            f"but a layer has {longest_b} outputs.",
        )
    return None
