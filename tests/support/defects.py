"""Defects of a good adapter, each made by code, so the repository holds no hostile file.

A defect is a function that spoils the good adapter in a folder. The defect's code names the one
rule that the spoiled adapter breaks. The name of the function names the change.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import shutil
import socket
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

Spoiler = Callable[[Path], None]


@dataclass(frozen=True, slots=True)
class Defect:
    """A way to spoil a folder, and the code of the rule that the spoiled folder breaks.

    Attributes:
    on: the content of the good folder: an adapter, or a base model.
    posix: whether the defect needs pipes, sockets or links that an ordinary user of Windows cannot
    make.
    """

    code: str
    spoil: Spoiler
    on: str = "adapter"
    posix: bool = False

    @property
    def name(self) -> str:
        """The name of the test: the code and the name of the function."""
        return f"{self.code}-{self.spoil.__name__}"

    @property
    def possible(self) -> bool:
        """Whether this system can make the defect."""
        return os.name == "posix" or not self.posix


DEFECTS: list[Defect] = []


def defect(code: str, *, on: str = "adapter", posix: bool = False) -> Callable[[Spoiler], Spoiler]:
    """Register a function as a defect that breaks the rule `code`."""

    def register(spoil: Spoiler) -> Spoiler:
        DEFECTS.append(Defect(code, spoil, on, posix))
        return spoil

    return register


def _register(code: str, cases: Mapping[str, Any], make: Callable[[Any], Spoiler]) -> None:
    """Register one defect for each case of a table, under the name that the table gives."""
    for name, case in cases.items():
        spoil = make(case)
        spoil.__name__ = name
        defect(code)(spoil)


# --- functions that make a spoiler ---------------------------------------------------------------


def edit_config(folder: Path, edit: Callable[[bytes], bytes]) -> None:
    path = folder / CONFIG
    path.write_bytes(edit(path.read_bytes()))


def split_weights(folder: Path) -> tuple[dict[str, Any], bytes]:
    """Return the header of the weights as plain JSON, and the data part."""
    raw = (folder / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def join_weights(folder: Path, header: bytes | Mapping[str, Any], data: bytes) -> None:
    """Write a header and data unchanged, after the right length of the header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data)


def edit_header_text(edit: Callable[[bytes], bytes]) -> Spoiler:
    """Return a spoiler that changes the text of the header."""

    def spoil(folder: Path) -> None:
        header, data = split_weights(folder)
        join_weights(folder, edit(json.dumps(header).encode()), data)

    return spoil


def edit_entry(**fields: Any) -> Spoiler:
    """Return a spoiler that changes fields of one tensor's entry; `...` deletes the field."""

    def spoil(folder: Path) -> None:
        header, data = split_weights(folder)
        entry = header[_any_name(header)]
        entry.update(fields)
        for field in [field for field, value in fields.items() if value is ...]:
            del entry[field]
        join_weights(folder, header, data)

    return spoil


def replace_entry(entry: object) -> Spoiler:
    """Return a spoiler that replaces a tensor's entry."""

    def spoil(folder: Path) -> None:
        header, data = split_weights(folder)
        header[_any_name(header)] = entry
        join_weights(folder, header, data)

    return spoil


def append_tensors(*entries: tuple[str, list[int], int, int], fill: int = 0) -> Spoiler:
    """Return a spoiler that appends an entry; begin and end count from the last byte."""

    def spoil(folder: Path) -> None:
        header, data = split_weights(folder)
        for number, (dtype, shape, begin, end) in enumerate(entries):
            offsets = [len(data) + begin, len(data) + end]
            header[f"more.{number}"] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        join_weights(folder, header, data + bytes(fill))

    return spoil


def _any_name(header: Mapping[str, Any]) -> str:
    return next(name for name in header if name.endswith("vera_lambda_b"))


def replace_weights(content: bytes) -> Spoiler:
    """Return a spoiler that replaces the weight file by these bytes."""
    return lambda folder: _ignore((folder / WEIGHTS).write_bytes(content))


def replace_config(content: bytes) -> Spoiler:
    """Return a spoiler that replaces the config by these bytes."""
    return lambda folder: _ignore((folder / CONFIG).write_bytes(content))


def _ignore(_: object) -> None:
    return None


def with_field(text: bytes) -> Spoiler:
    """Return a spoiler that adds the text of a field to the config."""
    return lambda folder: edit_config(folder, lambda old: b"{" + text + b"," + old[1:])


def _outside(folder: Path, name: str) -> Path:
    """Move a file out of its folder, and return the new path."""
    target = folder.with_name(folder.name + "-outside")
    target.mkdir()
    return Path(shutil.move(folder / name, target / name))


# --- V0: opening ---------------------------------------------------------------------------------


@defect("V001")
def config_is_a_folder(folder: Path) -> None:
    (folder / CONFIG).unlink()
    (folder / CONFIG).mkdir()


@defect("V001")
def weights_are_a_folder(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


@defect("V001", posix=True)
def config_is_a_pipe(folder: Path) -> None:
    (folder / CONFIG).unlink()
    os.mkfifo(folder / CONFIG)


@defect("V001", posix=True)
def weights_are_a_pipe(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


@defect("V001", posix=True)
def weights_are_a_socket(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(folder)  # the path of a socket has 108 bytes at most
        try:
            server.bind(WEIGHTS)
        finally:
            os.chdir(here)


@defect("V011", posix=True)
def weights_are_a_link_to_themselves(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(WEIGHTS)


@defect("V002", posix=True)
def config_links_out_of_the_folder(folder: Path) -> None:
    target = _outside(folder, CONFIG)
    (folder / CONFIG).symlink_to(Path("..") / target.parent.name / CONFIG)


@defect("V002", posix=True)
def weights_link_out_of_the_folder(folder: Path) -> None:
    (folder / WEIGHTS).symlink_to(_outside(folder, WEIGHTS))


@defect("V002", posix=True)
def weights_link_to_an_endless_device(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("/dev/zero")


@defect("V002", posix=True)
def weights_link_out_through_a_folder(folder: Path) -> None:
    target = _outside(folder, WEIGHTS)
    (folder / "inside").symlink_to(target.parent)
    (folder / WEIGHTS).symlink_to(Path("inside") / WEIGHTS)


@defect("V003", posix=True)
def config_claims_a_terabyte(folder: Path) -> None:
    with (folder / CONFIG).open("r+b") as file:
        file.truncate(1 << 40)  # sparse: the file takes no room on the disk


@defect("V003")
def config_is_padded_beyond_a_megabyte(folder: Path) -> None:
    edit_config(folder, lambda old: old + b" " * 1_048_576)


_register("V004", {"config_is_empty": b""}, replace_config)
_register("V004", {"weights_are_empty": b""}, replace_weights)


def _shard_named(name: str) -> Spoiler:
    """Return a spoiler that changes the name of a shard in the index of a base."""

    def spoil(folder: Path) -> None:
        index = {"metadata": {"total_size": 0}, "weight_map": {"lm_head.weight": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return spoil


for _number, _name in enumerate(
    [
        "",
        "/etc/passwd",
        "../model.safetensors",
        "shards/../../model.safetensors",
        "..\\model.safetensors",
        "\\\\server\\share\\model.safetensors",
        "//server/share/model.safetensors",
        "C:model.safetensors",
        "C:/model.safetensors",
        "model.safetensors:stream",
        "model.safetensors\0.json",
        "model\n.safetensors",
        "./model.safetensors",
        "shards//model.safetensors",
        "shards/",
        "..",
    ]
):
    _spoil = _shard_named(_name)
    _spoil.__name__ = f"index_names_a_shard_unsafely_{_number}"
    defect("V005", on="base")(_spoil)


@defect("V010")
def config_is_missing(folder: Path) -> None:
    (folder / CONFIG).unlink()


@defect("V017")
def config_lies_in_a_subfolder(folder: Path) -> None:
    (folder / "default").mkdir()
    for name in (CONFIG, WEIGHTS):
        (folder / name).rename(folder / "default" / name)


@defect("V011")
def weights_are_missing(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


@defect("V011", posix=True)
def weights_link_to_nowhere(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("gone")


@defect("V012")
def weights_are_pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


@defect("V013")
def pickled_weights_lie_beside(folder: Path) -> None:
    (folder / "adapter_model.bin").write_bytes(b"\x80\x02.")


# --- V0: JSON ------------------------------------------------------------------------------------


@defect("V020")
def config_is_utf_16(folder: Path) -> None:
    edit_config(folder, lambda old: old.decode().encode("utf-16"))


_register(
    "V020",
    {
        "config_has_a_latin_1_letter": b'"note": "caf\xe9"',
        "config_has_an_overlong_letter": b'"note": "\xc0\xaf"',
        "config_has_an_encoded_surrogate": b'"note": "\xed\xa0\x80"',
    },
    with_field,
)
_register(
    "V020",
    {
        "header_is_not_utf_8": lambda text: text.replace(b"vera_lambda_b", b"vera_lambda_\xff", 1),
    },
    edit_header_text,
)


@defect("V021")
def config_has_a_byte_order_mark(folder: Path) -> None:
    edit_config(folder, lambda old: b"\xef\xbb\xbf" + old)


_register(
    "V022",
    {
        "config_is_blank": b" \n",
        "config_is_cut_off": b'{"r": 4, "peft_type": "VE',
        "config_is_a_python_literal": b"{'r': 4}",
        "config_has_a_comment": b'{"r": 4} // rank',
        "config_has_a_trailing_comma": b'{"r": 4,}',
        "config_has_two_documents": b'{"r": 4}{"r": 8}',
        "config_has_a_raw_line_break": b'{"note": "a\nb"}',
        "config_has_a_raw_nul": b'{"note": "a\0b"}',
        "config_has_a_leading_zero": b'{"r": 04}',
        "config_has_a_plus_sign": b'{"r": +4}',
        "config_has_a_bad_escape": b'{"note": "\\x41"}',
        "config_has_a_non_breaking_space": b'{\xc2\xa0"r": 4}',
    },
    replace_config,
)
_register(
    "V022",
    {
        "header_is_cut_off": lambda text: text[:-1],
        "header_is_padded_with_nul": lambda text: text + b"\0" * 8,
        "header_is_followed_by_another": lambda text: text + b"{}",
        "header_has_shapes_with_a_leading_zero": lambda text: text.replace(b"[4]", b"[04]"),
        "header_has_offsets_with_a_leading_zero": lambda text: re.sub(
            rb"(\d+), (\d+)\]", rb"\1, 0\2]", text
        ),
        "header_has_a_raw_line_break": lambda text: text.replace(b".layers.", b".lay\ners.", 1),
        "header_hides_a_broken_key_before_an_entry": lambda _: (
            b'{"__metadata__":{"k,":":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}":"v"}}'
        ),
    },
    edit_header_text,
)
_register(
    "V023",
    {
        "config_has_a_key_twice": b'"r": 8',
        "config_has_a_key_twice_by_escape": b'"\\u0072": 8',
        "config_has_a_nested_key_twice": b'"loftq_config": {"a": 1, "a": 1}',
    },
    with_field,
)
_register(
    "V023",
    {
        "header_has_a_tensor_twice": lambda text: (
            text[:-1] + b', "a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}' * 2 + b"}"
        ),
        "header_has_a_dtype_twice": lambda text: text.replace(
            b'"dtype": "F32"', b'"dtype": "F32", "dtype": "F32"', 1
        ),
        "header_has_metadata_twice": lambda text: b'{"__metadata__": {"format": "tf"}, ' + text[1:],
        "header_has_a_metadata_key_twice": lambda text: text.replace(
            b'"format": "pt"', b'"format": "pt", "format": "tf"', 1
        ),
    },
    edit_header_text,
)
_register(
    "V024",
    {
        "header_has_nan": lambda text: text.replace(b"[0, ", b"[NaN, ", 1),
        "header_has_infinity": lambda text: text.replace(b"[0, ", b"[Infinity, ", 1),
        "header_has_minus_infinity": lambda text: text.replace(b"[0, ", b"[-Infinity, ", 1),
    },
    edit_header_text,
)
_register(
    "V025",
    {
        "config_nests_lists": b'"a": ' + b"[" * 100_000 + b"]" * 100_000,
        "config_nests_objects": b'"a": ' + b'{"a": ' * 65 + b"1" + b"}" * 65,
        "config_nests_without_end": b'"a": ' + b'[{"a": ' * 50_000,
    },
    with_field,
)
_register(
    "V025",
    {
        "header_nests_lists": lambda text: text.replace(
            b'"shape": [', b'"shape": [' + b"[" * 1_000_000 + b"]" * 1_000_000 + b",", 1
        ),
    },
    edit_header_text,
)
_register(
    "V026",
    {
        "config_has_a_number_of_900000_digits": b'"seed": ' + b"9" * 900_000,
        "config_has_a_number_of_4301_digits": b'"seed": ' + b"9" * 4_301,
        "config_has_a_float_of_five_thousand_digits": b'"seed": 0.' + b"1" * 5_000,
    },
    with_field,
)
_register(
    "V026",
    {
        "header_has_a_number_of_65_digits": lambda text: text.replace(
            b"[0, ", b"[" + b"9" * 65 + b", ", 1
        ),
        "header_has_minus_zero": lambda text: text.replace(b"[0, ", b"[-0, ", 1),
        "header_has_an_offset_that_overflows": lambda text: text.replace(b"[0, ", b"[1e400, ", 1),
    },
    edit_header_text,
)
_register(
    "V027",
    {
        "config_has_half_a_character": b'"note": "\\ud83d"',
        "config_has_the_other_half": b'"note": ["\\uDE00\\ud83d"]',
        "config_has_half_a_character_in_a_key": b'"\\ud800": 1',
    },
    with_field,
)
_register(
    "V027",
    {
        "header_has_half_a_character": lambda text: text.replace(b".layers.", b".\\ud83d.", 1),
    },
    edit_header_text,
)
_register(
    "V028",
    {
        "header_has_millions_of_sizes": lambda text: text.replace(
            b'"shape": [', b'"shape": [' + b"1," * 4_000_000, 1
        ),
        "header_has_millions_of_texts": lambda _: b'{"a":[' + b'"[",' * 1_000_000 + b"0]}",
    },
    edit_header_text,
)


# --- V0: the safetensors file --------------------------------------------------------------------


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
    return buffer.getvalue()


_register(
    "V030",
    {
        "weights_are_a_git_lfs_pointer": (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n"
        )
    },
    replace_weights,
)
_register(
    "V031",
    {
        "weights_are_a_renamed_zip_of_pickles": _zip(),
        "weights_are_a_renamed_pickle": b"\x80\x02}q\x00X\x06\x00\x00\x00vera_Aq\x01K\x01s.",
    },
    replace_weights,
)
_register(
    "V032",
    {
        "weights_are_gguf": b"GGUF\x03\x00\x00\x00" + bytes(16) + b"\x01",
        "weights_are_a_web_page": b"<!DOCTYPE html><html><body>Sign in</body></html>",
        "weights_are_json": b'{"error": "Repository not found"}',
        "weights_are_compressed": gzip.compress(b"weights", mtime=1_700_000_000),
        "weights_are_a_numpy_array": b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'}",
    },
    replace_weights,
)
_register(
    "V033", {"weights_have_one_byte": b"\0", "weights_have_seven_bytes": bytes(7)}, replace_weights
)
_register(
    "V034",
    {
        "header_claims_all_of_64_bits": b"\xff" * 8 + b"{}",
        "header_claims_the_highest_bit": (1 << 63).to_bytes(8, "little") + b"{}",
        "header_claims_a_negative_length": (-2 & (1 << 64) - 1).to_bytes(8, "little") + b"{}",
    },
    replace_weights,
)


@defect("V034", posix=True)
def header_really_has_more_than_100_megabytes(folder: Path) -> None:
    with (folder / WEIGHTS).open("r+b") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(200_000_000)  # sparse: the file takes no room on the disk


@defect("V035")
def header_claims_more_than_the_file_has(folder: Path) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes((99_999_999).to_bytes(8, "little") + raw[8:])


@defect("V035")
def header_claims_one_byte_more_than_the_file_has(folder: Path) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes((len(raw) - 7).to_bytes(8, "little") + raw[8:])


@defect("V035")
def weights_are_cut_off_within_the_header(folder: Path) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(raw[:100])


_register(
    "V036",
    {
        "header_has_no_bytes": lambda _: b"",
        "header_begins_with_a_space": lambda text: b" " + text,
        "header_begins_with_a_line_break": lambda text: b"\n" + text,
        "header_begins_with_a_byte_order_mark": lambda text: b"\xef\xbb\xbf" + text,
        "header_is_a_list": lambda text: b"[" + text + b"]",
        "header_is_a_text": lambda _: b'"{}"',
    },
    edit_header_text,
)


def _with_metadata(value: object) -> Spoiler:
    return edit_header_text(
        lambda text: json.dumps({**json.loads(text), "__metadata__": value}).encode()
    )


_register(
    "V040",
    {
        "metadata_is_null": None,
        "metadata_is_a_text": "pt",
        "metadata_is_a_list": [["format", "pt"]],
        "metadata_has_a_number": {"format": "pt", "epoch": 3},
        "metadata_has_null": {"format": None},
        "metadata_has_an_object": {"format": {"name": "pt"}},
        "metadata_is_a_tensor": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]},
    },
    _with_metadata,
)
_register(
    "V041",
    {
        "entry_is_a_list": ["F32", [16], [0, 64]],  # serde reads the list as a whole entry
        "entry_is_null": None,
        "entry_is_a_text": "F32",
        "entry_is_a_number": 1,
        "entry_is_true": True,
    },
    replace_entry,
)
_register(
    "V042",
    {
        "entry_has_no_dtype": {"dtype": ...},
        "entry_has_no_shape": {"shape": ...},
        "entry_has_no_offsets": {"data_offsets": ...},
    },
    lambda fields: edit_entry(**fields),
)
_register(
    "V043",
    {
        "entry_has_a_scale": {"scale": 0.5},
        "entry_has_an_old_field": {"offsets": [0, 64]},
        "entry_has_a_nested_field": {"": {"dtype": "F32"}},
    },
    lambda fields: edit_entry(**fields),
)
_register(
    "V044",
    {
        "dtype_is_unheard_of": "F31",
        "dtype_is_in_lower_case": "f32",
        "dtype_is_torchs": "torch.float32",
        "dtype_is_numpys": "<f4",
        "dtype_is_empty": "",
        "dtype_is_a_number": 32,
        "dtype_is_null": None,
        "dtype_is_an_object": {"F32": None},  # serde reads the object as F32
        "dtype_is_a_list": ["F32"],
    },
    lambda dtype: edit_entry(dtype=dtype),
)
_register(
    "V045",
    {
        "shape_is_negative": [-16],
        "shape_is_fractional": [16.0],
        "shape_is_true": [True, 16],
        "shape_is_text": ["16"],
        "shape_is_null": None,
        "shape_is_a_number": 16,
        "shape_is_nested": [[16]],
        "shape_is_an_object": {"0": 16},
        "shape_has_33_dimensions": [1] * 32 + [16],
    },
    lambda shape: edit_entry(shape=shape),
)
_register(
    "V046",
    {
        "shape_overflows_64_bits": [2, (1 << 64) - 2],
        "shape_overflows_in_bytes": [2, (1 << 63) - 1],
        "shape_wraps_round_to_its_size": [(1 << 60) + 1, 16],
        "shape_is_empty_but_huge": [0, 1 << 62, 1 << 62],
        "shape_has_a_size_of_64_digits": [10**63],
    },
    lambda shape: edit_entry(shape=shape),
)
_register(
    "V047",
    {"values_of_4_bits_end_within_a_byte": ("F4", [3], 0, 2)}
    | {"values_of_6_bits_end_within_a_byte": ("F6_E2M3", [2, 3], 0, 5)},
    lambda entry: append_tensors(entry, fill=entry[3]),
)
_register(
    "V048",
    {
        "offsets_are_one": [64],
        "offsets_are_three": [0, 64, 64],
        "offsets_are_none": [],
        "offsets_are_reversed": [64, 0],
        "offsets_are_negative": [-64, 0],
        "offsets_are_fractional": [0.0, 64.0],
        "offsets_are_true": [False, True],
        "offsets_are_text": ["0", "64"],
        "offsets_are_null": None,
        "offsets_are_an_object": {"begin": 0, "end": 64},
    },
    lambda offsets: edit_entry(data_offsets=offsets),
)
_register(
    "V049",
    {
        "shape_is_smaller_than_the_span": {"shape": [2]},
        "shape_is_larger_than_the_span": {"shape": [1 << 40]},
        "shape_is_empty_but_the_span_is_not": {"shape": [0]},
        "dtype_is_narrower_than_the_span": {"dtype": "F16"},
        "dtype_is_wider_than_the_span": {"dtype": "F64"},
    },
    lambda fields: edit_entry(**fields),
)
_register(
    "V050",
    {
        "two_tensors_are_one": [("U8", [8], 0, 8)] * 2,
        "two_tensors_overlap_by_a_byte": [("U8", [8], 0, 8), ("U8", [8], 7, 15)],
        "a_tensor_lies_within_another": [("U8", [8], 0, 8), ("U8", [2], 2, 4)],
        "an_empty_tensor_lies_within_another": [("U8", [8], 0, 8), ("U8", [0], 4, 4)],
        "a_thousand_tensors_are_one": [("U8", [8], 0, 8)] * 1_000,
    },
    lambda entries: append_tensors(*entries, fill=max(entry[3] for entry in entries)),
)
_register(
    "V051",
    {
        "a_byte_before_a_tensor_is_hidden": [("U8", [8], 1, 9)],
        "a_byte_between_tensors_is_hidden": [("U8", [8], 0, 8), ("U8", [8], 9, 17)],
        "an_empty_tensor_lies_behind_a_gap": [("U8", [0], 8, 8)],
    },
    lambda entries: append_tensors(*entries, fill=entries[-1][3]),
)


@defect("V051")
def the_first_bytes_are_hidden(folder: Path) -> None:
    header, data = split_weights(folder)
    for name, entry in header.items():
        if name != "__metadata__":
            entry["data_offsets"] = [offset + 4 for offset in entry["data_offsets"]]
    join_weights(folder, header, bytes(4) + data)


def _cut(count: int) -> Spoiler:
    return lambda folder: os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - count)


_register("V052", {"the_last_byte_is_cut_off": 1, "half_is_cut_off": 500}, _cut)
_register(
    "V052",
    {"tensor_claims_an_exabyte": ("U8", [1 << 59], 0, 1 << 59)},
    lambda entry: append_tensors(entry, fill=1),
)


def _append(content: bytes) -> Spoiler:
    def spoil(folder: Path) -> None:
        with (folder / WEIGHTS).open("ab") as file:
            file.write(content)

    return spoil


_register(
    "V053",
    {"a_byte_is_appended": b"\0", "a_zip_archive_is_appended": _zip()},
    _append,
)


@defect("V053", posix=True)
def a_terabyte_is_appended(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, 1 << 40)  # sparse: the file takes no room on the disk


def _named(name: str) -> Spoiler:
    """Return a spoiler that gives one tensor another name."""

    def spoil(folder: Path) -> None:
        header, data = split_weights(folder)
        join_weights(
            folder, {name if k == _any_name(header) else k: v for k, v in header.items()}, data
        )

    return spoil


_register(
    "V054",
    {
        "a_name_has_a_million_letters": "a" * 1_000_000,
        "a_name_has_a_hundred_elements": "base_model.model." + "a." * 100 + "vera_lambda_b",
    },
    _named,
)
