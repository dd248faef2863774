"""The values of a base that decide a merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from vera_convert.base.model import BaseModel, BaseTensor
from vera_convert.files.header import TensorInfo
from vera_convert.hub.lookup import Location
from vera_convert.merging.base_files import BaseFiles, own_heads


@pytest.mark.parametrize("packed", ["lm_head.weight", "model.embed_tokens.weight"])
def test_a_head_is_not_tied_if_head_or_embedding_is_packed(
    packed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {
        name: BaseTensor("m", TensorInfo(name, "BF16", (32, 16), 0, 0))
        for name in ("lm_head.weight", "model.embed_tokens.weight")
    }
    model = BaseModel(Location("base", Path()), {"tie_word_embeddings": True}, {}, tensors)
    sides: Any = Mock()
    files = BaseFiles(model, sides, {}, {})
    monkeypatch.setattr(
        BaseFiles, "decoder", lambda _files, name: object() if name == packed else None
    )
    assert [*own_heads(files)] == ["lm_head.weight"]
