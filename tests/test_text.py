"""Phrases that messages share: escaped names, lists, counts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vera_convert.text import (
    and_more,
    counted,
    listed,
    printable,
    printable_whole,
    read_back_differs,
    there_are,
)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("model.layers.0", "model.layers.0"),
        ("größe 模型 😀", "größe 模型 😀"),
        ("C:\\models", "C:\\models"),
        ("a\nb\r\tc", "a\\nb\\r\\tc"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\x00\x7f\x9b", "\\x00\\x7f\\x9b"),
        ("a\u202ecod.exe", "a\\u202ecod.exe"),
        ("\u2066x\u2069", "\\u2066x\\u2069"),
        ("zero\u200bwidth\ufeff", "zero\\u200bwidth\\ufeff"),
        ("line\u2028paragraph\u2029", "line\\u2028paragraph\\u2029"),
        ("no\xa0break soft\xad", "no\\xa0break soft\\xad"),
        ("half \ud83d", "half \\ud83d"),
        ("filler\u3164\u2800\ufe0f", "filler\\u3164\\u2800\\ufe0f"),
        ("tag\U000e0041\U000e0100", "tag\\U000e0041\\U000e0100"),
        ("private\ue000", "private\\ue000"),
        ("x" * 300, "x" * 300),
        ("x" * 301, "x" * 300 + "… (301 characters)"),
        ("\n" * 10_000, "\\n" * 300 + "… (10,000 characters)"),
    ],
)
def test_text_is_shown_without_control_and_invisible_characters(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text(st.characters(exclude_categories=())))
def test_all_shown_text_is_printable_and_can_be_encoded(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert len(shown) <= 10 * 300 + 30
    shown.encode()
    assert printable_whole(text).isprintable()


def test_a_command_is_escaped_and_never_cut() -> None:
    assert printable_whole("x\n" * 400) == "x\\n" * 400


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 layers"), (1, "1 layer"), (2, "2 layers"), (1000, "1,000 layers")]
)
def test_a_number_has_the_right_form_of_its_noun(number: int, text: str) -> None:
    assert counted(number, "layer") == text


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (-2, "", ""),
        (0, "layer", ""),
        (1, "", " and 1 more"),
        (1, "layer", " and 1 more layer"),
        (2, "layer", " and 2 more layers"),
        (70500, "", " and 70,500 more"),
    ],
)
def test_the_omitted_part_of_a_list_is_counted(number: int, noun: str, text: str) -> None:
    assert and_more(number, noun) == text


def test_a_list_shows_its_first_names_escaped_and_counts_the_others() -> None:
    assert listed(()) == ""
    assert listed("abc") == "a, b, c"
    assert listed(["a\n", "b", "c", "d", "e"]) == "a\\n, b, c and 2 more"
    assert listed(["a", "b", "c"], 1, noun="layer") == "a and 2 more layers"


def test_there_is_a_single_name_or_there_are_several_names() -> None:
    assert there_are(["a"]) == "there is a"
    assert there_are(["a", "b"]) == "there are a, b"


def test_a_file_that_reads_back_differently_is_named() -> None:
    assert read_back_differs("a\nb").startswith("a\\nb reads back with other bytes")
    assert "(bytes 5 to 9), so nothing was published" in read_back_differs("a", " (bytes 5 to 9)")
