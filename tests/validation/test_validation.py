"""validate finds all defects at once, and reports no defect of a good adapter."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
    drawn,
    fields,
    fingerprint,
    opening,
    register,  # noqa: F401 -- fills DEFECTS
    stripped,
    without,
)
from adapters import HIDDEN, RANK, good_adapter
from bases import tiny_base
from defects import CONFIG, DEFECTS, WEIGHTS, Defect
from folders import bytes_by_name
from hub_server import HubServer

from vera_convert.base.facts import BaseOptions
from vera_convert.conversion.migration import Mode, migrate
from vera_convert.conversion.strip_embed import embed, strip
from vera_convert.draws.generator import Rounding, Variant
from vera_convert.errors import CheckpointError, SurroundingsError, UsageError
from vera_convert.hub.lookup import HubAccess
from vera_convert.merging.merge import merge
from vera_convert.rules import CATALOG, Severity
from vera_convert.validation.result import Checked, Validation
from vera_convert.validation.selection import Settings, read_settings
from vera_convert.validation.validate import validate

DATA = Path(__file__).parents[1] / "data"
FIXTURES = sorted(path.parent for path in (DATA / "fixtures").rglob(CONFIG))


def check(folder: Path, **options: Any) -> Checked:
    (checked,) = validate([folder], **options).adapters
    return checked


def codes(folder: Path, **options: Any) -> list[str]:
    checked = check(folder, **options)
    assert checked.failure is None
    return [finding.code for finding in checked.findings]


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return good_adapter(tmp_path / "adapter", revision="main")


# --- findings ------------------------------------------------------------------------------------


def test_a_good_adapter_has_no_findings(good: Path) -> None:
    before = bytes_by_name(good)
    checked = check(good)
    assert (checked.findings, checked.failure) == ((), None)
    assert checked.not_checked == ("the base: give --base MODEL to compare with a base.",)
    assert checked.embedded
    assert checked.draw is not None
    assert checked.draw.variant is Variant.FLOAT32_FUSED
    assert bytes_by_name(good) == before


def test_a_good_adapter_has_no_findings_on_its_base(good: Path, tmp_path: Path) -> None:
    checked = check(good, base=tiny_base(tmp_path / "base"))
    assert (checked.findings, checked.not_checked) == ((), ())
    assert checked.base == str(tmp_path / "base")


OPENED = [
    case
    for case in DEFECTS
    if case.on == "adapter"
    and case.possible
    and (not isinstance(case, AdapterDefect) or case.find is opening)
]


@pytest.mark.parametrize("case", OPENED, ids=lambda case: case.name)
def test_validate_finds_every_defect_that_a_command_refuses(good: Path, case: Defect) -> None:
    case.spoil(good)
    assert case.code in codes(good)


def test_defects_of_all_families_are_found_together(good: Path) -> None:
    all_of(
        fields({"d_initial": "0.1", "peft_version": 21, "foo": 1}),
        without(f"{Q_D}"),
        added({Q_B: np.full(16, np.nan, np.float32)}),
    )(good)
    (good / "adapter_model.bin").write_bytes(b"pickled")
    assert codes(good) == ["V013", "V103", "V103", "V110", "V202", "V301"]


def test_findings_come_in_the_order_of_the_catalog(good: Path) -> None:
    all_of(drawn(key=8), fields({"foo": 1, "base_model_name_or_path": None}))(good)
    found = codes(good)
    assert found == sorted(found) == ["V110", "V121", "V414"]


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_a_constant_matrix_is_an_error(good: Path, value: float) -> None:
    added({A: np.full((RANK, HIDDEN), value, np.float32)})(good)
    assert "V304" in codes(good)


def test_a_file_that_may_not_be_read_is_a_finding(
    good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def forbidden(path: Any, *args: Any, **options: Any) -> int:
        if str(path).endswith(WEIGHTS):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(os, "open", forbidden)
    checked = check(good)
    assert [finding.code for finding in checked.findings] == ["V006"]
    assert "Permission denied" in checked.findings[0].reason


def test_good_side_files_are_not_reported(good: Path) -> None:
    (good / "README.md").write_text("# card")
    (good / "runs").mkdir()
    (good / "runs" / "log.txt").write_text("log")
    assert codes(good) == []


@pytest.mark.parametrize(
    ("dropped", "said"),
    [
        (["0.self_attn.v_proj"], {"v_proj": "1 of 2"}),
        (["1.self_attn.q_proj"], {"q_proj": "1 of 2"}),
        (["0.self_attn.q_proj", "1.self_attn.v_proj"], {"q_proj": "1 of 2", "v_proj": "1 of 2"}),
        (["0.self_attn.q_proj", "1.self_attn.q_proj"], {}),
        (["1.self_attn.q_proj", "1.self_attn.v_proj"], {}),
        ([], {}),
    ],
    ids=str,
)
def test_a_target_in_only_some_layers_is_reported(
    tmp_path: Path, dropped: list[str], said: Mapping[str, str]
) -> None:
    gone = {
        f"base_model.model.model.layers.{module}.vera_lambda_{kind}": None
        for module in dropped
        for kind in "bd"
    }
    folder = good_adapter(tmp_path / "adapter", tensors=gone)
    found = check(folder, ignore=["V122", "V229", "V416"]).findings
    assert {finding.reason for finding in found} == {
        f"self_attn.{target} is adapted in {count} layers." for target, count in said.items()
    }
    assert {(finding.code, finding.severity) for finding in found} <= {("V226", Severity.NOTE)}
    base = tiny_base(tmp_path / "base", config={"model_type": "llama", "num_hidden_layers": 2})
    of_base = check(folder, ignore=["V122", "V416"], base=base).findings
    holes = {("V411", Severity.WARNING)} if len(dropped) else set()
    assert {(finding.code, finding.severity) for finding in of_base} == holes


def test_a_hybrid_model_with_all_layers_adapted_has_no_finding(tmp_path: Path) -> None:
    gone = {
        f"base_model.model.model.layers.1.self_attn.q_proj.vera_lambda_{kind}": None
        for kind in "bd"
    }
    folder = good_adapter(tmp_path / "adapter", tensors=gone)
    base = tiny_base(tmp_path / "base", tensors={"model.layers.1.self_attn.q_proj.weight": None})
    assert check(folder, base=base, ignore=["V122"]).findings == ()


@pytest.mark.parametrize("version", ["0.21.2", None])
def test_an_adapter_that_peft_stripped_has_no_warning(version: str | None, tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter", stripped=True, peft_version=version)
    strip(folder, tmp_path / "out")
    for each in (folder, tmp_path / "out"):
        result = validate([each], base=tiny_base(each / "base"), fail_on=Severity.WARNING)
        assert result.passed
        assert [f.severity for f in result.findings if f.code == "V410"] == [Severity.NOTE]


def test_an_adapter_of_an_unknown_trainer_is_a_warning(tmp_path: Path) -> None:
    folder = good_adapter(
        tmp_path / "adapter", stripped=True, peft_version=None, inference_mode=False
    )
    assert not validate([folder], fail_on=Severity.WARNING).passed


BIASES = {f"model.layers.{n}.self_attn.q_proj.bias": (16,) for n in range(2)}
OTHERS = {"model.layers.0.mlp.up_proj.bias": (24,)}


@pytest.mark.parametrize("version", ["0.20.0", "0.21.2"])
@pytest.mark.parametrize(
    ("bias", "tensors", "lost"),
    [
        ("none", BIASES, False),
        ("all", {}, False),
        ("all", OTHERS, True),
        ("vera_only", OTHERS, False),
        ("vera_only", BIASES, True),
        ("lora_only", BIASES, True),
        ("all", {"model.layers.0.self_attn.bias": (1, 1, 8, 8)}, False),
    ],
)
def test_declared_biases_that_are_not_stored_are_reported(
    bias: str, tensors: dict[str, Any], lost: bool, version: str, tmp_path: Path
) -> None:
    folder = good_adapter(tmp_path / "adapter", bias=bias, peft_version=version)
    base = tiny_base(tmp_path / "base", tensors=tensors)
    alone = [f.severity for f in check(folder, select=["V223"]).findings]
    found = [f.severity for f in check(folder, select=["V223"], base=base).findings]
    if bias == "none":
        assert alone == found == []
    elif version == "0.20.0":
        assert alone == found == [Severity.WARNING]
    else:
        assert alone == [Severity.NOTE]
        assert found == [Severity.NOTE] + [Severity.WARNING] * lost
    merged = merge(folder, tmp_path / "merged", base=base).findings
    assert [f.severity for f in merged if f.code == "V223"] == found


# --- what real PEFT wrote ------------------------------------------------------------------------


def _expected(folder: Path) -> set[str]:
    """Return the expected codes of a fixture, from its name and its config."""
    config = json.loads((folder / CONFIG).read_bytes())
    found = {"V122"}
    if not config["save_projection"]:
        return found | {"V410"}
    if "foreign" in folder.name:
        return found | {"V414"}
    return found | ({"V418"} if "bf16" in folder.name else set())


@pytest.mark.parametrize("folder", FIXTURES, ids=lambda f: f"{f.parent.name}-{f.name}")
def test_adapters_of_peft_have_no_errors(folder: Path) -> None:
    checked = check(folder)
    assert {finding.code for finding in checked.findings} == _expected(folder)
    assert all(finding.severity is not Severity.ERROR for finding in checked.findings)


def test_a_fixture_on_its_own_base_is_rounded_as_the_base_rounds() -> None:
    folder = next(folder for folder in FIXTURES if folder.name == "llama_bf16_proj")
    assert "V418" in codes(folder)
    assert "V418" not in codes(folder, base=BaseOptions(dtype="bfloat16"))
    found = check(folder, base=BaseOptions(dtype="float32")).findings
    assert "V414" in {finding.code for finding in found}


# --- A and B -------------------------------------------------------------------------------------


def test_the_fingerprint_of_a_stripped_adapter_is_proven_by_regenerating_a_and_b(
    good: Path,
) -> None:
    stripped(good)
    checked = check(good, deep=True)
    assert checked.findings == ()
    assert checked.draw is not None
    assert not checked.embedded


def test_a_wrong_hash_is_found_by_regenerating_a_and_b(
    good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fingerprint(sha256_A="0" * 64)(good)
    assert codes(good) == ["V409"]
    monkeypatch.setattr("vera_convert.adapter.fingerprint._SMALL", 0)
    checked = check(good)
    assert checked.findings == ()
    assert any("--deep" in text for text in checked.not_checked)
    assert codes(good, deep=True) == ["V409"]


@pytest.mark.parametrize("spoil", [drawn(rounding=Rounding.BF16), drawn()])
def test_the_rounding_is_compared_with_the_base(good: Path, tmp_path: Path, spoil: Any) -> None:
    spoil(good)
    of_16_bits = "V418" in codes(good)
    bases = {dtype: tiny_base(tmp_path / dtype, dtype=dtype) for dtype in ("bfloat16", "float32")}
    assert codes(good, base=bases["bfloat16"]) == ([] if of_16_bits else ["V414"])
    assert codes(good, base=bases["float32"]) == (["V414"] if of_16_bits else [])


def test_projections_that_no_layers_explain_have_other_dims(good: Path, tmp_path: Path) -> None:
    drawn(width=20)(good)
    wide = {f"model.layers.{n}.mlp.v_proj.weight": (40, 24) for n in range(2)}
    base = tiny_base(tmp_path / "base", tensors=wide)
    assert codes(good, base=base) == ["V411", "V416"]


def test_a_fingerprint_is_compared_with_the_base(good: Path, tmp_path: Path) -> None:
    drawn(width=20)(good)
    stripped(good)
    wide = {f"model.layers.{n}.mlp.v_proj.weight": (40, 24) for n in range(2)}
    assert "V408" in codes(good, base=tiny_base(tmp_path / "base", tensors=wide))


# --- the base ------------------------------------------------------------------------------------


def test_another_base_is_recognized_by_names_and_shapes(good: Path, tmp_path: Path) -> None:
    other = tiny_base(tmp_path / "other", tensors={"model.layers.1.self_attn.q_proj.weight": None})
    assert codes(good, base=other) == ["V520"]
    wider = {f"model.layers.{n}.self_attn.v_proj.weight": (16, 16) for n in range(2)}
    assert codes(good, base=tiny_base(tmp_path / "wider", tensors=wider)) == ["V522", "V522"]


def test_a_head_of_another_size_is_reported_with_both_sizes(good: Path, tmp_path: Path) -> None:
    fields({"modules_to_save": ["lm_head"]})(good)
    added({"base_model.model.lm_head.weight": np.zeros((40, 16), np.float32)})(good)
    (finding,) = check(good, base=tiny_base(tmp_path / "base")).findings
    assert finding.code == "V531"
    assert "40 by 16" in finding.reason
    assert "32 by 16" in finding.reason


def test_a_tokenizer_with_more_tokens_than_rows_is_reported(good: Path, tmp_path: Path) -> None:
    (good / "tokenizer.json").write_text('{"added_tokens": [{"id": 32}]}')
    (good / "added_tokens.json").write_text('{"<new>": 32}')
    assert codes(good, base=tiny_base(tmp_path / "base")) == ["V541"]
    larger = tiny_base(tmp_path / "larger", tensors={"model.embed_tokens.weight": (33, 16)})
    assert codes(good, base=larger) == []


def test_a_broken_adapter_is_not_compared_with_a_base(good: Path, tmp_path: Path) -> None:
    without(Q_D)(good)
    checked = check(good, base=tiny_base(tmp_path / "base"))
    assert [finding.code for finding in checked.findings] == ["V202"]
    assert any("base" in text for text in checked.not_checked)


def test_a_missing_base_fails_the_call(good: Path, tmp_path: Path) -> None:
    with pytest.raises(SurroundingsError, match="no folder"):
        validate([good], base=tmp_path / "nowhere")


# --- every conversion refuses what validate calls an error ---------------------------------------

ERRORS = [
    case
    for case in DEFECTS
    if CATALOG[case.code].severity is Severity.ERROR
    and (case in OPENED or case.code.startswith("V3"))
]
"""All codes except those of patterns, which a conversion evaluates only to size A and B."""


@pytest.mark.parametrize("case", ERRORS, ids=lambda case: case.name)
def test_every_conversion_refuses_an_adapter_with_an_error(
    good: Path, tmp_path: Path, case: Defect
) -> None:
    case.spoil(good)
    assert case.code in codes(good)
    base = BaseOptions(in_features=16, out_features=16, dtype="float32")
    with pytest.raises(CheckpointError):
        strip(good, tmp_path / "stripped")
    with pytest.raises(CheckpointError):
        embed(good, tmp_path / "embedded", base=base)
    assert not (tmp_path / "stripped").exists()
    assert not (tmp_path / "embedded").exists()


def test_migrate_refuses_values_that_it_cannot_repair(good: Path, tmp_path: Path) -> None:
    added({Q_B: np.full((16, 1), np.inf, np.float32)})(good)
    with pytest.raises(CheckpointError, match="V301"):
        migrate(good, tmp_path / "out", to=Mode.ASIS)


# --- many adapters, and where they lie -----------------------------------------------------------


def test_folders_are_searched(tmp_path: Path) -> None:
    for name in ("b/checkpoint-1", "b/checkpoint-2", "a"):
        good_adapter(tmp_path / "tree" / name, revision="main")
    without(Q_D)(tmp_path / "tree" / "b" / "checkpoint-2")
    result = validate([tmp_path / "tree"], recursive=True)
    found = {Path(c.label).name: [f.code for f in c.findings] for c in result.adapters}
    assert found == {"a": [], "checkpoint-1": [], "checkpoint-2": ["V202"]}
    assert result.status == 1


def test_a_folder_without_adapters_fails(tmp_path: Path) -> None:
    with pytest.raises(SurroundingsError, match="no adapter was found in"):
        validate([tmp_path], recursive=True)


def test_the_files_of_an_adapter_stand_for_its_folder_once(good: Path) -> None:
    result = validate([good / CONFIG, good / WEIGHTS, good])
    assert [checked.path for checked in result.adapters] == [str(good)]


def test_an_unavailable_adapter_does_not_stop_the_others(good: Path, tmp_path: Path) -> None:
    result = validate([tmp_path / "nowhere", good])
    assert [checked.failure is None for checked in result.adapters] == [False, True]
    assert result.status == 3


def test_of_a_repo_only_config_and_header_are_read(
    good: Path, tmp_path: Path, server: HubServer
) -> None:
    more = {
        f"base_model.model.x.{n}.vera_lambda_b": np.full(50_000, np.nan, "f4") for n in range(9)
    }
    more |= {f"base_model.model.x.{n}.vera_lambda_d": np.zeros(RANK, "f4") for n in range(9)}
    added({**more, B: np.zeros((50_000, RANK), "f4")})(good)
    files = {path.name: path.read_bytes() for path in good.iterdir()}
    server.add("org/adapter", files)
    access = HubAccess(cache_dir=tmp_path / "cache", progress=False)
    checked = check(Path("org/adapter"), access=access)
    assert checked.failure is None
    assert checked.path is None
    assert checked.label.startswith("org/adapter@")
    assert checked.bytes_read is not None
    assert 0 < checked.bytes_read < 140_000 < len(files[WEIGHTS])
    assert {f.code for f in checked.findings} <= {"V229", "V411"}
    assert any("--deep" in text for text in checked.not_checked)
    deep = check(Path("org/adapter"), access=access, deep=True)
    assert {"V301", "V304"} <= {finding.code for finding in deep.findings}


def test_a_repo_without_an_adapter_is_a_finding(tmp_path: Path, server: HubServer) -> None:
    server.add("org/model", {"config.json": b"{}", "model.safetensors": b""})
    access = HubAccess(cache_dir=tmp_path / "cache", progress=False)
    assert codes(Path("org/model"), access=access) == ["V010"]


# --- selected findings, and the status -----------------------------------------------------------


def test_codes_are_selected_and_ignored_by_prefix(good: Path) -> None:
    all_of(fields({"foo": 1, "base_model_name_or_path": None}), without(Q_D))(good)
    assert codes(good) == ["V110", "V121", "V202"]
    assert codes(good, select=["V1"]) == ["V110", "V121"]
    assert codes(good, select=["V1"], ignore=["V121"]) == ["V110"]
    assert codes(good, ignore=["V2", "V110"]) == ["V121"]


@pytest.mark.parametrize(
    ("code", "reason"),
    [("", "is empty"), ("W1", "not a code"), ("V999", "not a code"), ("v101", "not a code")],
)
def test_an_unknown_code_is_refused(good: Path, code: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        validate([good], select=[code])


def test_the_status_shows_whether_errors_were_found(good: Path, tmp_path: Path) -> None:
    warned = good_adapter(tmp_path / "warned", base_model_name_or_path=None)
    assert validate([good]).status == 0
    assert validate([warned]).status == 0
    assert validate([warned], fail_on=Severity.WARNING).status == 1
    assert Validation((), Severity.ERROR).status == 0


def test_settings_are_read_from_the_project(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[tool.vera-convert.validate]\nignore = ["V122"]\nselect = ["V1"]\nfail-on = "warning"\n'
    )
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "pyproject.toml").write_text('[project]\nname = "other"\n')
    expected = Settings(("V1",), ("V122",), Severity.WARNING)
    assert read_settings(tmp_path / "deep" / "er") == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x = ", "not TOML"),
        ("[tool]\nvera-convert.validate = 1", "not a table"),
        ("[tool.vera-convert.validate]\nignores = []", "unknown keys ignores"),
        ('[tool.vera-convert.validate]\nignore = "V1"', "list of codes"),
        ('[tool.vera-convert.validate]\nignore = ["V9"]', "not a code"),
        ('[tool.vera-convert.validate]\nfail-on = "note"', "error or warning"),
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "pyproject.toml").write_text(text)
    with pytest.raises(UsageError, match=re.escape(reason)):
        read_settings(tmp_path)


def test_an_adapter_with_unselected_errors_does_not_count_as_good(good: Path) -> None:
    without(Q_D)(good)
    checked = check(good, select=["V1"])
    assert checked.findings == ()
    assert checked.has_hidden_errors
    assert any("V202" in text for text in checked.not_checked)


def test_a_single_adapter_can_be_given_without_a_list(good: Path) -> None:
    assert validate(str(good)).passed
    assert validate(good).adapters[0].path == str(good)
    with pytest.raises(UsageError, match="lists of codes"):
        validate(good, select="V1")
    with pytest.raises(UsageError, match=r"banana.*error, warning, note"):
        validate(good, fail_on="banana")


def test_a_target_inside_a_saved_module_is_not_missing(tmp_path: Path) -> None:
    module = "model.layers.1.mlp.down_proj"
    tensors = {f"base_model.model.{module}.weight": np.ones((4, 4), np.float32)}
    targets = ["q_proj", "v_proj", module]
    folder = good_adapter(
        tmp_path / "a", tensors=tensors, target_modules=targets, modules_to_save=[module]
    )
    assert [each.code for each in check(folder, select=["V229"]).findings] == []


def test_the_bias_of_a_saved_module_is_not_missing(tmp_path: Path) -> None:
    head = {"score.weight": (3, 16), "score.bias": (3,)}
    tensors = {
        f"base_model.model.{name}": np.ones(shape, np.float32) for name, shape in head.items()
    }
    fields: dict[str, Any] = {
        "bias": "all",
        "peft_version": "0.21.2",
        "modules_to_save": ["score"],
    }
    folder = good_adapter(tmp_path / "a", tensors=tensors, **fields)
    base = tiny_base(tmp_path / "base", tensors=head)
    found = [each.severity for each in check(folder, select=["V223"], base=base).findings]
    assert Severity.WARNING not in found
