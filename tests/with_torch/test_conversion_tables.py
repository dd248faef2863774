"""Our renames and the conversion tables of the installed transformers, class by class.

A new release of transformers with further model types fails here, with a list of these types.
"""

from __future__ import annotations

import pytest

pytest.importorskip("transformers.conversion_mapping", reason="needs transformers 5.0 or later")

from conversiontables import Walk, file_text, registry, walk

from vera_convert.base.rename_table import CONVERSIONS_FILE, families
from vera_convert.base.unsupported_layouts import LAYOUTS
from vera_convert.lora.peft_targets import renamed_on_loading

NOT_BUILT = {
    **dict.fromkeys(
        (
            *("BeitForSemanticSegmentation", "ConditionalDetrForSegmentation"),
            *("DetrForSegmentation", "PPChart2TableModel", "xCLIPTextModel", "xCLIPVisionModel"),
            *("Sapiens2ForImageMatting", "Sapiens2ForNormalEstimation", "MtpModel"),
            *("Sapiens2ForPointmapEstimation", "Sapiens2ForPoseEstimation"),
            "Sapiens2ForSemanticSegmentation",
        ),
        "a class whose type is built under another class",
    ),
    **dict.fromkeys(("dots1", "sarvam_mla"), "it renames experts in stacks alone"),
    "legacy": "it renames parameters of norms alone",
    "timm_wrapper": "it needs a library, and puts a prefix before all names",
}
"""Tables of which nothing is built here, and why."""
NOT_FOUND = {
    "ViTMSNForImageClassification": "its classifier lies beside the model, not in it",
}
"""Classes of which some layers are not found, and why."""


@pytest.fixture(scope="module")
def walked() -> Walk:
    return walk()


def test_every_conversion_table_is_known(walked: Walk) -> None:
    ours = set().union(
        *(family.types for family in families()), *(layout.types for layout in LAYOUTS)
    )
    unknown = set(registry()) - walked.met - ours - NOT_BUILT.keys()
    assert sorted(unknown) == []


def test_the_layers_of_every_class_are_found_in_its_files(walked: Walk) -> None:
    wrong = {name: why for name, why in walked.wrong.items() if name not in NOT_FOUND}
    assert wrong == {}, "generate the table again, or add a family"


def test_the_other_tensors_of_every_class_are_found_in_its_files(walked: Walk) -> None:
    assert walked.lost == {}, "generate the table again, or add a family"


def test_the_generated_table_is_that_of_the_installed_release(walked: Walk) -> None:
    assert file_text(walked) == CONVERSIONS_FILE.read_text(encoding="utf-8")


def test_the_layers_that_peft_renames_in_a_lora_are_known(walked: Walk) -> None:
    lost = {
        name: [module for module, is_loaded in loaded.items() if not is_loaded]
        for (name, _), loaded in walked.loras.items()
    }
    known = {
        name: renamed_on_loading([*loaded], model_type)
        for (name, model_type), loaded in walked.loras.items()
    }
    assert known == lost
    assert any(lost.values())
