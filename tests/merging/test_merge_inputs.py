"""Merges from the Hub: the files that a merge downloads, and the files that are not needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import good_adapter
from bases import tiny_base
from folders import bytes_by_name
from heads import PREFIX, TIED, on_the_head
from hub_server import HubServer
from merges import assert_same, expected_tensors, filled_base, tensors_of
from safetensors.numpy import save_file

from vera_convert.base.facts import BaseOptions
from vera_convert.base.model import read_base
from vera_convert.base.side_files import sort_files
from vera_convert.errors import CheckpointError, SurroundingsError
from vera_convert.hub.location import HubAccess, Location
from vera_convert.merging.adapter_files import adapter_files
from vera_convert.merging.adapters import AdapterSpec
from vera_convert.merging.merge import Merge, merge
from vera_convert.merging.options import MergeOptions, Tied
from vera_convert.validation.validate import validate


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return good_adapter(tmp_path / "adapter", base_model_name_or_path="org/base")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = filled_base(tmp_path / "base", shards=2)
    (folder / "generation_config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(bytes(100_000))
    return folder


def merged(tmp_path: Path, adapter: str | Path, base: str | None = None, **options: Any) -> Merge:
    access = HubAccess(cache_dir=tmp_path / "cache")
    return merge(
        adapter,
        tmp_path / "out",
        base=BaseOptions(base),
        options=MergeOptions(**options),
        access=access,
    )


def test_adapters_and_their_base_come_from_the_hub(
    server: HubServer, tmp_path: Path, adapter: Path, base: Path
) -> None:
    files = bytes_by_name(adapter)
    commits = {
        "adapter": server.add("org/adapters", {f"sub/{n}": text for n, text in files.items()}),
        "base": server.add("org/base", bytes_by_name(base)),
    }
    add = (AdapterSpec(adapter, -1.5),)
    done = merged(tmp_path, "org/adapters/sub", add=add)
    assert_same(tensors_of(tmp_path / "out"), expected_tensors({adapter: -0.5}, base), within=1e-6)
    document = json.loads((tmp_path / "out/merge-provenance.json").read_bytes())
    assert document["base"]["source"] == {"repo_id": "org/base", "commit": commits["base"]}
    assert [each["source"] for each in document["adapters"]] == [
        {"repo_id": "org/adapters", "commit": commits["adapter"], "subfolder": "sub"},
        {"folder": "adapter"},
    ]
    card = (tmp_path / "out/README.md").read_text()
    assert f"| Base | `org/base` | `{commits['base']}` |" in card
    assert done.base == f"org/base@{commits['base']}"
    assert "pytorch_model.bin" not in {path.rpartition("/")[2] for path in server.paths()}


def test_a_dry_run_reads_only_headers(
    server: HubServer, tmp_path: Path, adapter: Path, base: Path
) -> None:
    content = bytes_by_name(base)
    server.add("org/base", content)
    done = merged(tmp_path, adapter, dry_run=True)
    here = merge(
        adapter,
        tmp_path / "out",
        base=BaseOptions(str(base)),
        options=MergeOptions(dry_run=True),
    )
    weights = [name for name in content if name.endswith(".safetensors")]
    assert done.files[: len(weights)] == here.files[: len(weights)]
    fetched = [path for path in server.paths() if path.rpartition("/")[2] in weights]
    ranges = [span for _, path, span in server.requests if path in fetched]
    assert len(ranges) == len(weights)
    assert None not in ranges


def test_a_dry_run_compares_rows_of_a_head_and_an_embedding_on_the_hub(
    server: HubServer, tmp_path: Path
) -> None:
    tied = filled_base(tmp_path / "tied", config=TIED)
    server.add("org/tied", bytes_by_name(tied))
    tensors = tensors_of(tied) | {"lm_head.weight": np.ones((32, 16), np.float32)}
    save_file(tensors, tied / "model.safetensors", {"format": "pt"})
    server.add("org/own", bytes_by_name(tied))
    adapter = on_the_head(tmp_path / "head")
    for choice in Tied:
        merged(tmp_path, adapter, "org/tied", dry_run=True, tied=choice)
    with pytest.raises(CheckpointError, match="V524"):
        merged(tmp_path, adapter, "org/tied", dry_run=True)
    merged(tmp_path, adapter, "org/own", dry_run=True)
    access = HubAccess(cache_dir=tmp_path / "cache")
    warned = [
        "V526"
        in {
            each.code for each in validate(adapter, base=f"hf://org/{name}", access=access).findings
        }
        for name in ("tied", "own")
    ]
    assert warned == [True, False]


def test_a_dry_run_does_not_compare_a_copy_of_the_head_on_the_hub(
    server: HubServer, tmp_path: Path, base: Path
) -> None:
    own = {f"{PREFIX}lm_head.base_layer.weight": tensors_of(base)["lm_head.weight"]}
    server.add("org/base", bytes_by_name(base))
    merged(tmp_path, on_the_head(tmp_path / "head", **own), "org/base", dry_run=True)


def test_a_merge_can_be_repeated_offline(
    server: HubServer, tmp_path: Path, adapter: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add("org/base", bytes_by_name(base))
    merged(tmp_path, adapter)
    before = bytes_by_name(tmp_path / "out")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    server.requests.clear()
    merged(tmp_path, adapter, force=True)
    assert not server.requests
    assert bytes_by_name(tmp_path / "out") == before


@pytest.mark.parametrize("appended", [True, False])
def test_an_input_that_changes_between_two_reads_is_refused(
    tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, appended: bool
) -> None:
    base = filled_base(tmp_path / "base")
    other = filled_base(tmp_path / "other", dtype="float64")

    def meddle(*given: Any) -> Any:
        if appended:
            with (base / "model.safetensors").open("ab") as file:
                file.write(bytes(10))
        else:
            (other / "model.safetensors").replace(base / "model.safetensors")
        return sort_files(*given)

    monkeypatch.setattr("vera_convert.merging.base_files.sort_files", meddle)
    with pytest.raises(SurroundingsError, match="changed while it was read"):
        merged(tmp_path, adapter, str(base))


def test_a_file_that_was_not_downloaded_is_a_warning(tmp_path: Path) -> None:
    adapter = good_adapter(tmp_path / "adapter")
    (adapter / "2_Dense").mkdir()
    (adapter / "2_Dense" / "config.json").write_text("{}")
    base = read_base(Location("base", tiny_base(tmp_path / "base")), HubAccess(offline=True))
    left = ("2_Dense/model.safetensors", "notes.bin")
    found = adapter_files(Location("org/name", adapter, left_out=left), base)
    assert [finding.code for finding in found.findings("org/name")] == ["V575"]
    assert found.not_fetched == ("2_Dense/model.safetensors",)
    assert found.left_out == ("notes.bin",)


@pytest.mark.parametrize(
    ("first", "added", "named"),
    [
        ("{}", "{}", False),
        (None, '{"own": 1}', False),
        ("{}", '{"x": 2}', True),
        (None, '{"x": 2}', True),
    ],
)
def test_a_file_of_an_added_adapter_that_the_merged_model_lacks_is_named(
    tmp_path: Path, first: str | None, added: str, *, named: bool
) -> None:
    base = filled_base(tmp_path / "base")
    (base / "generation_config.json").write_text('{"own": 1}')
    folders = [good_adapter(tmp_path / name) for name in "ab"]
    for folder, text in zip(folders, (first, added), strict=True):
        if text is not None:
            (folder / "generation_config.json").write_text(text)
    done = merged(tmp_path, folders[0], str(base), add=(AdapterSpec(folders[1]),))
    assert ("V578" in [finding.code for finding in done.findings]) is named
    expected = first if first is not None else '{"own": 1}'
    assert (tmp_path / "out/generation_config.json").read_text() == expected
