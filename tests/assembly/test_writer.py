"""Several threads write files with the same bytes, the same numbers, and the same error."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from terms import computed_in_blocks, term

from vera_convert.assembly import addends, writer
from vera_convert.assembly.addends import NotFiniteError, Numbers, Sum
from vera_convert.assembly.blocks import CPU, product_sha256
from vera_convert.assembly.copying import write_at
from vera_convert.assembly.input_files import InputFile
from vera_convert.assembly.writer import Assembler, Computed, CopiedRange, Finished, NewFile
from vera_convert.delta import Array
from vera_convert.errors import SurroundingsError

FLOAT = np.dtype(np.float32)
OUTPUTS, INPUTS = 40, 12


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(addends, "BLOCK_VALUES", 64)
    monkeypatch.setattr(writer, "COPY_BLOCK", 100)
    before = threading.active_count()
    yield
    assert threading.active_count() == before, "no thread outlives a run"


@pytest.fixture
def stored() -> NDArray[Any]:
    return np.random.default_rng(3).normal(size=(OUTPUTS, INPUTS)).astype(FLOAT)


@pytest.fixture
def source(tmp_path: Path, stored: NDArray[Any]) -> InputFile:
    (tmp_path / "source").write_bytes(b"x" * 999 + stored.tobytes())
    return InputFile.look(tmp_path / "source", within=tmp_path)


def summed(name: str = "w") -> Sum:
    return Sum(name, (OUTPUTS, INPUTS), FLOAT, FLOAT, terms=(term(OUTPUTS, INPUTS, seed=1),))


def files(source: InputFile) -> list[NewFile]:
    size = OUTPUTS * INPUTS * 4
    return [
        NewFile("config.json", b"{}"),
        NewFile("empty"),
        NewFile(
            "folder/weights",
            b"head",
            (
                CopiedRange(source, 7, 500, 4),
                Computed(source, 999, summed(), 504),
                CopiedRange(source, 0, 999, 504 + size),
                Computed(source, 999, Sum("cast", (480, 1), FLOAT, np.dtype("f2")), 1503 + size),
            ),
        ),
    ]


def assembled(
    source: InputFile, folder: Path, *, jobs: int = 2, **options: Any
) -> tuple[dict[str, bytes], dict[str, Finished]]:
    check = options.pop("check", False)
    with Assembler(files(source), jobs=jobs, check=check) as assembler:
        folder.mkdir()
        results = assembler.assemble(folder, **options)
    found = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    return found, results


def test_parts_are_written_to_their_positions(
    source: InputFile, stored: NDArray[Any], tmp_path: Path
) -> None:
    found, results = assembled(source, tmp_path / "out")
    wanted, numbers = computed_in_blocks(summed(), stored)
    expected = b"head" + b"x" * 500 + wanted.tobytes() + b"x" * 999
    assert found["folder/weights"] == expected + stored.astype("f2").tobytes()
    assert found["config.json"] == b"{}"
    assert found["empty"] == b""
    assert results["folder/weights"].numbers == {"w": numbers}
    assert results["config.json"] == Finished({}, None)


@pytest.mark.parametrize("check", [False, True])
def test_the_result_does_not_depend_on_the_number_of_threads(
    source: InputFile, tmp_path: Path, check: bool
) -> None:
    first, *others = (
        assembled(source, tmp_path / str(jobs), jobs=jobs, check=check, hashes=True)
        for jobs in (1, 2, 5)
    )
    assert others == [first, first]
    assert first[1]["folder/weights"].sha256 == sha256(first[0]["folder/weights"]).hexdigest()


def test_a_checked_run_reads_all_values(source: InputFile, tmp_path: Path) -> None:
    _, results = assembled(source, tmp_path / "out", check=True)
    assert results["folder/weights"].numbers["w"].values == OUTPUTS * INPUTS


def test_progress_counts_every_byte(source: InputFile, tmp_path: Path) -> None:
    told: list[int] = []
    found, _ = assembled(source, tmp_path / "out", progress=told.append)
    assert told == sorted(told)
    assert told[-1] == sum(map(len, found.values()))


def test_finished_files_are_not_written_again(source: InputFile, tmp_path: Path) -> None:
    told: list[int] = []
    finished: dict[str, Finished] = {}
    found, results = assembled(
        source,
        tmp_path / "out",
        finished=["folder/weights"],
        progress=told.append,
        on_finished=finished.__setitem__,
    )
    assert found.keys() == {"config.json", "empty"}
    assert finished == results
    assert told[-1] == sum(file.size for file in files(source))


@pytest.mark.parametrize("jobs", [1, 4])
def test_the_first_value_that_is_not_finite_is_reported(
    tmp_path: Path, stored: NDArray[Any], jobs: int
) -> None:
    stored[30, 2], stored[39, 0] = np.inf, np.nan
    (tmp_path / "source").write_bytes(stored.tobytes())
    source = InputFile.look(tmp_path / "source", within=tmp_path)
    pieces = (Computed(source, 0, summed("bad"), 0),)
    (tmp_path / "out").mkdir()
    with (
        Assembler([NewFile("weights", pieces=pieces)], jobs=jobs) as assembler,
        pytest.raises(NotFiniteError) as caught,
    ):
        assembler.assemble(tmp_path / "out")
    assert (caught.value.tensor.name, caught.value.index) == ("bad", (30, 2))


def test_an_input_that_changes_stops_the_run(source: InputFile, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"other")
    with pytest.raises(SurroundingsError, match="changed"):
        assembled(source, tmp_path / "out")


def test_an_input_that_ends_early_stops_the_run(source: InputFile, tmp_path: Path) -> None:
    short = InputFile(source.path, source.within, source.identity)
    pieces = (CopiedRange(short, 900, source.size, 0),)
    (tmp_path / "out").mkdir()
    with (
        Assembler([NewFile("weights", pieces=pieces)], jobs=1) as assembler,
        pytest.raises((SurroundingsError, ValueError)),
    ):
        assembler.assemble(tmp_path / "out")


def test_bytes_that_read_back_differently_stop_a_checked_run(
    source: InputFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(target: int, at: int, data: memoryview) -> None:
        write_at(target, at, data if at < 700 else memoryview(bytes(len(data))))

    monkeypatch.setattr("vera_convert.assembly.writer.write_at", spoilt)
    assembled(source, tmp_path / "unchecked")
    with pytest.raises(SurroundingsError, match="reads back with other bytes"):
        assembled(source, tmp_path / "out", check=True)


def test_a_first_product_is_run_before_anything_is_written(
    source: InputFile,
) -> None:
    def fail() -> str:
        raise MemoryError

    broken = replace(CPU, product=fail)
    with pytest.raises(MemoryError):
        Assembler(files(source), jobs=2, device=broken)


def test_products_show_that_a_blas_sums_in_another_precision() -> None:
    def in_float64(left: Array, right: Array) -> Array:
        return (left.astype(np.float64) @ right).astype(np.float32)

    assert CPU.product() == product_sha256() != product_sha256(in_float64)


def test_numbers_are_added_in_the_order_of_the_blocks() -> None:
    parts = [Numbers(1, 0, 0.1 * n, 0.0, 1e16 if n == 2 else 1.0) for n in range(4)]
    total = writer.in_order({n: parts[n] for n in (2, 0, 3, 1)})
    assert total == parts[0] + parts[1] + parts[2] + parts[3]
