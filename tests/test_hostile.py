"""Hostile files do no harm: every command ends in time, with little memory, and as expected."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from adapters import good_adapter
from commandline import Ended, Run
from folders import WEIGHTS
from hostile import ACCEPT, ACTING, CASES, COMMANDS, SURROUNDINGS, Case, Outcome
from limits import LIMIT_SECONDS, in_memory, in_time
from merges import filled_base

from vera_convert.files.reading import LocalFile

Arguments = list[object]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Write a good adapter and good bases; the tests spoil copies."""
    folder = tmp_path_factory.mktemp("originals")
    return {
        "adapter": good_adapter(folder / "adapter", revision="main"),
        "base": filled_base(folder / "base"),
        "shards": filled_base(folder / "shards", shards=3),
    }


def calls(adapter: Path, out: Path, base: Path, *, with_base: bool) -> dict[str, Arguments]:
    """Return the call of every command; with `with_base`, every call names the base."""
    given = ["--base", base]
    return {
        "validate": ["validate", adapter, *(given if with_base else [])],
        "info": ["info", adapter, *(given if with_base else [])],
        "strip": ["strip", adapter, out, *given],
        "embed": ["embed", adapter, out, *given],
        "migrate": ["migrate", adapter, out, "--to", "asis", *(given if with_base else [])],
        "merge": ["merge", adapter, out, *given, "--jobs", "1"],
        "to-lora": ["to-lora", adapter, out, *given],
    }


def state_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return kind, size, times and identity of every path below a folder, without following
    links.
    """
    found: dict[str, tuple[int, ...]] = {}
    folders = [str(folder)]
    while folders:
        for entry in os.scandir(folders.pop()):
            status = entry.stat(follow_symlinks=False)
            times = (status.st_mtime_ns, status.st_ctime_ns)
            found[entry.path] = (status.st_mode, status.st_size, status.st_ino, *times)
            folders += [entry.path] if entry.is_dir(follow_symlinks=False) else []
    return found


TOLD = re.compile(r"^(?:  )?(?:error|warning|note)(?::.*?)? +(V\d\d\d)\b", re.MULTILINE)
"""The start of a finding in text: after two spaces in a report, otherwise at the start of a
line.
"""


def assert_harmless(ended: Ended) -> None:
    """Check that no printed text controls the terminal or hides from a reader."""
    for text in (ended.out, ended.err):
        assert "Traceback" not in text
        assert all(line.replace("\t", "").isprintable() for line in text.split("\n"))


def assert_ends(command: str, outcome: Outcome, ended: Ended) -> None:
    """Check that status and code are the expected ones, and that a line gives the reason."""
    said = ended.out if command == "validate" else ended.err
    assert ended.status == outcome.status, said
    codes = TOLD.findall(said)
    errors = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    if not outcome.status:
        assert outcome.code in codes if outcome.code else not codes, said
        assert not errors
    elif command == "validate" and outcome.code:
        assert outcome.code in codes
    elif command == "validate":
        assert errors or "not read" in said
    else:
        (line,) = errors
        assert line.startswith(f"error: {outcome.code}")
        assert ended.out == ""


def built(case: Case, originals: Mapping[str, Path], folder: Path) -> tuple[Path, Path]:
    """Return an adapter and a base, one of them spoiled; skip cases that this system cannot
    make.
    """
    if case.posix and os.name != "posix":
        pytest.skip("pipes, sockets and links of POSIX")
    adapter = Path(shutil.copytree(originals["adapter"], folder / "adapter"))
    base = originals["base"]
    if case.on != "adapter":
        base = Path(shutil.copytree(originals[case.on], folder / "base"))
    try:
        case.build(base if case.on != "adapter" else adapter)
    except PermissionError:
        pytest.skip("nobody but root makes a device")
    return adapter, base


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_command_ends_as_expected(
    case: Case,
    run: Run,
    originals: Mapping[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # other tests check durable writing
    adapter, base = built(case, originals, tmp_path)
    before = state_of(tmp_path)
    out = tmp_path / "out"
    wanted: Mapping[str, Arguments] = calls(adapter, out, base, with_base=case.on != "adapter")
    for command in COMMANDS:
        if command not in case.outcomes:
            continue
        with in_time(), in_memory():
            ended = run(*wanted[command])
        assert_harmless(ended)
        assert_ends(command, case.outcomes[command], ended)
        if out.exists():
            assert ended.status == 0
            shutil.rmtree(out)
        assert state_of(tmp_path) == before


def test_there_are_hundreds_of_cases_over_all_families() -> None:
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))
    assert sum(len(case.outcomes) for case in CASES) > 3_000
    codes = {outcome.code[:2] for case in CASES for outcome in case.outcomes.values()}
    assert codes >= {"V0", "V1", "V2", "V3", "V4", "V5"}
    assert {command for case in CASES for command in case.outcomes} == {*COMMANDS}


def test_every_outcome_written_by_hand_has_a_reason() -> None:
    for case in CASES:
        outcomes = {*case.outcomes.values()}
        derived = len(outcomes) == 1 and ACCEPT not in outcomes and SURROUNDINGS not in outcomes
        assert derived or case.why, case.name


LEFT_TO_OTHERS = ("V130", "V131", "V132")


def test_no_conversion_is_laxer_than_the_validator() -> None:
    """Patterns for targets are an exception: a conversion evaluates these only to size A and B."""
    for case in CASES:
        found = case.outcomes.get("validate", ACCEPT)
        if found.status != 1 or found.code in LEFT_TO_OTHERS:
            continue
        mended = {"migrate"} if case.outcomes.get("migrate") == ACCEPT else set()
        for command in {
            "strip",
            "embed",
            "migrate",
            "merge",
            "to-lora",
        } & case.outcomes.keys() - mended:
            assert case.outcomes[command].status, f"{command} of {case.name}"


# --- as real processes ---------------------------------------------------------------------------

SAMPLE = {
    "V001-config_is_a_pipe": "info",
    "V001-weights_are_a_pipe": "merge",
    "V001-weights_are_a_socket": "validate",
    "V002-weights_link_to_an_endless_device": "strip",
    "V003-config_claims_a_terabyte": "embed",
    "V011-weights_are_a_link_to_themselves": "migrate",
    "V025-config_nests_without_end": "merge",
    "V025-header_nests_lists": "validate",
    "V026-config_has_a_number_of_900000_digits": "strip",
    "V028-header_has_millions_of_sizes": "info",
    "V031-weights_are_a_renamed_pickle": "merge",
    "V034-header_really_has_more_than_100_megabytes": "embed",
    "V052-tensor_claims_an_exabyte": "validate",
    "V053-a_terabyte_is_appended": "merge",
    "V301-a_lambda_is_no_number": "merge",
    "config_links_to_a_full_device": "validate",
    "weights_link_to_what_this_process_holds": "merge",
    "a_module_lies_beside_it": "strip",
    "a_side_file_claims_more_than_any_disk": "migrate",
    "a_head_claims_a_terabyte": "merge",
    "rank_is_a_milliard": "embed",
    "fingerprint_claims_all_of_32_bits": "merge",
    "fingerprint_was_cut_from_a_disk_full": "embed",
    "ten_thousand_saved_modules_meet_as_many_heads": "strip",
    "pattern_nests_for_ever": "validate",
    "a_name_sets_the_title": "merge",
    "a_text_forges_a_line": "info",
    "base_config_nests_for_ever": "strip",
    "index_names_the_folder_above": "merge",
    "a_shard_is_a_pipe": "merge",
    "code_lies_in_the_base": "merge",
}
"""A command for each case that could escape the limits of a single process."""

MOST_ADDRESSES = 2 << 30
LIMITED = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, ({MOST_ADDRESSES},) * 2)
resource.setrlimit(resource.RLIMIT_CPU, ({LIMIT_SECONDS},) * 2)
from vera_convert.cli.app import main
main(sys.argv[1:])
"""


@dataclass(frozen=True, slots=True)
class Process:
    """The end of a command in a separate process, and the files before and after."""

    ended: Ended
    wrote: bool
    before: Mapping[str, tuple[int, ...]]
    after: Mapping[str, tuple[int, ...]]


def ran(arguments: Arguments, folder: Path) -> Process:
    """Run a command in a folder, with limits of time and memory."""
    before, out = state_of(folder), folder / "out"
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    wrote = out.exists()
    shutil.rmtree(out, ignore_errors=True)
    ended = Ended(done.returncode, done.stdout, done.stderr)
    return Process(ended, wrote, before, state_of(folder))


@pytest.fixture(scope="module")
def processes(
    originals: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mapping[str, Future[Process]]]:
    """Run all cases of `SAMPLE` at once, on all cores."""
    by_name, started = {case.name: case for case in CASES}, {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, command in SAMPLE.items():
            case, folder = by_name[name], tmp_path_factory.mktemp("process")
            adapter, base = built(case, originals, folder)
            given = calls(adapter, folder / "out", base, with_base=case.on != "adapter")
            started[name] = pool.submit(ran, given[command], folder)
        yield started


@pytest.mark.skipif(sys.platform != "linux", reason="limits of processes as Linux has them")
@pytest.mark.parametrize(("name", "command"), SAMPLE.items())
def test_a_separate_process_ends_in_the_same_way(
    name: str, command: str, processes: Mapping[str, Future[Process]]
) -> None:
    (case,) = (case for case in CASES if case.name == name)
    process = processes[name].result()
    assert_harmless(process.ended)
    assert_ends(command, case.outcomes[command], process.ended)
    assert process.wrote is (process.ended.status == 0 and command not in ("validate", "info"))
    assert process.after == process.before


# --- what no folder can hold ---------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_changes_while_it_is_read_is_no_fault_of_the_checkpoint(
    command: str,
    run: Run,
    originals: Mapping[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adapter = Path(shutil.copytree(originals["adapter"], tmp_path / "adapter"))
    real = LocalFile.read_into

    def read_and_change(self: LocalFile, offset: int, buffer: memoryview) -> None:
        real(self, offset, buffer)
        if self.place.endswith(WEIGHTS):
            with (adapter / WEIGHTS).open("ab") as file:
                file.write(b"more")

    monkeypatch.setattr(LocalFile, "read_into", read_and_change)
    ended = run(*calls(adapter, tmp_path / "out", originals["base"], with_base=False)[command])
    assert_harmless(ended)
    assert ended.status == 3
    assert "changed while it was read" in ended.out + ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("what", [what for what in ACTING if what != "has_a_nul"])
def test_the_name_of_a_folder_does_not_control_the_terminal(
    what: str, run: Run, originals: Mapping[str, Path], tmp_path: Path
) -> None:
    name = ACTING[what].replace("/", "").replace("\\", "")
    try:
        adapter = Path(shutil.copytree(originals["adapter"], tmp_path / name))
    except OSError:
        pytest.skip("this file system has no such names")
    for out in (tmp_path / "out", tmp_path / f"out{name}"):
        for command, arguments in calls(adapter, out, originals["base"], with_base=False).items():
            if command in ("validate", "info", "strip"):
                assert_harmless(run(*arguments))
                shutil.rmtree(out, ignore_errors=True)
    (adapter / WEIGHTS).write_bytes(b"")
    for command, arguments in calls(adapter, tmp_path / "x", adapter, with_base=True).items():
        ended = run(*arguments)
        assert_harmless(ended)
        assert ended.status == 1, command
