"""Defects of the config, the tensors and the projections of the good adapter.

Some defects show when the adapter is opened. Others show only when a command converts the adapter
or compares the adapter with a base. Each defect names the function that finds the defect.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from adapters import HIDDEN, KEY, OUTPUTS, RANK
from bases import tiny_base
from defects import CONFIG, DEFECTS, WEIGHTS, Defect, Spoiler, edit_config, join_weights
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from vera_convert.adapter.fingerprint import METADATA_KEY, from_text, to_text
from vera_convert.adapter.opening import open_adapter
from vera_convert.base.facts import BaseOptions
from vera_convert.conversion.migration import Mode, migrate
from vera_convert.conversion.strip_embed import embed, strip
from vera_convert.draws.generator import Draw, Rounding, Variant, rounded
from vera_convert.errors import CheckpointError
from vera_convert.rules import Finding
from vera_convert.summary import info
from vera_convert.targets.linear import ModelLayers
from vera_convert.targets.matching import adapted
from vera_convert.validation.validate import validate

Finder = Callable[[Path], Iterable[Finding]]
Tensors = dict[str, NDArray[Any]]

LAYER = "base_model.model.model.layers.0.self_attn."
TOKENS = "base_model.model.model.embed_tokens"
Q_B, Q_D, V_B = (
    f"{LAYER}q_proj.vera_lambda_b",
    f"{LAYER}q_proj.vera_lambda_d",
    f"{LAYER}v_proj.vera_lambda_b",
)
A, B = "base_model.vera_A", "base_model.vera_B"
TALL = max(OUTPUTS.values())


def opening(folder: Path) -> Iterable[Finding]:
    """Return the findings of opening the adapter."""
    with open_adapter(folder) as adapter:
        return adapter.findings


@dataclass(frozen=True, slots=True)
class AdapterDefect(Defect):
    """A defect of an adapter, with the function that finds the defect."""

    find: Finder = opening


def adapter_defect(code: str, *, by: Finder | None = None) -> Callable[[Spoiler], Spoiler]:
    """Register a function as a defect that `by` finds; the default is to open the adapter."""

    def register(spoil: Spoiler) -> Spoiler:
        DEFECTS.append(AdapterDefect(code, spoil, find=by or opening))
        return spoil

    return register


def register(
    code: str, cases: Mapping[str, Any], make: Callable[[Any], Spoiler], *, by: Finder | None = None
) -> None:
    """Register one defect for each case of a table, under the name that the table gives."""
    for name, case in cases.items():
        spoil = make(case)
        spoil.__name__ = name
        adapter_defect(code, by=by)(spoil)


# --- functions that find a defect ----------------------------------------------------------------


def running_info(**base: Any) -> Finder:
    """Return a function that returns the findings of `info` on a base."""
    return lambda folder: info(folder, base=_base_options(folder, base)).findings


def stripping(**base: Any) -> Finder:
    """Return a function that returns the findings of `strip` on a base."""
    return lambda folder: strip(folder, _out(folder), base=_base_options(folder, base)).findings


def embedding(**options: Any) -> Finder:
    """Return a function that returns the findings of `embed`, on the good base or with options."""
    return lambda folder: (
        embed(
            folder,
            _out(folder),
            base=BaseOptions(**options) if options else _base_options(folder, {}),
        ).findings
    )


def migrating(folder: Path) -> Iterable[Finding]:
    """Return the findings of `migrate --to asis`."""
    return migrate(folder, _out(folder), to=Mode.ASIS).findings


def stripping_alone(folder: Path) -> Iterable[Finding]:
    """Return the findings of `strip` without a base."""
    return strip(folder, _out(folder)).findings


def validating(*ignore: str, deep: bool = False, **base: Any) -> Finder:
    """Return a function that returns the findings of `validate`, on a base if `base` has fields.

    The findings leave out V122, the missing revision, unless `ignore` names other codes.
    """

    def find(folder: Path) -> Iterable[Finding]:
        options = _base_options(folder, base) if base else None
        (checked,) = validate(
            [folder], base=options, ignore=ignore or ("V122",), deep=deep
        ).adapters
        return checked.findings

    return find


def matching_other_layers(folder: Path) -> Iterable[Finding]:
    """Match the adapter with a model that has no layer of the config's targets."""
    with open_adapter(folder) as adapter:
        adapted(ModelLayers("nothing", "llama", {}), adapter.config)
        return ()


def _out(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-out")


def _base_options(folder: Path, base: Mapping[str, Any]) -> BaseOptions:
    return BaseOptions(str(tiny_base(folder.with_name(f"{folder.name}-base"), **base)))


def codes(found: Finder, folder: Path) -> list[str]:
    """Return the codes of the findings, whether the finder raises or returns the findings."""
    try:
        return [finding.code for finding in found(folder)]
    except CheckpointError as error:
        return [finding.code for finding in error.findings]


# --- functions that make a spoiler ---------------------------------------------------------------


def fields(changes: Mapping[str, object]) -> Spoiler:
    """Return a spoiler that changes fields of the config."""
    return lambda folder: edit_config(
        folder, lambda old: json.dumps({**json.loads(old), **changes}).encode()
    )


def tensors(edit: Callable[[Tensors], Tensors]) -> Spoiler:
    """Return a spoiler that changes the tensors."""

    def spoil(folder: Path) -> None:
        path = folder / WEIGHTS
        with safe_open(path, "np") as file:
            metadata = file.metadata()
        stored = {name: array.copy() for name, array in load_file(path).items()}
        save_file(edit(stored), path, metadata)

    return spoil


def added(more: Mapping[str, NDArray[Any]]) -> Spoiler:
    """Return a spoiler that adds tensors or replaces them."""
    return tensors(lambda stored: {**stored, **more})


def without(*names: str) -> Spoiler:
    """Return a spoiler that drops tensors."""
    return tensors(lambda stored: {k: v for k, v in stored.items() if k not in names})


def renamed(new_name: Callable[[str], str]) -> Spoiler:
    """Return a spoiler that renames tensors."""
    return tensors(lambda stored: {new_name(name): array for name, array in stored.items()})


def all_of(*spoilers: Spoiler) -> Spoiler:
    """Return a spoiler that runs all of these spoilers, in this order."""

    def spoil(folder: Path) -> None:
        for each in spoilers:
            each(folder)

    return spoil


def as_it_is(_: object) -> Spoiler:
    """Return a spoiler that changes nothing: the defect lies in the base or the options."""
    return all_of()


def drawn(
    variant: Variant = Variant.FLOAT32_FUSED,
    *,
    key: int = KEY,
    width: int = HIDDEN,
    height: int = TALL,
    rounding: Rounding = Rounding.NONE,
    kept: int | None = None,
) -> Spoiler:
    """Return a spoiler that stores A and B of another draw; `kept` limits the columns of A."""
    pair = Draw(variant, key=key, rank=RANK, in_features=width, out_features=height).matrices()
    first, second = (rounded(matrix, rounding) for matrix in pair)
    dtype = np.float64 if variant.dtype == np.float64 else np.float32
    return added({A: first[:, :kept].astype(dtype).copy(), B: second.astype(dtype)})


def stripped(folder: Path, *, accept_change: bool = False) -> None:
    """Strip the good adapter with our own command, which writes a fingerprint."""
    strip(folder, _out(folder), base=BaseOptions(dtype="float32"), accept_change=accept_change)
    for name in (CONFIG, WEIGHTS):
        (_out(folder) / name).replace(folder / name)
        (_out(folder) / name).unlink(missing_ok=True)
    _out(folder).rmdir()


bare = all_of(without(A, B), fields({"save_projection": False}))
"""Strip the good adapter as PEFT does, which leaves no record of A and B."""


def fingerprint(**changes: Any) -> Spoiler:
    """Return a spoiler that strips the adapter and edits its fingerprint."""

    def spoil(folder: Path) -> None:
        stripped(folder)
        with safe_open(folder / WEIGHTS, "np") as file:
            metadata = file.metadata()
        edited = replace(from_text(metadata[METADATA_KEY], place="weights"), **changes)
        metadata[METADATA_KEY] = to_text(edited)
        save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata)

    return spoil


def _zeros(*shape: int, dtype: Any = np.float32) -> NDArray[Any]:
    return np.zeros(shape, dtype)


# --- V1: config ----------------------------------------------------------------------------------

register(
    "V101",
    {
        "config_is_of_lora": {"peft_type": "LORA"},
        "config_is_of_pvera": {"peft_type": "PVERA"},
        "peft_type_is_in_small_letters": {"peft_type": "vera"},
        "peft_type_is_null": {"peft_type": None},
        "peft_type_is_a_number": {"peft_type": 1},
    },
    fields,
)


def _config_is(document: object) -> Spoiler:
    return lambda folder: edit_config(folder, lambda _: json.dumps(document).encode())


register("V101", {"config_is_of_a_model": {"model_type": "llama", "hidden_size": 16}}, _config_is)
register("V102", {"config_is_a_list": [], "config_is_a_text": "VERA"}, _config_is)
register("V103", {"rank_is_a_text": {"r": "4"}, "flag_is_a_number": {"save_projection": 1}}, fields)
register("V104", {"rank_is_zero": {"r": 0}, "dropout_is_above_one": {"vera_dropout": 2}}, fields)
register(
    "V105",
    {"key_is_true": {"projection_prng_key": True}, "key_is_large": {"projection_prng_key": 2**64}},
    fields,
)
register("V106", {"bias_is_unheard_of": {"bias": "some"}}, fields)
register("V107", {"layers_pattern_stands_alone": {"layers_pattern": "layers"}}, fields)
register("V110", {"config_has_a_new_field": {"foo_config": None}}, fields)
register("V130", {"targets_are_no_pattern": {"target_modules": "("}}, fields, by=stripping())
register(
    "V131",
    {"targets_take_for_ever": {"target_modules": r"([\w.]+)+\d\d"}},
    fields,
    by=stripping(tensors={f"{'long_name_' * 6}.weight": (16, 16)}),
)
register("V132", {"targets_match_nothing": {}}, fields, by=matching_other_layers)
register("V132", {"targets_are_misspelled": {"target_modules": ["w_proj"]}}, fields, by=stripping())
register(
    "V132",
    {"targets_match_no_layer_of_a_base": {"target_modules": ["w_proj"]}},
    fields,
    by=validating(tensors={"further.weight": (8, 8)}),
)
register(
    "V133",
    {"targets_are_null_on_a_new_model": {"target_modules": None}},
    fields,
    by=stripping(config={"model_type": "new"}),
)

# --- V2: tensors ---------------------------------------------------------------------------------


@adapter_defect("V201")
def all_lambdas_are_gone(folder: Path) -> None:
    tensors(lambda stored: {A: stored[A], B: stored[B]})(folder)


@adapter_defect("V201")
def all_tensors_are_gone(folder: Path) -> None:
    fields({"save_projection": False})(folder)
    join_weights(folder, {"__metadata__": {"format": "pt"}}, b"")


register("V202", {"lambda_b_is_gone": Q_B, "lambda_d_is_gone": Q_D}, without)
register(
    "V203",
    {
        "lambda_b_is_a_scalar": {Q_B: np.array(1, np.float32)},
        "lambda_b_is_a_row": {Q_B: _zeros(1, 16)},
        "lambda_d_is_a_block": {Q_D: _zeros(4, 1, 1)},
    },
    added,
)
register(
    "V204", {"lambda_d_is_long": {Q_D: _zeros(5)}, "lambda_d_is_short": {Q_D: _zeros(3)}}, added
)
register(
    "V204",
    {"rank_is_another": {"r": 5, "save_projection": False}},
    lambda change: all_of(fields(change), without(A, B)),
)
register(
    "V205",
    {
        "lambda_b_is_empty": {Q_B: _zeros(0)},
        "lambda_d_is_empty": {Q_D: _zeros(0)},
        "vera_a_is_empty": {A: _zeros(0)},
    },
    added,
)
register(
    "V205",
    {"a_saved_head_is_empty": {"base_model.model.score.weight": _zeros(0)}},
    lambda more: all_of(added(more), fields({"modules_to_save": ["score"]})),
)
register(
    "V206",
    {
        "lambda_b_is_of_integers": {Q_B: _zeros(16, dtype=np.int32)},
        "vera_a_is_of_eight_bits": {A: _zeros(RANK, HIDDEN, dtype=ml_dtypes.float8_e5m2)},
    },
    added,
)
register("V207", {"one_lambda_is_of_16_bits": {Q_B: np.ones(16, np.float16)}}, added)
register("V208", {"vera_a_alone_is_gone": A, "vera_b_alone_is_gone": B}, without)
register(
    "V209",
    {
        "vera_a_has_a_row_too_many": {A: _zeros(RANK + 1, HIDDEN)},
        "vera_a_lies_on_its_side": {A: _zeros(HIDDEN, RANK)},
        "vera_a_is_flat": {A: _zeros(RANK * HIDDEN)},
        "vera_b_lies_on_its_side": {B: _zeros(RANK, TALL)},
    },
    added,
)
register("V210", {"vera_b_is_short": {B: _zeros(TALL - 1, RANK)}}, added)
register("V211", {"promised_projections_are_gone": (A, B)}, lambda names: without(*names))
register("V212", {"projections_are_denied": {"save_projection": False}}, fields)


def _copies(change: float) -> Spoiler:
    def copy(stored: Tensors) -> Tensors:
        return {
            **stored,
            f"{LAYER}q_proj.vera_A": stored[A].copy(),
            f"{LAYER}v_proj.vera_A": stored[A] + np.float32(change),
        }

    return tensors(copy)


register("V213", {"projections_are_repeated": 0.0}, _copies)
register("V214", {"a_layer_has_projections_of_its_own": 1.0}, _copies)
register(
    "V215",
    {
        "names_begin_with_orig_mod": lambda name: f"_orig_mod.{name}",
        "names_have_orig_mod_inside": lambda name: name.replace(
            "base_model.model.", "base_model.model._orig_mod."
        ),
    },
    renamed,
)
register("V216", {"names_end_with_the_adapters": lambda name: f"{name}.default"}, renamed)
register(
    "V217",
    {
        "names_lack_the_prefix": lambda name: name.replace("base_model.model.", "").replace(
            "base_model.", ""
        ),
        "vera_a_lies_at_the_top": lambda name: name.replace("base_model.vera", "vera"),
    },
    renamed,
)
register(
    "V218",
    {"a_lambda_is_a_column": {Q_B: _zeros(16, 1)}, "lambda_d_is_a_column": {Q_D: _zeros(4, 1)}},
    added,
)
register(
    "V219",
    {
        "a_third_lambda": {f"{LAYER}q_proj.vera_lambda_c": _zeros(4)},
        "a_third_matrix": {"base_model.vera_C": _zeros(4, 4)},
        "a_tensor_of_pvera": {f"{LAYER}q_proj.pvera_lambda_d": _zeros(4)},
    },
    added,
)
register(
    "V220",
    {
        "a_tensor_of_lora": {f"{LAYER}q_proj.lora_A.weight": _zeros(4, 16)},
        "an_adapted_head_of_peft_0_12": {
            "base_model.model.score.modules_to_save.weight": _zeros(4, 16)
        },
        "a_lambda_of_no_layer": {"base_model.model.vera_lambda_b": _zeros(4)},
        "a_lambda_with_more_behind_it": {f"{LAYER}q_proj.vera_lambda_b.default.more": _zeros(4)},
        "a_tensor_of_something_else": {"optimizer.step": _zeros(1)},
    },
    added,
)
register(
    "V221",
    {
        "a_weight_is_smuggled_in": {f"{LAYER}o_proj.weight": _zeros(16, 16)},
        "an_adapted_weight_is_smuggled_in": {f"{LAYER}q_proj.base_layer.weight": _zeros(16, 16)},
        "a_norm_is_smuggled_in": {"base_model.model.model.norm.weight": _zeros(16)},
        "a_bias_is_smuggled_in": {f"{LAYER}q_proj.base_layer.bias": _zeros(16)},
    },
    added,
)
register(
    "V222",
    {
        "a_saved_module_is_gone": {"modules_to_save": ["score"]},
        "a_tasks_head_is_gone": {
            "task_type": "SEQ_CLS",
            "modules_to_save": ["classifier", "score"],
        },
    },
    fields,
)
register("V223", {"trained_biases_are_gone": {"bias": "all", "peft_version": "0.20.0"}}, fields)
register(
    "V224",
    {"a_name_is_there_twice": {f"{Q_B}.default": _zeros(16)}},
    added,
    by=migrating,
)
register(
    "V225",
    {
        "projections_lie_with_layers_only": lambda name: name.replace(
            "base_model.vera", f"{LAYER}q_proj.vera"
        )
    },
    renamed,
)
register(
    "V226",
    {"a_target_is_missing_in_one_layer": (V_B, V_B.replace("_b", "_d"))},
    lambda names: without(*names),
    by=validating(),
)
register(
    "V227",
    {"two_adapters_lie_in_one_file": lambda name: f"{name}.{'one' if '.0.' in name else 'two'}"},
    renamed,
)
register(
    "V228",
    {
        "half_the_names_lack_the_prefix": lambda name: name.replace(
            "base_model.model.model.layers.1", "model.layers.1"
        )
    },
    renamed,
)

# --- V4: projections -----------------------------------------------------------------------------


def _flipped(name: str) -> Spoiler:
    def flip(stored: Tensors) -> Tensors:
        stored[name].view(np.uint32)[-1, -1] ^= 1
        return stored

    return tensors(flip)


register(
    "V401",
    {
        "projections_are_random": {
            A: np.random.default_rng(1).normal(size=(RANK, HIDDEN)).astype(np.float32)
        }
    },
    added,
    by=stripping(),
)
register(
    "V401",
    {"a_bit_of_vera_a_is_flipped": A, "a_bit_of_vera_b_is_flipped": B},
    _flipped,
    by=stripping(),
)
register(
    "V402",
    {"the_key_was_edited": {"projection_prng_key": KEY + 1}},
    fields,
    by=stripping(),
)
register(
    "V403",
    {
        "drawn_without_fused_multiply_add": Variant.FLOAT32_SEPARATE,
        "drawn_under_float64": Variant.FLOAT64_FUSED,
        "drawn_under_bfloat16_before_2_12": Variant.BFLOAT16_2_11,
        "drawn_under_float16_since_2_12": Variant.FLOAT16_2_12_FUSED,
    },
    drawn,
    by=stripping(),
)
register(
    "V403",
    {
        "drawn_for_a_wider_model": {"width": 24, "kept": 16},
        "rounded_for_another_base": {"rounding": Rounding.BF16},
    },
    lambda case: drawn(**case),
    by=stripping(),
)
register("V403", {"nothing_is_rounded_for_the_base": ()}, as_it_is, by=stripping(dtype="bfloat16"))
register(
    "V403",
    {"nothing_is_rounded_for_a_base_of_two_types": ()},
    as_it_is,
    by=stripping(dtypes={"layers.0": "bfloat16", "layers.1": "float16"}),
)
register("V404", {"no_base_is_known": ()}, as_it_is, by=stripping_alone)
register(
    "V405",
    {"vera_b_has_more_rows_than_told": {"height": 20}},
    lambda case: drawn(**case),
    by=stripping_alone,
)
register(
    "V406",
    {"denied_projections_are_others": drawn(key=KEY + 1)},
    lambda spoil: all_of(spoil, fields({"save_projection": False})),
    by=stripping(),
)
register(
    "V407",
    {
        "fingerprint_is_no_json": {METADATA_KEY: "{"},
        "fingerprint_is_of_tomorrow": {METADATA_KEY: '{"format":2}'},
    },
    lambda metadata: (
        lambda folder: save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata)
    ),
)
register(
    "V408",
    {"fingerprint_has_another_key": {"key": 8}, "fingerprint_has_another_rank": {"rank": 5}},
    lambda case: fingerprint(**case),
)
register(
    "V408",
    {"fingerprint_is_of_another_base": {"in_features": 20, "drawn_in_features": 20}},
    lambda case: fingerprint(**case),
    by=embedding(),
)
register(
    "V409",
    {
        "fingerprint_has_another_hash": {"sha256_B": "0" * 64},
        "fingerprint_has_another_variant": {"variant": Variant.FLOAT32_SEPARATE},
        "fingerprint_has_another_dtype": {"dtype": "F64"},
    },
    lambda case: fingerprint(**case),
    by=embedding(),
)
register("V410", {"nothing_records_the_projections": bare}, lambda spoil: spoil, by=embedding())
register(
    "V411",
    {"config_matches_more_layers": {"target_modules": ["q_proj", "v_proj", "o_proj"]}},
    fields,
    by=stripping(),
)
register(
    "V412",
    {"rows_are_too_few": bare},
    lambda spoil: spoil,
    by=embedding(in_features=16, out_features=8, dtype="float32"),
)
register(
    "V412",
    {"config_matches_narrower_layers": {"target_modules": ["v_proj"]}},
    fields,
    by=stripping(),
)
register(
    "V413",
    {"projections_would_fill_a_disk": bare},
    lambda spoil: spoil,
    by=embedding(in_features=1 << 31, out_features=16, dtype="float32"),
)
register("V414", {"old_peft_would_draw_others": Variant.FLOAT32_SEPARATE}, drawn, by=running_info())
register(
    "V415",
    {"base_is_of_two_16_bit_types": ()},
    as_it_is,
    by=running_info(dtypes={"layers.0": "bfloat16", "layers.1": "float16"}),
)
register("V415", {"base_is_quantized": ()}, as_it_is, by=running_info(dtypes={"q_proj": "int8"}))
register(
    "V416", {"stored_for_a_wider_model": {"width": 24}}, lambda case: drawn(**case), by=embedding()
)
register(
    "V417",
    {"projections_are_of_two_types": {"rounding": Rounding.FP16}},
    lambda case: all_of(
        drawn(**case), tensors(lambda stored: {**stored, B: stored[B].astype(np.float16)})
    ),
    by=stripping(dtype="float16"),
)
register(
    "V421",
    {"a_layer_that_decides_the_dims_is_missing": bare},
    lambda spoil: spoil,
    by=running_info(
        config={"model_type": "llama", "num_hidden_layers": 3},
        tensors={"model.layers.2.self_attn.q_proj.weight": (40, 48)},
    ),
)

# --- defects that only `validate` looks for ------------------------------------------------------


@adapter_defect("V007", by=validating())
def a_side_file_links_to_nowhere(folder: Path) -> None:
    (folder / "notes.txt").symlink_to(folder / "gone.txt")


@adapter_defect("V014")
def weights_are_a_models(folder: Path) -> None:
    names = ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight")
    tensors(lambda _: {name: _zeros(16, 16) for name in names})(folder)


@adapter_defect("V015")
def weights_are_called_as_a_models(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "model.safetensors")


@adapter_defect("V016", by=validating())
def folder_to_check_is_a_models(folder: Path) -> None:
    folder_is_a_models(folder)


@adapter_defect("V016")
def folder_is_a_models(folder: Path) -> None:
    (folder / CONFIG).unlink()
    (folder / WEIGHTS).rename(folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')


@adapter_defect("V018", by=validating())
def states_of_training_lie_beside_it(folder: Path) -> None:
    for name in ("optimizer.pt", "rng_state.pth", "scheduler.pt", "training_args.bin"):
        (folder / name).write_bytes(b"state")


@adapter_defect("V018", by=validating())
def logs_of_training_lie_beside_it(folder: Path) -> None:
    (folder / "runs" / "host").mkdir(parents=True)
    (folder / "runs" / "host" / "events.out.tfevents.1.host.2.0").write_bytes(b"log")
    (folder / "trainer_state.json").write_text("{}")


@adapter_defect("V019", by=validating())
def marks_of_a_download_lie_beside_it(folder: Path) -> None:
    for name in (CONFIG, WEIGHTS):
        (folder / f"{name}:Zone.Identifier").write_text("[ZoneTransfer]")


@adapter_defect("V019", by=validating())
def another_models_weights_lie_beside_it(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"weights")


@adapter_defect("V008", by=validating())
def weights_that_peft_does_not_read_lie_beside_it(folder: Path) -> None:
    (folder / "new_embeddings.safetensors").write_bytes(b"weights")


register(
    "V101",
    {
        "config_is_of_paddle_nlp": {"vera_alpha": 8},
        "config_is_of_mlora": {"peft_type": "VeRA", "lora_alpha": 16},
        "config_is_of_vera_plus": {"c_initial": 1.0},
    },
    fields,
)
register(
    "V111",
    {"layers_pattern_is_a_list": {"layers_to_transform": [0, 1], "layers_pattern": ["layers"]}},
    fields,
    by=validating(),
)


@adapter_defect("V111", by=validating())
def the_only_layer_is_zero(folder: Path) -> None:
    fields({"layers_to_transform": 0, "layers_pattern": "layers"})(folder)
    tensors(lambda stored: {k: v for k, v in stored.items() if ".layers.1." not in k})(folder)


register(
    "V120",
    {"base_is_a_path": "/data/llama", "base_is_a_path_of_windows": "C:\\llama"},
    lambda name: fields({"base_model_name_or_path": name}),
    by=validating(),
)
register(
    "V121",
    {"base_has_no_name": None, "base_has_an_empty_name": ""},
    lambda name: fields({"base_model_name_or_path": name}),
    by=validating(),
)
register("V123", {"revision_leads_out": {"revision": "../../x"}}, fields, by=validating("V122"))
register("V122", {"base_has_no_revision": {}}, fields, by=validating("V121"))
register(
    "V134",
    {"layers_lie_at_the_top": None},
    lambda _: all_of(
        fields({"layers_to_transform": [0, 1], "layers_pattern": "layers"}),
        renamed(lambda name: name.replace("base_model.model.model.", "base_model.model.")),
    ),
    by=validating(),
)
register(
    "V229",
    {"a_target_is_not_stored": {"target_modules": ["q_proj", "v_proj", "k_proj"]}},
    fields,
    by=validating(),
)
register(
    "V301",
    {"a_lambda_is_no_number": np.nan, "a_lambda_is_infinite": -np.inf},
    lambda value: added({Q_D: np.array([1, 2, value, 4], np.float32)}),
    by=validating(),
)


def as_float16(folder: Path) -> None:
    """Store all tensors in float16, with A and B rounded as for a float16 base."""
    drawn(rounding=Rounding.FP16)(folder)
    tensors(lambda stored: {k: v.astype(np.float16) for k, v in stored.items()})(folder)


register(
    "V302",
    {"the_vectors_overflow_float16": 60000, "their_products_overflow_float16": 700},
    lambda value: all_of(
        as_float16, added({Q_B: np.full(16, value, "f2"), Q_D: np.full(4, value, "f2")})
    ),
    by=validating("V122", "V418"),
)


def lambdas(which: str, value: float, *, layer: str = "") -> Spoiler:
    """Return a spoiler that fills one kind of vector with a value, in the layers of `layer`."""

    def filled(name: str, array: NDArray[Any]) -> NDArray[Any]:
        return np.full_like(array, value) if name.endswith(which) and layer in name else array

    return tensors(lambda stored: {k: filled(k, v) for k, v in stored.items()})


register(
    "V303",
    {"no_layer_was_trained": "lambda_b", "every_lambda_d_is_zero": "lambda_d"},
    lambda which: lambdas(which, 0),
    by=validating(),
)
register(
    "V305",
    {"values_are_huge": 1e30, "values_are_tiny": 1e-40},
    lambda value: added({Q_B: np.full(16, value, np.float32)}),
    by=validating(),
)
register(
    "V306",
    {"a_layer_was_not_trained": ".layers.1."},
    lambda layer: lambdas("lambda_b", 0, layer=layer),
    by=validating(),
)
register(
    "V414",
    {
        "projections_are_seen_to_be_random": tensors(
            lambda stored: {**stored, A: stored[A] + 1, B: stored[B] + 1}
        ),
        "projections_are_seen_to_be_of_another_key": drawn(key=KEY + 1),
        "projections_are_seen_to_be_of_another_width": drawn(width=HIDDEN + 1, kept=HIDDEN),
    },
    all_of,
    by=validating("V122", "V304"),
)
register(
    "V414",
    {"projections_are_not_rounded_as_by_this_base": None},
    as_it_is,
    by=validating(dtype="bfloat16"),
)
register(
    "V418", {"projections_are_rounded": Rounding.BF16}, lambda r: drawn(rounding=r), by=validating()
)
register(
    "V419",
    {"what_was_dropped_is_drawn_otherwise": Variant.FLOAT32_SEPARATE},
    lambda variant: all_of(drawn(variant), partial(stripped, accept_change=True)),
    by=validating(),
)
register(
    "V526",
    {"the_head_is_the_embedding": "base_model.model.lm_head"},
    lambda module: all_of(
        fields({"target_modules": ["q_proj", "v_proj", "lm_head"]}),
        drawn(height=32),
        added(
            {
                f"{module}.vera_lambda_b": np.ones(32, np.float32),
                f"{module}.vera_lambda_d": np.ones(RANK, np.float32),
            }
        ),
    ),
    by=validating(
        tensors={"lm_head.weight": None},
        config={"model_type": "llama", "tie_word_embeddings": True},
    ),
)
register(
    "V527",
    {"layers_are_said_to_be_conv1d": {"fan_in_fan_out": True}},
    fields,
    by=validating(dtype="float32"),
)
register(
    "V546",
    {"names_lack_the_base_prefix": lambda name: name.replace(".model.model.", ".model.")},
    renamed,
    by=validating(dtype="float32"),
)
register(
    "V556",
    {"the_targets_are_quantized": None},
    as_it_is,
    by=validating(
        "V122",
        "V415",
        dtypes={"self_attn": "int8"},
        config={"model_type": "llama", "quantization_config": {"quant_method": "bitsandbytes"}},
    ),
)


def _with_a_bit_flipped(stored: Tensors) -> Tensors:
    stored[B].view(np.uint32)[3, 2] ^= 1
    return stored


register(
    "V420",
    {"a_bit_of_the_projections_is_flipped": _with_a_bit_flipped},
    tensors,
    by=validating(),
)
register(
    "V231",
    {"an_embedding_is_stored": {"base_model.model.model.embed_tokens.weight": _zeros(32, 16)}},
    added,
    by=validating(),
)
register(
    "V232",
    {
        "rows_of_tokens_are_stored": {
            f"{TOKENS}.token_adapter.trainable_tokens_delta": _zeros(2, 16)
        },
        "rows_of_tokens_are_stored_alone": {f"{TOKENS}.trainable_tokens_delta": _zeros(2, 16)},
    },
    added,
)
register(
    "V233",
    {
        "a_saved_module_lies_inside_another": {
            "base_model.model.classifier.dense.weight": _zeros(2, 2),
            "base_model.model.classifier.dense.norm.weight": _zeros(2),
        },
        "a_name_ends_both_paths": {
            "base_model.model.dense.LayerNorm.weight": _zeros(2),
            "base_model.model.dense.adense.weight": _zeros(2, 2),
        },
    },
    lambda more: all_of(added(more), fields({"modules_to_save": ["classifier", "dense"]})),
)
