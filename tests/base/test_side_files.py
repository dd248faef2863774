"""The other files in the base's folder: copied, left out, or replaced by the adapter's files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from folders import bytes_by_name, refusal
from hub_server import HubServer
from merges import INDEX, filled_base, merged_with, tensors_of

from vera_convert.errors import CheckpointError
from vera_convert.hub.lookup import HubAccess
from vera_convert.merging.merge import merge
from vera_convert.verification.options import VerifyOptions
from vera_convert.verification.verify import verify

# --- other files of the base ---------------------------------------------------------------------


BESIDE = {
    "generation_config.json": b'{"temperature": 0.1, "do_sample": false}',
    "tokenizer.json": b"{ }",
    "tokenizer_config.json": b'{"a": 1}',
    "chat_template.jinja": b"{{ x }}",
    "preprocessor_config.json": b"[]",
    "modeling_own.py": b"raise SystemExit",
    "LICENSE": b"free",
    "assets/picture.png": b"\x89PNG",
}
OTHERS = [
    "pytorch_model.bin",
    "model.fp16.safetensors",
    "tf_model.h5",
    "flax_model.msgpack",
    "model.onnx",
    "rust_model.ot",
    "model.gguf",
    "weights.npz",
    "model.tflite",
    "consolidated.00.pth",
    "onnx/model.onnx",
    "onnx/config.json",
    "openvino/openvino_model.xml",
    "original/params.json",
    "pytorch_model.bin.index.json",
    "training_args.bin",
]


def beside(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def test_side_files_are_copied_byte_by_byte(tmp_path: Path, adapter: Path, base: Path) -> None:
    beside(base, BESIDE | {".hidden": b"", "README.md": b"the base's own card"})
    done = merged_with(adapter, base, tmp_path / "out")
    found = bytes_by_name(tmp_path / "out")
    assert {name: found[name] for name in BESIDE} == BESIDE
    assert found["config.json"] == (base / "config.json").read_bytes()
    own = {"config.json", "model.safetensors", "README.md", "merge-provenance.json"}
    assert found.keys() - BESIDE.keys() == own
    assert done.sides.copied == tuple(sorted(BESIDE))
    assert not done.findings


def test_other_forms_of_the_weights_are_never_copied(
    tmp_path: Path, adapter: Path, base: Path
) -> None:
    beside(base, dict.fromkeys(OTHERS, b"x") | {"extra-00001-of-00002.safetensors": b"x"})
    done = merged_with(adapter, base, tmp_path / "out")
    found = bytes_by_name(tmp_path / "out")
    own = {"config.json", "model.safetensors", "README.md", "merge-provenance.json"}
    assert found.keys() == own
    codes = [finding.code for finding in done.findings]
    assert codes.count("V539") == 1
    (listed,) = [finding for finding in done.findings if finding.code == "V539"]
    assert all(name in listed.reason for name in OTHERS if not name.endswith(".safetensors"))
    assert {finding.code for finding in done.findings} == {"V539", "V512"}


def test_an_adapter_in_the_base_s_folder_is_left_out(
    tmp_path: Path, adapter: Path, base: Path
) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, base / name)
    done = merged_with(adapter, base, tmp_path / "out")
    assert not [*(tmp_path / "out").glob("adapter_*")]
    assert [finding.code for finding in done.findings] == ["V540"]


def test_parts_with_their_own_weights_are_copied(tmp_path: Path, adapter: Path, base: Path) -> None:
    dense = {
        "modules.json": b"[]",
        "2_Dense/config.json": b"{}",
        "2_Dense/model.safetensors": b"its own",
        "2_Dense/pytorch_model.bin": b"its own too",
    }
    beside(base, dense)
    done = merged_with(adapter, base, tmp_path / "out")
    assert dense.items() <= bytes_by_name(tmp_path / "out").items()
    assert not done.findings
    assert "library_name: sentence-transformers" in (tmp_path / "out/README.md").read_text()


def test_all_files_of_the_adapter_s_tokenizer_are_taken_together(
    tmp_path: Path, adapter: Path, base: Path
) -> None:
    beside(base, {"vocab.txt": b"base", "tokenizer_config.json": b"{}", "keep.txt": b"base"})
    own = {"tokenizer.json": b'{"added_tokens": [{"id": 31}]}', "special_tokens_map.json": b"{}"}
    beside(adapter, own | {"notes.txt": b"not taken"})
    done = merged_with(adapter, base, tmp_path / "out")
    found = bytes_by_name(tmp_path / "out")
    assert own.items() <= found.items()
    assert found["keep.txt"] == b"base"
    assert not {"vocab.txt", "tokenizer_config.json", "notes.txt"} & found.keys()
    assert done.tokenizer == tuple(sorted(own))


def test_a_chat_template_is_taken_without_a_tokenizer(
    tmp_path: Path, adapter: Path, base: Path
) -> None:
    beside(base, {"chat_template.jinja": b"base", "tokenizer_config.json": b"base's"})
    beside(adapter, {"chat_template.jinja": b"x", "tokenizer_config.json": b"{}"})
    done = merged_with(adapter, base, tmp_path / "out")
    assert done.tokenizer == ()
    assert (tmp_path / "out/chat_template.jinja").read_bytes() == b"x"
    assert (tmp_path / "out/tokenizer_config.json").read_bytes() == b"base's"


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer.json": b'{"added_tokens": [{"id": 32}]}'},
        {"vocab.json": b"{}", "added_tokens.json": b'{"<x>": 32}'},
        {"vocab.json": b"{}", "tokenizer_config.json": b'{"added_tokens_decoder": {"32": {}}}'},
    ],
)
def test_a_token_without_a_row_is_refused_with_both_numbers(
    tmp_path: Path, adapter: Path, base: Path, files: dict[str, bytes]
) -> None:
    beside(adapter, files)
    with pytest.raises(CheckpointError, match=r"V541 .*largest token is 32.* has 32 rows"):
        merged_with(adapter, base, tmp_path / "out")


# --- other files of the adapter ------------------------------------------------------------------


def test_generation_and_processor_configs_are_taken_from_the_adapter(
    tmp_path: Path, adapter: Path, base: Path
) -> None:
    beside(base, {"generation_config.json": b"base", "preprocessor_config.json": b"base"})
    own = {"generation_config.json": b"own", "processor_config.json": b"own"}
    beside(adapter, own | {"notes.txt": b"not taken", "code.py": b"not taken"})
    done = merged_with(adapter, base, tmp_path / "out")
    found = bytes_by_name(tmp_path / "out")
    assert own.items() <= found.items()
    assert found["preprocessor_config.json"] == b"base"
    assert not {"notes.txt", "code.py"} & found.keys()
    assert sorted(done.beside.copied) == sorted(own)
    assert done.beside.left_out == ("code.py", "notes.txt")
    record = json.loads(found["merge-provenance.json"])
    assert record["from_adapter"] == sorted(own)
    assert record["carried"] == ["preprocessor_config.json"]


def test_the_modules_of_sentence_transformers_are_taken_from_the_adapter(
    tmp_path: Path, adapter: Path, base: Path
) -> None:
    beside(
        base,
        {
            "modules.json": b"[]",
            "1_Pooling/config.json": b"base",
            "2_Dense/config.json": b"base",
            "2_Dense/pytorch_model.bin": b"base",
        },
    )
    listed = [{"idx": 2, "name": "2", "path": "head", "type": "x"}]
    own = {
        "modules.json": json.dumps(listed).encode(),
        "config_sentence_transformers.json": b'{"prompts": {}}',
        "sentence_bert_config.json": b"{}",
        "2_Dense/config.json": b"own",
        "2_Dense/model.safetensors": b"own",
        "head/config.json": b"own",
        "head/model.safetensors": b"own",
    }
    beside(adapter, own)
    done = merged_with(adapter, base, tmp_path / "out")
    found = bytes_by_name(tmp_path / "out")
    assert own.items() <= found.items()
    assert found["1_Pooling/config.json"] == b"base"
    assert "2_Dense/pytorch_model.bin" not in found, "a module is replaced as a whole"
    assert not done.findings
    assert b"library_name: sentence-transformers" in found["README.md"]


@pytest.mark.parametrize(
    ("path", "codes"), [("0_Transformer", ["V576"]), ("1_Pooling", []), (None, [])]
)
def test_an_adapter_that_is_a_module_of_the_folder_above_is_warned_about(
    tmp_path: Path, adapter: Path, base: Path, path: str | None, codes: list[str]
) -> None:
    folder = tmp_path / "sentences" / "0_Transformer"
    folder.parent.mkdir()
    adapter.rename(folder)
    if path is not None:
        entries = [{"idx": 0, "name": "0", "path": path, "type": "x"}]
        (folder.parent / "modules.json").write_text(json.dumps(entries))
    done = merged_with(folder, base, tmp_path / "out")
    assert [found.code for found in done.findings] == codes


def test_an_adapter_that_is_a_module_of_a_router_is_warned_about(
    tmp_path: Path, adapter: Path, base: Path
) -> None:
    folder = tmp_path / "sentences" / "query_0_Transformer"
    folder.parent.mkdir()
    adapter.rename(folder)
    types = {folder.name: "Transformer", "document_0_StaticEmbedding": "StaticEmbedding"}
    (folder.parent / "router_config.json").write_text(json.dumps({"types": types}))
    done = merged_with(folder, base, tmp_path / "out")
    assert [found.code for found in done.findings] == ["V576"]


@pytest.mark.parametrize(
    "listed", ["[", "{}", "[1]", '[{"path": []}]', '[{"path": {}}]', "[{}]", '{"types": [[]]}']
)
def test_a_malformed_list_of_modules_names_no_module(
    tmp_path: Path, adapter: Path, base: Path, listed: str
) -> None:
    lists = {"modules.json": listed.encode(), "router_config.json": listed.encode()}
    beside(adapter, {**lists, "1_Pooling/config.json": b"own"})
    merged_with(adapter, base, tmp_path / "out")
    assert bytes_by_name(tmp_path / "out")["1_Pooling/config.json"] == b"own"


def test_an_adapter_that_is_a_module_of_a_repo_is_warned_about(
    tmp_path: Path, adapter: Path, base: Path, server: HubServer
) -> None:
    files = {f"0_Transformer/{path.name}": path.read_bytes() for path in adapter.iterdir()}
    server.add("org/sentences", {**files, "modules.json": b"[]"})
    access = HubAccess(cache_dir=tmp_path / "cache", progress=False)
    done = merge("org/sentences/0_Transformer", tmp_path / "out", base=base, access=access)
    assert [found.code for found in done.findings] == ["V576"]


@pytest.mark.parametrize(
    "name", ["new_embeddings.safetensors", "non_lora_state_dict.bin", "extra/weights.pt"]
)
def test_other_weights_in_the_adapter_s_folder_are_named_as_not_merged(
    tmp_path: Path, adapter: Path, base: Path, name: str
) -> None:
    beside(adapter, {name: b"weights"})
    done = merged_with(adapter, base, tmp_path / "out")
    (finding,) = done.findings
    assert finding.code == "V573"
    assert name in finding.reason
    assert not (tmp_path / "out" / name).exists()


def test_nothing_of_a_training_run_or_a_download_is_published(
    tmp_path: Path, adapter: Path, base: Path
) -> None:
    strange = {
        "config.json:Zone.Identifier": b"[ZoneTransfer]",
        "runs/host/events.out.tfevents.1.host.2.0": b"log",
        "trainer_state.json": b"{}",
        "zero_to_fp32.py": b"",
        "latest": b"global_step10",
    }
    beside(base, strange)
    beside(adapter, strange)
    done = merged_with(adapter, base, tmp_path / "out")
    assert not strange.keys() & bytes_by_name(tmp_path / "out").keys()
    assert sorted(done.sides.unneeded) == sorted(strange)
    assert sorted(done.beside.left_out) == sorted(strange)
    assert not done.findings


# --- a config that names the file of the weights --------------------------------------------------


@pytest.mark.parametrize("shards", [1, 2])
def test_the_weights_that_the_config_names_are_merged(
    tmp_path: Path, adapter: Path, shards: int
) -> None:
    """transformers 5 follows the field, even if the folder holds a file of the usual name."""
    base = filled_base(tmp_path / "base", shards=shards)
    named = "weights.safetensors" if shards == 1 else "weights.safetensors.index.json"
    (base / ("model.safetensors" if shards == 1 else INDEX)).rename(base / named)
    config = {"model_type": "llama", "transformers_weights": named, "hidden_size": 16}
    (base / "config.json").write_text(json.dumps(config))
    expected = tensors_of(base)
    shutil.copy(
        filled_base(tmp_path / "other", dtype="float16") / "model.safetensors",
        base / "model.safetensors",
    )
    done = merged_with(adapter, base, tmp_path / "out")
    out = tmp_path / "out"
    found = tensors_of(out)
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        name: tensor.dtype for name, tensor in expected.items()
    }
    changed = {name for name in found if not np.array_equal(found[name], expected[name])}
    assert changed == {each.name for each in done.tensors}
    assert json.loads((out / "config.json").read_bytes()) == {
        "model_type": "llama",
        "hidden_size": 16,
    }
    names = {path.name for path in out.iterdir()} - {"config.json", "README.md"}
    if shards == 1:
        assert names == {"model.safetensors", "merge-provenance.json"}
    else:
        listed = {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
        assert names == {INDEX, *listed, "merge-provenance.json"}
    options = VerifyOptions(layers_only=True)
    result = verify(adapter, base=str(base), merged=out, options=options)
    assert result.passed, [str(each) for each in result.findings]


@pytest.mark.parametrize(
    ("named", "code"),
    [("../other.safetensors", "V005"), ("missing.safetensors", "V507"), ("/x.safetensors", "V005")],
)
def test_a_config_that_names_missing_weights_is_refused(
    tmp_path: Path, adapter: Path, base: Path, named: str, code: str
) -> None:
    (base / "config.json").write_text(json.dumps({"transformers_weights": named}))
    assert refusal(lambda: merged_with(adapter, base, tmp_path / "out")) == code
