"""The command line, as users and their scripts rely on the commands."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from adapterdefects import A, added, bare, drawn, fields, renamed, stripped, tensors
from adapters import KEY, good_adapter
from bases import tiny_base
from commandline import COMMANDS as ALL_COMMANDS
from commandline import Run
from folders import DATA, WEIGHTS, bytes_by_name, weights
from merges import filled_base
from safetensors.numpy import load_file

from vera_convert.assembly.journal import Journal
from vera_convert.assembly.writer import Finished
from vera_convert.cli.values import GENERATORS
from vera_convert.conversion.migration import Mode
from vera_convert.conversion.projections import ProjectionSource
from vera_convert.draws.generator import Draw, Rounding, Variant, rounded
from vera_convert.schemas import schema_names

ROOT = Path(__file__).parents[2]
posix = pytest.mark.skipif(os.name != "posix", reason="shells and signals of POSIX")
SCHEMA_OF = {
    "info": "info",
    "validate": "validation",
    "strip": "conversion",
    "embed": "conversion",
    "migrate": "conversion",
    "regenerate": "regeneration",
    "count": "count",
    "to-lora": "lora",
}
COMMANDS = [*SCHEMA_OF]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_base(tmp_path / "base")


def process(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Return a function that runs the program in a separate process."""
    command = [sys.executable, "-m", "vera_convert", *map(str, arguments)]
    return subprocess.run(command, text=True, cwd=ROOT, check=False, **options)


# --- the options ---------------------------------------------------------------------------------


def choices(command: str, option: str) -> list[str]:
    parameters = ALL_COMMANDS[command].params
    (found,) = (parameter for parameter in parameters if option in parameter.opts)
    assert isinstance(found.type, click.Choice)
    return [*found.type.choices]


def test_choices_equal_the_library_s() -> None:
    assert [*GENERATORS] == [*Variant] == choices("embed", "--generator")
    assert choices("strip", "--projections") == [*ProjectionSource]
    assert choices("migrate", "--to") == [*Mode]
    assert choices("regenerate", "--round") == ["bfloat16", "float16"]


RECURRING = ["--json", "--quiet", "--progress", "--debug", "--token", "--cache-dir", "--offline"]
OPTIONS = {
    "info": ["--base", "--base-revision", "--base-dtype", "--key-map", "--projections"],
    "validate": ["--recursive", "--base", "--deep", "--format", "--output", "--select", "--ignore"],
    "strip": ["--base", "--accept-change", "--force", "--projections", "--base-dtype"],
    "embed": ["--base", "--in-features", "--out-features", "--generator", "--key-map", "--force"],
    "migrate": ["--to", "--base", "--accept-change", "--peft-version", "--recursive", "--force"],
    "regenerate": ["--rank", "--in-features", "--out-features", "--key", "--round", "--for"],
    "count": ["--base", "--config", "--rank", "--target"],
    "to-lora": [
        "--base",
        "--for",
        "--rank",
        "--max-error",
        "--dtype",
        "--fill-layers",
        "--dry-run",
    ],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_the_promised_options(command: str, run: Run) -> None:
    for flag in ("--help", "-h"):
        ended = run(command, flag)
        assert (ended.status, ended.err) == (0, "")
        for option in (*RECURRING, *OPTIONS[command]):
            assert re.search(rf"^ +(-\w, )?{option}\b", ended.out, re.MULTILINE), option


def test_the_program_prints_its_version_and_its_commands(run: Run) -> None:
    assert re.fullmatch(r"vera-convert \d+\.\d+\.\d+\S*\n", run("--version").out)
    assert all(command in run("--help").out for command in COMMANDS)
    alone = run()
    assert (alone.status, alone.out) == (2, "")
    assert alone.err.startswith("Usage: vera-convert")


# --- what the commands do ------------------------------------------------------------------------


def test_info(run: Run, adapter: Path, base: Path) -> None:
    ended = run("info", adapter, "--base", base)
    assert (ended.status, ended.err) == (0, "")
    assert re.search(r"^rank +4$", ended.out, re.MULTILINE)
    assert "q_proj" in ended.out
    assert run("info", adapter, "--base", base, "--base-dtype", "bfloat16").status == 0


def test_strip_and_embed(run: Run, adapter: Path, base: Path, tmp_path: Path) -> None:
    ended = run("strip", adapter, tmp_path / "stripped", "--base", base)
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.startswith(f"wrote    {tmp_path / 'stripped'} (stripped)\n")
    ended = run("embed", tmp_path / "stripped", tmp_path / "embedded")
    assert (ended.status, ended.err) == (0, "")
    assert bytes_by_name(tmp_path / "embedded") == bytes_by_name(adapter)
    again = run("strip", tmp_path / "stripped", tmp_path / "copy")
    assert "is stripped already, and was copied" in again.out
    again = run("embed", adapter, tmp_path / "copy2")
    assert "embedded already, and was copied" in again.out


def test_strip_that_would_change_a_and_b_needs_an_option(
    run: Run, adapter: Path, base: Path, tmp_path: Path
) -> None:
    drawn(Variant.FLOAT32_SEPARATE)(adapter)
    refused = run("strip", adapter, tmp_path / "out", "--base", base)
    assert refused.status == 1
    assert re.match(r"error: V403 .*largest difference .*--accept-change", refused.err)
    done = run("strip", adapter, tmp_path / "out", "--base", base, "--accept-change")
    assert done.status == 0
    assert "accepted: " in done.out
    assert run("embed", tmp_path / "out", tmp_path / "back").status == 0
    assert bytes_by_name(tmp_path / "back") == bytes_by_name(adapter)


def test_embed_with_sizes_instead_of_a_base(run: Run, adapter: Path, tmp_path: Path) -> None:
    good = weights(adapter)
    bare(adapter)
    dims = ["--in-features", 16, "--out-features", 16]
    asked = run("embed", adapter, tmp_path / "out", *dims)
    assert asked.status == 2
    assert "--base-dtype" in asked.err
    done = run("embed", adapter, tmp_path / "out", *dims, "--base-dtype", "float32")
    assert done.status == 0
    assert done.err.startswith("note: V410 ")
    assert np.array_equal(weights(tmp_path / "out")[A], good[A])
    other = ("--base-dtype", "float32", "--generator", "float32-separate")
    assert run("embed", adapter, tmp_path / "other", *dims, *other).status == 0
    assert not np.array_equal(weights(tmp_path / "other")[A], good[A])


def test_migrate(run: Run, adapter: Path, tmp_path: Path) -> None:
    good = bytes_by_name(adapter)
    renamed(lambda name: f"_orig_mod.{name}")(adapter)
    refused = run("info", adapter)
    assert refused.status == 1
    assert re.match(r"error: V215 .*migrate --to asis", refused.err)
    done = run("migrate", adapter, tmp_path / "out", "--to", "asis")
    assert (done.status, done.err) == (0, "")
    assert "removed _orig_mod from names (10 tensors)" in done.out
    assert bytes_by_name(tmp_path / "out") == good
    old = run("migrate", tmp_path / "out", tmp_path / "old", "--to=asis", "--peft-version=0.13.2")
    assert "peft_version" in old.out


@pytest.mark.parametrize("as_json", [False, True])
def test_migrate_a_tree(
    run: Run, tmp_path: Path, schema_errors: Callable[..., list[str]], *, as_json: bool
) -> None:
    good_adapter(tmp_path / "tree" / "one")
    good_adapter(tmp_path / "tree" / "two\u202e")
    options = ["--to", "stripped", "--recursive", *(["--json"] if as_json else [])]
    ended = run("migrate", tmp_path / "tree", tmp_path / "out", *options)
    assert ended.status == 0
    assert [line[:13] for line in ended.err.splitlines()] == ["warning: one:", "warning: two\\"]
    good_adapter(tmp_path / "tree" / "bad\u202e", r=0)
    ended = run("migrate", tmp_path / "tree", tmp_path / "out", "--force", *options)
    assert ended.status == 1
    assert ended.err.splitlines()[-1].startswith("error: bad\\u202e: V104 ")
    assert (tmp_path / "out" / "one" / WEIGHTS).exists()
    assert "\u202e" not in ended.out + ended.err
    if as_json:
        assert schema_errors("migration", ended.document) == []
        assert [*ended.document["failed"]] == ["bad\u202e"]
    else:
        assert ended.out.endswith(f"wrote 2 of 3 adapters to {tmp_path / 'out'}\n")


def test_migrate_a_tree_without_good_adapters(run: Run, tmp_path: Path) -> None:
    good_adapter(tmp_path / "tree" / "bad", r=0)
    ended = run("migrate", tmp_path / "tree", tmp_path / "out", "--to=asis", "--recursive")
    assert ended.status == 1
    assert not (tmp_path / "out").exists()
    (tmp_path / "empty").mkdir()
    ended = run("migrate", tmp_path / "empty", tmp_path / "out", "--to=asis", "--recursive")
    assert ended.status == 3


@pytest.mark.parametrize("variant", Variant)
@pytest.mark.parametrize("rounding", [Rounding.NONE, Rounding.BF16])
def test_regenerate(variant: Variant, rounding: Rounding, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "pair.safetensors"
    options = ["--rank=3", "--in-features=5", "--out-features=7", "--key=-9"]
    options += ["--generator", variant] + (["--round", rounding] if rounding != "none" else [])
    ended = run("regenerate", out, *options)
    if variant.dtype.itemsize == 2 and rounding is not Rounding.NONE:
        assert ended.status == 2
        return
    assert (ended.status, ended.err) == (0, "")
    made = load_file(out)
    expected = Draw(variant, key=-9, rank=3, in_features=5, out_features=7).matrices()
    for name, matrix in zip(("vera_A", "vera_B"), expected, strict=True):
        assert np.array_equal(made[name], rounded(matrix, rounding))
        assert made[name].dtype == rounded(matrix, rounding).dtype
    assert run("regenerate", out, *options).status == 2
    assert run("regenerate", out, *options, "--force").status == 0


@pytest.mark.parametrize(
    ("spoil", "options", "status", "warns"),
    [
        (lambda _: None, [], 0, False),
        (stripped, [], 0, False),
        (drawn(Variant.FLOAT32_SEPARATE), [], 0, False),
        (drawn(Variant.BFLOAT16_2_11), [], 0, False),
        (drawn(rounding=Rounding.BF16), [], 0, False),
        (bare, [], 3, False),
        (bare, ["--base"], 0, True),
        (drawn(key=KEY + 1), [], 2, False),
        (drawn(key=KEY + 1), ["--base-dtype=float32"], 0, True),
    ],
)
def test_regenerate_for_an_adapter(
    spoil: Callable[[Path], None],
    options: list[str],
    run: Run,
    tmp_path: Path,
    *,
    status: int,
    warns: bool,
) -> None:
    adapter, base = good_adapter(tmp_path / "adapter"), tiny_base(tmp_path / "base")
    good = weights(adapter)
    spoil(adapter)
    options = [f"--base={base}" if option == "--base" else option for option in options]
    out = tmp_path / "pair.safetensors"
    ended = run("regenerate", out, "--for", adapter, *options)
    assert ended.status == status
    assert ("V410" in ended.err) is warns
    has_others = warns and "base_model.vera_A" in weights(adapter)
    assert ("the adapter stores other A and B" in ended.err) is has_others
    if status == 0:
        stored = weights(adapter)
        expected = stored[A] if A in stored and not warns else good[A]
        assert np.array_equal(load_file(out)["vera_A"].astype("f8"), expected.astype("f8"))


def test_count(run: Run) -> None:
    config = DATA / "configs" / "llama-3.2-3b.json"
    ended = run("count", "--config", config, "--rank", 256, "--target", "q_proj,v_proj")
    assert (ended.status, ended.err) == (0, "")
    assert "129,024" in ended.out
    assert "6,821,968" in ended.out
    again = run("count", "--config", config, "--rank=256", "--target=q_proj", "--target=v_proj")
    assert again.out == ended.out


# --- documents -----------------------------------------------------------------------------------


def arguments_of(command: str, adapter: Path, tmp_path: Path) -> list[object]:
    if command == "regenerate":
        sizes = ["--rank=2", "--in-features=3", "--out-features=4"]
        return [command, tmp_path / "out.safetensors", *sizes]
    if command == "count":
        return [command, "--config", DATA / "configs" / "gpt2-medium.json", "--rank=4"]
    if command == "to-lora":
        return [command, adapter, tmp_path / "out", "--base", tiny_base(tmp_path / "its-base")]
    out = [] if command in ("info", "validate") else [tmp_path / "out"]
    return [command, adapter, *out, *(["--to=stripped"] if command == "migrate" else [])]


@pytest.mark.parametrize("command", COMMANDS)
def test_json_is_a_document_that_satisfies_its_schema(
    command: str,
    run: Run,
    adapter: Path,
    tmp_path: Path,
    schema_errors: Callable[..., list[str]],
) -> None:
    ended = run(*arguments_of(command, adapter, tmp_path), "--json")
    assert ended.status == 0
    assert schema_errors(SCHEMA_OF[command], ended.document) == []
    assert all(line.startswith("warning: ") for line in ended.err.splitlines())


def test_the_tests_check_documents_against_every_schema() -> None:
    sources = [
        path.read_text(encoding="utf-8") for path in Path(__file__).parents[1].rglob("test_*.py")
    ]
    called = re.compile(r"schema_errors\(\s*f?\"([a-z_-]+)\"|anchor|load_schema\(\"([a-z_-]+)\"")
    held = {name for text in sources for match in called.finditer(text) for name in match.groups()}
    assert {*schema_names()} <= held | {*SCHEMA_OF.values()}


@pytest.mark.parametrize("command", COMMANDS)
def test_quiet_prints_no_result(command: str, run: Run, adapter: Path, tmp_path: Path) -> None:
    ended = run(*arguments_of(command, adapter, tmp_path), "--quiet")
    assert (ended.status, ended.out) == (0, "")
    assert all(line.startswith("warning: ") for line in ended.err.splitlines())


FAILURES: list[tuple[int, Sequence[object]]] = [
    (1, ["info", "BAD"]),
    (1, ["strip", "BAD", "OUT"]),
    (1, ["embed", "BAD", "OUT"]),
    (1, ["migrate", "BAD", "OUT", "--to", "asis"]),
    (1, ["regenerate", "OUT", "--for", "BAD"]),
    (1, ["strip", "FOREIGN", "OUT", "--accept-change"]),
    (2, ["info"]),
    (2, ["info", "GOOD", "--unheard-of"]),
    (2, ["nosuch"]),
    (2, ["info", "GPT2"]),
    (2, ["info", ""]),
    (2, ["info", "GOOD", "--base-dtype", "int8"]),
    (2, ["info", "GOOD", "--key-map", "model"]),
    (2, ["info", "GOOD", "--key-map", "="]),
    (2, ["info", "GOOD", "--revision", "main"]),
    (2, ["strip", "GOOD", "GOOD"]),
    (2, ["strip", "GOOD", "GOOD/out", "--force"]),
    (2, ["strip", "GOOD", "TAKEN"]),
    (2, ["strip", "GOOD", "TAKEN", "--force"]),
    (2, ["embed", "STRIPPED", "OUT", "--in-features", "16"]),
    (2, ["embed", "STRIPPED", "OUT", "--in-features", "0", "--out-features", "1"]),
    (2, ["embed", "STRIPPED", "OUT", "--generator", "float31"]),
    (2, ["embed", "STRIPPED", "OUT", "--base", "GOOD", "--in-features=1", "--out-features=1"]),
    (2, ["migrate", "GOOD", "OUT"]),
    (2, ["migrate", "GOOD", "OUT", "--to", "nowhere"]),
    (2, ["migrate", "GOOD", "OUT", "--to", "asis", "--peft-version", "old"]),
    (2, ["migrate", "GOOD", "OUT", "--to", "asis", "--recursive", "--revision", "main"]),
    (2, ["regenerate", "OUT"]),
    (2, ["regenerate", "OUT", "--rank", "4"]),
    (2, ["regenerate", "OUT", "--rank=0", "--in-features=1", "--out-features=1"]),
    (2, ["regenerate", "OUT", "--rank=4", "--in-features=1", "--out-features=1", "--key", 2**64]),
    (2, ["regenerate", "OUT", "--rank=4", "--in-features=1", "--out-features=1", "--key=0.0"]),
    (2, ["regenerate", "OUT", "--rank=99999", "--in-features=99999", "--out-features=99999"]),
    (2, ["regenerate", "OUT", "--for", "GOOD", "--rank", "4"]),
    (2, ["regenerate", "OUT", "--rank=4", "--in-features=1", "--out-features=1", "--base", "x"]),
    (2, ["count", "--rank", "4"]),
    (2, ["count", "--rank", "4", "--base", "GOOD", "--config", "GOOD"]),
    (2, ["count", "--rank", "0", "--config", "GPT2"]),
    (2, ["count", "--rank", "4", "--config", "GPT2", "--target", "q_proj"]),
    (1, ["count", "--rank", "4", "--config", "GOOD/adapter_config.json"]),
    (3, ["count", "--rank", "4", "--config", "GONE"]),
    (3, ["info", "GONE"]),
    (3, ["info", "./gone"]),
    (3, ["info", "bare-name"]),
    (3, ["info", "org/name", "--offline"]),
    (3, ["info", "GOOD", "--base", "GONE"]),
    (3, ["strip", "GOOD", "GOOD/adapter_config.json/out"]),
    (3, ["embed", "STRIPPED", "OUT"]),
    (3, ["migrate", "GONE", "OUT", "--to", "asis", "--recursive"]),
]


@pytest.mark.parametrize(("status", "arguments"), FAILURES, ids=str)
@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_a_failure_has_its_status_and_one_line_and_leaves_no_output(
    status: int,
    arguments: Sequence[object],
    run: Run,
    tmp_path: Path,
    schema_errors: Callable[..., list[str]],
    *,
    as_json: bool,
) -> None:
    good_adapter(tmp_path / "good")
    good_adapter(tmp_path / "stripped", stripped=True)
    good_adapter(tmp_path / "bad", r="4")
    tensors(lambda stored: {**stored, A: stored[A] * np.float32(3)})(
        good_adapter(tmp_path / "foreign")
    )
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine", encoding="utf-8")
    before = bytes_by_name(tmp_path)
    places = {
        name: str(tmp_path / name.lower())
        for name in ("GOOD", "STRIPPED", "BAD", "FOREIGN", "TAKEN", "GONE", "OUT")
    }
    places["GPT2"] = str(DATA / "configs" / "gpt2-medium.json")
    filled = [str(argument) for argument in arguments]
    for name, place in places.items():
        filled = [re.sub(rf"^{name}\b", lambda _, place=place: place, text) for text in filled]  # type: ignore[misc]
    ended = run(*filled, *(["--json"] if as_json else []))
    assert ended.status == status
    assert ended.err.startswith("error: V" if status == 1 else "error: ")
    assert ended.err.count("\n") == 1
    assert ended.err[:-1].isprintable()
    assert "Traceback" not in ended.err
    if as_json:
        assert schema_errors("error", ended.document) == []
        assert ended.document["status"] == status
        assert ended.document["error"] in ended.err
    else:
        assert ended.out == ""
    assert bytes_by_name(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_the_first_of_several_defects_is_shown_and_the_others_are_counted(
    run: Run, adapter: Path
) -> None:
    fields({"r": "4", "bias": 1, "init_weights": 1})(adapter)
    ended = run("info", adapter)
    assert re.fullmatch(
        rf"error: V103 .* \(and 2 more: vera-convert validate {re.escape(str(adapter))}\)\n",
        ended.err,
    )
    assert len(run("info", adapter, "--json").document["findings"]) == 3


@pytest.mark.parametrize(
    "call",
    [
        ["info", "BAD"],
        ["strip", "BAD", "OUT", "--base", "BASE"],
        ["regenerate", "OUT", "--for", "BAD"],
        ["migrate", "TREE", "OUT", "--to=asis", "--recursive"],
    ],
    ids=lambda call: call[0],
)
def test_the_command_that_shows_the_other_defects_can_be_run(
    call: list[str], run: Run, base: Path, tmp_path: Path
) -> None:
    tree = tmp_path / "a tree"
    bad = good_adapter(tree / "it's \u202e; $(x) bad", r="4", bias=1, init_weights=1)
    places = {"BAD": bad, "BASE": base, "OUT": tmp_path / "out", "TREE": tree}
    refused = run(*(places.get(word, word) for word in call))
    (line,) = re.findall(r"\(and 2 more: vera-convert (.*)\)$", refused.err, re.MULTILINE)
    words = [word.encode("latin-1").decode("unicode_escape") for word in shlex.split(line)]
    assert words == ["validate", str(bad), *(["--base", str(base)] if "--base" in call else [])]
    assert [each["code"] for each in run(*words, "--json").document["adapters"][0]["findings"]][
        :3
    ] == ["V103"] * 3


def test_names_and_texts_are_escaped(run: Run, tmp_path: Path) -> None:
    evil, worse = "a\u202e\u2028", "a\u202e\x1b[31m\n"
    folder = good_adapter(tmp_path / evil, base_model_name_or_path=worse, peft_version=worse)
    fields({worse: 1})(folder)
    (folder / f"{evil}.txt").write_text("")
    for ended in (
        run("info", folder),
        run("strip", folder, tmp_path / f"out{evil}"),
        run("info", tmp_path / f"gone{evil}"),
        run(worse),
        run("info", folder, f"--{worse}"),
        run("info", folder, "--base-dtype", worse),
        run("info", folder, "--base", f"./{evil}"),
        run("regenerate", tmp_path / evil / "x", "--rank", worse),
        run("count", "--rank=1", "--config", tmp_path / evil),
    ):
        shown = ended.out + ended.err
        assert all(line.isprintable() for line in shown.split("\n"))
        assert "a\\u202e" in shown


@posix
def test_no_file_gets_the_number_of_a_closed_standard_stream(adapter: Path, tmp_path: Path) -> None:
    code = """
import os, sys
from vera_convert.__main__ import main
null = os.stat(os.devnull).st_rdev
try:
    main()
finally:
    streams = [os.fstat(number).st_rdev == null for number in range(3)]
    open(sys.argv[3] + ".streams", "w").write(str(streams))
"""
    closed = '"$@" <&- >&- 2>&-'
    command = [sys.executable, "-c", code, "strip", str(adapter), str(tmp_path / "out")]
    ended = subprocess.run(["sh", "-c", closed, "sh", *command], check=False)
    assert ended.returncode == 0
    assert (tmp_path / "out.streams").read_text() == "[True, True, True]"
    assert (tmp_path / "out" / WEIGHTS).exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("validate", ""),
        ("validate", "", "--recursive"),
        ("info", ""),
        ("strip", "", "out"),
        ("migrate", "", "out", "--recursive", "--to", "asis"),
        ("validate", "ADAPTER", "--base", ""),
        ("validate", "ADAPTER", "--output", "", "--format", "json"),
        ("strip", "ADAPTER", ""),
    ],
)
def test_an_empty_name_never_means_the_working_directory(
    arguments: tuple[str, ...], run: Run, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(adapter)
    ended = run(*(str(adapter) if word == "ADAPTER" else word for word in arguments))
    assert ended.status == 2
    assert "empty" in ended.err or "OUT must end in a name" in ended.err


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit addresses")
def test_too_little_memory_to_import_numpy_is_reported_with_status_3(adapter: Path) -> None:
    code = """
import resource
from vera_convert.__main__ import main
resource.setrlimit(resource.RLIMIT_AS, (100 << 20,) * 2)
main()
"""
    command = [sys.executable, "-c", code, "info", str(adapter)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (3, "")
    assert ended.stderr.startswith("error: there is not enough memory to start")
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "not enough memory"),
        (OSError(28, "No space left on device", "out\x1b"), "x1b: No space left on device."),
        (PermissionError(13, "Permission denied"), "error: Permission denied."),
        (ImportError("lib.so: failed to map\x1b"), "The memory may be too small"),
        (RuntimeError("can't start new thread"), "no thread could be started"),
        (RuntimeError("odd\x1b"), "bug in vera-convert"),
    ],
)
def test_an_unexpected_exception_ends_in_one_line(
    error: Exception, said: str, run: Run, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("vera_convert.summary.info", fail)
    ended = run("info", adapter)
    assert ended.status == 3
    assert said in ended.err
    assert ended.err[:-1].isprintable()
    debugged = run("info", adapter, "--debug")
    assert debugged.status == 3
    assert "Traceback (most recent call last)" in debugged.err


def test_a_refusal_has_a_traceback_only_on_demand(run: Run, adapter: Path) -> None:
    fields({"r": 0})(adapter)
    assert "Traceback" not in run("info", adapter).err
    assert "Traceback" in run("info", adapter, "--debug").err


# --- the surroundings ----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["environment", "option"])
def test_offline_no_socket_is_opened(
    how: str, run: Run, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "__init__", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    options = []
    if how == "option":
        monkeypatch.delenv("HF_HUB_OFFLINE")
        options = ["--offline"]
    assert run("info", adapter, *options).status == 0
    assert run("strip", adapter, tmp_path / "stripped", *options).status == 0
    assert run("embed", tmp_path / "stripped", tmp_path / "embedded", *options).status == 0
    ended = run("migrate", adapter, tmp_path / "migrated", "--to=stripped", *options)
    assert ended.status == 0
    ended = run("info", "org/name", *options)
    assert ended.status == 3
    assert "not in the local cache" in ended.err


def test_a_token_is_never_printed(run: Run, adapter: Path) -> None:
    for options in ([], ["--debug"], ["--base=./gone", "--debug"]):
        ended = run("info", adapter, "--token", "hf_secret", *options)
        assert "hf_secret" not in ended.out + ended.err
    ended = run("info", adapter, "--token", "hf_secret\n", "--debug")
    assert ended.status == 2
    assert "hf_secret" not in ended.out + ended.err


def test_the_module_runs_as_a_program(adapter: Path, tmp_path: Path) -> None:
    ended = process("info", adapter, capture_output=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("adapter ")
    assert process("info", tmp_path / "gone", capture_output=True).returncode == 3


def test_a_letter_that_the_terminal_lacks_is_printed_as_its_number(tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "\u6a21\u578b", base_model_name_or_path="\u6a21/\u578b")
    ended = process(
        "info", folder, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "latin-1"}
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "\\u6a21\\u578b (VeRA" in ended.stdout


@posix
@pytest.mark.parametrize(
    ("redirected", "status"),
    [(">&-", 0), ("2>&-", 0), ("<&- >&- 2>&-", 0), (">/dev/full", 3), ("| true", 0)],
)
@pytest.mark.parametrize("failing", [False, True])
def test_a_closed_stdout_does_not_change_the_output_folder(
    redirected: str, status: int, adapter: Path, tmp_path: Path, *, failing: bool
) -> None:
    if redirected == ">/dev/full" and (failing or not Path("/dev/full").exists()):
        pytest.skip("nothing is printed to stdout where the command fails")
    out = adapter if failing else tmp_path / "out"
    program = f"{sys.executable} -m vera_convert strip {adapter} {out}"
    script = f"set -o pipefail; {program} {redirected}"
    ended = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == (2 if failing else status)
    assert "Traceback" not in ended.stderr
    assert "Exception ignored" not in ended.stderr
    if not failing:
        assert (tmp_path / "out" / WEIGHTS).exists()


@posix
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_an_interruption_leaves_no_output(
    number: signal.Signals, status: int, adapter: Path, tmp_path: Path
) -> None:
    code = """
import sys, time
from vera_convert.adapter import folder as adapterfolder
from vera_convert.cli.app import main
write = adapterfolder.write_tensors
def write_and_wait(*args):
    written = write(*args)
    print("written", flush=True)
    time.sleep(60)
    return written
adapterfolder.write_tensors = write_and_wait
main(sys.argv[1:])
"""
    command = [sys.executable, "-c", code, "strip", str(adapter), str(tmp_path / "out")]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "written\n"
        assert len([*tmp_path.iterdir()]) > 1
        child.send_signal(number)
        out, err = child.communicate(timeout=30)
    assert child.returncode == status
    assert out == ""
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("token", [["--token", "hf_secret"], ["--token=hf_secret"]])
def test_a_merge_that_failed_names_the_command_that_continues(
    token: list[str], run: Run, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, out = filled_base(tmp_path / "sharded", shards=4), tmp_path / "out 1"
    call = ["merge", adapter, out, "--base", base, "--jobs", "1"]
    real, count = Journal.add, itertools.count()

    def add(self: Journal, name: str, finished: Finished) -> None:
        if next(count) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, name, finished)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", add)
        failed = run(*call, "--resume", *token)
    assert failed.status == 3
    assert not out.exists()
    assert "hf_secret" not in failed.err
    (line,) = re.findall("^note: .* this continues: vera-convert (.*)$", failed.err, re.MULTILINE)
    continued = run(*shlex.split(line))
    assert continued.status == 0
    assert re.search(
        r"^resumed +\d shards? of 4 finished by an earlier run$", continued.out, re.MULTILINE
    )
    again = run(*call, "--force")
    assert again.err == ""
    assert "resumed" not in again.out


def test_a_merge_that_keeps_nothing_names_no_command(
    run: Run, adapter: Path, base: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    refused = run("merge", adapter, tmp_path / "out", "--base", base, "--resume")
    assert refused.status == 2
    assert "continues" not in refused.err


def test_a_merge_takes_labels_and_the_class_of_the_head(
    run: Run, adapter: Path, base: Path, tmp_path: Path
) -> None:
    fields({"modules_to_save": ["score"]})(adapter)
    added({"base_model.model.score.weight": np.ones((2, 16), np.float32)})(adapter)
    call = ["merge", adapter, tmp_path / "out", "--base", base]
    assert "V533" in run(*call, "--dry-run").err
    done = run(*call, "--architecture", "LlamaForSequenceClassification", "--labels", "no, yes")
    assert (done.status, "V533" in done.err) == (0, False)
    config = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["id2label"] == {"0": "no", "1": "yes"}
    for wrong in (["--labels", "a,b,c"], ["--labels", "a,a"], ["--architecture", "no class"]):
        assert run(*call, "--force", *wrong).status == 2
