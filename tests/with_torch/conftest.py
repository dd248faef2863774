"""These tests need torch, transformers and PEFT; where they are missing, one test alone is run."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import pytest

from vera_convert.verification.model_comparison import ModelComparison, ModelJob

PRESENT = all(map(find_spec, ("torch", "transformers", "peft")))
collect_ignore_glob = [] if PRESENT else ["test_[!w]*.py"]


@pytest.fixture(scope="session", autouse=PRESENT)
def _one_thread() -> None:
    """Threads would only wait for each other on matrices this small."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def models_here(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModelComparison]:
    """Let `verify` run models in this process: a child imports torch and transformers once more."""
    from vera_convert.verification import verify
    from vera_convert.with_torch.compare import compare_lora, compare_models

    def run_models(job: ModelJob, **_options: object) -> ModelComparison:
        return compare_lora(job, quiet) if job.is_lora else compare_models(job, quiet)

    def quiet(_stage: object, _done: int, _of: int) -> None:
        pass

    monkeypatch.setattr(verify, "run_models", run_models)
    return run_models
