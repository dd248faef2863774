"""migrate repairs known old and damaged forms without loss; a second migration changes nothing."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from adapterdefects import LAYER, A, B, all_of, drawn, fields, renamed, stripped, tensors, without
from adapters import KEY, RANK, good_adapter
from bases import tiny_base
from commandline import Run
from defects import DEFECTS, Spoiler, edit_config
from folders import CONFIG_NAME, DATA, WEIGHTS, bytes_by_name, metadata, refusal, weights
from numpy.typing import NDArray
from safetensors.numpy import load_file

from vera_convert.adapter.folder import adapters_below
from vera_convert.adapter.opening import open_adapter
from vera_convert.base.facts import BaseOptions
from vera_convert.base.model import BaseModel, read_base
from vera_convert.conversion.migration import Mode, migrate, migrate_tree
from vera_convert.conversion.projections import ProjectionSource
from vera_convert.errors import CheckpointError, SurroundingsError, UsageError
from vera_convert.hub.lookup import HubAccess, Location

MODEL = "base_model.model."


def columns(stored: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {
        name: array[:, np.newaxis] if "lambda" in name else array for name, array in stored.items()
    }


def copies(stored: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    more = {
        name.replace("lambda_b", kind): stored[f"base_model.vera_{kind[-1]}"].copy()
        for name in stored
        if name.endswith("lambda_b")
        for kind in ("A", "B")
    }
    return {**stored, **more}


def shorn(name: str) -> str:
    return name.replace(MODEL, "").replace("base_model.", "")


PER_LAYER = all_of(tensors(copies), without(A, B))
DAMAGED: dict[str, tuple[Spoiler, str]] = {
    "lambdas are columns": (tensors(columns), "second dimension of 1 from 8 lambdas"),
    "the adapter's name is left": (
        renamed(lambda name: f"{name}.default"),
        "adapter's name default from names (10 tensors)",
    ),
    "the name of one element is left": (
        renamed(lambda name: f"{name}.vera_lambda_b" if "lambda_b" in name else name),
        "adapter's name vera_lambda_b from names (4 tensors)",
    ),
    "the name of A and B alone is left": (
        renamed(lambda name: name if "lambda" in name else f"{name}.xx"),
        "adapter's name xx from names (2 tensors)",
    ),
    "_orig_mod leads": (
        renamed(lambda name: f"_orig_mod.{name}"),
        "_orig_mod from names (10 tensors)",
    ),
    "_orig_mod is inside": (
        renamed(lambda name: name.replace("model.layers", "model._orig_mod.layers")),
        "_orig_mod from names (8 tensors)",
    ),
    "_orig_mod is everywhere": (
        renamed(lambda name: f"_orig_mod.{name.replace('.self_attn', '._orig_mod.self_attn')}"),
        "_orig_mod from names (10 tensors)",
    ),
    "the prefix is missing": (
        renamed(lambda name: name.replace(MODEL, "")),
        "added the prefix",
    ),
    "every prefix is missing": (renamed(shorn), "added the prefix base_model. to names (10"),
    "a wrapper is in names without a prefix": (
        renamed(lambda name: name.replace(MODEL, "_orig_mod.")),
        "added the prefix base_model. to names (8",
    ),
    "the names are those of PEFT's inner model": (
        renamed(lambda name: name.removeprefix("base_model.")),
        "added the prefix base_model. to names (10",
    ),
    "A and B lie at the top": (
        renamed(lambda name: name.replace("base_model.vera", "vera")),
        "added the prefix base_model. to names (2 tensors)",
    ),
    "projections are repeated": (tensors(copies), "stored A and B once instead of 8 times"),
    "projections lie with the layers": (PER_LAYER, "stored A and B once instead of 8 times"),
    "projections lie with the layers and the name": (
        all_of(PER_LAYER, renamed(lambda name: f"{name}.default")),
        "stored A and B once",
    ),
    "all at once": (
        all_of(
            tensors(columns),
            PER_LAYER,
            renamed(lambda name: f"_orig_mod.{shorn(name)}.default"),
        ),
        "stored A and B once",
    ),
}


@pytest.mark.parametrize(("spoil", "said"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_form_is_repaired_and_reported(spoil: Spoiler, said: str, tmp_path: Path) -> None:
    good = good_adapter(tmp_path / "good")
    folder = good_adapter(tmp_path / "adapter")
    spoil(folder)
    before = bytes_by_name(folder)
    done = migrate(folder, tmp_path / "out", to=Mode.ASIS)
    assert any(said in change for change in done.changes)
    assert bytes_by_name(tmp_path / "out") == bytes_by_name(good)
    assert bytes_by_name(folder) == before


@pytest.mark.parametrize("spoil", [spoil for spoil, _ in DAMAGED.values()], ids=DAMAGED)
@pytest.mark.parametrize("mode", Mode)
def test_a_second_migration_changes_nothing(spoil: Spoiler, mode: Mode, tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter", foo_config=None)
    spoil(folder)
    first = migrate(folder, tmp_path / "once", to=mode, peft_version=(0, 13))
    assert first.changes
    second = migrate(tmp_path / "once", tmp_path / "twice", to=mode, peft_version=(0, 13))
    assert second.changes == ()
    assert bytes_by_name(tmp_path / "twice") == bytes_by_name(tmp_path / "once")


def test_lambdas_keep_their_bytes_and_types(tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter")
    values = np.array([0.0, -0.0, 1e30, 1e-40, 3], np.float32).astype(ml_dtypes.bfloat16)
    name = f"{LAYER}v_proj.vera_lambda_b"
    odd = np.resize(values, 8)
    all_of(tensors(lambda stored: columns({**stored, name: odd})))(folder)
    migrate(folder, tmp_path / "out", to=Mode.ASIS)
    assert weights(tmp_path / "out")[name].tobytes() == odd.tobytes()
    assert weights(tmp_path / "out")[name].dtype == odd.dtype


UNMENDABLE: dict[str, tuple[Spoiler, str]] = {
    "half of the names lack the prefix": (
        renamed(lambda name: name.replace(f"{MODEL}model.layers.0", "model.layers.0")),
        "V228",
    ),
    "two adapters' names are left": (
        renamed(lambda name: f"{name}.{'a' if '.0.' in name else 'b'}"),
        "V227",
    ),
    "two names become one": (
        tensors(lambda stored: {**stored, f"_orig_mod.{A}": stored[A].copy()}),
        "V224",
    ),
    "a layer's projections differ": (
        tensors(lambda stored: {**stored, f"{LAYER}q_proj.vera_A": stored[A] + np.float32(1)}),
        "V214",
    ),
    "projections of two layers differ": (
        all_of(
            PER_LAYER,
            tensors(lambda s: {n: a * np.float32(2 if "1" in n else 1) for n, a in s.items()}),
        ),
        "V214",
    ),
    "a copy is of another type": (
        tensors(lambda s: {**s, f"{LAYER}q_proj.vera_A": s[A].astype(np.float64)}),
        "V214",
    ),
    "a lambda is a matrix": (
        tensors(lambda stored: {**stored, f"{LAYER}q_proj.vera_lambda_b": np.ones((16, 2), "f4")}),
        "V203",
    ),
    "a lambda is a row": (
        tensors(lambda stored: {**stored, f"{LAYER}q_proj.vera_lambda_b": np.ones((1, 16), "f4")}),
        "V203",
    ),
    "projections are promised": (without(A, B), "V211"),
    "only B is there": (without(A), "V208"),
    "LoRA tensors are there": (
        tensors(lambda stored: {**stored, f"{LAYER}q_proj.lora_A.weight": stored[A].copy()}),
        "V220",
    ),
}


@pytest.mark.parametrize(("spoil", "code"), UNMENDABLE.values(), ids=UNMENDABLE)
@pytest.mark.parametrize("mode", Mode)
def test_an_adapter_that_cannot_be_repaired_is_refused(
    spoil: Spoiler, code: str, mode: Mode, tmp_path: Path
) -> None:
    folder = good_adapter(tmp_path / "adapter")
    spoil(folder)
    with pytest.raises(CheckpointError) as caught:
        migrate(folder, tmp_path / "out", to=mode)
    assert {finding.code for finding in caught.value.findings} == {code}
    assert not (tmp_path / "out").exists()


def test_the_refusal_of_mixed_names_shows_both_groups(tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter")
    renamed(lambda name: name.replace(f"{MODEL}model.layers.0", "model.layers.0"))(folder)
    with pytest.raises(CheckpointError, match=r"V228 model\.layers\.0\.") as caught:
        migrate(folder, tmp_path / "out", to=Mode.ASIS)
    assert f'4 names of vectors begin with "{MODEL}", such as {MODEL}model.layers.1.' in str(
        caught.value
    )
    assert "4 names of vectors begin with the path of the layer" in str(caught.value)


def test_an_adapter_with_names_of_two_layouts_fits_no_base(tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter")
    renamed(lambda name: name.replace("model.model.layers.0", "model.language_model.layers.0"))(
        folder
    )
    base = BaseOptions(str(tiny_base(tmp_path / "base")))
    with pytest.raises(CheckpointError, match=r"V520 .* 2 of 4 layers"):
        migrate(folder, tmp_path / "out", to=Mode.STRIPPED, base=base)


# --- the modes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["embedded", "stripped"])
@pytest.mark.parametrize("mode", Mode)
def test_every_mode_is_reached_from_every_other(start: str, mode: Mode, tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter")
    whole = bytes_by_name(folder)
    if start == "stripped":
        stripped(folder)
    bare = bytes_by_name(folder)
    base = BaseOptions(str(tiny_base(tmp_path / "base")))
    done = migrate(folder, tmp_path / "out", to=mode, base=base)
    assert done.embedded is (mode is Mode.EMBEDDED or (mode is Mode.ASIS and start == "embedded"))
    if mode is Mode.EMBEDDED:
        assert bytes_by_name(tmp_path / "out") == whole
    elif mode is Mode.ASIS:
        assert bytes_by_name(tmp_path / "out") == bare
    else:
        assert weights(tmp_path / "out").keys() == whole_names(whole) - {A, B}
    assert done.findings == ()


def whole_names(files: dict[str, bytes]) -> set[str]:
    header = files[WEIGHTS][8 : 8 + int.from_bytes(files[WEIGHTS][:8], "little")]
    return {*json.loads(header)} - {"__metadata__"}


@pytest.mark.parametrize(
    ("case", "base"),
    [("0.11.0/llama_bf16_proj", "llama-bf16"), ("0.12.0/gpt2_fp32_proj", "gpt2-fp32")],
)
def test_an_old_adapter_of_peft_can_be_stripped_and_embedded_again(
    case: str, base: str, tmp_path: Path
) -> None:
    folder, options = (
        DATA / "fixtures" / case,
        BaseOptions(str(DATA / "fixtures" / "bases" / base)),
    )
    migrate(folder, tmp_path / "a", to=Mode.STRIPPED, base=options)
    migrate(tmp_path / "a", tmp_path / "b", to=Mode.EMBEDDED, base=options)
    assert bytes_by_name(tmp_path / "b") == bytes_by_name(folder)


LARGER = drawn(width=24, height=20)


@pytest.mark.parametrize("mode", [Mode.ASIS, Mode.EMBEDDED])
def test_larger_projections_are_cut_to_the_base(mode: Mode, tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter")
    LARGER(folder)
    stored = weights(folder)
    base = BaseOptions(str(tiny_base(tmp_path / "base")))
    done = migrate(folder, tmp_path / "out", to=mode, base=base)
    assert done.changes == ("cut A from [4, 24] to [4, 16] and B from [20, 4] to [16, 4]",)
    assert np.array_equal(weights(tmp_path / "out")[A], stored[A][:, :16])
    assert np.array_equal(weights(tmp_path / "out")[B], stored[B][:16])
    again = migrate(tmp_path / "out", tmp_path / "again", to=mode, base=base)
    assert again.changes == ()
    assert bytes_by_name(tmp_path / "again") == bytes_by_name(tmp_path / "out")


def test_larger_projections_are_not_cut_without_a_base(tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter")
    LARGER(folder)
    assert migrate(folder, tmp_path / "out", to=Mode.ASIS).changes == ()
    assert refusal(lambda: migrate(folder, tmp_path / "no", to=Mode.STRIPPED)) == "V405"


def test_cut_projections_are_stripped_only_with_accept_change(tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter")
    LARGER(folder)
    base = BaseOptions(str(tiny_base(tmp_path / "base")))
    assert refusal(lambda: migrate(folder, tmp_path / "no", to=Mode.STRIPPED, base=base)) == "V403"
    done = migrate(folder, tmp_path / "a", to=Mode.STRIPPED, base=base, accept_change=True)
    assert [change.split()[0] for change in done.changes] == ["cut", "dropped", "accepted:"]
    migrate(tmp_path / "a", tmp_path / "b", to=Mode.EMBEDDED)
    migrate(folder, tmp_path / "c", to=Mode.EMBEDDED, base=base)
    assert bytes_by_name(tmp_path / "b") == bytes_by_name(tmp_path / "c")


def test_smaller_projections_are_reported_and_not_changed(tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter", target_modules=["q_proj", "v_proj", "down_proj"])
    base = BaseOptions(str(tiny_base(tmp_path / "base")))
    done = migrate(folder, tmp_path / "out", to=Mode.ASIS, base=base)
    assert done.changes == ()
    assert {finding.code for finding in done.findings} == {"V411", "V416"}


def test_projections_that_are_no_draw_are_cut(tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter")
    random = np.random.default_rng(0)
    pair = {A: random.random((RANK, 20), np.float32), B: random.random((16, RANK), np.float32)}
    tensors(lambda stored: {**stored, **pair})(folder)
    base = BaseOptions(str(tiny_base(tmp_path / "base")))
    migrate(folder, tmp_path / "out", to=Mode.EMBEDDED, base=base)
    assert weights(tmp_path / "out")[A].shape == (RANK, 16)


@pytest.mark.parametrize("projections", [ProjectionSource.FILE, ProjectionSource.KEY])
def test_an_option_chooses_between_stored_and_regenerated_projections(
    projections: ProjectionSource, tmp_path: Path
) -> None:
    folder = good_adapter(tmp_path / "adapter", save_projection=False)
    good = weights(folder)
    drawn(key=KEY + 1)(folder)
    base = BaseOptions(str(tiny_base(tmp_path / "base")))
    assert refusal(lambda: migrate(folder, tmp_path / "no", to=Mode.EMBEDDED, base=base)) == "V406"
    migrate(folder, tmp_path / "out", to=Mode.EMBEDDED, base=base, projections=projections)
    expected = good if projections is ProjectionSource.KEY else weights(folder)
    assert np.array_equal(weights(tmp_path / "out")[A], expected[A])


# --- old readers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "removed"),
    [((0, 11), True), ((0, 13), True), ((0, 13, 2), True), ((0, 14), False), ((0, 21), False)],
)
def test_a_config_is_made_readable_for_an_old_peft(
    version: tuple[int, ...], tmp_path: Path, *, removed: bool
) -> None:
    folder = good_adapter(tmp_path / "adapter", foo_config={"a": [1]}, bar=3)
    text = (folder / CONFIG_NAME).read_bytes()
    done = migrate(folder, tmp_path / "out", to=Mode.ASIS, peft_version=version)
    after = json.loads((tmp_path / "out" / CONFIG_NAME).read_bytes())
    gone = {"foo_config", "bar", "peft_version"} if removed else set()
    assert after == {key: value for key, value in json.loads(text).items() if key not in gone}
    if removed:
        assert done.changes == (
            "removed config fields that old PEFT refuses: bar, foo_config, peft_version",
        )
    else:
        assert (tmp_path / "out" / CONFIG_NAME).read_bytes() == text


def test_other_lines_of_the_config_are_not_changed(tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter")
    edit_config(folder, lambda old: old.replace(b"  ", b"\t").replace(b"\n", b"\r\n"))
    text = (folder / CONFIG_NAME).read_bytes()
    migrate(folder, tmp_path / "out", to=Mode.ASIS, peft_version=(0, 13))
    expected = text.replace(b'\t"peft_version": "0.21.2",\r\n', b"")
    assert expected != text
    assert (tmp_path / "out" / CONFIG_NAME).read_bytes() == expected


# --- a tree --------------------------------------------------------------------------------------


def write_tree(tree: Path) -> Path:
    """Write a tree of a trainer's checkpoints: good, damaged and bad adapters, and other files."""
    good_adapter(tree / "run/checkpoint-100")
    good_adapter(tree / "run/checkpoint-200", stripped=True)
    renamed(lambda name: f"_orig_mod.{name}")(good_adapter(tree / "run/checkpoint-300"))
    good_adapter(tree / "run/checkpoint-400", r="4")
    without(A)(good_adapter(tree / "run/checkpoint-500"))
    good_adapter(tree / "zwölf\u202e")
    (tree / "logs").mkdir()
    (tree / "logs/events.txt").write_text("none of an adapter")
    (tree / "run/checkpoint-100/README.md").write_text("carried")
    (tree / "run/checkpoint-100/optimizer.pt").write_bytes(b"left out")
    return tree


def test_good_adapters_of_a_tree_are_migrated_and_bad_adapters_reported(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree")
    before = bytes_by_name(tree)
    result = migrate_tree(tree, tmp_path / "out", to=Mode.STRIPPED)
    assert [*result.done] == [
        "run/checkpoint-100",
        "run/checkpoint-200",
        "run/checkpoint-300",
        "zwölf\u202e",
    ]
    assert {name: error.status for name, error in result.failed.items()} == {
        "run/checkpoint-400": 1,
        "run/checkpoint-500": 1,
    }
    written = bytes_by_name(tmp_path / "out")
    assert {str(Path(name).parent) for name in written} == {*result.done}
    assert written["run/checkpoint-100/README.md"] == b"carried"
    assert "run/checkpoint-100/optimizer.pt" not in written
    assert result.done["run/checkpoint-100"].side_files.left_out == ("optimizer.pt",)
    for name in result.done:
        with open_adapter(tmp_path / "out" / name) as adapter:
            assert adapter.projections is None
    assert bytes_by_name(tree) == before


def test_a_second_migration_of_a_tree_changes_nothing(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree")
    migrate_tree(tree, tmp_path / "once", to=Mode.STRIPPED)
    result = migrate_tree(tmp_path / "once", tmp_path / "twice", to=Mode.STRIPPED)
    assert all(done.changes == () for done in result.done.values())
    assert bytes_by_name(tmp_path / "twice") == bytes_by_name(tmp_path / "once")


@pytest.mark.parametrize("bad", [".", "one", "one/nested"])
def test_an_adapter_inside_an_adapter_is_migrated_separately(bad: str, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    names = [".", "one", "one/nested", "two"]
    for name in names:
        good_adapter(tmp_path / "made")
        (tree / name).mkdir(parents=True, exist_ok=True)
        for path in (tmp_path / "made").iterdir():
            path.rename(tree / name / path.name)
        (tmp_path / "made").rmdir()
    fields({"r": 0})(tree / bad)
    result = migrate_tree(tree, tmp_path / "out", to=Mode.ASIS)
    assert [*result.failed] == [bad]
    assert [*result.done] == [name for name in names if name != bad]
    kept = {
        name: data for name, data in bytes_by_name(tree).items() if str(Path(name).parent) != bad
    }
    assert bytes_by_name(tmp_path / "out") == kept


def test_a_tree_without_good_adapters_leaves_no_output(tmp_path: Path) -> None:
    good_adapter(tmp_path / "tree" / "one", r=0)
    result = migrate_tree(tmp_path / "tree", tmp_path / "out", to=Mode.ASIS)
    assert (result.done, [*result.failed]) == ({}, ["one"])
    assert [path.name for path in tmp_path.iterdir()] == ["tree"]


def test_a_tree_without_adapters_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    for tree in ("tree", "gone"):
        with pytest.raises(SurroundingsError):
            migrate_tree(tmp_path / tree, tmp_path / "out", to=Mode.ASIS)
    assert [path.name for path in tmp_path.iterdir()] == ["tree"]


@pytest.mark.skipif(os.name != "posix", reason="links need rights on Windows")
def test_links_are_not_followed_out_of_the_tree_nor_in_circles(tmp_path: Path) -> None:
    good_adapter(tmp_path / "tree" / "one")
    outside = good_adapter(tmp_path / "outside")
    (tmp_path / "tree" / "linked").symlink_to(outside, target_is_directory=True)
    (tmp_path / "tree" / "round").symlink_to(tmp_path / "tree", target_is_directory=True)
    (tmp_path / "tree" / "one" / "round").symlink_to(tmp_path / "tree", target_is_directory=True)
    (tmp_path / "tree" / "one" / "secret").symlink_to(outside / CONFIG_NAME)
    (tmp_path / "tree" / "one" / "self").symlink_to("self")
    (tmp_path / "tree" / "one" / "gone").symlink_to("nowhere")
    (tmp_path / "tree" / "two").mkdir()
    for name in (CONFIG_NAME, WEIGHTS):
        (tmp_path / "tree" / "two" / name).symlink_to(outside / name)
    result = migrate_tree(tmp_path / "tree", tmp_path / "out", to=Mode.ASIS)
    assert [*result.done] == ["one"]
    assert result.done["one"].side_files.outside == ("gone", "round", "secret", "self")
    assert [*result.failed] == ["two"]
    assert sorted(bytes_by_name(tmp_path / "out")) == [f"one/{CONFIG_NAME}", f"one/{WEIGHTS}"]


def test_hidden_folders_are_skipped(tmp_path: Path) -> None:
    good_adapter(tmp_path / "tree" / ".cache" / "one")
    good_adapter(tmp_path / "tree" / "one")
    assert [*adapters_below(tmp_path / "tree")] == ["one"]


def test_a_tree_replaces_only_a_tree(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree")
    out = tmp_path / "out"
    migrate_tree(tree, out, to=Mode.ASIS)
    with pytest.raises(UsageError, match="exists"):
        migrate_tree(tree, out, to=Mode.ASIS)
    migrate_tree(tree, out, to=Mode.STRIPPED, force=True)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UsageError):
        migrate_tree(tree, out, to=Mode.STRIPPED, force=True)
    assert (out / "notes.txt").read_text() == "mine"


def test_out_and_inputs_of_a_tree_do_not_overlap(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree")
    base = tiny_base(tmp_path / "base")
    for out in (tree, tree / "out", tree / "run", tmp_path, base / "out", base):
        with pytest.raises(UsageError):
            migrate_tree(tree, out, to=Mode.ASIS, base=BaseOptions(str(base)), force=True)


def test_a_wrong_base_is_reported_once(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree")
    with pytest.raises(SurroundingsError, match="gone"):
        migrate_tree(tree, tmp_path / "out", to=Mode.ASIS, base=BaseOptions("./gone"))


def test_a_defective_adapter_does_not_stop_the_others_of_a_tree(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    good_adapter(tree / "good")
    small = [
        case for case in DEFECTS if case.on == "adapter" and case.possible and case.code < "V3"
    ]
    slow = {"V003", "V025", "V026", "V028", "V034", "V053"}
    for number, case in enumerate(case for case in small if case.code not in slow):
        case.spoil(good_adapter(tree / f"bad{number}"))
    result = migrate_tree(tree, tmp_path / "out", to=Mode.ASIS)
    assert "good" in result.done
    assert len(result.failed) > 100
    assert all(isinstance(error, CheckpointError) for error in result.failed.values())
    assert load_file(tmp_path / "out/good" / WEIGHTS).keys() == weights(tree / "good").keys()
    assert metadata(tmp_path / "out/good") == {"format": "pt"}


def test_the_damage_of_peft_0_12_is_refused(tmp_path: Path) -> None:
    head = f"{MODEL}classifier"
    more = {
        f"{head}.modules_to_save.vera_lambda_b": np.ones(4, np.float32),
        f"{head}.original_module.vera_lambda_b": np.ones(4, np.float32),
        f"{head}.base_layer.weight": np.ones((4, 16), np.float32),
    }
    folder = good_adapter(tmp_path / "adapter", tensors=more, task_type="SEQ_CLS")
    assert refusal(lambda: migrate(folder, tmp_path / "out", to=Mode.ASIS)) == "V220"


def test_progress_of_a_failing_disk_stops_the_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = write_tree(tmp_path / "tree")

    def full(*_: Any, **__: Any) -> Callable[..., Any]:
        raise SurroundingsError("the disk is full.")

    monkeypatch.setattr("vera_convert.conversion.migration.write_adapter", full)
    with pytest.raises(SurroundingsError, match="disk is full"):
        migrate_tree(tree, tmp_path / "out", to=Mode.ASIS)
    assert [path.name for path in tmp_path.iterdir()] == ["tree"]


def test_files_of_a_tree_outside_of_adapters_are_reported(tmp_path: Path) -> None:
    good_adapter(tmp_path / "tree" / "one")
    (tmp_path / "tree" / "notes.txt").write_text("mine")
    (tmp_path / "tree" / "link").symlink_to(tmp_path / "tree" / "one")
    result = migrate_tree(tmp_path / "tree", tmp_path / "out", to=Mode.ASIS)
    assert result.outside == ("link", "notes.txt")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["one"]


def test_too_deep_folders_are_refused(tmp_path: Path) -> None:
    good_adapter(tmp_path / "tree" / "one")
    deep = Path(tmp_path, "tree", *["d"] * 120)
    deep.mkdir(parents=True)
    result = migrate_tree(tmp_path / "tree", tmp_path / "out", to=Mode.ASIS)
    assert [*result.done] == ["one"]
    (error,) = result.failed.values()
    assert "more than 100 folders deep" in str(error)


def test_a_too_deep_adapter_is_reported_with_the_limit(tmp_path: Path, run: Run) -> None:
    good_adapter(tmp_path / "tree" / "one")
    good_adapter(Path(tmp_path, "tree", *["d"] * 200, "two"))
    ended = run("migrate", "--recursive", tmp_path / "tree", tmp_path / "out", "--to", "asis")
    assert ended.status == 3
    assert "more than 100 folders deep" in ended.out
    assert "no defect of it" not in ended.out


def test_a_folder_that_cannot_be_listed_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good_adapter(tmp_path / "tree" / "one")
    good_adapter(tmp_path / "tree" / "shut")
    real = os.scandir

    def scandir(folder: Path) -> Any:
        if Path(folder).name == "shut":
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(folder)

    monkeypatch.setattr("vera_convert.adapter.folder.os.scandir", scandir)
    result = migrate_tree(tmp_path / "tree", tmp_path / "out", to=Mode.ASIS)
    assert [*result.done] == ["one"]
    assert [*result.failed] == ["shut"]
    assert "Permission denied" in str(result.failed["shut"])


def test_a_tree_reads_its_base_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two", "three"):
        good_adapter(tmp_path / "tree" / name)
    read: list[str] = []

    def counted(location: Location, access: HubAccess, **more: Any) -> BaseModel:
        read.append(location.label)
        return read_base(location, access, **more)

    monkeypatch.setattr("vera_convert.base.bases.read_base", counted)
    base = tiny_base(tmp_path / "base")
    result = migrate_tree(tmp_path / "tree", tmp_path / "out", to=Mode.STRIPPED, base=str(base))
    assert len(result.done) == 3
    assert len(read) == 1
