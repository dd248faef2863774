"""The published schemas are well formed, explained, and agree with the files of PEFT."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

import vera_convert
from vera_convert.formats.document import SCHEMAS
from vera_convert.schemas import load_schema, schema_names

SchemaErrors = Callable[..., list[str]]

FORM_OF_VERSION = {
    **dict.fromkeys(["0.11.0", "0.11.1", "0.12.0", "0.13.2"], "peft-0.11"),
    **dict.fromkeys(["0.14.0", "0.15.2", "0.16.0", "0.17.1"], "peft-0.14"),
    **dict.fromkeys(["0.18.1", "0.19.1", "0.20.0"], "peft-0.18"),
    "0.21.2": "peft-0.21",
}


def properties(schema: object, path: str = "") -> Iterator[tuple[str, dict[str, object]]]:
    """Return the path of every property that a schema defines with a type or values."""
    if isinstance(schema, list):
        for item in schema:
            yield from properties(item, path)
    if isinstance(schema, dict):
        for name, value in schema.items():
            if name == "properties":
                yield from ((f"{path}/{key}", prop) for key, prop in value.items())
            yield from properties(value, f"{path}/{name}")


def test_the_result_of_every_function_has_a_schema() -> None:
    public = [getattr(vera_convert, name) for name in dir(vera_convert)]
    results = {
        str(inspect.signature(each).return_annotation)
        for each in public
        if inspect.isfunction(each)
    }
    assert {name for name in results if "[" not in name} <= {*SCHEMAS}
    assert {*SCHEMAS.values()} <= {*schema_names()}


@pytest.mark.parametrize("name", schema_names())
class TestEverySchema:
    def test_the_schema_has_an_address_for_references(self, name: str) -> None:
        schema = load_schema(name)
        Draft202012Validator.check_schema(schema)
        assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
        assert schema["$id"] == f"urn:vera-convert:schema:{name}"

    def test_the_schema_has_a_title_and_a_description(self, name: str) -> None:
        schema = load_schema(name)
        assert schema["title"]
        assert schema["description"]

    def test_every_field_has_a_description(self, name: str) -> None:
        explained: set[str] = set()
        named: set[str] = set()
        for path, prop in properties(load_schema(name)):
            field = path.rsplit("/", 1)[-1]
            named.add(field)
            if "description" in prop or "$ref" in prop:
                explained.add(field)
        assert named <= explained


def test_an_unknown_schema_is_refused_with_the_existing_names() -> None:
    with pytest.raises(ValueError, match=r"no schema is called '\.\./x'; .*adapter_config"):
        load_schema("../x")


class TestAdapterConfig:
    @pytest.fixture
    def config(self, fixtures: Path) -> dict[str, object]:
        """Return the config of an adapter of PEFT 0.21.2."""
        path = fixtures / "0.21.2" / "llama_fp32_proj" / "adapter_config.json"
        document: dict[str, object] = json.loads(path.read_bytes())
        return document

    @pytest.mark.parametrize(("version", "form"), FORM_OF_VERSION.items())
    def test_configs_of_every_version_satisfy_the_schema(
        self, version: str, form: str, fixtures: Path, schema_errors: SchemaErrors
    ) -> None:
        paths = sorted((fixtures / version).glob("*/adapter_config.json"))
        assert len(paths) >= 6
        for path in paths:
            document = json.loads(path.read_bytes())
            assert schema_errors("adapter_config", document) == []
            assert schema_errors("adapter_config", document, anchor=form) == []
            if "peft_version" in document:
                for other in set(FORM_OF_VERSION.values()) - {form}:
                    assert schema_errors("adapter_config", document, anchor=other)

    def test_the_config_of_the_trained_adapter_satisfies_the_schema(
        self, minilm: Path, schema_errors: SchemaErrors
    ) -> None:
        configs = [*minilm.glob("*/adapter_config.json")]
        assert configs
        for path in configs:
            assert schema_errors("adapter_config", json.loads(path.read_bytes())) == []

    @pytest.mark.parametrize(
        "change",
        [
            {"projection_prng_key": -(2**63)},
            {"projection_prng_key": 2**64 - 1},
            {"target_modules": r".*\.(q|v)_proj"},
            {"target_modules": None},
            {"bias": "lora_only"},
            {"layers_to_transform": 0, "layers_pattern": "layers"},
            {"layers_to_transform": [0, 3], "layers_pattern": ["h", "layers"]},
            {"auto_mapping": {"base_model_class": "Net", "parent_library": "__main__"}},
            {"peft_version": "0.21.3.dev0@UNKNOWN"},
            {"peft_version": "0.18.0rc1", "layers_to_transform": 3},
        ],
        ids=str,
    )
    def test_the_schema_allows_all_forms_that_peft_allows(
        self, change: dict[str, object], config: dict[str, object], schema_errors: SchemaErrors
    ) -> None:
        assert schema_errors("adapter_config", config | change) == []

    @pytest.mark.parametrize(
        "change",
        [
            {"r": 0},
            {"r": -4},
            {"r": 4.0},
            {"r": True},
            {"r": "4"},
            {"projection_prng_key": 2**64},
            {"projection_prng_key": -(2**63) - 1},
            {"projection_prng_key": 0.0},
            {"projection_prng_key": False},
            {"projection_prng_key": None},
            {"save_projection": 1},
            {"save_projection": "true"},
            {"vera_dropout": 1.5},
            {"vera_dropout": -0.1},
            {"d_initial": True},
            {"d_initial": None},
            {"fan_in_fan_out": None},
            {"bias": "some"},
            {"bias": None},
            {"peft_type": "vera"},
            {"peft_type": "LORA"},
            {"task_type": "CHAT"},
            {"target_modules": [1]},
            {"target_modules": {"q_proj": True}},
            {"modules_to_save": "classifier"},
            {"layers_to_transform": "0"},
            {"layers_to_transform": [True]},
            {"layers_to_transform": 1.0},
            {"layers_pattern": "layers"},
            {"layers_pattern": ["layers"]},
            {"auto_mapping": {}},
            {"base_model_name_or_path": 7},
            {"revision": False},
            {"inference_mode": "yes"},
            {"init_weights": "gaussian"},
            {"peft_version": "0.22.0"},
            {"peft_version": None},
            {"peft_version": 0.21},
            {"peft_version": "0.20.0", "layers_to_transform": 0, "layers_pattern": "layers"},
            {"lora_alpha": 16},
        ],
        ids=str,
    )
    def test_the_schema_refuses_configs_that_no_version_wrote(
        self, change: dict[str, object], config: dict[str, object], schema_errors: SchemaErrors
    ) -> None:
        assert schema_errors("adapter_config", config | change)

    def test_every_field_is_required(
        self, config: dict[str, object], schema_errors: SchemaErrors
    ) -> None:
        for field in config.keys() - {"peft_version"}:
            rest = {key: value for key, value in config.items() if key != field}
            assert schema_errors("adapter_config", rest), field

    def test_the_schema_allows_configs_of_old_versions(
        self, fixtures: Path, schema_errors: SchemaErrors
    ) -> None:
        path = fixtures / "0.13.2" / "llama_fp32_proj" / "adapter_config.json"
        old = json.loads(path.read_bytes()) | {"layers_pattern": "layers", "task_type": "CHAT"}
        assert schema_errors("adapter_config", old) == []
        assert schema_errors("adapter_config", old, anchor="peft-0.14")
        assert schema_errors("adapter_config", old | {"layers_pattern": ["layers"]})
        assert schema_errors("adapter_config", old | {"bias": "lora_only"})

    def test_the_schema_agrees_with_the_installed_peft(
        self, tmp_path: Path, schema_errors: SchemaErrors
    ) -> None:
        peft = pytest.importorskip("peft")
        peft.VeraConfig().save_pretrained(tmp_path)
        written = json.loads((tmp_path / "adapter_config.json").read_bytes())
        assert schema_errors("adapter_config", written) == []

        definitions = load_schema("adapter_config")["$defs"]
        assert isinstance(definitions, dict)
        fields = definitions["fields"]["properties"]
        defaults = {name: field.get("default", "VERA") for name, field in fields.items()}
        assert defaults == {key: written[key] for key in written if key != "peft_version"}
