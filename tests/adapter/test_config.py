"""Read adapter_config.json strictly, and edit its text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from adapters import CONFIG
from hypothesis import given
from hypothesis import strategies as st

from vera_convert.adapter.config import (
    ConfigFile,
    VeraConfig,
    parse_config,
    peft_release,
    read_config,
)
from vera_convert.errors import CheckpointError
from vera_convert.files.json_edit import edited_object
from vera_convert.files.reading import open_local


def parsed(**changes: object) -> ConfigFile:
    document = {key: value for key, value in {**CONFIG, **changes}.items() if value is not ...}
    return parse_config(json.dumps(document).encode(), place="adapter_config.json")


def refused(**changes: object) -> dict[str, str]:
    """Return the reasons of a config's findings by code."""
    with pytest.raises(CheckpointError) as caught:
        parsed(**changes)
    return {finding.code: finding.reason for finding in caught.value.findings}


# --- reading -------------------------------------------------------------------------------------


def test_configs_of_every_peft_are_read(fixtures: Path) -> None:
    paths = sorted(fixtures.glob("*/*/adapter_config.json"))
    assert len(paths) == 74
    for path in paths:
        document = json.loads(path.read_bytes())
        with open_local(path) as source:
            file = read_config(source)
        assert file.findings == ()
        assert file.text == path.read_bytes()
        assert file.config.r == document["r"] == 4
        assert set(file.config.target_modules or ()) == set(document["target_modules"])
        assert file.config.save_projection is document["save_projection"]
        assert file.config.peft_version == document.get("peft_version")


def test_a_missing_field_has_pefts_default() -> None:
    alone = parse_config(b'{"peft_type": "VERA"}', place="adapter_config.json")
    assert alone.config == VeraConfig()
    assert alone.config.save_projection
    assert alone.config.r == 256


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ({"projection_prng_key": -1}, "projection_prng_key", -1),
        ({"projection_prng_key": -(2**63)}, "projection_prng_key", -(2**63)),
        ({"projection_prng_key": 2**64 - 1}, "projection_prng_key", 2**64 - 1),
        ({"target_modules": r".*\.(q|v)_proj"}, "target_modules", r".*\.(q|v)_proj"),
        ({"target_modules": None}, "target_modules", None),
        ({"target_modules": []}, "target_modules", ()),
        ({"vera_dropout": 1}, "vera_dropout", 1),
        ({"d_initial": -0.5}, "d_initial", -0.5),
        ({"bias": "all"}, "bias", "all"),
        ({"bias": "lora_only"}, "bias", "lora_only"),
        ({"layers_to_transform": 0, "layers_pattern": "h"}, "layers_to_transform", 0),
        ({"layers_to_transform": [0, 3]}, "layers_to_transform", (0, 3)),
        ({"layers_to_transform": [0], "layers_pattern": ["h"]}, "layers_pattern", ("h",)),
        ({"modules_to_save": ["score", "score"]}, "modules_to_save", ("score", "score")),
        ({"task_type": None}, "task_type", None),
        (
            {"auto_mapping": {"base_model_class": "Net"}},
            "auto_mapping",
            {"base_model_class": "Net"},
        ),
        ({"base_model_name_or_path": "/data/llama"}, "base_model_name_or_path", "/data/llama"),
        ({"peft_version": "0.22.0.dev0@UNKNOWN"}, "peft_version", "0.22.0.dev0@UNKNOWN"),
    ],
    ids=str,
)
def test_all_forms_that_peft_allows_are_read(
    change: dict[str, object], field: str, value: object
) -> None:
    assert getattr(parsed(**change).config, field) == value


WRONG_TYPES: Mapping[str, list[object]] = {
    "r": [True, 4.0, "4", None, [4]],
    "target_modules": [True, 1, {"q_proj": True}, ["q_proj", 1]],
    "save_projection": [1, 0, "true", None],
    "vera_dropout": [True, "0", None],
    "d_initial": [False, "0.1", None],
    "fan_in_fan_out": [0, None, "false"],
    "bias": [None, True, ["none"]],
    "modules_to_save": ["classifier", [1], {}],
    "init_weights": [None, "gaussian", 1],
    "layers_to_transform": [True, 1.0, "0", [True], [0.0]],
    "layers_pattern": [1, [1], {}],
    "task_type": [1, ["CAUSAL_LM"]],
    "base_model_name_or_path": [1, ["gpt2"]],
    "revision": [False, 1],
    "inference_mode": ["yes", 1, None],
    "auto_mapping": [[], "Net", True],
    "peft_version": [0.21, 21],
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field in WRONG_TYPES for value in WRONG_TYPES[field]]
)
def test_a_field_of_the_wrong_type_is_refused(field: str, value: object) -> None:
    assert refused(**{field: value}).keys() == {"V103"}
    assert field in refused(**{field: value})["V103"]


@pytest.mark.parametrize(
    "key", [True, False, "0", 0.0, 1.5, None, [0], 2**64, 2**64 + 1, -(2**63) - 1]
)
def test_a_key_that_torch_refuses_is_refused(key: object) -> None:
    assert refused(projection_prng_key=key).keys() == {"V105"}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"r": 0}, "V104"),
        ({"r": -4}, "V104"),
        ({"r": 1 << 40}, "V104"),
        ({"vera_dropout": -0.1}, "V104"),
        ({"vera_dropout": 1.5}, "V104"),
        ({"bias": "some"}, "V106"),
        ({"bias": ""}, "V106"),
        ({"task_type": "CHAT"}, "V106"),
        ({"task_type": ""}, "V106"),
        ({"layers_pattern": "layers"}, "V107"),
        ({"layers_pattern": ["layers"]}, "V107"),
    ],
    ids=str,
)
def test_a_value_that_peft_cannot_work_with_is_refused(change: dict[str, Any], code: str) -> None:
    assert refused(**change).keys() == {code}


def test_all_defects_are_reported_together() -> None:
    assert refused(r=True, bias=1, projection_prng_key="0").keys() == {"V103", "V105"}
    assert refused(r=0, bias="x", layers_pattern="h").keys() == {"V104", "V106", "V107"}


def test_a_defect_is_reported_in_one_line_without_control_characters() -> None:
    reason = refused(bias="\x1b[31m\n\u202eevil" * 100)["V106"]
    assert reason.isprintable()
    assert len(reason) < 700


@pytest.mark.parametrize(
    ("document", "found"),
    [
        ({"peft_type": "LORA"}, "LoRA"),
        ({"peft_type": "PVERA"}, "PVeRA"),
        ({"peft_type": "vera"}, "capitals"),
        ({"peft_type": None}, "null"),
        ({"peft_type": 7}, "a number"),
        ({"r": 4}, "missing"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "whole model"),
        ({"model_type": "bert", "model_class": "BertModel", "config": {}}, "AdapterHub"),
        ({"peft_type": "ve\x1bra"}, "ve\\x1bra"),
    ],
    ids=str,
)
def test_the_refusal_of_another_config_names_its_probable_kind(
    document: object, found: str
) -> None:
    with pytest.raises(CheckpointError, match="V101") as caught:
        parse_config(json.dumps(document).encode(), place="adapter_config.json")
    (finding,) = caught.value.findings
    assert found in finding.reason
    assert "\n" not in str(finding)


@pytest.mark.parametrize("document", [[], "VERA", 1, None, True])
def test_a_config_that_is_no_json_object_is_refused(document: object) -> None:
    with pytest.raises(CheckpointError, match="V102"):
        parse_config(json.dumps(document).encode(), place="adapter_config.json")


def test_each_unknown_field_is_reported_once_and_kept() -> None:
    file = parsed(foo_config=None, bar=3)
    assert [finding.code for finding in file.findings] == ["V110", "V110"]
    assert file.unknown_fields == ("foo_config", "bar")
    assert set(json.loads(file.edited({"save_projection": False}).text)) >= {"foo_config", "bar"}


# --- editing -------------------------------------------------------------------------------------

NO_CHANGE: Mapping[str, object] = {}


@pytest.mark.parametrize(
    ("before", "changes", "remove", "after"),
    [
        (b'{"a": 1, "b": 2}', {"a": True}, (), b'{"a": true, "b": 2}'),
        (b'{"a":1,"b":2}', {"b": None}, (), b'{"a":1,"b":null}'),
        (b'{\n  "a": 1\n}\n', {"b": False}, (), b'{\n  "a": 1,\n  "b": false\n}\n'),
        (b'{\r\n\t"a": 1\r\n}', {"b": 2}, (), b'{\r\n\t"a": 1,\r\n\t"b": 2\r\n}'),
        (b'{"a": [1, {"a": 2}], "b": "}"}', {"b": 3}, (), b'{"a": [1, {"a": 2}], "b": 3}'),
        (b'{"\\u0061": "\\u00e9\\/"}', {"a": 1}, (), b'{"\\u0061": 1}'),
        (b'{"x\\"a": 1, "a" : 2 }', {"a": 3}, (), b'{"x\\"a": 1, "a" : 3 }'),
        (b"{}", {"a": 1}, (), b'{"a": 1}'),
        (b" { \n } ", {"a": 1}, (), b' {"a": 1 \n } '),
        (b'{"a": 1, "b": 2, "c": 3}', NO_CHANGE, ("a",), b'{"b": 2, "c": 3}'),
        (b'{"a": 1, "b": 2, "c": 3}', NO_CHANGE, ("b",), b'{"a": 1, "c": 3}'),
        (b'{"a": 1,\n"b": 2,\n"c": 3}', NO_CHANGE, ("c",), b'{"a": 1,\n"b": 2}'),
        (b'{"a": 1}', NO_CHANGE, ("a",), b"{}"),
        (b'{"a": 1}', NO_CHANGE, ("b",), b'{"a": 1}'),
        (b'{"a": 1, "b": 2}', {"c": 3}, ("a", "b"), b'{"c": 3}'),
        (
            b'{"a": "\xc3\xa9\xf0\x9f\x98\x80"}',
            {"b": 1},
            (),
            b'{"a": "\xc3\xa9\xf0\x9f\x98\x80","b": 1}',
        ),
    ],
    ids=repr,
)
def test_an_edit_changes_no_other_field(
    before: bytes, changes: dict[str, object], remove: tuple[str, ...], after: bytes
) -> None:
    assert edited_object(before, changes, frozenset(remove)) == after


def test_an_edited_config_of_peft_differs_in_one_word(fixtures: Path) -> None:
    text = (fixtures / "0.21.2/llama_fp32_proj/adapter_config.json").read_bytes()
    edited = parse_config(text, place="adapter_config.json").edited({"save_projection": False})
    assert edited.text == text.replace(b'"save_projection": true', b'"save_projection": false')
    assert edited.text != text
    assert edited.config.save_projection is False


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
names = st.sampled_from(["a", "b", "c", 'a"', "\\a", "{a", "é", ""])
objects = st.dictionaries(names, values, max_size=5)
styles: st.SearchStrategy[Mapping[str, Any]] = st.sampled_from(
    [
        {},
        {"indent": 2},
        {"indent": "\t"},
        {"separators": (",", ":")},
        {"ensure_ascii": False},
        {"separators": (" , ", "  :  ")},
    ]
)


@given(objects, objects, st.frozensets(names), styles)
def test_an_edited_object_has_the_requested_fields(
    before: dict[str, object],
    changes: dict[str, object],
    remove: frozenset[str],
    style: Mapping[str, Any],
) -> None:
    text = json.dumps(before, **style).encode("utf-8", "surrogatepass")
    expected = {name: value for name, value in before.items() if name not in remove} | changes
    edited = edited_object(text, changes, remove)
    assert json.loads(edited) == expected
    assert [*json.loads(edited)] == [*expected]
    assert edited_object(edited, {}, remove - changes.keys()) == edited


@given(objects, names, values, styles)
def test_all_bytes_around_a_changed_value_are_kept(
    before: dict[str, object], name: str, value: object, style: Mapping[str, Any]
) -> None:
    text = json.dumps({**before, name: 0}, **style).encode()
    place = edited_object(text, {name: 1})
    at = next(i for i, (one, other) in enumerate(zip(text, place, strict=True)) if one != other)
    edited = edited_object(text, {name: value})
    assert edited.startswith(text[:at])
    assert edited.endswith(text[at + 1 :])
    assert json.loads(edited[at : len(edited) - len(text[at + 1 :])]) == value


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"modules_to_save": ["a"] * 10_001}, "modules_to_save has 10,001 entries"),
        ({"target_modules": ["." * 10_001]}, "target_modules has an entry of over 10,000 letters"),
        ({f"field_{number}": 0 for number in range(1_000)}, "fields"),
    ],
)
def test_absurdly_long_configs_are_refused(changes: dict[str, object], said: str) -> None:
    text = json.dumps({"peft_type": "VERA", **changes}).encode()
    with pytest.raises(CheckpointError, match=f"V104 .*{said}"):
        parse_config(text, place="here")


@pytest.mark.parametrize(
    ("recorded", "release"),
    [
        (None, None),
        ("0.18.1", (0, 18)),
        ("0.19.0.dev0@UNKNOWN", (0, 19)),
        ("1.2", (1, 2)),
        ("latest", None),
        ("0.123456789", None),
        ("", None),
    ],
)
def test_a_recorded_version_shows_the_release(
    recorded: str | None, release: tuple[int, int] | None
) -> None:
    assert peft_release(recorded) == release
