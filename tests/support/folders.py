"""Look at adapters' folders before and after a conversion."""

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
"""The folders that real PEFT and PyTorch wrote."""


def everything(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its relative name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def weights(folder: Path) -> dict[str, NDArray[Any]]:
    """The adapter's tensors, as the safetensors library reads them."""
    return load_file(folder / WEIGHTS)


def metadata(folder: Path) -> dict[str, str]:
    """The metadata of the adapter's weights."""
    with safe_open(folder / WEIGHTS, "np") as file:
        return dict(file.metadata())


def base_of(folder: Path) -> BaseOptions:
    """The base that a fixture was made on."""
    expected = json.loads((folder / "expected.json").read_bytes())
    return BaseOptions(str(DATA / "fixtures" / expected["base"]))


def codes(result: Conversion) -> set[str]:
    """Return the codes of a conversion's findings."""
    return {finding.code for finding in result.findings}


def refusal(act: Callable[[], object]) -> str:
    """The one code that an act is refused with."""
    with pytest.raises(CheckpointError) as caught:
        act()
    (finding,) = caught.value.findings
    return finding.code
