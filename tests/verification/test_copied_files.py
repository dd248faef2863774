"""Compare the other files of a merged model with the files that the merge copies."""

from __future__ import annotations

from pathlib import Path

import pytest
from adapters import good_adapter
from bases import tiny_base

from vera_convert import VerifyOptions, merge, verify

WEIGHTS_ALONE = VerifyOptions(layers_only=True)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    base = tiny_base(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"):
        (base / name).write_text("{}")
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text("{}")
    return base


def codes(tmp_path: Path, base: Path) -> list[tuple[str, str]]:
    merged, adapter = tmp_path / "merged", tmp_path / "adapter"
    result = verify(adapter, merged=merged, base=str(base), options=WEIGHTS_ALONE)
    return [(finding.code, finding.reason) for finding in result.errors]


@pytest.fixture
def merged(tmp_path: Path, base: Path) -> Path:
    merge(good_adapter(tmp_path / "adapter"), tmp_path / "merged", base=str(base))
    assert codes(tmp_path, base) == []
    return tmp_path / "merged"


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
def test_other_bytes_and_missing_files_are_errors(
    name: str, tmp_path: Path, base: Path, merged: Path
) -> None:
    (merged / name).write_text("[]")
    assert codes(tmp_path, base) == [("V625", f"{name} has other bytes.")]
    (merged / name).unlink()
    assert codes(tmp_path, base) == [("V625", f"{name} is missing.")]


def test_a_file_in_a_subfolder_is_compared_and_a_license_is_not(
    tmp_path: Path, base: Path, merged: Path
) -> None:
    (merged / "LICENSE").unlink()
    (merged / "1_Pooling" / "config.json").write_text('{"a": 1}')
    assert codes(tmp_path, base) == [("V625", "1_Pooling/config.json has other bytes.")]


def test_the_tokenizer_of_the_adapter_replaces_the_base_s(tmp_path: Path, base: Path) -> None:
    adapter = good_adapter(tmp_path / "adapter")
    (adapter / "tokenizer.json").write_text('{"of": "adapter"}')
    merge(adapter, tmp_path / "merged", base=str(base))
    assert codes(tmp_path, base) == []
    (tmp_path / "merged" / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
    assert codes(tmp_path, base) == [("V625", "tokenizer.json has other bytes.")]


def test_without_a_record_other_files_may_differ(tmp_path: Path, base: Path, merged: Path) -> None:
    (merged / "merge-provenance.json").unlink()
    (merged / "tokenizer.json").unlink()
    assert codes(tmp_path, base) == []
