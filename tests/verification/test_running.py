"""The process that runs models: the parent reports each end of the process and removes all
files.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from modelchildren import RESULT

from vera_convert.errors import SurroundingsError, UsageError
from vera_convert.verification import running
from vera_convert.verification.model_comparison import ModelComparison, ModelJob, Stage
from vera_convert.verification.running import Limit, Limits, run_models

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals end the children here")

SHORT = Limits(times=dict.fromkeys(Stage, Limit(0.2)) | {Stage.START: Limit(60)})


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run a stand-in for the child process, with temporary files in this folder."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(running, "_CHILD", "modelchildren")
    return folder


def job(tmp_path: Path, told: str, weights: int = 0) -> ModelJob:
    return ModelJob((), tmp_path, tmp_path, weights, samples=1, lines=(told,))


def is_alive(tmp_path: Path) -> bool:
    try:
        os.kill(int((tmp_path / "pid").read_text()), 0)
    except ProcessLookupError:
        return False
    return True


def test_the_child_s_answer_is_the_result(tmp_path: Path, scratch: Path) -> None:
    told: list[tuple[int, int]] = []
    found = run_models(job(tmp_path, "answer", 1000), progress=lambda *given: told.append(given))
    memory = 4 * 2**30 + 2**26 * (os.cpu_count() or 1) + 8 * 1000
    assert found == ModelComparison(**{**RESULT, "tokens": memory})  # type: ignore[arg-type]
    assert told == [(0, 5), (1, 5)]
    assert [*scratch.iterdir()] == []
    assert not is_alive(tmp_path)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ("fail", r"^it cannot be built\.$"),
        ("abort", "ended by signal SIGABRT while it was running a model on a sample"),
        ("leave", "ended with status 7 while it was running"),
        ("noise", "ended by signal SIGKILL while it was running"),
        ("mute", "ended by signal SIGKILL while it was running"),
        ("sleep", r"running a model on a sample was stopped: .*longer than 0 s.*--layers-only"),
    ],
)
def test_a_child_that_fails_dies_or_hangs_is_a_clear_error(
    told: str, said: str, tmp_path: Path, scratch: Path
) -> None:
    limits = SHORT if told == "sleep" else None
    with pytest.raises(SurroundingsError, match=said):
        run_models(job(tmp_path, told), limits=limits)
    assert [*scratch.iterdir()] == []
    assert not is_alive(tmp_path)


def test_a_wrong_option_is_reported_as_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^Leave --text out\.$"):
        run_models(job(tmp_path, "usage"))


def test_time_limits_grow_with_the_weights(tmp_path: Path) -> None:
    times = dict.fromkeys(Stage, Limit(0.1, 0.2)) | {Stage.START: Limit(60)}
    with pytest.raises(SurroundingsError, match="longer than 1 s"):
        run_models(job(tmp_path, "sleep", 4 << 30), limits=Limits(times=times))


def test_the_child_has_no_secret_no_network_and_no_module_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    (tmp_path / "json.py").write_text("raise SystemExit('evil')")
    monkeypatch.chdir(tmp_path)
    run_models(job(tmp_path, "answer"))
    environment = json.loads((tmp_path / "environment").read_text())
    assert "HF_TOKEN" not in environment
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["USE_HUB_KERNELS"] == "NO"
    path = json.loads((tmp_path / "path").read_text())
    assert "" not in path
    assert str(tmp_path) not in path


def test_an_interrupted_parent_leaves_no_child_and_no_file(tmp_path: Path, scratch: Path) -> None:
    program = f"""
import sys, tempfile
from pathlib import Path
from vera_convert.publish.signals import signals_raise
from vera_convert.verification import running
from vera_convert.verification.model_comparison import ModelJob
tempfile.tempdir = {str(scratch)!r}
running._CHILD = "modelchildren"
folder = Path({str(tmp_path)!r})
with signals_raise():
    running.run_models(ModelJob((), folder, folder, 0, samples=1, lines=("sleep",)))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    parent = subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stderr=subprocess.DEVNULL
    )
    try:
        until = time.monotonic() + 60
        while not (tmp_path / "pid").exists() and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(0.2)
        parent.send_signal(signal.SIGTERM)
        assert parent.wait(60) != 0
    finally:
        parent.kill()
        parent.wait()
    assert [*scratch.iterdir()] == []
    assert not is_alive(tmp_path)
