"""NaN and Infinity in JSON of transformers and PEFT: the file is read, and copied unchanged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from adapters import good_adapter
from commandline import Run
from folders import bytes_by_name, weights
from merges import assert_same, expected_tensors, filled_base, merged_with, tensors_of

from vera_convert.base.model import parse_config_file

INFINITIES = ("Infinity", "-Infinity", "NaN", "1e400", '{"__float__": "Infinity"}')


def with_number(path: Path, number: str) -> bytes:
    """Write a number's text into a config: at the top level, in a list, and in a nested config."""
    content = path.read_bytes().lstrip()
    more = f'{{"limit": {number}, "limits": [0.0, {number}], "part": {{"inner": {number}}}, '
    path.write_bytes(more.encode() + content[1:])
    return path.read_bytes()


@pytest.mark.parametrize("number", INFINITIES)
def test_a_base_with_nan_or_infinity_is_merged_and_its_config_is_copied(
    number: str, tmp_path: Path, run: Run
) -> None:
    adapter, base = good_adapter(tmp_path / "adapter"), filled_base(tmp_path / "base")
    text = with_number(base / "config.json", number)
    result = merged_with(adapter, base, tmp_path / "out")
    assert (tmp_path / "out/config.json").read_bytes() == text
    assert_same(tensors_of(tmp_path / "out"), expected_tensors({adapter: 1.0}, base))
    assert [finding.code for finding in result.findings if finding.severity == "error"] == []
    ended = run(*("verify", adapter, "--base", base, "--merged", tmp_path / "out", "--layers-only"))
    assert ended.status == 0, ended.err


@pytest.mark.parametrize("number", INFINITIES)
@pytest.mark.parametrize("command", ["info", "validate", "strip", "embed", "migrate"])
def test_every_command_takes_a_base_with_nan_or_infinity(
    command: str, number: str, tmp_path: Path, run: Run
) -> None:
    adapter, base = good_adapter(tmp_path / "adapter"), filled_base(tmp_path / "base")
    with_number(base / "config.json", number)
    out = [tmp_path / "out"] if command in ("strip", "embed", "migrate") else []
    mode = ["--to", "stripped"] if command == "migrate" else []
    ended = run(command, adapter, *out, *mode, "--base", base)
    assert ended.status == 0, ended.err


def test_another_dtype_changes_no_other_field_of_a_config_with_nan_or_infinity(
    tmp_path: Path,
) -> None:
    adapter, base = good_adapter(tmp_path / "adapter"), filled_base(tmp_path / "base")
    (base / "config.json").write_text('{"torch_dtype": "float32", "model_type": "llama"}')
    text = with_number(base / "config.json", "Infinity")
    merged_with(adapter, base, tmp_path / "out", dtype="bfloat16")
    changed = text.replace(b'"float32"', b'"bfloat16"')
    assert (tmp_path / "out/config.json").read_bytes() == changed


def test_an_index_and_a_tokenizer_may_hold_nan_or_infinity(tmp_path: Path) -> None:
    adapter = good_adapter(tmp_path / "adapter")
    base = filled_base(tmp_path / "base", shards=2)
    index = base / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"metadata": {', '"metadata": {"loss": NaN, '))
    for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
        (adapter / name).write_text('{"scale": -Infinity, "model_max_length": 1e400}')
    merged_with(adapter, base, tmp_path / "out")
    assert (tmp_path / "out" / index.name).read_bytes() == index.read_bytes()
    assert b"-Infinity" in (tmp_path / "out/tokenizer_config.json").read_bytes()


@pytest.mark.parametrize(
    ("field", "number"),
    [
        *((field, number) for field in ("d_initial", "x") for number in INFINITIES[:4]),
        ("vera_dropout", "NaN"),
        ("x", "-0"),
        ("x", "9" * 4_300),
    ],
)
def test_an_adapter_s_config_may_hold_the_numbers_that_peft_loads(
    field: str, number: str, tmp_path: Path, run: Run
) -> None:
    adapter, base = good_adapter(tmp_path / "adapter"), filled_base(tmp_path / "base")
    plain = good_adapter(tmp_path / "plain")
    config = adapter / "adapter_config.json"
    document = {**json.loads(config.read_bytes()), field: "@"}
    config.write_text(json.dumps(document, indent=2).replace('"@"', number))
    assert run("validate", adapter, "--base", base).status == 0
    assert run("strip", adapter, tmp_path / "stripped").status == 0
    assert run("embed", tmp_path / "stripped", tmp_path / "again", "--base", base).status == 0
    assert (tmp_path / "again/adapter_config.json").read_bytes() == config.read_bytes()
    assert weights(tmp_path / "again").keys() == weights(adapter).keys()
    assert run("verify", adapter, "--adapter", tmp_path / "again").status == 0
    merged_with(adapter, base, tmp_path / "out")
    merged_with(plain, base, tmp_path / "wanted")
    name = "model.safetensors"
    assert bytes_by_name(tmp_path / "out")[name] == bytes_by_name(tmp_path / "wanted")[name]


@pytest.mark.parametrize("text", ['"Infinite"', "[1]", '"Infinity", "b": 1', '"nan"'])
def test_an_object_that_only_looks_like_a_float_stays_an_object(text: str) -> None:
    content = f'{{"x": {{"__float__": {text}}}}}'.encode()
    assert parse_config_file(content, place="config.json") == json.loads(content)


def test_layers_are_counted_from_a_config_with_nan_or_infinity(tmp_path: Path, run: Run) -> None:
    config = tmp_path / "config.json"
    fields = '"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 9'
    heads = '"num_attention_heads": 2, "num_key_value_heads": 1, "rope_theta": Infinity'
    config.write_text(f'{{"model_type": "llama", {fields}, {heads}}}')
    assert run("count", "--config", config, "--rank", 4, "--target", "q_proj").status == 0
    config.write_text(config.read_text().replace('"hidden_size": 16', '"hidden_size": Infinity'))
    ended = run("count", "--config", config, "--rank", 4, "--target", "q_proj")
    assert ended.status == 1
    assert "hidden_size" in ended.err


def test_a_tokenizer_of_the_adapter_may_hold_nan_or_infinity(tmp_path: Path) -> None:
    adapter, base = good_adapter(tmp_path / "adapter"), filled_base(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (adapter / name).write_text('{"model_max_length": Infinity, "pad_token_id": NaN}')
    merged_with(adapter, base, tmp_path / "out")
    text = (adapter / "tokenizer_config.json").read_bytes()
    assert (tmp_path / "out/tokenizer_config.json").read_bytes() == text
