"""Each message names the cause, the place, and a remedy."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
from adapters import good_adapter
from commandline import Run
from hub_server import HubServer
from merges import INDEX, filled_base
from safetensors.numpy import load_file, save_file

from vera_convert.errors import mark_resumable
from vera_convert.hub.repo_name import RepoName, parse_repo_name
from vera_convert.summary import info
from vera_convert.validation.validate import validate
from vera_convert.verification import model_comparison

HOST = "https://huggingface.co"
KEY = 2**64
"""The smallest key that torch refuses."""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{HOST}/org/name", RepoName("org/name")),
        (f"{HOST}/org/name/", RepoName("org/name")),
        (f"{HOST}/org/name/tree/main", RepoName("org/name", "main")),
        (f"{HOST}/org/name/tree/v1/sub/folder", RepoName("org/name", "v1", "sub/folder")),
        (f"{HOST}/org/name/tree/refs%2Fpr%2F1/sub", RepoName("org/name", "refs/pr/1", "sub")),
        (f"{HOST}/org/name/tree/refs/pr/1", RepoName("org/name", "refs/pr/1")),
        (f"{HOST}/org/name/blob/main/a/adapter_config.json", RepoName("org/name", "main", "a")),
        (f"{HOST}/org/name/resolve/main/adapter_config.json", RepoName("org/name", "main")),
        ("http://hf.co/org/name?x=1#files", RepoName("org/name")),
        ("huggingface.co/org/name/tree/main/sub", RepoName("org/name", "main", "sub")),
        ("hf.co/org/name", RepoName("org/name")),
    ],
)
def test_the_address_of_a_page_is_read_as_its_repo(text: str, expected: RepoName) -> None:
    assert parse_repo_name(text, bare=False) == expected


@pytest.mark.parametrize(
    "text",
    [
        "https://example.com/org/name",
        f"{HOST}/datasets/org/name",
        f"{HOST}/org/name/discussions/1",
        f"{HOST}/org",
        f"{HOST}/",
        f"{HOST}/org/name/tree/main/../../x",
        f"{HOST}/org/name/tree/..%2F..%2Fx",
        f"{HOST}.evil.example/org/name",
        "https://huggingface.co@evil.example/org/name",
        "ftp://huggingface.co/org/name",
    ],
)
def test_another_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"org/name|Hub|revision|subfolder|address"):
        parse_repo_name(text, bare=False)


def test_an_address_names_an_adapter(server: HubServer, tmp_path: Path, run: Run) -> None:
    folder = good_adapter(tmp_path / "adapter")
    files = {f"sub/{path.name}": path.read_bytes() for path in folder.iterdir()}
    server.add("org/name", files)
    ended = run("info", f"{server.url}/org/name/tree/main/sub", "--cache-dir", tmp_path / "cache")
    assert ended.status == 0
    assert "org/name@" in ended.out


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_of_an_adapter_stands_for_its_folder_everywhere(
    name: str, tmp_path: Path, run: Run
) -> None:
    adapter, base = good_adapter(tmp_path / "adapter"), filled_base(tmp_path / "base")
    file = adapter / name
    commands: list[list[object]] = [
        ["info", file],
        ["validate", file],
        ["strip", file, tmp_path / "stripped"],
        ["migrate", file, tmp_path / "migrated", "--to", "asis"],
        ["merge", file, tmp_path / "merged", "--add", file],
        ["verify", file, "--adapter", tmp_path / "stripped" / name],
    ]
    for command in commands:
        ended = run(*command, "--base", base)
        assert ended.status == 0, ended
    assert run("info", base / "config.json").status == 2


def test_a_backslash_in_a_repo_s_name_is_shown(run: Run) -> None:
    ended = run("info", "owner\\name")
    assert ended.status == 3
    assert "written with a slash: owner/name." in ended.err


def test_a_question_mark_is_not_followed_by_a_period(run: Run) -> None:
    ended = run("inof", "x")
    assert "Did you mean" in ended.err
    assert "?." not in ended.err


def test_an_error_is_printed_once(run: Run, tmp_path: Path) -> None:
    ended = run("validate", tmp_path / "nothere")
    assert ended.status == 3
    assert (ended.out + ended.err).count("there is no folder") == 1
    ended = run("validate", tmp_path / "nothere", "--quiet")
    assert ended.err.count("there is no folder") == 1


def test_count_refuses_the_revision_of_an_adapter(run: Run, tmp_path: Path) -> None:
    base = filled_base(tmp_path / "base")
    ended = run("count", "--base", base, "--rank", 4, "--revision", "v1")
    assert ended.status == 2
    assert "--base-revision" in ended.err


@pytest.mark.parametrize("revision", ["../../x", "/x", "a..b", "-x", "x.lock", "a b"])
def test_an_impossible_revision_is_a_warning(revision: str, tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter", revision=revision)
    codes = {finding.code for finding in validate(folder).findings}
    assert "V123" in codes
    assert validate(folder).passed
    fine = good_adapter(tmp_path / "fine", revision="v1.0")
    assert "V123" not in {finding.code for finding in validate(fine).findings}


def test_a_copy_of_the_base_s_head_is_not_listed_as_trained(tmp_path: Path) -> None:
    copy = {"base_model.model.lm_head.base_layer.weight": np.ones((32, 16), "f4")}
    head = {
        "base_model.model.lm_head.vera_lambda_b": np.ones(32, "f4"),
        "base_model.model.lm_head.vera_lambda_d": np.ones(4, "f4"),
        "base_model.vera_B": np.random.default_rng(0).normal(size=(32, 4)).astype("f4"),
    }
    targets = ["q_proj", "v_proj", "lm_head"]
    folder = good_adapter(tmp_path / "adapter", tensors={**copy, **head}, target_modules=targets)
    assert info(folder).replacements == ()


@pytest.mark.skipif(sys.platform == "win32", reason="links need a right there")
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_dead_link_is_called_a_link(name: str, tmp_path: Path, run: Run) -> None:
    folder = good_adapter(tmp_path / "deep" / "adapter")
    (folder / name).unlink()
    (folder / name).symlink_to("nowhere")
    ended = run("info", folder)
    assert ended.status == 1
    assert f"{name} is a link that leads nowhere" in ended.err
    assert str(folder) in ended.err


def test_an_adapter_in_several_files_is_named(tmp_path: Path, run: Run) -> None:
    folder = good_adapter(tmp_path / "adapter")
    (folder / "adapter_model.safetensors").rename(
        folder / "adapter_model-00001-of-00002.safetensors"
    )
    ended = run("info", folder)
    assert ended.status == 1
    assert "several files" in ended.err
    assert "join them" in ended.err


@pytest.mark.parametrize("kind", ["model", "adapters_below"])
def test_a_folder_is_named_with_its_full_path(kind: str, tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "deep" / "folder"
    if kind == "model":
        filled_base(folder)
    else:
        good_adapter(folder / "checkpoint-1")
    ended = run("info", folder)
    assert ended.status == 1
    assert str(folder) in ended.err


def test_a_tensor_that_its_shard_lacks_is_named_with_the_shard(tmp_path: Path, run: Run) -> None:
    base = filled_base(tmp_path / "base", shards=2)
    index = json.loads((base / INDEX).read_text())
    name, file = next(iter(index["weight_map"].items()))
    tensors = load_file(base / file)
    moved = tensors.pop(name)
    save_file(tensors, base / file)
    adapter = good_adapter(tmp_path / "adapter")
    ended = run("merge", adapter, tmp_path / "out", "--base", base)
    assert f"which the index puts into {file}" in ended.err
    other = next(each for each in index["weight_map"].values() if each != file)
    save_file({**load_file(base / other), name: moved}, base / other)
    ended = run("merge", adapter, tmp_path / "out", "--base", base)
    assert f"lies in {other}" in ended.err


@pytest.mark.parametrize("path", ["experts.0.up_proj", "experts.up_projs.0"])
def test_an_expert_of_a_stack_is_called_an_expert(path: str, tmp_path: Path, run: Run) -> None:
    stack = {"model.layers.0.mlp.experts.gate_up_proj": (2, 16, 16)}
    base = filled_base(tmp_path / "base", tensors=stack)
    lambdas = {
        f"base_model.model.model.layers.0.mlp.{path}.vera_lambda_b": np.ones(8, "f4"),
        f"base_model.model.model.layers.0.mlp.{path}.vera_lambda_d": np.ones(4, "f4"),
    }
    targets = ["q_proj", "v_proj", path.rpartition(".")[2] if path.endswith("proj") else "0"]
    adapter = good_adapter(tmp_path / "adapter", tensors=lambdas, target_modules=targets)
    ended = run("merge", adapter, tmp_path / "out", "--base", base)
    assert ended.status == 1
    assert "is one of the experts in" in ended.err


FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="no device that is always full")
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_full_stdout_is_reported_with_the_state_of_out(form: list[str], tmp_path: Path) -> None:
    adapter = good_adapter(tmp_path / "adapter")
    command = [sys.executable, "-m", "vera_convert"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with FULL.open("w") as stdout:
        done = subprocess.run(
            [*command, "migrate", adapter, tmp_path / "out", "--to", "asis", *form],
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            check=False,
        )
        told = subprocess.run(
            [*command, "info", adapter, *form],
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            check=False,
        )
    assert (tmp_path / "out" / "adapter_config.json").is_file()
    assert done.returncode == 3
    assert "OUT is written and complete" in done.stderr
    assert told.returncode == 3
    assert "could not be printed" in told.stderr
    assert "Errno" not in done.stderr + told.stderr


@pytest.mark.parametrize("kept", [True, False])
def test_an_interrupted_merge_names_only_the_kept_files(
    kept: bool, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object, **__: object) -> None:
        error = KeyboardInterrupt()
        if kept:
            mark_resumable(error)
        raise error

    monkeypatch.setattr("vera_convert.merging.merge.merge", stopped)
    ended = run("merge", tmp_path / "adapter", tmp_path / "out", "--resume")
    assert ended.status == 130
    assert ("this continues: vera-convert merge" in ended.err) is kept
    assert ("no output is left" in ended.err) is not kept


# --- one sentence for each wrong value -----------------------------------------------------------


SIZES = ("--rank=4", "--in-features=4", "--out-features=4")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["count", "--rank", "4", "--config", "FOLDER"],
            "--config FOLDER is a folder: give the config.json, or the folder with --base.",
        ),
        (
            ["regenerate", "x", *SIZES, f"--key={2**64}"],
            f"--key is {KEY}: give a whole number from -2^63 to 2^64 - 1.",
        ),
        (
            ["regenerate", "x", "--rank=0", "--in-features=4", "--out-features=4"],
            "--rank is 0: give a whole number from 1 on.",
        ),
        (
            ["regenerate", "x", "--in-features=4"],
            "--rank, --out-features must be given, or --for ADAPTER.",
        ),
        (
            ["regenerate", "x", "--for=a", "--round=bf16", "--key=0"],
            "--key, --round cannot go with --for: leave one out.",
        ),
        (
            ["regenerate", "x", *SIZES, "--base=b", "--key-map=a=b"],
            "--base, --key-map cannot go with --rank: leave one out.",
        ),
    ],
)
def test_a_wrong_value_is_named_with_the_right_values(
    words: list[str], says: str, run: Run, tmp_path: Path
) -> None:
    ended = run(*(word.replace("FOLDER", str(tmp_path)) for word in words))
    assert (ended.status, ended.err) == (2, f"error: {says.replace('FOLDER', str(tmp_path))}\n")


def test_a_gpu_without_torch_is_reported_with_the_option(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [*sys.modules]:
        if name.partition(".")[0] == "torch" or name.startswith("vera_convert.with_torch"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    ended = run("merge", "a", tmp_path / "out", "--device", "cuda")
    assert ended.status == 3
    assert ended.err.startswith("error: --device cuda needs PyTorch. PyTorch cannot be imported")
    assert ended.err.endswith("`pip install 'vera-convert[torch]'`.\n")


def test_missing_packages_are_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_comparison, "find_spec", lambda _name: None)
    found = [model_comparison.missing_packages(*names) for names in ((), ("a",), "ab", "abc")]
    assert found == ["", "a", "a and b", "a, b and c"]


def test_checks_that_a_broken_base_prevents_are_named(run: Run, tmp_path: Path) -> None:
    adapter, base = good_adapter(tmp_path / "adapter"), filled_base(tmp_path / "base")
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    ended = run("validate", adapter, "--base", base)
    assert ended.status == 1
    assert "not checked  the further checks on the base: fix the errors first.\n" in ended.out


@pytest.mark.parametrize("command", ["strip", "to-lora"])
def test_names_that_differ_only_in_case_are_no_missing_files_on_a_disk_that_ignores_case(
    command: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, base = good_adapter(tmp_path / "adapter"), filled_base(tmp_path / "base")
    for name in ("tokenizer.json", "Tokenizer.json"):
        (adapter / name).write_text("{}")
    opened = Path.open

    def open_ignoring_case(path: Path, mode: str = "r", *rest: Any, **more: Any) -> IO[Any]:
        beside = {each.name.casefold() for each in path.parent.iterdir()}
        if "x" in mode and path.name.casefold() in beside:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        return opened(path, mode, *rest, **more)

    monkeypatch.setattr(Path, "open", open_ignoring_case)
    ended = run(command, adapter, tmp_path / "out", "--base", base)
    assert ended.status == 3
    assert "Two files have this name, in upper and in lower case" in ended.err
    assert {each.name for each in tmp_path.iterdir()} == {"adapter", "base"}


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("embed A OUT --in-features 3", "--in-features and --out-features belong together"),
        (
            "embed A OUT --base B --in-features 3 --out-features 3",
            "give either --base or --in-features and --out-features, not both",
        ),
        ("to-lora A OUT --rank 2 --max-error 0.1", "--rank and --max-error exclude each other"),
        ("strip A OUT --key-map x", '--key-map is "x": give OLD=NEW'),
    ],
)
def test_options_that_conflict_are_named_as_a_user_types_them(
    command: str, said: str, tmp_path: Path, run: Run
) -> None:
    adapter = good_adapter(tmp_path / "a", stripped=True)
    words = {"A": adapter, "OUT": tmp_path / "out", "B": filled_base(tmp_path / "base")}
    ended = run(*(str(words.get(word, word)) for word in command.split()))
    assert ended.status == 2
    assert said in ended.err
