"""A base that only an adapter's config names: a local folder, a repo on the Hub, or both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from adapters import good_adapter
from commandline import Run
from folders import bytes_by_name
from hub_server import HubServer
from merges import filled_base, tensors_of

from vera_convert.base.facts import BaseOptions
from vera_convert.conversion.migration import migrate_tree

BOTH = r"--base ./models/llama or --base hf://models/llama"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Enter a folder with the base models/llama and adapters whose configs name this base."""
    monkeypatch.chdir(tmp_path)
    filled_base(tmp_path / "models" / "llama")
    good_adapter(tmp_path / "adapter", base_model_name_or_path="models/llama")
    good_adapter(tmp_path / "bare", stripped=True, base_model_name_or_path="models/llama")
    return tmp_path


@pytest.mark.parametrize(
    "command",
    [
        ("info", "adapter"),
        ("strip", "adapter", "out"),
        ("embed", "bare", "out"),
        ("merge", "adapter", "out"),
        ("migrate", "bare", "out", "--to", "embedded"),
    ],
    ids=lambda command: command[0],
)
@pytest.mark.usefixtures("here")
def test_a_local_folder_is_the_base_with_a_note_if_the_hub_has_no_such_repo(
    command: tuple[str, ...], run: Run
) -> None:
    ended = run(*command, "--offline")
    assert ended.status == 0
    assert "V557" in ended.err
    assert "models/llama" in ended.out
    quiet = run(*(word if word != "out" else "quiet" for word in command), "--offline", "-q")
    assert (quiet.status, quiet.out, quiet.err) == (0, "", "")
    named = run(*(word if word != "out" else "named" for word in command), "--base", "models/llama")
    assert named.status == 0
    assert "V557" not in named.err
    if "out" in command:
        written = bytes_by_name(Path("out")), bytes_by_name(Path("named"))
        for files in written:
            files.pop("merge-provenance.json", None)
        assert written[0] == written[1]


@pytest.mark.usefixtures("here")
def test_validate_reports_nothing_about_a_base_that_was_not_given(run: Run) -> None:
    assert "V557" not in run("validate", "adapter", "--offline").out


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (("info", "adapter"), 0),
        (("strip", "adapter", "out"), 0),
        (("embed", "bare", "out"), 2),
        (("merge", "adapter", "out"), 2),
    ],
    ids=str,
)
def test_a_base_both_local_and_on_the_hub_is_refused_only_if_a_command_needs_the_base(
    command: tuple[str, ...], status: int, here: Path, server: HubServer, run: Run
) -> None:
    server.add("models/llama", bytes_by_name(here / "models" / "llama"))
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(here)
        ended = run(*command)
    assert ended.status == status
    assert "V557" not in ended.err
    if status:
        assert BOTH in ended.err
        assert not (here / "out").exists()
    elif command[0] == "info":
        assert BOTH in ended.out.replace("\n", " ")


def test_a_local_folder_without_a_model_does_not_hide_the_repo(
    server: HubServer, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    server.add("models/llama", bytes_by_name(filled_base(tmp_path / "base")))
    (tmp_path / "models" / "llama" / "checkpoint-1").mkdir(parents=True)
    good_adapter(tmp_path / "adapter", base_model_name_or_path="models/llama")
    assert run("merge", "adapter", "out", "--cache-dir", tmp_path / "cache").status == 0
    expected = run("merge", "adapter", "again", "--base", tmp_path / "base")
    assert expected.status == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "again" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("name", ["./models/llama", "../x/models/llama", "~/models/llama", "a/b/c"])
def test_a_base_that_can_only_be_a_path_is_not_read(name: str, here: Path, run: Run) -> None:
    filled_base(here / "a/b/c")
    good_adapter(here / "other", base_model_name_or_path=name)
    ended = run("merge", "other", "out", "--offline")
    assert ended.status == 2
    assert "--base" in ended.err


def test_each_adapter_of_a_tree_gets_its_own_base(here: Path, run: Run) -> None:
    wide = {"model.layers.0.self_attn.q_proj.weight": (16, 24)}
    filled_base(here / "wide", tensors={**wide, "model.layers.1.self_attn.q_proj.weight": (16, 24)})
    good_adapter(here / "tree" / "a", stripped=True, base_model_name_or_path="/data/wide")
    good_adapter(here / "tree" / "b", stripped=True, base_model_name_or_path="models/llama")
    ended = run(
        *("migrate", "tree", "out", "--recursive", "--to", "embedded", "--offline"),
        *("--base-for", "/data/wide=wide"),
    )
    assert ended.status == 0
    widths = {name: tensors_of(here / "out" / name)["base_model.vera_A"].shape for name in "ab"}
    assert widths == {"a": (4, 24), "b": (4, 16)}
    options = BaseOptions(places={"/data/wide": "wide"})  # type: ignore[arg-type] # a mapping will do
    migrate_tree(here / "tree", here / "again", to="embedded", base=options)
    assert bytes_by_name(here / "again") == bytes_by_name(here / "out")


@pytest.mark.parametrize("said", ["x", "=x", "x="])
def test_base_for_takes_a_name_and_a_model(said: str, run: Run, tmp_path: Path) -> None:
    ended = run("migrate", tmp_path, tmp_path / "out", "--to", "asis", "--base-for", said)
    assert ended.status == 2
    assert "NAME=MODEL" in ended.err


def test_base_for_with_a_missing_folder_fails_only_the_adapters_of_that_base(
    here: Path, run: Run
) -> None:
    good_adapter(here / "tree" / "a", stripped=True, base_model_name_or_path="/data/one")
    good_adapter(here / "tree" / "b", stripped=True, base_model_name_or_path="models/llama")
    ended = run(
        *("migrate", "tree", "out", "--recursive", "--to", "embedded", "--offline", "--json"),
        *("--base-for", "/data/one=./nowhere"),
    )
    document = json.loads(ended.out)
    assert [*document["done"]] == ["b"]
    assert "nowhere" in json.dumps(document["failed"]["a"])
