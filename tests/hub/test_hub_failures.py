"""A Hub that fails: short failures are retried, others are named, and no secret is shown."""

from __future__ import annotations

import email.utils
import io
import itertools
import json
import logging
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from commandline import Run
from hub_server import Fault, HubServer, stated

from vera_convert.errors import SurroundingsError, UsageError
from vera_convert.hub import checksum, client, download, retry
from vera_convert.hub.client import repo_info
from vera_convert.hub.download import cache_of_repo
from vera_convert.hub.lookup import (
    AmbiguousBaseError,
    HubAccess,
    base_from_config,
    fetch_adapter,
    fetch_base,
    list_files,
    locate,
    open_file,
)
from vera_convert.hub.redaction import redacted
from vera_convert.hub.refusals import LimitedError, OutOfReachError, Refusal, RefusedError

SECRET = "hf_SecretToken"  # noqa: S105 - of the stand-in
SIGNATURE = "c0ffee5167"
WEIGHTS = bytes(range(256)) * 2000
FILES = {
    "adapter_config.json": b'{"peft_type": "VERA"}',
    "adapter_model.safetensors": WEIGHTS,
    "README.md": b"# card",
}

TRANSIENT = [
    pytest.param(Fault(429), id="429"),
    pytest.param(Fault(500), id="500"),
    pytest.param(Fault(502), id="502"),
    pytest.param(Fault(503), id="503"),
    pytest.param(Fault(504), id="504"),
    pytest.param(Fault("reset"), id="reset"),
    pytest.param(Fault("silence"), id="silence"),
    pytest.param(Fault("cut"), id="cut"),
]


@pytest.fixture
def access(tmp_path: Path) -> HubAccess:
    return HubAccess(cache_dir=tmp_path / "cache", progress=False)


@pytest.fixture(autouse=True)
def impatient(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    # Only tests of silence have a short limit: on a busy machine any answer may take a second.
    timeout = 0.3 if "silence" in request.node.name else 30
    monkeypatch.setattr("hub_server.SILENCE", 0.6)
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", timeout)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    slept: list[float] = []
    monkeypatch.setattr(retry, "PAUSES", (0.5, 1.0, 2.0, 4.0))
    monkeypatch.setattr(time, "sleep", slept.append)
    return slept


def fetched(access: HubAccess) -> dict[str, bytes]:
    """Locate and fetch the adapter; return the files."""
    location = locate("org/name", kind="adapter", access=access)
    folder = fetch_adapter(location, access).fetched
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- failures that pass --------------------------------------------------------------------------


@pytest.mark.parametrize("fault", TRANSIENT)
def test_a_request_for_the_description_is_retried(
    fault: Fault, server: HubServer, access: HubAccess
) -> None:
    commit = server.add("org/name", FILES)
    server.info_failures = [fault]
    location = locate("org/name", kind="adapter", access=access)
    assert location.commit == commit
    assert server.info_failures == []


@pytest.mark.parametrize("fault", TRANSIENT)
def test_a_request_for_a_complete_file_is_retried(
    fault: Fault, server: HubServer, access: HubAccess
) -> None:
    server.add("org/name", FILES)
    for count in range(4):  # one in the config, two in the weights, one in the card
        server.failures = [fault]
        location = locate("org/name", kind="adapter", access=access)
        name = sorted(FILES)[min(count, 2)]
        folder = fetch_base(location, access, names=[name]).fetched
        assert (folder / name).read_bytes() == FILES[name]
        (folder / name).unlink()
        for blob in (cache_of_repo("org/name", access) / "blobs").iterdir():
            blob.unlink()


@pytest.mark.parametrize("fault", TRANSIENT)
def test_a_request_for_a_range_is_retried(
    fault: Fault, server: HubServer, access: HubAccess
) -> None:
    server.add("org/name", FILES)
    location = locate("org/name", kind="adapter", access=access)
    server.failures = [fault]
    with open_file(location, "adapter_model.safetensors", access) as file:
        server.failures = [fault]
        assert file.read_at(400_000, 1000) == WEIGHTS[400_000:401_000]
        server.failures = [fault, fault]
        assert file.read_at(100, 200_000) == WEIGHTS[100:200_100]


@pytest.mark.parametrize("fault", TRANSIENT)
def test_a_request_to_the_server_of_large_files_is_retried(
    fault: Fault, server: HubServer, access: HubAccess
) -> None:
    server.add("org/name", FILES)
    with HubServer(repos=server.repos) as storage:
        server.elsewhere = storage
        storage.failures = [fault]
        assert fetched(access) == FILES


def test_a_lasting_fault_ends_after_a_limited_number_of_tries(
    server: HubServer, access: HubAccess, pauses: list[float]
) -> None:
    server.add("org/name", FILES)
    location = locate("org/name", kind="adapter", access=access)
    for fault in (Fault(500), Fault(502), Fault(503), Fault(504), Fault("reset"), Fault("cut")):
        pauses.clear()
        server.info_failures, server.failures = [fault] * 99, [fault] * 99
        with pytest.raises(OutOfReachError, match=r"org/name could not be read .* in 5 tries"):
            locate("org/name", kind="adapter", access=access)
        with pytest.raises(OutOfReachError, match=r"README.md could not be read .* in 5 tries"):
            open_file(location, "README.md", access)
        assert pauses == [0.5, 1.0, 2.0, 4.0] * 2


@pytest.mark.parametrize(
    ("headers", "waited"),
    [
        ({"Retry-After": "3"}, 3.0),
        ({"Retry-After": "86400"}, retry.LONGEST_PAUSE),
        ({"Retry-After": "0"}, 0.5),
        ({"Retry-After": "soon"}, 0.5),
        ({"Retry-After": "9" * 30}, 0.5),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.5),
        ({"RateLimit": '"api";r=0;t=7'}, 7.0),
        ({"RateLimit": '"api";r=0;t=300'}, retry.LONGEST_PAUSE),
        ({"RateLimit": '"api";r=12;t=300'}, 0.5),
    ],
)
def test_a_server_that_asks_for_a_pause_gets_the_pause_within_limits(
    headers: dict[str, str],
    waited: float,
    server: HubServer,
    access: HubAccess,
    pauses: list[float],
) -> None:
    server.add("org/name", FILES)
    server.info_failures = [Fault(429, headers)]
    server.failures = [Fault(503, headers)]
    assert fetched(access) == FILES
    assert pauses == [waited, waited]


def test_a_server_that_names_a_time_for_the_next_try_gets_the_pause(
    server: HubServer, access: HubAccess, pauses: list[float]
) -> None:
    server.add("org/name", FILES)
    soon = email.utils.formatdate(time.time() + 20, usegmt=True)
    server.info_failures = [Fault(503, {"Retry-After": soon})]
    locate("org/name", kind="adapter", access=access)
    assert 15 < pauses[0] <= 20


def test_a_server_that_sends_headers_too_slowly_is_given_up(
    server: HubServer, access: HubAccess, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add("org/name", FILES)
    location = locate("org/name", kind="adapter", access=access)
    monkeypatch.setattr(retry, "WINDOW", 0.2)
    slow = r"could not be read from the Hub: the server sent less than 262,144 bytes in 0 seconds"
    server.info_failures, server.failures = [Fault("trickle")] * 9, [Fault("trickle")] * 9
    with pytest.raises(OutOfReachError, match=rf"^org/name {slow}"):
        repo_info("org/name", None, access)
    with pytest.raises(OutOfReachError, match=rf"README.md {slow}"):
        open_file(location, "README.md", access)
    with pytest.raises(OutOfReachError, match=rf"README.md {slow}"):
        fetch_base(location, access, names=["README.md"])
    # each request is sent once; the download sends another to learn the reason
    assert len(server.failures) >= 6


@pytest.mark.parametrize(
    ("status", "reason"), [(429, "rate limit is reached"), (503, "the Hub answers 503")]
)
def test_a_download_that_the_hub_delays_for_an_hour_is_given_up_with_the_hub_s_reason(
    status: int,
    reason: str,
    server: HubServer,
    access: HubAccess,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server.add("org/name", FILES)
    location = locate("org/name", kind="adapter", access=access)
    ends = threading.Event()
    monkeypatch.setattr(time, "sleep", lambda seconds: seconds > 60 and ends.wait(60))
    monkeypatch.setattr(retry, "WINDOW", 0.2)
    server.failures = [Fault(status, {"Retry-After": "3600"})] * 99
    try:
        with pytest.raises(OutOfReachError, match=reason) as caught:
            fetch_base(location, access, names=["README.md"])
    finally:
        ends.set()
    assert isinstance(caught.value, LimitedError) == (status == 429)


def test_a_slow_body_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retry, "WINDOW", 0.05)
    sent = itertools.count(0, retry.LEAST)
    ends = threading.Event()

    def transferred() -> int:
        if (now := next(sent)) > 3 * retry.LEAST:
            ends.set()
        return now

    assert retry.at_least_slowly(ends.wait, transferred, what="x")


def test_the_total_pause_of_a_request_is_limited(
    server: HubServer, access: HubAccess, pauses: list[float]
) -> None:
    server.add("org/name", FILES)
    server.info_failures = [Fault(429, {"Retry-After": "3600"})] * 99
    with pytest.raises(LimitedError):
        locate("org/name", kind="adapter", access=access)
    assert sum(pauses) <= retry.LONGEST_WAIT


# --- lasting failures ----------------------------------------------------------------------------


def refusal(access: HubAccess) -> RefusedError:
    """Fetch an adapter that is refused, and return the reason."""
    with pytest.raises(SurroundingsError) as caught:
        fetched(access)
    error = caught.value
    assert isinstance(error, RefusedError)
    return error


SAID = {
    Refusal.MISSING: ("no such repo", "Check the spelling"),
    Refusal.PRIVATE: ("the repo is private", "log in with `hf auth login` or pass --token"),
    Refusal.GATED: ("is gated", "Accept the terms on the repo's page"),
    Refusal.DISABLED: ("has disabled the repo", "Use another copy"),
    Refusal.BAD_TOKEN: ("does not accept the token", "Make a new token"),
    Refusal.RATE_LIMITED: ("rate limit is reached", "Wait some minutes, or log in"),
}


@pytest.mark.parametrize("kind", Refusal)
def test_each_lasting_reason_is_named_with_its_remedy_and_status_3(
    kind: Refusal, server: HubServer, tmp_path: Path, run: Run
) -> None:
    reason, remedy = SAID[kind]
    access = HubAccess(token=SECRET, cache_dir=tmp_path / "cache", progress=False)
    if kind is Refusal.PRIVATE:
        access = HubAccess(cache_dir=tmp_path / "cache", progress=False)
        server.add("org/name", FILES, token="other")  # noqa: S106 - of the stand-in
    elif kind is not Refusal.MISSING:
        gated, disabled = kind is Refusal.GATED, kind is Refusal.DISABLED
        server.add("org/name", FILES, gated=gated, disabled=disabled)
    server.refused_token = SECRET if kind is Refusal.BAD_TOKEN else None
    server.info_failures = [429] * 99 if kind is Refusal.RATE_LIMITED else []
    error = refusal(access)
    assert error.refusal is kind
    assert reason in str(error)
    assert remedy in str(error)
    options = () if access.token is None else ("--token", access.token)
    for command in (("info", "org/name"), ("strip", "org/name", tmp_path / "out")):
        ended = run(*command, *options, "--cache-dir", tmp_path / "cache", "--debug")
        assert ended.status == 3
        assert reason in ended.err
        assert remedy in ended.err
        assert SECRET not in ended.err


NO_REFUSALS = (b"[1]", b"5", b'{"error": 5}', b'{"errors": 5}', b'{"errors": [1]}')
"""JSON bodies of other forms than the Hub's; huggingface_hub expects an object."""


@pytest.mark.parametrize(
    ("fault", "token", "kind"),
    [
        (Fault(401), None, Refusal.PRIVATE),
        (Fault(403), None, Refusal.PRIVATE),
        (Fault(404), None, Refusal.MISSING),
        (Fault(410), None, Refusal.MISSING),
        (Fault(451), None, Refusal.DISABLED),
        (Fault(401, body=b'{"error": "User Token is expired"}'), SECRET, Refusal.BAD_TOKEN),
        (Fault(401, {"X-Error-Code": "GatedRepo"}), None, Refusal.GATED),
        (Fault(403, {"X-Error-Code": "GatedRepo"}), SECRET, Refusal.GATED),
        (
            Fault(403, body=b'{"error": "Access to this resource is disabled."}'),
            None,
            Refusal.DISABLED,
        ),
        (Fault(403, body=b"[" * 100_000), None, Refusal.PRIVATE),
        *((Fault(403, body=body), None, Refusal.PRIVATE) for body in NO_REFUSALS),
    ],
)
def test_every_form_of_a_refusal_is_recognized(
    fault: Fault, token: str | None, kind: Refusal, server: HubServer, tmp_path: Path
) -> None:
    server.add("org/name", FILES)
    access = HubAccess(token=token, cache_dir=tmp_path / "cache", progress=False)
    server.info_failures = [fault]
    assert refusal(access).refusal is kind
    assert len(server.requests) == 1
    server.failures = [fault]
    assert refusal(access).refusal is kind


def test_a_malformed_token_of_the_environment_is_refused_without_being_shown(
    server: HubServer, access: HubAccess, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add("org/name", FILES)
    monkeypatch.setenv("HF_TOKEN", f"{SECRET} ö")
    with pytest.raises(SurroundingsError, match="the token in HF_TOKEN") as caught:
        locate("org/name", kind="adapter", access=access)
    assert SECRET not in str(caught.value)


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("address", ["nothing", "http://[bad", "http://a b", "http://user@host"])
def test_a_malformed_address_of_the_hub_is_a_usage_error(
    address: str, access: HubAccess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", address)
    with pytest.raises(UsageError, match="HF_ENDPOINT must be a web address"):
        locate("org/name", kind="adapter", access=access)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"[]",
        b'{"sha": 1}',
        b'{"sha": "main", "siblings": []}',
        b'{"sha": "%s", "siblings": [{}]}' % (b"a" * 40),
        b"[" * 100_000,
        b'{"sha": ' + b"9" * 5000 + b"}",
    ],
)
def test_a_malformed_description_is_refused(
    body: bytes, server: HubServer, access: HubAccess
) -> None:
    server.add("org/name", FILES)
    server.info_failures = [Fault(200, {}, body)]
    with pytest.raises(SurroundingsError, match=r"the Hub(.s description| names no commit)"):
        locate("org/name", kind="adapter", access=access)


def test_a_description_without_end_is_read_up_to_a_limit(
    server: HubServer, access: HubAccess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_MOST_LISTED", 100)
    server.add("org/name", FILES)
    server.info_failures = [Fault(200, {}, b"{" + b" " * 10_000_000)]
    with pytest.raises(SurroundingsError, match="has more than 100 bytes"):
        locate("org/name", kind="adapter", access=access)
    assert server.bytes_served < 10_000_000


# --- bytes that differ from the Hub's statement --------------------------------------------------


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("ranges", [True, False])
def test_a_flipped_bit_is_refused_and_never_reaches_the_cache(
    name: str, ranges: bool, server: HubServer, access: HubAccess
) -> None:
    server.add("org/name", FILES)
    server.damaged, server.ranges = {name}, ranges
    for _ in range(2):
        with pytest.raises(SurroundingsError, match=f"{name}: the downloaded bytes have"):
            fetched(access)
        blobs = cache_of_repo("org/name", access) / "blobs"
        held = {path.name for path in blobs.iterdir()} if blobs.exists() else set()
        assert held <= {stated(other, content) for other, content in FILES.items()} - {
            stated(name, FILES[name])
        }
    server.damaged = set()
    assert fetched(access) == FILES


def test_a_flipped_bit_in_a_file_read_by_range_is_refused_after_the_last_range(
    server: HubServer, access: HubAccess
) -> None:
    server.add("org/name", FILES)
    server.damaged = {"adapter_config.json"}
    location = locate("org/name", kind="adapter", access=access)
    with pytest.raises(SurroundingsError, match="another hash than the Hub states"):
        open_file(location, "adapter_config.json", access)


def test_files_of_a_mirror_without_hashes_are_accepted(
    server: HubServer, access: HubAccess
) -> None:
    server.add("org/name", FILES)
    server.hashes = False
    assert fetched(access) == FILES


def test_a_file_of_a_mirror_with_another_size_than_listed_is_refused(
    server: HubServer, access: HubAccess
) -> None:
    server.add("org/name", FILES)
    server.hashes = False
    location = locate("org/name", kind="adapter", access=access)
    server.repos["org/name"].commits[location.commit or ""]["README.md"] = b"#"
    with pytest.raises(SurroundingsError, match=r"README.md: the downloaded bytes have"):
        fetch_base(location, access, names=["README.md"])


def test_a_damaged_file_of_the_cache_is_refused_and_kept(
    server: HubServer, access: HubAccess
) -> None:
    server.add("org/name", FILES)
    location = locate("org/name", kind="adapter", access=access)
    folder = fetch_base(location, access, names=[*FILES]).fetched
    for name, content in FILES.items():
        (folder / name).write_bytes(content[:-1] + b"!")
        offline = HubAccess(cache_dir=access.cache_dir, offline=True)
        for each in (access, offline):
            with pytest.raises(SurroundingsError, match=r"in the Hub's cache is damaged.* Delete"):
                fetch_base(location, each, names=[name])
        assert (folder / name).read_bytes() != content
        (folder / name).resolve().unlink()
        assert fetch_base(location, access, names=[name]).fetched == folder
        assert (folder / name).read_bytes() == content


def test_a_large_file_of_the_cache_is_hashed_once_unless_it_changes(
    server: HubServer, access: HubAccess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_REMEMBERED", len(WEIGHTS))
    server.add("org/name", FILES)
    location = locate("org/name", kind="adapter", access=access)
    folder = fetch_base(location, access, names=["adapter_model.safetensors"]).fetched
    hashed: list[int] = []
    actual = checksum.has_digests

    def counted(blocks: Iterable[bytes], size: int, stated: Iterable[str]) -> bool:
        hashed.append(size)
        return actual(blocks, size, stated)

    monkeypatch.setattr(download, "has_digests", counted)
    fetch_base(location, access, names=["adapter_model.safetensors"])
    assert hashed == []
    (folder / "adapter_model.safetensors").write_bytes(WEIGHTS[::-1])
    with pytest.raises(SurroundingsError, match="is damaged"):
        fetch_base(location, access, names=["adapter_model.safetensors"])
    assert hashed == [len(WEIGHTS)]


def test_a_file_with_another_size_than_listed_is_refused(
    server: HubServer, access: HubAccess
) -> None:
    server.add("org/name", FILES)
    location = locate("org/name", kind="adapter", access=access)
    commit = location.commit or ""
    server.repos["org/name"].commits[commit]["README.md"] = b"#"
    with pytest.raises(SurroundingsError, match=r"README.md: .* another hash than the Hub states"):
        fetch_base(location, access, names=["README.md"])


def test_a_full_disk_is_named(
    server: HubServer, access: HubAccess, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add("org/name", FILES)
    monkeypatch.setattr("shutil.disk_usage", lambda _path: type("Usage", (), {"free": 10}))
    with pytest.raises(
        SurroundingsError, match=r"has 10 bytes free, and .* take 512,027\. Free some"
    ):
        fetched(access)


def test_an_interrupted_download_leaves_no_file(server: HubServer, access: HubAccess) -> None:
    server.add("org/name", FILES)
    location = locate("org/name", kind="adapter", access=access)
    server.failures = [200, *[Fault("cut")] * 99]
    with pytest.raises(SurroundingsError):
        fetch_base(location, access, names=["adapter_model.safetensors"])
    left = [path.name for path in cache_of_repo("org/name", access).rglob("*.incomplete")]
    # huggingface_hub < 2 continues an interrupted download
    assert [name for name in left if name.count(".") > 1] == []
    server.failures = []
    folder = fetch_base(location, access, names=["adapter_model.safetensors"]).fetched
    assert (folder / "adapter_model.safetensors").read_bytes() == WEIGHTS


# --- secrets -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [Fault(503), Fault("reset"), pytest.param(Fault("silence"), id="silence"), Fault("cut"), 403],
)
def test_no_signed_address_and_no_token_reaches_stderr(
    fault: Fault | int, server: HubServer, tmp_path: Path, run: Run
) -> None:
    server.add("org/name", FILES, token=SECRET)
    with HubServer(repos=server.repos) as storage:
        server.elsewhere, server.signature = storage, SIGNATURE
        storage.failures = [fault] * 99
        for command in ("info", "validate"):
            where = ("--cache-dir", tmp_path / "cache", "--token", SECRET)
            ended = run(command, "org/name", *where, "--debug")
            assert ended.status == 3
            assert "Traceback" in ended.err or command == "validate"
            assert SIGNATURE not in ended.out + ended.err
            assert SECRET not in ended.out + ended.err
        assert any(SIGNATURE in path for path in storage.addresses)


def test_the_log_lines_of_huggingface_hub_show_no_signature(
    server: HubServer, access: HubAccess, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("huggingface_hub")
    before, written = logger.level, io.StringIO()
    monkeypatch.setattr(logger, "handlers", [logging.StreamHandler(written)])
    server.add("org/name", FILES)
    with HubServer(repos=server.repos) as storage:
        server.elsewhere, server.signature = storage, SIGNATURE
        try:
            logger.setLevel(logging.DEBUG)
            assert fetched(access) == FILES
            logging.getLogger("huggingface_hub.x").warning(
                "Error while downloading from %s", f"https://host.example/a?Signature={SIGNATURE}"
            )
            try:
                raise OSError(f"https://host.example/b?Signature={SIGNATURE}")
            except OSError:
                logging.getLogger("huggingface_hub.x").debug("failed", exc_info=True)
        finally:
            logger.setLevel(before)
    shown = written.getvalue()
    assert "OSError: https://host.example/b?***" in shown
    assert "Error while downloading from https://host.example/a?***" in shown
    assert SIGNATURE not in shown


def test_secrets_are_removed_from_texts() -> None:
    assert (
        redacted("get https://u:p@h.example/x?a=b&c=d#e now")
        == "get https://***@h.example/x?*** now"
    )
    assert redacted("url: /x/y?X-Amz-Signature=abc (Caused by z)") == "url: /x/y?*** (Caused by z)"
    assert (
        redacted("Illegal header value b'Bearer hf_abc\\n'") == "Illegal header value b'Bearer ***'"
    )
    assert redacted("hf_abcDEF123, and mine", "mine") == "hf_***, and ***"
    assert redacted("what? nothing") == "what? nothing"


# --- the number of requests ----------------------------------------------------------------------


def test_only_needed_files_are_requested(
    server: HubServer, access: HubAccess, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    commit = server.add("org/name", FILES)
    assert fetched(access) == FILES
    assert set(server.everything) == {
        "/api/models/org/name?blobs=true",
        *(f"/org/name/resolve/{commit}/{name}" for name in FILES),
    }


def test_a_repo_s_description_is_requested_once(server: HubServer, access: HubAccess) -> None:
    commit = server.add("org/name", FILES)
    location = locate("org/name", kind="adapter", access=access)
    assert list_files(location, access)["README.md"] == 6
    fetch_adapter(location, access)
    asked = [path for path in server.paths() if path.startswith("/api/")]
    assert asked == ["/api/models/org/name"]
    pinned = locate(f"org/name@{commit}", kind="adapter", access=access)
    list_files(pinned, access)
    list_files(locate(f"org/name@{commit}", kind="base", access=access), access)
    asked = [path for path in server.paths() if path.startswith("/api/")]
    assert asked == ["/api/models/org/name", f"/api/models/org/name/revision/{commit}"]


def test_a_file_that_is_fetched_takes_two_requests(server: HubServer, access: HubAccess) -> None:
    server.add("org/name", FILES)
    assert fetched(access) == FILES
    assert len(server.requests) == 1 + 2 * len(FILES)


def test_the_first_request_for_weights_takes_at_most_32_kibibytes(
    server: HubServer, access: HubAccess
) -> None:
    server.add("org/name", FILES)
    location = locate("org/name", kind="adapter", access=access)
    open_file(location, "adapter_model.safetensors", access)
    span = server.requests[-1][2]
    assert span is not None
    first, last = span.removeprefix("bytes=").split("-")
    assert first == "0"
    assert 16 << 10 <= int(last) + 1 <= 32 << 10


def test_the_cache_of_headers_is_limited_and_damaged_entries_are_ignored(
    server: HubServer, access: HubAccess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vera_convert.hub.header_cache.MOST_OF_A_REPO", 100_000)
    server.add("org/name", {f"{n}.safetensors": WEIGHTS for n in range(9)})
    location = locate("org/name", kind="base", access=access)
    kept = cache_of_repo("org/name", access) / "vera-convert"
    for n in range(9):
        open_file(location, f"{n}.safetensors", access)
        assert sum(path.stat().st_size for path in kept.iterdir()) <= 100_000
    for path in kept.iterdir():
        data = path.read_bytes()
        for damaged in (
            data[:-1],
            data[:-1] + b"!",
            b"",
            b"{}\n",
            b"null\n",
            b"[" * 2000,
            data * 9,
        ):
            path.write_bytes(damaged)
            server.requests.clear()
            with open_file(location, "8.safetensors", access) as file:
                assert file.read_at(0, 100) == WEIGHTS[:100]
            assert len(server.requests) <= 1
        path.unlink()


def test_huggingface_hub_can_read_the_cache(server: HubServer, access: HubAccess) -> None:
    from huggingface_hub import scan_cache_dir, try_to_load_from_cache

    commit = server.add("org/name", FILES)
    server.add("org/headers", FILES)
    open_file(locate("org/headers", kind="base", access=access), "README.md", access)
    assert fetched(access) == FILES
    assert access.cache_dir is not None
    for revision in ("main", commit):
        found = try_to_load_from_cache(
            "org/name", "README.md", cache_dir=access.cache_dir, revision=revision
        )
        assert isinstance(found, str)
        assert Path(found).read_bytes() == b"# card"
    report = scan_cache_dir(access.cache_dir)
    assert report.warnings == []
    (repo,) = (repo for repo in report.repos if repo.repo_id == "org/name")
    assert {file.file_name for each in repo.revisions for file in each.files} == set(FILES)


def test_a_cache_that_cannot_be_written_is_named(
    server: HubServer, access: HubAccess, tmp_path: Path
) -> None:
    server.add("org/name", FILES)
    (tmp_path / "cache").write_bytes(b"a file")
    with pytest.raises(SurroundingsError, match="the Hub's cache cannot be written"):
        fetched(access)


def test_a_json_error_document_holds_no_secret(server: HubServer, tmp_path: Path, run: Run) -> None:
    server.add("org/name", FILES, gated=True)
    where = ("--cache-dir", tmp_path / "cache", "--token", SECRET)
    ended = run("info", "org/name", "--json", *where)
    assert ended.status == 3
    assert "gated" in json.dumps(json.loads(ended.out))
    assert SECRET not in ended.out + ended.err


# --- a base that is also a local folder ----------------------------------------------------------


def model_here() -> None:
    folder = Path("org/name")
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(b"{}")


@pytest.mark.parametrize(
    "fault", [Fault(429), Fault(503), Fault("reset"), Fault(401, body=b'{"error": "expired"}')]
)
@pytest.mark.usefixtures("pauses")
def test_a_hub_without_an_answer_does_not_decide_for_the_local_folder(
    fault: Fault, server: HubServer, tmp_path: Path
) -> None:
    access = HubAccess(token=SECRET, cache_dir=tmp_path / "cache", progress=False)
    model_here()
    server.add("org/name", FILES)
    server.info_failures = [fault] * 99
    with pytest.raises(SurroundingsError, match=r"could not be read .* give --base \./org/name\.$"):
        base_from_config("org/name", None, access)


@pytest.mark.parametrize("refused", ["gated", "disabled"])
def test_a_base_that_the_hub_refuses_to_send_is_ambiguous_with_a_local_folder(
    refused: str, server: HubServer, access: HubAccess
) -> None:
    model_here()
    server.add("org/name", FILES, gated=refused == "gated", disabled=refused == "disabled")
    with pytest.raises(AmbiguousBaseError, match=r"--base \./org/name or --base hf://org/name"):
        base_from_config("org/name", None, access)


@pytest.mark.parametrize("private", [True, False])
def test_a_base_that_the_hub_does_not_show_is_the_local_folder(
    private: bool, server: HubServer, access: HubAccess
) -> None:
    model_here()
    if private:
        server.add("org/name", FILES, token="other")  # noqa: S106 - of the stand-in
    found = base_from_config("org/name", None, access)
    assert found.location is not None
    assert found.location.folder == Path("org/name")
    assert "the Hub shows this account no repo of that name" in found.reason


def test_offline_only_the_cache_decides_about_the_local_folder(
    server: HubServer, tmp_path: Path
) -> None:
    access = HubAccess(cache_dir=tmp_path / "cache", offline=True)
    model_here()
    found = base_from_config("org/name", None, access)
    assert found.location is not None
    assert found.location.folder == Path("org/name")
    assert "the Hub's cache holds no repo of that name" in found.reason
    assert not server.requests
