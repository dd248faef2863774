"""Turn a result into a JSON document: the schema names the keys, the result has the values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import cache
from typing import Any

from vera_convert.files.file_names import CARD_NAME
from vera_convert.rules import Severity
from vera_convert.schemas import load_schema
from vera_convert.text import printable

Document = dict[str, object]
Schema = Mapping[str, Any]

SCHEMAS = {
    "AdapterInfo": "info",
    "Conversion": "conversion",
    "Count": "count",
    "LoraConversion": "lora",
    "Merge": "merge",
    "Regenerated": "regeneration",
    "TreeMigration": "migration",
    "Validation": "validation",
    "VeraConvertError": "error",
    "Verification": "verification",
}
"""The schema of each result, by the result's class."""

_MODEL_NUMBERS = (
    *("largest_difference", "remerged_difference", "kl", "top1", "effect"),
    *("threshold_difference", "threshold_remerged", "threshold_kl", "threshold_top1"),
)


def _base(result: Any) -> object:  # noqa: ANN401 -- any record with base facts
    """Return the base facts, if a base was found."""
    return None if result.base_facts.location is None else result.base_facts


def _form(result: Any) -> str | None:  # noqa: ANN401 -- any record of an adapter
    return {True: "embedded", False: "stripped", None: None}[result.embedded]


def _four_digits(source: str) -> Callable[[Any], float | None]:
    """Return a function that reads a number with four digits; None if the number is infinite."""

    def read(result: Any) -> float | None:  # noqa: ANN401 -- any record
        number = _followed(result, source)
        is_finite = isinstance(number, float | int) and math.isfinite(number)
        return float(f"{number:.4g}") if is_finite else None

    return read


def _milliseconds(result: Any) -> float:  # noqa: ANN401 -- any record with a duration
    """Return a duration in seconds."""
    seconds: float = result.seconds
    return round(seconds, 3)


def _migrated(tree: Any) -> Document:  # noqa: ANN401 -- a record of a migration
    return {name: result_document(each, command="migrate") for name, each in tree.done.items()}


def _lora_layers(lora: Any) -> list[Document]:  # noqa: ANN401 -- a record of a conversion
    return [
        {
            "module": layer.module,
            "name": lora.names[layer.module],
            "in_features": layer.shape.in_features,
            "out_features": layer.shape.out_features,
            "relative_error": _short(lora.measured.errors.get(layer.module, 0.0)),
            "zeros": layer.vectors is None,
        }
        for layer in lora.plan.layers
    ]


def _merged_numbers(merge: Any) -> object:  # noqa: ANN401 -- a record of a merge
    from vera_convert.merging.report import total

    return total(merge.tensors).record() if merge.written else None


def _short(value: float) -> float:
    return float(f"{value:.3g}")


VALUES: Mapping[str, Mapping[str, str | Callable[[Any], object]]] = {
    "AdapterInfo": {
        "adapter": "location.label",
        "commit": "location.commit",
        "peft_version": "config.peft_version",
        "base_model_name_or_path": "config.base_model_name_or_path",
        "base": _base,
        "rank": "config.r",
        "key": "config.projection_prng_key",
        "save_projection": "config.save_projection",
        "fingerprint": lambda info: info.fingerprint is not None,
        "trainable_parameters": "parameters",
        "bytes": "sizes",
    },
    "BaseFacts": {
        "name": "location.label",
        "repo_id": "location.repo_id",
        "commit": "location.commit",
        "model_type": "base.model_type",
        "names": "match.strategy.name",
    },
    "Checked": {
        "adapter": "label",
        "base": lambda checked: checked.base or None,
        "projections": _form,
    },
    "Conversion": {
        "projections": _form,
        "base": _base,
        "carried": "side_files.copied",
        "left_out": "side_files.left_out",
        "not_followed": "side_files.outside",
    },
    "Count": {"vera": lambda count: {**asdict(count.vera), "stripped_bytes": count.stripped_bytes}},
    "Finding": {
        "tensor": lambda finding: finding.tensor and printable(finding.tensor),
    },
    "FilePlan": {
        "bytes": "size",
        "carried_bytes": "copied",
        "computed_bytes": "computed",
        "computed_tensors": "tensors",
    },
    "FormCheck": {"name": "label", "projections": "origins"},
    "FormEffect": {"difference": lambda effect: effect.difference or None},
    "LoraCheck": {"name": "label", "projections": "origin", "recorded_error": "recorded"},
    "LoraLayerCheck": {"relative_error": _four_digits("error"), "allowed": _four_digits("limit")},
    "LoraConversion": {
        "for": "options.engine",
        "dtype": "options.dtype",
        "rank": "plan.rank",
        "exact": lambda lora: not lora.plan.reduced,
        "base": "base_facts.location.label",
        "projections": "origin",
        "trained_whole": lambda lora: [tensor.name for tensor in lora.extras.tensors],
        "server_arguments": lambda lora: lora.server_arguments or None,
        "bytes": "size",
        "bytes_free": "free",
        "carried": lambda lora: [name for name in lora.side_files.copied if name != CARD_NAME],
        "left_out": "side_files.left_out",
        "layers": _lora_layers,
        "relative_error": lambda lora: _short(lora.measured.worst),
    },
    "Merge": {
        "tensors": lambda merge: [report.record() for report in merge.tensors],
        "numbers": _merged_numbers,
        "left_out": lambda merge: [
            *(*merge.sides.other_weights, *merge.sides.adapter, *merge.sides.unneeded)
        ],
        "adapter_left_out": lambda merge: [
            *(*merge.beside.unmerged, *merge.beside.not_fetched, *merge.beside.left_out)
        ],
        "bytes_needed": "needed",
        "bytes_free": "free",
        "seconds": _milliseconds,
        "carried": "sides.copied",
        "from_adapter": "beside.copied",
        "tokenizer": "beside.tokenizer",
    },
    "MergeSettings": {
        "given": lambda settings: sorted(settings.given),
        "key_map": lambda settings: [f"{old}={new}" for old, new in settings.key_map],
    },
    "MergedAdapter": {"name": "label", "projections": "origin"},
    "MergedCheck": {
        "name": "label",
        "options": "settings",
        "allowed_excess": "tensors.limit",
        "tensors": "tensors.reported",
        "untouched": lambda check: len(check.tensors.checks) - len(check.tensors.reported),
        "bytes": "tensors.nbytes",
        "seconds": _milliseconds,
        "jobs": "tensors.jobs",
    },
    "ModelComparison": {name: _four_digits(name) for name in _MODEL_NUMBERS},
    "QuantizedComparison": {
        name: _four_digits(name) for name in ("difference", "threshold", "effect")
    },
    "Regenerated": {"bytes": "size"},
    "ReplacedTensor": {
        "relative_change": lambda each: each.numbers and each.numbers.record()["relative_change"]
    },
    "VeraConvertError": {"error": str, "findings": lambda error: getattr(error, "findings", ())},
    "StoredProjections": {"dtype": "A.dtype", "shape_A": "A.shape", "shape_B": "B.shape"},
    "TensorCheck": {
        "values": "comparison.values",
        "off": "comparison.off",
        "wrong": "comparison.wrong",
        "ulps": _four_digits("comparison.ulps"),
        "excess": _four_digits("comparison.excess"),
        "hint": lambda check: check.cause or None,
    },
    "TreeMigration": {"done": _migrated},
    "Validation": {
        "counts": lambda found: {str(each): found.count(each) for each in Severity},
    },
    "Verification": {"seconds": _milliseconds},
}
"""The source of each value whose attribute has another name than the key, by the result's class."""


_loaded = cache(load_schema)


def result_document(result: object, **values: object) -> Document:
    """Return a result, or an error, as a JSON object with the keys of the result's schema."""
    name = next(kind.__name__ for kind in type(result).__mro__ if kind.__name__ in SCHEMAS)
    return document(SCHEMAS[name], result, **values)


def document(schema: str, result: object, **values: object) -> Document:
    """Return a result as a JSON object, with the keys of a schema and in their order.

    A key takes a given value, else the source in `VALUES`, else the attribute with the name of the
    key. An optional key is left out if the value is None.

    Args:
        schema: a name of `load_schema`.
        result: a record of the library.
        values: further values, by key.
    """
    loaded = _loaded(schema)
    return _object(result, loaded, loaded, values)


def _object(result: object, schema: Schema, root: Schema, given: Mapping[str, object]) -> Document:
    found: Document = {}
    for key, part in schema["properties"].items():
        if "const" in part:
            found[key] = part["const"]
            continue
        value = given[key] if key in given else _attribute(result, key)
        if value is not None or key in schema["required"]:
            found[key] = _value(value, part, root)
    return found


def _attribute(result: object, key: str) -> object:
    """Return the value of a result for a key; None if a record on the way is None."""
    if isinstance(result, Mapping):
        return result.get(key)
    kinds = (VALUES.get(kind.__name__, {}) for kind in type(result).__mro__)
    source = next((values[key] for values in kinds if key in values), key)
    return source(result) if callable(source) else _followed(result, source)


def _followed(result: object, source: str) -> object:
    for name in source.split("."):
        result = None if result is None else getattr(result, name)
    return result


def _value(value: object, schema: Schema, root: Schema) -> object:
    """Return a value as JSON has it; the schema says what an object shows of a record."""
    if value is None or isinstance(value, bool | int):
        return value
    if "$ref" in schema:
        return _value(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root)
    if "anyOf" in schema and {"type": "null"} in schema["anyOf"]:
        return _value(value, schema["anyOf"][0], root)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)  # JSON lacks NaN and infinity
    if "properties" in schema:
        return _object(value, schema, root, {})
    if "items" in schema and isinstance(value, Iterable):
        return [_value(each, schema["items"], root) for each in value]
    if isinstance(value, Mapping):
        inner = schema["additionalProperties"]
        return {str(name): _value(each, inner, root) for name, each in value.items()}
    return str(value)
