"""A merge as text and as a document."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vera_convert.base.facts import BaseOptions
from vera_convert.formats.document import result_document
from vera_convert.formats.merge import merge_text
from vera_convert.merging.merge import Merge, merge
from vera_convert.merging.options import MergeOptions

SchemaErrors = Callable[..., list[str]]

CASES = ["llama_fp32_proj", "llama_bf16_noproj", "gpt2_fp32_proj", "bert_cls_fp32_proj"]


def merged(fixtures: Path, case: str, out: Path, **options: Any) -> Merge:
    base = fixtures / "bases" / case.rsplit("_", 1)[0].replace("_", "-")
    base_options = BaseOptions(model=str(base))
    return merge(
        fixtures / "0.21.2" / case, out, base=base_options, options=MergeOptions(**options)
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "options", [{}, {"dry_run": True}, {"checksums": True, "check": True}, {"dtype": "float16"}]
)
def test_the_document_satisfies_its_schema(
    case: str,
    options: dict[str, Any],
    fixtures: Path,
    tmp_path: Path,
    schema_errors: SchemaErrors,
) -> None:
    result = merged(fixtures, case, tmp_path / "out", **options)
    document = json.loads(json.dumps(result_document(result), allow_nan=False))
    assert schema_errors("merge", document) == []
    assert document["written"] is not options.get("dry_run", False)
    assert (document["numbers"] is None) is not document["written"]
    hashed = [file["sha256"] is not None for file in document["files"]]
    assert any(hashed) is options.get("checksums", False)


def test_the_schema_is_strict(schema_errors: SchemaErrors) -> None:
    assert schema_errors("merge", {})
    assert schema_errors("merge", {"format": 2})


def test_the_text_of_a_merge(fixtures: Path, tmp_path: Path) -> None:
    text = merge_text(merged(fixtures, "llama_fp32_proj", tmp_path / "out"))
    rows = [line.strip().split("  ")[0] for line in text.splitlines()]
    assert rows == [
        "wrote",
        "base",
        "adapter",
        "layer names",
        "A and B",
        "time",
        "changed",
        "delta",
        "rounding error",
        "copied",
        "left out",
    ]
    assert re.search(r"^left out +expected.json$", text, re.MULTILINE)
    assert "A and B       stored" in text
    assert "8 layers of rank 4" in text


def test_the_text_of_a_dry_run(fixtures: Path, tmp_path: Path) -> None:
    text = merge_text(merged(fixtures, "llama_bf16_noproj", tmp_path / "out", dry_run=True))
    assert text.startswith("would write")
    assert "model.safetensors" in text
    assert " bytes in 8 tensors computed" in text
    assert "rounded to bfloat16" in text
    assert not (tmp_path / "out").exists()
