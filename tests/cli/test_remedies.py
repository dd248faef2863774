"""The remedy of a message fits the case, and works when a user follows the remedy."""

from __future__ import annotations

import errno
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import good_adapter, good_tensors
from bases import tiny_base
from commandline import Run
from merges import filled_base
from safetensors.numpy import load_file

import vera_convert
from vera_convert.cli.refusals import explained
from vera_convert.errors import SurroundingsError
from vera_convert.files.reading import unreadable
from vera_convert.rules import Finding


def finding(code: str, folder: Path) -> Finding:
    """Return the only finding with a code about an adapter."""
    (found,) = [each for each in vera_convert.validate(folder).findings if each.code == code]
    return found


# --- A and B -------------------------------------------------------------------------------------


def test_a_and_b_that_differ_from_the_key_s_are_read_from_the_adapter(
    tmp_path: Path, run: Run
) -> None:
    folder = good_adapter(tmp_path / "adapter", projection_prng_key=8)
    base = tiny_base(tmp_path / "base")
    call = "regenerate", tmp_path / "ab.safetensors", "--for", folder, "--base", base
    ended = run(*call)
    assert ended.status == 0
    assert "V410" in ended.err
    assert "vera-convert embed" not in ended.err, "the adapter stores A and B already"
    assert "read both from adapter_model.safetensors" in ended.err


@pytest.mark.parametrize("name", ["org/unknown", "/models/llama", None])
def test_a_tree_asks_for_the_base_by_the_name_in_the_config(
    name: str | None, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    good_adapter(tmp_path / "tree/one", stripped=True, base_model_name_or_path=name)
    base = tiny_base(tmp_path / "base")
    call = "migrate", tmp_path / "tree", tmp_path / "out", "--to", "embedded", "--recursive"
    ended = run(*call, "--offline")
    assert ended.status in (2, 3)
    if name is None:
        assert "Migrate this adapter alone, with --base." in ended.err
        alone = "migrate", tmp_path / "tree/one", tmp_path / "out", "--to", "embedded"
        assert run(*alone, "--base", base).status == 0
    else:
        assert f"Pass the base with --base-for {name}=MODEL." in ended.err
        assert run(*call, "--offline", "--base-for", f"{name}={base}").status == 0


def test_sizes_replace_a_missing_base(tmp_path: Path, run: Run) -> None:
    folder = good_adapter(tmp_path / "adapter", stripped=True, base_model_name_or_path=None)
    ended = run("embed", folder, tmp_path / "out")
    sizes = "--in-features, --out-features and --base-dtype"
    assert f"Pass the base with --base. Or run `vera-convert embed` with {sizes}." in ended.err
    given = "--in-features", "16", "--out-features", "16", "--base-dtype", "float32"
    assert run("embed", folder, tmp_path / "out", *given).status == 0


# --- copies of the base's head -------------------------------------------------------------------


def with_head(folder: Path, **copies: np.ndarray) -> Path:
    """Write an adapter of an output head, with copies of the base's tensors as PEFT stores them."""
    random = np.random.default_rng(0)
    head = "base_model.model.lm_head."
    tensors = {
        f"{head}vera_lambda_b": random.normal(size=32).astype("f4"),
        f"{head}vera_lambda_d": random.normal(size=4).astype("f4"),
        "base_model.vera_B": random.normal(size=(32, 4)).astype("f4"),
        **{f"{head}base_layer.{name}": value for name, value in copies.items()},
    }
    return good_adapter(folder, tensors=tensors, target_modules=["q_proj", "v_proj", "lm_head"])


def test_the_copy_of_a_packed_head_is_removed(tmp_path: Path) -> None:
    packed = np.zeros((256, 1), "u1")
    state = {"weight.quant_state.bitsandbytes__nf4": np.zeros(8, "u1")}
    folder = with_head(tmp_path / "adapter", weight=packed, **state)
    before = vera_convert.validate(folder)
    assert not before.passed
    remedy = finding("V206", folder).remedy
    assert "float32" not in remedy
    pytest.importorskip("torch")
    (code,) = re.findall(r'python -c "([^"]*)"', remedy)
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
    after = vera_convert.validate(folder)
    assert after.passed, after.findings


def test_a_trained_tensor_without_floats_is_converted(tmp_path: Path) -> None:
    lambda_b = {"base_model.model.model.layers.0.self_attn.q_proj.vera_lambda_b": np.ones(16, "i4")}
    folder = good_adapter(tmp_path / "adapter", tensors=lambda_b)
    assert finding("V206", folder).remedy.startswith("Convert the tensor to float32")


def test_peft_s_copy_of_a_head_needs_no_action(tmp_path: Path) -> None:
    folder = with_head(tmp_path / "adapter", weight=np.ones((32, 16), "f4"))
    assert finding("V231", folder).remedy.startswith("No action is needed")


# --- merges --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        (["--weight", "0"], "Give another weight with --weight, or with --add ADAPTER=W."),
        (["--add", "{}=-1"], "Check the adapters and their weights: deltas can cancel each other."),
    ],
)
def test_a_merge_without_effect_names_the_weights(
    options: list[str], remedy: str, tmp_path: Path, run: Run
) -> None:
    folder, base = good_adapter(tmp_path / "adapter"), filled_base(tmp_path / "base")
    given = [each.format(folder) for each in options]
    ended = run("merge", folder, tmp_path / "out", "--base", base, *given)
    assert "V303" in ended.err
    assert remedy in ended.err


@pytest.mark.parametrize("form", ["itself", "stripped"])
def test_an_adapter_that_is_merged_twice_is_named(form: str, tmp_path: Path, run: Run) -> None:
    folder, base = good_adapter(tmp_path / "adapter"), filled_base(tmp_path / "base")
    other = folder
    if form == "stripped":
        vera_convert.strip(folder, other := tmp_path / "stripped", base=base)
    ended = run("merge", folder, tmp_path / "out", "--base", base, "--add", other)
    assert ended.status == 0
    assert f"V581 {other}: it has the vectors, A and B of {folder}" in ended.err
    once = run("merge", folder, tmp_path / "once", "--base", base, "--weight", "2")
    assert "V581" not in once.err
    merged = [load_file(tmp_path / name / "model.safetensors") for name in ("out", "once")]
    assert all(np.allclose(merged[0][name], merged[1][name]) for name in merged[0])


def test_an_adapter_with_other_a_and_b_is_not_the_same_adapter(tmp_path: Path, run: Run) -> None:
    folder, base = good_adapter(tmp_path / "adapter"), filled_base(tmp_path / "base")
    A = {"base_model.vera_A": np.linspace(0, 1, 64, dtype="f4").reshape(4, 16)}
    other = good_adapter(tmp_path / "other", tensors=A)
    ended = run("merge", folder, tmp_path / "out", "--base", base, "--add", other)
    assert ended.status == 0, ended.err
    assert "V581" not in ended.err


def test_an_error_of_an_added_adapter_names_the_adapter(tmp_path: Path, run: Run) -> None:
    folder, base = good_adapter(tmp_path / "adapter"), filled_base(tmp_path / "base")
    call = "merge", folder, tmp_path / "out", "--base", base, "--add"
    lora = good_adapter(tmp_path / "lora", peft_type="LORA")
    assert f"error: V101 {lora}/adapter_config.json: " in run(*call, lora).err
    theirs = {name: each for name, each in good_tensors().items() if "q_proj" in name}
    renamed: dict[str, Any] = dict.fromkeys(theirs)
    renamed |= {name.replace("q_proj", "qq_proj"): each for name, each in theirs.items()}
    odd = good_adapter(tmp_path / "odd", tensors=renamed, target_modules=["qq_proj"])
    assert f"error: V520 {odd}: " in run(*call, odd).err
    wrong = good_adapter(tmp_path / "wrong", r="4", d_initial="x")
    ended = run(*call, wrong)
    assert f"error: V103 {wrong}" in ended.err
    assert f"vera-convert validate {wrong} --base {base})" in ended.err, "not the first adapter"


@pytest.mark.parametrize("name", ["a", "adapter"])
def test_an_added_adapter_of_any_name_is_named(
    name: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name can equal the beginning of a place, such as `adapter_config.json`."""
    monkeypatch.chdir(tmp_path)
    folder, base = good_adapter(tmp_path / "first"), filled_base(tmp_path / "base")
    good_adapter(tmp_path / name, stripped=True, save_projection=True)
    ended = run("merge", folder, tmp_path / "out", "--base", base, "--add", name)
    assert f"error: V211 {name}: adapter_model.safetensors: " in ended.err


@pytest.mark.parametrize(
    ("given", "is_strange"),
    [
        ("Foo", True),
        ("BertForSequenceClassification", True),
        ("LlamaForTokenClassification", False),
    ],
)
def test_a_class_of_another_model_is_a_warning(
    given: str, is_strange: bool, tmp_path: Path, run: Run
) -> None:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    base = filled_base(tmp_path / "base", config=config)
    folder = good_adapter(tmp_path / "adapter")
    call = "merge", folder, tmp_path / "out", "--base", base, "--architecture", given
    ended = run(*call)
    assert ended.status == 0
    assert ("V580 --architecture: the class is" in ended.err) == is_strange


def test_code_of_the_base_can_name_any_class(tmp_path: Path, run: Run) -> None:
    config = {"model_type": "llama", "auto_map": {"AutoModel": "modeling.Mine"}}
    base = filled_base(tmp_path / "base", config=config)
    folder = good_adapter(tmp_path / "adapter")
    ended = run("merge", folder, tmp_path / "out", "--base", base, "--architecture", "Mine")
    assert ended.status == 0
    assert "V580" not in ended.err


# --- every format --------------------------------------------------------------------------------


def test_every_format_shows_the_remedy_of_the_case(tmp_path: Path, run: Run) -> None:
    folder = with_head(tmp_path / "adapter", weight=np.ones((32, 16), "f4"))
    for form in ("text", "json", "sarif", "junit", "github"):
        shown = run("validate", folder, "--format", form).out
        assert "PEFT stores the base's weight of an adapted head." in shown.replace("&apos;", "'")
        assert "If the vocabulary was resized" not in shown or form == "sarif", "SARIF lists rules"
    document = json.loads(run("validate", folder, "--json").out)
    (found,) = [each for each in document["adapters"][0]["findings"] if each["code"] == "V231"]
    assert found["remedy"].startswith("No action is needed")


# --- OUT -----------------------------------------------------------------------------------------


def test_out_is_below_the_home_folder_as_inputs_are(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell does not expand `--output=~/x` and `'~/x'`; a folder named ~ would be a trap."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    good_adapter(tmp_path / "home/adapter")
    assert run("embed", "~/adapter", "~/out").status == 0
    assert (tmp_path / "home/out/adapter_config.json").is_file()
    assert run("validate", "~/out", "--format", "json", "--output", "~/report.json").status == 0
    assert (tmp_path / "home/report.json").is_file()
    assert not Path("~").exists()


@pytest.mark.parametrize("command", ["strip", "embed", "migrate", "merge", "to-lora"])
def test_every_command_replaces_an_empty_folder(command: str, tmp_path: Path, run: Run) -> None:
    folder, base = good_adapter(tmp_path / "adapter"), filled_base(tmp_path / "base")
    (out := tmp_path / "out").mkdir()
    call = [command, folder, out, "--base", base]
    call += ["--to", "asis"] if command == "migrate" else []
    refused = run(*call)
    assert refused.status == 2
    assert "replace it with --force" in refused.err
    assert run(*call, "--force").status == 0


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_an_out_in_a_system_folder_is_refused(tmp_path: Path, run: Run) -> None:
    ended = run("embed", good_adapter(tmp_path / "adapter"), "/proc/OUT")
    assert ended.status == 3
    assert ended.err.rstrip().endswith("Choose another OUT.")


# --- remedies in a circle ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "is_told"),
    [
        (["migrate", "--to", "embedded"], False),
        (["migrate", "--to", "stripped"], False),
        (["embed"], False),
        (["strip"], False),
        (["migrate", "--to", "asis"], True),
        (["merge"], True),
    ],
)
def test_the_command_that_cures_an_unannounced_pair_does_not_advise_itself(
    call: list[str], is_told: bool, tmp_path: Path, run: Run
) -> None:
    folder = good_adapter(tmp_path / "adapter", save_projection=False)
    base = filled_base(tmp_path / "base")
    ended = run(call[0], folder, tmp_path / "out", *call[1:], "--base", base)
    assert ended.status == 0
    assert ("V212" in ended.err) is is_told
    if not is_told:
        assert "V212" not in run("info", tmp_path / "out", "--base", base).err


def test_adapters_that_fail_alike_share_one_line_with_the_remedy(tmp_path: Path, run: Run) -> None:
    for name in ("one", "two"):
        good_adapter(tmp_path / "tree" / name, stripped=True, base_model_name_or_path=None)
    good_adapter(tmp_path / "tree/bad", r=0)
    call = "migrate", tmp_path / "tree", tmp_path / "out", "--to", "embedded", "--recursive"
    ended = run(*call)
    assert ended.status == 1
    assert ended.err.count("error: ") == 2
    assert "error: one, two: A and B cannot be drawn" in ended.err
    assert ended.err.count("with --base.") == 1
    assert ended.out.count("NOT MIGRATED") == 3
    assert "--base" not in ended.out
    assert [*json.loads(run(*call, "--json").out)["failed"]] == ["bad", "one", "two"]


# --- mistyped words ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["info", "x", "--base-dtype", "float8"], "'float8_e4m3fn'"),
        (["info", "x", "--base-dtype", "flot32"], "'float32'"),
        (["info", "x", "--base-dtype", "bfloat"], "'bfloat16'"),
        (["merge", "x", "y", "--dtype", "float8"], ""),
        (["info", "x", "--bse", "y"], "'--base'"),
        (["validate", "x", "--projections", "file"], ""),
        (["validaet", "x"], "'validate'"),
    ],
)
def test_a_mistyped_word_gets_the_nearest_words(given: list[str], meant: str, run: Run) -> None:
    ended = run(*given)
    assert ended.status == 2
    assert re.findall(r"Did you mean (.*)\?", ended.err) == [*filter(None, [meant])]


# --- inputs --------------------------------------------------------------------------------------


def test_a_file_that_may_not_be_read_has_a_remedy() -> None:
    denied = PermissionError(errno.EACCES, "Permission denied", "x")
    for error in (unreadable("x", denied), explained(denied)):
        assert isinstance(error, SurroundingsError)
        assert str(error).endswith(
            "Give your user the right to read, with `chmod u+rX`, or run as another user."
        )
        assert error.reason.endswith("Permission denied.")
    assert str(unreadable("x", OSError(errno.EIO, "Input/output error"))).endswith("error.")


def test_no_remedy_proposes_to_delete_the_files_of_a_model(tmp_path: Path) -> None:
    """A user who passes the folder of a model by mistake must not delete the model."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.gguf").write_bytes(b"GGUF" + bytes(100))
    found = vera_convert.validate(tmp_path / "model").findings
    assert [each.code for each in found] == ["V010"]
    folder = good_adapter(tmp_path / "adapter", revision="v1")
    (folder / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    assert [each.code for each in vera_convert.validate(folder).findings] == ["V019"]


def test_a_revision_of_a_folder_names_the_option_to_leave_out(tmp_path: Path, run: Run) -> None:
    folder, base = good_adapter(tmp_path / "adapter"), tiny_base(tmp_path / "base")
    for option in ("--revision", "--base-revision"):
        ended = run("info", folder, "--base", base, option, "main")
        assert ended.status == 2
        assert ended.err.startswith(f"error: {option} must be left out, because ")


def test_a_vera_adapter_in_place_of_a_lora_leads_to_the_option_for_forms(
    tmp_path: Path, run: Run
) -> None:
    folder = good_adapter(tmp_path / "adapter")
    ended = run("verify", folder, "--lora", folder)
    assert ended.status == 1
    assert "this is a VeRA adapter, not a LoRA." in ended.err
    assert ended.err.endswith("To compare two forms of an adapter, use --adapter.\n")
    assert run("verify", folder, "--adapter", folder).status == 0


def test_strip_does_not_advise_to_keep_damaged_values(tmp_path: Path, run: Run) -> None:
    A = good_tensors()["base_model.vera_A"].copy()
    A[2, 3] += 1
    folder = good_adapter(tmp_path / "adapter", tensors={"base_model.vera_A": A})
    base = tiny_base(tmp_path / "base")
    ended = run("strip", folder, tmp_path / "out", "--base", base)
    assert (ended.status, ended.err.split()[1]) == (1, "V401")
    assert "Keep A and B" not in ended.err
    assert "Copy the adapter again." in ended.err
    repair = "--to", "embedded", "--projections", "key", "--base", base
    assert run("migrate", folder, tmp_path / "repaired", *repair).status == 0
    assert run("strip", tmp_path / "repaired", tmp_path / "out", "--base", base).status == 0


@pytest.mark.parametrize("text", ["hf://org/name", "https://huggingface.co/org/name"])
def test_an_address_is_not_called_a_missing_folder(
    text: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    ended = run("info", text, "--offline")
    assert ended.status == 3
    assert ended.err.startswith("error: org/name@main is not in the local cache")
    assert run("info", "org/name", "--offline").err.startswith("error: there is no folder org/name")


def test_two_revisions_are_one_too_many(run: Run) -> None:
    ended = run("info", "org/name@v1", "--revision", "v2", "--offline")
    assert ended.status == 2
    assert ended.err.endswith("Give one of the two.\n")


def test_a_removed_field_needs_no_removal(tmp_path: Path, run: Run) -> None:
    folder = good_adapter(tmp_path / "adapter", strange=1)
    call = "migrate", folder, tmp_path / "out", "--to", "asis"
    assert "V110" in run(*call).err
    ended = run(*call, "--peft-version", "0.13", "--force")
    assert (ended.status, ended.err) == (0, "")
    assert "strange" in ended.out


@pytest.mark.parametrize("command", ["strip", "embed", "to-lora", "merge"])
def test_arguments_in_the_wrong_order_are_reported(command: str, tmp_path: Path, run: Run) -> None:
    folder = good_adapter(tmp_path / "adapter")
    ended = run(command, tmp_path / "new", folder)
    assert ended.status == 3
    assert ended.err.endswith("An adapter lies at OUT: give ADAPTER first, then OUT.\n")
    other = run(command, tmp_path / "new", tmp_path / "out")
    assert "first" not in other.err


def test_regenerate_has_no_adapter_to_exchange_with_out(tmp_path: Path, run: Run) -> None:
    ended = run("regenerate", good_adapter(tmp_path / "adapter"), "--for", tmp_path / "absent")
    assert ended.status == 3
    assert "ADAPTER first" not in ended.err


@pytest.mark.parametrize(
    ("config", "code"),
    [({"model_type": "starcoder9"}, "V560"), ({"model_type": "llama", "hidden_size": 0}, "V561")],
)
def test_a_config_of_an_unknown_model_has_the_name_that_the_user_gave(
    config: dict[str, object], code: str, tmp_path: Path, run: Run
) -> None:
    (tmp_path / "base").mkdir()
    for name in ("my model.json", "base/config.json"):
        (tmp_path / name).write_text(json.dumps(config))
    file, base = tmp_path / "my model.json", tmp_path / "base"
    assert run("count", "--config", file, "--rank", 4).err.startswith(f"error: {code} {file}: ")
    ended = run("count", "--base", base, "--rank", 4)
    assert ended.err.startswith(f"error: {code} {base}/config.json: ")


CONFIG_TEXT = b'{"peft_type": "VERA", "r": 4}'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "V030 {}: is a Git LFS pointer. Run",
        ),
        (b"<!DOCTYPE html>", "V032 {}: is a web page. Download"),
        (b"PK\x03\x04\x00", "V032 {}: is a zip archive. Download"),
        (
            b"// mine\n" + CONFIG_TEXT,
            "V022 {}: line 1, column 1: a comment, which JSON",
        ),
        (CONFIG_TEXT[:-1] + b', # r\n"x": 1}', "V022 {}: line 1, column 31: a comment, which JSON"),
        (CONFIG_TEXT[:-1], "V022 {}: line 1, column 29: Expecting ',' delimiter. Restore"),
    ],
)
def test_what_lies_in_place_of_a_config_is_named(
    text: bytes, said: str, tmp_path: Path, run: Run
) -> None:
    folder = good_adapter(tmp_path / "adapter")
    (folder / "adapter_config.json").write_bytes(text)
    ended = run("info", folder)
    assert ended.status == 1
    assert said.format(f"{folder}/adapter_config.json") in ended.err


def test_the_config_of_a_lora_has_its_folder_in_the_message(tmp_path: Path, run: Run) -> None:
    folder = good_adapter(tmp_path / "adapter", peft_type="LORA")
    assert f"V101 {folder}/adapter_config.json: this is a LoRA" in run("info", folder).err


@pytest.mark.parametrize("command", ["info", "merge"])
def test_an_archive_is_to_be_unpacked(command: str, tmp_path: Path, run: Run) -> None:
    (tmp_path / "adapter.zip").write_bytes(b"PK")
    ended = run(command, tmp_path / "adapter.zip", *([tmp_path / "out"] * (command == "merge")))
    assert ended.status == 2
    assert ended.err.endswith(
        "adapter.zip is an archive. Unpack the archive, and pass the folder.\n"
    )


def test_a_model_and_an_adapter_in_each_other_s_place_are_told(tmp_path: Path, run: Run) -> None:
    adapter, base = good_adapter(tmp_path / "adapter"), tiny_base(tmp_path / "base")
    ended = run("merge", base, tmp_path / "out", "--base", adapter)
    assert ended.status == 1
    assert ended.err.endswith("An adapter lies at --base: give ADAPTER, then --base MODEL.\n")
    assert "An adapter" not in run("merge", base, tmp_path / "out", "--base", base).err


@pytest.mark.parametrize("call", [["count", "base", "--rank", "4"], ["merge", "a", "out", "base"]])
def test_a_base_without_its_option_leads_to_the_option(call: list[str], run: Run) -> None:
    ended = run(*call)
    assert ended.status == 2
    assert "(base). A base is given with --base. See `" in ended.err


@pytest.mark.parametrize("out", ["hf://org/name", "https://huggingface.co/org/name", "s3://b/x"])
def test_an_address_is_no_place_for_out(
    out: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = run("embed", good_adapter(tmp_path / "adapter"), out)
    assert ended.status == 2
    assert ended.err.endswith("is an address. Give a path on this machine.\n")
    assert [each.name for each in tmp_path.iterdir()] == ["adapter"]
    (tmp_path / "hf:").mkdir()
    assert run("embed", tmp_path / "adapter", "hf:/name").status == 0
