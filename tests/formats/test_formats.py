"""Results as text for people and as documents for programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapterdefects import A, all_of, bare, drawn, fields, stripped, tensors
from adapters import KEY, good_adapter
from bases import tiny_base
from folders import DATA

from vera_convert.base.facts import BaseOptions
from vera_convert.conversion.migration import Mode, migrate_tree
from vera_convert.conversion.regeneration import regenerate
from vera_convert.conversion.strip_embed import embed, strip
from vera_convert.conversion.work import Conversion
from vera_convert.counting import count, layers_of_base, layers_of_config_file
from vera_convert.draws.generator import Rounding, Variant
from vera_convert.errors import CheckpointError, SurroundingsError, UsageError
from vera_convert.formats.document import result_document
from vera_convert.formats.results import (
    conversion_text,
    count_text,
    info_text,
    regenerated_text,
    tree_text,
)
from vera_convert.formats.shared import table
from vera_convert.hub.lookup import HubAccess
from vera_convert.rules import CATALOG
from vera_convert.schemas import load_schema
from vera_convert.summary import info

SchemaErrors = Callable[..., list[str]]
FIXTURES = DATA / "fixtures"
RANDOM = np.random.default_rng(1).normal(size=(4, 16)).astype(np.float32)


def as_printed(document: object) -> Any:
    """Return a document as programs read the document: as strict JSON."""
    return json.loads(json.dumps(document, allow_nan=False))


def test_a_table_is_aligned_without_trailing_spaces() -> None:
    rows = [["a", "b"], ["long name", "x"], ["", "y", "z"], ["last"]]
    assert table(rows) == "a          b\nlong name  x\n           y  z\nlast"


# --- info ----------------------------------------------------------------------------------------

SPOILERS = {
    "good": all_of(),
    "stripped by us": stripped,
    "stripped by PEFT": bare,
    "no draw": tensors(lambda stored: {**stored, A: RANDOM}),
    "not finite": tensors(lambda stored: {**stored, A: stored[A] / np.float32(0)}),
    "another variant": drawn(Variant.BFLOAT16_2_12_FUSED),
    "odd texts": fields(
        {"base_model_name_or_path": "\x1b[31m\n", "peft_version": "\u202e", "x": 1}
    ),
}


@pytest.mark.parametrize("spoil", SPOILERS.values(), ids=SPOILERS)
@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_the_document_of_info(
    spoil: Callable[[Path], None], tmp_path: Path, schema_errors: SchemaErrors, *, with_base: bool
) -> None:
    folder = good_adapter(tmp_path / "adapter")
    spoil(folder)
    options = BaseOptions(str(tiny_base(tmp_path / "base"))) if with_base else None
    found = info(folder, base=options)
    document = as_printed(result_document(found))
    assert schema_errors("info", document) == []
    text = info_text(found)
    assert all(line.isprintable() and line == line.rstrip() for line in text.splitlines())
    assert f"{found.sizes.as_is:,} bytes" in text
    assert document["bytes"]["as_is"] == found.sizes.as_is


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*/*/adapter_config.json"))[::5], ids=str)
def test_the_documents_of_info_on_adapters_of_peft(path: Path, schema_errors: SchemaErrors) -> None:
    expected = json.loads((path.parent / "expected.json").read_bytes())
    for options in (None, BaseOptions(str(FIXTURES / expected["base"]))):
        found = info(path.parent, base=options)
        assert schema_errors("info", as_printed(result_document(found))) == []


def test_the_text_of_info() -> None:
    folder = FIXTURES / "0.21.2" / "llama_bf16_proj"
    base = FIXTURES / "bases" / "llama-bf16"
    found = info(folder, base=BaseOptions(str(base)))
    found = replace(
        found,
        location=replace(found.location, label="org/adapter"),
        base_facts=replace(found.base_facts, source="org/base"),
    )
    assert info_text(found) == (
        """\
adapter                org/adapter (VeRA, written by PEFT 0.21.2)
base                   org/base (llama)
rank                   4
key                    0
layers                 8
  mlp.down_proj        2 x (80 -> 48)
  self_attn.k_proj     2 x (48 -> 24)
  self_attn.q_proj     2 x (48 -> 48)
  self_attn.v_proj     2 x (48 -> 24)
lambdas                F32
projections            embedded: A [4, 80], B [48, 4], F32
                       the float32-fused draw of key 0 for r = 4, 80 inputs, 48 outputs, """
        """rounded to bfloat16
  PEFT 0.11 to 0.20    regenerates the same A and B from the key on a bfloat16 base
  PEFT 0.21 and later  uses the stored A and B
trainable              320 parameters in b and d (a LoRA of this rank: 2,944)
size                   5,416 bytes
  stripped             3,600 bytes
  embedded             5,416 bytes
  as LoRA              14,440 bytes
  merged               94,760 bytes"""
    )


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (bare, "Not proven: the adapter stores no fingerprint"),
        (bare, "stripped; a fingerprint with the sizes is missing"),
        (stripped, "stripped, with a fingerprint"),
        (stripped, "regenerates the same A and B from the key on a float32 base"),
        (drawn(Variant.FLOAT32_SEPARATE), "regenerates other A and B from the key"),
        (drawn(key=KEY + 1), "draw of key 8"),
        (tensors(lambda stored: {**stored, A: RANDOM}), "from no known generator: "),
        (tensors(lambda stored: {**stored, A: RANDOM}), "cannot be stripped"),
        (all_of(), "not read: example/tiny-llama@main is not in the local cache"),
        (all_of(), "(this run is offline). Pass the base with --base\n"),
        (all_of(), "2 x (? -> 16)"),
        (
            fields({"base_model_name_or_path": None}),
            "config names no base. Pass the base with --base",
        ),
    ],
)
def test_the_text_of_info_contains(
    spoil: Callable[[Path], None], said: str, tmp_path: Path
) -> None:
    folder = good_adapter(tmp_path / "adapter")
    spoil(folder)
    assert said in info_text(info(folder))


# --- strip, embed, migrate -----------------------------------------------------------------------


def conversions(tmp_path: Path) -> Iterator[tuple[str, Conversion]]:
    folder = good_adapter(tmp_path / "adapter")
    (folder / "README.md").write_text("carried")
    (folder / "optimizer.pt").write_bytes(b"left out")
    base = BaseOptions(str(tiny_base(tmp_path / "base")))
    yield "strip", strip(folder, tmp_path / "stripped", base=base)
    yield "strip", strip(tmp_path / "stripped", tmp_path / "copied")
    yield "embed", embed(tmp_path / "stripped", tmp_path / "embedded")
    yield "embed", embed(folder, tmp_path / "again", base=base)


def test_the_report_of_a_conversion(tmp_path: Path, schema_errors: SchemaErrors) -> None:
    texts = []
    for command, done in conversions(tmp_path):
        document = as_printed(result_document(done, command=command))
        assert schema_errors("conversion", document) == []
        assert document["bytes_after"] == (
            (Path(document["out"]) / "adapter_model.safetensors").stat().st_size
        )
        texts.append(conversion_text(done))
    first, copied, embedded, again = texts
    assert first.splitlines()[0].endswith("stripped (stripped)")
    assert "changed   dropped A and B (the float32-fused draw of key 7" in first
    assert f"base      {tmp_path / 'base'}" in first
    assert "copied    README.md" in first
    assert "left out  optimizer.pt" in first
    assert "nothing: the adapter is stripped already, and was copied" in copied
    assert "proven identical by the fingerprint" in embedded
    assert "nothing: the adapter is embedded already, and was copied" in again


def test_the_report_names_a_needed_renaming(tmp_path: Path, schema_errors: SchemaErrors) -> None:
    folder = good_adapter(tmp_path / "adapter")
    tensors(lambda s: {n.replace("model.model.layers", "model.layers"): a for n, a in s.items()})(
        folder
    )
    done = strip(folder, tmp_path / "out", base=BaseOptions(str(tiny_base(tmp_path / "base"))))
    assert 'prefix "model." added' in conversion_text(done)
    document = as_printed(result_document(done, command="strip"))
    assert document["base"]["names"] == 'prefix "model." added'
    assert schema_errors("conversion", document) == []


def test_the_report_of_a_tree(tmp_path: Path, schema_errors: SchemaErrors) -> None:
    good_adapter(tmp_path / "tree" / "one")
    good_adapter(tmp_path / "tree" / "\u202e")
    good_adapter(tmp_path / "tree" / "bad\u2028", r=0)
    result = migrate_tree(tmp_path / "tree", tmp_path / "out", to=Mode.STRIPPED)
    document = as_printed(result_document(result))
    assert schema_errors("migration", document) == []
    assert [*document["done"]] == ["one", "\u202e"]
    assert document["failed"]["bad\u2028"]["findings"][0]["code"] == "V104"
    lines = tree_text(result).splitlines()
    assert all(line.isprintable() for line in lines)
    assert lines[-1] == f"wrote 2 of 3 adapters to {tmp_path / 'out'}"
    assert "NOT MIGRATED (V104)" in lines[2]


def test_the_report_of_a_tree_without_good_adapters(
    tmp_path: Path, schema_errors: SchemaErrors
) -> None:
    good_adapter(tmp_path / "tree" / "bad", r=0)
    result = migrate_tree(tmp_path / "tree", tmp_path / "out", to=Mode.ASIS)
    assert tree_text(result).endswith("wrote 0 of 1 adapters, so nothing")
    unread = replace(result, failed={"bad": SurroundingsError("no base.", "Pass the base.")})
    assert "NOT MIGRATED (no base)\n" in tree_text(unread)
    assert schema_errors("migration", as_printed(result_document(result))) == []


# --- regenerate, count, errors -------------------------------------------------------------------


@pytest.mark.parametrize("variant", Variant)
@pytest.mark.parametrize("rounding", [Rounding.NONE, Rounding.BF16, Rounding.FP16])
def test_the_report_of_regenerate(
    variant: Variant, rounding: Rounding, tmp_path: Path, schema_errors: SchemaErrors
) -> None:
    if variant.dtype.itemsize == 2 and rounding is not Rounding.NONE:
        return
    made = regenerate(
        tmp_path / "out.safetensors",
        rank=2,
        in_features=3,
        out_features=5,
        key=-1,
        generator=variant,
        rounding=rounding,
    )
    document = as_printed(result_document(made))
    assert schema_errors("regeneration", document) == []
    text = regenerated_text(made)
    assert made.sha256_A in text
    assert f"{made.size:,} bytes" in text
    assert made.draw.description in text


@pytest.mark.parametrize("targets", [[], ["q_proj", "mlp.down_proj"], ["all-linear"], ["lm_head"]])
def test_the_report_of_count(targets: list[str], schema_errors: SchemaErrors) -> None:
    access = HubAccess()
    for model in (
        layers_of_config_file(DATA / "configs" / "llama-3.2-3b.json"),
        layers_of_base(str(FIXTURES / "bases/llama-fp32"), revision=None, access=access),
    ):
        result = count(model, rank=256, targets=targets)
        assert schema_errors("count", as_printed(result_document(result))) == []
        text = count_text(result)
        assert f"{result.vera.parameters:,}" in text
        assert all(line == line.rstrip() for line in text.splitlines())


def test_the_published_figures_are_printed() -> None:
    model = layers_of_config_file(DATA / "configs" / "llama-3.2-3b.json")
    text = count_text(count(model, rank=256, targets=["q_proj", "v_proj"]))
    assert "129,024" in text
    assert "6,821,968" in text


def test_the_document_of_an_error(tmp_path: Path, schema_errors: SchemaErrors) -> None:
    for error in (UsageError("a"), SurroundingsError("b")):
        document = as_printed(result_document(error))
        assert schema_errors("error", document) == []
        assert document["findings"] == []
        assert document["status"] == error.status
    with pytest.raises(CheckpointError) as caught:
        info(good_adapter(tmp_path / "adapter", r="4", bias=1))
    document = as_printed(result_document(caught.value))
    assert schema_errors("error", document) == []
    assert [finding["code"] for finding in document["findings"]] == ["V103", "V103"]
    assert document["error"].startswith("V103 ")


def test_every_rule_can_stand_in_a_document(schema_errors: SchemaErrors) -> None:
    for rule in CATALOG.values():
        error = CheckpointError(rule.at("place", "reason."))
        assert schema_errors("error", as_printed(result_document(error))) == []


# --- the schemas ---------------------------------------------------------------------------------


DOCUMENTS = ["info", "conversion", "migration", "regeneration", "count", "error"]


def test_shared_definitions_are_the_same_in_every_schema() -> None:
    schemas = {name: load_schema(name) for name in DOCUMENTS}
    seen: dict[str, object] = {}
    for schema in schemas.values():
        definitions = schema.get("$defs", {})
        assert isinstance(definitions, dict)
        for name in ("finding", "draw", "base"):
            if name in definitions:
                assert definitions[name] == seen.setdefault(name, definitions[name])
    parts = schemas["migration"]["$defs"]
    assert isinstance(parts, dict)
    for name in ("conversion", "error"):
        for key in ("properties", "required"):
            assert parts[name][key] == schemas[name][key]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_schema_is_strict(name: str, schema_errors: SchemaErrors) -> None:
    """A schema refuses a missing field, an unknown field, and a field of another type."""
    assert schema_errors(name, {})
    assert schema_errors(name, [])
    required = load_schema(name)["required"]
    assert isinstance(required, list)
    document: dict[str, object] = dict.fromkeys(required)
    errors = schema_errors(name, {**document, "more": 1})
    assert any("'more'" in error for error in errors)


def test_a_changed_document_violates_the_schema(
    tmp_path: Path, schema_errors: SchemaErrors
) -> None:
    document = as_printed(result_document(info(good_adapter(tmp_path / "adapter"))))
    changes: list[dict[str, object]] = [
        {"format": 2},
        {"rank": "4"},
        {"rank": True},
        {"base": {}},
        {"draw": {**document["draw"], "variant": "float32"}},
        {"findings": [{"code": "X1"}]},
        {"effects": [{**document["effects"][0], "source": "cloud"}]},
        {"bytes": {**document["bytes"], "as_is": None}},
    ]
    for change in changes:
        assert schema_errors("info", {**document, **change}), change
