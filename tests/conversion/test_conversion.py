"""strip, embed and migrate with adapter and base on the Hub, or with a base that is unavailable."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from adapterdefects import bare, fields, stripped
from adapters import RANK
from bases import tiny_base
from folders import WEIGHTS, bytes_by_name, codes
from hub_server import HubServer

from vera_convert.base.facts import BaseOptions
from vera_convert.conversion.migration import Mode, migrate, migrate_tree
from vera_convert.conversion.strip_embed import embed, strip
from vera_convert.errors import SurroundingsError
from vera_convert.hub.lookup import HubAccess
from vera_convert.summary import info

LARGE = 8_000_000


@pytest.fixture
def hub(server: HubServer, tmp_path: Path) -> HubServer:
    """Start a Hub with the large base of the good adapter."""
    base = tiny_base(tmp_path / "base", tensors={"model.embed_tokens.weight": (LARGE // 64, 16)})
    server.add("example/tiny-llama", bytes_by_name(base))
    return server


@pytest.fixture
def access(tmp_path: Path) -> HubAccess:
    return HubAccess(cache_dir=tmp_path / "cache", progress=False)


def requests_for(server: HubServer, repo: str) -> bool:
    return any(repo in path for path in [*server.paths("GET"), *server.paths("HEAD")])


def test_of_a_base_on_the_hub_only_kilobytes_are_read(
    hub: HubServer, access: HubAccess, adapter: Path, tmp_path: Path
) -> None:
    done = strip(adapter, tmp_path / "stripped", access=access)
    assert done.findings == ()
    assert done.base_facts.source.startswith("example/tiny-llama@")
    bare(adapter)
    embedded = embed(adapter, tmp_path / "embedded", access=access)
    assert codes(embedded) == {"V410"}
    assert hub.bytes_served < LARGE // 50


def test_an_adapter_on_the_hub_is_converted_like_any_other(
    hub: HubServer, access: HubAccess, adapter: Path, tmp_path: Path
) -> None:
    (adapter / "README.md").write_text("card")
    (adapter / "optimizer.pt").write_bytes(b"state")
    commit = hub.add("org/name", {f"vera/{k}": v for k, v in bytes_by_name(adapter).items()})
    done = strip("org/name@main/vera", tmp_path / "stripped", access=access)
    assert done.adapter == f"org/name@{commit}/vera"
    assert done.side_files.copied == ("README.md",)
    assert done.side_files.left_out == ("optimizer.pt",)
    embed(tmp_path / "stripped", tmp_path / "embedded", access=access)
    assert (tmp_path / "embedded" / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes()
    assert info("org/name/vera", access=access).location.commit == commit


def test_a_base_that_is_not_needed_is_not_requested(
    hub: HubServer, access: HubAccess, adapter: Path, tmp_path: Path
) -> None:
    embed(adapter, tmp_path / "a", access=access)  # the adapter stores A and B
    migrate(adapter, tmp_path / "b", to=Mode.ASIS, access=access)
    assert not requests_for(hub, "example")
    stripped(adapter)
    hub.requests.clear()
    strip(adapter, tmp_path / "c", access=access)  # the adapter stores no A and B
    embed(adapter, tmp_path / "d", access=access)  # the fingerprint records the dims
    migrate(adapter, tmp_path / "e", to=Mode.EMBEDDED, access=access)
    migrate(adapter, tmp_path / "f", to=Mode.STRIPPED, access=access)
    assert not requests_for(hub, "example")


@pytest.mark.parametrize("failures", [[503] * 9, [404] * 9, [401] * 9])
def test_an_unavailable_base_is_a_warning_if_the_command_works_without_the_base(
    failures: list[int], hub: HubServer, access: HubAccess, adapter: Path, tmp_path: Path
) -> None:
    del hub.repos["example/tiny-llama"]
    hub.failures += failures
    done = strip(adapter, tmp_path / "stripped", access=access)
    assert codes(done) == {"V404"}
    assert "example/tiny-llama" in done.findings[0].reason
    assert "example/tiny-llama" in info(adapter, access=access).base_facts.source
    bare(adapter)
    with pytest.raises(SurroundingsError, match="example/tiny-llama"):
        embed(adapter, tmp_path / "embedded", access=access)


def test_an_unsuitable_base_of_the_config_is_a_warning(
    hub: HubServer, access: HubAccess, adapter: Path, tmp_path: Path
) -> None:
    hub.add("example/tiny-llama", bytes_by_name(tiny_base(tmp_path / "other", dtype="int8")))
    quantized = strip(adapter, tmp_path / "a", access=access)
    assert codes(quantized) == {"V404", "V415"}
    hub.add("example/tiny-llama", {"config.json": b"{}", "model.gguf": b"GGUF"})
    without = strip(adapter, tmp_path / "b", access=access)
    assert codes(without) == {"V404"}
    assert "V503" in without.findings[0].reason
    fields({"target_modules": "("})(adapter)  # an invalid pattern is the adapter's own defect
    hub.add("example/tiny-llama", bytes_by_name(tmp_path / "base"))
    with pytest.raises(Exception, match="V130"):
        strip(adapter, tmp_path / "c", access=access)


def test_the_revisions_of_adapter_and_base_are_kept_apart(
    hub: HubServer, access: HubAccess, adapter: Path, tmp_path: Path
) -> None:
    base = bytes_by_name(tmp_path / "base")
    fields({"revision": "recorded"})(adapter)
    bases = {
        ref: hub.add("example/tiny-llama", {**base, "README.md": ref.encode()}, ref=ref)
        for ref in ("main", "recorded", "given")
    }
    commits = {
        ref: hub.add("org/name", {**bytes_by_name(adapter), "README.md": ref.encode()}, ref=ref)
        for ref in ("main", "mine")
    }
    by_config = strip("org/name", tmp_path / "a", revision="mine", access=access)
    assert by_config.adapter == f"org/name@{commits['mine']}"
    assert by_config.base_facts.source == f"example/tiny-llama@{bases['recorded']}"
    by_option = strip("org/name", tmp_path / "b", base=BaseOptions(revision="given"), access=access)
    assert by_option.adapter == f"org/name@{commits['main']}"
    assert by_option.base_facts.source == f"example/tiny-llama@{bases['given']}"
    by_name = BaseOptions("example/tiny-llama", revision="given")
    by_both = strip("org/name", tmp_path / "c", base=by_name, access=access)
    assert by_both.base_facts.source == f"example/tiny-llama@{bases['given']}"


def test_info_fetches_only_config_and_weights(
    hub: HubServer, access: HubAccess, adapter: Path
) -> None:
    (adapter / "tokenizer.json").write_bytes(bytes(1000))
    hub.add("example/adapter", bytes_by_name(adapter))
    found = info("example/adapter", access=access)
    assert found.config.r == RANK
    asked = [path for path in hub.paths("GET") if "example/adapter/resolve" in path]
    assert {path.rpartition("/")[2] for path in asked} == {"adapter_config.json", WEIGHTS}


def test_a_tree_of_adapters_requests_each_base_and_each_header_once(
    hub: HubServer, access: HubAccess, adapter: Path, tmp_path: Path
) -> None:
    for name in ("a", "b", "c/d"):
        shutil.copytree(adapter, tmp_path / "tree" / name)
    for run in range(2):
        hub.requests.clear()
        done = migrate_tree(
            tmp_path / "tree", tmp_path / f"out{run}", to=Mode.EMBEDDED, access=access
        )
        assert len(done.done) == 3
        described = [path for path in hub.paths() if path.startswith("/api/")]
        assert described == ["/api/models/example/tiny-llama"]
        assert len(hub.requests) == (3, 1)[run]
    assert not hub.paths("HEAD")
