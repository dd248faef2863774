from __future__ import annotations

import socket
from pathlib import Path

import pytest
from hub_server import HubServer

from vera_convert.errors import CheckpointError, SurroundingsError, UsageError
from vera_convert.hub.lookup import (
    AmbiguousBaseError,
    HubAccess,
    Location,
    base_from_config,
    fetch_adapter,
    fetch_base,
    list_files,
    locate,
    open_file,
)
from vera_convert.hub.repos import SIDE_FILE_LIMIT

SECRET = "hf_SecretToken"  # noqa: S105 - of the stand-in
ADAPTER = {
    "adapter_config.json": b"{}",
    "adapter_model.safetensors": b"weights" * 3_000_000,
    "README.md": b"# card",
    "tokenizer/vocab.txt": b"words",
    "big.bin": b"0" * 10_000_001,
    "optimizer.pt": b"state",
    "runs/of:host": b"log",
    "../outside": b"",
    ".gitattributes": b"hidden",
    "checkpoint-1/adapter_config.json": b"{}",
    "checkpoint-1/adapter_model.safetensors": b"other",
}


@pytest.fixture
def access(tmp_path: Path) -> HubAccess:
    return HubAccess(cache_dir=tmp_path / "cache", progress=False)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        pytest.fail("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Enter an empty working directory."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


# --- the meaning of an argument ------------------------------------------------------------------


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("text", ["org/name", "gpt2", "org/name@main", "./x", "~x", "a b"])
def test_an_existing_path_takes_precedence(text: str, inside: Path, access: HubAccess) -> None:
    (inside / text).mkdir(parents=True)
    for kind in ("adapter", "base"):
        location = locate(text, kind=kind, access=access)
        assert location == Location(text, Path(text))


@pytest.mark.usefixtures("no_network", "inside")
@pytest.mark.parametrize(
    "text", ["./name", "../org/name", "/org/name", "~/name", "~nobody/x", "C:/models", "org\\name"]
)
def test_a_name_that_looks_like_a_path_is_never_sent_to_the_hub(
    text: str, access: HubAccess
) -> None:
    for kind in ("adapter", "base"):
        with pytest.raises(SurroundingsError, match="there is no folder"):
            locate(text, kind=kind, access=access)


@pytest.mark.usefixtures("no_network", "inside")
def test_a_bare_name_is_a_path_for_an_adapter(access: HubAccess) -> None:
    with pytest.raises(
        SurroundingsError, match=r"no folder gpt2\. A repo on the Hub is written org/"
    ):
        locate("gpt2", kind="adapter", access=access)


@pytest.mark.usefixtures("no_network", "inside")
@pytest.mark.parametrize(
    "text",
    ["", "a\0b", "org/name//", "a/b/../c", "https://x.y/a/b", "hf://datasets/a/b", "x" * 5000],
)
def test_a_malformed_name_is_a_usage_error(text: str, access: HubAccess) -> None:
    with pytest.raises(UsageError):
        locate(text, kind="base", access=access)


def test_a_file_is_a_usage_error(inside: Path, access: HubAccess) -> None:
    (inside / "weights.safetensors").touch()
    with pytest.raises(UsageError, match="is a file"):
        locate("weights.safetensors", kind="adapter", access=access)


def test_a_folder_has_no_revision(inside: Path, access: HubAccess) -> None:
    (inside / "folder").mkdir()
    with pytest.raises(UsageError, match="has no revision"):
        locate("folder", kind="adapter", access=access, revision="main")


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize(
    ("text", "option", "ref"),
    [
        ("org/name", None, "main"),
        ("org/name@v1", None, "v1"),
        ("org/name@refs/pr/7", None, "refs/pr/7"),
        ("hf://org/name@v1", "v1", "v1"),
        ("hf://models/org/name", "feature/x", "feature/x"),
    ],
)
def test_a_revision_becomes_a_commit(
    text: str, option: str | None, ref: str, server: HubServer, access: HubAccess
) -> None:
    commits = {
        name: server.add("org/name", {"name": name.encode()}, ref=name)
        for name in ("main", "v1", "refs/pr/7", "feature/x")
    }
    location = locate(text, kind="adapter", access=access, revision=option)
    assert location.folder is None
    assert (location.repo_id, location.commit) == ("org/name", commits[ref])
    assert location.label == f"org/name@{commits[ref]}"
    again = locate(location.label, kind="adapter", access=access)
    assert again.commit == location.commit


@pytest.mark.usefixtures("inside")
def test_a_bare_name_may_be_a_base(server: HubServer, access: HubAccess) -> None:
    commit = server.add("gpt2", {"config.json": b"{}"})
    assert locate("gpt2", kind="base", access=access).commit == commit
    assert locate("hf://gpt2@main/sub", kind="base", access=access).subfolder == "sub"


@pytest.mark.usefixtures("no_network", "inside")
def test_two_revisions_are_refused(access: HubAccess) -> None:
    with pytest.raises(UsageError, match="two revisions"):
        locate("org/name@v1", kind="adapter", access=access, revision="v2")
    with pytest.raises(UsageError, match="impossible name of a revision"):
        locate("org/name", kind="adapter", access=access, revision="../..")


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("inside")
def test_refusals_name_a_remedy(server: HubServer, access: HubAccess) -> None:
    server.add("org/name", ADAPTER)
    with pytest.raises(
        SurroundingsError, match=r"no such repo, or the repo is private.*hf auth login"
    ):
        locate("org/absent", kind="adapter", access=access)
    with pytest.raises(SurroundingsError, match="no such revision"):
        locate("org/name@absent", kind="adapter", access=access)
    location = locate("org/name/absent", kind="adapter", access=access)
    with pytest.raises(SurroundingsError, match="no such folder"):
        list_files(location, access)
    location = locate("org/name", kind="adapter", access=access)
    with pytest.raises(SurroundingsError, match="no such file"):
        open_file(location, "absent.json", access)
    with pytest.raises(CheckpointError, match="V005"):
        open_file(location, "../x", access)


@pytest.mark.usefixtures("inside")
def test_a_gated_repo_is_named(server: HubServer, access: HubAccess) -> None:
    server.add("org/gated", ADAPTER, gated=True)
    location = locate("org/gated", kind="adapter", access=access)
    with pytest.raises(SurroundingsError, match=r"is gated\. Accept the terms"):
        open_file(location, "README.md", access)
    with pytest.raises(SurroundingsError, match=r"is gated\. Accept the terms"):
        fetch_adapter(location, access)


@pytest.mark.usefixtures("inside", "server")
def test_a_hub_without_an_answer_is_no_fault_of_the_checkpoint(
    access: HubAccess, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(
            SurroundingsError, match="org/name could not be read from the Hub: the con"
        ):
            locate("org/name", kind="adapter", access=access)


@pytest.mark.usefixtures("inside")
def test_the_same_token_goes_to_adapter_and_base(
    server: HubServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    access = HubAccess(token=SECRET, cache_dir=tmp_path / "cache")
    for name in ("org/adapter", "org/base"):
        server.add(name, ADAPTER, token=SECRET)
        with pytest.raises(SurroundingsError, match="no such repo"):
            locate(name, kind="adapter", access=HubAccess(cache_dir=tmp_path / "cache"))
    server.authorizations.clear()
    adapter = locate("org/adapter", kind="adapter", access=access)
    fetch_adapter(adapter, access)
    base = base_from_config("org/base", None, access).location
    assert base is not None
    open_file(base, "README.md", access)
    assert set(server.authorizations) == {f"Bearer {SECRET}"}
    assert SECRET not in repr(access) + "".join(capfd.readouterr())


def test_a_malformed_token_is_refused_without_being_shown() -> None:
    for token in ("", f"{SECRET}\n", f"{SECRET} x", "hf_ö"):
        with pytest.raises(UsageError) as error:
            HubAccess(token=token)
        assert SECRET not in str(error.value)


@pytest.mark.usefixtures("inside")
def test_the_token_is_not_sent_to_the_server_of_the_files(
    server: HubServer, tmp_path: Path
) -> None:
    access = HubAccess(token=SECRET, cache_dir=tmp_path / "cache")
    server.add("org/name", ADAPTER, token=SECRET)
    with HubServer() as storage:
        storage.repos = server.repos
        server.elsewhere = storage
        location = locate("org/name", kind="adapter", access=access)
        with open_file(location, "adapter_model.safetensors", access) as file:
            assert file.size == 21_000_000
            assert (
                file.read_at(20_000_000, 4) == ADAPTER["adapter_model.safetensors"][-1_000_000:][:4]
            )
        assert storage.authorizations == [None, None]
        assert storage.bytes_served < 40_000


# --- reading by range ----------------------------------------------------------------------------


@pytest.mark.usefixtures("inside")
def test_a_file_is_read_by_range_at_its_commit(server: HubServer, access: HubAccess) -> None:
    server.add("org/name", {"sub/a b#.txt": bytes(range(256)) * 4000})
    location = locate("org/name/sub", kind="base", access=access)
    server.add("org/name", {"sub/a b#.txt": b"newer"})
    server.bytes_served = 0
    with open_file(location, "a b#.txt", access) as file:
        assert file.size == 1_024_000
        assert file.read_at(1_000_001, 3) == bytes([65, 66, 67])
        assert file.place == f"{location.label}/a b#.txt"
    assert server.bytes_served < 70_000


@pytest.mark.usefixtures("inside")
def test_a_hub_without_ranges_is_read(server: HubServer, access: HubAccess) -> None:
    server.ranges = False
    server.add("org/name", {"x": b"head" + bytes(30_000_000)})
    location = locate("org/name", kind="base", access=access)
    with open_file(location, "x", access) as file:
        assert (file.size, file.read_at(0, 4)) == (30_000_004, b"head")
    assert server.bytes_served < 15_000_000


@pytest.mark.usefixtures("inside")
def test_another_commit_than_asked_for_is_refused(server: HubServer, access: HubAccess) -> None:
    server.add("org/name", {"x": b"1"})
    location = locate("org/name", kind="base", access=access)
    server.repos["org/name"].refs[location.commit or ""] = server.add("org/name", {"x": b"2"})
    with pytest.raises(SurroundingsError, match="sent it from commit"):
        open_file(location, "x", access)


# --- whole files ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("inside")
def test_an_adapter_is_fetched_with_its_small_side_files(
    server: HubServer, access: HubAccess
) -> None:
    server.add("org/name", ADAPTER)
    location = locate("org/name", kind="adapter", access=access)
    assert "x.safetensors" not in list_files(location, access)
    fetched = fetch_adapter(location, access)
    assert fetched.folder is not None
    found = {
        str(path.relative_to(fetched.folder)): path.read_bytes()
        for path in fetched.folder.rglob("*")
        if path.is_file()
    }
    expected = (
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer/vocab.txt",
    )
    assert found == {name: ADAPTER[name] for name in expected}
    assert fetched.left_out == ("big.bin", "optimizer.pt", "runs/of:host")
    assert fetch_adapter(fetched, access) is fetched


@pytest.mark.usefixtures("inside")
def test_of_a_repo_only_the_adapter_s_subfolder_is_fetched(
    server: HubServer, access: HubAccess
) -> None:
    server.add("org/name", ADAPTER)
    location = locate("org/name/checkpoint-1", kind="adapter", access=access)
    fetched = fetch_adapter(location, access)
    assert fetched.folder is not None
    assert (fetched.folder / "adapter_model.safetensors").read_bytes() == b"other"
    assert not (fetched.folder.parent / "adapter_config.json").exists()


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (["README.md"], "V010.*there is no adapter_config.json"),
        (["vera/adapter_config.json"], "V017.*the folder vera/ is an adapter"),
        (["adapter_config.json"], "V011"),
        (["adapter_config.json", "adapter_model.bin"], "V012.*adapter_model.bin alone"),
    ],
)
def test_a_repo_that_is_no_adapter_is_refused_before_anything_is_fetched(
    files: list[str], reason: str, server: HubServer, access: HubAccess
) -> None:
    server.add("org/name", dict.fromkeys(files, b"{}"))
    location = locate("org/name", kind="adapter", access=access)
    with pytest.raises(CheckpointError, match=reason):
        fetch_adapter(location, access)
    assert not any("/resolve/" in path for path in server.paths())


@pytest.mark.usefixtures("inside")
def test_the_tokenizer_of_a_large_vocabulary_is_fetched(
    server: HubServer, access: HubAccess
) -> None:
    large = {"tokenizer.json": ADAPTER["big.bin"], "other.json": ADAPTER["big.bin"]}
    server.add("org/name", {**ADAPTER, **large})
    location = locate("org/name", kind="adapter", access=access)
    fetched = fetch_adapter(location, access)
    assert fetched.folder is not None
    assert (fetched.folder / "tokenizer.json").stat().st_size == SIDE_FILE_LIMIT + 1
    assert "other.json" in fetched.left_out


@pytest.mark.usefixtures("inside")
def test_a_file_of_unknown_size_does_not_count_as_small(
    server: HubServer, access: HubAccess
) -> None:
    server.sizes = False
    server.add("org/name", ADAPTER)
    location = locate("org/name", kind="adapter", access=access)
    fetched = fetch_adapter(location, access)
    assert "README.md" in fetched.left_out
    assert fetched.folder is not None
    assert (fetched.folder / "adapter_model.safetensors").exists()


@pytest.mark.usefixtures("inside")
def test_a_repo_that_gets_a_new_commit_meanwhile_is_read_at_the_first_commit(
    server: HubServer, access: HubAccess
) -> None:
    server.add("org/name", ADAPTER)
    location = locate("org/name", kind="adapter", access=access)
    server.add("org/name", ADAPTER | {"adapter_config.json": b"[]"})
    fetched = fetch_adapter(location, access)
    assert (fetched.fetched / "adapter_config.json").read_bytes() == b"{}"


@pytest.mark.usefixtures("inside")
def test_only_the_named_files_of_a_base_are_fetched(server: HubServer, access: HubAccess) -> None:
    server.add("gpt2", {"config.json": b"{}", "a/model.safetensors": b"1", "model.bin": b"2"})
    location = locate("gpt2", kind="base", access=access)
    fetched = fetch_base(location, access, names={"config.json", "a/model.safetensors"})
    assert fetched.folder is not None
    assert list_files(fetched, access) == {"a/model.safetensors": 1, "config.json": 2}


# --- the cache -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize("how", ["option", "environment"])
def test_offline_the_cache_serves_without_a_socket(
    how: str, server: HubServer, access: HubAccess, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = server.add("org/name", ADAPTER)
    online = locate("org/name", kind="adapter", access=access)
    fetched = fetch_adapter(online, access)

    def refuse(*_: object) -> None:
        pytest.fail("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    if how == "option":
        access = HubAccess(cache_dir=access.cache_dir, offline=True)
    else:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for text in ("org/name", "org/name@main", f"org/name@{commit}"):
        location = locate(text, kind="adapter", access=access)
        assert location.commit == commit
        again = fetch_adapter(location, access)
        assert again.folder == fetched.folder
        assert "README.md" in list_files(location, access)
        with open_file(location, "README.md", access) as file:
            assert file.read_at(0, 6) == b"# card"
    for text in ("org/absent", "org/name@v2"):
        with pytest.raises(SurroundingsError, match="not in the local cache"):
            locate(text, kind="adapter", access=access)
    with pytest.raises(SurroundingsError, match="not in the local cache"):
        open_file(location, "big.bin", access)
    with pytest.raises(SurroundingsError, match="not in the local cache"):
        fetch_base(location, access, names=["big.bin"])


@pytest.mark.usefixtures("inside")
def test_a_cached_file_is_not_requested_again(server: HubServer, access: HubAccess) -> None:
    server.add("org/name", ADAPTER)
    location = locate("org/name", kind="adapter", access=access)
    fetch_adapter(location, access)
    server.requests.clear()
    with open_file(location, "adapter_model.safetensors", access) as file:
        assert file.size == 21_000_000
    assert server.requests == []


@pytest.mark.usefixtures("inside")
def test_cached_files_are_used_if_the_hub_is_out_of_reach(
    server: HubServer, access: HubAccess, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = server.add("org/name", ADAPTER)
    location = locate("org/name", kind="adapter", access=access)
    fetch_adapter(location, access)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert locate("org/name", kind="adapter", access=access).commit == commit
    assert "README.md" in list_files(location, access)
    with pytest.raises(SurroundingsError, match="could not be read from the Hub"):
        locate("org/other", kind="adapter", access=access)


# --- the base of a config ------------------------------------------------------------------------


@pytest.mark.usefixtures("inside")
def test_a_base_in_a_config_is_looked_up(server: HubServer, access: HubAccess) -> None:
    commit = server.add("org/base", {"config.json": b"{}"}, ref="v1")
    found = base_from_config("org/base", "v1", access)
    assert found.location is not None
    assert found.location.commit == commit


@pytest.mark.usefixtures("inside")
def test_a_base_in_a_config_comes_from_the_cache_first(
    server: HubServer, access: HubAccess
) -> None:
    commit = server.add("org/base", {"model.safetensors": b"1"})
    location = locate("org/base", kind="base", access=access)
    fetch_base(location, access, names=["model.safetensors"])
    server.add("org/base", {"model.safetensors": b"2"})
    server.requests.clear()
    found = base_from_config("org/base", None, access)
    assert found.location is not None
    assert found.location.commit == commit
    assert server.requests == []


@pytest.mark.usefixtures("no_network", "inside")
@pytest.mark.parametrize(
    ("name", "revision"),
    [
        (None, None),
        ("", None),
        ("/data/llama", None),
        ("./llama", None),
        ("..", None),
        ("C:\\models\\llama", None),
        ("a/b/c", None),
        ("hf://org/name", None),
        ("org/name@v1", None),
        ("org/name\n", None),
        ("org/name", "../../x"),
    ],
)
def test_a_path_in_a_config_is_never_followed(
    name: str | None, revision: str | None, inside: Path, access: HubAccess
) -> None:
    (inside / "llama").mkdir()
    found = base_from_config(name, revision, access)
    assert found.location is None
    assert found.reason
    assert "\n" not in found.reason


def test_a_base_that_is_both_a_local_folder_and_a_repo_is_ambiguous(
    server: HubServer, inside: Path, access: HubAccess
) -> None:
    server.add("org/base", {"config.json": b"{}", "model.safetensors": b"weights"})
    (inside / "org/base").mkdir(parents=True)
    (inside / "org/base/config.json").write_bytes(b"{}")
    with pytest.raises(AmbiguousBaseError, match=r"--base \./org/base or --base hf://org/base"):
        base_from_config("org/base", None, access)


@pytest.mark.parametrize("file", ["config.json", "model_index.json", "model.safetensors"])
def test_a_base_that_the_hub_does_not_have_is_the_local_folder(
    file: str, server: HubServer, inside: Path, access: HubAccess
) -> None:
    (inside / "models/llama").mkdir(parents=True)
    (inside / "models/llama" / file).write_bytes(b"{}")
    found = base_from_config("models/llama", None, access)
    assert found.location is not None
    assert found.location.folder == Path("models/llama")
    assert "no repo of that name" in found.reason
    assert server.paths()


def test_a_local_folder_without_a_model_is_not_the_base(
    server: HubServer, inside: Path, access: HubAccess
) -> None:
    server.add("org/base", {"config.json": b"{}", "model.safetensors": b"weights"})
    (inside / "org/base").mkdir(parents=True)
    (inside / "org/base/adapter_config.json").write_bytes(b"{}")
    (inside / "org/base/adapter_model.safetensors").write_bytes(b"")
    found = base_from_config("org/base", None, access)
    assert found.location is not None
    assert (found.location.folder, found.location.repo_id) == (None, "org/base")


def test_the_large_side_file_of_these_tests_exceeds_the_limit_by_one_byte() -> None:
    assert len(ADAPTER["big.bin"]) == SIDE_FILE_LIMIT + 1
