"""Names with parts that PEFT did not write: one finding names the part; migrate removes the
part.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
from adapterdefects import LAYER, A, B, renamed
from adapters import CONFIG, good_adapter, good_tensors
from bases import tiny_base
from folders import CONFIG_NAME, bytes_by_name
from hypothesis import given
from hypothesis import strategies as st

from vera_convert.adapter.config import VeraConfig
from vera_convert.adapter.opening import examined_folder, open_adapter
from vera_convert.adapter.repairs import repaired, with_proper_names
from vera_convert.adapter.sorting import sort_tensors
from vera_convert.conversion.migration import Mode, migrate
from vera_convert.conversion.strip_embed import embed, strip
from vera_convert.errors import CheckpointError
from vera_convert.files.tensorfile import from_array
from vera_convert.merging.merge import merge

Rename = Callable[[str], str]
PREFIX = "base_model.model."


def around(wrapper: str) -> Rename:
    """Put a wrapper around the whole model only."""
    return lambda name: name.replace(PREFIX, f"{PREFIX}{wrapper}.")


def inside(wrapper: str) -> Rename:
    """Put a wrapper around the whole model and around each attention block."""

    def rename(name: str) -> str:
        return name.replace(PREFIX, f"{PREFIX}{wrapper}.").replace(
            ".self_attn", f".{wrapper}.self_attn"
        )

    return rename


def before(front: str) -> Rename:
    return lambda name: f"{front}.{name}"


def left(adapter: str) -> Rename:
    """Keep the adapter's name before the kind of the vector."""
    return lambda name: name.replace(".vera_lambda", f".{adapter}.vera_lambda")


FOREIGN: dict[str, tuple[Rename, str, str]] = {
    **{
        f"{wrapper} is inside": (inside(wrapper), "V215", wrapper)
        for wrapper in (
            *("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_fpw_module"),
            *("_forward_module", "_module", "_original_module", "_dmp_wrapped_module"),
            *("_torchdynamo_orig_callable", "_dynamo_orig_callable", "_flat_param_wrapped"),
        )
    },
    "another adapter's layer is around each layer": (left("base_layer"), "V215", "base_layer"),
    **{
        f"{wrapper} is around the model": (around(wrapper), "V215", wrapper)
        for wrapper in ("module", "pretrained_model", "wrapped_model", "nncf_module")
    },
    "two wrappers are around the model": (
        around("_fsdp_wrapped_module.module"),
        "V215",
        '_fsdp_wrapped_module" and "module"',
    ),
    **{
        f"{front} is in front": (before(front), "V215", front)
        for front in ("thinker", "module", "pretrained_model", "model", "_fsdp_wrapped_module")
    },
    "a path is in front": (before("policy.actor"), "V215", "policy.actor"),
    "the prefix is doubled": (before("base_model.model"), "V215", "base_model.model."),
    "the prefix is there three times": (
        before("base_model.model.base_model.model"),
        "V215",
        "base_model.model.base_model.model.",
    ),
    "the prefix is doubled around a wrapper": (
        before("base_model.model._fsdp_wrapped_module"),
        "V215",
        "_fsdp_wrapped_module",
    ),
    "a wrapper is inside the prefix": (
        lambda name: name.replace("base_model.", "base_model._orig_mod."),
        "V215",
        "_orig_mod",
    ),
    "the adapter's name is before the vector": (left("default"), "V216", "default"),
    "another adapter's name is before the vector": (left("my_adapter"), "V216", "my_adapter"),
}


@pytest.mark.parametrize(("rename", "code", "part"), FOREIGN.values(), ids=FOREIGN)
def test_the_foreign_part_is_named_and_every_command_refuses_the_adapter(
    rename: Rename, code: str, part: str, tmp_path: Path
) -> None:
    folder = good_adapter(tmp_path / "adapter")
    renamed(rename)(folder)
    base = tiny_base(tmp_path / "base")
    with examined_folder(folder) as found:
        (finding,) = [each for each in found.findings if each.code == code]
        assert f'"{part}' in finding.reason
        assert "migrate --to asis" in finding.rule.remedy
    for act in (
        lambda: strip(folder, tmp_path / "out", base=base),
        lambda: embed(folder, tmp_path / "out", base=base),
        lambda: merge(folder, tmp_path / "out", base=base),
    ):
        with pytest.raises(CheckpointError, match=code):
            act()
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rename", [rename for rename, *_ in FOREIGN.values()], ids=FOREIGN)
def test_migrate_removes_the_foreign_part(rename: Rename, tmp_path: Path) -> None:
    good, folder = good_adapter(tmp_path / "good"), good_adapter(tmp_path / "adapter")
    renamed(rename)(folder)
    done = migrate(folder, tmp_path / "out", to=Mode.ASIS)
    assert done.changes
    assert bytes_by_name(tmp_path / "out") == bytes_by_name(good)


def test_a_head_is_renamed_with_the_layers(tmp_path: Path) -> None:
    head = {"base_model.model.score.weight": np.ones((2, 16), np.float32)}
    good = good_adapter(tmp_path / "good", tensors=head, modules_to_save=["score"])
    folder = good_adapter(tmp_path / "adapter", tensors=head, modules_to_save=["score"])
    renamed(
        lambda name: (
            f"module.{name}".replace("score.", "score.modules_to_save.default.")
            + ".default" * ("vera_" in name)
        )
    )(folder)
    migrate(folder, tmp_path / "out", to=Mode.ASIS)
    assert bytes_by_name(tmp_path / "out") == bytes_by_name(good)


def test_lists_in_the_config_are_corrected_too(tmp_path: Path) -> None:
    path = "_fsdp_wrapped_module.model.layers.{}._checkpoint_wrapped_module.self_attn.{}"
    targets = [path.format(layer, name) for layer in (0, 1) for name in ("q_proj", "v_proj")]
    folder = good_adapter(tmp_path / "adapter", target_modules=targets)
    with pytest.raises(CheckpointError, match=r"V215 adapter_config.json, target_modules"):
        strip(folder, tmp_path / "out")
    done = migrate(folder, tmp_path / "out", to=Mode.ASIS)
    assert done.changes == ("removed wrappers' names from target_modules",)
    document = json.loads((tmp_path / "out" / CONFIG_NAME).read_bytes())
    assert document["target_modules"] == [
        f"model.layers.{layer}.self_attn.{name}"
        for layer in (0, 1)
        for name in ("q_proj", "v_proj")
    ]


# --- good names ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "config"),
    [
        # In transformers, each layer of LeViT has a module of this name.
        ("levit.encoder.stages.0.layers.1.module.queries_keys_values.linear", {}),
        # A class of the user's own code, without a repo on the Hub.
        ("module.layers.0.linear", {"base_model_name_or_path": None}),
        ("wrapped_model.layers.0.linear", {"base_model_name_or_path": None}),
        ("base_model.model.layers.0.linear", {"base_model_name_or_path": None}),
        ("base_layer.0.linear", {}),
        ("encoder._blocks.0._fc", {}),
        ("base_model.layers.0.linear", {}),
        ("thinker.model.layers.0.self_attn.q_proj", {}),
        ("pretrained.model.blocks.0.attn.qkv", {}),
        ("layers.0.adapter.default", {"target_modules": ("default",)}),
        ("modules.0.linear", {}),
    ],
)
def test_a_models_own_names_are_no_wrappers(path: str, config: dict[str, object]) -> None:
    arrays = {
        A: np.ones((4, 16), np.float32),
        B: np.ones((16, 4), np.float32),
        f"{PREFIX}{path}.vera_lambda_b": np.ones(16, np.float32),
        f"{PREFIX}{path}.vera_lambda_d": np.ones(4, np.float32),
    }
    fields = {"base_model_name_or_path": "example/model", "target_modules": ("linear",), **config}
    found = sort_tensors(
        [from_array(name, array) for name, array in arrays.items()],
        VeraConfig(r=4, **fields),  # type: ignore[arg-type]
    )
    assert [*found.layers] == [path]
    assert found.findings == ()


# --- ambiguous names -----------------------------------------------------------------------------


def test_two_different_prefixes_are_refused_and_shown(tmp_path: Path) -> None:
    """The file may hold the adapters of two models whose layers have the same paths."""
    folder = good_adapter(tmp_path / "adapter")
    renamed(lambda name: f"thinker.{name}" if ".0." in name else f"talker.{name}")(folder)
    for act in (strip, embed, lambda one, out: migrate(one, out, to=Mode.ASIS)):
        with pytest.raises(CheckpointError, match="V228") as caught:
            act(folder, tmp_path / "out")
        assert '4 names of vectors begin with "thinker.base_model.model."' in str(caught.value)
        assert '4 names of vectors begin with "talker.base_model.model."' in str(caught.value)
        assert "migrate" not in str(caught.value)


def test_an_adapter_with_half_of_a_prefix_is_refused(tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter")
    renamed(lambda name: name.replace(f"{PREFIX}model.", "base_model."))(folder)
    for act in (strip, lambda one, out: migrate(one, out, to=Mode.ASIS)):
        with pytest.raises(CheckpointError, match="V220"):
            act(folder, tmp_path / "out")


ADDITIONS: tuple[Rename, ...] = (
    *(rename for rename, code, _ in FOREIGN.values() if code == "V215"),
    lambda name: f"{name}.default",
)
MANGLINGS: tuple[Rename, ...] = (
    *ADDITIONS,
    *(left(adapter) for adapter in ("default", "my_adapter")),
    lambda name: name.removeprefix(PREFIX),
    lambda name: around("module")(name).removeprefix(PREFIX),
    lambda name: name.replace("base_model.", ""),
    lambda name: name.replace(f"{PREFIX}model.", "base_model."),
    lambda name: f"thinker.{name}" if ".0." in name else name,
    lambda name: f"_orig_mod.{name}" if ".0." in name else name,
    lambda name: f"{name}.x" if ".0." in name else name,
)
MENDED_BY_MIGRATE = {"V215", "V216", "V217"}


@given(
    st.lists(st.sampled_from(MANGLINGS), max_size=4, unique=True),
    st.sampled_from(["org/name", None]),
)
def test_migrate_does_everything_that_a_remedy_promises(
    manglings: list[Rename], base: str | None
) -> None:
    """No finding proposes migrate if migrate would end with a finding about names again."""
    good = good_tensors()
    names = [reduce(lambda name, mangle: mangle(name), manglings, name) for name in good]
    tensors = [from_array(*pair) for pair in zip(names, good.values(), strict=True)]
    config = VeraConfig(r=4, target_modules=("q_proj", "v_proj"), base_model_name_or_path=base)
    if len(set(names)) != len(names):
        return
    codes = {finding.code for finding in sort_tensors(tensors, config).findings}
    mended, _ = with_proper_names(tensors, config)
    after = {finding.code for finding in sort_tensors(mended, config).findings}
    assert not after or not after <= MENDED_BY_MIGRATE
    if base and codes <= MENDED_BY_MIGRATE and {*manglings} <= {*ADDITIONS}:
        assert {tensor.name for tensor in mended} == good.keys()
        assert not after


def test_repairs_of_good_names_change_nothing(tmp_path: Path) -> None:
    assert CONFIG["base_model_name_or_path"]
    with open_adapter(good_adapter(tmp_path / "adapter"), repair=repaired) as adapter:
        assert {tensor.name for tensor in adapter.tensors} >= {f"{LAYER}q_proj.vera_lambda_b"}
        assert adapter.changes == ()
