"""Set or remove members in JSON text without a change to any other byte."""

from __future__ import annotations

import pytest

from vera_convert.files.json_edit import edited_member

TEXT = b"""{
  "a": [1,   2],
  "inner": { "x" : "y, \\"}" ,"deep": {"n": 1.0} },
\t"empty": {}
}
"""


@pytest.mark.parametrize(
    ("path", "value", "old", "new"),
    [
        (("a",), 3, b"[1,   2]", b"3"),
        (("inner", "x"), None, b'"y, \\"}"', b"null"),
        (("inner", "deep", "n"), "z", b"1.0", b'"z"'),
        (("empty", "new"), 1, b"{}", b'{"new": 1}'),
        (("inner", "deep", "m"), 2, b'{"n": 1.0}', b'{"n": 1.0,"m": 2}'),
    ],
)
def test_a_member_is_set_wherever_it_is(
    path: tuple[str, ...], value: object, old: bytes, new: bytes
) -> None:
    assert TEXT.count(old) == 1
    assert edited_member(TEXT, path, value) == TEXT.replace(old, new)


def test_a_missing_object_is_not_created() -> None:
    with pytest.raises(KeyError):
        edited_member(TEXT, ("absent", "x"), 1)
