"""The other files in an adapter's folder, and the writing of a new folder."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from adapters import good_adapter
from folders import bytes_by_name

from vera_convert.adapter import folder as adapterfolder
from vera_convert.adapter.folder import is_vera, side_files
from vera_convert.conversion.strip_embed import strip
from vera_convert.errors import SurroundingsError, UsageError
from vera_convert.files.file_names import is_training_state
from vera_convert.files.reading import LocalFile

posix = pytest.mark.skipif(os.name != "posix", reason="links need rights on Windows")


@pytest.mark.parametrize(
    "name",
    [
        "adapter_model.bin",
        "training_args.bin",
        "optimizer.pt",
        "optimizer.bin",
        "optimizer_1.bin",
        "optimizer.safetensors",
        "scheduler.pt",
        "scaler.pt",
        "rng_state.pth",
        "rng_state_7.pth",
        "random_states_0.pkl",
        "zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "mp_rank_00_model_states.pt",
        "trainer_state.json",
        "checkpoint/trainer_state.json",
        "runs/Jul01_host/events.out.tfevents.1.host.2.0",
        "logs/events.out.tfevents.1.host.2.0",
        "wandb/run-1/files/wandb-metadata.json",
        "latest",
        "zero_to_fp32.py",
    ],
)
def test_the_state_of_a_training_run_is_left_out(name: str) -> None:
    assert is_training_state(name)


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "tokenizer.json",
        "generation_config.json",
        "chat_template.jinja",
        "modeling.py",
        "my_optimizer.pt.txt",
        "adapter_model.bin.md",
        "OPTIMIZER.txt",
        "latest.txt",
        "runs/notes.txt",
    ],
)
def test_all_other_files_are_copied(name: str) -> None:
    assert not is_training_state(name)


def test_files_are_sorted_into_copied_and_left_out(tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter")
    for name in (
        "README.md",
        "z.txt",
        "deep/er/notes.txt",
        "optimizer.pt",
        "global_step5/mp_rank_00_model_states.pt",
        ".hidden",
        ".git/config",
        "deep/.hidden",
        "adapter_model.bin",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    good_adapter(folder / "checkpoint-1")
    (folder / "checkpoint-1" / "more.txt").write_text("of another adapter")
    (folder / "empty").mkdir()
    found = side_files(folder)
    assert found.copied == ("README.md", "deep/er/notes.txt", "z.txt")
    assert found.left_out == (
        "adapter_model.bin",
        "global_step5/mp_rank_00_model_states.pt",
        "optimizer.pt",
    )
    assert found.outside == ()


@posix
def test_links_within_the_folder_are_copied_as_files(tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter")
    (folder / "real.txt").write_text("content")
    (folder / "linked.txt").symlink_to("real.txt")
    (tmp_path / "secret").write_text("secret")
    (folder / "absolute").symlink_to(tmp_path / "secret")
    (folder / "relative").symlink_to("../secret")
    (folder / "device").symlink_to("/dev/zero")
    (folder / "nowhere").symlink_to("gone")
    (folder / "circle").symlink_to("circle")
    (folder / "folder").symlink_to(tmp_path, target_is_directory=True)
    os.mkfifo(folder / "pipe")
    strip(folder, tmp_path / "out")
    found = side_files(folder)
    assert found.copied == ("linked.txt", "real.txt")
    assert found.outside == ("absolute", "circle", "device", "folder", "nowhere", "relative")
    assert bytes_by_name(tmp_path / "out").keys() == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "linked.txt",
        "real.txt",
    }
    assert not (tmp_path / "out" / "linked.txt").is_symlink()
    assert (tmp_path / "out" / "linked.txt").read_text() == "content"


@posix
def test_an_adapter_in_the_cache_of_the_hub_is_read(tmp_path: Path) -> None:
    repo = tmp_path / "models--org--name"
    snapshot = repo / "snapshots" / ("c" * 40)
    made = good_adapter(tmp_path / "made")
    (made / "README.md").write_text("card")
    (repo / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(made.iterdir())):
        path.rename(repo / "blobs" / f"{number:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040x}")
    strip(snapshot, tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == "card"
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


@posix
def test_more_files_than_a_process_can_open_are_copied(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    folder = good_adapter(tmp_path / "adapter")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = Path("/proc/self/fd")
    used = len([*opened.iterdir()]) if opened.exists() else 64
    for number in range(60):
        (folder / f"{number}.txt").write_text("")
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 30, limits[1]))
    try:
        strip(folder, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(bytes_by_name(tmp_path / "out")) == 62


def test_a_copy_that_reads_back_with_other_bytes_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = good_adapter(tmp_path / "adapter")
    (folder / "README.md").write_text("card")
    copy = adapterfolder._copy

    def rotten(source: LocalFile, target: Path) -> str:
        digest = copy(source, target)
        target.write_text("dard")
        return digest

    monkeypatch.setattr(adapterfolder, "_copy", rotten)
    with pytest.raises(SurroundingsError, match=r"README\.md reads back with other bytes"):
        strip(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@posix
def test_modes_follow_the_umask(tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter")
    (folder / "README.md").write_text("card")
    (folder / "README.md").chmod(0o400)
    before = os.umask(0o027)
    try:
        strip(folder, tmp_path / "out")
    finally:
        os.umask(before)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {"0o640"}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


def test_an_adapters_folder_is_known_by_its_config(tmp_path: Path) -> None:
    assert is_vera(good_adapter(tmp_path / "adapter"))
    assert not is_vera(tmp_path)
    (tmp_path / "adapter_config.json").mkdir()
    assert not is_vera(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        *("optimizer.pt", "adapter_model.bin", ".git/config", "checkpoint-10/adapter_config.json"),
        *("notes.txt", "eval_results.json", "deep/er/notes.txt"),
    ],
)
def test_force_deletes_nothing_that_the_conversion_does_not_write(
    name: str, tmp_path: Path
) -> None:
    folder = good_adapter(tmp_path / "adapter")
    taken = good_adapter(tmp_path / "out")
    (taken / name).parent.mkdir(parents=True, exist_ok=True)
    (taken / name).write_text("{}")
    before = bytes_by_name(taken)
    with pytest.raises(UsageError, match=f"--force would delete: {re.escape(name)}"):
        strip(folder, taken, force=True)
    assert bytes_by_name(taken) == before


def test_force_does_not_replace_a_lora(tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter")
    lora = good_adapter(tmp_path / "out", peft_type="LORA")
    with pytest.raises(UsageError):
        strip(folder, lora, force=True)
    assert '"LORA"' in (lora / "adapter_config.json").read_text()


def test_force_replaces_what_the_conversion_writes_again(tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter")
    (folder / "README.md").write_text("card")
    strip(folder, tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("another card")
    strip(folder, tmp_path / "out", force=True)
    assert (tmp_path / "out" / "README.md").read_text() == "card"


@pytest.mark.parametrize(
    ("name", "is_copied"),
    [
        ("adapter_model.safetensors:Zone.Identifier", False),
        ("README.md\uf03aZone.Identifier", False),
        ("__MACOSX/README.md", False),
        ("__pycache__/code.cpython-311.pyc", False),
        ("Thumbs.db", False),
        ("model.safetensors", False),
        ("model-00001-of-00002.safetensors", False),
        ("pytorch_model.bin.index.json", False),
        ("model.q4.gguf", False),
        ("old/model.safetensors", False),
        ("new_embeddings.safetensors", True),
        ("2_Dense/model.safetensors", True),
        ("model_card.md", True),
    ],
)
def test_only_files_that_belong_to_the_adapter_are_copied(
    name: str, is_copied: bool, tmp_path: Path
) -> None:
    folder = good_adapter(tmp_path / "adapter")
    (folder / "2_Dense").mkdir()
    (folder / "2_Dense" / "config.json").write_text("{}")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"x")
    done = strip(folder, tmp_path / "out")
    assert (name in done.side_files.copied) is is_copied
    assert (name in done.side_files.left_out) is not is_copied
    assert (tmp_path / "out" / name).exists() is is_copied
