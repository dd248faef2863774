"""Strict JSON: any text that two readers could understand differently is refused."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import codes

from vera_convert.errors import CheckpointError, SurroundingsError
from vera_convert.files.reading import open_local
from vera_convert.files.strict_json import parse_json, read_json


def parse(text: str | bytes) -> object:
    return parse_json(text if isinstance(text, bytes) else text.encode(), place="file.json")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64) | st.text() | st.floats(-1e300, 1e300),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(VALUES, st.booleans())
@settings(max_examples=40)
def test_the_json_of_python_is_read_back(value: object, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert parse(text) == value
    assert type(parse(text)) is type(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('"a-0"', "a-0"),
        ("[-0.0, -0e1]", [-0.0, -0.0]),
        ('"' + "1" * 100 + '"', "1" * 100),
        ("9" * 64, int("9" * 64)),
        ('"\\ud83d\\ude00 \\\\ud83d"', "😀 \\ud83d"),
        ('"NaN -Infinity"', "NaN -Infinity"),
        ('"[[[[\\"{{{{\\\\"', '[[[["{{{{\\'),
        ("[" * 64 + "]" * 64, json.loads("[" * 64 + "]" * 64)),
        ('{"a": {"a": 1}, "b": {"a": 1}}', {"a": {"a": 1}, "b": {"a": 1}}),
        (" \t\r\n1 ", 1),
    ],
)
def test_unusual_but_valid_json_is_read(text: str, value: object) -> None:
    assert parse(text) == value


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("[" * 65 + "]" * 65, "V025"),
        ("[" * 100_000, "V025"),
        ('["' + "a" * 10 + '", ' + "[" * 65, "V025"),
        ('{"[[[": ' + '{"]]]": [' * 40 + "]}" * 40 + "}", "V025"),
        ('"' + '\\"[' * 100, "V022"),
        ('"' * 1001, "V022"),
        ("]" * 1000 + "[" * 10, "V022"),
        ('["\\"]', "V022"),
        ("", "V022"),
        ("-0", "V026"),
        ("[1, -0]", "V026"),
        ("-" + "1" * 64, "V026"),
        ("1e309", "V026"),
        ("-1e309", "V026"),
        ("[NaN]", "V024"),
        ("Infinity", "V024"),
        ("-Infinity", "V024"),
        ('{"a": 1, "\\u0061": 2}', "V023"),
        ('[{"x": {"": 1, "": 1}}]', "V023"),
        ('"\\udc00\\ud800"', "V027"),
        ('{"a": [{"\\uDABC": 1}]}', "V027"),
        ("\ufeff{}", "V021"),
        (b"\xff\xfe{\0}\0", "V020"),
        (b'"\xed\xa0\x80"', "V020"),
    ],
)
def test_text_that_readers_understand_differently_is_refused(text: str | bytes, code: str) -> None:
    assert codes(lambda: parse(text)) == [code]


@pytest.mark.parametrize(
    "text",
    [
        "NaN",
        "[Infinity, -Infinity]",
        "1e400",
        "-1e309",
        "-0",
        "[1, -0]",
        "9" * 4_300,
        "0." + "1" * 99,
    ],
)
def test_a_config_may_hold_the_numbers_of_pythons_json(text: str) -> None:
    value = parse_json(text.encode(), place="config.json", pythons_numbers=True)
    assert repr(value) == repr(json.loads(text))


@pytest.mark.parametrize("text", ["9" * 4_301, "-" + "9" * 4_301, "0." + "1" * 5_000])
def test_a_number_that_python_reads_slowly_is_refused_in_a_config_too(text: str) -> None:
    found = codes(lambda: parse_json(text.encode(), place="config.json", pythons_numbers=True))
    assert found == ["V026"]


def test_other_invalid_json_is_refused_in_a_config_too() -> None:
    for text, code in {'{"a": NaN, "a": NaN}': "V023", "[" * 65: "V025", "nan": "V022"}.items():
        act = partial(parse_json, text.encode(), place="config.json", pythons_numbers=True)
        assert codes(act) == [code]


def test_a_config_with_nan_equals_itself_read_again() -> None:
    text = b'{"a": [NaN, {"b": NaN}], "c": NaN}'
    first, second = (parse_json(text, place="x", pythons_numbers=True) for _ in range(2))
    assert first == second


def test_an_error_names_line_and_column() -> None:
    with pytest.raises(CheckpointError, match=r"file\.json: line 2, column 8: Expecting ',' delim"):
        parse('{\n"a": 1 "b": 2}')
    with pytest.raises(CheckpointError, match=r"byte 2 \(0xFF\)"):
        parse(b'["\xff')
    with pytest.raises(CheckpointError, match=r'the key "b\\u202e" stands twice'):
        parse('{"a": 1, "b\u202e": 2, "b\u202e": 3}')


def test_up_to_fifty_duplicates_are_reported_together() -> None:
    twice = '{"a": 1, "a": 1}'
    assert codes(lambda: parse(f"[{twice}, {twice}]")) == ["V023"] * 2
    assert codes(lambda: parse(f"[{','.join([twice] * 100)}]")) == ["V023"] * 50


@pytest.mark.parametrize("depth_of_python", [False, True])
def test_the_limit_of_depth_does_not_depend_on_the_stack(*, depth_of_python: bool) -> None:
    text = "[" * 64 + "]" * 64
    limit = sys.getrecursionlimit()
    try:
        if depth_of_python:
            sys.setrecursionlimit(10_000)
        assert codes(lambda: parse(text)) == []
        assert codes(lambda: parse("[" * 9_000 + "]" * 9_000)) == ["V025"]
    finally:
        sys.setrecursionlimit(limit)


def test_a_json_file_is_returned_with_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'{"r": 4}\n')
    with open_local(path) as file:
        assert read_json(file, limit=9) == ({"r": 4}, b'{"r": 4}\n')
        assert codes(lambda: read_json(file, limit=8)) == ["V003"]
        path.write_bytes(b'{"r": 44}')
        with pytest.raises(SurroundingsError, match="changed while it was read"):
            read_json(file, limit=9)


def test_an_empty_json_file_is_called_empty(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    with open_local(tmp_path / "config.json") as file:
        assert codes(lambda: read_json(file, limit=9)) == ["V004"]
