"""Errors for a missing or old torch."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["with_torch", "with_torch.layer", "with_torch.model"])
def test_a_missing_torch_is_reported_with_the_install_command(module: str) -> None:
    code = f"""
import sys
sys.modules["torch"] = None
from vera_convert import SurroundingsError
try:
    import vera_convert.{module}
except SurroundingsError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "PyTorch" in run.stdout
    assert "pip install 'vera-convert[torch]'" in run.stdout


def test_a_torch_that_is_too_old_is_reported_with_the_install_command() -> None:
    code = """
import sys, types
sys.modules["torch"] = types.SimpleNamespace(__version__="2.3.1+cpu")
from vera_convert import SurroundingsError
try:
    import vera_convert.with_torch
except SurroundingsError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (
        "PyTorch 2.3.1+cpu is installed, and vera-convert needs PyTorch 2.4 or later." in run.stdout
    )
