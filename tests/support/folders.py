"""Read an adapter's folder before and after a conversion."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file

from vera_convert.base.facts import BaseOptions
from vera_convert.conversion.work import Conversion
from vera_convert.errors import CheckpointError

CONFIG_NAME, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

DATA = Path(__file__).parents[1] / "data"
"""The folders of files that real PEFT and PyTorch wrote."""


def bytes_by_name(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file below a folder by relative name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def weights(folder: Path) -> dict[str, NDArray[Any]]:
    """Return the adapter's tensors, as the safetensors library reads them."""
    return load_file(folder / WEIGHTS)


def metadata(folder: Path) -> dict[str, str]:
    """Return the metadata of the adapter's weight file."""
    with safe_open(folder / WEIGHTS, "np") as file:
        return dict(file.metadata())


def base_of(folder: Path) -> BaseOptions:
    """Return the base that a fixture was made for."""
    expected = json.loads((folder / "expected.json").read_bytes())
    return BaseOptions(str(DATA / "fixtures" / expected["base"]))


def codes(result: Conversion) -> set[str]:
    """Return the codes of a conversion's findings."""
    return {finding.code for finding in result.findings}


def refusal(act: Callable[[], object]) -> str:
    """Return the one code with which a call is refused."""
    with pytest.raises(CheckpointError) as caught:
        act()
    (finding,) = caught.value.findings
    return finding.code
