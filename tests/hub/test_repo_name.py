from __future__ import annotations

import pytest

from vera_convert.hub.repo_name import (
    RepoName,
    is_repo_id,
    is_revision,
    looks_like_path,
    parse_repo_name,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", RepoName("org/name")),
        ("org/name@v1.0", RepoName("org/name", "v1.0")),
        ("org/name/sub", RepoName("org/name", None, "sub")),
        ("org/name/a/b@c", RepoName("org/name", None, "a/b@c")),
        ("org/name@main/a/b", RepoName("org/name", "main", "a/b")),
        ("org/name@refs/pr/12", RepoName("org/name", "refs/pr/12")),
        ("org/name@refs/pr/12/sub", RepoName("org/name", "refs/pr/12", "sub")),
        ("org/name@a%2Fb", RepoName("org/name", "a%2Fb")),
        ("hf://org/name", RepoName("org/name")),
        ("hf://org/name@main/sub", RepoName("org/name", "main", "sub")),
        ("hf://models/org/name@refs/pr/1", RepoName("org/name", "refs/pr/1")),
        ("hf://org/name@a%2Fb/sub", RepoName("org/name", "a/b", "sub")),
        ("hf://org/name/", RepoName("org/name")),
        ("org/name/", RepoName("org/name")),
        ("org/name@main/", RepoName("org/name", "main")),
        ("org/name/sub/", RepoName("org/name", None, "sub")),
        ("org/name.git", RepoName("org/name")),
        ("https://huggingface.co/org/name.git", RepoName("org/name")),
        ("https://huggingface.co/org/name/", RepoName("org/name")),
        ("git@hf.co:org/name", RepoName("org/name")),
        ("git@hf.co:org/name.git", RepoName("org/name")),
        ("ssh://git@hf.co/org/name", RepoName("org/name")),
        ("https://hf.co/org/name/tree/main/sub", RepoName("org/name", "main", "sub")),
        ("https://hf.co/org/name/tree/refs%2Fpr%2F1", RepoName("org/name", "refs/pr/1")),
        (
            "https://hf.co/org/name/blob/v1/a/adapter_config.json",
            RepoName("org/name", "v1", "a"),
        ),
        (
            "https://hf.co/org/name/resolve/main/adapter_model.safetensors?download=true",
            RepoName("org/name", "main"),
        ),
        ("https://hf.co/org/name/raw/main/adapter_config.json", RepoName("org/name", "main")),
        (f"https://hf.co/org/name/commit/{'a' * 40}", RepoName("org/name", "a" * 40)),
    ],
)
def test_a_repo_name_is_parsed(text: str, expected: RepoName) -> None:
    assert parse_repo_name(text, bare=False) == expected


def test_an_hf_address_is_parsed_as_by_huggingface_hub() -> None:
    from huggingface_hub import utils

    if not hasattr(utils, "parse_hf_uri"):
        pytest.skip("this huggingface_hub parses no addresses")
    for text in (
        "hf://org/name",
        "hf://models/org/name",
        "hf://org/name@main/sub/folder",
        "hf://org/name@refs/pr/3/sub",
        "hf://org/name@a%2Fb/sub",
        "hf://org/name/deep/file@1",
    ):
        theirs = utils.parse_hf_uri(text)
        ours = parse_repo_name(text, bare=False)
        assert ours == RepoName(theirs.id, theirs.revision, theirs.path_in_repo)


@pytest.mark.parametrize("text", ["gpt2", "gpt2@main", "gpt2@refs/pr/2", "hf://gpt2"])
def test_a_bare_name_is_a_repo_only_if_allowed(text: str) -> None:
    assert parse_repo_name(text, bare=True).repo_id == "gpt2"
    with pytest.raises(ValueError, match="org/name"):
        parse_repo_name(text, bare=False)


@pytest.mark.parametrize(
    "text",
    [
        "org/name@",
        "org//name",
        "org/name//",
        "git@github.com:org/name.git",
        "https://hf.co/org/name/discussions/1",
        "org/name/../up",
        "org/name@a..b",
        "org/name@-x",
        "org/na me",
        "org/naïve",
        "org/name.git.git",
        "org/a--b",
        f"org/{'n' * 97}",
        "https://example.com/org/name",
        "hf://",
        "hf://datasets/org/name",
        "hf://model/org/name",
        "hf://models/name",
        "org/name\n",
        "org/name/sub\x07",
    ],
)
def test_a_malformed_name_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse_repo_name(text, bare=False)


@pytest.mark.parametrize(
    "text", [".", "./x", "../x", "/x", "~/x", "~", "C:x", "c:/x", "a\\b", "\\\\host\\share"]
)
def test_names_that_look_like_a_path(text: str) -> None:
    assert looks_like_path(text)
    assert not is_repo_id(text)


def test_names_that_do_not_look_like_a_path() -> None:
    assert not any(map(looks_like_path, ("org/name", "gpt2", "hf://org/name", "org/name@v1/sub")))


@pytest.mark.parametrize("text", ["main", "v1.0", "refs/pr/1", "feature/x", "a" * 40, "ünïcode"])
def test_a_revision_that_git_allows(text: str) -> None:
    assert is_revision(text)


@pytest.mark.parametrize(
    "text", ["", "-f", "a..b", "../x", "/x", "x/", "a b", "x.lock", "a@b", "."]
)
def test_a_revision_that_git_does_not_allow(text: str) -> None:
    assert not is_revision(text)
