"""These tests need torch, transformers and PEFT; where they are missing, one test alone is run."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

PRESENT = all(map(find_spec, ("torch", "transformers", "peft")))
collect_ignore_glob = [] if PRESENT else ["test_[!w]*.py"]


@pytest.fixture(scope="session", autouse=PRESENT)
def _one_thread() -> None:
    """Threads would only wait for each other on matrices this small."""
    import torch

    torch.set_num_threads(1)
