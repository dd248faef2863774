"""Write the provenance of a merged model: every input, option and change.

The same inputs and options give the same bytes: the file leaves out times, paths and the number of
threads. Products can differ between kinds of CPU, so the file has the hash of a small product.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from vera_convert._version import __version__
from vera_convert.base.side_files import PROVENANCE_NAME
from vera_convert.errors import CheckpointError, SurroundingsError
from vera_convert.files.reading import open_local
from vera_convert.files.strict_json import read_json
from vera_convert.merging.adapters import MatchedAdapter
from vera_convert.merging.base_files import BaseFiles
from vera_convert.merging.inputs import MergeInputs
from vera_convert.merging.output import MergePlan
from vera_convert.merging.report import TensorReport

FORMAT = 1
PROVENANCE_LIMIT = 100_000_000
"""The most bytes of a provenance file, which has some hundred bytes for each tensor."""


def versions() -> dict[str, str]:
    """Return the versions of the packages that decide the bytes of a merge."""
    return {
        "vera_convert": __version__,
        "numpy": np.__version__,
        "ml_dtypes": ml_dtypes.__version__,
    }


def input_records(inputs: MergeInputs) -> dict[str, object]:
    """Return the records of the base, the adapters and the options."""
    return {
        "base": _base_record(inputs.base),
        "adapters": [*map(_adapter_record, inputs.adapters)],
        "options": inputs.options.record(inputs.base_options),
    }


def _adapter_record(matched: MatchedAdapter) -> dict[str, object]:
    config, pair = matched.adapter.config, matched.pair
    drawn = asdict(pair.draw) if pair.draw is not None else None
    return {
        "source": matched.location.record,
        "weight": matched.weight,
        "rank": config.r,
        "layers": len(matched.adapter.layers),
        "strategy": matched.match.strategy.name,
        "projections": {"origin": pair.origin, "draw": drawn},
        "config_sha256": sha256(matched.adapter.config_file.text).hexdigest(),
        "weights_size": matched.weights.size,
        "header_sha256": sha256(matched.header.raw).hexdigest(),
    }


def _base_record(base: BaseFiles) -> dict[str, object]:
    return {
        "source": base.model.location.record,
        "files": [
            {
                "name": name,
                "size": base.files[name].size,
                "header_sha256": sha256(header.raw).hexdigest(),
            }
            for name, header in base.model.files.items()
        ],
        "texts": [
            {"name": name, "size": len(text), "sha256": sha256(text).hexdigest()}
            for name, text in sorted(base.texts.items())
        ],
    }


def provenance_text(
    plan: MergePlan, tensors: Sequence[TensorReport], hashes: Mapping[str, str], product: str
) -> bytes:
    """Return the bytes of the provenance file.

    Args:
        plan: the merge.
        tensors: the report for each tensor that an adapter changes.
        hashes: the SHA-256 of files, by name.
        product: the hash of a small product on this machine.
    """
    inputs, written = plan.inputs, plan.inputs.side_files
    copied = inputs.base.copied.items()
    document = {
        "format": FORMAT,
        "versions": versions(),
        "product_sha256": product,
        **input_records(inputs),
        "tensors": [each.record() for each in tensors],
        "outputs": [
            {"name": file.name, "size": file.size}
            | ({"sha256": hashes[file.name]} if file.name in hashes else {})
            for file in plan.files
        ],
        "carried": [name for name, file in copied if written.get(name) is file],
        "from_adapter": sorted(inputs.beside.in_model),
    }
    return (_laid_out(document, "\n") + "\n").encode()


def recorded_files(folder: Path) -> set[str]:
    """Return the files that an earlier merge recorded; empty if the record cannot be read."""
    with suppress(CheckpointError, SurroundingsError):
        with open_local(folder / PROVENANCE_NAME, within=folder) as source:
            document, _ = read_json(source, limit=PROVENANCE_LIMIT)
        outputs = document.get("outputs") if isinstance(document, dict) else None
        records = outputs if isinstance(outputs, list) else []
        names = (each.get("name") for each in records if isinstance(each, dict))
        return {name for name in names if isinstance(name, str)}
    return set()


def _laid_out(value: object, indent: str) -> str:
    """Return a JSON value with one line for each member of an object, and each item of a list.

    A model can have a million tensors, and the json module is slow and large with indents.
    """
    deeper = indent + "  "
    if isinstance(value, list) and value:
        return f"[{deeper}" + f",{deeper}".join(map(_line, value)) + f"{indent}]"
    if isinstance(value, dict) and value:
        members = (f"{_line(name)}: {_laid_out(each, deeper)}" for name, each in value.items())
        return f"{{{deeper}" + f",{deeper}".join(members) + f"{indent}}}"
    return _line(value)


def _line(value: object) -> str:
    text = json.dumps(value)
    return json.dumps(_as_utf8(value)) if "\\ud" in text else text


def _as_utf8(value: Any) -> Any:  # noqa: ANN401 -- any JSON value
    """Return a JSON value with an escape for each byte that is not UTF-8 in a file's name."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, Mapping):
        return {_as_utf8(name): _as_utf8(each) for name, each in value.items()}
    return [*map(_as_utf8, value)] if isinstance(value, list | tuple) else value
