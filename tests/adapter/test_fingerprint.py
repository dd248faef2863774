"""The fingerprint in the metadata of a stripped adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vera_convert.adapter.config import VeraConfig
from vera_convert.adapter.fingerprint import (
    MAX_FEATURES,
    METADATA_KEY,
    Fingerprint,
    disagreement,
    from_text,
    to_text,
)
from vera_convert.draws.generator import Rounding, Variant
from vera_convert.dtypes import PRECISION
from vera_convert.errors import CheckpointError

HASH = "0123456789abcdef" * 4
GOOD = Fingerprint(
    variant=Variant.FLOAT32_FUSED,
    key=7,
    rank=4,
    in_features=48,
    out_features=24,
    drawn_in_features=80,
    drawn_out_features=24,
    rounding=Rounding.BF16,
    dtype="F32",
    sha256_A=HASH,
    sha256_B=HASH[::-1],
)
features = st.integers(1, MAX_FEATURES)


@st.composite
def fingerprints(draw: Callable[[st.SearchStrategy[int]], int]) -> Fingerprint:
    width, height = draw(features), draw(features)
    return Fingerprint(
        variant=Variant([*Variant][draw(st.integers(0, len(Variant) - 1))]),
        key=draw(st.integers(-(2**63), 2**64 - 1)),
        rank=draw(st.integers(1, 1 << 24)),
        in_features=width,
        out_features=height,
        drawn_in_features=draw(st.integers(width, MAX_FEATURES)),
        drawn_out_features=draw(st.integers(height, MAX_FEATURES)),
        rounding=[*Rounding][draw(st.integers(0, len(Rounding) - 1))],
        dtype=[*PRECISION][draw(st.integers(0, 3))],
        sha256_A=f"{draw(st.integers(0, 16**64 - 1)):064x}",
        sha256_B=HASH,
    )


@given(fingerprints())
def test_a_fingerprint_is_read_as_it_was_written(fingerprint: Fingerprint) -> None:
    assert from_text(to_text(fingerprint), place="weights") == fingerprint


@given(fingerprint=fingerprints())
def test_a_written_fingerprint_satisfies_the_published_schema(
    fingerprint: Fingerprint, schema_errors: Callable[..., list[str]]
) -> None:
    assert schema_errors("fingerprint", json.loads(to_text(fingerprint))) == []


def test_the_text_is_compact_and_names_its_format_first() -> None:
    text = to_text(GOOD)
    assert text.startswith('{"format":1,"variant":"float32-fused","key":7,')
    assert " " not in text
    assert METADATA_KEY == "vera_convert.projection"


def test_a_fingerprint_describes_the_draw_of_the_removed_matrices() -> None:
    assert GOOD.draw.in_features == 80
    assert GOOD.draw.out_features == 24
    assert GOOD.draw.rounding is Rounding.BF16


DOCUMENT = json.loads(to_text(GOOD))
WRONG: dict[str, list[object]] = {
    "format": [0, 2, True, 1.0, "1", None],
    "variant": ["float32", "FLOAT32-FUSED", None, 1, []],
    "key": [True, 7.0, "7", 2**64, -(2**63) - 1, None],
    "rank": [0, -1, True, 4.0, "4", (1 << 24) + 1],
    "in_features": [0, 81, True, 48.0, 1 << 32],
    "out_features": [0, 25, None, "24"],
    "drawn_in_features": [47, 0, True, 1 << 32],
    "drawn_out_features": [23, 24.0],
    "rounding": ["bfloat16", None, "", ["bf16"]],
    "dtype": ["float32", "I8", "F8_E4M3", None],
    "sha256_A": ["", HASH[:-1], HASH + "0", HASH.upper(), HASH + "\n", None, 0],
    "sha256_B": [["a"], HASH.replace("0", "g")],
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field in WRONG for value in WRONG[field]]
)
def test_a_wrong_field_is_refused_by_reader_and_schema(
    field: str, value: object, schema_errors: Callable[..., list[str]]
) -> None:
    document = {**DOCUMENT, field: value}
    with pytest.raises(CheckpointError, match="V407") as caught:
        from_text(json.dumps(document), place="weights")
    assert field in caught.value.findings[0].reason
    # A schema cannot compare two fields.
    compares = field.endswith("_features") and isinstance(value, int) and value in (23, 25, 47, 81)
    assert compares or schema_errors("fingerprint", document)


@pytest.mark.parametrize("field", ["format", *(field.name for field in fields(Fingerprint))])
def test_every_field_is_required_and_no_other_is_allowed(
    field: str, schema_errors: Callable[..., list[str]]
) -> None:
    for document in (
        {key: value for key, value in DOCUMENT.items() if key != field},
        {**DOCUMENT, f"{field}_": 1},
    ):
        with pytest.raises(CheckpointError, match="V407"):
            from_text(json.dumps(document), place="weights")
        assert schema_errors("fingerprint", document)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '"{}"',
        "{}",
        "\x1b[31m",
        to_text(GOOD) + "x",
        to_text(GOOD).replace('"key":7', '"key":7,"key":7'),
        to_text(GOOD).replace('"key":7', '"key":NaN'),
        to_text(GOOD).replace('"key":7', f'"key":{"9" * 5000}'),
        "[" * 100_000,
        "\ufeff" + to_text(GOOD),
    ],
)
def test_a_hostile_text_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        from_text(text, place="weights")
    (finding,) = caught.value.findings
    assert finding.code == "V407"
    assert str(finding).isprintable()
    assert len(str(finding)) < 1000


@pytest.mark.parametrize(
    ("change", "longest", "said"),
    [
        ({}, 24, None),
        ({}, 8, None),
        ({}, 25, "24 rows"),
        ({"key": 8}, 24, "key 8"),
        ({"key": 7 + 2**32}, 24, "key 4294967303"),
        ({"rank": 8}, 24, "rank 8"),
    ],
    ids=str,
)
def test_a_fingerprint_that_contradicts_its_adapter(
    change: dict[str, int], longest: int, said: str | None
) -> None:
    config = VeraConfig(r=4, projection_prng_key=7)
    fingerprint = Fingerprint(**{**asdict(GOOD), **change})
    assert fingerprint == replace(GOOD, **change)  # type: ignore[arg-type]
    finding = disagreement(fingerprint, config, longest, place="weights")
    if said is None:
        assert finding is None
    else:
        assert finding is not None
        assert finding.code == "V408"
        assert said in finding.reason
