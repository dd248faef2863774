"""Hostile quantized bases: every command ends with a code, soon and with little memory."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commandline import Ended, Run
from folders import DATA
from limits import LIMIT_SECONDS, in_memory, in_time

from vera_convert.base.model import read_base
from vera_convert.base.quantized.layer import PackedWeight
from vera_convert.base.quantized.unpack import unpacked
from vera_convert.hub.lookup import HubAccess, Location

FIXTURES = DATA / "quantized"
NAMES = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir())
CODE = re.compile(r"\bV\d\d\d\b")
LONG = 1 << 31
"""The number of values in a row that no command may hold in memory."""


@dataclass
class Weights:
    """The weight file of a base, which a test changes and writes again.

    Attributes:
    packed: the first quantized weight.
    header: the dtype and the shape of each tensor.
    metadata: the metadata.
    data: the bytes of each tensor.
    sizes: the number of bytes of each tensor in the new file; a hole follows shorter `data`.
    settings: the quantization_config of the base.
    """

    packed: PackedWeight
    header: dict[str, dict[str, Any]]
    metadata: dict[str, str]
    data: dict[str, bytes]
    settings: dict[str, Any]
    sizes: dict[str, int] = field(default_factory=dict)

    def set(self, name: str, shape: list[int], size: int) -> None:
        """Change a tensor's shape, and the number of bytes to match."""
        self.header[name]["shape"] = shape
        self.data[name] = self.data[name][:size]
        self.sizes[name] = size


def read(folder: Path) -> Weights:
    base = read_base(Location("base", folder), HubAccess(offline=True))
    weight = next(iter(unpacked(base).weights.values()))
    raw = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    data = {}
    for name, info in header.items():
        begin, end = info.pop("data_offsets")
        data[name] = raw[8 + length + begin : 8 + length + end]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return Weights(weight, header, metadata, data, config["quantization_config"])


def write(weights: Weights, folder: Path) -> None:
    end, header = 0, dict[str, Any](__metadata__=weights.metadata)
    for name, info in weights.header.items():
        begin, end = end, end + weights.sizes.get(name, len(weights.data[name]))
        header[name] = {**info, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, data in weights.data.items():
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            file.write(data)
        file.truncate(8 + len(text) + end)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = weights.settings
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


# --- hostile changes -----------------------------------------------------------------------------


def the_parts_are_bytes_of_ones(weights: Weights) -> None:
    """Set all bits: scales become NaN, group numbers become -1, and states are not JSON."""
    for part in weights.packed.parts:
        weights.data[part] = b"\xff" * len(weights.data[part])


def the_packed_values_claim_more_than_the_file_has(weights: Weights) -> None:
    weights.header[weights.packed.main]["shape"][0] <<= 30


def the_packed_values_have_a_billion_rows(weights: Weights) -> None:
    name = weights.packed.main
    shape = weights.header[name]["shape"]
    weights.set(name, [shape[0] << 24, *shape[1:]], len(weights.data[name]) << 24)


def every_other_part_is_a_million_times_longer(weights: Weights) -> None:
    for name in weights.packed.parts:
        shape = weights.header[name]["shape"] or [1]
        if name != weights.packed.main:
            weights.set(name, [shape[0] << 20, *shape[1:]], len(weights.data[name]) << 20)


def a_text_is_no_json(weights: Weights) -> None:
    """Spoil the text that describes the weight, or the bytes of all other parts."""
    if weights.packed.name in weights.metadata:
        weights.metadata[weights.packed.name] = "{" * 100_000
        return
    for name in weights.packed.parts:
        if name != weights.packed.main:
            weights.data[name] = (b"{" * len(weights.data[name]))[: len(weights.data[name])]
            weights.header[name]["dtype"] = "I8" if "scale" in name else "BOOL"
            weights.header[name]["shape"] = [len(weights.data[name])]


def the_settings_name_groups_of_one(weights: Weights) -> None:
    """Declare a scale for each value, in the settings, the state or the metadata."""
    number = re.compile(r'"((?:group|block)_?size|bits|num_bits)": ?-?\d+')
    lists = re.compile(r'"(\w*block_s\w+)": ?\[[^\]]*\]')

    def changed(text: str) -> str:
        return lists.sub(r'"\1": [1, 1]', number.sub(r'"\1": 1', text))

    weights.settings = json.loads(changed(json.dumps(weights.settings)))
    weights.metadata = {key: changed(text) for key, text in weights.metadata.items()}
    for name in weights.packed.parts:
        if "quant_state" in name:
            text = changed(weights.data[name].decode()).encode()
            weights.set(name, [len(text)], len(text))
            weights.data[name] = text


CHANGES: tuple[Callable[[Weights], None], ...] = (
    the_parts_are_bytes_of_ones,
    the_packed_values_claim_more_than_the_file_has,
    the_packed_values_have_a_billion_rows,
    every_other_part_is_a_million_times_longer,
    a_text_is_no_json,
    the_settings_name_groups_of_one,
)
WITHOUT_GROUPS = ("bnb-int8", "mxfp4", "ct-fp8")
"""Fixtures whose settings hold no group size."""


def ended_well(ended: Ended) -> Ended:
    assert "Traceback" not in ended.out + ended.err
    return ended


def changed_base(name: str, change: Callable[[Weights], None], folder: Path) -> Path:
    """Write a changed copy of a fixture's base, and return the copy's folder."""
    base = Path(shutil.copytree(FIXTURES / name / "base", folder))
    weights = read(base)
    change(weights)
    write(weights, base)
    return base


def assert_refused(name: str, base: Path, run: Run, out: Path) -> Ended:
    """Check that all commands end, and that a merge is refused with a code and writes nothing."""
    adapter = FIXTURES / name / "adapter"
    with in_time(), in_memory():
        for command in ("validate", "info"):
            ended = ended_well(run(command, adapter, "--base", base, "--offline"))
            assert ended.status in (0, 1)
            assert command == "info" or CODE.search(ended.out + ended.err)
        ended = ended_well(
            run("merge", adapter, out, "--base", base, "--offline", "--dequantize", "--jobs", "1")
        )
    assert ended.status == 1
    assert CODE.search(ended.err)
    assert not out.exists()
    return ended


@pytest.mark.parametrize(
    ("name", "change"),
    [
        pytest.param(name, change, id=f"{name}-{change.__name__}")
        for name in NAMES
        for change in CHANGES
        if change is not the_settings_name_groups_of_one or not name.startswith(WITHOUT_GROUPS)
    ],
)
def test_a_hostile_base_is_refused_with_a_code(
    name: str, change: Callable[[Weights], None], tmp_path: Path, run: Run
) -> None:
    base = changed_base(name, change, tmp_path / "base")
    assert_refused(name, base, run, tmp_path / "out")


# --- lists in the settings -----------------------------------------------------------------------

MANY = 100_000
SLOW = r"(.|.)+#"
NEVER = {"bits": 4, "targets": ["Linear"], "weights": [{}]}
LISTS: tuple[tuple[str, str, object], ...] = (
    ("gptq-8bit", "dynamic", {f"-:.*{number}x": {} for number in range(MANY)}),
    ("awq-gemm", "dynamic", {SLOW: {}, f"+:{SLOW}": None}),
    ("awq-gemm", "modules_to_not_convert", [*map(str, range(MANY)), "", "."]),
    ("awq-gemm", "modules_to_not_convert", [SLOW, "(", "["]),
    (
        "ct-fp8-channel",
        "config_groups",
        {f"{n}": {**NEVER, "targets": [f"re:.*{n}", f"a.{n}"]} for n in range(MANY)},
    ),
    ("ct-fp8-channel", "config_groups", {"a": {**NEVER, "targets": [f"re:{SLOW}", [[SLOW]]]}}),
)


@pytest.mark.parametrize("number", range(len(LISTS)))
def test_hostile_lists_end_in_little_time_and_memory(number: int, tmp_path: Path, run: Run) -> None:
    name, field_name, value = LISTS[number]

    def change(weights: Weights) -> None:
        weights.settings[field_name] = value

    base, adapter = changed_base(name, change, tmp_path / "base"), FIXTURES / name / "adapter"
    for command in (("validate", adapter), ("merge", adapter, tmp_path / "out", "--dequantize")):
        before = sum(os.times()[:4])  # CPU time, which other load on the machine does not change
        with in_memory():
            ended = ended_well(run(*command, "--base", base, "--offline"))
        assert sum(os.times()[:4]) - before < LIMIT_SECONDS
        assert ended.status == 0 or CODE.search(ended.out + ended.err)


# --- rows that do not fit into memory ------------------------------------------------------------


def wide_nf4(weights: Weights) -> None:
    path = weights.packed.name
    state = f"{path}.quant_state.bitsandbytes__nf4"
    text = re.sub(rb'"shape": ?\[[^\]]*\]', b'"shape": [1, %d]' % LONG, weights.data[state])
    weights.set(path, [LONG // 2, 1], LONG // 2)
    weights.set(f"{path}.absmax", [LONG // 64], LONG // 16)
    weights.set(state, [len(text)], len(text))
    weights.data[state] = text


def wide_int8(weights: Weights) -> None:
    weights.set(weights.packed.main, [1, LONG], LONG)
    weights.set(weights.packed.name.replace("weight", "SCB"), [1], 4)


def wide_fp8(weights: Weights) -> None:
    weights.set(weights.packed.main, [1, LONG], LONG)
    weights.set(f"{weights.packed.name}_scale_inv", [1, LONG // 32], LONG // 8)


def wide_pack(weights: Weights) -> None:
    weights.set(weights.packed.main, [1, LONG // 4], LONG)
    weights.set(f"{weights.packed.name}_scale", [1, 1], 2)
    weights.data[f"{weights.packed.name}_shape"] = np.array([1, LONG], np.int64).tobytes()


def wide_gptq(weights: Weights) -> None:
    path = weights.packed.name.removesuffix("weight")
    weights.set(f"{path}qweight", [LONG // 4, 4], LONG * 4)
    weights.set(f"{path}qzeros", [1, 1], 4)
    weights.set(f"{path}scales", [1, 4], 8)
    weights.set(f"{path}g_idx", [LONG], LONG * 4)
    weights.settings["group_size"] = -1


def wide_experts(weights: Weights) -> None:
    weights.set(weights.packed.main, [1, 1, LONG // 32, 16], LONG // 2)
    weights.set(weights.packed.main.replace("_blocks", "_scales"), [1, 1, LONG // 32], LONG // 32)


@pytest.mark.parametrize(
    ("name", "widen"),
    [
        ("bnb-nf4", wide_nf4),
        ("bnb-int8-noproj", wide_int8),
        ("fp8-block", wide_fp8),
        ("ct-pack-int8-channel-noproj", wide_pack),
        ("gptq-8bit", wide_gptq),
        ("mxfp4-gpt-oss-noproj", wide_experts),
    ],
)
def test_a_row_that_does_not_fit_into_memory_is_refused(
    name: str, widen: Callable[[Weights], None], tmp_path: Path, run: Run
) -> None:
    base = changed_base(name, widen, tmp_path / "base")
    ended = assert_refused(name, base, run, tmp_path / "out")
    assert "V554" in ended.err
    assert "rows of up to 1,048,576 values" in " ".join(ended.err.split())
