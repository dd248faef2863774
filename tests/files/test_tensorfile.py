from __future__ import annotations

import gc
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
from adapters import good_adapter
from defects import DEFECTS, Defect, split_weights
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save, save_file

from vera_convert.dtypes import BITS
from vera_convert.errors import CheckpointError, SurroundingsError
from vera_convert.files import header
from vera_convert.files.header import TensorInfo, header_bytes, read_header
from vera_convert.files.reading import open_local
from vera_convert.files.strict_json import read_json
from vera_convert.files.tensorfile import (
    NUMPY_DTYPE,
    TensorData,
    TensorFile,
    from_array,
    from_file,
    pickled_weights,
    write_tensors,
)
from vera_convert.rules import CONFIG_MISSING, WEIGHTS_MISSING

library: Any = safetensors
"""The safetensors library, whose functions have no types."""


class Memory:
    """A file in memory that records each read, as a file on the Hub would."""

    place = "remote.safetensors"

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)
        self.reads: list[tuple[int, int]] = []

    def read_at(self, offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= self.size
        self.reads.append((offset, length))
        return self.data[offset : offset + length]

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.read_at(offset, len(buffer))

    def check_unchanged(self) -> None:
        pass


def packed(text: bytes | str | Mapping[str, Any], data: bytes = b"") -> bytes:
    """Return the bytes of a safetensors file with this header, unchanged."""
    if isinstance(text, Mapping):
        text = json.dumps(text)
    raw = text if isinstance(text, bytes) else text.encode()
    return len(raw).to_bytes(8, "little") + raw + data


def codes(data: bytes) -> list[str]:
    """Return the codes with which a file is refused; empty if the file is read."""
    try:
        read_header(Memory(data))
    except CheckpointError as error:
        return [finding.code for finding in error.findings]
    return []


# --- against the safetensors library -------------------------------------------------------------


def library_refuses(data: bytes) -> bool:
    try:
        library.deserialize(data)
    except library.SafetensorError:
        return True
    return False


def known_to_the_library() -> list[str]:
    """Return the dtypes that the installed version of the library knows."""
    return [
        dtype
        for dtype, bits in BITS.items()
        if not library_refuses(
            packed(
                {"a": {"dtype": dtype, "shape": [4], "data_offsets": [0, bits // 2]}},
                bytes(bits // 2),
            )
        )
    ]


DTYPES = known_to_the_library()
MANY: list[Any] = [
    {},
    [],
    None,
    True,
    "",
    "F32",
    0,
    1,
    -1,
    2.0,
    0.5,
    10**19,
    10**25,
    [0],
    [1, 1],
    ["a"],
]
FORMS: list[Callable[[Any], str]] = [
    json.dumps,
    lambda value: json.dumps(value, separators=(",", ":")),
    lambda value: json.dumps(value, indent=1, ensure_ascii=False),
    lambda value: json.dumps(value) + " \t\r\n",
]


PLAIN_NAMES = [*"abcdefg"]
ODD_NAMES = ["a", "b", "vera_A", "ä\U0001f600", '"\\\n', "", "layers.0"]


def random_document(rng: Random, names: Sequence[str] = ODD_NAMES) -> tuple[dict[str, Any], int]:
    """Return a valid header with up to six tensors in any order, and the size of the data."""
    document: dict[str, Any] = {}
    size = 0
    for name in rng.sample(names, rng.randrange(7)):
        dtype = rng.choice(DTYPES)
        shape = [rng.choice([0, 1, 2, 4, 8]) for _ in range(rng.randrange(4))] + [4]
        end = size + int(np.prod(shape)) * BITS[dtype] // 8
        document[name] = {"dtype": dtype, "shape": shape, "data_offsets": [size, end]}
        size = end
    items = rng.sample([*document.items()], len(document))
    if rng.random() < 0.5:
        items.insert(rng.randrange(len(items) + 1), ("__metadata__", {"format": "pt", "ä": "\n"}))
    return dict(items), size


def change_somewhere(rng: Random, document: dict[str, Any]) -> None:
    """Change a value, a number or a key anywhere in the document."""
    at: Any = document
    while True:
        keys = [*at] if isinstance(at, dict) else [*range(len(at))]
        if not keys:
            return
        key = rng.choice(keys)
        if not isinstance(at[key], dict | list) or rng.random() < 0.2:
            break
        at = at[key]
    if type(at[key]) is int and rng.random() < 0.6:
        at[key] += rng.choice([-8, -4, -1, 1, 4, 8, 1 << 62, 1 << 63])
    elif isinstance(at, dict) and rng.random() < 0.4:
        at[rng.choice(["dtype", "shape", "data_offsets", "__metadata__", "extra"])] = at.pop(key)
    else:
        at[key] = deepcopy(rng.choice([*MANY, *DTYPES, "F33"]))


def change_text(rng: Random, data: bytes) -> bytes:
    """Change single bytes of the file, or cut out or repeat a piece."""
    place, length = rng.randrange(len(data)), rng.choice([1, 1, 2, 30])
    piece = rng.choice(
        [b"", bytes([rng.randrange(256)]), data[place : place + length] * 2, b'"', b","]
    )
    changed = data[:place] + piece + data[place + length :]
    return packed(changed[8:]) if rng.random() < 0.5 else changed


def test_every_file_that_the_library_refuses_is_refused() -> None:
    rng = Random(0)
    kept, refused = 0, 0
    for _ in range(2_000):
        document, size = random_document(rng)
        for _ in range(rng.randrange(3)):
            change_somewhere(rng, document)
        data = packed(
            rng.choice(FORMS)(document), bytes(max(0, size + rng.choice([0] * 9 + [-1, 1])))
        )
        if rng.random() < 0.3:
            data = change_text(rng, data)
        if library_refuses(data):
            assert codes(data), data
            refused += 1
        elif not codes(data):
            kept += 1
    assert kept > 300  # both kinds of files must occur
    assert refused > 300


def test_a_file_is_read_as_the_library_reads_the_file() -> None:
    rng = Random(1)
    for _ in range(500):
        document, size = random_document(rng)
        data = packed(rng.choice(FORMS)(document), rng.randbytes(size))
        found = TensorFile(Memory(data))
        expected = dict(library.deserialize(data))
        assert found.header.metadata == document.get("__metadata__", {})
        assert [*found.header.tensors] == [name for name in document if name != "__metadata__"]
        assert found.header.tensors.keys() == expected.keys()
        for name, info in found.header.tensors.items():
            assert (info.dtype, [*info.shape]) == (expected[name]["dtype"], expected[name]["shape"])
            assert b"".join(map(bytes, found.blocks(name, 3))) == expected[name]["data"]


def test_the_fast_path_for_plain_entries_gives_the_same_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = Random(2)
    quick = 0
    for _ in range(1_000):
        document, size = random_document(rng, PLAIN_NAMES)
        document = dict(sorted(document.items()))  # the metadata come first
        for _ in range(rng.choice([0, 0, 1])):
            change_somewhere(rng, document)
        data = packed(rng.choice(FORMS)(document), bytes(size))
        if rng.random() < 0.3:
            data = change_text(rng, data)
        with monkeypatch.context() as patch:
            patch.setattr(header, "_cut_plain", lambda text: (text, []))
            slow = outcome(data)
        assert outcome(data) == slow, data
        quick += bool(header._cut_plain(data[8 : len(data) - size])[1])
    assert quick > 300


def outcome(data: bytes) -> object:
    try:
        found = read_header(Memory(data))
    except CheckpointError as error:
        return sorted(map(str, error.findings))
    return dict(found.tensors), found.metadata


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_of_dtypes_equals_the_library_s(dtype: str) -> None:
    pairs = [(dtype, other) for other in NUMPY_DTYPE if dtype in NUMPY_DTYPE and other in DTYPES]
    for pair in pairs:
        tensors = {
            name: np.zeros(2, NUMPY_DTYPE[kind]) for name, kind in zip("ab", pair, strict=True)
        }
        written = [from_array(name, array) for name, array in tensors.items()]
        assert save(tensors) == header_bytes(written, {}) + bytes(sum(t.nbytes for t in written))


def test_a_written_file_has_the_bytes_of_the_library_s(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    kinds = [kind for name, kind in NUMPY_DTYPE.items() if name in DTYPES]
    names = [
        "base_model.vera_A",
        'quote " backslash \\ slash /',
        "control \x00\x01\x1f\x7f\b\f\n\r\t",
        "größe 模型 \U0001f600",
        "\ue000 private",
        "\uffff last of the plane",
        "\U00010000 first of the next",
        "line \u2028 separators \u2029",
        "",
        "a",
        "a.b",
        "a-b",
        "B",
    ]
    tensors: dict[str, Any] = {}
    for number, kind in enumerate(kinds):
        for name in names:
            shape = [(3, 4), (0, 4), (), (7,), (1, 2, 3)][(number + len(name)) % 5]
            raw = rng.integers(0, 2, shape).astype(kind)
            tensors[f"{name}{number % 4}.{number}"] = raw
    metadata = {'fo"rmat\\': "pt ü\n\x01\U0001f600"}
    save_file(tensors, tmp_path / "theirs", metadata)
    theirs = (tmp_path / "theirs").read_bytes()

    shuffled = Random(4).sample([*tensors.items()], len(tensors))
    data = [from_array(name, array) for name, array in shuffled]
    digest = write_tensors(tmp_path / "ours", data, metadata)
    assert (tmp_path / "ours").read_bytes() == theirs
    assert digest == hashlib.sha256(theirs).hexdigest()

    with open_local(tmp_path / "theirs") as source:
        file = TensorFile(source)
        assert (
            header_bytes([*file.header.tensors.values()], file.header.metadata) == file.header.raw
        )
        assert theirs.startswith(file.header.raw)
        assert len(file.header.raw) == file.header.data_start
        copies = [from_file(file, name) for name in file.header.tensors]
        assert write_tensors(tmp_path / "copy", copies, file.header.metadata) == digest


def test_untouched_files_of_peft_give_the_same_header(fixtures: Path, minilm: Path) -> None:
    paths = [*fixtures.rglob("*.safetensors"), *minilm.rglob("*.safetensors")]
    assert len(paths) > 50
    for path in paths:
        with open_local(path) as source:
            found = read_header(source)
        assert header_bytes([*found.tensors.values()], found.metadata) == found.raw


@given(
    st.dictionaries(
        st.text(), st.tuples(st.sampled_from(DTYPES), st.lists(st.sampled_from([0, 4, 8])))
    ).map(lambda found: {name: info for name, info in found.items() if name != "__metadata__"}),
    st.dictionaries(st.text(), st.text()),
)
def test_a_written_header_is_read_back_by_both(
    tensors: dict[str, tuple[str, list[int]]], metadata: dict[str, str]
) -> None:
    infos = []
    for name, (dtype, sizes) in tensors.items():
        shape = (*sizes[:3], 4)
        infos.append(TensorInfo(name, dtype, shape, 0, int(np.prod(shape)) * BITS[dtype] // 8))
    data = header_bytes(infos, metadata) + bytes(sum(info.nbytes for info in infos))
    assert not library_refuses(data)
    found = read_header(Memory(data))
    assert found.data_start % 8 == 0
    assert found.metadata == metadata
    assert {(i.name, i.dtype, i.shape) for i in found.tensors.values()} == {
        (i.name, i.dtype, i.shape) for i in infos
    }


def test_several_metadata_keys_are_sorted() -> None:
    metadata = {"format": "pt", "a": "1", "ä": "2", "B": "3"}
    text = header_bytes([], metadata)[8:]
    assert text.rstrip() == '{"__metadata__":{"B":"3","a":"1","format":"pt","ä":"2"}}'.encode()


# --- reading a header ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2, 0], "data_offsets": [0, 0]},
        {"dtype": "F4", "shape": [2, 3], "data_offsets": [0, 3]},
        {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]},
        {"dtype": "BF16", "shape": [1] * 32, "data_offsets": [0, 2]},
    ],
)
def test_an_unusual_but_valid_header_is_read(entry: dict[str, Any]) -> None:
    data = packed({"a\x1b[31m": entry}, bytes(entry["data_offsets"][1]))
    (info,) = read_header(Memory(data)).tensors.values()
    assert (info.name, info.dtype, [*info.shape]) == ("a\x1b[31m", entry["dtype"], entry["shape"])


def test_a_file_without_tensors_is_read() -> None:
    found = read_header(Memory(packed("{}\r \t\n")))
    assert (found.tensors, found.metadata, found.data_start) == ({}, {}, 14)


def test_a_header_takes_one_read_or_two() -> None:
    small = Memory(packed({"a": {"dtype": "U8", "shape": [9], "data_offsets": [0, 9]}}, bytes(9)))
    read_header(small)
    assert small.reads == [(0, small.size)]
    entries = {f"{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(2_000)}
    large = Memory(packed(entries))
    assert len(read_header(large).tensors) == 2_000
    assert large.reads == [(0, 32_768), (32_768, large.size - 32_768)]


def test_a_claimed_length_is_compared_with_the_file_before_any_further_read() -> None:
    for length in (2**64 - 1, 2**63, 99_999_999, 3):
        file = Memory(length.to_bytes(8, "little") + b"{}")
        with pytest.raises(CheckpointError):
            read_header(file)
        assert file.reads == [(0, 10)]


def test_all_defects_are_reported_together_with_their_places() -> None:
    document = {
        "__metadata__": {"epoch": 1},
        "a": None,
        "b\u202e": {"dtype": "F31", "shape": [-1], "data_offsets": [0], "extra": 1},
        "c": {"dtype": "F32"},
        "d": {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]},
        "e": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
    }
    with pytest.raises(CheckpointError) as caught:
        read_header(Memory(packed(document, bytes(4))))
    found = [(finding.code, finding.place) for finding in caught.value.findings]
    b = 'remote.safetensors tensor "b\\u202e"'
    assert found == [
        ("V040", "remote.safetensors"),
        ("V041", 'remote.safetensors tensor "a"'),
        ("V043", b),
        ("V044", b),
        ("V045", b),
        ("V048", b),
        ("V042", 'remote.safetensors tensor "c"'),
        ("V042", 'remote.safetensors tensor "c"'),
        ("V049", 'remote.safetensors tensor "d"'),
    ]


def test_findings_are_counted_beyond_fifty() -> None:
    entry = {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}
    with pytest.raises(CheckpointError) as caught:
        read_header(Memory(packed({f"{i}": entry for i in range(1_000)}, bytes(8))))
    assert [finding.code for finding in caught.value.findings] == ["V050"] * 50
    assert "(949 more defects of this header are not listed.)" in str(caught.value.findings[-1])


def test_many_entries_take_no_quadratic_time() -> None:
    def seconds(count: int, form: Callable[[Any], str]) -> float:
        document = {
            f"layers.{i}.q_proj.vera_lambda_b": {
                "dtype": "F32",
                "shape": [4],
                "data_offsets": [16 * i, 16 * i + 16],
            }
            for i in range(count)
        }
        file = Memory(packed(form(document), bytes(16 * count)))
        gc.disable()  # a garbage collection would visit every object of earlier tests
        try:
            start = time.process_time()
            assert len(read_header(file).tensors) == count
            return time.process_time() - start
        finally:
            gc.enable()

    for form in FORMS[1:3]:  # the fast path and the slow path
        few, many = (min(seconds(count, form) for _ in range(3)) for count in (2_000, 20_000))
        assert many < 40 * few  # quadratic time would be 100 times longer


# --- reading tensors -----------------------------------------------------------------------------


def samples() -> Iterator[tuple[str, Any]]:
    for name, dtype in NUMPY_DTYPE.items():
        if name in DTYPES:
            yield name, np.random.default_rng(5).integers(0, 2, (5, 3)).astype(dtype)


def test_tensors_come_in_their_own_dtype(tmp_path: Path) -> None:
    tensors = dict(samples())
    save_file(tensors, tmp_path / "file")
    with open_local(tmp_path / "file") as source:
        file = TensorFile(source)
        for name, array in tensors.items():
            assert file.header.tensors[name].dtype == name
            found = from_file(file, name).array()
            assert found.dtype == array.dtype
            assert found.flags.c_contiguous
            assert found.flags.writeable
            assert found.tobytes() == array.tobytes()
    assert {
        "F32",
        "F64",
        "F16",
        "BF16",
        "F8_E4M3",
        "F8_E5M2",
        "BOOL",
        "I64",
        "U8",
    } <= tensors.keys()


def test_bfloat16_keeps_its_bits(tmp_path: Path) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    write_tensors(tmp_path / "file", [from_array("a", bits.view(ml_dtypes.bfloat16))], {})
    with open_local(tmp_path / "file") as source:
        np.testing.assert_array_equal(
            from_file(TensorFile(source), "a").array().view(np.uint16), bits
        )


def test_a_missing_tensor_is_an_error(tmp_path: Path) -> None:
    save_file({"a": np.zeros((5, 3))}, tmp_path / "file")
    with open_local(tmp_path / "file") as source, pytest.raises(KeyError):
        from_file(TensorFile(source), "c")


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_empty_tensors_have_no_bytes_to_read(tmp_path: Path, shape: tuple[int, ...]) -> None:
    save_file({"a": np.zeros(shape, np.float32)}, tmp_path / "file")
    with open_local(tmp_path / "file") as source:
        file = TensorFile(source)
        assert from_file(file, "a").array().shape == shape
        assert [*file.blocks("a")] == []


def test_packed_values_are_copied_but_not_decoded(tmp_path: Path) -> None:
    header = {"a": {"dtype": "F4", "shape": [2, 3], "data_offsets": [0, 3]}}
    (tmp_path / "file").write_bytes(packed(header, b"abc"))
    with open_local(tmp_path / "file") as source:
        file = TensorFile(source)
        tensor = from_file(file, "a")
        with pytest.raises(CheckpointError, match=r'V206 .*tensor "a": its dtype is F4'):
            tensor.array()
        write_tensors(tmp_path / "copy", [tensor], {})
    assert split_and_parsed(tmp_path / "copy") == (header, b"abc")


def split_and_parsed(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def test_a_tensor_read_while_the_file_changes_is_refused(tmp_path: Path) -> None:
    save_file({"a": np.zeros(9)}, tmp_path / "file")
    with open_local(tmp_path / "file") as source:
        file = TensorFile(source)
        os.utime(tmp_path / "file", ns=(0, 0))
        with pytest.raises(SurroundingsError, match="changed while it was read"):
            [*file.blocks("a")]


# --- writing -------------------------------------------------------------------------------------


def test_arrays_are_stored_in_c_order_little_endian(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    forms = [array, np.asfortranarray(array), array.astype(">f4"), np.repeat(array, 2, 1)[:, ::2]]
    for number, form in enumerate(forms):
        write_tensors(tmp_path / f"{number}", [from_array("a", form)], {"format": "pt"})
        np.testing.assert_array_equal(load_file(tmp_path / f"{number}")["a"], array)


def test_values_are_cast_to_the_dtype_to_store() -> None:
    tensor = from_array("a", np.array([[1.0, 1 / 3]]), "BF16")
    assert (tensor.dtype, tensor.shape, tensor.nbytes) == ("BF16", (1, 2), 4)
    expected = np.array([[1.0, 1 / 3]]).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(tensor.array(), expected)


@pytest.mark.parametrize("given", [b"1234567", b"123456789", b""])
def test_a_tensor_that_gives_another_number_of_bytes_is_refused(
    tmp_path: Path, given: bytes
) -> None:
    tensor = TensorData("a", "F32", (2,), lambda: iter((given,)))
    with pytest.raises(ValueError, match=f"a gave {len(given)} of 8 bytes"):
        write_tensors(tmp_path / "file", [tensor], {})


def test_names_are_unique_and_files_new(tmp_path: Path) -> None:
    tensor = from_array("a", np.zeros(1))
    with pytest.raises(ValueError, match="same name"):
        write_tensors(tmp_path / "file", [tensor, tensor], {})
    (tmp_path / "old").write_bytes(b"kept")
    with pytest.raises(FileExistsError):
        write_tensors(tmp_path / "old", [tensor], {})
    assert (tmp_path / "old").read_bytes() == b"kept"


def test_the_library_opens_a_written_file(tmp_path: Path) -> None:
    tensors = dict(samples())
    data = [from_array(name, array) for name, array in tensors.items()]
    write_tensors(tmp_path / "file", data, {"format": "pt", "vera_convert.projection": "{}"})
    with library.safe_open(tmp_path / "file", "np") as file:
        assert file.metadata() == {"format": "pt", "vera_convert.projection": "{}"}
        assert {*file.keys()} == tensors.keys()
        np.testing.assert_array_equal(file.get_tensor("F32"), tensors["F32"])


# --- spoiled adapters ----------------------------------------------------------------------------


def read_all(folder: Path) -> list[str]:
    """Return the codes with which the readers refuse the config and the weights of an adapter."""
    found: list[str] = []
    try:
        config = folder / "adapter_config.json"
        with open_local(config, within=folder) as source:
            read_json(source, limit=1_000_000)
    except SurroundingsError:
        found.append(CONFIG_MISSING.code)
    except CheckpointError as error:
        found += [finding.code for finding in error.findings]
    pickled = pickled_weights(folder)
    found += [pickled.code] if pickled else []
    missing = pickled.rule if pickled else WEIGHTS_MISSING
    try:
        weights = folder / "adapter_model.safetensors"
        with open_local(weights, within=folder) as source:
            read_header(source)
    except SurroundingsError:
        found.append(missing.code)
    except CheckpointError as error:
        found += [finding.code for finding in error.findings]
    return found


def test_good_adapters_are_read(tmp_path: Path) -> None:
    assert read_all(good_adapter(tmp_path / "embedded")) == []
    assert read_all(good_adapter(tmp_path / "stripped", stripped=True)) == []
    assert "base_model.vera_A" in split_weights(tmp_path / "embedded")[0]


OF_FOLDERS = ("V007", "V014", "V015", "V016", "V017", "V018", "V008", "V019")
"""Codes about several files, which no reader of a single file reports."""

OF_FILES = [
    case
    for case in DEFECTS
    if case.code < "V1" and case.code not in OF_FOLDERS and case.on == "adapter" and case.possible
]


@pytest.mark.parametrize("case", OF_FILES, ids=lambda case: case.name)
def test_a_spoiled_adapter_is_refused_for_its_defect(tmp_path: Path, case: Defect) -> None:
    folder = good_adapter(tmp_path / "adapter")
    case.spoil(folder)
    start = time.process_time()
    found = read_all(folder)
    assert {*found} - ({"V011"} if case.code == "V010" else set()) == {case.code}
    assert time.process_time() - start < 5
