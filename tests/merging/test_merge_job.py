"""A merge appears completely or not at all, and continues after an interruption."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import good_adapter, good_tensors
from commandline import Run
from folders import bytes_by_name
from merges import filled_base, merged_with
from safetensors.numpy import load_file, save_file

from vera_convert.assembly.journal import Journal, finished_files
from vera_convert.assembly.writer import Finished
from vera_convert.errors import SurroundingsError, UsageError, is_resumable
from vera_convert.merging.output import check_staged

PREFIX = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"


# --- publishing and continuing -------------------------------------------------------------------


def test_only_a_merged_model_is_replaced(tmp_path: Path, adapter: Path, base: Path) -> None:
    out = tmp_path / "out"
    merged_with(adapter, base, out, max_shard_size=3000)
    with pytest.raises(UsageError, match="exists"):
        merged_with(adapter, base, out)
    merged_with(adapter, base, out, force=True)
    assert sorted(path.name for path in out.glob("*.safetensors")) == ["model.safetensors"]
    with pytest.raises(UsageError, match="is no output of this command"):
        merged_with(adapter, base, good_adapter(tmp_path / "other"), force=True)
    for place in (base, base / "out", adapter / "out"):
        with pytest.raises(UsageError):
            merged_with(adapter, base, place, force=True)


@pytest.mark.parametrize("dry_run", [False, True])
def test_force_deletes_nothing_that_no_merge_wrote(
    tmp_path: Path, adapter: Path, base: Path, dry_run: bool
) -> None:
    out = tmp_path / "out"
    merged_with(adapter, base, out, max_shard_size=3000)
    (out / "eval").mkdir()
    for name in ("notes.txt", "eval/results.json"):
        (out / name).write_text("mine")
    with pytest.raises(UsageError, match=r"would delete: eval/results\.json, notes\.txt\. Move"):
        merged_with(adapter, base, out, force=True, dry_run=dry_run)
    assert (out / "notes.txt").read_text() == "mine"
    assert len([*out.glob("model-*.safetensors")]) > 1


def test_a_folder_with_only_a_provenance_is_no_merged_model(
    tmp_path: Path, adapter: Path, base: Path
) -> None:
    for number, text in enumerate(
        ["", "{}", "[]", '{"outputs": 5}', '{"outputs": [{"name": []}]}']
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "merge-provenance.json").write_text(text)
        (folder / "thesis.tex").write_text("mine")
        with pytest.raises(UsageError, match=r"thesis\.tex"):
            merged_with(adapter, base, folder, force=True)
        assert (folder / "thesis.tex").exists()


class StopError(Exception):
    """An interruption in the middle of a merge."""


def stopped(adapter: Path, base: Path, out: Path, after: int, **options: Any) -> BaseException:
    """Merge until this number of shards is finished; return the error that stopped the merge."""
    real, count = Journal.add, itertools.count()

    def add(self: Journal, name: str, finished: Finished) -> None:
        if next(count) >= after:
            raise StopError
        real(self, name, finished)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "add", add)
        with pytest.raises(StopError) as caught:
            merged_with(adapter, base, out, resume=True, jobs=1, **options)
    return caught.value


def hidden(folder: Path) -> list[Path]:
    return [*folder.glob(".out.vera-convert-*")]


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return filled_base(tmp_path / "base", shards=4)


def test_a_stopped_merge_is_continued(
    tmp_path: Path, adapter: Path, sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged_with(adapter, sharded, tmp_path / "whole", checksums=True)
    error = stopped(adapter, sharded, tmp_path / "out", after=2, checksums=True)
    assert is_resumable(error)
    (kept,) = hidden(tmp_path)
    assert (kept / "journal").exists()
    taken: list[int] = []

    def counted(path: Path, folder: Path, identity: str) -> dict[str, Finished]:
        found = finished_files(path, folder, identity)
        taken.append(len(found))
        return found

    monkeypatch.setattr("vera_convert.merging.job.finished_files", counted)
    merged_with(adapter, sharded, tmp_path / "out", checksums=True, resume=True, jobs=2)
    assert taken[0] >= 2
    assert bytes_by_name(tmp_path / "out") == bytes_by_name(tmp_path / "whole")
    assert not hidden(tmp_path)


def test_a_run_that_does_not_continue_removes_the_kept_shards(
    tmp_path: Path, adapter: Path, sharded: Path
) -> None:
    stopped(adapter, sharded, tmp_path / "out", after=1)
    assert hidden(tmp_path)
    merged_with(adapter, sharded, tmp_path / "elsewhere")
    assert hidden(tmp_path), "that of another OUT stays"
    merged_with(adapter, sharded, tmp_path / "out")
    assert not hidden(tmp_path)


@pytest.mark.parametrize("what", ["options", "adapter", "base"])
def test_no_shard_is_reused_if_an_input_or_option_differs(
    tmp_path: Path, adapter: Path, sharded: Path, what: str
) -> None:
    stopped(adapter, sharded, tmp_path / "out", after=3)
    options: dict[str, Any] = {}
    if what == "options":
        options["weight"] = 0.5
    elif what == "adapter":
        shutil.rmtree(adapter)
        values = {f"{PREFIX}{Q}.vera_lambda_b": np.zeros(16, np.float32)}
        good_adapter(adapter, tensors=values)
    else:
        file = sharded / "model-00002-of-00004.safetensors"
        tensors = {name: tensor + tensor for name, tensor in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
    merged_with(adapter, sharded, tmp_path / "whole", **options)
    merged_with(adapter, sharded, tmp_path / "out", resume=True, **options)
    assert bytes_by_name(tmp_path / "out") == bytes_by_name(tmp_path / "whole")
    assert not hidden(tmp_path)


def test_a_shard_that_was_modified_is_computed_again(
    tmp_path: Path, adapter: Path, sharded: Path
) -> None:
    merged_with(adapter, sharded, tmp_path / "whole")
    stopped(adapter, sharded, tmp_path / "out", after=3)
    (kept,) = hidden(tmp_path)
    first = kept / "new/model-00001-of-00004.safetensors"
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    merged_with(adapter, sharded, tmp_path / "out", resume=True)
    assert bytes_by_name(tmp_path / "out") == bytes_by_name(tmp_path / "whole")


def test_a_modified_shard_with_its_old_times_is_computed_again(
    tmp_path: Path, adapter: Path, sharded: Path
) -> None:
    merged_with(adapter, sharded, tmp_path / "whole")
    stopped(adapter, sharded, tmp_path / "out", after=3)
    (kept,) = hidden(tmp_path)
    first = kept / "new/model-00001-of-00004.safetensors"
    times, content = first.stat(), bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    os.utime(first, ns=(times.st_atime_ns, times.st_mtime_ns))
    merged_with(adapter, sharded, tmp_path / "out", resume=True)
    assert bytes_by_name(tmp_path / "out") == bytes_by_name(tmp_path / "whole")


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such modes")
@pytest.mark.parametrize("is_of", ["another user", "a group"])
def test_a_hidden_folder_of_other_users_is_neither_reused_nor_removed(
    tmp_path: Path, adapter: Path, sharded: Path, is_of: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged_with(adapter, sharded, tmp_path / "whole")
    stopped(adapter, sharded, tmp_path / "out", after=3)
    (kept,) = hidden(tmp_path)
    (kept / "old").mkdir()
    before = bytes_by_name(kept)
    if is_of == "a group":
        kept.chmod(0o770)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 4_321)
        real = Path.lstat

        def mine(path: Path) -> os.stat_result:
            found = real(path)
            return found if path == kept else os.stat_result((*found[:4], 4_321, *found[5:]))

        monkeypatch.setattr(Path, "lstat", mine)
    for resume in (True, False):
        merged_with(adapter, sharded, tmp_path / "out", resume=resume, force=True)
        assert bytes_by_name(tmp_path / "out") == bytes_by_name(tmp_path / "whole")
        assert hidden(tmp_path) == [kept]
        assert bytes_by_name(kept) == before


def test_kept_shards_do_not_count_as_needed_space(
    tmp_path: Path, adapter: Path, sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(adapter, sharded, tmp_path / "out", after=3)
    (kept,) = hidden(tmp_path)
    records = [json.loads(line) for line in (kept / "journal").read_text().splitlines()]
    finished = sum(record["size"] for record in records[1:])
    assert len(records) > 1
    needed = merged_with(adapter, sharded, tmp_path / "x", dry_run=True).needed
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - finished - 1))
    with pytest.raises(SurroundingsError, match=f"{finished:,} of which are there already"):
        merged_with(adapter, sharded, tmp_path / "out", resume=True)
    assert hidden(tmp_path), "what is finished stays"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - finished))
    merged_with(adapter, sharded, tmp_path / "out", resume=True, dry_run=True)
    merged_with(adapter, sharded, tmp_path / "out", resume=True)
    assert not hidden(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="others allow no such names")
def test_a_file_whose_name_is_not_utf_8_is_copied_and_the_provenance_can_be_read(
    tmp_path: Path, adapter: Path, base: Path, run: Run
) -> None:
    odd = os.fsdecode(b"note\xff.txt")
    (base / odd).write_text("note")
    merged_with(adapter, base, tmp_path / "out")
    assert (tmp_path / "out" / odd).read_text() == "note"
    call = ("verify", adapter, "--base", base, "--merged", tmp_path / "out", "--layers-only")
    assert run(*call).status == 0
    merged_with(adapter, base, tmp_path / "out", force=True, max_shard_size=3_000)
    merged_with(adapter, base, tmp_path / "out", force=True)


def test_a_stopped_merge_into_a_single_file_keeps_no_file(
    tmp_path: Path, adapter: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise StopError

    monkeypatch.setattr("vera_convert.merging.job.check_staged", fail)
    with pytest.raises(StopError):
        merged_with(adapter, base, tmp_path / "out", resume=True)
    assert not hidden(tmp_path)


def test_an_input_that_changes_during_the_merge_is_refused(
    tmp_path: Path, adapter: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def meddle(*given: Any) -> None:
        check_staged(*given)
        (base / "generation_config.json").write_text("{ }")

    (base / "generation_config.json").write_text("{}")
    monkeypatch.setattr("vera_convert.merging.job.check_staged", meddle)
    with pytest.raises(SurroundingsError, match="changed"):
        merged_with(adapter, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- memory --------------------------------------------------------------------------------------


MEASURED = """
import sys
from pathlib import Path
from vera_convert.merging.options import MergeOptions
from vera_convert.merging.merge import merge
from vera_convert.base.facts import BaseOptions
adapter, base, out = sys.argv[1:]
merge(adapter, out, base=BaseOptions(base), options=MergeOptions(jobs=2))
status = Path("/proc/self/status").read_text()
print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
"""


def deep(folder: Path, layers: int) -> tuple[Path, Path]:
    """Write an adapter and a base with this number of layers, each of 1 MB."""
    values = np.random.default_rng(0)
    modules = [f"model.layers.{n}.self_attn.q_proj" for n in range(layers)]
    vectors = {
        f"{PREFIX}{module}.vera_lambda_{kind}": np.ones(size, np.float32)
        for module in modules
        for kind, size in (("b", 512), ("d", 4))
    }
    pair = {
        "base_model.vera_A": values.normal(size=(4, 512)).astype(np.float32),
        "base_model.vera_B": values.normal(size=(512, 4)).astype(np.float32),
    }
    adapter = good_adapter(
        folder / "adapter", tensors={**dict.fromkeys(good_tensors()), **vectors, **pair}
    )
    (folder / "base").mkdir()
    (folder / "base/config.json").write_text('{"model_type": "llama"}')
    weights = {f"{module}.weight": np.zeros((512, 512), np.float32) for module in modules}
    save_file(weights, folder / "base/model.safetensors")
    return adapter, folder / "base"


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are counted otherwise elsewhere")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    peaks = []
    for layers in (8, 128):
        adapter, base = map(str, deep(tmp_path / str(layers), layers))
        command = [sys.executable, "-c", MEASURED, adapter, base, str(tmp_path / f"out{layers}")]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] < peaks[0] + 5
