"""target_modules of a LoRA: names that match the converted modules and no other modules."""

from __future__ import annotations

import numpy as np
import pytest

from vera_convert.adapter.config import VeraConfig
from vera_convert.lora.forms import target_names

LLAMA = [
    f"model.layers.{n}.{name}"
    for n in range(12)
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "input_layernorm")
] + ["lm_head", "model.embed_tokens"]
NESTED = [
    "a.to_out.0",
    "a.to_out.1",
    "b.to_out.0",
    "b.to_out.1",
    "x.dense",
    "x.output.dense",
]


def matched(names: list[str], modules: list[str]) -> set[str]:
    """Return the modules that PEFT matches with a list of names."""
    return {
        module
        for module in modules
        if any(module == name or module.endswith(f".{name}") for name in names)
    }


def names_for(wanted: list[str], modules: list[str], **config: object) -> tuple[list[str], bool]:
    fields = {"target_modules": None, **config}
    return target_names(wanted, modules, VeraConfig(**fields))  # type: ignore[arg-type]


def test_the_config_s_own_list_is_kept_if_it_matches_no_other_module() -> None:
    wanted = [name for name in LLAMA if "q_proj" in name]
    assert names_for(wanted, LLAMA, target_modules=("self_attn.q_proj",)) == (
        ["self_attn.q_proj"],
        False,
    )


def test_a_list_that_matches_other_modules_is_narrowed() -> None:
    wanted = [name for name in LLAMA if "q_proj" in name and ".3." in name]
    found, limits = names_for(wanted, LLAMA, target_modules=("q_proj",))
    assert found == ["layers.3.self_attn.q_proj"]
    assert matched(found, LLAMA) == {*wanted}
    assert not limits


@pytest.mark.parametrize("limit", [3, (0, 5)])
def test_the_config_s_layers_to_transform_are_kept(limit: object) -> None:
    numbers = limit if isinstance(limit, tuple) else (limit,)
    wanted = [f"model.layers.{n}.self_attn.q_proj" for n in numbers]
    found = names_for(wanted, LLAMA, target_modules=("q_proj",), layers_to_transform=limit)
    assert found == (["q_proj"], True)


def test_an_index_is_never_a_name_without_its_list() -> None:
    found, _ = names_for(["a.to_out.0", "b.to_out.0"], NESTED)
    assert found == ["to_out.0"]


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("modules", [LLAMA, NESTED], ids=["llama", "nested"])
def test_the_names_match_exactly_the_converted_modules(seed: int, modules: list[str]) -> None:
    chosen = np.random.default_rng(seed).random(len(modules)) < 0.4
    wanted = [name for name, taken in zip(modules, chosen, strict=True) if taken]
    if wanted:
        found, _ = names_for(wanted, modules)
        assert matched(found, modules) == {*wanted}


def test_no_name_matches_a_module_of_several_layers() -> None:
    wanted = ["model.weighting.layers.0", "decoder.layers.3.self_attn.q_proj"]
    modules = [*LLAMA, *wanted]
    found, _ = names_for(wanted, modules)
    containers = {name.rpartition(".self_attn")[0] for name in modules if ".self_attn" in name}
    assert matched(found, [*modules, *containers]) == {*wanted}


def test_names_of_the_config_that_match_no_other_module_are_kept() -> None:
    wanted = [name for name in LLAMA if "up_proj" in name or "layers.3.self_attn.v_proj" in name]
    found, _ = names_for(wanted, LLAMA, target_modules=("mlp.up_proj", "v_proj"))
    assert found == ["layers.3.self_attn.v_proj", "mlp.up_proj"]


def test_full_names_are_written_if_the_model_is_not_known() -> None:
    assert names_for(LLAMA[:2], [], target_modules=("q_proj", "v_proj"))[0] == LLAMA[:2]


def test_a_hundred_thousand_modules_take_no_quadratic_time() -> None:
    modules = [f"m.layers.{n}.experts.{k}.up" for n in range(100) for k in range(500)]
    others = [f"m.layers.{n}.experts.{k}.down" for n in range(100) for k in range(500)]
    assert names_for(modules, modules + others)[0] == ["up"]
