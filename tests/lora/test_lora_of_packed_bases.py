"""LoRAs for quantized bases: the sizes of layers come from the packed files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from folders import DATA, weights

from vera_convert.base.facts import BaseOptions
from vera_convert.lora.conversion import to_lora
from vera_convert.verification.verify import verify

FIXTURES = DATA / "quantized"
NAMES = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir())


@pytest.mark.parametrize("name", NAMES)
def test_a_packed_base_of_an_unknown_type_gives_the_same_lora(name: str, tmp_path: Path) -> None:
    adapter, known = FIXTURES / name / "adapter", FIXTURES / name / "base"
    unknown = Path(shutil.copytree(known, tmp_path / "base"))
    config = json.loads((known / "config.json").read_bytes()) | {"model_type": "unheard-of"}
    (unknown / "config.json").write_text(json.dumps(config))
    found = []
    for base in (known, unknown):
        options = BaseOptions(str(base), dtype="bfloat16")
        to_lora(adapter, tmp_path / f"lora-{base.parent.name}", base=options)
        found.append(weights(tmp_path / f"lora-{base.parent.name}"))
        assert verify(adapter, lora=tmp_path / f"lora-{base.parent.name}", base=options).passed
    assert found[0].keys() == found[1].keys()
    assert all(np.array_equal(found[0][key], found[1][key]) for key in found[0])
