"""These tests need torch, transformers and PEFT; without these, only one test runs."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import pytest

from vera_convert.verification.model_comparison import ModelComparison, ModelJob

PRESENT = all(map(find_spec, ("torch", "transformers", "peft")))
collect_ignore_glob = [] if PRESENT else ["test_[!w]*.py"]


@pytest.fixture(scope="session", autouse=PRESENT)
def _one_thread() -> None:
    """Use one thread, because more threads only wait for each other on matrices this small."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def models_here(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModelComparison]:
    """Let `verify` run models in this process; a child process would import torch and transformers
    again.
    """
    from vera_convert.verification import verify
    from vera_convert.with_torch.compare import compare_lora, compare_models

    def run_models(job: ModelJob, **_options: object) -> ModelComparison:
        return compare_lora(job, quiet) if job.is_lora else compare_models(job, quiet)

    def quiet(_stage: object, _done: int, _of: int) -> None:
        pass

    monkeypatch.setattr(verify, "run_models", run_models)
    return run_models
