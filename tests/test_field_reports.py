"""Failures that users of other tools reported, each with a test that excludes the failure here.

Most reports are about LoRA or other programs. The tests look for the same kind of failure.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest
from hostile import CASES

HERE = Path(__file__).parent


class Report(NamedTuple):
    """A kind of failure.

    Attributes:
    kind: a description of the failure.
    reported: the public reports.
    seen: the hostile cases and the tests that fail if this package has the failure.
    """

    kind: str
    reported: str
    seen: tuple[str, ...]


REPORTS = (
    # --- names of tensors ---
    Report(
        "an adapter whose names fit no layer of the model is accepted and has no effect",
        "vllm-project/vllm #34186, #34591",
        (
            "test_names_that_do_not_fit_are_refused_with_counts_and_examples",
            "test_a_single_missing_layer_is_refused",
        ),
    ),
    Report(
        "names contain _orig_mod from torch.compile, and no tensor is loaded",
        "MakazhanAlpamys/Soup #335, #351",
        (
            "V215-names_begin_with_orig_mod",
            "V215-names_have_orig_mod_inside",
            "test_a_second_migration_changes_nothing",
        ),
    ),
    Report(
        "names contain the adapter's name, or the adapter lies in a folder of that name",
        "huggingface/peft #2699, #2252",
        (
            "V216-names_end_with_the_adapters",
            "V227-two_adapters_lie_in_one_file",
            "V017-config_lies_in_a_subfolder",
        ),
    ),
    Report(
        "a release of transformers moves layers, and older adapters match no layer",
        "huggingface/transformers #38927, huggingface/peft #2574",
        (
            "test_each_layout_of_llava_is_found_in_each_other_layout",
            "test_an_adapter_with_names_of_two_releases_is_refused",
        ),
    ),
    Report(
        "half of the names were moved, and half of the adapter is applied",
        "illuin-tech/colpali #424, embeddings-benchmark/mteb #4673",
        (
            "V228-half_the_names_lack_the_prefix",
            "test_an_adapter_with_two_layouts_is_refused",
            "test_an_adapter_with_names_of_two_layouts_fits_no_base",
        ),
    ),
    Report(
        "a merged model has names from memory instead of the names of the base's files",
        "huggingface/transformers #38489, #45358",
        (
            "test_shards_keep_their_headers_and_the_index_its_bytes",
            "test_shards_may_lie_in_subfolders",
        ),
    ),
    Report(
        "names lack PEFT's prefix, or A and B lie elsewhere",
        "huggingface/peft #3110",
        (
            "V217-names_lack_the_prefix",
            "V217-vera_a_lies_at_the_top",
            "V225-projections_lie_with_layers_only",
        ),
    ),
    # --- types and numbers ---
    Report(
        "a merged 16-bit model comes out in 32 bits",
        "axolotl #1510, bigcode/starcoder #137",
        ("test_each_tensor_keeps_its_dtype",),
    ),
    Report(
        "a second merge into one folder leaves shards of the first",
        "huggingface/peft #906",
        ("test_only_a_merged_model_is_replaced",),
    ),
    Report(
        "the delta is lost in the rounding of the base, without a warning",
        "OpenBMB/MiniCPM-V #502, meta-pytorch/torchtune #1101",
        (
            "test_a_delta_that_is_lost_in_rounding_is_a_warning",
            "test_a_delta_below_the_last_bit_is_a_warning",
        ),
    ),
    Report(
        "tensors are decoded in the wrong dtype",
        "paiml/aprender #2189",
        (
            "test_each_tensor_keeps_its_own_dtype",
            "V207-one_lambda_is_of_16_bits",
            "V305-values_are_huge",
        ),
    ),
    Report(
        "merged weights are not the base's plus the delta, rounded once",
        "huggingface/peft #1388, unslothai/unsloth #3091, QwenLM/Qwen #1168",
        ("test_a_merge_equals_the_merge_of_peft", "test_a_model_that_is_merged_again_is_found"),
    ),
    Report(
        "a NaN is merged, or found only after weights were changed",
        "huggingface/peft #3682, #3689, #3705, #3710",
        (
            "test_a_trained_value_that_is_not_finite_is_named",
            "V301-a_lambda_is_no_number",
            "lambda_b_ends_in_a_signaling_nan",
            "a_saved_head_holds_nan",
        ),
    ),
    Report(
        "a change of the head changes the tied embedding",
        "huggingface/peft #2018, #2244, ggml-org/llama.cpp #9065",
        ("test_a_tied_head_is_refused", "test_a_tied_head_is_untied"),
    ),
    Report(
        "a trained head is lost, or an undeclared head is used",
        "huggingface/peft #2502, sentence-transformers #3980",
        (
            "test_an_adapter_s_head_replaces_the_base_s_head",
            "V222-a_tasks_head_is_gone",
            "V221-a_norm_is_smuggled_in",
        ),
    ),
    Report(
        "trained biases are dropped, or added instead of replaced",
        "huggingface/peft #3306",
        ("V223-trained_biases_are_gone", "test_trained_biases_replace_the_base_s_biases"),
    ),
    Report(
        "a variant with a third vector is merged as plain VeRA",
        "TonAnh/VeRA-plus, its layer",
        ("V219-a_third_lambda", "V101-config_is_of_vera_plus"),
    ),
    # --- the config ---
    Report(
        "a config of a newer release has fields that stop an older release",
        "huggingface/peft #2275, oobabooga/textgen #6819, modelscope/ms-swift #3141",
        (
            "V110-config_has_a_new_field",
            "hundreds_of_fields_are_unknown",
            "test_metadata_and_unknown_fields_are_kept",
        ),
    ),
    Report(
        "a model's config, or a config without a method, ends in a KeyError",
        "huggingface/peft #1661, #662, #1168",
        (
            "V101-config_is_of_a_model",
            "V101-peft_type_is_null",
            "V101-peft_type_is_a_number",
            "config_is_an_empty_object",
        ),
    ),
    Report(
        "a seed is described as a switch, so the config holds true or a text",
        "modelscope/ms-swift, its parameters",
        (
            "V105-key_is_true",
            "V105-key_is_large",
            "key_is_text",
            "key_is_fractional",
            "test_a_negative_key_is_restored",
        ),
    ),
    Report(
        "a target matches only in some layers, without a warning",
        "huggingface/peft #3658, #1024, #3610",
        ("test_a_target_in_only_some_layers_is_reported",),
    ),
    Report(
        "the same revision is used for the adapter and for the base",
        "huggingface/peft #1567, huggingface/transformers #29849",
        (
            "test_adapters_and_their_base_come_from_the_hub",
            "test_two_revisions_are_refused",
            "revision_is_a_path",
        ),
    ),
    # --- tokenizers and side files ---
    Report(
        "side files are missing after a merge, or rewritten",
        "arcee-ai/mergekit #275, modelscope/ms-swift #566",
        ("test_side_files_are_copied_byte_by_byte", "code_lies_in_the_base"),
    ),
    Report(
        "new tokens have no row in the merged embedding",
        "hiyouga/LlamaFactory #4408, unslothai/unsloth #3428",
        (
            "test_a_token_without_a_row_is_refused_with_both_numbers",
            "a_token_has_five_thousand_digits",
        ),
    ),
    Report(
        "an embedding of another height than the base's fails halfway",
        "axolotl #2277, hiyouga/LlamaFactory #3125, allenai/open-instruct #124, #142",
        ("test_an_embedding_of_another_height_is_refused_with_both_heights",),
    ),
    Report(
        "an adapter in the base's folder is attached to the merged model",
        "huggingface/transformers #43746, #43781",
        ("test_an_adapter_in_the_base_s_folder_is_left_out",),
    ),
    Report(
        "a folder called merged holds an adapter, or an adapter's folder holds a model",
        "a repo of the Hub called merged_model",
        (
            "V016-folder_is_a_models",
            "V014-weights_are_a_models",
            "V015-weights_are_called_as_a_models",
            "test_a_merge_with_check_gives_the_same_model",
        ),
    ),
    # --- shards ---
    Report(
        "shards come without their index",
        "unslothai/unsloth #2355",
        ("test_shards_can_get_another_size", "test_an_index_that_does_not_agree_is_refused"),
    ),
    Report(
        "stray weights beside the shards are loaded or merged as well",
        "unslothai/unsloth-zoo #808, Blaizzy/mlx-vlm #1464, #1827",
        (
            "stray_weights_lie_in_the_base",
            "test_a_weight_file_that_the_index_does_not_name_is_reported_and_not_read",
        ),
    ),
    Report(
        "the index names missing shards, and random values replace the weights",
        "sgl-project/sglang #32279, Neph0s/CoSER #3",
        (
            "test_a_shard_that_is_missing_is_refused",
            "index_names_a_file_that_is_not_there",
            "index_names_a_tensor_of_no_shard",
        ),
    ),
    Report(
        "the index states the number of tensors instead of the number of bytes",
        "axolotl's merge of LoRA",
        ("test_a_wrong_total_size_is_corrected", "index_has_a_size_that_is_text"),
    ),
    # --- the Hub and paths ---
    Report(
        "a forbidden network is used",
        "huggingface/peft #1452, #867, huggingface/transformers #31700",
        ("test_offline_no_socket_is_opened", "test_a_merge_can_be_repeated_offline"),
    ),
    Report(
        "a token is sent only to the adapter's repo and not to the base's, or is logged",
        "huggingface/trl #1825, huggingface/transformers #26488, #25649",
        ("test_the_same_token_goes_to_adapter_and_base", "test_a_token_is_never_printed"),
    ),
    Report(
        "the base is named by a path of a single machine",
        "huggingface/transformers #33922, #32212, huggingface/peft #938",
        (
            "V120-base_is_a_path",
            "V120-base_is_a_path_of_windows",
            "test_a_card_names_no_local_folder_as_the_base",
        ),
    ),
    Report(
        "the wrong file is loaded if there are pickled and other weights",
        "predibase/lorax #51, huggingface/peft #546, huggingface/text-generation-inference #1333",
        ("V012-weights_are_pickled", "V013-pickled_weights_lie_beside"),
    ),
    # --- memory and disk ---
    Report(
        "a merge takes as much memory as the model",
        "huggingface/peft #1939, #2065, hiyouga/LlamaFactory #4711, modelscope/ms-swift #4963",
        ("test_memory_does_not_grow_with_the_model",),
    ),
    Report(
        "a disk that becomes full counts as a success",
        "unslothai/unsloth #732, #534, #1122",
        (
            "test_free_space_is_checked_before_any_write",
            "test_a_full_disk_is_an_error_without_a_second_try",
            "a_side_file_claims_more_than_any_disk",
        ),
    ),
    # --- LoRA ---
    Report(
        "a server refuses an adapter with fully trained modules",
        "ggml-org/llama.cpp #11554, vllm-project/vllm #9280, #21500",
        (
            "test_a_trained_head_is_kept_for_peft_with_a_warning",
            "test_a_head_that_the_engine_drops_is_refused_or_left_out",
            "test_vllm_takes_a_plain_classifier_and_refuses_a_nested_one",
        ),
    ),
    Report(
        "only the server reports a rank above the server's limit",
        "vllm-project/vllm #2847, NVIDIA/TensorRT-LLM #1903, PrimeIntellect-ai/prime-rl #1408",
        (
            "test_a_rank_that_vllm_does_not_serve_is_refused_with_an_exact_remedy",
            "test_without_an_exact_remedy_the_highest_rank_and_its_error_are_proposed",
            "test_the_proposed_max_lora_rank_is_a_value_that_vllm_allows",
        ),
    ),
    Report(
        "a head of several layers becomes a single layer in the LoRA",
        "PEFT's save_as_lora, on RoBERTa",
        (
            "test_peft_gives_the_outputs_of_the_vera_adapter",
            "test_a_trained_head_is_kept_for_peft_with_a_warning",
        ),
    ),
    Report(
        "a layer with fewer outputs than the rank is not converted to a LoRA",
        "PEFT's save_as_lora, on layers with grouped keys",
        (
            "test_a_rank_above_a_layers_outputs_is_exact",
            "test_a_rank_above_both_sides_of_a_layer_is_converted",
        ),
    ),
    # --- quantized bases ---
    Report(
        "the scales of a quantized base are ignored",
        "unslothai/unsloth #4919, unslothai/unsloth-zoo #803",
        (
            "test_without_the_option_an_fp8_base_is_refused_and_nothing_is_written",
            "test_a_merge_equals_the_merge_into_the_16_bit_model",
            "base_config_is_quantized_in_an_odd_way",
        ),
    ),
    # --- A and B ---
    Report(
        "B has fewer rows than a layer has outputs",
        "huggingface/peft #1816, #1954, #1921",
        ("V210-vera_b_is_short", "test_a_layer_wider_than_b_is_named_with_both_sizes"),
    ),
    Report(
        "the same seed gives different bits on another processor",
        "pytorch #155423, #155552, #148247",
        ("test_every_variant_and_rounding_is_recognized", "test_a_single_flipped_bit_is_refused"),
    ),
    Report(
        "A and B were drawn on a GPU, whose generator depends on the card",
        "pytorch #196613, #158398, #97097",
        ("V401-projections_are_random", "test_projections_that_are_no_draw_are_never_stripped"),
    ),
    Report(
        "no field says how A and B were drawn, and the seed gives other matrices",
        "mindspore-lab/mindnlp, its VeRA",
        ("nobody_says_who_dropped_the_projections",),
    ),
    Report(
        "a file saved under ZeRO-3 holds no values",
        "huggingface/peft #2892, #2500, #2450, huggingface/trl #4416, DeepSpeed #7900",
        (
            "V201-all_tensors_are_gone",
            "V205-lambda_b_is_empty",
            "V205-a_saved_head_is_empty",
        ),
    ),
    Report(
        "the shared matrices are stored with every layer",
        "huggingface/peft #3709, #3714",
        (
            "V213-projections_are_repeated",
            "V214-a_layer_has_projections_of_its_own",
            "test_repeated_projections_are_all_dropped",
        ),
    ),
)


@pytest.fixture(scope="module")
def known() -> frozenset[str]:
    """Return the names of every hostile case and of every test."""
    sources = (path.read_text(encoding="utf-8") for path in HERE.rglob("test_*.py"))
    tests = {
        name for text in sources for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)
    }
    return frozenset(tests | {case.name for case in CASES})


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: report.kind)
def test_every_reported_failure_has_a_test(report: Report, known: frozenset[str]) -> None:
    assert report.seen
    assert known >= {*report.seen}
