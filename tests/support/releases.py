"""Skip tests that need a newer torch, transformers or PEFT than the installed release."""

from __future__ import annotations

import inspect
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest
from packaging.version import Version


def has(library: str, release: str) -> bool:
    """Say whether a library is installed in this release or a later release."""
    try:
        return Version(Version(version(library)).base_version) >= Version(release)
    except PackageNotFoundError:
        return False


def needs(library: str, release: str, why: str) -> pytest.MarkDecorator:
    """Skip a test if a library is older than a release; `why` names the needed feature."""
    return pytest.mark.skipif(
        not has(library, release), reason=f"needs {library} {release} or later: {why}"
    )


def of_transformers(name: str) -> Any:
    """Return a class of transformers, or skip the test if the installed release lacks the class."""
    import transformers

    if not hasattr(transformers, name):
        pytest.skip(f"needs a later transformers than {transformers.__version__}: one with {name}")
    return getattr(transformers, name)


def resize_vocabulary(model: Any, rows: int) -> None:
    """Resize a model's embeddings; new rows are not the mean of old rows if the class allows."""
    asks = "mean_resizing" in inspect.signature(model.resize_token_embeddings).parameters
    model.resize_token_embeddings(rows, **({"mean_resizing": False} if asks else {}))


AS_STORED: dict[str, Any] = {"dtype" if has("transformers", "4.56") else "torch_dtype": "auto"}
"""The argument that makes transformers keep the dtypes of the files."""
