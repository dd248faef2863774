"""Hostile adapters and bases, each with the expected outcome of every command.

Code makes all cases. Many cases come from the catalog of defects. This module adds attacks on
readers, absurd sizes, names and texts that change a terminal, and hostile bases.

If a defect shows when the adapter is opened, every command refuses the adapter with the same code.
Other outcomes are written by hand, with the reason.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from adapterdefects import (
    Q_B,
    Q_D,
    A,
    AdapterDefect,
    B,
    added,
    all_of,
    bare,
    fields,
    fingerprint,
    opening,
    renamed,
    stripped,
    tensors,
)
from adapters import HIDDEN, RANK
from defects import (
    CONFIG,
    DEFECTS,
    WEIGHTS,
    Defect,
    Spoiler,
    edit_entry,
    edit_header_text,
    join_weights,
    replace_config,
    replace_weights,
    with_field,
)
from merges import INDEX
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from vera_convert.adapter.fingerprint import METADATA_KEY
from vera_convert.rules import CATALOG, Severity

COMMANDS = ("validate", "info", "strip", "embed", "migrate", "merge", "to-lora")


@dataclass(frozen=True, slots=True)
class Outcome:
    """The expected end of a command.

    Attributes:
    status: the exit status.
    code: the code that the command refuses with or warns of; empty if the command reports nothing.
    """

    status: int
    code: str = ""

    def __str__(self) -> str:
        return f"{self.status} {self.code}".rstrip()


ACCEPT = Outcome(0)
"""The command succeeds and reports nothing."""
SURROUNDINGS = Outcome(3)
"""The command names a fault of the machine: no space, no permission, a file that changes."""


def reject(code: str) -> Outcome:
    """The command refuses, and names this rule first."""
    return Outcome(1, code)


def warn(code: str) -> Outcome:
    """The command succeeds, and reports this rule as a warning or a note."""
    return Outcome(0, code)


@dataclass(frozen=True, slots=True)
class Case:
    """A hostile adapter, or a good adapter with a hostile base.

    Attributes:
    name: the name of the test.
    build: a function that spoils the good adapter, or the good base, in a folder.
    outcomes: the expected outcome of each command; a command without an outcome does not run.
    why: the reason for outcomes that were written by hand.
    on: the spoiled folder: ``adapter``; ``base``, with one file; or ``shards``, with three files.
    posix: whether the case needs pipes, sockets, links or modes.
    """

    name: str
    build: Spoiler
    outcomes: Mapping[str, Outcome]
    why: str = ""
    on: str = "adapter"
    posix: bool = False


CASES: list[Case] = []


def everywhere(outcome: Outcome, **differing: Outcome) -> dict[str, Outcome]:
    """Return one outcome for every command; keywords give other outcomes for some commands."""
    named = {command.replace("_", "-"): each for command, each in differing.items()}
    return {**dict.fromkeys(COMMANDS, outcome), **named}


# --- cases from the catalog of defects -----------------------------------------------------------

MENDED = "migrate repairs the adapter"
NO_VALUES = "info reads no values"
NO_PATTERNS = "info and migrate to asis need no sizes, so these commands evaluate no pattern"
STRIP_PROVES = "only a command that drops A and B requires that A and B are a draw"
DRAWN_AGAIN = "info does not regenerate A and B, so info does not find a wrong hash"
READS_VALUES = "the adapter works; validate and to-lora look at the values of the vectors"
VALIDATE_ALONE = "the adapter works; validate warns of a risk"

BY_HAND: Mapping[str, tuple[str, Mapping[str, Outcome]]] = {
    **{
        name: (MENDED, {"migrate": ACCEPT})
        for name in (
            "V213-projections_are_repeated",
            "V215-names_begin_with_orig_mod",
            "V215-names_have_orig_mod_inside",
            "V216-names_end_with_the_adapters",
            "V217-names_lack_the_prefix",
            "V217-vera_a_lies_at_the_top",
            "V218-a_lambda_is_a_column",
            "V218-lambda_d_is_a_column",
            "V225-projections_lie_with_layers_only",
        )
    },
    "V212-projections_are_denied": (
        "strip and embed make config and file agree",
        {"strip": ACCEPT, "embed": ACCEPT},
    ),
}
"""The outcomes that differ from a refusal, for defects that show when an adapter is opened."""


def _derived(defect: Defect) -> Case:
    """Return the case of a defect that shows when an adapter is opened."""
    is_error = CATALOG[defect.code].severity is Severity.ERROR
    why, differing = BY_HAND.get(defect.name, ("", {}))
    outcomes = everywhere(reject(defect.code) if is_error else warn(defect.code), **differing)
    return Case(defect.name, defect.spoil, outcomes, why, posix=defect.posix)


CASES += [
    _derived(defect)
    for defect in DEFECTS
    if defect.on == "adapter" and (not isinstance(defect, AdapterDefect) or defect.find is opening)
]

FOUND_LATER: Mapping[str, tuple[str, Mapping[str, Outcome]]] = {
    "V007-a_side_file_links_to_nowhere": (VALIDATE_ALONE, {"validate": warn("V007")}),
    "V008-weights_that_peft_does_not_read_lie_beside_it": (
        "a merge and a LoRA do not include these weights",
        {"validate": warn("V008"), "merge": warn("V573"), "to-lora": warn("V573")},
    ),
    "V018-states_of_training_lie_beside_it": (VALIDATE_ALONE, {"validate": warn("V018")}),
    "V018-logs_of_training_lie_beside_it": (VALIDATE_ALONE, {"validate": warn("V018")}),
    "V019-marks_of_a_download_lie_beside_it": (VALIDATE_ALONE, {"validate": warn("V019")}),
    "V019-another_models_weights_lie_beside_it": (VALIDATE_ALONE, {"validate": warn("V019")}),
    "V111-layers_pattern_is_a_list": (VALIDATE_ALONE, {"validate": warn("V111")}),
    "V111-the_only_layer_is_zero": (VALIDATE_ALONE, {"validate": warn("V111")}),
    "V120-base_is_a_path": (VALIDATE_ALONE, {"validate": warn("V120")}),
    "V120-base_is_a_path_of_windows": (VALIDATE_ALONE, {"validate": warn("V120")}),
    "V121-base_has_no_name": (VALIDATE_ALONE, {"validate": warn("V121")}),
    "V121-base_has_an_empty_name": (VALIDATE_ALONE, {"validate": warn("V121")}),
    "V130-targets_are_no_pattern": (
        NO_PATTERNS,
        dict.fromkeys(("validate", "strip", "embed", "merge", "to-lora"), reject("V130")),
    ),
    "V134-layers_lie_at_the_top": (VALIDATE_ALONE, {"validate": warn("V134")}),
    "V224-a_name_is_there_twice": (
        "migrate would give two tensors the same name; for other commands one name is wrong",
        everywhere(reject("V216"), migrate=reject("V224")),
    ),
    "V229-a_target_is_not_stored": (
        "with a base, the finding is V411",
        {"validate": warn("V229")} | dict.fromkeys(("strip", "merge", "to-lora"), warn("V411")),
    ),
    **{
        f"V301-{name}": (NO_VALUES, everywhere(reject("V301"), info=ACCEPT))
        for name in ("a_lambda_is_no_number", "a_lambda_is_infinite")
    },
    "V303-no_layer_was_trained": (
        "the merge reports that nothing changed; a LoRA would hold only zeros",
        dict.fromkeys(("validate", "merge", "to-lora"), warn("V303")),
    ),
    "V305-values_are_huge": (
        READS_VALUES,
        {"validate": warn("V305"), "to-lora": warn("V305")},
    ),
    "V305-values_are_tiny": (
        "the merge reports the loss by rounding",
        {"validate": warn("V305"), "merge": warn("V537"), "to-lora": warn("V305")},
    ),
    "V306-a_layer_was_not_trained": (
        READS_VALUES,
        {"validate": warn("V306"), "to-lora": warn("V306")},
    ),
    "V401-projections_are_random": (
        STRIP_PROVES,
        {"validate": warn("V414"), "info": warn("V414"), "strip": reject("V401")},
    ),
    **{
        f"V401-a_bit_of_vera_{name}_is_flipped": (
            "strip says that the pair is no draw; info says which pair each PEFT would use",
            everywhere(reject("V420"), strip=reject("V401"), info=warn("V414")),
        )
        for name in "ab"
    },
    "V402-the_key_was_edited": (
        STRIP_PROVES,
        {"validate": warn("V414"), "info": warn("V414"), "strip": reject("V402")},
    ),
    "V403-drawn_without_fused_multiply_add": (
        STRIP_PROVES,
        {"validate": warn("V414"), "info": warn("V414"), "strip": reject("V403")},
    ),
    "V406-denied_projections_are_others": (
        "info tells both",
        everywhere(reject("V406"), info=warn("V212")),
    ),
    **{
        f"V409-{name}": (
            DRAWN_AGAIN,
            everywhere(reject("V409"), info=ACCEPT),
        )
        for name in ("fingerprint_has_another_hash", "fingerprint_has_another_dtype")
    },
    "V408-fingerprint_is_of_another_base": (
        "only commands that regenerate A and B compare the fingerprint with the base",
        everywhere(reject("V409"), info=ACCEPT)
        | dict.fromkeys(("embed", "merge", "to-lora"), reject("V408")),
    ),
    "V412-config_matches_narrower_layers": (
        "A and B would be too small for the layers of the file",
        {"validate": warn("V411")}
        | dict.fromkeys(("strip", "embed", "merge", "to-lora"), reject("V412")),
    ),
    "V414-projections_are_seen_to_be_random": (
        STRIP_PROVES,
        {"validate": warn("V414"), "info": warn("V414"), "strip": reject("V401")},
    ),
    "V417-projections_are_of_two_types": (
        "one fingerprint cannot record two types",
        everywhere(warn("V207"), strip=reject("V417")),
    ),
    "V419-what_was_dropped_is_drawn_otherwise": (VALIDATE_ALONE, {"validate": warn("V419")}),
}
"""The reason and the outcomes of defects that show after opening; other commands accept."""

CASES += [
    Case(defect.name, defect.spoil, everywhere(ACCEPT) | {**outcomes}, why, posix=defect.posix)
    for defect in DEFECTS
    for why, outcomes in [FOUND_LATER.get(defect.name, ("", {}))]
    if outcomes
]

# --- further cases -------------------------------------------------------------------------------


def hostile(
    outcomes: Mapping[str, Outcome],
    cases: Mapping[str, Spoiler],
    why: str = "",
    *,
    on: str = "adapter",
    posix: bool = False,
) -> None:
    """Register the cases of a table; all of these cases have the same outcomes."""
    CASES.extend(Case(name, build, outcomes, why, on, posix) for name, build in cases.items())


def hostile_case(
    outcomes: Mapping[str, Outcome], why: str = "", *, on: str = "adapter", posix: bool = False
) -> Callable[[Spoiler], Spoiler]:
    """Register a function as a case."""

    def register(build: Spoiler) -> Spoiler:
        CASES.append(Case(build.__name__, build, outcomes, why, on, posix))
        return build

    return register


def only(outcomes: Mapping[str, Outcome], *commands: str) -> dict[str, Outcome]:
    """Return the outcomes of some commands, for slow cases in which other commands add nothing."""
    return {command: outcomes[command] for command in commands}


REFUSED = {code: everywhere(reject(code)) for code in CATALOG}
"""Every command refuses with this code."""
WARNED = {code: everywhere(warn(code)) for code in CATALOG}
HARMLESS = everywhere(ACCEPT)


def warned_by_validate(code: str, *also: str, **others: Outcome) -> dict[str, Outcome]:
    """Return outcomes in which `validate` and the other named commands warn; the rest accepts."""
    return everywhere(ACCEPT, **dict.fromkeys(("validate", *also), warn(code)), **others)


def metadata(entries: Mapping[str, str]) -> Spoiler:
    """Return a spoiler that replaces the metadata of the weights."""
    return lambda folder: save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, {**entries})


def header_of(
    entries: Iterable[tuple[str, str, Sequence[int], int]], *, metadata: object = None
) -> Spoiler:
    """Return a spoiler that writes name, dtype, shape and size of tensors; the data is sparse."""

    def spoil(folder: Path) -> None:
        header: dict[str, object] = {"__metadata__": metadata or {"format": "pt"}}
        at = 0
        for name, dtype, shape, size in entries:
            offsets = [at, at + size]
            header[name] = {"dtype": dtype, "shape": [*shape], "data_offsets": offsets}
            at += size
        join_weights(folder, header, b"")
        with (folder / WEIGHTS).open("r+b") as file:
            file.truncate((folder / WEIGHTS).stat().st_size + at)

    return spoil


def of_rank_one(layers: int) -> list[tuple[str, str, Sequence[int], int]]:
    """Return the entries of the smallest adapter with this number of layers."""
    pair = [(A, "F32", (1, HIDDEN), 4 * HIDDEN), (B, "F32", (HIDDEN, 1), 4 * HIDDEN)]
    return pair + [
        (f"base_model.model.model.layers.{number}.self_attn.q_proj.{name}", "F32", (1,), 4)
        for number in range(layers)
        for name in ("vera_lambda_b", "vera_lambda_d")
    ]


# --- files that are no checkpoint ----------------------------------------------------------------

hostile(
    REFUSED["V034"],
    {
        "weights_are_a_program": replace_weights(b"\x7fELF\x02\x01\x01" + bytes(57)),
        "weights_are_a_program_of_windows": replace_weights(b"MZ\x90\0\x03\0\0\0" + bytes(56)),
        "weights_are_a_picture": replace_weights(b"\x89PNG\r\n\x1a\n" + bytes(24)),
        "weights_are_a_document": replace_weights(b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n"),
        "weights_are_a_script": replace_weights(b"#!/bin/sh\necho owned\n"),
        "weights_are_a_tar": replace_weights(b"data.pkl".ljust(1024, b"\0")),
        "weights_are_a_pickle_of_text": replace_weights(b"cos\nsystem\n(S'echo owned'\ntR."),
        "weights_are_a_database": replace_weights(b"SQLite format 3\0" + bytes(84)),
        "weights_act_on_a_terminal": replace_weights(b"\x1b[2J\x1b]0;owned\x07" * 8),
    },
)
hostile(
    REFUSED["V032"],
    {
        "weights_are_hdf5": replace_weights(b"\x89HDF\r\n\x1a\n" + bytes(56)),
        "weights_are_zstandard": replace_weights(b"\x28\xb5\x2f\xfd" + bytes(60)),
    },
)
hostile(REFUSED["V033"], {"weights_are_a_line_break": replace_weights(b"\n")})
hostile(
    REFUSED["V036"],
    {
        "weights_are_zeros": replace_weights(bytes(4096)),
        "header_is_all_spaces": edit_header_text(lambda text: b" " * len(text)),
    },
)
hostile(REFUSED["V022"], {"config_is_binary": replace_config(b"\x01\x02\x03\x04")})
hostile(
    REFUSED["V101"],
    {
        "config_is_of_the_adapters_library": replace_config(b'{"config": {}, "model_type": "x"}'),
        "config_is_of_two_methods": fields({"peft_type": ["VERA", "LORA"]}),
        "config_is_an_empty_object": replace_config(b"{}"),
        "config_is_of_a_method_in_look_alike_letters": fields({"peft_type": "V\u0415RA"}),
        "config_is_of_a_method_that_acts": fields({"peft_type": "\x1b]0;owned\x07VERA\u202e"}),
    },
)


@hostile_case(REFUSED["V010"])
def folder_is_of_paddle_nlp(folder: Path) -> None:
    (folder / CONFIG).rename(folder / "vera_config.json")


@hostile_case(REFUSED["V010"], posix=True)
def config_is_one_of_two_links_in_a_circle(folder: Path) -> None:
    (folder / CONFIG).unlink()
    (folder / CONFIG).symlink_to("other")
    (folder / "other").symlink_to(CONFIG)


@hostile_case(REFUSED["V011"], posix=True)
def weights_are_one_of_two_links_in_a_circle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("other")
    (folder / "other").symlink_to(WEIGHTS)


@hostile_case(REFUSED["V010"], posix=True)
def config_lies_below_a_file(folder: Path) -> None:
    (folder / CONFIG).unlink()
    (folder / CONFIG).symlink_to(f"{WEIGHTS}/{CONFIG}")


@hostile_case(REFUSED["V002"], posix=True)
def config_links_to_a_full_device(folder: Path) -> None:
    (folder / CONFIG).unlink()
    (folder / CONFIG).symlink_to("/dev/full")


@hostile_case(REFUSED["V002"], posix=True)
def config_links_to_the_passwords(folder: Path) -> None:
    (folder / CONFIG).unlink()
    (folder / CONFIG).symlink_to("../../../../../../../../../../../etc/passwd")


@hostile_case(REFUSED["V002"], posix=True)
def weights_link_to_what_this_process_holds(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("/proc/self/mem")


@hostile_case(REFUSED["V001"], posix=True)
def weights_are_a_device(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    # only root can make a device such as /dev/zero
    os.mknod(folder / WEIGHTS, 0o020666, os.makedev(1, 5))


@hostile_case(REFUSED["V001"], posix=True)
def config_is_a_socket(folder: Path) -> None:
    (folder / CONFIG).unlink()
    _bind(folder, CONFIG)


def _bind(folder: Path, name: str) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(folder)  # the path of a socket has 108 bytes at most
        try:
            server.bind(name)
        finally:
            os.chdir(here)


def _shut(name: str) -> Spoiler:
    """Return a spoiler that removes the permission to read; root can read every file."""

    def spoil(folder: Path) -> None:
        (folder / name).chmod(0)
        with suppress(PermissionError):
            (folder / name).read_bytes()
            pytest.skip("root can read every file")

    return spoil


hostile(
    everywhere(SURROUNDINGS, validate=reject("V006")),
    {"config_may_not_be_read": _shut(CONFIG), "weights_may_not_be_read": _shut(WEIGHTS)},
    "for validate the unreadable file is a defect of the folder",
    posix=True,
)

# --- other files in the folder -------------------------------------------------------------------


def beside(name: str, content: bytes = b"text") -> Spoiler:
    """Return a spoiler that writes a file into the folder of the weights."""

    def spoil(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    return spoil


def linked(name: str, target: str) -> Spoiler:
    """Return a spoiler that puts a link into the folder of the weights."""
    return lambda folder: (folder / name).symlink_to(target)


hostile(
    warned_by_validate("V007"),
    {
        "a_side_file_links_to_the_passwords": linked("notes.txt", "/etc/passwd"),
        "a_side_file_links_to_an_endless_device": linked("notes.txt", "/dev/zero"),
        "a_side_file_links_to_itself": linked("notes.txt", "notes.txt"),
        "a_side_folder_links_to_its_parent": linked("up", ".."),
        "a_side_folder_links_to_the_root": linked("root", "/"),
        "a_tokenizer_links_out_of_the_folder": linked("tokenizer.json", "../../tokenizer.json"),
        "a_link_has_a_name_that_acts": linked("\x1b]0;owned\x07\u202e", "\x1b[2J"),
    },
    "no conversion copies the file; validate says so",
    posix=True,
)


@hostile_case(HARMLESS, "only regular files are copied", posix=True)
def pipes_and_sockets_lie_beside_it(folder: Path) -> None:
    os.mkfifo(folder / "README.md")
    os.mkfifo(folder / "tokenizer.json")
    _bind(folder, "notes")


@hostile_case(HARMLESS, "JSON allows any white space")
def config_ends_its_lines_as_windows_does(folder: Path) -> None:
    path = folder / CONFIG
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))


hostile(
    HARMLESS,
    {
        "a_side_file_has_a_name_that_acts": beside("\x1b]0;owned\x07\u202e\n\r\x9b31m.txt"),
        "side_files_differ_in_case_alone": all_of(beside("NOTES.md"), beside("notes.md")),
        "side_files_differ_in_form_alone": all_of(beside("\u00e9.md"), beside("e\u0301.md")),
        "a_side_file_is_called_as_an_option": beside("--force"),
        "a_side_file_is_called_as_a_device_of_windows": beside("NUL.txt"),
        "a_hidden_file_lies_beside_it": beside(".git/hooks/post-checkout", b"#!/bin/sh\n"),
        "a_card_acts_on_a_terminal": beside("README.md", b"\x1b[2J\x1b]0;owned\x07\x9b"),
        "code_lies_beside_it": beside("modeling_evil.py", b"raise SystemExit('owned')\n"),
        "a_module_lies_beside_it": beside("numpy.py", b"raise SystemExit('owned')\n"),
    },
    "side files are bytes with names: copied, never opened or run",
)
hostile(
    HARMLESS | dict.fromkeys(("strip", "embed", "migrate", "to-lora"), SURROUNDINGS),
    {"a_side_file_claims_more_than_any_disk": lambda folder: sparse(folder / "notes.txt", 1 << 42)},
    "a copy needs the space; a merge leaves the file out",
    posix=True,
)
hostile(
    everywhere(SURROUNDINGS, info=ACCEPT),
    {"side_folders_lie_absurdly_deep": beside("x/" * 101 + "x")},
    "info does not list the folder; other commands stop, as on a failing disk",
)
hostile(
    WARNED["V013"], {"a_pickle_has_a_name_that_acts": beside("adapter_model.\x1b[2J\u202e.bin")}
)


@hostile_case(REFUSED["V017"])
def adapters_lie_in_folders_with_names_that_act(folder: Path) -> None:
    for name in ("\x1b[2J", "a\u202eb", "a\nerror: V999 forged"):
        (folder / name).mkdir()
        shutil.copy(folder / CONFIG, folder / name)
    (folder / CONFIG).unlink()
    (folder / WEIGHTS).unlink()


def sparse(path: Path, size: int) -> None:
    """Make a file of `size` bytes that takes no room on the disk."""
    with path.open("wb") as file:
        file.truncate(size)


# --- attacks on readers of safetensors -----------------------------------------------------------


def plain_header(entries: Mapping[str, object], data: bytes = b"") -> Spoiler:
    """Return a spoiler that writes a header unchanged."""
    return lambda folder: join_weights(folder, entries, data)


def _at(shape: Sequence[int], begin: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": [*shape], "data_offsets": [begin, end]}


def _zip_in_a_tensor(folder: Path) -> None:
    added({"base_model.model.payload": np.frombuffer(b"PK\x03\x04" + bytes(60), np.uint8)})(folder)


# These cases follow the tests, the folder attacks/ and the audit of the safetensors repository.
hostile(
    REFUSED["V050"],
    {
        "ten_tensors_share_all_their_bytes": plain_header(
            {f"weight_{number}": _at([2, 2], 0, 16) for number in range(10)}, bytes(16)
        ),
        "two_large_ones_are_one": plain_header(
            {name: _at([500, 500], 0, 1_000_000) for name in "ab"}, bytes(1_000_000)
        ),
    },
)
hostile(
    only(REFUSED["V050"], "validate"),
    {
        "twenty_thousand_tensors_are_one": plain_header(
            {f"weight_{number}": _at([2, 2], 0, 16) for number in range(20_000)}, bytes(16)
        )
    },
)
hostile(
    REFUSED["V053"],
    {
        "more_bytes_follow_than_are_named": plain_header({"test": _at([2, 2], 0, 16)}, bytes(17)),
        "a_header_without_tensors_hides_bytes": plain_header({}, b"PK\x05\x06" + bytes(18)),
    },
)
hostile(
    REFUSED["V052"],
    {
        "a_tensor_is_not_all_there": plain_header({"test": _at([2, 2], 0, 16)}, bytes(15)),
        "data_is_all_gone": plain_header({"test": _at([2, 2], 0, 16)}),
    },
)
hostile(
    REFUSED["V046"],
    {
        "a_tensor_ends_at_the_last_of_63_bits": plain_header(
            {"test": _at([(1 << 60) - 1], 0, (1 << 63) - 8, "F64")}
        ),
        "shape_overflows_as_in_the_library": plain_header(
            {"test": _at([2, (1 << 64) - 1], 0, 16)}, bytes(16)
        ),
        "shape_times_dtype_overflows_as_in_the_library": plain_header(
            {"test": _at([2, (1 << 62) + 1], 0, 16)}, bytes(16)
        ),
    },
)
hostile(
    REFUSED["V049"],
    {
        "span_is_smaller_than_the_shape": plain_header({"test": _at([2, 2], 0, 4)}, bytes(4)),
        "offsets_are_beyond_64_bits": edit_entry(data_offsets=[1 << 64, 1 << 65]),
        "a_scalar_has_no_bytes": plain_header({"test": _at([], 0, 0)}),
    },
)
hostile(
    REFUSED["V022"],
    {
        "header_is_not_json": edit_header_text(lambda text: b"{" + bytes(len(text) - 1)),
        "header_is_javascript": edit_header_text(lambda text: text.replace(b'"dtype"', b"dtype")),
        "header_has_a_comment": edit_header_text(lambda text: text[:-1] + b"/**/}"),
        "header_has_a_trailing_comma": edit_header_text(lambda text: text[:-1] + b",}"),
    },
)
hostile(
    REFUSED["V023"],
    {
        "header_has_a_tensor_twice_by_escape": edit_header_text(
            lambda text: (
                text[:-1]
                + b', "\\u0062'
                + Q_B[1:].encode()
                + b'": '
                + json.dumps(_at([16], 0, 64)).encode()
                + b"}"
            )
        ),
        "header_has_metadata_twice_by_escape": edit_header_text(
            lambda text: text[:-1] + b', "\\u005f_metadata__": {"format": "tf"}}'
        ),
        "header_has_offsets_twice": edit_header_text(
            lambda text: text.replace(
                b'"data_offsets": ', b'"data_offsets": [0, 1], "data_offsets": ', 1
            )
        ),
    },
)
hostile(
    only(REFUSED["V028"], "strip", "merge"),
    {
        "header_has_a_million_fields_in_an_entry": edit_header_text(
            lambda text: text[:-1] + b', "x": {' + b'"":[],' * 1_400_000 + b'"y": 0}}'
        )
    },
)
hostile(
    REFUSED["V042"],
    {"metadata_is_spelled_otherwise": plain_header({"__Metadata__": {"format": "pt"}})},
)
hostile(
    HARMLESS,
    {
        "header_is_padded_with_spaces": edit_header_text(lambda text: text + b" " * 1_000),
        "header_is_padded_with_megabytes": edit_header_text(lambda text: text + b" " * 5_000_000),
        "header_lists_its_tensors_backwards": edit_header_text(
            lambda text: json.dumps(dict(reversed(json.loads(text).items()))).encode()
        ),
        "names_are_written_in_escapes": edit_header_text(
            lambda text: text.replace(b"vera_A", b"\\u0076era_\\u0041")
        ),
        "header_has_no_metadata": edit_header_text(
            lambda text: json.dumps(
                {k: v for k, v in json.loads(text).items() if k != "__metadata__"}
            ).encode()
        ),
        "metadata_is_also_a_document": metadata(
            {"format": "pt", "%PDF-1.7": "%PDF-1.7\n1 0 obj\n"}
        ),
        "metadata_is_also_a_page": metadata({"format": "pt", "x": "<script>alert(1)</script>"}),
        "metadata_acts_on_a_terminal": metadata(
            {"format": "\x1b[2J", "\x1b]0;owned\x07": "\u202e"}
        ),
        "metadata_is_of_another_framework": metadata({"format": "\0", "__proto__": "{}"}),
        "metadata_is_large": metadata({"format": "pt", "x": "y" * 5_000_000}),
    },
    "two readers see the same file; metadata is copied and never used",
)
hostile(
    only(HARMLESS, "validate", "strip"),
    {"metadata_has_thousands_of_entries": metadata({f"k{n}": "v" for n in range(30_000)})},
    "metadata is copied unchanged",
)
hostile(
    REFUSED["V220"],
    {
        "a_tensor_has_no_name": added({"": np.zeros(1, np.float32)}),
        "a_tensor_is_called_as_a_path": added({"../../../etc/passwd": np.zeros(1, np.float32)}),
        "a_tensor_is_called_as_metadata": added({"__metadata__.x": np.zeros(1, np.float32)}),
    },
)
hostile(
    REFUSED["V221"],
    {
        "two_tensors_have_names_that_look_alike": added(
            {
                f"base_model.model.caf{end}": np.zeros(1, np.float32)
                for end in ("\u00e9", "e\u0301", "\u0435\u0301")
            }
        ),
    },
)
hostile(
    only(REFUSED["V220"], "merge"),
    {
        "twenty_thousand_tensors_are_unknown": header_of(
            [*of_rank_one(1), *((f"x{number}.vera", "U8", (1,), 1) for number in range(20_000))]
        )
    },
)

hostile(REFUSED["V221"], {"a_zip_lies_in_a_tensor": _zip_in_a_tensor})

# --- JSON ----------------------------------------------------------------------------------------

hostile(
    REFUSED["V104"],
    {
        "config_has_a_thousand_fields_too_many": fields({f"x{n}": n for n in range(1_001)}),
        "rank_is_a_milliard": fields({"r": 10**9}),
        "rank_is_negative": fields({"r": -1}),
        "rank_has_64_digits": fields({"r": int("9" * 64)}),
        "rank_is_just_beyond_the_largest": fields({"r": (1 << 24) + 1}),
        "targets_are_ten_thousand_and_one": fields({"target_modules": ["q_proj"] * 10_001}),
        "saved_modules_are_ten_thousand_and_one": fields({"modules_to_save": ["x"] * 10_001}),
        "layers_are_ten_thousand_and_one": fields({"layers_to_transform": [0] * 10_001}),
        "a_target_has_ten_thousand_and_one_letters": fields({"target_modules": ["q" * 10_001]}),
        "a_pattern_has_a_million_letters": fields({"target_modules": "(a|b)*" * 100_000}),
        "dropout_is_huge": fields({"vera_dropout": 1e308}),
        "rank_has_65_digits": fields({"r": 10**64}),
        "initial_value_is_beyond_all_floats": fields({"d_initial": 10**400}),
        "dropout_is_negative": fields({"vera_dropout": -1e-9}),
    },
)
hostile(
    REFUSED["V103"],
    {
        "rank_is_fractional": fields({"r": 4.0}),
        "rank_is_a_list": fields({"r": [4]}),
        "targets_are_nested": fields({"target_modules": [["q_proj"]]}),
        "targets_are_an_object": fields({"target_modules": {"q_proj": True}}),
        "layers_are_true": fields({"layers_to_transform": True}),
        "layers_are_fractional": fields({"layers_to_transform": [0.0]}),
        "base_is_a_list": fields({"base_model_name_or_path": ["a/b"]}),
        "initial_value_is_text": fields({"d_initial": "__import__('os')"}),
        "flag_is_the_text_false": fields({"save_projection": "false"}),
        "version_is_a_number": fields({"peft_version": 0.21}),
    },
)
hostile(
    REFUSED["V105"],
    {
        "key_is_text": fields({"projection_prng_key": "0"}),
        "key_is_fractional": fields({"projection_prng_key": 0.0}),
        "key_is_null": fields({"projection_prng_key": None}),
        "key_is_below_63_bits": fields({"projection_prng_key": -(2**63) - 1}),
    },
)
hostile(
    REFUSED["V106"],
    {
        "task_is_unheard_of": fields({"task_type": "EVERYTHING"}),
        "task_acts_on_a_terminal": fields({"task_type": "\x1b]0;owned\x07\u202e\n"}),
        "bias_acts_on_a_terminal": fields({"bias": "\x1b[2J\u2066"}),
    },
)
hostile(
    REFUSED["V023"],
    {"config_has_a_thousand_keys_twice": with_field(b",".join(b'"a": 1' for _ in range(1_000)))},
)
hostile(
    WARNED["V110"],
    {
        "a_field_has_a_long_text": fields({"x": "y" * 900_000}),
        "a_field_has_a_long_name": fields({"x" * 900_000: 1}),
        "a_field_is_a_whole_emoji": with_field(b'"x": "\\ud83d\\ude00"'),
        "a_field_is_a_tiny_number": with_field(b'"x": 1e-999'),
        "a_field_is_nan": with_field(b'"x": NaN'),
        "a_field_is_infinite": with_field(b'"x": [-Infinity, Infinity, 1e400]'),
        "a_field_is_minus_zero": with_field(b'"x": -0'),
        "a_field_has_4300_digits": with_field(b'"x": -' + b"9" * 4_300),
        "a_field_has_64_levels": with_field(b'"x": ' + b"[" * 63 + b"]" * 63),
        "a_field_is_called_as_an_attribute": fields({"__class__": "x", "__init__": {}}),
        "hundreds_of_fields_are_unknown": fields({f"x{n}": n for n in range(900)}),
    },
)

# --- claims --------------------------------------------------------------------------------------

hostile(
    REFUSED["V204"],
    {
        "rank_is_the_largest_allowed": all_of(
            fields({"r": 1 << 24, "save_projection": False}), bare
        ),
    },
)
hostile(
    everywhere(
        ACCEPT,
        validate=reject("V132"),
        **dict.fromkeys(("strip", "merge", "to_lora"), warn("V132")),
    ),
    {
        "layers_are_a_trillion_of_millions": fields({"layers_to_transform": 10**18}),
        "layers_have_63_digits": fields({"layers_to_transform": [10**62]}),
        "layers_are_negative": fields({"layers_to_transform": [-1]}),
        "targets_are_none": fields({"target_modules": []}),
        "targets_are_an_empty_pattern": fields({"target_modules": ""}),
    },
    "PEFT would refuse the adapter; commands convert the layers of the file",
)
hostile(
    HARMLESS,
    {
        "initial_value_has_63_digits": fields({"d_initial": 10**62}),
        "version_has_a_hundred_thousand_digits": fields({"peft_version": "9" * 100_000 + ".1"}),
        "version_acts_on_a_terminal": fields({"peft_version": "0.21\x1b[2J\u202e\n"}),
        "mapping_acts_on_a_terminal": fields({"auto_mapping": {"\x1b[2J": "\u202e"}}),
    },
    "a field without an effect on any result is copied unchanged",
)
hostile(
    warned_by_validate("V123"),
    {
        "revision_is_a_path": fields({"revision": "../../../etc/passwd"}),
        "revision_acts_on_a_terminal": fields({"revision": "main\n\x1b[2J\u202e"}),
    },
    "git does not allow this revision, so the revision is never requested",
)
hostile(
    warned_by_validate("V229"),
    {
        "targets_are_ten_thousand": fields(
            {"target_modules": ["q_proj", "v_proj", *(f"x{n}" for n in range(9_998))]}
        ),
        "a_target_is_empty": fields({"target_modules": ["", "q_proj", "v_proj"]}),
        "a_target_acts_on_a_terminal": fields(
            {"target_modules": ["q_proj", "v_proj", "\x1b]0;owned\x07\u202e\n"]}
        ),
        "a_target_looks_like_a_pattern": fields({"target_modules": ["q_proj", "v_proj", "(a+)+$"]}),
    },
    "the base does not have these layers either",
)
hostile(
    warned_by_validate("V120"),
    {
        "base_is_a_device": fields({"base_model_name_or_path": "/dev/zero"}),
        "base_is_a_way_up": fields({"base_model_name_or_path": "../" * 100 + "etc"}),
        "base_is_a_share": fields({"base_model_name_or_path": "\\\\server\\share"}),
        "base_is_an_address": fields({"base_model_name_or_path": "http://127.0.0.1:1/x"}),
        "base_is_of_the_hub_and_leads_up": fields({"base_model_name_or_path": "hf://../.."}),
        "base_has_a_long_name": fields({"base_model_name_or_path": "a" * 900_000}),
        "base_acts_on_a_terminal": fields(
            {"base_model_name_or_path": "a/b\x1b]0;owned\x07\x9b2J\u202e\u2066\u200b\r\n"}
        ),
        "base_is_an_option": fields({"base_model_name_or_path": "--force"}),
        "base_is_a_command": fields({"base_model_name_or_path": "$(touch owned)"}),
    },
    "a base that the config names is untrusted text, and never used as a path",
)
hostile(
    REFUSED["V222"],
    {
        "a_saved_module_has_no_name": fields({"modules_to_save": [""]}),
        "a_saved_module_is_a_dot": fields({"modules_to_save": ["."]}),
        "a_saved_module_acts_on_a_terminal": fields({"modules_to_save": ["\x1b[2J\u202e\n"]}),
        "ten_thousand_saved_modules_are_gone": fields(
            {"modules_to_save": [f"x{n}" for n in range(10_000)]}
        ),
    },
)
hostile(
    only(REFUSED["V221"], "strip"),
    {
        "ten_thousand_saved_modules_meet_as_many_heads": all_of(
            fields({"r": 1, "modules_to_save": [f"m{n}" for n in range(10_000)]}),
            header_of(
                [
                    *of_rank_one(1),
                    *((f"base_model.model.x{n}.weight", "F32", (1,), 4) for n in range(20_000)),
                ]
            ),
        )
    },
    "every name is compared with every layer, which must not take quadratic time",
)
MANY = of_rank_one(5_000)
ELSEWHERE = [f"x{number}.q_proj" for number in range(9_999)]
hostile(
    only(REFUSED["V304"], "validate"),
    {
        "ten_thousand_targets_meet_as_many_layers": all_of(
            fields({"r": 1, "target_modules": [*ELSEWHERE, "q_proj"]}), header_of(MANY)
        ),
        "ten_thousand_targets_meet_none_of_as_many_layers": all_of(
            fields({"r": 1, "target_modules": ELSEWHERE}), header_of(MANY)
        ),
        "ten_thousand_layers_are_none_of_as_many": all_of(
            fields(
                {"r": 1, "target_modules": ["q_proj"], "layers_to_transform": [*range(-9_999, 1)]}
            ),
            header_of(MANY),
        ),
        "ten_thousand_patterns_meet_as_many_layers": all_of(
            fields(
                {
                    "r": 1,
                    "target_modules": ["q_proj"],
                    "layers_to_transform": [0],
                    "layers_pattern": [f"x{number}" for number in range(10_000)],
                }
            ),
            header_of(MANY),
        ),
    },
    "a file without data, so all values are zero; names are compared in linear time",
)
hostile(
    only(REFUSED["V304"], "validate"),
    {
        "header_has_a_hundred_thousand_entries": all_of(
            fields({"r": 1}), header_of(of_rank_one(50_000))
        )
    },
    "a valid header of the largest size; all values are zero",
)

TERABYTE = 1 << 40
hostile(
    REFUSED["V003"],
    {
        "a_lambda_claims_a_terabyte": all_of(
            fields({"r": 1, "save_projection": False}),
            header_of(
                [
                    (Q_B, "F32", (TERABYTE // 4,), TERABYTE),
                    (Q_D, "F32", (1,), 4),
                ]
            ),
        ),
        "a_head_claims_a_terabyte": all_of(
            fields({"r": 1, "modules_to_save": ["score"]}),
            header_of(
                [
                    *of_rank_one(1),
                    ("base_model.model.score.weight", "F32", (1 << 19, 1 << 19), TERABYTE),
                ]
            ),
        ),
        "a_copy_of_a_claims_a_terabyte": all_of(
            fields({"r": 1}),
            header_of(
                [
                    *of_rank_one(1),
                    (Q_B.replace("lambda_b", "A"), "F32", (1, TERABYTE // 4), TERABYTE),
                ]
            ),
        ),
    },
    "the file is sparse: the disk is not full, but a read would take an hour",
    posix=True,
)
hostile(
    only(REFUSED["V413"], "info", "merge"),
    {
        "stored_projections_claim_gigabytes": all_of(
            fields({"r": 1}),
            header_of(
                [
                    *of_rank_one(1)[2:],
                    (A, "F32", (1, 1 << 29), 1 << 31),
                    (B, "F32", (HIDDEN, 1), 4 * HIDDEN),
                ]
            ),
        )
    },
    "a file without data; validate would read all zeros",
    posix=True,
)
hostile(
    REFUSED["V413"],
    {
        "vera_a_is_absurdly_wide": all_of(
            fields({"r": 1}),
            header_of(
                [
                    *of_rank_one(1)[2:],
                    (A, "F32", (1, (1 << 20) + 1), 4 * ((1 << 20) + 1)),
                    (B, "F32", (HIDDEN, 1), 4 * HIDDEN),
                ]
            ),
        )
    },
    posix=True,
)

# --- patterns ------------------------------------------------------------------------------------

hostile(
    only(everywhere(reject("V131")), "strip"),
    {"targets_take_for_ever_on_any_name": fields({"target_modules": r"([\w.]+)+\d\d"})},
)
hostile(
    only(everywhere(reject("V131")), "merge"),
    {
        "a_pattern_of_layers_takes_for_ever": fields(
            {"layers_to_transform": [0, 1], "layers_pattern": r"([\w.]+)+\d\d"}
        )
    },
)
hostile(
    only(everywhere(reject("V131")), "validate"),
    {"a_saved_module_takes_for_ever": fields({"modules_to_save": [r"([\w.]+)+\d\d"]})},
)
hostile(
    only(everywhere(reject("V130")), "validate", "strip"),
    {
        "pattern_nests_for_ever": fields({"target_modules": "(" * 4_000 + ")" * 4_000}),
        "pattern_repeats_beyond_all": fields({"target_modules": "x{4294967296}"}),
        "pattern_looks_back_without_a_length": fields({"target_modules": r"(?<=.*)x"}),
        "pattern_has_a_group_twice": fields({"target_modules": r"(?P<a>x)(?P<a>y)"}),
        "pattern_has_flags_that_exclude_each_other": fields({"target_modules": r"(?au)x"}),
        "pattern_acts_on_a_terminal": fields({"target_modules": "(\x1b]0;owned\x07\u202e\n"}),
        "pattern_calls_for_code": fields({"target_modules": r"(?{print('owned')})"}),
    },
)
hostile(
    only(
        everywhere(ACCEPT, strip=reject("V403"), merge=warn("V411")), "validate", "strip", "merge"
    ),
    {
        "pattern_repeats_repeats": fields(
            {"target_modules": "((((q{1,60000}){1,60000}){1,60000}){1,60000})?.*"}
        ),
        "pattern_has_thousands_of_letters_in_any_case": fields(
            {"target_modules": "(?i)[" + "".join(map(chr, range(0x100, 0x2000))) + "]*.*"}
        ),
    },
    "the pattern is fast and matches every layer of the base, so A and B would be larger",
)

# --- fingerprints --------------------------------------------------------------------------------


def fingerprint_text(edit: Callable[[str], str]) -> Spoiler:
    """Return a spoiler that strips the adapter and edits the text of its fingerprint."""

    def spoil(folder: Path) -> None:
        stripped(folder)
        with safe_open(folder / WEIGHTS, "np") as file:
            entries = file.metadata()
        metadata(entries | {METADATA_KEY: edit(entries[METADATA_KEY])})(folder)

    return spoil


hostile(
    REFUSED["V407"],
    {
        "fingerprint_is_empty": fingerprint_text(lambda _: ""),
        "fingerprint_is_null": fingerprint_text(lambda _: "null"),
        "fingerprint_is_a_bomb": fingerprint_text(lambda _: "[" * 100_000),
        "fingerprint_is_a_long_number": fingerprint_text(lambda _: "9" * 5_000),
        "fingerprint_is_another_format": fingerprint_text(
            lambda text: text.replace(":1,", ":true,", 1)
        ),
        "fingerprint_has_a_key_twice": fingerprint_text(lambda text: text[:-1] + ',"key":7}'),
        "fingerprint_has_a_new_field": fingerprint_text(lambda text: text[:-1] + ',"x":0}'),
        "fingerprint_has_nan": fingerprint_text(lambda text: text.replace('"key":7', '"key":NaN')),
        "fingerprint_has_half_a_character": fingerprint_text(lambda _: '{"x": "\\ud800"}'),
        "fingerprint_acts_on_a_terminal": fingerprint_text(
            lambda _: '{"format": "\\u001b[2J\u202e"}'
        ),
        "fingerprint_claims_two_to_the_32_inputs": fingerprint(
            in_features=1 << 32, drawn_in_features=1 << 32
        ),
        "fingerprint_claims_no_inputs": fingerprint(in_features=0),
        "fingerprint_claims_more_than_was_drawn": fingerprint(in_features=HIDDEN + 1),
        "fingerprint_has_a_key_beyond_64_bits": fingerprint(key=1 << 64),
        "fingerprint_has_a_hash_in_capitals": fingerprint(sha256_A="A" * 64),
        "fingerprint_has_a_short_hash": fingerprint(sha256_B="0" * 63),
        "fingerprint_has_a_dtype_of_its_own": fingerprint(dtype="F8_E5M2"),
        "fingerprint_claims_an_absurd_rank": fingerprint(rank=(1 << 24) + 1),
    },
)
hostile(
    REFUSED["V408"],
    {
        "fingerprint_claims_the_largest_rank": fingerprint(rank=1 << 24),
        "fingerprint_has_too_few_outputs": fingerprint(out_features=1),
    },
)
hostile(
    everywhere(ACCEPT, **dict.fromkeys(("embed", "merge", "to_lora"), reject("V408"))),
    {
        "fingerprint_claims_all_of_32_bits": fingerprint(
            in_features=(1 << 32) - 1, drawn_in_features=(1 << 32) - 1
        ),
        "fingerprint_claims_rows_of_32_bits": fingerprint(
            out_features=(1 << 32) - 1, drawn_out_features=(1 << 32) - 1
        ),
    },
    "the fingerprint is compared with the base before any draw",
)
hostile(
    everywhere(warn("V419"), info=ACCEPT, strip=ACCEPT, migrate=ACCEPT)
    | dict.fromkeys(("embed", "merge", "to-lora"), reject("V413")),
    {"fingerprint_was_cut_from_a_disk_full": fingerprint(drawn_in_features=(1 << 32) - 1)},
    "a command that regenerates A and B checks the sizes before taking memory",
)
hostile(
    everywhere(reject("V409"), info=ACCEPT),
    {"fingerprint_has_hashes_of_nothing": fingerprint(sha256_A="0" * 64, sha256_B="f" * 64)},
    DRAWN_AGAIN,
)

hostile(
    everywhere(warn("V410"), strip=ACCEPT, migrate=ACCEPT),
    {
        "nobody_says_who_dropped_the_projections": all_of(
            bare, fields({"peft_version": None, "inference_mode": False})
        )
    },
    "commands that regenerate or check A and B say that nothing proves the draw",
)

# --- values --------------------------------------------------------------------------------------


def _of_bits(name: str, bits: int, dtype: type, width: type) -> Spoiler:
    """Return a spoiler that sets the bits of a tensor's last value, after a cast to this dtype."""

    def edit(stored: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        values: NDArray[Any] = stored[name].astype(dtype)
        values.reshape(-1).view(width)[-1] = bits
        return {**stored, name: values}

    return tensors(edit)


BITS = {
    "a_quiet_nan": (0x7FC00000, np.float32, np.uint32),
    "a_nan_with_a_payload": (0x7FC0BEEF, np.float32, np.uint32),
    "a_signaling_nan": (0x7F800001, np.float32, np.uint32),
    "a_negative_nan": (0xFFFFFFFF, np.float32, np.uint32),
    "an_infinity": (0xFF800000, np.float32, np.uint32),
    "a_nan_of_float16": (0x7C01, np.float16, np.uint16),
    "an_infinity_of_float16": (0xFC00, np.float16, np.uint16),
    "a_nan_of_bfloat16": (0x7F81, ml_dtypes.bfloat16, np.uint16),
    "an_infinity_of_bfloat16": (0xFF80, ml_dtypes.bfloat16, np.uint16),
    "a_nan_of_float64": (0x7FF0000000000001, np.float64, np.uint64),
}
for _what, (_bits, _dtype, _width) in BITS.items():
    # Vectors that are not float32 also bring the warning about mixed dtypes.
    _tolerated = ACCEPT if _dtype is np.float32 else warn("V207")
    hostile(
        everywhere(reject("V301"), info=_tolerated),
        {f"lambda_b_ends_in_{_what}": _of_bits(Q_B, _bits, _dtype, _width)},
        NO_VALUES,
    )
hostile(
    everywhere(reject("V301"), info=warn("V414")),
    {"vera_a_ends_in_a_nan": _of_bits(A, *BITS["a_nan_with_a_payload"])},
    "info reads A and B, and says that A and B are no draw",
)
hostile(
    everywhere(reject("V304"), info=warn("V414")),
    {"vera_a_holds_one_value": added({A: np.full((RANK, HIDDEN), 0.5, np.float32)})},
    "info says that A and B are no draw",
)
hostile(
    everywhere(reject("V301"), info=ACCEPT),
    {
        "a_saved_head_holds_nan": all_of(
            added({"base_model.model.lm_head.weight": np.full((32, 16), np.nan, np.float32)}),
            fields({"modules_to_save": ["lm_head"]}),
        )
    },
    NO_VALUES,
)

# --- names and texts that change a terminal, or hide ---------------------------------------------

ACTING = {
    "turns_the_direction": "\u202egpj.x\u202c",
    "isolates_a_direction": "\u2066a\u2069",
    "marks_a_direction": "\u061c\u200f",
    "sets_colors": "\x1b[31mred\x1b[0m",
    "clears_the_screen": "\x1b[2J\x1b[H",
    "sets_the_title": "\x1b]0;owned\x07",
    "opens_a_link": "\x1b]8;;http://a.example\x1b\\a\x1b]8;;\x1b\\",
    "asks_for_an_answer": "\x1b[6n\x1bP$qm\x1b\\",
    "sets_colors_in_one_byte": "\x9b31m",
    "sets_the_title_in_one_byte": "\x9d0;owned\x9c",
    "forges_a_line": "x\nerror: V999 forged",
    "goes_back_to_the_beginning": "bad\rgood",
    "takes_letters_back": "bad\b\b\bgood",
    "rings": "\a" * 3,
    "has_a_nul": "a\0b",
    "has_no_width": "a\u200b\u2060\ufeffb",
    "is_a_filler": "\u3164\uffa0",
    "is_a_tag": "\U000e0041\U000e0001",
    "separates_lines": "a\u2028b\u2029c\x85d",
    "is_of_private_use": "\ue000\U0010fffd",
    "is_no_character": "\uffff\ufdd0",
    "varies_an_emoji": "a\ufe0f\U000e0100",
    "deletes": "a\x7fb",
}
"""A sample of text for each effect on a terminal."""

for _what, _text in ACTING.items():
    hostile(
        REFUSED["V220"],
        {
            f"a_name_{_what}": all_of(
                added({f"vera_lora_{_text}": np.zeros(1, np.float32)}), fields({_text: _text})
            )
        },
    )
    hostile(
        only(WARNED["V110"], "validate", "info", "strip"),
        {
            f"a_text_{_what}": all_of(
                fields({_text: [_text], "base_model_name_or_path": _text, "peft_version": _text}),
                metadata({"format": "pt", _text: _text}),
            )
        },
    )

EVERYTHING = "".join(text.replace("\0", "") for text in ACTING.values())
hostile(
    REFUSED["V216"],
    {
        "an_adapters_name_is_left_that_acts": renamed(
            lambda name: f"{name}.{EVERYTHING.replace('.', '')}"
        )
    },
)
CASES[-1] = replace(
    CASES[-1], outcomes={**CASES[-1].outcomes, "migrate": ACCEPT}, why="migrate removes the name"
)
hostile(
    REFUSED["V202"],
    {
        "a_layer_has_a_name_that_acts": added(
            {f"base_model.model.{EVERYTHING}.vera_lambda_b": np.zeros(16, np.float32)}
        )
    },
)
hostile(
    REFUSED["V044"],
    {"a_dtype_acts": edit_entry(dtype=EVERYTHING)},
)
hostile(REFUSED["V043"], {"a_field_of_an_entry_acts": edit_entry(**{EVERYTHING: 1})})
hostile(
    REFUSED["V040"], {"a_key_of_metadata_acts": plain_header({"__metadata__": {EVERYTHING: 1}})}
)
hostile(
    REFUSED["V023"],
    {
        "a_key_that_acts_stands_twice": with_field(
            b",".join([json.dumps(EVERYTHING).encode() + b": 1"] * 2)
        )
    },
)
hostile(
    REFUSED["V027"],
    {"half_a_character_stands_beside_what_acts": with_field(b'"x": "\\u001b[2J\\ud800\\u202e"')},
)

# --- hostile bases -------------------------------------------------------------------------------

NO_ENDING = frozenset(f"V005-index_names_a_shard_unsafely_{n}" for n in (0, 1, 9, 10, 14, 15))
"""Names without the ending of a safetensors file; V506 refuses these before any path is checked."""

CASES += [
    Case(
        defect.name,
        defect.spoil,
        REFUSED["V506" if defect.name in NO_ENDING else defect.code],
        on="base",
        posix=defect.posix,
    )
    for defect in DEFECTS
    if defect.on == "base"
]


def base_config(document: object) -> Spoiler:
    """Return a spoiler that replaces a base's config by bytes, or by the JSON of a value."""
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    return beside("config.json", text)


def llama(**more: object) -> Spoiler:
    """Return a spoiler that adds fields to the base's config."""
    return base_config({"model_type": "llama", **more})


def indexed(edit: Callable[[dict[str, Any]], object]) -> Spoiler:
    """Return a spoiler that edits the index of shards; a result of `edit` becomes the index."""

    def spoil(folder: Path) -> None:
        document = json.loads((folder / INDEX).read_bytes())
        (folder / INDEX).write_text(json.dumps(edit(document) or document))

    return spoil


def mapped(**shards: str) -> Spoiler:
    """Return a spoiler that adds tensors and their shards to the index."""
    return indexed(lambda document: document["weight_map"].update(shards))


def in_place_of(name: str, make: Callable[[Path], object]) -> Spoiler:
    """Return a spoiler that replaces a file by something else."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return spoil


for _code, _bases in {
    "V020": {"base_config_is_utf_16": base_config('{"a": 1}'.encode("utf-16"))},
    "V021": {"base_config_has_a_byte_order_mark": base_config(b"\xef\xbb\xbf{}")},
    "V022": {"base_config_is_cut_off": base_config(b'{"model_type": "lla')},
    "V023": {"base_config_has_a_key_twice": base_config(b'{"a": 1, "a": 2}')},
    "V025": {"base_config_nests_for_ever": base_config(b'{"a":' * 500_000)},
    "V026": {
        "base_config_has_a_long_number": base_config(b'{"vocab_size": ' + b"9" * 5_000 + b"}")
    },
    "V027": {"base_config_has_half_a_character": base_config(b'{"a": "\\udc00"}')},
    "V028": {"base_config_has_millions_of_values": base_config(b"[" + b"0," * 5_000_000 + b"0]")},
    "V004": {"base_config_is_empty": base_config(b"")},
    "V513": {"base_config_is_a_list": base_config([]), "base_config_is_null": base_config(None)},
}.items():
    hostile(REFUSED[_code], _bases, on="base")
hostile(
    REFUSED["V003"],
    {
        "base_config_claims_a_terabyte": lambda folder: sparse(folder / "config.json", TERABYTE),
    },
    on="base",
    posix=True,
)
hostile(
    REFUSED["V002"],
    {
        "base_config_links_to_the_passwords": in_place_of(
            "config.json", lambda path: path.symlink_to("/etc/passwd")
        ),
        "base_weights_link_out_of_the_folder": in_place_of(
            "model.safetensors", lambda path: path.symlink_to("/proc/self/maps")
        ),
    },
    on="base",
    posix=True,
)
_MADE: dict[str, Callable[[Path], object]] = {
    "are_a_pipe": os.mkfifo,
    "are_a_folder": Path.mkdir,
    "link_to_themselves": lambda path: path.symlink_to("model.safetensors"),
    "link_to_an_endless_device": lambda path: path.symlink_to("/dev/zero"),
}
for _what, _make in _MADE.items():
    _refusal = {
        "link_to_themselves": everywhere(SURROUNDINGS),
        "link_to_an_endless_device": REFUSED["V002"],
    }
    hostile(
        _refusal.get(_what, REFUSED["V001"]),
        {f"base_weights_{_what}": in_place_of("model.safetensors", _make)},
        "a weight file that cannot be opened must not let the config alone describe the model",
        on="base",
        posix=True,
    )
hostile(
    HARMLESS,
    {
        "a_pipe_lies_in_the_base": lambda folder: os.mkfifo(folder / "README.txt"),
        "a_link_in_the_base_leads_to_itself": linked("notes.txt", "notes.txt"),
        "a_link_in_the_base_leads_to_its_parent": linked("up", ".."),
        "a_link_in_the_base_leads_to_an_endless_device": linked("notes.txt", "/dev/zero"),
    },
    "only regular files are listed, and nothing depends on others",
    on="base",
    posix=True,
)
hostile(
    REFUSED["V001"],
    {
        "base_config_is_a_pipe": in_place_of("config.json", os.mkfifo),
        "base_config_is_a_folder": in_place_of("config.json", os.mkdir),
    },
    on="base",
    posix=True,
)
hostile(
    everywhere(ACCEPT, merge=reject("V002")),
    {"a_file_of_the_base_links_to_the_passwords": linked("notes.txt", "/etc/passwd")},
    "only a merge copies the other files of the base",
    on="base",
    posix=True,
)
hostile(
    everywhere(ACCEPT, merge=SURROUNDINGS),
    {"a_file_of_the_base_claims_more_than_any_disk": lambda base: sparse(base / "a.txt", 1 << 42)},
    "only a merge copies the other files of the base",
    on="base",
    posix=True,
)
hostile(
    HARMLESS,
    {
        "base_config_has_fields_of_odd_types": llama(
            tie_word_embeddings="yes",
            quantization_config=[1],
            text_config=3,
            vocab_size=10**18,
            auto_map=1,
            architectures=5,
            torch_dtype=7,
            dtype=[],
        ),
        "base_config_has_a_type_that_is_a_list": base_config({"model_type": ["llama"]}),
        "base_config_has_a_type_that_acts": base_config({"model_type": EVERYTHING}),
        "base_config_asks_for_code": llama(auto_map={"AutoModel": "evil--evil.Evil"}),
        "a_file_of_the_base_has_a_name_that_acts": beside("\x1b]0;owned\x07\u202e\n.txt"),
        "code_lies_in_the_base": beside("modeling_evil.py", b"raise SystemExit('owned')\n"),
    },
    "a config is data: no part of a config is run, and unknown fields decide nothing",
    on="base",
)
hostile(
    everywhere(ACCEPT, validate=warn("V556"), merge=reject("V550")),
    {
        "base_config_is_quantized_in_an_odd_way": llama(
            quantization_config={
                "quant_method": 7,
                "modules_to_not_convert": [1, {}],
                "config_groups": 5,
                "ignore": "(",
            }
        )
    },
    "quantized in any way: only a merge adds to the weights",
    on="base",
)
hostile(
    only(everywhere(warn("V556"), merge=reject("V550")), "merge"),
    {
        "base_config_has_a_pattern_without_end": llama(
            quantization_config={
                "quant_method": "fp8",
                "modules_to_not_convert": ["([\\w.]+)+\\d\\d"],
            }
        )
    },
    "a pattern that is given up excepts nothing",
    on="base",
)
hostile(
    everywhere(warn("V512"), embed=ACCEPT),
    {
        "stray_weights_lie_in_the_base": beside("x.safetensors", b"\xff" * 64),
        "stray_weights_have_a_name_that_acts": beside("\x1b[2J\u202e\n.safetensors", b""),
    },
    "an embedded adapter is copied, for any base",
    on="base",
)
hostile(
    everywhere(reject("V052")),
    {
        "base_weights_claim_an_exabyte": lambda folder: (
            plain_header({"lm_head.weight": _at([1 << 57], 0, 1 << 59)})(folder),
            (folder / WEIGHTS).replace(folder / "model.safetensors"),
        )[0],
    },
    on="base",
)
hostile(
    REFUSED["V054"],
    {
        "a_tensor_of_the_base_lies_absurdly_deep": lambda folder: (
            plain_header({"model." * 10_000 + "weight": _at([1], 0, 4)}, bytes(4))(folder),
            (folder / WEIGHTS).replace(folder / "model.safetensors"),
        )[0],
    },
    on="base",
)
hostile(
    everywhere(reject("V520")),
    {
        "tensors_of_the_base_have_names_that_act": lambda folder: (
            plain_header({f"{EVERYTHING}.weight": _at([1, 1], 0, 4)}, bytes(4))(folder),
            (folder / WEIGHTS).replace(folder / "model.safetensors"),
        )[0],
    },
    on="base",
)

for _code, _indexes in {
    "V506": {
        "index_is_a_list": indexed(lambda document: [document]),
        "index_has_no_map": indexed(lambda _: {"metadata": {}}),
        "index_has_an_empty_map": indexed(lambda _: {"weight_map": {}}),
        "index_has_a_list_for_a_map": indexed(lambda _: {"weight_map": ["a.safetensors"]}),
        "index_names_numbers": indexed(lambda _: {"weight_map": {"lm_head.weight": 1}}),
        "index_names_nested_files": indexed(
            lambda _: {"weight_map": {"a": {"b": "c.safetensors"}}}
        ),
        "index_names_a_pickle": mapped(x="pytorch_model.bin"),
        "index_names_its_own_file": mapped(x=INDEX),
    },
    "V507": {
        "index_names_a_file_that_is_not_there": mapped(x="gone.safetensors"),
        "index_names_a_file_with_a_long_name": mapped(x="x" * 5_000 + ".safetensors"),
        "index_names_a_file_in_other_letters": mapped(x="MODEL-00001-of-00003.safetensors"),
        "index_names_a_file_in_a_name_that_hides": mapped(x="\u202emodel\u200b.safetensors"),
        "index_names_a_device_of_windows": mapped(x="NUL.safetensors"),
    },
    "V001": {
        "a_shard_is_a_pipe": in_place_of("model-00002-of-00003.safetensors", os.mkfifo),
        "a_shard_is_a_folder": in_place_of("model-00002-of-00003.safetensors", Path.mkdir),
    },
    "V005": {
        "index_names_the_folder_above": mapped(x="../model-00001-of-00003.safetensors"),
        "index_names_a_way_down_and_up": mapped(x="a/../model-00001-of-00003.safetensors"),
        "index_names_the_root": mapped(x="/etc/shadow.safetensors"),
        "index_names_a_drive": mapped(x="C:\\windows\\x.safetensors"),
        "index_names_a_share": mapped(x="\\\\server\\share\\x.safetensors"),
        "index_names_a_stream": mapped(x="model-00001-of-00003.safetensors:x.safetensors"),
        "index_names_an_address": mapped(x="http://a.example/x.safetensors"),
        "index_names_a_line_break": mapped(x="model\n.safetensors"),
        "index_names_a_nul": mapped(x="model-00001-of-00003.safetensors\0.safetensors"),
        "index_names_what_acts": mapped(x="\x1b]0;owned\x07.safetensors"),
        "index_names_one_byte_that_acts": mapped(x="\x9b2J.safetensors"),
    },
    "V004": {"a_shard_is_empty": beside("model-00001-of-00003.safetensors", b"")},
    "V036": {"a_shard_is_zeros": beside("model-00001-of-00003.safetensors", bytes(64))},
    "V509": {
        "index_gives_every_tensor_to_another_shard": indexed(
            lambda document: {
                "weight_map": dict(
                    zip(
                        document["weight_map"],
                        [*document["weight_map"].values()][::-1],
                        strict=True,
                    )
                )
            }
        ),
    },
    "V508": {"index_names_a_tensor_of_no_shard": mapped(x="model-00001-of-00003.safetensors")},
    "V025": {"index_nests_for_ever": beside(INDEX, b'{"weight_map":' * 100_000)},
    "V023": {"index_has_a_tensor_twice": beside(INDEX, b'{"weight_map": {"a": "b", "a": "c"}}')},
}.items():
    hostile(REFUSED[_code], _indexes, on="shards", posix=True)
hostile(
    REFUSED["V002"],
    {
        "a_shard_links_out_of_the_folder": in_place_of(
            "model-00001-of-00003.safetensors", lambda path: path.symlink_to("/etc/passwd")
        )
    },
    on="shards",
    posix=True,
)
hostile(
    REFUSED["V003"],
    {"index_claims_a_terabyte": lambda folder: sparse(folder / INDEX, TERABYTE)},
    on="shards",
    posix=True,
)
hostile(
    HARMLESS,
    {
        "index_has_odd_metadata": indexed(lambda document: document.update(metadata=[1])),
        "index_has_a_size_that_is_text": indexed(
            lambda document: document.update(metadata={"total_size": "\x1b[2J"})
        ),
        "index_has_a_size_beyond_64_bits": indexed(
            lambda document: document.update(metadata={"total_size": 10**60})
        ),
        "index_has_fields_that_act": indexed(lambda document: document.update({EVERYTHING: 1})),
    },
    "no command uses the other fields of an index",
    on="shards",
)

# --- an adapter's tokenizer on a base ------------------------------------------------------------


def with_tokenizer(folder: Path, **files: object) -> None:
    """Put a tokenizer with added tokens and further fields into the folder of the weights."""
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": 3}]}))
    for name, document in files.items():
        (folder / f"{name}.json").write_text(json.dumps(document))


hostile(
    everywhere(ACCEPT, merge=reject("V541"), to_lora=reject("V541")),
    {
        "a_token_has_five_thousand_digits": lambda folder: with_tokenizer(
            folder, tokenizer_config={"added_tokens_decoder": {"9" * 5_000: {}}}
        ),
        "a_token_has_digits_of_another_script": lambda folder: with_tokenizer(
            folder, tokenizer_config={"added_tokens_decoder": {"\u0669\u0669": {}}}
        ),
        "a_token_is_beyond_64_bits": lambda folder: with_tokenizer(
            folder, added_tokens={"\x1b[2J": 10**60}
        ),
    },
    "only commands with a base can count the rows",
)
hostile(
    HARMLESS,
    {
        "tokens_are_of_odd_types": lambda folder: with_tokenizer(
            folder, added_tokens={"a": -1, "b": True, "c": "x", "d": None, "e": [1]}
        ),
        "a_tokenizer_is_a_list": lambda folder: with_tokenizer(folder, tokenizer_config=[1]),
    },
    "only a whole number is a token",
)
hostile(
    everywhere(ACCEPT, merge=reject("V025"), to_lora=reject("V025")),
    {"a_tokenizer_nests_for_ever": beside("tokenizer.json", b"[" * 100_000)},
    "only commands with a base read the tokenizer",
)
