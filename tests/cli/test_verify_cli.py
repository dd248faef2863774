"""`vera-convert verify`, as users and their scripts rely on the command."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from adapters import good_adapter
from commandline import Run
from folders import bytes_by_name
from heads import TIED, on_the_head
from merges import filled_base, merged_with, tensors_of
from wrongmerges import PROVENANCE, Q, edit

from vera_convert.base.facts import BaseOptions
from vera_convert.conversion.strip_embed import strip
from vera_convert.errors import SurroundingsError
from vera_convert.merging.adapters import AdapterSpec
from vera_convert.merging.options import Tied
from vera_convert.verification import model_comparison
from vera_convert.verification import verify as verifying

OPTIONS = (
    *("--adapter", "--merged", "--base", "--base-revision", "--base-dtype", "--key-map"),
    *("--projections", "--generator", "--weight", "--add", "--tied", "--dequantize", "--dtype"),
    *("--samples", "--text", "--layers-only", "--jobs", "--revision", "--token", "--cache-dir"),
    *("--offline", "--json", "--quiet", "--progress", "--debug"),
)


@pytest.fixture
def run(run: Run) -> Run:
    """Run `verify` in this process."""
    return partial(run, "verify")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return filled_base(tmp_path / "base", dtype="bfloat16")


@pytest.fixture
def model(tmp_path: Path, adapter: Path, base: Path) -> Path:
    merged_with(adapter, base, tmp_path / "merged")
    return tmp_path / "merged"


def test_help_lists_the_promised_options(run: Run) -> None:
    ended = run("--help")
    assert (ended.status, ended.err) == (0, "")
    for option in OPTIONS:
        assert re.search(rf"^ +(-\w, )?{option}\b", ended.out, re.MULTILINE), option


def test_a_right_merge_passes(run: Run, adapter: Path, base: Path, model: Path) -> None:
    before = bytes_by_name(model.parent)
    ended = run(adapter, "--merged", model, "--base", base, "--layers-only")
    assert (ended.status, ended.err) == (0, "")
    assert re.search(r"^with a delta +4 of 4 tensors verified", ended.out, re.MULTILINE)
    assert re.search(r"^same as base +13 of 13 tensors verified$", ended.out, re.MULTILINE)
    assert ended.out.endswith("verified\n")
    assert bytes_by_name(model.parent) == before
    quiet = run(adapter, "--merged", model, "--base", base, "--layers-only", "--quiet")
    assert quiet == (0, "", "")


@pytest.mark.parametrize("as_json", [False, True])
def test_a_wrong_merge_fails(
    run: Run,
    adapter: Path,
    base: Path,
    model: Path,
    schema_errors: Callable[..., list[str]],
    *,
    as_json: bool,
) -> None:
    edit(model, {f"{Q}.weight": tensors_of(base)[f"{Q}.weight"]})
    options = ["--layers-only", *(["--json"] if as_json else [])]
    ended = run(adapter, "--merged", model, "--base", base, *options)
    assert ended.status == 1
    assert re.fullmatch(rf"error: V601 {re.escape(Q)}\.weight: .*merge again\.\n", ended.err)
    if as_json:
        assert "the delta was not added." in ended.err
        document: Any = json.loads(ended.out)
        assert schema_errors("verification", document) == []
        assert not document["passed"]
        (wrong,) = [each for each in document["merged"]["tensors"] if not each["passed"]]
        assert wrong["name"] == f"{Q}.weight"
        assert wrong["hint"] is not None
        assert document["merged"]["untouched"] == 13
    else:
        assert "with a delta" in ended.out
        assert "FAILED: 1 tensor differs" in ended.out
        assert f"WRONG {Q}.weight: " in ended.out
        assert "the delta was not added." in ended.out
        assert "not added" not in ended.err, "the cause is told once"
        quiet = run(adapter, "--merged", model, "--base", base, *options, "--quiet")
        assert "the delta was not added." in quiet.err


def test_another_form_of_an_adapter_is_compared(
    run: Run, tmp_path: Path, adapter: Path, base: Path
) -> None:
    strip(adapter, tmp_path / "stripped", base=BaseOptions(dtype="float32"))
    ended = run(adapter, "--adapter", tmp_path / "stripped")
    assert ended.status == 0
    assert re.search(r"^trained +8 tensors compared", ended.out, re.MULTILINE)
    assert ended.err.startswith("warning: V624 ")
    other = good_adapter(tmp_path / "other", projection_prng_key=8)
    ended = run(adapter, "--adapter", other, "--base", base)
    assert ended.status == 1
    assert ended.err.splitlines()[-1].startswith("error: V622 adapter_config.json: ")


def test_adapters_that_were_added_are_given_again(
    run: Run, tmp_path: Path, adapter: Path, base: Path
) -> None:
    second = good_adapter(tmp_path / "second=2", stripped=True)
    out = tmp_path / "out"
    merged_with(adapter, base, out, add=(AdapterSpec(second, -0.5),))
    call = [adapter, "--merged", out, "--base", base, "--layers-only"]
    asked = run(*call)
    assert (asked.status, asked.out) == (2, "")
    assert "--add second=2" in asked.err
    assert run(*call, "--add", f"{second}=-0.5").status == 0
    assert run(*call, "--add", f"{second}=1").status == 1
    named = second.rename(tmp_path / "second")
    assert run(*call, "--add", named).status == 0


def test_a_missing_provenance_is_a_warning(
    run: Run, adapter: Path, base: Path, model: Path
) -> None:
    (model / PROVENANCE).unlink()
    ended = run(adapter, "--merged", model, "--base", base, "--layers-only")
    assert ended.status == 0
    assert ended.err.startswith("warning: V608 ")
    (model / PROVENANCE).write_text("{}")
    ended = run(adapter, "--merged", model, "--base", base, "--layers-only")
    assert (ended.status, ended.out) == (1, "")
    assert ended.err.startswith("error: V607 ")


@pytest.mark.parametrize(
    ("status", "options"),
    [
        (2, []),
        (2, ["--layers-only"]),
        (2, ["--adapter", "ADAPTER", "--dtype", "float32"]),
        (2, ["--merged", "MODEL", "--samples", "0"]),
        (2, ["--merged", "MODEL", "--jobs", "0", "--layers-only"]),
        (2, ["--merged", "MODEL", "--weight", "inf", "--layers-only"]),
        (2, ["--merged", "MODEL", "--dtype", "int8"]),
        (2, ["--merged", "MODEL", "--key-map", "x"]),
        (3, ["--merged", "GONE", "--layers-only"]),
        (3, ["--adapter", "GONE"]),
        (3, ["--merged", "MODEL", "--base", "GONE", "--layers-only"]),
        (1, ["--merged", "ADAPTER", "--layers-only"]),
        (1, ["--adapter", "MODEL"]),
    ],
)
def test_a_failure_has_its_status_and_one_line(
    status: int, options: list[str], run: Run, adapter: Path, model: Path
) -> None:
    places = {"ADAPTER": adapter, "MODEL": model, "GONE": model.parent / "gone"}
    given = [str(places.get(option, option)) for option in options]
    based = [] if "--base" in options else ["--base", str(model.parent / "base")]
    ended = run(adapter, *given, *based)
    assert (ended.status, ended.out) == (status, "")
    assert ended.err.startswith("error: V" if status == 1 else "error: ")
    assert ended.err.count("\n") == 1


def test_without_torch_only_weights_are_compared(
    run: Run, adapter: Path, base: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_comparison, "find_spec", lambda _name: None)
    ended = run(adapter, "--merged", model, "--base", base)
    assert (ended.status, ended.out) == (3, "")
    assert "pip install 'vera-convert[torch]'" in ended.err
    assert "--layers-only" in ended.err
    assert run(adapter, "--merged", model, "--base", base, "--layers-only").status == 0


def test_the_layers_are_shown_if_the_model_cannot_be_run(
    run: Run, adapter: Path, base: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unfit(*_: object, **__: object) -> None:
        raise SurroundingsError("it cannot be built.")

    monkeypatch.setattr(model_comparison, "find_spec", lambda _name: object())
    monkeypatch.setattr(verifying, "run_models", unfit)
    ended = run(adapter, "--merged", model, "--base", base)
    assert (ended.status, ended.err) == (3, "error: it cannot be built.\n")
    assert re.search(r"^with a delta +4 of 4 tensors verified", ended.out, re.MULTILINE)
    assert re.search(r"^model +NOT RUN: it cannot be built\.$", ended.out, re.MULTILINE)
    document: Any = json.loads(run(adapter, "--merged", model, "--base", base, "--json").out)
    assert (document["passed"], document["not_run"]) == (False, "it cannot be built.")


def test_defects_of_the_merged_model_do_not_lead_to_the_adapter(
    run: Run, tmp_path: Path, adapter: Path
) -> None:
    base = filled_base(tmp_path / "sharded", shards=3)
    merged_with(adapter, base, tmp_path / "out")
    for shard in sorted((tmp_path / "out").glob("*.safetensors"))[:2]:
        shard.unlink()
    ended = run(adapter, "--merged", tmp_path / "out", "--base", base, "--layers-only")
    assert ended.status == 1
    assert ended.err.startswith("error: V507 ")
    assert ended.err.endswith("(and 1 more: --json lists all)\n")


def test_an_interruption_without_an_output_does_not_mention_an_output(
    run: Run, adapter: Path, base: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verifying, "verify", stopped)
    ended = run(adapter, "--merged", model, "--base", base)
    assert ended == (130, "", "error: interrupted.\n")


def test_a_tied_head_needs_the_option_of_the_merge(run: Run, tmp_path: Path) -> None:
    adapter = on_the_head(tmp_path / "a")
    base = filled_base(tmp_path / "base", tensors={"lm_head.weight": None}, config=TIED)
    merged_with(adapter, base, tmp_path / "out", tied=Tied.UNTIE)
    (tmp_path / "out" / PROVENANCE).unlink()
    call = [adapter, "--merged", tmp_path / "out", "--base", base, "--layers-only"]
    ended = run(*call)
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.startswith("error: V524 ")
    assert run(*call, "--tied", "untie").status == 0


def test_names_are_escaped(run: Run, tmp_path: Path) -> None:
    evil = "a\u202e\u2028"
    adapter = good_adapter(tmp_path / evil / "adapter")
    base = filled_base(tmp_path / evil / "base")
    call = [adapter, "--merged", base, "--base", base, "--adapter", adapter, "--layers-only"]
    ended = run(*call)
    assert ended.status == 1
    assert all(line.isprintable() for line in (ended.out + ended.err).split("\n"))
    assert "a\\u202e" in ended.out
