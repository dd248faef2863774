"""The example runs, from the sentences to the merged model."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "train_minilm.py"


def test_the_example_trains_saves_strips_merges_and_verifies(
    minilm_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--quick", "--model", str(minilm_model), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *options])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    out = capsys.readouterr().out
    differences = [float(text) for text in re.findall(r"differs by ([\d.e+-]+)", out)]
    assert len(differences) == 3
    assert max(differences) < 1e-5
    assert "verified, tensor by tensor and by running both models" in out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "adapter",
        "head.safetensors",
        "merged",
        "stripped",
    }
